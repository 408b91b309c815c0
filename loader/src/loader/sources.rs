//! The opened corpora of a run, and the assignment of their sequences to positions.
//!
//! A single corpus is a series of its own epochs, and may grow between two of them. Several corpora
//! are drawn from by the schedule of a mixture.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, Result};
use crate::keys::{derive_key, reduce};
use crate::layout::{self, Lost, Segment};
use crate::loader::description::DescribedCorpus;
use crate::loader::state::StateValue;
use crate::order::bucket::{Bucket, Buckets};
use crate::order::holdout::SequenceSide;
use crate::order::mixture::{Draw, Mixture};
use crate::order::{Arrangement, EpochOrder};
use crate::read::{ReadMemory, Reader};
use crate::settings::mixture::{MixtureSettings, Stage};
use crate::settings::{self, Compared, Config, Phase, Shuffle};
use crate::sync::lock;

/// Separates the seeds of a mixture's sources.
const SOURCE: u64 = 5;
/// Separates the rows that replace damaged rows from other keys.
const SUBSTITUTE: u64 = 0x7375_6273_7469_7400;
/// Separates the phases of epochs from other keys.
const PHASE: u64 = 0x7068_6173_6500;
/// Number of orders that a worker keeps. Rows near each other belong to few epochs.
const KEPT_ORDERS: usize = 256;
/// Orders with tables that all workers share: of the epochs that a few passes are in.
const SHARED_ORDERS: usize = 16;

/// One corpus: opened in this process, or described by another one.
#[derive(Debug)]
pub(crate) struct CorpusSource {
    pub(crate) name: String,
    data: SourceData,
    seed: u64,
}

#[derive(Debug)]
enum SourceData {
    Opened(Reader),
    Described(DescribedCorpus),
}

/// Numbers of shards, each in force from an epoch on, sorted by epoch. The first is from epoch 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Growth(Arc<[(u64, u64)]>);

/// The contents of an epoch of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct EpochExtent {
    layout: layout::Extent,
    /// Number of full sequences on the delivered side.
    sequences: u64,
    /// Whether tokens are left over that some row must deliver.
    tail: bool,
}

/// Source, number of shards and epoch of an order.
type OrderKey = (usize, u64, u64);

/// Source, epoch and bucket.
type BucketKey = (usize, u64, Bucket);

/// The rows of a bucket, in their order.
type BucketRows = Arc<[u64]>;

/// All sources of a run.
#[derive(Debug)]
pub(crate) struct CorpusSources {
    list: Vec<CorpusSource>,
    mixture: Option<(MixtureSettings, Mixture)>,
    settings: OrderSettings,
    /// Most positions of an epoch, including its tail and its end.
    most_positions: u64,
    /// Orders with tables, the oldest first. Workers copy them.
    shared_orders: Mutex<VecDeque<(OrderKey, EpochOrder)>>,
    /// Buckets and the number of shards that they were made of, the oldest first.
    shared_buckets: Mutex<VecDeque<((BucketKey, u64), BucketRows)>>,
}

/// The settings that assign sequences to positions.
#[derive(Clone, Copy, Debug)]
struct OrderSettings {
    shuffle: Shuffle,
    seq_len: u64,
    chunk_tokens: u64,
    window_tokens: u64,
    lanes: u64,
    side: SequenceSide,
    /// Whether rows are a cut stream, whose tail wraps around and fills rows.
    joins: bool,
    bucket: Option<u64>,
    phase: Phase,
}

/// The stretches that one row reads.
#[derive(Clone, Debug)]
pub(crate) struct RowRead {
    pub(crate) source: usize,
    /// Epoch of the source.
    pub(crate) epoch: u64,
    /// Sequence of the source, over both sides of a holdout.
    pub(crate) sequence: u64,
    /// The extent of the source in that epoch.
    extent: layout::Extent,
    /// Its segments, as a range of the segments of its [`RowReads`].
    segments: Range<u32>,
    /// Number of tokens that the row delivers for the first time. The rest of the row is padding,
    /// or repeated.
    pub(crate) tokens: u64,
    /// Whether the tokens after the row are read at another time of the epoch.
    pub(crate) ends_chunk: bool,
    /// Whether the row was delivered before and only fills the last batch.
    pub(crate) repeated: bool,
    /// Whether the row stands in the place of a damaged row.
    pub(crate) substituted: bool,
}

