//! Writes the shards of each group. Groups do not depend on each other, so that each thread takes
//! one.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use forebay::format::OpenOptions;
use forebay::{Error, ErrorKind};
use indicatif::ProgressBar;

use super::content::Content;
use super::cursor::SourceCursor;
use super::fields::CarriedField;
use super::groups::SourceGroup;
use super::manifest::{Done, Manifest};
use super::options::ShardForm;
use super::output::PartialShard;
use super::source::SourceShard;
use crate::report::{names, number_of};

/// Number of rows of a plain column taken at once.
const PLAIN_ROWS: usize = 1 << 16;

/// The state that the threads share.
pub(super) struct Rewriting<'a> {
    pub(super) groups: &'a [SourceGroup],
    pub(super) sources: &'a [SourceShard],
    pub(super) target: &'a Path,
    pub(super) names: &'a ShardNames,
    pub(super) column: &'a str,
    /// The further columns that are copied.
    pub(super) fields: &'a [CarriedField],
    pub(super) shape: ShardForm,
    /// The ids around documents, for formats without ends of documents.
    pub(super) specials: (Option<u32>, Option<u32>),
    pub(super) open: OpenOptions,
    pub(super) manifest: &'a Manifest,
    pub(super) bar: &'a ProgressBar,
    /// Set by the first failure, so that other threads stop soon. No other memory depends on it.
    pub(super) stop: AtomicBool,
}

/// The names of shards. Folders list them in the order of the shards.
pub(super) struct ShardNames {
    group_digits: usize,
    shard_digits: usize,
    suffix: String,
}

impl ShardNames {
    pub(super) fn new(groups: &[SourceGroup], suffix: String) -> Self {
        let digits = |most: u64| most.max(1).ilog10() as usize + 1;
        let most_shards = groups.iter().map(|group| group.tokens / group.shard_tokens + 1).max().unwrap_or(1);
        Self { group_digits: digits(groups.len() as u64).max(5), shard_digits: digits(most_shards).max(3), suffix }
    }

    pub(super) fn of(&self, group: usize, shard: u64) -> String {
        let Self { group_digits, shard_digits, suffix } = self;
        format!("tokens-{group:0group_digits$}-{shard:0shard_digits$}.{suffix}")
    }

    /// The group of the shard to which the file `name` belongs.
    pub(super) fn group_of(&self, name: &str) -> Option<usize> {
        name.strip_prefix("tokens-")?.split('-').next()?.parse().ok()
    }

    /// The shards of `group` among `done`, in order. `None` if one of them is missing.
    pub(super) fn complete(
        &self,
        index: usize,
        group: &SourceGroup,
        done: &BTreeMap<String, Done>,
    ) -> Option<Vec<(String, Done)>> {
        let (mut at, mut shards) = ((group.sources.start, 0), Vec::new());
        while at != (group.sources.end, 0) {
            let name = self.of(index, shards.len() as u64);
            let shard = done.get(&name)?.clone();
            at = shard.next;
            shards.push((name, shard));
        }
        Some(shards)
    }
}

/// A shard of the result, and whether an earlier run wrote it.
pub(super) struct WrittenShard {
    pub(super) done: Done,
    pub(super) was_there: bool,
}

