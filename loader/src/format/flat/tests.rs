use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::format::open;
use crate::settings::{Config, Io};

fn options(io: Io, block_tokens: u64) -> OpenOptions {
    OpenOptions { io, block_tokens, bin_dtype: Some(Dtype::U16), ..OpenOptions::of(&Config::default()) }
}

fn little(numbers: impl IntoIterator<Item = u64>, width: usize) -> Vec<u8> {
    numbers.into_iter().flat_map(|number| number.to_le_bytes()[..width].to_vec()).collect()
}

/// The files of a shard in each format, with the suffixes that they add to its name. Ids count up.
fn written(lengths: &[u64], sentence: u64) -> Vec<Vec<(&'static str, Vec<u8>)>> {
    let tokens: u64 = lengths.iter().sum();
    let ends = lengths.iter().scan(0, |sum, length| {
        *sum += length;
        Some(*sum)
    });
    let datatrove = vec![(".ds", little(0..tokens, 2)), (".ds.index", little(ends, 8))];

    let (mut sequences, mut firsts) = (Vec::new(), vec![0]);
    for length in lengths {
        sequences.extend((0..*length).step_by(sentence as usize).map(|start| sentence.min(length - start)));
        firsts.push(sequences.len() as u64);
    }
    let offsets = sequences.iter().scan(0, |sum, length| {
        *sum += 4 * length;
        Some(*sum - 4 * length)
    });
    let mut index = [b"MMIDIDX\0\0".to_vec(), little([1], 8), vec![4]].concat();
    index.extend(little([sequences.len() as u64, firsts.len() as u64], 8));
    index.extend([little(sequences.clone(), 4), little(offsets, 8), little(firsts, 8)].concat());
    let megatron = vec![(".bin", little(0..tokens, 4)), (".idx", index)];

    let header = format!("{{'descr': '<u2', 'fortran_order': False, 'shape': ({tokens},), }}\n");
    let start = [b"\x93NUMPY\x01\x00".to_vec(), little([header.len() as u64], 2), header.into_bytes()].concat();
    let npy = vec![(".npy", [start, little(0..tokens, 2)].concat())];

    let mut header = little([20_240_520, 1, tokens], 4);
    header.resize(1024, 0);
    let llmc = vec![(".bin", [header, little(0..tokens, 2)].concat())];
    vec![datatrove, megatron, npy, llmc, vec![(".bin", little(0..tokens, 2))]]
}

fn write(folder: &Path, files: &[(&str, Vec<u8>)]) -> PathBuf {
    for (suffix, bytes) in files {
        std::fs::write(folder.join(format!("shard{suffix}")), bytes).unwrap();
    }
    folder.join(format!("shard{}", files[0].0))
}

/// The non-empty documents, as a loader reads them block by block.
fn documents(shard: &Shard) -> Result<Vec<Vec<i64>>> {
    let Shard::Random(shard) = shard else { panic!("flat files are read in place") };
    let mut documents = Vec::new();
    for (block, meta) in shard.blocks().iter().enumerate() {
        let (mut bytes, mut scratch) = (Vec::new(), EndsScratch::default());
        let ends = shard.ends(block, &mut scratch)?;
        let ends: Vec<u64> = (0..ends.len()).map(|index| ends.get(index)).collect();
        assert_eq!((ends.len() as u64, ends.last().copied()), (meta.ends, Some(meta.tokens)));
        assert_eq!(meta.starts, meta.ends);
        let mut start = 0;
        for end in ends {
            let tokens = shard.tokens(block, start..end, &mut bytes)?;
            documents.push((0..tokens.len()).map(|index| tokens.get(index)).collect());
            start = end;
        }
    }
    Ok(documents)
}

proptest! {
    #[test]
    fn every_document_is_found(
        lengths in prop::collection::vec(0u64..9, 1..60), sentence in 1u64..9, block_tokens in 1u64..40, pread: bool,
    ) {
        let io = if pread { Io::Pread } else { Io::Mmap };
        let tokens: u64 = lengths.iter().sum();
        let mut start = 0;
        let mut expected: Vec<Vec<i64>> = Vec::new();
        for length in lengths.iter().filter(|length| **length > 0) {
            expected.push((start..start + *length as i64).collect());
            start += *length as i64;
        }
        for files in written(&lengths, sentence) {
            if tokens == 0 && files.len() == 1 {
                continue;
            }
            let folder = tempfile::tempdir().unwrap();
            let path = write(folder.path(), &files);
            let shard = open(&path, &options(io, block_tokens)).unwrap();
            let found = documents(&shard).unwrap();
            if files.len() == 1 {
                prop_assert_eq!(found.concat(), expected.concat());
                prop_assert_eq!((found.len(), shard.info().rows), (1, tokens));
                continue;
            }
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(shard.info().rows, lengths.len() as u64);
            let rows: Vec<u64> = shard.row_lengths().unwrap().into_iter().flatten().collect();
            prop_assert_eq!(&rows, &lengths);
            let Shard::Random(random) = &shard else { unreachable!() };
            for (block, meta) in shard.blocks().iter().enumerate() {
                for token in 0..meta.tokens {
                    let row = random.row_of(block, token).unwrap();
                    let before: u64 = lengths[..row as usize].iter().sum();
                    let id = shard.blocks()[..block].iter().map(|block| block.tokens).sum::<u64>() + token;
                    prop_assert!(before <= id && id < before + lengths[row as usize]);
                }
            }
        }
    }
}

