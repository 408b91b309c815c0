//! Pipeline: the only threads of a loader.
//!
//! Work is numbered. A worker takes the next number, computes its item alone, and puts it into the item's slot; consumers take
//! items in the order of their numbers. At most `window` items are begun or ready at once, which bounds memory. All waiting is blocked,
//! none spins. Dropping the pipeline tells the workers to stop and does not wait for them, so that it can happen at interpreter exit.
//!
//! A failed item stays at the front: every later call fails the same way, and nothing after it is ever delivered.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::buffer::Lease;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Home, lock, wait, wait_timeout};

/// Numbered work, computed side by side and taken in order.
#[derive(Debug)]
pub(crate) struct Pipeline<T> {
    shared: Arc<Shared<T>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    home: Home,
}

#[derive(Debug)]
struct Shared<T> {
    ring: Mutex<Ring<T>>,
    /// Workers wait here for a number to take.
    work: Condvar,
    /// Consumers wait here for the front slot.
    ready: Condvar,
}

#[derive(Debug)]
struct Ring<T> {
    /// Number of the front slot.
    front: u64,
    /// One slot per number taken and not delivered; `None` while it is computed.
    slots: VecDeque<Option<Result<T>>>,
    /// One past the last number.
    end: u64,
    window: usize,
    /// Output memory of the caller, one per number to come, where the caller provides it.
    leases: Option<VecDeque<Lease>>,
    closed: bool,
}

impl<T> Ring<T> {
    /// The next number, and its buffer, if it can be begun.
    fn take(&mut self) -> Option<(u64, Option<Lease>)> {
        let number = self.front + self.slots.len() as u64;
        if number >= self.end || self.slots.len() >= self.window {
            return None;
        }
        let lease = match &mut self.leases {
            Some(leases) => Some(leases.pop_front()?),
            None => None,
        };
        self.slots.push_back(None);
        Some((number, lease))
    }
}

/// What asking for the next item came to.
pub(crate) enum Taken<T> {
    Item(T),
    End,
    Pending,
}

/// How a pipeline runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) threads: usize,
    pub(crate) window: usize,
    /// Items to compute, numbered from 0.
    pub(crate) items: u64,
    /// Whether the caller provides a lease per item.
    pub(crate) leased: bool,
}

impl<T: Send + 'static> Pipeline<T> {
    /// Starts workers; each makes its own state with `begin` and computes items with it.
    pub(crate) fn start<S: 'static>(
        plan: Plan,
        begin: impl Fn() -> S + Send + Sync + 'static,
        compute: impl Fn(&mut S, u64, Option<Lease>) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            ring: Mutex::new(Ring {
                front: 0,
                slots: VecDeque::with_capacity(plan.window),
                end: plan.items,
                window: plan.window,
                leases: plan.leased.then(VecDeque::new),
                closed: false,
            }),
            work: Condvar::new(),
            ready: Condvar::new(),
        });
        let pipeline = Self { shared, workers: Mutex::default(), home: Home::here() };
        let job = Arc::new((begin, compute));
        for index in 0..plan.threads {
            let (shared, job) = (Arc::clone(&pipeline.shared), Arc::clone(&job));
            let worker = std::thread::Builder::new()
                .name(format!("forebay-{index}"))
                .spawn(move || work(&shared, job.0(), &job.1))
                .map_err(|error| Error::io(format!("cannot start worker thread {index} of {}", plan.threads), error))?;
            lock(&pipeline.workers).push(worker);
        }
        Ok(pipeline)
    }

    /// Gives the memory of the next item that has none yet.
    pub(crate) fn submit(&self, lease: Lease) {
        let mut ring = lock(&self.shared.ring);
        if let Some(leases) = &mut ring.leases {
            leases.push_back(lease);
        }
        drop(ring);
        self.shared.work.notify_one();
    }

    /// The next item in order; waits at most `timeout` for it. `delivered` runs before any other consumer can take the one after it.
    pub(crate) fn take(&self, timeout: Duration, delivered: impl FnOnce(&T)) -> Result<Taken<T>> {
        // Centuries overflow; a day at a time is as good as for ever.
        let deadline = Instant::now() + timeout.min(Duration::from_secs(86_400));
        let mut ring = lock(&self.shared.ring);
        loop {
            if ring.closed {
                return Err(Error::new(ErrorKind::Closed, "the loader was closed"));
            }
            if ring.front == ring.end {
                return Ok(Taken::End);
            }
            match ring.slots.front() {
                Some(Some(Err(error))) => return Err(error.clone()),
                Some(Some(Ok(_))) => {
                    let Some(Some(Ok(item))) = ring.slots.pop_front() else { unreachable!("looked at it just now") };
                    ring.front += 1;
                    delivered(&item);
                    let more = ring.front == ring.end || matches!(ring.slots.front(), Some(Some(_)));
                    drop(ring);
                    self.shared.work.notify_one();
                    if more {
                        // Another consumer may have slept through this item's successor becoming ready.
                        self.shared.ready.notify_all();
                    }
                    return Ok(Taken::Item(item));
                }
                Some(None) | None => {
                    let now = Instant::now();
                    if now >= deadline {
                        return Ok(Taken::Pending);
                    }
                    ring = wait_timeout(&self.shared.ready, ring, deadline - now);
                }
            }
        }
    }

    /// Items ready to be taken without waiting.
    pub(crate) fn depth(&self) -> usize {
        lock(&self.shared.ring).slots.iter().take_while(|slot| slot.is_some()).count()
    }

    /// Tells the workers to stop after what they are at; consumers fail from now on.
    pub(crate) fn close(&self) {
        if self.home.was_left() {
            return;
        }
        let mut ring = lock(&self.shared.ring);
        ring.closed = true;
        let dropped = (std::mem::take(&mut ring.slots), ring.leases.take());
        drop(ring);
        // Outside of the lock: dropping caller memory may run the caller's code.
        drop(dropped);
        self.shared.work.notify_all();
        self.shared.ready.notify_all();
    }

    /// Waits for the workers to end, after [`Pipeline::close`].
    pub(crate) fn join(&self) {
        if self.home.was_left() {
            return;
        }
        for worker in lock(&self.workers).drain(..) {
            // A worker catches its own panics; there is nothing left to report.
            let _ = worker.join();
        }
    }
}

