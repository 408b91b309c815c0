"""The formats of batches in plain Python: what each trainer takes, made of lists.

A batch of the default form is the input. Each function is short enough to be read as the
specification.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

MASKS = ("loss_mask", "completion_mask", "assistant_masks")
FORMATS = ("hf", "hf-packed", "titan", "megatron", "olmo", "xy", "jax")
SHIFTED = ("titan", "megatron", "xy", "jax")
#: Arrays of a batch that every format replaces or leaves out. All others are kept.
KNOWN = (
    "input_ids", "labels", "x", "y", *MASKS, "weights", "attention_mask", "position_ids", "doc_ids", "cu_seqlens",
    "max_seqlen",
)  # fmt: skip


def ahead(row: list[Any], last: Any) -> list[Any]:
    return [*row[1:], last]


def masked(batch: dict[str, Any], targets: str, ignore_index: int) -> list[list[int]]:
    """Targets, with `ignore_index` where a mask is 0."""
    rows = [list(row) for row in batch[targets]]
    for name in MASKS:
        for row, mask in zip(rows, batch.get(name, []), strict=False):
            row[:] = [value if kept else ignore_index for value, kept in zip(row, mask, strict=True)]
    return rows


def documents_of(batch: dict[str, Any], rows: int, columns: int) -> list[list[int]]:
    """The lengths of the stretches of each row."""
    starts = sorted(set(batch["cu_seqlens"]) | {row * columns for row in range(rows + 1)})
    lengths: list[list[int]] = [[] for _ in range(rows)]
    for start, end in pairwise(starts):
        lengths[start // columns].append(end - start)
    return lengths


def joined(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def flipped(value: Any) -> Any:
    return [flipped(part) for part in value] if isinstance(value, list) else not value


def expected(
    name: str,
    batch: dict[str, Any],
    real: list[list[int]],
    *,
    layout: str,
    ignore_index: int,
    packed: bool = False,
    fields: tuple[str, ...] = (),
) -> Any:
    """The batch in format `name`. `real` says which places hold a token.

    `packed` says that rows of the files hold several documents. `fields` names the columns of the
    corpus.
    """
    inputs, targets = ("x", "y") if "x" in batch else ("input_ids", "labels")
    ids, labels = batch[inputs], masked(batch, targets, ignore_index)
    weights = batch.get("weights")
    if name in SHIFTED and inputs == "input_ids":
        labels = [ahead(row, ignore_index) for row in labels]
        weights = weights and [ahead(row, 0.0) for row in weights]
    rows, columns = len(ids), len(ids[0])
    positions = batch.get("position_ids", [list(range(columns)) for _ in range(rows)])
    has_borders = "cu_seqlens" in batch
    kept = {field: value for field, value in batch.items() if field not in KNOWN}
    if weights and name != "megatron":
        kept["weights"] = weights
    is_target = [[label != ignore_index for label in row] for row in labels]
    zeroed = [[label if label != ignore_index else 0 for label in row] for row in labels]
    if name == "hf":
        holds_one_each = layout == "pad" and not packed
        finds_by_positions = has_borders or (layout == "rows" and "position_ids" in fields)
        more = {"position_ids": positions}
        if holds_one_each or not finds_by_positions:
            more = {"attention_mask": real} | ({"position_ids": positions} if "position_ids" in fields else {})
        return {"input_ids": ids, "labels": labels, **more, **kept}
    if name == "hf-packed":
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, **kept}
        flat = {key: [joined(rows)] if isinstance(rows[0], list) else rows for key, rows in arrays.items()}
        borders, longest = batch["cu_seqlens"], batch["max_seqlen"]
        lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        number = [at for at, (start, end) in enumerate(pairwise(borders)) for _ in range(start, end)]
        return {**flat, **lengths, "max_length_q": longest, "max_length_k": longest, "seq_idx": [number]}
    if name == "titan":
        return {"input": joined(ids), "positions": joined(positions)}, joined(labels)
    if name == "xy":
        return ids, labels
    if name == "megatron":
        weighed = weights or [[1.0] * columns for _ in range(rows)]
        loss = [[w * t for w, t in zip(*pair, strict=True)] for pair in zip(weighed, is_target, strict=True)]
        made = {"tokens": ids, "labels": zeroed, "loss_mask": loss, "position_ids": positions, **kept}
        if has_borders:
            lengths = documents_of(batch, rows, columns)
            width = max(map(len, lengths)) + 1
            borders = [[sum(row[:at]) for at in range(width)] for row in lengths]
            longest = [max(row) for row in lengths]
            made |= {"cu_seqlens": borders, "cu_seqlens_padded": borders, "max_seqlen": longest}
        if "document_mask" in made:
            made["attention_mask"] = flipped(made.pop("document_mask"))
        return made
    if name == "olmo":
        made = {"input_ids": ids, "label_mask": is_target, **kept}
        if "labels" in fields:
            made["labels"] = [ahead(row, ignore_index) for row in labels]
        if "sample_index" in made:
            made["index"] = made.pop("sample_index")
        if has_borders:
            lengths = documents_of(batch, rows, columns)
            width = max(map(len, lengths))
            made["doc_lens"] = [row + [0] * (width - len(row)) for row in lengths]
            made["max_doc_lens"] = [max(row) for row in lengths]
        return made
    assert name == "jax"
    segments = [[number + 1 for number in row] for row in batch["doc_ids"]] if has_borders else real
    return {
        "inputs": ids,
        "inputs_position": positions,
        "inputs_segmentation": segments,
        "targets": zeroed,
        "targets_position": positions,
        "targets_segmentation": [
            [number * t for number, t in zip(*pair, strict=True)] for pair in zip(segments, is_target, strict=True)
        ],
        **kept,
    }


#: Types of the arrays of each format. Any other array has the type that it has without a format.
DTYPES: dict[str, dict[str, str]] = {
    "hf": {"input_ids": "int64", "labels": "int64", "attention_mask": "int64", "position_ids": "int64"},
    "hf-packed": {
        "input_ids": "int64", "labels": "int64", "position_ids": "int64", "cu_seq_lens_q": "int32",
        "cu_seq_lens_k": "int32", "seq_idx": "int32",
    },
    "megatron": {
        "tokens": "int64", "labels": "int64", "loss_mask": "float32", "position_ids": "int64", "cu_seqlens": "int32",
        "cu_seqlens_padded": "int32", "max_seqlen": "int32",
    },
    "olmo": {"input_ids": "int64", "labels": "int64", "label_mask": "bool", "doc_lens": "int32", "index": "int64"},
    "titan": {"input": "int64", "positions": "int64"},
    "xy": {},
    "jax": {
        name: "int32"
        for name in (
            "inputs", "inputs_position", "inputs_segmentation", "targets", "targets_position", "targets_segmentation",
        )
    },
}  # fmt: skip
