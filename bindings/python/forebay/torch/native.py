"""Passes of a native loader: forebay's threads compute the batches, which become tensors."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch._C._autograd import _profiler_enabled
from torch.utils.data import IterableDataset
from torch.utils.data._utils import worker as torch_worker

from forebay import _core
from forebay._formats import Format, format_of
from forebay._loader import Loader, finite
from forebay._transform import Taken, Transformed, transformed
from forebay.torch.dataset import TokenDataset
from forebay.torch.device import Ahead
from forebay.torch.pinned import Memory, views
from forebay.torch.tensors import NATIVE, Tensors, Torch, row_of, tensors_of

#: Makes the copier of a new pass to the device from the function that takes its next batch. None
#: means host memory.
AheadOf = Callable[[Callable[[float | None], Any]], Ahead | None]


class Native:
    """A loader of tokens, and the facts that its passes need beside it."""

    def __init__(
        self, loader: Loader[Any], allocator: Callable[[int], torch.Tensor] | None, limit_s: float | None, sampler: Any
    ) -> None:
        self.loader = loader
        self.allocator = allocator
        self.limit_s = limit_s
        self.format = format_of(loader.config, Torch())
        self._sampler = sampler
        self._sampler_epoch = getattr(sampler, "epoch", None)

    def follow_sampler(self) -> None:
        """Goes to the epoch that the sampler was told."""
        epoch = getattr(self._sampler, "epoch", None)
        # Only a change of the epoch counts. A sampler that was never told an epoch must not undo a
        # restored one.
        if epoch is not None and epoch != self._sampler_epoch:
            self._sampler_epoch = epoch
            self.loader.set_epoch(epoch)

    def take_part(self, part: _core.Parts) -> Any:
        """Returns the next rows of a consumer of the split loader, or None at the end."""
        if self.allocator is not None:
            # Steps that can fail come before a batch is taken.
            for _ in range(part.buffers_missing()):
                buffer = self.allocator(part.batch_bytes())
                part.submit(buffer.data_ptr(), buffer.nbytes, buffer)
        try:
            batch = part.next(self.limit_s)
        except TimeoutError as error:
            raise RuntimeError(f"DataLoader timed out after {self.limit_s} seconds: {error}") from None
        if batch is None:
            return None
        buffer = batch.owner
        tensors = tensors_of(batch) if buffer is None else views(buffer, batch)
        made = tensors if self.format is None else self.format(tensors)
        transform = self.loader._transform
        # A consumer of a part has a thread of its own already.
        return made if transform is None else transformed(transform, Taken(batch.epoch, batch.step, made))

    def close(self) -> None:
        """Stops every pass. Batches that were handed over stay valid."""
        self.loader.close()


class Rows(IterableDataset[Tensors]):
    """The ``dataset`` of a native loader. It gives the rows one by one.

    Trainers that skip rows batch them again. Such a trainer must tell the loader the epoch. Hugging
    Face's Trainer does not do so when it resumes within a later epoch. The ``on_epoch_begin`` of a
    callback can call ``train_dataloader.set_epoch(int(state.epoch))``.
    """

    def __init__(self, loader: Loader[Any], tokens: TokenDataset) -> None:
        self._loader = loader
        #: The dataset that was given to the loader.
        self.tokens = tokens

    def __len__(self) -> int:
        """Returns the number of full sequences of an epoch, over all ranks."""
        return self._loader.num_sequences

    def __getitem__(self, index: int) -> Tensors:
        return self.tokens[index]

    def __iter__(self) -> Iterator[Tensors]:
        """Gives the rows of this rank, in a new pass of the loader."""
        if torch_worker.get_worker_info() is not None:
            raise RuntimeError("each worker would read all rows: give that DataLoader the TokenDataset itself")
        core = self._loader._open_core().iter(external=False)
        while (batch := core.next()) is not None:
            tensors = tensors_of(batch)
            for row in range(batch.rows):
                yield row_of(tensors, row)

    def set_epoch(self, epoch: int) -> None:
        """Lets the next pass begin this epoch.

        A restored position of this epoch stays in force until a pass has continued it.
        """
        self._loader.set_epoch(epoch)


def _made_here(core: _core.Batches, limit_s: float | None) -> Taken | None:
    batch = core.next(limit_s)
    return None if batch is None else Taken(batch.epoch, batch.step, tensors_of(batch))


def _formatted(
    take: Callable[[float | None], Taken | None], form: Format | None, limit_s: float | None = None
) -> Taken | None:
    found = take(limit_s)
    return found if found is None or form is None else found._replace(batch=form(found.batch))


def _with_step(take: Callable[[float | None], Taken | None], limit_s: float | None) -> tuple[int, Any] | None:
    found = take(limit_s)
    return None if found is None else (found.step, found.batch)


class NativeIterator:
    """A pass of a native loader. Several threads may take batches from it."""

    def __init__(self, native: Native, owner: Any, ahead_of: AheadOf) -> None:
        self._native = native
        self._owner = owner
        core = native.loader._open_core()
        self._core = core.iter(external=native.allocator is not None)
        self._steps = core.len
        self._memory = None if native.allocator is None else Memory(self._core, native.allocator)
        take = functools.partial(_made_here, self._core) if self._memory is None else self._memory.take
        take = functools.partial(_formatted, take, native.format)
        #: Returns step and tensors of the next batch in host memory, or None at the end.
        self._take_on_host: Callable[[float | None], tuple[int, Any] | None] = functools.partial(_with_step, take)
        self._transformed: Transformed | None = None
        if native.loader._transform is not None:
            self._transformed = native.loader._transformed(take, self._core)
            self._take_on_host = self._transformed.take
        elif self._memory is None and native.format is None and NATIVE is not None:
            self._take_on_host = functools.partial(self._core.next_tensors, NATIVE)
        self._ahead = ahead_of(self._take_on_host)
        self._take = self._take_on_host if self._ahead is None else self._ahead.take
        self._lock = threading.RLock()
        self._begun = False
        self._gradient_state: Any = None

    def __iter__(self) -> Self:
        return self

    def __len__(self) -> int:
        return finite(self._steps)

    def _begin(self) -> None:
        with self._lock:
            if self._begun:
                return
            owner = self._owner
            self._native.follow_sampler()
            # Accelerate counts gradient accumulation by the loaders that are being iterated.
            accelerate = sys.modules.get("accelerate.state")
            if accelerate is not None:
                owner.end_of_dataloader = False
                self._gradient_state = accelerate.GradientState()
                self._gradient_state._add_dataloader(owner)
            self._begun = True

    def __next__(self) -> Any:
        # The label costs as much as handing over a small batch. It is made only for an active
        # profiler.
        if not _profiler_enabled():
            return self._next()
        with torch.autograd.profiler.record_function("enumerate(DataLoader)#NativeIterator.__next__"):
            return self._next()

    def _next(self) -> Any:
        if not self._begun:
            self._begin()
        limit_s = self._native.limit_s
        try:
            found = self._take(limit_s)
        except TimeoutError:
            raise RuntimeError(f"DataLoader timed out after {limit_s} seconds") from None
        except BaseException:
            self._leave()
            raise
        if found is None:
            self._leave()
            raise StopIteration
        step, tensors = found
        if step + 1 == self._steps:
            self._owner.end_of_dataloader = True
        return tensors

    def _leave(self) -> None:
        with self._lock:
            state, self._gradient_state = self._gradient_state, None
        if state is not None:
            state._remove_dataloader(self._owner)

    def close(self) -> None:
        """Ends the pass and its threads."""
        self._leave()
        self._core.close()
        if self._transformed is not None:
            self._transformed.close()
        if self._ahead is not None:
            self._ahead.close()
        if self._memory is not None:
            self._memory.end()

    def __del__(self) -> None:
        if getattr(self, "_gradient_state", None) is not None:
            self._leave()
