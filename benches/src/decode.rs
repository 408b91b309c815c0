//! Compares the decoding of Parquet with its limit.
//!
//! `forebay-decode SECONDS FILE...` prints one JSON line per file, with tokens per second of CPU
//! time for three programs:
//!
//! - `limit`: the codec's library decompresses the bytes of the pages into one buffer; without a
//!   codec the bytes are copied. Then as many tokens of the stored width are widened to 64 bits.
//!   Levels and encodings are not decoded.
//! - `blocks`: forebay decodes blocks into one buffer, which is widened in the same way.
//! - `loader`: batches come from a loader of one thread, in the order of the file, whose cache
//!   holds a part of the file. The loader also writes labels.
//!
//! The three programs take turns. The line has the median and the best of each program's turns, and
//! the median of the ratios to the limit within a turn. Each file should hold one column of lists
//! of `uint16` or `int32`.

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forebay::corpus::discover::ShardFile;
use forebay::format::{BlockShard, DecodedBlock, OpenOptions, Shard, open};
use forebay::settings::{Config, Shuffle};
use forebay::tokens::Dtype;
use forebay::{Loader, Next};
use parquet::basic::Compression;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::json;

type Failure = Box<dyn std::error::Error>;

/// Body of a page: its bytes in the file, and their number after decompression.
struct Body {
    from: usize,
    to: usize,
    plain: usize,
}

/// Reads integers of Thrift's compact protocol.
struct Thrift<'a>(&'a [u8], usize);

impl Thrift<'_> {
    fn varint(&mut self) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = self.0[self.1];
            self.1 += 1;
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }

    fn integer(&mut self) -> i64 {
        let raw = self.varint();
        (raw >> 1) as i64 ^ -((raw & 1) as i64)
    }

    /// The integers of a struct's top level, as pairs of id and value.
    fn structure(&mut self) -> Vec<(i64, i64)> {
        let (mut id, mut fields) = (0, Vec::new());
        loop {
            let head = self.0[self.1];
            self.1 += 1;
            if head == 0 {
                return fields;
            }
            id = if head >> 4 == 0 { self.integer() } else { id + i64::from(head >> 4) };
            match head & 15 {
                1 | 2 => {}
                3 => self.1 += 1,
                4..=6 => {
                    let value = self.integer();
                    fields.push((id, value));
                }
                7 => self.1 += 8,
                8 => {
                    let length = self.varint() as usize;
                    self.1 += length;
                }
                12 => drop(self.structure()),
                other => panic!("unexpected field of type {other}"),
            }
        }
    }
}

fn bodies(bytes: &[u8], path: &Path) -> Result<(Compression, Vec<Body>), Failure> {
    let reader = SerializedFileReader::new(fs::File::open(path)?)?;
    let mut codec = Compression::UNCOMPRESSED;
    let mut found = Vec::new();
    for group in reader.metadata().row_groups() {
        let column = group.column(0);
        codec = column.compression();
        let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset()) as usize;
        let end = start + column.compressed_size() as usize;
        let mut at = start;
        while at < end {
            let mut thrift = Thrift(bytes, at);
            let fields = thrift.structure();
            let field = |wanted| fields.iter().find(|(id, _)| *id == wanted).map_or(0, |(_, value)| *value as usize);
            let from = thrift.1;
            at = from + field(3);
            found.push(Body { from, to: at, plain: field(2) });
        }
    }
    Ok((codec, found))
}

/// Widens `tokens` tokens of `width` bytes from `bytes`, one batch at a time.
fn widen(bytes: &[u8], width: usize, out: &mut [i64]) {
    fn run(bytes: &[u8], width: usize, out: &mut [i64]) {
        if width == 2 {
            for (id, token) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *id = i64::from(u16::from_le_bytes(*token));
            }
        } else {
            for (id, token) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *id = i64::from(i32::from_le_bytes(*token));
            }
        }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn avx2(bytes: &[u8], width: usize, out: &mut [i64]) {
        run(bytes, width, out);
    }
    for part in bytes.chunks(out.len() * width) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, as just checked.
            unsafe { avx2(part, width, out) };
            black_box(&mut *out);
            continue;
        }
        run(part, width, out);
        black_box(&mut *out);
    }
}

struct Limit<'a> {
    bytes: &'a [u8],
    codec: Compression,
    bodies: Vec<Body>,
    tokens: usize,
    width: usize,
    zstd: zstd::bulk::Decompressor<'static>,
    plain: Vec<u8>,
    stored: Vec<u8>,
}

impl Limit<'_> {
    fn turn(&mut self, out: &mut [i64]) -> Result<(), Failure> {
        let share = self.tokens.div_ceil(self.bodies.len());
        for body in &self.bodies {
            let packed = &self.bytes[body.from..body.to];
            match self.codec {
                Compression::UNCOMPRESSED => self.plain[..body.plain].copy_from_slice(packed),
                Compression::SNAPPY => {
                    snap::raw::Decoder::new().decompress(packed, &mut self.plain[..body.plain])?;
                }
                Compression::ZSTD(_) => {
                    self.zstd.decompress_to_buffer(packed, &mut self.plain[..body.plain])?;
                }
                other => return Err(format!("codec {other}").into()),
            }
            black_box(&self.plain);
            widen(&self.stored[..share * self.width], self.width, out);
        }
        Ok(())
    }
}