/// The reads of the rows of a batch, and their segments. The memory is reused from batch to batch.
#[derive(Debug, Default)]
pub(crate) struct RowReads {
    /// The reads of each row. `None` for a row of padding.
    pub(crate) rows: Vec<Option<RowRead>>,
    segments: Vec<Segment>,
}

impl RowReads {
    /// Removes all rows, and makes room for `rows` rows.
    pub(crate) fn clear_for(&mut self, rows: usize) {
        self.rows.clear();
        self.rows.reserve(rows);
        self.segments.clear();
        self.segments.reserve(rows);
    }

    /// The segments of `read`, which must be one of these rows.
    pub(crate) fn segments(&self, read: &RowRead) -> &[Segment] {
        &self.segments[read.segments.start as usize..read.segments.end as usize]
    }

    /// Takes row `row` of `from`, as the only row.
    pub(crate) fn copy_row(&mut self, from: &Self, row: usize) {
        self.clear_for(1);
        let read = from.rows[row].as_ref().map(|read| {
            self.segments.extend_from_slice(from.segments(read));
            RowRead { segments: 0..self.segments.len() as u32, ..read.clone() }
        });
        self.rows.push(read);
    }

    /// The rows that are not padding, each with its segments.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&RowRead, &[Segment])> {
        self.rows.iter().flatten().map(|read| (read, self.segments(read)))
    }
}

/// Orders of the epochs that a worker reads.
#[derive(Debug, Default)]
pub(crate) struct Orders {
    epochs: Vec<((usize, u64), EpochOrder)>,
    buckets: HashMap<BucketKey, BucketRows>,
}

impl Growth {
    pub(crate) fn none(shards: u64) -> Self {
        Self([(0, shards)].into())
    }

    /// Adds to this growth that `shards` shards are in force from `epoch` on, which has not begun.
    pub(crate) fn with(&self, epoch: u64, shards: u64) -> Self {
        let begun = self.0.iter().filter(|(from, _)| *from < epoch);
        Self(begun.copied().chain([(epoch, shards)]).collect())
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| text.parse::<u64>().ok();
        let entries = text.split(',').map(|part| {
            let (epoch, shards) = part.split_once(':')?;
            Some((number(epoch)?, number(shards)?))
        });
        let entries: Vec<(u64, u64)> = entries.collect::<Option<_>>()?;
        let sound = entries[0].0 == 0 && entries.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1);
        sound.then(|| Self(entries.into()))
    }

    pub(crate) fn text(&self) -> String {
        let entries: Vec<String> = self.0.iter().map(|(epoch, shards)| format!("{epoch}:{shards}")).collect();
        entries.join(",")
    }

    /// Number of shards of the newest epochs.
    pub(crate) fn latest(&self) -> u64 {
        self.0.last().expect("has at least its first entry").1
    }

    /// Epochs at which shards join.
    pub(crate) fn changes(&self) -> impl Iterator<Item = u64> {
        self.0.iter().map(|(epoch, _)| *epoch)
    }

    /// The numbers of shards.
    pub(crate) fn shards(&self) -> impl Iterator<Item = u64> {
        self.0.iter().map(|(_, shards)| *shards)
    }

    fn shards_at(&self, epoch: u64) -> u64 {
        self.0[self.0.partition_point(|(from, _)| *from <= epoch) - 1].1
    }
}

impl CorpusSource {
    pub(crate) fn new(name: String, reader: Reader, seed: u64) -> Self {
        Self { name, data: SourceData::Opened(reader), seed }
    }

