"""Puts the batches of a pass into memory of the caller, such as torch's page-locked memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from forebay import _core
from forebay._transform import Taken
from forebay.torch.tensors import Tensors


def pinned(nbytes: int) -> torch.Tensor:
    # torch's own allocator reuses a block only after the copies from it have ended. No other memory
    # has this protection.
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


class Memory:
    """Buffers for the batches of a pass, one for each batch.

    A buffer is kept until its batch is handed over.
    """

    def __init__(self, core: _core.Batches, allocate: Callable[[int], torch.Tensor]) -> None:
        self._core = core
        self._allocate = allocate
        self._lock = threading.RLock()
        #: Buffers that are submitted and not handed over yet, by address.
        self._buffers: dict[int, torch.Tensor] = {}
        self._takers = 0
        self._ended = False

    def take(self, limit_s: float | None) -> Taken | None:
        """Returns the next batch, or None at the end."""
        with self._lock:
            # Steps that can fail come before a batch is taken. A failure after that would lose the
            # batch.
            while not self._ended and len(self._buffers) <= self._core.buffers_wanted + self._takers:
                self._submit()
            self._takers += 1
        try:
            batch = self._core.next(limit_s)
            if batch is None:
                self._ended = True
                return None
            buffer = self._buffers.pop(batch.address)
            return Taken(batch.epoch, batch.step, views(buffer, batch))
        finally:
            with self._lock:
                self._takers -= 1
                self._let_go()

    def end(self) -> None:
        """Releases the buffers that no batch will use."""
        with self._lock:
            self._ended = True
            self._let_go()

    def _submit(self) -> None:
        buffer = self._allocate(self._core.batch_bytes)
        address = buffer.data_ptr()
        # The buffer is noted first: another taker may receive it as soon as it is submitted.
        self._buffers[address] = buffer
        try:
            self._core.submit(address, buffer.nbytes, buffer)
        except BaseException:
            del self._buffers[address]
            raise

    def _let_go(self) -> None:
        # Another taker may hold a batch and look for its buffer.
        if self._ended and self._takers == 0:
            self._buffers.clear()


def views(buffer: torch.Tensor, batch: _core.Batch) -> Tensors:
    """Returns the arrays of a batch as views of `buffer`."""
    tensors: dict[str, Any] = {field[0]: view(buffer, *field[1:]) for field in batch.layout()}
    tensors.update((name, torch.utils.dlpack.from_dlpack(array)) for name, array in batch.beside())
    tensors.update(batch.facts() or {})
    return tensors


def view(buffer: torch.Tensor, dtype: str, offset: int, shape: list[int]) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    nbytes = math.prod(shape) * kind.itemsize
    return buffer[offset : offset + nbytes].view(kind).view(shape)
