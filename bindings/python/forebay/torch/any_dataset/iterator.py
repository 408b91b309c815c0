"""One pass over any dataset of torch, on threads of this process or in the caller's thread."""

from __future__ import annotations

import copy
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.data
from torch.utils.data import _DatasetKind, _utils
from torch.utils.data import dataloader as torch_dataloader

from forebay._loader import first_time, log_notes
from forebay.torch.any_dataset.order import InEpochs, Order, State, chained, is_stateful, nexts
from forebay.torch.any_dataset.random_state import OwnRandomState, drawn_seed, seeding
from forebay.torch.any_dataset.state import (
    Change,
    Failed,
    Position,
    Resume,
    first_state,
    is_inside,
    keeps_dataset_state,
    size_of,
    state_of,
)
from forebay.torch.any_dataset.tasks import Caller, Fetched, Items, Recipe, tell_of_replay, tell_of_unkept
from forebay.torch.any_dataset.worker_info import answer_per_thread
from forebay.torch.any_dataset.workers import Outcome, Workers
from forebay.torch.device import Ahead

#: Makes the copier of a new pass to the device from the function that takes its next batch. None
#: means host memory.
AheadOf = Callable[[Callable[[float | None], Any]], Ahead | None]

#: Entries of the state that a pass continues.
_CONTINUED = (
    "batches", "ahead", "counts", "items", "ended", "datasets", "base_seed", "random", "seeds", "sampler",
)  # fmt: skip


