//! Pipeline: the only threads of a loader.
//!
//! Items have numbers. A thread takes the next number, computes the item alone, and puts it into
//! the item's slot. Consumers receive the items in the order of their numbers. At most `window`
//! items are begun or ready at once, which bounds memory.
//!
//! A consumer whose item is not ready computes an item itself if that is quicker than sleeping.
//! Every other wait blocks; no thread spins, and only threads that wait are woken. Dropping the
//! pipeline tells the workers to stop and does not wait for them, so that it can happen at
//! interpreter exit.
//!
//! A failed item stays at the front. Every later call fails the same way, and no later item is
//! delivered.

pub(crate) mod affinity;

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::buffer::Lease;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{ForkGuard, lock, wait, wait_timeout};

/// Longest time of an item that a waiting consumer computes itself while a worker computes the item
/// that it waits for. Sleeping and waking costs some tens of microseconds.
const QUICK: Duration = Duration::from_micros(250);

/// Value of [`Ring::starved`] from which on the workers do not keep up with the consumers. Below
/// it, one late batch would only become later if the consumer computed another one.
const STARVED: u32 = 12;

/// The computation that a pipeline performs.
pub(crate) trait Work: Send + Sync + 'static {
    /// Memory of one thread.
    type State: Send;
    type Item: Send + fmt::Debug;

    /// Makes the memory of worker `worker`, or of a consumer if that is `None`.
    fn begin(&self, worker: Option<usize>) -> Self::State;

    /// Computes item `number`. Writes it to `lease` if the caller provided that memory.
    fn compute(&self, state: &mut Self::State, number: u64, lease: Option<Lease>) -> Result<Self::Item>;

    /// Notes that the worker waited for an item to begin, from `began` to `ended`.
    fn waited(&self, state: &mut Self::State, began: Instant, ended: Instant) {
        let _ = (state, began, ended);
    }

    /// Does useful work for the items from `next` on while no worker may begin them. Returns
    /// whether there was any work.
    fn prepare(&self, state: &mut Self::State, next: u64) -> bool {
        let _ = (state, next);
        false
    }
}

/// Numbered items that threads compute side by side and consumers take in order.
pub(crate) struct Pipeline<W: Work> {
    shared: Arc<Shared<W>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    home: ForkGuard,
}

impl<W: Work> fmt::Debug for Pipeline<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipeline").field("ring", &self.shared.ring).finish_non_exhaustive()
    }
}

struct Shared<W: Work> {
    work: W,
    ring: Mutex<Ring<W::Item>>,
    /// Workers wait here for a number to take.
    room: Condvar,
    /// Consumers wait here for the front slot.
    ready: Condvar,
    /// Memory of consumers that computed items themselves.
    states: Mutex<Vec<W::State>>,
}

#[derive(Debug)]
struct Ring<T> {
    /// Number of the front slot.
    front: u64,
    /// One slot for each number that was taken and not delivered. A slot is `None` while its item
    /// is computed.
    slots: VecDeque<Option<Result<T>>>,
    /// The last number plus one.
    end: u64,
    window: usize,
    threads: usize,
    /// Output memory of the caller, one buffer for each next number. `None` if the pipeline takes
    /// memory itself.
    leases: Option<VecDeque<Lease>>,
    closed: bool,
    /// Workers that wait for room.
    idle: usize,
    /// Consumers that wait for the front slot.
    waiting: usize,
    /// Smoothed time that recent items took.
    typical: Duration,
    /// Measures how often the front slot was not ready lately. Rises by two for each request that
    /// found it missing, and falls by one for each other request.
    starved: u32,
}

impl<T> Ring<T> {
    /// The next number that no thread has begun.
    fn next(&self) -> u64 {
        self.front + self.slots.len() as u64
    }

    /// Takes the next number and its buffer, if the number can be begun.
    fn take(&mut self) -> Option<(u64, Option<Lease>)> {
        if !self.may_begin() {
            return None;
        }
        let number = self.next();
        self.slots.push_back(None);
        Some((number, self.leases.as_mut().and_then(VecDeque::pop_front)))
    }

