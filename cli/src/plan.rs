//! `forebay plan`: computes the size and cost of a run before a GPU is used.
//!
//! The command opens the corpus, takes one batch and closes the corpus. Everything else is
//! computed. The settings, the launcher's environment and `--world-size` choose the rank.

use std::io::Write;
use std::time::{Duration, Instant};

use forebay::corpus::Corpus;
use forebay::format::Access;
use forebay::layout::Lost;
use forebay::loader::Next;
use forebay::loader::plan::{Advice, Decoding, Distance, LanesAdvice, MemoryPlan, PassPlan, Plan, SourcePlan};
use forebay::order::Arrangement;
use forebay::settings::{MOST_DEFAULT_THREADS, Remainder, Shuffle, available_cpus};
use forebay::storage::{PART_BYTES, is_remote};
use forebay::{Config, Loader};
use serde_json::{Value, json};

use crate::report::{bytes, grouped, line, number_of};
use crate::{Context, Failure, Sets, ShapeOptions};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  forebay plan corpus/ --seq-len 4096 --batch-size 8 --shuffle --world-size 64\n  \
    forebay plan corpus/ --seq-len 4096 --batch-size 8 --shuffle --world-size 64 --advise --cpus 192")]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    #[command(flatten)]
    shape: ShapeOptions,
    /// Number of ranks; the plan is for the first rank
    #[arg(long, value_name = "N")]
    world_size: Option<String>,
    /// Also advises lanes, window, threads and memory for these ranks, with the arithmetic
    #[arg(long)]
    advise: bool,
    /// Number of ranks on a node, for the advice; default: the launcher's number, else 8 at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "advise")]
    ranks_per_node: Option<u64>,
    /// Number of CPUs of a node, for the advice; default: the CPUs of this process
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "advise")]
    cpus: Option<u64>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let own = [
        ("dp_world_size", options.world_size.clone()),
        ("dp_rank", options.world_size.as_ref().map(|_| "0".to_owned())),
    ];
    let flags = [options.shape.flags().as_slice(), &own].concat();
    let config = options.sets.resolve(&options.paths, &flags, context)?.config;
    let opening = Instant::now();
    let loader = Loader::open(config)?;
    let open = opening.elapsed();
    context.tell_notices()?;
    let start = Start { open, first_batch: first_batch(&loader)? };
    let planning = Instant::now();
    let plan = loader.plan()?;
    let took = planning.elapsed();
    let advice = options.advise.then(|| {
        let local = context.env.get("LOCAL_WORLD_SIZE").and_then(|text| text.trim().parse().ok());
        let ranks = options.ranks_per_node.or(local).unwrap_or(USUAL_RANKS).clamp(1, plan.pass.world_size);
        loader.advise(ranks, options.cpus.unwrap_or_else(available_cpus))
    });
    let planned = Planned { loader, start, plan, took, advice };
    if options.json {
        writeln!(context.out, "{}", planned.json())?;
    } else {
        planned.write(context.out)?;
    }
    Ok(0)
}

/// Measures the time from the request for the first batch to its arrival. `None` if a pass has no
/// batch.
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

/// Times of the start.
struct Start {
    open: Duration,
    first_batch: Option<Duration>,
}

struct Planned {
    loader: Loader,
    start: Start,
    plan: Plan,
    took: Duration,
    advice: Option<Advice>,
}

impl Planned {
    fn open_shards(&self) -> u64 {
        self.plan.sources.iter().map(|source| source.open_shards).sum()
    }

    /// Bytes that were scanned for the ends of documents, and the seconds of all scans together.
    fn scanned(&self) -> Option<(u64, f64)> {
        self.loader.corpora().next()?.1.scanned()
    }

