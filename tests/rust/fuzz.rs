//! Openers and decoders take any bytes: they give values or an error. They never panic, and never
//! take more memory than their budget explains.
//!
//! Each case changes a sound file of some format at several places, or makes bytes of its own
//! behind the mark of a format. Seed and number decide all of a case. `FOREBAY_FUZZ_SECONDS` sets
//! the time for all cases, and `FOREBAY_FUZZ_SEED` the seed. The test prints the number of cases. A
//! failure prints the seed and the number of its case, which `FOREBAY_FUZZ_CASE` runs alone.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::io;
use std::io::Write;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow_array::builder::{BooleanBuilder, Int64Builder, ListBuilder, StringDictionaryBuilder};
use arrow_array::types::Int8Type;
use arrow_array::{ArrayRef, FixedSizeListArray, Int32Array, RecordBatch, StringArray};
use arrow_buffer::NullBuffer;
use arrow_schema::{DataType, Field};

use forebay::ErrorKind;
use forebay::format::documents::{DocumentColumn, Values};
use forebay::format::{self, DecodedBlock, EndsScratch, OpenOptions, Shard};
use forebay::settings::{Config, Io};
use forebay::storage::local::{Local, Mapping};
use forebay::storage::{Files, Item, ItemKind, Object, Stamp, Stat, Storage};
use forebay::tokens::{Dtype, Tokens};
use forebay_tests::{Container, Shape, containers, documents, write, write_batches};

/// Memory that the test may hold at any time, in bytes.
///
/// The budget of a case is [`BUDGET_BYTES`]. The rest is for the sound files, and for what readers
/// need beside decoded blocks.
const MOST_BYTES: usize = 192 << 20;
const BUDGET_BYTES: u64 = 16 << 20;

/// An allocator that has no more than [`MOST_BYTES`]. So a case that claims too much fails at once,
/// on every machine.
struct Limited;

/// Bytes that are in use. Any thread adds and subtracts; no other memory depends on it.
static IN_USE: AtomicUsize = AtomicUsize::new(0);
/// The seed and the running case, for [`tell_case`].
static SEED: AtomicU64 = AtomicU64::new(0);
static CASE: AtomicU64 = AtomicU64::new(0);

// SAFETY: the system's allocator does all work. Null means that there is no memory, as its contract
// says.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if IN_USE.fetch_add(layout.size(), Ordering::Relaxed).saturating_add(layout.size()) > MOST_BYTES {
            IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
            return std::ptr::null_mut();
        }
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the memory came from `alloc` above, with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Limited = Limited;

/// Names the running case when the process aborts, because no panic tells of that.
extern "C" fn tell_case(_: libc::c_int) {
    let (seed, case) = (SEED.load(Ordering::Relaxed), CASE.load(Ordering::Relaxed));
    let mut text = [0_u8; 96];
    let mut rest = &mut text[..];
    let _ = writeln!(rest, "aborted at FOREBAY_FUZZ_SEED={seed} FOREBAY_FUZZ_CASE={case}");
    let len = 96 - rest.len();
    // SAFETY: the bytes are initialised and outlive the call. `write` may be called by a handler.
    unsafe { libc::write(2, text.as_ptr().cast(), len) };
}

/// The files of a case, by their locations.
type Contents = HashMap<PathBuf, Arc<Vec<u8>>>;

/// A storage of files in memory.
#[derive(Debug)]
struct Memory(Arc<Mutex<Contents>>);

#[derive(Debug)]
struct MemoryFile(Arc<Vec<u8>>);