impl Rewriting<'_> {
    /// Writes the shards of a group. Turns a panic of a reader into an error.
    pub(super) fn guarded(&self, group: usize) -> forebay::Result<Vec<WrittenShard>> {
        // A damaged file may make a reader panic. The shards of other threads stay.
        let result = catch_unwind(AssertUnwindSafe(|| self.write_group(group))).unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Internal, format!("panic while rewriting {}", self.paths(group))))
        });
        if result.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        result
    }

    /// The paths of a group's sources, in words.
    fn paths(&self, group: usize) -> String {
        names(self.sources[self.groups[group].sources.clone()].iter().map(|source| source.file.path.to_string_lossy()))
    }

    fn write_group(&self, index: usize) -> forebay::Result<Vec<WrittenShard>> {
        let group = &self.groups[index];
        let end = (group.sources.end, 0);
        let cursor = |field| SourceCursor::new(self.sources, field, group.sources.clone(), self.open.io);
        let mut fields: Vec<SourceCursor<'_>> = (0..self.fields.len()).map(|field| cursor(Some(field))).collect();
        let mut cursor = cursor(None);
        let mut shards: Vec<WrittenShard> = Vec::new();
        let mut at = (group.sources.start, 0);
        while at != end && !self.stop.load(Ordering::Relaxed) {
            let name = self.names.of(index, shards.len() as u64);
            let shard = match self.manifest.done.get(&name) {
                Some(done) => WrittenShard { done: done.clone(), was_there: true },
                None => {
                    cursor.seek(at);
                    let Some(done) = self.write_shard(&name, index, &mut cursor, &mut fields, &shards)? else { break };
                    WrittenShard { done, was_there: false }
                }
            };
            at = shard.done.next;
            shards.push(shard);
        }
        Ok(shards)
    }

    /// Adds the values of further column `index` to a document of `tokens` tokens.
    fn add_field(
        &self,
        part: &mut PartialShard,
        index: usize,
        cursor: &mut SourceCursor<'_>,
        tokens: usize,
    ) -> forebay::Result<()> {
        let name = &self.fields[index].name;
        let Some((_, batch)) = cursor.current()? else {
            return Err(Error::data(format!("column `{name}` ends before the tokens")));
        };
        let values = batch.document(batch.next);
        if values.len() != tokens && !self.fields[index].is_per_document() {
            let found = values.len();
            return Err(Error::data(format!(
                "column `{name}` must have a value for each token: expected {tokens}, found {found}"
            )));
        }
        part.field(index, &batch.values, values)?;
        batch.next += 1;
        Ok(())
    }

    /// Writes a shard from the place of `cursor` on. Returns `None` if another thread has failed
    /// meanwhile.
    fn write_shard(
        &self,
        name: &str,
        index: usize,
        cursor: &mut SourceCursor<'_>,
        fields: &mut [SourceCursor<'_>],
        before: &[WrittenShard],
    ) -> forebay::Result<Option<Done>> {
        let group = &self.groups[index];
        let joins = self.shape.joins();
        let plain = group.plain || joins;
        let mut part = PartialShard::create(self.target, name, self.column, plain, self.fields, &self.shape)?;
        // Ids around documents do not count for the size of a shard.
        let (mut shown, mut around) = (0, 0);
        loop {
            if cursor.current()?.is_none() {
                break;
            }
            let place = cursor.place();
            let Some((path, batch)) = cursor.current()? else { break };
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            if group.plain {
                let rows = batch.next..batch.len.min(batch.next + PLAIN_ROWS);
                let added = part.document(|ids| batch.widen(rows.clone(), ids));
                added.map_err(|error| error.at_row(batch.row(rows.start)).at(path))?;
                batch.next = rows.end;
            } else {
                // Empty documents stay in the shard before them, so that the last shard never
                // consists of them.
                let document = batch.document(batch.next);
                if part.tokens() - around >= group.shard_tokens && !document.is_empty() {
                    break;
                }
                let (row, tokens) = (batch.row(batch.next), document.len());
                for (index, field) in fields.iter_mut().enumerate() {
                    field.seek(place);
                    let added = self.add_field(&mut part, index, field, tokens);
                    added.map_err(|error| error.at_row(row).at(path))?;
                }
                let (bos, eos) = if joins && tokens > 0 { self.specials } else { (None, None) };
                around += u64::from(bos.is_some()) + u64::from(eos.is_some());
                let added = part.document(|ids| {
                    ids.extend(bos.map(i64::from));
                    batch.widen(document, ids)?;
                    ids.extend(eos.map(i64::from));
                    Ok(())
                });
                added.map_err(|error| error.at_row(row).at(path))?;
                batch.next += 1;
            }
            if part.tokens() > shown + (1 << 20) {
                self.bar.inc(part.tokens() - shown);
                shown = part.tokens();
            }
        }
        let next = cursor.place();
        self.bar.inc(part.tokens() - shown);
        let (finished, content) = part.finish(&self.open)?;
        if next == (group.sources.end, 0) {
            let sum = |of: fn(&Content) -> u64| {
                before.iter().map(|shard| of(&shard.done.content)).sum::<u64>() + of(&content)
            };
            // Joined documents have no ends, and perhaps ids around them.
            let specials = u64::from(self.specials.0.is_some()) + u64::from(self.specials.1.is_some());
            let added = if joins && !group.plain { specials * group.documents } else { 0 };
            let documents = if joins { group.documents } else { sum(|content| content.documents) };
            let found = (sum(|content| content.tokens) - added.min(sum(|content| content.tokens)), documents);
            if found != (group.tokens, group.documents) {
                return Err(Error::data(format!(
                    "arrow-rs reads {} and {}, but opening found {} and {}, in {}",
                    number_of(found.0, "token"),
                    number_of(found.1, "document"),
                    group.tokens,
                    group.documents,
                    self.paths(index)
                )));
            }
        }
        let done = Done { bytes: finished.bytes, content, next };
        self.manifest.note(name, &done)?;
        finished.publish()?;
        Ok(Some(done))
    }
}
