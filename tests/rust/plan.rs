//! Tests the plan of a run. A run has the steps, remainder, displacement, decoding and memory
//! that `plan` announces.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use forebay::loader::MAX_EPOCH;
use forebay::loader::plan::Plan;
use forebay::settings::Skip;
use forebay::settings::{Config, Epochs, Remainder, Shuffle};
use forebay::tokens::Dtype;
use forebay::{Loader, Next};
use forebay_tests::{Container, Shape, documents, write};
use parquet::basic::Compression;

const SEQ_LEN: u64 = 64;
const LANES: u64 = 8;
/// Pages are compressed, so that the larger part of a block's cost is real. They are small, so that
/// blocks can be small.
const PARQUET: Container = Container::Parquet { codec: Compression::SNAPPY, encoding: None, pages: 1 };

/// Writes about 400,000 tokens to a folder, once.
fn folder(container: Container, suffix: &str) -> PathBuf {
    static FOLDERS: OnceLock<HashMap<&'static str, PathBuf>> = OnceLock::new();
    let folders = FOLDERS.get_or_init(|| {
        let root = tempfile::tempdir().unwrap().keep();
        [("parquet", PARQUET), ("arrow", Container::ArrowFile(None))]
            .into_iter()
            .map(|(suffix, container)| {
                let folder = root.join(suffix);
                std::fs::create_dir(&folder).unwrap();
                for shard in 0..3 {
                    let path = folder.join(format!("{shard}.{suffix}"));
                    write(&path, container, Dtype::I32, Shape::List, &documents(1000, 120, 50_000, shard), 300);
                }
                (suffix, folder)
            })
            .collect()
    });
    assert!(matches!(container, Container::Parquet { .. }) == (suffix == "parquet"));
    folders[suffix].clone()
}

fn parquet() -> Config {
    Config {
        data: vec![folder(PARQUET, "parquet").to_str().unwrap().to_owned()],
        seq_len: SEQ_LEN,
        shuffle: Shuffle::Block,
        lanes: LANES,
        block_tokens: 256,
        chunk_tokens: 8192,
        window_tokens: 32_768,
        num_threads: Some(1),
        dp_rank: Some(0),
        dp_world_size: Some(1),
        ..Config::default()
    }
}

/// The totals of an epoch over all ranks.
#[derive(Debug, Default)]
struct Ran {
    steps: Vec<u64>,
    targets: u64,
    decoded_tokens: u64,
    most_cache_bytes: u64,
    most_buffer_bytes: u64,
}

fn run(config: &Config, world_size: u64) -> Ran {
    run_epoch(config, world_size, 0)
}

fn run_epoch(config: &Config, world_size: u64, epoch: u64) -> Ran {
    let mut ran = Ran::default();
    for rank in 0..world_size {
        let config = Config { dp_rank: Some(rank), dp_world_size: Some(world_size), ..config.clone() };
        let loader = Loader::open(config).unwrap();
        loader.set_epoch(epoch);
        let batches = loader.iter();
        let mut steps = 0;
        while let Next::Batch(batch) = batches.next_timeout(Duration::from_secs(60)).unwrap() {
            steps += 1;
            for row in 0..batch.rows {
                ran.targets +=
                    batch.row("labels", row).iter().filter(|id| **id != loader.config().ignore_index).count() as u64;
            }
            let stats = loader.stats();
            ran.most_cache_bytes = ran.most_cache_bytes.max(stats.cache_bytes);
            ran.most_buffer_bytes = ran.most_buffer_bytes.max(stats.buffer_bytes);
        }
        ran.steps.push(steps);
        // All ids fit into 16 bits, and a block holds the ends of its documents.
        let sources = loader.plan().unwrap().sources;
        let documents: u64 = sources.iter().map(|source| source.documents).sum();
        let tokens: u64 = sources.iter().map(|source| source.tokens).sum();
        let per_token = 2.0 + 4.0 * documents as f64 / tokens as f64;
        ran.decoded_tokens += (loader.stats().decoded_bytes as f64 / per_token) as u64;
    }
    ran
}

