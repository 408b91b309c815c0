//! Locks whose holders never leave them half-way: a panic in one thread must not end the others by poisoning.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

/// Locks `mutex`.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar`.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar` for at most `timeout`.
pub(crate) fn wait_timeout<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, timeout: Duration) -> MutexGuard<'a, T> {
    condvar.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner).0
}

/// The process that something was made in.
///
/// A forked child has a copy of every lock, held for ever if another thread held it at the fork: what runs in destructors must not take one there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForkGuard {
    process: u32,
    forks: u32,
}

/// Forks that this process is the child of. Asking the system who one is costs more than handing a small batch over.
static FORKS: AtomicU32 = AtomicU32::new(0);

impl ForkGuard {
    /// This process.
    pub(crate) fn new() -> Self {
        #[cfg(unix)]
        {
            static COUNTS: Once = Once::new();
            extern "C" fn forked() {
                FORKS.fetch_add(1, Ordering::Relaxed);
            }
            COUNTS.call_once(|| {
                // SAFETY: a handler that may run after any fork, of a library that is never unloaded.
                let code = unsafe { libc::pthread_atfork(None, None, Some(forked)) };
                assert_eq!(code, 0, "out of memory for a fork handler");
            });
        }
        Self { process: std::process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }

    /// The process' number.
    pub(crate) fn process(self) -> u32 {
        self.process
    }

    /// Whether this process is a forked child of that one.
    pub(crate) fn is_forked_child(self) -> bool {
        self.forks != FORKS.load(Ordering::Relaxed)
    }
}
