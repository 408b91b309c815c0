//! Types of the settings, and checks of several settings together.
//!
//! [`Config`] itself is made from the table ([`super::table`]), which also checks each value alone.

use super::forms::Choice;
use super::mixture::MixtureSettings;
pub use super::table::Config;
use crate::error::{Error, Result};

/// Defines an enum whose variants have names for users.
macro_rules! choices {
    ($(#[$note:meta])* $name:ident {
        $($(#[doc = $line:literal])+ $variant:ident = $text:literal,)+
    }) => {
        $(#[$note])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[doc = $line])+ $variant,)+
        }

        impl $name {
            /// Every value, with the name that users give it.
            pub const CHOICES: &'static [(&'static str, Self)] = &[$(($text, Self::$variant)),+];

            /// Name shown to users.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }

        impl Choice for $name {
            const CHOICES: &'static [(&'static str, Self)] = Self::CHOICES;
            const DOCS: &'static [&'static str] = &[$(concat!($($line),+)),+];
        }
    };
}

choices! {
    /// Order of an epoch.
    Shuffle {
        /// `Global` if any window can be read at once, `Block` if blocks must be decoded.
        On = "true",
        /// Corpus order.
        Off = "false",
        /// One permutation over all sequences.
        Global = "global",
        /// Chunks are permuted over the corpus, then sequences inside windows of each lane.
        Block = "block",
    }
}

choices! {
    /// The rule that makes rows from documents.
    LayoutKind {
        /// All documents are joined, and the stream is cut into rows.
        Concat = "concat",
        /// Rows hold several whole documents each.
        Pack = "pack",
        /// Rows hold one document each.
        Pad = "pad",
        /// Documents have exactly the length of a row already.
        Rows = "rows",
    }
}

impl LayoutKind {
    /// Whether rows are cut from joined documents, so that no row has padding or needs the lengths
    /// of documents.
    pub const fn joins(self) -> bool {
        matches!(self, Self::Concat)
    }

    /// Whether rows are made window by window, from the lengths of the documents in a window.
    pub const fn has_windows(self) -> bool {
        matches!(self, Self::Pack | Self::Pad)
    }
}

choices! {
    /// Treatment of documents that are longer than a row.
    Overflow {
        /// The document is cut into pieces of the length of a row. The last piece may be shorter.
        Split = "split",
        /// The row takes the beginning of the document. The rest is left out.
        Truncate = "truncate",
        /// The document is left out.
        Drop = "drop",
    }
}

choices! {
    /// The column that says where documents begin in rows that were packed before.
    PackedBy {
        /// A row of a file is one document.
        None = "none",
        /// The column of TRL holds the lengths of the documents.
        SeqLengths = "seq_lengths",
        /// The column of Megatron-Bridge holds the places where documents begin.
        SeqStartId = "seq_start_id",
        /// The column holds a position for each token. A document begins at each 0.
        PositionIds = "position_ids",
    }
}

choices! {
    /// Arrays of a batch.
    Targets {
        /// `input_ids` and `labels` at the same positions. The model shifts them, as in Hugging
        /// Face's models.
        Labels = "labels",
        /// `x` and `y`, one token apart in `seq_len + 1` tokens. Neighbouring sequences overlap
        /// by one token.
        Shifted = "shifted",
    }
}

choices! {
    /// A trainer's names, shapes and types for the arrays of a batch.
    BatchFormat {
        /// Models and trainers of Hugging Face, with rows.
        Hf = "hf",
        /// The same, with all rows of a batch joined, for attention inside documents.
        HfPacked = "hf-packed",
        /// The trainer torchtitan.
        Titan = "titan",
        /// Megatron-LM.
        Megatron = "megatron",
        /// OLMo-core.
        Olmo = "olmo",
        /// A pair of inputs and targets, as in nanoGPT.
        Xy = "xy",
        /// MaxText, and other trainers of the T5X family.
        Jax = "jax",
    }
}

impl BatchFormat {
    /// The targets that the trainer takes. It shifts `labels` itself.
    pub const fn targets(self) -> Targets {
        match self {
            Self::Hf | Self::HfPacked | Self::Olmo => Targets::Labels,
            Self::Titan | Self::Megatron | Self::Xy | Self::Jax => Targets::Shifted,
        }
    }

    /// Whether a batch has room for arrays of other names than the trainer's.
    pub const fn has_room(self) -> bool {
        !matches!(self, Self::Titan | Self::Xy)
    }

    /// Whether a batch tells the positions of its tokens.
    const fn has_positions(self) -> bool {
        !matches!(self, Self::Olmo | Self::Xy)
    }
}

