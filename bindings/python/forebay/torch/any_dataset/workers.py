"""Runs numbered tasks on threads and gives their results in order. Knows nothing of torch.

The consumer looks at a result with `peek` and removes it with `done`. An interrupt may come between
any two lines, so that each step either has not happened yet or can be repeated. Tasks are noted
before they are sent. A task that is sent twice is done once. `put_back` undoes `done`.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol

#: Sets a thread up, and returns the function that turns the index of a task into its result.
Begin = Callable[[], Callable[[Any], Any]]
Tasks = SimpleQueue[tuple[int, Any] | None]


class Draw(Protocol):
    """Gives the indices of tasks, in the consumer's thread."""

    def __call__(self, at: int) -> Any:
        """Returns index `at`, from 0, any number of times. Raises StopIteration after the last."""


class Outcome:
    """The end of a task: a result, an exception, or the end of its worker's data."""

    __slots__ = ("error", "index", "is_setup", "number", "result", "traceback", "worker", "worker_ended")

    def __init__(
        self, index: Any, result: Any = None, error: BaseException | None = None, worker_ended: bool = False
    ) -> None:
        self.index, self.result, self.error, self.worker_ended = index, result, error, worker_ended
        #: The traceback as it was in the worker. Raising the error again lengthens its own
        #: traceback.
        self.traceback: TracebackType | None = None if error is None else error.__traceback__
        self.number = -1
        #: The worker whose data gave the result, if each worker has its own data.
        self.worker = 0
        #: Whether the set-up of the thread failed, so that it can do no task.
        self.is_setup = False

    def raised(self) -> BaseException:
        """Returns the error, ready to be raised again any number of times."""
        assert self.error is not None
        # ``with_traceback`` does not use ``__setattr__``, which some exceptions forbid.
        return self.error.with_traceback(self.traceback)


_EXIT_LIMIT_S = 5.0
_CLAIMS_KEPT = 1 << 16


@atexit.register
def _end_all() -> None:
    """Stops and joins the threads.

    If a thread is in C++ when the interpreter shuts down, it aborts the process.
    """
    live: list[_Shared] = []
    with contextlib.suppress(RuntimeError):  # another thread begins a pass
        live = list(_live)
    for shared in live:
        shared.stop()
    deadline = time.monotonic() + _EXIT_LIMIT_S
    for thread in [thread for shared in live for thread in shared.threads]:
        thread.join(max(0.0, deadline - time.monotonic()))


