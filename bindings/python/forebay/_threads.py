"""Worker threads for datasets written in Python: tasks are handed out, results are taken in order. Free of torch."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

#: A thread's set-up; returns what turns the index of a task into its result.
Begin = Callable[[], Callable[[Any], Any]]
Tasks = SimpleQueue[tuple[int, Any] | None]


class _Outcome:
    """What a task came to: a result, an exception, or the end of its worker's data."""

    __slots__ = ("error", "result", "worker_ended")

    def __init__(self, result: Any = None, error: BaseException | None = None, worker_ended: bool = False) -> None:
        self.result, self.error, self.worker_ended = result, error, worker_ended


class _Shared:
    """What the consumer and the threads share. Threads hold nothing else, so that dropping `Workers` ends them."""

    def __init__(self, queues: list[Tasks]) -> None:
        self.queues = queues
        self.changed = threading.Condition()
        self.outcomes: dict[int, _Outcome] = {}
        self.stopped = False

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


class Workers:
    """Threads over numbered tasks.

    `own_data`: each thread goes through data of its own and gets every `len(begins)`-th number, until its data raises
    ``StopIteration``; results come from them in turn. Otherwise the next task goes to whichever thread is free.
    At most `window` tasks are given and not delivered.
    """

    def __init__(self, begins: list[Begin], *, own_data: bool, window: int, in_order: bool, timeout_s: float) -> None:
        self._begins = begins
        self._own_data = own_data
        self._window = window
        self._in_order = in_order
        self._timeout_s = timeout_s
        shared_queue: Tasks = SimpleQueue()
        self._shared = _Shared([SimpleQueue() if own_data else shared_queue for _ in begins])
        self._threads: list[threading.Thread] = []
        self._given = 0
        self._given_to = [0] * len(begins)
        self._pending: set[int] = set()
        self._ended: set[int] = set()
        self._front = 0
        self._stop = weakref.finalize(self, self._shared.stop)

    def next(self, next_index: Callable[[], Any]) -> Any:
        """The next result; raises ``StopIteration`` after the last, and what the task raised at the task's place.

        `next_index` is called here, in the consumer's thread, until it raises ``StopIteration``.
        """
        if not self._threads:
            self._start(next_index)
        while self._pending:
            outcome = self._take(next_index)
            if outcome.worker_ended:
                continue
            if outcome.error is None:
                return outcome.result
            try:
                raise outcome.error
            finally:
                del outcome  # it is in its own traceback
        self._stop()
        raise StopIteration

    def close(self) -> None:
        """Ends the threads and waits for what they are at."""
        self._stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _start(self, next_index: Callable[[], Any]) -> None:
        for worker, begin in enumerate(self._begins):
            thread = threading.Thread(
                target=_work,
                args=(self._shared, self._shared.queues[worker], begin, self._own_data),
                name=f"forebay-python-{worker}",
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()
        for turn in range(self._window):
            self._give(turn % len(self._begins), next_index)

    def _give(self, worker: int, next_index: Callable[[], Any]) -> None:
        try:
            index = next_index()
        except StopIteration:
            return
        number = self._given_to[worker] * len(self._begins) + worker if self._own_data else self._given
        self._given += 1
        self._given_to[worker] += 1
        self._pending.add(number)
        self._shared.queues[worker].put((number, index))

    def _ready(self) -> int | None:
        """Number of an outcome that can be delivered now."""
        outcomes = self._shared.outcomes
        if not self._in_order:
            return next(iter(outcomes), None)
        return self._front if self._front in outcomes else None

    def _take(self, next_index: Callable[[], Any]) -> _Outcome:
        count, shared = len(self._begins), self._shared
        while self._in_order and self._front % count in self._ended:
            self._front += 1
        deadline = time.monotonic() + self._timeout_s if self._timeout_s > 0 else None
        with shared.changed:
            while (number := self._ready()) is None:
                if shared.stopped:
                    raise RuntimeError("this pass was closed")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise RuntimeError(f"DataLoader timed out after {self._timeout_s} seconds")
                shared.changed.wait(left)
            outcome = shared.outcomes.pop(number)
        self._pending.discard(number)
        self._front = max(self._front, number + 1)
        if outcome.worker_ended:
            self._ended.add(number % count)
            # What it was given beyond its end will not be computed.
            self._pending = {other for other in self._pending if other % count != number % count}
        else:
            self._give(number % count, next_index)
        return outcome


def _work(shared: _Shared, tasks: Tasks, begin: Begin, own_data: bool) -> None:
    work: Callable[[Any], Any] | None = None
    failed: BaseException | None = None
    try:
        work = begin()
    except BaseException as error:
        failed = error
    while (task := tasks.get()) is not None and not shared.stopped:
        number, index = task
        try:
            if work is None:
                assert failed is not None
                raise failed
            outcome = _Outcome(work(index))
        except StopIteration as error:
            if own_data and failed is None:
                shared.put(number, _Outcome(worker_ended=True))
                return
            # Raised as it is, it would end the epoch without a word.
            told = RuntimeError("the dataset raised StopIteration")
            told.__cause__ = error
            outcome = _Outcome(error=told)
        except BaseException as error:
            error.add_note(f"raised in thread {threading.current_thread().name}")
            outcome = _Outcome(error=error)
        shared.put(number, outcome)
        del outcome, task, index
