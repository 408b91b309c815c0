//! Settings: one struct, one default, one check.
//!
//! Content settings say what is trained on and belong to a saved state; grouping settings only say how positions are
//! grouped into batches; operational settings touch neither. `settings.rs` describes each of them by name.

use super::mixture::MixtureSettings;
use crate::error::{Error, Result};
use crate::tokens::Dtype;

/// How the order of an epoch is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shuffle {
    /// Corpus order.
    #[default]
    Off,
    /// `Global` where any window can be read at once, `Block` where blocks have to be decoded.
    On,
    /// One permutation over all sequences.
    Global,
    /// Chunks are permuted over the corpus, then sequences inside windows of each lane.
    Block,
}

/// What a batch holds beside the inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Targets {
    /// `input_ids` and `labels` at the same positions; the model shifts (Hugging Face convention).
    #[default]
    Labels,
    /// `x` and `y`, views one token apart of `seq_len + 1` tokens; neighbouring sequences overlap by one token.
    Shifted,
}

/// What happens to the tokens and sequences that fill no whole sequence or global batch at an epoch's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Remainder {
    /// Left out, and counted.
    #[default]
    Drop,
    /// Delivered in full rows and batches, filled up with `pad_id` and labels of -100.
    Pad,
    /// Filled up from the start of the same epoch's order.
    Wrap,
    /// The last batch has fewer rows; refused where a rank would have none.
    Short,
}

/// How file bytes are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// Mapped on local file systems, positioned reads on network and FUSE ones.
    #[default]
    Auto,
    /// Always mapped.
    Mmap,
    /// Always positioned reads.
    Pread,
}

/// Side of a corpus of which `holdout` keeps sequences out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// All but those held out.
    #[default]
    Train,
    /// Those held out.
    Holdout,
}

/// Epochs of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epochs {
    /// So many, one after the other.
    Count(u64),
    /// One after the other without end.
    Endless,
}

impl Default for Epochs {
    fn default() -> Self {
        Self::Count(1)
    }
}

/// Positions `start..end` of `epoch` that are never delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skip {
    /// Epoch, counted from 0.
    pub epoch: u64,
    /// First position left out.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// Container format that `data` is expected to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataFormat {
    /// Recognised by content.
    #[default]
    Auto,
    /// Parquet only.
    Parquet,
    /// Arrow IPC file or stream only.
    Arrow,
}

impl DataFormat {
    /// The values by the names that users give them.
    pub const CHOICES: &[(&str, Self)] = &[("auto", Self::Auto), ("parquet", Self::Parquet), ("arrow", Self::Arrow)];

    /// Name shown to users.
    pub fn name(self) -> &'static str {
        Self::CHOICES.iter().find(|(_, value)| *value == self).map_or("", |(name, _)| name)
    }
}