choices! {
    /// Places where `concat` cuts the joined documents.
    Phase {
        /// Every epoch cuts at the same places.
        Fixed = "fixed",
        /// The cuts move from epoch to epoch. The row at the end of the corpus goes on at its
        /// start, so that each token still comes once.
        Epoch = "epoch",
    }
}

choices! {
    /// Rule that moves rows of a global batch between ranks.
    Balance {
        /// Rows stay where the order puts them.
        Off = "off",
        /// The rows of each global batch are permuted, so that ranks get about equal sums of
        /// squared document lengths.
        Ranks = "ranks",
    }
}

choices! {
    /// Treatment of the tokens and sequences at an epoch's end that fill no whole sequence or
    /// global batch.
    Remainder {
        /// They are left out, and counted.
        Drop = "drop",
        /// They are delivered in full rows and batches, filled up with `pad_id` and ignored labels.
        Pad = "pad",
        /// They are filled up from the start of the epoch.
        Wrap = "wrap",
        /// The last batch has fewer rows. This is refused if a rank would have none.
        Short = "short",
    }
}

choices! {
    /// Access to file bytes.
    Io {
        /// Files are mapped on local file systems, and read by position on network and FUSE ones.
        Auto = "auto",
        /// Files are always mapped.
        Mmap = "mmap",
        /// Files are always read by position.
        Pread = "pread",
    }
}

choices! {
    /// Rule for rows that cannot be read.
    OnError {
        /// The batch of the row is an error, and so is the rest of the pass.
        Raise = "raise",
        /// Passing errors of files are tried again for half a minute, in place of a second. Damage
        /// is an error.
        Retry = "retry",
        /// A damaged row is replaced by another row of its source. Seed, epoch and row decide
        /// which, so all ranks, restarts and numbers of threads choose alike.
        Substitute = "substitute",
    }
}

choices! {
    /// A side of a corpus from which `holdout` keeps sequences.
    Split {
        /// All sequences that are not held out.
        Train = "train",
        /// The held-out sequences.
        Holdout = "holdout",
    }
}

choices! {
    /// Container format that `data` is expected to hold.
    DataFormat {
        /// The content of the files tells the format.
        Auto = "auto",
        /// Parquet only.
        Parquet = "parquet",
        /// Arrow IPC file or stream only.
        Arrow = "arrow",
        /// NumPy arrays only.
        Npy = "npy",
        /// Files of llm.c only.
        LlmC = "llm.c",
        /// Megatron's pairs only.
        Megatron = "megatron",
        /// Files of datatrove only.
        Datatrove = "datatrove",
        /// Ids without a header only.
        Raw = "raw",
    }
}

/// Epochs of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epochs {
    /// This many epochs, one after the other.
    Count(u64),
    /// One epoch after the other, without end.
    Endless,
}

/// Positions `start..end` of `epoch` that are never delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skip {
    /// Epoch, from 0.
    pub epoch: u64,
    /// First position that is left out.
    pub start: u64,
    /// The position after the last position that is left out.
    pub end: u64,
}

impl Config {
    /// Checks every value alone and together with the others. Fails with all faults, listed
    /// together.
    pub fn validate(&self) -> Result<()> {
        let mut faults: Vec<Error> = super::all().iter().filter_map(|setting| setting.check(self).err()).collect();
        self.check_corpora(&mut faults);
        let mut check = |holds: bool, text: &dyn Fn() -> String| {
            if !holds {
                faults.push(Error::config(text()));
            }
        };
        check(self.split == Split::Train || self.holdout.is_some(), &|| {
            "`split` = holdout needs `holdout`: nothing is held out".to_owned()
        });
        check(self.dp_rank.is_some() == self.dp_world_size.is_some(), &|| {
            "`dp_rank` and `dp_world_size` belong together: only one of them is set".to_owned()
        });
        if let (Some(rank), Some(size)) = (self.dp_rank, self.dp_world_size) {
            check(rank < size, &|| format!("`dp_rank` must be below `dp_world_size`: found rank {rank} of {size}"));
        }
        check(self.on_error != OnError::Substitute || self.service.is_empty(), &|| {
            "`on_error` = substitute is for loaders that read files themselves: leave `service` out, or use another \
             `on_error`"
                .to_owned()
        });
        if let Some(size) = self.vocab_size {
            for (name, id) in [("bos_id", self.bos_id), ("eos_id", self.eos_id), ("pad_id", Some(self.pad_id))] {
                check(id.is_none_or(|id| u64::from(id) < size), &|| {
                    format!("`{name}` = {} must be below `vocab_size` = {size}", id.unwrap_or_default())
                });
            }
        }
        self.check_layout(&mut faults);
        self.check_batch_format(&mut faults);
        if faults.is_empty() { Ok(()) } else { Err(Error::all(faults)) }
    }

