//! The server's side: opens corpora for consumers, and streams their batches.
//!
//! [`serve`] runs until it is told to stop. A server holds no position. Each stream has a session
//! of its own over corpora that all streams share.

pub(crate) mod data_sets;
mod flight;
mod sockets;
pub(crate) mod streams;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forebay::{Config, Error, ErrorKind, Result};
use tokio::runtime::Runtime;

pub use crate::access::Token;
pub use crate::address::Address;
use data_sets::DataSets;
use flight::Flight;
use sockets::Listeners;

/// What a server serves, and where.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Addresses to listen at.
    pub listen: Vec<Address>,
    /// Operational settings of the corpora, and the first corpus or mixture if there is one.
    pub config: Config,
    /// Names of the content settings that `config` fixes. A consumer may choose all others.
    pub fixed: Vec<String>,
    /// Further corpora, each a list of paths.
    pub also: Vec<Vec<String>>,
    /// Folders whose corpora are served.
    pub under: Vec<String>,
    /// Time after which an unused corpus is closed.
    pub idle: Duration,
    /// Users beside the own one that may connect to a Unix socket, by their number.
    pub users: Vec<u32>,
    /// Secret that consumers over TCP have to show.
    pub token: Option<Token>,
    /// Files with the certificate and the key of the server, in PEM format.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Time that streams get to end when the server stops.
const DRAIN: Duration = Duration::from_secs(10);
/// Time between two looks at a request to stop.
const SLICE: Duration = Duration::from_millis(25);

/// Serves until `should_stop`. Calls `ready` once the server listens at all addresses.
///
/// Streams that are open then end with a notice that the server stops, so that their consumers go
/// on elsewhere.
pub fn serve(options: Options, ready: impl FnOnce(&[Address]), should_stop: impl Fn() -> bool) -> Result<()> {
    crate::metrics::start()?;
    let sets = Arc::new(DataSets::new(&options)?);
    let runtime = runtime()?;
    let listeners = runtime.block_on(Listeners::open(&options))?;
    let flight = Flight::new(Arc::clone(&sets));
    let serving = runtime.block_on(async { listeners.serve(flight.clone()) })?;
    ready(listeners.addresses());
    while !should_stop() && !serving.is_finished() {
        std::thread::sleep(SLICE);
        sets.close_idle();
    }
    flight.drain();
    listeners.stop();
    let ended = runtime.block_on(async { tokio::time::timeout(DRAIN, serving).await });
    runtime.shutdown_timeout(Duration::from_secs(1));
    match ended {
        Ok(Ok(Err(error))) => Err(error),
        _ => Ok(()),
    }
}

fn runtime() -> Result<Runtime> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("forebay-serve").enable_all().build();
    runtime.map_err(|error| Error::new(ErrorKind::Io, "cannot start the threads of the server").with_source(error))
}
