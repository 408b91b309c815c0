//! `forebay verify`: proves that every token was delivered once.
//!
//! What should have been delivered comes from reading the files in their own order with arrow-rs ([`crate::sequential`]); what was delivered comes
//! from running the loader, or from the ledger that a training run wrote. Both are sums of row hashes that do not depend on the order. The loader's
//! order is asked only which sequences belong to a part of an epoch, and then checked to name each of them once.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forebay::config::{Config, Remainder};
use forebay::coverage::Coverage;
use forebay::ledger::{Conflict, GlobalBatch, Ledger, Span, Tiling};
use forebay::loader::Next;
use forebay::state::{State, StateValue};
use forebay::{Error, ErrorKind, Loader};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::report::{grouped, line};
use crate::sequential::{self, Visitor};
use crate::{Context, FAILED, Failure, Sets, progress};

const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {eta} left";
/// Faults of one kind that are shown; `--json` lists all.
const SHOWN: usize = 10;
/// Positions looked at between two steps of the progress bar.
const BAR_EVERY: u64 = 1 << 16;

#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0 proven, 1 not proven, 2 usage or settings.\n\n\
    Cost: the files are read once in full; without --ledger, once more through the loader. --document looks at every position of the epochs in the \
    ledger, some 20 to 300 ns each: an epoch of 10^9 sequences takes minutes. Memory: one bit per sequence where only a part of an epoch is proved.")]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    /// Tokens per sequence
    #[arg(long, value_name = "TOKENS")]
    seq_len: Option<String>,
    /// Sequences per rank and step
    #[arg(long, value_name = "N")]
    batch_size: Option<String>,
    /// Order: true, false, global or block
    #[arg(long, value_name = "ORDER", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    shuffle: Option<String>,
    /// Key of the order
    #[arg(long, value_name = "N")]
    seed: Option<String>,
    /// Ranks to run one after the other; that of the settings where it is not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "ledger")]
    world_size: Option<u64>,
    /// Epoch; that of the state or 0 where it is not given, and with `--ledger` all
    #[arg(long, value_name = "N")]
    epoch: Option<u64>,
    /// A state as JSON, as `state_dict()` gives it: proves from there to the epoch's end
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Proves what the ranks of a run wrote to this folder
    #[arg(long, value_name = "DIR")]
    ledger: Option<PathBuf>,
    /// Prints the documents of one global batch of the ledger, counted from 0 in its epoch
    #[arg(long, value_name = "N", requires = "ledger", conflicts_with = "document")]
    step: Option<u64>,
    /// Prints where the ledger had the document in a row of a shard, named as its file or by its end
    #[arg(long, value_name = "SHARD:ROW", requires = "ledger", value_parser = shard_and_row)]
    document: Option<(String, u64)>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

fn shard_and_row(text: &str) -> Result<(String, u64), String> {
    let found = text.rsplit_once(':').and_then(|(shard, row)| Some((shard.to_owned(), row.parse().ok()?)));
    found.ok_or_else(|| "expected SHARD:ROW".to_owned())
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let flags = [
        ("seq_len", options.seq_len.clone()),
        ("batch_size", options.batch_size.clone()),
        ("shuffle", options.shuffle.clone()),
        ("seed", options.seed.clone()),
    ];
    let mut config = options.sets.resolve(&options.paths, &flags, context)?.config;
    // Proving is no training: it must not add to a ledger.
    config.ledger = None;
    let state = options.state.as_deref().map(read_state).transpose()?;
    if let (Some(state), Some(epoch)) = (&state, options.epoch)
        && state.epoch() != epoch
    {
        return Err(Error::config(format!("the state is in epoch {}, `--epoch` says {epoch}", state.epoch())).into());
    }
    match &options.ledger {
        None => {
            let world_size = options.world_size.or(config.dp_world_size).unwrap_or(1);
            stream(config, world_size, options, state.as_ref(), context)
        }
        Some(folder) => {
            // Ranks and batch sizes are those of the ledger.
            config.batch_size = 1;
            (config.dp_rank, config.dp_world_size) = (Some(0), Some(1));
            let loader = Loader::open(config)?;
            if let Some(state) = &state {
                loader.load_state(state)?;
            }
            let found = Found::read(&loader, folder, options, state.as_ref())?;
            match (options.step, &options.document) {
                (Some(step), _) => found.documents_of(step, options, context),
                (None, Some((shard, row))) => found.steps_of(shard, *row, options, context),
                (None, None) => found.prove(options, context),
            }
        }
    }
}