    /// Makes a source of a corpus that another process has opened.
    pub(super) fn of_described(corpus: DescribedCorpus, seed: u64) -> Self {
        Self { name: corpus.facts().name.clone(), data: SourceData::Described(corpus), seed }
    }

    /// The reader of the files.
    ///
    /// # Panics
    /// If another process has opened the corpus. No caller asks then, because rows come from there.
    pub(crate) fn reader(&self) -> &Reader {
        match &self.data {
            SourceData::Opened(reader) => reader,
            SourceData::Described(_) => unreachable!("another process reads the files"),
        }
    }

    /// The description, if another process has opened the corpus.
    pub(super) fn described(&self) -> Option<&DescribedCorpus> {
        match &self.data {
            SourceData::Opened(_) => None,
            SourceData::Described(corpus) => Some(corpus),
        }
    }

    /// Number of tokens in the files.
    pub(crate) fn tokens(&self) -> u64 {
        match &self.data {
            SourceData::Opened(reader) => reader.corpus().tokens(),
            SourceData::Described(corpus) => corpus.facts().tokens,
        }
    }

    /// Whether the files have to be decoded.
    pub(crate) fn decodes(&self) -> bool {
        match &self.data {
            SourceData::Opened(reader) => reader.decodes(),
            SourceData::Described(corpus) => corpus.facts().decodes,
        }
    }

    /// Whether the files have further column `column`.
    pub(crate) fn has_field(&self, column: usize) -> bool {
        match &self.data {
            SourceData::Opened(reader) => reader.corpus().field_type(column).is_some(),
            SourceData::Described(corpus) => corpus.facts().fields.get(column).is_some_and(Option::is_some),
        }
    }

    /// Fingerprint of the first `shards` shards.
    pub(crate) fn fingerprint_of(&self, shards: u64) -> String {
        match &self.data {
            SourceData::Opened(reader) => reader.corpus().fingerprint_of(shards as usize),
            SourceData::Described(corpus) => corpus.part(shards).fingerprint,
        }
    }

    /// Fingerprint of all shards.
    pub(crate) fn fingerprint(&self) -> String {
        match &self.data {
            SourceData::Opened(reader) => reader.corpus().fingerprint().to_owned(),
            SourceData::Described(corpus) => corpus.part(corpus.facts().shards).fingerprint,
        }
    }

    /// The value of setting `name` that opening decided, for the first `shards` shards.
    fn as_opened(&self, name: &str, shards: u64) -> String {
        match (&self.data, name) {
            (SourceData::Opened(reader), "format") => reader.corpus().families(shards as usize).join("+"),
            (SourceData::Opened(reader), "token_column") => reader.corpus().token_columns(shards as usize).join("+"),
            (SourceData::Described(corpus), "format") => corpus.part(shards).format,
            (SourceData::Described(corpus), "token_column") => corpus.part(shards).token_column,
            _ => unreachable!("opening decides no value of `{name}`"),
        }
    }
}

