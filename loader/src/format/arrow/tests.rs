use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{Int32Builder, ListBuilder};
use arrow_array::{Array, ArrayRef, Int32Array, ListArray, RecordBatch, StringArray, StructArray, UInt16Array};
use arrow_buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use arrow_schema::{Field, Fields};
use proptest::prelude::*;

use super::*;
use crate::format::EndsScratch;
use crate::settings::{Config, Io};
use crate::tokens::Tokens;

fn options(io: Io, block_tokens: u64) -> OpenOptions {
    OpenOptions { io, block_tokens, ..OpenOptions::of(&Config::default()) }
}

fn written(batches: &[RecordBatch], stream: bool, codec: Option<CompressionType>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let options = IpcWriteOptions::default().try_with_compression(codec).unwrap();
    let schema = batches[0].schema();
    if stream {
        let mut writer = StreamWriter::try_new_with_options(&mut bytes, &schema, options).unwrap();
        batches.iter().for_each(|batch| writer.write(batch).unwrap());
        writer.finish().unwrap();
    } else {
        let mut writer = FileWriter::try_new_with_options(&mut bytes, &schema, options).unwrap();
        batches.iter().for_each(|batch| writer.write(batch).unwrap());
        writer.finish().unwrap();
    }
    bytes
}

fn opened(bytes: &[u8], options: &OpenOptions) -> Result<Shard> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    open_at(file.path(), options)
}

/// Opens the shard in the format that its head shows, whatever the end of the file looks like.
fn open_at(path: &Path, options: &OpenOptions) -> Result<Shard> {
    let mut reads = Reads::new(options.files.open(path, options.io)?);
    let is_file = reads.get(0..reads.file().len().min(6))? == b"ARROW1";
    open(reads, if is_file { Format::ArrowFile } else { Format::ArrowStream }, options)
}

/// Documents of a shard that have tokens, read block by block.
fn documents(shard: &Shard) -> Result<Vec<Vec<i64>>> {
    let mut documents = Vec::new();
    for (index, meta) in shard.blocks().iter().enumerate() {
        let (tokens, ends): (Vec<i64>, Vec<u64>) = match shard {
            Shard::Random(shard) => {
                let (mut bytes, mut scratch) = (Vec::new(), EndsScratch::default());
                let tokens = shard.tokens(index, 0..meta.tokens, &mut bytes)?;
                let ends = shard.ends(index, &mut scratch)?;
                ((0..tokens.len()).map(|at| tokens.get(at)).collect(), (0..ends.len()).map(|at| ends.get(at)).collect())
            }
            Shard::Block(shard) => {
                let block = shard.decode(index, None)?;
                assert!(block.complete);
                let mut ends = vec![7];
                shard.ends_into(index, &mut ends)?;
                assert_eq!(ends, block.ends, "the offsets alone give the ends");
                assert!(block.bytes.len() as u64 + 4 * block.ends.len() as u64 <= meta.decoded_bytes);
                let tokens = Tokens::new(shard.block_dtype(), &block.bytes);
                (
                    (0..tokens.len()).map(|at| tokens.get(at)).collect(),
                    block.ends.iter().map(|end| u64::from(*end)).collect(),
                )
            }
        };
        assert_eq!((tokens.len() as u64, ends.len() as u64), (meta.tokens, meta.ends));
        assert_eq!(meta.starts, meta.ends);
        let mut start = 0;
        for end in ends {
            documents.push(tokens[start as usize..end as usize].to_vec());
            start = end;
        }
        assert_eq!(start, meta.tokens);
    }
    Ok(documents)
}

type Lists = Vec<Option<Vec<i32>>>;

/// Makes a list column after columns of many shapes. Its null lists cover tokens, as the format
/// allows.
fn batch(lists: &Lists) -> RecordBatch {
    let mut offsets = vec![0i32];
    let mut values = Vec::new();
    for (row, list) in lists.iter().enumerate() {
        match list {
            Some(ids) => values.extend(ids.iter().copied()),
            None => values.extend(vec![-7; row % 3]),
        }
        offsets.push(values.len() as i32);
    }
    let nulls: NullBuffer = lists.iter().map(Option::is_some).collect();
    let tokens: ArrayRef = Arc::new(ListArray::new(
        Arc::new(Field::new("item", DataType::Int32, true)),
        OffsetBuffer::new(ScalarBuffer::from(offsets)),
        Arc::new(Int32Array::from(values)),
        Some(nulls),
    ));
    let count = lists.len();
    let text: ArrayRef =
        Arc::new(StringArray::from_iter((0..count).map(|row| (row % 2 == 0).then(|| row.to_string()))));
    let view: ArrayRef = Arc::new(arrow_array::StringViewArray::from_iter_values(
        (0..count).map(|row| format!("a text longer than twelve bytes {row}")),
    ));
    let mut nested = ListBuilder::new(Int32Builder::new());
    (0..count).for_each(|row| nested.append_value((0..row as i32 % 3).map(Some)));
    let nested: ArrayRef = Arc::new(nested.finish());
    let fields: Fields =
        vec![Field::new("a", DataType::Utf8, true), Field::new("b", nested.data_type().clone(), true)].into();
    let record: ArrayRef = Arc::new(StructArray::new(fields, vec![Arc::clone(&text), nested], None));
    let flag: ArrayRef = Arc::new(arrow_array::BooleanArray::from_iter((0..count).map(|row| Some(row % 2 == 0))));
    let none: ArrayRef = Arc::new(arrow_array::NullArray::new(count));
    RecordBatch::try_from_iter_with_nullable([
        ("text", text, true),
        ("view", view, true),
        ("record", record, true),
        ("flag", flag, true),
        ("none", none, true),
        ("input_ids", tokens, true),
    ])
    .unwrap()
}

