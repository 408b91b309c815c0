//! Tests that a rewritten corpus gives the same batches as its source, after any kill.
//!
//! `check` has nothing to say against it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arrow_array::types::Int32Type;
use arrow_array::{ArrayRef, Int32Array, ListArray, RecordBatch};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::FileWriter;
use forebay::settings::Shuffle;
use forebay::settings::environment::Environment;
use forebay::tokens::Dtype;
use forebay::{Config, Loader};
use forebay_tests::{Container, Document, Shape, containers, documents, drain, rows, write};
use parquet::basic::Compression;
use proptest::prelude::*;
use serde_json::Value;

struct Ran {
    status: u8,
    out: String,
    err: String,
}

fn run(args: &[&str]) -> Ran {
    let args: Vec<OsString> = ["forebay"].iter().chain(args).map(OsString::from).collect();
    let env = Environment::from_pairs([("FOREBAY_PROGRESS", "0")]);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = forebay_cli::run(&args, &env, &mut out, &mut err);
    Ran { status, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
}

fn sound(args: &[&str]) -> Value {
    let ran = run(args);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""), "{args:?}: {}", ran.out);
    serde_json::from_str(&ran.out).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

const PLAIN: Container =
    Container::Parquet { codec: Compression::SNAPPY, encoding: Some(parquet::basic::Encoding::PLAIN), pages: 1 };

/// Every row of a shuffled epoch, with the specials that show where documents end.
fn delivered(folder: &Path, shuffle: Shuffle) -> Vec<Vec<i64>> {
    let config = Config {
        data: vec![text(folder).to_owned()],
        seq_len: 7,
        batch_size: 3,
        bos_id: Some(1_000_001),
        eos_id: Some(1_000_002),
        shuffle,
        chunk_tokens: 70,
        window_tokens: 280,
        lanes: 2,
        remainder: forebay::settings::Remainder::Pad,
        num_threads: Some(2),
        ..Config::default()
    };
    let loader = Loader::open(config).unwrap();
    rows(&drain(&loader.iter()), "input_ids")
}

fn same_batches(source: &Path, result: &Path) {
    for shuffle in [Shuffle::Off, Shuffle::Global, Shuffle::Block] {
        let expected = delivered(source, shuffle);
        assert!(!expected.is_empty());
        assert_eq!(delivered(result, shuffle), expected, "{shuffle:?}");
    }
}

/// Names and contents of the shards in `folder`.
fn shards(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut shards: Vec<_> = entries
        .filter(|path| path.extension().is_some_and(|suffix| suffix == "arrow" || suffix == "parquet"))
        // A file that is being written is no shard yet.
        .filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.'))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    shards.sort();
    shards
}

#[test]
fn every_format_becomes_fast_and_gives_the_same_batches() {
    let written = [documents(120, 40, 50_000, 1), documents(30, 40, 50_000, 2), vec![None, Some(Vec::new())]];
    for (index, container) in containers().into_iter().enumerate() {
        let root = tempfile::tempdir().unwrap();
        let (source, result) = (root.path().join("source"), root.path().join("result"));
        std::fs::create_dir(&source).unwrap();
        let shape = if index % 2 == 0 { Shape::List } else { Shape::LargeList };
        for (number, documents) in written.iter().enumerate() {
            let suffix = if matches!(container, Container::Parquet { .. }) { "parquet" } else { "arrow" };
            write(&source.join(format!("{number}.{suffix}")), container, Dtype::I32, shape, documents, 17);
        }
        let to: &[&str] = match index % 3 {
            0 => &["--to", "arrow"],
            1 => &["--to", "parquet", "--shard-tokens", "900", "--encoding", "byte-stream-split"],
            _ => &["--shard-tokens", "500", "--set", "io=pread"],
        };
        let io = if index % 5 == 0 { "io=pread" } else { "io=auto" };
        let json = sound(&[&["rewrite", text(&source), text(&result), "--json", "--set", io], to].concat());
        let all: Vec<_> = written.iter().flatten().collect();
        let filled = || all.iter().filter_map(|document| document.as_ref()).filter(|ids| !ids.is_empty());
        assert_eq!(json["rows"], all.len(), "{container:?}: empty documents are kept");
        assert_eq!(json["documents"], filled().count());
        assert_eq!(json["tokens"], filled().map(Vec::len).sum::<usize>());
        assert_eq!(json["dtype"], "uint16");
        assert_eq!(json["left_out"], serde_json::json!(["text"]));
        assert!(json["shards"].as_u64().unwrap() >= if to.len() > 2 { 3 } else { 1 }, "{json}");
        same_batches(&source, &result);
        let check = sound(&["check", text(&result), "--json"]);
        assert_eq!((&check["advice"], &check["rows"]), (&serde_json::json!([]), &json["rows"]), "{container:?}");
        let access = if to.contains(&"parquet") { "decoded by blocks" } else { "read in place" };
        assert_eq!(check["access"][access], json["shards"]);
    }
}

