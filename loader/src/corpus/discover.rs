//! Finds the shards that paths, folders and patterns mean, in corpus order.
//!
//! The order is that of the list given; a folder is searched recursively and sorted bytewise by relative path, so that it is the same on every
//! machine. The name of a shard is relative to where it was found: a corpus may move without becoming another one.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::format::suffixes;
use crate::settings::DataFormat;

/// Where `forebay rewrite` notes what it has done, beside the shards.
pub const REWRITING: &str = "_forebay_rewrite.jsonl";

/// A shard to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its name in the corpus: the path below the root it was found under, with `/` between the parts.
    pub name: String,
}

/// The shards of `data`, in order. Files of another family than `format` are refused when they are opened, except in folders, where they are left out.
pub fn find(data: &[String], format: DataFormat) -> Result<Vec<ShardFile>> {
    let mut shards = Vec::new();
    let mut faults = Vec::new();
    for entry in data {
        match find_one(entry, format) {
            Ok(found) => shards.extend(found),
            Err(error) => faults.push(error),
        }
    }
    let mut folders = Folders::default();
    let mut seen = HashMap::with_capacity(shards.len());
    for shard in &shards {
        let place = (folders.number(&shard.path), shard.path.file_name());
        if let Some(first) = seen.insert(place, &shard.path) {
            faults.push(Error::config(format!(
                "a shard is listed twice: `{}` and `{}`; each token must be there once",
                first.display(),
                shard.path.display()
            )));
        }
    }
    if faults.is_empty() { Ok(shards) } else { Err(Error::all(faults)) }
}

fn find_one(entry: &str, format: DataFormat) -> Result<Vec<ShardFile>> {
    let path = Path::new(entry);
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => find_in_folder(path, format),
        Ok(_) => Ok(vec![ShardFile { path: path.to_owned(), name: file_name(path) }]),
        Err(_) if entry.contains(['*', '?', '[']) => find_pattern(entry),
        Err(error) => {
            Err(Error::io(format!("cannot find `{entry}`: no such file or folder, and not a pattern"), error))
        }
    }
}

fn find_pattern(pattern: &str) -> Result<Vec<ShardFile>> {
    let paths = glob::glob(pattern)
        .map_err(|error| Error::config(format!("`data` holds the invalid pattern `{pattern}`")).with_source(error))?;
    let mut found: Vec<PathBuf> = Vec::new();
    for path in paths {
        let path = path.map_err(|error| {
            let place = error.path().to_owned();
            Error::io(format!("cannot search `{pattern}`"), error.into()).at(&place)
        })?;
        if path.is_file() {
            found.push(path);
        }
    }
    // Relative to the part of the pattern before its first wildcard, as a folder's files are to the folder.
    let fixed: PathBuf = Path::new(pattern)
        .components()
        .take_while(|part| !part.as_os_str().to_string_lossy().contains(['*', '?', '[']))
        .collect();
    // A wildcard passes over the names that a search of the folder passes over, unless the pattern spells one out.
    let is_hidden = |name: &str| name.split('/').any(|part| part.starts_with(['_', '.']));
    let spelled_out = is_hidden(&relative_name(Path::new(pattern), &fixed));
    let mut shards: Vec<ShardFile> =
        found.into_iter().map(|path| ShardFile { name: relative_name(&path, &fixed), path }).collect();
    shards.retain(|shard| spelled_out || !is_hidden(&shard.name));
    check_rewriting(&fixed)?;
    shards.sort_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
    if shards.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("no shards found: the pattern `{pattern}` matches no file"),
        ));
    }
    Ok(shards)
}

/// Fails if `folder` is what `forebay rewrite` has begun and not ended: the shards that are there are sound, and not all.
fn check_rewriting(folder: &Path) -> Result<()> {
    let path = folder.join(REWRITING);
    // Its last line is a short one once all is there; those before it are one for each file.
    let last = File::open(&path).and_then(|mut file| {
        let len = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(len.saturating_sub(64)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map(|_| bytes)
    });
    let last = match last {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("cannot read what `forebay rewrite` notes", error).at(&path)),
        Ok(last) => last,
    };
    let line = last.trim_ascii_end().rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    if serde_json::from_slice::<serde_json::Value>(line).is_ok_and(|line| line.get("complete").is_some()) {
        return Ok(());
    }
    Err(Error::data(
        "this rewriting was begun and is not complete: run the same `forebay rewrite` again, which goes on where it stopped",
    )
    .at(folder))
}

fn find_in_folder(folder: &Path, format: DataFormat) -> Result<Vec<ShardFile>> {
    let mut search =
        Search { root: folder, suffixes: suffixes(format), found: Vec::new(), other: 0, folders: Vec::new() };
    search.walk(folder, "")?;
    search.found.sort_by(|a, b| sorted_by(a).cmp(sorted_by(b)));
    let shards: Vec<ShardFile> = std::mem::take(&mut search.found).into_iter().map(|(_, shard)| shard).collect();
    if shards.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "no shards found: searched `{}` and the folders in it for files ending in .{}, found {} other files; name files or a pattern instead",
                folder.display(),
                search.suffixes.join(", ."),
                search.other
            ),
        ));
    }
    Ok(shards)
}

