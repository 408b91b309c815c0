//! `forebay plan`: what a run comes to and costs, before a GPU is used.
//!
//! Opens the corpus, takes one batch and closes it again; everything else is computed. The settings of the run, its launcher's environment and
//! `--world-size` say for which rank.

use std::io::Write;
use std::time::{Duration, Instant};

use forebay::config::Remainder;
use forebay::loader::Next;
use forebay::order::Arrangement;
use forebay::plan::{Decoding, Distance, EpochPlan, MemoryPlan, Plan, SourcePlan};
use forebay::{Config, Loader};
use serde_json::{Value, json};

use crate::report::{bytes, grouped, line};
use crate::{Context, Failure, Sets};

#[derive(Debug, clap::Args)]
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
    /// Plans for the first of so many ranks
    #[arg(long, value_name = "N")]
    world_size: Option<String>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let flags = [
        ("seq_len", options.seq_len.clone()),
        ("batch_size", options.batch_size.clone()),
        ("shuffle", options.shuffle.clone()),
        ("dp_world_size", options.world_size.clone()),
        ("dp_rank", options.world_size.as_ref().map(|_| "0".to_owned())),
    ];
    let config = options.sets.resolve(&options.paths, &flags, context)?.config;
    let opening = Instant::now();
    let loader = Loader::open(config)?;
    let open = opening.elapsed();
    let start = Start { open, first_batch: first_batch(&loader)? };
    let planning = Instant::now();
    let plan = loader.plan()?;
    let planned = Planned { loader, start, plan, took: planning.elapsed() };
    if options.json {
        writeln!(context.out, "{}", planned.json())?;
    } else {
        planned.write(context.out)?;
    }
    Ok(0)
}

/// Time from the request for the first batch to its coming; `None` where an epoch has none.
fn first_batch(loader: &Loader) -> Result<Option<Duration>, Failure> {
    let asked = Instant::now();
    let batches = loader.iter();
    let found = loop {
        match batches.next_timeout(Duration::from_secs(1))? {
            Next::Batch(_) => break Some(asked.elapsed()),
            Next::End => break None,
            Next::Pending => {}
        }
    };
    loader.close();
    Ok(found)
}

/// What starting took.
struct Start {
    open: Duration,
    first_batch: Option<Duration>,
}

struct Planned {
    loader: Loader,
    start: Start,
    plan: Plan,
    took: Duration,
}

impl Planned {
    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let config = self.loader.config();
        for source in &self.plan.sources {
            let name = if source.name.is_empty() { String::new() } else { format!("{}: ", source.name) };
            line(
                out,
                "corpus",
                &format!(
                    "{name}{} shards, {} blocks, {} documents, {} tokens, {}",
                    grouped(source.shards),
                    grouped(source.blocks),
                    grouped(source.documents),
                    grouped(source.tokens),
                    source.format
                ),
            )?;
            write_source(out, source, config)?;
        }
        match &self.plan.epoch {
            Some(epoch) => write_epoch(out, epoch, config)?,
            None => line(out, "steps", "without end: no source ever ends the mixture")?,
        }
        write_memory(out, &self.plan.memory, config)?;
        let first = match self.start.first_batch {
            Some(time) => format!("{:.3} s to the first batch", time.as_secs_f64()),
            None => "an epoch has no batch".to_owned(),
        };
        let open = self.start.open.as_secs_f64();
        line(out, "start", &format!("{open:.3} s to open {} shards, then {first}", grouped(self.shards())))?;
        line(out, "planned in", &format!("{:.2} s", self.took.as_secs_f64()))?;
        for warning in self.loader.warnings() {
            line(out, "warning", warning)?;
        }
        Ok(())
    }

    fn shards(&self) -> u64 {
        self.plan.sources.iter().map(|source| source.shards).sum()
    }

    fn json(&self) -> Value {
        let settings: serde_json::Map<_, _> = forebay::settings::all()
            .iter()
            .map(|setting| (setting.name.to_owned(), (setting.get)(self.loader.config()).into()))
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "settings": settings,
            "sources": self.plan.sources.iter().map(source_json).collect::<Vec<_>>(),
            "epoch": self.plan.epoch.as_ref().map(epoch_json),
            "memory": memory_json(&self.plan.memory),
            "start": {
                "open_seconds": self.start.open.as_secs_f64(),
                "shards_opened": self.shards(),
                "first_batch_seconds": self.start.first_batch.map(|time| time.as_secs_f64()),
            },
            "plan_seconds": self.took.as_secs_f64(),
            "warnings": self.loader.warnings(),
        })
    }
}

