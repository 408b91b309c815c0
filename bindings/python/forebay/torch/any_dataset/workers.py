"""Worker threads for datasets written in Python: tasks are handed out, results are taken in order. Free of torch."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

#: A thread's set-up; returns what turns the index of a task into its result.
Begin = Callable[[], Callable[[Any], Any]]
Tasks = SimpleQueue[tuple[int, Any] | None]


class Outcome:
    """What a task came to: a result, an exception, or the end of its worker's data."""

    __slots__ = ("error", "index", "result", "worker", "worker_ended")

    def __init__(
        self, index: Any, result: Any = None, error: BaseException | None = None, worker_ended: bool = False
    ) -> None:
        self.index, self.result, self.error, self.worker_ended = index, result, error, worker_ended
        #: Whose data it is of, where workers have data of their own.
        self.worker = -1


_starting = threading.Lock()
_EXIT_LIMIT_S = 5.0


@atexit.register
def _end_all() -> None:
    """Stops and awaits the threads: one that is still in C++ when the interpreter is taken down aborts the process."""
    with _starting:
        live = list(_live)
    for shared in live:
        shared.stop()
    deadline = time.monotonic() + _EXIT_LIMIT_S
    for thread in [thread for shared in live for thread in shared.threads]:
        thread.join(max(0.0, deadline - time.monotonic()))


class _Shared:
    """What the consumer and the threads share. Threads hold nothing else, so that dropping `Workers` ends them."""

    def __init__(self, queues: list[Tasks]) -> None:
        self.queues = queues
        self.changed = threading.Condition()
        self.outcomes: dict[int, Outcome] = {}
        self.begun = 0
        self.stopped = False
        #: Seconds that threads spent on tasks, and of these the seconds on a processor.
        self.busy_s = self.cpu_s = 0.0
        self.threads: list[threading.Thread] = []
        with _starting:
            _live.add(self)

    def note_begun(self) -> None:
        with self.changed:
            self.begun += 1
            self.changed.notify_all()

    def wait_begun(self, count: int, timeout_s: float) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.begun >= count or self.stopped, timeout_s or None):
                raise RuntimeError(f"DataLoader timed out after {timeout_s} seconds")

    def put(self, number: int, outcome: Outcome, busy_s: float = 0.0, cpu_s: float = 0.0) -> None:
        with self.changed:
            self.busy_s += busy_s
            self.cpu_s += cpu_s
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


_live: weakref.WeakSet[_Shared] = weakref.WeakSet()


