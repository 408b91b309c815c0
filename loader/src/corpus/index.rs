//! The saved index: facts about the shards, in one file, so that a start need not open them.
//!
//! The file has a header and one record of fixed size per shard, in corpus order. Ranks map the
//! file and read records in place.
//!
//! The index is a cache. Its name and key depend on all settings that the records depend on. A
//! checksum covers every byte. A record is valid only while its shard has the same size and
//! modification time. Any other content is an error, which the caller shows as a warning before it
//! makes the index anew.
//!
//! A writer writes a file of its own and renames it. Writers that run at the same time replace each
//! other's complete files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::corpus::checksums::ChecksumsFile;
use crate::corpus::discover::ShardFile;
use crate::corpus::lengths::LengthsFile;
use crate::corpus::parts::Part;
use crate::corpus::tables::TableFile;
use crate::error::{Error, Result};
use crate::format::{Access, Counts, FORMATS, OpenOptions, ShardFacts, TokenColumn};
use crate::settings::{DataFormat, Io};
use crate::storage::{Files, ItemKind, Stamp};
use crate::tokens::{Dtype, FieldTypes, MAX_FIELDS};

const MAGIC: &[u8; 8] = b"forebayI";
/// Version of the layout of header and records.
const VERSION: u32 = 5;
/// Size of the header without its checksum, in bytes: magic, version, size of a record, number of
/// records, key.
const CHECKED_HEADER: usize = 40;
const HEADER: usize = CHECKED_HEADER + 8;
const RECORD: usize = 104 + MAX_FIELDS;
/// Stands in the place of the nanoseconds if a file system has no modification times.
const NO_TIME: u32 = u32::MAX;

/// Suffix of the files of parts.
const PART: &str = "forebay-part";

const ACCESSES: [Access; 2] = [Access::Random, Access::Block];

/// Hash of a shard's absolute path.
///
/// Names would not do: a name may occur once under each root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PathHash(u128);

impl PathHash {
    /// The places of `files`, in order.
    pub fn of_all(storage: &Files, files: &[ShardFile]) -> Vec<Self> {
        // Thousands of shards share a folder, so that its links are resolved only once.
        let mut folders: HashMap<&Path, PathBuf> = HashMap::new();
        let mut places = Vec::with_capacity(files.len());
        for file in files {
            let folder = file.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let folder = folders.entry(folder).or_insert_with(|| storage.absolute(folder));
            let mut hash = Xxh3::new();
            hash.update(folder.as_os_str().as_encoded_bytes());
            hash.update(b"/");
            hash.update(file.path.file_name().unwrap_or_default().as_encoded_bytes());
            places.push(Self(hash.digest128()));
        }
        places
    }
}

/// The file that holds the index of a corpus.
#[derive(Clone, Debug)]
pub struct IndexFile {
    files: Files,
    path: PathBuf,
    key: u128,
    /// The key without the settings that decide only how shards are cut and which fields are read.
    data_key: u128,
}

impl IndexFile {
    /// Names the file in `folder` for the corpus that `data` and the other settings describe.
    pub fn new(folder: &Path, data: &[String], format: DataFormat, options: &OpenOptions) -> Self {
        let key_of = |block_tokens: u64, fields: &[String]| {
            let mut hash = Xxh3::new();
            let mut part = |bytes: &[u8]| {
                hash.update(&(bytes.len() as u64).to_le_bytes());
                hash.update(bytes);
            };
            // Another version of forebay may cut blocks elsewhere.
            part(env!("CARGO_PKG_VERSION").as_bytes());
            part(&VERSION.to_le_bytes());
            part(format!("{format:?} {:?} {block_tokens}", options.token_column).as_bytes());
            let end_id = options.split.as_ref().map(|split| split.id);
            part(format!("{fields:?} {:?} {end_id:?}", options.bin_dtype).as_bytes());
            for entry in data {
                part(options.files.absolute(Path::new(entry)).as_os_str().as_encoded_bytes());
            }
            hash.digest128()
        };
        let key = key_of(options.block_tokens, &options.fields);
        let path = folder.join(format!("{key:032x}.forebay-index"));
        Self { files: options.files.clone(), path, key, data_key: key_of(0, &[]) }
    }

    /// The file of document lengths beside this index.
    pub fn lengths(&self) -> LengthsFile {
        let path = self.path.with_file_name(format!("{:032x}.forebay-lengths", self.data_key));
        LengthsFile::new(self.files.clone(), path, self.data_key)
    }