impl CorpusSources {
    /// Makes the sources of `config`, whose shuffling is decided.
    pub(crate) fn new(config: &Config, mut list: Vec<CorpusSource>) -> Result<Self> {
        let settings = OrderSettings {
            shuffle: config.shuffle,
            seq_len: config.seq_len,
            chunk_tokens: config.chunk_tokens,
            window_tokens: config.window_tokens,
            lanes: config.lanes,
            // Layouts with windows draw the side of each document.
            side: if config.layout.has_windows() { SequenceSide::All } else { SequenceSide::of(config) },
            joins: config.layout.joins(),
            bucket: config.bucket,
            phase: config.phase,
        };
        let Some(text) = &config.mixture else {
            let most_positions = settings.extent(&list[0], list[0].shards()).sequences + 2;
            return Ok(Self::with(list, None, settings, most_positions));
        };
        let recipe = MixtureSettings::parse(text)?;
        let mut faults = Vec::new();
        let mut sequences = Vec::with_capacity(list.len());
        for (source, index) in list.iter_mut().zip(0..) {
            source.seed = derive_key(config.seed, &[SOURCE, index]);
            let count = settings.extent(source, source.shards()).sequences;
            if count < config.lanes {
                faults.push(Error::config(format!(
                    "source `{}` has {count} sequences, fewer than `lanes` = {}, of which each needs one: lower `lanes`, or leave the source out",
                    source.name, config.lanes
                )));
            }
            sequences.push(count);
        }
        if !faults.is_empty() {
            return Err(Error::all(faults));
        }
        let epochs: Vec<Option<u64>> = recipe.sources.iter().map(|source| source.epochs).collect();
        let stages = recipe.stages(config.seq_len)?;
        if let Some(count) = recipe.exact_per.filter(|count| !count.is_multiple_of(config.lanes)) {
            return Err(Error::config(format!(
                "`mixture`: `exact_per` must be a multiple of `lanes` = {}, found {count}",
                config.lanes
            )));
        }
        let mixture = Mixture::new(config.lanes, &sequences, &epochs, &stages, recipe.exhausted, recipe.exact_per);
        let most_positions = mixture.positions() + 2;
        Ok(Self::with(list, Some((recipe, mixture)), settings, most_positions))
    }

    fn with(
        list: Vec<CorpusSource>,
        mixture: Option<(MixtureSettings, Mixture)>,
        settings: OrderSettings,
        most_positions: u64,
    ) -> Self {
        let (shared_orders, shared_buckets) = (Mutex::default(), Mutex::default());
        Self { list, mixture, settings, most_positions, shared_orders, shared_buckets }
    }

    pub(crate) fn list(&self) -> &[CorpusSource] {
        &self.list
    }

    pub(crate) fn mixture(&self) -> Option<&Mixture> {
        self.mixture.as_ref().map(|(_, mixture)| mixture)
    }

    /// Number of shards of the corpus. 0 for a mixture, because its sources do not grow.
    pub(crate) fn shards(&self) -> u64 {
        if self.mixture.is_some() { 0 } else { self.list[0].shards() }
    }

    /// The growth that `text` describes, as a state has it. No text means that the corpus did not
    /// grow. Fails if this corpus has fewer shards.
    pub(crate) fn growth_of(&self, text: &str) -> Result<Growth> {
        let shards = self.shards();
        if text.is_empty() {
            return Ok(Growth::none(shards));
        }
        let growth = Growth::parse(text).filter(|growth| growth.latest() <= shards);
        growth.ok_or_else(|| {
            Error::config(format!("growth `{text}` is not a history of this corpus, which has {shards} shards"))
        })
    }

    /// Converts a position to a number among the positions of all epochs, for the block cache.
    ///
    /// The number grows with the epoch and the position. Epochs that are shorter than the newest
    /// one leave gaps.
    pub(crate) fn global_position(&self, epoch: u64, position: u64) -> u64 {
        epoch.saturating_mul(self.most_positions).saturating_add(position)
    }

    /// Number of rows of an epoch without missing tokens, over all ranks.
    pub(crate) fn full_rows(&self, growth: &Growth, epoch: u64) -> u64 {
        match &self.mixture {
            Some((_, mixture)) => mixture.positions(),
            None => self.extent_at(growth, epoch).sequences,
        }
    }

    /// Whether an epoch has tokens after its last full row.
    pub(crate) fn has_tail(&self, growth: &Growth, epoch: u64) -> bool {
        self.mixture.is_none() && self.extent_at(growth, epoch).tail
    }

    /// Tokens of one epoch of all sources that no row holds, because documents are longer than a
    /// row.
    pub(crate) fn lost(&self) -> Lost {
        let mut lost = Lost::default();
        for source in &self.list {
            lost += source.lost();
        }
        lost
    }

