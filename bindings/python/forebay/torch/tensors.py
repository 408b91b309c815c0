"""Batches as tensors."""

from __future__ import annotations

import torch
import torch.utils.dlpack

from forebay import _core

Tensors = dict[str, torch.Tensor]


def _native_tensors() -> _core.Tensors | None:
    """Gives torch's own way of making tensors from C, which exists since torch 2.10."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return None if exchange is None else _core.Tensors.by(exchange)


NATIVE = _native_tensors()


def tensors_of(batch: _core.Batch) -> Tensors:
    if NATIVE is not None:
        return batch.tensors(NATIVE)
    return {name: torch.utils.dlpack.from_dlpack(array) for name, array in batch.fields()}
