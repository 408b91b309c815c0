//! Tests that the values of further columns follow their tokens into every batch.
//!
//! Columns that do not fit are refused.

use std::path::Path;
use std::sync::Arc;

use arrow_array::types::{
    ArrowPrimitiveType, Float16Type, Float32Type, Int8Type, Int16Type, Int32Type, UInt16Type, UInt32Type,
};
use arrow_array::{Array, ArrayRef, BooleanArray, LargeListArray, ListArray, PrimitiveArray, RecordBatch};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_ipc::CompressionType;
use arrow_schema::{Field, Schema};
use forebay::settings::{Config, Io, Remainder, Shuffle, Targets};
use forebay::tokens::Dtype;
use forebay::{Batch, ErrorKind, Loader};
use forebay_tests::{Container, Document, documents, drain, stream, write_batches};
use parquet::basic::{Compression, ZstdLevel};

const BOS: u32 = 1 << 30;
const EOS: u32 = BOS + 1;
const PAD: u32 = BOS + 2;

/// Columns beside the tokens: name, type in the file, type in a batch.
const COLUMNS: [(&str, Dtype, Dtype); 8] = [
    ("labels", Dtype::I32, Dtype::I64),
    ("loss_mask", Dtype::Bool, Dtype::Bool),
    ("weights", Dtype::F16, Dtype::F32),
    ("a", Dtype::I8, Dtype::I8),
    ("b", Dtype::I16, Dtype::I16),
    ("c", Dtype::U16, Dtype::I32),
    ("d", Dtype::U32, Dtype::I64),
    ("e", Dtype::F32, Dtype::F32),
];

fn names() -> Vec<String> {
    COLUMNS.map(|(name, ..)| name.to_owned()).to_vec()
}

/// The value of a column at a token, as [`Batch::row`] gives it.
fn value(name: &str, token: i64) -> i64 {
    let bits = |number: f32| i64::from(number.to_bits());
    match name {
        "labels" => {
            if token % 2 == 0 {
                -100
            } else {
                token
            }
        }
        "loss_mask" => i64::from(token % 3 == 0),
        "weights" => bits((token % 9) as f32 / 8.0),
        "a" => token % 256 - 128,
        "b" => token % 40_000 - 20_000,
        "c" => token % 60_000,
        "d" => (1 << 31) + token,
        "e" => bits(-(token as f32) / 3.0),
        _ => unreachable!("a column of the table"),
    }
}

/// The value where no token of a file stands.
fn elsewhere(name: &str, id: i64) -> i64 {
    assert!(id >= i64::from(BOS));
    if name == "labels" { -100 } else { 0 }
}

fn expected(name: &str, id: i64) -> i64 {
    if id < i64::from(BOS) { value(name, id) } else { elsewhere(name, id) }
}

fn numbers(dtype: Dtype, name: &str, tokens: &[i64]) -> ArrayRef {
    let values = tokens.iter().map(|token| value(name, *token));
    macro_rules! array {
        ($type:ty, $of:expr) => {
            Arc::new(PrimitiveArray::<$type>::from_iter_values(values.map($of)))
        };
    }
    match dtype {
        Dtype::Bool => Arc::new(BooleanArray::from_iter(values.map(|value| Some(value == 1)))),
        Dtype::I8 => array!(Int8Type, |value| value as i8),
        Dtype::I16 => array!(Int16Type, |value| value as i16),
        Dtype::U16 => array!(UInt16Type, |value| value as u16),
        Dtype::U32 => array!(UInt32Type, |value| value as u32),
        Dtype::I32 => array!(Int32Type, |value| value as i32),
        Dtype::F16 => {
            let half = |bits: i64| <<Float16Type as ArrowPrimitiveType>::Native>::from_f32(f32::from_bits(bits as u32));
            array!(Float16Type, half)
        }
        Dtype::F32 => array!(Float32Type, |bits| f32::from_bits(bits as u32)),
        other => unreachable!("no column of type {}", other.name()),
    }
}

