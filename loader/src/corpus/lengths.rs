//! The lengths of all documents of a corpus, in two bytes each, in memory or in a saved file.
//!
//! The file lies beside the saved index. It has a header, a record per shard in corpus order, and a
//! section per shard. A section holds two bytes per non-empty document. The lengths that do not fit
//! follow them in a sorted list. So any run of lengths is read without those before it.
//!
//! The file is a cache, like the index. A record names its shard by a digest of the shard's path,
//! size, time and counts. A section of another shard, or of a changed shard, is not found. A
//! checksum covers header and records, and another covers each section. The second one is checked
//! when the section is first read, so that a start does not read the lengths.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::settings::Io;
use crate::storage::{Files, ItemKind};

const MAGIC: &[u8; 8] = b"forebayL";
/// Version of the layout of header, records and sections.
const VERSION: u64 = 1;
/// Bytes of the header: magic, version, number of shards, key, checksum.
const HEADER: usize = 48;
/// Bytes of a record: shard, documents, start of the section, long documents, checksum.
const RECORD: usize = 48;
/// Stands in the place of a length that is in the list of long documents.
const LONG: u16 = u16::MAX;
/// Bytes of a long document in its list: its number, and its length.
const LONG_BYTES: usize = 8;

/// The lengths of one shard, as they lie in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Section {
    bytes: Vec<u8>,
    documents: u64,
    long: u64,
}

impl Section {
    /// The section of a shard whose non-empty documents have these `lengths`.
    ///
    /// # Panics
    /// Panics if there are 2^32 documents or more.
    pub fn of(lengths: &[u32]) -> Self {
        let mut bytes = Vec::with_capacity(lengths.len() * 2);
        for length in lengths {
            let short = u16::try_from(*length).unwrap_or(LONG);
            bytes.extend_from_slice(&short.to_le_bytes());
        }
        let mut long = 0;
        for (document, length) in lengths.iter().enumerate().filter(|(_, length)| **length >= u32::from(LONG)) {
            let document = u32::try_from(document).expect("a shard has fewer than 2^32 documents");
            bytes.extend_from_slice(&document.to_le_bytes());
            bytes.extend_from_slice(&length.to_le_bytes());
            long += 1;
        }
        Self { bytes, documents: lengths.len() as u64, long }
    }

    /// Bytes that the section takes.
    pub fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// The file that holds the lengths of a corpus.
#[derive(Clone, Debug)]
pub struct LengthsFile {
    files: Files,
    path: PathBuf,
    key: u128,
}

impl LengthsFile {
    /// The file at `path`. `key` stands for the data and the settings that the lengths depend on.
    pub fn new(files: Files, path: PathBuf, key: u128) -> Self {
        Self { files, path, key }
    }

