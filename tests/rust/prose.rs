//! Tests of the rules for comments, and of the list of files with `unsafe`.
//!
//! A comment has lines of at most 100 characters. A doc comment begins with a capital letter, and
//! not with a word that makes it a fragment. `prose_unclean.txt` lists the files that still break
//! these rules; a file must leave the list as soon as it keeps them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest line of a comment, in characters.
const MOST: usize = 100;

/// First words that make a doc comment a fragment.
const FRAGMENTS: [&str; 3] = ["Of ", "As ", "That "];

/// The folders with code.
const FOLDERS: [&str; 8] = ["loader", "service", "cli", "bindings", "benches", "tests", "examples", "scripts"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files of `FOLDERS` with one of `extensions`, by their paths from the root.
fn files(extensions: &[&str]) -> Vec<(String, String)> {
    fn walk(folder: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy();
            if name.starts_with('.') || name == "target" || name == "__pycache__" {
                continue;
            }
            if path.is_dir() {
                walk(&path, extensions, found);
            } else if path.extension().is_some_and(|found| extensions.iter().any(|extension| found == *extension)) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    for folder in FOLDERS {
        walk(&root().join(folder), extensions, &mut found);
    }
    found.sort();
    let relative = |path: &Path| path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
    found.iter().map(|path| (relative(path), fs::read_to_string(path).unwrap())).collect()
}

/// A line of a comment, and whether it is the first line of a documentation comment.
struct CommentLine<'a> {
    number: usize,
    line: &'a str,
    /// The text of the first line of a documentation comment.
    first: Option<&'a str>,
}

/// The comment lines of Rust source text.
fn rust_comments(text: &str) -> Vec<CommentLine<'_>> {
    let mut lines = Vec::new();
    let mut previous = "";
    for (index, line) in text.lines().enumerate() {
        let code = line.trim_start();
        let marker = ["///", "//!"].into_iter().find(|marker| code.starts_with(marker)).unwrap_or_default();
        if code.starts_with("//") {
            let is_first = !marker.is_empty() && previous != marker;
            let first = is_first.then(|| code[marker.len()..].trim_start());
            lines.push(CommentLine { number: index + 1, line, first });
        }
        previous = marker;
    }
    lines
}

/// The comment lines and the lines of docstrings of Python source text.
fn python_comments(text: &str) -> Vec<CommentLine<'_>> {
    let mut lines = Vec::new();
    let (mut in_docstring, mut in_text, mut after_marker) = (false, false, false);
    for (index, line) in text.lines().enumerate() {
        let code = line.trim_start();
        let number = index + 1;
        // A string that begins after code is no documentation.
        let has_odd_quotes = code.matches("\"\"\"").count() % 2 == 1;
        if in_text {
            in_text = !has_odd_quotes;
        } else if in_docstring {
            lines.push(CommentLine { number, line, first: None });
            in_docstring = !code.contains("\"\"\"");
        } else if let Some(text) = code.strip_prefix("\"\"\"").or_else(|| code.strip_prefix("r\"\"\"")) {
            lines.push(CommentLine { number, line, first: Some(text) });
            in_docstring = !text.contains("\"\"\"");
        } else if let Some(text) = code.strip_prefix("#:") {
            lines.push(CommentLine { number, line, first: (!after_marker).then(|| text.trim_start()) });
        } else if code.starts_with('#') {
            lines.push(CommentLine { number, line, first: None });
        } else {
            in_text = has_odd_quotes;
        }
        after_marker = code.starts_with("#:");
    }
    lines
}

/// The broken rules of one file, one line for each.
fn faults(path: &str, text: &str) -> Vec<String> {
    let comments = if path.ends_with(".rs") { rust_comments(text) } else { python_comments(text) };
    let mut faults = Vec::new();
    for CommentLine { number, line, first } in comments {
        let length = line.chars().count();
        if length > MOST {
            faults.push(format!("{path}:{number}: {length} characters, at most {MOST} are allowed"));
        }
        let Some(first) = first else { continue };
        if first.starts_with(char::is_lowercase) {
            faults.push(format!("{path}:{number}: a doc comment begins in lower case: `{first}`"));
        }
        if FRAGMENTS.iter().any(|fragment| first.starts_with(fragment)) {
            faults.push(format!("{path}:{number}: a doc comment begins as a fragment: `{first}`"));
        }
    }
    faults
}

#[test]
fn comments_keep_the_rules_of_prose() {
    let list = fs::read_to_string(root().join("tests/rust/prose_unclean.txt")).unwrap();
    let mut unclean: BTreeSet<&str> = list.lines().filter(|line| !line.is_empty()).collect();
    let mut found = Vec::new();
    for (path, text) in files(&["rs", "py", "pyi"]) {
        let faults = faults(&path, &text);
        match (unclean.remove(path.as_str()), faults.is_empty()) {
            (true, true) => found.push(format!("{path}: it keeps the rules now, take it out of prose_unclean.txt")),
            (true, false) => {}
            (false, _) => found.extend(faults),
        }
    }
    found.extend(unclean.iter().map(|path| format!("{path}: it does not exist, take it out of prose_unclean.txt")));
    assert!(found.is_empty(), "comments break the rules of prose:\n{}", found.join("\n"));
}

#[test]
fn faults_of_prose_are_found() {
    let long = format!("/// {}", "x".repeat(MOST));
    let long_code = format!("x = {}", "1".repeat(MOST));
    for (path, text, expected) in [
        ("a.rs", "/// Counts rows.\n/// of a shard", 0),
        ("a.rs", "/// counts rows.", 1),
        ("a.rs", "//! Of `pairs`.", 1),
        ("a.rs", "    // as it comes", 0),
        ("a.rs", &long, 2),
        ("a.py", "def f():\n    \"\"\"Counts rows.\n\n    as they come\n    \"\"\"\n", 0),
        ("a.py", "\"\"\"That row.\"\"\"\n#: the path\n#: of it\n", 2),
        ("a.py", "text = \"\"\"\nthat\n\"\"\"\n", 0),
        ("a.py", &format!("text = \"\"\"\nthat\n\"\"\"\n{long_code}\n\"\"\"of it\"\"\"\n"), 1),
    ] {
        assert_eq!(faults(path, text).len(), expected, "{path}: {text}");
    }
}

#[test]
fn contributing_lists_the_files_with_unsafe() {
    let is_unsafe = |text: &str| {
        let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
        code.flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_')).any(|word| word == "unsafe")
    };
    let own = "tests/rust/prose.rs";
    let tree: BTreeSet<String> = files(&["rs"])
        .into_iter()
        .filter(|(path, text)| path != own && is_unsafe(text))
        .map(|(path, _)| path)
        .collect();
    let text = fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let section = text.split("## Files with `unsafe`\n").nth(1).expect("CONTRIBUTING.md has a list of files");
    let rows = section.split("\n## ").next().unwrap_or_default().lines().filter_map(|line| line.strip_prefix("| `"));
    let listed: BTreeSet<String> = rows.filter_map(|row| row.split('`').next()).map(str::to_owned).collect();
    let missing: Vec<_> = tree.difference(&listed).collect();
    let superfluous: Vec<_> = listed.difference(&tree).collect();
    assert!(
        missing.is_empty() && superfluous.is_empty(),
        "the list of files with `unsafe` in CONTRIBUTING.md lacks {missing:?}, and names {superfluous:?} without need"
    );
}
