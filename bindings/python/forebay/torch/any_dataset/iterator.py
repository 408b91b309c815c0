"""Passes over any torch dataset, on threads of this process."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.data
from torch.utils.data import _DatasetKind, _utils, graph_settings
from torch.utils.data import dataloader as torch_dataloader
from torch.utils.data.datapipes.datapipe import IterDataPipe, MapDataPipe

from forebay._loader import first_time, log_notes
from forebay.torch.any_dataset.order import Order, State, is_stateful, restore_sampler
from forebay.torch.any_dataset.random_state import drawn_seed, own_random_state
from forebay.torch.any_dataset.state import Position, Resume, first_state, is_inside, size_of
from forebay.torch.any_dataset.worker_info import answer_per_thread, here, make_worker_info, run_init_fn
from forebay.torch.any_dataset.workers import Begin, Outcome, Workers, told_of_stop
from forebay.torch.device import Ahead

#: Makes the copies of a new pass to the device out of what takes its next batch; None for host memory.
AheadOf = Callable[[Callable[[float | None], Any]], Ahead | None]


class DatasetIterator(torch_dataloader._BaseDataLoaderIter):
    """A pass over a dataset: on ``num_workers`` threads, or on the caller's for 0. It begins at the first ``next()``.

    Threads share a map-style dataset; of an iterable one, each iterates a shallow copy of its own. Several threads may
    take batches from one iterator.
    """

    def __init__(self, loader: torch.utils.data.DataLoader[Any], resume: Resume, ahead_of: AheadOf) -> None:
        self._owner = loader
        self._resume = resume
        self._taking = threading.RLock()
        self._position: Position | None = None
        self._workers: Workers | _Caller | None = None
        self._ahead = ahead_of(self._take_on_host)
        self._ended = False
        # Where there is one processor, or no lock, threads wait for nothing that could be had otherwise.
        self._hints = _has_gil() and len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else False
        self._drawn = 0
        self._skipped: set[int] = set()
        self._order = None if loader._dataset_kind == _DatasetKind.Iterable else Order(loader)
        early = self._order is not None and not self._order.late
        self._mark = self._order.mark() if early and self._order is not None else []
        with contextlib.ExitStack() as stack:
            if is_inside(resume.restored):
                # The interrupted run drew for this pass before its state was taken: drawing again would shift the
                # numbers that the trainer gets.
                stack.enter_context(own_random_state())
            super().__init__(loader)
        if self._num_workers > 0:
            answer_per_thread()
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
        restored = self._resume.take()
        state = first_state(loader)
        if self._order is not None:
            restored = self._start_order(self._order, restored, state)
            self._whole = size_of(self._index_sampler)
        state["base_seed"] = int(self._base_seed)
        if restored is not None and is_inside(restored):
            kept = ("batches", "ahead", "counts", "ended", "datasets", "base_seed", "random", "sampler")
            state.update({name: copy.copy(restored[name]) for name in kept})
            self._base_seed = state["base_seed"]
            self._skipped = set(state["ahead"])
            self._drawn = state["batches"]
        self._position = Position(state)
        self._workers = self._made_workers(state)
        self._resume.newest = self._position

    def _start_order(self, order: Order, restored: State | None, state: State) -> State | None:
        """Draws what `restored` drew; what is left to continue: nothing if the sampler was told another epoch."""
        if restored is not None and restored["epoch"] not in (-1, order.epoch()):
            restored = None
        if restored is not None and restored["finished"]:
            if order.stateful is not None:
                restore_sampler(order, restored)
                for _ in iter(self._index_sampler):
                    pass
            if order.kind == "generator":
                order.again(restored["random"], None)
            self._mark = order.mark() if not order.late else []
            self._sampler_iter = iter(self._index_sampler)
            if self._owner.generator is not None:
                self._base_seed = drawn_seed(self._owner.generator)
            restored = None
        if restored is None or not is_inside(restored):
            state["random"] = order.mark() if order.late else self._mark
            if order.kind == "seed":
                self._sampler_iter = order.seeded(state["random"][0])
            return None
        if order.stateful is not None:
            restore_sampler(order, restored)
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

    def _begin(self, loader: torch.utils.data.DataLoader[Any], worker: int | None, state: State) -> Begin:
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
                here.info = make_worker_info(worker, count, base_seed, dataset)
            if isinstance(dataset, (IterDataPipe, MapDataPipe)):
                shards = (world[0] * max(count, 1), (worker or 0) * world[0] + world[1])
                graph_settings.apply_sharding(dataset, *shards)
            if worker is not None and init_fn is not None:
                run_init_fn(init_fn, worker, base_seed)
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
            owner = "iterator" if is_stateful(fetcher.dataset_iter) else "dataset"
            stateful: Any = fetcher.dataset_iter if owner == "iterator" else dataset

            def fetch(task: Any) -> Any:
                data = fetcher.fetch(task[1])
                kept = {"of": owner, "state": copy.deepcopy(stateful.state_dict())} if is_stateful(stateful) else None
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