fn read_state(path: &Path) -> Result<State, Error> {
    let text = std::fs::read(path).map_err(|error| Error::io("cannot read the state", error).at(path))?;
    let damaged = |what: &str| Error::new(ErrorKind::State, format!("no state: {what}")).at(path);
    let value: Value = serde_json::from_slice(&text).map_err(|error| damaged("not JSON").with_source(error))?;
    let Value::Object(fields) = value else { return Err(damaged("expected a JSON object")) };
    let entries = fields.into_iter().map(|(key, value)| match value {
        Value::String(text) => Ok((key, StateValue::Text(text))),
        value => match value.as_u64() {
            Some(number) => Ok((key, StateValue::Int(number))),
            None => Err(damaged(&format!("`{key}` must be a whole number or a word"))),
        },
    });
    State::from_entries(entries.collect::<Result<_, _>>()?).map_err(|error| error.at(path))
}

/// The sequences that a part of an epoch should deliver.
enum Wanted {
    /// Those below a number.
    Below(u64),
    /// Those whose bit is set.
    Some(Vec<u64>),
}

impl Wanted {
    /// The sequences at the `positions` of `epoch` for which `covered` holds; fails where the order names one of them twice.
    fn new(loader: &Loader, epoch: u64, covered: &[Range<u64>], bar: &ProgressBar) -> forebay::Result<Self> {
        let positions = loader.num_positions();
        // Every sequence, and the tail where it has a position: their number alone says so.
        if covered == [0..positions] && positions >= loader.num_sequences() {
            return Ok(Self::Below(positions));
        }
        let mut bits = vec![0; (loader.num_sequences() / 64 + 1) as usize];
        for range in covered {
            for (sequence, at) in loader.sequences(epoch, range.clone()).zip(0u64..) {
                let (word, bit) = ((sequence / 64) as usize, 1 << (sequence % 64));
                if bits[word] & bit != 0 {
                    let text = format!("the order of epoch {epoch} has sequence {sequence} twice");
                    return Err(Error::new(ErrorKind::Internal, text));
                }
                bits[word] |= bit;
                if at % BAR_EVERY == 0 {
                    bar.tick();
                }
            }
        }
        Ok(Self::Some(bits))
    }

    fn holds(&self, sequence: u64) -> bool {
        match self {
            Self::Below(end) => sequence < *end,
            Self::Some(bits) => bits[(sequence / 64) as usize] >> (sequence % 64) & 1 == 1,
        }
    }
}

/// Adds up what the files hold for several expectations at once.
struct Expected<'a> {
    wanted: &'a [Wanted],
    sums: Vec<Coverage>,
    bar: ProgressBar,
}

impl Visitor for Expected<'_> {
    fn row(&mut self, sequence: u64, tokens: &[i64]) {
        let mut one = None;
        for (wanted, sum) in self.wanted.iter().zip(&mut self.sums) {
            if wanted.holds(sequence) {
                *sum += *one.get_or_insert_with(|| {
                    let mut one = Coverage::default();
                    one.add_row(0, sequence, tokens);
                    one
                });
            }
        }
    }

    fn document(&mut self, _: usize, _: u64, _: Range<u64>) {}

    fn read(&mut self, tokens: u64) {
        self.bar.inc(tokens);
    }
}

/// What the files hold for each of `wanted`.
fn expected(loader: &Loader, wanted: &[Wanted], context: &Context<'_>) -> Result<Vec<Coverage>, Failure> {
    let bar = reading_bar(loader, context)?;
    let mut expected = Expected { wanted, sums: vec![Coverage::default(); wanted.len()], bar };
    sequential::read(loader.config(), &paths(loader), &mut expected)?;
    expected.bar.finish_and_clear();
    Ok(expected.sums)
}

fn reading_bar(loader: &Loader, context: &Context<'_>) -> forebay::Result<ProgressBar> {
    Ok(progress::bar(loader.corpus().tokens(), TEMPLATE, context.env)?.with_message("reading files"))
}

