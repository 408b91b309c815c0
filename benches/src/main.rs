//! Limits of the machine: the speed that a loader could reach if it only moved the tokens.
//!
//! `forebay-limits FILE DTYPE SEQ_LEN BATCH_SIZE THREADS SECONDS` maps a flat file of `uint16` or
//! `int32` tokens. It prints one JSON line with the speed of copying memory and the speed of the
//! bare loop.
//!
//! The loop takes rows of `SEQ_LEN` tokens in a shuffled order. It widens them to 64 bits into the
//! inputs of a batch, and writes the labels beside them. Each thread writes one batch again and
//! again, so the output stays in its cache. A loader that hands its memory over cannot do better.
//! The loop is compiled for SSE2, AVX2 and AVX-512, and the fastest version counts.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use memmap2::Mmap;

#[derive(Clone, Copy)]
struct Shape {
    seq_len: usize,
    batch_size: usize,
    threads: usize,
    time: Duration,
}

/// Writes one row: reads token bytes, and writes inputs and labels.
type Row = fn(&[u8], &mut [i64], &mut [i64]);

macro_rules! kernels {
    ($width:literal, $of:expr, $plain:ident, $avx2:ident, $avx512:ident) => {
        #[inline(always)]
        fn $plain(tokens: &[u8], inputs: &mut [i64], labels: &mut [i64]) {
            for ((token, input), label) in tokens.as_chunks::<$width>().0.iter().zip(inputs).zip(labels) {
                let id: i64 = $of(*token);
                *input = id;
                *label = id;
            }
        }
        #[cfg(target_arch = "x86_64")]
        fn $avx2(tokens: &[u8], inputs: &mut [i64], labels: &mut [i64]) {
            #[target_feature(enable = "avx2")]
            fn inner(tokens: &[u8], inputs: &mut [i64], labels: &mut [i64]) {
                $plain(tokens, inputs, labels);
            }
            // SAFETY: the caller chooses it only if the processor has AVX2.
            unsafe { inner(tokens, inputs, labels) }
        }
        #[cfg(target_arch = "x86_64")]
        fn $avx512(tokens: &[u8], inputs: &mut [i64], labels: &mut [i64]) {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            fn inner(tokens: &[u8], inputs: &mut [i64], labels: &mut [i64]) {
                $plain(tokens, inputs, labels);
            }
            // SAFETY: the caller chooses it only if the processor has AVX-512 BW and VL.
            unsafe { inner(tokens, inputs, labels) }
        }
    };
}

kernels!(2, |b: [u8; 2]| i64::from(u16::from_le_bytes(b)), u16_plain, u16_avx2, u16_avx512);
kernels!(4, |b: [u8; 4]| i64::from(i32::from_le_bytes(b)), i32_plain, i32_avx2, i32_avx512);

fn kernels(dtype: &str) -> (usize, Vec<(&'static str, Row)>) {
    let (width, plain): (usize, Row) = if dtype == "uint16" { (2, u16_plain) } else { (4, i32_plain) };
    #[allow(unused_mut)] // other processors have only the plain version
    let mut all = vec![("baseline", plain)];
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") {
            all.push(("avx2", if width == 2 { u16_avx2 } else { i32_avx2 }));
        }
        if std::arch::is_x86_feature_detected!("avx512bw") && std::arch::is_x86_feature_detected!("avx512vl") {
            all.push(("avx512", if width == 2 { u16_avx512 } else { i32_avx512 }));
        }
    }
    (width, all)
}

/// Tokens per second that `row` writes from shuffled rows of `tokens`.
fn gather(tokens: &[u8], width: usize, row: Row, shape: Shape) -> f64 {
    let row_bytes = shape.seq_len * width;
    let rows = tokens.len() / row_bytes;
    let barrier = Barrier::new(shape.threads);
    let counts: Vec<(u64, f64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..shape.threads)
            .map(|thread| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let mut batch = vec![0i64; 2 * shape.batch_size * shape.seq_len];
                    let (inputs, labels) = batch.split_at_mut(shape.batch_size * shape.seq_len);
                    // An odd multiplier visits every row before it repeats one. Each step leads far
                    // from the last row.
                    let mut at = thread * rows / shape.threads;
                    let step = (rows as f64 * 0.618) as usize | 1;
                    barrier.wait();
                    let start = Instant::now();
                    let mut batches = 0u64;
                    while start.elapsed() < shape.time {
                        for _ in 0..8 {
                            for index in 0..shape.batch_size {
                                let from = &tokens[at * row_bytes..(at + 1) * row_bytes];
                                let to = index * shape.seq_len..(index + 1) * shape.seq_len;
                                row(from, &mut inputs[to.clone()], &mut labels[to]);
                                at = (at + step) % rows;
                            }
                            black_box((&inputs, &labels));
                            batches += 1;
                        }
                    }
                    (batches, start.elapsed().as_secs_f64())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("the loop does not panic")).collect()
    });
    counts.iter().map(|(batches, time)| (batches * (shape.batch_size * shape.seq_len) as u64) as f64 / time).sum()
}

/// Bytes per second that are copied between buffers far larger than the caches.
fn copy(threads: usize, time: Duration) -> f64 {
    const BYTES: usize = 256 << 20;
    let barrier = Barrier::new(threads);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let from = vec![1u8; BYTES];
                    let mut to = vec![0u8; BYTES];
                    barrier.wait();
                    let start = Instant::now();
                    let mut copied = 0;
                    while start.elapsed() < time {
                        to.copy_from_slice(black_box(&from));
                        black_box(&to);
                        copied += BYTES;
                    }
                    copied as f64 / start.elapsed().as_secs_f64()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("the loop does not panic")).sum()
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, dtype, seq_len, batch_size, threads, seconds] = args.as_slice() else {
        return Err("usage: forebay-limits FILE uint16|int32 SEQ_LEN BATCH_SIZE THREADS SECONDS".into());
    };
    let shape = Shape {
        seq_len: seq_len.parse()?,
        batch_size: batch_size.parse()?,
        threads: threads.parse()?,
        time: Duration::from_secs_f64(seconds.parse()?),
    };
    let file = std::fs::File::open(path)?;
    #[allow(clippy::disallowed_methods)] // the limit must not go through the code that it limits
    // SAFETY: the benchmark owns the file, and no process writes it meanwhile.
    let map = unsafe { Mmap::map(&file)? };
    let (width, kernels) = kernels(dtype);
    if map.len() < shape.seq_len * width * 2 {
        return Err(format!("{path} holds fewer than two rows").into());
    }
    let touched: u64 = map.iter().step_by(4096).map(|byte| u64::from(*byte)).sum();
    black_box(touched);
    let speeds: Vec<(&str, f64)> =
        kernels.into_iter().map(|(name, row)| (name, gather(&map, width, row, shape))).collect();
    let best = speeds.iter().map(|(_, speed)| *speed).fold(0.0, f64::max);
    let line = serde_json::json!({
        "what": "gather", "dtype": dtype, "seq_len": shape.seq_len, "batch_size": shape.batch_size, "threads": shape.threads,
        "tokens_per_second": best,
        "kernels": speeds.iter().map(|(name, speed)| ((*name).to_owned(), (*speed).into())).collect::<serde_json::Map<_, _>>(),
        "copy_bytes_per_second": copy(shape.threads, shape.time.min(Duration::from_secs(1))),
    });
    println!("{line}");
    Ok(())
}
