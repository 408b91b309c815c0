//! Tests that consumers of a split loader get the rows of separate ranks, without a copy.
//!
//! A failed batch is not lost.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forebay::batch_source::split::{BatchPart, NextPart, PartPass, Split, SplitOptions};
use forebay::loader::WaitPolicy;
use forebay::settings::{Config, Remainder, Shuffle, Targets};
use forebay::tokens::Dtype;
use forebay::{ErrorKind, Loader, Next};
use forebay_tests::{Container, Shape, documents, drain, rows, write};

const PARQUET: Container = Container::Parquet { codec: parquet::basic::Compression::SNAPPY, encoding: None, pages: 4 };
const LONG: WaitPolicy = WaitPolicy::Wait(Duration::from_secs(60));
const CONSUMERS: u64 = 4;

fn corpus(root: &Path, container: Container) -> Config {
    for seed in 0..2 {
        let path = root.join(format!("{seed}.shard"));
        write(&path, container, Dtype::I32, Shape::List, &documents(300, 60, 1 << 31, seed), 40);
    }
    Config {
        data: (0..2).map(|seed| root.join(format!("{seed}.shard")).to_str().unwrap().to_owned()).collect(),
        seq_len: 32,
        shuffle: Shuffle::On,
        chunk_tokens: 500,
        window_tokens: 3000,
        block_tokens: 300,
        num_threads: Some(2),
        ..Config::default()
    }
}

fn split(loader: &Arc<Loader>, ahead: Option<u64>) -> Split {
    let source = Arc::clone(loader);
    Split::new(source, SplitOptions { count: CONSUMERS, ahead, external: false }).unwrap()
}

fn next(pass: &PartPass) -> Option<BatchPart> {
    match pass.take(LONG).unwrap() {
        NextPart::Part(part) => Some(part),
        NextPart::End => None,
        other => panic!("nothing within a minute: {other:?}"),
    }
}

fn values(part: &BatchPart, field: usize) -> Vec<i64> {
    let field = &part.fields[field];
    let at = |row: usize, column: usize| {
        let place = field.offset_bytes / 8 + row * field.shape[1] + column;
        // SAFETY: the field lies in the batch's buffer of initialised 64-bit integers, which nobody
        // writes.
        unsafe { *part.batch.as_ptr().cast::<i64>().add(place) }
    };
    (0..part.rows).flat_map(|row| (0..field.shape[1]).map(move |column| at(row, column))).collect()
}

#[test]
fn consumers_get_the_rows_of_separate_ranks() {
    for (container, targets, remainder) in [
        (Container::ArrowFile(None), Targets::Labels, Remainder::Pad),
        (PARQUET, Targets::Shifted, Remainder::Wrap),
        (PARQUET, Targets::Labels, Remainder::Drop),
    ] {
        let root = tempfile::tempdir().unwrap();
        let config = Config { targets, remainder, sample_ids: true, ..corpus(root.path(), container) };
        let whole = Config { batch_size: 3 * CONSUMERS, ..config.clone() };
        let split = split(&Arc::new(Loader::open(whole).unwrap()), None);
        std::thread::scope(|scope| {
            for consumer in 0..CONSUMERS {
                let (split, config) = (&split, &config);
                scope.spawn(move || {
                    let rank = Config {
                        batch_size: 3,
                        dp_rank: Some(consumer),
                        dp_world_size: Some(CONSUMERS),
                        ..config.clone()
                    };
                    let alone = Loader::open(rank).unwrap();
                    for _ in 0..2 {
                        let pass = split.iter(consumer as usize);
                        for batch in drain(&alone.iter()) {
                            let part = next(&pass).unwrap();
                            for (index, field) in batch.fields.iter().enumerate() {
                                let expected = rows(&[Arc::clone(&batch)], field.name).concat();
                                assert_eq!(values(&part, index), expected, "consumer {consumer}, {}", field.name);
                            }
                        }
                        assert!(next(&pass).is_none());
                    }
                });
            }
        });
    }
}