fn paths(loader: &Loader) -> Vec<&Path> {
    loader.corpus().files().iter().map(|file| file.path.as_path()).collect()
}

fn coverage_json(coverage: &Coverage) -> Value {
    json!({"rows": coverage.rows, "tokens": coverage.tokens, "hash": coverage.hash_text()})
}

fn coverage_text(coverage: &Coverage) -> String {
    format!("{} rows, {} tokens, hash {}", grouped(coverage.rows), grouped(coverage.tokens), coverage.hash_text())
}

fn write_json(value: &Value, context: &mut Context<'_>) -> Result<(), Failure> {
    Ok(writeln!(context.out, "{value}")?)
}

/// Runs every rank of an epoch, and compares.
fn stream(
    config: Config,
    world_size: u64,
    options: &Options,
    state: Option<&State>,
    context: &mut Context<'_>,
) -> Result<u8, Failure> {
    let open = |rank| Loader::open(Config { dp_rank: Some(rank), dp_world_size: Some(world_size), ..config.clone() });
    let mut loader = open(0)?;
    let epoch = state.map_or(options.epoch.unwrap_or(0), State::epoch);
    let positions = loader.num_positions();
    let from = state.map_or(0, State::position).min(positions);
    let global_batch = config.batch_size * world_size;
    let to = match config.remainder {
        Remainder::Drop => positions - (positions - from) % global_batch,
        Remainder::Pad | Remainder::Wrap | Remainder::Short => positions,
    };

    let bar = progress::bar(to - from, TEMPLATE, context.env)?.with_message("streaming");
    let mut found = Coverage::default();
    for rank in 0..world_size {
        if rank > 0 {
            loader = open(rank)?;
        }
        loader.cover();
        if let Some(state) = state {
            loader.load_state(state)?;
        }
        loader.set_epoch(epoch);
        let batches = loader.iter();
        loop {
            match batches.next_timeout(Duration::from_secs(1))? {
                Next::Batch(batch) => {
                    let coverage = batch.coverage.expect("asked for before the pass began");
                    bar.inc(coverage.rows);
                    found += coverage;
                }
                Next::End => break,
                Next::Pending => {}
            }
        }
    }
    bar.finish_and_clear();

    let order = progress::bar(0, "{msg} {spinner}", context.env)?.with_message("order");
    // One range even where it is empty.
    #[allow(clippy::single_range_in_vec_init)]
    let wanted = [Wanted::new(&loader, epoch, &[from..to], &order)?];
    order.finish_and_clear();
    let expected = expected(&loader, &wanted, context)?[0];
    let proven = found == expected && expected.rows == to - from;
    if options.json {
        let value = json!({
            "proven": proven,
            "epoch": epoch,
            "position": from,
            "end": to,
            "positions": positions,
            "world_size": world_size,
            "batch_size": config.batch_size,
            "expected": coverage_json(&expected),
            "found": coverage_json(&found),
        });
        write_json(&value, context)?;
    } else {
        let out = &mut *context.out;
        line(
            out,
            "epoch",
            &format!("{epoch}, positions {} to {} of {}", grouped(from), grouped(to), grouped(positions)),
        )?;
        line(out, "ranks", &format!("{world_size}, {} sequences each per step", config.batch_size))?;
        line(out, "expected", &coverage_text(&expected))?;
        line(out, "found", &coverage_text(&found))?;
        line(
            out,
            "verdict",
            if proven { PROVEN } else { "NOT PROVEN: what was delivered is not what the files hold" },
        )?;
    }
    Ok(if proven { 0 } else { FAILED })
}

const PROVEN: &str = "proven: every row once, and its tokens are those of the files";

/// A ledger, put together epoch by epoch.
struct Found<'a> {
    loader: &'a Loader,
    ledger: Ledger,
    content: String,
    groups: Vec<Group>,
}

/// Epochs that are proved together: one, unless batches cross to the next.
struct Group {
    epochs: Range<u64>,
    /// Indices of these epochs.
    len: u64,
    from: u64,
    tiling: Tiling,
}

