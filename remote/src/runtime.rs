//! The threads on which all requests run.

use std::sync::{Mutex, PoisonError};

use tokio::runtime::{Builder, Runtime};

/// Number of threads. They wait for sockets and copy bytes.
const THREADS: usize = 2;

/// The runtime, with the process that made it. A forked child has none of the threads, so that it
/// makes its own runtime.
static RUNTIME: Mutex<Option<(u32, &'static Runtime)>> = Mutex::new(None);

/// The runtime of this process, which the first call makes.
pub(crate) fn get() -> Result<&'static Runtime, String> {
    let mut held = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if let Some((of, runtime)) = *held
        && of == process
    {
        return Ok(runtime);
    }
    // Another library may have installed a provider already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let made = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("forebay-remote")
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start threads: {error}"))?;
    let runtime: &'static Runtime = Box::leak(Box::new(made));
    *held = Some((process, runtime));
    Ok(runtime)
}
