//! Keeps the progress of a rewriting, in `_forebay_rewrite.jsonl` in the folder of the result.
//!
//! The first lines name the options and the sources. A run with other options or sources refuses to
//! go on. Then each shard has a line, which is on storage before the shard gets its name. So no
//! named shard lacks its line, and a line without its shard means that the shard is missing.
//!
//! The last line says that all shards are complete. Loaders refuse a folder without it.
//!
//! A part of a rewriting keeps its own manifest beside it, in `_forebay_rewrite.I-of-N.jsonl`.
//! Parts lock their manifests, and share the lock of the folder. Joining them takes the folder
//! alone, and writes one manifest of all lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use forebay::corpus::discover;
use forebay::corpus::parts::Part;
use forebay::format;
use forebay::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};

use super::content::Content;
use super::output::{DRAFT, draft_name, sync_folder};
use super::source::SourceShard;

const NAME: &str = discover::REWRITING;
/// Begin of the names of the parts' manifests.
const STEM: &str = "_forebay_rewrite.";
const VERSION: u64 = 1;

/// A finished shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) bytes: u64,
    pub(super) content: Content,
    /// Source and row at which the next shard begins.
    pub(super) next: (usize, u64),
}

/// The manifest of a folder. No other process rewrites to the folder while this value lives.
pub(super) struct Manifest {
    /// Values that the options left open, such as the type of the ids.
    pub(super) settled: Value,
    pub(super) done: BTreeMap<String, Done>,
    lines: Mutex<File>,
    path: PathBuf,
    /// The folder, locked.
    _folder: File,
}

/// The folder of a rewriting in parts, and what they have done.
pub(super) struct Parts {
    folder: PathBuf,
    pub(super) done: BTreeMap<String, Done>,
    /// The parts that have begun, with their manifests.
    pub(super) found: Vec<(Part, PathBuf)>,
    /// Names of files that no line names.
    others: BTreeSet<String>,
    /// The folder, locked.
    _folder: File,
}

