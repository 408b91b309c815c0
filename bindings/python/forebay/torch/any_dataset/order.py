"""The order of a map-style dataset: the source of its indices, and ways to draw them again.

The module also finds the objects that must be told the epoch.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
from array import array
from collections.abc import Iterator
from typing import Any

import torch.distributed
import torch.utils.data
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from forebay._errors import StateMismatchError
from forebay.torch.any_dataset.random_state import (
    OwnRandomState,
    derived_seed,
    from_text,
    process_state,
    seeded_process_state,
    seeding,
    set_process_state,
    to_text,
)

State = dict[str, Any]

_FIXED = (SequentialSampler, DistributedSampler)
#: Seeds of earlier epochs that a state keeps, beside the first one.
_SEEDS_KEPT = 1000


def is_plain(value: object, kind: type, *methods: str) -> bool:
    """Tells whether `value` is of `kind` and behaves like it. A subclass may have changed it."""
    return isinstance(value, kind) and all(getattr(type(value), name) is getattr(kind, name) for name in methods)


def is_stateful(value: object) -> bool:
    """Tells whether `value` has ``state_dict()`` and ``load_state_dict(state)``.

    Methods with further arguments do not count.
    """
    return _takes(value, "state_dict") and _takes(value, "load_state_dict", {})


def _takes(value: object, name: str, *arguments: object) -> bool:
    method = getattr(value, name, None)
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        pass  # a method in C may have no signature
    return True


class Order:
    """The source of a pass's indices, with the data for drawing the same ones again.

    `kind` names the origin of the order: nothing (``"fixed"``), a sampler's own state, a seed that
    the pass draws, the state of a generator, or the random state of the process.
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
        #: The digest of the indices that were skipped last.
        self.passed = ""
        #: Whether the sampler's code begins at the first index, not when the iterator is made.
        self.late = inspect.isgeneratorfunction(getattr(type(self.index_sampler), "__iter__", None))

    def mark(self) -> list[Any]:
        """Returns the random state from which the indices follow."""
        if self.kind == "seed":
            # RandomSampler draws its seed with the same calls.
            return [int(torch.empty((), dtype=torch.int64).random_().item())]
        if self.kind == "generator":
            assert self.generator is not None
            return [to_text(self.generator.get_state())]
        return [process_state()] if self.kind == "process" else []

    def unused(self, marked: list[Any], used: list[Any]) -> list[Any]:
        """Returns `marked`, or a state derived from it if an epoch of `used` began with it.

        A script that seeds the process at its start gives every restart the random state of the
        first epoch.
        """
        if self.kind not in ("seed", "process") or not used or self.seed_of(marked) not in used:
            return marked
        seed = derived_seed([used[-1], len(used)])
        return [seed] if self.kind == "seed" else [seeded_process_state(seed)]

    def seed_of(self, marked: list[Any]) -> int:
        seed: int = marked[0] if self.kind == "seed" else derived_seed(marked)
        return seed

    def with_seed(self, marked: list[Any], used: list[Any]) -> list[Any]:
        """Returns `used` and the seed of an epoch that begins with `marked`."""
        if self.kind not in ("seed", "process"):
            return []
        return [*used[:1], *used[1:][-_SEEDS_KEPT:], self.seed_of(marked)]

    def seeded(self, seed: int) -> Iterator[Any]:
        """Returns the indices of a RandomSampler that drew this seed."""
        sampler = copy.copy(self.sampler)
        sampler.generator = torch.Generator().manual_seed(seed)
        if not self._auto:
            return iter(sampler)
        batch_sampler = copy.copy(self.index_sampler)
        batch_sampler.sampler = sampler
        return iter(batch_sampler)

    def rank(self) -> int:
        """Returns the rank of the sampler, or else of this process. 0 without ranks."""
        for part in (self.index_sampler, self.sampler):
            for name in ("rank", "process_index"):
                found = getattr(part, name, None)
                if isinstance(found, int):
                    return found
        dist = torch.distributed
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def again(self, marked: list[Any], skip: int | None, digest: str | None = None) -> Iterator[Any]:
        """Returns the indices after the first `skip`, or after all of them.

        The skipped indices must have this `digest`, if it is given.
        """
        if self.kind == "seed":
            return self._skipped(self.seeded(marked[0]), skip, digest)
        if self.kind == "process":
            with seeding, OwnRandomState():
                set_process_state(marked[0])
                return _begun(self._skipped(iter(self.index_sampler), skip, digest))
        if self.kind == "generator":
            assert self.generator is not None
            self.generator.set_state(from_text(marked[0]))
        return _begun(self._skipped(iter(self.index_sampler), skip, digest))

    def _skipped(self, indices: Iterator[Any], skip: int | None, digest: str | None) -> Iterator[Any]:
        found, passed = 0, ""
        for index in itertools.islice(nexts(indices), skip):
            found += 1
            passed = chained(passed, index) if skip is not None else ""
        if skip is not None and found < skip:
            raise StateMismatchError(
                f"the state is {skip} batches into its epoch, but the sampler gives only {found}: it is another sampler"
            )
        if digest is not None and passed != digest:
            raise StateMismatchError(
                f"the sampler draws other indices for the {skip} batches that were handed over: their digest is "
                f"{passed} here, but {digest} in the state. Its order follows from something that the state does not "
                "hold: give it `state_dict` and `load_state_dict`, or draw from a torch.Generator in its attribute "
                "`generator`"
            )
        self.passed = passed
        return indices

    def restore_sampler(self, states: list[Any]) -> None:
        for state in states:
            self.stateful.load_state_dict(copy.deepcopy(state))