    /// The file beside this index that holds the records of the shards of `part`.
    pub(super) fn part(&self, part: Part) -> Self {
        let mut hash = Xxh3::new();
        hash.update(&self.key.to_le_bytes());
        hash.update(part.to_string().as_bytes());
        let path = self.path.with_extension(format!("{}.{PART}", part.to_string().replace('/', "-of-")));
        Self { files: self.files.clone(), path, key: hash.digest128(), data_key: self.data_key }
    }

    /// The parts of this index whose files are there, with the files.
    pub(super) fn parts(&self) -> Result<Vec<(Part, PathBuf)>> {
        let folder = self.path.parent().expect("a file lies in a folder");
        let part_of = |name: &str| {
            let rest = name.strip_prefix(&format!("{:032x}.", self.key))?;
            rest.strip_suffix(&format!(".{PART}"))?.replace("-of-", "/").parse().ok()
        };
        let items = self.files.list(folder)?;
        let mut parts: Vec<_> =
            items.into_iter().filter_map(|item| Some((part_of(&item.name)?, item.location))).collect();
        parts.sort_unstable();
        Ok(parts)
    }

    /// The file of checksums beside this index.
    pub fn checksums(&self) -> ChecksumsFile {
        ChecksumsFile::new(self.files.clone(), self.path.with_extension("forebay-checksums"), self.key)
    }

