"""Passes over any torch dataset on threads of this process, and the position in them. Private part of forebay.torch."""

from __future__ import annotations

import base64
import contextlib
import copy
import inspect
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    _DatasetKind,
    _utils,
    graph_settings,
)
from torch.utils.data import dataloader as torch_dataloader
from torch.utils.data._utils import collate as torch_collate
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data.datapipes.datapipe import IterDataPipe, MapDataPipe

from forebay._errors import StateMismatchError
from forebay._loader import first_time, log_notes
from forebay._threads import Begin, Outcome, Workers, told_of_stop

if TYPE_CHECKING:
    from forebay.torch import DataLoader

State = dict[str, Any]

_VERSION = 1
_FIXED = (SequentialSampler, DistributedSampler)


def is_plain(value: object, kind: type, *methods: str) -> bool:
    """Whether `value` is of `kind` and does what `kind` does: a subclass may have changed it."""
    return isinstance(value, kind) and all(getattr(type(value), name) is getattr(kind, name) for name in methods)


def _is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# Random state of the process.

_seeding = threading.Lock()


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """What is drawn or seeded inside leaves the state of `random`, NumPy and torch as it was. One thread at a time."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with _seeding, torch.random.fork_rng(devices=devices):
        of_python, of_numpy = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _process_state() -> list[Any]:
    version, words, gauss = random.getstate()
    of_numpy = np.random.get_state()
    assert isinstance(of_numpy, tuple)
    name, keys, *more = of_numpy
    return [_to_text(torch.get_rng_state()), [version, list(words), gauss], [name, keys.tolist(), *more]]


def _set_process_state(state: list[Any]) -> None:
    of_torch, (version, words, gauss), (name, keys, *more) = state
    torch.set_rng_state(_from_text(of_torch))
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *more))


# The order of a map-style dataset.


class _Order:
    """Where the indices of a pass come from, and what it takes to draw the same ones again.

    `random` of a state is empty for what draws nothing; a seed; the state of a generator; or that of the process.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        batch_sampler = loader.batch_sampler
        auto = batch_sampler is not None
        self.index_sampler: Any = batch_sampler if auto else loader.sampler
        plain = not auto or is_plain(batch_sampler, BatchSampler, "__iter__")
        self.sampler: Any = getattr(batch_sampler, "sampler", loader.sampler) if auto else loader.sampler
        stateful = [part for part in (self.index_sampler, self.sampler) if _is_stateful(part)]
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
            return [_to_text(self.generator.get_state())]
        return [_process_state()] if self.kind == "process" else []

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
                _set_process_state(marked[0])
                return self._skipped(iter(self.index_sampler), skip)
        if self.kind == "generator":
            assert self.generator is not None
            self.generator.set_state(_from_text(marked[0]))
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


# Positions.


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


def _size(dataset: Any) -> int:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return -1