class DatasetIterator(torch_dataloader._BaseDataLoaderIter):
    """A pass over a dataset, on ``num_workers`` threads, or in the caller's thread for 0.

    It begins at the first ``next()``. Threads share a map-style dataset. Of an iterable dataset,
    each thread iterates its own copy. Several threads may take batches from one iterator. If a
    set-up is interrupted or fails, the next ``next()`` begins it again.
    """

    def __init__(self, loader: torch.utils.data.DataLoader[Any], resume: Resume, ahead_of: AheadOf) -> None:
        self._owner: Any = loader
        self._resume = resume
        self._taking = threading.RLock()
        self._position: Position | None = None
        self._workers: Workers | Caller | None = None
        self._ahead = ahead_of(self._take_on_host)
        self._ended = False
        # With one processor or without the GIL, threads do not wait for the interpreter.
        self._hints = _has_gil() and len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else False
        self._order = None if loader._dataset_kind == _DatasetKind.Iterable else Order(loader)
        #: The index that is drawn and not given out, and the task made from it. Empty without one.
        self._pulled: list[Any] = []
        self._task: tuple[int, Any] | None = None
        self._draws = 0
        self._drawn = 0
        self._skipped: set[int] = set()
        self._sampler_failed = False
        self._must_redraw = False
        #: State of the sampler before the first index. Empty if it has none.
        self._sampler_start: list[Any] = []
        #: Workers whose dataset raised an error at their last batch. An end after it is not the end
        #: of their data.
        self._broken: set[int] = set()
        #: The time at which each consumer left with its last batch.
        self._left: dict[int, float] = {}
        #: The batch that a thread is about to return. An interrupt must not lose it.
        self._giving: dict[int, tuple[Outcome, Change | None]] = {}
        early = self._order is not None and not self._order.late
        self._mark = self._order.mark() if early and self._order is not None else []
        if is_inside(resume.restored):
            # The interrupted set-up drew for this pass before its state was taken. Drawing again
            # would shift the numbers of the trainer.
            with seeding, OwnRandomState():
                super().__init__(loader)
        else:
            super().__init__(loader)
        if self._num_workers > 0:
            answer_per_thread()
        elif self._timeout > 0:
            raise ValueError("`timeout` needs `num_workers`: without threads, nothing can be given up")

    def __next__(self) -> Any:
        me, began = threading.get_ident(), time.perf_counter()
        self._giving.pop(me, None)
        try:
            data = super().__next__()
            ended = time.perf_counter()
            self._owner._waits.add(ended - began, ended - self._left.get(me, began))
            self._left[me] = ended
            return data
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        """Keeps the batch that this thread was about to return for the next ``next()``."""
        found = self._giving.pop(threading.get_ident(), None)
        if found is None or self._ahead is not None:
            return
        with self._taking:
            outcome, change = found
            if change is not None:
                change.undo()
            if self._workers is not None:
                self._workers.put_back(outcome)

    def _next_data(self) -> Any:
        found = self._take_on_host(None) if self._ahead is None else self._ahead.take(None)
        if found is None:
            raise StopIteration
        return found[0]

    def _take_on_host(self, limit_s: float | None) -> tuple[Any] | None:
        """Returns the next batch, or None at the end.

        Raises TimeoutError if there is none and `limit_s` is 0.
        """
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

    def _is_ready(self) -> bool:
        return self._ended or (isinstance(self._workers, Workers) and self._workers.ready())

    def _take(self) -> Any:
        if self._ended:
            raise StopIteration
        if self._workers is None:
            self._start()
        assert self._workers is not None and self._position is not None
        outcome = self._workers.peek(self._draw)
        if outcome is None:
            self._end()
            raise StopIteration
        if self._hints:
            self._hint()
        change = None if outcome.is_setup else self._change(outcome, self._position)
        me = threading.get_ident()
        self._giving[me] = outcome, change
        if change is not None:
            change.apply()
        self._workers.done(outcome)
        if outcome.error is None:
            fetched: Fetched = outcome.result
            return fetched.data
        del self._giving[me]
        error = outcome.raised()
        try:
            raise error
        finally:
            del outcome, error  # they are in their own traceback

    def _change(self, outcome: Outcome, position: Position) -> Change | None:
        """Returns the step of the position that `outcome` makes."""
        fetched: Fetched | None = outcome.result
        if self._order is not None:
            if outcome.index is None:
                return None  # the sampler failed
            # A batch that failed counts, because it fails again wherever it is asked for.
            return position.handed(outcome.index[0], self._whole, None if fetched is None else fetched.dataset_state)
        assert self._workers is not None
        if fetched is None:
            self._broken.add(outcome.worker)
            return None
        self._broken.discard(outcome.worker)
        if isinstance(self._workers, Caller):
            items = self._workers.items
            # The position outlives the pass. It must hold neither threads nor unneeded data.
            if items is not None and items.is_stateful and position.asked is dict:
                position.asked = _asker(items, self._taking)
        ended = [worker for worker in self._workers.ended if worker not in self._broken]
        return position.handed_by(outcome.worker, fetched.items, fetched.dataset_state, ended)

    def _end(self) -> None:
        self._ended = True
        assert self._position is not None
        # After an error, a generator only tells that it has ended. The rest of the epoch was not
        # handed over.
        if not self._broken and not self._sampler_failed:
            self._position.finish()

    def _start(self) -> None:
        """Sets the pass up. Nothing in the loader changes before the set-up is complete."""
        with self._resume.starting:
            self._start_from(self._resume.restored)

    def _start_from(self, restored: State | None) -> None:
        loader = self._owner
        state = first_state(loader, self._resume.told)
        told_another = restored is not None and any(
            epoch not in (-1, now) for epoch, now in zip(restored["epochs"], state["epochs"], strict=True)
        )
        if told_another:
            restored = None
        self._pulled, self._draws, self._drawn, self._skipped = [], 0, 0, set()
        if restored is not None and (not restored["finished"] or loader.num_workers <= 1):
            state["dataset"] = restored["dataset"]
        state["renew"] = restored is not None and bool(restored["finished"])
        inside = restored if is_inside(restored) else None
        base_seed: Any = self._base_seed
        if self._order is None:
            # torch's own sampler of nothing is a generator, which an interrupt would end.
            self._sampler_iter = itertools.repeat(next(iter(self._index_sampler)))
        else:
            base_seed = self._start_order(self._order, restored, inside, state, base_seed)
            self._whole = size_of(self._index_sampler)
            stateful = self._order.stateful
            self._sampler_start = [] if stateful is None else [state_of(stateful)]
        state["base_seed"] = int(base_seed)
        if inside is not None:
            state.update({name: inside[name] for name in _CONTINUED})
            self._skipped, self._drawn = set(state["ahead"]), state["batches"]
        if self._order is not None:
            dataset: Any = self._dataset
            for kept in state["dataset"]:
                dataset.load_state_dict(copy.deepcopy(kept))
            if not keeps_dataset_state(loader):
                state["dataset"] = []
        workers = self._made_workers(state)
        del state["renew"]
        position = Position(state)
        if self._order is not None and self._num_workers > 1 and is_stateful(self._dataset):
            position.asked = _teller(self._dataset, self._num_workers)
        self._resume.begin(position)
        self._position, self._workers = position, workers

    def _start_order(
        self, order: Order, restored: State | None, inside: State | None, state: State, base_seed: Any
    ) -> Any:
        """Moves the indices to the start of the pass, and returns the base seed of the pass."""
        if inside is not None:
            state["digest"] = inside["digest"]
            if order.stateful is not None:
                order.restore_sampler(inside["sampler"])
                self._sampler_iter = iter(self._index_sampler)
            else:
                # Some trainers give the state of one rank to all ranks. The others skip other
                # indices.
                digest = inside["digest"] if inside["rank"] == state["rank"] else None
                self._sampler_iter = order.again(inside["random"], inside["batches"], digest)
                state["digest"] = order.passed
            return inside["base_seed"]
        if restored is not None and restored["finished"]:
            if order.stateful is not None:
                order.restore_sampler(restored["sampler"])
                for _ in iter(self._index_sampler):
                    pass
            if order.kind == "generator":
                order.again(restored["random"], None)
            self._mark = order.mark() if not order.late else []
            self._sampler_iter = iter(self._index_sampler)
            if self._owner.generator is not None:
                base_seed = drawn_seed(self._owner.generator)
        mark = order.mark() if order.late else self._mark
        used = self._resume.seeds
        state["random"] = order.unused(mark, used) if self._resume.is_continued else mark
        state["seeds"] = order.with_seed(state["random"], used)
        if order.kind == "seed":
            self._sampler_iter = order.seeded(state["random"][0])
        elif state["random"] != mark:
            self._sampler_iter = order.again(state["random"], 0)
        return base_seed

    def _draw(self, at: int) -> tuple[int, Any]:
        """Returns number and index of the next batch. Draws a new index when `at` changes."""
        while at >= self._draws:
            if not self._pulled:
                if self._must_redraw:
                    self._sampler_iter = self._redrawn()
                    self._must_redraw = False
                try:
                    # This is one step: an interrupt comes before the index is drawn, or after it is
                    # kept.
                    self._pulled.extend(itertools.islice(nexts(self._sampler_iter), 1))
                except Exception:
                    self._sampler_failed = True
                    raise
                except BaseException:
                    # An interrupted generator has ended, so that the indices are drawn again.
                    self._must_redraw = self._order is not None
                    raise
                if not self._pulled:
                    raise StopIteration
            number, index = self._drawn, self._pulled[0]
            if self._order is not None:
                assert self._position is not None
                stateful = self._order.stateful
                kept = [] if stateful is None else [state_of(stateful)]
                self._position.drew(number, chained(self._position.digest_before(number), index), kept)
            drawn = number not in self._skipped
            # There must be no calls from here on, because interrupts come only at calls.
            del self._pulled[0]
            self._drawn = number + 1
            if drawn:
                self._task = number, index
                self._draws = at + 1
        assert self._task is not None
        return self._task

    def _redrawn(self) -> Iterator[Any]:
        """Returns the indices that are not drawn yet, from a new iterator of the sampler."""
        order, position = self._order, self._position
        assert order is not None and position is not None
        if order.stateful is None:
            with InEpochs(self._owner, position.state["epochs"]):
                return order.again(position.state["random"], self._drawn, position.digest_before(self._drawn))
        kept = position.sampler_before(self._drawn) or self._sampler_start
        for found in kept:
            if isinstance(found, Failed):
                raise found.error
        order.restore_sampler(kept)
        return iter(order.index_sampler)

    def _made_workers(self, state: State) -> Workers | Caller:
        loader, iterable = self._owner, self._order is None
        if iterable and state["batches"]:
            tell_of_replay(self._dataset, state)
        recipe = Recipe(
            kind=self._dataset_kind,
            auto_collation=self._auto_collation,
            collate_fn=self._collate_fn,
            drop_last=self._drop_last,
            init_fn=loader.worker_init_fn,
            workers=self._num_workers,
            base_seed=state["base_seed"],
            world=(self._world_size, self._rank),
        )
        keeps = keeps_dataset_state(loader)
        if self._num_workers == 0:
            return Caller(recipe.begin(self._dataset, None, dict(state), keeps and not iterable), iterable)
        count = self._num_workers
        own = [recipe.own_dataset(self._dataset, worker) for worker in range(count)]
        return Workers(
            [recipe.begin(own[worker], worker, dict(state), keeps or iterable) for worker in range(count)],
            own_data=iterable,
            window=count * (loader.prefetch_factor or 2),
            in_order=loader.in_order,
            timeout_s=self._timeout,
            done=state["counts"],
            ended=state["ended"],
            together=loader.worker_init_fn is not None,
        )

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

    def close(self) -> None:
        """Ends the pass and waits until its threads finish their present items."""
        self._ended = True
        if isinstance(self._workers, Workers):
            self._workers.close()
        if self._ahead is not None:
            self._ahead.close()


def _asker(items: Items, taking: threading.RLock) -> Callable[[], State]:
    """Makes the function that asks the dataset of `items` for its state when a user asks for it."""

    def asked() -> State:
        # Another thread that is computing a batch holds the lock. Then the last known state
        # suffices.
        if not taking.acquire(blocking=False):
            return {}
        try:
            return items.asked()
        finally:
            taking.release()

    return asked


def _teller(dataset: Any, workers: int) -> Callable[[], State]:
    def asked() -> State:
        tell_of_unkept(dataset, workers)
        return {}

    return asked


def _has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())