def nexts(iterator: Iterator[Any]) -> Iterator[Any]:
    """Gives the items of `iterator` by `next()` alone.

    Some iterators begin again at a second `iter()`.
    """
    return map(next, itertools.repeat(iterator))


def _begun(indices: Iterator[Any]) -> Iterator[Any]:
    """Draws the first of `indices` now, because a generator draws its order there."""
    rest = nexts(indices)
    return itertools.chain(list(itertools.islice(rest, 1)), rest)


def chained(digest: str, index: Any) -> str:
    """Returns the digest of the indices up to and including `index`."""
    found = hashlib.blake2b(digest.encode(), digest_size=8)
    try:
        found.update(array("q", index if isinstance(index, (list, tuple)) else [index]).tobytes())
    except (TypeError, ValueError, OverflowError):
        found.update(_spelled(index).encode(errors="surrogatepass"))
    return found.hexdigest()


def _spelled(index: Any) -> str:
    """Converts `index` to a text that is the same in every process."""
    if isinstance(index, (list, tuple)):
        return f"[{','.join(map(_spelled, index))}]"
    if hasattr(index, "tolist"):
        return _spelled(index.tolist())
    text = repr(index)
    return type(index).__name__ if " at 0x" in text else text


# Epochs.


def told_of_epochs(loader: torch.utils.data.DataLoader[Any]) -> list[Any]:
    """Finds every sampler and dataset of `loader` with `set_epoch`, also inside of others.

    An object with the method tells the objects inside it, so that the search ends there.
    """
    found: list[Any] = []
    seen: set[int] = set()

    def visit(part: Any, inside: tuple[type, ...], depth: int) -> None:
        if part is None or id(part) in seen or depth > 16:
            return
        seen.add(id(part))
        if callable(getattr(part, "set_epoch", None)):
            found.append(part)
            return
        for value in list(getattr(part, "__dict__", {}).values()):
            for item in value if isinstance(value, (list, tuple)) and len(value) <= 1000 else (value,):
                if isinstance(item, inside) or (Sampler in inside and _is_sampler(item)):
                    visit(item, inside, depth + 1)

    visit(loader.batch_sampler, (Sampler,), 0)
    visit(loader.sampler, (Sampler,), 0)
    visit(loader.dataset, (Dataset,), 0)
    return found


def _is_sampler(value: Any) -> bool:
    kind = type(value)
    names = ("set_epoch", "sampler", "batch_sampler")
    return not isinstance(value, Dataset) and hasattr(kind, "__iter__") and any(hasattr(value, name) for name in names)


def epochs_of(parts: list[Any], told: int) -> list[int]:
    """Returns the epoch of each part. `told` stands for a part that does not give its epoch."""
    epochs = [getattr(part, "epoch", None) for part in parts]
    return [epoch if isinstance(epoch, int) else told for epoch in epochs]


class InEpochs:
    """Puts the samplers of `loader` into the epochs of a pass during a ``with`` block."""

    def __init__(self, loader: torch.utils.data.DataLoader[Any], epochs: list[int]) -> None:
        parts = [part for part in zip(told_of_epochs(loader), epochs, strict=True) if part[0] is not loader.dataset]
        now = epochs_of([part for part, _ in parts], -1)
        self._changes = [(*part, told) for part, told in zip(parts, now, strict=True) if -1 not in (part[1], told)]

    def __enter__(self) -> None:
        for part, epoch, _ in self._changes:
            part.set_epoch(epoch)

    def __exit__(self, *error: object) -> None:
        for part, _, told in self._changes:
            part.set_epoch(told)