impl Memory {
    fn get(&self, location: &Path) -> io::Result<MemoryFile> {
        let found = self.0.lock().unwrap().get(location).cloned();
        found.map(MemoryFile).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Storage for Memory {
    fn stat(&self, location: &Path) -> io::Result<Stat> {
        self.get(location)?.stat()
    }

    fn list(&self, _: &Path) -> io::Result<Vec<Item>> {
        Ok(Vec::new())
    }

    fn open(&self, location: &Path) -> io::Result<Box<dyn Object>> {
        Ok(Box::new(self.get(location)?))
    }

    fn replace(&self, _: &Path, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn canonical(&self, folder: &Path) -> io::Result<PathBuf> {
        Ok(folder.to_owned())
    }

    fn absolute(&self, location: &Path) -> PathBuf {
        Local.absolute(location)
    }
}

impl Object for MemoryFile {
    fn stat(&self) -> io::Result<Stat> {
        let stamp = Stamp { size_bytes: self.0.len() as u64, modified: None, version: 0 };
        Ok(Stat { kind: ItemKind::File, stamp })
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = self.0.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn is_best_mapped(&self) -> bool {
        false
    }

    fn map(&self, _: u64) -> io::Result<Option<Mapping>> {
        Ok(None)
    }

    fn will_need(&self, _: Range<u64>) {}
}

/// The generator splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % below.max(1) as u64) as usize
    }
}

/// Sound files of every format: the location that is opened, and the files.
fn sound() -> Vec<(PathBuf, Contents)> {
    let folder = tempfile::tempdir().unwrap();
    let mut all = Vec::new();
    let mut add = |files: &[(&str, Vec<u8>)]| {
        let contents = files.iter().map(|(name, bytes)| (PathBuf::from(name), Arc::new(bytes.clone()))).collect();
        all.push((PathBuf::from(files[0].0), contents));
    };
    let some = documents(30, 9, 50_000, 1);
    let same: Vec<_> = (0..20).map(|row| Some((row * 4..row * 4 + 4).collect())).collect();
    for container in containers() {
        let path = path_of(&folder);
        for (dtype, shape, rows) in [
            (Dtype::I32, Shape::List, &some),
            (Dtype::U16, Shape::LargeList, &some),
            (Dtype::I64, Shape::FixedSizeList(4), &same),
        ] {
            write(&path, container, dtype, shape, rows, 11);
            add(&[("shard", std::fs::read(&path).unwrap())]);
        }
    }
    for container in containers() {
        let is_parquet = matches!(container, Container::Parquet { .. });
        let empty = (!is_parquet).then(without_values);
        for batches in [Some(with_further_columns()), empty].into_iter().flatten() {
            write_batches(&path_of(&folder), container, &batches, 11);
            add(&[("shard", std::fs::read(path_of(&folder)).unwrap())]);
        }
    }
    let ids: Vec<u8> = (0..100_u16).flat_map(u16::to_le_bytes).collect();
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let header =
        |text: &str| [b"\x93NUMPY\x01\0", &(text.len() as u16).to_le_bytes()[..], text.as_bytes(), &ids].concat();
    add(&[("a.npy", header("{'descr': '<u2', 'fortran_order': False, 'shape': (100,), }\n"))]);
    add(&[("a.npy", header("{'descr': '<u2', 'fortran_order': False, 'shape': (20, 5), }\n"))]);
    let llmc: Vec<u8> = [20_240_520_i32, 1, 100].iter().chain(&[0; 253]).flat_map(|word| word.to_le_bytes()).collect();
    add(&[("a.bin", [llmc, ids.clone()].concat())]);
    add(&[("a.ds", ids.clone()), ("a.ds.index", words(&[10, 11, 60, 100]))]);
    let mut index = [b"MMIDIDX\0\0".to_vec(), words(&[1]), vec![8], words(&[2, 3])].concat();
    index.extend([60_i32, 40].iter().flat_map(|size| size.to_le_bytes()));
    index.extend(words(&[0, 120, 0, 1, 2]));
    add(&[("a.bin", ids), ("a.idx", index)]);
    all
}

fn path_of(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("shard")
}

/// A batch of lists of no values. Its rows take no bytes of a file.
fn without_values() -> Vec<RecordBatch> {
    let item = Arc::new(Field::new("item", DataType::Int32, true));
    let (values, valid) = (Arc::new(Int32Array::from(Vec::<i32>::new())), NullBuffer::new_valid(20));
    let lists: ArrayRef = Arc::new(FixedSizeListArray::new(item, 0, values, Some(valid)));
    vec![RecordBatch::try_from_iter_with_nullable([("input_ids", lists, true)]).unwrap()]
}

/// Two batches with a mask for each token, and with a column of documents of each kind.
fn with_further_columns() -> Vec<RecordBatch> {
    let batch = |rows: i64| {
        let (mut ids, mut mask) = (ListBuilder::new(Int64Builder::new()), ListBuilder::new(BooleanBuilder::new()));
        let (mut scores, mut flags) = (Int64Builder::new(), BooleanBuilder::new());
        let mut sources = StringDictionaryBuilder::<Int8Type>::new();
        let texts = StringArray::from_iter((0..rows).map(|row| (row % 5 != 0).then(|| format!("text {row}"))));
        for row in 0..rows {
            for token in 0..row % 7 {
                ids.values().append_value(row * 10 + token);
                mask.values().append_value(token % 3 == 0);
            }
            ids.append(true);
            mask.append(true);
            scores.append_option((row % 3 != 0).then_some(row * row));
            flags.append_option((row % 4 != 0).then_some(row % 2 == 0));
            sources.append_option((row % 6 != 0).then(|| ["web", "code", "books"][row as usize % 3]));
        }
        let columns: [(&str, ArrayRef); 6] = [
            ("text", Arc::new(texts)),
            ("input_ids", Arc::new(ids.finish())),
            ("loss_mask", Arc::new(mask.finish())),
            ("score", Arc::new(scores.finish())),
            ("flag", Arc::new(flags.finish())),
            ("source", Arc::new(sources.finish())),
        ];
        RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, true))).unwrap()
    };
    vec![batch(30), batch(11)]
}

