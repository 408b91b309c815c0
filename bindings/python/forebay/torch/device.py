"""Copies batches to a device, on a stream of their own, a given number of batches ahead.

This is a private part of forebay.torch. Host memory is released only after the event of its copy. A
batch is handed over when the next work on the caller's stream waits for the copy. Only `Cuda` knows
CUDA, so that tests can replace it by a slow device.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils import _pytree


class Event(Protocol):
    """The end of a copy."""

    def query(self) -> bool:
        """Tells whether the copy has ended."""

    def synchronize(self) -> None:
        """Waits for the end of the copy."""


class Link(Protocol):
    """The way to one device."""

    def copy(self, block: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """Begins to copy `block`, which stays alive and unchanged until the event."""

    def order(self, block: torch.Tensor, event: Event) -> None:
        """Lets later work on the caller's stream wait for the event.

        Keeps the memory of `block` until that work has ended.
        """


class Cuda:
    """A CUDA device, with a stream that only copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, block: torch.Tensor) -> tuple[torch.Tensor, Event]:
        with torch.cuda.stream(self._stream):
            copied = torch.empty_like(block, device=self._device)
            copied.copy_(block, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return copied, event

    def order(self, block: torch.Tensor, event: Event) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)  # type: ignore[arg-type]
        # The block came from the memory of the copying stream. It may not go back before this
        # stream has finished with it.
        block.record_stream(stream)


class Handed:
    """The position after the batches that were handed over. Batches that are ahead do not count."""

    def __init__(self, state: Any) -> None:
        self.state = state


class Ahead:
    """Takes batches, copies them, and hands them over in order.

    Several threads may take batches.
    """

    def __init__(
        self,
        link: Link,
        take: Callable[[float | None], Any],
        state: Callable[[], Any],
        began: Callable[[Handed], None],
        ahead: int,
    ) -> None:
        self._link, self._take, self._state, self._began, self._ahead = link, take, state, began, ahead
        self._lock = threading.RLock()
        self._ready: deque[tuple[Any, list[tuple[torch.Tensor, Event]], Any] | Exception] = deque()
        #: Host memory that a copy may still read, in the order of the copies.
        self._reading: deque[tuple[Event, Any]] = deque()
        self._handed: Handed | None = None
        self._ended = False
        # If a pass is dropped in the middle, memory that a copy reads must not be freed.
        weakref.finalize(self, _wait, self._reading).atexit = False

    def take(self, limit_s: float | None) -> Any:
        """Returns the next batch, on the device, or None at the end.

        Raises errors of computing it.
        """
        with self._lock:
            if self._handed is None:
                self._handed = Handed(self._state())
                self._began(self._handed)
            self._let_go()
            if not self._ready and not self._ended:
                self._begin(limit_s)
            while self._ready and not self._ended and len(self._ready) <= self._ahead:
                try:
                    self._begin(0.0)
                except TimeoutError:
                    break  # not computed yet
                except Exception as error:
                    self._ready.append(error)
                    break
            if not self._ready:
                return None
            found = self._ready.popleft()
            if isinstance(found, Exception):
                raise found
            batch, copies, self._handed.state = found
            for block, event in copies:
                self._link.order(block, event)
            return batch

    def _begin(self, limit_s: float | None) -> None:
        batch = self._take(limit_s)
        if batch is None:
            self._ended = True
            return
        state = self._state()
        moved, copies, blocks = _moved(self._link, batch)
        self._reading.extend(zip((event for _, event in copies), blocks, strict=True))
        self._ready.append((moved, copies, state))

    def _let_go(self) -> None:
        while self._reading and self._reading[0][0].query():
            self._reading.popleft()

    def close(self) -> None:
        """Waits for the copies that were begun. Batches that were handed over stay valid."""
        with self._lock:
            self._ended = True
            self._ready.clear()
            _wait(self._reading)


def _wait(reading: deque[tuple[Event, Any]]) -> None:
    while reading:
        reading[0][0].synchronize()
        reading.popleft()


def _moved(link: Link, batch: Any) -> tuple[Any, list[tuple[torch.Tensor, Event]], list[torch.Tensor]]:
    """Moves the tensors of a batch to the device.

    Returns the batch, the copies that must end first, and the host memory that they read.
    """
    leaves, form = _pytree.tree_flatten(batch)
    used: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            used[storage.data_ptr()] = used.get(storage.data_ptr(), 0) + leaf.nbytes
    blocks: dict[int, torch.Tensor] = {}
    copies: list[tuple[torch.Tensor, Event]] = []
    sources: list[torch.Tensor] = []

    def copied(source: torch.Tensor) -> torch.Tensor:
        block, event = link.copy(source)
        copies.append((block, event))
        sources.append(source)
        return block

    def to_device(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.device.type != "cpu":
            return leaf
        storage = leaf.untyped_storage()
        # A small view of a large storage is copied alone. Tensors of one buffer are copied in one
        # piece.
        if leaf.layout != torch.strided or used[storage.data_ptr()] * 2 < storage.nbytes():
            return copied(leaf)
        key = storage.data_ptr()
        if key not in blocks:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            blocks[key] = copied(whole)
        block = blocks[key]
        empty = torch.empty(0, dtype=leaf.dtype, device=block.device)
        return empty.set_(block.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())

    return _pytree.tree_unflatten([to_device(leaf) for leaf in leaves], form), copies, sources