    /// The work that `cache_dir` saves later starts.
    fn saved_text(&self) -> &'static str {
        if self.loader.config().index_folder().is_some() {
            "later starts find it saved"
        } else {
            "`cache_dir` would save it"
        }
    }

    /// The cost of finding the ends of documents by an id.
    fn scan_text(&self) -> Option<String> {
        let (scanned, seconds) = self.scanned()?;
        if scanned == 0 {
            return Some("the ends that `document_end_id` finds were saved: nothing was scanned".to_owned());
        }
        let (scanned, saved) = (bytes(scanned), self.saved_text());
        Some(format!("of which {seconds:.3} s to scan {scanned} for `document_end_id`; {saved}"))
    }

    /// The cost of reading document lengths.
    fn lengths_text(&self) -> Option<String> {
        let read = || self.plan.sources.iter().filter_map(|source| Some((source.documents, source.lengths_took?)));
        let seconds = read().map(|(_, took)| took).sum::<Duration>().as_secs_f64();
        let documents = read().map(|(documents, _)| documents).sum();
        let text = || {
            let (lengths, saved) = (number_of(documents, "document length"), self.saved_text());
            format!("of which {seconds:.3} s to read {lengths}; {saved}")
        };
        read().next().map(|_| text())
    }

    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        write_plan(out, &self.plan, &self.loader)?;
        let first = match self.start.first_batch {
            Some(time) => format!("{:.3} s to the first batch", time.as_secs_f64()),
            None => "a pass has no batch".to_owned(),
        };
        let (open, shards) = (self.start.open.as_secs_f64(), number_of(self.open_shards(), "open shard"));
        line(out, "start", &format!("{open:.3} s to open, then {first}; {shards}"))?;
        for text in [self.scan_text(), self.lengths_text()].into_iter().flatten() {
            line(out, "", &text)?;
        }
        line(out, "planned in", &format!("{:.2} s", self.took.as_secs_f64()))?;
        if let Some(advice) = &self.advice {
            write_advice(out, advice)?;
        }
        for warning in self.loader.warnings() {
            line(out, "warning", warning)?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let settings: serde_json::Map<_, _> = forebay::settings::all()
            .iter()
            .map(|setting| (setting.name.to_owned(), setting.text(self.loader.config()).into()))
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "settings": settings,
            "sources": sources_json(&self.plan, &self.loader),
            "pass": pass_json(&self.plan.pass),
            "decoding": self.plan.decoding.as_ref().map(decoding_json),
            "memory": memory_json(&self.plan.memory),
            "start": {
                "open_seconds": self.start.open.as_secs_f64(),
                "first_batch_seconds": self.start.first_batch.map(|time| time.as_secs_f64()),
                "open_shards": self.open_shards(),
                "scan": self.scanned().map(|(bytes, seconds)| json!({"bytes": bytes, "seconds": seconds})),
            },
            "remote": RemoteReading::of(&self.loader, &self.plan).map(|reading| reading.json()),
            "advice": self.advice.as_ref().map(advice_json),
            "plan_seconds": self.took.as_secs_f64(),
            "warnings": self.loader.warnings(),
        })
    }
}

/// Number of ranks on a node, if nothing tells it. Most nodes have that many GPUs.
const USUAL_RANKS: u64 = 8;

/// Price of a million reads in the standard class of the large stores, in US dollars.
const DOLLARS_PER_MILLION: f64 = 0.4;

/// What an epoch asks of object stores while nothing is cached.
struct RemoteReading {
    shards: u64,
    bytes: u64,
    requests: u64,
    /// Whether single rows are read in any order.
    scattered: bool,
}

impl RemoteReading {
    /// `None` if all shards are local.
    fn of(loader: &Loader, plan: &Plan) -> Option<Self> {
        let config = loader.config();
        let files = loader.corpora().flat_map(|(_, corpus)| corpus.files().iter().zip(corpus.facts()));
        let remote = files.filter(|(file, _)| is_remote(&file.path)).map(|(_, facts)| facts);
        let mut found = Self { shards: 0, bytes: 0, requests: 0, scattered: false };
        for facts in remote {
            found.shards += 1;
            found.bytes += facts.stamp.size_bytes;
            // Opening reads the head and the tail.
            found.requests += facts.stamp.size_bytes.div_ceil(PART_BYTES) + 2;
            found.scattered |= facts.access == Access::Random && config.shuffle == Shuffle::Global;
        }
        found.scattered &= found.bytes > config.room_for_objects();
        if found.scattered {
            found.requests += plan.sources.iter().map(|source| source.sequences).sum::<u64>();
        }
        (found.shards > 0).then_some(found)
    }

