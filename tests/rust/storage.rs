//! Passing errors of a storage cost a warning. Lasting errors are errors with a name. The tests
//! inject faults behind the seam.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use forebay::ErrorKind;
use forebay::corpus::Corpus;
use forebay::format::{OpenOptions, Shard};
use forebay::notices;
use forebay::settings::{Config, DataFormat, Io};
use forebay::storage::local::{Local, Mapping};
use forebay::storage::{Files, Item, Object, Stat, Storage};
use forebay::tokens::{Dtype, Tokens};
use forebay_tests::{Container, Shape, documents, write};
use parquet::basic::Compression;

/// The calls that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Stat,
    List,
    Open,
    StatOpen,
    Read,
    Map,
}

const CALLS: [Call; 6] = [Call::Stat, Call::List, Call::Open, Call::StatOpen, Call::Read, Call::Map];

/// The calls that fail, and their number and error.
#[derive(Debug)]
struct Faults {
    call: Call,
    /// Number of calls that succeed before the first one that fails.
    after: AtomicUsize,
    /// Number of calls that fail.
    times: AtomicUsize,
    errno: i32,
}

impl Faults {
    fn check(&self, call: Call) -> io::Result<()> {
        let down = |count: &AtomicUsize| {
            count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1)).is_ok()
        };
        if call == self.call && !down(&self.after) && down(&self.times) {
            return Err(io::Error::from_raw_os_error(self.errno));
        }
        Ok(())
    }
}

/// The local disk, with faults.
#[derive(Debug)]
struct Failing(Arc<Faults>);

#[derive(Debug)]
struct FailingFile(Box<dyn Object>, Arc<Faults>);

impl Storage for Failing {
    fn stat(&self, location: &Path) -> io::Result<Stat> {
        self.0.check(Call::Stat)?;
        Local.stat(location)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Item>> {
        self.0.check(Call::List)?;
        Local.list(folder)
    }

    fn open(&self, location: &Path) -> io::Result<Box<dyn Object>> {
        self.0.check(Call::Open)?;
        Ok(Box::new(FailingFile(Local.open(location)?, Arc::clone(&self.0))))
    }

    fn replace(&self, location: &Path, bytes: &[u8]) -> io::Result<()> {
        Local.replace(location, bytes)
    }

    fn canonical(&self, folder: &Path) -> io::Result<PathBuf> {
        Local.canonical(folder)
    }

    fn absolute(&self, location: &Path) -> PathBuf {
        Local.absolute(location)
    }
}

impl Object for FailingFile {
    fn stat(&self) -> io::Result<Stat> {
        self.1.check(Call::StatOpen)?;
        self.0.stat()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.1.check(Call::Read)?;
        // Short reads are allowed. The reader asks for the rest.
        let part = buffer.len().div_ceil(2).max(1);
        self.0.read_at(&mut buffer[..part], offset)
    }

    fn is_best_mapped(&self) -> bool {
        self.0.is_best_mapped()
    }

    fn map(&self, len: u64) -> io::Result<Option<Mapping>> {
        self.1.check(Call::Map)?;
        self.0.map(len)
    }