    /// The key of the file.
    pub fn key(&self) -> u128 {
        self.key
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Loads the saved lengths. Returns `None` if there is no file.
    pub fn load(&self, io: Io) -> Result<Option<SavedLengths>> {
        let Some(stat) = self.files.stat_if_there(&self.path)? else { return Ok(None) };
        if stat.kind != ItemKind::File {
            return Err(Error::data("saved lengths are damaged: no file").at(&self.path));
        }
        let file = self.files.open(&self.path, io)?;
        let found = SavedLengths::new(file.bytes(0..file.len())?, self.key);
        found.map(Some).map_err(|error| error.at(&self.path))
    }

    /// Saves `lengths`, and replaces the previous file.
    pub fn save(&self, lengths: &SavedLengths) -> Result<()> {
        let saved = self.files.replace(&self.path, &lengths.bytes);
        saved.map_err(|error| error.context("cannot write saved lengths"))
    }
}

/// The checksum of header and records, without itself.
fn checksum_of(bytes: &[u8]) -> u64 {
    xxh3_64(&bytes[..HEADER - 8]) ^ xxh3_64(&bytes[HEADER..])
}

/// The lengths of all documents of a corpus. Where they are mapped, they cost no memory of their
/// own.
#[derive(Debug)]
pub struct SavedLengths {
    bytes: Bytes,
    /// Whether the section of a shard was compared with its checksum.
    checked: Box<[AtomicBool]>,
}

/// A record of the file.
struct Record {
    shard: u128,
    documents: u64,
    start: u64,
    long: u64,
    checksum: u64,
}

impl SavedLengths {
    fn new(bytes: Bytes, key: u128) -> Result<Self> {
        let damaged = |what: &str| Error::data(format!("saved lengths are damaged: {what}"));
        if bytes.len() < HEADER || &bytes[..8] != MAGIC {
            return Err(damaged("the file does not begin as one"));
        }
        let [version, shards] = [8, 16].map(|at| word(&bytes, at));
        let records = shards.checked_mul(RECORD as u64).and_then(|records| records.checked_add(HEADER as u64));
        let Some(records) = records.filter(|records| version == VERSION && *records <= bytes.len() as u64) else {
            return Err(damaged("its records are not of this version"));
        };
        if checksum_of(&bytes[..records as usize]) != word(&bytes, HEADER - 8) {
            return Err(damaged("its checksum differs"));
        }
        if u128::from(word(&bytes, 24)) | u128::from(word(&bytes, 32)) << 64 != key {
            return Err(Error::data("saved lengths belong to other data: the file was renamed or copied"));
        }
        let checked = (0..shards).map(|_| AtomicBool::new(false)).collect();
        let found = Self { bytes, checked };
        let mut start = records;
        for index in 0..found.len() {
            let record = found.record(index);
            if record.start != start {
                return Err(damaged("its sections do not follow each other"));
            }
            start = start.saturating_add(record.len_bytes());
        }
        if start == found.bytes.len() as u64 { Ok(found) } else { Err(damaged("its end is missing")) }
    }

