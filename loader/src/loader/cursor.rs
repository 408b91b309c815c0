//! The position of a session: the start of the next pass, and the progress of the newest one.
//!
//! A pass reads the position at its first batch. It moves the position with every batch that it
//! hands over. States, `seek` and `set_epoch` go through this file, so that all rules about the
//! next epoch are in one place.

use super::MAX_EPOCH;
use super::pass::PassRange;
use super::session::Session;
use crate::error::{Error, Result};
use crate::loader::sources::Growth;
use crate::loader::state::{State, StateValue, refused};
use crate::order::epochs::{self, EpochChain};
use crate::settings::{self, Epochs};
use crate::sync::lock;

/// The position of a session.
#[derive(Clone, Debug)]
pub(super) struct Cursor {
    pub(super) growth: Growth,
    pub(super) epoch: u64,
    pub(super) position: u64,
    /// Whether the next pass continues here. Otherwise it begins the next epoch.
    continues: bool,
    /// Whether the caller named that epoch. If nothing of it is left, its pass is then empty.
    named: bool,
    /// The pass that moves this position.
    pass: u64,
}

impl Cursor {
    /// The position of a new session on a corpus of `shards` shards.
    pub(super) fn new(shards: u64) -> Self {
        Self { growth: Growth::none(shards), epoch: 0, position: 0, continues: true, named: false, pass: u64::MAX }
    }

    /// Moves the position. The next pass begins there.
    fn go(&mut self, epoch: u64, position: u64, named: bool) {
        *self = Self { growth: self.growth.clone(), epoch, position, continues: true, named, pass: u64::MAX };
    }

    /// Notes that pass `pass` handed over everything before `end`. Has no effect if another pass
    /// moves the position now.
    pub(super) fn advance(&mut self, pass: u64, end: (u64, u64)) {
        if self.pass == pass {
            (self.epoch, self.position) = end;
        }
    }
}

impl Cursor {
    /// Lets the next pass continue at the first batch that the failed pass `pass` did not hand
    /// over.
    pub(super) fn failed(&mut self, pass: u64) {
        if self.pass == pass {
            self.continues = true;
        }
    }
}

impl Session {
    pub(super) fn set_epoch(&self, epoch: u64) {
        let mut cursor = lock(&self.cursor);
        if cursor.continues && cursor.epoch == epoch {
            cursor.named = true;
        } else {
            cursor.go(epoch, 0, true);
        }
    }

    pub(super) fn seek(&self, epoch: u64, position: u64) -> Result<()> {
        let mut cursor = lock(&self.cursor);
        let positions = self.positions(&cursor.growth, epoch);
        if position > positions {
            return Err(Error::config(format!(
                "cannot seek to position {position}: epoch {epoch} has {positions} positions"
            )));
        }
        cursor.go(epoch, position, true);
        Ok(())
    }

    pub(super) fn state(&self) -> State {
        let cursor = lock(&self.cursor).clone();
        let content = self.content(&cursor.growth, cursor.epoch, cursor.position);
        State::new(cursor.epoch, cursor.position, &content)
    }

    pub(super) fn load_state(&self, state: &State) -> Result<()> {
        let (epoch, position) = (state.epoch(), state.position());
        if epoch > MAX_EPOCH {
            return Err(refused(format!("state is damaged: epoch {epoch} is past {MAX_EPOCH}")));
        }
        let (saved, growth) = self.growth(state)?;
        state.check(&self.content(&saved, epoch, position))?;
        // A run that ended its epochs with another remainder rule may have delivered the tail as
        // well.
        let most = self.opened.sources.full_rows(&saved, epoch) + 1;
        if position > most {
            let text = format!("state is damaged: position {position} is past the {most} of epoch {epoch}");
            return Err(refused(text));
        }
        let mut cursor = lock(&self.cursor);
        *cursor = Cursor { growth, ..Cursor::new(0) };
        cursor.go(epoch, position, false);
        Ok(())
    }