class Workers:
    """Threads over numbered tasks.

    `own_data`: each thread goes through data of its own and gets every `len(begins)`-th number, until its data raises
    ``StopIteration``; results come from them in turn. Otherwise the next task goes to whichever thread is free.
    At most `window` tasks are given and not delivered. `done` and `ended` continue an earlier pass over own data: how
    many results each worker delivered there, and which of them came to their end. `together`: nothing is delivered
    before every thread is set up.
    """

    def __init__(
        self,
        begins: list[Begin],
        *,
        own_data: bool,
        window: int,
        in_order: bool,
        timeout_s: float,
        done: Sequence[int] = (),
        ended: Iterable[int] = (),
        together: bool = False,
    ) -> None:
        self._begins = begins
        self._own_data = own_data
        self._window = window
        self._in_order = in_order
        self._timeout_s = timeout_s
        shared_queue: Tasks = SimpleQueue()
        self._shared = _Shared([SimpleQueue() if own_data else shared_queue for _ in begins])
        self._threads: list[threading.Thread] = []
        self._given = 0
        self._given_to = list(done) or [0] * len(begins)
        self._first = list(self._given_to)
        self._pending: set[int] = set()
        self._ended: set[int] = set(ended)
        self._front = 0
        self._together = together
        self._started_s = self._waited_s = 0.0
        self._stop = weakref.finalize(self, self._shared.stop)

    @property
    def ended(self) -> list[int]:
        """Workers whose data came to its end."""
        return sorted(self._ended)

    def next(self, next_index: Callable[[], Any]) -> Outcome | None:
        """What the next task came to, None after the last.

        `next_index` is called here, in the consumer's thread, until it raises ``StopIteration``.
        """
        if not self._threads:
            self._start(next_index)
        while self._pending:
            outcome = self._take(next_index)
            if not outcome.worker_ended:
                return outcome
        self._stop()
        return None

    def ready(self) -> bool:
        """Whether `next` would not wait."""
        with self._shared.changed:
            return not self._pending or (bool(self._threads) and self._ready() is not None)

    def close(self) -> None:
        """Ends the threads and waits for what they are at."""
        self._stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def contention(self) -> tuple[float, float] | None:
        """Seconds of work and seconds gone by, if threads waited for the interpreter and the consumer for them.

        Then together they keep one processor busy, and take longer over their tasks than that, though not because
        other work has the processors.
        """
        gone_s = time.monotonic() - self._started_s
        with self._shared.changed:
            busy_s, cpu_s = self._shared.busy_s, self._shared.cpu_s
        if gone_s < 1 or len(self._begins) < 2 or self._waited_s < 0.5 * gone_s:
            return None
        if not (0.7 * gone_s < cpu_s < 1.2 * gone_s and busy_s > 1.6 * cpu_s):
            return None
        return (cpu_s, gone_s) if busy_s - _queued_s(self._threads) > 1.6 * cpu_s else None

    def _start(self, next_index: Callable[[], Any]) -> None:
        self._started_s = time.monotonic()
        for worker, begin in enumerate(self._begins):
            thread = threading.Thread(
                target=_work,
                args=(self._shared, self._shared.queues[worker], begin, self._own_data),
                name=f"forebay-python-{worker}",
                daemon=True,
            )
            self._threads.append(thread)
            self._shared.threads.append(thread)
            thread.start()
        if self._together:
            self._shared.wait_begun(len(self._begins), self._timeout_s)
        for turn in range(self._window):
            self._give(turn % len(self._begins), next_index)

    def _give(self, worker: int, next_index: Callable[[], Any]) -> None:
        if worker in self._ended:
            return
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
        outcomes, count = self._shared.outcomes, len(self._begins)
        if not self._in_order:
            return next(iter(outcomes), None)
        while self._own_data and (
            self._front % count in self._ended or self._front // count < self._first[self._front % count]
        ):
            self._front += 1
        return self._front if self._front in outcomes else None

    def _take(self, next_index: Callable[[], Any]) -> Outcome:
        count, shared = len(self._begins), self._shared
        start = time.monotonic()
        deadline = start + self._timeout_s if self._timeout_s > 0 else None
        with shared.changed:
            while (number := self._ready()) is None:
                if shared.stopped:
                    raise RuntimeError("this pass was closed")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise RuntimeError(f"DataLoader timed out after {self._timeout_s} seconds")
                shared.changed.wait(left)
            outcome = shared.outcomes.pop(number)
        self._waited_s += time.monotonic() - start
        if self._own_data:
            outcome.worker = number % count
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
    shared.note_begun()
    while (task := tasks.get()) is not None and not shared.stopped:
        number, index = task
        start, start_cpu = time.perf_counter(), time.thread_time()
        try:
            if work is None:
                assert failed is not None
                raise failed
            outcome = Outcome(index, work(index))
        except StopIteration as error:
            if own_data and failed is None:
                shared.put(number, Outcome(index, worker_ended=True))
                return
            outcome = Outcome(index, error=told_of_stop(error))
        except BaseException as error:
            error.add_note(f"raised in thread {threading.current_thread().name}")
            outcome = Outcome(index, error=error)
        shared.put(number, outcome, time.perf_counter() - start, time.thread_time() - start_cpu)
        del outcome, task, index


def _queued_s(threads: Iterable[threading.Thread]) -> float:
    """Seconds that threads were ready to run and had no processor; 0 where the system does not tell."""
    queued_ns = 0
    for thread in threads:
        with contextlib.suppress(OSError, ValueError, IndexError):
            queued_ns += int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[1])
    return queued_ns / 1e9


def told_of_stop(error: StopIteration) -> RuntimeError:
    """Raised as it is, a StopIteration of the dataset would end the epoch without a word."""
    told = RuntimeError("the dataset raised StopIteration")
    told.__cause__ = error
    return told
