"""Runs a function of the user on batches, on Python threads between the loader and its consumer.

Each thread takes the next batch, runs the function, and puts the result to its number. The consumer
gets the results in order. No thread of the core ever runs Python. The module does not import torch.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple

from forebay._errors import ClosedError

#: Takes a batch of the loader's form, or of the trainer's, and returns another.
Transform = Callable[[Any], Any]


class Taken(NamedTuple):
    """A batch that was taken from the core."""

    epoch: int
    step: int
    batch: Any


class Outcome(NamedTuple):
    """The end of one batch: its result, or an error."""

    step: int
    result: Any
    #: Position of the loader after the batch.
    state: Any
    error: BaseException | None
    traceback: TracebackType | None


def default_threads(num_threads: int) -> int:
    """Returns how many threads run a transform if the user does not say it.

    With a global lock, more threads than one only help functions that release it.
    """
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    return 1 if has_lock else max(num_threads, 1)


def transformed(transform: Transform, taken: Taken) -> Any:
    """Returns the result of the function. Its exception gets a note with the batch's position."""
    try:
        result = transform(taken.batch)
        if result is None:
            raise TypeError("`transform` returned None: return the batch")
        return result
    except BaseException as error:
        raised = error
        if isinstance(error, StopIteration):
            # It would end the epoch silently.
            raised = RuntimeError("`transform` raised StopIteration")
            raised.__cause__ = error
        # Some exceptions refuse notes.
        with contextlib.suppress(BaseException):
            raised.add_note(f"raised by `transform`, for the batch of epoch {taken.epoch}, step {taken.step}")
        if raised is error:
            raise
        raise raised from error


_EXIT_LIMIT_S = 5.0


@atexit.register
def _end_all() -> None:
    """Stops and joins the threads.

    A thread that is in the core at the end would abort the process.
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

    Threads hold nothing else, so that dropping the pass ends them. The consumer changes containers
    by single operations, which are atomic on every build. Only the threads take `turn`.
    """

    def __init__(
        self,
        take: Callable[[], Taken | None],
        transform: Transform,
        state: Callable[[], Any],
        close: Callable[[], None],
        window: int,
    ) -> None:
        self._take, self._transform, self._state, self._close = take, transform, state, close
        #: The thread that holds it takes the next batch.
        self.turn = threading.Lock()
        self.taken = 0
        #: One entry for each batch that may be taken. None ends a thread.
        self.room: SimpleQueue[int | None] = SimpleQueue()
        for _ in range(window):
            self.room.put(1)
        self.outcomes: dict[int, Outcome] = {}
        #: Gets an entry at every change.
        self.changed: SimpleQueue[None] = SimpleQueue()
        #: Number of batches of the pass, once its end was seen.
        self.end: int | None = None
        self.stopped = False
        self.threads: list[threading.Thread] = []
        _live.add(self)

    def run(self) -> None:
        while self.room.get() is not None and not self.stopped:
            with self.turn:
                if self.end is not None or self.stopped:
                    return
                number = self.taken
                try:
                    found = self._take()
                    state = None if found is None else self._state()
                except BaseException as error:
                    self._put(number, Outcome(0, None, None, error, error.__traceback__))
                    self._ended(number + 1)
                    return
                if found is None:
                    self._ended(number)
                    return
                self.taken += 1
            self._put(number, self._transformed(found, state))
            del found, state

    def _transformed(self, found: Taken, state: Any) -> Outcome:
        try:
            return Outcome(found.step, transformed(self._transform, found), state, None, None)
        except BaseException as error:
            return Outcome(found.step, None, None, error, error.__traceback__)

    def _put(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        if self.stopped:
            self.outcomes.clear()
        self.changed.put(None)

    def _ended(self, end: int) -> None:
        self.end = end
        self.changed.put(None)
        for _ in self.threads:
            self.room.put(None)

    def stop(self) -> None:
        """Ends the threads, each after its present batch."""
        self.stopped = True
        self.outcomes.clear()
        self.changed.put(None)
        for _ in self.threads:
            self.room.put(None)
        self._close()


_live: weakref.WeakSet[_Shared] = weakref.WeakSet()


class Transformed:
    """A pass whose batches go through a function. Several threads may take batches from it.

    Parameters
    ----------
    take:
        Returns the next batch of the core, or None at the end.
    state:
        Returns the position after the batches that were taken.
    close:
        Ends the pass of the core. It may be called several times.
    begins:
        Is called with the position at the start of the pass, before anything is taken.
    handed:
        Is called with the position after each batch that is handed over.
    failed:
        Is called once, when an error of the function is raised.
    """

    def __init__(
        self,
        take: Callable[[], Taken | None],
        transform: Transform,
        threads: int,
        *,
        state: Callable[[], Any],
        close: Callable[[], None],
        begins: Callable[[Any], None],
        handed: Callable[[Any], None],
        failed: Callable[[], None],
    ) -> None:
        self._shared = _Shared(take, transform, state, close, window=threads + 1)
        self._count = threads
        self._state, self._begins, self._handed, self._failed = state, begins, handed, failed
        self._lock = threading.RLock()
        self._front = 0
        self._error: Outcome | None = None
        self._process = os.getpid()
        self._stop = weakref.finalize(self, self._shared.stop)
        # `_end_all` stops it, and waits for the threads.
        self._stop.atexit = False

    def take(self, limit_s: float | None = None) -> tuple[int, Any] | None:
        """Waits for the next batch, and returns its step and the batch. Returns None at the end.

        Raises TimeoutError, which loses no batch. Raises the errors of the loader and of the
        function at the batch that they belong to, and at every later call.
        """
        if os.getpid() != self._process:
            raise ClosedError("this pass belongs to the process that began it: begin a new one after a fork")
        deadline = None if limit_s is None else time.monotonic() + limit_s
        with self._lock:
            if self._error is None:
                self._start()
                found = self._wait(deadline)
                if found is None:
                    return None
                if found.error is None:
                    self._shared.outcomes.pop(self._front, None)
                    with contextlib.suppress(Empty):
                        self._shared.changed.get_nowait()
                    self._front += 1
                    self._handed(found.state)
                    self._shared.room.put(1)
                    return found.step, found.result
                self._error = found
                self._shared.stop()
                self._failed()
            error = self._error.error
            assert error is not None
            raise error.with_traceback(self._error.traceback)

    def close(self) -> None:
        """Ends the threads, and waits until they finish their present batch."""
        self._shared.stop()
        if os.getpid() != self._process:
            return
        for thread in self._shared.threads:
            if thread is not threading.current_thread():
                thread.join()

    def _start(self) -> None:
        shared = self._shared
        if not shared.threads and not shared.stopped:
            self._begins(self._state())
        while len(shared.threads) < self._count and not shared.stopped:
            thread = threading.Thread(
                target=contextvars.copy_context().run,
                args=(shared.run,),
                name=f"forebay-transform-{len(shared.threads)}",
                daemon=True,
            )
            shared.threads.append(thread)
            thread.start()

    def _wait(self, deadline: float | None) -> Outcome | None:
        shared = self._shared
        while True:
            found = shared.outcomes.get(self._front)
            if found is not None:
                return found
            if shared.end is not None and self._front >= shared.end:
                return None
            if shared.stopped:
                raise ClosedError("the pass was closed")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("no batch was ready in time")
            with contextlib.suppress(Empty):
                shared.changed.get(timeout=left)
