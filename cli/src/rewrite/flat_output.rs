//! Writes flat files of ids, by the published layout of each format.
//!
//! A format lists the ends of documents in a file beside the ids, or has none. Files without ends
//! hold all documents of a shard joined.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use forebay::tokens::Dtype;
use forebay::{Error, Result};

/// Bytes of the header that is written before the ids of an `.npy` file.
const NPY_HEADER: usize = 128;
/// Bytes of the header of llm.c.
const LLM_C_HEADER: usize = 1024;

/// A flat format that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FlatFormat {
    Npy,
    Raw,
    LlmC,
    Megatron,
    Datatrove,
}

impl FlatFormat {
    /// Suffix of the files with ids.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::Npy => "npy",
            Self::Raw | Self::LlmC | Self::Megatron => "bin",
            Self::Datatrove => "ds",
        }
    }

    /// Whether a file has no ends of documents.
    pub(super) fn joins(self) -> bool {
        matches!(self, Self::Npy | Self::Raw | Self::LlmC)
    }

    /// The column that a file beside the ids can hold.
    pub(super) fn column(self) -> Option<&'static str> {
        (self == Self::Datatrove).then_some("loss_mask")
    }

    /// The smallest type of the format that holds all ids of type `dtype`. `None` if there is none.
    pub(super) fn type_for(self, dtype: Dtype) -> Option<Dtype> {
        match (self, dtype) {
            (Self::Npy | Self::Raw, dtype) => Some(dtype),
            (Self::LlmC | Self::Datatrove, Dtype::U8 | Dtype::U16) => Some(Dtype::U16),
            (Self::LlmC | Self::Datatrove, Dtype::I32 | Dtype::U32) => Some(Dtype::U32),
            (Self::Megatron, Dtype::U32) => Some(Dtype::I64),
            (Self::Megatron, dtype) => Some(dtype),
            (Self::LlmC | Self::Datatrove, _) => None,
        }
    }

    /// Most tokens of a file.
    fn most_tokens(self) -> u64 {
        if self == Self::LlmC { i32::MAX as u64 } else { u64::MAX }
    }
}

/// A flat file that is being written.
pub(super) struct FlatWriter {
    format: FlatFormat,
    dtype: Dtype,
    file: BufWriter<File>,
    path: PathBuf,
    /// The file with a mask beside the ids.
    mask: Option<BufWriter<File>>,
    /// Number of tokens up to the end of each document.
    ends: Vec<u64>,
    tokens: u64,
}

/// The files beside `path` that a rewriting may write.
pub(super) fn beside(path: &Path) -> [PathBuf; 4] {
    let with = |suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    [path.with_extension("idx"), with(".index"), with(".metadata"), with(".loss")]
}

impl FlatWriter {
    /// Begins the file at `path`, which `file` has opened.
    pub(super) fn new(format: FlatFormat, dtype: Dtype, file: File, path: &Path, has_mask: bool) -> Result<Self> {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let header = match format {
            FlatFormat::Npy => NPY_HEADER,
            FlatFormat::LlmC => LLM_C_HEADER,
            FlatFormat::Raw | FlatFormat::Megatron | FlatFormat::Datatrove => 0,
        };
        // The header holds the number of tokens, which is known at the end.
        file.write_all(&vec![0; header]).map_err(failed)?;
        let [.., mask] = beside(path);
        let mask = has_mask.then(|| File::create(&mask).map(BufWriter::new)).transpose().map_err(failed)?;
        Ok(Self { format, dtype, file, path: path.to_owned(), mask, ends: Vec::new(), tokens: 0 })
    }

    /// Adds `ids`, and documents that end after `ends` of them. `mask` has a byte for each id, or
    /// none.
    pub(super) fn write(&mut self, ids: &[i64], ends: &[i32], mask: &[u8]) -> Result<()> {
        self.ends.extend(ends.iter().map(|end| self.tokens + *end as u64));
        self.tokens += ids.len() as u64;
        let most = self.format.most_tokens();
        if self.tokens > most {
            let text =
                format!("a shard has more than {most} tokens, the most that llm.c can count: lower `--shard-tokens`");
            return Err(Error::config(text));
        }
        let size = self.dtype.size();
        ids.iter().try_for_each(|id| self.file.write_all(&id.to_le_bytes()[..size])).map_err(failed)?;
        if let Some(file) = &mut self.mask {
            file.write_all(mask).map_err(failed)?;
        }
        Ok(())
    }

    /// Ends a document.
    pub(super) fn end(&mut self) {
        self.ends.push(self.tokens);
    }

