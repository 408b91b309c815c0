//! Proves the delivery log of a run: compares it with the files.

use std::io::Write;
use std::ops::Range;
use std::path::Path;

use forebay::corpus::parts::Part;
use forebay::loader::state::State;
use forebay::order::epochs::{ENDLESS, EpochChain};
use forebay::proof::checksum::Checksum;
use forebay::proof::delivery_log::{DeliveryLog, DeliveryPair, GlobalBatch, LoggedPass, ProofRange, Tiling};
use forebay::settings::Remainder;
use forebay::{Error, ErrorKind, Loader};
use serde_json::{Value, json};

use super::{Options, PROVEN, SHOWN, Wanted, coverage_json, coverage_text, expected, write_json};
use crate::report::{line, number_of, plural};
use crate::{Context, FAILED, Failure, progress};

/// A delivery log, joined to chains of global batches, epoch by epoch.
pub(super) struct Found<'a> {
    pub(super) loader: &'a Loader,
    delivery_log: DeliveryLog,
    content: String,
    pub(super) groups: Vec<EpochGroup>,
}

/// Epochs that are proved together. It is one epoch, unless batches cross to the next.
pub(super) struct EpochGroup {
    pub(super) epochs: Range<u64>,
    chain: EpochChain,
    /// Number of indices of these epochs.
    pub(super) len: u64,
    from: u64,
    pub(super) tiling: Tiling,
}

impl EpochGroup {
    /// The indices whose rows could not be read, so that other rows were delivered in their place.
    fn substituted(&self) -> Vec<u64> {
        let places = self.tiling.chain.iter().flat_map(|batch| &batch.substituted);
        let mut indices: Vec<u64> = places.map(|(epoch, position)| self.chain.index_of(*epoch, *position)).collect();
        indices.sort_unstable();
        indices.dedup();
        indices
    }

    /// The indices whose own rows the chain delivered.
    fn covered(&self) -> Vec<Range<u64>> {
        let mut covered = Vec::new();
        let mut at = self.from;
        let substituted = self.substituted().into_iter().map(|index| index..index + 1);
        let mut left_out: Vec<Range<u64>> = self.tiling.holes.iter().cloned().chain(substituted).collect();
        left_out.sort_unstable_by_key(|range| range.start);
        left_out.push(self.tiling.dropped.clone());
        for hole in &left_out {
            covered.push(at..hole.start.max(at));
            at = hole.end.max(at);
        }
        covered.push(at..self.len);
        covered.retain(|range| !range.is_empty());
        covered
    }
}

impl<'a> Found<'a> {
    pub(super) fn read(
        loader: &'a Loader,
        folder: &Path,
        options: &Options,
        state: Option<&State>,
    ) -> Result<Self, Failure> {
        let delivery_log = DeliveryLog::read(folder)?;
        let content = loader.content_digest();
        let mut epochs = delivery_log.epochs(&content);
        if epochs.is_empty() {
            let mut known: Vec<String> = delivery_log.passes().iter().map(|pass| differences(loader, pass)).collect();
            known.sort();
            known.dedup();
            let text = format!(
                "the delivery log has no batch of this corpus under these settings: {}; give the corpus and the content settings of the run",
                known.join(", or ")
            );
            return Err(Error::new(ErrorKind::State, text).at(folder).into());
        }
        let first = state.map(State::epoch);
        epochs.retain(|epochs| options.epoch.or(first).is_none_or(|epoch| epochs.contains(&epoch)));
        if epochs.is_empty() {
            let epoch = options.epoch.or(first).unwrap_or_default();
            let text = format!("the delivery log has no batch of epoch {epoch}");
            return Err(Error::new(ErrorKind::State, text).at(folder).into());
        }
        let newest =
            delivery_log.passes().iter().filter(|pass| pass.content == content).max_by_key(|pass| pass.time_ms);
        if let Some(pass) = newest {
            loader.assume_growth(&pass.growth).map_err(|error| error.context("the run had another corpus"))?;
        }
        let groups = epochs
            .into_iter()
            .map(|epochs| {
                let may_drop = loader.config().remainder == Remainder::Drop;
                let (chain, _) = loader.epoch_chain(epochs.clone());
                let mut span = ProofRange { epochs: epochs.clone(), chain: &chain, from: 0, may_drop };
                span.from = state.map_or(0, |state| span.index((state.epoch(), state.position())));
                let (len, from, tiling) = (span.len(), span.from, delivery_log.tile(&content, &span));
                EpochGroup { epochs, chain, len, from, tiling }
            })
            .collect();
        Ok(Self { loader, delivery_log, content, groups })
    }

