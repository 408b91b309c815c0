//! `forebay rewrite`: writes the documents of a corpus to files that a loader reads fast.
//!
//! A loader's order does not depend on the files. So the result gives the same batches as the
//! source if `shuffle` is `global` or `block`. Sources are joined, or cut between documents, into
//! shards of nearly equal size. The metadata of the sources decides which sources form a group of
//! shards. So threads write shards in parallel, and a later run knows which shards are missing.
//!
//! ```text
//! options -> source (rows by arrow-rs) -> groups -> work (cursor -> output -> content)
//!         -> manifest -> summary
//! ```

mod content;
mod cursor;
mod fields;
mod flat_output;
mod groups;
mod id_type;
mod manifest;
mod options;
mod output;
mod source;
mod summary;
mod target;
mod work;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use forebay::corpus::mixed_columns;
use forebay::corpus::parts::{Part, complete_count, part_names};
use forebay::format::{self, OpenOptions};
use forebay::tokens::Dtype;
use forebay::{Config, Error, ErrorKind};
use rayon::prelude::*;
use serde_json::{Value, json};

use self::fields::CarriedField;
use self::flat_output::FlatFormat;
use self::groups::{SourceGroup, groups};
use self::id_type::{DTYPES, smallest_dtype, smallest_for};
use self::manifest::Manifest;
pub(crate) use self::options::Options;
use self::options::{ShardForm, name};
use self::source::SourceShard;
use self::summary::Summary;
use self::target::refuse_inside;
use self::work::{Rewriting, ShardNames, WrittenShard};
use crate::report::{grouped, line};
use crate::{Context, Failure, progress};

