"""Types of batches of tensors, for type checkers.

All other batches are a ``dict[str, torch.Tensor]``.
"""

from __future__ import annotations

from typing import NotRequired, Protocol, Self, TypedDict, TypeVar

import torch

Tensors = dict[str, torch.Tensor]
T_co = TypeVar("T_co", covariant=True)


class Pass(Protocol[T_co]):
    """A pass of a loader."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> T_co: ...
    def __len__(self) -> int: ...
    def close(self) -> None:
        """Ends the pass and its threads."""


class HfPackedTensors(TypedDict):
    """``batch_format="hf-packed"``."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    seq_idx: torch.Tensor
    weights: NotRequired[torch.Tensor]
    loss_weights: NotRequired[torch.Tensor]
    source: NotRequired[torch.Tensor]
    sample_index: NotRequired[torch.Tensor]


class OlmoTensors(TypedDict):
    """``batch_format="olmo"``."""

    input_ids: torch.Tensor
    label_mask: torch.Tensor
    labels: NotRequired[torch.Tensor]
    doc_lens: NotRequired[torch.Tensor]
    max_doc_lens: NotRequired[list[int]]
    document_mask: NotRequired[torch.Tensor]
    index: NotRequired[torch.Tensor]
    weights: NotRequired[torch.Tensor]
    loss_weights: NotRequired[torch.Tensor]
    source: NotRequired[torch.Tensor]


TitanTensors = tuple[Tensors, torch.Tensor]
XyTensors = tuple[torch.Tensor, torch.Tensor]
