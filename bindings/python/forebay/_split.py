"""Several consumers of one loader: each gets every n-th row of its batches. Free of torch.

The consumers share the threads, the mapping and the windows of one pass. A batch stays until all of them took their
rows; who is `ahead` batches before the slowest one waits for it. So no consumer is starved, and none costs more memory
than that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from forebay._errors import ClosedError, ConfigError

Batch = TypeVar("Batch")
Taken = TypeVar("Taken", covariant=True)
State = dict[str, Any]


class Source(Protocol[Taken]):
    """A pass of the loader that is split."""

    def take(self, limit_s: float | None) -> Taken | None:
        """The next batch, None at the end. Raises TimeoutError, which loses no batch."""

    def close(self) -> None:
        """Ends the pass and its threads."""


class Whole(Protocol[Batch]):
    """The loader that is split."""

    def begin(self) -> Source[Batch]:
        """A new pass."""

    def cut(self, batch: Batch, consumer: int, count: int) -> Batch:
        """Rows `consumer`, `consumer + count` and so on, in memory that no other consumer sees."""

    def steps(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...
    def epoch(self) -> int: ...
    def state(self) -> State: ...


class _Pass(Generic[Batch]):
    """One pass, as all consumers see it. Guarded by the condition of its `Split`."""

    def __init__(self, number: int, source: Source[Batch], told: int | None) -> None:
        self.number, self.source = number, source
        #: The epoch that its first consumer was told, or that its batches turned out to be of.
        self.epoch = told
        #: Batches taken from the source that not all consumers have, by their place in the pass.
        self.batches: dict[int, Batch] = {}
        self.taken = 0
        self.is_taking = False
        self.ended = False


class Split(Generic[Batch]):
    """What the consumers share. Everything is guarded by `changed`, but for waiting for a batch."""

    def __init__(self, whole: Whole[Batch], count: int, ahead: int, limit_s: float | None) -> None:
        self.whole, self.ahead, self.limit_s = whole, ahead, limit_s
        self.changed = threading.Condition()
        self._passes: dict[int, _Pass[Batch]] = {}
        self._states: dict[tuple[int, int], State] = {}
        self.consumers = [Consumer(self, index, count) for index in range(count)]

    def join(self, consumer: Consumer[Batch]) -> _Pass[Batch]:
        number = consumer._next_pass
        told, consumer._told = consumer._told, None
        while (found := self._passes.get(number)) is not None and found.is_taking and found.taken == 0:
            self.changed.wait()  # its epoch is being settled
        if found is None:
            if told is not None:
                self.whole.set_epoch(told)
            found = self._passes[number] = _Pass(number, self.whole.begin(), told)
            self._states[number, 0] = self.whole.state()
        elif told is not None and told != found.epoch and found.taken == 0 and found.epoch is None:
            self.whole.set_epoch(told)
            found.epoch = told
        elif told is not None and found.epoch not in (None, told):
            raise RuntimeError(
                f"consumer {consumer.index} was told epoch {told}, but the others are in their pass of epoch "
                f"{found.epoch}: tell all of them the same"
            )
        consumer._next_pass = number + 1
        consumer._at = number, 0
        self._let_go()
        return found

    def next(self, consumer: Consumer[Batch], current: _Pass[Batch], at: int) -> Batch | None:
        """Batch `at` of the pass, None at the end."""
        deadline = None if self.limit_s is None else time.monotonic() + self.limit_s
        with self.changed:
            while at not in current.batches:
                if consumer._closed:
                    raise ClosedError("the consumer was closed")
                if current.ended and at >= current.taken:
                    return None
                if self._passes.get(current.number) is not current:
                    raise ClosedError("this pass ended when another position was restored: begin a new one")
                behind = min(other.place_in(current.number) for other in self.consumers)
                if not current.is_taking and at - behind < self.ahead:
                    self._take(current)
                    continue
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    slow = [other.index for other in self.consumers if other.place_in(current.number) == behind]
                    raise RuntimeError(
                        f"DataLoader timed out after {self.limit_s} seconds: consumer {slow[0]} is {at - behind} "
                        f"batches behind consumer {consumer.index}"
                    )
                self.changed.wait(left)
            batch = current.batches[at]
            if current.number == consumer._at[0]:
                consumer._at = current.number, at + 1
            self._let_go()
            self.changed.notify_all()
        return batch

    def _take(self, current: _Pass[Batch]) -> None:
        """Takes the next batch from the source; other consumers may go on meanwhile."""
        current.is_taking = True
        self.changed.release()
        batch, state = None, None
        try:
            batch = current.source.take(self.limit_s)
            state = self.whole.state()
        except TimeoutError:
            raise RuntimeError(f"DataLoader timed out after {self.limit_s} seconds") from None
        finally:
            self.changed.acquire()
            current.is_taking = False
            self.changed.notify_all()
        if batch is None:
            current.ended = True
            return
        current.batches[current.taken] = batch
        current.taken += 1
        current.epoch = self.whole.epoch() if current.taken == 1 else current.epoch
        self._states[current.number, current.taken] = state

    def _let_go(self) -> None:
        """Forgets what all consumers are past."""
        for current in list(self._passes.values()):
            slowest = min(other.place_in(current.number) for other in self.consumers)
            for at in [at for at in current.batches if at < slowest]:
                del current.batches[at]
            if slowest == _PAST and not current.is_taking:
                del self._passes[current.number]
                current.source.close()
        slowest_at = self._slowest()
        for at_pass in [at for at in self._states if slowest_at is not None and at < slowest_at]:
            del self._states[at_pass]

    def _slowest(self) -> tuple[int, int] | None:
        return min((consumer._at for consumer in self.consumers if not consumer._closed), default=None)

    def state(self) -> State:
        """The position after the last batch that every consumer has."""
        with self.changed:
            slowest = self._slowest()
            found = None if slowest is None else self._states.get(slowest)
            return dict(self.whole.state() if found is None else found)

    def restored(self) -> None:
        """The loader was given another position: every consumer continues there in its next pass."""
        with self.changed:
            number = max([consumer._next_pass for consumer in self.consumers])
            for consumer in self.consumers:
                consumer._next_pass, consumer._at = number, (number, 0)
            self._states.clear()
            self._let_go()
            self.changed.notify_all()


#: The place of a consumer in a pass that it will take nothing more of.
_PAST = 2**63


class Consumer(Generic[Batch]):
    """The batches of one rank of a split loader. Each consumer belongs to one thread at a time."""

    def __init__(self, split: Split[Batch], index: int, count: int) -> None:
        self._split, self.index, self.count = split, index, count
        self._next_pass = 0
        self._at = 0, 0
        self._told: int | None = None
        self._closed = False
        self._left: set[int] = set()

    def place_in(self, number: int) -> int:
        if self._closed or number in self._left or self._at[0] > number:
            return _PAST
        return self._at[1] if self._at[0] == number else 0

    def __iter__(self) -> Iterator[Batch]:
        """A new pass, together with the other consumers; it begins at its first ``next()``."""
        return _Part(self)

    def __len__(self) -> int:
        return self._split.whole.steps()

    def set_epoch(self, epoch: int) -> None:
        """The next pass is of this epoch. All consumers are told the same, or only the first to begin."""
        self._told = epoch

    def state_dict(self) -> State:
        """That of the loader: the position after the last batch that every consumer has."""
        return self._split.state()

    def close(self) -> None:
        """The others go on without this one."""
        with self._split.changed:
            self._closed = True
            self._split._let_go()
            self._split.changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Part(Iterator[Batch]):
    """A pass of one consumer."""

    def __init__(self, consumer: Consumer[Batch]) -> None:
        self._consumer = consumer
        self._pass: _Pass[Batch] | None = None
        self._taken = 0
        self._ended = False

    def __len__(self) -> int:
        return len(self._consumer)

    def __next__(self) -> Batch:
        if self._ended:
            raise StopIteration
        consumer = self._consumer
        split = consumer._split
        if self._pass is None:
            with split.changed:
                if consumer._closed:
                    raise ClosedError("the consumer was closed")
                self._pass = split.join(consumer)
        batch = split.next(consumer, self._pass, self._taken)
        if batch is None:
            self.close()
            raise StopIteration
        self._taken += 1
        return split.whole.cut(batch, consumer.index, consumer.count)

    def close(self) -> None:
        """Takes no more of this pass: the others need not wait."""
        if self._pass is None or self._ended:
            self._ended = True
            return
        self._ended = True
        with self._consumer._split.changed:
            self._consumer._left.add(self._pass.number)
            self._consumer._split._let_go()
            self._consumer._split.changed.notify_all()

    def __del__(self) -> None:
        if getattr(self, "_pass", None) is not None:
            self.close()


def check(count: int, ahead: int | None, config: dict[str, Any]) -> int:
    """How many batches a consumer may be ahead. Raises ConfigError where rows cannot be dealt out evenly."""
    if count < 1:
        raise ConfigError(f"a loader is split for 1 consumer or more, found {count}")
    if config["batch_size"] % count:
        raise ConfigError(f"`batch_size` must be a multiple of the {count} consumers, found {config['batch_size']}")
    if config["remainder"] == "short" and count > 1:
        raise ConfigError(
            "a short last batch cannot be dealt out evenly: set `drop_last=True`, or `remainder` to drop, pad or wrap"
        )
    found: int = config["prefetch_batches"] if ahead is None else ahead
    if found < 1:
        raise ConfigError(f"`ahead` must be 1 or more, found {found}")
    return found