    /// Epoch and position of an index of `group`.
    pub(super) fn at(&self, group: &EpochGroup, index: u64) -> (u64, u64) {
        group.chain.at(index)
    }

    /// Compares every group with the files.
    pub(super) fn prove(&self, options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
        let order = progress::bar(0, "{msg} {spinner}", context.env)?.with_message("order");
        let wanted: Vec<Wanted> = self
            .groups
            .iter()
            .map(|group| Wanted::new(self.loader, group.epochs.clone(), &group.covered(), &order))
            .collect::<forebay::Result<_>>()?;
        order.finish_and_clear();
        let sums = expected(self.loader, &wanted, Part::WHOLE, context).map_err(|failure| self.explain(failure))?;
        drop(wanted);

        let last = self.groups.len() - 1;
        let mut judged = Vec::new();
        for (number, group) in self.groups.iter().enumerate() {
            let expected = sums[number];
            // A run may still be at its last epoch. An epoch that is asked for has to be whole.
            let to_come = group.tiling.missing(group.len).1;
            let unfinished = number == last && options.epoch.is_none() && !to_come.is_empty();
            let mut judged_group = Judged { group, expected, unfinished, altered: Vec::new() };
            if !judged_group.sum_is_right() {
                judged_group.altered = self.altered(group)?;
            }
            judged.push(judged_group);
        }
        let proven = judged.iter().all(Judged::is_proven);
        if options.json {
            let epochs: Vec<Value> = judged.iter().map(|judged| judged.json(self)).collect();
            let value = json!({
                "proven": proven,
                "files": self.delivery_log.files().len(),
                "passes": self.delivery_log.passes().len(),
                "torn_lines": self.delivery_log.torn(),
                "content": self.content,
                "epochs": epochs,
            });
            write_json(&value, context)?;
        } else {
            self.write(&judged, proven, context.out)?;
        }
        Ok(if proven { 0 } else { FAILED })
    }

    /// Adds to a failure about a damaged file that the run replaced rows of it.
    fn explain(&self, failure: Failure) -> Failure {
        let substituted: usize = self.groups.iter().map(|group| group.substituted().len()).sum();
        match failure {
            Failure::Error(error) if error.kind() == ErrorKind::Data && substituted > 0 => {
                let rows = number_of(substituted as u64, "row");
                let text = format!(
                    "the run replaced {rows} that could not be read, and a file is still damaged: put a sound copy in \
                     its place, against which all other rows are proven"
                );
                error.context(text).into()
            }
            other => other,
        }
    }

    /// Finds the global batches whose content differs from the corpus at their positions.
    fn altered(&self, group: &EpochGroup) -> Result<Vec<u64>, Failure> {
        self.loader.cover();
        let mut altered = Vec::new();
        for (step, batch) in group.tiling.chain.iter().enumerate() {
            let mut found = Checksum::default();
            for index in batch.indices.clone() {
                let (epoch, position) = self.at(group, index);
                if batch.substituted.contains(&(epoch, position)) {
                    continue;
                }
                found += self.loader.sequences_at(epoch, position, 1)?.checksum.unwrap_or_default();
            }
            if found != batch.checksum {
                altered.push(step as u64);
            }
        }
        Ok(altered)
    }