    /// Writes headers and the files beside the ids. Returns the file with the ids.
    pub(super) fn finish(self) -> Result<File> {
        let Self { format, dtype, file, path, mask, ends, tokens } = self;
        let mut file = file.into_inner().map_err(|error| failed(error.into_error()))?;
        if let Some(mask) = mask {
            mask.into_inner().map_err(|error| failed(error.into_error()))?.sync_all().map_err(failed)?;
        }
        let mut at_start = |header: &[u8]| file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(header));
        match format {
            FlatFormat::Npy => at_start(&npy_header(dtype, tokens)).map_err(failed)?,
            FlatFormat::LlmC => at_start(&llm_c_header(dtype, tokens)).map_err(failed)?,
            FlatFormat::Raw => {}
            FlatFormat::Megatron => write_all(&beside(&path)[0], &megatron_index(dtype, &ends)?)?,
            FlatFormat::Datatrove => {
                let ends: Vec<u8> = ends.iter().flat_map(|end| end.to_le_bytes()).collect();
                let [_, index, metadata, _] = beside(&path);
                write_all(&index, &ends)?;
                write_all(&metadata, datatrove_metadata(dtype, tokens).as_bytes())?;
            }
        }
        Ok(file)
    }
}

fn write_all(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| failed(error).at(path))
}

/// A header of version 1.0, filled up with spaces. Format: `numpy.lib.format`.
fn npy_header(dtype: Dtype, tokens: u64) -> Vec<u8> {
    let kind = if dtype.is_signed() { 'i' } else { 'u' };
    let order = if dtype.size() == 1 { '|' } else { '<' };
    let size = dtype.size();
    let text = format!("{{'descr': '{order}{kind}{size}', 'fortran_order': False, 'shape': ({tokens},), }}");
    let length = NPY_HEADER - 10;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((length as u16).to_le_bytes());
    header.extend(format!("{text:<width$}\n", width = length - 1).into_bytes());
    header
}

/// A header of 256 numbers. Format: `dev/data/data_common.py` of llm.c.
fn llm_c_header(dtype: Dtype, tokens: u64) -> Vec<u8> {
    let (magic, version): (i32, i32) = if dtype == Dtype::U16 { (20_240_520, 1) } else { (20_240_801, 7) };
    let mut header: Vec<u8> = [magic, version, tokens as i32].iter().flat_map(|word| word.to_le_bytes()).collect();
    header.resize(LLM_C_HEADER, 0);
    header
}

/// An index in which each document is one sequence, and an empty document none. Format:
/// `megatron/core/datasets/indexed_dataset.py`.
fn megatron_index(dtype: Dtype, ends: &[u64]) -> Result<Vec<u8>> {
    let code: u8 = match dtype {
        Dtype::U8 => 1,
        Dtype::I32 => 4,
        Dtype::I64 => 5,
        Dtype::U16 => 8,
        other => return Err(Error::config(format!("Megatron has no ids of type {}", other.name()))),
    };
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let (mut lengths, mut offsets, mut firsts) = (Vec::new(), Vec::new(), 0_u64.to_le_bytes().to_vec());
    let mut sequences = 0_u64;
    for (start, end) in starts.zip(ends) {
        if *end > start {
            let length = i32::try_from(end - start)
                .map_err(|_| Error::data(format!("a document of {} tokens is too long for Megatron", end - start)))?;
            lengths.extend(length.to_le_bytes());
            offsets.extend((start * dtype.size() as u64).to_le_bytes());
            sequences += 1;
        }
        firsts.extend(sequences.to_le_bytes());
    }
    let mut index = b"MMIDIDX\0\0".to_vec();
    index.extend(1_u64.to_le_bytes());
    index.push(code);
    index.extend(sequences.to_le_bytes());
    index.extend((ends.len() as u64 + 1).to_le_bytes());
    index.extend(lengths);
    index.extend(offsets);
    index.extend(firsts);
    Ok(index)
}

/// Names the bytes of an id, and the number of ids. The merger of datatrove takes two bytes for an
/// id if this file is missing. Format: `datatrove/pipeline/tokens/tokenizer.py`.
fn datatrove_metadata(dtype: Dtype, tokens: u64) -> String {
    let thousands = tokens.checked_ilog10().unwrap_or(0) / 3;
    let shown = tokens as f64 / 1000_f64.powi(thousands as i32);
    let prefix = ["", "k", "M", "G", "T", "P", "E"][thousands as usize];
    let decimals = 2 - (shown.max(1.0).log10() as usize).min(2);
    format!("Unknown Tokenizer|{}\n{tokens}\n{shown:.decimals$} {prefix}T", dtype.size())
}

fn failed(error: std::io::Error) -> Error {
    Error::io("cannot write shard", error)
}
