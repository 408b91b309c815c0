//! The settings, one by one: the table from which environment, configuration file, command line and documentation are made.
//!
//! [`crate::config`] holds the values, their types and their defaults; this table adds names and text. A setting is read from and written as
//! one line of text everywhere.

use super::Skip;
use crate::error::{Error, Result};
use crate::settings::suggest::nearest_of;
use crate::settings::{Config, DataFormat, Epochs, Io, Remainder, Shuffle, Split, Targets};
use crate::tokens::Dtype;

/// What a setting has an influence on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// What is trained on, and in which order. A saved state belongs to it.
    Content,
    /// How positions are grouped into batches.
    Grouping,
    /// Speed and memory only.
    Operational,
}

impl Kind {
    /// Name shown to users.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Content => "content",
            Self::Grouping => "grouping",
            Self::Operational => "operational",
        }
    }
}

/// One field of [`Config`], as text.
#[derive(Debug)]
pub struct Setting {
    /// The field's name, which is also its keyword in Python and its key in a file.
    pub name: &'static str,
    /// What it has an influence on.
    pub kind: Kind,
    /// Accepted text.
    pub accepts: &'static str,
    /// What it means, in one line.
    pub doc: &'static str,
    /// Its value, as text that [`Setting::set`] takes.
    pub get: fn(&Config) -> String,
    parse: fn(&mut Config, &str) -> Option<()>,
}

impl Setting {
    /// Name of its environment variable.
    pub fn variable(&self) -> String {
        format!("FOREBAY_{}", self.name.to_uppercase())
    }

    /// Its default, as text.
    pub fn default_text(&self) -> String {
        (self.get)(&Config::default())
    }

    /// Sets it to what `text` says.
    pub fn set(&self, config: &mut Config, text: &str) -> Result<()> {
        self.set_from(config, text, self.name)
    }

    /// As [`Setting::set`], with errors that name `place`, where the text was found.
    pub fn set_from(&self, config: &mut Config, text: &str, place: &str) -> Result<()> {
        // Ranges are checked here too, on a configuration that is sound otherwise, because only here is it known where the value is from.
        let mut probe = Config {
            data: vec!["corpus".to_owned()],
            dp_rank: Some(0),
            dp_world_size: Some(1 << 32),
            ..Config::default()
        };
        let fault = || Error::config(format!("`{place}` must be {}, found `{text}`", self.accepts));
        (self.parse)(&mut probe, text.trim()).ok_or_else(fault)?;
        if probe.dp_rank.is_none() || probe.dp_world_size.is_none() {
            (probe.dp_rank, probe.dp_world_size) = (None, None);
        }
        if probe.mixture.is_some() {
            probe.data.clear();
        }
        if probe.split == Split::Holdout {
            probe.holdout = Some(2);
        }
        // What is wrong with a text of many parts, only its own reader can say.
        let own = |error: Error| {
            if self.name == "mixture" { Error::config(format!("{error} (from `{place}`)")) } else { fault() }
        };
        probe.validate().map_err(own)?;
        (self.parse)(config, text.trim()).ok_or_else(fault)
    }
}

/// Every setting, in the order of [`Config`]'s fields.
pub fn all() -> &'static [Setting] {
    SETTINGS
}

/// The setting called `name`.
pub fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

/// The setting that a mistyped `name` most likely means.
pub fn nearest(name: &str) -> Option<&'static str> {
    nearest_of(name, SETTINGS.iter().map(|setting| setting.name))
}

/// The settings as the table of the README.
pub fn markdown() -> String {
    let mut text =
        String::from("| setting | environment | kind | default | accepts | meaning |\n|---|---|---|---|---|---|\n");
    for setting in SETTINGS {
        let default = match setting.default_text() {
            none if none.is_empty() => String::new(),
            value => format!("`{value}`"),
        };
        text.push_str(&format!(
            "| `{}` | `{}` | {} | {default} | {} | {} |\n",
            setting.name,
            setting.variable(),
            setting.kind.name(),
            setting.accepts,
            setting.doc
        ));
    }
    text
}

