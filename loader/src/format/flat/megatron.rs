//! Megatron's pairs: ids in `NAME.bin`, and their type, lengths and documents in `NAME.idx`.
//!
//! The index lists sequences, and documents as runs of sequences. A document of forebay is a
//! document of Megatron: its sequences are joined. Format:
//! `megatron/core/datasets/indexed_dataset.py`.

use std::path::{Path, PathBuf};

use super::documents::{DocumentTable, TableKind, entries};
use super::{Contents, FlatDocuments};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{FileSample, Format, OpenOptions, Recognised, Shard};
use crate::storage::{Reads, SourceFile};
use crate::tokens::Dtype;

const MAGIC: &[u8] = b"MMIDIDX\0\0";
/// Size of magic, version, type, number of sequences, and number of document entries.
const HEADER: u64 = 34;
/// Number of sequences that are checked at once.
const PIECE: u64 = 1 << 16;

/// The types of values, by their numbers in an index.
const TYPES: [(u8, &str, Option<Dtype>); 8] = [
    (1, "uint8", Some(Dtype::U8)),
    (2, "int8", Some(Dtype::I8)),
    (3, "int16", Some(Dtype::I16)),
    (4, "int32", Some(Dtype::I32)),
    (5, "int64", Some(Dtype::I64)),
    (6, "float64", None),
    (7, "float32", None),
    (8, "uint16", Some(Dtype::U16)),
];

fn index_of(path: &Path) -> PathBuf {
    path.with_extension("idx")
}

/// Recognises the ids by the index beside them.
pub(in crate::format) fn recognise(sample: &FileSample<'_>) -> Recognised {
    if sample.head.starts_with(&MAGIC[..8]) {
        return Recognised::Refused(Error::data(format!(
            "the file is the index of a Megatron pair: name the ids, `{}`",
            sample.path.with_extension("bin").display()
        )));
    }
    if !sample.ends_in("bin") {
        return Recognised::No;
    }
    let index = index_of(sample.path);
    let begins = || -> Result<Option<Vec<u8>>> {
        if !sample.options.files.has_file(&index)? {
            return Ok(None);
        }
        let file = sample.options.files.open(&index, sample.options.io)?;
        Ok(Some(Reads::new(file.clone()).get(0..file.len().min(MAGIC.len() as u64))?.to_vec()))
    };
    match begins() {
        Ok(None) => Recognised::No,
        Ok(Some(begins)) if begins == MAGIC => Recognised::Yes,
        Ok(Some(begins)) => Recognised::Refused(
            Error::data(format!(
                "the file beside `{}` is no index of Megatron: expected it to begin with `MMIDIDX`, found {begins:02x?}; \
                 write or copy the pair again, or move the file away if it belongs to something else",
                sample.path.display()
            ))
            .at(&index),
        ),
        Err(error) => Recognised::Refused(error.at(&index)),
    }
}

/// Opens the ids of `reads` by their index.
pub(in crate::format) fn open(reads: Reads, options: &OpenOptions) -> Result<Shard> {
    let file = reads.into_file();
    let path = index_of(file.path());
    let index = options.files.open(&path, options.io)?;
    let (dtype, tokens, table) = read(index, &file).map_err(|error| error.at(&path))?;
    let documents = FlatDocuments::Listed(table);
    Contents { format: Format::Megatron, file, start: 0, dtype, tokens, documents, further: None }.open(options)
}