    /// Decides which epochs pass `pass` covers, and moves the position to its start.
    pub(super) fn begin_pass(&self, pass: u64) -> Result<PassRange> {
        let mut cursor = lock(&self.cursor);
        let mut epochs = self.epoch_chain(&cursor.growth, cursor.epoch);
        let mut start = epochs.index_of(cursor.epoch, cursor.position);
        let left = |start: u64, epochs: &EpochChain| self.steps_from(start, epochs) > 0;
        let continued = cursor.continues && left(start, &epochs);
        let stays = cursor.continues && (cursor.named || (cursor.position == 0 && start == 0));
        let endless = epochs.len().is_none();
        if !(continued || stays || endless) {
            let next = match self.config.epochs {
                Epochs::Count(count) => cursor.epoch - cursor.epoch % count + count,
                Epochs::Endless => cursor.epoch + 1,
            };
            epochs = self.epoch_chain(&cursor.growth, next);
            start = 0;
        }
        self.check_epoch(cursor.epoch)?;
        if let Some(end) = epochs.len() {
            self.grouping.check(end.saturating_sub(start))?;
        }
        let (epoch, position) = epochs.state_at(start);
        let growth = cursor.growth.clone();
        *cursor = Cursor { growth: growth.clone(), epoch, position, continues: false, named: false, pass };
        Ok(PassRange { epochs, growth, start })
    }

    /// The content that a state at `position` of `epoch` belongs to, under a fixed list of keys.
    fn content(&self, growth: &Growth, epoch: u64, position: u64) -> Vec<(&'static str, StateValue)> {
        let sources = &self.opened.sources;
        let mut content = self.opened.content.clone();
        let shards = growth.latest();
        let fingerprint = match sources.mixture() {
            Some(_) => "mixture".to_owned(),
            None => sources.list()[0].fingerprint_of(shards),
        };
        let begun: Vec<_> = epochs::merged(&self.config.skip)
            .into_iter()
            .filter(|skip| (skip.epoch, skip.start) < (epoch, position))
            .collect();
        // The part of a mixture that has begun in its first epoch. Later epochs begin with all of
        // it.
        let progress = if epoch == 0 { position } else { u64::MAX };
        content.extend(sources.as_opened(shards, progress));
        content.extend([
            ("fingerprint", StateValue::Text(fingerprint)),
            ("shards", shards.into()),
            ("sequences", sources.all_sequences(growth).into()),
            ("growth", StateValue::Text(growth.text())),
            ("skipped", StateValue::short(settings::skips_text(&begun))),
            ("mixture", sources.mixture_digest(progress)),
        ]);
        content
    }

    /// The growth under which `state` was saved, and the growth that continues it.
    fn growth(&self, state: &State) -> Result<(Growth, Growth)> {
        let sources = &self.opened.sources;
        let saved = Growth::parse(state.text("growth")?)
            .ok_or_else(|| refused("state is damaged: `growth` must hold `EPOCH:SHARDS` pairs, in order".to_owned()))?;
        self.opened.learn(&saved)?;
        let (before, now) = (saved.latest(), sources.shards());
        if sources.mixture().is_some() || before >= now {
            // The comparison of states finds the differences.
            return Ok(if before == now { (saved.clone(), saved) } else { (Growth::none(now), Growth::none(now)) });
        }
        if state.text("fingerprint")? != sources.list()[0].fingerprint_of(before) {
            return Ok((Growth::none(now), Growth::none(now)));
        }
        if !self.config.extend {
            return Err(refused(format!(
                "the corpus has grown: it had {before} shards when the state was saved, and {now} now; set `extend` to \
                 let the new ones join at the next epoch, or resume with the old ones"
            )));
        }
        let joins = state.epoch() + u64::from(state.position() > 0);
        Ok((saved.clone(), saved.with(joins, now)))
    }
}
