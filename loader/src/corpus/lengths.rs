//! The lengths of all documents of a corpus, in two bytes each, in memory or in a saved file.
//!
//! The file lies beside the saved index. It has a header, a record per shard in corpus order, and a
//! section per shard. A section holds two bytes per non-empty document. The lengths that do not fit
//! follow them in a sorted list. So any run of lengths is read without those before it.
//!
//! The file is a cache, like the index. A record names its shard by a digest of the shard's path,
//! size, time and counts. A section of another shard, or of a changed shard, is not found. A
//! checksum covers header and records. Each part of a section has a checksum of its own, which is
//! compared when the part is first read. So neither a start nor a window reads all lengths.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::error::{Error, Result};
use crate::settings::Io;
use crate::storage::{Files, ItemKind, SourceFile};

const MAGIC: &[u8; 8] = b"forebayL";
/// Version of the layout of header, records and sections.
const VERSION: u64 = 2;
/// Bytes of the header: magic, version, number of shards, key, checksum.
const HEADER: usize = 48;
/// Bytes of a record: shard, documents, start of the section, long documents.
const RECORD: usize = 40;
/// Stands in the place of a length that is in the list of long documents.
const LONG: u16 = u16::MAX;
/// Bytes of a long document in its list: its number, and its length.
const LONG_BYTES: u64 = 8;
/// Bytes of a section that one checksum covers.
const PART: u64 = 64 << 10;
/// Bytes of a checksum. The checksums of a section follow its list of long documents.
const CHECKSUM: u64 = 8;

/// The lengths of one shard, as they lie in the file before their checksums.
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

    /// Bytes that the section takes in memory.
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

    /// Opens the saved lengths. Returns `None` if there is no file.
    pub fn load(&self, io: Io) -> Result<Option<SavedLengths>> {
        let Some(stat) = self.files.stat_if_there(&self.path)? else { return Ok(None) };
        if stat.kind != ItemKind::File {
            return Err(Error::data("saved lengths are damaged: no file").at(&self.path));
        }
        let file = self.files.open(&self.path, io)?;
        let found = SavedLengths::new(Content::File(file), self.key);
        found.map(Some).map_err(|error| error.at(&self.path))
    }

    /// Saves `lengths`, and replaces the previous file.
    ///
    /// # Panics
    /// Panics if `lengths` were opened from a file.
    pub fn save(&self, lengths: &SavedLengths) -> Result<()> {
        let Content::Memory(bytes) = &lengths.content else { panic!("these lengths are saved already") };
        let saved = self.files.replace(&self.path, bytes);
        saved.map_err(|error| error.context("cannot write saved lengths"))
    }
}

/// The checksum of header and records, without itself.
fn checksum_of(bytes: &[u8]) -> u64 {
    xxh3_64(&bytes[..HEADER - 8]) ^ xxh3_64(&bytes[HEADER..])
}

/// The checksum of part `number` of a section.
fn part_checksum(bytes: &[u8], number: u64) -> u64 {
    xxh3_64_with_seed(bytes, number)
}

fn damaged(what: &str) -> Error {
    Error::data(format!("saved lengths are damaged: {what}"))
}

/// The bytes of header, records and sections.
#[derive(Debug)]
enum Content {
    Memory(Bytes),
    File(SourceFile),
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(file) => file.len(),
        }
    }

    /// The bytes of `range`. A file that cannot be mapped is read into `scratch`.
    fn slice<'a>(&'a self, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        match self {
            Self::Memory(bytes) => Ok(&bytes[range.start as usize..range.end as usize]),
            Self::File(file) => file.slice(range, scratch),
        }
    }

    /// The first `len` bytes: a view where that is possible.
    fn head(&self, len: u64) -> Result<Bytes> {
        match self {
            Self::Memory(bytes) => Ok(bytes.slice(..len as usize)),
            Self::File(file) => file.bytes(0..len),
        }
    }
}

/// The lengths of all documents of a corpus. Where they are saved, they cost no memory of their
/// own.
#[derive(Debug)]
pub struct SavedLengths {
    content: Content,
    /// Header and records.
    head: Bytes,
    /// A bit for each part that was compared with its checksum. Any thread sets bits. Several
    /// threads may compare a part; they find the same.
    checked: Box<[AtomicU64]>,
}

/// A record of the file.
#[derive(Clone, Copy)]
struct Record {
    shard: u128,
    documents: u64,
    start: u64,
    long: u64,
}