impl Group {
    /// Indices that the chain covers.
    fn covered(&self) -> Vec<Range<u64>> {
        let mut covered = Vec::new();
        let mut at = self.from;
        for hole in self.tiling.holes.iter().chain([&self.tiling.dropped]) {
            covered.push(at..hole.start.max(at));
            at = hole.end.max(at);
        }
        covered.push(at..self.len);
        covered.retain(|range| !range.is_empty());
        covered
    }
}

impl<'a> Found<'a> {
    fn read(loader: &'a Loader, folder: &Path, options: &Options, state: Option<&State>) -> Result<Self, Failure> {
        let ledger = Ledger::read(folder)?;
        let content = loader.content_digest();
        let mut epochs = ledger.epochs(&content);
        if epochs.is_empty() {
            let mut known: Vec<String> = ledger
                .passes()
                .iter()
                .map(|pass| format!("content {}, corpus {}", pass.content, pass.fingerprint))
                .collect();
            known.sort();
            known.dedup();
            let text = format!(
                "the ledger has no batch of this corpus under these settings: it has {}; here are content {content}, corpus {}; \
                 give the corpus and the content settings of the run",
                known.join(" and "),
                loader.corpus().fingerprint()
            );
            return Err(Error::new(ErrorKind::State, text).at(folder).into());
        }
        let first = state.map(State::epoch);
        epochs.retain(|epochs| options.epoch.or(first).is_none_or(|epoch| epochs.contains(&epoch)));
        if epochs.is_empty() {
            let epoch = options.epoch.or(first).unwrap_or_default();
            let text = format!("the ledger has no batch of epoch {epoch}");
            return Err(Error::new(ErrorKind::State, text).at(folder).into());
        }
        let positions = |_| loader.num_positions();
        let groups = epochs
            .into_iter()
            .map(|epochs| {
                let may_drop = loader.config().remainder == Remainder::Drop;
                let mut span = Span { epochs: epochs.clone(), positions: &positions, from: 0, may_drop };
                span.from = state.map_or(0, |state| span.index((state.epoch(), state.position())));
                Group { epochs, len: span.len(), from: span.from, tiling: ledger.tile(&content, &span) }
            })
            .collect();
        Ok(Self { loader, ledger, content, groups })
    }

    /// Epoch and position of an index of `group`.
    fn at(&self, group: &Group, index: u64) -> (u64, u64) {
        let positions = |_| self.loader.num_positions();
        Span { epochs: group.epochs.clone(), positions: &positions, from: 0, may_drop: false }.at(index)
    }