#[test]
fn sources_that_no_loader_takes_together_become_one_corpus() {
    let root = tempfile::tempdir().unwrap();
    let [a, b, c, result] = ["a.parquet", "b.arrow", "c.arrow", "result"].map(|name| root.path().join(name));
    let parts = [documents(40, 30, 200, 1), documents(40, 30, 200, 2), documents(40, 30, 200, 3)];
    write(&a, PLAIN, Dtype::I64, Shape::List, &parts[0], 9);
    write(&b, Container::ArrowFile(Some(CompressionType::ZSTD)), Dtype::I32, Shape::LargeList, &parts[1], 9);
    write(&c, Container::ArrowStream(None), Dtype::U16, Shape::List, &parts[2], 9);
    assert_eq!(run(&["check", text(root.path())]).status, 1);
    let json = sound(&["rewrite", text(&a), text(&b), text(&c), text(&result), "--json"]);
    assert_eq!((&json["dtype"], &json["shards"]), (&"uint8".into(), &1.into()));
    let one = root.path().join("one");
    std::fs::create_dir(&one).unwrap();
    write(&one.join("x.parquet"), PLAIN, Dtype::I32, Shape::List, &parts.concat(), 50);
    same_batches(&one, &result);
}

#[test]
fn a_plain_column_stays_one_document() {
    let root = tempfile::tempdir().unwrap();
    let (source, result) = (root.path().join("source"), root.path().join("result"));
    std::fs::create_dir(&source).unwrap();
    let plain = |name: &str, column: ArrayRef| {
        let batch = RecordBatch::try_from_iter([("tokens", column)]).unwrap();
        let mut writer = FileWriter::try_new(File::create(source.join(name)).unwrap(), &batch.schema()).unwrap();
        (0..3).for_each(|_| writer.write(&batch).unwrap());
        writer.finish().unwrap();
    };
    plain("a.arrow", Arc::new(Int32Array::from_iter_values(0..1000)));
    plain("b.arrow", Arc::new(Int32Array::from_iter_values(500..900)));
    for to in ["arrow", "parquet"] {
        let result = result.join(to);
        let args = ["rewrite", text(&source), text(&result), "--json", "--shard-tokens", "64", "--to", to];
        let json = sound(&args);
        assert_eq!((&json["shards"], &json["documents"], &json["tokens"]), (&2.into(), &2.into(), &4200.into()));
        same_batches(&source, &result);
    }
}

#[test]
fn a_killed_run_is_continued() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("source");
    std::fs::create_dir(&source).unwrap();
    write(&source.join("a.parquet"), PLAIN, Dtype::I32, Shape::List, &documents(3000, 60, 50_000, 1), 100);
    write(&source.join("b.parquet"), PLAIN, Dtype::I32, Shape::List, &documents(900, 60, 50_000, 2), 100);
    for to in ["arrow", "parquet"] {
        let [whole, killed] = ["whole", "killed"].map(|name| root.path().join(format!("{name}-{to}")));
        let args = |result: &Path| -> Vec<String> {
            let options = ["--json", "--shard-tokens", "2000", "--to", to, "--set", "num_threads=2"];
            ["rewrite", text(&source), text(result)].into_iter().chain(options).map(str::to_owned).collect()
        };
        let strings = args(&whole);
        let expected = sound(&strings.iter().map(String::as_str).collect::<Vec<_>>());
        let most = expected["shards"].as_u64().unwrap() as usize;
        assert!(most > 50, "{expected}");
        // Each start is killed a little later than the one before.
        let mut kept = 0;
        for more in [1, 7, 20] {
            let mut child = Command::new(env!("CARGO_BIN_EXE_forebay"))
                .args(args(&killed))
                .env("FOREBAY_PROGRESS", "0")
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            while shards(&killed).len() < kept + more && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            child.kill().unwrap();
            child.wait().unwrap();
            let now = shards(&killed).len();
            assert!(now >= kept + more && now < most, "{now} of {most}: killed in the middle");
            kept = now;
            for data in [text(&killed), &format!("{}/tokens-*", text(&killed))] {
                let ran = run(&["check", data]);
                assert_eq!(ran.status, 1, "{}", ran.out);
                assert!(ran.err.contains("not complete") && ran.err.contains("again"), "{data}: {}", ran.err);
            }
        }
        // One that is lost in between is written again, and no other.
        std::fs::remove_file(killed.join(&shards(&killed)[1].0)).unwrap();
        let strings = args(&killed);
        let strings: Vec<_> = strings.iter().map(String::as_str).collect();
        let json = sound(&strings);
        assert_eq!(json["kept"], kept - 1);
        assert_eq!(shards(&killed), shards(&whole), "byte by byte");
        same_batches(&source, &killed);
        let again = sound(&strings);
        assert_eq!((&again["kept"], &again["tokens"]), (&expected["shards"], &expected["tokens"]));
        let hidden: Vec<_> = std::fs::read_dir(&killed)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| !name.starts_with("tokens-"))
            .collect();
        assert_eq!(hidden, ["_forebay_rewrite.jsonl"]);
    }
}

