//! Numbers of the loaders of this process for other programs, and a page for people.
//!
//! If `FOREBAY_METRICS` names an address, a thread listens there. It answers `/metrics` in the
//! format of OpenMetrics, `/status` in JSON, and `/` with a page that shows the status. Without the
//! variable, there is no thread, and a loader does nothing more than it does otherwise.

mod listener;
mod open_metrics;
pub mod status;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use forebay::settings::environment::Environment;
use forebay::{Error, Loader, Result};

/// The loaders of this process that metrics show, and whether a thread listens.
#[derive(Debug, Default)]
struct Watched {
    loaders: Vec<Weak<Loader>>,
    process: Option<u32>,
}

static WATCHED: Mutex<Watched> = Mutex::new(Watched { loaders: Vec::new(), process: None });

fn watched() -> MutexGuard<'static, Watched> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The loaders that live.
fn loaders() -> Vec<Arc<Loader>> {
    let mut watched = watched();
    watched.loaders.retain(|loader| loader.strong_count() > 0);
    watched.loaders.iter().filter_map(Weak::upgrade).collect()
}

/// Shows `loader` in the metrics of this process, if `FOREBAY_METRICS` asks for them.
///
/// Fails if the variable is no address. An address that is in use leaves a warning: several ranks
/// of a node may have the same variable.
pub fn watch(loader: &Arc<Loader>) -> Result<()> {
    if !start()? {
        return Ok(());
    }
    watched().loaders.push(Arc::downgrade(loader));
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
        let local = environment.get("LOCAL_RANK").and_then(|rank| rank.parse().ok()).unwrap_or(0);
        listener::start(address, local).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidInput => Error::config(format!(
                "`FOREBAY_METRICS` must be an address such as `127.0.0.1:9440`, found `{address}`"
            )),
            _ => Error::io(format!("cannot listen at `{address}`, which `FOREBAY_METRICS` names"), error),
        })?;
    }
    Ok(true)
}
