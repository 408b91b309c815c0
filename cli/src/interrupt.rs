//! Ends the process at Ctrl-C, with status 130.
//!
//! A command without results ends at once. Its output is complete, or has a name that the next run
//! removes. A command that measures holds the signal back ([`hold`]), prints its results so far,
//! and ends by itself. A second Ctrl-C ends such a command at once, too.

use std::sync::atomic::{AtomicBool, Ordering};

/// Status of a command that Ctrl-C ended: 128 plus the number of the signal.
pub(crate) const INTERRUPTED: u8 = 130;

/// Whether a command reads `PENDING`. The command writes it, and the handler reads it on any
/// thread. No other memory depends on it.
static HELD: AtomicBool = AtomicBool::new(false);
/// Whether a held signal came. The handler writes it, and the command reads it. No other memory
/// depends on it.
static PENDING: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C end this process while the returned value lives, whatever handles it before and
/// after.
///
/// It is for a program's own process. A library that tests or a trainer call must not do this.
#[must_use]
pub fn end_at_interrupt() -> EndAtInterrupt {
    EndAtInterrupt {
        // SAFETY: `signal` stores the address of a function that lives as long as the program. That
        // function calls only functions that a handler may call: atomics, `isatty`, `write` and
        // `_exit`.
        #[cfg(unix)]
        before: unsafe { libc::signal(libc::SIGINT, on_interrupt as extern "C" fn(libc::c_int) as libc::sighandler_t) },
    }
}

/// Gives Ctrl-C back to its former handler on drop.
#[derive(Debug)]
pub struct EndAtInterrupt {
    #[cfg(unix)]
    before: libc::sighandler_t,
}

#[cfg(unix)]
impl Drop for EndAtInterrupt {
    fn drop(&mut self) {
        if self.before != libc::SIG_ERR {
            // SAFETY: `signal` itself returned `before` as the handler in force.
            unsafe { libc::signal(libc::SIGINT, self.before) };
        }
    }
}

#[cfg(unix)]
extern "C" fn on_interrupt(_: libc::c_int) {
    if HELD.load(Ordering::Relaxed) && !PENDING.swap(true, Ordering::Relaxed) {
        return;
    }
    // SAFETY: a handler may make these calls, and the pointer points to one byte of static memory.
    unsafe {
        // The next prompt begins on a new line, after a progress bar or `^C`.
        if libc::isatty(2) == 1 {
            libc::write(2, b"\n".as_ptr().cast(), 1);
        }
        libc::_exit(i32::from(INTERRUPTED));
    }
}

/// Holds Ctrl-C back until it is dropped.
pub(crate) struct Hold(());

/// Holds Ctrl-C back, so that the caller can end its work in order.
pub(crate) fn hold() -> Hold {
    HELD.store(true, Ordering::Relaxed);
    Hold(())
}

impl Hold {
    /// Whether Ctrl-C came.
    pub(crate) fn is_pending(&self) -> bool {
        PENDING.load(Ordering::Relaxed)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        HELD.store(false, Ordering::Relaxed);
    }
}