/// Changes `bytes` at one place.
fn change(bytes: &mut Vec<u8>, random: &mut Random) {
    let numbers: [&[u8]; 6] = [
        &[0xff; 8],
        &[0xff, 0xff, 0xff, 0x7f],
        &[0, 0, 0, 0x80],
        &[0, 0, 0, 0, 0, 0, 0, 0x40],
        &[0xff; 10],
        &[1, 0, 0, 0],
    ];
    let at = random.below(bytes.len());
    let end = (at + 1 + random.below(24)).min(bytes.len());
    match random.below(10) {
        0..=3 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        4 if at < bytes.len() => bytes[at] = random.below(256) as u8,
        5 => bytes[at..end].fill(0),
        6 => {
            let number = numbers[random.below(numbers.len())];
            let end = (at + number.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&number[..end - at]);
        }
        7 => drop(bytes.drain(at..end)),
        8 => {
            let part = bytes[at..end].to_vec();
            let to = random.below(bytes.len());
            bytes.splice(to..to, part);
        }
        _ => bytes.truncate(at),
    }
}

/// Bytes without sense behind the marks of a format.
fn noise(random: &mut Random) -> Vec<u8> {
    let marks: [(&[u8], &[u8]); 6] = [
        (b"PAR1", b"\x20\0\0\0PAR1"),
        (b"ARROW1\0\0", b"\x20\0\0\0ARROW1"),
        (b"\xff\xff\xff\xff\x40\0\0\0", b""),
        (b"\x93NUMPY\x01\0\x40\0", b""),
        (b"\x88\xda\x34\x01", b""),
        (b"", b""),
    ];
    let (first, last) = marks[random.below(marks.len())];
    let middle = (0..random.below(200)).map(|_| random.below(256) as u8).collect::<Vec<u8>>();
    [first, &middle, last].concat()
}

/// Opens the file and reads all of it in every way.
fn read(path: &Path, options: &OpenOptions) -> forebay::Result<u64> {
    for name in ["text", "score", "flag", "source"] {
        let Ok(Some(column)) = DocumentColumn::open(path, name, options) else { continue };
        let mut decoded = DecodedBlock::default();
        for part in 0..column.parts().min(64) {
            if column.decode_into(part, &mut decoded).is_ok() {
                let values = Values::of(column.kind(), &decoded);
                let _ = (0..values.len()).filter_map(|row| values.get(row)).count();
            }
        }
    }
    let of_mask = OpenOptions { token_column: Some("loss_mask".to_owned()), is_field: true, ..options.clone() };
    let of_mask = format::open(path, &of_mask).and_then(|shard| read_shard(&shard));
    let sum = format::open(path, options).and_then(|shard| read_shard(&shard))?;
    Ok(sum.wrapping_add(of_mask.unwrap_or(0)))
}

fn read_shard(shard: &Shard) -> forebay::Result<u64> {
    let mut sum = 0_u64;
    for (block, meta) in shard.blocks().iter().enumerate().take(64) {
        // A block may be large without a budget that refuses it.
        if meta.tokens > 1 << 20 {
            continue;
        }
        match shard {
            Shard::Random(shard) => {
                let (mut scratch, mut bytes) = (EndsScratch::default(), Vec::new());
                let ends = shard.ends(block, &mut scratch)?;
                sum += (0..ends.len()).map(|document| ends.get(document)).fold(0, u64::wrapping_add);
                let tokens = shard.tokens(block, 0..meta.tokens, &mut bytes)?;
                sum = (0..tokens.len()).fold(sum, |sum, at| sum.wrapping_add(tokens.get(at) as u64));
                shard.row_of(block, meta.tokens.saturating_sub(1));
            }
            Shard::Block(shard) => {
                let decoded = shard.decode(block, None)?;
                let tokens = Tokens::new(shard.block_dtype(), &decoded.bytes);
                sum = (0..tokens.len()).fold(sum, |sum, at| sum.wrapping_add(tokens.get(at) as u64));
                shard.decode(block, Some(meta.tokens / 2))?;
                let mut ends = Vec::new();
                shard.ends_into(block, &mut ends)?;
                assert_eq!(ends, decoded.ends, "two ways to the ends of documents");
            }
        }
    }
    shard.row_lengths()?;
    Ok(sum)
}

