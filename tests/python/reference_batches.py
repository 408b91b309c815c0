"""All batches of an epoch in plain Python: every layout, every column, every format.

Takes the rows of each shard as dicts of lists. Lays out the place of each token instead of the
token, so that each column is looked up at the places of its tokens. It shares no code with the Rust
core, nor with the formats of the package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

from reference_documents import arrays, batch, chunk_order, columns, laid_out, window_starts
from reference_formats import expected
from reference_layout import LayoutSettings
from reference_order import block_order, global_order

MASKS = ("loss_mask", "completion_mask", "assistant_masks")
#: Columns whose value belongs to the target at its place.
OF_TARGETS = ("labels", *MASKS, "weights", "loss_weights")


class Where(NamedTuple):
    """A place in a document. The special ids are at place -1, and at the end."""

    document: int  # among the documents of the corpus that are not empty
    place: int


@dataclass(frozen=True)
class BatchSettings:
    """Settings of a batch, under the names that the loader gives them."""

    layout: LayoutSettings
    fields: tuple[str, ...] = ()
    boundaries: bool = False
    packed_by: str = "none"
    bos_id: int | None = None
    eos_id: int | None = None
    batch_size: int = 1
    shuffle: str = "off"
    seed: int = 0
    chunk_tokens: int = 4 << 20
    window_tokens: int = 16 << 20
    lanes: int = 8
    remainder: str = "drop"
    pad_id: int = 0
    document_mask: bool = False
    sample_ids: bool = False
    batch_format: str | None = None

    def padding(self, name: str) -> Any:
        return {"labels": self.layout.ignore_index, "weights": 0.0, "loss_weights": 0.0}.get(name, 0)

    def special(self, name: str) -> Any:
        return 1 if name == "attention_mask" else self.padding(name)


Shards = list[list[dict[str, Any]]]


def per_document(shards: Shards, name: str) -> bool:
    return not isinstance(shards[0][0][name], list)


def places_of(shards: Shards, s: BatchSettings) -> Any:
    """The documents of each shard, with the place of each token."""
    number, found = 0, []
    for shard in shards:
        documents = []
        for row in shard:
            length = len(row["input_ids"])
            if length:
                places = range(-(s.bos_id is not None), length + (s.eos_id is not None))
                documents.append([Where(number, place) for place in places])
                number += 1
        found.append(documents)
    return SimpleNamespace(shards=found)


def all_rows(shards: Shards, s: BatchSettings) -> tuple[list[Any], int, list[int]]:
    """Every row as cuts of places, the number of full rows, and the first row of each window."""
    corpus = places_of(shards, s)
    rows: list[Any] = laid_out(corpus, s.layout)
    full = len(rows)
    if s.packed_by != "none":
        whole = [row for shard in shards for row in shard if row["input_ids"]]
        rows = [cut_inside(row, whole) for row in rows]
    if s.layout.layout != "concat":
        return rows, full, window_starts(corpus, s.layout)
    stream = [at for shard in corpus.shards for document in shard for at in document]
    rest = stream[full * s.layout.seq_len :]
    if s.remainder == "pad" and len(rest) > s.layout.capacity - s.layout.seq_len:
        row: list[Any] = []
        for place, at in enumerate(rest):
            if not row or at.document != row[-1][1][-1].document:
                row.append((place, []))
            row[-1][1].append(at)
        rows.append(row)
    return rows, full, []


def cut_inside(row: Any, whole: list[dict[str, Any]]) -> Any:
    """The one stretch of a row, cut where `seq_lengths` of its document says."""
    [(first, places)] = row
    ends = set(accumulate(whole[places[0].document]["seq_lengths"]))
    cuts: list[Any] = []
    for at, where in enumerate(places, first):
        if not cuts or where.place in ends:
            cuts.append((at, []))
        cuts[-1][1].append(where)
    return cuts


def order_of(full: int, starts: list[int], s: BatchSettings) -> list[int]:
    if s.shuffle == "off":
        return list(range(full))
    if s.shuffle == "global":
        return global_order(full, seed=s.seed, epoch=0)
    shape: dict[str, Any] = {"seed": s.seed, "epoch": 0, "seq_len": s.layout.seq_len}
    shape |= {"chunk_tokens": s.chunk_tokens, "window_tokens": s.window_tokens, "lanes": s.lanes}
    if s.layout.layout in ("pack", "pad"):
        return chunk_order(full, starts, **shape)
    return block_order(full, **shape)


def values_of(whole: list[dict[str, Any]], name: str, where: Where, s: BatchSettings) -> Any:
    """The value of a column at a place, special ids included."""
    values = whole[where.document][name]
    if 0 <= where.place < len(values):
        return values[where.place]
    if name == "input_ids":
        return s.bos_id if where.place < 0 else s.eos_id
    return s.special(name)


def row_arrays(row: Any, whole: list[dict[str, Any]], s: BatchSettings, of_documents: list[str]) -> dict[str, Any]:
    """The arrays of one row without a format."""
    layout = s.layout
    lead = layout.capacity - layout.seq_len
    tokens = [(at, [values_of(whole, "input_ids", where, s) for where in cut]) for at, cut in row]
    made = arrays(tokens, layout, s.pad_id, s.boundaries)
    for name in s.fields:
        if name in of_documents:
            numbers: list[int | None] = [cut[0].document for at, cut in row if at < layout.seq_len]
            numbers += [None] * (len(made["starts"]) - len(numbers))
            made[name] = [None if number is None else whole[number][name] for number in numbers]
            continue
        is_target = name in OF_TARGETS
        values = [s.padding(name)] * layout.capacity
        for at, cut in row:
            for place, where in enumerate(cut, at):
                is_first = s.boundaries and is_target and place == at
                values[place] = s.padding(name) if is_first else values_of(whole, name, where, s)
        made["y" if lead and name == "labels" else name] = values[lead:] if is_target else values[: layout.seq_len]
    return made


def mask_of(row: dict[str, Any], columns: int) -> list[list[list[bool]]]:
    """Which places each place may attend to: itself and earlier ones of its stretch."""
    stretch = [sum(start <= at for start in row["starts"]) for at in range(columns)]
    seen = range(columns)
    return [[[stretch[at] == stretch[other] and other <= at for other in seen] for at in seen]]


def batches(shards: Shards, s: BatchSettings) -> list[tuple[dict[str, Any], list[list[int]]]]:
    """The batches of an epoch without a format, and the places that hold a token."""
    whole = [row for shard in shards for row in shard if row["input_ids"]]
    of_documents = [name for name in s.fields if per_document(shards, name)]
    rows, full, starts = all_rows(shards, s)
    order: list[int | None] = [*order_of(full, starts, s), *range(full, len(rows))]
    size = s.batch_size
    if s.remainder == "pad":
        order += [None] * (-len(order) % size)
    found = []
    for at in range(0, len(order) - size + 1, size):
        numbers = order[at : at + size]
        chosen = [[] if number is None else rows[number] for number in numbers]
        shape = replace(s, layout=replace(s.layout, seq_len=columns(chosen, s.layout)))
        places = shape.layout.seq_len
        made = [row_arrays(row, whole, shape, of_documents) for row in chosen]
        masks = [mask_of(row, places) for row in made] if s.document_mask else None
        joined = {name: [value for row in made for value in row.pop(name)] for name in of_documents}
        whole_batch = batch(made, places) | joined
        if masks is not None:
            whole_batch["document_mask"] = masks
        if s.sample_ids:
            whole_batch["source"] = [-1 if number is None else 0 for number in numbers]
            whole_batch["sample_index"] = [-1 if number is None else number for number in numbers]
        for name in of_documents:
            if not isinstance(next(row[name] for row in whole if row[name] is not None), str):
                whole_batch[f"{name}_is_null"] = [value is None for value in whole_batch[name]]
                whole_batch[name] = [value or 0 for value in whole_batch[name]]
        held = [{place for start, cut in row for place in range(start, start + len(cut))} for row in chosen]
        found.append((whole_batch, [[int(place in row) for place in range(places)] for row in held]))
    return found


def formatted(shards: Shards, s: BatchSettings) -> list[Any]:
    """The batches of an epoch in the format that is asked for."""
    layout = s.layout
    if s.batch_format is None:
        return [made for made, _ in batches(shards, s)]
    shape: dict[str, Any] = {"layout": layout.layout, "ignore_index": layout.ignore_index, "fields": s.fields}
    shape["packed"] = s.packed_by != "none"
    return [expected(s.batch_format, made, real, **shape) for made, real in batches(shards, s)]