    /// Joins the sections of all shards to the lengths of a corpus. `key` stands for its data.
    pub fn of_sections(key: u128, sections: &[(u128, Section)]) -> Self {
        let mut start = HEADER + sections.len() * RECORD;
        let mut bytes =
            Vec::with_capacity(start + sections.iter().map(|(_, section)| section.bytes.len()).sum::<usize>());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(sections.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&key.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        for (shard, Section { bytes: section, documents, long }) in sections {
            bytes.extend_from_slice(&shard.to_le_bytes());
            for word in [*documents, start as u64, *long, xxh3_64(section)] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            start += section.len();
        }
        let checksum = checksum_of(&bytes);
        bytes[HEADER - 8..HEADER].copy_from_slice(&checksum.to_le_bytes());
        for (_, section) in sections {
            bytes.extend_from_slice(&section.bytes);
        }
        Self::new(bytes.into(), key).expect("a writer writes what a reader takes")
    }

    /// Number of shards.
    pub fn len(&self) -> usize {
        self.checked.len()
    }

    /// Whether there are no shards.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of header, records and sections.
    pub fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The digest of shard `index`.
    pub fn shard(&self, index: usize) -> u128 {
        self.record(index).shard
    }

    /// Number of documents in shard `index`.
    pub fn documents(&self, index: usize) -> u64 {
        self.record(index).documents
    }

    /// The section of shard `index`, as it is written again.
    pub fn section(&self, index: usize) -> Result<Section> {
        let record = self.record(index);
        let bytes = self.section_bytes(index, &record)?;
        Ok(Section { bytes: bytes.to_vec(), documents: record.documents, long: record.long })
    }

    /// The lengths of `documents` of shard `index`.
    ///
    /// # Panics
    /// Panics if the shard has fewer documents.
    pub fn of(&self, index: usize, documents: Range<u64>) -> Result<Vec<u32>> {
        let record = self.record(index);
        assert!(documents.end <= record.documents, "documents {documents:?} of {}", record.documents);
        let bytes = self.section_bytes(index, &record)?;
        let (short, long) = bytes.split_at(record.documents as usize * 2);
        let long = long.as_chunks::<LONG_BYTES>().0;
        let long = |at: usize| {
            let [document, length] =
                [0, 4].map(|byte| u32::from_le_bytes(long[at][byte..byte + 4].try_into().expect("four bytes")));
            (u64::from(document), length)
        };
        let first = partition_point(record.long as usize, |at| long(at).0 < documents.start);
        let mut listed = (first..record.long as usize).map(long);
        let short = short.as_chunks::<2>().0[documents.start as usize..documents.end as usize].iter();
        let lengths = documents.zip(short.map(|bytes| u16::from_le_bytes(*bytes)));
        let lengths = lengths.map(|(document, short)| match short {
            LONG => listed.next().filter(|(listed, _)| *listed == document).map(|(_, length)| length),
            short => Some(u32::from(short)),
        });
        let lengths: Option<Vec<u32>> = lengths.collect();
        lengths.ok_or_else(|| Error::data("saved lengths are damaged: a long document is not in its list"))
    }

    fn record(&self, index: usize) -> Record {
        let at = HEADER + index * RECORD;
        let [low, high, documents, start, long, checksum] =
            [0, 8, 16, 24, 32, 40].map(|place| word(&self.bytes, at + place));
        Record { shard: u128::from(low) | u128::from(high) << 64, documents, start, long, checksum }
    }

    fn section_bytes(&self, index: usize, record: &Record) -> Result<&[u8]> {
        let bytes = &self.bytes[record.start as usize..][..record.len_bytes() as usize];
        // Several threads may compare a section; they find the same.
        if !self.checked[index].load(Ordering::Relaxed) {
            if xxh3_64(bytes) != record.checksum {
                return Err(Error::data("saved lengths are damaged: the checksum of a shard differs; remove the file"));
            }
            self.checked[index].store(true, Ordering::Relaxed);
        }
        Ok(bytes)
    }
}

impl Record {
    fn len_bytes(&self) -> u64 {
        self.documents.saturating_mul(2).saturating_add(self.long.saturating_mul(LONG_BYTES as u64))
    }
}

/// The first of `0..len` for which `is_before` does not hold.
fn partition_point(len: usize, is_before: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, len);
    while low < high {
        let middle = low.midpoint(high);
        if is_before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(folder: &Path) -> LengthsFile {
        LengthsFile::new(Files::local(), folder.join("lengths"), 7)
    }

    proptest! {
        #[test]
        fn every_run_of_lengths_comes_back(
            shards in prop::collection::vec(prop::collection::vec(prop_oneof![1u32..9, 65_530u32..65_540, 1u32..], 0..40), 0..5),
            picks in prop::collection::vec((0usize..40, 0usize..40), 5),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let file = file(folder.path());
            let sections: Vec<_> = shards.iter().zip(1..).map(|(lengths, shard)| (shard, Section::of(lengths))).collect();
            file.save(&SavedLengths::of_sections(7, &sections)).unwrap();
            let saved = file.load(Io::Auto).unwrap().expect("a file");
            prop_assert_eq!(saved.len(), shards.len());
            for (index, lengths) in shards.iter().enumerate() {
                prop_assert_eq!(saved.shard(index), index as u128 + 1);
                prop_assert_eq!(saved.documents(index), lengths.len() as u64);
                prop_assert_eq!(&saved.section(index).unwrap(), &sections[index].1);
                for (from, to) in picks.iter().map(|(from, to)| (from.min(to), from.max(to))) {
                    let run = *from.min(&lengths.len())..*to.min(&lengths.len());
                    prop_assert_eq!(&saved.of(index, run.start as u64..run.end as u64).unwrap(), &lengths[run]);
                }
            }
        }

        #[test]
        fn a_changed_byte_is_noticed(at: prop::sample::Index, change in 1u8..) {
            let content = SavedLengths::of_sections(7, &[(3, Section::of(&[1, 70_000, 2])), (4, Section::of(&[5; 30]))]);
            let mut bytes = content.bytes.to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            let read = |saved: SavedLengths| saved.of(0, 0..3).and_then(|_| saved.of(1, 0..30));
            prop_assert!(SavedLengths::new(bytes.into(), 7).and_then(read).is_err(), "byte {}", at);
        }
    }
}