    fn write(&self, judged: &[Judged<'_>], proven: bool, out: &mut dyn Write) -> std::io::Result<()> {
        let launches = self.delivery_log.passes().len();
        line(
            out,
            "log",
            &format!(
                "{}, {}, {}",
                number_of(self.delivery_log.files().len() as u64, "rank"),
                number_of(launches as u64, "pass"),
                number_of(self.delivery_log.torn().len() as u64, "torn line")
            ),
        )?;
        for judged in judged {
            judged.write(self, out)?;
        }
        let substituted: usize = judged.iter().map(|judged| judged.group.substituted().len()).sum();
        let except = format!(
            "proven except for {} that others replaced: every other row once, and its tokens are those of the files",
            number_of(substituted as u64, "row")
        );
        let verdict = match proven {
            true if substituted > 0 => &except,
            true if judged.iter().any(|judged| judged.unfinished) => {
                "proven as far as the run has come: every row once, and its tokens are those of the files"
            }
            true => PROVEN,
            false => "NOT PROVEN",
        };
        line(out, "verdict", verdict)
    }
}

/// Says how the run differs from the corpus and the settings given here.
fn differences(loader: &Loader, pass: &LoggedPass) -> String {
    let here = loader.content_settings();
    let was = |name: &str| pass.settings.iter().find(|(other, _)| other == name).map_or("not set", |(_, value)| value);
    let mut found: Vec<String> = here
        .iter()
        .filter(|(name, value)| was(name) != value)
        .map(|(name, value)| format!("`{name}` was {} in the run and is {value} here", was(name)))
        .collect();
    if found.is_empty() {
        let here = loader.corpus().fingerprint();
        found.push(format!("the corpus of the run had fingerprint {}, this one has {here}", pass.fingerprint));
    }
    found.join(" and ")
}

/// A global batch in words.
pub(super) fn of(batch: &GlobalBatch) -> String {
    format!(
        "positions {} to {}, {} with {} each, launch {}",
        batch.position,
        batch.position + (batch.indices.end - batch.indices.start),
        number_of(batch.world_size, "rank"),
        number_of(batch.batch_size, "row"),
        batch.launches.join(" and ")
    )
}

/// A group, and the checksum that it should have.
struct Judged<'a> {
    group: &'a EpochGroup,
    expected: Checksum,
    unfinished: bool,
    /// Steps whose content differs from the corpus.
    altered: Vec<u64>,
}