fn list(values: ArrayRef, lengths: &[usize], nulls: Option<NullBuffer>, is_large: bool) -> ArrayRef {
    let field = Arc::new(Field::new("item", values.data_type().clone(), true));
    if is_large {
        Arc::new(LargeListArray::new(field, OffsetBuffer::from_lengths(lengths.iter().copied()), values, nulls))
    } else {
        Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(lengths.iter().copied()), values, nulls))
    }
}

/// The documents with the columns `columns` beside them. Null documents have empty lists there.
fn batch(documents: &[Document], columns: &[(&str, Dtype, Dtype)]) -> RecordBatch {
    let ids: Vec<i64> = documents.iter().flatten().flatten().copied().collect();
    let lengths: Vec<usize> = documents.iter().map(|document| document.as_ref().map_or(0, Vec::len)).collect();
    let nulls = NullBuffer::from_iter(documents.iter().map(Option::is_some));
    let tokens = Arc::new(PrimitiveArray::<Int32Type>::from_iter_values(ids.iter().map(|id| *id as i32)));
    let mut arrays = vec![("input_ids", list(tokens, &lengths, Some(nulls), false))];
    for (index, (name, dtype, _)) in columns.iter().enumerate() {
        arrays.push((name, list(numbers(*dtype, name, &ids), &lengths, None, index % 2 == 0)));
    }
    record(arrays)
}

fn record(arrays: Vec<(&str, ArrayRef)>) -> RecordBatch {
    let field = |(name, array): &(&str, ArrayRef)| Field::new(*name, array.data_type().clone(), true);
    let schema = Schema::new(arrays.iter().map(field).collect::<Vec<_>>());
    RecordBatch::try_new(Arc::new(schema), arrays.into_iter().map(|(_, array)| array).collect()).unwrap()
}

fn write(path: &Path, container: Container, documents: &[Document], columns: &[(&str, Dtype, Dtype)], rows: usize) {
    let batches: Vec<_> = documents.chunks(rows).map(|documents| batch(documents, columns)).collect();
    write_batches(path, container, &batches, rows);
}

fn containers() -> [Container; 5] {
    let parquet = |codec, pages| Container::Parquet { codec, encoding: None, pages };
    [
        Container::ArrowFile(None),
        Container::ArrowStream(None),
        Container::ArrowFile(Some(CompressionType::ZSTD)),
        parquet(Compression::UNCOMPRESSED, 1),
        parquet(Compression::ZSTD(ZstdLevel::default()), 2),
    ]
}

fn suffix(container: Container) -> &'static str {
    if matches!(container, Container::Parquet { .. }) { "parquet" } else { "arrow" }
}

/// Shards of documents whose ids count up from 0 over all of them.
fn shards() -> Vec<Vec<Document>> {
    let mut next = 0;
    let mut renumbered = |document: Document| {
        let renumber = |ids: Vec<i64>| {
            let first = next;
            next += ids.len() as i64;
            (first..next).collect::<Vec<i64>>()
        };
        document.map(renumber)
    };
    [(70, 30, 1), (40, 90, 2), (1, 1, 3)]
        .map(|(count, longest, seed)| {
            documents(count, longest, 1 << 20, seed).into_iter().map(&mut renumbered).collect()
        })
        .into()
}

fn check_batch(batch: &Batch, what: &str) {
    for row in 0..batch.rows {
        let ids = batch.row("input_ids", row);
        for (name, ..) in COLUMNS {
            let wanted: Vec<i64> = ids.iter().map(|id| expected(name, *id)).collect();
            assert_eq!(batch.row(name, row), wanted, "{what}: row {row} of `{name}`");
        }
    }
}

