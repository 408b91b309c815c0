//! Tests that the table of settings is the only place where a setting is written.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

use forebay::Loader;
use forebay::settings::{self, Compared, Config, Setting, SettingKind, Taker, Value};
use forebay::tokens::Dtype;
use forebay_tests::{Container, Shape, documents, generated, write};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn generated_parts_are_those_that_the_table_gives() {
    for (path, text, wanted) in generated::files(&root()).unwrap() {
        assert!(text == wanted, "{} is out of date: run `make generate`", path.display());
    }
}

#[test]
fn every_class_takes_the_settings_that_the_table_says() {
    let files = generated::files(&root()).unwrap();
    for (taker, file) in [
        (Taker::Loader, "_loader.py"),
        (Taker::TokenDataset, "torch/dataset.py"),
        (Taker::DataLoader, "torch/loader.py"),
    ] {
        let (_, text, _) = files.iter().find(|(path, ..)| path.ends_with(file)).unwrap();
        for setting in settings::all().iter().filter(|setting| setting.is_taken_by(taker)) {
            let name = setting.name;
            assert!(text.contains(&format!("        {name}: {} | None = None,\n", setting.python())), "{file}: {name}");
            assert!(text.contains(&format!("            {name}={name},\n")), "{file}: {name}");
            assert!(text.contains(&format!("\n    {name}:\n        ")), "{file}: {name}");
        }
    }
}

/// The folders with hand-written code of the product, and pages.
const PLACES: [&str; 8] = [
    "loader/src",
    "cli/src",
    "bindings/src",
    "bindings/python",
    "docs",
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
];

/// The files that define settings.
const DEFINITIONS: [&str; 4] = [
    "loader/src/settings/table.rs",
    "loader/src/settings/config.rs",
    "loader/src/settings/forms.rs",
    "loader/src/settings/mixture.rs",
];

/// Pages that `scripts/pages.py` writes as a whole. A test in Python compares them with the code.
const WRITTEN_PAGES: [&str; 2] = ["docs/cli.md", "docs/python.md"];

/// The file that gives each choice of a setting its meaning, and the setting.
const MEANINGS: [(&str, &str); 1] = [("bindings/python/forebay/_formats.py", "batch_format")];

/// The files of `PLACES` by their paths from the root, with their text without tests and generated
/// parts.
fn by_hand() -> io::Result<Vec<(String, String)>> {
    fn walk(path: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
        if !path.is_dir() {
            let is_text = |end| ["rs", "py", "pyi", "md"].iter().any(|known| end == *known);
            found.extend(path.extension().is_some_and(is_text).then(|| path.to_owned()));
            return Ok(());
        }
        for entry in fs::read_dir(path)? {
            walk(&entry?.path(), found)?;
        }
        Ok(())
    }
    let mut paths = Vec::new();
    for place in PLACES {
        walk(&root().join(place), &mut paths)?;
    }
    let mut files = Vec::new();
    for path in paths {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
        if !DEFINITIONS.contains(&&*name) && !WRITTEN_PAGES.contains(&&*name) {
            let text = fs::read_to_string(&path)?;
            let text = text.split("#[cfg(test)]").next().unwrap();
            files.push((name.clone(), generated::by_hand(&name, text)?));
        }
    }
    Ok(files)
}

/// The settings whose names `line` lists, as strings or as keywords.
fn listed(line: &str) -> Vec<&'static str> {
    let is_listed = |name: &&str| {
        line.match_indices(name).any(|(at, _)| {
            let (before, after) = (&line[..at], &line[at + name.len()..]);
            let begins_a_word = !before.ends_with(|c: char| c.is_alphanumeric() || "_.`".contains(c));
            let is_keyword = after.starts_with('=') && !after.starts_with("==");
            before.ends_with('"') && after.starts_with('"') || begins_a_word && is_keyword
        })
    };
    settings::all().iter().map(|setting| setting.name).filter(is_listed).collect()
}

/// Adjacent lines that may not name [`MANY`] settings.
const LINES: usize = 10;
const MANY: usize = 8;

/// The choices among the text that says what a setting accepts.
fn choices(setting: &Setting) -> Vec<&'static str> {
    let accepts: &'static str = setting.accepts().leak();
    if setting.python().contains("Literal") { accepts.split('`').skip(1).step_by(2).collect() } else { Vec::new() }
}

/// The default of a setting as code may write it. Nothing and the lowest numbers are no secrets.
fn defaults(setting: &Setting) -> Vec<String> {
    match setting.value(&Config::default()) {
        Value::Integer(number) if number > 1 => vec![number.to_string(), setting.default_text()],
        Value::Text(text) => vec![format!("\"{text}\""), format!("'{text}'")],
        _ => Vec::new(),
    }
}