fn containers() -> Vec<(bool, Option<CompressionType>)> {
    [None, Some(CompressionType::LZ4_FRAME), Some(CompressionType::ZSTD)]
        .into_iter()
        .flat_map(|codec| [(false, codec), (true, codec)])
        .collect()
}

proptest! {
    #[test]
    fn every_document_is_found(
        lists in prop::collection::vec(prop::option::weighted(0.8, prop::collection::vec(0i32..1000, 0..6)), 1..40),
        cuts in 1usize..20, block_tokens in 1u64..30, sliced in 0usize..4, pread: bool,
    ) {
        let io = if pread { Io::Pread } else { Io::Mmap };
        let batches: Vec<_> = lists.chunks(cuts).map(|lists| {
            // Slicing off the first rows leaves offsets that do not begin at 0.
            let mut padded: Lists = vec![Some(vec![5; 3]); sliced];
            padded.extend(lists.iter().cloned());
            batch(&padded).slice(sliced, lists.len())
        }).collect();
        let expected: Vec<Vec<i64>> = lists.iter().flatten().filter(|ids| !ids.is_empty())
            .map(|ids| ids.iter().map(|id| i64::from(*id)).collect()).collect();
        for (stream, codec) in containers() {
            let bytes = written(&batches, stream, codec);
            let shard = opened(&bytes, &options(io, block_tokens)).unwrap();
            prop_assert_eq!(shard.info().rows, lists.len() as u64);
            prop_assert_eq!(documents(&shard).unwrap(), expected.clone());
            if let Shard::Block(shard) = &shard {
                for (index, meta) in shard.blocks().iter().enumerate() {
                    let whole = shard.decode(index, None).unwrap();
                    for limit in 1..=meta.tokens {
                        let part = shard.decode(index, Some(limit)).unwrap();
                        prop_assert!(part.bytes.len() as u64 / 4 >= limit);
                        prop_assert_eq!(&whole.bytes[..part.bytes.len()], &part.bytes[..]);
                        prop_assert_eq!(&whole.ends[..part.ends.len()], &part.ends[..]);
                    }
                }
            }
        }
    }

    #[test]
    fn damage_is_an_error_or_other_tokens_but_never_a_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4)) {
        let batches = [batch(&vec![Some(vec![1, 2, 3]), None, Some(vec![]), Some(vec![4])]), batch(&vec![Some(vec![9; 20])])];
        for (stream, codec) in containers() {
            let mut bytes = written(&batches, stream, codec);
            for (at, bit) in &flips {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            if let Ok(shard) = opened(&bytes, &options(Io::Mmap, 10)) {
                for (index, meta) in shard.blocks().iter().enumerate() {
                    match &shard { Shard::Random(shard) => {
                        let _ = shard.tokens(index, 0..meta.tokens, &mut Vec::new()).map(|tokens| tokens.first_negative());
                        let _ = shard.ends(index, &mut EndsScratch::default()).map(|ends| ends.len());
                    }
                    Shard::Block(shard) => {
                        let _ = shard.ends_into(index, &mut Vec::new());
                        drop(shard.decode(index, None));
                    }
                    }
                }
            }
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error_or_shorter_by_whole_batches() {
    let batches = [batch(&vec![Some(vec![1, 2, 3])]), batch(&vec![Some(vec![9; 20])])];
    for (stream, codec) in containers() {
        let bytes = written(&batches, stream, codec);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let options = options(Io::Pread, 10);
        let mut sound = 0;
        for len in (1..bytes.len()).rev() {
            file.as_file().set_len(len as u64).unwrap();
            if let Ok(shard) = open_at(file.path(), &options) {
                // A stream may end with its file after any batch.
                assert!(stream, "{len} of {} bytes", bytes.len());
                assert!(documents(&shard).unwrap().len() <= 2);
                sound += 1;
            }
        }
        // The sound cuts are after the schema, after each batch, and after the marker without its
        // length.
        assert!(sound <= 4, "{sound} cuts went unnoticed");
    }
}

#[test]
fn a_plain_column_is_one_document() {
    let ids: ArrayRef = Arc::new(UInt16Array::from((0..100).collect::<Vec<u16>>()));
    let batches: Vec<_> =
        (0..4).map(|part| RecordBatch::try_from_iter([("tokens", ids.slice(part * 25, 25))]).unwrap()).collect();
    for (stream, codec) in containers() {
        let shard = opened(&written(&batches, stream, codec), &options(Io::Mmap, 30)).unwrap();
        assert_eq!(shard.blocks().iter().map(|block| block.tokens).sum::<u64>(), 100);
        let counts: Vec<_> = shard.blocks().iter().map(|block| (block.starts, block.ends)).collect();
        assert_eq!(counts.iter().map(|count| count.0).sum::<u64>(), 1);
        assert_eq!(counts[0].0, 1);
        assert_eq!(counts.iter().map(|count| count.1).sum::<u64>(), 1);
        assert_eq!(counts.last().unwrap().1, 1);
    }
}

#[test]
fn null_tokens_and_wrong_types_are_named() {
    let column = |nulls: bool| -> ArrayRef {
        let mut lists = ListBuilder::new(Int32Builder::new());
        lists.append_value([Some(1), Some(2)]);
        lists.append_value([Some(3), if nulls { None } else { Some(4) }]);
        Arc::new(lists.finish())
    };
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    for (stream, codec) in containers() {
        let open = |column: &ArrayRef, name: &str| {
            let batch = RecordBatch::try_from_iter([(name, Arc::clone(column))]).unwrap();
            opened(&written(&[batch], stream, codec), &options(Io::Mmap, 30))
        };
        let error = open(&column(true), "ids").unwrap_err();
        assert!(error.to_string().contains("null token") && error.to_string().contains("row 1"), "{error}");
        assert!(open(&column(false), "ids").is_ok());
        let error = open(&text, "ids").unwrap_err().to_string();
        assert!(error.contains("Utf8") && error.contains("uint16"), "{error}");
        let error = open(&text, "text").unwrap_err().to_string();
        assert!(error.contains("no token column") && error.contains("`text`"), "{error}");
    }
}

#[test]
fn a_damaged_shard_without_token_column_is_not_taken_for_an_empty_one() {
    use arrow_schema::{DataType, Schema};

    let other = |name: &str| (name.to_owned(), Arc::new(StringArray::from(Vec::<&str>::new())) as ArrayRef);
    let narrow = RecordBatch::try_from_iter([other("a")]).unwrap();
    let wide = RecordBatch::try_from_iter([other("a"), other("b")]).unwrap();
    let (narrow, wide) = (written(&[narrow], true, None), written(&[wide], true, None));
    for whole in [&narrow, &wide] {
        assert_eq!(opened(whole, &options(Io::Mmap, 30)).unwrap().blocks().len(), 0);
    }
    // The schema of one stream with the record batch of the other. A stream begins with 8 bytes and
    // the schema.
    let schema_of = |stream: &[u8]| 8 + u32::from_le_bytes(stream[4..8].try_into().unwrap()) as usize;
    let mixed = [&wide[..schema_of(&wide)], &narrow[schema_of(&narrow)..]].concat();
    let error = opened(&mixed, &options(Io::Mmap, 30)).unwrap_err().to_string();
    assert!(error.contains("record batch 0 is damaged: it has 1 field nodes and 3 buffers"), "{error}");

    let impossible = [
        (DataType::Decimal32(10, 0), "precision 10, which must be 1 to 9"),
        (DataType::Decimal64(0, 0), "precision 0, which must be 1 to 18"),
        (DataType::Decimal128(39, 0), "precision 39, which must be 1 to 38"),
        (DataType::Decimal256(77, 0), "precision 77, which must be 1 to 76"),
        (DataType::FixedSizeBinary(-1), "a length of -1"),
    ];
    for (data_type, expected) in impossible {
        for field in
            [Field::new("x", data_type.clone(), true), Field::new_list("x", Field::new("item", data_type, true), true)]
        {
            let mut bytes = Vec::new();
            StreamWriter::try_new(&mut bytes, &Schema::new(vec![field])).unwrap().finish().unwrap();
            let error = opened(&bytes, &options(Io::Mmap, 30)).unwrap_err().to_string();
            assert!(error.contains("damaged: column `") && error.contains(expected), "{error}");
        }
    }
}
