//! Holds the structure of the core: rooms import one way, along the order that `lib.rs` gives them.

use std::fs;
use std::path::{Path, PathBuf};

fn core() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../loader/src")
}

/// The rooms in the order that the documentation of `lib.rs` gives them.
fn rooms() -> Vec<String> {
    let text = fs::read_to_string(core().join("lib.rs")).unwrap();
    let picture = text.split("//! ```text\n").nth(1).and_then(|rest| rest.split("//! ```").next()).unwrap();
    let words = picture.lines().flat_map(|line| line.trim_start_matches("//!").split_whitespace());
    words.filter(|word| *word != "->").map(str::to_owned).collect()
}

/// The modules that `lib.rs` declares.
fn declared() -> Vec<String> {
    let text = fs::read_to_string(core().join("lib.rs")).unwrap();
    let name = |line: &str| {
        let line = line.trim_start_matches("pub ");
        Some(line.strip_prefix("mod ")?.strip_suffix(';')?.to_owned())
    };
    text.lines().filter_map(name).collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The rooms that a line names by `crate::ROOM`, without those that a comment or a test module
/// names.
fn named(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices("crate::").map(|(at, found)| {
        let rest = &code[at + found.len()..];
        &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())]
    })
}

#[test]
fn rooms_import_only_from_rooms_before_them() {
    let (core, rooms) = (core(), rooms());
    let (mut drawn, mut declared) = (rooms.clone(), declared());
    drawn.sort();
    declared.sort();
    assert_eq!(drawn, declared, "the picture in `lib.rs` names every module");
    let mut files = Vec::new();
    sources(&core, &mut files);
    let mut faults = Vec::new();
    for path in files {
        let relative = path.strip_prefix(&core).unwrap();
        let room = relative.components().next().unwrap().as_os_str().to_string_lossy();
        let room = room.trim_end_matches(".rs");
        let Some(own) = rooms.iter().position(|name| name == room) else { continue };
        let text = fs::read_to_string(&path).unwrap();
        if relative.ends_with("tests.rs") {
            continue;
        }
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            for name in named(line) {
                let is_later = rooms.iter().position(|other| other == name).is_some_and(|other| other > own);
                if is_later {
                    faults.push(format!("{}:{}: `{room}` imports `{name}`", relative.display(), number + 1));
                }
            }
        }
    }
    assert!(faults.is_empty(), "imports run against the order of `lib.rs`:\n{}", faults.join("\n"));
}

/// Rooms that read data through the seam `storage` alone.
const WITHOUT_FILE_CALLS: [&str; 7] = ["format", "corpus", "layout", "order", "fill", "read", "buffer"];

#[test]
fn data_is_read_through_the_storage_alone() {
    let core = core();
    let mut faults = Vec::new();
    for room in WITHOUT_FILE_CALLS {
        let mut files = Vec::new();
        sources(&core.join(room), &mut files);
        for path in files.into_iter().filter(|path| !path.ends_with("tests.rs")) {
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            for (number, line) in code.lines().enumerate() {
                let line = line.split("//").next().unwrap_or_default();
                if ["std::fs", "File::open", "glob::glob", ".is_file()", ".is_dir()", ".canonicalize()", ".exists()"]
                    .iter()
                    .any(|call| line.contains(call))
                {
                    faults.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
                }
            }
        }
    }
    assert!(faults.is_empty(), "files are read past the seam `storage`:\n{}", faults.join("\n"));
}

#[test]
fn stores_are_asked_by_the_storage_alone() {
    let core = core();
    let mut files = Vec::new();
    sources(&core, &mut files);
    let asks = |path: &PathBuf| fs::read_to_string(path).unwrap().contains("forebay_remote");
    let others: Vec<_> = files.iter().filter(|path| !path.starts_with(core.join("storage")) && asks(path)).collect();
    assert!(others.is_empty(), "{others:?}");
    let manifest = fs::read_to_string(core.join("../../remote/Cargo.toml")).unwrap();
    let needs = manifest.split("[dependencies]").nth(1).unwrap();
    assert!(!needs.contains("forebay"), "the client of stores knows nothing of the loader");
}
