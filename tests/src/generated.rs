//! The parts of the tree that are made from the table of settings.
//!
//! A part lies in a file that is otherwise written by hand. A line begins it, and another line ends
//! it. `make generate` writes all parts. A test compares them with the table.

use std::path::{Path, PathBuf};
use std::{fs, io};

use forebay::settings::{self, Setting, Taker};

/// Longest line of a docstring.
const WIDTH: usize = 100;

/// A part of a file that the table gives the text of.
pub struct Part {
    /// The path of the file, from the root of the tree.
    pub file: &'static str,
    begin: &'static str,
    end: &'static str,
    text: fn() -> String,
}

/// Begins the keywords in a signature.
const KEYWORDS: &str = "        # settings: keywords, from `make generate`\n";
/// Begins the keywords in a call that passes them on.
const VALUES: &str = "            # settings: values, from `make generate`\n";
/// Begins the types of the keywords of `Loader`.
const TYPES: &str = "    # settings: types, from `make generate`\n";
/// Begins the types of the keywords of `forebay.torch.DataLoader`.
const TORCH_TYPES: &str = "    # settings: torch types, from `make generate`\n";
/// Ends a part of code.
const END: &str = "# settings: end\n";

const LOADER: &str = "bindings/python/forebay/_loader.py";
const TYPED: &str = "bindings/python/forebay/_keywords.py";
const DATASET: &str = "bindings/python/forebay/torch/dataset.py";
const TORCH_LOADER: &str = "bindings/python/forebay/torch/loader.py";

/// Every part.
pub const PARTS: &[Part] = &[
    Part {
        file: "docs/settings.md",
        begin: "<!-- settings:begin -->\n",
        end: "<!-- settings:end -->",
        text: settings::markdown,
    },
    Part { file: LOADER, begin: KEYWORDS, end: END, text: || keywords(Taker::Loader) },
    Part { file: LOADER, begin: VALUES, end: END, text: || values(Taker::Loader) },
    Part {
        file: LOADER,
        begin: "    Parameters\n    ----------\n",
        end: "\n    Raises\n",
        text: || parameters(Taker::Loader),
    },
    Part { file: TYPED, begin: TYPES, end: END, text: || types(Taker::Loader) },
    Part { file: TYPED, begin: TORCH_TYPES, end: END, text: || types(Taker::DataLoader) },
    Part { file: DATASET, begin: KEYWORDS, end: END, text: || keywords(Taker::TokenDataset) },
    Part { file: DATASET, begin: VALUES, end: END, text: || values(Taker::TokenDataset) },
    Part {
        file: DATASET,
        begin: "    Parameters\n    ----------\n",
        end: "    \"\"\"\n",
        text: || parameters(Taker::TokenDataset),
    },
    Part { file: TORCH_LOADER, begin: KEYWORDS, end: END, text: || keywords(Taker::DataLoader) },
    Part { file: TORCH_LOADER, begin: VALUES, end: END, text: || values(Taker::DataLoader) },
    Part {
        file: TORCH_LOADER,
        begin: "    Other Parameters\n    ----------------\n",
        end: "\n    Raises\n",
        text: || parameters(Taker::DataLoader),
    },
    Part {
        file: TORCH_LOADER,
        begin: "        # settings: `shuffle`, from `make generate`\n",
        end: "        # settings: end\n",
        text: || keyword(settings::find("shuffle").expect("the table has this setting")),
    },
];

impl Part {
    /// Cuts `text`, the text of the file, into the text before, of, and after the part.
    fn cut<'a>(&self, text: &'a str) -> io::Result<(&'a str, &'a str, &'a str)> {
        let Self { file, begin, end, .. } = self;
        let missing = |what: &str| io::Error::other(format!("{file} must have the line {what:?} once"));
        let (before, after) = text.split_once(begin).ok_or_else(|| missing(begin))?;
        if after.contains(begin) {
            return Err(missing(begin));
        }
        let length = after.find(end).ok_or_else(|| missing(end))?;
        // The blanks before an end belong to its line.
        let length = after[..length].trim_end_matches(' ').len();
        Ok((&text[..before.len() + begin.len()], &after[..length], &after[length..]))
    }
}

/// The files with parts, each by its path, with its text now and with the text that it should have.
pub fn files(root: &Path) -> io::Result<Vec<(PathBuf, String, String)>> {
    let mut files: Vec<(PathBuf, String, String)> = Vec::new();
    for part in PARTS {
        let path = root.join(part.file);
        if !files.iter().any(|(known, ..)| *known == path) {
            let text = fs::read_to_string(&path)?;
            files.push((path.clone(), text.clone(), text));
        }
        let (.., wanted) = files.iter_mut().find(|(known, ..)| *known == path).expect("added above");
        let (before, _, after) = part.cut(wanted)?;
        *wanted = format!("{before}{}{after}", (part.text)());
    }
    Ok(files)
}

/// The text of `file` without its parts.
pub fn by_hand(file: &str, text: &str) -> io::Result<String> {
    let mut left = text.to_owned();
    for part in PARTS.iter().filter(|part| part.file == file) {
        let (before, _, after) = part.cut(&left)?;
        left = format!("{before}{after}");
    }
    Ok(left)
}

fn taken(taker: Taker) -> impl Iterator<Item = &'static Setting> {
    settings::all().iter().filter(move |setting| setting.is_taken_by(taker))
}

fn keyword(setting: &Setting) -> String {
    format!("        {}: {} | None = None,\n", setting.name, setting.python())
}

/// The keywords of a signature. The data may be given by position.
fn keywords(taker: Taker) -> String {
    let after = |setting: &Setting| if setting.name == "data" { "        *,\n" } else { "" };
    taken(taker).map(|setting| keyword(setting) + after(setting)).collect()
}

/// The types of all keywords but those that decide the type of a batch.
fn types(taker: Taker) -> String {
    let decides = |setting: &&Setting| ["data", "fields", "targets", "batch_format"].contains(&setting.name);
    let line = |setting: &Setting| format!("    {}: {} | None\n", setting.name, setting.python());
    taken(taker).filter(|setting| !decides(setting)).map(line).collect()
}

fn values(taker: Taker) -> String {
    taken(taker).map(|setting| format!("            {0}={0},\n", setting.name)).collect()
}

/// The parameters as a docstring describes them.
fn parameters(taker: Taker) -> String {
    taken(taker).map(|setting| format!("    {}:\n{}", setting.name, wrapped(&description(setting), 8))).collect()
}

/// The meaning of a setting, its default, and the values that its type does not tell.
fn description(setting: &Setting) -> String {
    let mut text = setting.doc();
    // In Python, paths are a list, not text with commas.
    if setting.name != "data" {
        text.push_str(&format!(" Default: {}.", setting.default_text()));
        if setting.python() != "bool" {
            text.push_str(&format!(" Accepted: {}.", setting.accepts()));
        }
    }
    text.replace('\\', "\\\\")
}

/// Breaks `text` into lines that are indented by `indent` blanks.
fn wrapped(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split(' ') {
        if !line.is_empty() && indent + line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push_str(&format!("{:indent$}{line}\n", ""));
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines + &format!("{:indent$}{line}\n", "")
}
