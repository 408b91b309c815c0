"""Worker threads for datasets written in Python: what torch's worker processes do, inside this process."""

from __future__ import annotations

import copy
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import _DatasetKind, _utils
from torch.utils.data import dataloader as torch_dataloader
from torch.utils.data._utils import worker as torch_worker

if TYPE_CHECKING:
    from forebay.torch import DataLoader

_here = threading.local()
_patching = threading.Lock()


def _answer_worker_info_per_thread() -> None:
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


class _Outcome:
    """What a task came to: a batch, an exception, or the end of a worker's dataset."""

    __slots__ = ("data", "ended", "error")

    def __init__(self, data: Any = None, error: BaseException | None = None, ended: bool = False) -> None:
        self.data, self.error, self.ended = data, error, ended


class _Shared:
    """What the consumer and the threads share; threads hold nothing else, so that a dropped iterator ends them."""

    def __init__(self, queues: list[queue.SimpleQueue[tuple[int, Any] | None]]) -> None:
        self.queues = queues
        self.changed = threading.Condition()
        self.outcomes: dict[int, _Outcome] = {}
        self.stopped = False
        self.threads: list[threading.Thread] = []

    def put(self, number: int, outcome: _Outcome) -> None:
        with self.changed:
            if not self.stopped:
                self.outcomes[number] = outcome
                self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.outcomes.clear()
            self.changed.notify_all()
        for tasks in self.queues:
            tasks.put(None)


class ThreadIterator(torch_dataloader._BaseDataLoaderIter):
    """A pass over a dataset on ``num_workers`` threads, started at the first ``next()``.

    Map-style: threads share the dataset and take the next batch of indices. Iterable: each thread iterates its own shallow copy and
    batches are taken from them in turn, as torch does.
    """

    def __init__(self, loader: DataLoader) -> None:
        super().__init__(loader)
        _answer_worker_info_per_thread()
        self._iterable = self._dataset_kind == _DatasetKind.Iterable
        self._init_fn = loader.worker_init_fn
        self._in_order = loader.in_order
        self._window = self._num_workers * (loader.prefetch_factor or 2)
        tasks: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._shared = _Shared([queue.SimpleQueue() if self._iterable else tasks for _ in range(self._num_workers)])
        self._given = [0] * self._num_workers  # tasks given to each thread, where they have their own
        self._pending: set[int] = set()
        self._ended: set[int] = set()
        self._number = 0  # of the next task of map-style datasets
        self._front = 0  # number of the next batch in order
        self._stop = weakref.finalize(self, self._shared.stop)

    def _begin(self) -> None:
        shared = self._shared
        work: Callable[..., None] = _work
        for index in range(self._num_workers):
            dataset = copy.copy(self._dataset) if self._iterable else self._dataset
            known = getattr(torch_worker.WorkerInfo, "__dataclass_fields__", ())
            info = torch_worker.WorkerInfo(
                id=index,
                num_workers=self._num_workers,
                seed=self._base_seed + index,
                dataset=dataset,
                **({"worker_method": "thread"} if "worker_method" in known else {}),
            )

            def make(dataset: Any = dataset) -> Any:
                return _DatasetKind.create_fetcher(
                    self_kind, dataset, self_auto_collation, self_collate_fn, self_drop_last
                )

            # Locals, not attributes: a thread must not keep the iterator.
            self_kind, self_auto_collation = self._dataset_kind, self._auto_collation
            self_collate_fn, self_drop_last = self._collate_fn, self._drop_last
            thread = threading.Thread(
                target=work,
                args=(shared, shared.queues[index], info, self._init_fn, make, self._iterable),
                name=f"forebay-python-{index}",
                daemon=True,
            )
            shared.threads.append(thread)
            thread.start()
        for turn in range(self._window):
            self._give(turn % self._num_workers)

    def _give(self, worker: int) -> None:
        """Gives a worker its next task; map-style tasks are taken by whichever thread is free."""
        try:
            index = self._next_index()
        except StopIteration:
            return
        if self._iterable:
            number = worker + self._num_workers * self._given[worker]
            self._given[worker] += 1
        else:
            number = self._number
            self._number += 1
        self._pending.add(number)
        self._shared.queues[worker].put((number, index))

    def _skip_ended(self) -> None:
        while self._front % self._num_workers in self._ended and len(self._ended) < self._num_workers:
            self._front += 1

    def _ready(self) -> int | None:
        """Number of an outcome that can be delivered now."""
        outcomes = self._shared.outcomes
        if self._in_order:
            return self._front if self._front in outcomes else None
        return next(iter(outcomes), None)

    def _wait(self) -> _Outcome:
        shared = self._shared
        deadline = time.monotonic() + self._timeout if self._timeout > 0 else None
        with shared.changed:
            while (number := self._ready()) is None:
                if shared.stopped:
                    raise RuntimeError("this pass was closed")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds")
                shared.changed.wait(left)
            outcome = shared.outcomes.pop(number)
        self._pending.discard(number)
        worker = number % self._num_workers
        if outcome.ended:
            self._ended.add(worker)
            # What was given to it after its end will not be computed.
            self._pending = {other for other in self._pending if other % self._num_workers != worker}
        else:
            self._give(worker)
        self._front += 1
        return outcome

    def _next_data(self) -> Any:
        if not self._shared.threads:
            self._begin()
        while self._pending:
            if self._iterable and self._in_order:
                self._skip_ended()
            outcome = self._wait()
            if outcome.ended:
                continue
            if outcome.error is not None:
                try:
                    raise outcome.error
                finally:
                    del outcome
            data = outcome.data
            if self._pin_memory:
                data = _utils.pin_memory.pin_memory(data, self._pin_memory_device)
            return data
        self._stop()
        raise StopIteration

    def close(self) -> None:
        """Ends the pass and waits for its threads to finish what they are at."""
        self._stop()
        for thread in self._shared.threads:
            if thread is not threading.current_thread():
                thread.join()


def _work(
    shared: _Shared,
    tasks: queue.SimpleQueue[tuple[int, Any] | None],
    info: Any,
    init_fn: Callable[[int], None] | None,
    make_fetcher: Callable[[], Any],
    iterable: bool,
) -> None:
    _here.info = info
    fetcher: Any = None
    failed: BaseException | None = None
    try:
        if init_fn is not None:
            init_fn(info.id)
        fetcher = make_fetcher()
    except BaseException as error:
        failed = error
    while (task := tasks.get()) is not None and not shared.stopped:
        number, index = task
        try:
            if failed is not None:
                raise failed
            outcome = _Outcome(fetcher.fetch(index))
        except StopIteration as error:
            if iterable:
                shared.put(number, _Outcome(ended=True))
                return
            # Raised as it is, it would end the epoch without a word.
            wrapped = RuntimeError("the dataset raised StopIteration")
            wrapped.__cause__ = error
            outcome = _Outcome(error=wrapped)
        except BaseException as error:
            error.add_note(f"raised in worker thread {info.id} of {info.num_workers}")
            outcome = _Outcome(error=error)
        shared.put(number, outcome)
        del outcome, task, index