/// A source of one file, and a place for the result.
fn one_file(documents: &[Document]) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let (source, result) = (root.path().join("source"), root.path().join("result"));
    std::fs::create_dir(&source).unwrap();
    write(&source.join("a.parquet"), PLAIN, Dtype::I64, Shape::List, documents, 50);
    (root, source, result)
}

#[test]
fn what_would_harm_is_refused() {
    let (root, source, result) = one_file(&documents(200, 30, 70_000, 1));
    let refused = |args: &[&str], status: u8, words: &[&str]| {
        let ran = run(&[&["rewrite"], args].concat());
        assert_eq!((ran.status, ran.out.as_str()), (status, ""), "{args:?}: {}", ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{args:?}: `{word}` in {}", ran.err);
        }
    };
    let inside = source.join("deep/result");
    refused(&[text(&source), text(&inside)], 2, &["inside of", "outside of it"]);
    let pattern = format!("{}/*/*.parquet", text(root.path()));
    refused(&[&pattern, text(&result)], 2, &["inside of"]);
    refused(&[text(&source), text(&source)], 2, &["inside of"]);
    let other = root.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.tex"), "x").unwrap();
    refused(&[text(&source), text(&other)], 2, &["not empty", "thesis.tex"]);
    refused(&[text(&source)], 2, &["Usage", "<DST>"]);
    refused(&[text(&source), text(&result), "--shard-tokens", "0"], 2, &["from 1 to 2^48"]);
    assert!(!inside.exists() && !result.exists());

    // Without a half file under a final name.
    refused(
        &[text(&source), text(&result), "--dtype", "uint8"],
        1,
        &["token id 256 does not fit uint8", "a.parquet", "row"],
    );
    assert_eq!(shards(&result), []);
    // Nothing of it is there, so that what the message says to do can be done.
    sound(&["rewrite", text(&source), text(&result), "--dtype", "int32", "--json"]);
    refused(&[text(&source), text(&result), "--dtype", "int64"], 1, &["`--dtype`", "\"int32\"", "\"int64\""]);
    std::fs::remove_dir_all(&result).unwrap();

    let args = ["rewrite", text(&source), text(&result), "--json", "--shard-tokens", "500"];
    assert_eq!(sound(&args)["dtype"], if documents_exceed_u16(&source) { "int32" } else { "uint16" });
    refused(
        &[text(&source), text(&result)],
        1,
        &["`--shard-tokens`", "\"500\"", "\"268435456\"", "name another folder"],
    );
    write(&source.join("a.parquet"), PLAIN, Dtype::I64, Shape::List, &documents(201, 30, 70_000, 1), 50);
    refused(&args[1..], 1, &["source", "a.parquet", "its size was", "name another folder"]);
    let stray = result.join("stray.arrow");
    std::fs::write(&stray, "x").unwrap();
    write(&source.join("b.parquet"), PLAIN, Dtype::I64, Shape::List, &documents(9, 30, 70_000, 1), 50);
    refused(&args[1..], 1, &["number of source shards was 1", "is 2"]);
}

fn documents_exceed_u16(source: &Path) -> bool {
    delivered(source, Shuffle::Off).iter().flatten().any(|id| *id > 65535 && *id < 1_000_000)
}

