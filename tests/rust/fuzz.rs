//! Openers and decoders take any bytes: they give values or an error, and never panic.
//!
//! Each case changes a sound file of some format at several places, or makes bytes of its own
//! behind the mark of a format. `FOREBAY_FUZZ_SECONDS` sets the time for all cases. The test prints
//! their number. A failure prints the seed and the number of its case.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forebay::ErrorKind;
use forebay::format::documents::{DocumentColumn, Values};
use forebay::format::{self, DecodedBlock, EndsScratch, OpenOptions, Shard};
use forebay::settings::{Config, Io};
use forebay::storage::local::{Local, Mapping};
use forebay::storage::{Files, Item, ItemKind, Object, Stamp, Stat, Storage};
use forebay::tokens::{Dtype, Tokens};
use forebay_tests::{Shape, containers, documents, write};

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
        let path = folder.path().join("shard");
        for (dtype, shape, rows) in [
            (Dtype::I32, Shape::List, &some),
            (Dtype::U16, Shape::LargeList, &some),
            (Dtype::I64, Shape::FixedSizeList(4), &same),
        ] {
            write(&path, container, dtype, shape, rows, 11);
            add(&[("shard", std::fs::read(&path).unwrap())]);
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
    if let Ok(Some(column)) = DocumentColumn::open(path, "text", options) {
        let mut decoded = DecodedBlock::default();
        for part in 0..column.parts().min(64) {
            if column.decode_into(part, &mut decoded).is_ok() {
                let values = Values::of(column.kind(), &decoded);
                let _ = (0..values.len()).filter_map(|row| values.get(row)).count();
            }
        }
    }
    let shard = format::open(path, options)?;
    let mut sum = 0_u64;
    for (block, meta) in shard.blocks().iter().enumerate().take(64) {
        // A block may be large without a budget that refuses it.
        if meta.tokens > 1 << 20 {
            continue;
        }
        match &shard {
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

#[test]
fn no_bytes_make_an_opener_or_a_decoder_panic() {
    let seconds = std::env::var("FOREBAY_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let seed = std::env::var("FOREBAY_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let contents = Arc::new(Mutex::new(Contents::new()));
    let options = OpenOptions {
        files: Files::new(Box::new(Memory(Arc::clone(&contents)))),
        memory_budget: 16 << 20,
        ..OpenOptions::of(&Config { io: Io::Pread, block_tokens: 50, ..Config::default() })
    };
    let sound = sound();
    for (path, files) in &sound {
        *contents.lock().unwrap() = files.clone();
        read(path, &options).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    // The readers of others panic on some damage, which is caught. Their messages are not shown.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let (began, mut cases, mut refused) = (Instant::now(), 0_u64, 0_u64);
    let mut failure = None;
    while failure.is_none() && began.elapsed() < Duration::from_secs(seconds) {
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
    }
    std::panic::set_hook(hook);
    println!("seed {seed}: {cases} cases, {refused} refused, in {:?}", began.elapsed());
    assert_eq!(failure, None);
    assert!(refused > cases / 4, "hardly a case met what a reader needs");
}
