//! Tests the output of the commands, and their exit status.

use std::ffi::OsString;
use std::path::Path;

use forebay::settings::environment::Environment;
use forebay::tokens::Dtype;
use forebay_tests::{Container, Document, Shape, documents, stream, write};
use parquet::basic::Compression;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

struct Ran {
    status: u8,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        assert_eq!(self.out.lines().count(), 1, "one object: {}", self.out);
        serde_json::from_str(&self.out).unwrap()
    }
}

fn run_with(variables: &[(&str, &str)], args: &[&str]) -> Ran {
    let args: Vec<OsString> = ["forebay"].iter().chain(args).map(OsString::from).collect();
    // No bar, should the tests run on a terminal.
    let env = Environment::from_pairs(variables.iter().copied().chain([("FOREBAY_PROGRESS", "0")]));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = forebay_cli::run(&args, &env, &mut out, &mut err);
    Ran { status, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
}

fn run(args: &[&str]) -> Ran {
    run_with(&[], args)
}

const PARQUET: Container =
    Container::Parquet { codec: Compression::UNCOMPRESSED, encoding: Some(parquet::basic::Encoding::PLAIN), pages: 1 };

/// Two shards in a folder of their own, and what was written.
fn corpus(container: Container, suffix: &str) -> (tempfile::TempDir, Vec<Vec<Document>>) {
    let root = tempfile::tempdir().unwrap();
    let shards = vec![documents(300, 60, 50_000, 1), documents(100, 60, 50_000, 2)];
    for (index, documents) in shards.iter().enumerate() {
        let path = root.path().join(format!("{index}.{suffix}"));
        write(&path, container, Dtype::I32, Shape::List, documents, 40);
    }
    (root, shards)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn usage_errors_are_told_from_help() {
    for args in [&["dance"][..], &["check", "--colour"], &["bench", "x", "--seconds", "-1"], &[]] {
        let ran = run(args);
        assert_eq!(ran.status, 2, "{args:?}");
        assert!(ran.out.is_empty() && ran.err.contains("Usage"), "{args:?}: {}{}", ran.out, ran.err);
    }
    let ran = run(&["verify", "x", "--pad-id", "3"]);
    assert!(ran.status == 2 && ran.err.contains("`--set pad_id=VALUE`"), "{}", ran.err);
    let ran = run(&["config", "--set", "x"]);
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("expected NAME=VALUE"), "{}", ran.err);
    let help = run(&["--help"]);
    assert_eq!((help.status, help.err.as_str()), (0, ""));
    for command in ["config", "check", "plan", "bench"] {
        assert!(help.out.contains(command), "{}", help.out);
    }
    assert!(!help.out.contains("settings  "), "hidden: {}", help.out);
    let version = run(&["--version"]);
    assert_eq!((version.status, version.out.trim()), (0, concat!("forebay ", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn config_names_every_setting_with_its_origin() {
    let variables = [
        ("FOREBAY_SEQ_LEN", "512"),
        ("FOREBAY_SEEED", "1"),
        ("RANK", "1"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_WORLD_SIZE", "2"),
    ];
    let ran = run_with(&variables, &["config", "--set", "batch-size=16"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    let lines: Vec<Vec<&str>> =
        ran.out.lines().map(|line| line.split("  ").filter(|cell| !cell.is_empty()).collect()).collect();
    for setting in forebay::settings::all() {
        assert_eq!(lines.iter().filter(|line| line[0] == setting.name).count(), 1, "{}", setting.name);
    }
    let line = |name: &str| {
        lines.iter().find(|line| line[0] == name).unwrap()[1..].iter().map(|cell| cell.trim()).collect::<Vec<_>>()
    };
    assert_eq!(line("seq_len"), ["512", "FOREBAY_SEQ_LEN"]);
    assert_eq!(line("batch_size"), ["16", "argument"]);
    assert_eq!(line("lanes"), ["8", "default"]);
    assert_eq!(line("dp_rank"), ["1", "RANK and WORLD_SIZE"]);
    assert_eq!(line("dp_world_size"), ["4", "RANK and WORLD_SIZE"]);
    assert!(line("num_threads")[1].contains("CPUs / LOCAL_WORLD_SIZE 2 - 1"), "{}", ran.out);
    assert!(
        ran.err.contains("warning: variable `FOREBAY_SEEED` is unknown: did you mean `FOREBAY_SEED`?"),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("note: assuming pure data parallel over 4 ranks"), "{}", ran.err);
    assert_eq!(ran.out.lines().count(), 1 + forebay::settings::all().len(), "settings alone: {}", ran.out);
    let origins: Vec<usize> = ran.out.lines().take(5).map(|line| line.rfind("  ").unwrap()).collect();
    assert!(origins.windows(2).all(|pair| pair[0] == pair[1]), "columns are aligned:\n{}", ran.out);
}

#[test]
fn config_is_strict_where_it_is_asked_to_be() {
    let mistyped = [("FOREBAY_SEEED", "1")];
    for (variables, args, status) in [
        (&mistyped[..], &["config"][..], 0),
        (&mistyped, &["config", "--strict"], 2),
        (&mistyped, &["config", "--strict", "--json"], 2),
        (&[], &["config", "--strict"], 0),
        // What is assumed is no mistake.
        (&[("RANK", "1"), ("WORLD_SIZE", "4")], &["config", "--strict"], 0),
    ] {
        let ran = run_with(variables, args);
        assert_eq!(ran.status, status, "{variables:?} {args:?}: {}", ran.err);
        assert_eq!(ran.err.contains("error: 1 warning, and `--strict` allows none"), status == 2, "{}", ran.err);
        assert!(ran.out.contains("seq_len"), "the settings are printed all the same: {}", ran.out);
    }
}

#[test]
fn config_gives_json_of_the_right_types() {
    let sets = [
        "data=a/*.parquet,b",
        "memory_budget=1GiB",
        "seq_len=2Ki",
        "token_column=007",
        "cpu_affinity=3",
        "sample_ids=true",
        "shuffle=global",
    ];
    let args: Vec<&str> = ["config", "--json"].into_iter().chain(sets.iter().flat_map(|set| ["--set", set])).collect();
    let ran = run_with(&[("FOREBAY_SEEED", "1"), ("FOREBAY_LANES", "16")], &args);
    let json = ran.json();
    let settings = json["settings"].as_object().unwrap();
    assert_eq!(settings.len(), forebay::settings::all().len());
    for (name, value) in [
        ("data", serde_json::json!(["a/*.parquet", "b"])),
        ("memory_budget", (1_u64 << 30).into()),
        ("seq_len", 2048.into()),
        ("token_column", "007".into()),
        ("cpu_affinity", serde_json::json!([3])),
        ("sample_ids", true.into()),
        ("pin_memory", false.into()),
        ("shuffle", "global".into()),
        ("eos_id", Value::Null),
        ("mixture", Value::Null),
        ("lanes", 16.into()),
        ("epochs", 1.into()),
    ] {
        assert_eq!(settings[name]["value"], value, "{name}: {json}");
    }
    assert_eq!(settings["lanes"]["origin"], "FOREBAY_LANES");
    assert_eq!(json["warnings"].as_array().unwrap().len(), 1, "{json}");
    assert!(ran.err.starts_with("warning: "), "{}", ran.err);

    for (budget, shown) in [("512MiB", "512 MiB"), ("1536Mi", "1.5 GiB"), ("1234567890", "1.1 GiB (1234567890)")] {
        let ran = run(&["config", "--set", &format!("memory_budget={budget}")]);
        assert!(ran.out.contains(&format!("  {shown}  ")), "{}", ran.out);
    }
}

#[test]
fn a_mistyped_word_gets_a_hint() {
    for (args, hint) in [
        (&["chek", "x"][..], "did you mean `forebay check`?"),
        (&["benchmark"], "did you mean `forebay bench`?"),
        (&["verfy"], "did you mean `forebay verify`?"),
        (&["check", "x", "--tokn-column", "y"], "did you mean `--token-column`?"),
        (&["bench", "x", "--second=3"], "did you mean `--seconds`?"),
        (&["bench", "x", "--lanez", "3"], "did you mean the setting `--set lanes=VALUE`?"),
        (&["verify", "x", "--pad-id", "3"], "`pad_id` is a setting: `--set pad_id=VALUE`"),
    ] {
        let ran = run(args);
        assert_eq!(ran.status, 2, "{args:?}");
        assert!(ran.err.contains(&format!("tip: {hint}")), "{args:?}: {}", ran.err);
    }
    assert!(!run(&["dance"]).err.contains("tip"));
    // Nothing hidden is suggested.
    assert!(!run(&["setings"]).err.contains("settings"));
}

#[test]
fn every_help_begins_with_a_verb_and_has_an_example() {
    for command in ["config", "check", "index", "rewrite", "plan", "bench", "verify"] {
        let ran = run(&[command, "--help"]);
        assert_eq!(ran.status, 0);
        let first = ran.out.split_whitespace().next().unwrap();
        assert!(first.ends_with('s') && first.starts_with(char::is_uppercase), "{command}: {}", ran.out);
        assert!(ran.out.contains(&format!("forebay {command} ")) && ran.out.contains("Example"), "{}", ran.out);
        // Only `config` describes the settings.
        assert_eq!(ran.out.contains("delivery_log"), command == "config", "{}", ran.out);
    }
    assert!(run(&["--help"]).out.contains("Example: forebay check corpus/"));
    let help = run(&["config", "--help"]).out;
    for setting in forebay::settings::all() {
        assert!(help.contains(&format!("\n  {} (default: ", setting.name)), "{help}");
    }
}

#[test]
fn columns_that_are_not_read_are_listed_and_escaped() {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int32Array, RecordBatch};
    let root = tempfile::tempdir().unwrap();
    let names = ["attention_mask", "te\u{1b}[2Jxt\n", "loss_weights", "labels", "url"];
    let column = || Arc::new(Int32Array::from(vec![1, 2, 3])) as ArrayRef;
    let columns = names.iter().copied().chain(["input_ids"]).map(|name| (name, column()));
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let path = root.path().join("a.parquet");
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();

    let json = run(&["check", text(&path), "--json"]).json();
    let found: Vec<(&str, Option<&str>)> = json["not_read"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| (entry["column"].as_str().unwrap(), entry["looks_like"].as_str()))
        .collect();
    let expected = [
        ("attention_mask", Some("a mask")),
        ("labels", Some("labels")),
        ("loss_weights", Some("weights")),
        ("te\u{1b}[2Jxt\n", None),
        ("url", None),
    ];
    assert_eq!(found, expected);
    let table = run(&["check", text(&path)]);
    assert_eq!(table.status, 0, "{}", table.out);
    for line in [
        "not read    column `attention_mask` in 1 shard, which looks like a mask\n",
        "not read    column `labels` in 1 shard, which looks like labels\n",
        "not read    columns `te\\u{1b}[2Jxt\\n`, `url`\n",
    ] {
        assert!(table.out.contains(line), "{line}: {}", table.out);
    }
    let rewritten = root.path().join("new");
    let ran = run(&["rewrite", text(&path), text(&rewritten)]);
    assert!(ran.status == 0 && ran.out.contains("`te\\u{1b}[2Jxt\\n`"), "{}{}", ran.out, ran.err);
    let ran = run(&["check", text(&path), "--token-column", "no\u{7}ne"]);
    assert!(!ran.out.contains(['\u{7}', '\u{1b}']) && ran.out.contains("no\\u{7}ne"), "{}", ran.out);
}

#[test]
fn bad_settings_end_with_2_and_their_names() {
    let ran = run_with(&[("FOREBAY_LANES", "x")], &["config", "--set", "seqlen=1"]);
    assert_eq!((ran.status, ran.out.as_str()), (2, ""));
    assert!(ran.err.starts_with("error: 2 faults found"), "{}", ran.err);
    assert!(ran.err.contains("`FOREBAY_LANES`") && ran.err.contains("did you mean `seq_len`"), "{}", ran.err);
    let ran = run(&["check"]);
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("no data"), "{}", ran.err);
    let ran = run(&["check", "/nowhere/at/all"]);
    assert_eq!(ran.status, 1);
    assert!(ran.err.contains("error: ") && ran.err.contains("/nowhere/at/all"), "{}", ran.err);
}

#[test]
fn check_counts_what_was_written() {
    let containers =
        [(PARQUET, "parquet", "decoded by blocks"), (Container::ArrowFile(None), "arrow", "read in place")];
    for (container, suffix, access) in containers {
        let (root, shards) = corpus(container, suffix);
        let documents: Vec<_> = shards.iter().flatten().collect();
        let sound = run(&["check", text(root.path()), "--json", "--set", "block_tokens=500"]);
        assert_eq!((sound.status, sound.err.as_str()), (0, ""), "{}", sound.out);
        let json = sound.json();
        assert_eq!(json["sound"], true);
        assert_eq!(json["shards"], 2);
        assert_eq!(json["rows"], documents.len());
        assert_eq!(
            json["documents"],
            documents.iter().filter(|ids| ids.as_ref().is_some_and(|ids| !ids.is_empty())).count()
        );
        assert_eq!(json["tokens"], stream(&shards, None, None).len());
        assert_eq!(json["dtype"]["int32"], 2);
        assert_eq!(json["access"][access], 2);
        assert!(json["skew"].as_f64().unwrap() >= 1.0);
        let blocks = &json["blocks"];
        assert!(blocks["count"].as_u64().unwrap() > 2, "{blocks}");
        assert!(blocks["tokens_min"].as_u64() <= blocks["tokens_median"].as_u64(), "{blocks}");
        assert!(blocks["tokens_median"].as_u64() <= blocks["tokens_max"].as_u64(), "{blocks}");

        let table = run_with(&[("FOREBAY_DATA", text(root.path()))], &["check"]);
        assert_eq!(table.status, 0, "{}", table.err);
        for words in ["shards", access, "int32", "every block was read"] {
            assert!(table.out.contains(words), "{words}: {}", table.out);
        }
    }
}

/// Makes the last token of row group 1 of an uncompressed Parquet file negative.
fn damage(path: &Path) {
    let reader = SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap();
    let group = reader.metadata().row_group(1);
    let column = group.columns().iter().find(|column| column.column_path().string().starts_with("input_ids")).unwrap();
    let (start, length) = column.byte_range();
    let mut content = std::fs::read(path).unwrap();
    content[..(start + length) as usize].last_chunk_mut::<4>().unwrap().fill(0xFF);
    std::fs::write(path, content).unwrap();
}

#[test]
fn check_goes_on_after_damage_and_names_its_place() {
    for (container, suffix) in [(PARQUET, "parquet"), (Container::ArrowFile(None), "arrow")] {
        let (root, mut shards) = corpus(container, suffix);
        let (damaged, garbage) = (root.path().join(format!("0.{suffix}")), root.path().join(format!("2.{suffix}")));
        if suffix == "parquet" {
            damage(&damaged);
        } else {
            *shards[0][60..].iter_mut().flatten().flatten().next().unwrap() = -1;
            write(&damaged, container, Dtype::I32, Shape::List, &shards[0], 40);
        }
        std::fs::write(&garbage, b"not a shard at all").unwrap();

        let ran = run(&["check", text(root.path()), "--json", "--set", "block_tokens=200"]);
        assert_eq!(ran.status, 1, "{}", ran.err);
        let json = ran.json();
        assert_eq!((&json["sound"], &json["shards"]), (&false.into(), &3.into()), "broken shards are shards");
        let [opening, reading] = json["broken"].as_array().unwrap().as_slice() else {
            panic!("one fault each, and none in the sound shard: {json}")
        };
        assert_eq!((&opening["path"], &opening["block"]), (&text(&garbage).into(), &Value::Null));
        assert_eq!((&reading["path"], &reading["kind"]), (&text(&damaged).into(), &"data".into()));
        assert!(reading["block"].as_u64().is_some_and(|block| block > 0), "{reading}");
        assert!(reading["error"].as_str().unwrap().contains("-1"), "{reading}");

        let table = run(&["check", text(root.path())]);
        assert_eq!(table.status, 1);
        for words in [text(&garbage), text(&damaged), "2 faults found"] {
            assert!(table.out.contains(words), "{words}: {}", table.out);
        }
        assert!(!table.out.contains("every block was read"), "{}", table.out);
    }
}

/// An output whose reader has gone.
struct Gone;

impl std::io::Write for Gone {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn check_tells_of_damage_though_nobody_reads_on() {
    let (root, _) = corpus(PARQUET, "parquet");
    let env = Environment::from_pairs([("FOREBAY_PROGRESS", "0")]);
    let check = |json: &[&str]| {
        let args: Vec<OsString> =
            ["forebay", "check", text(root.path())].iter().chain(json).map(OsString::from).collect();
        let mut err = Vec::new();
        let status = forebay_cli::run(&args, &env, &mut Gone, &mut err);
        (status, String::from_utf8(err).unwrap())
    };
    assert_eq!(check(&[]), (0, String::new()));
    assert_eq!(check(&["--json"]), (0, String::new()));
    std::fs::write(root.path().join("2.parquet"), b"not a shard at all").unwrap();
    assert_eq!(check(&[]), (1, String::new()));
    assert_eq!(check(&["--json"]), (1, String::new()));
}

#[test]
fn check_takes_the_column_that_is_named() {
    let (root, _) = corpus(PARQUET, "parquet");
    let ran = run(&["check", text(root.path()), "--token-column", "ids_of_mine"]);
    assert_eq!(ran.status, 1);
    assert!(ran.out.contains("token column `ids_of_mine` is missing"), "{}", ran.out);
    assert_eq!(run(&["check", text(root.path()), "--token-column", "input_ids"]).status, 0);
}

#[test]
fn plan_counts_what_a_run_will_come_to() {
    let (root, shards) = corpus(PARQUET, "parquet");
    let tokens = stream(&shards, None, None).len() as u64;
    let data = text(root.path());
    let args =
        ["plan", data, "--seq-len=32", "--batch-size", "4", "--shuffle", "--world-size=3", "--set", "remainder=pad"];
    let ran = run(&[&args[..], &["--json"]].concat());
    assert_eq!((ran.status, ran.err.as_str()), (0, ""), "{}", ran.out);
    let json = ran.json();
    let (source, pass, memory, start) = (&json["sources"][0], &json["pass"], &json["memory"], &json["start"]);
    let (sequences, tail) = (tokens / 32, tokens % 32);
    assert_eq!((&source["shards"], &source["tokens"]), (&2.into(), &tokens.into()));
    assert_eq!((&source["sequences"], &source["tail_tokens"]), (&sequences.into(), &tail.into()));
    let positions = sequences + u64::from(tail > 0);
    let steps = positions.div_ceil(12);
    assert_eq!((&pass["steps"], &pass["world_size"]), (&steps.into(), &3.into()));
    assert_eq!(pass["delivered_tokens"], tokens);
    assert_eq!((&pass["remainder"], &pass["padded_rows"]), (&"pad".into(), &(steps * 12 - positions).into()));
    assert_eq!(pass["padded_tokens"], steps * 12 * 32 - tokens);
    assert_eq!(source["arrangement"]["kind"], "block");
    assert!(source["displacement"]["mean"].as_f64().unwrap() > 0.0, "{source}");
    assert!(json["decoding"]["amplification"].as_f64().unwrap() >= 1.0, "{source}");
    assert_eq!((&json["decoding"]["ranks"], &pass["sharing_ranks"]), (&3.into(), &3.into()));
    let part = |name: &str| memory[name].as_u64().unwrap();
    assert_eq!(
        part("batches_bytes") + part("held_blocks_bytes") + part("cache_bytes"),
        part("budgeted_bytes"),
        "{memory}"
    );
    assert!(part("budgeted_bytes") <= part("budget_bytes") && part("index_bytes") > 0, "{memory}");
    assert_eq!(start["open_shards"], 2);
    assert!(start["open_seconds"].as_f64().unwrap() > 0.0 && start["first_batch_seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(json["settings"]["dp_world_size"], "3");

    let table = run(&args);
    assert_eq!(table.status, 0, "{}", table.err);
    for words in
        ["on each of 3 ranks", "pad: ", "tokens decoded per token", "cache", "first batch", "expected", "3 ranks draw"]
    {
        assert!(table.out.contains(words), "{words}: {}", table.out);
    }
}

#[test]
fn plan_says_where_an_epoch_has_no_batch_and_nothing_is_decoded() {
    let (root, _) = corpus(Container::ArrowFile(None), "arrow");
    let ran = run(&["plan", text(root.path()), "--batch-size=100", "--json"]);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""), "{}", ran.out);
    let json = ran.json();
    assert_eq!((&json["pass"]["steps"], &json["start"]["first_batch_seconds"]), (&0.into(), &Value::Null));
    assert_eq!((&json["decoding"], &json["sources"][0]["arrangement"]["kind"]), (&Value::Null, &"sequential".into()));
    assert_eq!(json["memory"]["cache_bytes"], 0);
    assert!(run(&["plan", text(root.path()), "--batch-size=100"]).out.contains("a pass has no batch"));
    assert_eq!(run(&["plan"]).status, 2);
}

#[test]
fn bench_measures_the_epochs_asked_for() {
    let (root, shards) = corpus(PARQUET, "parquet");
    let tokens = stream(&shards, None, None).len() as u64;
    let ran = run(&[
        "bench",
        text(root.path()),
        "--json",
        "--seq-len=32",
        "--batch-size",
        "4",
        "--shuffle",
        "--threads=2",
        "--epochs=3",
        "--set",
        "prefetch_batches=2",
    ]);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""), "{}", ran.out);
    let json = ran.json();
    let batches = 3 * (tokens / 32 / 4);
    assert_eq!(json["batches"], batches);
    assert_eq!(json["tokens"], batches * 4 * 32);
    assert_eq!(json["bytes"].as_u64().unwrap(), batches * 4 * 32 * 16, "inputs and labels of 8 bytes");
    assert_eq!((&json["epochs"], &json["shards"], &json["corpus_tokens"]), (&3.into(), &2.into(), &tokens.into()));
    let settings = &json["settings"];
    assert_eq!((&settings["shuffle"], &settings["num_threads"]), (&"block".into(), &"2".into()));
    assert_eq!((&settings["prefetch_batches"], &settings["seq_len"]), (&"2".into(), &"32".into()));
    let number = |key: &str| json[key].as_f64().unwrap_or_else(|| panic!("`{key}` is a number in {json}"));
    for key in [
        "elapsed_seconds",
        "tokens_per_second",
        "megabytes_per_second",
        "next_p50_ms",
        "open_seconds",
        "first_batch_seconds",
        "peak_rss_anon_bytes",
    ] {
        assert!(number(key) > 0.0, "{key}: {json}");
    }
    let rate = number("tokens") / number("elapsed_seconds");
    assert!((number("tokens_per_second") / rate - 1.0).abs() < 1e-6, "{json}");
    assert!(
        number("next_p50_ms") <= number("next_p99_ms") && number("next_p99_ms") <= number("next_p999_ms"),
        "{json}"
    );
    assert!(number("next_p999_ms") <= number("elapsed_seconds") * 1e3, "{json}");
    assert!(number("peak_rss_bytes") >= number("peak_rss_anon_bytes"), "{json}");
    let counted = std::fs::read_to_string("/proc/self/io").is_ok();
    assert_eq!(json["storage_read_bytes"].is_u64(), counted, "{json}");
    assert!(number("cpu_seconds") >= 0.0 && number("cpu_seconds_per_billion_tokens") >= 0.0, "{json}");
    assert_eq!(json["verdict"], Value::Null, "no trainer is there");
    assert_eq!((&json["fits_cache"], &json["interrupted"]), (&true.into(), &false.into()), "{json}");
    assert!(number("decoded_corpus_bytes") <= number("cache_bytes"), "{json}");
}

#[test]
fn the_log_level_decides_what_is_told_of_loaders() {
    let (root, _) = corpus(PARQUET, "parquet");
    let data = text(root.path());
    for (level, told) in [("", 0), ("warn", 0), ("error", 0), ("info", 1), ("debug", 2)] {
        for args in [&["bench", data, "--epochs=1"][..], &["plan", data]] {
            let variables = [("FOREBAY_LOG", level), ("RANK", "1"), ("WORLD_SIZE", "2"), ("FOREBAY_DP_RANK", "1")];
            let variables = [&variables[..], &[("FOREBAY_DP_WORLD_SIZE", "2"), ("FOREBAY_SEQ_LEN", "16")]].concat();
            let ran = run_with(&variables, args);
            assert_eq!(ran.status, 0, "{}", ran.err);
            let lines: Vec<_> = ran.err.lines().filter(|line| !line.starts_with("note: ")).collect();
            assert_eq!(lines.len(), told, "{level} {args:?}: {}", ran.err);
            if told > 0 {
                let expected = format!("info: rank 1 of 2 opens `{data}` (2 shards, ");
                assert!(lines[0].starts_with(&expected), "{}", lines[0]);
                for words in ["at epoch 0, position 0", "thread", "memory budget of 512 MiB"] {
                    assert!(lines[0].contains(words), "{words}: {}", lines[0]);
                }
            }
            if told > 1 {
                assert!(lines[1].starts_with("debug: rank 1 begins a pass at epoch 0, position 0: "), "{}", lines[1]);
            }
        }
    }
    let ran = run_with(&[("FOREBAY_LOG", "loud")], &["config"]);
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("`FOREBAY_LOG` must be error, warn, info or debug, found `loud`"), "{}", ran.err);
}

#[test]
fn bench_ends_when_its_time_is_over() {
    let (root, _) = corpus(PARQUET, "parquet");
    let variables = [("FOREBAY_DATA", text(root.path())), ("FOREBAY_SEQ_LEN", "16")];
    let ran = run_with(&variables, &["bench", "--seconds=0.2"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    for words in ["tokens/s", "p99.9", "10^9 tokens", "seq_len=16", "fits the cache", "anonymous"] {
        assert!(ran.out.contains(words), "{words}: {}", ran.out);
    }
}

#[test]
fn bench_does_not_run_without_a_batch() {
    let (root, _) = corpus(PARQUET, "parquet");
    let ran = run(&["bench", text(root.path()), "--set", "batch_size=100"]);
    assert_eq!(ran.status, 2, "{}", ran.out);
    assert!(ran.err.contains("an epoch has no batch"), "{}", ran.err);
    let ran = run(&["bench", text(root.path()), "--shuffle=sideways"]);
    assert_eq!(ran.status, 2);
    assert!(
        ran.err.contains("`shuffle` must be `true`, `false`, `global` or `block`, found `sideways`"),
        "{}",
        ran.err
    );
}

#[test]
fn the_settings_are_printed_for_the_readme() {
    let ran = run(&["settings", "--markdown"]);
    assert_eq!((ran.status, ran.out), (0, forebay::settings::markdown()));
}

#[test]
fn index_is_written_once_and_found_by_loaders() {
    let (root, shards) = corpus(Container::ArrowFile(None), "arrow");
    let cache = tempfile::tempdir().unwrap();
    let args = ["index", text(root.path()), "--cache-dir", text(cache.path()), "--json"];
    let first = run(&args).json();
    assert_eq!(first["tokens"], stream(&shards, None, None).len());
    assert_eq!((&first["shards"], &first["opened"]), (&2.into(), &2.into()));
    let path = first["index"].as_str().unwrap();
    assert_eq!(first["index_bytes"], std::fs::metadata(path).unwrap().len());
    let second = run(&args).json();
    assert_eq!((&second["opened"], &second["fingerprint"]), (&0.into(), &first["fingerprint"]));

    let ran = run(&args[..4]);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""));
    assert!(ran.out.contains(path) && ran.out.contains("0 in "), "{}", ran.out);

    std::fs::write(path, "damaged").unwrap();
    let ran = run(&args);
    assert!(ran.err.starts_with("warning: saved index is damaged") && ran.err.contains(path), "{}", ran.err);
    assert_eq!((ran.status, &ran.json()["opened"]), (0, &2.into()));
}

#[test]
fn index_says_where_it_cannot_write_and_asks_for_a_folder() {
    let (root, _) = corpus(Container::ArrowFile(None), "arrow");
    let ran = run(&["index", text(root.path())]);
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("--cache-dir"), "{}", ran.err);
    let file = root.path().join("0.arrow");
    let ran = run(&["index", text(root.path()), "--cache-dir", text(&file)]);
    assert_eq!((ran.status, ran.out.as_str()), (1, ""));
    assert!(ran.err.starts_with("error: cannot create the folder of the index"), "{}", ran.err);
    assert!(ran.err.contains(text(&file)) && !ran.err.contains("warning"), "{}", ran.err);

    // A folder stands where the file should be: this shows only when the index is saved.
    let cache = tempfile::tempdir().unwrap();
    let args = ["index", text(root.path()), "--cache-dir", text(cache.path()), "--json"];
    let path = run(&args).json()["index"].as_str().unwrap().to_owned();
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    std::fs::write(Path::new(&path).join("x"), "x").unwrap();
    let ran = run(&args);
    assert_eq!((ran.status, ran.out.as_str()), (1, ""));
    assert!(ran.err.contains("error: cannot write saved index"), "{}", ran.err);
    assert!(ran.err.contains("name another folder with `--cache-dir`"), "{}", ran.err);
    assert!(!ran.err.contains("opened at every start"), "{}", ran.err);
}

#[test]
fn index_and_check_take_every_source_of_a_mixture() {
    let ((arrow, _), (parquet, _)) = (corpus(Container::ArrowFile(None), "arrow"), corpus(PARQUET, "parquet"));
    let cache = tempfile::tempdir().unwrap();
    let mixture = serde_json::json!({"sources": [
        {"name": "a", "data": [text(arrow.path())], "weight": 1},
        {"name": "b", "data": [text(parquet.path())], "weight": 1},
    ]});
    let (mixture, cache_dir) = (format!("mixture={mixture}"), format!("cache_dir={}", text(cache.path())));
    let indexed = run(&["index", "--set", &mixture, "--set", &cache_dir, "--json"]);
    assert_eq!((indexed.status, indexed.err.as_str()), (0, ""));
    let found: Vec<Value> = indexed.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(found.iter().map(|entry| &entry["source"]).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 2);
    let bench = ["bench", "--seq-len", "8", "--seconds", "0.01", "--set", &mixture, "--set", &cache_dir];
    let ran = run(&bench);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""));

    let checked = run(&["check", "--set", &mixture, "--json"]).json();
    assert_eq!((&checked["sound"], &checked["shards"]), (&true.into(), &4.into()));
    assert_eq!(checked["tokens"], found[0]["tokens"].as_u64().unwrap() + found[1]["tokens"].as_u64().unwrap());
}

#[cfg(target_os = "linux")]
#[test]
fn a_corpus_may_have_more_shards_than_a_process_may_have_files() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    std::fs::create_dir(&data).unwrap();
    for shard in 0..200 {
        let documents = documents(10, 20, 1000, shard);
        write(
            &data.join(format!("{shard:03}.arrow")),
            Container::ArrowFile(None),
            Dtype::I32,
            Shape::List,
            &documents,
            9,
        );
    }
    let bench = format!(
        "ulimit -n 80; {} bench {} --seq-len 4 --shuffle --epochs 2 --threads 2 --json",
        env!("CARGO_BIN_EXE_forebay"),
        text(&data)
    );
    let cached = format!("{bench} --set cache_dir={}", text(&root.path().join("cache")));
    for command in [&bench, &cached, &cached] {
        let ran = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
        let errors = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{errors}");
        let found: Value = serde_json::from_slice(&ran.stdout).unwrap();
        assert_eq!((&found["shards"], &found["epochs"]), (&200.into(), &2.into()), "{found}");
    }
}
