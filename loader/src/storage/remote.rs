//! Object stores, web servers and the Hub, whose files have URLs.
//!
//! A storage remembers what it was told of a location, so that the files of a corpus are those of
//! one listing. Reads ask for the version that was listed. A file that was replaced meanwhile is
//! refused.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bytes::Bytes;
use forebay_remote::{Answer, Client, Kind, Meta, Options, Question};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::cache::{BLOCK, Cache, CachedObject};
use super::local::Mapping;
use super::{Item, ItemKind, Object, Stamp, Stat, Storage, listings};
use crate::notices::{self, Level};
use crate::settings::Config;
use crate::sync::lock;

/// Tells whether `location` is a URL that this storage reads.
pub(super) fn is_remote(location: &Path) -> bool {
    location.to_str().is_some_and(forebay_remote::is_remote)
}

/// The files that have URLs.
#[derive(Debug)]
pub(super) struct Remote {
    client: Arc<Client>,
    known: RwLock<Known>,
    blocks: Arc<Mutex<Blocks>>,
    cache: Option<Arc<Cache>>,
    /// The folder of listings that ranks share, and the server that they are of.
    listings: Option<(PathBuf, String)>,
}

/// What stores have told so far.
#[derive(Debug, Default)]
struct Known {
    /// Folders whose objects are all in `objects`. Each ends with a slash.
    folders: Vec<String>,
    /// Objects by URL. `None` stands for an object that is not there.
    objects: BTreeMap<String, Option<Meta>>,
    /// Further folders, and whether they hold an object. Each ends with a slash.
    others: HashMap<String, bool>,
}

/// The kind of thing that lies at a location.
enum Found {
    File(Meta),
    Folder,
    Nothing,
}

impl Known {
    fn is_listed(&self, url: &str) -> bool {
        self.folders.iter().any(|folder| url.starts_with(folder.as_str()) || url == folder.trim_end_matches('/'))
    }

    fn has_any(&self, folder: &str) -> bool {
        let after = self.objects.range(folder.to_owned()..);
        after.take_while(|(url, _)| url.starts_with(folder)).any(|(_, meta)| meta.is_some())
    }

    /// What lies at `url`. `None` if it is not known.
    fn find(&self, url: &str) -> Option<Found> {
        let object = self.objects.get(url);
        if let Some(Some(meta)) = object {
            return Some(Found::File(meta.clone()));
        }
        let folder = with_slash(url);
        let is_listed = self.is_listed(&folder);
        if self.has_any(&folder) || self.others.get(&folder) == Some(&true) {
            return Some(Found::Folder);
        }
        let no_object = object.is_some() || self.is_listed(url);
        let no_folder = is_listed || self.others.get(&folder) == Some(&false);
        (no_object && no_folder).then_some(Found::Nothing)
    }

    fn add(&mut self, question: &Question, answer: Answer) {
        match answer {
            Answer::Object(meta) => {
                self.objects.insert(question.url().to_owned(), meta);
            }
            Answer::Objects(metas) => {
                self.objects.extend(metas.into_iter().map(|meta| (meta.url.clone(), Some(meta))));
                self.folders.push(with_slash(question.url()));
            }
            Answer::HasAny(is_there) => {
                self.others.insert(with_slash(question.url()), is_there);
            }
        }
    }
}

fn with_slash(url: &str) -> String {
    let mut url = url.trim_end_matches('/').to_owned();
    url.push('/');
    url
}

fn text_of(location: &Path) -> io::Result<&str> {
    let text = location.to_str().ok_or_else(|| io::Error::other("a URL must be text in UTF-8"))?;
    Ok(text.trim_end_matches('/'))
}

