"""Batches as tensors."""

from __future__ import annotations

from typing import Any

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
    tensors: dict[str, Any] = {name: torch.utils.dlpack.from_dlpack(array) for name, array in batch.fields()}
    tensors.update(batch.facts() or {})
    return tensors


class Torch:
    """Operations on tensors, as a ``Library`` of formats."""

    def cast(self, array: torch.Tensor, dtype: str) -> torch.Tensor:
        return array.to(getattr(torch, dtype))

    def positions(self, like: torch.Tensor) -> torch.Tensor:
        return torch.arange(like.shape[1], device=like.device).repeat(like.shape[0], 1)

    def fill(self, array: torch.Tensor, where: torch.Tensor, value: int) -> None:
        array.masked_fill_(where, value)

    def copy(self, array: torch.Tensor) -> torch.Tensor:
        return array.clone()

    def to_host(self, array: torch.Tensor) -> Any:
        return array.numpy()

    def of_host(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array)


def row_of(batch: Tensors, row: int) -> Tensors:
    """Returns the arrays of one row. Facts about the whole batch are left out."""
    rows: Any = {name: array for name, array in batch.items() if name not in ("cu_seqlens", "max_seqlen")}
    inputs = next(iter(batch.values()))
    if "cu_seqlens" not in batch:
        return {name: array[row] for name, array in rows.items()}
    # Values of documents have no row of their own: the row has those of its stretches.
    starts = batch["cu_seqlens"][:-1]
    first, last = (int((starts < place * inputs.shape[1]).sum()) for place in (row, row + 1))
    is_of_row = {
        name: isinstance(array, torch.Tensor) and array.shape[:2] == inputs.shape for name, array in rows.items()
    }
    return {name: array[row] if is_of_row[name] else array[first:last] for name, array in rows.items()}