    /// Checks that the settings of the layout belong to it, and to each other.
    fn check_layout(&self, faults: &mut Vec<Error>) {
        let layout = self.layout;
        let mut check = |holds: bool, text: String| {
            if !holds {
                faults.push(Error::config(text));
            }
        };
        let only = |name: &str, layouts: &str| {
            format!("`{name}` is for `layout` = {layouts}, found `layout` = {}", layout.name())
        };
        let is_pack = layout == LayoutKind::Pack;
        check(layout.has_windows() || self.overflow == Overflow::Split, only("overflow", "pack or pad"));
        check(layout.joins() || self.phase == Phase::Fixed, only("phase", "concat"));
        check(!layout.joins() || self.balance == Balance::Off, only("balance", "pack, pad or rows"));
        check(
            self.phase == Phase::Fixed || self.holdout.is_none(),
            "`phase` = epoch moves the borders of rows, so that rows of `holdout` would be trained on in another \
             epoch: leave `holdout` out, or use `phase` = fixed"
                .to_owned(),
        );
        check(is_pack || self.max_docs_per_row.is_none(), only("max_docs_per_row", "pack"));
        check(is_pack || self.pack_align == 1, only("pack_align", "pack"));
        check(
            self.seq_len.is_multiple_of(self.pack_align),
            format!("`seq_len` = {} must be a multiple of `pack_align` = {}", self.seq_len, self.pack_align),
        );
        let is_packed = self.packed_by != PackedBy::None;
        check(!is_packed || matches!(layout, LayoutKind::Rows | LayoutKind::Pad), only("packed_by", "rows or pad"));
        check(
            !is_packed || self.boundaries != Some(false),
            "`packed_by` needs `boundaries`: without them, no batch shows where documents begin".to_owned(),
        );
        check(
            !is_packed || (self.bos_id.is_none() && self.eos_id.is_none()),
            "`packed_by` does not go with `bos_id` and `eos_id`: a row of the file has its special ids already"
                .to_owned(),
        );
        check(
            !self.has_own_positions() || (self.bos_id.is_none() && self.eos_id.is_none()),
            "a column `position_ids` does not go with `bos_id` and `eos_id`, which have no position in the file: leave \
             the column out, which gives positions made of the documents"
                .to_owned(),
        );
        let is_pad = layout == LayoutKind::Pad;
        check(is_pad || self.pad_to_multiple.is_none(), only("pad_to_multiple", "pad"));
        let multiple = self.pad_to_multiple.unwrap_or(1);
        check(
            self.seq_len.is_multiple_of(multiple),
            format!("`seq_len` = {} must be a multiple of `pad_to_multiple` = {multiple}", self.seq_len),
        );
        check(is_pad || self.bucket.is_none(), only("bucket", "pad"));
        check(
            !is_pad || self.bucket.is_none() || self.pad_to_multiple.is_some(),
            "`bucket` needs `pad_to_multiple`: without it, all batches are `seq_len` long".to_owned(),
        );
        check(
            self.cu_seqlens_width.is_none() || self.has_boundaries(),
            "`cu_seqlens_width` needs `boundaries` = true".to_owned(),
        );
        check(!self.document_mask || self.has_boundaries(), "`document_mask` needs `boundaries` = true".to_owned());
        let places = self.batch_size.saturating_mul(self.seq_len);
        check(
            !self.has_boundaries() || places < 1 << 31,
            format!(
                "`cu_seqlens` is int32, too small for {places} places of a batch: lower `batch_size` or `seq_len`, or \
                 set `boundaries` = false"
            ),
        );
        check(
            layout.joins() || self.row_tokens() < 1 << 32,
            format!("`seq_len` = {} is too large for `layout` = {}", self.seq_len, layout.name()),
        );
    }

