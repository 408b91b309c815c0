//! Keeps the progress of a rewriting, in `_forebay_rewrite.jsonl` in the folder of the result.
//!
//! The first lines name the options and the sources. A run with other options or sources refuses to
//! go on. Then each shard has a line, which is on storage before the shard gets its name. So no
//! named shard lacks its line, and a line without its shard means that the shard is missing.
//!
//! The last line says that all shards are complete. Loaders refuse a folder without it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use forebay::corpus::discover;
use forebay::format;
use forebay::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};

use super::content::Content;
use super::output::{DRAFT, draft_name, sync_folder};
use super::source::SourceShard;

const NAME: &str = discover::REWRITING;
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
    folder: PathBuf,
    /// Values that the options left open, such as the type of the ids.
    pub(super) settled: Value,
    pub(super) done: BTreeMap<String, Done>,
    lines: Mutex<File>,
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
        let failed = |what: &str, error| Error::io(format!("cannot {what} folder"), error).at(folder);
        std::fs::create_dir_all(folder).map_err(|error| failed("create", error))?;
        let locked = File::open(folder).map_err(|error| failed("open", error))?;
        lock(&locked).map_err(|error| failed("lock", error).context("is another `forebay rewrite` writing there?"))?;
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(folder).map_err(|error| failed("read", error))? {
            names.insert(entry.map_err(|error| failed("read", error))?.file_name().to_string_lossy().into_owned());
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
            let failed = |error| Error::io("cannot write the manifest", error).at(&draft);
            let mut file = File::create(&draft).map_err(failed)?;
            file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
            std::fs::rename(&draft, &path).map_err(failed)?;
            sync_folder(folder)?;
            let lines = Mutex::new(file);
            return Ok(Self { folder: folder.to_owned(), settled, done: BTreeMap::new(), lines, _folder: locked });
        }

        let (settled, known) = parse(&bytes[..whole], options, sources).map_err(|error| error.at(&path))?;
        let failed = |error| Error::io("cannot write the manifest", error).at(&path);
        let file = File::options().append(true).open(&path).map_err(failed)?;
        file.set_len(whole as u64).map_err(failed)?;
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
        remove_drafts(folder, &mut names)?;
        if let Some(name) = names.first() {
            return Err(Error::config(format!(
                "`{}` holds `{name}`, which this rewriting did not write: remove it, or name another folder",
                folder.display()
            )));
        }
        Ok(Self { folder: folder.to_owned(), settled, done, lines: Mutex::new(file), _folder: locked })
    }

    /// Notes a shard that is about to get its name.
    pub(super) fn note(&self, name: &str, shard: &Done) -> Result<()> {
        let Content { rows, documents, tokens, hash } = &shard.content;
        let (source, row) = shard.next;
        self.write(&json!({
            "shard": name, "bytes": shard.bytes, "rows": rows, "documents": documents, "tokens": tokens, "hash": hash,
            "next_source": source, "next_row": row,
        }))
    }

    /// Notes that all `shards` have their names.
    pub(super) fn complete(&self, shards: usize) -> Result<()> {
        self.write(&json!({ "complete": shards }))
    }

    fn write(&self, line: &Value) -> Result<()> {
        let mut file = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error| Error::io("cannot write the manifest", error).at(&self.folder.join(NAME));
        let whole = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let written = file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_data());
        if written.is_err() {
            // Another thread's line must not follow half of this line.
            let _ = file.set_len(whole);
        }
        written.map_err(failed)
    }
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

/// Keeps other processes from locking `folder` until this process closes it or ends.
fn lock(folder: &File) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the call takes an open descriptor and touches none of our memory.
        if unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    let _ = folder;
    Ok(())
}