impl Judged<'_> {
    fn sum_is_right(&self) -> bool {
        let covered: u64 = self.group.covered().iter().map(|range| range.end - range.start).sum();
        self.group.tiling.checksum() == self.expected && self.expected.rows == covered
    }

    fn is_proven(&self) -> bool {
        let Tiling { conflicts, doubles, .. } = &self.group.tiling;
        self.sum_is_right() && self.missing().0.is_empty() && conflicts.is_empty() && doubles.is_empty()
    }

    fn name(&self) -> String {
        let epochs = &self.group.epochs;
        match epochs.end - epochs.start {
            1 => format!("epoch {}", epochs.start),
            _ => format!("epochs {} to {}", epochs.start, epochs.end - 1),
        }
    }

    /// The holes, and the indices that are still to come.
    fn missing(&self) -> (&[Range<u64>], Range<u64>) {
        let (holes, to_come) = self.group.tiling.missing(self.group.len);
        if self.unfinished { (holes, to_come) } else { (&self.group.tiling.holes, to_come.end..to_come.end) }
    }

    /// Epoch and position of the first and the last index of `indices`.
    fn place(&self, found: &Found<'_>, indices: &Range<u64>) -> [(u64, u64); 2] {
        [indices.start, indices.end - 1].map(|index| found.at(self.group, index))
    }

    fn write(&self, found: &Found<'_>, out: &mut dyn Write) -> std::io::Result<()> {
        let tiling = &self.group.tiling;
        let mut sizes: Vec<u64> = tiling.chain.iter().map(|batch| batch.world_size).collect();
        sizes.dedup();
        let sizes: Vec<String> = sizes.iter().map(u64::to_string).collect();
        let steps = number_of(tiling.chain.len() as u64, "global batch");
        let last = tiling.chain.last().map_or(0, |batch| batch.world_size);
        let ranks = format!("{} {}", sizes.join(", then "), plural(last, "rank"));
        line(out, "steps", &format!("{}: {steps}, on {ranks}", self.name()))?;
        if tiling.spare > 0 {
            let spare = number_of(tiling.spare, "batch");
            line(out, "restarts", &format!("{spare} of single ranks came again later, or not on every rank"))?;
        }
        let dropped = tiling.dropped.end - tiling.dropped.start;
        if dropped > 0 {
            line(
                out,
                "remainder",
                &format!("{} at the end fill no global batch: dropped", number_of(dropped, "position")),
            )?;
        }
        let substituted = self.group.substituted();
        for index in substituted.iter().take(SHOWN) {
            let (epoch, position) = found.at(self.group, *index);
            let text = format!("epoch {epoch}, position {position}: its row could not be read, another stood there");
            line(out, "SUBSTITUTED", &text)?;
        }
        if substituted.len() > SHOWN {
            let more = number_of((substituted.len() - SHOWN) as u64, "row");
            line(out, "SUBSTITUTED", &format!("and {more} more"))?;
        }
        let (holes, to_come) = self.missing();
        for hole in holes.iter().take(SHOWN) {
            line(out, "HOLE", &format!("{}: no global batch has them", positions_of(self.place(found, hole))))?;
        }
        if holes.len() > SHOWN {
            line(out, "HOLE", &format!("and {} more", number_of((holes.len() - SHOWN) as u64, "hole")))?;
        }
        if to_come.end == ENDLESS {
            let (epoch, position) = found.at(self.group, to_come.start);
            line(out, "to come", &format!("epoch {epoch}, from position {position} on"))?;
        } else if !to_come.is_empty() {
            line(out, "to come", &format!("{}: not delivered yet", positions_of(self.place(found, &to_come))))?;
        }
        for (name, faults, what) in [
            ("DIFFERENT", &tiling.conflicts, "two launches were given different tokens: not deterministic"),
            ("DOUBLE", &tiling.doubles, "two processes had this rank at the same time"),
        ] {
            for fault in faults.iter().take(SHOWN) {
                line(out, name, &format!("{}: {what}", place_of(fault)))?;
            }
            if faults.len() > SHOWN {
                line(out, name, &format!("and {} more", faults.len() - SHOWN))?;
            }
        }
        for step in self.altered.iter().take(SHOWN) {
            let batch = &tiling.chain[*step as usize];
            line(out, "ALTERED", &format!("step {step}, {}: not what the corpus holds there", of(batch)))?;
        }
        if self.altered.len() > SHOWN {
            line(out, "ALTERED", &format!("and {} more steps", self.altered.len() - SHOWN))?;
        }
        line(out, "expected", &coverage_text(&self.expected))?;
        line(out, "found", &coverage_text(&tiling.checksum()))
    }

    fn json(&self, found: &Found<'_>) -> Value {
        let tiling = &self.group.tiling;
        let faults = |faults: &[DeliveryPair]| -> Vec<Value> {
            let fault = |fault: &DeliveryPair| {
                json!({"epoch": fault.epoch, "position": fault.position, "rank": fault.rank,
                    "world_size": fault.world_size, "runs": fault.runs})
            };
            faults.iter().map(fault).collect()
        };
        let steps: Vec<Value> = tiling
            .chain
            .iter()
            .map(|batch| {
                json!({"epoch": batch.epoch, "position": batch.position, "world_size": batch.world_size,
                    "batch_size": batch.batch_size, "rows": batch.checksum.rows, "hash": batch.checksum.hash_text()})
            })
            .collect();
        let (holes, to_come) = self.missing();
        json!({
            "epochs": [self.group.epochs.start, self.group.epochs.end],
            "proven": self.is_proven(),
            "unfinished": self.unfinished,
            "positions": self.group.len,
            "from": self.group.from,
            "steps": steps,
            "spare": tiling.spare,
            "partial": tiling.partial,
            "dropped": tiling.dropped.end - tiling.dropped.start,
            "substituted": self.group.substituted().iter().map(|index| found.at(self.group, *index)).collect::<Vec<_>>(),
            "holes": holes.iter().map(|hole| self.place(found, hole)).collect::<Vec<_>>(),
            "to_come": if to_come.is_empty() { Value::Null } else { json!(self.place(found, &to_come)) },
            "not_deterministic": faults(&tiling.conflicts),
            "doubles": faults(&tiling.doubles),
            "altered_steps": self.altered,
            "expected": coverage_json(&self.expected),
            "found": coverage_json(&tiling.checksum()),
        })
    }
}

fn place_of(fault: &DeliveryPair) -> String {
    let DeliveryPair { epoch, position, world_size, runs: [first, second], .. } = fault;
    let ranks = fault.rank.map_or("all ranks".to_owned(), |rank| format!("rank {rank}"));
    format!("epoch {epoch}, position {position}, {ranks} of {world_size} (in {first} and {second})")
}

/// A stretch of positions in words, by its first and its last.
fn positions_of([(epoch, first), (last_epoch, last)]: [(u64, u64); 2]) -> String {
    if epoch == last_epoch {
        format!("epoch {epoch}, positions {first} to {last}")
    } else {
        format!("position {first} of epoch {epoch} to position {last} of epoch {last_epoch}")
    }
}
