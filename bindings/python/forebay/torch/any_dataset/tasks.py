"""The dataset's own code: sets a worker up and computes its batches.

Nothing here holds the iterator, so that a thread does not keep a pass alive that its user dropped.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import _DatasetKind, graph_settings
from torch.utils.data.datapipes.datapipe import IterDataPipe, MapDataPipe

from forebay._loader import first_time, log_notes
from forebay.torch.any_dataset.copies import copied_for_thread
from forebay.torch.any_dataset.order import State, is_stateful, nexts
from forebay.torch.any_dataset.state import Failed, state_of
from forebay.torch.any_dataset.worker_info import here, make_worker_info, run_init_fn
from forebay.torch.any_dataset.workers import Begin, Draw, Outcome, told_of_stop


class Modes:
    """The modes of torch that belong to a thread.

    A worker process begins with its parent's modes.
    """

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._device = torch.get_default_device()
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]

    def enter(self) -> None:
        """Sets the modes of the calling thread, for the rest of its life."""
        stack = contextlib.ExitStack()
        if self._inference:
            stack.enter_context(torch.inference_mode())
        torch.set_grad_enabled(self._grad)
        if self._device != torch.get_default_device():
            stack.enter_context(self._device)
        for kind, dtype in self._autocast:
            stack.enter_context(torch.autocast(kind, dtype))
        # The stack is never left: if it were dropped, it would leave the modes.
        here.modes = stack.pop_all()


@dataclass(frozen=True)
class Recipe:
    """The start of each worker of a pass."""

    kind: int
    auto_collation: bool
    collate_fn: Any
    drop_last: bool
    init_fn: Callable[[int], None] | None
    workers: int
    base_seed: int
    #: Number of ranks and rank of torch.distributed, by which DataPipes are sharded.
    world: tuple[int, int]

    @property
    def is_iterable(self) -> bool:
        return self.kind == _DatasetKind.Iterable

    def own_dataset(self, source: Any, worker: int | None) -> Any:
        """Returns the dataset of a worker: its own copy, or the dataset that all workers share."""
        if worker is None:
            return source
        if isinstance(source, (IterDataPipe, MapDataPipe)):
            return copy.deepcopy(source)  # sharding is written into the pipes of the graph
        return copied_for_thread(source) if self.is_iterable else source

    def begin(self, dataset: Any, worker: int | None, state: State, keeps: bool) -> Begin:
        """Sets a worker up. None means the caller of `num_workers=0`. Its results are `Fetched`."""
        modes = Modes() if worker is not None else None

        def begin() -> Callable[[Any], Fetched]:
            if modes is not None:
                modes.enter()
            if worker is not None:
                here.info = make_worker_info(worker, self.workers, self.base_seed, dataset)
            if isinstance(dataset, (IterDataPipe, MapDataPipe)):
                size, rank = self.world
                shards = (size * max(self.workers, 1), (worker or 0) * size + rank)
                graph_settings.apply_sharding(dataset, *shards)
            if worker is not None and self.init_fn is not None:
                run_init_fn(self.init_fn, worker, self.base_seed)
            make = Items if self.is_iterable else Indexed
            return make(self, dataset, worker or 0, state, keeps).fetch

        return begin

    def fetcher(self, dataset: Any) -> Any:
        return _DatasetKind.create_fetcher(  # type: ignore[no-untyped-call]
            self.kind, dataset, self.auto_collation, self.collate_fn, self.drop_last
        )


@dataclass(frozen=True, slots=True)
class Fetched:
    """A batch, and the position of its dataset after it."""

    data: Any
    dataset_state: Any = None
    items: int = 0


class Indexed:
    """Batches of a map-style dataset."""

    def __init__(self, recipe: Recipe, dataset: Any, worker: int, state: State, keeps: bool) -> None:
        self._dataset, self._keeps = dataset, keeps
        self._fetcher = recipe.fetcher(dataset)

    def fetch(self, task: Any) -> Fetched:
        data = self._fetcher.fetch(task[1])
        return Fetched(data, [state_of(self._dataset)] if self._keeps else None)


class Items:
    """Batches of an iterable dataset.

    It restores the state of the dataset first, and then the state of its iterator. Then it skips
    the items that were read after that state was taken.
    """

    def __init__(self, recipe: Recipe, dataset: Any, worker: int, state: State, keeps: bool) -> None:
        kept: State | None = state["datasets"][worker]
        of_dataset = state["dataset"] if kept is None else kept["dataset"]
        fresh = state_of(dataset) if of_dataset and state["renew"] else None
        for found in of_dataset:
            dataset.load_state_dict(copy.deepcopy(found))
        self._recipe, self._dataset = recipe, dataset
        self._fetcher = recipe.fetcher(dataset)
        for found in () if kept is None else kept["iterator"]:
            self._fetcher.dataset_iter.load_state_dict(copy.deepcopy(found))
        self._watch()
        self._pulls.pass_over(0 if kept is None else kept["items"])
        self._pass_over(state["items"][worker] - self._pulls.count)
        #: Whether each batch comes with the state after it, because threads read ahead.
        self._keeps = keeps
        self._base = kept
        #: Whether the dataset is inside a batch: it is being read, or it has raised an error.
        self._is_inside = False
        self._has_raised = False
        #: The batch that the caller may not have yet, after its number.
        self._last: tuple[int, Fetched] | None = None
        #: The state of a dataset before its first iteration. A pass begins there if the restored
        #: state is at the end.
        self._fresh = None if isinstance(fresh, Failed) else fresh

    def _watch(self) -> None:
        items = self._fetcher.dataset_iter
        self._iterator = items if is_stateful(items) else None
        self._stateful = self._dataset if is_stateful(self._dataset) and items is not self._dataset else None
        self._pulls = _Pulls(items)
        self._fetcher.dataset_iter = self._pulls

    def _pass_over(self, count: int) -> None:
        for _ in range(count):
            try:
                next(self._pulls)
            except StopIteration:
                break  # an end that comes early is the end of the pass
            except Exception:
                continue  # it failed in the earlier pass too, or does not any more
        self._pulls.forget()

    def fetch(self, task: Any) -> Fetched:
        if self._last is not None and self._last[0] == task[0]:
            return self._last[1]
        self._is_inside = True
        try:
            data = self._fetcher.fetch(task[1])
        except StopIteration:
            if self._fresh is None:
                self._is_inside = self._has_raised
                raise
            return self._fetch_renewed(task)
        except Exception:
            self._has_raised = True
            self._pulls.forget()
            raise
        except BaseException:
            self._pulls.read_again()
            self._fetcher.ended = False
            raise
        fetched = Fetched(data, self._taken() if self._keeps else self._base, self._pulls.count)
        self._last = None if self._keeps else (task[0], fetched)
        self._pulls.forget()
        self._fresh = None
        self._is_inside = self._has_raised = False
        return fetched

    def delivered(self) -> None:
        """Notes that the caller has the last batch."""
        self._last = None

    def undelivered(self, number: int, fetched: Fetched) -> None:
        """Notes that the caller does not have the last batch after all."""
        self._last = number, fetched

    def _fetch_renewed(self, task: Any) -> Fetched:
        fresh, self._fresh = self._fresh, None
        self._dataset.load_state_dict(fresh)
        self._fetcher = self._recipe.fetcher(self._dataset)
        self._watch()
        return self.fetch(task)

    @property
    def is_stateful(self) -> bool:
        return self._stateful is not None or self._iterator is not None

    def _taken(self) -> State | None:
        if not self.is_stateful:
            return None
        states = [[] if owner is None else [state_of(owner)] for owner in (self._stateful, self._iterator)]
        return {"dataset": states[0], "iterator": states[1], "items": self._pulls.count}

    def asked(self) -> State:
        """Returns the present entries of the state.

        None inside a batch: then the last entries count.
        """
        if self._is_inside or self._last is not None:
            return {}
        self._base = self._taken()
        return {"datasets": [self._base], "dataset": [] if self._base is None else self._base["dataset"]}


class _Pulls:
    """Counts the items that are read, and gives the items of an interrupted batch again."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._before = self._failed = 0
        #: The items of the present batch, and the number of them that were given.
        self._batch: list[Any] = []
        self._given = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._given == len(self._batch):
            try:
                # This is one step: an interrupt comes before the item is read, or after it is kept.
                self._batch.extend(itertools.islice(nexts(self._items), 1))
            except Exception:
                self._failed += 1
                raise
            if self._given == len(self._batch):
                raise StopIteration
        item = self._batch[self._given]
        self._given += 1
        return item

    @property
    def count(self) -> int:
        """Number of items read, including items that raised an error."""
        return self._before + self._failed + len(self._batch)

    def pass_over(self, count: int) -> None:
        self._before += count

    def forget(self) -> None:
        """Notes that the batch is complete."""
        self._before, self._batch, self._given = self._before + len(self._batch), [], 0

    def read_again(self) -> None:
        """Notes that the batch was interrupted."""
        self._given = 0


