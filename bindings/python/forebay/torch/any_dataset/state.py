"""Positions in a pass, and states, the form in which a user stores a position."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch.utils.data
from torch.utils.data import _DatasetKind

from forebay._errors import StateMismatchError
from forebay.torch.any_dataset.order import Order, State, epochs_of, is_stateful, told_of_epochs

_VERSION = 2


class Failed:
    """An error of a `state_dict` of the user's, kept until a user asks for the state."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def state_of(owner: Any) -> Any:
    """Returns a copy of the state of `owner`, or the error that it raised.

    A pass must not fail because its position cannot be stored.
    """
    try:
        return copy.deepcopy(owner.state_dict())
    except Exception as error:
        return Failed(error)


class Change:
    """A step of a position. It is undone if the batch did not reach the consumer."""

    def __init__(self, position: Position, after: State) -> None:
        self._position, self._before, self._after = position, position.state, after

    def apply(self) -> None:
        self._position.state = self._after

    def undo(self) -> None:
        if self._position.state is self._after:
            self._position.state = self._before


class Position:
    """The batches that a pass has handed over.

    The pass writes it, and any thread reads it. It holds no threads. `state` is replaced and never
    changed, so that readers need no lock.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        #: Gives entries of the state that are not kept, because only a user who asks needs them.
        self.asked: Callable[[], State] = dict
        #: Digest and sampler state after each batch that was drawn and not handed over in order.
        self._drawn: dict[int, tuple[str, list[Any]]] = {}

    def drew(self, number: int, digest: str, sampler_state: list[Any]) -> None:
        self._drawn[number] = digest, sampler_state

    def digest_before(self, number: int) -> str:
        """Returns the digest of the batches before `number`, which is the next batch to draw."""
        if number - 1 in self._drawn:
            return self._drawn[number - 1][0]
        digest: str = self.state["digest"]
        return digest

    def sampler_before(self, number: int) -> list[Any]:
        """Returns the sampler's state after the batches before `number`. Empty if none is known."""
        if number - 1 in self._drawn:
            return self._drawn[number - 1][1]
        states: list[Any] = self.state["sampler"]
        return states

    def handed(self, number: int, whole: int | None, dataset_state: list[Any] | None) -> Change:
        """Notes that batch `number` of the epoch is handed over.

        `whole` is the number of batches.
        """
        state = dict(self.state)
        ahead = {*state["ahead"], number}
        while state["batches"] in ahead:
            done = state["batches"]
            ahead.remove(done)
            state["batches"] = done + 1
            state["digest"], state["sampler"] = self._drawn.get(done, (state["digest"], state["sampler"]))
            self._drawn.pop(done - 16, None)
        if dataset_state is not None:
            state["dataset"] = dataset_state
        state["ahead"] = sorted(ahead)
        state["finished"] = int(state["batches"] == whole)
        return Change(self, state)

    def handed_by(self, worker: int, items: int, dataset_state: Any, ended: list[int]) -> Change:
        """Notes that a batch of this worker's own data is handed over. It has then read `items`."""
        state = dict(self.state)
        state["batches"] += 1
        for name, value in (("counts", state["counts"][worker] + 1), ("items", items), ("datasets", dataset_state)):
            state[name] = [*state[name][:worker], value, *state[name][worker + 1 :]]
        state["ended"] = ended
        return Change(self, state)

    def finish(self) -> None:
        self.state = {**self.state, "finished": 1}

    def snapshot(self) -> State:
        """Returns the state for a user.

        It shares no object with the pass, a dataset or a sampler.
        """
        return _shown({**self.state, **self.asked()})


def _shown(state: State) -> State:
    kept = [worker for worker in state["datasets"] if worker is not None]
    of_workers = [found for worker in kept for found in (*worker["dataset"], *worker["iterator"])]
    for found in (*state["sampler"], *state["dataset"], *of_workers):
        if isinstance(found, Failed):
            raise found.error
    return copy.deepcopy(state)


def size_of(dataset: Any) -> int:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return -1


def first_state(loader: torch.utils.data.DataLoader[Any], told: int = -1) -> State:
    """Returns the position before the first batch.

    Every state has these keys. Entries whose number could change are lists.
    """
    iterable = loader._dataset_kind == _DatasetKind.Iterable
    streams = max(loader.num_workers, 1) if iterable else 0
    return {
        "version": _VERSION,
        "kind": "iterable" if iterable else "map",
        "samples": -1 if iterable else size_of(loader.dataset),
        "batch_size": loader.batch_size or 0,
        "workers": loader.num_workers,
        "batches": 0,
        "ahead": [],
        "finished": 0,
        "counts": [0] * streams,
        "items": [0] * streams,
        "ended": [],
        "datasets": [None] * streams,
        "dataset": [],
        "order": "stream" if iterable else Order(loader).kind,
        "epochs": epochs_of(told_of_epochs(loader), told),
        "base_seed": 0,
        "random": [],
        "seeds": [],
        "sampler": [],
        "digest": "",
        "rank": 0 if iterable else Order(loader).rank(),
    }


