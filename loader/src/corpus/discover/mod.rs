//! Finds the shards that paths, folders and patterns mean, in corpus order.
//!
//! Shards of a list keep the order of the list. Shards of a folder or a pattern are sorted bytewise
//! by relative path, so that the order is the same on every machine. A shard's name is relative to
//! the place where it was found, so that a corpus may move and stay the same corpus.
//!
//! Folders that are not plain corpora are refused with a remedy (`plain.rs`). Reading all their
//! files would give removed rows, test splits, or the same rows twice.

mod pattern;
mod plain;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{self, FORMATS, suffixes};
use crate::settings::DataFormat;
use crate::storage::{self, Files, Item, ItemKind};

/// The file beside the shards in which `forebay rewrite` notes its progress.
pub const REWRITING: &str = "_forebay_rewrite.jsonl";

/// A shard to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardFile {
    /// Location of the shard.
    pub path: PathBuf,
    /// Name in the corpus: the path below the root, with `/` between the parts.
    pub name: String,
}

/// The shards of a corpus, before they are opened.
#[derive(Clone, Debug, Default)]
pub struct Discovery {
    /// The shards in corpus order.
    pub shards: Vec<ShardFile>,
    /// Warnings for the user, one line each.
    pub warnings: Vec<String>,
}

/// Finds the shards of `data`, in order.
///
/// If `format` names a family of formats, folders leave out files of other families, with a
/// warning. A file of another family that `data` names is refused when it is opened.
pub fn find(files: &Files, data: &[String], format: DataFormat) -> Result<Discovery> {
    let mut found = Discovery::default();
    let mut faults = Vec::new();
    files.prepare(data, &plain::logs())?;
    for entry in data {
        match find_entry(files, entry, format) {
            Ok(more) => {
                found.shards.extend(more.shards);
                found.warnings.extend(more.warnings);
            }
            Err(error) => faults.push(error),
        }
    }
    let mut folders = Folders { files, seen: HashMap::new(), real: HashMap::new() };
    let mut seen = HashMap::with_capacity(found.shards.len());
    for shard in &found.shards {
        let key = (folders.number(&shard.path), shard.path.file_name());
        if let Some(first) = seen.insert(key, &shard.path) {
            faults.push(Error::config(format!(
                "a shard is listed twice, as `{}` and `{}`: list it once",
                first.display(),
                shard.path.display()
            )));
        }
    }
    if faults.is_empty() { Ok(found) } else { Err(Error::all(faults)) }
}

fn find_entry(files: &Files, entry: &str, format: DataFormat) -> Result<Discovery> {
    let path = Path::new(entry);
    let there = files.stat_if_there(path);
    if matches!(there, Ok(None))
        && let Some(path) = format::ids_of_prefix(files, entry)?
    {
        let shard = ShardFile { name: file_name(&path), path };
        return Ok(Discovery { shards: vec![shard], warnings: Vec::new() });
    }
    match there {
        Ok(None) if is_url(entry) && !storage::is_remote(path) => Err(Error::config(format!(
            "cannot read `{entry}`: the URLs of object stores begin with `s3://`, `gs://`, `az://`, `http://`, \
             `https://` or `hf://datasets/`{}",
            if cfg!(feature = "remote") { "" } else { ", and this build of forebay reads none of them" }
        ))),
        Ok(Some(stat)) if stat.kind == ItemKind::Folder => find_in_folder(files, path, format),
        Ok(Some(_)) => {
            let shard = ShardFile { path: path.to_owned(), name: file_name(path) };
            Ok(Discovery { shards: vec![shard], warnings: Vec::new() })
        }
        _ if entry.contains(pattern::WILDCARDS) => find_by_pattern(files, entry, format),
        Ok(None) => Err(Error::new(
            ErrorKind::NotFound,
            format!("cannot find `{entry}`: no such file or folder, and not a pattern"),
        )),
        Err(error) => Err(error),
    }
}

fn find_in_folder(files: &Files, folder: &Path, format: DataFormat) -> Result<Discovery> {
    plain::check_parents(files, folder)?;
    let mut search = Search::new(files, folder, format);
    search.walk(folder, "")?;
    let other = search.other;
    let found = search.finish(folder, true)?;
    if found.shards.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "no shards found: searched `{}` and the folders in it for files ending in .{}, found {}; name files or a pattern instead",
                folder.display(),
                suffixes(format).join(", ."),
                if other == 1 { "1 other file".to_owned() } else { format!("{other} other files") },
            ),
        ));
    }
    Ok(found)
}