class _Shared:
    """The state that the consumer and the threads share.

    Threads hold nothing else, so that dropping `Workers` ends them. The consumer waits for
    `changed`, which gets an entry at every change. It takes no lock: an interrupt can come between
    taking a lock and the body of its ``with`` block, and the lock then stays taken. CPython 3.14
    checks for signals there, and ``threading.Condition`` is written in Python. So the consumer
    changes a container by single operations, which are atomic on every build. Only the threads of
    this module take `lock`. `stop` does not take it.
    """

    def __init__(self, queues: list[Tasks]) -> None:
        self.queues = queues
        self.lock = threading.Lock()
        self.changed: SimpleQueue[None] = SimpleQueue()
        self.outcomes: dict[int, Outcome] = {}
        self.begun = 0
        self.stopped = False
        #: The errors of failed set-ups, by worker.
        self.failed: dict[int, Outcome] = {}
        #: Name and error of a thread that ended too early.
        self.died: tuple[str, BaseException] | None = None
        #: Numbers that a thread took. Old numbers are forgotten.
        self.claimed: set[int] = set()
        #: Seconds that threads spent on tasks, and the part of them on a processor.
        self.busy_s = self.cpu_s = 0.0
        self.threads: list[threading.Thread] = []
        _live.add(self)

    def note_begun(self, failed: Outcome | None) -> None:
        with self.lock:
            self.begun += 1
            if failed is not None:
                self.failed[failed.worker] = failed
        self.changed.put(None)

    def claim(self, number: int) -> bool:
        """Claims a task, unless a thread has it.

        A task that is sent twice is sent twice in a row.
        """
        with self.lock:
            if number in self.claimed:
                return False
            self.claimed.add(number)
            if len(self.claimed) > _CLAIMS_KEPT:
                oldest = sorted(self.claimed)[: _CLAIMS_KEPT // 2]
                self.claimed.difference_update(oldest)
            return True

    def put(self, number: int, outcome: Outcome, busy_s: float = 0.0, cpu_s: float = 0.0) -> None:
        with self.lock:
            self.busy_s += busy_s
            self.cpu_s += cpu_s
        self.outcomes[number] = outcome
        if self.stopped:
            self.outcomes.clear()
        self.changed.put(None)

    def note_death(self, error: BaseException) -> None:
        self.died = self.died or (threading.current_thread().name, error)
        self.changed.put(None)

    def stop(self) -> None:
        self.stopped = True
        self.outcomes.clear()
        self.changed.put(None)
        for tasks in self.queues:
            tasks.put(None)


_live: weakref.WeakSet[_Shared] = weakref.WeakSet()


class Workers:
    """Threads for numbered tasks.

    With `own_data`, each thread reads its own data and gets every `len(begins)`-th number, until
    its data raises ``StopIteration``. Results come from the threads in turn. Otherwise the next
    free thread takes the next task. At most `window` tasks are given and not delivered.

    `done` and `ended` continue an earlier pass over own data. They give the number of results that
    each worker delivered there, and the workers whose data ended. With `together`, nothing is
    delivered before every thread is set up.
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
        self._process = os.getpid()
        self._given = self._drawn = 0
        self._given_to = list(done) or [0] * len(begins)
        self._first = list(self._given_to)
        #: Numbers that were given and not delivered.
        self._pending: dict[int, bool] = {}
        #: Tasks that were given, and may not be in a queue yet.
        self._unsent: dict[int, Any] = {}
        self._exhausted = False
        self._ended: set[int] = set(ended)
        self._front = 0
        self._together = together
        self._started_s = self._waited_s = 0.0
        self._stop = weakref.finalize(self, self._shared.stop)

    @property
    def ended(self) -> list[int]:
        """Returns the workers whose data has ended."""
        return sorted(self._ended)

    def peek(self, draw: Draw) -> Outcome | None:
        """Waits for the outcome to deliver next, or None after the last. It stays until `done`."""
        if os.getpid() != self._process:
            raise RuntimeError("this pass belongs to the process that began it: begin a new one after a fork")
        self._start()
        if self._together:
            self._wait_begun()
            if (failed := self._failed_setup()) is not None:
                return failed
        while True:
            self._fill(draw)
            if not self._is_pending():
                self._shared.stop()
                return None
            outcome = self._wait()
            if not outcome.worker_ended:
                return outcome
            self._ended.add(outcome.worker)
            self.done(outcome)

    def done(self, outcome: Outcome) -> None:
        """Removes a delivered outcome."""
        if outcome.is_setup:
            return
        number = outcome.number
        self._shared.outcomes.pop(number, None)
        if not self._shared.changed.empty():
            self._shared.changed.get_nowait()
        if number in self._pending:
            del self._pending[number]
        self._front = max(self._front, number + 1)

    def put_back(self, outcome: Outcome) -> None:
        """Undoes `done` if the outcome did not reach the consumer."""
        number = outcome.number
        if outcome.is_setup or self._shared.stopped:
            return
        self._shared.outcomes[number] = outcome
        self._pending[number] = True
        self._front = min(self._front, number)

    def ready(self) -> bool:
        """Tells whether `peek` would not wait."""
        return bool(self._threads) and (not self._is_pending() or self._ready() is not None)

    def close(self) -> None:
        """Ends the threads and waits until they finish their present tasks."""
        self._shared.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def contention(self) -> tuple[float, float] | None:
        """Returns seconds of work and elapsed seconds, if threads waited for the interpreter.

        The consumer must have waited for the threads, too. Together the threads then keep one
        processor busy. Their tasks take longer than that, but not because other work uses the
        processors.
        """
        gone_s = time.monotonic() - self._started_s
        busy_s, cpu_s = self._shared.busy_s, self._shared.cpu_s
        if gone_s < 1 or len(self._begins) < 2 or self._waited_s < 0.5 * gone_s:
            return None
        if not (0.7 * gone_s < cpu_s < 1.2 * gone_s and busy_s > 1.6 * cpu_s):
            return None
        return (cpu_s, gone_s) if busy_s - _queued_s(self._threads) > 1.6 * cpu_s else None

    @property
    def waited_s(self) -> float:
        """Seconds that the consumer waited."""
        return self._waited_s

    @property
    def busy_s(self) -> float:
        """Seconds that threads spent on tasks, all threads together."""
        return self._shared.busy_s

    def _start(self) -> None:
        while len(self._threads) < len(self._begins):
            self._started_s = self._started_s or time.monotonic()
            worker = len(self._threads)
            # The dataset's code finds the context variables of the thread that began the pass.
            thread = threading.Thread(
                target=contextvars.copy_context().run,
                args=(_run, self._shared, self._shared.queues[worker], self._begins[worker], self._own_data, worker),
                name=f"forebay-python-{worker}",
                daemon=True,
            )
            self._shared.threads.append(thread)
            thread.start()
            self._threads.append(thread)

    def _failed_setup(self) -> Outcome | None:
        """Returns the failed set-up that is due. Each worker of its own data fails in its turn."""
        failed = self._shared.failed
        if self._own_data and self._in_order and not self._together:
            return failed.get(self._front % len(self._begins))
        return failed[min(failed)] if failed else None

    def _fill(self, draw: Draw) -> None:
        """Gives tasks until the window is full. Indices are drawn in the order of the numbers."""
        count = len(self._begins)
        while not self._exhausted and len(self._pending) < self._window:
            worker = self._next_worker() if self._own_data else 0
            if worker is None:
                break
            number = self._given_to[worker] * count + worker if self._own_data else self._given
            try:
                index = draw(self._drawn)
            except StopIteration:
                self._exhausted = True
                break
            except Exception as error:
                # The error is kept at its number, so that earlier batches are delivered first.
                self._keep_failed_draw(number, worker, error)
                continue
            self._unsent[number] = (worker, index)
            self._note_given(number, worker, 1)
        while self._unsent:
            number = next(iter(self._unsent))
            worker, index = self._unsent[number]
            self._shared.queues[worker].put((number, index))
            del self._unsent[number]

    def _keep_failed_draw(self, number: int, worker: int, error: Exception) -> None:
        outcome = Outcome(None, error=error)
        outcome.number, outcome.worker = number, worker
        self._shared.outcomes[number] = outcome
        self._note_given(number, worker, 0)

    def _note_given(self, number: int, worker: int, drawn: int) -> None:
        # There must be no calls here, because interrupts come only at calls.
        self._pending[number] = True
        self._given += 1
        self._given_to[worker] += 1
        self._drawn += drawn

    def _next_worker(self) -> int | None:
        """Returns the worker with the fewest tasks of its own. None if each has its share."""
        count = len(self._begins)
        pending = [0] * count
        for number in self._pending:
            pending[number % count] += 1
        open_to = [worker for worker in range(count) if worker not in self._ended]
        worker = min(open_to, key=lambda worker: (pending[worker], self._given_to[worker], worker), default=None)
        return None if worker is None or pending[worker] >= max(self._window // count, 1) else worker

    def _is_pending(self) -> bool:
        # A worker with no more data computes none of the tasks beyond its end.
        if not self._own_data:
            return bool(self._pending)
        return any(number % len(self._begins) not in self._ended for number in self._pending)

    def _ready(self) -> int | None:
        """Returns the number of an outcome that can be delivered now."""
        outcomes, count = self._shared.outcomes, len(self._begins)
        if not self._in_order:
            return next(iter(list(outcomes)), None)
        while self._own_data and (
            self._front % count in self._ended or self._front // count < self._first[self._front % count]
        ):
            self._front += 1
        return self._front if self._front in outcomes else None

    def _wait_begun(self) -> None:
        shared, deadline = self._shared, self._deadline()
        while shared.begun < len(self._begins) and not shared.stopped and shared.died is None:
            self._wait_for_change(deadline)

    def _wait(self) -> Outcome:
        count, shared = len(self._begins), self._shared
        start, deadline = time.monotonic(), self._deadline()
        while True:
            number = self._ready()
            found = None if number is None else shared.outcomes.get(number)
            if found is not None and number is not None:
                break
            if (failed := self._failed_setup()) is not None:
                return failed
            if shared.stopped:
                raise RuntimeError("this pass was closed")
            if shared.died is not None:
                name, error = shared.died
                raise RuntimeError(f"thread {name} ended by {type(error).__name__}, with a task undone") from error
            self._wait_for_change(deadline)
        self._waited_s += time.monotonic() - start
        found.number = number
        if self._own_data:
            found.worker = number % count
        return found

    def _deadline(self) -> float | None:
        return time.monotonic() + self._timeout_s if self._timeout_s > 0 else None

    def _wait_for_change(self, deadline: float | None) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise _timed_out(self._timeout_s)
        with contextlib.suppress(Empty):
            self._shared.changed.get(timeout=left)


def _timed_out(timeout_s: float) -> RuntimeError:
    return RuntimeError(f"DataLoader timed out after {timeout_s} seconds")


def _run(shared: _Shared, tasks: Tasks, begin: Begin, own_data: bool, worker: int) -> None:
    try:
        _work(shared, tasks, begin, own_data, worker)
    except BaseException as error:
        # In whatever way a thread ends, the consumer must not wait for it.
        shared.note_death(error)


def _work(shared: _Shared, tasks: Tasks, begin: Begin, own_data: bool, worker: int) -> None:
    try:
        work = begin()
    except BaseException as error:
        outcome = Outcome(None, error=_noted(error))
        outcome.is_setup, outcome.worker = True, worker
        shared.note_begun(outcome)
        return
    shared.note_begun(None)
    while (task := tasks.get()) is not None and not shared.stopped:
        number, index = task
        if not shared.claim(number):
            continue
        start, start_cpu = time.perf_counter(), time.thread_time()
        try:
            outcome = Outcome(index, work(index))
        except StopIteration as error:
            if own_data:
                shared.put(number, Outcome(index, worker_ended=True))
                return
            outcome = Outcome(index, error=told_of_stop(error))
        except BaseException as error:
            outcome = Outcome(index, error=_noted(error))
        shared.put(number, outcome, time.perf_counter() - start, time.thread_time() - start_cpu)
        del outcome, task, index


def _noted(error: BaseException) -> BaseException:
    # A frozen dataclass refuses notes, and a `__setattr__` may raise anything.
    with contextlib.suppress(BaseException):
        error.add_note(f"raised in thread {threading.current_thread().name}")
    return error


def _queued_s(threads: Iterable[threading.Thread]) -> float:
    """Seconds that threads were ready to run without a processor. 0 if the system does not tell."""
    queued_ns = 0
    for thread in threads:
        with contextlib.suppress(OSError, ValueError, IndexError):
            queued_ns += int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[1])
    return queued_ns / 1e9


def told_of_stop(error: StopIteration) -> RuntimeError:
    """Makes an error in place of a StopIteration of the dataset.

    The StopIteration would end the epoch silently.
    """
    told = RuntimeError("the dataset raised StopIteration")
    told.__cause__ = error
    return told
