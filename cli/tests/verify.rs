//! Tests that `forebay verify` proves a whole delivery, and names the faults of another.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use forebay::settings::environment::Environment;
use forebay::settings::{Remainder, Shuffle, Targets};
use forebay::tokens::Dtype;
use forebay::{Config, ErrorKind, Loader, Next};
use forebay_tests::{Container, Document, Shape, documents, drain, write};
use parquet::basic::Compression;
use serde_json::Value;

const ARROW: Container = Container::ArrowFile(None);
const SEQ_LEN: u64 = 16;

fn verify(args: &[&str]) -> (u8, String, String) {
    let args: Vec<OsString> = ["forebay", "verify"].iter().chain(args).map(OsString::from).collect();
    let env = Environment::from_pairs([("FOREBAY_PROGRESS", "0")]);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = forebay_cli::run(&args, &env, &mut out, &mut err);
    (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

fn verify_json(args: &[&str]) -> (u8, Value) {
    let (status, out, err) = verify(&[args, &["--json"]].concat());
    (status, serde_json::from_str(&out).unwrap_or_else(|_| panic!("no JSON: {out}{err}")))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Two shards of documents, some empty and some null.
fn corpus(folder: &Path, container: Container, dtype: Dtype, shape: Shape) -> (PathBuf, Vec<Vec<Document>>) {
    let folder = folder.join("corpus");
    std::fs::create_dir_all(&folder).unwrap();
    let shards = vec![documents(150, 40, 100, 1), documents(100, 40, 100, 2)];
    for (index, documents) in shards.iter().enumerate() {
        write(&folder.join(format!("{index}.shard.parquet")), container, dtype, shape, documents, 30);
    }
    (folder, shards)
}

fn arrow_corpus(folder: &Path) -> (PathBuf, Vec<Vec<Document>>) {
    corpus(folder, ARROW, Dtype::U16, Shape::List)
}

fn settings(corpus: &Path, delivery_log: &Path) -> Config {
    Config {
        data: vec![text(corpus).to_owned()],
        seq_len: SEQ_LEN,
        shuffle: Shuffle::Global,
        seed: 3,
        delivery_log: Some(text(delivery_log).to_owned()),
        ..Config::default()
    }
}

/// The same settings on the command line.
fn flags<'a>(corpus: &'a Path, delivery_log: &'a Path) -> Vec<&'a str> {
    vec![text(corpus), "--seq-len=16", "--shuffle=global", "--seed=3", "--delivery-log", text(delivery_log)]
}

/// Lets each rank take `steps` batches from `position` on, as a launch that is killed then.
fn launch(config: &Config, world_size: u64, batch_size: u64, position: u64, steps: u64) {
    for rank in 0..world_size {
        let config = Config { dp_rank: Some(rank), dp_world_size: Some(world_size), batch_size, ..config.clone() };
        let loader = Loader::open(config).unwrap();
        let state = loader.state();
        let entries = state.entries().iter().cloned().map(|(key, value)| match key.as_str() {
            "position" => (key, position.into()),
            _ => (key, value),
        });
        loader.load_state(&forebay::State::from_entries(entries.collect()).unwrap()).unwrap();
        let batches = loader.iter();
        for _ in 0..steps {
            match batches.next_timeout(std::time::Duration::from_secs(60)).unwrap() {
                Next::Batch(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn an_epoch_is_proved_for_every_format_and_rule() {
    let parquet = |pages| Container::Parquet { codec: Compression::SNAPPY, encoding: None, pages };
    for (index, (container, dtype, shape)) in [
        (parquet(1), Dtype::I32, Shape::List),
        (parquet(2), Dtype::I64, Shape::LargeList),
        (ARROW, Dtype::U8, Shape::LargeList),
        (Container::ArrowStream(Some(arrow_codec())), Dtype::U32, Shape::List),
        (Container::ArrowStream(None), Dtype::U16, Shape::FixedSizeList(7)),
    ]
    .into_iter()
    .enumerate()
    {
        let root = tempfile::tempdir().unwrap();
        let fixed = |documents: Vec<Document>| match shape {
            Shape::FixedSizeList(length) => documents.iter().map(|_| Some((0..i64::from(length)).collect())).collect(),
            _ => documents,
        };
        let path = root.path().join("0.parquet");
        write(&path, container, dtype, shape, &fixed(documents(200, 40, 100, 4)), 30);
        for (remainder, world_size, targets) in
            [("drop", "1", "labels"), ("pad", "3", "shifted"), ("wrap", "2", "labels"), ("short", "1", "shifted")]
        {
            let (remainder, targets) = (format!("remainder={remainder}"), format!("targets={targets}"));
            let specials = if index % 2 == 0 { "eos_id=99" } else { "bos_id=98" };
            let mut args = vec![text(root.path()), "--seq-len=16", "--batch-size=4", "--shuffle", "--epoch=2"];
            args.extend(["--world-size", world_size]);
            args.extend(["--set", &remainder, "--set", &targets, "--set", specials]);
            args.extend(["--set", "block_tokens=300", "--set", "chunk_tokens=64", "--set", "window_tokens=256"]);
            let (status, json) = verify_json(&args);
            assert_eq!((status, &json["proven"]), (0, &true.into()), "{container:?} {remainder}: {json}");
            assert_eq!((&json["found"], &json["epoch"]), (&json["expected"], &2.into()));
            let rows = json["found"]["rows"].as_u64().unwrap();
            assert!(rows > 20, "{json}");
            let kept = json["positions"].as_u64().unwrap();
            let size = 4 * world_size.parse::<u64>().unwrap();
            assert_eq!(rows, if remainder.ends_with("drop") { kept - kept % size } else { kept });
        }
    }
}

fn arrow_codec() -> arrow_ipc::CompressionType {
    arrow_ipc::CompressionType::LZ4_FRAME
}

#[test]
fn an_epoch_is_proved_from_a_state_on() {
    let root = tempfile::tempdir().unwrap();
    let (corpus, _) = arrow_corpus(root.path());
    let config = Config { batch_size: 4, delivery_log: None, ..settings(&corpus, root.path()) };
    let loader = Loader::open(config).unwrap();
    loader.set_epoch(1);
    let batches = loader.iter();
    for _ in 0..5 {
        assert!(matches!(batches.next_timeout(std::time::Duration::from_secs(60)), Ok(Next::Batch(_))));
    }
    let state = loader.state();
    let fields = state.entries().iter().map(|(key, value)| match value {
        forebay::loader::state::StateValue::Int(number) => (key.clone(), (*number).into()),
        forebay::loader::state::StateValue::Text(text) => (key.clone(), text.clone().into()),
    });
    let path = root.path().join("state.json");
    std::fs::write(&path, Value::Object(fields.collect()).to_string()).unwrap();
    let args =
        [text(&corpus), "--seq-len=16", "--shuffle=global", "--seed=3", "--batch-size=3", "--state", text(&path)];
    let (status, json) = verify_json(&args);
    assert_eq!(status, 0, "{json}");
    assert_eq!((&json["epoch"], &json["position"]), (&1.into(), &20.into()));
    assert_eq!(json["found"]["rows"].as_u64().unwrap(), (loader.epoch_chain(0..1).0.len().unwrap() - 20) / 3 * 3);
    let (status, out, err) = verify(&[&args[..], &["--epoch=0"]].concat());
    assert_eq!((status, out.as_str()), (2, ""), "{err}");
    let (status, _, err) = verify(&[&args[..], &["--set", "eos_id=7"]].concat());
    assert_eq!(status, 1);
    assert!(err.contains("`eos_id` was `none` when saved and is 7 now"), "{err}");
}

#[test]
fn a_delivery_log_of_changing_world_sizes_is_proved() {
    let root = tempfile::tempdir().unwrap();
    let (corpus, _) = arrow_corpus(root.path());
    let delivery_log = root.path().join("delivery_log");
    let config = settings(&corpus, &delivery_log);
    let positions =
        Loader::open(Config { delivery_log: None, ..config.clone() }).unwrap().epoch_chain(0..1).0.len().unwrap();
    let steps = positions / 12;
    assert!(steps > 12, "{positions}");
    launch(&config, 4, 3, 0, 7);
    launch(&config, 2, 6, 4 * 12, 5);

    let (status, json) = verify_json(&flags(&corpus, &delivery_log));
    assert_eq!((status, &json["epochs"][0]["unfinished"]), (0, &true.into()), "{json}");
    let (status, out, _) = verify(&[&flags(&corpus, &delivery_log)[..], &["--epoch=0"]].concat());
    assert_eq!(status, 1, "an epoch that is asked for must be whole");
    assert!(out.contains(&format!("epoch 0, positions 108 to {}: no global batch has them", positions - 1)), "{out}");

    launch(&config, 3, 4, 9 * 12, steps - 9);
    let (status, json) = verify_json(&flags(&corpus, &delivery_log));
    let epoch = &json["epochs"][0];
    assert_eq!((status, &json["proven"], &epoch["unfinished"]), (0, &true.into(), &false.into()), "{json}");
    assert_eq!((&epoch["spare"], &epoch["dropped"]), (&(3 * 4).into(), &(positions % 12).into()));
    let sizes: Vec<_> = epoch["steps"].as_array().unwrap().iter().map(|step| step["world_size"].as_u64()).collect();
    assert_eq!((sizes[3], sizes[4], sizes[8], sizes[9]), (Some(4), Some(2), Some(2), Some(3)));
    let (_, out, _) = verify(&flags(&corpus, &delivery_log));
    for words in ["4 ranks, 9 passes, 0 torn lines", "on 4, then 2, then 3 ranks", "proven: every row once"] {
        assert!(out.contains(words), "{words}: {out}");
    }

    // An undisturbed run has the same global batches.
    let undisturbed = root.path().join("undisturbed");
    launch(&Config { delivery_log: Some(text(&undisturbed).to_owned()), ..config }, 1, 12, 0, steps);
    let (_, other) = verify_json(&flags(&corpus, &undisturbed));
    let hashes = |json: &Value| -> Vec<Value> {
        json["epochs"][0]["steps"].as_array().unwrap().iter().map(|step| step["hash"].clone()).collect()
    };
    assert_eq!(hashes(&other), hashes(&json));

    let (status, _, err) = verify(&[&flags(&corpus, &delivery_log)[..], &["--set", "eos_id=5"]].concat());
    assert_eq!(status, 1);
    assert!(err.contains("under these settings: `eos_id` was none in the run and is 5 here; give"), "{err}");
    for (shard, message) in [
        ("1.shard.parquet", "the run had another corpus: growth `0:2` is not one of this corpus of 1 shards"),
        ("0.shard.parquet", "the corpus of the run had fingerprint"),
    ] {
        let aside = root.path().join("aside");
        std::fs::rename(corpus.join(shard), &aside).unwrap();
        let (status, _, err) = verify(&flags(&corpus, &delivery_log));
        assert!(status == 1 && err.contains(message), "{err}");
        std::fs::rename(aside, corpus.join(shard)).unwrap();
    }
}

#[test]
fn a_hole_does_not_make_holes_of_what_is_still_to_come() {
    let root = tempfile::tempdir().unwrap();
    let (corpus, _) = arrow_corpus(root.path());
    let delivery_log = root.path().join("delivery_log");
    let config = settings(&corpus, &delivery_log);
    let positions = Loader::open(config.clone()).unwrap().epoch_chain(0..1).0.len().unwrap();
    launch(&config, 2, 6, 0, 2);
    launch(&config, 3, 4, 4 * 12, 2);
    let (status, json) = verify_json(&flags(&corpus, &delivery_log));
    let epoch = &json["epochs"][0];
    assert_eq!((status, &epoch["unfinished"]), (1, &true.into()), "{json}");
    assert_eq!(epoch["holes"], serde_json::json!([[[0, 24], [0, 47]]]));
    assert_eq!(epoch["to_come"], serde_json::json!([[0, 72], [0, positions - 1]]));
    let (_, out, _) = verify(&flags(&corpus, &delivery_log));
    assert!(out.contains("HOLE        epoch 0, positions 24 to 47: no global batch has them"), "{out}");
    let last = positions - 1;
    assert!(out.contains(&format!("to come     epoch 0, positions 72 to {last}: not delivered yet")), "{out}");
    assert_eq!(out.matches("HOLE").count(), 1, "{out}");

    // Once the hole is filled, nothing but the rest is missing.
    launch(&config, 1, 12, 24, 2);
    let (status, json) = verify_json(&flags(&corpus, &delivery_log));
    assert_eq!((status, &json["epochs"][0]["holes"]), (0, &serde_json::json!([])), "{json}");
    // An epoch that is asked for has to be whole.
    let (status, json) = verify_json(&[&flags(&corpus, &delivery_log)[..], &["--epoch=0"]].concat());
    assert_eq!((status, &json["epochs"][0]["to_come"]), (1, &Value::Null), "{json}");
    assert_eq!(json["epochs"][0]["holes"], serde_json::json!([[[0, 72], [0, positions - 1]]]));
}

#[test]
fn every_remainder_rule_is_proved_to_its_end() {
    for (remainder, world_size) in [(Remainder::Pad, 4), (Remainder::Wrap, 4), (Remainder::Short, 1)] {
        for targets in [Targets::Labels, Targets::Shifted] {
            let root = tempfile::tempdir().unwrap();
            let (corpus, _) = arrow_corpus(root.path());
            let delivery_log = root.path().join("delivery_log");
            let config = Config { remainder, targets, ..settings(&corpus, &delivery_log) };
            for epoch in 0..2 {
                for rank in 0..world_size {
                    let (dp_rank, dp_world_size) = (Some(rank), Some(world_size));
                    let loader =
                        Loader::open(Config { dp_rank, dp_world_size, batch_size: 5, ..config.clone() }).unwrap();
                    loader.set_epoch(epoch);
                    assert!(!drain(&loader.iter()).is_empty());
                }
            }
            let name = format!("remainder={remainder:?}").to_lowercase();
            let targets = format!("targets={targets:?}").to_lowercase();
            let (status, json) =
                verify_json(&[&flags(&corpus, &delivery_log)[..], &["--set", &name, "--set", &targets]].concat());
            assert_eq!((status, json["epochs"].as_array().unwrap().len()), (0, 2), "{name}: {json}");
            assert_eq!(json["epochs"][1]["unfinished"], false, "{json}");
        }
    }
}

#[test]
fn faults_of_a_delivery_log_are_named() {
    let root = tempfile::tempdir().unwrap();
    let (corpus, _) = arrow_corpus(root.path());
    let delivery_log = root.path().join("delivery_log");
    let config = Config { remainder: Remainder::Short, ..settings(&corpus, &delivery_log) };
    let rule = ["--set", "remainder=short"];
    let loader = Loader::open(Config { batch_size: 6, ..config }).unwrap();
    drain(&loader.iter());
    let path = delivery_log.join("rank-00000.jsonl");
    let sound = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = sound.lines().collect();
    let with = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        change(&mut lines);
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
        let (status, out, err) = verify(&[&flags(&corpus, &delivery_log)[..], &rule].concat());
        (status, out + &err)
    };
    assert_eq!(with(&|_| ()).0, 0);
    let (status, out) = with(&|lines| drop(lines.remove(3)));
    assert!(status == 1 && out.contains("HOLE        epoch 0, positions 12 to 17"), "{out}");

    let run = |line: &str| serde_json::from_str::<Value>(line).unwrap()["run"].as_str().unwrap().to_owned();
    let second = |line: &str| line.replace(&run(lines[0]), "again");
    let (status, out) = with(&|lines| {
        // Another process of the same rank, at the same time.
        lines.insert(1, second(&lines[0]));
        lines.insert(4, second(&lines[2]));
    });
    assert!(status == 1 && out.contains("DOUBLE      epoch 0, position 0, rank 0 of 1"), "{out}");
    let (status, out) = with(&|lines| {
        let rows = [second(&lines[0]), second(&lines[1]), second(&lines[2])];
        lines.extend(rows);
    });
    assert!(status == 0 && out.contains("2 batches of single ranks came again later"), "{out}");
    let (status, out) = with(&|lines| {
        let mut other: Value = serde_json::from_str(&second(lines[2].as_str())).unwrap();
        other["hash"] = "00ff".into();
        lines.extend([second(&lines[0]), other.to_string()]);
    });
    assert!(status == 1 && out.contains("DIFFERENT   epoch 0, position 6, rank 0 of 1"), "{out}");
}

/// Changes one token of an uncompressed file, and nothing else about it.
fn flip_a_byte(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(8).rposition(|window| window == [77, 0, 76, 0, 75, 0, 74, 0]).expect("is in the corpus");
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn content_altered_after_the_run_is_noticed_and_its_step_named() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("corpus");
    std::fs::create_dir_all(&folder).unwrap();
    let mut shard = documents(200, 40, 70, 1);
    shard[120] = Some(vec![77, 76, 75, 74]);
    let path = folder.join("0.arrow");
    write(&path, ARROW, Dtype::U16, Shape::List, &shard, 30);
    let delivery_log = root.path().join("delivery_log");
    let loader = Loader::open(Config { batch_size: 2, ..settings(&folder, &delivery_log) }).unwrap();
    drain(&loader.iter());
    assert_eq!(verify(&flags(&folder, &delivery_log)).0, 0);

    flip_a_byte(&path);
    let (status, json) = verify_json(&flags(&folder, &delivery_log));
    let epoch = &json["epochs"][0];
    assert_eq!((status, &json["proven"]), (1, &false.into()), "{json}");
    assert_eq!((&epoch["expected"]["rows"], &epoch["holes"]), (&epoch["found"]["rows"], &Value::Array(vec![])));
    // The step that the document is found in is the step that was altered.
    let [step] = epoch["altered_steps"].as_array().unwrap().as_slice() else { panic!("{epoch}") };
    let (_, found) = verify_json(&[&flags(&folder, &delivery_log)[..], &["--document", "0.arrow:120"]].concat());
    assert!(found["deliveries"].as_array().unwrap().iter().any(|hit| hit["step"] == *step), "{found} {step}");
    let (status, out, _) = verify(&flags(&folder, &delivery_log));
    assert_eq!(status, 1);
    assert!(out.contains(&format!("ALTERED     step {step}, ")) && out.contains("NOT PROVEN"), "{out}");
}

#[test]
fn steps_and_documents_are_found_from_each_other() {
    let root = tempfile::tempdir().unwrap();
    let (corpus, shards) = arrow_corpus(root.path());
    let delivery_log = root.path().join("delivery_log");
    let config = settings(&corpus, &delivery_log);
    launch(&config, 2, 2, 0, 10);
    let with = |more: &[&str]| verify_json(&[&flags(&corpus, &delivery_log)[..], more].concat());

    // Where the stream has each document, by the documents that were written.
    let mut places = Vec::new();
    let mut at = 0;
    for (shard, documents) in shards.iter().enumerate() {
        for (row, ids) in documents.iter().enumerate() {
            let len = ids.as_ref().map_or(0, Vec::len) as u64;
            places.push((shard, row as u64, at..at + len));
            at += len;
        }
    }
    let loader = Loader::open(Config { delivery_log: None, ..config }).unwrap();
    let (status, json) = with(&["--step=3"]);
    assert_eq!(status, 0);
    let mut expected = Vec::new();
    let (_, mut sample) = loader.epoch_chain(0..1);
    for (position, sequence) in (12..16).map(|position| (position, sample(position).unwrap().sequence)) {
        let tokens = sequence * SEQ_LEN..(sequence + 1) * SEQ_LEN;
        for (shard, row, place) in &places {
            if place.start < tokens.end && place.end > tokens.start && !place.is_empty() {
                expected.push((format!("{shard}.shard.parquet"), *row, sequence, position));
            }
        }
    }
    expected.sort();
    let mut found: Vec<_> = json["documents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|document| {
            let number = |key: &str| document[key].as_u64().unwrap();
            (document["shard"].as_str().unwrap().to_owned(), number("row"), number("sequence"), number("position"))
        })
        .collect();
    found.sort();
    assert_eq!(found, expected);

    for (shard, row, sequence, position) in expected {
        let (status, json) = with(&["--document", &format!("{shard}:{row}")]);
        assert_eq!(status, 0);
        let hits = json["deliveries"].as_array().unwrap();
        let hit = hits.iter().find(|hit| hit["sequence"] == sequence).unwrap();
        assert_eq!((&hit["position"], &hit["step"]), (&position.into(), &3.into()));
        assert_eq!((&hit["rank"], &hit["world_size"]), (&(position % 2).into(), &2.into()));
    }
    let (_, out, _) = verify(&[&flags(&corpus, &delivery_log)[..], &["--step=0"]].concat());
    assert!(out.contains("step        0 of epoch 0: positions 0 to 4, 2 ranks with 2 rows each"), "{out}");
    for (more, message) in [
        (["--step", "10"], "the delivery log has 10 of epoch 0"),
        (["--document", "2.shard.parquet:0"], "no shard of the corpus is called"),
        (["--document", "0.shard.parquet:100000"], "has no document with tokens in row 100000"),
        (["--document", "0.shard.parquet"], "expected SHARD:ROW"),
        (["--epoch", "4"], "the delivery log has no batch of epoch 4"),
    ] {
        let (status, _, err) = verify(&[&flags(&corpus, &delivery_log)[..], &more].concat());
        assert!(status > 0 && err.contains(message), "{message}: {err}");
    }
}

#[test]
fn a_delivery_log_that_cannot_be_written_is_an_error_at_the_batch() {
    let root = tempfile::tempdir().unwrap();
    let (corpus, _) = arrow_corpus(root.path());
    let full = root.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::os::unix::fs::symlink("/dev/full", full.join("rank-00000.jsonl")).unwrap();
    for folder in [full, corpus.join("0.shard.parquet")] {
        let loader = Loader::open(settings(&corpus, &folder)).unwrap();
        let batches = loader.iter();
        for _ in 0..2 {
            let error = batches.next_timeout(std::time::Duration::from_secs(60)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            assert!(error.to_string().contains("cannot write the delivery log"), "{error}");
        }
        assert_eq!(loader.state().position(), 0);
    }
}