/// The second writings of settings in the text of a file.
fn second_writings(file: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let is_code = !file.ends_with(".md");
    let tight: Vec<String> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let is_mark = |word: &&str| !matches!(*word, "//" | "///" | "//!" | "#" | "#:");
    let flat = text.split_whitespace().filter(is_mark).collect::<Vec<_>>().join(" ");
    for setting in settings::all() {
        let name = setting.name;
        for sentence in setting.doc().split_inclusive(". ").map(str::trim).filter(|sentence| sentence.len() >= 24) {
            if flat.contains(sentence) {
                faults.push(format!("{file}: the doc of `{name}`: {sentence}"));
            }
        }
        if !is_code {
            continue;
        }
        let accepts = setting.accepts();
        if accepts.contains(|c: char| c.is_ascii_digit() || c == '`') && accepts.len() >= 24 && flat.contains(&accepts)
        {
            faults.push(format!("{file}: what `{name}` accepts: {accepts}"));
        }
        let choices = choices(setting);
        let quoted = |text: &str| choices.iter().filter(|choice| text.contains(&format!("\"{choice}\""))).count();
        let (in_line, in_file) = (text.lines().map(quoted).max().unwrap_or(0), quoted(text));
        let has_meaning = MEANINGS.contains(&(file, name));
        if !has_meaning && choices.len() >= 2 && (in_line >= 2 || (choices.len() >= 3 && in_file == choices.len())) {
            faults.push(format!("{file}: the choices of `{name}`"));
        }
        let forms: Vec<String> = defaults(setting)
            .iter()
            .flat_map(|value| [format!("{name}={value}"), format!("{name}:{value}"), format!("\"{name}\",{value}")])
            .collect();
        let is_default = |line: &str, form: &String| {
            let ends = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
            // Code in a message is quoted.
            line.split_once(form.as_str()).is_some_and(|(before, rest)| ends(rest) && !before.ends_with('`'))
        };
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            if forms.iter().any(|form| is_default(&tight[index], form)) {
                faults.push(format!("{file}:{number}: the default of `{name}`"));
            }
            let is_keyword =
                line.trim_start().starts_with(&format!("{name}: ")) && line.trim_end().ends_with("= None,");
            if file.ends_with(".py") && is_keyword {
                faults.push(format!("{file}:{number}: the keyword `{name}`"));
            }
        }
    }
    if is_code {
        let lines: Vec<Vec<&str>> = text.lines().map(listed).collect();
        for (index, window) in lines.windows(LINES.min(lines.len()).max(1)).enumerate() {
            let names: BTreeSet<_> = window.iter().flatten().collect();
            if names.len() >= MANY {
                faults.push(format!("{file}:{}: a list of settings: {names:?}", index + 1));
                break;
            }
        }
    }
    faults
}

#[test]
fn no_setting_is_written_a_second_time() {
    let files = by_hand().unwrap();
    assert!(files.len() > 100);
    let faults: Vec<_> = files.iter().flat_map(|(file, text)| second_writings(file, text)).collect();
    assert!(
        faults.is_empty(),
        "these belong to the table of settings; derive them from it, or from `make generate`:\n{}",
        faults.join("\n")
    );
}

#[test]
fn second_writings_are_found() {
    for (file, text, words) in [
        ("a.rs", "/// Id put before every\n/// non-empty document.", "the doc of `bos_id`"),
        ("a.md", "Sequences per rank\nand step.", "the doc of `batch_size`"),
        ("a.py", "    lanes: int | None = None,\n", "the keyword `lanes`"),
        ("a.py", "io: Literal[\"auto\", \"mmap\", \"pread\"]", "the choices of `io`"),
        ("a.rs", "Self::Drop => \"drop\",\n\"pad\"\n\"wrap\"\n\"short\"", "the choices of `remainder`"),
        ("a.rs", "\"expected an integer from 2 to 2^32, or `none`\"", "what `holdout` accepts"),
        ("a.py", "prefetch_batches = 4", "the default of `prefetch_batches`"),
        ("a.rs", "(\"seq_len\", 2048)", "the default of `seq_len`"),
        ("a.py", "f(seed=1, lanes=2, skip=3,\nextend=4, pad_id=5,\nepochs=6, io=7, split=8)", "a list of settings"),
        (
            "a.rs",
            "[\"seed\", \"lanes\", \"skip\", \"extend\", \"pad_id\", \"epochs\", \"io\", \"split\"]",
            "a list of settings",
        ),
    ] {
        let faults = second_writings(file, text);
        assert!(faults.iter().any(|fault| fault.contains(words)), "{text}: {faults:?}");
    }
    for (file, text) in [
        ("a.rs", "config.seed, config.lanes, config.skip, config.extend, config.pad_id, config.epochs, config.io"),
        ("a.py", "prefetch_batches = 40"),
        ("a.py", "\"set `prefetch_batches=4`\""),
        ("a.md", "Loader(seq_len=2048, seed=1, lanes=2, skip=3, extend=4, pad_id=5, epochs=6, io=7)"),
        ("a.py", "    shuffle: bool | None = None\n"),
    ] {
        assert_eq!(second_writings(file, text), [""; 0], "{text}");
    }
}

#[test]
fn a_state_compares_every_content_setting_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.arrow");
    write(&path, Container::ArrowFile(None), Dtype::I32, Shape::List, &documents(20, 9, 100, 1), 7);
    let config = Config { data: vec![path.display().to_string()], seq_len: 2, ..Config::default() };
    let state = Loader::open(config).unwrap().state();
    let has = |key: &str| state.entries().iter().any(|(name, _)| name == key);
    for setting in settings::all() {
        let name = setting.name;
        assert_eq!(setting.kind() == SettingKind::Content, setting.compared().is_some());
        match setting.compared() {
            None => assert!(!has(name), "`{name}` is no content setting"),
            Some(Compared::ByCorpus(keys, _) | Compared::ByProgress(keys, _)) => {
                assert!(keys.iter().all(|key| has(key)), "`{name}`: {keys:?}");
            }
            Some(_) => assert!(has(name), "`{name}` is not compared"),
        }
    }
}