    /// Checks that batches can have the format that is asked for.
    fn check_batch_format(&self, faults: &mut Vec<Error>) {
        let Some(format) = self.batch_format else { return };
        let mut check = |holds: bool, text: &str| {
            if !holds {
                faults.push(Error::config(format!("`batch_format` = {} {text}", format.name())));
            }
        };
        check(
            format.targets() == Targets::Shifted || self.targets == Targets::Labels,
            "takes labels at the places of their tokens: set `targets` = labels, or leave it out",
        );
        check(
            format != BatchFormat::HfPacked || self.has_boundaries(),
            "needs the starts of documents: set `layout` = pack, or `boundaries` = true",
        );
        check(
            format.has_room() || !self.sample_ids,
            "has no place for `sample_ids`: leave it out, or choose another format",
        );
        check(
            format.has_room() || !self.document_mask,
            "has no place for `document_mask`: leave it out, or choose another format",
        );
        check(
            format != BatchFormat::HfPacked || !self.document_mask,
            "joins the rows of a batch, and `document_mask` has a square for each row: leave it out, or choose `hf`",
        );
        let is_olmo = format == BatchFormat::Olmo;
        check(!is_olmo || self.pad_to_multiple.is_none(), "takes batches of one size: leave `pad_to_multiple` out");
        check(
            !is_olmo || self.remainder != Remainder::Short,
            "takes batches of one size, and the last batch may be short: set `remainder` to drop, pad or wrap \
             (`drop_last=True` of a DataLoader)",
        );
        let has_own_positions = self.has_own_positions();
        check(
            !has_own_positions || format.has_positions(),
            "has no place for the column `position_ids`: leave it out, or choose another format",
        );
        check(
            !has_own_positions || self.shows_documents_by_positions(format),
            "finds documents by positions that begin at 0, so that a column `position_ids` needs `layout` = rows, and \
             `packed_by` = position_ids for boundaries: leave the column out, which gives positions made of the \
             documents, or choose another format",
        );
    }

    /// Whether the positions of a column may stand in a batch of `format`. Trainers that find
    /// documents by positions alone need positions that begin at 0 in every row and document.
    fn shows_documents_by_positions(&self, format: BatchFormat) -> bool {
        let has_mask = format == BatchFormat::Hf && self.layout == LayoutKind::Pad && self.packed_by == PackedBy::None;
        let is_whole =
            self.layout == LayoutKind::Rows && (!self.has_boundaries() || self.packed_by == PackedBy::PositionIds);
        !matches!(format, BatchFormat::Hf | BatchFormat::Titan) || has_mask || is_whole
    }

    /// Whether positions come from a column of the corpus.
    fn has_own_positions(&self) -> bool {
        self.fields.iter().any(|name| name == "position_ids")
    }

    /// Whether a batch tells by `attention_mask` which places hold a token.
    pub(crate) fn has_attention_mask(&self) -> bool {
        match self.batch_format {
            // Where a row has several documents, an attention mask would hide their borders.
            Some(BatchFormat::Hf) if self.has_own_positions() && self.layout == LayoutKind::Rows => false,
            Some(BatchFormat::Hf) => {
                !self.has_boundaries() || (self.layout == LayoutKind::Pad && self.packed_by == PackedBy::None)
            }
            Some(BatchFormat::Jax) => !self.has_boundaries(),
            _ => false,
        }
    }

    /// Whether batches show the starts of documents.
    pub fn has_boundaries(&self) -> bool {
        self.boundaries.unwrap_or(self.layout == LayoutKind::Pack || self.packed_by != PackedBy::None)
    }

    /// Checks that the data is named once, and that the stages of a mixture are in order.
    fn check_corpora(&self, faults: &mut Vec<Error>) {
        let Some(text) = &self.mixture else {
            if self.data.is_empty() {
                faults.push(Error::config("`data` is empty: expected at least one file, folder or glob pattern"));
            }
            return;
        };
        if !self.data.is_empty() {
            faults.push(Error::config("`data` and `mixture` are both set: the mixture names its sources' data"));
        }
        if self.extend {
            let text = "`extend` is for one corpus: add to a mixture by a new source and a new stage";
            faults.push(Error::config(text));
        }
        let stages = MixtureSettings::parse(text).and_then(|mixture| mixture.stages(self.seq_len));
        faults.extend(stages.err());
    }

    /// Most bytes of object stores that are kept on a local disk.
    pub fn room_for_objects(&self) -> u64 {
        if self.cache_dir.is_some() { self.cache_bytes } else { 0 }
    }

    /// The folder of the saved index, if indexes are saved.
    pub fn index_folder(&self) -> Option<&str> {
        self.index_dir.as_deref().or(self.cache_dir.as_deref())
    }

    /// The corpora that these settings name, each as its name and its `data`.
    ///
    /// Without a mixture, there is one corpus, with an empty name.
    pub fn corpora(&self) -> Result<Vec<(String, Vec<String>)>> {
        let Some(text) = &self.mixture else { return Ok(vec![(String::new(), self.data.clone())]) };
        Ok(MixtureSettings::parse(text)?.sources.into_iter().map(|source| (source.name, source.data)).collect())
    }

    /// Number of tokens that a row reads from the stream: `seq_len`, and one more for shifted
    /// targets.
    pub fn row_tokens(&self) -> u64 {
        self.seq_len + u64::from(self.targets == Targets::Shifted)
    }
}
