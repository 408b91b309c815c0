//! Numbers of the loaders of this process for other programs, and a page for people.
//!
//! If `FOREBAY_METRICS` names an address, a thread listens there. It answers `/metrics` in the
//! format of OpenMetrics, `/status` in JSON, and `/` with a page that shows the status. Without the
//! variable, there is no thread, and a loader does nothing more than it does otherwise.

mod listener;
mod open_metrics;
pub mod status;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use forebay::notices::{self, Level};
use forebay::settings::environment::Environment;
use forebay::{Error, Loader, Result};

/// The loaders of this process that metrics show, and whether a thread listens.
#[derive(Debug, Default)]
struct Watched {
    loaders: Vec<(Weak<Loader>, Option<Start>)>,
    process: Option<u32>,
}

/// Epoch and index of the first row of a stream, whose loader has no position of its own.
pub(crate) type Start = (u64, u64);

static WATCHED: Mutex<Watched> = Mutex::new(Watched { loaders: Vec::new(), process: None });

fn watched() -> MutexGuard<'static, Watched> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The loaders that live, and where the streams of a service began.
fn loaders() -> Vec<(Arc<Loader>, Option<Start>)> {
    let mut watched = watched();
    watched.loaders.retain(|(loader, _)| loader.strong_count() > 0);
    watched.loaders.iter().filter_map(|(loader, start)| Some((loader.upgrade()?, *start))).collect()
}

/// Shows `loader` in the metrics of this process, if `FOREBAY_METRICS` asks for them.
///
/// Fails if the variable is no address. An address that is in use leaves a warning: several ranks
/// of a node may have the same variable.
pub fn watch(loader: &Arc<Loader>) -> Result<()> {
    add(loader, None)
}

/// Shows the loader of a stream that begins at `start`.
pub(crate) fn watch_stream(loader: &Arc<Loader>, start: Start) -> Result<()> {
    add(loader, Some(start))
}

fn add(loader: &Arc<Loader>, begins_at: Option<Start>) -> Result<()> {
    if start()? {
        watched().loaders.push((Arc::downgrade(loader), begins_at));
    }
    Ok(())
}

/// Starts the thread that listens, if `FOREBAY_METRICS` asks for it. Returns whether it does.
pub fn start() -> Result<bool> {
    let environment = Environment::current();
    let Some(address) = environment.get("FOREBAY_METRICS").map(str::trim).filter(|text| !text.is_empty()) else {
        return Ok(false);
    };
    let mut watched = watched();
    let process = std::process::id();
    if watched.process != Some(process) {
        // A forked child has no thread that listens.
        watched.process = Some(process);
        let local = environment.local_rank();
        match listener::start(address, local) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
                return Err(Error::config(format!(
                    "`FOREBAY_METRICS` must be an address such as `127.0.0.1:9440`, found `{address}`"
                )));
            }
            // A run does not end for its metrics.
            Err(error) => notices::add(
                Level::Warning,
                format!("no metrics: cannot listen at `{address}` of `FOREBAY_METRICS`, local rank {local}: {error}"),
            ),
        }
    }
    Ok(true)
}