fn plan(config: &Config, world_size: u64) -> Plan {
    let config = Config { dp_rank: Some(0), dp_world_size: Some(world_size), ..config.clone() };
    Loader::open(config).unwrap().plan().unwrap()
}

#[test]
fn blocks_are_decoded_as_often_as_planned_and_about_once_where_ranks_divide_the_lanes() {
    // The cache holds the windows and not much more, so that the order, not the memory, keeps
    // decoding low.
    let base = Config { memory_budget: 256 << 10, batch_size: 2, prefetch_batches: 2, ..parquet() };
    for world_size in [1, 2, 4, 8] {
        let planned = plan(&base, world_size);
        let decoding = planned.decoding.unwrap();
        // This is the last possible epoch, so that no blocks of a next epoch are decoded towards
        // its end.
        let ran = run_epoch(&base, world_size, MAX_EPOCH);
        let measured = ran.decoded_tokens as f64 / planned.pass.delivered_tokens as f64;
        eprintln!("W={world_size}: planned {:.3}, measured {measured:.3}", decoding.amplification);
        assert!(decoding.whole_pass && decoding.ranks == world_size, "{decoding:?}");
        assert!(
            (measured / decoding.amplification - 1.0).abs() < 0.02,
            "W={world_size}: {measured} as against {decoding:?}"
        );
        assert!(measured <= 1.1, "W={world_size}: {measured}");
        // The order is the cause. The cache has no room for everything.
        assert!(planned.memory.cache_bytes < planned.sources[0].tokens * 4 / 4, "{:?}", planned.memory);
    }
}

#[test]
fn wasteful_settings_are_announced_as_such() {
    let tight = Config { memory_budget: 64 << 10, prefetch_batches: 1, ..parquet() };
    for (what, config, world_size, least) in [
        ("ranks that do not divide the lanes", tight.clone(), 3, 1.5),
        (
            "corpus order, in which every rank needs every block",
            Config { shuffle: Shuffle::Off, ..tight.clone() },
            4,
            2.0,
        ),
        ("one permutation over blocks", Config { shuffle: Shuffle::Global, ..tight }, 2, 3.0),
    ] {
        let decoding = plan(&config, world_size).decoding.unwrap();
        let planned = plan(&config, world_size);
        let measured = run(&config, world_size).decoded_tokens as f64 / planned.pass.delivered_tokens as f64;
        eprintln!("{what}: planned {:.3}, measured {measured:.3}", decoding.amplification);
        assert!(decoding.amplification > least, "{what}: {decoding:?}");
        assert!((measured / decoding.amplification - 1.0).abs() < 0.05, "{what}: {measured} as against {decoding:?}");
    }
}

#[test]
fn memory_stays_inside_the_plan() {
    for threads in [1, 4] {
        let config = Config { num_threads: Some(threads), memory_budget: 256 << 10, prefetch_batches: 3, ..parquet() };
        let memory = plan(&config, 1).memory;
        let ran = run(&config, 1);
        assert!(memory.budgeted_bytes() <= memory.budget_bytes, "{memory:?}");
        assert!(ran.most_cache_bytes <= memory.cache_bytes, "{ran:?} {memory:?}");
        assert!(ran.most_buffer_bytes <= memory.batches_bytes, "{ran:?} {memory:?}");
        // The plan is not only an upper bound: the cache comes close to its part.
        assert!(ran.most_cache_bytes * 10 >= memory.cache_bytes * 9, "{ran:?} {memory:?}");
    }
}

