//! Tests that Ctrl-C ends every command at once with status 130.
//!
//! `bench` prints its results so far.
#![cfg(unix)]

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use forebay::tokens::Dtype;
use forebay_tests::{Container, Shape, documents, write};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(5);

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(args).env("FOREBAY_PROGRESS", "0").stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn interrupt(child: &Child) {
    // SAFETY: a call that touches no memory, for a process that was not waited for yet.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
}

/// Status and output of a process that was just interrupted.
fn end(mut child: Child) -> (i32, String, String) {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > SOON {
            child.kill().unwrap();
            panic!("the process did not end within {SOON:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (child.wait().unwrap().code().expect("it ends by itself"), out, err)
}

fn shard(path: &Path, count: usize) {
    write(path, Container::ArrowFile(None), Dtype::U16, Shape::List, &documents(count, 60, 50_000, 1), 40);
}

/// Waits until the process has mapped or opened `path`, which is when it works with it.
#[cfg(target_os = "linux")]
fn wait_for(child: &Child, is_there: impl Fn(&str) -> bool) {
    let began = Instant::now();
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.id())).unwrap_or_default();
    while !is_there(&read("maps")) {
        assert!(began.elapsed() < SOON, "{}", read("maps"));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn bench_prints_what_it_measured_so_far() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.arrow");
    shard(&path, 400);
    let path = path.to_str().unwrap();
    for form in [&["--json"][..], &[]] {
        let args = ["bench", path, "--seq-len", "16", "--shuffle", "--seconds", "600"];
        let child = start(&[&args, form].concat());
        wait_for(&child, |maps| maps.contains("a.arrow"));
        // Time for a batch; without one it says so, which is right as well.
        std::thread::sleep(Duration::from_millis(500));
        interrupt(&child);
        let (status, out, err) = end(child);
        assert_eq!(status, 130, "{out}{err}");
        assert!(err.contains("interrupted"), "{err}");
        if form.is_empty() {
            assert!(out.contains("tokens/s"), "{out}{err}");
        } else {
            let json: Value = serde_json::from_str(&out).unwrap();
            assert_eq!(json["interrupted"], true);
            assert!(json["batches"].as_u64().unwrap() > 0, "{json}");
        }
    }
}

#[test]
fn commands_end_while_many_shards_open() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("source");
    std::fs::create_dir(&source).unwrap();
    shard(&source.join("a.arrow"), 2000);
    for link in 0..30_000 {
        std::fs::hard_link(source.join("a.arrow"), source.join(format!("b{link:05}.arrow"))).unwrap();
    }
    let (data, target) = (source.to_str().unwrap(), root.path().join("target"));
    for args in [
        &["bench", data][..],
        &["check", data],
        &["plan", data],
        &["verify", data],
        &["index", data, "--cache-dir", root.path().to_str().unwrap()],
        &["rewrite", data, target.to_str().unwrap()],
    ] {
        let mut child = start(args);
        std::thread::sleep(Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none(), "{args:?} ended by itself");
        interrupt(&child);
        let (status, out, _) = end(child);
        assert_eq!((status, out.as_str()), (130, ""), "{args:?}");
    }
}
