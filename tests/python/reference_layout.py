"""The layouts that keep documents whole, in plain Python.

The module takes the lengths of the non-empty documents of each shard. It gives the stretches of
documents in each row, and their places. It shares no code with the Rust core, and can be read as
the specification of `pack`, `pad` and `rows`. Lengths count `bos_id` and `eos_id` as tokens of
their document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from reference_order import derive

WINDOW_PIECES = 16_384
WINDOW_TOKENS = 4 << 20
HOLDOUT_KEY = 0x646F63756D656E74


@dataclass(frozen=True)
class LayoutSettings:
    """Settings that decide the content of rows, with the loader's names."""

    layout: str = "pack"
    seq_len: int = 2048
    targets: str = "labels"
    ignore_index: int = -100
    overflow: str = "split"
    max_docs_per_row: int | None = None
    pack_align: int = 1
    pad_to_multiple: int | None = None
    bucket: int | None = None
    holdout: int | None = None
    split: str = "train"

    @property
    def capacity(self) -> int:
        """Number of tokens of a row. With shifted targets, the last token is only a target."""
        return self.seq_len + (self.targets == "shifted")

    @property
    def smallest(self) -> int:
        """Least number of places that a piece takes.

        With shifted targets, its first token must be an input.
        """
        return 2 if self.targets == "shifted" else 1


class Piece(NamedTuple):
    """A stretch of one document that fits into a row."""

    document: int  # among the non-empty documents of the shard
    offset: int  # in the document
    length: int


class Segment(NamedTuple):
    """A piece at a place in a row."""

    shard: int
    document: int
    offset: int
    length: int
    place: int


Row = list[Segment]


def pieces(lengths: list[int], s: LayoutSettings) -> list[Piece]:
    """The documents of a shard, cut where they are longer than a row."""
    found = []
    for document, length in enumerate(lengths):
        if length <= s.capacity or s.overflow == "split":
            offsets = range(0, length, s.capacity)
            found += [Piece(document, at, min(s.capacity, length - at)) for at in offsets]
        elif s.overflow == "truncate":
            found.append(Piece(document, 0, s.capacity))
    return found


def windows(found: list[Piece]) -> list[list[Piece]]:
    """Runs of pieces of one shard. A run ends with the piece that fills it."""
    runs: list[list[Piece]] = []
    tokens = WINDOW_TOKENS
    for piece in found:
        if tokens >= WINDOW_TOKENS or len(runs[-1]) >= WINDOW_PIECES:
            runs.append([])
            tokens = 0
        runs[-1].append(piece)
        tokens += piece.length
    return runs


def best_fit(sizes: list[int], capacity: int, most: int) -> list[list[int]]:
    """Rows of piece numbers.

    The largest piece goes first, and each piece goes into the row with the least room that is
    enough.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # the rows with so much room left; the last one is taken first
    for piece in sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], piece)):
        room = min((room for room, rows in open_rows.items() if rows and room >= sizes[piece]), default=None)
        if room is None:
            rows.append([])
            room, row = capacity, len(rows) - 1
        else:
            row = open_rows[room].pop()
        rows[row].append(piece)
        if len(rows[row]) < most:
            open_rows.setdefault(room - sizes[piece], []).append(row)
    # The pieces of a row, and the rows, are in the order of the stream.
    return sorted(sorted(row) for row in rows)


def is_held_out(document: int, every: int) -> bool:
    """Tells whether a document is on the held-out side, by its number in the corpus."""
    return (derive(HOLDOUT_KEY, document) * every) >> 64 == 0


def rows(shards: list[list[int]], s: LayoutSettings) -> list[Row]:
    """All rows of a corpus. Its shards have documents of these lengths."""
    return [row for window in window_rows(shards, s) for row in window]


def window_rows(shards: list[list[int]], s: LayoutSettings) -> list[list[Row]]:
    """The rows of each window of a corpus, in order."""
    if s.layout == "rows":
        assert all(length == s.capacity for lengths in shards for length in lengths)
    most = 1 if s.layout in ("pad", "rows") else s.max_docs_per_row or WINDOW_PIECES
    align = s.pack_align if s.layout == "pack" else 1
    found, before = [], 0
    for shard, lengths in enumerate(shards):
        for window in windows(pieces(lengths, s)):
            # In `rows`, the order draws the held-out rows.
            if s.holdout and s.layout != "rows":
                held = s.split == "holdout"
                window = [p for p in window if is_held_out(before + p.document, s.holdout) == held]
            # A piece takes at least `smallest` places, a multiple of `align`, and never more than a
            # row.
            sizes = [min(-(-max(p.length, s.smallest) // align) * align, s.capacity) for p in window]
            of_window = []
            for numbers in best_fit(sizes, s.capacity, most):
                place, row = 0, []
                for number in numbers:
                    row.append(Segment(shard, *window[number], place))
                    place += sizes[number]
                of_window.append(row)
            found.append(of_window)
        before += len(lengths)
    return found