#[test]
fn every_value_stands_where_its_token_stands() {
    for container in containers() {
        let folder = tempfile::tempdir().unwrap();
        for (index, documents) in shards().iter().enumerate() {
            write(&folder.path().join(format!("{index}.{}", suffix(container))), container, documents, &COLUMNS, 23);
        }
        for (number, (shuffle, specials)) in
            [(Shuffle::Off, false), (Shuffle::Global, true), (Shuffle::Block, false), (Shuffle::On, true)]
                .into_iter()
                .enumerate()
        {
            let config = Config {
                data: vec![folder.path().to_str().unwrap().to_owned()],
                fields: names(),
                seq_len: 16,
                batch_size: 3,
                shuffle,
                bos_id: specials.then_some(BOS),
                eos_id: specials.then_some(EOS),
                pad_id: PAD,
                remainder: Remainder::Pad,
                chunk_tokens: 64,
                window_tokens: 512,
                lanes: 2,
                block_tokens: [1, 100, 1 << 20, 30][number],
                io: [Io::Mmap, Io::Pread][number % 2],
                num_threads: Some([0, 3][number / 2]),
                ..Config::default()
            };
            let what = format!("{container:?} {shuffle:?} {specials}");
            let loader = Loader::open(config.clone()).unwrap_or_else(|error| panic!("{what}: {}", error.report()));
            let batches = drain(&loader.iter());
            let mut ids = Vec::new();
            for batch in &batches {
                check_batch(batch, &what);
                for (name, _, dtype) in COLUMNS {
                    let array = batch.fields.iter().find(|field| field.name == name).unwrap();
                    assert_eq!((array.dtype, array.shape), (dtype, [3, 16, 1, 1]), "{what} {name}");
                }
                ids.extend((0..batch.rows).flat_map(|row| batch.row("input_ids", row)));
            }
            let mut wanted = stream(&shards(), config.bos_id, config.eos_id);
            ids.retain(|id| *id != i64::from(PAD));
            ids.sort_unstable();
            wanted.sort_unstable();
            assert_eq!(ids, wanted, "{what}: each token once");
            for rank in 0..2 {
                check_batch(&loader.batch_at(1, 1, rank, 2).unwrap(), &what);
            }
        }
    }
}

#[test]
fn labels_and_masks_are_one_token_ahead_where_targets_are_shifted() {
    for container in containers() {
        let folder = tempfile::tempdir().unwrap();
        for (index, documents) in shards().iter().enumerate() {
            write(&folder.path().join(format!("{index}.{}", suffix(container))), container, documents, &COLUMNS, 23);
        }
        let config = Config {
            data: vec![folder.path().to_str().unwrap().to_owned()],
            fields: names(),
            seq_len: 16,
            targets: Targets::Shifted,
            eos_id: Some(EOS),
            ..Config::default()
        };
        let expected_rows = stream(&shards(), None, Some(EOS));
        let batches = drain(&Loader::open(config).unwrap().iter());
        for (row, batch) in expected_rows.windows(17).step_by(16).zip(&batches) {
            assert_eq!(batch.row("x", 0), row[..16]);
            for (name, ..) in COLUMNS {
                let (array, ids) = match name {
                    "labels" => ("y", &row[1..]),
                    "loss_mask" | "weights" => (name, &row[1..]),
                    _ => (name, &row[..16]),
                };
                let wanted: Vec<i64> = ids.iter().map(|id| expected(name, *id)).collect();
                assert_eq!(batch.row(array, 0), wanted, "{container:?} {name}");
            }
        }
        assert_eq!(batches.len(), (expected_rows.len() - 1) / 16);
    }
}

