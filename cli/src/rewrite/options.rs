//! The options of `forebay rewrite`, and the form that they give to shards.

use std::path::PathBuf;

use clap::ValueEnum;
use forebay::corpus::parts::Part;
use forebay::settings::{self, Config};
use forebay::tokens::Dtype;
use parquet::basic::{Compression, Encoding, ZstdLevel};

use super::flat_output::FlatFormat;
use super::manifest;
use crate::Sets;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Documents keep their order, their tokens and their ends. Empty and null documents stay, as empty ones. \
    Columns that `--set fields=NAME,...` names are carried, and all others are left out. A file whose token column is plain is one document, and stays one file.\n\n\
    `npy`, `raw` and `llm.c` have no ends of documents: `--set eos_id=N` writes the id N after each. They hold no further \
    columns. `datatrove` holds `loss_mask`.\n\n\
    The same command continues a run that was killed, and keeps the shards that are there. Every shard is read \
    back and compared with its source before it gets its name.\n\n\
    Memory on each thread: 16 bytes for each of --batch-tokens, with --to parquet a row group, and the longest \
    document. Compressed Arrow takes one of its record batches, too.\n\n\
    Several machines can share the work by `--part`, with the same options and a folder that all of them see. The \
    files are those that one run writes. Loaders refuse the folder until `--merge` has run.\n\n\
    Examples:\n  forebay rewrite corpus/ fast/ --to arrow --shard-tokens 256Mi\n  \
    forebay rewrite corpus/ fast/ --dtype uint16 --part 3/64\n  forebay rewrite corpus/ fast/ --dtype uint16 --merge"
)]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    #[arg(value_name = "SRC", required = true)]
    pub(super) paths: Vec<String>,
    /// Folder for the result: a new or an empty one, or one that this command began
    #[arg(value_name = "DST", required = true)]
    pub(super) target: PathBuf,
    /// Format of the result
    #[arg(long, value_enum, default_value_t = To::Arrow)]
    pub(super) to: To,
    /// Type of the ids in the result; `auto` reads them all and takes the smallest that holds them
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "uint8", "uint16", "int32", "uint32", "int64"])]
    pub(super) dtype: String,
    /// Number of tokens in a shard of the result; the shard ends with the document that reaches it
    #[arg(long, value_name = "TOKENS", default_value = "256Mi", value_parser = size)]
    pub(super) shard_tokens: u64,
    /// Approximate number of tokens in a record batch; the index of Arrow has an entry for each
    #[arg(long, value_name = "TOKENS", default_value = "1Mi", value_parser = size)]
    pub(super) batch_tokens: u64,
    /// Codec of Parquet
    #[arg(long, value_enum, default_value_t = CodecName::Zstd)]
    pub(super) codec: CodecName,
    /// Encoding of Parquet
    #[arg(long, value_enum, default_value_t = Values::Plain)]
    pub(super) encoding: Values,
    /// Approximate number of tokens in a row group of Parquet
    #[arg(long, value_name = "TOKENS", default_value = "16Mi", value_parser = size)]
    row_group_tokens: u64,
    /// Approximate number of bytes in a page of Parquet, before compression
    #[arg(long, value_name = "BYTES", default_value = "1Mi", value_parser = size)]
    page_bytes: u64,
    /// Name of the token column, if it is none of the usual ones
    #[arg(long, value_name = "NAME")]
    pub(super) token_column: Option<String>,
    /// Writes only part I of N, counted from 0, of the shards. Needs `--dtype`
    #[arg(long, value_name = "I/N", conflicts_with = "merge")]
    pub(super) part: Option<Part>,
    /// Joins the parts: checks that all shards are there, and completes the folder
    #[arg(long)]
    pub(super) merge: bool,
    /// Prints one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) sets: Sets,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum To {
    /// Uncompressed, read in place
    Arrow,
    /// Compressed, decoded by blocks
    Parquet,
    /// Arrays of NumPy, each with the documents of a shard joined
    Npy,
    /// Ids without a header, with the documents of a shard joined
    Raw,
    /// Files of llm.c, each with the documents of a shard joined
    #[value(name = "llm.c")]
    LlmC,
    /// Pairs of Megatron
    Megatron,
    /// Files of datatrove
    Datatrove,
}

