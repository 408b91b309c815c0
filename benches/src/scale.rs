//! Shows how costs grow, for 15 x 10^12 tokens in 10^6 shards on 4096 ranks. Measures the cost and
//! the quality of the order.
//!
//! `forebay-scale` prints JSON lines. No such corpus exists here. A table of token counts, as an
//! index would hold it, stands for the shards. Blocks lie in the shards at multiples of their size.
//! The order, the partition and the plan are the loader's own.

use std::collections::BTreeSet;
use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use forebay::Loader;
use forebay::layout::Segment;
use forebay::loader::plan::{self, BlockPlace, MOST_ROWS, RowSegments, Simulated};
use forebay::loader::state::StateValue;
use forebay::order::partition::{BatchRow, Grouping};
use forebay::order::permutation::{Permutation, derive_key};
use forebay::order::{Arrangement, EpochOrder};
use forebay::settings::{Config, Remainder, Shuffle};
use forebay::tokens::Dtype;
use forebay_tests::{Container, Shape, documents, write};
use serde_json::{Value, json};

const SHARDS: u64 = 1_000_000;
const TOKENS: u64 = 15_000_000_000_000;
const RANKS: u64 = 4096;
const SEQ_LEN: u64 = 4096;
const BATCH_SIZE: u64 = 4;
const BLOCK_TOKENS: u64 = 128 << 10;
const CHUNK_TOKENS: u64 = 4 << 20;
/// Size of the window of each rank's lane.
const LANE_WINDOW_TOKENS: u64 = 4 << 20;
const CACHE_BYTES: u64 = 512 << 20;
/// A step that leads to places far from each other.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    let print = |mut record: Value| {
        record["profile"] = profile.into();
        println!("{record}");
    };
    let before = anonymous_bytes();
    let (table, record) = Table::build();
    print(record);
    for (name, arrangement) in arrangements(table.sequences()) {
        print(order(name, &table, arrangement));
        for share in [0.0, 0.5, 0.999] {
            for rank in [0, RANKS - 1] {
                print(first_batch(name, &table, arrangement, rank, share));
            }
        }
        print(planned(name, &table, arrangement));
    }
    print(
        json!({"kind": "scale-memory", "anonymous_bytes": anonymous_bytes().saturating_sub(before), "peak_bytes": status_bytes("VmHWM:")}),
    );
    print(state()?);
    for n in [5, 100, 256, 257, 1_000_000, table.sequences()] {
        print(permutation(n));
    }
    for bits in [10, 16, 24, 32, 48] {
        for n in [(1 << bits) - 1, 1 << bits, (1 << bits) + 1] {
            print(permutation(n));
        }
    }
    Ok(())
}

/// The start of each shard in the stream.
struct Table {
    starts: Vec<u64>,
}

impl Table {
    fn build() -> (Self, Value) {
        // The shards have between 0.5 and 1.5 times the mean length.
        let mean = TOKENS / SHARDS;
        let counts: Vec<u64> = (0..SHARDS).map(|shard| mean / 2 + derive_key(1, &[shard]) % mean).collect();
        let began = Instant::now();
        let mut starts = Vec::with_capacity(counts.len() + 1);
        let mut at = 0;
        starts.push(0);
        for count in counts {
            at += count;
            starts.push(at);
        }
        let seconds = began.elapsed().as_secs_f64();
        let record = json!({
            "kind": "scale-table", "shards": SHARDS, "tokens": at, "seconds": seconds,
            "bytes": size_of_val(starts.as_slice()),
        });
        (Self { starts }, record)
    }

    fn stream_len(&self) -> u64 {
        *self.starts.last().expect("holds at least the end")
    }

    fn sequences(&self) -> u64 {
        self.stream_len() / SEQ_LEN
    }

    fn shard(&self, at: u64) -> usize {
        self.starts.partition_point(|start| *start <= at) - 1
    }

    /// The block at a stream token. The count runs over the corpus as if every shard had as many
    /// blocks as the longest shard could have.
    fn block_at(&self, at: u64) -> BlockPlace {
        let shard = self.shard(at);
        let block = (at - self.starts[shard]) / BLOCK_TOKENS;
        let start = self.starts[shard] + block * BLOCK_TOKENS;
        let len = BLOCK_TOKENS.min(self.starts[shard + 1] - start);
        BlockPlace { block: ((shard as u64) << 32) + block, start, len, tokens: len, bytes: len * 4 }
    }
}