class Caller:
    """Does the tasks of ``num_workers=0`` in the thread that asks for a batch."""

    def __init__(self, begin: Begin, own_data: bool) -> None:
        self._begin = begin
        self._own_data = own_data
        self._work: Callable[[Any], Any] | None = None
        self._drawn = 0
        self._outcome: Outcome | None = None
        self.ended: list[int] = []

    @property
    def items(self) -> Items | None:
        """The reader of an iterable dataset, once it is set up."""
        found = getattr(self._work, "__self__", None)
        return found if isinstance(found, Items) else None

    def peek(self, draw: Draw) -> Outcome | None:
        """Returns the outcome to deliver next, or None after the last.

        Repeats an interrupted task.
        """
        if self._outcome is not None:
            return self._outcome
        if self._work is None:
            self._work = self._begin()
        try:
            index = draw(self._drawn)
        except StopIteration:
            return None
        try:
            outcome = Outcome(index, self._work(index))
        except StopIteration as error:
            if self._own_data:
                return None
            outcome = Outcome(index, error=told_of_stop(error))
        except Exception as error:
            outcome = Outcome(index, error=error)
        self._outcome, self._drawn = outcome, self._drawn + 1
        return outcome

    def done(self, outcome: Outcome) -> None:
        self._outcome = None
        if self.items is not None:
            self.items.delivered()

    def put_back(self, outcome: Outcome) -> None:
        self._outcome = outcome
        if self.items is not None and outcome.error is None:
            self.items.undelivered(outcome.index[0], outcome.result)


def tell_of_replay(dataset: Any, state: State) -> None:
    if any(count and kept is None for count, kept in zip(state["counts"], state["datasets"], strict=True)):
        text = (
            f"the state holds no position of {type(dataset).__name__}: it is read again from its start, and the "
            "batches that were handed over are passed over"
        )
        if not is_stateful(dataset):
            text += "; give it `state_dict` and `load_state_dict` to resume without reading"
        if first_time(text):
            log_notes([f"{text} ({state['batches']} batches)"], [], None)


def tell_of_unkept(dataset: Any, workers: int) -> None:
    text = (
        f"the state of {type(dataset).__name__} is not stored: {workers} threads change it at once, so that it belongs "
        "to no batch; with `num_workers` 0 or 1 it is stored"
    )
    log_notes([text], [], None)
