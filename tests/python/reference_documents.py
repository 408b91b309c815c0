"""What every row has to be in the layouts that keep documents whole, and with boundaries.

Takes the documents of each shard, lays them out by `reference_layout.py`, and writes every array of
a row place by place. It shares no code with the Rust core.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from reference import documents, shards
from reference_layout import LayoutSettings, rows, windows
from reference_layout import pieces as pieces_of
from reference_order import derive, in_lanes, permute

Cut = tuple[int, list[int]]
"""A stretch of one document: its place in the row and its tokens."""


@dataclass
class Documents:
    """A corpus: the non-empty documents of each shard, with `bos_id` and `eos_id` around them."""

    data: Any
    bos_id: int | None = None
    eos_id: int | None = None
    bin_dtype: str | None = None
    document_end_id: int | None = None
    shards: list[list[list[int]]] = field(init=False)

    def __post_init__(self) -> None:
        before = [] if self.bos_id is None else [self.bos_id]
        after = [] if self.eos_id is None else [self.eos_id]
        self.shards = [
            [
                before + document + after
                for document in documents(path, bin_dtype=self.bin_dtype, document_end_id=self.document_end_id)
                if document
            ]
            for path in shards(self.data)
        ]


def laid_out(corpus: Documents, s: LayoutSettings) -> list[list[Cut]]:
    """Every row, in the order of the corpus."""
    lengths = [[len(document) for document in shard] for shard in corpus.shards]
    if s.layout == "concat":
        return joined(corpus, s)
    return [
        [(at.place, corpus.shards[at.shard][at.document][at.offset : at.offset + at.length]) for at in row]
        for row in rows(lengths, s)
    ]


def joined(corpus: Documents, s: LayoutSettings) -> list[list[Cut]]:
    """The full rows of the joined stream, each cut where documents begin."""
    stream = [
        (token, place == 0) for shard in corpus.shards for document in shard for place, token in enumerate(document)
    ]
    found: list[list[Cut]] = []
    for start in range(0, len(stream) - s.capacity + 1, s.seq_len):
        row: list[Cut] = []
        for place, (token, begins) in enumerate(stream[start : start + s.capacity]):
            if begins or not row:
                row.append((place, []))
            row[-1][1].append(token)
        found.append(row)
    return found


def arrays(row: list[Cut], s: LayoutSettings, pad_id: int, boundaries: bool) -> dict[str, Any]:
    """The arrays of one row."""
    lead = s.capacity - s.seq_len
    tokens, firsts = [pad_id] * s.capacity, set()
    labels, numbers, positions = [s.ignore_index] * s.capacity, [-1] * s.capacity, [0] * s.capacity
    for number, (place, cut) in enumerate(row):
        firsts.add(place)
        for at, token in enumerate(cut, place):
            tokens[at], numbers[at] = token, number
            labels[at] = s.ignore_index if boundaries and at == place else token
    # The padding at the end is a stretch of its own. Other padding belongs to the stretch before
    # it.
    end = max((place + len(cut) for place, cut in row), default=0)
    if end < s.capacity:
        firsts.add(end)
    for at in range(s.capacity):
        positions[at] = 0 if at in firsts or at == 0 else positions[at - 1] + 1
    found = {"x" if lead else "input_ids": tokens[: s.seq_len], "y" if lead else "labels": labels[lead:]}
    if boundaries:
        found |= {"position_ids": positions[: s.seq_len], "doc_ids": numbers[: s.seq_len]}
        found["starts"] = sorted(at for at in firsts | {0} if at < s.seq_len)
    return found


def columns(rows: list[list[Cut]], s: LayoutSettings) -> int:
    """Number of places of each row of a batch."""
    if s.pad_to_multiple is None:
        return s.seq_len
    longest = max((place + len(cut) for row in rows for place, cut in row), default=0)
    return min(-(-max(1, longest) // s.pad_to_multiple) * s.pad_to_multiple, s.seq_len)


def batch_of(rows: list[list[Cut]], s: LayoutSettings, pad_id: int, boundaries: bool) -> dict[str, Any]:
    """The arrays of a batch of rows."""
    s = replace(s, seq_len=columns(rows, s))
    return batch([arrays(row, s, pad_id, boundaries) for row in rows], s.seq_len)


def batch(rows: list[dict[str, Any]], seq_len: int) -> dict[str, Any]:
    """The arrays of a batch of rows, with the borders of all of them in one list."""
    found: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0] if name != "starts"}
    if "starts" in rows[0]:
        borders = [at * seq_len + start for at, row in enumerate(rows) for start in row["starts"]]
        found["cu_seqlens"] = [*borders, len(rows) * seq_len]
        pairs = zip(found["cu_seqlens"], found["cu_seqlens"][1:], strict=False)
        found["max_seqlen"] = max(after - before for before, after in pairs)
    return found


def window_starts(corpus: Documents, s: LayoutSettings) -> list[int]:
    """The first row of each window."""
    starts, count = [], 0
    lengths = [[len(document) for document in shard] for shard in corpus.shards]
    for shard in lengths:
        for window in windows(pieces_of(shard, s)):
            # A window alone has the rows that it has among the others.
            sizes = [[piece.length for piece in window]]
            if window:
                starts.append(count)
                count += len(rows(sizes, s))
    return starts


def chunk_order(
    n: int, starts: list[int], *, seed: int, epoch: int, seq_len: int, chunk_tokens: int, window_tokens: int, lanes: int
) -> list[int]:
    """Row at each of `n` positions: runs of whole windows are permuted, then rows inside windows of
    each lane.
    """
    if n == 0:
        return []
    chunk = max(1, chunk_tokens // seq_len)
    chunks: list[list[int]] = []
    for begin, end in zip(starts, [*starts[1:], n], strict=True):
        if not chunks or len(chunks[-1]) >= chunk:
            chunks.append([])
        chunks[-1] += range(begin, end)
    key = derive(seed, 1, epoch)
    listed = [row for slot in range(len(chunks)) for row in chunks[permute(derive(key, 3), len(chunks), slot)]]
    return in_lanes(listed, key, window_tokens // seq_len, lanes)
