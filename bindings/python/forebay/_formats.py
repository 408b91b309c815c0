"""Batches with the names, shapes and types that trainers take.

The core gives every batch in the same form. A ``Format`` makes the form of a trainer of it. Arrays
stay views of the batch's memory wherever names and shapes alone differ. The module does not import
torch: a ``Library`` knows NumPy or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from forebay._errors import ConfigError

Batch = dict[str, Any]

#: Columns that tell whether a token is a target.
MASKS = ("loss_mask", "completion_mask", "assistant_masks")
#: Columns that weigh targets.
WEIGHTS = ("weights", "loss_weights")


class Library(Protocol):
    """The operations on arrays of one library that differ between libraries."""

    def cast(self, array: Any, dtype: str) -> Any:
        """Returns the values as `dtype`: the array itself if it has this type already."""

    def positions(self, like: Any) -> Any:
        """Returns int64 numbers of the columns, in the shape of `like`."""

    def fill(self, array: Any, where: Any, value: int) -> None:
        """Writes `value` to the places `where`."""

    def copy(self, array: Any) -> Any:
        """Returns a copy."""

    def to_host(self, array: Any) -> Any:
        """Returns the array as a NumPy array that shares its memory."""

    def of_host(self, array: Any) -> Any:
        """Returns a NumPy array as an array of this library that shares its memory."""


class NumPy:
    """NumPy as a ``Library``."""

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(dtype, copy=False)

    def positions(self, like: Any) -> Any:
        return np.tile(np.arange(like.shape[1]), (like.shape[0], 1))

    def fill(self, array: Any, where: Any, value: int) -> None:
        array[where] = value

    def copy(self, array: Any) -> Any:
        return array.copy()

    def to_host(self, array: Any) -> Any:
        return array

    def of_host(self, array: Any) -> Any:
        return array


class Format:
    """Makes batches of one trainer from batches of the core.

    It takes over the batch, and may write to its arrays. Raises ConfigError if a column has the
    name of an array that the trainer expects.
    """

    def __init__(self, name: str, config: Mapping[str, Any], library: Library) -> None:
        self._library = library
        self._ignore_index: int = config["ignore_index"]
        self._has_labels = "labels" in config["fields"]
        layout, has_positions = config["layout"], "position_ids" in config["fields"]
        holds_one_each = layout == "pad" and config["packed_by"] == "none"
        #: Whether rows hold one document each, as far as the batch tells.
        self._is_plain = holds_one_each or not (config["boundaries"] or (layout == "rows" and has_positions))
        #: Arrays that models of transformers take for one another.
        self._unused = {"attention_mask", "position_ids"} - {"attention_mask" if self._is_plain else "position_ids"}
        if self._is_plain and has_positions:
            self._unused = set()
        make, own = _FORMATS[name]
        self._make: Callable[[Format, Batch], Any] = make
        for column in config["fields"]:
            if column in own or column in _BOUNDARIES:
                raise ConfigError(
                    f"`batch_format` = {name} has an array `{column}` of its own: leave that column out of `fields`, "
                    "or choose another format"
                )

    def __call__(self, batch: Batch) -> Any:
        return self._make(self, batch)

    def _inputs_and_targets(self, batch: Batch, *, ahead: bool) -> tuple[Any, Any]:
        """Takes both out of the batch, with masks applied. `ahead` asks for shifted targets."""
        is_shifted = "y" in batch
        inputs, targets = (batch.pop(name) for name in (("x", "y") if is_shifted else ("input_ids", "labels")))
        for name in MASKS:
            if name in batch:
                self._library.fill(targets, batch.pop(name) == 0, self._ignore_index)
        if ahead and not is_shifted:
            targets = self._one_ahead(targets, self._ignore_index)
            for name in WEIGHTS:
                if name in batch:
                    batch[name] = self._one_ahead(batch[name], 0)
        return inputs, targets

    def _one_ahead(self, array: Any, last: int) -> Any:
        moved = self._library.copy(array)
        moved[:, :-1] = array[:, 1:]
        moved[:, -1] = last
        return moved

    def _positions(self, batch: Batch, like: Any) -> Any:
        found = batch.pop("position_ids", None)
        return self._library.positions(like) if found is None else found

    def _borders(self, batch: Batch, like: Any) -> Any:
        """Takes `cu_seqlens` out of the batch, and returns the borders of each row.

        They are an int32 matrix of NumPy. Each row begins with 0, and ends with its length, which
        repeats.
        """
        rows, columns = like.shape
        starts = self._library.to_host(batch.pop("cu_seqlens"))
        starts = starts[starts < rows * columns]
        row = starts // columns
        first = np.searchsorted(row, np.arange(rows))
        place = np.arange(len(row)) - first[row]
        borders = np.full((rows, place.max(initial=0) + 2), columns, dtype=np.int32)
        borders[row, place] = starts - row * columns
        return borders

    def _hf(self, batch: Batch) -> Batch:
        ids, labels = self._inputs_and_targets(batch, ahead=False)
        for name in (*self._unused, "doc_ids", "cu_seqlens", "max_seqlen"):
            batch.pop(name, None)
        return {"input_ids": ids, "labels": labels} | batch

    def _hf_packed(self, batch: Batch) -> Batch:
        ids, labels = self._inputs_and_targets(batch, ahead=False)
        borders, longest = batch.pop("cu_seqlens"), batch.pop("max_seqlen")
        for name in ("attention_mask", "doc_ids"):
            batch.pop(name, None)
        made = {"input_ids": ids, "labels": labels, **batch}
        for name, array in made.items():
            if getattr(array, "ndim", 0) == 2:
                made[name] = array.reshape(1, -1)
        lengths = np.diff(self._library.to_host(borders))
        numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        return made | {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": self._library.of_host(numbers).reshape(1, -1),
        }

    def _titan(self, batch: Batch) -> tuple[Batch, Any]:
        inputs, labels = self._inputs_and_targets(batch, ahead=True)
        positions = self._positions(batch, inputs)
        return {"input": inputs.reshape(-1), "positions": positions.reshape(-1)}, labels.reshape(-1)

    def _megatron(self, batch: Batch) -> Batch:
        tokens, labels = self._inputs_and_targets(batch, ahead=True)
        is_target = labels != self._ignore_index
        self._library.fill(labels, ~is_target, 0)
        loss_mask = self._library.cast(is_target, "float32")
        for name in WEIGHTS:
            if name in batch:
                loss_mask = loss_mask * batch.pop(name)
        made = {
            "tokens": self._library.cast(tokens, "int64"),
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": self._positions(batch, tokens),
        }
        if "cu_seqlens" in batch:
            borders = self._borders(batch, tokens)
            made["cu_seqlens"] = self._library.of_host(borders)
            made["cu_seqlens_padded"] = made["cu_seqlens"]
            made["max_seqlen"] = self._library.of_host(np.diff(borders).max(axis=1))
        for name in ("attention_mask", "doc_ids", "max_seqlen"):
            batch.pop(name, None)
        if "document_mask" in batch:
            # The trainer's mask is true where a place may not attend.
            made["attention_mask"] = ~batch.pop("document_mask")
        return made | batch

    def _olmo(self, batch: Batch) -> Batch:
        ids, labels = self._inputs_and_targets(batch, ahead=False)
        made = {"input_ids": ids, "label_mask": labels != self._ignore_index}
        if self._has_labels:
            # The trainer makes labels of the ids only if the batch has none.
            made["labels"] = self._one_ahead(labels, self._ignore_index)
        if "cu_seqlens" in batch:
            lengths = np.diff(self._borders(batch, ids))
            made["doc_lens"] = self._library.of_host(lengths)
            made["max_doc_lens"] = lengths.max(axis=1).tolist()
        if "sample_index" in batch:
            made["index"] = batch.pop("sample_index")
        for name in ("attention_mask", "doc_ids", "max_seqlen", "position_ids"):
            batch.pop(name, None)
        return made | batch

    def _xy(self, batch: Batch) -> tuple[Any, Any]:
        return self._inputs_and_targets(batch, ahead=True)

    def _jax(self, batch: Batch) -> Batch:
        inputs, targets = self._inputs_and_targets(batch, ahead=True)
        cast = self._library.cast
        mask, documents = batch.pop("attention_mask", None), batch.pop("doc_ids", None)
        segments = cast(mask, "int32") if documents is None else documents + 1
        is_target = targets != self._ignore_index
        self._library.fill(targets, ~is_target, 0)
        positions = cast(self._positions(batch, inputs), "int32")
        for name in ("cu_seqlens", "max_seqlen"):
            batch.pop(name, None)
        return {
            "inputs": cast(inputs, "int32"),
            "inputs_position": positions,
            "inputs_segmentation": segments,
            "targets": cast(targets, "int32"),
            "targets_position": positions,
            "targets_segmentation": segments * is_target,
            **batch,
        }


#: Arrays of the core that every format reads.
_BOUNDARIES = ("doc_ids", "cu_seqlens", "max_seqlen", "document_mask")

#: How each format is made, and the names of its arrays that a column may not have.
_FORMATS: dict[str, tuple[Callable[[Format, Batch], Any], tuple[str, ...]]] = {
    "hf": (Format._hf, ()),
    "hf-packed": (
        Format._hf_packed,
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    ),
    "titan": (Format._titan, ()),
    "megatron": (Format._megatron, ("tokens", "cu_seqlens_padded")),
    "olmo": (Format._olmo, ("label_mask", "doc_lens", "max_doc_lens", "index")),
    "xy": (Format._xy, ()),
    "jax": (
        Format._jax,
        (
            "inputs", "inputs_position", "inputs_segmentation", "targets", "targets_position",
            "targets_segmentation",
        ),
    ),
}  # fmt: skip


def format_of(config: Mapping[str, Any], library: Library) -> Format | None:
    """Returns the format that the settings ask for. None leaves batches as they are."""
    name = config["batch_format"]
    return None if name is None else Format(name, config, library)
