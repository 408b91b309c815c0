//! Keeps opened shards.
//!
//! The first thread that needs a shard opens it. Up to the limit of open shards, shards stay open,
//! and access takes no lock. Above the limit, shards that were not used lately are closed. A thread
//! that holds a shard keeps it until it lets go.

use std::collections::{HashMap, VecDeque};
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock};

use crate::error::Result;
use crate::sync::lock;

/// Number of shards that can be opened at the same time.
const OPENING: usize = 64;

/// The opened shards of a corpus.
#[derive(Debug)]
pub(crate) struct ShardCache<T> {
    places: Capacity<T>,
    /// The thread that opens a shard holds the lock with the shard's number modulo the length. No
    /// shard is opened twice.
    opening: [Mutex<()>; OPENING],
}

#[derive(Debug)]
enum Capacity<T> {
    /// All shards may be open.
    All(Vec<OnceLock<T>>),
    /// At most `most` shards may be open.
    Some { most: usize, recent: Mutex<Recent<T>> },
}

#[derive(Debug)]
struct Recent<T> {
    open: HashMap<usize, RecentShard<T>>,
    /// The open shards, in the order in which they are examined when room is needed.
    queue: VecDeque<usize>,
}

#[derive(Debug)]
struct RecentShard<T> {
    shard: Arc<T>,
    /// Whether the shard was used since it was last examined.
    used: bool,
}

/// An opened shard, which stays open while this value lives.
#[derive(Debug)]
pub enum Held<'a, T> {
    /// The shard stays open in any case.
    Kept(&'a T),
    /// The shard may be closed afterwards.
    Shared(Arc<T>),
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Kept(shard) => shard,
            Self::Shared(shard) => shard,
        }
    }
}

impl<T> ShardCache<T> {
    /// Makes room for `count` shards. At most `most` of them stay open.
    pub(crate) fn new(count: usize, most: usize) -> Self {
        let places = if count <= most {
            Capacity::All(std::iter::repeat_with(OnceLock::new).take(count).collect())
        } else {
            Capacity::Some {
                most: most.max(1),
                recent: Mutex::new(Recent { open: HashMap::new(), queue: VecDeque::new() }),
            }
        };
        Self { places, opening: std::array::from_fn(|_| Mutex::new(())) }
    }

    /// Returns shard `index`, if it is open.
    pub(crate) fn get(&self, index: usize) -> Option<Held<'_, T>> {
        match &self.places {
            Capacity::All(shards) => shards[index].get().map(Held::Kept),
            Capacity::Some { recent, .. } => {
                let mut recent = lock(recent);
                let entry = recent.open.get_mut(&index)?;
                entry.used = true;
                Some(Held::Shared(Arc::clone(&entry.shard)))
            }
        }
    }

    /// Returns shard `index`. Opens it by `open` if it is closed.
    ///
    /// An error is not kept: the next caller tries again.
    pub(crate) fn get_or_open(&self, index: usize, open: impl FnOnce() -> Result<T>) -> Result<Held<'_, T>> {
        if let Some(shard) = self.get(index) {
            return Ok(shard);
        }
        let _opening = lock(&self.opening[index % OPENING]);
        if let Some(shard) = self.get(index) {
            return Ok(shard);
        }
        let shard = open()?;
        Ok(match &self.places {
            Capacity::All(shards) => Held::Kept(shards[index].get_or_init(|| shard)),
            Capacity::Some { most, recent } => {
                let shard = Arc::new(shard);
                let closed = lock(recent).insert(index, Arc::clone(&shard), *most);
                // The drop happens outside of the lock, because unmapping a large file takes a
                // while.
                drop(closed);
                Held::Shared(shard)
            }
        })
    }
}

impl<T> Recent<T> {
    /// Adds a shard, and returns the shards that must be closed to make room.
    fn insert(&mut self, index: usize, shard: Arc<T>, most: usize) -> Vec<Arc<T>> {
        let mut closed = Vec::new();
        while self.open.len() >= most
            && let Some(oldest) = self.queue.pop_front()
        {
            match self.open.get_mut(&oldest) {
                Some(entry) if entry.used => {
                    entry.used = false;
                    self.queue.push_back(oldest);
                }
                _ => closed.extend(self.open.remove(&oldest).map(|entry| entry.shard)),
            }
        }
        self.open.insert(index, RecentShard { shard, used: false });
        self.queue.push_back(index);
        closed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::error::Error;

    #[test]
    fn no_more_are_open_than_may_be_and_the_unused_make_room() {
        let opened = ShardCache::new(10, 3);
        let open = |index: usize| *opened.get_or_open(index, || Ok(index)).unwrap();
        for index in [0, 1, 2] {
            assert_eq!(open(index), index);
        }
        assert_eq!(open(1), 1);
        assert_eq!(open(3), 3);
        let held = opened.get(1).expect("used lately");
        assert!(opened.get(0).is_none());
        for index in 4..10 {
            assert_eq!(open(index), index);
        }
        assert_eq!((0..10).filter(|index| opened.get(*index).is_some()).count(), 3);
        assert_eq!(*held, 1);
    }

    #[test]
    fn a_shard_wanted_by_many_is_opened_once_and_a_failure_is_not_kept() {
        for most in [5, 2] {
            let opened = ShardCache::new(5, most);
            assert!(opened.get_or_open(1, || Err::<usize, _>(Error::data("broken"))).is_err());
            let times = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        let open = || {
                            times.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(std::time::Duration::from_millis(20));
                            Ok(7)
                        };
                        assert_eq!(*opened.get_or_open(1, open).unwrap(), 7);
                    });
                }
            });
            assert_eq!(times.into_inner(), 1);
        }
    }
}