    /// Compares every group with the files.
    fn prove(&self, options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
        let order = progress::bar(0, "{msg} {spinner}", context.env)?.with_message("order");
        let mut wanted = Vec::new();
        let mut owners = Vec::new();
        for (number, group) in self.groups.iter().enumerate() {
            let positions = self.loader.num_positions();
            for (epoch, start) in group.epochs.clone().zip((0..).step_by(positions.max(1) as usize)) {
                let of_epoch = group.covered().into_iter().map(|range| {
                    let clip = |index: u64| index.clamp(start, start + positions) - start;
                    clip(range.start)..clip(range.end)
                });
                let of_epoch: Vec<_> = of_epoch.filter(|range| !range.is_empty()).collect();
                wanted.push(Wanted::new(self.loader, epoch, &of_epoch, &order)?);
                owners.push(number);
            }
        }
        order.finish_and_clear();
        let sums = expected(self.loader, &wanted, context)?;
        drop(wanted);

        let last = self.groups.len() - 1;
        let mut judged = Vec::new();
        for (number, group) in self.groups.iter().enumerate() {
            let parts = owners.iter().zip(&sums).filter(|(owner, _)| **owner == number);
            let expected: Coverage = parts.map(|(_, sum)| *sum).sum();
            // A run may still be at its last epoch; whoever asks for one epoch wants it whole.
            let unfinished = number == last && options.epoch.is_none() && group.tiling.is_unfinished(group.len);
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
                "files": self.ledger.files().len(),
                "passes": self.ledger.passes().len(),
                "torn_lines": self.ledger.torn(),
                "content": self.content,
                "epochs": epochs,
            });
            write_json(&value, context)?;
        } else {
            self.write(&judged, proven, context.out)?;
        }
        Ok(if proven { 0 } else { FAILED })
    }

    /// Global batches whose content is not what the corpus has at their positions.
    fn altered(&self, group: &Group) -> Result<Vec<u64>, Failure> {
        self.loader.cover();
        let mut altered = Vec::new();
        for (step, batch) in group.tiling.chain.iter().enumerate() {
            let (epoch, start) = self.at(group, batch.indices.start);
            let here = (batch.indices.end - batch.indices.start).min(self.loader.num_positions() - start);
            let found = self.loader.sequences_at(epoch, start, here)?.coverage.unwrap_or_default();
            if found != batch.coverage {
                altered.push(step as u64);
            }
        }
        Ok(altered)
    }

    fn write(&self, judged: &[Judged<'_>], proven: bool, out: &mut dyn Write) -> std::io::Result<()> {
        let launches = self.ledger.passes().len();
        line(
            out,
            "ledger",
            &format!(
                "{} ranks, {} passes, {} torn lines",
                self.ledger.files().len(),
                grouped(launches as u64),
                self.ledger.torn().len()
            ),
        )?;
        for judged in judged {
            judged.write(self, out)?;
        }
        let verdict = match proven {
            true if judged.iter().any(|judged| judged.unfinished) => {
                "proven as far as the run has come: every row once, and its tokens are those of the files"
            }
            true => PROVEN,
            false => "NOT PROVEN",
        };
        line(out, "verdict", verdict)
    }

    /// The global batch number `step` of the first group.
    fn batch(&self, step: u64) -> Result<(&Group, &GlobalBatch), Failure> {
        let group = &self.groups[0];
        let batch = usize::try_from(step).ok().and_then(|step| group.tiling.chain.get(step)).ok_or_else(|| {
            let steps = group.tiling.chain.len();
            Error::config(format!("step {step} is asked for, the ledger has {steps} of epoch {}", group.epochs.start))
        })?;
        Ok((group, batch))
    }

    /// Prints which documents a global batch had.
    fn documents_of(&self, step: u64, options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
        let (group, batch) = self.batch(step)?;
        let mut rows: Vec<(u64, u64, u64)> = Vec::new();
        for index in batch.indices.clone() {
            let (epoch, position) = self.at(group, index);
            rows.extend(self.loader.sequences(epoch, position..position + 1).map(|row| (row, epoch, position)));
        }
        rows.sort_unstable();
        let sequences = rows.iter().map(|row| row.0).collect();
        let mut documents =
            Documents { loader: self.loader, sequences, found: Vec::new(), bar: reading_bar(self.loader, context)? };
        sequential::read(self.loader.config(), &paths(self.loader), &mut documents)?;
        documents.bar.finish_and_clear();
        if options.json {
            let names: Vec<&str> = self.loader.corpus().files().iter().map(|file| file.name.as_str()).collect();
            let list = documents.found.iter().map(|found| {
                json!({"shard": names[found.shard], "row": found.row, "sequence": found.sequence,
                    "position": rows[rows.partition_point(|row| row.0 < found.sequence)].2})
            });
            let value = json!({
                "step": step,
                "epoch": batch.epoch,
                "position": batch.position,
                "world_size": batch.world_size,
                "batch_size": batch.batch_size,
                "launches": batch.launches,
                "documents": list.collect::<Vec<_>>(),
            });
            write_json(&value, context)?;
            return Ok(0);
        }
        let out = &mut *context.out;
        line(out, "step", &format!("{step} of epoch {}: {}", batch.epoch, of(batch)))?;
        for found in &documents.found {
            let (_, _, position) = rows[rows.partition_point(|row| row.0 < found.sequence)];
            let name = &self.loader.corpus().files()[found.shard].name;
            line(out, "document", &format!("{name}:{} (sequence {}, position {position})", found.row, found.sequence))?;
        }
        Ok(0)
    }

    /// Prints which steps had a document.
    fn steps_of(&self, shard: &str, row: u64, options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
        let names: Vec<&str> = self.loader.corpus().files().iter().map(|file| file.name.as_str()).collect();
        let matching: Vec<usize> = names
            .iter()
            .enumerate()
            .filter(|(_, name)| ***name == *shard || name.ends_with(&format!("/{shard}")))
            .map(|(index, _)| index)
            .collect();
        let [shard] = matching.as_slice() else {
            let found = if matching.is_empty() { "no" } else { "more than one" };
            return Err(Error::config(format!("{found} shard of the corpus is called `{shard}`")).into());
        };
        let mut place = Place { shard: *shard, row, place: None, bar: reading_bar(self.loader, context)? };
        sequential::read(self.loader.config(), &paths(self.loader), &mut place)?;
        place.bar.finish_and_clear();
        let Some(place) = place.place else {
            return Err(Error::config(format!("`{}` has no document with tokens in row {row}", names[*shard])).into());
        };
        let config = self.loader.config();
        let sequences = sequences_of(&place, config);
        let mut hits = Vec::new();
        for group in &self.groups {
            let bar = progress::bar(group.len, TEMPLATE, context.env)?.with_message("searching");
            let mut index = 0;
            for epoch in group.epochs.clone() {
                for sequence in self.loader.sequences(epoch, 0..self.loader.num_positions()) {
                    if sequences.contains(&sequence) {
                        let chain = &group.tiling.chain;
                        let step = chain.partition_point(|batch| batch.indices.end <= index);
                        let batch = chain.get(step).filter(|batch| batch.indices.contains(&index));
                        hits.push((self.at(group, index), sequence, batch.map(|batch| (step, batch, index))));
                    }
                    index += 1;
                    if index % BAR_EVERY == 0 {
                        bar.set_position(index);
                    }
                }
            }
            bar.finish_and_clear();
        }
        if options.json {
            let list = hits.iter().map(|((epoch, position), sequence, batch)| {
                let mut hit = json!({"epoch": epoch, "position": position, "sequence": sequence, "step": null});
                if let Some((step, batch, index)) = batch {
                    hit["step"] = (*step).into();
                    hit["rank"] = ((index - batch.indices.start) % batch.world_size).into();
                    hit["world_size"] = batch.world_size.into();
                    hit["launches"] = batch.launches.clone().into();
                }
                hit
            });
            let value = json!({"shard": names[*shard], "row": row, "sequences": [sequences.start, sequences.end],
                "deliveries": list.collect::<Vec<_>>()});
            write_json(&value, context)?;
            return Ok(0);
        }
        let out = &mut *context.out;
        let last = sequences.end - 1;
        line(out, "document", &format!("{}:{row}: sequences {} to {last}", names[*shard], sequences.start))?;
        for ((epoch, position), sequence, batch) in hits {
            let place = match batch {
                Some((step, batch, index)) => {
                    format!("step {step}, rank {}, {}", (index - batch.indices.start) % batch.world_size, of(batch))
                }
                None => "not delivered".to_owned(),
            };
            line(out, "sequence", &format!("{sequence}: epoch {epoch}, position {position}, {place}"))?;
        }
        Ok(0)
    }
}