impl SavedLengths {
    fn new(content: Content, key: u128) -> Result<Self> {
        let len = content.len();
        let mut head = content.head(len.min(HEADER as u64))?;
        if head.len() < HEADER || &head[..8] != MAGIC {
            return Err(damaged("the file does not begin as one"));
        }
        let [version, shards] = [8, 16].map(|at| word(&head, at));
        let records = shards.checked_mul(RECORD as u64).and_then(|records| records.checked_add(HEADER as u64));
        let Some(records) = records.filter(|records| version == VERSION && *records <= len) else {
            return Err(damaged("its records are not of this version"));
        };
        head = content.head(records)?;
        if checksum_of(&head) != word(&head, HEADER - 8) {
            return Err(damaged("its checksum differs"));
        }
        if u128::from(word(&head, 24)) | u128::from(word(&head, 32)) << 64 != key {
            return Err(Error::data("saved lengths belong to other data: the file was renamed or copied"));
        }
        let parts = len / PART + shards + 1;
        let checked = (0..parts.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let found = Self { content, head, checked };
        let mut start = records;
        for index in 0..found.len() {
            let record = found.record(index);
            if record.start != start {
                return Err(damaged("its sections do not follow each other"));
            }
            start = start.saturating_add(record.saved_bytes());
        }
        if start == len { Ok(found) } else { Err(damaged("its end is missing")) }
    }

    /// Joins the sections of all shards to the lengths of a corpus. `key` stands for its data.
    ///
    /// Frees each section once it is joined, so that the lengths are hardly ever in memory twice.
    pub fn of_sections(key: u128, sections: Vec<(u128, Section)>) -> Self {
        let mut start = (HEADER + sections.len() * RECORD) as u64;
        let mut bytes = Vec::with_capacity(start as usize);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(sections.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&key.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        for (shard, Section { documents, long, .. }) in &sections {
            bytes.extend_from_slice(&shard.to_le_bytes());
            let record = Record { shard: *shard, documents: *documents, start, long: *long };
            for word in [record.documents, record.start, record.long] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            start += record.saved_bytes();
        }
        let checksum = checksum_of(&bytes);
        bytes[HEADER - 8..HEADER].copy_from_slice(&checksum.to_le_bytes());
        bytes.reserve_exact(start as usize - bytes.len());
        for (_, Section { bytes: section, .. }) in sections {
            bytes.extend_from_slice(&section);
            for (part, number) in section.chunks(PART as usize).zip(0..) {
                bytes.extend_from_slice(&part_checksum(part, number).to_le_bytes());
            }
        }
        Self::new(Content::Memory(bytes.into()), key).expect("a writer writes what a reader takes")
    }

    /// Number of shards.
    pub fn len(&self) -> usize {
        (self.head.len() - HEADER) / RECORD
    }

    /// Whether there are no shards.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory that the lengths take. Saved lengths are read from their file.
    pub fn held_bytes(&self) -> u64 {
        match &self.content {
            Content::Memory(bytes) => bytes.len() as u64,
            Content::File(_) => 0,
        }
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
        let mut scratch = Vec::new();
        let bytes = self.section_bytes(index, &record, 0..record.len_bytes(), &mut scratch)?;
        Ok(Section { bytes: bytes.to_vec(), documents: record.documents, long: record.long })
    }

    /// The lengths of `documents` of shard `index`.
    ///
    /// # Panics
    /// Panics if the shard has fewer documents.
    pub fn of(&self, index: usize, documents: Range<u64>) -> Result<Vec<u32>> {
        let record = self.record(index);
        assert!(documents.end <= record.documents, "documents {documents:?} of {}", record.documents);
        let mut scratch = Vec::new();
        let short = self.section_bytes(index, &record, documents.start * 2..documents.end * 2, &mut scratch)?;
        let mut lengths: Vec<u32> =
            short.as_chunks::<2>().0.iter().map(|bytes| u32::from(u16::from_le_bytes(*bytes))).collect();
        let mut listed = None;
        for (document, length) in documents.clone().zip(&mut lengths) {
            if *length != u32::from(LONG) {
                continue;
            }
            let at = match listed {
                Some(at) => at + 1,
                None => self.first_long(index, &record, documents.start)?,
            };
            let found = if at < record.long { Some(self.long(index, &record, at)?) } else { None };
            let found = found.filter(|(found, _)| *found == document);
            let (_, found) = found.ok_or_else(|| damaged("a long document is not in its list"))?;
            *length = found;
            listed = Some(at);
        }
        Ok(lengths)
    }

    /// Place in the list of the first long document that is not before `document`.
    fn first_long(&self, index: usize, record: &Record, document: u64) -> Result<u64> {
        let (mut low, mut high) = (0, record.long);
        while low < high {
            let middle = low.midpoint(high);
            if self.long(index, record, middle)?.0 < document {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Entry `at` of the list of long documents: number and length.
    fn long(&self, index: usize, record: &Record, at: u64) -> Result<(u64, u32)> {
        let from = record.documents * 2 + at * LONG_BYTES;
        let mut scratch = Vec::new();
        let bytes = self.section_bytes(index, record, from..from + LONG_BYTES, &mut scratch)?;
        let [document, length] =
            [0, 4].map(|byte| u32::from_le_bytes(bytes[byte..byte + 4].try_into().expect("four bytes")));
        Ok((u64::from(document), length))
    }

    fn record(&self, index: usize) -> Record {
        let at = HEADER + index * RECORD;
        let [low, high, documents, start, long] = [0, 8, 16, 24, 32].map(|place| word(&self.head, at + place));
        Record { shard: u128::from(low) | u128::from(high) << 64, documents, start, long }
    }

    /// The bytes of `range` of the section of `record`, which is number `index`. Compares the parts
    /// of the range with their checksums, unless that was done before.
    fn section_bytes<'a>(
        &'a self,
        index: usize,
        record: &Record,
        range: Range<u64>,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        if let Content::File(file) = &self.content {
            file.check_window()?;
        }
        let len = record.len_bytes();
        for number in range.start / PART..range.end.div_ceil(PART) {
            // A section begins anywhere. With the number of its shard, no two parts share a bit.
            let bit = record.start / PART + number + index as u64;
            let (word_at, mask) = ((bit / 64) as usize, 1 << (bit % 64));
            if self.checked[word_at].load(Ordering::Relaxed) & mask != 0 {
                continue;
            }
            let part = record.start + number * PART..record.start + len.min((number + 1) * PART);
            let found = part_checksum(self.content.slice(part, scratch)?, number);
            let at = record.start + len + number * CHECKSUM;
            if self.content.slice(at..at + CHECKSUM, scratch)? != found.to_le_bytes() {
                return Err(damaged("a checksum of a shard differs; remove the file"));
            }
            self.checked[word_at].fetch_or(mask, Ordering::Relaxed);
        }
        self.content.slice(record.start + range.start..record.start + range.end, scratch)
    }
}

impl Record {
    /// Bytes of the lengths and of the long documents.
    fn len_bytes(&self) -> u64 {
        self.documents.saturating_mul(2).saturating_add(self.long.saturating_mul(LONG_BYTES))
    }

    /// Bytes of the section in the file, with its checksums.
    fn saved_bytes(&self) -> u64 {
        let len = self.len_bytes();
        len.saturating_add(len.div_ceil(PART) * CHECKSUM)
    }
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

    fn bytes_of(lengths: &SavedLengths) -> Vec<u8> {
        match &lengths.content {
            Content::Memory(bytes) => bytes.to_vec(),
            Content::File(_) => unreachable!("made in memory"),
        }
    }

    proptest! {
        #[test]
        fn every_run_of_lengths_comes_back(
            shards in prop::collection::vec(prop::collection::vec(prop_oneof![1u32..9, 65_530u32..65_540, 1u32..], 0..40), 0..5),
            picks in prop::collection::vec((0usize..40, 0usize..40), 5),
            mapped in any::<bool>(),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let file = file(folder.path());
            let sections: Vec<_> = shards.iter().zip(1..).map(|(lengths, shard)| (shard, Section::of(lengths))).collect();
            file.save(&SavedLengths::of_sections(7, sections.clone())).unwrap();
            let saved = file.load(if mapped { Io::Auto } else { Io::Pread }).unwrap().expect("a file");
            prop_assert_eq!(saved.held_bytes(), 0);
            prop_assert_eq!(saved.len(), shards.len());
            for (index, lengths) in shards.iter().enumerate() {
                prop_assert_eq!(saved.shard(index), index as u128 + 1);
                prop_assert_eq!(saved.documents(index), lengths.len() as u64);
                for (from, to) in picks.iter().map(|(from, to)| (from.min(to), from.max(to))) {
                    let run = *from.min(&lengths.len())..*to.min(&lengths.len());
                    prop_assert_eq!(&saved.of(index, run.start as u64..run.end as u64).unwrap(), &lengths[run]);
                }
                prop_assert_eq!(&saved.section(index).unwrap(), &sections[index].1);
            }
        }

        #[test]
        fn a_changed_byte_is_noticed(at: prop::sample::Index, change in 1u8..) {
            let content = vec![(3, Section::of(&[1, 70_000, 2])), (4, Section::of(&[5; 30]))];
            let mut bytes = bytes_of(&SavedLengths::of_sections(7, content));
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            let read = |saved: SavedLengths| saved.of(0, 0..3).and_then(|_| saved.of(1, 0..30));
            prop_assert!(SavedLengths::new(Content::Memory(bytes.into()), 7).and_then(read).is_err(), "byte {}", at);
        }
    }

    #[test]
    fn only_the_parts_that_are_read_are_compared() {
        let documents = 5 * PART / 2 + 9;
        let lengths: Vec<u32> = (0..documents as u32).map(|document| document % 7 + 60_000).collect();
        let content = vec![(1, Section::of(&lengths[..11])), (2, Section::of(&lengths)), (3, Section::of(&lengths))];
        let mut bytes = bytes_of(&SavedLengths::of_sections(7, content));
        let section = bytes.len() as u64 - 2 * documents - 6 * CHECKSUM;
        // A byte of the third part of the last shard.
        bytes[(section + 2 * PART + 70) as usize] ^= 1;
        let saved = SavedLengths::new(Content::Memory(bytes.into()), 7).unwrap();
        let part = PART / 2;
        for _ in 0..2 {
            for (shard, run) in [(0, 0..11), (1, 0..documents), (2, 0..2 * part), (2, 3 * part..documents)] {
                assert_eq!(saved.of(shard, run.clone()).unwrap(), lengths[run.start as usize..run.end as usize]);
            }
            assert!(saved.of(2, 0..2 * part + 1).is_err(), "one document of the damaged part");
            assert!(saved.of(2, 3 * part - 1..documents).is_err());
        }
    }
}
