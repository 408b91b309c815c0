//! Tests that `verify` and `rewrite` take the column that a loader takes.
//!
//! Other columns stand beside it in the file.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{MapBuilder, StringBuilder, StringViewBuilder};
use arrow_array::types::Int32Type;
use arrow_array::{
    Array, ArrayRef, DictionaryArray, Int32Array, LargeListArray, ListArray, NullArray, RecordBatch, RunArray,
    StructArray,
};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use arrow_schema::{Field, Fields, Schema};
use forebay::settings::environment::Environment;
use forebay::settings::{Config, Remainder};
use forebay::{Loader, Result};
use forebay_tests::{drain, rows};
use parquet::basic::{LogicalType, Repetition, Type as Physical};
use parquet::data_type::Int32Type as ParquetInt32;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::{Type, TypePtr};
use proptest::prelude::*;
use serde_json::Value;

fn run(args: &[&str]) -> (u8, String) {
    let args: Vec<OsString> = ["forebay"].iter().chain(args).map(OsString::from).collect();
    let env = Environment::from_pairs([("FOREBAY_PROGRESS", "0")]);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = forebay_cli::run(&args, &env, &mut out, &mut err);
    (status, String::from_utf8([out, err].concat()).unwrap())
}

/// The stream of tokens that a loader delivers.
fn loaded(path: &Path) -> Result<Vec<i64>> {
    let loader = Loader::open(Config {
        data: vec![path.to_str().unwrap().to_owned()],
        seq_len: 1,
        batch_size: 64,
        remainder: Remainder::Short,
        num_threads: Some(0),
        ..Config::default()
    })?;
    Ok(rows(&drain(&loader.iter()), "input_ids").concat())
}

/// Holds each command that reads files by arrow-rs to the documents that were written.
fn commands_take_the_documents(path: &Path, documents: &[Vec<i32>]) {
    let expected: Vec<i64> = documents.iter().flatten().map(|id| i64::from(*id)).collect();
    assert_eq!(loaded(path).unwrap(), expected);
    let text = path.to_str().unwrap();
    for io in ["io=auto", "io=pread"] {
        let (status, said) = run(&["verify", text, "--seq-len", "1", "--batch-size", "1", "--json", "--set", io]);
        let json: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}"));
        assert_eq!((status, &json["proven"]), (0, &true.into()), "{json}");
        let target = path.with_extension(io);
        let (status, said) = run(&["rewrite", text, target.to_str().unwrap(), "--json", "--set", io]);
        let json: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}"));
        assert_eq!((status, &json["rows"]), (0, &documents.len().into()), "{json}");
        assert_eq!(loaded(&target).unwrap(), expected, "{json}");
        let left_out = json["left_out"].as_array().unwrap();
        assert!(!left_out.contains(&"input_ids".into()), "{json}");
    }
}