fn arrangements(sequences: u64) -> [(&'static str, Arrangement); 3] {
    let block = |window, lanes| Arrangement::block(sequences, SEQ_LEN, CHUNK_TOKENS, window, lanes);
    let default = Config::default();
    [
        ("global", Arrangement::Global),
        ("block, a lane for each rank", block(LANE_WINDOW_TOKENS * RANKS, RANKS)),
        ("block, default lanes and window", block(default.window_tokens, default.lanes)),
    ]
}

fn grouping(rank: u64) -> Grouping {
    Grouping { batch_size: BATCH_SIZE, rank, world_size: RANKS, remainder: Remainder::Drop }
}

fn order(name: &str, table: &Table, arrangement: Arrangement) -> Value {
    let made = median_seconds(|epoch| {
        black_box(EpochOrder::new(table.sequences(), arrangement, 7, epoch));
    });
    let order = EpochOrder::new(table.sequences(), arrangement, 7, 0);
    let (n, mut at) = (table.sequences(), 0);
    let stride = GOLDEN % n;
    let position = median_seconds(|_| {
        for _ in 0..1000 {
            at = if at >= n - stride { at - (n - stride) } else { at + stride };
            black_box(order.sequence_at(black_box(at)));
        }
    });
    json!({
        "kind": "scale-order", "name": name, "sequences": table.sequences(), "bytes": size_of::<EpochOrder>(), "new_us": made * 1e6,
        "ns_per_position": position * 1e6,
    })
}

/// Measures the work of a rank for the batch at which it resumes.
fn first_batch(name: &str, table: &Table, arrangement: Arrangement, rank: u64, share: f64) -> Value {
    let grouping = grouping(rank);
    let steps = grouping.steps(table.sequences());
    let step = (steps as f64 * share) as u64;
    let find = |epoch, steps: Range<u64>| {
        let order = EpochOrder::new(table.sequences(), arrangement, 7, epoch);
        let mut shards = BTreeSet::new();
        for step in steps {
            for row in grouping.rows(step * grouping.global_batch(), table.sequences(), 0) {
                let BatchRow::Index(position) = row else { continue };
                let start = order.sequence_at(position) * SEQ_LEN;
                shards.extend(table.shard(start)..=table.shard(start + SEQ_LEN - 1));
            }
        }
        shards.len()
    };
    let seconds = median_seconds(|epoch| {
        black_box(find(epoch, step..step + 1));
    });
    json!({
        "kind": "scale-first", "name": name, "rank": rank, "share": share, "us": seconds * 1e6, "shards": find(0, step..step + 1),
        "shards_in_100_steps": find(0, step..(step + 100).min(steps)),
    })
}

fn planned(name: &str, table: &Table, arrangement: Arrangement) -> Value {
    let order = EpochOrder::new(table.sequences(), arrangement, 7, 0);
    let steps = grouping(0).steps(table.sequences());
    let rows = |rank, step: u64| {
        let grouping = grouping(rank);
        let read = |row| {
            let BatchRow::Index(position) = row else { return None };
            let sequence = order.sequence_at(position);
            let segments = vec![Segment::joined(sequence * SEQ_LEN, SEQ_LEN, 0)];
            Some(RowSegments { source: 0, segments, ends_chunk: order.ends_chunk(sequence) })
        };
        Ok(grouping.rows(step * grouping.global_batch(), table.sequences(), 0).map(read).collect())
    };
    let round = if let Arrangement::Block { lanes, window, .. } = arrangement { lanes * window } else { 1 };
    let simulated = Simulated {
        grouping: grouping(0),
        steps,
        rows: &rows,
        block_at: &|_, at| table.block_at(at),
        tokens_per_stream_token: &|_| 1.0,
        round: round.div_ceil(grouping(0).global_batch()),
        cache_bytes: CACHE_BYTES,
        prefetch: 4,
        decoded_ahead: (LANE_WINDOW_TOKENS * RANKS / SEQ_LEN).div_ceil(grouping(0).global_batch()).clamp(8, 4096),
        done_after: 2 * LANE_WINDOW_TOKENS,
        most_rows: MOST_ROWS,
    };
    let began = Instant::now();
    let (displacement, neighbours) = (plan::displacement(&order, arrangement), plan::neighbours(&order, arrangement));
    let distances_seconds = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let decoding = simulated.decoding().expect("its rows read nothing that can fail");
    json!({
        "kind": "scale-plan", "name": name,
        "distances_seconds": distances_seconds, "decoding_seconds": began.elapsed().as_secs_f64(),
        "displacement_mean": displacement.mean, "displacement_expected": displacement.expected_mean,
        "neighbours_expected": neighbours.expected_mean,
        "amplification": decoding.amplification, "rows": decoding.rows, "whole_pass": decoding.whole_pass,
    })
}

/// Measures the largest possible state, in which every number has the most digits.
fn state() -> Result<Value, Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.arrow");
    write(&path, Container::ArrowFile(None), Dtype::I32, Shape::List, &documents(100, 100, 50_000, 1), 50);
    let loader = Loader::open(Config {
        data: vec![path.to_str().expect("a temporary path is text").to_owned()],
        seq_len: 16,
        shuffle: Shuffle::Block,
        ..Config::default()
    })?;
    let entries: serde_json::Map<String, Value> = loader
        .state()
        .entries()
        .iter()
        .map(|(key, value)| {
            let longest = match value {
                StateValue::Int(_) => json!(u64::MAX),
                StateValue::Text(text) => json!(text),
            };
            (key.clone(), longest)
        })
        .collect();
    Ok(json!({"kind": "scale-state", "most_json_bytes": Value::Object(entries).to_string().len()}))
}

