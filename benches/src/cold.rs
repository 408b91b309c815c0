//! Reads random windows of a file that is not in memory, through the loader and in every other way.
//!
//! `forebay-cold FILE METHOD DEPTH SEQ_LEN WINDOWS SECONDS SEED` takes the file out of the page
//! cache and proves by `mincore` that it is out. It then reads and widens `WINDOWS` windows of
//! `SEQ_LEN` tokens, or fewer if `SECONDS` pass, and prints one JSON line.
//!
//! The file is an Arrow file of one record batch of `uint16` tokens. Every method reads the windows
//! that the loader's order names, so that all of them ask the disk for the same data.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forebay::corpus::discover::ShardFile;
use forebay::format::{self, OpenOptions, Shard};
use forebay::order::{Arrangement, EpochOrder};
use forebay::settings::{Config, Shuffle};
use forebay::{Loader, Next};
use memmap2::{Advice, Mmap};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const BATCH_SIZE: u64 = 8;

/// The windows to read.
#[derive(Clone, Copy)]
struct Job {
    seq_len: u64,
    windows: u64,
    seed: u64,
    time: Duration,
    /// Offset of the first token in the file.
    base: u64,
    sequences: u64,
}

impl Job {
    fn bytes(self) -> usize {
        self.seq_len as usize * 2
    }

    fn order(self) -> EpochOrder {
        EpochOrder::new(self.sequences, Arrangement::Global, self.seed, 0)
    }

    fn offset(self, order: &EpochOrder, window: u64) -> u64 {
        self.base + order.sequence_at(window) * self.bytes() as u64
    }

    fn batch(self) -> Batch {
        Batch { rows: vec![0; 2 * (BATCH_SIZE * self.seq_len) as usize], at: 0 }
    }
}

/// Destination of the windows: inputs and labels, as in a loader's batch.
struct Batch {
    rows: Vec<i64>,
    at: usize,
}

impl Batch {
    fn take(&mut self, window: &[u8]) {
        let len = window.len() / 2;
        let half = self.rows.len() / 2;
        let (inputs, labels) = self.rows.split_at_mut(half);
        let to = self.at..self.at + len;
        for ((token, input), label) in
            window.as_chunks::<2>().0.iter().zip(&mut inputs[to.clone()]).zip(&mut labels[to])
        {
            let id = i64::from(u16::from_le_bytes(*token));
            (*input, *label) = (id, id);
        }
        self.at = (self.at + len) % half;
        black_box(&self.rows);
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, method, depth, seq_len, windows, seconds, seed] = args.as_slice() else {
        return Err("usage: forebay-cold FILE METHOD DEPTH SEQ_LEN WINDOWS SECONDS SEED".into());
    };
    let depth: u64 = depth.parse()?;
    let file = File::open(path)?;
    let shard_file = ShardFile { path: PathBuf::from(path), name: "cold".to_owned() };
    let opened = format::open(&shard_file.path, &OpenOptions::of(&Config::default()))?;
    let Shard::Random(opened) = opened else { return Err("its windows do not lie in the file".into()) };
    let tokens: u64 = opened.blocks().iter().map(|block| block.tokens).sum();
    let mut scratch = Vec::new();
    let mapped = opened.info().file.mapped().ok_or("the file is not mapped: not on a local file system")?;
    let first = opened.tokens(0, 0..1, &mut scratch)?.bytes().as_ptr() as usize;
    let seq_len = seq_len.parse()?;
    let job = Job {
        seq_len,
        windows: windows.parse()?,
        seed: seed.parse()?,
        time: Duration::from_secs_f64(seconds.parse()?),
        base: (first - mapped.as_ptr() as usize) as u64,
        sequences: tokens / seq_len,
    };
    // The kernel keeps a mapped page, so close the file first.
    drop(opened);
    file.sync_all()?;
    // SAFETY: the call is a hint on an open descriptor and touches no memory of ours.
    let refused = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    let before = resident_share(&file)?;
    if refused != 0 || before > 0.001 {
        return Err(format!("the page cache still holds {:.1} % of {path}", before * 100.0).into());
    }
    let cpu = cpu_seconds();
    let began = Instant::now();
    let (read, prepared) = match method.as_str() {
        "forebay" => forebay(path, job, depth)?,
        "mmap" => mapped_faults(&file, job, None)?,
        "random" => mapped_faults(&file, job, Some(0))?,
        "willneed" => mapped_faults(&file, job, Some(depth))?,
        "pread" => (preads(&file, job, depth)?, Duration::ZERO),
        "uring" => (ring(&file, job, depth as u32)?, Duration::ZERO),
        _ => return Err(format!("unknown method {method}").into()),
    };
    let elapsed = (began.elapsed() - prepared).as_secs_f64();
    println!(
        "{}",
        json!({
            "method": method, "depth": depth, "window_bytes": job.bytes(), "windows": read, "seconds": elapsed,
            "tokens_per_s": (read * job.seq_len) as f64 / elapsed, "cpu_s_per_gtok": (cpu_seconds() - cpu) / (read * job.seq_len) as f64 * 1e9,
            "resident_before": before, "resident_after": resident_share(&file)?, "bytes": file.metadata()?.len(),
        })
    );
    Ok(())
}