/// The table's values as text, and back.
const SETTINGS: &[Setting] = &[
    Setting {
        name: "data",
        kind: Kind::Content,
        accepts: "files, folders and glob patterns, separated by commas (`\\,` is a comma in a name)",
        doc: "the corpus, in order",
        get: |config| list_text(&config.data),
        parse: |config, text| parsed(&mut config.data, list(text)),
    },
    Setting {
        name: "mixture",
        kind: Kind::Content,
        accepts: "sources, weights and stages as JSON, or `none`",
        doc: "several corpora with weights, in place of `data`",
        get: |config| optional_text(config.mixture.as_ref()),
        parse: |config, text| parsed(&mut config.mixture, optional(text, |text| Some(text.to_owned()))),
    },
    Setting {
        name: "format",
        kind: Kind::Content,
        accepts: "`auto`, `parquet` or `arrow`",
        doc: "expected format; `auto` recognises it by content",
        get: |config| choice_text(FORMATS, config.format),
        parse: |config, text| parsed(&mut config.format, choice(FORMATS, text)),
    },
    Setting {
        name: "token_column",
        kind: Kind::Content,
        accepts: "a column's name, or `none`",
        doc: "token column; `none` takes the first of `input_ids`, `tokens`, `token_ids`, `ids`",
        get: |config| optional_text(config.token_column.as_ref()),
        parse: |config, text| parsed(&mut config.token_column, optional(text, |text| Some(text.to_owned()))),
    },
    Setting {
        name: "seq_len",
        kind: Kind::Content,
        accepts: "a number of tokens from 1 to 2^32",
        doc: "tokens per sequence",
        get: |config| config.seq_len.to_string(),
        parse: |config, text| parsed(&mut config.seq_len, size(text, false)),
    },
    Setting {
        name: "targets",
        kind: Kind::Content,
        accepts: "`labels` or `shifted`",
        doc: "`labels`: `input_ids` and `labels` at the same positions; `shifted`: `x` and `y`, one token apart",
        get: |config| choice_text(TARGETS, config.targets),
        parse: |config, text| parsed(&mut config.targets, choice(TARGETS, text)),
    },
    Setting {
        name: "bos_id",
        kind: Kind::Content,
        accepts: "an id below 2^31, or `none`",
        doc: "id put before every non-empty document",
        get: |config| optional_text(config.bos_id),
        parse: |config, text| parsed(&mut config.bos_id, optional(text, id)),
    },
    Setting {
        name: "eos_id",
        kind: Kind::Content,
        accepts: "an id below 2^31, or `none`",
        doc: "id put after every non-empty document",
        get: |config| optional_text(config.eos_id),
        parse: |config, text| parsed(&mut config.eos_id, optional(text, id)),
    },
    Setting {
        name: "shuffle",
        kind: Kind::Content,
        accepts: "`true`, `false`, `global` or `block`",
        doc: "order of an epoch; `true` is `global` for uncompressed Arrow and `block` where blocks have to be decoded",
        get: |config| choice_text(SHUFFLES, config.shuffle),
        parse: |config, text| {
            let switch = || boolean(text).map(|on| if on { Shuffle::On } else { Shuffle::Off });
            parsed(&mut config.shuffle, choice(SHUFFLES, text).or_else(switch))
        },
    },
    Setting {
        name: "seed",
        kind: Kind::Content,
        accepts: "an integer from 0 to 2^64 - 1",
        doc: "key of the order, with the epoch",
        get: |config| config.seed.to_string(),
        parse: |config, text| parsed(&mut config.seed, integer(text)),
    },
    Setting {
        name: "chunk_tokens",
        kind: Kind::Content,
        accepts: "a number of tokens from 1 to 2^48, such as `1Mi`",
        doc: "the unit that block shuffling permutes over the corpus",
        get: |config| size_text(config.chunk_tokens, ""),
        parse: |config, text| parsed(&mut config.chunk_tokens, size(text, false)),
    },
    Setting {
        name: "window_tokens",
        kind: Kind::Content,
        accepts: "a number of tokens from 1 to 2^48, such as `16Mi`",
        doc: "where block shuffling then permutes sequences, over all lanes together",
        get: |config| size_text(config.window_tokens, ""),
        parse: |config, text| parsed(&mut config.window_tokens, size(text, false)),
    },
    Setting {
        name: "lanes",
        kind: Kind::Content,
        accepts: "an integer from 1 to 2^20",
        doc: "virtual shards that block shuffling interleaves; world sizes that divide it decode each block about once",
        get: |config| config.lanes.to_string(),
        parse: |config, text| parsed(&mut config.lanes, integer(text)),
    },
    Setting {
        name: "holdout",
        kind: Kind::Content,
        accepts: "an integer from 2 to 2^32, or `none`",
        doc: "one sequence in so many is kept out of training, whatever the seed",
        get: |config| optional_text(config.holdout),
        parse: |config, text| parsed(&mut config.holdout, optional(text, integer)),
    },
    Setting {
        name: "split",
        kind: Kind::Content,
        accepts: "`train` or `holdout`",
        doc: "which side of the holdout is delivered",
        get: |config| choice_text(SPLITS, config.split),
        parse: |config, text| parsed(&mut config.split, choice(SPLITS, text)),
    },
    Setting {
        name: "skip",
        kind: Kind::Content,
        accepts: "ranges of positions such as `100-200,3:0-50` (of epoch 0 and of epoch 3), or `none`",
        doc: "positions that are never delivered; all others keep their numbers",
        get: |config| skips_text(&config.skip),
        parse: |config, text| parsed(&mut config.skip, skips(text)),
    },
    Setting {
        name: "extend",
        kind: Kind::Content,
        accepts: "`true` or `false`",
        doc: "continue a state of the first shards of this corpus; the new ones join at the next epoch",
        get: |config| config.extend.to_string(),
        parse: |config, text| parsed(&mut config.extend, boolean(text)),
    },
    Setting {
        name: "batch_size",
        kind: Kind::Grouping,
        accepts: "an integer from 1 to 2^32",
        doc: "sequences per rank and step",
        get: |config| config.batch_size.to_string(),
        parse: |config, text| parsed(&mut config.batch_size, integer(text)),
    },
    Setting {
        name: "dp_rank",
        kind: Kind::Grouping,
        accepts: "an integer below `dp_world_size`, or `none`",
        doc: "data-parallel rank; `none` finds it in the launcher's environment, else 0",
        get: |config| optional_text(config.dp_rank),
        parse: |config, text| parsed(&mut config.dp_rank, optional(text, integer)),
    },
    Setting {
        name: "dp_world_size",
        kind: Kind::Grouping,
        accepts: "an integer from 1 to 2^32, or `none`",
        doc: "data-parallel size; `none` finds it in the launcher's environment, else 1",
        get: |config| optional_text(config.dp_world_size),
        parse: |config, text| parsed(&mut config.dp_world_size, optional(text, integer)),
    },
    Setting {
        name: "model_parallel_size",
        kind: Kind::Grouping,
        accepts: "an integer from 1 to 2^32",
        doc: "neighbouring ranks of the launcher that read the same rows (tensor-, context-, pipeline-parallel peers)",
        get: |config| config.model_parallel_size.to_string(),
        parse: |config, text| parsed(&mut config.model_parallel_size, integer(text)),
    },
    Setting {
        name: "epochs",
        kind: Kind::Grouping,
        accepts: "an integer from 1 to 2^32, or `endless`",
        doc: "epochs of one pass; with more than one, batches run on across their borders",
        get: |config| epochs_text(config.epochs),
        parse: |config, text| parsed(&mut config.epochs, epochs(text)),
    },
    Setting {
        name: "max_steps",
        kind: Kind::Grouping,
        accepts: "an integer from 1, or `none`",
        doc: "steps after which a pass ends, counted from the start of its first epoch",
        get: |config| optional_text(config.max_steps),
        parse: |config, text| parsed(&mut config.max_steps, optional(text, integer)),
    },
    Setting {
        name: "remainder",
        kind: Kind::Grouping,
        accepts: "`drop`, `pad`, `wrap` or `short`",
        doc: "what happens at an epoch's end to what fills no whole sequence or global batch",
        get: |config| choice_text(REMAINDERS, config.remainder),
        parse: |config, text| parsed(&mut config.remainder, choice(REMAINDERS, text)),
    },
    Setting {
        name: "pad_id",
        kind: Kind::Grouping,
        accepts: "an id below 2^31",
        doc: "id that fills padded rows; their labels are -100",
        get: |config| config.pad_id.to_string(),
        parse: |config, text| parsed(&mut config.pad_id, id(text)),
    },
    Setting {
        name: "input_dtype",
        kind: Kind::Grouping,
        accepts: "`int64` or `int32`",
        doc: "type of delivered input ids; labels are always int64",
        get: |config| config.input_dtype.name().to_owned(),
        parse: |config, text| parsed(&mut config.input_dtype, choice(DTYPES, text)),
    },
    Setting {
        name: "sample_ids",
        kind: Kind::Grouping,
        accepts: "`true` or `false`",
        doc: "batches say where each row is from: `source` and `sample_index`",
        get: |config| config.sample_ids.to_string(),
        parse: |config, text| parsed(&mut config.sample_ids, boolean(text)),
    },
    Setting {
        name: "num_threads",
        kind: Kind::Operational,
        accepts: "an integer from 0 to 1024, or `none`",
        doc: "worker threads; with 0 the thread that asks for a batch computes it; `none` takes the CPUs of this rank less one, 1 to 8",
        get: |config| optional_text(config.num_threads),
        parse: |config, text| parsed(&mut config.num_threads, optional(text, integer)),
    },
    Setting {
        name: "cpu_affinity",
        kind: Kind::Operational,
        accepts: "CPUs such as `0,2-5`, or `none`",
        doc: "CPUs that worker threads may run on (Linux); `none` leaves them wherever the process may run",
        get: |config| config.cpu_affinity.as_deref().map_or_else(|| "none".to_owned(), cpus_text),
        parse: |config, text| parsed(&mut config.cpu_affinity, optional(text, cpus)),
    },
    Setting {
        name: "thread_priority",
        kind: Kind::Operational,
        accepts: "an integer from 0 to 19",
        doc: "added to the `nice` value of worker threads (Linux), so that they take less from a trainer on the same CPUs",
        get: |config| config.thread_priority.to_string(),
        parse: |config, text| parsed(&mut config.thread_priority, integer(text)),
    },
    Setting {
        name: "prefetch_batches",
        kind: Kind::Operational,
        accepts: "an integer from 1 to 65536",
        doc: "batches computed ahead of the consumer",
        get: |config| config.prefetch_batches.to_string(),
        parse: |config, text| parsed(&mut config.prefetch_batches, integer(text)),
    },
    Setting {
        name: "memory_budget",
        kind: Kind::Operational,
        accepts: "a number of bytes, such as `512MiB` or `1GB`",
        doc: "memory for decoded blocks and batches in flight",
        get: |config| size_text(config.memory_budget, "B"),
        parse: |config, text| parsed(&mut config.memory_budget, size(text, true)),
    },
    Setting {
        name: "block_tokens",
        kind: Kind::Operational,
        accepts: "a number of tokens from 1 to 2^31, such as `128Ki`",
        doc: "tokens near which blocks are cut for decoding; never changes a batch",
        get: |config| size_text(config.block_tokens, ""),
        parse: |config, text| parsed(&mut config.block_tokens, size(text, false)),
    },
    Setting {
        name: "io",
        kind: Kind::Operational,
        accepts: "`auto`, `mmap` or `pread`",
        doc: "how file bytes are reached; `auto` maps on local file systems and reads on network and FUSE ones",
        get: |config| choice_text(IOS, config.io),
        parse: |config, text| parsed(&mut config.io, choice(IOS, text)),
    },
    Setting {
        name: "cache_dir",
        kind: Kind::Operational,
        accepts: "a folder, or `none`",
        doc: "where the index of the corpus is saved, with which shards are opened when first read; `none` opens all at the start",
        get: |config| optional_text(config.cache_dir.as_ref()),
        parse: |config, text| parsed(&mut config.cache_dir, optional(text, |text| Some(text.to_owned()))),
    },
    Setting {
        name: "pin_memory",
        kind: Kind::Operational,
        accepts: "`true` or `false`",
        doc: "batches in page-locked memory, where torch with CUDA is there",
        get: |config| config.pin_memory.to_string(),
        parse: |config, text| parsed(&mut config.pin_memory, boolean(text)),
    },
    Setting {
        name: "delivery_log",
        kind: Kind::Operational,
        accepts: "a folder, or `none`",
        doc: "folder where every rank writes a line for each batch it hands over, which `forebay verify` proves",
        get: |config| optional_text(config.delivery_log.as_ref()),
        parse: |config, text| parsed(&mut config.delivery_log, optional(text, |text| Some(text.to_owned()))),
    },
];