    fn dollars(&self) -> f64 {
        self.requests as f64 / 1e6 * DOLLARS_PER_MILLION
    }

    fn write(&self, out: &mut dyn Write, config: &Config) -> std::io::Result<()> {
        let text = format!(
            "{} of {}, about {} in an epoch without a cache, about ${:.4} at ${DOLLARS_PER_MILLION} for a million",
            number_of(self.shards, "shard"),
            bytes(self.bytes),
            number_of(self.requests, "request"),
            self.dollars(),
        );
        line(out, "remote", &text)?;
        let kept = match &config.cache_dir {
            Some(folder) => format!("up to {} in `{folder}`", bytes(config.cache_bytes)),
            None => "nothing: set `cache_dir` to read each object once".to_owned(),
        };
        line(out, "cached", &kept)?;
        if self.scattered {
            line(out, "advice", "`shuffle=\"block\"` would read each object in a few large requests")?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        json!({
            "shards": self.shards,
            "bytes": self.bytes,
            "requests": self.requests,
            "dollars": self.dollars(),
            "single_rows": self.scattered,
        })
    }
}

/// The plan of `loader` as one JSON object, and as the lines that `forebay plan` prints of it.
pub fn plan_of(loader: &Loader) -> forebay::Result<(String, String)> {
    let plan = loader.plan()?;
    let values = json!({
        "sources": sources_json(&plan, loader),
        "pass": pass_json(&plan.pass),
        "decoding": plan.decoding.as_ref().map(decoding_json),
        "memory": memory_json(&plan.memory),
    });
    let mut text = Vec::new();
    write_plan(&mut text, &plan, loader).map_err(|error| forebay::Error::io("cannot write the plan", error))?;
    Ok((values.to_string(), String::from_utf8_lossy(&text).into_owned()))
}

fn write_plan(out: &mut dyn Write, plan: &Plan, loader: &Loader) -> std::io::Result<()> {
    for (source, (_, corpus)) in plan.sources.iter().zip(loader.corpora()) {
        write_source(out, source, format_of(corpus), loader.config())?;
    }
    if let Some(reading) = RemoteReading::of(loader, plan) {
        reading.write(out, loader.config())?;
    }
    write_pass(out, plan, loader.config())?;
    write_memory(out, &plan.memory, loader.config())
}

fn sources_json(plan: &Plan, loader: &Loader) -> Vec<Value> {
    let sources = plan.sources.iter().zip(loader.corpora());
    sources.map(|(source, (_, corpus))| source_json(source, format_of(corpus))).collect()
}

fn format_of(corpus: &Corpus) -> &'static str {
    corpus.facts().next().map_or("-", |facts| facts.format.name())
}

fn write_source(out: &mut dyn Write, source: &SourcePlan, format: &str, config: &Config) -> std::io::Result<()> {
    let name = if source.name.is_empty() { String::new() } else { format!("`{}`: ", source.name) };
    line(
        out,
        "corpus",
        &format!(
            "{name}{}, {}, {}, {}, {format}",
            number_of(source.shards, "shard"),
            number_of(source.blocks, "block"),
            number_of(source.documents, "document"),
            number_of(source.tokens, "token"),
        ),
    )?;
    let specials = source.stream_tokens - source.tokens;
    let specials = if specials > 0 { format!(" ({} of them specials)", grouped(specials)) } else { String::new() };
    let held_out = match source.held_out_sequences {
        0 => String::new(),
        sequences => format!("; {} more on the other side of the holdout", grouped(sequences)),
    };
    line(
        out,
        "sequences",
        &format!(
            "{} of {} and a tail of {}, from {}{specials}{held_out}",
            grouped(source.sequences),
            number_of(config.seq_len, "token"),
            grouped(source.tail_tokens),
            number_of(source.stream_tokens, "token")
        ),
    )?;
    if !config.layout.joins() {
        line(out, "layout", &layout_text(source, config))?;
    }
    if let (Some(drawn), false) = (source.drawn_sequences, source.name.is_empty()) {
        let epochs = drawn as f64 / source.sequences.max(1) as f64;
        let (sequences, tokens) = (number_of(drawn, "sequence"), number_of(drawn * config.seq_len, "token"));
        line(out, "drawn", &format!("{sequences}, {tokens}, {epochs:.2} epochs"))?;
    }
    let order = match source.arrangement {
        Arrangement::Sequential => "as in the corpus".to_owned(),
        Arrangement::Global => "one permutation of all sequences".to_owned(),
        Arrangement::Block { chunk, lanes, window } => format!(
            "permuted chunks of {}, then windows of {} in each of {}",
            number_of(chunk, "sequence"),
            grouped(window),
            number_of(lanes, "lane")
        ),
    };
    line(out, "order", &order)?;
    line(out, "moved by", &distance_text(&source.displacement, "positions"))?;
    line(out, "neighbours", &distance_text(&source.neighbours, "positions apart, those of one window"))
}