def checked(loader: torch.utils.data.DataLoader[Any], state: Mapping[str, Any]) -> State:
    """Returns a copy of `state`, if `loader` can continue it."""
    if not isinstance(state, Mapping):
        raise TypeError(f"a state is a dict, as `state_dict()` gives it; found {type(state).__name__}")
    ours = first_state(loader)
    missing = sorted(set(ours) - set(state))
    if missing:
        raise StateMismatchError(
            f"the state lacks {', '.join(f'`{name}`' for name in missing)}: it is of another kind of loader"
        )
    for name in ("version", "kind", "samples", "batch_size", "order"):
        if state[name] != ours[name]:
            raise StateMismatchError(f"`{name}` is {ours[name]} here, but {state[name]} in the state")
    if len(state["epochs"]) != len(ours["epochs"]):
        raise StateMismatchError(
            f"{len(ours['epochs'])} samplers and datasets have `set_epoch` here, but {len(state['epochs'])} in the "
            f"state, with epochs {state['epochs']}"
        )
    if len(state["counts"]) != len(ours["counts"]):
        raise StateMismatchError(
            f"`num_workers` is {ours['workers']} here, but {state['workers']} in the state: an iterable dataset is "
            "split by worker id, so that the position of each worker means nothing for another number of them"
        )
    return copy.deepcopy({name: state[name] for name in ours})


def is_inside(state: State | None) -> bool:
    """Tells whether a pass would have something to continue there."""
    return state is not None and not state["finished"] and bool(state["batches"] or state["ahead"])


class Resume:
    """The position of a loader: a restored one that was not continued yet, or its newest pass's."""

    def __init__(self, restored: State | None = None) -> None:
        #: A state that the next pass continues.
        self.restored = restored
        self.newest: Position | None = None
        #: Seeds of the epochs that have begun, including those before a restart.
        self.seeds: list[Any] = [] if restored is None else list(restored["seeds"])
        #: Whether a state was restored. Only then could an epoch repeat the order of an earlier
        #: one.
        self.is_continued = restored is not None
        #: Held by a pass during its set-up. Only one pass continues the restored state.
        self.starting = threading.RLock()
        #: The epoch that the loader was told, for parts that do not give theirs.
        self.told = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return Resume, (self.restored,)

    def state(self, loader: torch.utils.data.DataLoader[Any]) -> State:
        """Returns the position after the batches that the newest pass handed over, for a user."""
        if self.restored is not None:
            return copy.deepcopy(self.restored)
        if self.newest is not None:
            return self.newest.snapshot()
        state = first_state(loader, self.told)
        if keeps_dataset_state(loader):
            state["dataset"] = [state_of(loader.dataset)]
        return _shown(state)

    def load(self, loader: torch.utils.data.DataLoader[Any], state_dict: Mapping[str, Any]) -> None:
        """Lets the next pass continue there. Tells samplers and datasets the epoch of the state."""
        state = checked(loader, state_dict)
        for part, epoch in zip(told_of_epochs(loader), state["epochs"], strict=True):
            # A part that is told another epoch later begins that epoch.
            if epoch != -1:
                part.set_epoch(epoch)
                self.told = epoch
        self.seeds, self.is_continued = list(state["seeds"]), True
        self.restored = state

    def begin(self, position: Position) -> None:
        """Notes that a pass has begun.

        It makes no calls: an interrupt must not separate the steps.
        """
        self.restored, self.newest, self.seeds = None, position, position.state["seeds"]

    def set_epoch(self, loader: torch.utils.data.DataLoader[Any], epoch: int) -> None:
        for part in told_of_epochs(loader):
            part.set_epoch(epoch)
        self.told = epoch


def keeps_dataset_state(loader: torch.utils.data.DataLoader[Any]) -> bool:
    """Tells whether a state holds the state of the dataset itself.

    A dataset that threads share has no state at a given batch.
    """
    iterable = loader._dataset_kind == _DatasetKind.Iterable
    return loader.num_workers <= (0 if iterable else 1) and is_stateful(loader.dataset)