#[test]
fn parts_of_a_batch_are_whole_pieces_of_its_own_memory() {
    let root = tempfile::tempdir().unwrap();
    let config = Config { batch_size: 2 * CONSUMERS, ..corpus(root.path(), PARQUET) };
    let split = split(&Arc::new(Loader::open(config).unwrap()), None);
    let passes: Vec<PartPass> = (0..CONSUMERS as usize).map(|consumer| split.iter(consumer)).collect();
    let parts: Vec<BatchPart> = passes.iter().map(|pass| next(pass).unwrap()).collect();
    assert!(parts.windows(2).all(|pair| Arc::ptr_eq(&pair[0].batch, &pair[1].batch)), "nothing is copied");
    let mut pieces: Vec<(usize, usize)> = parts
        .iter()
        .flat_map(|part| part.fields.iter())
        .map(|field| {
            assert_eq!(field.shape, [2, 32, 1, 1], "one piece of memory");
            (field.offset_bytes, field.offset_bytes + 2 * 32 * field.dtype.size())
        })
        .collect();
    pieces.sort_unstable();
    assert!(pieces.windows(2).all(|pair| pair[0].1 <= pair[1].0), "no two overlap");
}

#[test]
fn a_consumer_that_is_ahead_is_told_whom_it_waits_for() {
    let root = tempfile::tempdir().unwrap();
    let config = Config { batch_size: CONSUMERS, ..corpus(root.path(), PARQUET) };
    let split = split(&Arc::new(Loader::open(config).unwrap()), Some(2));
    let passes: Vec<PartPass> = (0..CONSUMERS as usize).map(|consumer| split.iter(consumer)).collect();
    for pass in &passes[..3] {
        next(pass).unwrap();
    }
    next(&passes[0]).unwrap();
    let waiting = passes[0].take(WaitPolicy::Wait(Duration::from_millis(20))).unwrap();
    assert!(matches!(waiting, NextPart::Waiting { consumer: 3, behind: 2 }), "{waiting:?}");
    split.close(3);
    next(&passes[0]).unwrap();
    assert_eq!(passes[3].take(LONG).unwrap_err().kind(), ErrorKind::Closed);
}

#[test]
fn after_an_error_the_next_pass_continues_at_the_batch_that_failed() {
    let root = tempfile::tempdir().unwrap();
    let config = Config { shuffle: Shuffle::Off, batch_size: 4, ..corpus(root.path(), PARQUET) };
    let expected = rows(&drain(&Loader::open(config.clone()).unwrap().iter()), "input_ids");
    let path = Path::new(&config.data[1]);
    let (sound, written) = (std::fs::read(path).unwrap(), std::fs::metadata(path).unwrap().modified().unwrap());
    // The same size and time, so that nothing but the pages is different.
    let put = |bytes: &[u8]| {
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
        file.set_modified(written).unwrap();
    };
    for splits in [false, true] {
        let loader = Arc::new(Loader::open(config.clone()).unwrap());
        let mut damaged = sound.clone();
        damaged[sound.len() / 4..sound.len() / 2].fill(0xFF);
        put(&damaged);
        let mut found = Vec::new();
        let (first, state);
        if splits {
            let split = split(&loader, None);
            let passes: Vec<PartPass> = (0..CONSUMERS as usize).map(|consumer| split.iter(consumer)).collect();
            loop {
                let taken: Result<Vec<_>, _> = passes.iter().map(|pass| pass.take(LONG)).collect();
                match taken {
                    Ok(parts) => found.extend(parts.iter().map(|part| match part {
                        NextPart::Part(part) => values(part, 0),
                        other => panic!("an error is due: {other:?}"),
                    })),
                    Err(error) => break assert_eq!(error.kind(), ErrorKind::Data, "{error}"),
                }
            }
            assert!(passes.iter().all(|pass| pass.take(LONG).is_err()), "the failed pass stays failed");
            (first, state) = (found.len(), split.state());
            put(&sound);
            let passes: Vec<PartPass> = (0..CONSUMERS as usize).map(|consumer| split.iter(consumer)).collect();
            'batches: loop {
                for pass in &passes {
                    let Some(part) = next(pass) else { break 'batches };
                    found.push(values(&part, 0));
                }
            }
        } else {
            let pass = loader.iter();
            let error = loop {
                match pass.next_timeout(Duration::from_secs(60)) {
                    Ok(Next::Batch(batch)) => found.extend(rows(&[batch], "input_ids")),
                    Ok(other) => panic!("an error is due: {other:?}"),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), ErrorKind::Data, "{error}");
            assert!(pass.next_timeout(Duration::from_secs(60)).is_err(), "the failed pass stays failed");
            (first, state) = (found.len(), loader.state());
            put(&sound);
            found.extend(rows(&drain(&loader.iter()), "input_ids"));
        }
        assert!(first > 0 && first < expected.len(), "the damage lies in the middle: {first}");
        assert_eq!(state.position(), first as u64);
        assert!(found == expected, "nothing is lost and nothing comes twice");
    }
}