/// Finds the files that `pattern` matches, and searches the folders that it matches.
fn find_by_pattern(files: &Files, text: &str, format: DataFormat) -> Result<Discovery> {
    // Names are relative to the part of the pattern before its first wildcard.
    let (fixed, items) = pattern::expand(files, text)?;
    plain::check_parents(files, &fixed)?;
    // A wildcard does not match the names that a search of a folder leaves out, unless the pattern
    // spells such a name out.
    let spelled_out = is_hidden(&relative_name(Path::new(text), &fixed));
    let mut search = Search::new(files, &fixed, format);
    if search.holds(&fixed, REWRITING)? {
        check_rewriting(files, &fixed)?;
    }
    for item in items {
        let name = relative_name(&item.location, &fixed);
        if !spelled_out && is_hidden(&name) {
            continue;
        }
        match item.kind {
            ItemKind::Folder if name.is_empty() => search.walk(&item.location, "")?,
            ItemKind::Folder => search.walk(&item.location, &format!("{name}/"))?,
            ItemKind::File => search.found.push((None, ShardFile { path: item.location, name })),
            ItemKind::Other => {}
        }
    }
    // The files that belong to others are read with these.
    let named: HashSet<PathBuf> = search.found.iter().map(|(_, shard)| shard.path.clone()).collect();
    search.found.retain(|(_, shard)| !format::owners(&shard.path).iter().any(|owner| named.contains(owner)));
    let names_caches = text.rsplit('/').next().is_some_and(|last| last.starts_with(plain::CACHE_PREFIX));
    let found = search.finish(&fixed, !names_caches)?;
    if found.shards.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, format!("no shards found: the pattern `{text}` matches no file")));
    }
    Ok(found)
}

/// Tells whether `entry` begins with a scheme, as in `s3://bucket`.
fn is_url(entry: &str) -> bool {
    let scheme = entry.split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| {
        !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+.-".contains(c))
    })
}

fn is_hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with(['_', '.']))
}

/// Fails if `forebay rewrite` was begun in `folder` and is not complete.
///
/// Its shards are sound, but some are missing.
fn check_rewriting(files: &Files, folder: &Path) -> Result<()> {
    let path = folder.join(REWRITING);
    let Some(notes) = files.read_if_there(&path)? else { return Ok(()) };
    let line = notes.trim_ascii_end().rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    if serde_json::from_slice::<serde_json::Value>(line).is_ok_and(|line| line.get("complete").is_some()) {
        return Ok(());
    }
    Err(Error::data(
        "this rewriting was begun and is not complete: run the same `forebay rewrite` again, it goes on where it stopped",
    )
    .at(folder))
}

/// Gives a number to each folder that holds files. A folder and the links to it have one number.
///
/// A link at the end of a path is not followed. The cache of a hub links several names to one file
/// if their content is the same.
struct Folders<'a> {
    files: &'a Files,
    /// The numbers by folder. Thousands of shards share a folder, and resolving its links asks the
    /// system for each of its parts.
    seen: HashMap<&'a OsStr, usize>,
    real: HashMap<PathBuf, usize>,
}

impl<'a> Folders<'a> {
    fn number(&mut self, path: &'a Path) -> usize {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        *self.seen.entry(folder.as_os_str()).or_insert_with(|| {
            let number = self.real.len();
            let real = self.files.canonical(folder).unwrap_or_else(|_| folder.to_owned());
            *self.real.entry(real).or_insert(number)
        })
    }
}

/// The files of a folder that `datasets.Dataset.save_to_disk` wrote, in the order of its state.
fn find_saved_dataset(files: &Files, folder: &Path) -> Result<Vec<ShardFile>> {
    let path = folder.join(DATASET_STATE);
    let text = files.read_if_there(&path)?.unwrap_or_default();
    let state: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|error| Error::data("the dataset's state is not valid JSON").with_source(error).at(&path))?;
    let listed = state.get("_data_files").and_then(serde_json::Value::as_array).ok_or_else(|| {
        Error::data("the dataset's state has no list `_data_files`: it was not written by `save_to_disk`").at(&path)
    })?;
    if listed.is_empty() {
        return Err(
            Error::new(ErrorKind::NotFound, "no shards found: the dataset's state lists no data files").at(&path)
        );
    }
    if let Some(indices) = state.get("_indices_data_files").and_then(serde_json::Value::as_array)
        && !indices.is_empty()
    {
        return Err(Error::data(
            "the dataset was saved with an indices mapping (a shuffle or select): \
             call `flatten_indices()` before `save_to_disk`",
        )
        .at(&path));
    }
    let shard = |listed: &serde_json::Value| {
        let name = listed.get("filename").and_then(serde_json::Value::as_str).ok_or_else(|| {
            Error::data("an entry of `_data_files` in the dataset's state has no `filename`").at(&path)
        })?;
        let file = folder.join(name);
        if !files.has_file(&file)? {
            let message = "the dataset's state lists a file that is not there";
            return Err(Error::new(ErrorKind::NotFound, message).at(&file));
        }
        Ok(ShardFile { path: file, name: name.to_owned() })
    };
    listed.iter().map(shard).collect()
}

/// The file that marks a folder written by `datasets.Dataset.save_to_disk`.
const DATASET_STATE: &str = "state.json";
/// The file that marks a folder of several such datasets.
const DATASET_DICT: &str = "dataset_dict.json";