const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {human_pos} tokens, {eta} left";

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let flags = [("token_column", options.token_column.clone())];
    let config = options.sets.resolve(&options.paths, &flags, context)?.config;
    if config.mixture.is_some() {
        return Err(Error::config("`mixture` is set: rewrite its corpora one by one").into());
    }
    config.validate()?;
    let target = &*options.target;
    refuse_inside(target, &config.data)?;
    let began = Instant::now();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.num_threads.unwrap_or(1) as usize)
        .thread_name(|index| format!("forebay-rewrite-{index}"))
        .build()
        .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads").with_source(error))?;
    let open = OpenOptions::of(&config);

    let files = context.find(&open.files, &config.data, config.format)?;
    let bar =
        progress::bar(files.len() as u64, "{msg} {wide_bar} {percent}% {human_pos} shards, {eta} left", context.env)?
            .with_message("opening");
    let opened: Vec<_> =
        pool.install(|| files.par_iter().map(|file| SourceShard::open(file, &open)).inspect(|_| bar.inc(1)).collect());
    bar.finish_and_clear();
    let (mut sources, mut faults) = (Vec::with_capacity(files.len()), Vec::new());
    for source in opened {
        source.map(|source| sources.push(source)).unwrap_or_else(|error| faults.push(error));
    }
    faults.extend(mixed_columns(sources.iter().map(|source: &SourceShard| (&*source.file.path, source.facts)), &open));
    if !faults.is_empty() {
        return Err(Error::all(faults).into());
    }
    // A plain file without tokens is an empty document, which needs no shard.
    sources.retain(|source| !(source.plain && source.facts.counts.tokens == 0));

    let fields = carried(&sources)?;
    if let Some(format) = options.to.flat() {
        refuse_columns(options, format, &fields)?;
    }
    let tokens: u64 = sources.iter().map(|source| source.facts.counts.tokens).sum();
    let settle = || -> forebay::Result<Value> {
        if let Some(dtype) = DTYPES.iter().find(|dtype| dtype.name() == options.dtype) {
            if let Some(format) = options.to.flat().filter(|format| format.type_for(*dtype) != Some(*dtype)) {
                let other =
                    format.type_for(*dtype).map_or_else(String::new, |other| format!(", such as {}", other.name()));
                let (to, dtype) = (name(options.to), dtype.name());
                let text =
                    format!("`--to {to}` has no ids of type {dtype}: choose another `--dtype`{other}, or `auto`");
                return Err(Error::config(text));
            }
            return Ok(json!({"dtype": dtype.name()}));
        }
        let bar = progress::bar(tokens, TEMPLATE, context.env)?.with_message("finding the largest id");
        let smallest = pool.install(|| smallest_dtype(&sources, &open, &bar))?;
        bar.finish_and_clear();
        let specials = [config.bos_id, config.eos_id].into_iter().flatten().filter(|_| options.to.joins());
        let special = smallest_for(specials.max().map_or(0, i64::from));
        let rank = |dtype: &Dtype| DTYPES.iter().position(|other| other == dtype);
        let smallest = if rank(&special) > rank(&smallest) { special } else { smallest };
        let dtype = options.to.flat().map_or(Some(smallest), |format| format.type_for(smallest));
        let dtype = dtype.ok_or_else(|| {
            let (to, name) = (name(options.to), smallest.name());
            Error::config(format!("`--to {to}` holds ids below 2^32, and the ids need {name}; choose another format"))
        })?;
        Ok(json!({"dtype": dtype.name()}))
    };
    let groups = groups(&sources, options.shard_tokens);
    let names = ShardNames::new(&groups, options.to.suffix());
    let named = options.named(&config);
    if options.merge {
        let settled = settle_of_parts(options, settle)?;
        let shards = join(target, &named, &sources, &groups, &names, &settled)?;
        return summarise(options, &config, &sources, &shards, &settled, began, context);
    }
    let manifest = match options.part {
        None => Manifest::open(target, &named, &sources, settle)?,
        Some(part) => {
            let is_own = |name: &str| names.group_of(name).is_some_and(|group| part.takes(group));
            let settled = settle_of_parts(options, settle)?;
            Manifest::open_part(target, part, &named, &sources, settled, &is_own)?
        }
    };
    let dtype = dtype_of(&manifest.settled, target)?;

    let own: Vec<usize> =
        (0..groups.len()).filter(|group| options.part.is_none_or(|part| part.takes(*group))).collect();
    let tokens = own.iter().map(|group| groups[*group].tokens).sum();
    let bar = progress::bar(tokens, TEMPLATE, context.env)?.with_message("rewriting");
    let is_own = |name: &str| names.group_of(name).is_some_and(|group| own.binary_search(&group).is_ok());
    let there = manifest.done.iter().filter(|(name, _)| is_own(name));
    bar.set_position(there.map(|(_, done)| done.content.tokens).sum());
    bar.reset_eta();
    // The column of a source without tokens may have any name, or be missing.
    let full = sources.iter().find(|source| source.facts.counts.tokens > 0);
    let column = full.map(|source| source.column.clone());
    let work = Rewriting {
        groups: &groups,
        sources: &sources,
        target,
        names: &names,
        column: column.as_deref().unwrap_or(format::TOKEN_COLUMNS[0]),
        fields: &fields,
        shape: ShardForm { container: options.container(), dtype, batch_tokens: options.batch_tokens },
        specials: (config.bos_id, config.eos_id),
        open: opened_as(options, dtype, OpenOptions { token_column: column.clone(), ..open }),
        manifest: &manifest,
        bar: &bar,
        stop: AtomicBool::new(false),
    };
    let results: Vec<_> = pool.install(|| own.par_iter().with_max_len(1).map(|group| work.guarded(*group)).collect());
    bar.finish_and_clear();
    let mut shards = Vec::new();
    let mut faults = Vec::new();
    for result in results {
        result.map(|written| shards.extend(written)).unwrap_or_else(|error| faults.push(error));
    }
    if !faults.is_empty() {
        return Err(Error::all(faults).into());
    }
    match options.part {
        None => {
            manifest.complete(shards.len())?;
            summarise(options, &config, &sources, &shards, &manifest.settled, began, context)
        }
        Some(part) => {
            let tokens: u64 = shards.iter().map(|shard| shard.done.content.tokens).sum();
            let kept = shards.iter().filter(|shard| shard.was_there).count();
            if options.json {
                let value = json!({"part": part.to_string(), "shards": shards.len(), "kept": kept, "tokens": tokens});
                writeln!(context.out, "{value}")?;
            } else {
                line(context.out, "part", &format!("{part}, in {}", target.display()))?;
                line(context.out, "shards", &format!("{}, of which {kept} were there", grouped(shards.len() as u64)))?;
                line(context.out, "tokens", &grouped(tokens))?;
            }
            Ok(0)
        }
    }
}

/// Decides what the options of a part leave open. A part does not see all ids, so `--dtype` must
/// name their type.
fn settle_of_parts(options: &Options, settle: impl FnOnce() -> forebay::Result<Value>) -> forebay::Result<Value> {
    if options.dtype == "auto" {
        return Err(Error::config(
            "a part does not read all ids: name their type by `--dtype`, such as `--dtype uint16`",
        ));
    }
    settle()
}

