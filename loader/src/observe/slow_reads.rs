//! Slow reads: notices a read that takes long, and names its file.
//!
//! A worker notes when its batch began. Before it reads a row it notes the row's place, at the cost
//! of a few stores. A waiting consumer looks at these notes, so that a read which never ends is
//! named as well. A worker checks its own batch at the end, in case no consumer waited for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;

/// Time after which a read counts as long.
pub(crate) const LONG: Duration = Duration::from_secs(5);

/// Notes on what each worker of a session reads. Its worker writes a note and any consumer reads
/// it. A reader that sees parts of two notes names the wrong file once.
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
    /// First stream token of the row.
    token: AtomicU64,
    /// Whether the user was told about this batch already.
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

    /// Records that `worker` began a batch at `began`.
    pub(crate) fn begin(&self, worker: usize, began: Instant) {
        let note = &self.workers[worker];
        note.told.store(false, Ordering::Relaxed);
        note.began.store(self.millis(began), Ordering::Relaxed);
    }

    /// Records that `worker` reads from stream token `token` of `source` on. Ignores workers that
    /// are not watched.
    #[inline]
    pub(crate) fn read(&self, worker: usize, source: usize, token: u64) {
        if let Some(note) = self.workers.get(worker) {
            note.source.store(source as u64, Ordering::Relaxed);
            note.token.store(token, Ordering::Relaxed);
        }
    }

    /// Records that `worker` finished its batch, which took `took`. Returns whether to tell the
    /// user: the batch took long, and the user does not know it.
    pub(crate) fn end(&self, worker: usize, took: Duration, long: Duration) -> bool {
        let note = &self.workers[worker];
        note.began.store(0, Ordering::Relaxed);
        took >= long && !note.told.swap(true, Ordering::Relaxed)
    }

    /// Returns the reads that take long now and that the user does not know.
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