/// The options of the run, as names and texts.
pub(super) type Options = Vec<(&'static str, String)>;

impl Manifest {
    /// Continues the rewriting in `folder`, or begins one. A new rewriting calls `settle` for the
    /// values that the options leave open.
    pub(super) fn open(
        folder: &Path,
        options: &Options,
        sources: &[SourceShard],
        settle: impl FnOnce() -> Result<Value>,
    ) -> Result<Self> {
        let (locked, mut names) = take_folder(folder, libc::LOCK_EX)?;
        if let Some((part, _)) = parts_among(folder, &names).first() {
            return Err(Error::config(format!(
                "`{}` is being written in parts, such as {part}: run the other parts, and then `--merge`",
                folder.display()
            )));
        }
        let path = folder.join(NAME);
        let draft = folder.join(draft_name(NAME));
        names.remove(&draft_name(NAME));
        let bytes = if names.remove(NAME) {
            std::fs::read(&path).map_err(|error| Error::io("cannot read the manifest", error).at(&path))?
        } else {
            Vec::new()
        };
        // A line that a killed process left incomplete has no line end.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        // Without a shard nothing is lost, and a wrong option may have stopped the first run.
        if !has_shards(&bytes[..whole]) {
            if !bytes.is_empty() {
                remove_drafts(folder, &mut names)?;
            }
            if let Some(name) = names.first() {
                return Err(Error::config(format!(
                    "`{}` is not empty and was not begun by `forebay rewrite`: it holds `{name}`; name an empty or a new folder",
                    folder.display()
                )));
            }
            let settled = settle()?;
            let text = head(options, sources, &settled);
            let lines = Mutex::new(write_whole(folder, &draft, &path, &text)?);
            return Ok(Self { settled, done: BTreeMap::new(), lines, path, _folder: locked });
        }

        let (settled, known) = parse(&bytes[..whole], options, sources).map_err(|error| error.at(&path))?;
        let file = reopened(&path, whole)?;
        let done = still_there(folder, known, &mut names);
        remove_drafts(folder, &mut names)?;
        if let Some(name) = names.first() {
            return Err(Error::config(format!(
                "`{}` holds `{name}`, which this rewriting did not write: remove it, or name another folder",
                folder.display()
            )));
        }
        Ok(Self { settled, done, lines: Mutex::new(file), path, _folder: locked })
    }

    /// Continues `part` of the rewriting in `folder`, or begins it. `is_own` tells whether a shard
    /// with a name belongs to the part.
    pub(super) fn open_part(
        folder: &Path,
        part: Part,
        options: &Options,
        sources: &[SourceShard],
        settled: Value,
        is_own: &dyn Fn(&str) -> bool,
    ) -> Result<Self> {
        let (locked, mut names) = take_folder(folder, libc::LOCK_SH)?;
        let found = parts_among(folder, &names);
        if let Some((other, _)) = found.iter().find(|(other, _)| other.count() != part.count()) {
            return Err(Error::config(format!(
                "`{}` is being written in {} parts, such as {other}: name another folder for {part}",
                folder.display(),
                other.count()
            )));
        }
        let path = folder.join(NAME);
        let text = head(options, sources, &settled);
        let mut done = BTreeMap::new();
        match read_whole(&path)? {
            // Loaders refuse the folder from now on. Each part writes the same.
            None => {
                let foreign = |name: &&String| !name.starts_with(DRAFT) && !name.starts_with(STEM);
                if let Some(name) = names.iter().find(foreign).filter(|_| found.is_empty()) {
                    return Err(Error::config(format!(
                        "`{}` is not empty and was not begun by `forebay rewrite`: it holds `{name}`; name an empty or a new folder",
                        folder.display()
                    )));
                }
                drop(write_whole(folder, &folder.join(draft_name(&part_name(part))), &path, &text)?);
            }
            Some(bytes) => done = parse(&bytes, options, sources).map_err(|error| error.at(&path))?.1,
        }
        let path = folder.join(part_name(part));
        let file = match read_whole(&path)? {
            None => write_whole(folder, &folder.join(draft_name(&part_name(part))), &path, &text)?,
            Some(bytes) => {
                done.extend(parse(&bytes, options, sources).map_err(|error| error.at(&path))?.1);
                reopened(&path, bytes.len())?
            }
        };
        let busy = |error| Error::io("cannot lock the manifest of the part: does another process write it?", error);
        lock(&file, libc::LOCK_EX).map_err(|error| busy(error).at(&path))?;
        let done = still_there(folder, done, &mut BTreeSet::new());
        names.retain(|name| name.strip_prefix(DRAFT).is_some_and(is_own));
        remove_drafts(folder, &mut names)?;
        Ok(Self { settled, done, lines: Mutex::new(file), path, _folder: locked })
    }

    /// Notes a shard that is about to get its name.
    pub(super) fn note(&self, name: &str, shard: &Done) -> Result<()> {
        self.write(&line_of(name, shard))
    }

    /// Notes that all `shards` have their names.
    pub(super) fn complete(&self, shards: usize) -> Result<()> {
        self.write(&json!({ "complete": shards }))
    }

    fn write(&self, line: &Value) -> Result<()> {
        let mut file = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error| Error::io("cannot write the manifest", error).at(&self.path);
        let whole = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let written = file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_data());
        if written.is_err() {
            // Another thread's line must not follow half of this line.
            let _ = file.set_len(whole);
        }
        written.map_err(failed)
    }
}

impl Parts {
    /// Reads what the parts of the rewriting in `folder` have done. No other process rewrites to
    /// the folder while the result lives.
    pub(super) fn open(folder: &Path, options: &Options, sources: &[SourceShard]) -> Result<Self> {
        let (locked, mut others) = take_folder(folder, libc::LOCK_EX)?;
        let found = parts_among(folder, &others);
        let mut done = BTreeMap::new();
        others.remove(NAME);
        for path in std::iter::once(&folder.join(NAME)).chain(found.iter().map(|(_, path)| path)) {
            if let Some(bytes) = read_whole(path)? {
                done.extend(parse(&bytes, options, sources).map_err(|error| error.at(path))?.1);
            }
        }
        let done = still_there(folder, done, &mut others);
        others.retain(|name| !name.starts_with(STEM));
        Ok(Self { folder: folder.to_owned(), done, found, others, _folder: locked })
    }

