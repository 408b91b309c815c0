//! Decides which decoded block is evicted to make room for the next one.
//!
//! Takes keys, bytes, the tokens that are read, and the global positions up to which sessions need
//! a block. Holds no block, does no IO, and knows no clock but its own count of uses. The block
//! cache follows its decisions, and `plan` simulates them.
//!
//! Blocks are evicted in this order of classes:
//!
//! 1. Blocks that the epoch has *finished*, the last used first. A block is finished when two
//!    windows' worth of its source's tokens have been read since its last use. The remaining blocks
//!    are still there in the next epoch.
//! 2. Other idle blocks, the least recently used first. A block is *idle* if no session needs it.
//! 3. Blocks that a session needs. The block that is needed last goes first.
//!
//! Every step takes a constant number of list operations, or one per source or session, for any
//! number of blocks. The idle blocks of a source are in one list, in the order of their last use.
//! The finished blocks are at its front and end at `done`. The blocks that a session needs are in a
//! list of the session, by position.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::RangeInclusive;

/// Stands for no entry or no need.
const NONE: u32 = u32::MAX;

/// Most steps along a list before the next best choice is taken.
const MOST_STEPS: u32 = 64;

/// The slot of a key. It is valid until its block is evicted or removed.
pub(crate) type Slot = u32;

/// A session whose needs count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SessionId(u32);

/// Chooses the blocks to evict, by keys, bytes and needs.
#[derive(Debug)]
pub(crate) struct EvictionPolicy<K> {
    slots: HashMap<K, Slot>,
    entries: Vec<CachedBlock<K>>,
    free_slots: Vec<Slot>,
    needs: Vec<Need>,
    free_needs: Vec<u32>,
    sources: Vec<IdleBlocks>,
    sessions: Vec<Option<SessionNeeds>>,
    used_bytes: u64,
    /// Bytes of the idle blocks.
    idle_bytes: u64,
    /// Number of uses so far.
    clock: u64,
    /// Number of tokens of a source after which a block is finished: the sum over the sessions that
    /// count.
    done_after: Option<u64>,
}

#[derive(Debug)]
struct CachedBlock<K> {
    key: K,
    source: u32,
    bytes: u64,
    /// Whether the block is being decoded, so that it cannot be evicted.
    is_loading: bool,
    /// The clock at its last use, or when the last need for it ended.
    used_at: u64,
    /// Number of tokens of its source that had been read by then.
    read: u64,
    /// The first of its needs.
    need: u32,
    /// Neighbours in its source's list, while it is idle.
    before: Slot,
    after: Slot,
}

/// The need of a session for a block.
#[derive(Clone, Copy, Debug)]
struct Need {
    session: u32,
    slot: Slot,
    /// The position after the last global position that is known to need the block.
    until: u64,
    /// Neighbours in the session's list.
    before: u32,
    after: u32,
    /// The next need for the same block.
    next: u32,
}

/// The idle blocks of a source, the least recently used first.
#[derive(Debug)]
struct IdleBlocks {
    read: u64,
    first: Slot,
    last: Slot,
    /// The last finished block from the front.
    done: Slot,
}

/// The blocks that a session needs, by position.
#[derive(Debug)]
struct SessionNeeds {
    /// The session has finished everything before this global position.
    current: u64,
    /// Number of positions that it may lag behind the first session.
    window: u64,
    /// Number of tokens of a source that it reads while its rows go through two windows.
    done_after: Option<u64>,
    counts: bool,
    /// Whether a block that it needs was evicted.
    lost: bool,
    first: u32,
    last: u32,
}

/// An evicted block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Evicted<K> {
    pub(crate) key: K,
    pub(crate) slot: Slot,
    pub(crate) bytes: u64,
}

impl<K: Copy + Eq + Hash> EvictionPolicy<K> {
    pub(crate) fn new() -> Self {
        Self {
            slots: HashMap::new(),
            entries: Vec::new(),
            free_slots: Vec::new(),
            needs: Vec::new(),
            free_needs: Vec::new(),
            sources: Vec::new(),
            sessions: Vec::new(),
            used_bytes: 0,
            idle_bytes: 0,
            clock: 0,
            done_after: None,
        }
    }

    /// Bytes of all blocks.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Whether evicting only idle blocks gives room for a block of `bytes` bytes in `budget_bytes`.
    /// Reused memory may be a quarter larger than its block.
    pub(crate) fn has_idle_room(&self, bytes: u64, budget_bytes: u64) -> bool {
        self.used_bytes + budget_bytes.min(bytes + bytes / 4) <= budget_bytes + self.idle_bytes
    }