/// Places of the sequences without a token, as a share of all their places.
fn padding_share(source: &SourcePlan) -> f64 {
    let places = source.row_tokens + source.padding_places;
    if source.padding_places == 0 { 0.0 } else { source.padding_places as f64 / places as f64 }
}

fn layout_text(source: &SourcePlan, config: &Config) -> String {
    let (padding, share) = (number_of(source.padding_places, "place"), padding_share(source) * 100.0);
    let about = if config.pad_to_multiple.is_some() { "about " } else { "" };
    let mut text = format!("{}: {about}{share:.2} % padding, {padding}", config.layout.name());
    let Lost { truncated_documents, truncated_tokens, dropped_documents, dropped_tokens } = source.lost;
    if truncated_documents > 0 {
        let (documents, tokens) = (number_of(truncated_documents, "document"), number_of(truncated_tokens, "token"));
        text += &format!("; {documents} truncated, without their last {tokens}");
    }
    if dropped_documents > 0 {
        let (documents, tokens) = (number_of(dropped_documents, "document"), number_of(dropped_tokens, "token"));
        text += &format!("; {documents} dropped, with {tokens}");
    }
    text
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
    let rows = number_of(decoding.rows, "row");
    let how = match (decoding.whole_pass, decoding.ranks) {
        (true, 1) => format!("simulated: one rank's pass of {rows}"),
        (true, ranks) => format!("simulated: a pass of all {ranks} ranks"),
        (false, _) => format!("simulated: {rows} of one rank, after {} to warm up", grouped(decoding.warm_up_rows)),
    };
    format!("{:.2} tokens decoded per token delivered ({how})", decoding.amplification)
}

fn write_pass(out: &mut dyn Write, plan: &Plan, config: &Config) -> std::io::Result<()> {
    let pass = &plan.pass;
    if let Some(decoding) = &plan.decoding {
        line(out, "decoding", &decoding_text(decoding))?;
        if pass.sharing_ranks > 1 {
            let remedy = match config.shuffle {
                Shuffle::Block => "; a multiple of `dp_world_size` as `lanes`, set before the first run, avoids that",
                _ => "",
            };
            line(out, "", &format!("{} draw from the same blocks{remedy}", number_of(pass.sharing_ranks, "rank")))?;
        }
    }
    let ranks = format!(
        "on each of {}, with {} each and {} over all",
        number_of(pass.world_size, "rank"),
        number_of(config.batch_size, "row"),
        grouped(pass.global_batch)
    );
    let Some(steps) = pass.steps else {
        return line(out, "steps", &format!("without end, {ranks}"));
    };
    // In a layout with padding, a row counts as `seq_len` places.
    let unit = if config.layout.joins() { "token" } else { "place" };
    let delivered = number_of(pass.delivered_tokens, unit);
    line(out, "steps", &format!("{} {ranks}; a pass delivers {delivered}", grouped(steps)))?;
    if pass.cut_rows > 0 {
        line(out, "", &format!("`max_steps` leaves {} undelivered", number_of(pass.cut_rows, "position")))?;
        return Ok(());
    }
    let text = match pass.remainder {
        Remainder::Drop => format!(
            "drop: leaves out {}, among them {}",
            number_of(pass.dropped_tokens, unit),
            number_of(pass.dropped_sequences, "whole sequence")
        ),
        Remainder::Pad => format!(
            "pad: fills {} with `pad_id`, among them {}",
            number_of(pass.padded_tokens, "place"),
            number_of(pass.padded_rows, "whole row")
        ),
        Remainder::Wrap => format!(
            "wrap: repeats {}, among them {}",
            number_of(pass.repeated_tokens, "token"),
            number_of(pass.repeated_rows, "whole row")
        ),
        Remainder::Short => format!(
            "short: the last step has {} over all ranks and fills {} with `pad_id`",
            number_of(pass.last_batch_rows, "row"),
            number_of(pass.padded_tokens, "place")
        ),
    };
    line(out, "remainder", &text)
}

