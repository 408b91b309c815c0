//! Loader: hands out the batches of an opened corpus in order, and saves and restores its position.
//!
//! A [`Loader`] has two parts. [`Opened`] holds the corpora, the cache of decoded blocks and the
//! content settings. It knows no rank and no batch size, so that several loaders may share it. The
//! session holds the rest: grouping, position, buffers, counters, trace and delivery log.
//!
//! A batch is computed from its position alone (`Session::compute`, in `compute.rs`), by any thread
//! that takes its number. Iteration, `batch_at` and `sequences_at` share that function, so that
//! they cannot differ.

mod at_position;
mod audit;
mod batch;
mod batch_rows;
mod boundaries;
mod compute;
mod cursor;
pub mod description;
mod documents;
mod notes;
mod open;
mod pass;
mod pass_work;
pub mod plan;
pub mod served;
mod session;
pub(crate) mod sources;
pub mod state;
mod substitution;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

pub use audit::Sample;
pub use batch::{Batch, Field, FieldMemory};
use description::OpenedDescription;
pub use documents::{DocumentValues, Text};
pub use open::Opened;
use pass::SharedPass;
pub use pass::{Batches, Next, PassOptions};
use served::{PassStart, RowFormat, RowService};
use session::Session;
pub use substitution::Substitution;

use crate::buffer::BufferSource;
use crate::buffer::pool::Pool;
use crate::corpus::Corpus;
use crate::corpus::schema::Schema;
use crate::error::Result;
use crate::loader::state::State;
use crate::observe::stats::Stats;
use crate::order::epochs::ENDLESS;
pub use crate::pipeline::WaitPolicy;
use crate::settings::{Config, Remainder};
pub use crate::sync::Cancel;
use crate::sync::lock;
use crate::tokens::Dtype;

/// The largest epoch number. A larger number is treated as a mistake.
pub const MAX_EPOCH: u64 = 1 << 32;

/// A loader of one corpus or one mixture. Any thread may call its methods.
#[derive(Debug)]
pub struct Loader {
    session: Arc<Session>,
    /// Passes that have not ended, so that `close` reaches them.
    passes: Mutex<Vec<Weak<SharedPass>>>,
}

impl Loader {
    /// Opens and indexes the corpus. Fails with all faults that opening can find, listed together.
    pub fn open(config: Config) -> Result<Self> {
        Self::open_with(config, |bytes, idle| Arc::new(Pool::new(bytes, idle)))
    }

    /// Opens the corpus like [`Loader::open`]. Fails soon after another thread sets `cancel`.
    pub fn open_cancellable(config: Config, cancel: &Cancel) -> Result<Self> {
        let opened = Arc::new(Opened::open_cancellable(&config, cancel)?);
        Self::of(Session::new(opened, config, |bytes, idle| Arc::new(Pool::new(bytes, idle)))?)
    }

    /// Opens the corpus, and takes the memory of batches from the source that `buffers` makes.
    ///
    /// `buffers` receives the size of one buffer in bytes, and the number of unused buffers that
    /// the source should keep.
    pub fn open_with(config: Config, buffers: impl FnOnce(usize, usize) -> Arc<dyn BufferSource>) -> Result<Self> {
        Self::of(Session::new(Arc::new(Opened::open(&config)?), config, buffers)?)
    }

    /// Makes a loader of an opened corpus, with its own rank, batch size and position.
    ///
    /// Loaders of one [`Opened`] share its files, its decoded blocks and its `memory_budget`.
    /// `config` must name the data and the content settings that the corpus was opened with.
    /// [`Opened::config`] gives them.
    pub fn new(opened: &Arc<Opened>, config: Config) -> Result<Self> {
        Self::of(Session::new(Arc::clone(opened), config, |bytes, idle| Arc::new(Pool::new(bytes, idle)))?)
    }

    /// Makes a loader of corpora that another process has opened. `service` gives their rows.
    pub fn served(config: Config, description: OpenedDescription, service: Arc<dyn RowService>) -> Result<Self> {
        let opened = Arc::new(Opened::described(&config, description, service)?);
        Self::new(&opened, config)
    }

    fn of(session: Session) -> Result<Self> {
        session.tell("opens");
        Ok(Self { session: Arc::new(session), passes: Mutex::default() })
    }

    /// The opened corpus, from which further loaders can be made.
    pub fn opened(&self) -> &Arc<Opened> {
        &self.session.opened
    }

    /// Settings in force. Rank, world size, threads and the kind of shuffling are filled in.
    pub fn config(&self) -> &Config {
        &self.session.config
    }

    /// The opened corpus, or the first corpus of a mixture.
    pub fn corpus(&self) -> &Corpus {
        self.session.opened.sources.list()[0].reader().corpus()
    }

    /// The columns of batches beside the tokens.
    pub fn schema(&self) -> &Schema {
        &self.session.opened.schema
    }

    /// Every opened corpus with its name in the mixture. Without a mixture, the name is empty.
    pub fn corpora(&self) -> impl Iterator<Item = (&str, &Corpus)> {
        let sources = self.session.opened.sources.list().iter();
        sources.map(|source| (source.name.as_str(), source.reader().corpus()))
    }

    /// Number of batches that this rank gets in a pass, the same on every rank. `u64::MAX` for a
    /// pass without end.
    ///
    /// The number holds for the pass of the present epoch. Other passes differ if positions are
    /// skipped or the corpus grew.
    pub fn len(&self) -> u64 {
        let cursor = lock(&self.session.cursor).clone();
        self.session.steps_from(0, &self.session.epoch_chain(&cursor.growth, cursor.epoch))
    }