/// More than any system has.
pub(crate) const MOST_CPUS: u64 = 1 << 13;

const FORMATS: &[(&str, DataFormat)] = DataFormat::CHOICES;
const TARGETS: &[(&str, Targets)] = &[("labels", Targets::Labels), ("shifted", Targets::Shifted)];
const SHUFFLES: &[(&str, Shuffle)] =
    &[("false", Shuffle::Off), ("true", Shuffle::On), ("global", Shuffle::Global), ("block", Shuffle::Block)];
const SPLITS: &[(&str, Split)] = &[("train", Split::Train), ("holdout", Split::Holdout)];
const REMAINDERS: &[(&str, Remainder)] =
    &[("drop", Remainder::Drop), ("pad", Remainder::Pad), ("wrap", Remainder::Wrap), ("short", Remainder::Short)];
const DTYPES: &[(&str, Dtype)] = &[("int64", Dtype::I64), ("int32", Dtype::I32)];
const IOS: &[(&str, Io)] = &[("auto", Io::Auto), ("mmap", Io::Mmap), ("pread", Io::Pread)];

fn parsed<T>(field: &mut T, value: Option<T>) -> Option<()> {
    *field = value?;
    Some(())
}

fn choice<T: Copy>(choices: &[(&str, T)], text: &str) -> Option<T> {
    choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, value)| *value)
}