fn write_memory(out: &mut dyn Write, memory: &MemoryPlan, config: &Config) -> std::io::Result<()> {
    line(
        out,
        "memory",
        &format!("at most {} of {} on each rank", bytes(memory.budgeted_bytes()), bytes(memory.budget_bytes)),
    )?;
    for (name, value, what) in [
        ("batches", memory.batches_bytes, format!("{} of {}", config.prefetch_batches + 1, bytes(memory.batch_bytes))),
        (
            "threads",
            memory.held_blocks_bytes,
            format!("one decoded block for each of {}", number_of(config.num_threads.unwrap_or(1), "thread")),
        ),
        ("cache", memory.cache_bytes, "decoded blocks".to_owned()),
        ("index", memory.index_bytes, "tables of shards and blocks, which the budget does not count".to_owned()),
    ] {
        line(out, "", &format!("{name:<8} {:>10}  {what}", bytes(value)))?;
    }
    Ok(())
}

/// Prints a line for each choice, with its arithmetic.
fn write_advice(out: &mut dyn Write, advice: &Advice) -> std::io::Result<()> {
    let Advice { ranks, ranks_per_node, cpus, num_threads, block_bytes, .. } = *advice;
    let nodes = number_of(ranks.div_ceil(ranks_per_node), "node");
    let here = number_of(ranks_per_node, "rank");
    line(out, "advice", &format!("{} on {nodes} with {} each", number_of(ranks, "rank"), number_of(cpus, "CPU")))?;
    let mut choice =
        |name: &str, value: &str, how: &str| line(out, "", &format!("{:<24} {how}", format!("{name}={value}")));
    match &advice.lanes {
        Some(LanesAdvice { set: (lanes, window), lanes: advised, window_tokens, of_rank, .. }) => {
            let kept = if lanes == advised { "as it is set" } else { "the window of a lane stays as it is" };
            let of_rank = number_of(*of_rank, "lane");
            let ranks = number_of(ranks, "rank");
            let text = format!("smallest multiple of {ranks} that is not below {lanes}; {of_rank} for each rank");
            choice("lanes", &advised.to_string(), &text)?;
            let text = format!("{} tokens / {lanes} lanes x {advised} lanes: {kept}", tokens(*window));
            choice("window_tokens", &tokens(*window_tokens), &text)?;
        }
        None => choice("lanes", "-", "the order of these settings has none")?,
    }
    let text = format!(
        "{} / {here} - 1 = {}, within 1 to {MOST_DEFAULT_THREADS}",
        number_of(cpus, "CPU"),
        (cpus / ranks_per_node).saturating_sub(1)
    );
    choice("num_threads", &num_threads.to_string(), &text)?;
    let mut text = format!("{} batches of {}", advice.batches.0, bytes(advice.batches.1));
    if block_bytes > 0 {
        let threads = number_of(num_threads, "thread");
        text += &format!(", and 5/4 of: a block of {} for each of {threads}", bytes(block_bytes));
        if advice.windows_bytes > 0 {
            text += &format!(", and {} to draw from", bytes(advice.windows_bytes));
        }
    }
    if advice.holds_lengths {
        text += "; an eighth is for document lengths, unless an index is saved";
    }
    let budget = format!("{}MiB", advice.memory_budget >> 20);
    choice("memory_budget", &budget, &text)?;
    if let Some(LanesAdvice { of_rank, drawn_tokens, .. }) = advice.lanes.filter(|_| advice.windows_bytes > 0) {
        let blocks = format!("blocks of {} at both ends", bytes(block_bytes));
        let text = format!("{}: {} tokens, and {blocks}", number_of(of_rank, "lane"), tokens(drawn_tokens));
        line(out, "", &format!("{:<24} to draw from {text}", ""))?;
    }
    let node = ranks_per_node * advice.memory_budget;
    let all = format!("{} of a node x {budget} = {}", here, bytes(node));
    line(out, "", &format!("{:<24} {all}", "memory of a node"))
}