/// Every setting of a loader. Build one with struct update syntax from [`Config::default`].
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    // Content.
    /// Files, folders and glob patterns, in order.
    pub data: Vec<String>,
    /// Several corpora with weights, as JSON ([`crate::settings::mixture`]), in place of `data`. Default: none.
    pub mixture: Option<String>,
    /// Expected format. Default: recognised by content.
    pub format: DataFormat,
    /// Token column. Default: the first of `input_ids`, `tokens`, `token_ids`, `ids`.
    pub token_column: Option<String>,
    /// Tokens per sequence. Default: 2048.
    pub seq_len: u64,
    /// What a batch holds beside the inputs. Default: labels.
    pub targets: Targets,
    /// Id put before every non-empty document. Default: none.
    pub bos_id: Option<u32>,
    /// Id put after every non-empty document. Default: none.
    pub eos_id: Option<u32>,
    /// Order of an epoch. Default: off.
    pub shuffle: Shuffle,
    /// Key of the order, with the epoch. Default: 0.
    pub seed: u64,
    /// Tokens of a chunk, the unit that block shuffling permutes over the corpus. Default: 4 Mi.
    pub chunk_tokens: u64,
    /// Tokens within which sequences are permuted after that, over all lanes together. Default: 16 Mi.
    pub window_tokens: u64,
    /// Virtual shards that block shuffling interleaves; world sizes that divide it decode each block about once. Default: 8.
    pub lanes: u64,
    /// One sequence of so many is kept out of training. Default: none.
    pub holdout: Option<u64>,
    /// Which side of the holdout is delivered. Default: train.
    pub split: Split,
    /// Positions that are left out. Default: none.
    pub skip: Vec<Skip>,
    /// Whether a state of the first shards of this corpus can be continued; the others join at the next epoch. Default: false.
    pub extend: bool,

    // Grouping.
    /// Sequences per rank and step. Default: 1.
    pub batch_size: u64,
    /// Data-parallel rank. Default: found in the environment, else 0.
    pub dp_rank: Option<u64>,
    /// Data-parallel size. Default: found in the environment, else 1.
    pub dp_world_size: Option<u64>,
    /// Ranks that read the same rows: tensor-, context- and pipeline-parallel peers, next to each other. Default: 1.
    pub model_parallel_size: u64,
    /// Epochs of one pass; with more than one, batches run on across their borders. Default: 1.
    pub epochs: Epochs,
    /// Steps after which a pass ends, counted from the start of its first epoch. Default: none.
    pub max_steps: Option<u64>,
    /// What happens at an epoch's end. Default: drop.
    pub remainder: Remainder,
    /// Id that fills padded rows. Default: 0.
    pub pad_id: u32,
    /// Type of delivered input ids, `I64` or `I32`; labels are always `I64`. Default: `I64`.
    pub input_dtype: Dtype,

    /// Whether batches say where each row is from: `source` and `sample_index`. Default: false.
    pub sample_ids: bool,

    // Operational.
    /// Worker threads. Default: CPUs of this rank less one, 1 to 8.
    pub num_threads: Option<u64>,
    /// CPUs that worker threads may run on; Linux only. Default: none, wherever the process may.
    pub cpu_affinity: Option<Vec<u64>>,
    /// How much is added to the `nice` value of worker threads; Linux only. Default: 0.
    pub thread_priority: u64,
    /// Batches computed ahead of the consumer. Default: 4.
    pub prefetch_batches: u64,
    /// Bytes for decoded blocks and batches in flight. Default: 512 MiB.
    pub memory_budget: u64,
    /// Tokens near which blocks are cut for decoding; never changes a batch. Default: 128 Ki.
    pub block_tokens: u64,
    /// How file bytes are reached. Default: auto.
    pub io: Io,
    /// Folder for the saved index, with which shards are opened when they are first read. Default: none, all are opened at the start.
    pub cache_dir: Option<String>,
    /// Batches in page-locked memory, where torch with CUDA is there. Default: false.
    pub pin_memory: bool,
    /// Folder for the delivery log: a line for every batch handed over. Default: none.
    pub delivery_log: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data: Vec::new(),
            mixture: None,
            format: DataFormat::Auto,
            token_column: None,
            seq_len: 2048,
            targets: Targets::Labels,
            bos_id: None,
            eos_id: None,
            shuffle: Shuffle::Off,
            seed: 0,
            chunk_tokens: 4 << 20,
            window_tokens: 16 << 20,
            lanes: 8,
            holdout: None,
            split: Split::Train,
            skip: Vec::new(),
            extend: false,
            batch_size: 1,
            dp_rank: None,
            dp_world_size: None,
            model_parallel_size: 1,
            epochs: Epochs::default(),
            max_steps: None,
            remainder: Remainder::Drop,
            pad_id: 0,
            input_dtype: Dtype::I64,
            sample_ids: false,
            num_threads: None,
            cpu_affinity: None,
            thread_priority: 0,
            prefetch_batches: 4,
            memory_budget: 512 << 20,
            block_tokens: 128 << 10,
            io: Io::Auto,
            cache_dir: None,
            pin_memory: false,
            delivery_log: None,
        }
    }
}