fn blocks(shard: &dyn BlockShard, width: usize, block: &mut DecodedBlock, out: &mut [i64]) -> Result<(), Failure> {
    for index in 0..shard.blocks().len() {
        shard.decode_into(index, None, block)?;
        widen(&block.bytes, width, out);
    }
    Ok(())
}

/// CPU time of this thread, or of this process with its ended threads.
fn cpu_seconds(clock: libc::clockid_t) -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one `timespec`, and the pointer points to one.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn median(turns: impl Iterator<Item = f64>) -> f64 {
    let mut turns: Vec<f64> = turns.collect();
    turns.sort_unstable_by(f64::total_cmp);
    turns[turns.len() / 2]
}

fn measure(path: &Path, time: Duration) -> Result<serde_json::Value, Failure> {
    let config = Config::default();
    let file = ShardFile { path: path.to_owned(), name: path.to_string_lossy().into_owned() };
    let shard = open(&file.path, &OpenOptions::of(&config))?;
    let Shard::Block(shard) = shard else { return Err("its blocks are not decoded".into()) };
    let tokens: u64 = shard.blocks().iter().map(|block| block.tokens).sum();
    let width = shard.info().dtype.size();
    assert!(matches!(shard.info().dtype, Dtype::U16 | Dtype::I32), "{}", shard.info().dtype.name());
    let bytes = fs::read(path)?;
    let (codec, bodies) = bodies(&bytes, path)?;
    let most = bodies.iter().map(|body| body.plain).max().unwrap_or(0);
    let share = tokens as usize / bodies.len().max(1) + 1;
    let mut limit = Limit {
        bytes: &bytes,
        codec,
        tokens: tokens as usize,
        width,
        zstd: zstd::bulk::Decompressor::new()?,
        plain: vec![0; most],
        stored: vec![1; share * width],
        bodies,
    };
    let mut out = vec![0i64; 8 * 2048];
    let mut block = DecodedBlock::default();
    let mut turns: Vec<[f64; 3]> = Vec::new();
    let began = Instant::now();
    // The first turn is a warm-up.
    for turn in 0.. {
        let now = || cpu_seconds(libc::CLOCK_THREAD_CPUTIME_ID);
        let start = now();
        limit.turn(&mut out)?;
        let between = now();
        blocks(shard.as_ref(), shard.block_dtype().size(), &mut block, &mut out)?;
        let end = now();
        let rate = |time: f64| tokens as f64 / time;
        let rates = [rate(between - start), rate(end - between), loader(path)?];
        if turn > 0 {
            turns.push(rates);
        }
        if turn >= 5 && began.elapsed() > time {
            break;
        }
    }
    let medians = [0, 1, 2].map(|index| median(turns.iter().map(|turn| turn[index])));
    let best = [0, 1, 2].map(|index| turns.iter().map(|turn| turn[index]).fold(0.0, f64::max));
    let of_limit = [1, 2].map(|index| median(turns.iter().map(|turn| turn[index] / turn[0])));
    Ok(json!({
        "file": path.file_name().map(|name| name.to_string_lossy().into_owned()),
        "tokens": tokens,
        "dtype": shard.info().dtype.name(),
        "pages": shard.describe(),
        "bytes_per_token": bytes.len() as f64 / tokens as f64,
        "turns": turns.len(),
        "limit": medians[0],
        "blocks": medians[1],
        "loader": medians[2],
        "best": { "limit": best[0], "blocks": best[1], "loader": best[2] },
        "blocks_of_limit": of_limit[0],
        "loader_of_limit": of_limit[1],
    }))
}

/// Tokens per second of CPU time in one pass through a loader.
fn loader(path: &Path) -> Result<f64, Failure> {
    let loader = Loader::open(Config {
        data: vec![path.to_string_lossy().into_owned()],
        seq_len: 2048,
        batch_size: 8,
        shuffle: Shuffle::Off,
        num_threads: Some(1),
        // The cache holds only a few blocks, as for a corpus that does not fit.
        memory_budget: 12 << 20,
        ..Config::default()
    })?;
    let mut rate = 0.0;
    // The first pass runs on memory that was never touched, so it does not count.
    for _ in 0..2 {
        let before = cpu_seconds(libc::CLOCK_PROCESS_CPUTIME_ID);
        let pass = loader.iter();
        let mut batches = 0u64;
        loop {
            match pass.next_timeout(Duration::from_secs(60))? {
                Next::Batch(batch) => {
                    black_box(batch.as_ptr());
                    batches += 1;
                }
                Next::End => break,
                Next::Pending => return Err("no batch within a minute".into()),
            }
        }
        rate = (batches * 8 * 2048) as f64 / (cpu_seconds(libc::CLOCK_PROCESS_CPUTIME_ID) - before);
    }
    loader.close();
    Ok(rate)
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let seconds: f64 = args.next().ok_or("usage: forebay-decode SECONDS FILE...")?.parse()?;
    for path in args.map(PathBuf::from) {
        println!("{}", measure(&path, Duration::from_secs_f64(seconds))?);
    }
    Ok(())
}