fn sorted_by((key, shard): &(Option<String>, ShardFile)) -> &[u8] {
    key.as_ref().unwrap_or(&shard.name).as_bytes()
}

/// The folders that paths are in, by number: the same one for a folder and for links to it. A link at the end of a path is not looked at: the cache of
/// a hub links several names to one file where their content is the same.
#[derive(Default)]
struct Folders<'a> {
    /// Shards by the thousand share a folder, and resolving its links asks the system for each of its parts.
    seen: HashMap<&'a OsStr, usize>,
    real: HashMap<PathBuf, usize>,
}

impl<'a> Folders<'a> {
    fn number(&mut self, path: &'a Path) -> usize {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        *self.seen.entry(folder.as_os_str()).or_insert_with(|| {
            let number = self.real.len();
            let real = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
            *self.real.entry(real).or_insert(number)
        })
    }
}

/// The files of a folder that `datasets.Dataset.save_to_disk` wrote, in the order of its state.
fn find_saved_dataset(folder: &Path) -> Result<Vec<ShardFile>> {
    let path = folder.join("state.json");
    let text = std::fs::read(&path).map_err(|error| Error::io("cannot read the dataset's state", error).at(&path))?;
    let state: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|error| Error::data("the dataset's state is not valid JSON").with_source(error).at(&path))?;
    let files = state.get("_data_files").and_then(serde_json::Value::as_array).ok_or_else(|| {
        Error::data("the dataset's state has no list `_data_files`: it was not written by `save_to_disk`").at(&path)
    })?;
    if files.is_empty() {
        return Err(
            Error::new(ErrorKind::NotFound, "no shards found: the dataset's state lists no data files").at(&path)
        );
    }
    if let Some(indices) = state.get("_indices_data_files").and_then(serde_json::Value::as_array)
        && !indices.is_empty()
    {
        return Err(Error::data(
            "the dataset was saved with an indices mapping (a shuffle or select): call `flatten_indices()` before `save_to_disk`",
        )
        .at(&path));
    }
    files
        .iter()
        .map(|file| {
            let name = file.get("filename").and_then(serde_json::Value::as_str).ok_or_else(|| {
                Error::data("an entry of `_data_files` in the dataset's state has no `filename`").at(&path)
            })?;
            let file = folder.join(name);
            if !file.is_file() {
                return Err(
                    Error::new(ErrorKind::NotFound, "the dataset's state lists a file that is not there").at(&file)
                );
            }
            Ok(ShardFile { path: file, name: name.to_owned() })
        })
        .collect()
}

struct Search<'a> {
    root: &'a Path,
    suffixes: Vec<&'static str>,
    /// Shards, each with what it is sorted by in place of its name: the folder's, where a saved dataset has its own order.
    found: Vec<(Option<String>, ShardFile)>,
    /// Files passed over.
    other: usize,
    /// The folders being searched, to end loops of links.
    folders: Vec<PathBuf>,
}

impl Search<'_> {
    /// Searches `folder`, below which names begin with `prefix`.
    fn walk(&mut self, folder: &Path, prefix: &str) -> Result<()> {
        let failed = |error| Error::io("cannot read folder", error).at(folder);
        let real = folder.canonicalize().map_err(failed)?;
        if self.folders.contains(&real) {
            return Ok(());
        }
        // Wherever it is met: beside its files a saved dataset may hold caches of `map`, which are not part of it.
        if folder.join("state.json").is_file() {
            let key = if prefix.is_empty() { "/" } else { prefix };
            for file in find_saved_dataset(folder)? {
                let name = relative_name(&file.path, self.root);
                self.found.push((Some(key.to_owned()), ShardFile { name, ..file }));
            }
            return Ok(());
        }
        if folder.join("dataset_dict.json").is_file() {
            let splits = subfolders(folder);
            return Err(Error::config(format!(
                "`{}` holds several splits (`{}`): name one of them, such as `{}`",
                folder.display(),
                splits.join("`, `"),
                folder.join(splits.first().map_or("train", String::as_str)).display()
            )));
        }
        self.folders.push(real);
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(['_', '.']) {
                if name == REWRITING {
                    check_rewriting(folder)?;
                }
                continue;
            }
            let path = entry.path();
            // Only a link's kind has to be asked for.
            let kind = entry.file_type().map_err(failed)?;
            if if kind.is_symlink() { path.is_dir() } else { kind.is_dir() } {
                self.walk(&path, &format!("{prefix}{name}/"))?;
            } else if path
                .extension()
                .is_some_and(|suffix| self.suffixes.iter().any(|known| suffix.eq_ignore_ascii_case(known)))
            {
                self.found.push((None, ShardFile { path, name: format!("{prefix}{name}") }));
            } else {
                self.other += 1;
            }
        }
        self.folders.pop();
        Ok(())
    }
}

