//! Tests that a batch is a function of settings, epoch and position.
//!
//! An epoch has every token once, and resuming is a jump.

use std::path::PathBuf;
use std::sync::OnceLock;

use forebay::loader::state::State;
use forebay::settings::{Config, Remainder, Shuffle, Targets};
use forebay::tokens::Dtype;
use forebay::{ErrorKind, Loader};
use forebay_tests::{Container, Shape, documents, drain, rows, stream, write};
use proptest::prelude::*;

struct Corpora {
    arrow: PathBuf,
    parquet: PathBuf,
    stream: Vec<i64>,
}

/// One corpus of unique tokens, written both ways once.
fn corpora() -> &'static Corpora {
    static CORPORA: OnceLock<Corpora> = OnceLock::new();
    CORPORA.get_or_init(|| {
        let root = tempfile::tempdir().unwrap().keep();
        let shards: Vec<_> = (0..3)
            .map(|seed| {
                let offset = i64::from(seed) * 1_000_000;
                documents(200, 50, 1 << 31, u64::from(seed as u32))
                    .into_iter()
                    .map(|document| document.map(|ids| ids.into_iter().map(|id| id + offset).collect::<Vec<_>>()))
                    .collect::<Vec<_>>()
            })
            .collect();
        for (name, suffix, container) in [
            ("arrow", "arrow", Container::ArrowFile(None)),
            (
                "parquet",
                "parquet",
                Container::Parquet {
                    codec: parquet::basic::Compression::ZSTD(Default::default()),
                    encoding: None,
                    pages: 1,
                },
            ),
        ] {
            std::fs::create_dir(root.join(name)).unwrap();
            for (index, documents) in shards.iter().enumerate() {
                write(
                    &root.join(name).join(format!("{index}.{suffix}")),
                    container,
                    Dtype::I32,
                    Shape::List,
                    documents,
                    33,
                );
            }
        }
        Corpora { arrow: root.join("arrow"), parquet: root.join("parquet"), stream: stream(&shards, None, None) }
    })
}

fn settings(parquet: bool) -> Config {
    let corpora = corpora();
    let folder = if parquet { &corpora.parquet } else { &corpora.arrow };
    Config {
        data: vec![folder.to_str().unwrap().to_owned()],
        seq_len: 32,
        shuffle: Shuffle::On,
        chunk_tokens: 500,
        window_tokens: 3000,
        lanes: 4,
        block_tokens: 300,
        num_threads: Some(2),
        ..Config::default()
    }
}

fn remainders() -> impl Strategy<Value = Remainder> {
    prop::sample::select(vec![Remainder::Drop, Remainder::Pad, Remainder::Wrap, Remainder::Short])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn each_token_is_delivered_once_over_all_ranks(
        parquet: bool, batch_size in 1u64..6, world_size in 1u64..5, remainder in remainders(), seed: u64, shifted: bool,
        epoch in 0u64..3, threads in 1u64..5,
    ) {
        let mut seen = Vec::new();
        let mut steps = None;
        let name = if shifted { "y" } else { "labels" };
        for rank in 0..world_size {
            let config = Config {
                batch_size, remainder, seed, num_threads: Some(threads),
                dp_rank: Some(rank), dp_world_size: Some(world_size),
                targets: if shifted { Targets::Shifted } else { Targets::Labels },
                ..settings(parquet)
            };
            let loader = match Loader::open(config) {
                Ok(loader) => loader,
                Err(error) => {
                    prop_assert_eq!(error.kind(), ErrorKind::Config);
                    prop_assert!(remainder == Remainder::Short);
                    return Ok(());
                }
            };
            loader.set_epoch(epoch);
            let batches = drain(&loader.iter());
            prop_assert_eq!(batches.len() as u64, loader.len());
            prop_assert_eq!(*steps.get_or_insert(batches.len()), batches.len());
            seen.extend(rows(&batches, name).into_iter().flatten().filter(|id| *id != -100));
        }
        // With shifted targets the first token of the stream is no target.
        let stream = &corpora().stream[usize::from(shifted)..];
        let mut counts = std::collections::HashMap::new();
        seen.iter().for_each(|id| *counts.entry(*id).or_insert(0u32) += 1);
        match remainder {
            Remainder::Drop => {
                let whole = (stream.len() / 32) as u64 / (batch_size * world_size) * batch_size * world_size * 32;
                prop_assert_eq!(seen.len() as u64, whole);
                prop_assert!(counts.values().all(|count| *count == 1));
            }
            Remainder::Pad | Remainder::Short => {
                prop_assert_eq!(seen.len(), stream.len());
                prop_assert!(counts.values().all(|count| *count == 1));
            }
            Remainder::Wrap => prop_assert!(stream.iter().all(|id| counts.contains_key(id))),
        }
    }

    #[test]
    fn global_batches_are_the_same_for_every_world_size(parquet: bool, seed: u64, step in 0u64..20) {
        let loader = Loader::open(Config { batch_size: 12, seed, ..settings(parquet) }).unwrap();
        let whole = rows(&[loader.sequences_at(1, step * 12, 12).unwrap()], "input_ids");
        for world_size in [1u64, 2, 3, 4, 6, 12] {
            let config = Config { batch_size: 12 / world_size, seed, num_threads: Some(1), ..settings(parquet) };
            let loader = Loader::open(config).unwrap();
            let mut global = vec![Vec::new(); 12];
            for rank in 0..world_size {
                let batch = loader.batch_at(1, step, rank, world_size).unwrap();
                for row in 0..batch.rows {
                    global[row * world_size as usize + rank as usize] = batch.row("input_ids", row);
                }
            }
            prop_assert_eq!(&global, &whole, "world size {}", world_size);
        }
    }

    #[test]
    fn a_restored_position_continues_where_it_was_saved(
        parquet: bool, taken in 0usize..40, threads in 1u64..4, batch_size in 1u64..5, resumed_batch in 1u64..5,
    ) {
        let config = |batch_size, threads| Config { batch_size, num_threads: Some(threads), ..settings(parquet) };
        let whole = Loader::open(config(1, 2)).unwrap();
        whole.set_epoch(1);
        let expected = rows(&drain(&whole.iter()), "input_ids");

        let first = Loader::open(config(batch_size, threads)).unwrap();
        first.set_epoch(1);
        let pass = first.iter();
        let mut seen = Vec::new();
        for _ in 0..taken {
            if let forebay::Next::Batch(batch) = pass.next_timeout(std::time::Duration::from_secs(60)).unwrap() {
                seen.extend(rows(&[batch], "input_ids"));
            }
        }
        let state = State::from_entries(first.state().entries().to_vec()).unwrap();
        drop((pass, first));

        let second = Loader::open(config(resumed_batch, threads)).unwrap();
        for _ in 0..2 {
            second.load_state(&state).unwrap();
        }
        second.set_epoch(1);
        let rest = rows(&drain(&second.iter()), "input_ids");
        let from = if expected.len() - seen.len() < resumed_batch as usize {
            // Nothing was left of that epoch: the next one begins.
            return Ok(());
        } else { seen.len() };
        prop_assert_eq!(&seen[..], &expected[..from]);
        prop_assert_eq!(&rest[..], &expected[from..from + rest.len()]);
        prop_assert!(expected.len() - from - rest.len() < resumed_batch as usize);
    }
}