/// A global batch in words.
fn of(batch: &GlobalBatch) -> String {
    format!(
        "positions {} to {}, {} ranks of {}, launch {}",
        batch.position,
        batch.position + (batch.indices.end - batch.indices.start),
        batch.world_size,
        batch.batch_size,
        batch.launches.join(" and ")
    )
}

/// The sequences that read some of a stretch of the stream.
fn sequences_of(place: &Range<u64>, config: &Config) -> Range<u64> {
    let first = place.start.saturating_sub(config.row_tokens() - 1).div_ceil(config.seq_len);
    first..(place.end - 1) / config.seq_len + 1
}

/// A group, and what it should have been.
struct Judged<'a> {
    group: &'a Group,
    expected: Coverage,
    unfinished: bool,
    /// Steps whose content differs from the corpus.
    altered: Vec<u64>,
}

impl Judged<'_> {
    fn sum_is_right(&self) -> bool {
        let covered: u64 = self.group.covered().iter().map(|range| range.end - range.start).sum();
        self.group.tiling.coverage() == self.expected && self.expected.rows == covered
    }

    fn is_proven(&self) -> bool {
        let Tiling { holes, conflicts, doubles, .. } = &self.group.tiling;
        self.sum_is_right() && (holes.is_empty() || self.unfinished) && conflicts.is_empty() && doubles.is_empty()
    }

    fn name(&self) -> String {
        let epochs = &self.group.epochs;
        match epochs.end - epochs.start {
            1 => format!("epoch {}", epochs.start),
            _ => format!("epochs {} to {}", epochs.start, epochs.end - 1),
        }
    }

    fn holes(&self, found: &Found<'_>) -> Vec<[(u64, u64); 2]> {
        let place = |index| found.at(self.group, index);
        self.group.tiling.holes.iter().map(|hole| [place(hole.start), place(hole.end - 1)]).collect()
    }

    fn write(&self, found: &Found<'_>, out: &mut dyn Write) -> std::io::Result<()> {
        let tiling = &self.group.tiling;
        let mut sizes: Vec<u64> = tiling.chain.iter().map(|batch| batch.world_size).collect();
        sizes.dedup();
        let sizes: Vec<String> = sizes.iter().map(u64::to_string).collect();
        let steps = grouped(tiling.chain.len() as u64);
        line(out, "steps", &format!("{}: {steps} global batches, on {} ranks", self.name(), sizes.join(", then ")))?;
        if tiling.spare > 0 {
            let spare = grouped(tiling.spare);
            line(
                out,
                "restarts",
                &format!("{spare} batches of ranks were handed over again later, or not on every rank"),
            )?;
        }
        let dropped = tiling.dropped.end - tiling.dropped.start;
        if dropped > 0 {
            line(out, "remainder", &format!("{dropped} positions at the end fill no global batch and are dropped"))?;
        }
        for [(epoch, first), (_, last)] in self.holes(found).into_iter().take(SHOWN) {
            let name = if self.unfinished { "to come" } else { "HOLE" };
            line(out, name, &format!("epoch {epoch}, positions {first} to {last}: no global batch has them"))?;
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
        line(out, "found", &coverage_text(&tiling.coverage()))
    }

    fn json(&self, found: &Found<'_>) -> Value {
        let tiling = &self.group.tiling;
        let faults = |faults: &[Conflict]| -> Vec<Value> {
            let fault = |fault: &Conflict| {
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
                    "batch_size": batch.batch_size, "rows": batch.coverage.rows, "hash": batch.coverage.hash_text()})
            })
            .collect();
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
            "holes": self.holes(found),
            "not_deterministic": faults(&tiling.conflicts),
            "doubles": faults(&tiling.doubles),
            "altered_steps": self.altered,
            "expected": coverage_json(&self.expected),
            "found": coverage_json(&tiling.coverage()),
        })
    }
}