/// The type of ids that a manifest names.
fn dtype_of(settled: &Value, target: &Path) -> forebay::Result<Dtype> {
    let dtype = DTYPES.into_iter().find(|dtype| settled["dtype"] == dtype.name());
    dtype.ok_or_else(|| {
        Error::data("the manifest is damaged: it names no type of ids; remove the folder and begin anew").at(target)
    })
}

/// Completes the rewriting whose parts lie in `target`. Fails with the names of missing parts.
fn join(
    target: &Path,
    named: &manifest::Options,
    sources: &[SourceShard],
    groups: &[SourceGroup],
    names: &ShardNames,
    settled: &Value,
) -> forebay::Result<Vec<WrittenShard>> {
    let parts = manifest::Parts::open(target, named, sources)?;
    let found: Vec<_> =
        groups.iter().enumerate().map(|(index, group)| names.complete(index, group, &parts.done)).collect();
    let unfinished = found.iter().enumerate().filter(|(_, shards)| shards.is_none());
    if let Some(group) = unfinished.clone().map(|(group, _)| group).next() {
        let count = complete_count(&parts.found, target)?;
        let missing: BTreeSet<Part> = unfinished.map(|(group, _)| Part::of(group, count)).collect();
        let text = format!("`{}` is missing: run {} again", names.of(group, 0), part_names(&missing));
        return Err(Error::new(ErrorKind::NotFound, text).at(target));
    }
    let shards: Vec<_> = found.into_iter().flatten().flatten().collect();
    parts.complete(named, sources, settled, &shards)?;
    Ok(shards.into_iter().map(|(_, done)| WrittenShard { done, was_there: true }).collect())
}

/// Prints the result.
fn summarise(
    options: &Options,
    config: &Config,
    sources: &[SourceShard],
    shards: &[WrittenShard],
    settled: &Value,
    began: Instant,
    context: &mut Context<'_>,
) -> Result<u8, Failure> {
    let target = &*options.target;
    let dtype = dtype_of(settled, target)?;
    let has_eos = config.eos_id.is_some() || config.bos_id.is_some() || config.document_end_id.is_some();
    let lost =
        (options.to.joins() && !has_eos).then_some(sources.iter().map(|source| source.facts.counts.starts).sum());
    let mut summary = Summary::new(sources, shards, dtype, options.to, began);
    summary.lost_ends = lost.unwrap_or(0);
    if options.json {
        writeln!(context.out, "{}", summary.json(target))?;
    } else {
        summary.write(target, context.out)?;
    }
    Ok(0)
}

/// Fails if files of `format` cannot hold one of `fields`.
fn refuse_columns(options: &Options, format: FlatFormat, fields: &[CarriedField]) -> forebay::Result<()> {
    let Some(field) = fields.iter().find(|field| format.column() != Some(&*field.name) || field.is_per_document())
    else {
        return Ok(());
    };
    let held = format.column().map_or_else(
        || "no columns beside the ids".to_owned(),
        |name| format!("no columns beside the ids but `{name}`, with a value for each token"),
    );
    Err(Error::config(format!(
        "`--to {}` holds {held}, and `fields` names `{}`: leave it out, or choose `--to arrow` or `--to parquet`",
        name(options.to),
        field.name
    )))
}

/// The options to read the result of this `dtype` back.
fn opened_as(options: &Options, dtype: Dtype, open: OpenOptions) -> OpenOptions {
    // The result is read as it is, so that a fault of the search for ends does not hide itself.
    let open = OpenOptions { split: None, ..open };
    match options.to.flat() {
        // Flat files have no names of columns.
        Some(FlatFormat::Raw) => OpenOptions { token_column: None, bin_dtype: Some(dtype), ..open },
        Some(_) => OpenOptions { token_column: None, bin_dtype: None, ..open },
        None => open,
    }
}

/// The further columns that are copied. All sources have them in one type.
fn carried(sources: &[SourceShard]) -> forebay::Result<Vec<CarriedField>> {
    let full = || sources.iter().filter(|source| source.facts.counts.tokens > 0);
    let Some(first) = full().next() else { return Ok(Vec::new()) };
    for source in full() {
        if source.fields != first.fields {
            return Err(Error::data(format!(
                "types of columns in `fields` differ between shards: `{}` and `{}`; rewrite them apart",
                first.file.path.display(),
                source.file.path.display()
            )));
        }
        if source.plain && !source.fields.is_empty() {
            let text = "a plain token column has no documents: `rewrite` carries further columns of lists alone";
            return Err(Error::data(text).at(&source.file.path));
        }
    }
    Ok(first.fields.clone())
}