#[test]
fn passes_begin_at_their_first_batch_and_epochs_advance_with_them() {
    let loader = Loader::open(Config { batch_size: 4, ..settings(false) }).unwrap();
    let epoch_of = |pass: &forebay::Batches| match pass.next_timeout(std::time::Duration::from_secs(60)).unwrap() {
        forebay::Next::Batch(batch) => (batch.epoch, batch.step),
        other => panic!("{other:?}"),
    };
    let never_used = loader.iter();
    assert_eq!(loader.state().position(), 0);
    assert_eq!(epoch_of(&loader.iter()), (0, 0));
    let second = loader.iter();
    assert_eq!(epoch_of(&second), (1, 0));
    assert_eq!((loader.state().epoch(), loader.state().position()), (1, 4));
    drop(never_used);
    loader.set_epoch(7);
    assert_eq!(epoch_of(&loader.iter()), (7, 0));
    let state = loader.state();
    loader.load_state(&state).unwrap();
    loader.set_epoch(7);
    assert_eq!(epoch_of(&loader.iter()), (7, 1), "the same epoch does not reset a restored position");
    loader.load_state(&state).unwrap();
    loader.set_epoch(8);
    assert_eq!(epoch_of(&loader.iter()), (8, 0));
    assert_eq!(epoch_of(&second), (1, 1), "an older pass goes on by itself");
    assert_eq!((loader.state().epoch(), loader.state().position()), (8, 4), "and does not move the state");
    drain(&loader.iter());
    let finished = loader.state();
    assert_eq!(finished.epoch(), 9);
    loader.load_state(&finished).unwrap();
    assert_eq!(epoch_of(&loader.iter()), (10, 0), "a finished epoch is not repeated");
    loader.load_state(&finished).unwrap();
    loader.set_epoch(9);
    assert!(drain(&loader.iter()).is_empty(), "nothing is left of the epoch that was asked for");
    loader.set_epoch(10);
    assert_eq!(epoch_of(&loader.iter()), (10, 0), "and the next one is not skipped");
}

#[test]
fn a_state_of_other_content_is_refused_with_both_values() {
    let loader = Loader::open(Config { batch_size: 4, ..settings(false) }).unwrap();
    let state = loader.state();
    let other = Loader::open(Config { batch_size: 4, seq_len: 64, seed: 9, ..settings(false) }).unwrap();
    let error = other.load_state(&state).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State);
    for words in ["`seq_len` was 32 when saved and is 64 now", "`seed` was 0 when saved and is 9 now"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    let elsewhere = Loader::open(settings(true)).unwrap();
    assert!(elsewhere.load_state(&state).unwrap_err().to_string().contains("`fingerprint`"));
    let grouped = Config {
        batch_size: 2,
        dp_rank: Some(1),
        dp_world_size: Some(2),
        num_threads: Some(1),
        prefetch_batches: 9,
        remainder: Remainder::Pad,
        block_tokens: 77,
        ..settings(false)
    };
    Loader::open(grouped).unwrap().load_state(&state).unwrap();
}
