//! Files of llm.c (`.bin`): a header of 256 integers, and then ids. They have no document ends.
//!
//! The header holds a magic number, a version and the number of ids. The magic number tells the
//! type of the ids. Format: `dev/data/data_common.py` of llm.c.

use super::{Contents, FlatDocuments, check_size};
use crate::error::{Error, Result};
use crate::format::{FileSample, Format, OpenOptions, Recognised, Shard};
use crate::storage::Reads;
use crate::tokens::Dtype;

/// Bytes of the header.
const HEADER: u64 = 1024;

/// A kind of file that llm.c writes.
struct Kind {
    magic: u32,
    version: u32,
    dtype: Dtype,
}

const KINDS: [Kind; 2] = [
    Kind { magic: 20_240_520, version: 1, dtype: Dtype::U16 },
    Kind { magic: 20_240_801, version: 7, dtype: Dtype::U32 },
];

/// The magic number of files for evaluation. They hold more than ids.
const EVALUATION: u32 = 20_240_522;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(4 * at..4 * at + 4)?;
    Some(u32::from_le_bytes(bytes.try_into().expect("four bytes")))
}

/// Recognises a file by its first two numbers.
pub(in crate::format) fn recognise(sample: &FileSample<'_>) -> Recognised {
    let (Some(magic), Some(version)) = (word(sample.head, 0), word(sample.head, 1)) else { return Recognised::No };
    if magic == EVALUATION && version == 1 {
        return Recognised::Refused(Error::data(
            "a file of llm.c for evaluation holds more than ids: expected a file of tokens to train on",
        ));
    }
    match KINDS.iter().find(|kind| kind.magic == magic) {
        Some(kind) if kind.version == version => Recognised::Yes,
        Some(kind) => Recognised::Refused(Error::data(format!(
            "a file of llm.c with magic number {magic} has version {version}: expected version {}; write it again",
            kind.version
        ))),
        None => Recognised::No,
    }
}

/// Opens the file of `reads`.
pub(in crate::format) fn open(mut reads: Reads, options: &OpenOptions) -> Result<Shard> {
    let len = reads.file().len();
    let cut =
        || Error::data(format!("the header of llm.c has {HEADER} bytes: the file has {len}; write or copy it again"));
    if len < HEADER {
        return Err(cut());
    }
    let header = reads.get(0..HEADER)?;
    let (magic, tokens) = word(header, 0).zip(word(header, 2)).ok_or_else(cut)?;
    if let Some(at) = header[12..].iter().position(|byte| *byte != 0) {
        return Err(Error::data(format!(
            "the header of llm.c is damaged: expected zeros from byte 12 to {HEADER}, found another value at byte {}; \
             write or copy it again",
            12 + at
        )));
    }
    let kind = KINDS.iter().find(|kind| kind.magic == magic).ok_or_else(cut)?;
    let (dtype, tokens) = (kind.dtype, u64::from(tokens));
    check_size(reads.file(), HEADER, dtype, tokens, "the header of llm.c says that the file has")?;
    let file = reads.into_file();
    Contents { format: Format::LlmC, file, start: HEADER, dtype, tokens, documents: FlatDocuments::One, further: None }
        .open(options)
}