impl To {
    /// The flat format. `None` for Arrow and Parquet.
    pub(super) fn flat(self) -> Option<FlatFormat> {
        match self {
            Self::Arrow | Self::Parquet => None,
            Self::Npy => Some(FlatFormat::Npy),
            Self::Raw => Some(FlatFormat::Raw),
            Self::LlmC => Some(FlatFormat::LlmC),
            Self::Megatron => Some(FlatFormat::Megatron),
            Self::Datatrove => Some(FlatFormat::Datatrove),
        }
    }

    /// Suffix of the shards.
    pub(super) fn suffix(self) -> String {
        self.flat().map_or_else(|| name(self), |format| format.suffix().to_owned())
    }

    /// Whether a shard of the result has no ends of documents.
    pub(super) fn joins(self) -> bool {
        self.flat().is_some_and(FlatFormat::joins)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CodecName {
    None,
    Snappy,
    Lz4,
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Values {
    Plain,
    Dictionary,
    Delta,
    ByteStreamSplit,
}

fn size(text: &str) -> Result<u64, String> {
    match settings::size(text.trim(), true) {
        Some(size) if (1..=1 << 48).contains(&size) => Ok(size),
        _ => Err("expected a number from 1 to 2^48, such as `16Mi`".to_owned()),
    }
}

/// The form of the result's shards.
#[derive(Clone, Debug)]
pub(super) struct ShardForm {
    pub(super) container: Container,
    pub(super) dtype: Dtype,
    pub(super) batch_tokens: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Container {
    Arrow,
    Flat(FlatFormat),
    Parquet {
        compression: Compression,
        /// Encoding of the values; `None` for a dictionary.
        encoding: Option<Encoding>,
        row_group_tokens: u64,
        page_bytes: u64,
    },
}

impl ShardForm {
    /// Whether a shard has no ends of documents.
    pub(super) fn joins(&self) -> bool {
        matches!(self.container, Container::Flat(format) if format.joins())
    }
}

impl Options {
    /// The options that the result depends on, as the manifest keeps them.
    pub(super) fn named(&self, config: &Config) -> manifest::Options {
        let mut named = vec![
            ("to", name(self.to)),
            ("dtype", self.dtype.clone()),
            ("shard-tokens", self.shard_tokens.to_string()),
            ("batch-tokens", self.batch_tokens.to_string()),
            ("token-column", config.token_column.clone().unwrap_or_default()),
        ];
        if self.to.joins() {
            let id = |id: Option<u32>| id.map_or_else(|| "none".to_owned(), |id| id.to_string());
            named.extend([("bos_id", id(config.bos_id)), ("eos_id", id(config.eos_id))]);
        }
        if let Some(id) = config.document_end_id {
            named.push(("document_end_id", id.to_string()));
        }
        if !config.fields.is_empty() {
            named.push(("fields", config.fields.join(",")));
        }
        if self.to == To::Parquet {
            named.extend([
                ("codec", name(self.codec)),
                ("encoding", name(self.encoding)),
                ("row-group-tokens", self.row_group_tokens.to_string()),
                ("page-bytes", self.page_bytes.to_string()),
            ]);
        }
        named
    }

    pub(super) fn container(&self) -> Container {
        if self.to == To::Arrow {
            return Container::Arrow;
        }
        if let Some(format) = self.to.flat() {
            return Container::Flat(format);
        }
        Container::Parquet {
            compression: match self.codec {
                CodecName::None => Compression::UNCOMPRESSED,
                CodecName::Snappy => Compression::SNAPPY,
                CodecName::Lz4 => Compression::LZ4_RAW,
                CodecName::Zstd => Compression::ZSTD(ZstdLevel::default()),
            },
            encoding: match self.encoding {
                Values::Plain => Some(Encoding::PLAIN),
                Values::Dictionary => None,
                Values::Delta => Some(Encoding::DELTA_BINARY_PACKED),
                Values::ByteStreamSplit => Some(Encoding::BYTE_STREAM_SPLIT),
            },
            row_group_tokens: self.row_group_tokens,
            page_bytes: self.page_bytes,
        }
    }
}

/// The name of a choice, as it is typed.
pub(super) fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}