#[test]
fn every_cut_is_an_error_that_names_a_file() {
    let lengths = [3, 0, 7, 1];
    for files in written(&lengths, 2) {
        for (number, (_, whole)) in files.iter().enumerate() {
            for len in 0..whole.len() {
                let mut files = files.clone();
                files[number].1.truncate(len);
                let is_raw = files.len() == 1 && files[0].0 == ".bin" && whole.len() < 1024;
                let folder = tempfile::tempdir().unwrap();
                let path = write(folder.path(), &files);
                let options = OpenOptions { bin_dtype: is_raw.then_some(Dtype::U16), ..options(Io::Pread, 100) };
                match open(&path, &options) {
                    // A raw file does not tell its size.
                    Ok(_) => assert!(is_raw && len % 2 == 0 && len > 0, "{} cut to {len}", files[number].0),
                    Err(error) => {
                        assert!(error.location().is_some_and(|place| place.path.starts_with(folder.path())), "{error}");
                    }
                }
            }
        }
    }
}

/// Options that split files at `id`, with a folder for the ends or without.
fn splitting(id: u32, folder: Option<&Path>, io: Io) -> OpenOptions {
    let config = Config {
        document_end_id: Some(id),
        cache_dir: folder.map(|folder| folder.to_str().unwrap().to_owned()),
        ..Config::default()
    };
    OpenOptions { io, bin_dtype: Some(Dtype::U16), ..OpenOptions::of(&config) }
}

/// The files of ids that do not say where documents end: `ids` in several types.
fn unsplit(ids: &[u64]) -> Vec<(&'static str, Vec<u8>)> {
    let npy = |descr: &str, width: usize| {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({},), }}\n", ids.len());
        let start = [b"\x93NUMPY\x01\x00".to_vec(), little([header.len() as u64], 2), header.into_bytes()].concat();
        (".npy", [start, little(ids.iter().copied(), width)].concat())
    };
    let llmc = |magic: u64, version: u64, width: usize| {
        let mut header = little([magic, version, ids.len() as u64], 4);
        header.resize(1024, 0);
        (".bin", [header, little(ids.iter().copied(), width)].concat())
    };
    let mut files = vec![(".bin", little(ids.iter().copied(), 2)), llmc(20_240_520, 1, 2), llmc(20_240_801, 7, 4)];
    files.extend(
        [("<u1", 1), ("|i1", 1), ("<u2", 2), ("<i2", 2), ("<u4", 4), ("<i4", 4), ("<i8", 8)]
            .map(|(descr, width)| npy(descr, width)),
    );
    files
}

/// The documents of `ids` that end with `id`. The last document may lack it.
fn split_by_hand(ids: &[u64], id: u64) -> Vec<Vec<i64>> {
    let mut documents: Vec<Vec<i64>> = vec![Vec::new()];
    for token in ids {
        documents.last_mut().unwrap().push(*token as i64);
        if *token == id {
            documents.push(Vec::new());
        }
    }
    documents.retain(|document| !document.is_empty());
    documents
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn an_id_ends_documents_in_every_type(
        ids in prop::collection::vec(prop_oneof![Just(7u64), 0u64..10, 0u64..128], 1..300), pread: bool, saves: bool,
    ) {
        let io = if pread { Io::Pread } else { Io::Mmap };
        let expected = split_by_hand(&ids, 7);
        for (suffix, bytes) in unsplit(&ids) {
            let (folder, saved) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let path = write(folder.path(), &[(suffix, bytes)]);
            // The second time, the ends come from their file.
            for time in 0..2 {
                let options = splitting(7, saves.then(|| saved.path()), io);
                let shard = open(&path, &options).unwrap();
                prop_assert_eq!(&documents(&shard).unwrap(), &expected);
                prop_assert_eq!(options.split.as_ref().unwrap().scanned().0 == 0, saves && time == 1);
                prop_assert_eq!(shard.info().rows, expected.len() as u64);
                let lengths: Vec<u64> = shard.row_lengths().unwrap().into_iter().flatten().collect();
                prop_assert_eq!(lengths, expected.iter().map(|document| document.len() as u64).collect::<Vec<_>>());
                let Shard::Random(random) = &shard else { unreachable!() };
                let rows = expected.iter().zip(0..).flat_map(|(document, row)| vec![row; document.len()]);
                for (token, row) in rows.enumerate() {
                    prop_assert_eq!(random.row_of(0, token as u64), Some(row));
                }
            }
        }
    }
}

