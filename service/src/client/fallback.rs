//! The corpus in this process, for the time in which no server answers.
//!
//! The process becomes a server of its own, without a socket: the same threads compute the same
//! messages. So a batch cannot depend on where it was computed.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_flight::FlightData;
use forebay::loader::Cancel;
use forebay::{Config, Error, ErrorKind, Result, storage};
use tokio::sync::mpsc::Receiver;
use tonic::Status;

use super::connection::block_on;
use crate::protocol::description::Answer;
use crate::protocol::failure::{Failed, failed};
use crate::protocol::request::Request;
use crate::protocol::ticket::Ticket;
use crate::server::Options;
use crate::server::data_sets::{DataSet, DataSets, InUse};
use crate::server::streams::{QUEUE, Stream};

/// Time between two attempts to reach a server again.
const RETRY: Duration = Duration::from_secs(2);

/// The data of a loader, which this process opens when no server answers.
#[derive(Debug)]
pub(super) struct Fallback {
    sets: DataSets,
}

impl Fallback {
    /// The fallback that `config` asks for, if it does. Fails if the data is not local, or if no
    /// folder keeps its index. Opens nothing yet.
    pub(super) fn of(config: &Config) -> Result<Option<Self>> {
        if !config.service_fallback {
            return Ok(None);
        }
        let corpora = config.corpora()?;
        if let Some(path) = corpora.iter().flat_map(|(_, paths)| paths).find(|path| storage::is_remote(Path::new(path)))
        {
            return Err(Error::config(format!(
                "`service_fallback` needs local data, and `{path}` lies in an object store: name local files, or leave \
                 `service_fallback` out"
            )));
        }
        if config.index_folder().is_none() {
            return Err(Error::config(
                "`service_fallback` needs the saved index of the data: set `index_dir` or `cache_dir`",
            ));
        }
        let options = Options { config: config.clone(), idle: Duration::ZERO, ..Options::default() };
        Ok(Some(Self { sets: DataSets::new(&options)? }))
    }

    /// Opens the corpora of `request`, if they are not open.
    pub(super) fn open(&self, request: &Request) -> Result<(Arc<DataSet>, Answer)> {
        let (set, description) = self.sets.get(request)?;
        let answer = Answer { handle: set.handle.clone(), description };
        Ok((set, answer))
    }

    /// Closes the corpora if no stream uses them.
    pub(super) fn close_unused(&self) {
        self.sets.close_idle();
    }
}

/// The messages of a stream that this process computes.
pub(super) struct LocalStream {
    received: Receiver<Result<FlightData, Status>>,
    runtime: tokio::runtime::Runtime,
    tried: Instant,
}

impl LocalStream {
    /// Begins the batches of `ticket`, and leaves their schema out.
    pub(super) fn begin(set: &Arc<DataSet>, ticket: Ticket, cancel: &Cancel) -> Result<Self> {
        let (messages, received) = tokio::sync::mpsc::channel(QUEUE);
        let set = InUse::new(set);
        let stream = Stream { set, ticket, messages, draining: Arc::default(), is_watched: false };
        let failed = |error| Error::io("cannot start a thread in place of the service", error);
        stream.start().map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(failed)?;
        let mut local = Self { received, runtime, tried: Instant::now() };
        local.message(cancel)?;
        Ok(local)
    }

    /// Waits for the next message.
    pub(super) fn message(&mut self, cancel: &Cancel) -> Result<FlightData> {
        loop {
            match block_on(&self.runtime, self.received.recv(), RETRY, cancel)? {
                None => {}
                Some(Some(Ok(message))) => return Ok(message),
                Some(Some(Err(status))) => {
                    return Err(match failed(&status) {
                        Failed::Fault(error) => error,
                        Failed::Gone(reason) => Error::new(ErrorKind::Internal, reason),
                        Failed::UnknownHandle => Error::new(ErrorKind::Internal, "the corpus was closed"),
                    });
                }
                Some(None) => return Err(Error::new(ErrorKind::Internal, "a stream gave too few batches")),
            }
        }
    }

    /// Whether it is time to try the servers again.
    pub(super) fn is_due(&self) -> bool {
        self.tried.elapsed() >= RETRY
    }

    /// Notes that no server answers yet.
    pub(super) fn tried(&mut self) {
        self.tried = Instant::now();
    }
}