    fn will_need(&self, range: Range<u64>) {
        self.0.will_need(range);
    }
}

/// Every token of the corpus below `root`, and the warnings, with the given faults.
fn read(
    root: &Path,
    io: Io,
    call: Call,
    (after, times): (usize, usize),
    errno: i32,
) -> forebay::Result<(Vec<i64>, Vec<String>)> {
    let faults = Faults { call, after: after.into(), times: times.into(), errno };
    let options = OpenOptions { files: Files::new(Box::new(Failing(Arc::new(faults)))), ..options(io) };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let corpus = Corpus::open(&[root.to_str().unwrap().to_owned()], DataFormat::Auto, &options, None, &pool)?;
    let mut all = Vec::new();
    for index in 0..corpus.len() {
        let held = corpus.shard(index)?;
        for (block, meta) in held.shard().blocks().iter().enumerate() {
            let mut scratch = Vec::new();
            let decoded;
            let tokens = match held.shard() {
                Shard::Random(shard) => shard.tokens(block, 0..meta.tokens, &mut scratch)?,
                Shard::Block(shard) => {
                    decoded = shard.decode(block, None)?;
                    Tokens::new(shard.block_dtype(), &decoded.bytes)
                }
            };
            all.extend((0..tokens.len()).map(|at| tokens.get(at)));
        }
    }
    assert!(corpus.warnings().is_empty(), "{:?}", corpus.warnings());
    Ok((all, notices_of(root)))
}

/// Takes the notices that name a file below `root`. Tests that run beside this one have others.
fn notices_of(root: &Path) -> Vec<String> {
    static OTHERS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut waiting = OTHERS.lock().unwrap();
    waiting.extend(notices::take().into_iter().map(|notice| notice.text));
    let (own, others) = waiting.drain(..).partition(|text| text.contains(root.to_str().unwrap()));
    *waiting = others;
    own
}

fn options(io: Io) -> OpenOptions {
    OpenOptions::of(&Config { io, ..Config::default() })
}

/// Three shards in a folder.
fn corpus(suffix: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let container = match suffix {
        "arrow" => Container::ArrowFile(None),
        _ => Container::Parquet { codec: Compression::UNCOMPRESSED, encoding: None, pages: 1 },
    };
    for shard in 0..3 {
        let path = folder.path().join(format!("{shard}.{suffix}"));
        write(&path, container, Dtype::I32, Shape::List, &documents(20, 9, 1000, shard), 7);
    }
    folder
}

#[test]
fn passing_errors_of_every_call_cost_a_warning_and_nothing_else() {
    for suffix in ["parquet", "arrow"] {
        let folder = corpus(suffix);
        for io in [Io::Mmap, Io::Pread] {
            let (sound, warnings) = read(folder.path(), io, Call::Stat, (0, 0), 0).unwrap();
            assert!(!sound.is_empty() && warnings.is_empty(), "{warnings:?}");
            for (call, errno) in CALLS.into_iter().zip([
                libc::EIO,
                libc::ESTALE,
                libc::EAGAIN,
                libc::ETIMEDOUT,
                libc::ESTALE,
                libc::EINTR,
            ]) {
                for after in [0, 1, 5] {
                    let (found, warnings) = read(folder.path(), io, call, (after, 1), errno).unwrap();
                    assert_eq!(found, sound, "{call:?} {after}");
                    assert!(warnings.len() <= 1, "{warnings:?}");
                    let text = io::Error::from_raw_os_error(errno).to_string();
                    assert!(warnings.iter().all(|warning| warning.contains(&text)), "{warnings:?}");
                    let always = matches!(call, Call::Stat | Call::List | Call::Open | Call::StatOpen);
                    assert!(after > 0 || !always || warnings.len() == 1, "{call:?}: {warnings:?}");
                }
            }
        }
    }
}

#[test]
fn a_lasting_error_of_any_call_names_the_file_and_what_the_system_said() {
    let folder = corpus("parquet");
    let root = folder.path().to_str().unwrap();
    for (call, io) in CALLS.into_iter().zip([Io::Mmap, Io::Mmap, Io::Mmap, Io::Mmap, Io::Pread, Io::Mmap]) {
        for (errno, tries) in [(libc::EIO, true), (libc::EACCES, false)] {
            let error = read(folder.path(), io, call, (0, usize::MAX), errno).unwrap_err();
            let said = io::Error::from_raw_os_error(errno).to_string();
            let text = error.to_string();
            assert_eq!(error.kind(), ErrorKind::Io, "{call:?}: {text}");
            assert!(text.contains(&said) && text.contains(root), "{call:?}: {text}");
            assert_eq!(text.contains("tried"), tries, "{call:?}: {text}");
            assert_eq!(error.report().matches(&said).count(), text.matches(&said).count());
        }
    }
}

#[test]
fn the_number_of_tries_is_the_number_of_waits_and_one() {
    const WAITS: [Duration; 8] = [Duration::ZERO; 8];
    let file = tempfile::NamedTempFile::new().unwrap();
    for (times, succeeds) in [(0, true), (8, true), (9, false)] {
        let (after, times) = (AtomicUsize::new(0), AtomicUsize::new(times));
        let faults = Arc::new(Faults { call: Call::Stat, after, times, errno: libc::EIO });
        let files = Files::with_waits(Box::new(Failing(faults)), &WAITS);
        let found = files.stat(file.path());
        assert_eq!(found.is_ok(), succeeds);
        assert!(found.is_ok_and(|stat| stat.stamp.size_bytes == 0) || !succeeds);
    }
}