/// A column of a Parquet file: its name and its content.
#[derive(Clone, Debug)]
enum Column {
    Tokens,
    Number(&'static str),
    Repeated(&'static str),
    Empty(&'static str),
    Struct(&'static str, Vec<Column>),
    Map(&'static str),
}

fn required(name: &str, repetition: Repetition) -> TypePtr {
    Arc::new(Type::primitive_type_builder(name, Physical::INT32).with_repetition(repetition).build().unwrap())
}

fn group(name: &str, repetition: Repetition, fields: Vec<TypePtr>, kind: Option<LogicalType>) -> TypePtr {
    let builder = Type::group_type_builder(name).with_repetition(repetition).with_fields(fields);
    Arc::new(builder.with_logical_type(kind).build().unwrap())
}

impl Column {
    fn schema(&self) -> TypePtr {
        const REPEATED: Repetition = Repetition::REPEATED;
        const REQUIRED: Repetition = Repetition::REQUIRED;
        match self {
            Self::Tokens => {
                let list = group("list", REPEATED, vec![required("element", REQUIRED)], None);
                group("input_ids", REQUIRED, vec![list], Some(LogicalType::List))
            }
            Self::Number(name) => required(name, REQUIRED),
            Self::Repeated(name) => required(name, REPEATED),
            Self::Empty(name) => group(name, REQUIRED, Vec::new(), None),
            Self::Struct(name, fields) => group(name, REQUIRED, fields.iter().map(Self::schema).collect(), None),
            Self::Map(name) => {
                let pair = vec![required("key", REQUIRED), required("value", REQUIRED)];
                group(name, REQUIRED, vec![group("key_value", REPEATED, pair, None)], Some(LogicalType::Map))
            }
        }
    }

    /// Whether each of its leaves holds the documents, something repeated, or a number for each
    /// row.
    fn leaves(&self, all: &mut Vec<Leaf>) {
        match self {
            Self::Tokens => all.push(Leaf::Tokens),
            Self::Number(_) => all.push(Leaf::Number),
            Self::Repeated(_) => all.push(Leaf::Repeated),
            Self::Empty(_) => {}
            Self::Struct(_, fields) => fields.iter().for_each(|field| field.leaves(all)),
            Self::Map(_) => all.extend([Leaf::Repeated, Leaf::Repeated]),
        }
    }
}

enum Leaf {
    Tokens,
    Number,
    Repeated,
}

/// Writes columns through the lowest layer of the parquet crate, which takes any schema.
fn write_parquet(path: &Path, columns: &[Column], documents: &[Vec<i32>]) {
    let fields = columns.iter().map(Column::schema).collect();
    let schema = Arc::new(Type::group_type_builder("schema").with_fields(fields).build().unwrap());
    let mut leaves = Vec::new();
    columns.iter().for_each(|column| column.leaves(&mut leaves));
    let properties = Arc::new(WriterProperties::default());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    let half = documents.len().div_ceil(2).max(1);
    for documents in documents.chunks(half) {
        let mut group = writer.next_row_group().unwrap();
        for leaf in &leaves {
            let mut column = group.next_column().unwrap().unwrap();
            let typed = column.typed::<ParquetInt32>();
            // None of the other columns has an id of a document.
            let lists: Vec<Vec<i32>> = match leaf {
                Leaf::Tokens => documents.to_vec(),
                Leaf::Number => documents.iter().map(|_| vec![-1]).collect(),
                Leaf::Repeated => documents.iter().map(|ids| vec![-2; ids.len() % 3]).collect(),
            };
            let levels = |of: fn(usize) -> i16, empty: i16| -> Vec<i16> {
                let list = |list: &Vec<i32>| match list.len() {
                    0 => vec![empty],
                    len => (0..len).map(of).collect(),
                };
                lists.iter().flat_map(list).collect()
            };
            let (definition, repetition) = (levels(|_| 1, 0), levels(|at| i16::from(at > 0), 0));
            match leaf {
                Leaf::Number => typed.write_batch(&lists.concat(), None, None),
                _ => typed.write_batch(&lists.concat(), Some(&definition), Some(&repetition)),
            }
            .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn documents() -> Vec<Vec<i32>> {
    vec![vec![10, 11, 12], vec![], vec![13, 14], vec![15], vec![16, 17, 18, 19]]
}

#[test]
fn groups_without_columns_shift_nothing() {
    let root = tempfile::tempdir().unwrap();
    let other = || Column::Repeated("other");
    for (name, columns) in [
        ("first", vec![Column::Empty("nothing"), Column::Tokens]),
        ("before", vec![Column::Empty("nothing"), other(), Column::Tokens]),
        ("between", vec![other(), Column::Empty("nothing"), Column::Tokens, other()]),
        ("after", vec![other(), Column::Tokens, Column::Empty("nothing")]),
        ("two", vec![Column::Empty("a"), other(), Column::Empty("b"), Column::Tokens, Column::Number("n")]),
        (
            "inside",
            vec![Column::Struct("deep", vec![Column::Empty("a"), Column::Number("n")]), Column::Tokens, other()],
        ),
        ("only", vec![Column::Struct("deep", vec![Column::Empty("a")]), other(), Column::Tokens]),
    ] {
        let path = root.path().join(name);
        write_parquet(&path, &columns, &documents());
        commands_take_the_documents(&path, &documents());
    }
}

#[test]
fn names_that_come_twice_are_no_other_column() {
    let root = tempfile::tempdir().unwrap();
    let twin = || Column::Struct("meta", vec![Column::Repeated("input_ids"), Column::Number("tokens")]);
    for (name, columns) in [
        ("nested", vec![twin(), Column::Tokens]),
        ("dotted", vec![Column::Repeated("meta.input_ids"), twin(), Column::Tokens]),
        ("path", vec![Column::Repeated("input_ids.list.element"), Column::Tokens]),
        ("twice", vec![Column::Repeated("other"), Column::Number("other"), Column::Tokens, Column::Number("other")]),
        ("map", vec![Column::Map("input_id"), Column::Map("map"), Column::Tokens]),
        ("second choice", vec![Column::Repeated("tokens"), Column::Tokens, Column::Number("ids")]),
    ] {
        let path = root.path().join(name);
        write_parquet(&path, &columns, &documents());
        commands_take_the_documents(&path, &documents());
    }
}

/// A file of one writer whose metadata for Arrow describes a schema that it does not have.
#[test]
fn what_the_metadata_says_of_other_columns_does_no_harm() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("stale");
    let batch = RecordBatch::try_from_iter([("input_ids", list(&documents())), ("more", numbers(5))]).unwrap();
    let mut stale = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    stale.write(&batch).unwrap();
    let stale = stale.close().unwrap();
    let said = stale.file_metadata().key_value_metadata().unwrap().clone();
    let properties = Arc::new(WriterProperties::builder().set_key_value_metadata(Some(said)).build());
    let columns = [Column::Number("one"), Column::Empty("two"), Column::Tokens];
    let fields = columns.iter().map(Column::schema).collect();
    let schema = Arc::new(Type::group_type_builder("schema").with_fields(fields).build().unwrap());
    let writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, properties).unwrap();
    writer.close().unwrap();
    assert_eq!(loaded(&path).unwrap(), Vec::<i64>::new());
    let (status, said) = run(&["rewrite", path.to_str().unwrap(), root.path().join("new").to_str().unwrap()]);
    assert_eq!(status, 0, "{said}");
}

fn list(documents: &[Vec<i32>]) -> ArrayRef {
    let lists = documents.iter().map(|ids| Some(ids.iter().map(|id| Some(*id))));
    Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(lists))
}

fn numbers(count: usize) -> ArrayRef {
    Arc::new(Int32Array::from(vec![-1; count]))
}

/// Columns of Arrow types that take other numbers of buffers than a list does.
fn unusual(count: usize) -> Vec<(&'static str, ArrayRef)> {
    let no_fields: ArrayRef = Arc::new(StructArray::new_empty_fields(count, None));
    let mut maps = MapBuilder::new(None, StringBuilder::new(), StringBuilder::new());
    let mut views = StringViewBuilder::new();
    for row in 0..count {
        maps.keys().append_value("key");
        maps.values().append_value("value");
        maps.append(true).unwrap();
        views.append_value(format!("a text that is too long to be inlined, {row}"));
    }
    let inner = ("input_ids", numbers(count));
    let fields: Fields = vec![Field::new(inner.0, inner.1.data_type().clone(), true)].into();
    let twin: ArrayRef = Arc::new(StructArray::new(fields, vec![inner.1], None));
    let lists = (0..count).map(|_| Some([Some(-3)]));
    let ends = Int32Array::from_iter_values(1..=count as i32);
    vec![
        ("nothing", no_fields),
        ("map", Arc::new(maps.finish())),
        ("view", Arc::new(views.finish())),
        ("meta", twin),
        ("large", Arc::new(LargeListArray::from_iter_primitive::<Int32Type, _, _>(lists))),
        ("word", Arc::new((0..count).map(|_| Some("word")).collect::<DictionaryArray<Int32Type>>())),
        ("null", Arc::new(NullArray::new(count))),
        ("runs", Arc::new(RunArray::try_new(&ends, &numbers(count)).unwrap())),
    ]
}

fn arrow_files(folder: &Path, columns: &[(&str, ArrayRef)]) -> Vec<std::path::PathBuf> {
    let fields = columns.iter().map(|(name, column)| Field::new(*name, column.data_type().clone(), true));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let arrays = columns.iter().map(|(_, column)| column.clone()).collect();
    let batch = RecordBatch::try_new(Arc::clone(&schema), arrays).unwrap();
    let mut paths = Vec::new();
    for codec in [None, Some(CompressionType::ZSTD)] {
        let options = || IpcWriteOptions::default().try_with_compression(codec).unwrap();
        let path = folder.join(format!("file-{}", codec.is_some()));
        let mut writer = FileWriter::try_new_with_options(File::create(&path).unwrap(), &schema, options()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        paths.push(path);
        let path = folder.join(format!("stream-{}", codec.is_some()));
        let mut writer = StreamWriter::try_new_with_options(File::create(&path).unwrap(), &schema, options()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        paths.push(path);
    }
    paths
}

#[test]
fn columns_of_arrow_before_the_tokens_are_passed_over() {
    let documents = documents();
    for (name, other) in unusual(documents.len()) {
        let root = tempfile::tempdir().unwrap();
        let columns = [(name, other), ("input_ids", list(&documents)), ("more", numbers(documents.len()))];
        for path in arrow_files(root.path(), &columns) {
            commands_take_the_documents(&path, &documents);
        }
    }
}

fn any_column() -> impl Strategy<Value = Column> {
    let name = || prop::sample::select(vec!["a", "b", "a.b", "meta", "token", "text"]);
    let leaf = prop_oneof![
        name().prop_map(Column::Number),
        name().prop_map(Column::Repeated),
        name().prop_map(Column::Empty),
        name().prop_map(Column::Map),
    ];
    leaf.prop_recursive(3, 8, 3, move |inner| {
        (name(), prop::collection::vec(inner, 0..3)).prop_map(|(name, fields)| Column::Struct(name, fields))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn any_schema_around_the_tokens_gives_the_tokens(
        before in prop::collection::vec(any_column(), 0..4),
        after in prop::collection::vec(any_column(), 0..3),
        lengths in prop::collection::vec(0_usize..6, 1..9),
    ) {
        let mut next = 0;
        let mut documents: Vec<Vec<i32>> = Vec::new();
        for length in lengths {
            documents.push((next..next + length as i32).collect());
            next += length as i32;
        }
        // A corpus without a token has nothing to prove.
        documents.push(vec![next]);
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.parquet");
        let columns: Vec<Column> = before.into_iter().chain([Column::Tokens]).chain(after).collect();
        write_parquet(&path, &columns, &documents);
        commands_take_the_documents(&path, &documents);
    }
}