    /// Finds a block without using it.
    pub(crate) fn find(&self, key: K) -> Option<Slot> {
        self.slots.get(&key).copied()
    }

    /// Notes that `tokens` tokens of block `key` of `source` are read, and finds the block.
    pub(crate) fn read(&mut self, key: K, source: usize, tokens: u64) -> Option<Slot> {
        self.clock += 1;
        self.source(source).read += tokens;
        let slot = self.find(key)?;
        let entry = &mut self.entries[slot as usize];
        entry.used_at = self.clock;
        entry.read = self.sources[source].read;
        if !entry.is_loading && entry.need == NONE {
            self.unlink(slot);
            self.link_last(slot);
        }
        Some(slot)
    }

    /// Adds a block that is being decoded. It cannot be evicted before [`EvictionPolicy::loaded`].
    pub(crate) fn insert(&mut self, key: K, source: usize, bytes: u64) -> Slot {
        let read = self.source(source).read;
        let entry = CachedBlock {
            key,
            source: source as u32,
            bytes,
            is_loading: true,
            used_at: self.clock,
            read,
            need: NONE,
            before: NONE,
            after: NONE,
        };
        let slot = match self.free_slots.pop() {
            Some(slot) => {
                self.entries[slot as usize] = entry;
                slot
            }
            None => {
                self.entries.push(entry);
                self.entries.len() as Slot - 1
            }
        };
        self.slots.insert(key, slot);
        self.used_bytes += bytes;
        slot
    }

    /// Notes that a block is decoded.
    pub(crate) fn loaded(&mut self, slot: Slot) {
        self.entries[slot as usize].is_loading = false;
        self.idle_if_unneeded(slot);
    }

    /// Removes a block whose decoding failed.
    pub(crate) fn remove(&mut self, slot: Slot) {
        let entry = &self.entries[slot as usize];
        let (key, bytes, is_idle) = (entry.key, entry.bytes, !entry.is_loading && entry.need == NONE);
        if is_idle {
            self.unlink(slot);
            self.idle_bytes -= bytes;
        }
        while self.entries[slot as usize].need != NONE {
            self.end_need(self.entries[slot as usize].need);
        }
        self.slots.remove(&key);
        self.used_bytes -= bytes;
        self.free_slots.push(slot);
    }

    /// Chooses a block to evict and removes it. Prefers a finished block of `suiting` bytes to
    /// other finished blocks.
    pub(crate) fn evict(&mut self, suiting: &RangeInclusive<u64>) -> Option<Evicted<K>> {
        let slot = self.done_with(suiting).or_else(|| self.least_recent()).or_else(|| self.needed_last())?;
        let CachedBlock { key, bytes, need, .. } = self.entries[slot as usize];
        let mut need = need;
        while need != NONE {
            let Need { session, next, .. } = self.needs[need as usize];
            self.session(session).lost = true;
            need = next;
        }
        self.remove(slot);
        Some(Evicted { key, slot, bytes })
    }

    /// The finished block that was used last, or a suiting one if there is one near.
    fn done_with(&mut self, suiting: &RangeInclusive<u64>) -> Option<Slot> {
        // The clock at its last use, and the slot.
        let mut best: Option<(u64, Slot)> = None;
        let mut best_suiting: Option<(u64, Slot)> = None;
        for source in 0..self.sources.len() {
            self.move_done(source);
            let mut slot = self.sources[source].done;
            if slot != NONE {
                best = best.max(Some((self.entries[slot as usize].used_at, slot)));
            }
            for _ in 0..MOST_STEPS {
                if slot == NONE {
                    break;
                }
                let entry = &self.entries[slot as usize];
                if suiting.contains(&entry.bytes) {
                    best_suiting = best_suiting.max(Some((entry.used_at, slot)));
                    break;
                }
                slot = entry.before;
            }
        }
        best_suiting.or(best).map(|(_, slot)| slot)
    }

    /// The idle block that was used least recently.
    fn least_recent(&self) -> Option<Slot> {
        let firsts = self.sources.iter().map(|source| match source.done {
            NONE => source.first,
            done => self.entries[done as usize].after,
        });
        firsts.filter(|slot| *slot != NONE).min_by_key(|slot| self.entries[*slot as usize].used_at)
    }

