//! Blocking client of object stores: lists, describes, reads and writes objects.
//!
//! A location is a URL such as `s3://bucket/key`. The part before the first slash of the key names
//! the store. Keys are taken as they are, without percent encoding.
//!
//! All requests run on two threads of this crate, which the first call makes. A call waits for its
//! result. Failed requests are tried again until a deadline. An error names the URL without
//! credentials, the cause and the remedy.

mod backend;
mod credentials;
mod error;
mod hub;
mod runtime;
mod transport;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;

use crate::backend::Backend;
pub use crate::error::{Error, Kind};
use crate::transport::Transport;
pub use crate::transport::traffic;

/// Settings of a client.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Options {
    /// URL of a server that speaks the store's protocol. `None` takes it from the environment, or
    /// the store's own server.
    pub endpoint: Option<String>,
    /// Region of an S3 bucket. `None` takes it from the environment.
    pub region: Option<String>,
    /// Whether requests are sent without credentials.
    pub anonymous: bool,
    /// Time after which a call fails, all its tries included.
    pub deadline: Duration,
    /// Limit of requests in flight.
    pub most_requests: usize,
}

/// An object: its URL and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The URL.
    pub url: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Time of the last modification, if the store tells it.
    pub modified: Option<SystemTime>,
    /// The name that the store gives to this version of the content.
    pub etag: Option<String>,
}

/// A question about a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// Asks for the object at this URL.
    Object(String),
    /// Asks for all objects in the folder at this URL.
    Objects(String),
    /// Asks whether the folder at this URL holds an object.
    HasAny(String),
}

impl Question {
    /// The URL that the question is about.
    pub fn url(&self) -> &str {
        match self {
            Self::Object(url) | Self::Objects(url) | Self::HasAny(url) => url,
        }
    }
}

/// The answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The object. `None` if there is none.
    Object(Option<Meta>),
    /// The objects, in any order.
    Objects(Vec<Meta>),
    /// Whether there is an object.
    HasAny(bool),
}

/// A client of all stores. All threads share it.
#[derive(Debug)]
pub struct Client {
    options: Options,
    transport: Transport,
    stores: Mutex<HashMap<String, Arc<Backend>>>,
}

/// Tells whether `location` begins with the scheme of a store.
pub fn is_remote(location: &str) -> bool {
    backend::scheme(location).is_some()
}

/// The part of `location` that names the store, without a slash at its end.
pub fn root(location: &str) -> Option<&str> {
    backend::split(location).ok().map(|parts| parts.store)
}

/// Tells whether folders of the store at `location` can be listed.
pub fn can_list(location: &str) -> bool {
    backend::scheme(location) != Some(backend::Scheme::Http)
}

/// The clients in use, each with its process. A forked child makes its own. A client that is no
/// longer in use goes, so that the next one reads the environment anew.
static CLIENTS: Mutex<Vec<(u32, Weak<Client>)>> = Mutex::new(Vec::new());

