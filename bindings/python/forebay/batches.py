"""Types of batches, for type checkers.

A batch is a plain dict or a pair. ``Loader`` and ``forebay.torch.DataLoader`` choose the type by
``batch_format`` and ``targets``. The types have the columns of ``KnownField``. With other columns
in ``fields``, a batch of NumPy arrays is a ``dict[str, Any]``, because their names are the user's.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
#: Ids are int64, or int32 on request.
Ids = npt.NDArray[np.signedinteger[Any]]
#: Columns that are recognised by name.
KnownField = Literal[
    "labels",
    "loss_mask",
    "completion_mask",
    "assistant_masks",
    "attention_mask",
    "position_ids",
    "weights",
    "loss_weights",
]


class _Boundaries(TypedDict):
    position_ids: NotRequired[Int64s]
    doc_ids: NotRequired[Int32s]
    cu_seqlens: NotRequired[Int32s]
    max_seqlen: NotRequired[int]
    document_mask: NotRequired[npt.NDArray[np.bool_]]


class _Masks(TypedDict):
    loss_mask: NotRequired[npt.NDArray[Any]]
    completion_mask: NotRequired[npt.NDArray[Any]]
    assistant_masks: NotRequired[npt.NDArray[Any]]
    attention_mask: NotRequired[Int64s]


class _Weights(TypedDict):
    weights: NotRequired[npt.NDArray[np.float32]]
    loss_weights: NotRequired[npt.NDArray[np.float32]]


class _Places(TypedDict):
    source: NotRequired[Int64s]
    sample_index: NotRequired[Int64s]


class Batch(_Boundaries, _Places, _Masks, _Weights):
    """A batch without a format, with labels at the places of their tokens."""

    input_ids: Ids
    labels: Int64s


class ShiftedBatch(_Boundaries, _Places, _Masks, _Weights):
    """A batch without a format, with ``targets="shifted"``."""

    x: Ids
    y: Int64s


class HfBatch(_Places, _Weights):
    """``batch_format="hf"``."""

    input_ids: Ids
    labels: Int64s
    attention_mask: NotRequired[Int64s]
    position_ids: NotRequired[Int64s]
    document_mask: NotRequired[npt.NDArray[np.bool_]]


class HfPackedBatch(_Places, _Weights):
    """``batch_format="hf-packed"``."""

    input_ids: Ids
    labels: Int64s
    position_ids: Int64s
    cu_seq_lens_q: Int32s
    cu_seq_lens_k: Int32s
    max_length_q: int
    max_length_k: int
    seq_idx: Int32s


class TitanInputs(TypedDict):
    """The inputs of ``batch_format="titan"``. A batch is a pair of these and the labels."""

    input: Ids
    positions: Int64s


class MegatronBatch(_Places):
    """``batch_format="megatron"``."""

    tokens: Int64s
    labels: Int64s
    loss_mask: npt.NDArray[np.float32]
    position_ids: Int64s
    cu_seqlens: NotRequired[Int32s]
    cu_seqlens_padded: NotRequired[Int32s]
    max_seqlen: NotRequired[Int32s]
    attention_mask: NotRequired[npt.NDArray[np.bool_]]


class OlmoBatch(_Weights):
    """``batch_format="olmo"``."""

    input_ids: Ids
    label_mask: npt.NDArray[np.bool_]
    labels: NotRequired[Int64s]
    document_mask: NotRequired[npt.NDArray[np.bool_]]
    doc_lens: NotRequired[Int32s]
    max_doc_lens: NotRequired[list[int]]
    index: NotRequired[Int64s]
    source: NotRequired[Int64s]


class JaxBatch(_Places, _Weights):
    """``batch_format="jax"``."""

    inputs: Int32s
    inputs_position: Int32s
    inputs_segmentation: Int32s
    targets: Int32s
    targets_position: Int32s
    targets_segmentation: Int32s
    document_mask: NotRequired[npt.NDArray[np.bool_]]


TitanBatch = tuple[TitanInputs, Int64s]
XyBatch = tuple[Ids, Int64s]