impl Config {
    /// Checks every value by itself and against the others; all faults are listed together.
    pub fn validate(&self) -> Result<()> {
        let mut faults = Vec::new();
        let mut check = |holds: bool, text: String| {
            if !holds {
                faults.push(Error::config(text));
            }
        };
        match &self.mixture {
            None => {
                let text = "`data` is empty: expected at least one file, folder or glob pattern";
                check(!self.data.is_empty(), text.to_owned());
            }
            Some(text) => {
                check(
                    self.data.is_empty(),
                    "`data` and `mixture` are both set: the mixture names its sources' data".to_owned(),
                );
                check(
                    !self.extend,
                    "`extend` is for one corpus: add to a mixture by a new source and a new stage".to_owned(),
                );
                match MixtureSettings::parse(text).and_then(|recipe| recipe.stages(self.seq_len)) {
                    Ok(_) => {}
                    Err(error) => check(false, error.to_string()),
                }
            }
        }
        check(
            self.split == Split::Train || self.holdout.is_some(),
            "`split` = holdout needs `holdout`: nothing is held out".to_owned(),
        );
        if let Epochs::Count(count) = self.epochs {
            check(
                (1..=1 << 32).contains(&count),
                format!("`epochs` must be between 1 and {}, found {count}", 1u64 << 32),
            );
        }
        for skip in &self.skip {
            check(
                skip.start < skip.end && skip.end <= 1 << 62,
                format!("`skip` holds {}-{}, which is no range of positions", skip.start, skip.end),
            );
        }
        for (name, value, low, high) in [
            ("seq_len", self.seq_len, 1, 1 << 32),
            ("batch_size", self.batch_size, 1, 1 << 32),
            ("chunk_tokens", self.chunk_tokens, 1, 1 << 48),
            ("window_tokens", self.window_tokens, 1, 1 << 48),
            ("lanes", self.lanes, 1, 1 << 20),
            ("prefetch_batches", self.prefetch_batches, 1, 1 << 16),
            ("block_tokens", self.block_tokens, 1, 1 << 31),
            ("num_threads", self.num_threads.unwrap_or(1), 0, 1024),
            ("thread_priority", self.thread_priority, 0, 19),
            ("dp_world_size", self.dp_world_size.unwrap_or(1), 1, 1 << 32),
            ("model_parallel_size", self.model_parallel_size, 1, 1 << 32),
            ("holdout", self.holdout.unwrap_or(2), 2, 1 << 32),
            ("max_steps", self.max_steps.unwrap_or(1), 1, 1 << 62),
        ] {
            check((low..=high).contains(&value), format!("`{name}` must be between {low} and {high}, found {value}"));
        }
        check(
            self.dp_rank.is_some() == self.dp_world_size.is_some(),
            "`dp_rank` and `dp_world_size` belong together: only one of them is set".to_owned(),
        );
        if let (Some(rank), Some(size)) = (self.dp_rank, self.dp_world_size) {
            check(rank < size, format!("`dp_rank` must be below `dp_world_size`: found rank {rank} of {size}"));
        }
        check(
            matches!(self.input_dtype, Dtype::I64 | Dtype::I32),
            format!("`input_dtype` must be int64 or int32, found {}", self.input_dtype.name()),
        );
        for (name, id) in [("bos_id", self.bos_id), ("eos_id", self.eos_id), ("pad_id", Some(self.pad_id))] {
            let fits = id.is_none_or(|id| i32::try_from(id).is_ok());
            check(fits, format!("`{name}` must be below 2147483648, found {}", id.unwrap_or_default()));
        }
        if faults.is_empty() { Ok(()) } else { Err(Error::all(faults)) }
    }

    /// The corpora that these settings name, each by its name and its `data`: those of the mixture, or the only one, which has no name.
    pub fn corpora(&self) -> Result<Vec<(String, Vec<String>)>> {
        let Some(text) = &self.mixture else { return Ok(vec![(String::new(), self.data.clone())]) };
        Ok(MixtureSettings::parse(text)?.sources.into_iter().map(|source| (source.name, source.data)).collect())
    }

    /// Tokens one row reads from the stream: `seq_len`, and one more where targets are shifted.
    pub fn row_tokens(&self) -> u64 {
        self.seq_len + u64::from(self.targets == Targets::Shifted)
    }
}