    /// Writes the manifest of the complete rewriting in the place of those of the parts. Fails if
    /// the folder holds a file beside the `shards`.
    pub(super) fn complete(
        mut self,
        options: &Options,
        sources: &[SourceShard],
        settled: &Value,
        shards: &[(String, Done)],
    ) -> Result<()> {
        remove_drafts(&self.folder, &mut self.others)?;
        let foreign = self.done.keys().find(|name| !shards.iter().any(|(shard, _)| shard == *name));
        if let Some(name) = foreign.or(self.others.first()) {
            return Err(Error::config(format!(
                "`{}` holds `{name}`, which this rewriting did not write: remove it, or name another folder",
                self.folder.display()
            )));
        }
        let mut text = head(options, sources, settled);
        for (name, shard) in shards {
            text.push_str(&format!("{}\n", line_of(name, shard)));
        }
        text.push_str(&format!("{}\n", json!({ "complete": shards.len() })));
        drop(write_whole(&self.folder, &self.folder.join(draft_name(NAME)), &self.folder.join(NAME), &text)?);
        for (_, path) in &self.found {
            std::fs::remove_file(path)
                .map_err(|error| Error::io("cannot remove the manifest of a part", error).at(path))?;
        }
        Ok(())
    }
}

/// Creates `folder` if it is missing, and locks it. Returns it with the names in it.
fn take_folder(folder: &Path, how: i32) -> Result<(File, BTreeSet<String>)> {
    let failed = |what: &str, error| Error::io(format!("cannot {what} folder"), error).at(folder);
    std::fs::create_dir_all(folder).map_err(|error| failed("create", error))?;
    let locked = File::open(folder).map_err(|error| failed("open", error))?;
    lock(&locked, how).map_err(|error| failed("lock", error).context("is another `forebay rewrite` writing there?"))?;
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(|error| failed("read", error))? {
        names.insert(entry.map_err(|error| failed("read", error))?.file_name().to_string_lossy().into_owned());
    }
    Ok((locked, names))
}

/// Name of the manifest of `part`.
fn part_name(part: Part) -> String {
    format!("{STEM}{}.jsonl", part.to_string().replace('/', "-of-"))
}

/// The parts whose manifests are among `names`.
fn parts_among(folder: &Path, names: &BTreeSet<String>) -> Vec<(Part, PathBuf)> {
    let part_of = |name: &String| -> Option<Part> {
        name.strip_prefix(STEM)?.strip_suffix(".jsonl")?.replace("-of-", "/").parse().ok()
    };
    let mut found: Vec<_> = names.iter().filter_map(|name| Some((part_of(name)?, folder.join(name)))).collect();
    found.sort_unstable();
    found
}

/// The whole lines of the manifest at `path`. `None` if there are none.
fn read_whole(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("cannot read the manifest", error).at(path)),
    };
    // A line that a killed process left incomplete has no line end.
    bytes.truncate(bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1));
    Ok((!bytes.is_empty()).then_some(bytes))
}

/// Writes `text` to `draft`, and gives it the name `path`. Both lie in `folder`.
fn write_whole(folder: &Path, draft: &Path, path: &Path, text: &str) -> Result<File> {
    let failed = |error| Error::io("cannot write the manifest", error).at(draft);
    let mut file = File::create(draft).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(draft, path).map_err(failed)?;
    sync_folder(folder)?;
    Ok(file)
}

/// Opens the manifest at `path` to append to its first `whole` bytes.
fn reopened(path: &Path, whole: usize) -> Result<File> {
    let failed = |error| Error::io("cannot write the manifest", error).at(path);
    let file = File::options().append(true).open(path).map_err(failed)?;
    file.set_len(whole as u64).map_err(failed)?;
    Ok(file)
}

/// Those of the `known` shards whose files are there. Takes all of their files out of `names`.
fn still_there(folder: &Path, known: BTreeMap<String, Done>, names: &mut BTreeSet<String>) -> BTreeMap<String, Done> {
    let mut done = BTreeMap::new();
    for (name, shard) in known {
        let there = std::fs::metadata(folder.join(&name)).is_ok_and(|file| file.len() == shard.bytes);
        names.remove(&name);
        let ids = Path::new(&name);
        names.retain(|other| !format::owners(Path::new(other)).iter().any(|owner| owner == ids));
        if there {
            done.insert(name, shard);
        }
    }
    done
}

/// Removes shards that were not finished, and their names.
fn remove_drafts(folder: &Path, names: &mut BTreeSet<String>) -> Result<()> {
    let is_draft = |name: &str| name.starts_with(DRAFT);
    for name in names.iter().filter(|name| is_draft(name)) {
        let path = folder.join(name);
        std::fs::remove_file(&path).map_err(|error| Error::io("cannot remove an unfinished shard", error).at(&path))?;
    }
    names.retain(|name| !is_draft(name));
    Ok(())
}

