"""The naive loader: every batch in plain Python on top of pyarrow.

It reads a corpus row by row, builds the stream of tokens as one list, cuts it, orders it and groups
it, without regard for memory or speed. It shares no code with the Rust core. It can be read as the
specification of a batch.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from reference_flat import flat_documents
from reference_order import block_order, global_order

TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")
BESIDE = (".idx", ".index", ".loss", ".metadata")
"""Suffixes of files that say something of the ids beside them."""


def shards(data: str | os.PathLike[str] | list[Any]) -> list[Path]:
    """Files of a corpus, in order.

    Lists keep their order. Folders are sorted bytewise by relative path, or follow `state.json`.
    """
    if isinstance(data, list | tuple):
        return [path for entry in data for path in shards(entry)]
    path = Path(data)
    if path.is_dir():
        state = path / "state.json"
        if state.exists():
            return [path / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
        inside = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        inside = [file for file in inside if not any(part[0] in "_." for part in file.parts)]
        inside = [file for file in inside if file.suffix not in BESIDE]
        return [path / file for file in sorted(inside, key=os.fsencode)]
    if not path.exists():
        return [Path(match) for match in sorted(glob.glob(str(path), recursive=True), key=os.fsencode)]
    return [path]


def read_table(path: Path) -> pa.Table:
    """All rows of one shard."""
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PAR1":
        return pq.ParquetFile(path).read()
    if magic == b"ARROW1":
        return pa.ipc.open_file(str(path)).read_all()
    with pa.OSFile(str(path)) as stream:
        return pa.ipc.open_stream(stream).read_all()


def documents(
    path: Path, column: str | None = None, bin_dtype: str | None = None, document_end_id: int | None = None
) -> list[list[int]]:
    """Rows of the token column.

    Null lists are empty, and a plain integer column is one document. `bin_dtype` is the type of ids
    in files that do not say it. `document_end_id` splits files of ids without document lengths.
    """
    flat = flat_documents(path, bin_dtype, document_end_id)
    if flat is not None:
        return flat
    table = read_table(path)
    if column is None:
        column = next(name for name in TOKEN_COLUMNS if name in table.column_names)
    values = table.column(column)
    rows = values.to_pylist()
    if pa.types.is_integer(values.type):
        return [rows]
    return [row or [] for row in rows]


def token_stream(
    data: Any,
    *,
    column: str | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
    bin_dtype: str | None = None,
    document_end_id: int | None = None,
) -> list[int]:
    """The corpus as one list of tokens.

    Every document with tokens stands between `bos_id` and `eos_id`.
    """
    stream: list[int] = []
    for path in shards(data):
        for document in documents(path, column, bin_dtype, document_end_id):
            if document:
                stream += [bos_id] if bos_id is not None else []
                stream += document
                stream += [eos_id] if eos_id is not None else []
    return stream


def resolve_shuffle(shuffle: bool | str, *, decoded: bool) -> str:
    """The meaning of `shuffle=True`.

    It is block order if blocks are decoded (Parquet, compressed Arrow), and global order otherwise.
    """
    if shuffle is True:
        return "block" if decoded else "global"
    return shuffle or "off"


@dataclass(frozen=True)
class Settings:
    """Content and grouping settings, with the loader's names and defaults."""

    seq_len: int = 2048
    batch_size: int = 1
    targets: str = "labels"
    ignore_index: int = -100
    bos_id: int | None = None
    eos_id: int | None = None
    shuffle: str = "off"
    seed: int = 0
    chunk_tokens: int = 4 << 20
    window_tokens: int = 16 << 20
    lanes: int = 8
    remainder: str = "drop"
    pad_id: int = 0

    @property
    def shifted(self) -> bool:
        return self.targets == "shifted"


Row = tuple[list[int], list[int]]
"""Inputs and targets of one sequence: `input_ids` and `labels`, or `x` and `y`."""


class Reference:
    """Batches of one corpus under one list of settings."""

    def __init__(self, stream: list[int], settings: Settings) -> None:
        self.stream = stream
        self.settings = settings
        # If targets are shifted, the first token is never a target.
        self.targets = max(0, len(stream) - settings.shifted)
        self.num_sequences, self.tail = divmod(self.targets, settings.seq_len)
        self.orders: dict[int, list[int]] = {}

    @property
    def positions(self) -> int:
        """Rows of an epoch: the full sequences, and one row for the tail unless it is dropped."""
        return self.num_sequences + (self.tail > 0 and self.settings.remainder != "drop")

    def order(self, epoch: int) -> list[int]:
        """The sequence at each position. The tail comes last and is never shuffled."""
        if epoch not in self.orders:
            self.orders[epoch] = self.draw_order(epoch)
        return self.orders[epoch]

    def draw_order(self, epoch: int) -> list[int]:
        s, n = self.settings, self.num_sequences
        if s.shuffle == "global":
            order = global_order(n, seed=s.seed, epoch=epoch)
        elif s.shuffle == "block":
            sizes = {"chunk_tokens": s.chunk_tokens, "window_tokens": s.window_tokens, "lanes": s.lanes}
            order = block_order(n, seed=s.seed, epoch=epoch, seq_len=s.seq_len, **sizes)
        else:
            order = list(range(n))
        return order + list(range(n, self.positions))

    def sequence(self, index: int) -> Row:
        """Sequence `index` of the stream.

        Padding, or the beginning of the stream, fills up the tail.
        """
        s = self.settings
        start, length = index * s.seq_len, s.seq_len + s.shifted
        tokens = self.stream[start : start + length]
        if len(tokens) < length and s.remainder == "wrap":
            tokens = [self.stream[(start + k) % len(self.stream)] for k in range(length)]
        if s.shifted:
            return fill(tokens[: s.seq_len], s.seq_len, s.pad_id), fill(tokens[1:], s.seq_len, s.ignore_index)
        return fill(tokens, s.seq_len, s.pad_id), fill(tokens, s.seq_len, s.ignore_index)

    def steps(self, world_size: int = 1) -> int:
        """Batches of every rank in an epoch."""
        rows = self.settings.batch_size * world_size
        return self.positions // rows if self.settings.remainder == "drop" else -(-self.positions // rows)

    def batch_at(self, step: int, *, epoch: int = 0, rank: int = 0, world_size: int = 1) -> list[Row]:
        """The batch of `rank` at `step`.

        Rows past the last position are padding, the first rows of the epoch, or missing.
        """
        s, order, rows = self.settings, self.order(epoch), []
        for j in range(s.batch_size):
            position = step * s.batch_size * world_size + j * world_size + rank
            if position < len(order):
                rows.append(self.sequence(order[position]))
            elif s.remainder == "pad":
                rows.append(([s.pad_id] * s.seq_len, [s.ignore_index] * s.seq_len))
            elif s.remainder == "wrap":
                rows.append(self.sequence(order[position % len(order)]))
        return rows

    def batches(self, *, epoch: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[list[Row]]:
        """All batches of `rank` in an epoch."""
        for step in range(self.steps(world_size)):
            yield self.batch_at(step, epoch=epoch, rank=rank, world_size=world_size)

    def short_is_refused(self, world_size: int) -> bool:
        """Tells whether the last step leaves a rank without a row.

        `remainder="short"` forbids that.
        """
        last = self.positions % (self.settings.batch_size * world_size)
        return 0 < last < world_size


def fill(values: list[int], length: int, filler: int) -> list[int]:
    return values + [filler] * (length - len(values))