impl<T> Drop for Pipeline<T> {
    fn drop(&mut self) {
        if self.home.was_left() {
            return;
        }
        let mut ring = lock(&self.shared.ring);
        ring.closed = true;
        drop(ring);
        self.shared.work.notify_all();
        self.shared.ready.notify_all();
    }
}

fn work<S, T>(shared: &Shared<T>, mut state: S, compute: &impl Fn(&mut S, u64, Option<Lease>) -> Result<T>) {
    loop {
        let mut ring = lock(&shared.ring);
        let (number, lease) = loop {
            if ring.closed {
                return;
            }
            match ring.take() {
                Some(taken) => break taken,
                None if ring.front + ring.slots.len() as u64 >= ring.end => return,
                None => ring = wait(&shared.work, ring),
            }
        };
        let last = number + 1 == ring.end;
        drop(ring);
        if last {
            // Nothing is left to begin: the others need not wait for it.
            shared.work.notify_all();
        }
        let result = catch_unwind(AssertUnwindSafe(|| compute(&mut state, number, lease))).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            Err(Error::new(ErrorKind::Internal, format!("a worker panicked: {text}; this is a defect of forebay")))
        });
        let mut ring = lock(&shared.ring);
        if ring.closed {
            drop(ring);
            // Its memory goes back here, outside of the lock.
            drop(result);
            return;
        }
        let slot = (number - ring.front) as usize;
        ring.slots[slot] = Some(result);
        drop(ring);
        if slot == 0 {
            shared.ready.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn numbers(threads: usize, window: usize, items: u64) -> Pipeline<u64> {
        let plan = Plan { threads, window, items, leased: false };
        Pipeline::start(plan, || (), |(), number, _| Ok(number)).unwrap()
    }

    #[test]
    fn items_come_in_order_for_any_number_of_threads() {
        for threads in [1, 2, 8] {
            let pipeline = numbers(threads, 3, 1000);
            for expected in 0..1000 {
                assert!(matches!(pipeline.take(LONG, |_| ()).unwrap(), Taken::Item(number) if number == expected));
            }
            assert!(matches!(pipeline.take(LONG, |_| ()).unwrap(), Taken::End));
            pipeline.join();
        }
    }

    #[test]
    fn many_consumers_share_the_items_and_all_see_the_end() {
        let pipeline = numbers(4, 8, 5000);
        let mut seen: Vec<u64> = std::thread::scope(|scope| {
            let consumers: Vec<_> = (0..6)
                .map(|_| {
                    scope.spawn(|| {
                        let mut mine = Vec::new();
                        while let Taken::Item(number) = pipeline.take(LONG, |_| ()).unwrap() {
                            mine.push(number);
                        }
                        mine
                    })
                })
                .collect();
            consumers.into_iter().flat_map(|consumer| consumer.join().unwrap()).collect()
        });
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..5000));
    }

    #[test]
    fn an_error_or_a_panic_stands_at_its_place_and_stays_there() {
        let plan = Plan { threads: 3, window: 4, items: 10, leased: false };
        let pipeline = Pipeline::start(
            plan,
            || (),
            |(), number, _| {
                if number == 5 {
                    panic!("five")
                }
                Ok(number)
            },
        )
        .unwrap();
        for _ in 0..5 {
            assert!(matches!(pipeline.take(LONG, |_| ()), Ok(Taken::Item(_))));
        }
        for _ in 0..2 {
            let error = pipeline.take(LONG, |_| ()).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Internal);
            assert!(error.to_string().contains("five"));
        }
    }

    #[test]
    fn closing_wakes_a_waiting_consumer_and_ends_the_workers() {
        let plan = Plan { threads: 2, window: 4, items: 10, leased: true };
        let pipeline = Pipeline::start(plan, || (), |(), number, _| Ok(number)).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pipeline.take(LONG, |_| ()).err().map(|error| error.kind()));
            std::thread::sleep(Duration::from_millis(20));
            pipeline.close();
            assert_eq!(waiting.join().unwrap(), Some(ErrorKind::Closed));
        });
        pipeline.join();
    }

    #[test]
    fn no_more_than_the_window_is_begun() {
        let pipeline = numbers(4, 3, 100);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(pipeline.depth(), 3);
        assert!(matches!(pipeline.take(Duration::ZERO, |_| ()).unwrap(), Taken::Item(0)));
    }
}
