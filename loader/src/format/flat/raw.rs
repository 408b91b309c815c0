//! Raw files of ids (`.bin`): values without a header. The setting `bin_dtype` names their type.
//!
//! A raw file cannot be recognised by its content. So a file counts as raw only if the user names
//! the type, and never if it has the suffix of another format.

use super::{Contents, FlatDocuments};
use crate::error::{Error, Result};
use crate::format::{FORMATS, FileSample, Format, OpenOptions, Recognised, Shard};
use crate::storage::Reads;

/// Recognises a file that no other format claims, if the user named the type of raw files.
pub(in crate::format) fn recognise(sample: &FileSample<'_>) -> Recognised {
    // Some writers give raw files the suffix of NumPy's arrays.
    let of_others = FORMATS.iter().flat_map(|entry| entry.suffixes).filter(|suffix| !["bin", "npy"].contains(suffix));
    let is_other = { of_others }.any(|suffix| sample.ends_in(suffix));
    let is_damaged_npy = sample.ends_in("npy") && looks_like_npy(sample.head);
    // Model weights are zip archives, and end in `.bin` too.
    if matches!(sample.head, [b'P', b'K', 3, 4, ..]) {
        return Recognised::No;
    }
    match sample.options.bin_dtype {
        Some(_) if !is_other && !is_damaged_npy => Recognised::Yes,
        None if sample.ends_in("bin") && !sample.head.starts_with(&[0xff; 4]) => {
            let path = sample.path.display();
            Recognised::Refused(Error::data(format!(
                "a file of format raw does not say the type of its ids: set `bin_dtype`, such as `uint16`, or rewrite it \
                 with `forebay rewrite --set bin_dtype=uint16 {path} FOLDER`; a file of Megatron needs its index `{}` \
                 beside it",
                sample.path.with_extension("idx").display()
            )))
        }
        None if sample.ends_in("npy") && !is_damaged_npy => Recognised::Refused(Error::data(format!(
            "not a NumPy array: expected it to begin with `\\x93NUMPY`, found {:02x?}; if it holds raw ids, set \
             `bin_dtype`, such as `uint16`",
            sample.head
        ))),
        _ => Recognised::No,
    }
}

/// Whether a file begins with most of the bytes that begin a NumPy array.
fn looks_like_npy(head: &[u8]) -> bool {
    head.iter().zip(b"\x93NUMPY").filter(|(found, expected)| found == expected).count() >= 4
}

/// Opens the file of `reads`.
pub(in crate::format) fn open(reads: Reads, options: &OpenOptions) -> Result<Shard> {
    let dtype = options.bin_dtype.ok_or_else(|| Error::config("`bin_dtype` is missing"))?;
    let file = reads.into_file();
    let width = dtype.size() as u64;
    if !file.len().is_multiple_of(width) {
        return Err(Error::data(format!(
            "the file has {} bytes, which is no multiple of the {width} bytes of `bin_dtype` = {}: the file is cut, or its \
             ids have another type",
            file.len(),
            dtype.name()
        )));
    }
    let tokens = file.len() / width;
    Contents { format: Format::Raw, file, start: 0, dtype, tokens, documents: FlatDocuments::One, further: None }
        .open(options)
}