#[test]
fn ends_at_the_borders_of_pieces_and_blocks_are_found() {
    let (folder, saved) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Documents of 1, 2 and many tokens, with ends just before and after each border of a piece.
    let mut ids = vec![1u64; (2 << 20) + 9];
    let places =
        [0, 1, 3, 63, 64, 65, (128 << 10) - 1, 128 << 10, (1 << 20) - 1, 1 << 20, (2 << 20) - 1, (2 << 20) + 7];
    places.into_iter().for_each(|place| ids[place] = 7);
    // Many documents of one token.
    ids[300_000..310_000].fill(7);
    let expected = split_by_hand(&ids, 7);
    let path = write(folder.path(), &[(".bin", little(ids, 2))]);
    for (folder, threads) in [(None, 0), (None, 3), (Some(saved.path()), 3), (Some(saved.path()), 0)] {
        let options = splitting(7, folder, Io::Auto);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build().unwrap();
        let opening = || open(&path, &options).unwrap();
        let shard = if threads > 0 { pool.install(opening) } else { opening() };
        assert_eq!(documents(&shard).unwrap(), expected);
        assert!(shard.blocks().len() > 4, "blocks end by tokens and by documents");
    }
}

#[test]
fn saved_ends_belong_to_one_id_and_one_state_of_the_file() {
    let (folder, saved) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = write(folder.path(), &[(".bin", little([1, 7, 2, 8, 3, 7], 2))]);
    let lengths = |id: u32| {
        let options = splitting(id, Some(saved.path()), Io::Pread);
        let shard = open(&path, &options).unwrap();
        let lengths: Vec<usize> = documents(&shard).unwrap().iter().map(Vec::len).collect();
        (lengths, options.split.unwrap().scanned().0)
    };
    assert_eq!(lengths(7), (vec![2, 4], 12));
    assert_eq!(lengths(8), (vec![4, 2], 12));
    assert_eq!(lengths(7), (vec![2, 4], 0));
    // No id is 9: the file is one document.
    assert_eq!(lengths(9), (vec![6], 12));
    std::fs::write(&path, little([7, 1, 1, 1, 1, 1, 7], 2)).unwrap();
    assert_eq!(lengths(7), (vec![1, 6], 14));

    let files: Vec<PathBuf> = std::fs::read_dir(saved.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 4);
    for file in &files {
        let whole = std::fs::read(file).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(file, damaged).unwrap();
            // Damage shows when the file is opened, which scans again, or when a block is read.
            let options = splitting(7, Some(saved.path()), Io::Pread);
            match documents(&open(&path, &options).unwrap()) {
                Ok(found) => assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [1, 6]),
                Err(error) => {
                    assert!(error.to_string().contains("saved ends"), "{error}");
                    std::fs::remove_file(file).unwrap();
                }
            }
        }
        std::fs::write(file, whole).unwrap();
    }
}

#[test]
fn ends_in_memory_have_a_limit_and_ids_a_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), &[(".bin", little(vec![7; 100_000], 2))]);
    let config = Config { document_end_id: Some(7), memory_budget: 1 << 20, ..Config::default() };
    let options = OpenOptions { bin_dtype: Some(Dtype::U16), ..OpenOptions::of(&config) };
    let error = open(&path, &options).unwrap_err();
    assert!(error.to_string().contains("set `cache_dir`"), "{error}");
    // A shard that was let go gives its bytes back.
    let another = tempfile::tempdir().unwrap();
    let small = write(another.path(), &[(".bin", little(vec![7; 20_000], 2))]);
    for _ in 0..5 {
        assert_eq!(open(&small, &options).unwrap().info().rows, 20_000);
    }
    let error = open(&path, &splitting(65_536, None, Io::Auto)).unwrap_err();
    assert!(error.to_string().contains("no id of type uint16"), "{error}");
    for files in written(&[3, 4], 2).into_iter().filter(|files| files.len() > 1) {
        let folder = tempfile::tempdir().unwrap();
        let error = open(&write(folder.path(), &files), &splitting(7, None, Io::Auto)).unwrap_err();
        assert!(error.to_string().contains("leave `document_end_id` out"), "{error}");
    }
}
