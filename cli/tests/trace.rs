//! Tests that `FOREBAY_TRACE` writes what each thread does, in a form that Perfetto opens.
//!
//! One process or several write the trace.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use forebay::tokens::Dtype;
use forebay_tests::{Container, Shape, documents, write};
use parquet::basic::Compression;
use serde_json::Value;

fn bench(corpus: &Path, trace: &str, rank: u64, seconds: &str) -> Child {
    let sets = ["num_threads=2", "chunk_tokens=4096", "window_tokens=16384", "memory_budget=4MiB", "block_tokens=4096"];
    Command::new(env!("CARGO_BIN_EXE_forebay"))
        .args([
            "bench",
            corpus.to_str().unwrap(),
            "--seq-len",
            "128",
            "--batch-size",
            "8",
            "--shuffle",
            "--seconds",
            seconds,
        ])
        .args(sets.iter().flat_map(|set| ["--set", set]))
        .env("FOREBAY_PROGRESS", "0")
        .env("FOREBAY_TRACE", trace)
        .envs([("RANK", rank.to_string()), ("WORLD_SIZE", "2".to_owned())])
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn corpus(root: &Path) -> PathBuf {
    let corpus = root.join("corpus");
    std::fs::create_dir(&corpus).unwrap();
    let zstd = Container::Parquet { codec: Compression::ZSTD(Default::default()), encoding: None, pages: 2 };
    write(&corpus.join("a.parquet"), zstd, Dtype::I32, Shape::List, &documents(3000, 200, 50_000, 1), 200);
    corpus
}

fn events(path: &Path) -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).unwrap()
}

/// Spans by thread, in the order of their beginnings, the longer of two that begin at once first:
/// name, begin, end in nanoseconds.
fn spans(events: &[Value]) -> BTreeMap<u64, Vec<(String, i64, i64)>> {
    let mut threads: BTreeMap<u64, Vec<(String, i64, i64)>> = BTreeMap::new();
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let nanos = |key: &str| (event[key].as_f64().unwrap() * 1e3).round() as i64;
        let name = event["name"].as_str().unwrap().to_owned();
        let thread = threads.entry(event["tid"].as_u64().unwrap()).or_default();
        thread.push((name, nanos("ts"), nanos("ts") + nanos("dur")));
    }
    for thread in threads.values_mut() {
        thread.sort_by_key(|(_, began, ended)| (*began, -*ended));
    }
    threads
}

#[test]
fn a_trace_names_its_threads_and_its_spans_nest() {
    let root = tempfile::tempdir().unwrap();
    let corpus = corpus(root.path());
    let asked = root.path().join("trace-{rank}.json");
    assert!(bench(&corpus, asked.to_str().unwrap(), 1, "0.5").wait().unwrap().success());
    let events = events(&root.path().join("trace-1.json"));
    let process = events.iter().find(|event| event["name"] == "process_name").unwrap();
    assert!(process["args"]["name"].as_str().unwrap().starts_with("forebay rank 1 of 2, pid "), "{process}");
    let named: BTreeMap<u64, &str> = events
        .iter()
        .filter(|event| event["name"] == "thread_name")
        .map(|event| (event["tid"].as_u64().unwrap(), event["args"]["name"].as_str().unwrap()))
        .collect();
    let threads = spans(&events);
    let (mut total, mut took) = (BTreeMap::<&str, i64>::new(), 0);
    for (thread, spans) in &threads {
        let name = named.get(thread).unwrap_or_else(|| panic!("thread {thread} has no name"));
        let mut open: Vec<i64> = Vec::new();
        for (span, began, ended) in spans {
            while open.last().is_some_and(|end| end <= began) {
                open.pop();
            }
            // Times this large are rounded to less than a microsecond when JSON is read as floats.
            assert!(open.last().is_none_or(|end| *ended <= end + 1000), "{name}: {span} crosses the end of another");
            open.push(*ended);
            *total.entry(span.as_str()).or_default() += ended - began;
        }
        took = took.max(spans.last().unwrap().2 - spans[0].1);
    }
    assert!(
        named.values().any(|name| *name == "forebay-0") && named.values().any(|name| *name == "forebay-1"),
        "{named:?}"
    );
    for span in ["batch", "fill", "decode"] {
        assert!(total.get(span).is_some_and(|sum| *sum > 0), "{span}: {total:?}");
    }
    assert!(total.contains_key("wait") || total.contains_key("hand over"), "{total:?}");
    assert!(total["fill"] <= total["batch"] + 1_000_000, "{total:?}");
    // Two workers and a consumer cannot have worked longer than the clock went on.
    assert!(took > 300_000_000 && total["batch"].max(total["decode"]) <= 3 * took, "{total:?} in {took}");
}

#[test]
fn ranks_that_name_one_file_have_one_each_and_a_kill_leaves_json() {
    let root = tempfile::tempdir().unwrap();
    let corpus = corpus(root.path());
    let asked = root.path().join("trace.json");
    let mut ranks: Vec<Child> = (0..2).map(|rank| bench(&corpus, asked.to_str().unwrap(), rank, "30")).collect();
    let written = || -> Vec<PathBuf> {
        let files = std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|suffix| suffix == "json")).collect()
    };
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while written().len() < 2 || written().iter().any(|path| size(path) < 100_000) {
        assert!(std::time::Instant::now() < deadline, "{:?}", written());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    for rank in &mut ranks {
        rank.kill().unwrap();
        rank.wait().unwrap();
    }
    let mut pids: Vec<u64> = ranks.iter().map(|rank| rank.id().into()).collect();
    pids.sort_unstable();
    let mut found: Vec<u64> = written().iter().map(|path| events(path)[0]["pid"].as_u64().unwrap()).collect();
    found.sort_unstable();
    assert_eq!(found, pids);
}

#[test]
fn a_trace_that_is_full_ends_and_says_so() {
    let root = tempfile::tempdir().unwrap();
    let corpus = corpus(root.path());
    let trace = root.path().join("trace.json");
    let run = |limit: &str| {
        Command::new(env!("CARGO_BIN_EXE_forebay"))
            .args(["bench", corpus.to_str().unwrap(), "--seq-len=16", "--shuffle", "--seconds=1"])
            .envs([
                ("FOREBAY_PROGRESS", "0"),
                ("FOREBAY_TRACE", trace.to_str().unwrap()),
                ("FOREBAY_TRACE_LIMIT", limit),
            ])
            .output()
            .unwrap()
    };
    let ran = run("100KiB");
    let err = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{err}");
    assert!(err.contains("warning: the trace") && err.contains("has reached 102400 bytes"), "{err}");
    let size = std::fs::metadata(&trace).unwrap().len();
    assert!((10_000..103_000).contains(&size), "{size}");
    assert!(events(&trace).last().unwrap()["name"].as_str().unwrap().contains("reached its limit"));
    let ran = run("plenty");
    let err = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(2));
    assert!(err.contains("`FOREBAY_TRACE_LIMIT` must be bytes, such as `64MiB`, found `plenty`"), "{err}");
}