fn choice_text<T: PartialEq + Copy>(choices: &[(&str, T)], value: T) -> String {
    let (name, _) = choices.iter().find(|(_, choice)| *choice == value).expect("the list names every variant");
    (*name).to_owned()
}

/// `1`, `true`, `on`, `yes` and their opposites.
pub(crate) fn boolean(text: &str) -> Option<bool> {
    const WORDS: &[(&str, bool)] = &[
        ("1", true),
        ("true", true),
        ("on", true),
        ("yes", true),
        ("0", false),
        ("false", false),
        ("off", false),
        ("no", false),
    ];
    choice(WORDS, text)
}

/// Decimal digits, with single underscores between them.
pub(crate) fn integer(text: &str) -> Option<u64> {
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !text.split('_').all(digits) {
        return None;
    }
    text.replace('_', "").parse().ok()
}

fn id(text: &str) -> Option<u32> {
    u32::try_from(integer(text)?).ok()
}

/// An integer with a decimal (`k`, `M`, `G`, `T`) or binary (`Ki`, `Mi`, `Gi`, `Ti`) unit, and `B` after it where `bytes` are meant.
pub fn size(text: &str, bytes: bool) -> Option<u64> {
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let unit = unit.to_ascii_lowercase();
    let unit = if bytes { unit.strip_suffix('b').unwrap_or(&unit) } else { &unit };
    let factor = match unit {
        "" => 1,
        "k" => 1_000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        "t" => 1_000_000_000_000,
        "ki" => 1 << 10,
        "mi" => 1 << 20,
        "gi" => 1 << 30,
        "ti" => 1 << 40,
        _ => return None,
    };
    integer(number.trim_end())?.checked_mul(factor)
}