    /// Number of tokens of an epoch, delivered or in its remainder.
    pub(crate) fn tokens(&self, growth: &Growth, epoch: u64) -> u64 {
        let extent = self.extent_at(growth, epoch);
        match (&self.mixture, self.settings.side) {
            (Some((_, mixture)), _) => mixture.positions().saturating_mul(self.settings.seq_len),
            (None, SequenceSide::All) => extent.layout.tokens,
            (None, SequenceSide::Train(_)) => {
                extent.layout.tokens - (extent.layout.rows - extent.sequences) * self.settings.seq_len
            }
            (None, SequenceSide::Holdout(_)) => extent.sequences * self.settings.seq_len,
        }
    }

    /// Tokens of an epoch that stand in no full row. No position delivers them unless the tail has
    /// one.
    pub(crate) fn rowless_tokens(&self, growth: &Growth, epoch: u64) -> u64 {
        if !self.settings.joins || self.mixture.is_some() {
            return 0;
        }
        self.tokens(growth, epoch) - self.full_rows(growth, epoch) * self.settings.seq_len
    }

    /// Sequences of the corpus in the newest epochs, over both sides of a holdout.
    pub(crate) fn all_sequences(&self, growth: &Growth) -> u64 {
        if self.mixture.is_some() { 0 } else { self.settings.extent(&self.list[0], growth.latest()).layout.rows }
    }

    /// Number of sequences in an epoch of a mixture's source.
    pub(crate) fn sequences_of(&self, source: &CorpusSource) -> u64 {
        self.settings.extent(source, source.shards()).sequences
    }

    /// The extent, arrangement and order of epoch `epoch` of source `index`, with its newest
    /// shards.
    pub(crate) fn order_of(&self, index: usize, epoch: u64) -> (layout::Extent, Arrangement, EpochOrder) {
        let source = &self.list[index];
        let EpochExtent { layout, sequences, .. } = self.settings.extent(source, source.shards());
        let (arrangement, order) = self.order(index, source.shards(), sequences, epoch);
        (layout, arrangement, order)
    }

    /// The order of an epoch of the first `shards` shards of source `index`. Orders that need a
    /// table are made once and shared.
    fn order(&self, index: usize, shards: u64, sequences: u64, epoch: u64) -> (Arrangement, EpochOrder) {
        let source = &self.list[index];
        let arrangement = self.settings.arrangement(sequences);
        let windows = match arrangement {
            Arrangement::Block { lanes, window, .. } => Some((lanes, window)),
            Arrangement::Sequential | Arrangement::Global => None,
        };
        let plain = || EpochOrder::new(sequences, arrangement, source.seed, epoch);
        let Some((lanes, window)) = windows else { return (arrangement, plain()) };
        let key = (index, shards, epoch);
        let mut shared = lock(&self.shared_orders);
        if let Some((_, order)) = shared.iter().find(|(found, _)| *found == key) {
            return (arrangement, order.clone());
        }
        let Some(rows) = source.reader().layout().window_rows(shards as usize) else { return (arrangement, plain()) };
        let starts = self.settings.chunk_starts(&rows, sequences);
        let order = EpochOrder::in_chunks(sequences, &starts, lanes, window, source.seed, epoch);
        if shared.len() >= SHARED_ORDERS {
            shared.pop_front();
        }
        shared.push_back((key, order.clone()));
        (arrangement, order)
    }

    fn extent_at(&self, growth: &Growth, epoch: u64) -> EpochExtent {
        let source = &self.list[0];
        let shards = if self.mixture.is_some() { source.shards() } else { growth.shards_at(epoch) };
        self.settings.extent(source, shards)
    }