impl Client {
    /// The client of this process with these settings.
    pub fn shared(options: &Options) -> Arc<Self> {
        let process = std::process::id();
        let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|(of, client)| *of == process && client.strong_count() > 0);
        let mut used = clients.iter().filter_map(|(_, client)| client.upgrade());
        if let Some(client) = used.find(|client| client.options == *options) {
            return client;
        }
        let client = Arc::new(Self::new(options.clone()));
        clients.push((process, Arc::downgrade(&client)));
        client
    }

    fn new(options: Options) -> Self {
        let transport = Transport::new(options.most_requests);
        Self { options, transport, stores: Mutex::default() }
    }

    /// Answers all `questions` at the same time, in order.
    pub fn ask(&self, questions: &[Question]) -> Vec<Result<Answer, Error>> {
        let runtime = match runtime::get() {
            Ok(runtime) => runtime,
            Err(error) => {
                let failed = |question: &Question| Err(Error::new(Kind::Other, error.clone()).of(question.url()));
                return questions.iter().map(failed).collect();
            }
        };
        let answers = futures_util::stream::iter(questions)
            .map(|question| self.answer(question))
            .buffered(self.options.most_requests.max(1));
        runtime.block_on(answers.collect())
    }

    async fn answer(&self, question: &Question) -> Result<Answer, Error> {
        let url = question.url();
        let (backend, key) = self.backend(url)?;
        let answer = async {
            Ok(match question {
                Question::Object(_) => match backend.head(&key).await {
                    Err(error) if error.kind() == Kind::NotFound => Answer::Object(None),
                    found => Answer::Object(Some(found?)),
                },
                Question::Objects(_) => Answer::Objects(backend.list(&key).await?),
                Question::HasAny(_) => Answer::HasAny(backend.has_any(&key).await?),
            })
        };
        self.in_time(url, answer).await
    }

    /// Describes all objects whose URL begins with the folder `url`, in any order.
    pub fn list(&self, url: &str) -> Result<Vec<Meta>, Error> {
        let (backend, key) = self.backend(url)?;
        self.wait(url, async { backend.list(&key).await })
    }

    /// Reads `range` of the object at `url`. Fails if the object is no longer the version `etag`.
    pub fn get(&self, url: &str, range: Range<u64>, etag: Option<&str>) -> Result<Bytes, Error> {
        let (backend, key) = self.backend(url)?;
        let length = range.end - range.start;
        self.wait(url, async {
            let mut tries = 0;
            loop {
                let found = backend.get(&key, range.clone(), etag).await;
                tries += 1;
                match found {
                    Ok(bytes) if bytes.len() as u64 == length => return Ok(bytes),
                    Ok(bytes) if tries >= backend::TRIES_OF_A_BODY => {
                        let text = format!("asked for {length} bytes, the server sent {}", bytes.len());
                        return Err(Error::new(Kind::Damaged, text));
                    }
                    Ok(_) => {}
                    Err(error) if error.kind() != Kind::Damaged || tries >= backend::TRIES_OF_A_BODY => {
                        return Err(error);
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(Duration::from_millis(100 << tries)).await;
            }
        })
    }

    /// Replaces the object at `url` by `bytes`.
    pub fn put(&self, url: &str, bytes: Bytes) -> Result<(), Error> {
        let (backend, key) = self.backend(url)?;
        self.wait(url, async { backend.put(&key, bytes).await })
    }

    /// Runs `work` on a thread of this crate. Its errors are dropped.
    pub fn in_background(self: &Arc<Self>, work: impl FnOnce(&Self) + Send + 'static) {
        let client = Arc::clone(self);
        if let Ok(runtime) = runtime::get() {
            drop(runtime.spawn_blocking(move || work(&client)));
        }
    }

    fn wait<T>(&self, url: &str, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let runtime = runtime::get().map_err(|error| Error::new(Kind::Other, error).of(url))?;
        runtime.block_on(self.in_time(url, work))
    }

    /// Ends `work` at the deadline.
    async fn in_time<T>(&self, url: &str, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let deadline = self.options.deadline;
        match tokio::time::timeout(deadline, work).await {
            Ok(result) => result.map_err(|error| error.of(url)),
            Err(_) => {
                let mut text = format!("no good answer within {} s, all tries included", deadline.as_secs());
                if let Some(last) = self.transport.last_trouble() {
                    text.push_str(&format!(" (the last trouble was {last})"));
                }
                Err(Error::new(Kind::Unavailable, text).of(url))
            }
        }
    }

    fn backend(&self, url: &str) -> Result<(Arc<Backend>, String), Error> {
        let parts = backend::split(url).map_err(|error| error.of(url))?;
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = stores.get(parts.store) {
            return Ok((Arc::clone(found), parts.key.to_owned()));
        }
        let runtime = runtime::get().map_err(|error| Error::new(Kind::Other, error).of(url))?;
        // Clients of HTTP look for the runtime when they are made.
        let _entered = runtime.enter();
        let made = Backend::new(&parts, &self.options, &self.transport).map_err(|error| error.of(url))?;
        let made = Arc::new(made);
        stores.insert(parts.store.to_owned(), Arc::clone(&made));
        Ok((made, parts.key.to_owned()))
    }
}