fn size_text(value: u64, suffix: &str) -> String {
    for (shift, unit) in [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
        if value > 0 && value.is_multiple_of(1 << shift) {
            return format!("{}{unit}{suffix}", value >> shift);
        }
    }
    value.to_string()
}

/// Names separated by commas; a backslash takes the special meaning of a comma or backslash after it.
fn list(text: &str) -> Option<Vec<String>> {
    let mut names = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            ',' => names.push(String::new()),
            '\\' if matches!(characters.peek(), Some(',' | '\\')) => names.last_mut()?.extend(characters.next()),
            other => names.last_mut()?.push(other),
        }
    }
    names.iter().all(|name| !name.is_empty()).then_some(names)
}

/// The text by which the setting `data` means `names`.
pub fn list_text<T: AsRef<str>>(names: &[T]) -> String {
    let escaped: Vec<_> = names.iter().map(|name| name.as_ref().replace('\\', "\\\\").replace(',', "\\,")).collect();
    escaped.join(",")
}

/// CPUs by number and range, each once and in order.
fn cpus(text: &str) -> Option<Vec<u64>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (integer(first.trim())?, integer(last.trim())?);
        if first > last || last >= MOST_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Some(cpus)
}

/// The text by which [`cpus`] means `cpus`, which are in order.
pub(crate) fn cpus_text(cpus: &[u64]) -> String {
    let runs = cpus.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [one] => one.to_string(),
        many => format!("{}-{}", many[0], many[many.len() - 1]),
    });
    runs.collect::<Vec<_>>().join(",")
}