/// Returns the number of windows read, and the time that opening took. No other method spends that
/// time.
fn forebay(path: &str, job: Job, threads: u64) -> Result<(u64, Duration)> {
    let began = Instant::now();
    let loader = Loader::open(Config {
        data: vec![path.to_owned()],
        seq_len: job.seq_len,
        batch_size: BATCH_SIZE,
        shuffle: Shuffle::Global,
        seed: job.seed,
        num_threads: Some(threads),
        max_steps: Some(job.windows / BATCH_SIZE),
        ..Config::default()
    })?;
    let opening = began.elapsed();
    let began = Instant::now();
    let mut read = 0;
    let batches = loader.iter();
    while began.elapsed() < job.time {
        match batches.next_timeout(Duration::MAX)? {
            Next::Batch(batch) => read += batch.rows as u64,
            Next::End => break,
            Next::Pending => {}
        }
    }
    Ok((read, opening))
}

/// Reads windows from the mapping. With `ahead`, announces scattered access and asks for that many
/// windows ahead.
fn mapped_faults(file: &File, job: Job, ahead: Option<u64>) -> Result<(u64, Duration)> {
    #[allow(clippy::disallowed_methods)] // must not go through the code it is compared with
    // SAFETY: the benchmark owns the file, and no process writes it meanwhile.
    let map = unsafe { Mmap::map(file)? };
    if ahead.is_some() {
        map.advise(Advice::Random)?;
    }
    let (order, mut batch) = (job.order(), job.batch());
    let ask = |window: u64| -> Result<()> {
        if window < job.windows {
            map.advise_range(Advice::WillNeed, job.offset(&order, window) as usize, job.bytes())?;
        }
        Ok(())
    };
    let ahead = ahead.unwrap_or(0);
    let began = Instant::now();
    for window in 0..ahead {
        ask(window)?;
    }
    let mut read = 0;
    while read < job.windows && began.elapsed() < job.time {
        if ahead > 0 {
            ask(read + ahead)?;
        }
        let at = job.offset(&order, read) as usize;
        batch.take(&map[at..at + job.bytes()]);
        read += 1;
    }
    Ok((read, Duration::ZERO))
}

fn preads(file: &File, job: Job, threads: u64) -> Result<u64> {
    let (taken, read) = (AtomicU64::new(0), AtomicU64::new(0));
    let failed = Mutex::new(None);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let (order, mut batch, mut buffer) = (job.order(), job.batch(), vec![0; job.bytes()]);
                while began.elapsed() < job.time {
                    let window = taken.fetch_add(1, Ordering::Relaxed);
                    if window >= job.windows {
                        break;
                    }
                    if let Err(error) = file.read_exact_at(&mut buffer, job.offset(&order, window)) {
                        *failed.lock().expect("nobody panics with it") = Some(error);
                        break;
                    }
                    batch.take(&buffer);
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    match failed.into_inner().expect("nobody panics with it") {
        Some(error) => Err(error.into()),
        None => Ok(read.into_inner()),
    }
}

/// Reads through a ring of `depth` requests, which may end in any order.
fn ring(file: &File, job: Job, depth: u32) -> Result<u64> {
    use io_uring::{IoUring, opcode, types};
    let mut ring = IoUring::new(depth)?;
    let mut buffers = vec![vec![0u8; job.bytes()]; depth as usize];
    let (order, mut batch) = (job.order(), job.batch());
    let descriptor = types::Fd(file.as_raw_fd());
    let began = Instant::now();
    let (mut asked, mut read, mut in_flight) = (0, 0, 0);
    let mut idle: Vec<usize> = (0..buffers.len()).collect();
    loop {
        let more = began.elapsed() < job.time;
        while more
            && asked < job.windows
            && let Some(slot) = idle.pop()
        {
            let request = opcode::Read::new(descriptor, buffers[slot].as_mut_ptr(), job.bytes() as u32)
                .offset(job.offset(&order, asked))
                .build()
                .user_data(slot as u64);
            // SAFETY: the buffer outlives the ring's use of it, because this function waits for all
            // requests before it returns.
            unsafe { ring.submission().push(&request)? };
            asked += 1;
            in_flight += 1;
        }
        if in_flight == 0 {
            return Ok(read);
        }
        ring.submit_and_wait(1)?;
        let ended: Vec<(usize, i32)> =
            ring.completion().map(|entry| (entry.user_data() as usize, entry.result())).collect();
        for (slot, result) in ended {
            in_flight -= 1;
            if result != job.bytes() as i32 {
                return Err(format!("a read of {} bytes gave {result}", job.bytes()).into());
            }
            batch.take(&buffers[slot]);
            read += 1;
            idle.push(slot);
        }
    }
}

fn resident_share(file: &File) -> Result<f64> {
    #[allow(clippy::disallowed_methods)] // looks at the file, not at the loader
    // SAFETY: the mapping is only asked which of its pages are in memory; no byte is read.
    let map = unsafe { Mmap::map(file)? };
    // SAFETY: `sysconf` reads a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let mut state = vec![0u8; map.len().div_ceil(page)];
    // SAFETY: the range is the whole mapping, which begins at a page. The state has one byte for
    // each of its pages.
    let asked = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), state.as_mut_ptr()) };
    if asked != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(state.iter().filter(|page| **page & 1 == 1).count() as f64 / state.len() as f64)
}

fn cpu_seconds() -> f64 {
    // SAFETY: `getrusage` writes one `rusage`, for which all-zero bytes are a valid start.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    [usage.ru_utime, usage.ru_stime].iter().map(|time| time.tv_sec as f64 + time.tv_usec as f64 / 1e6).sum()
}
