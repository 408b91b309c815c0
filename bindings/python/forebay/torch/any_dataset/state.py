"""Positions in a pass."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch.utils.data
from torch.utils.data import _DatasetKind

from forebay._errors import StateMismatchError
from forebay.torch.any_dataset.order import Order, State

_VERSION = 1


class Position:
    """What a pass has handed over. The pass writes it, any thread reads it; it holds neither threads nor data."""

    def __init__(self, state: State) -> None:
        self._lock = threading.Lock()
        self._state = state
        self._ahead: set[int] = set(state["ahead"])
        #: States of the sampler after each batch that was drawn and not handed over in turn.
        self._drawn: dict[int, Any] = {}

    def drew(self, number: int, sampler_state: Any) -> None:
        with self._lock:
            self._drawn[number] = sampler_state

    def handed(self, number: int, whole: int | None) -> None:
        """Batch `number` of the epoch was handed over; `whole` is how many there are."""
        with self._lock:
            state = self._state
            self._ahead.add(number)
            while state["batches"] in self._ahead:
                number = state["batches"]
                self._ahead.remove(number)
                state["batches"] = number + 1
                if number in self._drawn:
                    state["sampler"] = [self._drawn.pop(number)]
            state["finished"] = int(state["batches"] == whole)

    def handed_by(self, worker: int, dataset_state: Any, ended: list[int]) -> None:
        """A batch of this worker's own data was handed over."""
        with self._lock:
            state = self._state
            state["batches"] += 1
            state["counts"][worker] += 1
            state["datasets"][worker] = dataset_state
            state["ended"] = ended

    def finish(self) -> None:
        with self._lock:
            self._state["finished"] = 1

    def snapshot(self) -> State:
        with self._lock:
            lists = {name: list(value) for name, value in self._state.items() if isinstance(value, list)}
            return {**self._state, **lists, "ahead": sorted(self._ahead)}


def size_of(dataset: Any) -> int:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return -1


def first_state(loader: torch.utils.data.DataLoader[Any]) -> State:
    """The position before the first batch. Every state has these keys, and lists where their number could change."""
    iterable = loader._dataset_kind == _DatasetKind.Iterable
    streams = max(loader.num_workers, 1) if iterable else 0
    order = None if iterable else Order(loader)
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
        "ended": [],
        "datasets": [None] * streams,
        "order": "stream" if order is None else order.kind,
        "epoch": -1 if order is None else order.epoch(),
        "base_seed": 0,
        "random": [],
        "sampler": [],
    }


def checked(loader: torch.utils.data.DataLoader[Any], state: Mapping[str, Any]) -> State:
    """`state`, if it can be continued by `loader`."""
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
    if (state["epoch"] == -1) != (ours["epoch"] == -1):
        raise StateMismatchError(f"`epoch` of the sampler is {ours['epoch']} here, but {state['epoch']} in the state")
    if len(state["counts"]) != len(ours["counts"]):
        raise StateMismatchError(
            f"`num_workers` is {ours['workers']} here, but {state['workers']} in the state: an iterable dataset is "
            "split by worker id, so that the position of each worker means nothing for another number of them"
        )
    return {name: state[name] for name in ours}


def is_inside(state: State | None) -> bool:
    """Whether a pass would have something to continue there."""
    return state is not None and not state["finished"] and bool(state["batches"] or state["ahead"])


class Resume:
    """The position of a loader: restored and not continued yet, or that of its newest pass."""

    def __init__(self, restored: State | None = None) -> None:
        self._lock = threading.Lock()
        self.restored = restored
        self.newest: Position | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Resume, (self.restored,)

    def state(self, loader: torch.utils.data.DataLoader[Any]) -> State:
        if self.restored is not None:
            return dict(self.restored)
        return first_state(loader) if self.newest is None else self.newest.snapshot()

    def load(self, loader: torch.utils.data.DataLoader[Any], state_dict: Mapping[str, Any]) -> None:
        state = checked(loader, state_dict)
        if state["epoch"] != -1:
            # The sampler is told where to go on; who tells it of another epoch later begins that one.
            Order(loader).set_epoch(state["epoch"])
        self.restored = state

    def take(self) -> State | None:
        """The state that the pass which begins now has to continue."""
        with self._lock:
            state, self.restored = self.restored, None
            return state