fn subfolders(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    names
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
mod tests {
    use super::*;

    fn names(data: &[&Path], format: DataFormat) -> Result<Vec<String>> {
        let data: Vec<String> = data.iter().map(|path| path.to_str().unwrap().to_owned()).collect();
        Ok(find(&data, format)?.into_iter().map(|shard| shard.name).collect())
    }

    fn touch(root: &Path, names: &[&str]) {
        for name in names {
            std::fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            std::fs::write(root.join(name), b"x").unwrap();
        }
    }

    #[test]
    fn folders_are_searched_bytewise_without_hidden_files() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        touch(
            root,
            &["b/1.parquet", "a.parquet", "B.parquet", "b.parquet", "_x/1.parquet", ".y.parquet", "n.txt", "z.arrow"],
        );
        assert_eq!(
            names(&[root], DataFormat::Auto).unwrap(),
            ["B.parquet", "a.parquet", "b.parquet", "b/1.parquet", "z.arrow"]
        );
        assert_eq!(names(&[root], DataFormat::Arrow).unwrap(), ["z.arrow"]);
        assert_eq!(
            names(&[&root.join("*.parquet")], DataFormat::Auto).unwrap(),
            ["B.parquet", "a.parquet", "b.parquet"]
        );
        assert_eq!(names(&[&root.join("**/1.parquet")], DataFormat::Auto).unwrap(), ["b/1.parquet"]);
        assert_eq!(names(&[&root.join("_x/*.parquet")], DataFormat::Auto).unwrap(), ["1.parquet"]);
        assert_eq!(names(&[&root.join(".*.parquet")], DataFormat::Auto).unwrap(), [".y.parquet"]);
        assert_eq!(
            names(&[&root.join("b.parquet"), &root.join("a.parquet")], DataFormat::Auto).unwrap(),
            ["b.parquet", "a.parquet"],
            "a list keeps its order"
        );
    }

    #[test]
    fn a_loop_of_links_ends() {
        let root = tempfile::tempdir().unwrap();
        touch(root.path(), &["a/1.parquet"]);
        #[cfg(unix)]
        std::os::unix::fs::symlink(root.path(), root.path().join("a/again")).unwrap();
        assert_eq!(names(&[root.path()], DataFormat::Auto).unwrap(), ["a/1.parquet"]);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let root = tempfile::tempdir().unwrap();
        touch(root.path(), &["n.txt"]);
        for (path, words) in [
            (root.path().to_owned(), "1 other files"),
            (root.path().join("none"), "no such file"),
            (root.path().join("*.parquet"), "matches no file"),
        ] {
            let error = names(&[&path], DataFormat::Auto).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
            assert!(error.report().contains(words), "{error}");
            assert!(error.report().contains(root.path().to_str().unwrap()), "{error}");
        }
        let twice = root.path().join("n.txt");
        assert!(names(&[&twice, &twice], DataFormat::Auto).unwrap_err().to_string().contains("listed twice"));
    }

    #[test]
    fn saved_datasets_are_read_in_the_order_of_their_state() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        touch(root, &["d/b.arrow", "d/a.arrow", "d/stray.arrow", "s/dataset_dict.json", "s/train/x", "s/test/x"]);
        std::fs::write(
            root.join("d/state.json"),
            r#"{"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}"#,
        )
        .unwrap();
        assert_eq!(names(&[&root.join("d")], DataFormat::Auto).unwrap(), ["b.arrow", "a.arrow"]);
        let error = names(&[&root.join("s")], DataFormat::Auto).unwrap_err();
        assert!(error.to_string().contains("`test`, `train`"), "{error}");
        std::fs::write(root.join("d/state.json"), r#"{"_data_files": [{"filename": "c.arrow"}]}"#).unwrap();
        assert_eq!(names(&[&root.join("d")], DataFormat::Auto).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn saved_datasets_inside_folders_keep_their_order_and_leave_caches_out() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        touch(root, &["c.arrow", "d/b.arrow", "d/a.arrow", "d/cache-1234.arrow", "d-e.arrow", "d0.arrow"]);
        let state = r#"{"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}"#;
        std::fs::write(root.join("d/state.json"), state).unwrap();
        assert_eq!(
            names(&[root], DataFormat::Auto).unwrap(),
            ["c.arrow", "d-e.arrow", "d/b.arrow", "d/a.arrow", "d0.arrow"]
        );
        touch(root, &["s/dataset_dict.json", "s/train/x.arrow", "s/test/x.arrow"]);
        let error = names(&[root], DataFormat::Auto).unwrap_err();
        assert!(error.to_string().contains("`test`, `train`"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn names_that_a_hub_links_to_one_file_are_several_shards() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        touch(root, &["blobs/0123", "snapshot/x"]);
        for name in ["1.parquet", "2.parquet"] {
            std::os::unix::fs::symlink(root.join("blobs/0123"), root.join("snapshot").join(name)).unwrap();
        }
        std::os::unix::fs::symlink(root.join("snapshot"), root.join("main")).unwrap();
        assert_eq!(names(&[&root.join("snapshot")], DataFormat::Auto).unwrap(), ["1.parquet", "2.parquet"]);
        let twice = names(&[&root.join("snapshot/1.parquet"), &root.join("main/1.parquet")], DataFormat::Auto);
        assert!(twice.unwrap_err().to_string().contains("listed twice"));
    }
}