/// Ranges `start-end`, each of epoch 0 or of the one before its colon.
pub(crate) fn skips(text: &str) -> Option<Vec<Skip>> {
    if text.is_empty() || text.eq_ignore_ascii_case("none") {
        return Some(Vec::new());
    }
    text.split(',')
        .map(|part| {
            let (epoch, range) = part.trim().split_once(':').unwrap_or(("0", part.trim()));
            let (start, end) = range.split_once('-')?;
            Some(Skip { epoch: integer(epoch)?, start: integer(start)?, end: integer(end)? })
        })
        .collect()
}

/// The text by which the setting `skip` means `skips`.
pub(crate) fn skips_text(skips: &[Skip]) -> String {
    let ranges: Vec<String> = skips
        .iter()
        .map(
            |Skip { epoch, start, end }| {
                if *epoch == 0 { format!("{start}-{end}") } else { format!("{epoch}:{start}-{end}") }
            },
        )
        .collect();
    if ranges.is_empty() { "none".to_owned() } else { ranges.join(",") }
}

fn epochs(text: &str) -> Option<Epochs> {
    if text.eq_ignore_ascii_case("endless") { Some(Epochs::Endless) } else { integer(text).map(Epochs::Count) }
}

fn epochs_text(epochs: Epochs) -> String {
    match epochs {
        Epochs::Count(count) => count.to_string(),
        Epochs::Endless => "endless".to_owned(),
    }
}

fn optional<T>(text: &str, parse: fn(&str) -> Option<T>) -> Option<Option<T>> {
    if text.is_empty() || text.eq_ignore_ascii_case("none") { Some(None) } else { parse(text).map(Some) }
}