def first_state(loader: DataLoader[Any]) -> State:
    """The position before the first batch. Every state has these keys, and lists where their number could change."""
    iterable = loader._dataset_kind == _DatasetKind.Iterable
    streams = max(loader.num_workers, 1) if iterable else 0
    order = None if iterable else _Order(loader)
    return {
        "version": _VERSION,
        "kind": "iterable" if iterable else "map",
        "samples": -1 if iterable else _size(loader.dataset),
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


def checked(loader: DataLoader[Any], state: Mapping[str, Any]) -> State:
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


# Passes.


class DatasetIterator(torch_dataloader._BaseDataLoaderIter):
    """A pass over a dataset: on ``num_workers`` threads, or on the caller's for 0. It begins at the first ``next()``.

    Threads share a map-style dataset; of an iterable one, each iterates a shallow copy of its own. Several threads may
    take batches from one iterator.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._owner = loader
        self._taking = threading.RLock()
        self._position: Position | None = None
        self._workers: Workers | _Caller | None = None
        self._ahead = loader._ahead(self._take_on_host)
        self._ended = False
        # Where there is one processor, or no lock, threads wait for nothing that could be had otherwise.
        self._hints = _has_gil() and len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else False
        self._drawn = 0
        self._skipped: set[int] = set()
        self._order = None if loader._dataset_kind == _DatasetKind.Iterable else _Order(loader)
        early = self._order is not None and not self._order.late
        self._mark = self._order.mark() if early and self._order is not None else []
        with contextlib.ExitStack() as stack:
            if is_inside(loader._restored):
                # The interrupted run drew for this pass before its state was taken: drawing again would shift the
                # numbers that the trainer gets.
                stack.enter_context(own_random_state())
            super().__init__(loader)
        if self._num_workers > 0:
            answer_worker_info_per_thread()
        elif self._timeout > 0:
            raise ValueError("`timeout` needs `num_workers`: without threads, nothing can be given up")

    def _next_data(self) -> Any:
        found = self._take_on_host(None) if self._ahead is None else self._ahead.take(None)
        if found is None:
            raise StopIteration
        return found[0]

    def _take_on_host(self, limit_s: float | None) -> tuple[Any] | None:
        """The next batch, None at the end; raises TimeoutError if none is there and `limit_s` is 0."""
        with self._taking:
            if limit_s == 0 and not self._is_ready():
                raise TimeoutError
            try:
                data = self._take()
            except StopIteration:
                return None
            if self._pin_memory:
                data = _utils.pin_memory.pin_memory(data, self._pin_memory_device)  # type: ignore[no-untyped-call]
            return (data,)

    def _hint(self) -> None:
        found = self._workers.contention() if isinstance(self._workers, Workers) else None
        if found is None:
            return
        self._hints = False
        name = type(self._dataset).__name__
        if first_time(f"{name} holds the interpreter"):
            text = (
                f"{self._num_workers} threads did {found[0]:.1f} s of work of {name} in {found[1]:.1f} s: its Python "
                "holds the interpreter, so that threads gain nothing; python3.14t runs them in parallel, and torch's "
                "own DataLoader runs processes"
            )
            log_notes([text], [], None)

    def _is_ready(self) -> bool:
        return self._ended or (isinstance(self._workers, Workers) and self._workers.ready())

    def _take(self) -> Any:
        if self._ended:
            raise StopIteration
        if self._workers is None:
            self._start()
        assert self._workers is not None and self._position is not None
        outcome = self._workers.next(self._draw)
        if outcome is None:
            self._ended = True
            self._position.finish()
            raise StopIteration
        if self._hints:
            self._hint()
        if self._order is not None:
            # A batch that failed counts: it fails again wherever it is asked for.
            self._position.handed(outcome.index[0], self._whole)
        elif outcome.error is None:
            state, outcome.result = outcome.result
            self._position.handed_by(outcome.worker, state, self._workers.ended)
        if outcome.error is None:
            return outcome.result
        try:
            raise outcome.error
        finally:
            del outcome  # it is in its own traceback

    def _start(self) -> None:
        loader = self._owner
        restored = loader._take_restored()
        state = first_state(loader)
        if self._order is not None:
            restored = self._start_order(self._order, restored, state)
            self._whole = _size(self._index_sampler)
        state["base_seed"] = int(self._base_seed)
        if restored is not None and is_inside(restored):
            kept = ("batches", "ahead", "counts", "ended", "datasets", "base_seed", "random", "sampler")
            state.update({name: copy.copy(restored[name]) for name in kept})
            self._base_seed = state["base_seed"]
            self._skipped = set(state["ahead"])
            self._drawn = state["batches"]
        self._position = Position(state)
        self._workers = self._made_workers(state)
        loader._position = self._position

    def _start_order(self, order: _Order, restored: State | None, state: State) -> State | None:
        """Draws what `restored` drew; what is left to continue: nothing if the sampler was told another epoch."""
        if restored is not None and restored["epoch"] not in (-1, order.epoch()):
            restored = None
        if restored is not None and restored["finished"]:
            if order.stateful is not None:
                _restore_sampler(order, restored)
                for _ in iter(self._index_sampler):
                    pass
            if order.kind == "generator":
                order.again(restored["random"], None)
            self._mark = order.mark() if not order.late else []
            self._sampler_iter = iter(self._index_sampler)
            if self._owner.generator is not None:
                self._base_seed = _drawn_seed(self._owner.generator)
            restored = None
        if restored is None or not is_inside(restored):
            state["random"] = order.mark() if order.late else self._mark
            if order.kind == "seed":
                self._sampler_iter = order.seeded(state["random"][0])
            return None
        if order.stateful is not None:
            _restore_sampler(order, restored)
            self._sampler_iter = iter(self._index_sampler)
        else:
            self._sampler_iter = order.again(restored["random"], restored["batches"])
        return restored

    def _draw(self) -> tuple[int, Any]:
        while True:
            index = next(self._sampler_iter)
            number = self._drawn
            self._drawn += 1
            if self._order is not None and self._order.stateful is not None:
                assert self._position is not None
                self._position.drew(number, copy.deepcopy(self._order.stateful.state_dict()))
            if number not in self._skipped:
                return number, index

    def _made_workers(self, state: State) -> Workers | _Caller:
        loader, iterable = self._owner, self._order is None
        if iterable and state["batches"]:
            _tell_of_replay(self._dataset, state)
        if self._num_workers == 0:
            return _Caller(self._begin(loader, None, state), iterable)
        count = self._num_workers
        return Workers(
            [self._begin(loader, worker, state) for worker in range(count)],
            own_data=iterable,
            window=count * (loader.prefetch_factor or 2),
            in_order=loader.in_order,
            timeout_s=self._timeout,
            done=state["counts"],
            ended=state["ended"],
            together=loader.worker_init_fn is not None,
        )

    def _begin(self, loader: DataLoader[Any], worker: int | None, state: State) -> Begin:
        # Locals only: a thread that held the iterator would keep it alive.
        source, count, base_seed = self._dataset, self._num_workers, int(self._base_seed)
        kind, auto_collation = self._dataset_kind, self._auto_collation
        collate_fn, drop_last, init_fn = self._collate_fn, self._drop_last, loader.worker_init_fn
        iterable, world = self._order is None, (self._world_size, self._rank)
        done = state["counts"][worker or 0] if iterable else 0
        batch_size = loader.batch_size
        dataset_state: State | None = state["datasets"][worker or 0] if done else None

        def begin() -> Callable[[Any], Any]:
            dataset: Any = source
            if worker is not None:
                if isinstance(source, (IterDataPipe, MapDataPipe)):
                    dataset = copy.deepcopy(source)  # sharding is written into the pipes of the graph
                elif iterable:
                    dataset = _copied(source)
                _here.info = _worker_info(worker, count, base_seed, dataset)
            if isinstance(dataset, (IterDataPipe, MapDataPipe)):
                shards = (world[0] * max(count, 1), (worker or 0) * world[0] + world[1])
                graph_settings.apply_sharding(dataset, *shards)
            if worker is not None and init_fn is not None:
                _run_init_fn(init_fn, worker, base_seed)
            in_dataset = dataset_state is not None and dataset_state["of"] == "dataset"
            if dataset_state is not None and in_dataset:
                dataset.load_state_dict(dataset_state["state"])
            fetcher: Any = _DatasetKind.create_fetcher(  # type: ignore[no-untyped-call]
                kind, dataset, auto_collation, collate_fn, drop_last
            )
            if not iterable:
                return lambda task: fetcher.fetch(task[1])
            if dataset_state is not None and not in_dataset:
                fetcher.dataset_iter.load_state_dict(dataset_state["state"])
            elif done and not in_dataset:
                _replay(fetcher.dataset_iter, done * (batch_size or 1))
            owner = "iterator" if _is_stateful(fetcher.dataset_iter) else "dataset"
            stateful: Any = fetcher.dataset_iter if owner == "iterator" else dataset

            def fetch(task: Any) -> Any:
                data = fetcher.fetch(task[1])
                kept = {"of": owner, "state": copy.deepcopy(stateful.state_dict())} if _is_stateful(stateful) else None
                return kept, data

            return fetch

        return begin

    def close(self) -> None:
        """Ends the pass and waits for its threads to finish what they are at."""
        self._ended = True
        if isinstance(self._workers, Workers):
            self._workers.close()
        if self._ahead is not None:
            self._ahead.close()


class _Caller:
    """The tasks of ``num_workers=0``, done where the next batch is asked for."""

    def __init__(self, begin: Begin, own_data: bool) -> None:
        self._begin = begin
        self._own_data = own_data
        self._work: Callable[[Any], Any] | None = None
        self.ended: list[int] = []

    def next(self, next_index: Callable[[], Any]) -> Outcome | None:
        if self._work is None:
            self._work = self._begin()
        try:
            index = next_index()
        except StopIteration:
            return None
        try:
            outcome = Outcome(index, self._work(index))
        except StopIteration as error:
            if self._own_data:
                return None
            outcome = Outcome(index, error=told_of_stop(error))
        except BaseException as error:
            outcome = Outcome(index, error=error)
        outcome.worker = 0
        return outcome


def _has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _copied(source: Any) -> Any:
    """A shallow copy with attributes of its own, which not every ``__setstate__`` gives it."""
    copied = copy.copy(source)
    if copied is not source and getattr(copied, "__dict__", None) is not getattr(source, "__dict__", copied):
        return copied
    copied = object.__new__(type(source))
    copied.__dict__.update(source.__dict__)
    return copied


def _drawn_seed(generator: torch.Generator | None) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def _restore_sampler(order: _Order, restored: State) -> None:
    for state in restored["sampler"]:
        order.stateful.load_state_dict(copy.deepcopy(state))


def _tell_of_replay(dataset: Any, state: State) -> None:
    if any(count and kept is None for count, kept in zip(state["counts"], state["datasets"], strict=True)):
        text = (
            f"{type(dataset).__name__} has no `state_dict` and `load_state_dict`: to resume it, it is read again from "
            "its start, and what was handed over is passed over"
        )
        if first_time(text):
            log_notes([f"{text} ({state['batches']} batches)"], [], None)


def _replay(items: Iterator[Any], count: int) -> None:
    # The last batch may have been short: an end that comes early is the end of the pass.
    for _ in itertools.islice(items, count):
        pass


def _run_init_fn(init_fn: Callable[[int], None], worker: int, base_seed: int) -> None:
    """Seeds as torch seeds a worker process, so that `torch.initial_seed()` says the same; all of it is undone."""
    with own_random_state():
        random.seed(base_seed + worker)
        torch.manual_seed(base_seed + worker)
        np.random.seed(torch_worker._generate_state(base_seed, worker))  # type: ignore[no-untyped-call]
        init_fn(worker)


def _worker_info(worker: int, count: int, base_seed: int, dataset: Any) -> torch_worker.WorkerInfo:
    known = getattr(torch_worker.WorkerInfo, "__dataclass_fields__", ())
    more: dict[str, Any] = {"worker_method": "thread"} if "worker_method" in known else {}
    seed = base_seed + worker
    if "rng" in known:
        words = torch_worker._generate_state(base_seed, worker)  # type: ignore[no-untyped-call]
        more["rng"] = torch_worker._RNG(
            random_generator=random.Random(seed),
            torch_generator=torch.Generator().manual_seed(seed),
            numpy_generator=np.random.default_rng(words),
        )
    return torch_worker.WorkerInfo(id=worker, num_workers=count, seed=seed, dataset=dataset, **more)


_here = threading.local()
_patching = threading.Lock()


def answer_worker_info_per_thread() -> None:
    """Makes ``get_worker_info`` answer for the calling thread.

    It reads a module global, and others hold the function itself: its code is what can be replaced for all of them.
    """
    with _patching:
        if hasattr(torch_worker, "_forebay_worker_info"):
            return

        def of_thread() -> Any:
            info = getattr(_here, "info", None)
            return torch_worker._worker_info if info is None else info

        torch_worker._forebay_worker_info = of_thread  # type: ignore[attr-defined]

        def get_worker_info():  # type: ignore[no-untyped-def]
            return _forebay_worker_info()  # type: ignore[name-defined]  # noqa: F821

        torch_worker.get_worker_info.__code__ = get_worker_info.__code__

        # For whoever has worker info torch stacks into shared memory, a file for each tensor of a batch.
        stack = torch_collate.default_collate_fn_map[torch.Tensor]

        def stacked(batch: Any, **more: Any) -> Any:
            info, _here.info = getattr(_here, "info", None), None
            try:
                return stack(batch, **more)
            finally:
                _here.info = info

        torch_collate.default_collate_fn_map[torch.Tensor] = stacked
