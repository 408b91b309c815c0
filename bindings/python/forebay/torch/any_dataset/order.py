"""The order of a map-style dataset: where its indices come from."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

from forebay._errors import StateMismatchError
from forebay.torch.any_dataset.random_state import (
    from_text,
    own_random_state,
    process_state,
    set_process_state,
    to_text,
)

State = dict[str, Any]

_FIXED = (SequentialSampler, DistributedSampler)


def is_plain(value: object, kind: type, *methods: str) -> bool:
    """Whether `value` is of `kind` and does what `kind` does: a subclass may have changed it."""
    return isinstance(value, kind) and all(getattr(type(value), name) is getattr(kind, name) for name in methods)


def is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class Order:
    """Where the indices of a pass come from, and what it takes to draw the same ones again.

    `random` of a state is empty for what draws nothing; a seed; the state of a generator; or that of the process.
    """

    def __init__(self, loader: torch.utils.data.DataLoader[Any]) -> None:
        batch_sampler = loader.batch_sampler
        auto = batch_sampler is not None
        self.index_sampler: Any = batch_sampler if auto else loader.sampler
        plain = not auto or is_plain(batch_sampler, BatchSampler, "__iter__")
        self.sampler: Any = getattr(batch_sampler, "sampler", loader.sampler) if auto else loader.sampler
        stateful = [part for part in (self.index_sampler, self.sampler) if is_stateful(part)]
        self.stateful: Any = stateful[0] if stateful else None
        self.generator: torch.Generator | None = getattr(self.sampler, "generator", None)
        self._auto = auto
        fixed = isinstance(self.index_sampler, (list, tuple)) or (
            plain
            and (
                isinstance(self.sampler, (list, tuple, range))
                or any(is_plain(self.sampler, kind, "__iter__") for kind in _FIXED)
            )
        )
        if self.stateful is not None or fixed:
            self.kind = "fixed" if self.stateful is None else "state"
        elif plain and self.generator is None and is_plain(self.sampler, RandomSampler, "__iter__"):
            self.kind = "seed"
        elif self.generator is not None:
            self.kind = "generator"
        else:
            self.kind = "process"
        #: Whether its own code begins at the first index, and not where the iterator is made.
        self.late = inspect.isgeneratorfunction(getattr(type(self.index_sampler), "__iter__", None))

    def mark(self) -> list[Any]:
        """Random state from which the indices follow."""
        if self.kind == "seed":
            # What RandomSampler itself draws.
            return [int(torch.empty((), dtype=torch.int64).random_().item())]
        if self.kind == "generator":
            assert self.generator is not None
            return [to_text(self.generator.get_state())]
        return [process_state()] if self.kind == "process" else []

    def seeded(self, seed: int) -> Iterator[Any]:
        """Indices of a RandomSampler that drew this seed."""
        sampler = copy.copy(self.sampler)
        sampler.generator = torch.Generator().manual_seed(seed)
        if not self._auto:
            return iter(sampler)
        batch_sampler = copy.copy(self.index_sampler)
        batch_sampler.sampler = sampler
        return iter(batch_sampler)

    def again(self, marked: list[Any], skip: int | None) -> Iterator[Any]:
        """Indices after the first `skip`, or after all of them."""
        if self.kind == "seed":
            return self._skipped(self.seeded(marked[0]), skip)
        if self.kind == "process":
            with own_random_state():
                set_process_state(marked[0])
                return self._skipped(iter(self.index_sampler), skip)
        if self.kind == "generator":
            assert self.generator is not None
            self.generator.set_state(from_text(marked[0]))
        return self._skipped(iter(self.index_sampler), skip)

    def _skipped(self, indices: Iterator[Any], skip: int | None) -> Iterator[Any]:
        found = sum(1 for _ in itertools.islice(indices, skip))
        if skip is not None and found < skip:
            raise StateMismatchError(
                f"the state is {skip} batches into its epoch, but the sampler gives only {found}: it is another sampler"
            )
        return indices

    def epoch(self) -> int:
        """What the sampler was told, -1 if it was told nothing."""
        epoch = getattr(self._told(), "epoch", None)
        return epoch if isinstance(epoch, int) else -1

    def set_epoch(self, epoch: int) -> None:
        self._told().set_epoch(epoch)

    def _told(self) -> Any:
        return next((part for part in (self.index_sampler, self.sampler) if hasattr(part, "set_epoch")), None)


def restore_sampler(order: Order, restored: State) -> None:
    for state in restored["sampler"]:
        order.stateful.load_state_dict(copy.deepcopy(state))