fn write_source(out: &mut dyn Write, source: &SourcePlan, config: &Config) -> std::io::Result<()> {
    let specials = source.stream_tokens - source.tokens;
    let specials = if specials > 0 { format!(" ({} of them specials)", grouped(specials)) } else { String::new() };
    line(
        out,
        "sequences",
        &format!(
            "{} of {} tokens and a tail of {}, from {} tokens{specials}",
            grouped(source.sequences),
            grouped(config.seq_len),
            grouped(source.tail_tokens),
            grouped(source.stream_tokens)
        ),
    )?;
    if let Some(drawn) = source.drawn {
        let much = match (drawn.sequences, drawn.epochs) {
            (Some(sequences), Some(epochs)) => format!("{} sequences, {epochs:.3} epochs of it, ", grouped(sequences)),
            _ => String::new(),
        };
        line(out, "drawn", &format!("{much}{:.3} % of the mixture", drawn.share * 100.0))?;
    }
    let order = match source.arrangement {
        Arrangement::Sequential => "as in the corpus".to_owned(),
        Arrangement::Global => "one permutation of all sequences".to_owned(),
        Arrangement::Block { chunk, lanes, window } => format!(
            "permuted chunks of {} sequences, then windows of {} in each of {lanes} lanes",
            grouped(chunk),
            grouped(window)
        ),
    };
    line(out, "order", &order)?;
    line(out, "moved by", &distance_text(&source.displacement, "positions"))?;
    line(out, "neighbours", &distance_text(&source.neighbours, "positions apart, those of one window"))?;
    if let Some(decoding) = &source.decoding {
        line(out, "decoding", &decoding_text(decoding))?;
        if decoding.sharing_ranks > 1 {
            let remedy = match source.arrangement {
                Arrangement::Block { .. } => {
                    "; a multiple of `dp_world_size` as `lanes`, set before the first run, avoids that"
                }
                Arrangement::Sequential | Arrangement::Global => "",
            };
            line(out, "", &format!("{} ranks draw from the same blocks{remedy}", grouped(decoding.sharing_ranks)))?;
        }
    }
    Ok(())
}

fn distance_text(distance: &Distance, unit: &str) -> String {
    let expected = grouped(distance.expected_mean.round() as u64);
    if distance.sampled == 0 {
        return format!("{expected} {unit}, by the arrangement");
    }
    format!(
        "{} {unit}, in the mean of {} (expected {expected}); p50 {}, p95 {}",
        grouped(distance.mean.round() as u64),
        grouped(distance.sampled),
        grouped(distance.p50),
        grouped(distance.p95)
    )
}

fn decoding_text(decoding: &Decoding) -> String {
    let rows = grouped(decoding.rows);
    let how = match (decoding.whole_epoch, decoding.ranks) {
        (true, 1) => format!("one rank's epoch of {rows} rows simulated"),
        (true, ranks) => format!("an epoch of all {ranks} ranks simulated"),
        (false, _) => {
            format!("{rows} rows of one rank simulated, after {} to warm up", grouped(decoding.warm_up_rows))
        }
    };
    format!("{:.2} tokens decoded per token of the corpus ({how})", decoding.amplification)
}

fn write_epoch(out: &mut dyn Write, epoch: &EpochPlan, config: &Config) -> std::io::Result<()> {
    line(
        out,
        "steps",
        &format!(
            "{} on every one of {} ranks, {} rows each, {} over all ranks; {} tokens delivered",
            grouped(epoch.steps),
            grouped(epoch.world_size),
            grouped(config.batch_size),
            grouped(epoch.global_batch),
            grouped(epoch.delivered_tokens)
        ),
    )?;
    let text = match epoch.remainder {
        Remainder::Drop => format!(
            "drop: {} tokens are left out, {} whole sequences among them",
            grouped(epoch.dropped_tokens),
            grouped(epoch.dropped_sequences)
        ),
        Remainder::Pad => format!(
            "pad: {} places are filled with `pad_id`, {} whole rows among them",
            grouped(epoch.padded_tokens),
            grouped(epoch.padded_rows)
        ),
        Remainder::Wrap => format!(
            "wrap: {} tokens are given a second time, {} whole rows among them",
            grouped(epoch.repeated_tokens),
            grouped(epoch.repeated_rows)
        ),
        Remainder::Short => format!(
            "short: the last step has {} rows over all ranks, {} places are filled with `pad_id`",
            grouped(epoch.last_batch_rows),
            grouped(epoch.padded_tokens)
        ),
    };
    line(out, "remainder", &text)
}