    /// Tells whether [`Ring::take`] would give a number.
    fn may_begin(&self) -> bool {
        let has_memory = self.leases.as_ref().is_none_or(|leases| !leases.is_empty());
        self.next() < self.end && self.slots.len() < self.window && has_memory
    }

    /// Tells whether to wake an idle worker. Not every free slot is a reason: the consumer pays for
    /// the wake, most of all if the worker's processor sleeps too. Quick items may run lower.
    fn wants_worker(&self) -> bool {
        let low = if self.typical < QUICK { (self.window + 2) / 4 } else { self.window / 2 };
        self.idle > 0 && self.slots.len() <= low && self.may_begin()
    }

    /// Records whether the front slot was ready for a request.
    fn asked(&mut self, ready: bool) {
        self.starved = if ready { self.starved.saturating_sub(1) } else { (self.starved + 2).min(2 * STARVED) };
    }

    /// Tells whether a consumer gains by computing an item itself: it would sleep for about as
    /// long, or workers cannot keep up anyway.
    fn wants_consumer(&self, may_help: bool) -> bool {
        let gains = || self.slots.is_empty() || self.typical < QUICK || self.starved >= STARVED;
        self.threads == 0 || may_help && gains()
    }
}

/// The outcome of a request for the next item.
pub(crate) enum Taken<T> {
    /// The item, and the number of items that were ready at the request, including this one.
    Item(T, usize),
    End,
    Pending,
}

/// What a consumer does while its item is not ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitPolicy {
    /// It returns at once.
    None,
    /// It sleeps for at most this time. A pipeline without workers lets it compute the item all the
    /// same.
    Wait(Duration),
    /// It computes items if that is quicker, and sleeps otherwise. May take longer by the time of
    /// one item.
    Help(Duration),
}

/// The settings of a pipeline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PipelineOptions {
    /// Number of workers. With 0, consumers compute all items.
    pub(crate) threads: usize,
    pub(crate) window: usize,
    /// Number of items to compute. They are numbered from 0.
    pub(crate) items: u64,
    /// Whether the caller provides a lease for each item.
    pub(crate) leased: bool,
}

impl<W: Work> Pipeline<W> {
    /// Starts the workers.
    pub(crate) fn start(options: PipelineOptions, work: W) -> Result<Self> {
        let ring = Ring {
            front: 0,
            slots: VecDeque::with_capacity(options.window),
            end: options.items,
            window: options.window,
            threads: options.threads,
            leases: options.leased.then(VecDeque::new),
            closed: false,
            idle: 0,
            waiting: 0,
            typical: Duration::ZERO,
            starved: 0,
        };
        let shared = Arc::new(Shared {
            work,
            ring: Mutex::new(ring),
            room: Condvar::new(),
            ready: Condvar::new(),
            states: Mutex::default(),
        });
        let pipeline = Self { shared, workers: Mutex::default(), home: ForkGuard::new() };
        for index in 0..options.threads {
            let shared = Arc::clone(&pipeline.shared);
            let worker =
                std::thread::Builder::new().name(format!("forebay-{index}")).spawn(move || shared.run(index)).map_err(
                    |error| Error::io(format!("cannot start worker thread {index} of {}", options.threads), error),
                )?;
            lock(&pipeline.workers).push(worker);
        }
        Ok(pipeline)
    }

    /// Gives memory to the next item that has none yet.
    pub(crate) fn submit(&self, lease: Lease) {
        let mut ring = lock(&self.shared.ring);
        if let Some(leases) = &mut ring.leases {
            leases.push_back(lease);
        }
        self.shared.wake_worker(ring);
    }