#[test]
fn a_source_without_labels_masks_or_weights_gets_those_of_plain_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let all = shards();
    let container = containers()[4];
    write(&folder.path().join("a.parquet"), container, &all[0], &COLUMNS[..3], 23);
    write(&folder.path().join("b.parquet"), container, &all[1], &[], 23);
    let mixture = |fields: &[&str]| Config {
        mixture: Some(format!(
            r#"{{"sources": [{{"name": "a", "data": "{0}/a.parquet", "weight": 1}},
                            {{"name": "b", "data": "{0}/b.parquet", "weight": 1}}]}}"#,
            folder.path().display()
        )),
        fields: fields.iter().map(|name| (*name).to_owned()).collect(),
        seq_len: 16,
        lanes: 1,
        shuffle: Shuffle::On,
        eos_id: Some(EOS),
        max_steps: Some(60),
        ..Config::default()
    };
    let first_of_b = all[1].iter().flatten().flatten().next().copied().unwrap();
    let loader = Loader::open(mixture(&["labels", "loss_mask", "weights"])).unwrap();
    let mut of_b = 0;
    for batch in drain(&loader.iter()) {
        let ids = batch.row("input_ids", 0);
        let is_b = ids.iter().any(|id| (first_of_b..i64::from(BOS)).contains(id));
        of_b += u32::from(is_b);
        let one = i64::from(1f32.to_bits());
        for (name, derived) in [("labels", None), ("loss_mask", Some(1)), ("weights", Some(one))] {
            let wanted = ids.iter().map(|id| if is_b { derived.unwrap_or(*id) } else { expected(name, *id) });
            assert_eq!(batch.row(name, 0), wanted.collect::<Vec<_>>(), "{name}");
        }
    }
    assert!(of_b > 10);

    let error = Loader::open(mixture(&["a"])).unwrap_err();
    assert!(error.to_string().contains("column `a` of source `a` is missing"), "{error}");
}

/// A corpus of one shard whose column `labels` is `labels`, beside four documents.
fn misfit(folder: &Path, container: Container, labels: ArrayRef) -> Config {
    let tokens = Arc::new(PrimitiveArray::<Int32Type>::from_iter_values(0..12));
    let batch = record(vec![("input_ids", list(tokens, &[3, 0, 5, 4], None, false)), ("labels", labels)]);
    let path = folder.join(format!("x.{}", suffix(container)));
    write_batches(&path, container, &[batch], 100);
    Config {
        data: vec![path.to_str().unwrap().to_owned()],
        fields: vec!["labels".to_owned()],
        seq_len: 4,
        ..Config::default()
    }
}

#[test]
fn a_column_that_does_not_fit_its_tokens_is_refused_with_file_and_row() {
    let labels = |count: i32| Arc::new(PrimitiveArray::<Int32Type>::from_iter_values(0..count)) as ArrayRef;
    let null_at = |at: usize| {
        let values = (0..12).map(|index| (index != at).then_some(index as i32));
        Arc::new(PrimitiveArray::<Int32Type>::from_iter(values)) as ArrayRef
    };
    let null_list = |row: usize| Some(NullBuffer::from_iter((0..4).map(|index| index != row)));
    let cases = [
        ("one value less", list(labels(11), &[3, 0, 4, 4], None, false), 2),
        ("one value more", list(labels(13), &[3, 1, 5, 4], None, true), 1),
        ("one row less", list(labels(8), &[3, 0, 5, 0], None, false), 3),
        ("other lengths, the same sum", list(labels(12), &[3, 0, 4, 5], None, true), 2),
        ("values of an empty row", list(labels(12), &[2, 1, 5, 4], None, false), 0),
        ("a null value", list(null_at(4), &[3, 0, 5, 4], None, false), 2),
        ("a null list", list(labels(12), &[3, 0, 5, 4], null_list(1), false), 1),
        ("a null list of values", list(labels(8), &[3, 0, 5, 0], null_list(3), true), 3),
    ];
    for container in containers() {
        for (what, labels, row) in &cases {
            let folder = tempfile::tempdir().unwrap();
            let config = misfit(folder.path(), container, Arc::clone(labels));
            let what = format!("{what} in {container:?}");
            let error = match Loader::open(config) {
                Err(error) => error,
                Ok(loader) => {
                    let batches = loader.iter();
                    let take = |_| batches.next_timeout(std::time::Duration::from_secs(60)).err();
                    (0..4).find_map(take).unwrap_or_else(|| panic!("{what}: no error"))
                }
            };
            assert_eq!(error.kind(), ErrorKind::Data, "{what}");
            let location = error.location().unwrap_or_else(|| panic!("{what}: {error} has no place"));
            assert!(location.path.starts_with(folder.path()), "{what}: {error}");
            assert_eq!(location.row, Some(*row), "{what}: {error}");
            assert!(error.to_string().contains("`labels`"), "{what}: {error}");
        }
    }
}

