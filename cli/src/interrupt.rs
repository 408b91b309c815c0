//! Ends the process at Ctrl-C, with status 130.
//!
//! A command that has nothing to show ends at once: what it wrote is whole or has a name that the next run
//! removes. A command that measures holds the signal back ([`hold`]), prints what it has, and ends itself.
//! A second Ctrl-C ends that one at once, too.

use std::sync::atomic::{AtomicBool, Ordering};

/// Status of a command that Ctrl-C ended: 128 and the number of the signal.
pub(crate) const INTERRUPTED: u8 = 130;

/// Whether a command looks at `PENDING`. Written by the command, read by the handler on any thread; no other
/// memory depends on it.
static HELD: AtomicBool = AtomicBool::new(false);
/// Whether a held signal came. Written by the handler, read by the command; no other memory depends on it.
static PENDING: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C end this process while the result lives, whatever handles it before and after.
///
/// For a program's own process: a library that is called by tests or by a trainer must not do this.
#[must_use]
pub fn end_at_interrupt() -> EndAtInterrupt {
    EndAtInterrupt {
        // SAFETY: `signal` stores the address of a function that lives as long as the program. That function
        // calls only what a handler may call: atomics, `isatty`, `write` and `_exit`.
        #[cfg(unix)]
        before: unsafe { libc::signal(libc::SIGINT, on_interrupt as extern "C" fn(libc::c_int) as libc::sighandler_t) },
    }
}

/// Gives Ctrl-C back to its former handler when it is dropped.
#[derive(Debug)]
pub struct EndAtInterrupt {
    #[cfg(unix)]
    before: libc::sighandler_t,
}

#[cfg(unix)]
impl Drop for EndAtInterrupt {
    fn drop(&mut self) {
        if self.before != libc::SIG_ERR {
            // SAFETY: `before` is what `signal` itself gave as the handler in force.
            unsafe { libc::signal(libc::SIGINT, self.before) };
        }
    }
}

#[cfg(unix)]
extern "C" fn on_interrupt(_: libc::c_int) {
    if HELD.load(Ordering::Relaxed) && !PENDING.swap(true, Ordering::Relaxed) {
        return;
    }
    // SAFETY: a handler may make these calls, and the pointer is to one byte that lives for ever.
    unsafe {
        // The next prompt begins a line of its own, behind a progress bar or `^C`.
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