/// A search of folders for shards.
struct Search<'a> {
    files: &'a Files,
    root: &'a Path,
    format: DataFormat,
    suffixes: Vec<&'static str>,
    /// The shards, each with an optional key that sorts it instead of its name. Shards of a saved
    /// dataset have the key of their folder, and keep their own order.
    found: Vec<(Option<String>, ShardFile)>,
    /// Files that `format` leaves out.
    left_out: Vec<String>,
    /// The number of files without the suffix of a shard.
    other: usize,
    /// The folders on the way to the searched one. They end loops of links.
    folders: Vec<PathBuf>,
}

impl<'a> Search<'a> {
    fn new(files: &'a Files, root: &'a Path, format: DataFormat) -> Self {
        let (found, left_out, folders) = (Vec::new(), Vec::new(), Vec::new());
        Self { files, root, format, suffixes: suffixes(format), found, left_out, other: 0, folders }
    }

    fn holds(&self, folder: &Path, name: &str) -> Result<bool> {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        self.files.has_file(&folder.join(name))
    }

    /// Searches `folder`. Names of its files begin with `prefix`.
    fn walk(&mut self, folder: &Path, prefix: &str) -> Result<()> {
        let real = self.files.canonical(folder)?;
        if self.folders.contains(&real) {
            return Ok(());
        }
        let items = self.files.list(folder)?;
        plain::check_table(self.files, folder, &items)?;
        let has = |name: &str| items.iter().any(|item| item.name == name && item.kind == ItemKind::File);
        // A saved dataset may hold caches of `map`, which are not part of it.
        if has(DATASET_STATE) {
            let key = if prefix.is_empty() { "/" } else { prefix };
            for file in find_saved_dataset(self.files, folder)? {
                let name = relative_name(&file.path, self.root);
                self.found.push((Some(key.to_owned()), ShardFile { name, ..file }));
            }
            return Ok(());
        }
        if has(DATASET_DICT) {
            let splits: Vec<&str> =
                items.iter().filter(|item| item.kind == ItemKind::Folder).map(|item| item.name.as_str()).collect();
            return Err(Error::config(format!(
                "`{}` holds several splits (`{}`): name one of them, such as `{}`",
                folder.display(),
                splits.join("`, `"),
                folder.join(splits.first().unwrap_or(&"train")).display()
            )));
        }
        self.folders.push(real);
        for Item { name, location, kind, .. } in items {
            if is_hidden(&name) {
                if name == REWRITING {
                    check_rewriting(self.files, folder)?;
                }
                continue;
            }
            if kind == ItemKind::Folder {
                self.walk(&location, &format!("{prefix}{name}/"))?;
            } else if has_suffix(&location, &self.suffixes) {
                self.found.push((None, ShardFile { path: location, name: format!("{prefix}{name}") }));
            } else if FORMATS.iter().any(|entry| has_suffix(&location, entry.suffixes)) {
                self.left_out.push(format!("{prefix}{name}"));
            } else {
                self.other += 1;
            }
        }
        self.folders.pop();
        Ok(())
    }

    /// Sorts the shards found below `folder`. Fails if the folder is not a plain corpus.
    fn finish(mut self, folder: &Path, without_caches: bool) -> Result<Discovery> {
        self.found.sort_by(|a, b| sorted_by(a).cmp(sorted_by(b)));
        let mut warnings = Vec::new();
        if let Some(first) = self.left_out.first() {
            let count = self.left_out.len();
            warnings.push(format!(
                "`format` is {}, so that {count} {} of `{}` {} left out, such as `{first}`",
                self.format.name(),
                if count == 1 { "file" } else { "files" },
                folder.display(),
                if count == 1 { "is" } else { "are" },
            ));
        }
        if without_caches {
            // The state of a saved dataset lists its files, so that any name is right for them.
            let unlisted = self.found.iter().filter(|(key, _)| key.is_none()).map(|(_, shard)| shard);
            plain::check_caches(folder, unlisted)?;
        }
        plain::check_splits(folder, self.found.iter().map(|(_, shard)| shard))?;
        Ok(Discovery { shards: self.found.into_iter().map(|(_, shard)| shard).collect(), warnings })
    }
}

fn sorted_by((key, shard): &(Option<String>, ShardFile)) -> &[u8] {
    key.as_ref().unwrap_or(&shard.name).as_bytes()
}

fn has_suffix(path: &Path, suffixes: &[&str]) -> bool {
    path.extension().is_some_and(|suffix| suffixes.iter().any(|known| suffix.eq_ignore_ascii_case(known)))
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.to_string_lossy().into_owned(), |name| name.to_string_lossy().into_owned())
}

fn relative_name(path: &Path, root: &Path) -> String {
    let relative = path.strip_prefix(root).unwrap_or(path);
    let parts: Vec<_> = relative.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

#[cfg(test)]
mod tests;