    /// The reads of the row at `position` of `epoch`, which must exist. [`CorpusSources::add_row`]
    /// finds its segments. Fails if a bucket needs lengths that cannot be read.
    pub(crate) fn row_read(
        &self,
        growth: &Growth,
        orders: &mut Orders,
        (epoch, position): (u64, u64),
        scratch: &mut ReadMemory,
    ) -> Result<RowRead> {
        let (draw, shards) = match &self.mixture {
            Some((_, mixture)) => {
                let draw = mixture.draw(epoch, position);
                (draw, self.list[draw.source].shards())
            }
            None => (Draw { source: 0, epoch, position }, growth.shards_at(epoch)),
        };
        let Draw { source: index, epoch, position } = draw;
        let source = &self.list[index];
        let extent = self.settings.extent(source, shards);
        let read = |sequence, ends_chunk| RowRead {
            source: index,
            epoch,
            sequence,
            extent: extent.layout,
            segments: 0..0,
            tokens: 0,
            ends_chunk,
            repeated: false,
            substituted: false,
        };
        if position >= extent.sequences {
            return Ok(read(extent.layout.rows, false));
        }
        let make = || self.order(index, shards, extent.sequences, epoch).1;
        let Some(size) = self.settings.bucket else {
            let order = orders.get((index, epoch), make);
            let at = order.sequence_at(position);
            return Ok(read(self.settings.side.sequence(at), order.ends_chunk(at)));
        };
        let buckets = Buckets::new(extent.sequences, self.settings.arrangement(extent.sequences), size);
        let (bucket, place) = buckets.locate(position);
        let key = (index, epoch, bucket);
        if let Some(rows) = orders.buckets.get(&key) {
            return Ok(read(rows[place], false));
        }
        let rows = {
            let order = orders.get((index, epoch), make);
            self.bucket(&key, shards, &buckets, (&extent.layout, order), scratch)?
        };
        let row = rows[place];
        orders.keep(key, rows, self.kept_buckets());
        Ok(read(row, false))
    }

    /// Buckets that a worker keeps: those of all lanes, and the next ones.
    fn kept_buckets(&self) -> usize {
        2 * self.settings.lanes as usize * self.list.len() + 2
    }

    /// The rows of a bucket of an epoch of the first `shards` shards. Workers share them.
    fn bucket(
        &self,
        key: &BucketKey,
        shards: u64,
        buckets: &Buckets,
        (extent, order): (&layout::Extent, &EpochOrder),
        scratch: &mut ReadMemory,
    ) -> Result<BucketRows> {
        let shared_key = (*key, shards);
        if let Some((_, rows)) = lock(&self.shared_buckets).iter().find(|(found, _)| *found == shared_key) {
            return Ok(Arc::clone(rows));
        }
        let (source, epoch, bucket) = *key;
        let source = &self.list[source];
        let row_at = |position| self.settings.side.sequence(order.sequence_at(position));
        let rows: Vec<u64> = buckets.positions(bucket).map(row_at).collect();
        let (mut lengths, mut segments) = (Vec::with_capacity(rows.len()), Vec::new());
        for row in &rows {
            segments.clear();
            source.reader().plan_row(extent, *row, scratch, &mut segments)?;
            lengths.push(segments.iter().map(|segment| segment.len).sum());
        }
        let arranged = bucket.arranged(&lengths, source.seed, epoch);
        let rows: BucketRows = arranged.into_iter().map(|row| rows[row]).collect();
        let mut shared = lock(&self.shared_buckets);
        if shared.len() >= self.kept_buckets() {
            shared.pop_front();
        }
        shared.push_back((shared_key, Arc::clone(&rows)));
        Ok(rows)
    }

    /// Adds `read` to `reads`, with its segments. With `wrap_to`, a shorter row continues with the
    /// start of the stream until it has that many tokens.
    pub(crate) fn add_row(
        &self,
        mut read: RowRead,
        wrap_to: Option<u64>,
        scratch: &mut ReadMemory,
        reads: &mut RowReads,
    ) -> Result<()> {
        let segments = &mut reads.segments;
        let first = segments.len();
        self.list[read.source].reader().plan_row(&read.extent, read.sequence, scratch, segments)?;
        read.tokens = segments[first..].iter().map(|segment| segment.len).sum();
        let mut len = read.tokens;
        let wrap_to = wrap_to.filter(|_| self.settings.joins);
        while let Some(missing) = wrap_to.and_then(|wanted| wanted.checked_sub(len)).filter(|missing| *missing > 0) {
            let again = missing.min(read.extent.stream_len);
            segments.push(Segment::joined(0, again, len));
            len += again;
        }
        let phase = self.phase(read.source, read.epoch);
        if phase > 0 {
            advance(segments, first, phase, read.extent.stream_len);
        }
        read.segments = first as u32..segments.len() as u32;
        reads.rows.push(Some(read));
        Ok(())
    }