#[test]
fn what_others_put_into_the_folder_is_not_taken_for_a_shard() {
    let (_root, source, result) = one_file(&documents(200, 30, 70_000, 1));
    let args = ["rewrite", text(&source), text(&result), "--json"];
    sound(&args);
    std::fs::write(result.join("stray.arrow"), "x").unwrap();
    let ran = run(&args);
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("stray.arrow") && ran.err.contains("did not write"), "{}", ran.err);
}

#[test]
fn a_full_disk_leaves_no_half_shard_and_can_be_mended() {
    let (_root, source, result) = one_file(&documents(2000, 60, 70_000, 1));
    // A limit on the size of files stands for the full disk: the write fails the same way.
    let script = "trap '' XFSZ; ulimit -f 16; exec \"$@\"";
    let limited = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_forebay"), "rewrite", text(&source), text(&result)])
        .env("FOREBAY_PROGRESS", "0")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&limited.stderr);
    assert_eq!(limited.status.code(), Some(1), "{err}");
    assert!(
        err.contains("cannot write shard") && err.contains("tokens-00000-000.arrow") && err.contains("large"),
        "{err}"
    );
    let left: Vec<_> = std::fs::read_dir(&result).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["_forebay_rewrite.jsonl"]);
    sound(&["rewrite", text(&source), text(&result), "--json"]);
    same_batches(&source, &result);
}

#[test]
fn a_damaged_source_is_named_and_what_is_whole_stays() {
    let root = tempfile::tempdir().unwrap();
    let (source, result) = (root.path().join("source"), root.path().join("result"));
    std::fs::create_dir(&source).unwrap();
    let sound_shard = source.join("a.arrow");
    write(&sound_shard, Container::ArrowFile(None), Dtype::U16, Shape::List, &documents(300, 30, 500, 1), 40);
    let path = source.join("b.arrow");
    let ids = (0..5000).map(|id| Some(if id == 4321 { -7 } else { id }));
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([Some(ids)]);
    let negative = RecordBatch::try_from_iter([("input_ids", Arc::new(lists) as ArrayRef)]).unwrap();
    let mut writer = FileWriter::try_new(File::create(&path).unwrap(), &negative.schema()).unwrap();
    writer.write(&negative).unwrap();
    writer.finish().unwrap();
    let mut args = vec!["rewrite", text(&source), text(&result), "--dtype", "int32", "--set", "num_threads=1"];
    args.extend(["--shard-tokens", "1000"]);
    let ran = run(&args);
    assert_eq!(ran.status, 1);
    assert!(ran.err.contains("found -7") && ran.err.contains("b.arrow"), "{}", ran.err);
    assert!(!shards(&result).is_empty(), "what was written before the damage stays");
    assert_eq!(run(&args).status, 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_of_documents_survives(
        lengths in prop::collection::vec(prop::collection::vec(prop_oneof![Just(None), (0_usize..3).prop_map(Some), (0_usize..200).prop_map(Some)], 1..30), 1..5),
        shard_tokens in 1_u64..400,
        batch_tokens in 1_u64..100,
        parquet in any::<bool>(),
        from_parquet in any::<bool>(),
    ) {
        let root = tempfile::tempdir().unwrap();
        let (source, result) = (root.path().join("source"), root.path().join("result"));
        std::fs::create_dir(&source).unwrap();
        let mut next = 0;
        for (index, lengths) in lengths.iter().enumerate() {
            let documents: Vec<Document> = lengths.iter().map(|length| length.map(|length| {
                next += 1;
                (0..length).map(|at| (next * 31 + at as i64) % 300).collect()
            })).collect();
            let (container, suffix) = if from_parquet { (PLAIN, "parquet") } else { (Container::ArrowStream(None), "arrow") };
            write(&source.join(format!("{index}.{suffix}")), container, Dtype::I32, Shape::List, &documents, 5);
        }
        let (shard_tokens, batch_tokens) = (shard_tokens.to_string(), batch_tokens.to_string());
        let json = sound(&["rewrite", text(&source), text(&result), "--json", "--shard-tokens", &shard_tokens, "--batch-tokens", &batch_tokens,
            "--row-group-tokens", &batch_tokens, "--to", if parquet { "parquet" } else { "arrow" }]);
        prop_assert_eq!(&json["rows"], lengths.iter().map(Vec::len).sum::<usize>());
        let tokens: usize = lengths.iter().flatten().flatten().sum();
        prop_assert_eq!(&json["tokens"], tokens);
        if tokens > 0 {
            same_batches(&source, &result);
        }
    }
}