    /// The block that is needed last by any session.
    fn needed_last(&self) -> Option<Slot> {
        let last = |session: &SessionNeeds| {
            let mut need = session.last;
            while need != NONE {
                let Need { slot, until, before, .. } = self.needs[need as usize];
                if !self.entries[slot as usize].is_loading {
                    return Some((until, slot));
                }
                need = before;
            }
            None
        };
        self.sessions.iter().flatten().filter_map(last).max().map(|(_, slot)| slot)
    }

    /// Adds a session. Its needs may lag `window` positions behind the first session.
    pub(crate) fn join(&mut self, window: u64) -> SessionId {
        let session =
            SessionNeeds { current: 0, window, done_after: None, counts: true, lost: false, first: NONE, last: NONE };
        let free = self.sessions.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.sessions.push(None);
            self.sessions.len() - 1
        });
        self.sessions[index] = Some(session);
        SessionId(index as u32)
    }

    /// Ends a session and its needs.
    pub(crate) fn leave(&mut self, session: SessionId) {
        self.end_needs(session.0, u64::MAX);
        self.sessions[session.0 as usize] = None;
        self.recount();
    }

    /// Begins a pass of a session at a global position.
    ///
    /// `done_after` is the number of tokens of a source that the session reads while its rows go
    /// through two windows. Needs after the position stay, so that a pass finds the blocks that the
    /// previous pass decoded for it.
    pub(crate) fn begin(&mut self, session: SessionId, at: u64, done_after: u64) {
        let SessionNeeds { current, done_after: known, .. } = self.session(session.0);
        let is_behind = at < *current;
        (*current, *known) = (at, Some(done_after));
        self.end_needs(session.0, if is_behind { u64::MAX } else { at });
        self.recount();
    }

    /// Notes that a session has finished everything before a global position. Returns whether a
    /// block that it needed was evicted since the last call.
    pub(crate) fn reached(&mut self, session: SessionId, at: u64) -> bool {
        let SessionNeeds { current, lost, .. } = self.session(session.0);
        let lost = std::mem::take(lost);
        if at > *current {
            *current = at;
            self.end_needs(session.0, at);
            self.recount();
        }
        lost
    }

    /// Notes that a session needs a block at a global position. A session that lags does not count.
    pub(crate) fn need(&mut self, session: SessionId, slot: Slot, at: u64) {
        let until = at + 1;
        let index = session.0;
        if !self.session(index).counts {
            return;
        }
        let mut need = self.entries[slot as usize].need;
        while need != NONE && self.needs[need as usize].session != index {
            need = self.needs[need as usize].next;
        }
        if need == NONE {
            let entry = &mut self.entries[slot as usize];
            let first = entry.need;
            if first == NONE && !entry.is_loading {
                self.idle_bytes -= entry.bytes;
                self.unlink(slot);
            }
            let made = Need { session: index, slot, until, before: NONE, after: NONE, next: first };
            need = match self.free_needs.pop() {
                Some(free) => {
                    self.needs[free as usize] = made;
                    free
                }
                None => {
                    self.needs.push(made);
                    self.needs.len() as u32 - 1
                }
            };
            self.entries[slot as usize].need = need;
        } else {
            if until <= self.needs[need as usize].until {
                return;
            }
            if self.session(index).last == need {
                self.needs[need as usize].until = until;
                return;
            }
            self.unlink_need(need);
            self.needs[need as usize].until = until;
        }
        self.link_need(need);
    }

    fn session(&mut self, index: u32) -> &mut SessionNeeds {
        self.sessions[index as usize].as_mut().expect("a session is used until it leaves")
    }

    fn source(&mut self, index: usize) -> &mut IdleBlocks {
        while self.sources.len() <= index {
            self.sources.push(IdleBlocks { read: 0, first: NONE, last: NONE, done: NONE });
        }
        &mut self.sources[index]
    }

    /// Finds the sessions that count, and the number of tokens after which a block is finished.
    fn recount(&mut self) {
        let begun = |session: &SessionNeeds| session.done_after.map(|_| session.current);
        let front = self.sessions.iter().flatten().filter_map(begun).max().unwrap_or(0);
        let mut done_after = None;
        for index in 0..self.sessions.len() {
            let Some(session) = &mut self.sessions[index] else { continue };
            let counted = session.counts;
            session.counts = session.current.saturating_add(session.window) >= front;
            if session.counts {
                done_after = [done_after, session.done_after].into_iter().flatten().reduce(u64::saturating_add);
            } else if counted {
                self.end_needs(index as u32, u64::MAX);
            }
        }
        self.done_after = done_after;
    }

    /// Ends the needs of a session before a global position.
    fn end_needs(&mut self, session: u32, before: u64) {
        loop {
            let need = self.session(session).first;
            if need == NONE || self.needs[need as usize].until > before {
                return;
            }
            let slot = self.needs[need as usize].slot;
            self.end_need(need);
            self.idle_if_unneeded(slot);
        }
    }

    fn end_need(&mut self, need: u32) {
        self.unlink_need(need);
        let Need { slot, next, .. } = self.needs[need as usize];
        let mut at = self.entries[slot as usize].need;
        if at == need {
            self.entries[slot as usize].need = next;
        } else {
            while self.needs[at as usize].next != need {
                at = self.needs[at as usize].next;
            }
            self.needs[at as usize].next = next;
        }
        self.free_needs.push(need);
    }

    /// Puts a need into its session's list.
    ///
    /// Needs are noted nearly in order, so the search begins at the end. A need whose place is far
    /// from the end is treated as if it lasted longer.
    fn link_need(&mut self, need: u32) {
        let Need { session, until, .. } = self.needs[need as usize];
        let last = self.session(session).last;
        let mut before = last;
        for _ in 0..MOST_STEPS {
            if before == NONE || self.needs[before as usize].until <= until {
                break;
            }
            before = self.needs[before as usize].before;
        }
        if before != NONE {
            let least = self.needs[before as usize].until;
            self.needs[need as usize].until = until.max(least);
        }
        let after = if before == NONE { self.session(session).first } else { self.needs[before as usize].after };
        (self.needs[need as usize].before, self.needs[need as usize].after) = (before, after);
        match before {
            NONE => self.session(session).first = need,
            before => self.needs[before as usize].after = need,
        }
        match after {
            NONE => self.session(session).last = need,
            after => self.needs[after as usize].before = need,
        }
    }

    fn unlink_need(&mut self, need: u32) {
        let Need { session, before, after, .. } = self.needs[need as usize];
        match before {
            NONE => self.session(session).first = after,
            before => self.needs[before as usize].after = after,
        }
        match after {
            NONE => self.session(session).last = before,
            after => self.needs[after as usize].before = before,
        }
    }

    /// Counts a decoded block without needs as used now, and lets it be evicted.
    fn idle_if_unneeded(&mut self, slot: Slot) {
        let entry = &mut self.entries[slot as usize];
        if entry.is_loading || entry.need != NONE {
            return;
        }
        self.clock += 1;
        entry.used_at = self.clock;
        entry.read = self.sources[entry.source as usize].read;
        self.idle_bytes += entry.bytes;
        self.link_last(slot);
    }

    /// Puts a block at the end of its source's list.
    fn link_last(&mut self, slot: Slot) {
        let entry = &mut self.entries[slot as usize];
        let source = &mut self.sources[entry.source as usize];
        let last = std::mem::replace(&mut source.last, slot);
        (entry.before, entry.after) = (last, NONE);
        match last {
            NONE => source.first = slot,
            last => self.entries[last as usize].after = slot,
        }
    }

    fn unlink(&mut self, slot: Slot) {
        let CachedBlock { source, before, after, .. } = self.entries[slot as usize];
        let source = &mut self.sources[source as usize];
        if source.done == slot {
            source.done = before;
        }
        match before {
            NONE => source.first = after,
            before => self.entries[before as usize].after = after,
        }
        match after {
            NONE => source.last = before,
            after => self.entries[after as usize].before = before,
        }
    }

    /// Moves the border of the finished blocks to its present place.
    fn move_done(&mut self, source: usize) {
        let IdleBlocks { read, first, mut done, .. } = self.sources[source];
        let Some(done_after) = self.done_after else {
            self.sources[source].done = NONE;
            return;
        };
        let is_done = |slot: Slot| read > self.entries[slot as usize].read.saturating_add(done_after);
        while done != NONE && !is_done(done) {
            done = self.entries[done as usize].before;
        }
        loop {
            let next = if done == NONE { first } else { self.entries[done as usize].after };
            if next == NONE || !is_done(next) {
                break;
            }
            done = next;
        }
        self.sources[source].done = done;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    /// The same rule, by a scan of all blocks.
    #[derive(Debug, Default)]
    struct Scanning {
        blocks: HashMap<u64, Scanned>,
        read: HashMap<usize, u64>,
        clock: u64,
        current: u64,
        done_after: u64,
    }

    #[derive(Clone, Copy, Debug)]
    struct Scanned {
        source: usize,
        bytes: u64,
        used_at: u64,
        read: u64,
        until: u64,
    }

    impl Scanning {
        fn used(&mut self, key: u64) {
            self.clock += 1;
            let block = self.blocks.get_mut(&key).unwrap();
            (block.used_at, block.read) = (self.clock, self.read[&block.source]);
        }

        fn read(&mut self, key: u64, source: usize, tokens: u64) -> bool {
            *self.read.entry(source).or_default() += tokens;
            let found = self.blocks.contains_key(&key);
            if found {
                self.used(key);
            }
            found
        }

        fn reached(&mut self, at: u64) {
            let mut ended: Vec<(u64, u64)> = self
                .blocks
                .iter()
                .filter(|(_, block)| block.until > self.current && block.until <= at)
                .map(|(key, block)| (block.until, *key))
                .collect();
            ended.sort_unstable();
            self.current = at.max(self.current);
            for (_, key) in ended {
                self.used(key);
            }
        }

        fn idle_bytes(&self) -> u64 {
            self.blocks.values().filter(|block| block.until <= self.current).map(|block| block.bytes).sum()
        }

        fn evict(&mut self, suiting: &RangeInclusive<u64>) -> Option<u64> {
            let rank = |block: &Scanned| {
                if block.until > self.current {
                    return (2, u64::MAX - block.until, 0);
                }
                match self.read[&block.source] > block.read + self.done_after {
                    true => (0, u64::from(!suiting.contains(&block.bytes)), u64::MAX - block.used_at),
                    false => (1, 0, block.used_at),
                }
            };
            let (key, _) = self.blocks.iter().min_by_key(|(_, block)| rank(block))?;
            let key = *key;
            self.blocks.remove(&key);
            Some(key)
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Read { key: u64, tokens: u64 },
        Need { key: u64, ahead: u64 },
        Reach { by: u64 },
        Evict { bytes: u64 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0u64..40, 1u64..9).prop_map(|(key, tokens)| Step::Read { key, tokens }),
            4 => (0u64..40, 0u64..9).prop_map(|(key, ahead)| Step::Need { key, ahead }),
            1 => (0u64..6).prop_map(|by| Step::Reach { by }),
            2 => (1u64..30).prop_map(|bytes| Step::Evict { bytes }),
        ];
        prop::collection::vec(step, 1..400)
    }

    proptest! {
        #[test]
        fn lists_choose_what_a_scan_of_all_blocks_would(steps in steps(), done_after in 1u64..80) {
            let mut policy = EvictionPolicy::new();
            let mut scanning = Scanning { done_after, ..Scanning::default() };
            let session = policy.join(1 << 20);
            policy.begin(session, 0, done_after);
            // Positions of needs differ and only grow, so that no two blocks are needed equally
            // long.
            let mut noted = 0;
            for step in steps {
                match step {
                    Step::Read { key, tokens } => {
                        let source = (key % 3) as usize;
                        let found = scanning.read(key, source, tokens);
                        prop_assert_eq!(policy.read(key, source, tokens).is_some(), found);
                        if !found {
                            let bytes = 1 + key % 7;
                            let slot = policy.insert(key, source, bytes);
                            policy.loaded(slot);
                            let scanned = Scanned { source, bytes, used_at: 0, read: 0, until: 0 };
                            scanning.blocks.insert(key, scanned);
                            scanning.used(key);
                        }
                    }
                    Step::Need { key, ahead } => {
                        let Some(slot) = policy.find(key) else { continue };
                        noted = (noted + 1).max(scanning.current + ahead);
                        policy.need(session, slot, noted);
                        scanning.blocks.get_mut(&key).unwrap().until = noted + 1;
                    }
                    Step::Reach { by } => {
                        let at = scanning.current + by;
                        policy.reached(session, at);
                        scanning.reached(at);
                    }
                    Step::Evict { bytes } => {
                        let suiting = bytes..=bytes + 2;
                        let found = policy.evict(&suiting).map(|evicted| evicted.key);
                        prop_assert_eq!(found, scanning.evict(&suiting));
                    }
                }
                prop_assert_eq!(policy.idle_bytes, scanning.idle_bytes());
                let used: u64 = scanning.blocks.values().map(|block| block.bytes).sum();
                prop_assert_eq!(policy.used_bytes(), used);
            }
        }
    }

    fn filled(policy: &mut EvictionPolicy<u64>, keys: std::ops::Range<u64>) -> Vec<Slot> {
        let fill = |key| {
            policy.read(key, 0, 1);
            let slot = policy.insert(key, 0, 10);
            policy.loaded(slot);
            slot
        };
        keys.map(fill).collect()
    }

    #[test]
    fn a_session_that_stops_does_not_keep_its_blocks_from_making_room() {
        let mut policy = EvictionPolicy::new();
        let [stopped, going] = [100, 100].map(|window| policy.join(window));
        policy.begin(stopped, 0, 1000);
        policy.begin(going, 0, 1000);
        let slots = filled(&mut policy, 0..4);
        policy.need(stopped, slots[0], 20);
        policy.need(going, slots[1], 90);
        policy.need(stopped, slots[2], 60);
        policy.need(going, slots[2], 90);
        assert_eq!(policy.idle_bytes, 10);

        policy.reached(going, 50);
        assert_eq!(policy.idle_bytes, 10, "a session within a window keeps its blocks");
        policy.reached(going, 101);
        assert_eq!(policy.idle_bytes, 40, "past a window it does not, and the other one is done with its own");
        policy.need(stopped, slots[3], 30);
        assert_eq!(policy.idle_bytes, 40, "nor does it keep further ones");

        policy.reached(stopped, 40);
        policy.need(stopped, slots[3], 45);
        assert_eq!(policy.idle_bytes, 30, "once it catches up, it counts again");
        policy.leave(stopped);
        assert_eq!(policy.idle_bytes, 40);
    }

    #[test]
    fn a_block_that_two_sessions_need_is_kept_until_both_are_done() {
        let mut policy = EvictionPolicy::new();
        let [first, second] = [100, 100].map(|window| policy.join(window));
        policy.begin(first, 0, 1000);
        policy.begin(second, 0, 1000);
        let slots = filled(&mut policy, 0..2);
        policy.need(first, slots[0], 10);
        policy.need(second, slots[0], 30);
        policy.need(first, slots[1], 20);
        assert!(!policy.reached(first, 25));
        assert_eq!(policy.idle_bytes, 10, "the second session still needs block 0");
        assert_eq!(policy.evict(&(10..=12)).unwrap().key, 1);
        assert_eq!(policy.evict(&(10..=12)).unwrap().key, 0);
        assert!(policy.reached(second, 26) && !policy.reached(first, 26), "only the second one lost a block");
    }

    /// Prints the time of a load among a million blocks. Run it with `--ignored --nocapture`.
    #[test]
    #[ignore = "a timing"]
    fn time_of_a_load_among_a_million_blocks() {
        const BLOCKS: u64 = 1 << 20;
        let mut policy = EvictionPolicy::new();
        let session = policy.join(u64::MAX);
        policy.begin(session, 0, BLOCKS / 2);
        let mut scanning = Scanning { done_after: BLOCKS / 2, ..Scanning::default() };
        for key in 0..BLOCKS {
            policy.read(key, 0, 1);
            let slot = policy.insert(key, 0, 64 << 10);
            policy.loaded(slot);
            policy.need(session, slot, key);
            scanning.read(key, 0, 1);
            scanning
                .blocks
                .insert(key, Scanned { source: 0, bytes: 64 << 10, used_at: key, read: key, until: key + 1 });
        }
        policy.reached(session, BLOCKS / 4);
        scanning.current = BLOCKS / 4;
        let suiting = 64 << 10..=80 << 10;

        let began = Instant::now();
        for key in BLOCKS..2 * BLOCKS {
            policy.read(key, 0, 1);
            assert!(policy.has_idle_room(64 << 10, BLOCKS * (64 << 10)) || key > BLOCKS);
            policy.evict(&suiting).unwrap();
            let slot = policy.insert(key, 0, 64 << 10);
            policy.loaded(slot);
            policy.need(session, slot, key);
            policy.reached(session, key - 3 * BLOCKS / 4);
        }
        let lists = began.elapsed().as_nanos() / u128::from(BLOCKS);
        let began = Instant::now();
        const SCANS: u32 = 20;
        for _ in 0..SCANS {
            scanning.idle_bytes();
            scanning.evict(&suiting).unwrap();
        }
        println!("a load among {BLOCKS} blocks: {lists} ns by lists, {:?} by scanning", began.elapsed() / SCANS);
    }
}
