//! Tests that loaders of one opened corpus give the batches of loaders that opened it alone.

use std::path::Path;
use std::sync::Arc;

use forebay::loader::Opened;
use forebay::settings::{Config, Remainder, Shuffle};
use forebay::tokens::Dtype;
use forebay::{Batches, ErrorKind, Loader, Next};
use forebay_tests::{Container, Shape, documents, drain, rows, write};

const PARQUET: Container = Container::Parquet { codec: parquet::basic::Compression::SNAPPY, encoding: None, pages: 4 };

fn corpus(root: &Path, container: Container) -> Config {
    for seed in 0..3 {
        let path = root.join(format!("{seed}.shard"));
        write(&path, container, Dtype::I32, Shape::List, &documents(300, 60, 1 << 31, seed), 40);
    }
    Config {
        data: (0..3).map(|seed| root.join(format!("{seed}.shard")).to_str().unwrap().to_owned()).collect(),
        seq_len: 32,
        shuffle: Shuffle::On,
        chunk_tokens: 500,
        window_tokens: 3000,
        lanes: 4,
        block_tokens: 300,
        ..Config::default()
    }
}

/// The settings that sessions of one corpus may differ in.
fn sessions(config: &Config) -> Vec<Config> {
    vec![
        Config { batch_size: 4, num_threads: Some(2), ..config.clone() },
        Config { batch_size: 3, dp_rank: Some(1), dp_world_size: Some(2), num_threads: Some(1), ..config.clone() },
        Config { batch_size: 5, remainder: Remainder::Pad, num_threads: Some(0), ..config.clone() },
    ]
}

fn next(batches: &Batches) -> Option<Vec<Vec<i64>>> {
    match batches.next_timeout(std::time::Duration::from_secs(60)).unwrap() {
        Next::Batch(batch) => Some(rows(&[batch], "input_ids")),
        Next::End => None,
        Next::Pending => panic!("no batch within a minute"),
    }
}

#[test]
fn sessions_of_one_corpus_give_the_batches_of_separate_loaders() {
    for container in [Container::ArrowFile(None), PARQUET] {
        let root = tempfile::tempdir().unwrap();
        let config = corpus(root.path(), container);
        let alone: Vec<_> = sessions(&config)
            .into_iter()
            .map(|config| {
                let loader = Loader::open(config).unwrap();
                [drain(&loader.iter()), drain(&loader.iter())].map(|batches| rows(&batches, "input_ids"))
            })
            .collect();

        let opened = Arc::new(Opened::open(&config).unwrap());
        let loaders = || sessions(&config).into_iter().map(|config| Loader::new(&opened, config).unwrap());

        // Interleaved in one thread: a batch of each in turn.
        let interleaved: Vec<Loader> = loaders().collect();
        for epoch in 0..2 {
            let passes: Vec<Batches> = interleaved.iter().map(Loader::iter).collect();
            let mut found: Vec<Vec<Vec<i64>>> = vec![Vec::new(); passes.len()];
            let mut going = true;
            while going {
                going = false;
                for (pass, found) in passes.iter().zip(&mut found) {
                    if let Some(rows) = next(pass) {
                        found.extend(rows);
                        going = true;
                    }
                }
            }
            for (found, alone) in found.iter().zip(&alone) {
                assert!(found == &alone[epoch], "epoch {epoch}");
            }
        }

        // Side by side, each in a thread of its own.
        std::thread::scope(|scope| {
            for (loader, alone) in loaders().zip(&alone) {
                scope.spawn(move || {
                    for alone in alone {
                        assert!(&rows(&drain(&loader.iter()), "input_ids") == alone);
                    }
                });
            }
        });
    }
}

#[test]
fn sessions_have_positions_and_states_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    let config = corpus(root.path(), PARQUET);
    let opened = Arc::new(Opened::open(&config).unwrap());
    let [first, second] = [4, 2]
        .map(|batch_size| Loader::new(&opened, Config { batch_size, num_threads: Some(1), ..config.clone() }).unwrap());
    let pass = first.iter();
    for _ in 0..3 {
        next(&pass).unwrap();
    }
    assert_eq!((first.state().position(), second.state().position()), (12, 0));
    second.load_state(&first.state()).unwrap();
    let rest = |loader: &Loader| rows(&drain(&loader.iter()), "input_ids");
    let left = rows(&drain(&pass), "input_ids");
    assert!(rest(&second)[..left.len()] == left, "the same rows, in smaller batches");
}

#[test]
fn a_session_keeps_the_content_and_the_budget_of_its_corpus() {
    let root = tempfile::tempdir().unwrap();
    let config = Config { num_threads: Some(1), ..corpus(root.path(), PARQUET) };
    let opened = Arc::new(Opened::open(&config).unwrap());
    let refused = |config: Config| {
        let error = Loader::new(&opened, config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        error.to_string()
    };
    let found = refused(Config { seq_len: 64, seed: 3, ..config.clone() });
    assert!(found.contains("`seq_len` 64, opened with 32") && found.contains("`seed` 3, opened with 0"), "{found}");
    assert!(refused(Config { data: vec!["elsewhere".into()], ..config.clone() }).contains("another `data`"));

    // Each session takes its batches from one budget, and gives them back when it ends.
    let largest = Config { prefetch_batches: 4, batch_size: 1 << 17, ..config };
    let first = Loader::new(&opened, largest.clone()).unwrap();
    assert!(refused(largest.clone()).contains("of other loaders of this corpus"));
    drop(first);
    Loader::new(&opened, largest).unwrap();
}
