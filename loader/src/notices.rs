//! Notices: lines for the user's log, from any thread.
//!
//! A native thread must not call Python and should not write to a terminal. So it adds a notice to
//! a queue of the process. The binding and the command line take the notices at the next request
//! for a batch, and log them. Nothing waits for a notice to be taken.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, TryLockError};

/// Most notices that wait in the queue. Further notices are dropped until some are taken.
const MOST_WAITING: usize = 1000;

/// Importance of a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The progress of passes.
    Debug,
    /// The positions at which each rank begins and resumes.
    Info,
    /// A fact that the user should know without asking.
    Warning,
}

/// One line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Importance.
    pub level: Level,
    /// The line, without the level.
    pub text: String,
}

static WAITING: Mutex<VecDeque<Notice>> = Mutex::new(VecDeque::new());
/// Tells whether the queue has a notice. Writers hold the lock. A reader that sees a stale value
/// takes the notice one batch later.
static ANY: AtomicBool = AtomicBool::new(false);

/// Tells whether a notice waits. Costs one load, so that a consumer may ask before every batch.
pub fn are_waiting() -> bool {
    ANY.load(Ordering::Relaxed)
}

/// Takes all waiting notices, oldest first.
pub fn take() -> Vec<Notice> {
    with_queue(|queue| {
        ANY.store(false, Ordering::Relaxed);
        queue.drain(..).collect()
    })
    .unwrap_or_default()
}

/// Adds a notice.
pub fn add(level: Level, text: impl Into<String>) {
    let text = text.into();
    with_queue(|queue| {
        if queue.len() < MOST_WAITING {
            queue.push_back(Notice { level, text });
            ANY.store(true, Ordering::Relaxed);
        }
    });
}

/// Runs `work` on the queue. Gives up if the lock stays taken: in a forked child, the thread that
/// held it is gone.
fn with_queue<T>(work: impl FnOnce(&mut VecDeque<Notice>) -> T) -> Option<T> {
    for _ in 0..10_000 {
        match WAITING.try_lock() {
            Ok(mut queue) => return Some(work(&mut queue)),
            Err(TryLockError::Poisoned(poisoned)) => return Some(work(&mut poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_come_in_order_and_never_without_end() {
        take();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || (0..1000).for_each(|at| add(Level::Debug, format!("notices test {thread} {at}"))));
            }
        });
        assert!(are_waiting());
        let ours: Vec<_> = take().into_iter().filter(|notice| notice.text.starts_with("notices test")).collect();
        assert!(ours.len() <= MOST_WAITING && ours.len() > MOST_WAITING / 2, "{}", ours.len());
        for thread in 0..4 {
            let prefix = format!("notices test {thread} ");
            let of_thread = ours.iter().filter_map(|notice| notice.text.strip_prefix(&prefix)?.parse::<u32>().ok());
            assert!(of_thread.is_sorted());
        }
    }
}