#[test]
fn steps_and_remainder_are_as_planned() {
    for shuffle in [Shuffle::Off, Shuffle::Block] {
        for remainder in [Remainder::Drop, Remainder::Pad, Remainder::Wrap, Remainder::Short] {
            for (world_size, batch_size) in [(1, 1), (3, 7), (4, 16)] {
                let config = Config { shuffle, remainder, batch_size, ..parquet() };
                let Plan { pass, sources, .. } = plan(&config, world_size);
                let ran = run(&config, world_size);
                let what = format!("{remainder:?} W={world_size} B={batch_size}: {pass:?} {ran:?}");
                assert!(ran.steps.iter().all(|steps| Some(*steps) == pass.steps), "{what}");
                assert_eq!(ran.targets, pass.delivered_tokens + pass.repeated_tokens, "{what}");
                assert_eq!(pass.delivered_tokens + pass.dropped_tokens, sources[0].stream_tokens, "{what}");
                let places = pass.steps.unwrap() * pass.global_batch * SEQ_LEN;
                let short_rows =
                    if remainder == Remainder::Short { pass.global_batch - pass.last_batch_rows } else { 0 };
                assert_eq!(
                    pass.delivered_tokens + pass.padded_tokens + pass.repeated_tokens + short_rows * SEQ_LEN,
                    places,
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn passes_of_many_epochs_with_skips_holdouts_and_limits_are_as_planned() {
    let skip = |epoch, start, end| Skip { epoch, start, end };
    let n = Loader::open(parquet()).unwrap().num_sequences();
    let tail = Config { remainder: Remainder::Pad, ..parquet() };
    let cases = [
        Config { epochs: Epochs::Count(3), ..parquet() },
        Config { epochs: Epochs::Count(2), skip: vec![skip(0, 5, 40), skip(1, 0, 7), skip(2, 0, 9)], ..parquet() },
        Config { epochs: Epochs::Count(2), ..tail.clone() },
        // The first epoch's tail is skipped.
        Config { epochs: Epochs::Count(2), skip: vec![skip(0, n, n + 1)], ..tail.clone() },
        Config { epochs: Epochs::Count(2), max_steps: Some(n / 14 + 2), ..tail },
        Config { max_steps: Some(3), ..parquet() },
        Config { epochs: Epochs::Endless, max_steps: Some(n / 7), ..parquet() },
        Config { holdout: Some(10), ..parquet() },
    ];
    for config in cases {
        let config = Config { batch_size: 7, ..config };
        for world_size in [1, 2] {
            let planned = plan(&config, world_size);
            let (pass, ran) = (planned.pass, run(&config, world_size));
            let what = format!("W={world_size} {config:?}: {pass:?} {ran:?}");
            assert!(ran.steps.iter().all(|steps| Some(*steps) == pass.steps), "{what}");
            assert_eq!(ran.targets, pass.delivered_tokens + pass.repeated_tokens, "{what}");
            assert_eq!(planned.sources[0].drawn_sequences, Some(pass.delivered_rows - pass.delivered_tails), "{what}");
            let measured = ran.decoded_tokens as f64 / pass.delivered_tokens as f64;
            let decoding = planned.decoding.unwrap();
            assert!((measured / decoding.amplification - 1.0).abs() < 0.05, "{measured}: {what} {decoding:?}");
        }
    }
}

#[test]
fn mixtures_are_drawn_and_decoded_as_planned() {
    let folder = folder(PARQUET, "parquet");
    let mixture = format!(
        r#"{{"sources": [{{"name": "a", "data": ["{}"], "weight": 3, "epochs": 2}}, {{"name": "b", "data": ["{}"], "weight": 1}}], "exhausted": "stop"}}"#,
        folder.join("0.parquet").display(),
        folder.join("1.parquet").display()
    );
    let config = Config {
        data: Vec::new(),
        mixture: Some(mixture),
        memory_budget: 256 << 10,
        chunk_tokens: 4096,
        batch_size: 4,
        ..parquet()
    };
    for world_size in [1, 2] {
        let planned = plan(&config, world_size);
        let ran = run(&config, world_size);
        let what = format!("W={world_size}: {planned:?} {ran:?}");
        assert!(ran.steps.iter().all(|steps| Some(*steps) == planned.pass.steps), "{what}");
        assert_eq!(ran.targets, planned.pass.delivered_tokens, "{what}");
        let drawn: Vec<u64> = planned.sources.iter().map(|source| source.drawn_sequences.unwrap()).collect();
        assert_eq!(drawn.iter().sum::<u64>(), planned.pass.delivered_rows, "{what}");
        let share = drawn[0] as f64 / planned.pass.delivered_rows as f64;
        assert!((share - 0.75).abs() < 0.01, "{share}: {what}");
        let measured = ran.decoded_tokens as f64 / planned.pass.delivered_tokens as f64;
        let amplification = planned.decoding.unwrap().amplification;
        assert!((measured / amplification - 1.0).abs() < 0.05, "{measured}: {what}");
    }
}

#[test]
fn shards_that_are_not_open_are_planned_without_opening_them() {
    let cache = tempfile::tempdir().unwrap();
    let config = Config { memory_budget: 256 << 10, prefetch_batches: 2, batch_size: 2, ..parquet() };
    let opened = plan(&config, 2);
    let indexed = Config { cache_dir: Some(cache.path().to_str().unwrap().into()), ..config };
    for _ in 0..2 {
        let closed = plan(&indexed, 2);
        let (all, none) = (&opened.sources[0], &closed.sources[0]);
        assert_eq!((all.open_shards, none.open_shards), (3, 0));
        assert_eq!((all.blocks, all.tokens, all.sequences), (none.blocks, none.tokens, none.sequences));
        assert_eq!(opened.pass, closed.pass);
        let ratio = closed.decoding.unwrap().amplification / opened.decoding.unwrap().amplification;
        assert!((ratio - 1.0).abs() < 0.03, "{closed:?} {opened:?}");
    }
}

#[test]
fn sequences_move_as_far_as_planned() {
    let folder = folder(Container::ArrowFile(None), "arrow");
    let base = Config { data: vec![folder.to_str().unwrap().to_owned()], ..parquet() };
    let source = Loader::open(Config { shuffle: Shuffle::Off, ..base.clone() }).unwrap();
    // Rows of the corpus by content. They identify the sequence of a delivered row.
    let n = source.num_sequences();
    let rows = source.sequences_at(0, 0, n).unwrap();
    let mut places: HashMap<Vec<i64>, u64> = HashMap::new();
    for row in 0..n {
        assert!(places.insert(rows.row("input_ids", row as usize), row).is_none(), "two equal rows");
    }
    for shuffle in [Shuffle::Off, Shuffle::Global, Shuffle::Block] {
        let loader = Loader::open(Config { shuffle, ..base.clone() }).unwrap();
        let source = loader.plan().unwrap().sources.remove(0);
        let delivered = loader.sequences_at(0, 0, n).unwrap();
        let order: Vec<u64> = (0..n).map(|row| places[&delivered.row("input_ids", row as usize)]).collect();
        let mut moved: Vec<u64> = order.iter().zip(0..).map(|(place, position)| place.abs_diff(position)).collect();
        moved.sort_unstable();
        let mean = moved.iter().sum::<u64>() as f64 / n as f64;
        let planned = source.displacement;
        assert_eq!(planned.sampled, n, "{shuffle:?}: small corpora are looked at whole");
        assert!((planned.mean - mean).abs() < 1e-6, "{shuffle:?}: {mean} as against {planned:?}");
        assert_eq!((planned.p50, planned.p95), (moved[n as usize / 2], moved[n as usize * 95 / 100]), "{shuffle:?}");
        // Three standard deviations of the mean over permutations of that many things (Spearman's
        // footrule).
        let permuted = if shuffle == Shuffle::Block { n * SEQ_LEN / base.chunk_tokens } else { n };
        let spread = 3.0 * (2.0 / 45.0_f64).sqrt() * 3.0 / (permuted as f64).sqrt();
        let off = (planned.mean - planned.expected_mean).abs();
        assert!(off <= spread * planned.expected_mean, "{shuffle:?}: {planned:?}");

        let mut position_of = vec![0u64; n as usize];
        order.iter().zip(0..).for_each(|(place, position)| position_of[*place as usize] = position);
        let window = if shuffle == Shuffle::Block { base.window_tokens / SEQ_LEN } else { n };
        let apart: Vec<u64> =
            position_of.windows(2).map(|pair| pair[0].abs_diff(pair[1])).filter(|apart| *apart <= window).collect();
        let mean = apart.iter().sum::<u64>() as f64 / apart.len() as f64;
        let planned = source.neighbours;
        assert!((mean / planned.expected_mean - 1.0).abs() < 0.1, "{shuffle:?}: {mean} as against {planned:?}");
        assert!((planned.mean / planned.expected_mean - 1.0).abs() < 0.1, "{shuffle:?}: {planned:?}");
    }
}
