"""Several consumers of one loader, each in a thread of its own.

The core deals out the rows and lets the consumers wait for each other. These classes turn that into
iterators. The module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from forebay import _core
from forebay._errors import ClosedError

Batch = TypeVar("Batch")
State = dict[str, Any]


class Whole(Protocol):
    """The loader that is split."""

    def __len__(self) -> int: ...


class Split(Generic[Batch]):
    """The state that the consumers share.

    `take` takes the next rows of a consumer's pass, and gives None at its end. `begins` runs before
    the first consumer begins a pass.
    """

    def __init__(
        self,
        whole: Whole,
        core: _core.SharedLoader,
        count: int,
        take: Callable[[_core.Parts], Batch | None],
        begins: Callable[[], None] = lambda: None,
    ) -> None:
        self.whole, self.core, self.take, self.begins = whole, core, take, begins
        self.consumers = [Consumer(self, index, count) for index in range(count)]

    def state(self) -> State:
        """Returns the position after the last batch that every consumer has."""
        return dict(self.core.state())

    def restored(self) -> None:
        """Tells the consumers that the loader has a new position.

        Every consumer continues there in its next pass.
        """
        self.core.restored()


class Consumer(Generic[Batch]):
    """The batches of one rank of a split loader. Each consumer belongs to one thread at a time."""

    def __init__(self, split: Split[Batch], index: int, count: int) -> None:
        self._split, self.index, self.count = split, index, count
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        """Makes a new pass, together with the other consumers.

        It begins at its first ``next()``.
        """
        return _Part(self)

    def __len__(self) -> int:
        return len(self._split.whole)

    def set_epoch(self, epoch: int) -> None:
        """Lets the next pass begin `epoch`.

        It is enough that the first consumer to begin is told. Consumers that are told must be told
        the same epoch.
        """
        self._split.core.set_epoch(self.index, epoch)

    def state_dict(self) -> State:
        """Returns the position after the last batch that every consumer has.

        It is the state of the loader.
        """
        return self._split.state()

    def close(self) -> None:
        """Ends this consumer. The others go on without it."""
        self._closed = True
        self._split.core.close(self.index)

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
        self._core = consumer._split.core.iter(consumer.index)
        self._begun = False

    def __len__(self) -> int:
        return len(self._consumer)

    def __next__(self) -> Batch:
        split = self._consumer._split
        if not self._begun:
            if self._consumer._closed:
                raise ClosedError("the consumer was closed")
            if split.core.begins_pass(self._consumer.index):
                split.begins()
            self._begun = True
        batch = split.take(self._core)
        if batch is None:
            raise StopIteration
        return batch

    def close(self) -> None:
        """Ends this consumer's part in the pass. The others no longer wait for it."""
        self._core.close()
