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