    /// Takes the next item in order. `delivered` runs before another consumer can take the item
    /// after it.
    pub(crate) fn take(&self, patience: WaitPolicy, delivered: impl FnOnce(&W::Item)) -> Result<Taken<W::Item>> {
        let shared = &*self.shared;
        let mut deadline = None;
        let mut ring = lock(&shared.ring);
        let depth = ring.slots.iter().take_while(|slot| slot.is_some()).count();
        // A consumer that does not wait now comes back at once to wait.
        if depth > 0 || patience != WaitPolicy::None {
            ring.asked(depth > 0);
        }
        loop {
            if ring.closed {
                return Err(Error::new(ErrorKind::Closed, "the loader was closed"));
            }
            if ring.front == ring.end {
                return Ok(Taken::End);
            }
            match ring.slots.front() {
                Some(Some(Err(error))) => {
                    let error = error.clone();
                    shared.ready.notify_all();
                    return Err(error);
                }
                Some(Some(Ok(_))) => {
                    let Some(Some(Ok(item))) = ring.slots.pop_front() else { unreachable!("looked at it just now") };
                    ring.front += 1;
                    delivered(&item);
                    let ended = ring.front == ring.end;
                    if ring.waiting > 0 && (ended || matches!(ring.slots.front(), Some(Some(_)))) {
                        // Another consumer may have slept while the item after this one became
                        // ready.
                        shared.ready.notify_all();
                    }
                    shared.wake_worker(ring);
                    return Ok(Taken::Item(item, depth));
                }
                Some(None) | None => {
                    let timeout = match patience {
                        WaitPolicy::None => return Ok(Taken::Pending),
                        WaitPolicy::Wait(timeout) | WaitPolicy::Help(timeout) => timeout,
                    };
                    if ring.wants_consumer(matches!(patience, WaitPolicy::Help(_)))
                        && let Some((number, lease)) = ring.take()
                    {
                        shared.begun(ring, number);
                        let state = lock(&shared.states).pop();
                        let mut state = state.unwrap_or_else(|| shared.work.begin(None));
                        ring = shared.perform(&mut state, number, lease);
                        lock(&shared.states).push(state);
                        continue;
                    }
                    // A timeout of centuries would overflow. One day at a time serves as well as no
                    // limit.
                    let deadline =
                        *deadline.get_or_insert_with(|| Instant::now() + timeout.min(Duration::from_secs(86_400)));
                    let now = Instant::now();
                    if now >= deadline {
                        return Ok(Taken::Pending);
                    }
                    ring.waiting += 1;
                    ring = wait_timeout(&shared.ready, ring, deadline - now);
                    ring.waiting -= 1;
                }
            }
        }
    }

    /// Tells the workers to stop after their present items. Consumers fail from now on.
    pub(crate) fn close(&self) {
        if self.home.is_forked_child() {
            return;
        }
        self.shared.close();
    }

    /// Waits for the workers to end. Call [`Pipeline::close`] first.
    pub(crate) fn join(&self) {
        if self.home.is_forked_child() {
            return;
        }
        for worker in lock(&self.workers).drain(..) {
            // A worker catches its own panics, so no failure is left to report.
            let _ = worker.join();
        }
    }
}

impl<W: Work> Drop for Pipeline<W> {
    fn drop(&mut self) {
        if self.home.is_forked_child() {
            return;
        }
        self.shared.close();
    }
}

impl<T> Ring<T> {
    /// Puts a result into its slot. Returns the result if no consumer will take it.
    fn put(&mut self, number: u64, result: Result<T>, took: Duration) -> Option<Result<T>> {
        if self.closed {
            return Some(result);
        }
        self.typical = if self.typical.is_zero() { took } else { (self.typical * 7 + took) / 8 };
        let slot = (number - self.front) as usize;
        self.slots[slot] = Some(result);
        None
    }
}

impl<W: Work> Shared<W> {
    /// Unlocks the ring, and wakes a worker that has something to begin.
    fn wake_worker(&self, ring: MutexGuard<'_, Ring<W::Item>>) {
        let wakes = ring.wants_worker();
        drop(ring);
        if wakes {
            self.room.notify_one();
        }
    }

    fn close(&self) {
        let mut ring = lock(&self.ring);
        ring.closed = true;
        let dropped = (std::mem::take(&mut ring.slots), ring.leases.take());
        drop(ring);
        // Drop outside of the lock, because dropping caller memory may run the caller's code.
        drop(dropped);
        self.room.notify_all();
        self.ready.notify_all();
    }

    /// Unlocks the ring after `number` was taken.
    fn begun(&self, ring: MutexGuard<'_, Ring<W::Item>>, number: u64) {
        if number + 1 < ring.end {
            return self.wake_worker(ring);
        }
        drop(ring);
        // No item is left to begin, so no worker needs to wait for one.
        self.room.notify_all();
    }