fn io_error(error: forebay_remote::Error) -> io::Error {
    let kind = match error.kind() {
        Kind::NotFound => io::ErrorKind::NotFound,
        Kind::Denied => io::ErrorKind::PermissionDenied,
        Kind::Unsupported => io::ErrorKind::Unsupported,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error.without_url())
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Remote {
    pub(super) fn new(config: &Config) -> Self {
        let options = Options {
            endpoint: config.storage_endpoint.clone(),
            region: config.storage_region.clone(),
            anonymous: config.storage_anonymous,
            deadline: Duration::from_secs(config.storage_timeout),
            most_requests: config.storage_requests as usize,
        };
        let cache = config.cache_dir.as_deref().map(|folder| Arc::new(Cache::new(folder.as_ref(), config.cache_bytes)));
        let has_peers = config.dp_world_size.is_some_and(|ranks| ranks > 1);
        let server = config.storage_endpoint.clone().unwrap_or_default();
        let listings = config.cache_dir.as_ref().filter(|_| has_peers).map(|folder| (PathBuf::from(folder), server));
        Self { client: Client::shared(&options), known: RwLock::default(), blocks: Arc::default(), cache, listings }
    }

    /// Asks `questions` at the same time, and remembers the answers. Returns the first error.
    fn learn(&self, questions: &[Question]) -> io::Result<()> {
        let mut failed = Ok(());
        let mut note = |question: &Question, answer: io::Result<Answer>| match answer {
            Ok(answer) => write(&self.known).add(question, answer),
            Err(error) if failed.is_ok() => failed = Err(error),
            Err(_) => {}
        };
        let is_shared = |question: &&Question| self.listings.is_some() && matches!(question, Question::Objects(_));
        let (shared, own): (Vec<&Question>, Vec<&Question>) = questions.iter().partition(is_shared);
        let mut by_peer = false;
        for question in shared {
            let Some((folder, server)) = &self.listings else { continue };
            let url = question.url();
            let is_own = Cell::new(false);
            let list = || {
                is_own.set(true);
                self.client.list(url).map_err(io_error)
            };
            note(question, listings::shared(folder, server, url, &list).map(Answer::Objects));
            by_peer |= !is_own.get();
        }
        let mut own: Vec<Question> = own.into_iter().cloned().collect();
        if by_peer {
            // The rank that listed the folder looks for logs above it, and fails if there are any.
            own.retain(|question| match question {
                Question::HasAny(_) => {
                    note(question, Ok(Answer::HasAny(false)));
                    false
                }
                _ => true,
            });
        }
        for (question, answer) in own.iter().zip(self.client.ask(&own)) {
            note(question, answer.map_err(io_error));
        }
        failed
    }

    fn find(&self, url: &str) -> io::Result<Found> {
        if let Some(found) = read(&self.known).find(url) {
            return Ok(found);
        }
        self.learn(&[Question::Object(url.to_owned())])?;
        if let Some(found) = read(&self.known).find(url) {
            return Ok(found);
        }
        self.learn(&[Question::HasAny(url.to_owned())])?;
        Ok(read(&self.known).find(url).unwrap_or(Found::Nothing))
    }

    /// The questions whose answers a search of `entry` needs.
    fn questions(entry: &str, logs: &[&str], questions: &mut Vec<Question>) {
        let entry = entry.trim_end_matches('/');
        let folder = match entry.find(['*', '?', '[']) {
            Some(wildcard) => entry[..wildcard].rfind('/').map_or(entry, |slash| &entry[..slash]),
            None => {
                questions.push(Question::Object(entry.to_owned()));
                // A name with a suffix is mostly a file.
                if entry.rsplit('/').next().is_some_and(|name| name.contains('.')) {
                    return;
                }
                entry
            }
        };
        questions.push(Question::Objects(folder.to_owned()));
        let start = forebay_remote::root(folder).map_or(folder.len(), str::len);
        let mut parent = folder;
        // The listing tells the logs in the folder itself.
        for _ in 1..MOST_PARENTS {
            match parent.rfind('/').filter(|slash| *slash >= start) {
                Some(slash) => parent = &parent[..slash],
                None => break,
            }
            questions.extend(logs.iter().map(|log| Question::HasAny(format!("{parent}/{log}"))));
        }
    }
}

impl Storage for Remote {
    fn prepare(&self, entries: &[String], logs: &[&str]) -> io::Result<()> {
        let mut questions = Vec::new();
        let is_unlisted = |entry: &&String| !forebay_remote::can_list(entry) && entry.contains(['*', '?', '[']);
        if let Some(entry) = entries.iter().find(is_unlisted) {
            let text = format!("cannot expand `{entry}`: a web server lists no folders; name each file");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        for entry in entries.iter().filter(|entry| forebay_remote::is_remote(entry)) {
            Self::questions(entry, logs, &mut questions);
        }
        // A call that needs a missing answer asks again, and reports the error.
        let _ = self.learn(&questions);
        // Logs are folders, and never objects.
        let mut known = write(&self.known);
        for question in questions.iter().filter(|question| matches!(question, Question::HasAny(_))) {
            known.objects.entry(question.url().to_owned()).or_default();
        }
        Ok(())
    }

    fn stat(&self, location: &Path) -> io::Result<Stat> {
        let none = Stamp { size_bytes: 0, modified: None, version: 0 };
        match self.find(text_of(location)?)? {
            Found::File(meta) => Ok(stat_of(&meta)),
            Found::Folder => Ok(Stat { kind: ItemKind::Folder, stamp: none }),
            Found::Nothing => Err(io::Error::new(io::ErrorKind::NotFound, "no such object")),
        }
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Item>> {
        let prefix = with_slash(text_of(folder)?);
        if !read(&self.known).is_listed(&prefix) {
            self.learn(&[Question::Objects(prefix.trim_end_matches('/').to_owned())])?;
        }
        let known = read(&self.known);
        let mut items: Vec<Item> = Vec::new();
        for (url, meta) in known.objects.range(prefix.clone()..).take_while(|(url, _)| url.starts_with(&prefix)) {
            if meta.is_none() {
                continue;
            }
            let (name, kind) = match url[prefix.len()..].split_once('/') {
                Some((name, _)) => (name, ItemKind::Folder),
                None => (&url[prefix.len()..], ItemKind::File),
            };
            // The objects of a folder may stand around a file that has the folder's name.
            let is_new = !items.iter().rev().take(2).any(|item| item.name == name && item.kind == kind);
            if !name.is_empty() && is_new {
                let location = PathBuf::from(format!("{prefix}{name}"));
                items.push(Item { name: name.to_owned(), location, kind, is_link: false });
            }
        }
        Ok(items)
    }

    fn open(&self, location: &Path) -> io::Result<Box<dyn Object>> {
        let url = text_of(location)?;
        match self.find(url)? {
            Found::File(meta) => {
                let (client, blocks) = (Arc::clone(&self.client), Arc::clone(&self.blocks));
                let id = xxh3_64(url.as_bytes());
                let cached = self.cache.as_ref().and_then(|cache| {
                    let object = cache.open(key_of(&meta), meta.size_bytes)?;
                    Some(Arc::new(Cached { cache: Arc::clone(cache), object, ahead: AtomicUsize::new(0) }))
                });
                Ok(Box::new(RemoteObject { client, meta: Arc::new(meta), id, blocks, cached }))
            }
            Found::Folder => Err(io::Error::new(io::ErrorKind::IsADirectory, "a folder")),
            Found::Nothing => Err(io::Error::new(io::ErrorKind::NotFound, "no such object")),
        }
    }

    fn replace(&self, location: &Path, bytes: &[u8]) -> io::Result<()> {
        let url = text_of(location)?;
        self.client.put(url, Bytes::copy_from_slice(bytes)).map_err(io_error)?;
        write(&self.known).objects.remove(url);
        self.learn(&[Question::Object(url.to_owned())])
    }

    fn canonical(&self, folder: &Path) -> io::Result<PathBuf> {
        Ok(folder.to_owned())
    }

    fn absolute(&self, location: &Path) -> PathBuf {
        location.to_owned()
    }
}

fn stat_of(meta: &Meta) -> Stat {
    let version = meta.etag.as_ref().map_or(0, |etag| xxh3_64(etag.as_bytes()).max(1));
    Stat { kind: ItemKind::File, stamp: Stamp { size_bytes: meta.size_bytes, modified: meta.modified, version } }
}

/// The key of a version of an object in the cache.
fn key_of(meta: &Meta) -> u128 {
    let version = meta.etag.clone().unwrap_or_else(|| format!("{:?}", meta.modified));
    xxh3_128(format!("{}\n{}\n{version}", meta.url, meta.size_bytes).as_bytes())
}

/// Most folders above a folder that are searched for logs.
const MOST_PARENTS: usize = 5;
/// Most reads ahead of an object that run at the same time.
const MOST_AHEAD: usize = 8;
/// Blocks that a read in sequence fetches at once.
const IN_SEQUENCE: u64 = 16;
/// Bytes of all blocks of a storage.
const BLOCKS_BYTES: usize = 64 << 20;

/// Blocks of objects, read lately.
#[derive(Debug, Default)]
struct Blocks {
    held: HashMap<(u64, u64), Bytes>,
    /// The blocks in the order in which they came.
    order: VecDeque<(u64, u64)>,
    bytes: usize,
}

impl Blocks {
    fn insert(&mut self, key: (u64, u64), bytes: Bytes) {
        self.bytes += bytes.len();
        if let Some(before) = self.held.insert(key, bytes) {
            self.bytes -= before.len();
        } else {
            self.order.push_back(key);
        }
        while self.bytes > BLOCKS_BYTES
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.held.remove(&oldest).map_or(0, |bytes| bytes.len());
        }
    }
}

/// An object of one version. Cheap to clone.
#[derive(Clone, Debug)]
struct RemoteObject {
    client: Arc<Client>,
    meta: Arc<Meta>,
    /// Digest of the URL.
    id: u64,
    blocks: Arc<Mutex<Blocks>>,
    cached: Option<Arc<Cached>>,
}

/// The cached bytes of an object.
#[derive(Debug)]
struct Cached {
    cache: Arc<Cache>,
    object: CachedObject,
    /// Reads ahead that were asked for and are not done.
    ahead: AtomicUsize,
}

impl RemoteObject {
    fn fetch(&self, range: Range<u64>) -> io::Result<Bytes> {
        self.client.get(&self.meta.url, range, self.meta.etag.as_deref()).map_err(io_error)
    }

    /// Brings the bytes of `range` into the cache. Returns false if there is no cache, or no room.
    fn need_cached(&self, range: &Range<u64>, whole: bool) -> io::Result<bool> {
        let Some(cached) = &self.cached else { return Ok(false) };
        let is_there = cached.object.need(range, whole, &|range| self.fetch(range))?;
        if !is_there && let Some(warning) = cached.cache.warning() {
            notices::add(Level::Warning, warning);
        }
        Ok(is_there)
    }

    /// Asks for the end of the object in the background. Opening reads the start and then the end.
    fn will_need_tail(&self) {
        let size = self.meta.size_bytes;
        let Some(cached) = self.cached.as_ref().filter(|_| size > BLOCK) else { return };
        if !cached.object.has(&(size - 1..size)) {
            let object = self.clone();
            // The read that needs the bytes reports the error.
            self.client.in_background(move |_| drop(object.need_cached(&(size - 1..size), false)));
        }
    }

    /// Block `number`. Reads several blocks if the block before is held.
    fn block(&self, number: u64) -> io::Result<Bytes> {
        let count = {
            let blocks = lock(&self.blocks);
            if let Some(held) = blocks.held.get(&(self.id, number)) {
                return Ok(held.clone());
            }
            let before = number.checked_sub(1).is_some_and(|before| blocks.held.contains_key(&(self.id, before)));
            if before { IN_SEQUENCE } else { 1 }
        };
        let start = number * BLOCK;
        let end = (start + count * BLOCK).min(self.meta.size_bytes);
        let bytes = self.fetch(start..end)?;
        let mut blocks = lock(&self.blocks);
        for (number, at) in (number..).zip((0..bytes.len()).step_by(BLOCK as usize)) {
            // A copy, so that a block does not keep its neighbours in memory.
            let block = Bytes::copy_from_slice(&bytes[at..bytes.len().min(at + BLOCK as usize)]);
            blocks.insert((self.id, number), block);
        }
        Ok(bytes.slice(..bytes.len().min(BLOCK as usize)))
    }
}

impl Object for RemoteObject {
    fn stat(&self) -> io::Result<Stat> {
        // Each read compares the version.
        Ok(stat_of(&self.meta))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let end = (offset + buffer.len() as u64).min(self.meta.size_bytes);
        if offset >= end {
            return Ok(0);
        }
        let wanted = (end - offset) as usize;
        // Opening makes small reads, which need not wait for a whole part.
        let is_small = (wanted as u64) < BLOCK;
        if is_small && offset == 0 {
            self.will_need_tail();
        }
        if self.need_cached(&(offset..end), !is_small)?
            && let Some(cached) = &self.cached
        {
            cached.object.read_at(&mut buffer[..wanted], offset)?;
            return Ok(wanted);
        }
        if !is_small {
            buffer[..wanted].copy_from_slice(&self.fetch(offset..end)?);
            return Ok(wanted);
        }
        let block = self.block(offset / BLOCK)?;
        let found = &block[(offset % BLOCK) as usize..];
        let count = found.len().min(wanted);
        buffer[..count].copy_from_slice(&found[..count]);
        Ok(count)
    }

    fn is_best_mapped(&self) -> bool {
        self.cached.as_ref().is_some_and(|cached| cached.object.is_best_mapped())
    }

    fn map(&self, _: u64) -> io::Result<Option<Mapping>> {
        self.cached.as_ref().map(|cached| cached.object.map()).transpose()
    }

    fn is_partial(&self) -> bool {
        true
    }

    fn need(&self, range: Range<u64>) -> io::Result<bool> {
        self.need_cached(&range, true)
    }

    fn will_need(&self, range: Range<u64>) {
        let Some(cached) = self.cached.as_ref().filter(|cached| !cached.object.has(&range)) else { return };
        if cached.ahead.fetch_add(1, Ordering::Relaxed) >= MOST_AHEAD {
            cached.ahead.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let object = self.clone();
        self.client.in_background(move |_| {
            // The read that needs the bytes reports the error.
            let _ = object.need_cached(&range, true);
            if let Some(cached) = &object.cached {
                cached.ahead.fetch_sub(1, Ordering::Relaxed);
            }
        });
    }
}