fn write_memory(out: &mut dyn Write, memory: &MemoryPlan, config: &Config) -> std::io::Result<()> {
    line(
        out,
        "memory",
        &format!("{} of {} at most on each rank", bytes(memory.budgeted_bytes()), bytes(memory.budget_bytes)),
    )?;
    for (name, value, what) in [
        ("batches", memory.batches_bytes, format!("{} of {}", config.prefetch_batches + 1, bytes(memory.batch_bytes))),
        (
            "threads",
            memory.held_blocks_bytes,
            format!("one decoded block for each of {}", config.num_threads.unwrap_or(1)),
        ),
        ("cache", memory.cache_bytes, "decoded blocks".to_owned()),
        ("index", memory.index_bytes, "tables of shards and blocks, beside the budget".to_owned()),
    ] {
        line(out, "", &format!("{name:<8} {:>10}  {what}", bytes(value)))?;
    }
    Ok(())
}

fn source_json(source: &SourcePlan) -> Value {
    let arrangement = match source.arrangement {
        Arrangement::Sequential => json!({"kind": "sequential"}),
        Arrangement::Global => json!({"kind": "global"}),
        Arrangement::Block { chunk, lanes, window } => {
            json!({"kind": "block", "chunk_sequences": chunk, "lanes": lanes, "window_sequences": window})
        }
    };
    json!({
        "name": source.name,
        "format": source.format,
        "drawn": source.drawn.map(|drawn| json!({
            "sequences": drawn.sequences,
            "epochs": drawn.epochs,
            "share": drawn.share,
        })),
        "shards": source.shards,
        "blocks": source.blocks,
        "documents": source.documents,
        "tokens": source.tokens,
        "stream_tokens": source.stream_tokens,
        "sequences": source.sequences,
        "tail_tokens": source.tail_tokens,
        "arrangement": arrangement,
        "displacement": distance_json(&source.displacement),
        "neighbours": distance_json(&source.neighbours),
        "decoding": source.decoding.map(|decoding| json!({
            "amplification": decoding.amplification,
            "blocks": decoding.blocks,
            "tokens": decoding.tokens,
            "ranks": decoding.ranks,
            "rows": decoding.rows,
            "warm_up_rows": decoding.warm_up_rows,
            "whole_epoch": decoding.whole_epoch,
            "sharing_ranks": decoding.sharing_ranks,
        })),
    })
}

fn distance_json(distance: &Distance) -> Value {
    json!({
        "expected_mean": distance.expected_mean,
        "mean": distance.mean,
        "p50": distance.p50,
        "p95": distance.p95,
        "sampled": distance.sampled,
    })
}

fn epoch_json(epoch: &EpochPlan) -> Value {
    let remainder = match epoch.remainder {
        Remainder::Drop => "drop",
        Remainder::Pad => "pad",
        Remainder::Wrap => "wrap",
        Remainder::Short => "short",
    };
    json!({
        "steps": epoch.steps,
        "global_batch": epoch.global_batch,
        "world_size": epoch.world_size,
        "remainder": remainder,
        "delivered_tokens": epoch.delivered_tokens,
        "dropped_sequences": epoch.dropped_sequences,
        "dropped_tokens": epoch.dropped_tokens,
        "padded_rows": epoch.padded_rows,
        "padded_tokens": epoch.padded_tokens,
        "repeated_rows": epoch.repeated_rows,
        "repeated_tokens": epoch.repeated_tokens,
        "last_batch_rows": epoch.last_batch_rows,
    })
}

fn memory_json(memory: &MemoryPlan) -> Value {
    json!({
        "batch_bytes": memory.batch_bytes,
        "batches_bytes": memory.batches_bytes,
        "held_blocks_bytes": memory.held_blocks_bytes,
        "cache_bytes": memory.cache_bytes,
        "index_bytes": memory.index_bytes,
        "budgeted_bytes": memory.budgeted_bytes(),
        "budget_bytes": memory.budget_bytes,
    })
}
