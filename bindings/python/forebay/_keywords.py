"""The settings that each loader takes as keywords, for type checkers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

import numpy.typing as npt

from forebay._loader import Skip


class LoaderKeywords(TypedDict, total=False):
    """Keywords of ``Loader`` that do not decide the type of its batches."""

    # settings: types, from `make generate`
    mixture: Mapping[str, Any] | str | None
    format: Literal["auto", "parquet", "arrow", "npy", "llm.c", "megatron", "datatrove", "raw"] | None
    token_column: str | None
    bin_dtype: npt.DTypeLike | None
    vocab_size: int | None
    document_end_id: int | None
    seq_len: int | None
    ignore_index: int | None
    bos_id: int | None
    eos_id: int | None
    layout: Literal["concat", "pack", "pad", "rows"] | None
    phase: Literal["fixed", "epoch"] | None
    boundaries: bool | None
    packed_by: Literal["none", "seq_lengths", "seq_start_id", "position_ids"] | None
    overflow: Literal["split", "truncate", "drop"] | None
    max_docs_per_row: int | None
    pack_align: int | None
    bucket: int | None
    shuffle: bool | Literal["global", "block"] | None
    seed: int | None
    chunk_tokens: int | None
    window_tokens: int | None
    lanes: int | None
    holdout: int | None
    split: Literal["train", "holdout"] | None
    skip: Skip | None
    extend: bool | None
    batch_size: int | None
    dp_rank: int | None
    dp_world_size: int | None
    model_parallel_size: int | None
    epochs: int | Literal["endless"] | None
    max_steps: int | None
    remainder: Literal["drop", "pad", "wrap", "short"] | None
    balance: Literal["off", "ranks"] | None
    pad_id: int | None
    pad_to_multiple: int | None
    cu_seqlens_width: int | None
    document_mask: bool | None
    input_dtype: npt.DTypeLike | None
    sample_ids: bool | None
    num_threads: int | None
    cpu_affinity: str | Iterable[int] | None
    thread_priority: int | None
    prefetch_batches: int | None
    transform_threads: int | None
    memory_budget: int | None
    block_tokens: int | None
    io: Literal["auto", "mmap", "pread"] | None
    on_error: Literal["raise", "retry", "substitute"] | None
    max_substitutions: int | None
    index_dir: str | os.PathLike[str] | None
    cache_dir: str | os.PathLike[str] | None
    cache_bytes: int | None
    storage_endpoint: str | None
    storage_region: str | None
    storage_anonymous: bool | None
    storage_timeout: int | None
    storage_requests: int | None
    service: str | Iterable[str] | None
    service_timeout: int | None
    service_fallback: bool | None
    pin_memory: bool | None
    delivery_log: str | os.PathLike[str] | None
    # settings: end


class DataLoaderKeywords(TypedDict, total=False):
    """Keywords of ``forebay.torch.DataLoader`` that do not decide the type of its batches."""

    # settings: torch types, from `make generate`
    vocab_size: int | None
    seed: int | None
    chunk_tokens: int | None
    window_tokens: int | None
    lanes: int | None
    skip: Skip | None
    extend: bool | None
    dp_rank: int | None
    dp_world_size: int | None
    model_parallel_size: int | None
    epochs: int | Literal["endless"] | None
    max_steps: int | None
    remainder: Literal["drop", "pad", "wrap", "short"] | None
    balance: Literal["off", "ranks"] | None
    pad_id: int | None
    sample_ids: bool | None
    num_threads: int | None
    cpu_affinity: str | Iterable[int] | None
    thread_priority: int | None
    prefetch_batches: int | None
    transform_threads: int | None
    memory_budget: int | None
    block_tokens: int | None
    io: Literal["auto", "mmap", "pread"] | None
    on_error: Literal["raise", "retry", "substitute"] | None
    max_substitutions: int | None
    index_dir: str | os.PathLike[str] | None
    cache_dir: str | os.PathLike[str] | None
    cache_bytes: int | None
    storage_endpoint: str | None
    storage_region: str | None
    storage_anonymous: bool | None
    storage_timeout: int | None
    storage_requests: int | None
    service: str | Iterable[str] | None
    service_timeout: int | None
    service_fallback: bool | None
    delivery_log: str | os.PathLike[str] | None
    # settings: end
