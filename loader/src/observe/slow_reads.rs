//! Slow reads: notices a read that takes long, and names its file.
//!
//! A worker notes when its batch began, and the place of each row before it reads the row; that costs a few stores.
//! A consumer that waits looks at these notes, so that a read which never ends is named as well. A batch that nobody
//! waited for is looked at when it is done.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;

/// Time after which a read takes long.
pub(crate) const LONG: Duration = Duration::from_secs(5);

/// What each worker of a session reads. Its worker writes a note and any consumer reads it; a reader that sees parts of
/// two notes names the wrong file once.
#[derive(Debug)]
pub(crate) struct SlowReads {
    origin: Instant,
    workers: Vec<CachePadded<Note>>,
}

#[derive(Debug, Default)]
struct Note {
    /// When the batch began, in milliseconds since `origin`, plus 1; 0 between batches.
    began: AtomicU64,
    source: AtomicU64,
    /// Stream token that the row begins with.
    token: AtomicU64,
    /// Whether the user knows of this batch already.
    told: AtomicBool,
}

/// A read that takes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlowRead {
    pub(crate) source: usize,
    pub(crate) token: u64,
    pub(crate) lasts: Duration,
}

impl SlowReads {
    /// Watches `workers` workers, and one more for the threads of callers.
    pub(crate) fn new(workers: usize) -> Self {
        Self { origin: Instant::now(), workers: (0..=workers).map(|_| CachePadded::default()).collect() }
    }

    fn millis(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.origin).as_millis() as u64 + 1
    }

    /// Notes that `worker` began a batch at `began`.
    pub(crate) fn begin(&self, worker: usize, began: Instant) {
        let note = &self.workers[worker];
        note.told.store(false, Ordering::Relaxed);
        note.began.store(self.millis(began), Ordering::Relaxed);
    }

    /// Notes that `worker` reads from stream token `token` of `source` on. Ignores workers that are not watched.
    #[inline]
    pub(crate) fn read(&self, worker: usize, source: usize, token: u64) {
        if let Some(note) = self.workers.get(worker) {
            note.source.store(source as u64, Ordering::Relaxed);
            note.token.store(token, Ordering::Relaxed);
        }
    }

    /// Notes that `worker` is done with its batch, which took `took`. Returns whether that is to be told: it was long,
    /// and the user does not know it.
    pub(crate) fn end(&self, worker: usize, took: Duration, long: Duration) -> bool {
        let note = &self.workers[worker];
        note.began.store(0, Ordering::Relaxed);
        took >= long && !note.told.swap(true, Ordering::Relaxed)
    }

    /// The reads that take long now and that the user does not know of.
    pub(crate) fn look(&self, long: Duration) -> Vec<SlowRead> {
        let now = self.millis(Instant::now());
        let slow = self.workers.iter().filter_map(|note| {
            let began = note.began.load(Ordering::Relaxed);
            let lasts = Duration::from_millis(now.saturating_sub(began));
            if began == 0 || lasts < long || note.told.swap(true, Ordering::Relaxed) {
                return None;
            }
            let (source, token) = (note.source.load(Ordering::Relaxed), note.token.load(Ordering::Relaxed));
            Some(SlowRead { source: source as usize, token, lasts })
        });
        slow.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_that_takes_long_is_told_once() {
        let reads = SlowReads::new(2);
        assert_eq!(reads.look(Duration::ZERO), []);
        let now = Instant::now();
        reads.begin(1, now);
        reads.read(1, 3, 77);
        assert_eq!(reads.look(Duration::from_secs(3600)), []);
        let [slow] = reads.look(Duration::ZERO)[..] else { panic!("one worker reads") };
        assert_eq!((slow.source, slow.token), (3, 77));
        assert_eq!(reads.look(Duration::ZERO), []);
        assert!(!reads.end(1, LONG, LONG), "the user knows");

        reads.begin(1, now);
        assert!(!reads.end(1, LONG / 2, LONG));
        reads.begin(2, now);
        assert!(reads.end(2, LONG, LONG));
        assert_eq!(reads.look(Duration::ZERO), []);
        reads.read(usize::MAX, 0, 0);
    }
}