    /// Replaces row `row` of `reads` by another row of its source, for the try `attempt`. Nothing
    /// but the seed, the epoch, the row and the try decides which row it is.
    ///
    /// Returns whether the source has any row.
    pub(crate) fn substitute(
        &self,
        lost: &RowRead,
        row: usize,
        attempt: u64,
        wrap_to: Option<u64>,
        scratch: &mut ReadMemory,
        reads: &mut RowReads,
    ) -> Result<bool> {
        let sequences = self.settings.side.count(lost.extent.rows);
        if sequences == 0 {
            return Ok(false);
        }
        let key = derive_key(self.list[lost.source].seed, &[SUBSTITUTE, lost.epoch, lost.sequence, attempt]);
        let sequence = self.settings.side.sequence(reduce(key, sequences));
        let read = RowRead { sequence, ends_chunk: false, substituted: true, ..lost.clone() };
        self.add_row(read, wrap_to, scratch, reads)?;
        reads.rows[row] = reads.rows.pop().expect("it was added just now");
        Ok(true)
    }

    /// Number of tokens by which the rows of an epoch of a source begin later in the joined stream.
    pub(crate) fn phase(&self, source: usize, epoch: u64) -> u64 {
        match self.settings.phase {
            Phase::Fixed => 0,
            Phase::Epoch => reduce(derive_key(self.list[source].seed, &[PHASE, epoch]), self.settings.seq_len),
        }
    }

    /// The stages of the mixture that have begun before `position` of an epoch.
    fn stages_begun(&self, position: u64) -> Vec<Stage> {
        let Some((mixture, _)) = &self.mixture else { return Vec::new() };
        let mut stages = mixture.stages(self.settings.seq_len).expect("checked when opened");
        stages.retain(|stage| stage.start < position.max(1));
        stages
    }

    /// The indices of the sources that these stages draw from.
    fn drawn(&self, position: u64) -> Vec<usize> {
        let stages = self.stages_begun(position);
        let is_drawn = |index: &usize| stages.iter().any(|stage| stage.weights[*index] > 0);
        (0..self.list.len()).filter(is_drawn).collect()
    }

    /// The settings whose value opening decided ([`Compared::AsOpened`]).
    ///
    /// The values describe the first `shards` shards of a corpus. In a mixture, they describe the
    /// sources that rows before `position` come from.
    pub(crate) fn as_opened(&self, shards: u64, position: u64) -> Vec<(&'static str, StateValue)> {
        let value = |name: &str| match &self.mixture {
            None => self.list[0].as_opened(name, shards),
            Some(_) => {
                let of_source = |index: usize| {
                    let source = &self.list[index];
                    format!("{}: {}", source.name, source.as_opened(name, source.shards()))
                };
                self.drawn(position).into_iter().map(of_source).collect::<Vec<_>>().join(", ")
            }
        };
        let decided = settings::all().iter().filter(|setting| setting.compared() == Some(Compared::AsOpened));
        decided.map(|setting| (setting.name, StateValue::short(value(setting.name)))).collect()
    }

    /// Digest of all facts that decided the order of an epoch before `position`: the stages that
    /// have begun, and the sources that they draw from.
    pub(crate) fn mixture_digest(&self, position: u64) -> StateValue {
        let Some((recipe, _)) = &self.mixture else { return "none".into() };
        let mut text = format!("{:?} {:?}", recipe.exhausted, recipe.exact_per);
        for stage in self.stages_begun(position) {
            text.push_str(&format!("\n{} {}", stage.start, stage.ramp));
            for (index, weight) in stage.weights.iter().enumerate().filter(|(_, weight)| **weight > 0) {
                text.push_str(&format!(" {index}:{weight}"));
            }
        }
        for index in self.drawn(position) {
            let (source, given) = (&self.list[index], &recipe.sources[index]);
            text.push_str(&format!("\n{index} {} {} {:?}", source.name, source.fingerprint(), given.epochs));
        }
        StateValue::Text(format!("{:032x}", xxh3_128(text.as_bytes())))
    }
}