    /// Whether a pass has no batch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Full sequences of the present epoch, over all ranks. `u64::MAX` for an epoch without end.
    pub fn num_sequences(&self) -> u64 {
        let cursor = lock(&self.session.cursor).clone();
        Some(self.session.opened.sources.full_rows(&cursor.growth, cursor.epoch))
            .filter(|rows| *rows < ENDLESS)
            .unwrap_or(u64::MAX)
    }

    /// Tokens of the present epoch, including `bos_id`, `eos_id` and the remainder. `u64::MAX` for
    /// an epoch without end.
    pub fn num_tokens(&self) -> u64 {
        let cursor = lock(&self.session.cursor).clone();
        Some(self.session.opened.sources.tokens(&cursor.growth, cursor.epoch))
            .filter(|tokens| *tokens < ENDLESS)
            .unwrap_or(u64::MAX)
    }

    /// Tokens of the present epoch that the remainder rule leaves out, over all ranks. Correct for
    /// passes of one epoch.
    pub fn dropped_tokens(&self) -> u64 {
        let session = &self.session;
        let cursor = lock(&session.cursor).clone();
        let epochs = session.epoch_chain(&cursor.growth, cursor.epoch);
        let (Remainder::Drop, Some(end)) = (session.grouping.remainder, epochs.len()) else { return 0 };
        let delivered = session.grouping.steps(end) * session.grouping.global_batch();
        let sources = &session.opened.sources;
        let tail = sources.rowless_tokens(&cursor.growth, cursor.epoch);
        session.tokens_of(&cursor.growth, &epochs, delivered..end) + tail
    }

    /// Makes a new pass.
    ///
    /// The pass continues a restored position, begins the first epoch, or begins the epoch after
    /// the last one that began. The first request for a batch decides which. Until then, a pass has
    /// no effect.
    pub fn iter(&self) -> Batches {
        self.begin(PassOptions::default())
    }

    /// Makes a pass like [`Loader::iter`]. Its batches lie in buffers that the caller submits
    /// ([`Batches::submit`]).
    pub fn iter_external(&self) -> Batches {
        self.begin(PassOptions { external: true, ..PassOptions::default() })
    }

    /// Makes a pass like [`Loader::iter`], with `options`.
    pub fn begin(&self, options: PassOptions) -> Batches {
        self.begin_from(options, None)
    }

    /// Makes a pass that begins at `start`, for a consumer in another process. It does not move the
    /// position of this loader. Its batches keep the facts about their rows ([`Batch::sent`]).
    pub fn begin_at(&self, start: PassStart) -> Batches {
        self.session.keeps_facts.store(true, Ordering::Relaxed);
        let options = PassOptions { parts: start.parts.max(1), ..PassOptions::default() };
        self.begin_from(options, Some(start))
    }

    /// The arrays of a batch on its way to a consumer in another process.
    pub fn row_format(&self, ids: Dtype) -> RowFormat {
        self.session.row_format(ids)
    }

    fn begin_from(&self, options: PassOptions, start: Option<PassStart>) -> Batches {
        let pass = Arc::new(SharedPass::new(&self.session, options, start));
        let mut passes = lock(&self.passes);
        passes.retain(|pass| pass.strong_count() > 0);
        passes.push(Arc::downgrade(&pass));
        Batches { pass }
    }

    /// Lets the next pass begin `epoch` at its start.
    ///
    /// If a position of that epoch was restored and not continued yet, the pass continues it. At
    /// the end of the epoch, such a pass is empty.
    pub fn set_epoch(&self, epoch: u64) {
        self.session.set_epoch(epoch);
    }

    /// Lets the next pass begin at `position` of `epoch`. If that position is skipped, begins at
    /// the first later position that is not.
    ///
    /// Fails if the epoch has fewer positions.
    pub fn seek(&self, epoch: u64, position: u64) -> Result<()> {
        self.session.seek(epoch, position)
    }

    /// Epoch of the newest pass. After `set_epoch`, `seek` or `load_state`, the epoch of the next
    /// pass.
    pub fn epoch(&self) -> u64 {
        lock(&self.session.cursor).epoch
    }

    /// The position after the batches that the newest pass handed to the caller.
    pub fn state(&self) -> State {
        self.session.state()
    }

    /// Lets the next pass continue from `state`.
    ///
    /// Fails if the state belongs to another corpus or to other content settings. The error names
    /// both values.
    pub fn load_state(&self, state: &State) -> Result<()> {
        self.session.load_state(state)?;
        self.session.tell("resumes");
        Ok(())
    }

    /// Counters since the session began.
    pub fn stats(&self) -> Stats {
        self.session.stats()
    }

    /// Reasons why these settings are slow on this corpus, one line each, with the remedy.
    pub fn warnings(&self) -> &[String] {
        &self.session.warnings
    }

    /// Hashes the rows of every batch that begins from now on, so that it has a
    /// [`Batch::checksum`].
    pub fn cover(&self) {
        self.session.covers.store(true, Ordering::Relaxed);
    }

    /// Stops every pass and waits for its threads. Batches that were handed over stay valid.
    pub fn close(&self) {
        let passes: Vec<_> = lock(&self.passes).drain(..).filter_map(|pass| pass.upgrade()).collect();
        for pass in passes {
            pass.close();
        }
    }
}