/// Measures the cost and the uniformity of the permutation of `0..n`.
fn permutation(n: u64) -> Value {
    let drawn = Permutation::new(n, 3);
    let (mut at, stride) = (0, GOLDEN % n);
    let apply = median_seconds(|_| {
        for _ in 0..1000 {
            // A division would cost as much as the permutation itself.
            at = if at >= n - stride { at - (n - stride) } else { at + stride };
            black_box(drawn.apply(black_box(at)));
        }
    });
    let once = median_seconds(|key| {
        for index in 0..100 {
            black_box(Permutation::apply_once(n, key, black_box(index % n)));
        }
    });
    // Two tests of uniformity. The test over keys counts the places of two neighbours in a table of
    // up to 16 x 16 cells. The test over places counts distances of moves, in 64 classes of equal
    // likelihood.
    let side = n.min(16);
    let class = |value: u64| (u128::from(value) * u128::from(side) / u128::from(n)) as u64;
    let mut pairs = vec![0u64; (side * side) as usize];
    let keys = 100_000;
    for key in 0..keys {
        let drawn = Permutation::new(n, derive_key(5, &[key]));
        pairs[(class(drawn.apply(0)) * side + class(drawn.apply(1))) as usize] += 1;
    }
    // Two neighbours never go to one place, so equal classes are rarer if classes are small.
    let width = |class: u64| ((u128::from(class) * u128::from(n)).div_ceil(u128::from(side))) as f64;
    let pair_chi = chi_squared(pairs.iter().zip(0u64..).map(|(count, index)| {
        let (first, second) = (index / side, index % side);
        let [a, b] = [first, second].map(|class| width(class + 1) - width(class));
        let ways = if first == second { a * (b - 1.0) } else { a * b };
        (*count as f64, keys as f64 * ways / (n as f64 * (n as f64 - 1.0)))
    }));
    let mut moved = [0u64; 64];
    let places = n.min(1 << 18);
    for place in 0..places {
        let from = (u128::from(place) * u128::from(n) / u128::from(places)) as u64;
        // With n places, a move is shorter than the distance d with probability 1 - (1 - d/n)^2.
        let left = 1.0 - drawn.apply(from).abs_diff(from) as f64 / n as f64;
        moved[((1.0 - left * left) * 64.0).min(63.0) as usize] += 1;
    }
    let moved_chi = chi_squared(moved.iter().map(|count| (*count as f64, places as f64 / 64.0)));
    json!({
        "kind": "permutation", "n": n, "ns": apply * 1e6, "ns_once": once * 1e7, "pairs_z": pair_chi,
        // A small number of places cannot fill the classes evenly.
        "moved_z": (places == 1 << 18).then_some(moved_chi),
    })
}

/// Number of standard deviations by which chi-squared exceeds its mean. It is below 3 for a uniform
/// distribution.
fn chi_squared(counts: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (mut sum, mut classes) = (0.0, 0.0);
    for (count, expected) in counts {
        if expected > 0.0 {
            sum += (count - expected).powi(2) / expected;
            classes += 1.0;
        }
    }
    let freedom: f64 = classes - 1.0;
    (sum - freedom) / (2.0 * freedom).sqrt()
}

/// Median seconds of 31 runs.
fn median_seconds(mut run: impl FnMut(u64)) -> f64 {
    let mut times: Vec<f64> = (0..31)
        .map(|number| {
            let began = Instant::now();
            run(number);
            began.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    times[15]
}

fn anonymous_bytes() -> u64 {
    status_bytes("RssAnon:")
}

/// A field of this process's status, or 0 if the system has no such field.
fn status_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kibibytes: Option<u64> = line.and_then(|line| line.trim().trim_end_matches("kB").trim_end().parse().ok());
    kibibytes.unwrap_or(0) * 1024
}