impl CorpusSource {
    pub(crate) fn shards(&self) -> u64 {
        match &self.data {
            SourceData::Opened(reader) => reader.corpus().len() as u64,
            SourceData::Described(corpus) => corpus.facts().shards,
        }
    }

    fn extent(&self, shards: u64) -> layout::Extent {
        match &self.data {
            SourceData::Opened(reader) => reader.layout().extent(shards as usize),
            SourceData::Described(corpus) => corpus.part(shards).extent,
        }
    }

    fn lost(&self) -> Lost {
        match &self.data {
            SourceData::Opened(reader) => reader.layout().lost(reader.corpus().len()),
            SourceData::Described(corpus) => corpus.facts().lost,
        }
    }
}

/// Moves the segments from number `first` on by `phase` places of a stream of `len` tokens. Cuts a
/// segment that passes the end of the stream: it goes on at the start.
fn advance(segments: &mut Vec<Segment>, first: usize, phase: u64, len: u64) {
    let mut at = first;
    while at < segments.len() {
        let moved = segments[at];
        let start = (moved.start + phase) % len;
        let before_end = moved.len.min(len - start);
        segments[at] = Segment { start, len: before_end, ..moved };
        if before_end < moved.len {
            at += 1;
            let rest = Segment { start: 0, len: moved.len - before_end, place: moved.place + before_end, ..moved };
            segments.insert(at, rest);
        }
        at += 1;
    }
}

impl OrderSettings {
    fn extent(&self, source: &CorpusSource, shards: u64) -> EpochExtent {
        let layout = source.extent(shards);
        let tail = layout.tail_tokens > 0 && !matches!(self.side, SequenceSide::Holdout(_));
        EpochExtent { layout, sequences: self.side.count(layout.rows), tail }
    }

    /// Joins windows that begin at `rows` to chunks of at least `chunk_tokens` places, from the
    /// first one on. Gives the first row of each.
    fn chunk_starts(&self, rows: &[u64], sequences: u64) -> Arc<[u64]> {
        let chunk = (self.chunk_tokens / self.seq_len).max(1);
        let mut starts: Vec<u64> = Vec::new();
        for row in rows.iter().filter(|row| **row < sequences) {
            match starts.last() {
                Some(start) if row - start < chunk => {}
                _ => starts.push(*row),
            }
        }
        starts.into()
    }

    fn arrangement(&self, sequences: u64) -> Arrangement {
        match self.shuffle {
            Shuffle::Off | Shuffle::On => Arrangement::Sequential,
            Shuffle::Global => Arrangement::Global,
            Shuffle::Block => {
                Arrangement::block(sequences, self.seq_len, self.chunk_tokens, self.window_tokens, self.lanes)
            }
        }
    }
}

impl Orders {
    fn get(&mut self, key: (usize, u64), make: impl FnOnce() -> EpochOrder) -> &EpochOrder {
        let found = self.epochs.iter().position(|(kept, _)| *kept == key);
        let index = found.unwrap_or_else(|| {
            if self.epochs.len() >= KEPT_ORDERS {
                self.epochs.clear();
            }
            self.epochs.push((key, make()));
            self.epochs.len() - 1
        });
        &self.epochs[index].1
    }

    /// Keeps the rows of a bucket, and at most `most` buckets.
    fn keep(&mut self, key: BucketKey, rows: BucketRows, most: usize) {
        if self.buckets.len() >= most {
            self.buckets.clear();
        }
        self.buckets.insert(key, rows);
    }
}
