//! The facts that prove a run.
//!
//! They are the sample in each row, and the entries that every pass writes to its delivery log.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_128;

use super::Loader;
use super::pass::PassRange;
use super::session::Session;
use crate::error::Result;
use crate::loader::sources::{Growth, Orders, RowRead};
use crate::loader::state::{StateValue, refused};
use crate::order::epochs::EpochChain;
use crate::proof::delivery_log::{self, LoggedPass};
use crate::read::ReadMemory;
use crate::settings::environment;
use crate::sync::lock;

/// The sample in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Index of the source. 0 without a mixture.
    pub source: usize,
    /// Epoch of the source.
    pub epoch: u64,
    /// Sequence of that epoch. The number after the last full sequence means the tail.
    pub sequence: u64,
}

impl Loader {
    /// The epochs that passes over `epochs` go through, one after the other, and the sample at each
    /// index.
    pub fn epoch_chain(&self, epochs: Range<u64>) -> (EpochChain, impl FnMut(u64) -> Result<Sample> + use<>) {
        let session = Arc::clone(&self.session);
        let growth = lock(&session.cursor).growth.clone();
        let positions = |epoch| session.positions(&growth, epoch);
        let count = epochs.end.saturating_sub(epochs.start);
        let epochs = EpochChain::new(epochs.start, Some(count), &session.config.skip, growth.changes(), positions);
        let (at, mut orders, mut scratch) = (epochs.clone(), Orders::default(), ReadMemory::default());
        let sample = move |index| {
            let sources = &session.opened.sources;
            let RowRead { source, epoch, sequence, .. } =
                sources.row_read(&growth, &mut orders, at.at(index), &mut scratch)?;
            Ok(Sample { source, epoch, sequence })
        };
        (epochs, sample)
    }

    /// Number of rows that the first `shards` shards of source `source` have, if they are a corpus
    /// of their own.
    pub fn rows_of_first(&self, source: usize, shards: usize) -> u64 {
        self.session.opened.sources.list()[source].reader().layout().extent(shards).rows
    }

    /// Number of tokens by which the rows of an epoch of source `source` begin later in the joined
    /// stream. 0 unless the setting `phase` moves them.
    pub fn phase(&self, source: usize, epoch: u64) -> u64 {
        self.session.opened.sources.phase(source, epoch)
    }

    /// Takes over the history of a corpus that grew, from the `growth` of a state or a delivery
    /// log.
    pub fn assume_growth(&self, text: &str) -> Result<()> {
        let shards = self.session.opened.sources.shards();
        let growth = Growth::parse(text).filter(|growth| growth.latest() <= shards);
        let growth =
            growth.ok_or_else(|| refused(format!("growth `{text}` is not one of this corpus of {shards} shards")))?;
        lock(&self.session.cursor).growth = growth;
        Ok(())
    }

    /// Digest of the corpus and the content settings. Delivery logs contain it.
    pub fn content_digest(&self) -> String {
        self.session.content_digest()
    }

    /// The content settings, as names and texts. Delivery logs contain them.
    pub fn content_settings(&self) -> Vec<(String, String)> {
        self.session.content_texts()
    }
}

impl Session {
    /// The values that decide the data of a run and its order.
    ///
    /// Later epochs may change shards and stages that were added, and skips. These are left out.
    fn fixed_content(&self) -> Vec<(&'static str, StateValue)> {
        let mut content = self.opened.content.clone();
        content.extend(self.opened.sources.as_opened(1, 1));
        content
    }

    fn content_texts(&self) -> Vec<(String, String)> {
        let text = |value: &StateValue| match value {
            StateValue::Int(number) => number.to_string(),
            StateValue::Text(text) => text.clone(),
        };
        self.fixed_content().iter().map(|(key, value)| ((*key).to_owned(), text(value))).collect()
    }

    fn content_digest(&self) -> String {
        let sources = &self.opened.sources;
        let mut text: Vec<_> = self.fixed_content().iter().map(|(key, value)| format!("{key}={value}")).collect();
        text.push(match sources.mixture() {
            None => sources.list()[0].fingerprint_of(1.min(sources.shards())),
            Some(_) => sources.mixture_digest(1).to_string(),
        });
        format!("{:032x}", xxh3_128(text.join("\n").as_bytes()))
    }

    /// Begins the delivery log of a pass, if the session has a log.
    pub(super) fn begin_delivery_log(&self, heading: &PassRange) -> Result<Option<delivery_log::LogWriter>> {
        let Some(folder) = &self.config.delivery_log else { return Ok(None) };
        let (epoch, position) = heading.epochs.state_at(heading.start);
        let pass = LoggedPass {
            run: String::new(),
            time_ms: 0,
            launch: environment::launch(),
            epoch,
            position,
            rank: self.grouping.rank,
            world_size: self.grouping.world_size,
            batch_size: self.grouping.batch_size,
            content: self.content_digest(),
            settings: self.content_texts(),
            fingerprint: self.opened.sources.list()[0].fingerprint(),
            growth: heading.growth.text(),
        };
        delivery_log::LogWriter::begin(Path::new(folder), pass).map(Some)
    }
}