/// Reads and checks an index for the ids in `file`.
fn read(index: SourceFile, file: &SourceFile) -> Result<(Dtype, u64, DocumentTable)> {
    let damaged = |text: String| Error::data(format!("the index of the Megatron pair is damaged: {text}"));
    if index.len() < HEADER {
        return Err(damaged(format!("expected at least {HEADER} bytes, found {}", index.len())));
    }
    let mut scratch = Vec::new();
    let header = index.slice(0..HEADER, &mut scratch)?;
    let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
    let (version, code, sequences, firsts) = (number(9), header[17], number(18), number(26));
    if version != 1 {
        return Err(Error::data(format!("the index of the Megatron pair has version {version}: expected 1")));
    }
    let (name, dtype) = match TYPES.iter().find(|(number, ..)| *number == code) {
        Some((_, name, dtype)) => (*name, *dtype),
        None => return Err(damaged(format!("the number of its type is {code}: expected 1 to 8"))),
    };
    let dtype = dtype.ok_or_else(|| {
        let accepted = Dtype::accepted(false);
        Error::data(format!("the Megatron pair has values of type {name}: expected ids of {accepted}; write it again"))
    })?;

    // Each sequence has a length and an offset. The documents come next, and perhaps the modes of
    // the sequences.
    let offsets_at = sequences.checked_mul(4).and_then(|bytes| bytes.checked_add(HEADER));
    let firsts_at = sequences.checked_mul(12).and_then(|bytes| bytes.checked_add(HEADER));
    let end = firsts.checked_mul(8).zip(firsts_at).and_then(|(bytes, at)| bytes.checked_add(at));
    let with_modes = end.and_then(|end| end.checked_add(sequences));
    let sizes = offsets_at.zip(firsts_at).filter(|_| [end, with_modes].contains(&Some(index.len())));
    let Some((offsets_at, firsts_at)) = sizes else {
        let expected = end.map_or_else(|| "more than 2^64".to_owned(), |end| end.to_string());
        return Err(damaged(format!(
            "{sequences} sequences and {firsts} entries of documents take {expected} bytes, found {}; write or copy it \
             again",
            index.len()
        )));
    };

    let width = dtype.size() as u64;
    let bytes = check_sequences(&index, sequences, offsets_at, width, file)?;
    if bytes != file.len() {
        return Err(Error::data(format!(
            "the index of the Megatron pair does not fit its ids: {sequences} sequences take {bytes} bytes as {name}, \
             expected `{}` to have as many, found {}; the file is cut, or the index belongs to another",
            file.path().display(),
            file.len()
        )));
    }
    check_documents(&index, firsts, firsts_at, sequences)?;
    let tokens = bytes / width;
    let kind = TableKind::Sequences { firsts_at, offsets_at, sequences, width, tokens };
    Ok((dtype, tokens, DocumentTable { index, documents: firsts.saturating_sub(1), kind }))
}

/// Fails unless the sequences follow each other without gaps. Returns the bytes of all sequences.
fn check_sequences(index: &SourceFile, sequences: u64, offsets_at: u64, width: u64, file: &SourceFile) -> Result<u64> {
    let (mut lengths, mut offsets) = (Vec::new(), Vec::new());
    let mut bytes = 0u64;
    for start in (0..sequences).step_by(PIECE as usize) {
        let end = sequences.min(start + PIECE);
        let lengths = index.slice(HEADER + start * 4..HEADER + end * 4, &mut lengths)?.as_chunks().0;
        let offsets = index.slice(offsets_at + start * 8..offsets_at + end * 8, &mut offsets)?;
        for ((length, offset), sequence) in lengths.iter().zip(entries(offsets)).zip(start..) {
            let damaged = |text: String| {
                let text = format!("the index of the Megatron pair is damaged: sequence {sequence} {text}");
                Error::new(ErrorKind::Data, text)
            };
            let length = i32::from_le_bytes(*length);
            let length = u64::try_from(length).map_err(|_| damaged(format!("has the length {length}")))?;
            if offset != bytes {
                let outside = if offset > file.len() { ", which lies outside of the ids" } else { "" };
                let offset = offset.cast_signed();
                return Err(damaged(format!("begins at byte {offset}{outside}: expected byte {bytes}")));
            }
            bytes += length * width;
        }
    }
    Ok(bytes)
}

/// Fails unless the documents begin at sequence 0, rise, and end with the last sequence.
fn check_documents(index: &SourceFile, firsts: u64, firsts_at: u64, sequences: u64) -> Result<()> {
    let (mut scratch, mut last) = (Vec::new(), 0);
    let damaged = |text: String| {
        let text =
            format!("the documents in the index of the Megatron pair are damaged: {text}; write or copy it again");
        Error::data(text)
    };
    for start in (0..firsts).step_by(PIECE as usize) {
        let range = firsts_at + start * 8..firsts_at + firsts.min(start + PIECE) * 8;
        for (first, document) in entries(index.slice(range, &mut scratch)?).zip(start..) {
            if first < last || first > sequences || document == 0 && first > 0 {
                let expected = if document == 0 { 0 } else { sequences };
                let text = format!("document {document} begins at sequence {first}, expected {last} to {expected}");
                return Err(damaged(text));
            }
            last = first;
        }
    }
    if last != sequences {
        return Err(damaged(format!("they end after {last} sequences, expected {sequences}")));
    }
    Ok(())
}
