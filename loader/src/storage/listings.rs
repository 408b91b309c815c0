//! Listings that the ranks of a node share, so that only one of them asks the store.
//!
//! A listing is a file in the cache. The processes that one launcher started at about the same time
//! share it. A process takes a listing once, so that a later loader sees new objects.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forebay_remote::Meta;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_128;

use super::local;
use crate::sync::lock;

/// Time within which the ranks of a node start.
const FRESH: Duration = Duration::from_secs(60);
/// Name of the folder of listings in the folder that the user names.
const FOLDER: &str = "listings";

/// Listings that this process has taken, each as its file and its time.
static TAKEN: Mutex<Option<HashSet<(PathBuf, u64)>>> = Mutex::new(None);

/// Returns the objects of the folder `url`, from the listing of another rank or from `list`.
pub(super) fn shared(
    cache_dir: &Path,
    server: &str,
    url: &str,
    list: &dyn Fn() -> io::Result<Vec<Meta>>,
) -> io::Result<Vec<Meta>> {
    let launcher = std::os::unix::process::parent_id();
    let name = xxh3_128(format!("{launcher}\n{server}\n{url}").as_bytes());
    let folder = cache_dir.join(FOLDER);
    let path = folder.join(format!("{name:032x}.json"));
    let open = || {
        std::fs::create_dir_all(&folder)?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        local::lock_alone(&file)?;
        Ok::<_, io::Error>(file)
    };
    // A folder that cannot be written costs further listings.
    let Ok(mut file) = open() else { return list() };
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    if let Some((began, found)) = parse(&text)
        && age_of(began) < FRESH
        && take(&path, began)
    {
        return Ok(found);
    }
    let began = now();
    let found = list()?;
    take(&path, began);
    let text = to_text(began, &found);
    // The lock is held until the file is complete. A file that a kill cuts short is no listing.
    let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
    Ok(found)
}

/// Notes that this process takes a listing. Returns false if it took it before.
fn take(path: &Path, began: u64) -> bool {
    lock(&TAKEN).get_or_insert_default().insert((path.to_owned(), began))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

fn age_of(began: u64) -> Duration {
    // A listing of the future tells that the clock was changed.
    now().checked_sub(began).map_or(Duration::MAX, Duration::from_nanos)
}

fn to_text(began: u64, found: &[Meta]) -> String {
    let nanos = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let row = |meta: &Meta| json!([meta.url, meta.size_bytes, meta.modified.map(nanos), meta.etag]);
    json!({"began": began, "objects": found.iter().map(row).collect::<Vec<_>>()}).to_string()
}

fn parse(text: &[u8]) -> Option<(u64, Vec<Meta>)> {
    let value: Value = serde_json::from_slice(text).ok()?;
    let row = |row: &Value| {
        Some(Meta {
            url: row.get(0)?.as_str()?.to_owned(),
            size_bytes: row.get(1)?.as_u64()?,
            modified: row.get(2)?.as_u64().map(|nanos| UNIX_EPOCH + Duration::from_nanos(nanos)),
            etag: row.get(3)?.as_str().map(str::to_owned),
        })
    };
    let objects = value.get("objects")?.as_array()?.iter().map(row).collect::<Option<_>>()?;
    Some((value.get("began")?.as_u64()?, objects))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_taken_once_by_a_process_and_read_by_others() {
        let folder = tempfile::tempdir().unwrap();
        let meta = |name: &str, modified| Meta {
            url: format!("s3://b/{name}"),
            size_bytes: 7,
            modified,
            etag: Some("\"x\"".to_owned()),
        };
        let first = vec![meta("a", None), meta("b", Some(UNIX_EPOCH + Duration::new(9, 123_456_789)))];
        let second = vec![meta("c", None)];
        let ask = |answer: &Vec<Meta>| shared(folder.path(), "", "s3://b", &|| Ok(answer.clone())).unwrap();
        assert_eq!(ask(&first), first);
        assert_eq!(ask(&second), second);
        // Another process has not taken it.
        *lock(&TAKEN) = None;
        assert_eq!(ask(&first), second);
        let file = std::fs::read_dir(folder.path().join(FOLDER)).unwrap().next().unwrap().unwrap().path();
        let text = std::fs::read(&file).unwrap();
        for length in 0..text.len() {
            std::fs::write(&file, &text[..length]).unwrap();
            *lock(&TAKEN) = None;
            assert_eq!(ask(&first), first, "{length}");
        }
    }
}
