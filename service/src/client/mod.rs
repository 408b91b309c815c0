//! The consumer's side: a loader whose rows come from servers.
//!
//! Each stream has a connection of its own, on the thread that asks for its batches. If a server
//! does not answer, the stream goes on at the next address, at the batch that it lacks. If none
//! answers, it may go on in this process.

mod connection;
mod fallback;
mod stream;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forebay::loader::Cancel;
use forebay::loader::description::{OpenedDescription, PartDescription, SourceDescription};
use forebay::loader::served::{PassStart, RowFormat, RowService, RowStream};
use forebay::{Config, Error, ErrorKind, Loader, Result};

use crate::address::Address;
use crate::protocol::description::Answer;
use crate::protocol::request::Request;
use crate::server::data_sets::DataSet;
use connection::{Attempt, Connection};
use fallback::Fallback;
use stream::ServedStream;

/// Opens a loader. If the settings name a service, its rows come from there.
pub fn open(config: Config, cancel: &Cancel) -> Result<Loader> {
    if config.service.is_empty() {
        return Loader::open_cancellable(config, cancel);
    }
    config.validate()?;
    let addresses = config.service.iter().map(|text| Address::parse(text)).collect::<Result<Vec<_>>>()?;
    let timeout = Duration::from_secs(config.service_timeout);
    let fallback = Fallback::of(&config)?;
    let service = Arc::new(Service { addresses, timeout, config: config.clone(), known: Mutex::default(), fallback });
    let description = service.ask(&[], cancel)?.description;
    Loader::served(config, description, service)
}

/// The servers of a loader, and the corpus that it asks them for.
#[derive(Debug)]
struct Service {
    addresses: Vec<Address>,
    timeout: Duration,
    config: Config,
    /// The first answer of a server. Later servers must have the same corpus.
    known: Mutex<Option<Answer>>,
    /// The corpus in this process, if it may take the place of a server.
    fallback: Option<Fallback>,
}

impl Service {
    /// Asks a server for the corpus and the facts about its first `shards` shards. Tries all
    /// addresses until one answers.
    fn ask(&self, shards: &[u64], cancel: &Cancel) -> Result<Answer> {
        let mut patience = Patience::new(self.timeout);
        loop {
            let address = self.address(&patience);
            let asked = Connection::to(address, 1 << 20, self.silence(), cancel)
                .and_then(|mut connection| self.ask_over(&mut connection, shards, cancel));
            match asked {
                Ok(answer) => return Ok(answer),
                Err(Attempt::Fault(error)) => return Err(error),
                Err(Attempt::Gone(reason)) => {
                    if let Some(fallback) = self.fallback_after(&patience) {
                        return Ok(self.ask_fallback(fallback, shards)?.1);
                    }
                    patience.wait(self, &reason, cancel)?;
                }
            }
        }
    }

    /// Asks the server of `connection` for the corpus. Fails if it is another one than before.
    fn ask_over(&self, connection: &mut Connection, shards: &[u64], cancel: &Cancel) -> Result<Answer, Attempt> {
        let mut known = self.known();
        let answer = connection.info(self.request(&known, shards)?.to_bytes(), cancel)?;
        let place = format!("the service at `{}`", connection.address());
        Ok(remember(&mut known, &place, answer)?)
    }

    /// Opens the corpus in this process. Fails if it is another one than the servers have.
    fn ask_fallback(&self, fallback: &Fallback, shards: &[u64]) -> Result<(Arc<DataSet>, Answer)> {
        let mut known = self.known();
        let (set, answer) = fallback.open(&self.request(&known, shards)?)?;
        let answer = remember(&mut known, "this process", answer)?;
        Ok((set, answer))
    }

    /// The request for the corpus, with the numbers of shards that earlier answers spoke of.
    fn request(&self, known: &Option<Answer>, shards: &[u64]) -> Result<Request> {
        let known = known.iter().flat_map(|answer| &answer.description.sources).map(|source| source.shards);
        Request::of(&self.config, &shards.iter().copied().chain(known).collect::<Vec<_>>())
    }

