"""The keywords of ``forebay.torch.DataLoader``, for type checkers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import Sampler

from forebay._keywords import DataLoaderKeywords


class TorchKeywords(DataLoaderKeywords, total=False):
    """All keywords that do not decide the type of its batches."""

    sampler: Sampler[Any] | Iterable[Any] | None
    num_workers: int
    pin_memory: bool
    drop_last: bool
    timeout: float
    worker_init_fn: Callable[[int], None] | None
    generator: torch.Generator | None
    prefetch_factor: int | None
    persistent_workers: bool
    pin_memory_device: str
    in_order: bool
    mesh: Any
    device: str | torch.device | None
    device_prefetch: int