    /// Computes items until none are left or the pipeline is closed.
    fn run(&self, worker: usize) {
        let mut state = self.work.begin(Some(worker));
        let mut ring = lock(&self.ring);
        loop {
            let mut waited = None;
            let (number, lease) = loop {
                if ring.closed {
                    return;
                }
                if let Some(taken) = ring.take() {
                    break taken;
                }
                let next = ring.next();
                if next >= ring.end {
                    return;
                }
                drop(ring);
                let prepared = catch_unwind(AssertUnwindSafe(|| self.work.prepare(&mut state, next)));
                ring = lock(&self.ring);
                // Work that fails ahead of its time fails again at its item, which reports it.
                // Meanwhile another worker may have begun the last item. After that no thread wakes
                // a worker that begins to wait.
                let more = !ring.closed && ring.next() < ring.end;
                if !prepared.unwrap_or(false) && more && !ring.may_begin() {
                    ring.idle += 1;
                    let began = Instant::now();
                    ring = wait(&self.room, ring);
                    waited = Some((waited.map_or(began, |(earlier, _)| earlier), Instant::now()));
                    ring.idle -= 1;
                }
            };
            self.begun(ring, number);
            if let Some((began, ended)) = waited {
                self.work.waited(&mut state, began, ended);
            }
            ring = self.perform(&mut state, number, lease);
        }
    }