/// The number in the variable `name`, if it is set to a number.
#[expect(clippy::disallowed_methods, reason = "these variables belong to the test, and are no settings")]
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Tells whether the file is an Arrow file or stream.
fn is_arrow(bytes: &[u8]) -> bool {
    bytes.starts_with(b"ARROW1") || bytes.starts_with(&[0xFF; 4])
}

/// The options of a reader of `contents`.
fn options_of(contents: &Arc<Mutex<Contents>>) -> OpenOptions {
    OpenOptions {
        files: Files::new(Box::new(Memory(Arc::clone(contents)))),
        memory_budget: BUDGET_BYTES,
        ..OpenOptions::of(&Config { io: Io::Pread, block_tokens: 50, ..Config::default() })
    }
}

#[test]
fn an_absurd_number_at_any_place_of_an_arrow_file_takes_no_memory_and_no_time() {
    let contents = Arc::new(Mutex::new(Contents::new()));
    let options = options_of(&contents);
    let (hook, began) = (std::panic::take_hook(), Instant::now());
    std::panic::set_hook(Box::new(|_| ()));
    let mut cases = 0;
    for (path, files) in sound().iter().filter(|(path, files)| is_arrow(&files[path])) {
        let bytes = &files[path];
        for number in [1_u64 << 33, 1 << 62] {
            for at in (0..bytes.len().saturating_sub(8)).step_by(8) {
                let mut bytes = bytes.to_vec();
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
                contents.lock().unwrap().insert(path.clone(), Arc::new(bytes));
                // A number among the values gives other values. The allocator ends a test that
                // takes too much.
                let _ = catch_unwind(AssertUnwindSafe(|| read(path, &options)));
                cases += 1;
            }
        }
    }
    std::panic::set_hook(hook);
    assert!(cases > 1000, "{cases} cases");
    assert!(began.elapsed() < Duration::from_secs(60), "{cases} cases took {:?}", began.elapsed());
}

#[test]
fn no_bytes_make_an_opener_or_a_decoder_panic() {
    let seconds = number("FOREBAY_FUZZ_SECONDS").unwrap_or(5);
    let seed = number("FOREBAY_FUZZ_SEED").unwrap_or(1);
    let alone = number("FOREBAY_FUZZ_CASE");
    SEED.store(seed, Ordering::Relaxed);
    // SAFETY: the handler does nothing but a `write`.
    unsafe { libc::signal(libc::SIGABRT, tell_case as *const () as libc::sighandler_t) };
    let contents = Arc::new(Mutex::new(Contents::new()));
    let options = options_of(&contents);
    let sound = sound();
    for (path, files) in &sound {
        *contents.lock().unwrap() = files.clone();
        read(path, &options).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    // The readers of others panic on some damage, which is caught. Their messages are not shown.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let (began, mut refused) = (Instant::now(), 0_u64);
    let mut cases = alone.unwrap_or(0);
    let mut failure = None;
    while failure.is_none() && began.elapsed() < Duration::from_secs(seconds) {
        CASE.store(cases, Ordering::Relaxed);
        let mut random = Random(seed ^ (cases << 20));
        let (path, files) = &sound[random.below(sound.len())];
        let mut files = files.clone();
        let mut names: Vec<PathBuf> = files.keys().cloned().collect();
        names.sort();
        if random.below(20) == 0 {
            files.insert(path.clone(), Arc::new(noise(&mut random)));
        } else {
            for _ in 0..1 + random.below(3) {
                let name = &names[random.below(names.len())];
                let mut bytes = files[name].to_vec();
                if !bytes.is_empty() {
                    change(&mut bytes, &mut random);
                }
                files.insert(name.clone(), Arc::new(bytes));
            }
        }
        *contents.lock().unwrap() = files;
        let case = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| read(path, &options))) {
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.kind() != ErrorKind::Internal => refused += 1,
            Ok(Err(error)) => failure = Some(format!("case {cases}: {error}")),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                failure = Some(format!("case {cases}: {}", text.unwrap_or_default()));
            }
        }
        if case.elapsed() > Duration::from_secs(10) {
            failure = Some(format!("case {cases} took {:?}", case.elapsed()));
        }
        cases += 1;
        if alone.is_some() {
            break;
        }
    }
    std::panic::set_hook(hook);
    println!("seed {seed}: {cases} cases, {refused} refused, in {:?}", began.elapsed());
    assert_eq!(failure, None);
    assert!(alone.is_some() || refused > cases / 4, "hardly a case met what a reader needs");
}