/// A number of tokens, as settings take it.
fn tokens(tokens: u64) -> String {
    match tokens {
        0 => "0".to_owned(),
        _ if tokens.is_multiple_of(1 << 30) => format!("{}Gi", tokens >> 30),
        _ if tokens.is_multiple_of(1 << 20) => format!("{}Mi", tokens >> 20),
        _ if tokens.is_multiple_of(1 << 10) => format!("{}Ki", tokens >> 10),
        _ => tokens.to_string(),
    }
}

fn advice_json(advice: &Advice) -> Value {
    json!({
        "ranks": advice.ranks,
        "ranks_per_node": advice.ranks_per_node,
        "cpus": advice.cpus,
        "lanes": advice.lanes.map(|lanes| lanes.lanes),
        "window_tokens": advice.lanes.map(|lanes| lanes.window_tokens),
        "num_threads": advice.num_threads,
        "memory_budget": advice.memory_budget,
        "windows_bytes": advice.windows_bytes,
        "node_bytes": advice.ranks_per_node * advice.memory_budget,
    })
}

fn source_json(source: &SourcePlan, format: &str) -> Value {
    let arrangement = match source.arrangement {
        Arrangement::Sequential => json!({"kind": "sequential"}),
        Arrangement::Global => json!({"kind": "global"}),
        Arrangement::Block { chunk, lanes, window } => {
            json!({"kind": "block", "chunk_sequences": chunk, "lanes": lanes, "window_sequences": window})
        }
    };
    json!({
        "name": source.name,
        "format": format,
        "shards": source.shards,
        "blocks": source.blocks,
        "documents": source.documents,
        "tokens": source.tokens,
        "stream_tokens": source.stream_tokens,
        "sequences": source.sequences,
        "held_out_sequences": source.held_out_sequences,
        "drawn_sequences": source.drawn_sequences,
        "tail_tokens": source.tail_tokens,
        "row_tokens": source.row_tokens,
        "padding_places": source.padding_places,
        "padding_share": padding_share(source),
        "truncated_documents": source.lost.truncated_documents,
        "truncated_tokens": source.lost.truncated_tokens,
        "dropped_documents": source.lost.dropped_documents,
        "dropped_tokens": source.lost.dropped_tokens,
        "lengths_seconds": source.lengths_took.map(|took| took.as_secs_f64()),
        "arrangement": arrangement,
        "displacement": distance_json(&source.displacement),
        "neighbours": distance_json(&source.neighbours),
    })
}

fn decoding_json(decoding: &Decoding) -> Value {
    json!({
        "amplification": decoding.amplification,
        "blocks": decoding.blocks,
        "tokens": decoding.tokens,
        "ranks": decoding.ranks,
        "rows": decoding.rows,
        "warm_up_rows": decoding.warm_up_rows,
        "whole_pass": decoding.whole_pass,
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

fn pass_json(pass: &PassPlan) -> Value {
    json!({
        "steps": pass.steps,
        "sharing_ranks": pass.sharing_ranks,
        "delivered_rows": pass.delivered_rows,
        "cut_rows": pass.cut_rows,
        "global_batch": pass.global_batch,
        "world_size": pass.world_size,
        "remainder": pass.remainder.name(),
        "delivered_tokens": pass.delivered_tokens,
        "dropped_sequences": pass.dropped_sequences,
        "dropped_tokens": pass.dropped_tokens,
        "padded_rows": pass.padded_rows,
        "padded_tokens": pass.padded_tokens,
        "repeated_rows": pass.repeated_rows,
        "repeated_tokens": pass.repeated_tokens,
        "last_batch_rows": pass.last_batch_rows,
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