    /// The file of the table that follows from the settings `name` and from shards with these
    /// `digests`.
    pub fn table(&self, name: &str, digests: &[u128]) -> TableFile {
        let mut hash = Xxh3::new();
        hash.update(&self.data_key.to_le_bytes());
        hash.update(name.as_bytes());
        let path = self.path.with_file_name(format!("{:032x}.forebay-rows", hash.digest128()));
        digests.iter().for_each(|digest| hash.update(&digest.to_le_bytes()));
        TableFile { files: self.files.clone(), path, key: hash.digest128() }
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Loads the saved index. Returns `None` if there is no file.
    pub fn load(&self, io: Io) -> Result<Option<SavedIndex>> {
        let damaged = |what: &str| Error::data(format!("saved index is damaged: {what}")).at(&self.path);
        let Some(stat) = self.files.stat_if_there(&self.path)? else { return Ok(None) };
        if stat.kind != ItemKind::File || stat.stamp.size_bytes < HEADER as u64 {
            return Err(damaged("it is shorter than its header"));
        }
        let file = self.files.open(&self.path, io)?;
        let bytes = file.bytes(0..file.len())?;
        if &bytes[..8] != MAGIC {
            return Err(damaged("it does not begin as one"));
        }
        let mut hash = Xxh3::new();
        hash.update(&bytes[..CHECKED_HEADER]);
        hash.update(&bytes[HEADER..]);
        if hash.digest() != u64_at(&bytes, CHECKED_HEADER) {
            return Err(damaged("its checksum differs"));
        }
        let shards = u64_at(&bytes, 16);
        let length = shards.checked_mul(RECORD as u64).and_then(|records| records.checked_add(HEADER as u64));
        if u32_at(&bytes, 8) != VERSION || u32_at(&bytes, 12) != RECORD as u32 || length != Some(bytes.len() as u64) {
            return Err(damaged("its records are not of this version"));
        }
        if u128_at(&bytes, 24) != self.key {
            let message = "saved index belongs to other data or settings: it was renamed or copied";
            return Err(Error::data(message).at(&self.path));
        }
        Ok(Some(SavedIndex { bytes }))
    }

    /// Saves `records`, in corpus order, and replaces the previous file. Returns the size in bytes.
    pub fn save(&self, records: impl ExactSizeIterator<Item = (PathHash, ShardFacts)>) -> Result<u64> {
        let mut bytes = Vec::with_capacity(HEADER + records.len() * RECORD);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(RECORD as u32).to_le_bytes());
        bytes.extend_from_slice(&(records.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&self.key.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        for (place, facts) in records {
            push_record(&mut bytes, place, &facts);
        }
        let mut hash = Xxh3::new();
        hash.update(&bytes[..CHECKED_HEADER]);
        hash.update(&bytes[HEADER..]);
        bytes[CHECKED_HEADER..HEADER].copy_from_slice(&hash.digest().to_le_bytes());

        self.files.replace(&self.path, &bytes).map_err(|error| error.context("cannot write saved index"))?;
        Ok(bytes.len() as u64)
    }
}

/// A loaded index. It is cheap to clone. A mapped index costs no memory of its own.
#[derive(Clone, Debug)]
pub struct SavedIndex {
    bytes: Bytes,
}

impl SavedIndex {
    /// The number of records.
    pub fn len(&self) -> usize {
        (self.bytes.len() - HEADER) / RECORD
    }

    /// Whether the index has no records.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns record `index`: the place of its shard, and the facts about it. Returns `None` if
    /// the record holds values that no writer writes.
    ///
    /// # Panics
    /// Panics if `index` is not below [`SavedIndex::len`].
    pub fn get(&self, index: usize) -> Option<(PathHash, ShardFacts)> {
        let record = &self.bytes[HEADER + index * RECORD..HEADER + (index + 1) * RECORD];
        let word = |place: usize| u64_at(record, 40 + place * 8);
        let facts = ShardFacts {
            stamp: Stamp {
                size_bytes: u64_at(record, 16),
                modified: time_of(u64_at(record, 24) as i64, u32_at(record, 32)),
                version: word(7),
            },
            format: FORMATS.get(usize::from(record[36]))?.format,
            dtype: *Dtype::ALL.get(usize::from(record[37]))?,
            access: *ACCESSES.get(usize::from(record[38]))?,
            column: TokenColumn::of_number(record[39])?,
            rows: word(0),
            blocks: word(1),
            counts: Counts { tokens: word(2), starts: word(3), ends: word(4) },
            decoded_bytes: word(5),
            largest_block_bytes: word(6),
            fields: FieldTypes::of_numbers(array_at(record, 104))?,
        };
        Some((PathHash(u128_at(record, 0)), facts))
    }
}

/// A digest of a shard: its place, size, time, token column and counts.
pub(super) fn digest(place: PathHash, facts: &ShardFacts) -> u128 {
    let mut bytes = Vec::with_capacity(RECORD);
    // How the shard is cut into blocks, and its further columns, change no document.
    let none = FieldTypes::default();
    let facts = ShardFacts { blocks: 0, decoded_bytes: 0, largest_block_bytes: 0, fields: none, ..*facts };
    push_record(&mut bytes, place, &facts);
    xxh3_128(&bytes)
}

fn push_record(bytes: &mut Vec<u8>, place: PathHash, facts: &ShardFacts) {
    let start = bytes.len();
    let (seconds, nanos) = time_parts(facts.stamp.modified);
    let number = |known: Option<usize>| known.expect("the table lists every variant") as u8;
    bytes.extend_from_slice(&place.0.to_le_bytes());
    bytes.extend_from_slice(&facts.stamp.size_bytes.to_le_bytes());
    bytes.extend_from_slice(&seconds.to_le_bytes());
    bytes.extend_from_slice(&nanos.to_le_bytes());
    bytes.push(number(FORMATS.iter().position(|entry| entry.format == facts.format)));
    bytes.push(number(Dtype::ALL.iter().position(|dtype| *dtype == facts.dtype)));
    bytes.push(number(ACCESSES.iter().position(|access| *access == facts.access)));
    bytes.push(facts.column.number());
    let Counts { tokens, starts, ends } = facts.counts;
    let Stamp { version, .. } = facts.stamp;
    for word in
        [facts.rows, facts.blocks, tokens, starts, ends, facts.decoded_bytes, facts.largest_block_bytes, version]
    {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&facts.fields.numbers());
    debug_assert_eq!(bytes.len() - start, RECORD);
}

/// Splits a time into whole seconds since 1970 and the nanoseconds after them. Seconds before 1970
/// are negative.
fn time_parts(time: Option<SystemTime>) -> (i64, u32) {
    match time.map(|time| time.duration_since(UNIX_EPOCH)) {
        None => (0, NO_TIME),
        Some(Ok(after)) => (after.as_secs() as i64, after.subsec_nanos()),
        Some(Err(before)) => {
            let before = before.duration();
            match before.subsec_nanos() {
                0 => (-(before.as_secs() as i64), 0),
                nanos => (-(before.as_secs() as i64) - 1, 1_000_000_000 - nanos),
            }
        }
    }
}

fn time_of(seconds: i64, nanos: u32) -> Option<SystemTime> {
    if nanos == NO_TIME {
        return None;
    }
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    second?.checked_add(Duration::from_nanos(u64::from(nanos)))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of that length")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(array_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Config;
    use crate::tokens::FieldType;

    fn index(folder: &Path) -> IndexFile {
        let options = OpenOptions { block_tokens: 100, ..OpenOptions::of(&Config::default()) };
        IndexFile::new(folder, &["corpus".to_owned()], DataFormat::Auto, &options)
    }

    fn records() -> Vec<(PathHash, ShardFacts)> {
        let times = [
            None,
            Some(UNIX_EPOCH),
            Some(UNIX_EPOCH - Duration::from_millis(1500)),
            Some(UNIX_EPOCH - Duration::from_secs(2)),
            Some(UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789)),
        ];
        times
            .into_iter()
            .zip(0..)
            .map(|(modified, number): (_, u64)| {
                let facts = ShardFacts {
                    stamp: Stamp { size_bytes: 100 + number, modified, version: number * 3 },
                    format: FORMATS[number as usize % 3].format,
                    dtype: Dtype::ALL[number as usize % 5],
                    column: TokenColumn::of_number(number as u8 % 5).unwrap(),
                    access: ACCESSES[number as usize % 2],
                    rows: 7,
                    blocks: u64::MAX - number,
                    counts: Counts { tokens: 1 << 40, starts: 5, ends: 6 },
                    decoded_bytes: 8,
                    largest_block_bytes: 9,
                    fields: FieldTypes::new([None, Dtype::ALL.get(number as usize).copied().map(FieldType::PerToken)]),
                };
                (PathHash(u128::MAX - u128::from(number)), facts)
            })
            .collect()
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let index = index(&folder.path().join("made/on/demand"));
        assert!(index.load(Io::Auto).unwrap().is_none());
        for count in [0, 5] {
            let bytes = index.save(records()[..count].iter().copied()).unwrap();
            assert_eq!(bytes, std::fs::metadata(index.path()).unwrap().len());
            for io in [Io::Mmap, Io::Pread] {
                let saved = index.load(io).unwrap().unwrap();
                let found: Vec<_> = (0..saved.len()).map(|at| saved.get(at).unwrap()).collect();
                assert_eq!(found, records()[..count]);
            }
        }
        let left: Vec<_> = std::fs::read_dir(index.path().parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn any_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let index = index(folder.path());
        index.save(records().into_iter()).unwrap();
        let sound = std::fs::read(index.path()).unwrap();
        let mut bytes = sound.clone();
        for at in 0..bytes.len() {
            for bit in [1, 128] {
                bytes[at] ^= bit;
                std::fs::write(index.path(), &bytes).unwrap();
                assert!(index.load(Io::Pread).is_err(), "byte {at}");
                bytes[at] ^= bit;
            }
        }
        for len in 0..sound.len() {
            std::fs::write(index.path(), &sound[..len]).unwrap();
            assert!(index.load(Io::Pread).is_err(), "{len} bytes");
        }
        std::fs::write(index.path(), [&sound[..], &[0]].concat()).unwrap();
        assert!(index.load(Io::Pread).is_err());
        std::fs::write(index.path(), &sound).unwrap();
        assert!(index.load(Io::Pread).is_ok());
    }

    #[test]
    fn absurd_numbers_under_a_right_checksum_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let index = index(folder.path());
        index.save(records().into_iter()).unwrap();
        let sound = std::fs::read(index.path()).unwrap();
        for (at, width) in [(8, 4), (12, 4), (16, 8)] {
            for number in [u64::MAX, 1 << 60, 1 << 31, 6, 0] {
                let mut bytes = sound.clone();
                bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
                let mut hash = Xxh3::new();
                hash.update(&bytes[..CHECKED_HEADER]);
                hash.update(&bytes[HEADER..]);
                bytes[CHECKED_HEADER..HEADER].copy_from_slice(&hash.digest().to_le_bytes());
                std::fs::write(index.path(), &bytes).unwrap();
                assert!(index.load(Io::Pread).is_err(), "{number} at {at}");
            }
        }
    }

    #[test]
    fn an_index_of_other_settings_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let index = index(folder.path());
        index.save(records().into_iter()).unwrap();
        let options = OpenOptions { block_tokens: 101, ..OpenOptions::of(&Config::default()) };
        let other = IndexFile::new(folder.path(), &["corpus".to_owned()], DataFormat::Auto, &options);
        assert!(other.load(Io::Auto).unwrap().is_none());
        std::fs::copy(index.path(), other.path()).unwrap();
        assert!(other.load(Io::Auto).unwrap_err().to_string().contains("other data or settings"));
    }

    #[test]
    fn writers_at_once_leave_one_whole_index() {
        let folder = tempfile::tempdir().unwrap();
        let index = index(folder.path());
        std::thread::scope(|scope| {
            for count in 1..=4 {
                let index = &index;
                scope.spawn(move || {
                    for _ in 0..25 {
                        index.save(records()[..count].iter().copied()).unwrap();
                        let saved = index.load(Io::Mmap).unwrap().unwrap();
                        for at in 0..saved.len() {
                            assert_eq!(saved.get(at), Some(records()[at]));
                        }
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