    fn known(&self) -> MutexGuard<'_, Option<Answer>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The corpus in this process, once an attempt at every address has failed.
    fn fallback_after(&self, patience: &Patience) -> Option<&Fallback> {
        self.fallback.as_ref().filter(|_| patience.attempts + 1 >= self.addresses.len())
    }

    /// Time after which a server that says nothing counts as gone. Each address has its turn before
    /// the time is over.
    fn silence(&self) -> Duration {
        self.timeout / u32::try_from(self.addresses.len()).unwrap_or(u32::MAX)
    }

    fn handle(&self) -> Option<String> {
        self.known().as_ref().map(|answer| answer.handle.clone())
    }

    fn address(&self, patience: &Patience) -> &Address {
        &self.addresses[patience.attempts % self.addresses.len()]
    }
}

impl RowService for Service {
    fn describe(&self, shards: &[u64]) -> Result<OpenedDescription> {
        Ok(self.ask(shards, &Cancel::default())?.description)
    }

    fn open(self: Arc<Self>, config: &Config, format: &RowFormat, start: &PassStart) -> Box<dyn RowStream> {
        Box::new(ServedStream::new(self, config, format, start))
    }
}

/// Keeps `answer` of `place` as the known one. Fails if an earlier answer told of other corpora.
fn remember(known: &mut Option<Answer>, place: &str, answer: Answer) -> Result<Answer> {
    match known {
        None => *known = Some(answer.clone()),
        Some(known) => {
            check_same(place, &known.description, &answer.description)?;
            known.handle.clone_from(&answer.handle);
        }
    }
    Ok(answer)
}

/// Fails unless `place` has the corpora that `known` describes, or the same with further shards.
fn check_same(place: &str, known: &OpenedDescription, found: &OpenedDescription) -> Result<()> {
    let names = |description: &OpenedDescription| -> Vec<String> {
        description.sources.iter().map(|source| source.name.clone()).collect()
    };
    if names(known) != names(found) || known.ids != found.ids {
        return Err(other(place, "corpora", &format!("{:?}", names(found)), &format!("{:?}", names(known))));
    }
    for (known, found) in known.sources.iter().zip(&found.sources) {
        let part = |source: &SourceDescription| -> Option<PartDescription> {
            source.parts.iter().find(|part| part.shards == known.shards).cloned()
        };
        let (Some(before), now) = (part(known), part(found)) else { continue };
        let Some(now) = now else {
            let [now, before] = [found.shards, known.shards].map(|shards| format!("{shards} shards"));
            return Err(other(place, "number of shards", &now, &before));
        };
        if before != now {
            return Err(other(place, "fingerprint", &now.fingerprint, &before.fingerprint));
        }
    }
    Ok(())
}

fn other(place: &str, what: &str, now: &str, before: &str) -> Error {
    Error::new(
        ErrorKind::Changed,
        format!("{place} has another corpus: its {what} is {now} there and was {before} before"),
    )
}

/// The time that a loader waits for a server.
#[derive(Debug)]
struct Patience {
    began: Instant,
    timeout: Duration,
    attempts: usize,
}

/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

impl Patience {
    fn new(timeout: Duration) -> Self {
        Self { began: Instant::now(), timeout, attempts: 0 }
    }

    /// Waits before the next attempt. `reason` says why the last one failed. Fails if the time is
    /// over.
    fn wait(&mut self, service: &Service, reason: &str, cancel: &Cancel) -> Result<()> {
        let waited = self.began.elapsed();
        if waited >= self.timeout {
            let all: Vec<String> = service.addresses.iter().map(|address| format!("`{address}`")).collect();
            return Err(Error::new(
                ErrorKind::Io,
                format!(
                    "no service answered at {} within {} s of `service_timeout`: {reason}; start `forebay serve`, or raise the \
                     setting",
                    all.join(", "),
                    self.timeout.as_secs()
                ),
            ));
        }
        self.attempts += 1;
        // The next address is tried at once.
        let round = self.attempts / service.addresses.len();
        if self.attempts.is_multiple_of(service.addresses.len()) {
            let pause = Duration::from_millis(20 << round.min(6)).min(LONGEST_PAUSE);
            let until = Instant::now() + pause;
            while Instant::now() < until {
                cancel.check()?;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        cancel.check()
    }
}