fn place_of(fault: &Conflict) -> String {
    let Conflict { epoch, position, world_size, runs: [first, second], .. } = fault;
    let ranks = fault.rank.map_or("all ranks".to_owned(), |rank| format!("rank {rank}"));
    format!("epoch {epoch}, position {position}, {ranks} of {world_size} (in {first} and {second})")
}

/// A document in a sequence.
struct FoundDocument {
    shard: usize,
    row: u64,
    sequence: u64,
}

/// Finds the documents of some sequences.
struct Documents<'a> {
    loader: &'a Loader,
    /// Sorted.
    sequences: Vec<u64>,
    found: Vec<FoundDocument>,
    bar: ProgressBar,
}

impl Visitor for Documents<'_> {
    fn row(&mut self, _: u64, _: &[i64]) {}

    fn document(&mut self, shard: usize, row: u64, place: Range<u64>) {
        let of_document = sequences_of(&place, self.loader.config());
        let first = self.sequences.partition_point(|sequence| *sequence < of_document.start);
        for sequence in self.sequences[first..].iter().take_while(|sequence| of_document.contains(sequence)) {
            self.found.push(FoundDocument { shard, row, sequence: *sequence });
        }
    }

    fn read(&mut self, tokens: u64) {
        self.bar.inc(tokens);
    }
}

/// Finds where a document stands in the stream.
struct Place {
    shard: usize,
    row: u64,
    place: Option<Range<u64>>,
    bar: ProgressBar,
}

impl Visitor for Place {
    fn row(&mut self, _: u64, _: &[i64]) {}

    fn document(&mut self, shard: usize, row: u64, place: Range<u64>) {
        if (shard, row) == (self.shard, self.row) {
            self.place = Some(place);
        }
    }

    fn read(&mut self, tokens: u64) {
        self.bar.inc(tokens);
    }
}