    /// Computes an item and puts it into its slot, if the slot still exists.
    fn perform(&self, state: &mut W::State, number: u64, lease: Option<Lease>) -> MutexGuard<'_, Ring<W::Item>> {
        let (result, took) = self.compute(state, number, lease);
        let mut ring = lock(&self.ring);
        if let Some(left) = ring.put(number, result, took) {
            drop(ring);
            // Return its memory here, outside of the lock.
            drop(left);
            return lock(&self.ring);
        }
        if number == ring.front && ring.waiting > 0 {
            self.ready.notify_all();
        }
        ring
    }

    fn compute(&self, state: &mut W::State, number: u64, lease: Option<Lease>) -> (Result<W::Item>, Duration) {
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| self.work.compute(state, number, lease)));
        let result = result.unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            Err(Error::new(ErrorKind::Internal, format!("a worker panicked: {text}; this is a defect of forebay")))
        });
        (result, began.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: WaitPolicy = WaitPolicy::Wait(Duration::from_secs(60));
    const HELP: WaitPolicy = WaitPolicy::Help(Duration::from_secs(60));

    /// Computes each item from its number with a function.
    struct By<F>(F);

    impl<F: Fn(u64) -> Result<u64> + Send + Sync + 'static> Work for By<F> {
        type State = ();
        type Item = u64;

        fn begin(&self, _: Option<usize>) {}

        fn compute(&self, (): &mut (), number: u64, _: Option<Lease>) -> Result<u64> {
            self.0(number)
        }
    }

    fn pipeline<F>(threads: usize, window: usize, items: u64, of: F) -> Pipeline<By<F>>
    where
        F: Fn(u64) -> Result<u64> + Send + Sync + 'static,
    {
        Pipeline::start(PipelineOptions { threads, window, items, leased: false }, By(of)).unwrap()
    }

    #[test]
    fn items_come_in_order_for_any_number_of_threads_and_helping_or_not() {
        for threads in [0, 1, 2, 8] {
            for patience in [LONG, HELP] {
                let pipeline = pipeline(threads, 3, 1000, Ok);
                for expected in 0..1000 {
                    let taken = pipeline.take(patience, |_| ()).unwrap();
                    assert!(matches!(taken, Taken::Item(number, _) if number == expected));
                }
                assert!(matches!(pipeline.take(patience, |_| ()).unwrap(), Taken::End));
                pipeline.join();
            }
        }
    }

    #[test]
    fn many_consumers_share_the_items_and_all_see_the_end() {
        for (threads, patience) in [(4, LONG), (4, HELP), (0, LONG), (1, HELP)] {
            let pipeline = pipeline(threads, 8, 5000, Ok);
            let mut seen: Vec<u64> = std::thread::scope(|scope| {
                let consumers: Vec<_> = (0..6)
                    .map(|_| {
                        scope.spawn(|| {
                            let mut mine = Vec::new();
                            while let Taken::Item(number, _) = pipeline.take(patience, |_| ()).unwrap() {
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
    }

    #[test]
    fn an_error_or_a_panic_stands_at_its_place_and_stays_there() {
        for (threads, patience) in [(3, LONG), (3, HELP), (0, LONG)] {
            let five = |number| if number == 5 { panic!("five") } else { Ok(number) };
            let pipeline = pipeline(threads, 4, 10, five);
            for _ in 0..5 {
                assert!(matches!(pipeline.take(patience, |_| ()), Ok(Taken::Item(..))));
            }
            for _ in 0..2 {
                let error = pipeline.take(patience, |_| ()).err().unwrap();
                assert_eq!(error.kind(), ErrorKind::Internal);
                assert!(error.to_string().contains("five"));
            }
        }
    }

    #[test]
    fn closing_wakes_a_waiting_consumer_and_ends_the_workers() {
        let options = PipelineOptions { threads: 2, window: 4, items: 10, leased: true };
        let pipeline = Pipeline::start(options, By(Ok)).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pipeline.take(HELP, |_| ()).err().map(|error| error.kind()));
            std::thread::sleep(Duration::from_millis(20));
            pipeline.close();
            assert_eq!(waiting.join().unwrap(), Some(ErrorKind::Closed));
        });
        pipeline.join();
    }

    #[test]
    fn a_consumer_that_helps_sees_a_loader_closed_meanwhile() {
        let entered = Arc::new((Mutex::new(false), Condvar::new()));
        let inside = Arc::clone(&entered);
        let slow = move |number| {
            *lock(&inside.0) = true;
            inside.1.notify_all();
            std::thread::sleep(Duration::from_millis(50));
            Ok(number)
        };
        let pipeline = pipeline(0, 4, 10, slow);
        std::thread::scope(|scope| {
            let helping = scope.spawn(|| pipeline.take(HELP, |_| ()).err().map(|error| error.kind()));
            let mut begun = lock(&entered.0);
            while !*begun {
                begun = wait(&entered.1, begun);
            }
            pipeline.close();
            assert_eq!(helping.join().unwrap(), Some(ErrorKind::Closed));
        });
    }

    #[test]
    fn no_more_than_the_window_is_begun() {
        let pipeline = pipeline(4, 3, 100, Ok);
        std::thread::sleep(Duration::from_millis(50));
        assert!(matches!(pipeline.take(WaitPolicy::None, |_| ()).unwrap(), Taken::Item(0, 3)));
    }

    #[test]
    fn workers_prepare_what_comes_while_the_window_is_full() {
        struct Prepared(Mutex<Vec<u64>>);
        impl Work for Prepared {
            type State = ();
            type Item = u64;

            fn begin(&self, _: Option<usize>) {}

            fn compute(&self, (): &mut (), number: u64, _: Option<Lease>) -> Result<u64> {
                Ok(number)
            }

            fn prepare(&self, (): &mut (), next: u64) -> bool {
                let mut all = lock(&self.0);
                let first = all.last() != Some(&next);
                all.push(next);
                first
            }
        }
        let options = PipelineOptions { threads: 1, window: 2, items: 9, leased: false };
        let pipeline = Pipeline::start(options, Prepared(Mutex::default())).unwrap();
        for number in 0..9 {
            let began = Instant::now();
            let is_prepared = |next| next == 9 || lock(&pipeline.shared.work.0).contains(&next);
            while !is_prepared((number + 2).min(9)) {
                assert!(began.elapsed() < Duration::from_secs(60), "nothing was prepared before item {number}");
                std::thread::yield_now();
            }
            assert!(matches!(pipeline.take(LONG, |_| ()).unwrap(), Taken::Item(..)));
        }
        let prepared = lock(&pipeline.shared.work.0);
        assert!(prepared.is_sorted(), "{prepared:?}");
    }
}