/// The line of a finished shard.
fn line_of(name: &str, shard: &Done) -> Value {
    let Content { rows, documents, tokens, hash } = &shard.content;
    let (source, row) = shard.next;
    json!({
        "shard": name, "bytes": shard.bytes, "rows": rows, "documents": documents, "tokens": tokens, "hash": hash,
        "next_source": source, "next_row": row,
    })
}

fn has_shards(lines: &[u8]) -> bool {
    let is_shard = |line: Value| line.get("shard").is_some();
    lines.split(|byte| *byte == b'\n').any(|line| serde_json::from_slice(line).is_ok_and(is_shard))
}

fn head(options: &Options, sources: &[SourceShard], settled: &Value) -> String {
    let options: Map<_, _> = options.iter().map(|(name, value)| ((*name).to_owned(), value.as_str().into())).collect();
    let begin = json!({"forebay_rewrite": VERSION, "options": options, "settled": settled, "sources": sources.len()});
    let mut text = format!("{begin}\n");
    for source in sources {
        text.push_str(&format!("{}\n", identity(source)));
    }
    text
}

/// The identity of a source. It has no absolute path, so that a corpus may move.
fn identity(source: &SourceShard) -> Value {
    let modified = source.facts.stamp.modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    json!({
        "source": source.file.name,
        "bytes": source.facts.stamp.size_bytes,
        "modified_ns": modified.map(|time| time.as_nanos() as u64),
        "rows": source.facts.rows,
        "tokens": source.facts.counts.tokens,
    })
}

type Known = (Value, BTreeMap<String, Done>);

/// Reads the lines of a manifest. Fails if they name other options or sources.
fn parse(bytes: &[u8], options: &Options, sources: &[SourceShard]) -> Result<Known> {
    let damaged = || Error::data("the manifest is damaged: remove the folder and begin anew");
    let text = std::str::from_utf8(bytes).map_err(|_| damaged())?;
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).map_err(|_| damaged()));
    let begin = lines.next().ok_or_else(damaged)??;
    if begin["forebay_rewrite"] != VERSION {
        return Err(Error::data(format!(
            "the manifest has version {}, and this forebay knows version {VERSION}",
            begin["forebay_rewrite"]
        )));
    }
    let differs = |what: String, then: &Value, now: &Value| {
        Error::new(
            ErrorKind::State,
            format!(
                "{what} was {then} when this rewriting was begun and is {now}: name another folder, or go on with what was begun"
            ),
        )
    };
    for (name, value) in options {
        let then = &begin["options"][*name];
        if then != value {
            return Err(differs(format!("option `--{name}`"), then, &Value::from(value.as_str())));
        }
    }
    if begin["sources"] != sources.len() {
        return Err(differs("the number of source shards".to_owned(), &begin["sources"], &sources.len().into()));
    }
    for source in sources {
        let (then, now) = (lines.next().ok_or_else(damaged)??, identity(source));
        for (key, name) in [
            ("source", "name"),
            ("bytes", "size"),
            ("modified_ns", "modification time"),
            ("rows", "rows"),
            ("tokens", "tokens"),
        ] {
            if then[key] != now[key] {
                let what = format!("source `{}`: its {name}", source.file.path.display());
                return Err(differs(what, &then[key], &now[key]));
            }
        }
    }
    let mut done = BTreeMap::new();
    for line in lines {
        let line = line?;
        if line.get("complete").is_some() {
            continue;
        }
        let number = |key: &str| line[key].as_u64().ok_or_else(damaged);
        let text = |key: &str| line[key].as_str().map(str::to_owned).ok_or_else(damaged);
        let content = Content {
            rows: number("rows")?,
            documents: number("documents")?,
            tokens: number("tokens")?,
            hash: text("hash")?,
        };
        let next = (number("next_source")? as usize, number("next_row")?);
        done.insert(text("shard")?, Done { bytes: number("bytes")?, content, next });
    }
    Ok((begin["settled"].clone(), done))
}

/// Locks `file` until this process closes it or ends. `how` is `LOCK_EX` for this process alone,
/// and `LOCK_SH` for all that ask for the same.
fn lock(file: &File, how: i32) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the call takes an open descriptor and touches none of our memory.
        if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    let _ = (file, how);
    Ok(())
}