#[test]
fn types_and_names_that_no_field_has_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for container in containers() {
        let texts = Arc::new(arrow_array::StringArray::from_iter_values((0..12).map(|index| format!("{index}"))));
        let config = misfit(folder.path(), container, list(texts, &[3, 0, 5, 4], None, false));
        let error = Loader::open(config.clone()).unwrap_err().to_string();
        assert!(error.contains("column `labels`") && error.contains("float16, float32 or float64"), "{error}");
        let error = Loader::open(Config { fields: vec!["mask".to_owned()], ..config }).unwrap_err().to_string();
        assert!(error.contains("column `mask` of `fields` is missing: the file has `input_ids`, `labels`"), "{error}");
    }
}

#[test]
fn a_saved_position_belongs_to_its_fields() {
    let folder = tempfile::tempdir().unwrap();
    let container = containers()[0];
    write(&folder.path().join("a.arrow"), container, &shards()[0], &COLUMNS, 23);
    let of = |fields: &[&str]| {
        let fields = fields.iter().map(|name| (*name).to_owned()).collect();
        let data = vec![folder.path().to_str().unwrap().to_owned()];
        Loader::open(Config { data, fields, seq_len: 16, ..Config::default() }).unwrap()
    };
    let [plain, with_labels] = [of(&[]), of(&["labels"])];
    assert_ne!(plain.corpus().fingerprint(), with_labels.corpus().fingerprint());
    with_labels.load_state(&with_labels.state()).unwrap();
    let error = with_labels.load_state(&plain.state()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State);
    assert!(error.to_string().contains("`fields` was `none` when saved and is `labels` now"), "{error}");
}

#[test]
fn a_saved_index_knows_the_fields() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("corpus");
    std::fs::create_dir(&corpus).unwrap();
    for container in [containers()[0], containers()[4]] {
        for (index, documents) in shards().iter().enumerate() {
            write(&corpus.join(format!("{index}.{}", suffix(container))), container, documents, &COLUMNS, 23);
        }
        let config = Config {
            data: vec![corpus.join(format!("*.{}", suffix(container))).to_str().unwrap().to_owned()],
            fields: names(),
            seq_len: 16,
            cache_dir: Some(folder.path().join("index").to_str().unwrap().to_owned()),
            ..Config::default()
        };
        let first = Loader::open(config.clone()).unwrap();
        let again = Loader::open(config).unwrap();
        assert_eq!(again.corpus().open_shards().count(), 0, "no shard is opened before it is read");
        assert_eq!(first.corpus().fingerprint(), again.corpus().fingerprint());
        drain(&again.iter()).iter().for_each(|batch| check_batch(batch, "with an index"));
    }
}

#[test]
fn shards_of_one_corpus_agree_on_the_types_of_fields() {
    let folder = tempfile::tempdir().unwrap();
    let container = containers()[0];
    let all = shards();
    write(&folder.path().join("a.arrow"), container, &all[0], &[("a", Dtype::I8, Dtype::I8)], 23);
    write(&folder.path().join("b.arrow"), container, &all[1], &[("a", Dtype::I16, Dtype::I16)], 23);
    let data = vec![folder.path().to_str().unwrap().to_owned()];
    let error = Loader::open(Config { data, fields: vec!["a".to_owned()], ..Config::default() }).unwrap_err();
    assert!(error.to_string().contains("differ between shards"), "{error}");
}
