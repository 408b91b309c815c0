//! Notices of a session: the start and the resuming of passes, and reads that take long.

use super::session::Session;
use crate::notices::{self, Level};
use crate::observe::slow_reads::LONG;
use crate::sync::lock;
use crate::text::{bytes, number_of};

/// Number of names of files or corpora that a notice lists.
const LISTED: usize = 3;

impl Session {
    /// Reports this rank's corpus, position, threads and budget in one line. `does` is the verb of
    /// the sentence.
    pub(super) fn tell(&self, does: &str) {
        let sources = self.opened.sources.list();
        let (epoch, position) = {
            let cursor = lock(&self.cursor);
            (cursor.epoch, cursor.position)
        };
        let data = match self.opened.sources.mixture() {
            Some(_) => format!("a mixture of {}", listed(sources.iter().map(|source| source.name.as_str()))),
            None => listed(self.config.data.iter().map(String::as_str)),
        };
        let shards = number_of(sources.iter().map(|source| source.shards()).sum(), "shard");
        let tokens = number_of(sources.iter().map(|source| source.tokens()).sum(), "token");
        let grouping = &self.grouping;
        notices::add(
            Level::Info,
            format!(
                "rank {} of {} {does} {data} ({shards}, {tokens}) at epoch {epoch}, position {position}, with {} and a memory budget of {}",
                grouping.rank,
                grouping.world_size,
                number_of(self.threads() as u64, "thread"),
                bytes(self.config.memory_budget),
            ),
        );
    }

    /// Reports that a pass begins.
    pub(super) fn tell_pass(&self, epoch: u64, position: u64, steps: u64) {
        let steps = if steps == u64::MAX { "without end".to_owned() } else { number_of(steps, "step") };
        let rank = self.grouping.rank;
        let text = format!("rank {rank} begins a pass at epoch {epoch}, position {position}: {steps}");
        notices::add(Level::Debug, text);
    }

    /// Reports reads that take long while a consumer waits for them.
    pub(super) fn tell_slow_reads(&self) {
        for slow in self.slow_reads.look(LONG) {
            let reader = self.opened.sources.list()[slow.source].reader();
            let path = reader.path_at(slow.token);
            let text = format!("reading `{}` takes long: {:.1} s so far", path.display(), slow.lasts.as_secs_f64());
            notices::add(Level::Warning, text);
        }
    }

    /// Reports a batch that took `seconds`. Its rows begin at `places`: pairs of source and stream
    /// token.
    pub(super) fn tell_slow_batch(&self, seconds: f64, places: impl Iterator<Item = (usize, u64)>) {
        let mut paths: Vec<String> = places
            .map(|(source, token)| self.opened.sources.list()[source].reader().path_at(token).display().to_string())
            .collect();
        paths.dedup();
        let text = format!(
            "reading a batch took {seconds:.1} s; its rows are in {}",
            listed(paths.iter().map(|path| &**path))
        );
        notices::add(Level::Warning, text);
    }
}

/// Lists some names in backticks, and the number of the other names.
fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let shown: Vec<String> = names.iter().take(LISTED).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(LISTED) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