fn optional_text(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "none".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field by name and value; a new field does not compile until it is listed.
    fn fields(config: Config) -> Vec<(&'static str, String)> {
        macro_rules! list {
            ($($field:ident),*) => {{
                let Config { $($field),* } = config;
                vec![$((stringify!($field), format!("{:?}", $field))),*]
            }};
        }
        list!(
            data,
            mixture,
            format,
            token_column,
            seq_len,
            targets,
            bos_id,
            eos_id,
            shuffle,
            seed,
            chunk_tokens,
            window_tokens,
            lanes,
            holdout,
            split,
            skip,
            extend,
            batch_size,
            dp_rank,
            dp_world_size,
            model_parallel_size,
            epochs,
            max_steps,
            remainder,
            pad_id,
            input_dtype,
            sample_ids,
            num_threads,
            cpu_affinity,
            thread_priority,
            prefetch_batches,
            memory_budget,
            block_tokens,
            io,
            cache_dir,
            pin_memory,
            delivery_log
        )
    }

    /// A value other than the default for each setting.
    const OTHER: &[(&str, &str)] = &[
        ("data", "a,b\\,c"),
        ("mixture", r#"{"sources": [{"name": "a", "data": "a", "weight": 1}]}"#),
        ("format", "arrow"),
        ("token_column", "text ids"),
        ("seq_len", "512"),
        ("targets", "shifted"),
        ("bos_id", "1"),
        ("eos_id", "50256"),
        ("shuffle", "block"),
        ("seed", "18446744073709551615"),
        ("chunk_tokens", "3Ki"),
        ("window_tokens", "5"),
        ("lanes", "16"),
        ("holdout", "100"),
        ("split", "holdout"),
        ("skip", "10-20,3:0-5"),
        ("extend", "true"),
        ("batch_size", "7"),
        ("dp_rank", "3"),
        ("dp_world_size", "4"),
        ("model_parallel_size", "4"),
        ("epochs", "endless"),
        ("max_steps", "1000"),
        ("remainder", "wrap"),
        ("pad_id", "9"),
        ("input_dtype", "int32"),
        ("sample_ids", "true"),
        ("num_threads", "6"),
        ("cpu_affinity", "0,2-5"),
        ("thread_priority", "10"),
        ("prefetch_batches", "2"),
        ("memory_budget", "3GiB"),
        ("block_tokens", "1Mi"),
        ("io", "pread"),
        ("cache_dir", "a cache/here"),
        ("pin_memory", "true"),
        ("delivery_log", "out/the delivery log"),
    ];

    #[test]
    fn every_field_is_described_once_and_in_order() {
        let names: Vec<_> = all().iter().map(|setting| setting.name).collect();
        let fields: Vec<_> = fields(Config::default()).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, fields);
        assert_eq!(OTHER.iter().map(|(name, _)| *name).collect::<Vec<_>>(), fields);
    }

    #[test]
    fn a_setting_changes_its_field_alone_and_reads_back() {
        let before = fields(Config::default());
        for (name, text) in OTHER {
            let setting = find(name).unwrap();
            let mut config = Config::default();
            setting.set(&mut config, text).unwrap();
            assert_eq!((setting.get)(&config), *text);
            let changed: Vec<_> =
                fields(config.clone()).iter().zip(&before).filter(|(a, b)| a != b).map(|(a, _)| a.0).collect();
            assert_eq!(changed, [*name]);
            if setting.name != "data" {
                setting.set(&mut config, &setting.default_text()).unwrap();
                assert_eq!(config, Config::default(), "{name}");
            }
        }
    }

    #[test]
    fn text_is_read_in_the_usual_ways() {
        let set = |name: &str, text: &str| {
            let mut config = Config::default();
            find(name).unwrap().set(&mut config, text).unwrap();
            config
        };
        assert_eq!(set("seed", "1_000_000").seed, 1_000_000);
        assert_eq!(set("seq_len", "4Ki").seq_len, 4096);
        assert_eq!(set("window_tokens", "2M").window_tokens, 2_000_000);
        for (text, bytes) in
            [("512MiB", 512 << 20), ("1GB", 1_000_000_000), ("1Mi", 1 << 20), ("2 gib", 2 << 30), ("77", 77)]
        {
            assert_eq!(set("memory_budget", text).memory_budget, bytes);
        }
        for (text, on) in
            [("1", true), ("TRUE", true), ("on", true), ("yes", true), ("0", false), ("off", false), ("no", false)]
        {
            assert_eq!(set("pin_memory", text).pin_memory, on);
            assert_eq!(set("shuffle", text).shuffle, if on { Shuffle::On } else { Shuffle::Off });
        }
        assert_eq!(set("eos_id", " 0 ").eos_id, Some(0));
        assert_eq!(set("eos_id", "").eos_id, None);
        assert_eq!(set("data", "a/*.parquet,b").data, ["a/*.parquet", "b"]);
        assert_eq!(set("cpu_affinity", "7, 3-5,4").cpu_affinity, Some(vec![3, 4, 5, 7]));
        assert_eq!(set("data", r"a\b,c\\\,d").data, [r"a\b", r"c\,d"]);
    }

    #[test]
    fn bad_values_name_what_is_accepted() {
        for (name, text) in [
            ("data", ""),
            ("data", "a,,b"),
            ("format", "csv"),
            ("seq_len", "0"),
            ("seq_len", "2 KiB"),
            ("seq_len", "-1"),
            ("seq_len", "1__0"),
            ("targets", ""),
            ("bos_id", "2147483648"),
            ("pad_id", "none"),
            ("shuffle", "maybe"),
            ("seed", "18446744073709551616"),
            ("lanes", "none"),
            ("batch_size", "1e3"),
            ("dp_world_size", "0"),
            ("input_dtype", "uint16"),
            ("num_threads", "2000"),
            ("cpu_affinity", "3-1"),
            ("cpu_affinity", "0,,1"),
            ("cpu_affinity", "8192"),
            ("thread_priority", "20"),
            ("thread_priority", "-1"),
            ("memory_budget", "99999999Ti"),
            ("pin_memory", "2"),
            ("skip", "5"),
            ("skip", "9-3"),
            ("skip", "1:2:3-4"),
            ("epochs", "0"),
            ("epochs", "forever"),
            ("holdout", "1"),
            ("split", "validation"),
            ("model_parallel_size", "0"),
            ("max_steps", "0"),
        ] {
            let setting = find(name).unwrap();
            let mut config = Config::default();
            let error = setting.set_from(&mut config, text, "FROM_HERE").unwrap_err();
            assert_eq!(error.to_string(), format!("`FROM_HERE` must be {}, found `{text}`", setting.accepts));
            assert_eq!(config, Config::default(), "a refused value changes nothing");
        }
    }

    #[test]
    fn the_nearest_name_is_found() {
        for (name, meant) in [
            ("seqlen", Some("seq_len")),
            ("SEQ_LEN", Some("seq_len")),
            ("threads", Some("num_threads")),
            ("prefetch", Some("prefetch_batches")),
            ("world_size", Some("dp_world_size")),
            ("batchsize", Some("batch_size")),
            ("learning_rate_decay", None),
        ] {
            assert_eq!(nearest(name), meant, "{name}");
        }
    }
}
