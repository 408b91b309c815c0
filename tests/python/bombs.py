"""Files that claim far more than they hold.

Each is small, and its header asks for absurd amounts of memory or time. Parquet files are written
byte by byte here, because no writer writes them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

# --- Thrift's compact protocol

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12
MOST = (1 << 31) - 1
"""Largest 32-bit length."""
HUGE = 1 << 60
"""Absurd number of rows or bytes."""

Fields = dict[int, tuple[int, Any]]


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def value(kind: int, content: Any) -> bytes:
    if kind in (I32, I64):
        return varint(content << 1 if content >= 0 else (-content << 1) - 1)
    if kind == BINARY:
        return varint(len(content)) + content
    if kind == LIST:
        of, items = content
        return list_head(of, len(items)) + b"".join(value(of, item) for item in items)
    return content if isinstance(content, bytes) else fields(content)


def list_head(of: int, count: int) -> bytes:
    return bytes([count << 4 | of]) if count < 15 else bytes([0xF0 | of]) + varint(count)


def fields(content: Fields) -> bytes:
    """A struct with these fields, each with a type and a value."""
    out, last = b"", 0
    for number, (kind, item) in sorted(content.items()):
        out += bytes([(number - last) << 4 | kind]) + value(kind, item)
        last = number
    return out + b"\0"


# --- Parquet

PLAIN, BIT_PACKED, DELTA, DICTIONARY, RLE = 0, 4, 5, 8, 3
NONE, SNAPPY, GZIP, ZSTD, LZ4_RAW = 0, 1, 2, 6, 7


def column_schema() -> list[Fields]:
    """A required column of required int32 ids, without levels."""
    return [
        {4: (BINARY, b"schema"), 5: (I32, 1)},
        {1: (I32, 1), 3: (I32, 0), 4: (BINARY, b"input_ids")},
    ]


def list_schema() -> list[Fields]:
    """A required list of required int32 ids. Only its repetition levels have more than one
    value.
    """
    return [
        {4: (BINARY, b"schema"), 5: (I32, 1)},
        {3: (I32, 0), 4: (BINARY, b"input_ids"), 5: (I32, 1), 6: (I32, 3)},
        {3: (I32, 2), 4: (BINARY, b"list"), 5: (I32, 1)},
        {1: (I32, 1), 3: (I32, 0), 4: (BINARY, b"element")},
    ]


def data_page(
    body: bytes, values: int, *, encoding: int = PLAIN, inflated: int | None = None, levels: int = RLE
) -> bytes:
    header: Fields = {1: (I32, values), 2: (I32, encoding), 3: (I32, levels), 4: (I32, levels)}
    size = len(body) if inflated is None else inflated
    return fields({1: (I32, 0), 2: (I32, size), 3: (I32, len(body)), 5: (STRUCT, header)}) + body


def dictionary_page(body: bytes, values: int, *, inflated: int | None = None) -> bytes:
    size = len(body) if inflated is None else inflated
    header: Fields = {1: (I32, values), 2: (I32, PLAIN)}
    return fields({1: (I32, 2), 2: (I32, size), 3: (I32, len(body)), 7: (STRUCT, header)}) + body


def parquet(
    pages: bytes = b"",
    *,
    values: int = 4,
    rows: int = 4,
    file_rows: int | None = None,
    codec: int = NONE,
    schema: list[Fields] | None = None,
    path: list[bytes] | None = None,
    data_at: int = 0,
    groups: int = 1,
    more: Fields | None = None,
) -> bytes:
    """A file of one column chunk in each row group. `data_at` is where data pages begin, in
    `pages`.
    """
    column: Fields = {
        1: (I32, 1), 2: (LIST, (I32, [PLAIN])), 3: (LIST, (BINARY, path or [b"input_ids"])), 4: (I32, codec),
        5: (I64, values), 6: (I64, len(pages)), 7: (I64, len(pages)), 9: (I64, 4 + data_at),
    }  # fmt: skip
    if data_at:
        column[11] = (I64, 4)
    group: Fields = {
        1: (LIST, (STRUCT, [{2: (I64, 4), 3: (STRUCT, column)}])), 2: (I64, len(pages)), 3: (I64, rows),
    }  # fmt: skip
    footer = fields(
        {
            1: (I32, 2), 2: (LIST, (STRUCT, schema or column_schema())),
            3: (I64, rows * groups if file_rows is None else file_rows), 4: (LIST, (STRUCT, [group] * groups)),
            **(more or {}),
        }
    )  # fmt: skip
    return b"PAR1" + pages + footer + struct.pack("<I", len(footer)) + b"PAR1"


FOUR = np.arange(4, dtype="<i4").tobytes()
LIST_PATH = [b"input_ids", b"list", b"element"]


def nested_schema(depth: int) -> list[Fields]:
    groups: list[Fields] = [{3: (I32, 0), 4: (BINARY, b"input_ids"), 5: (I32, 1)} for _ in range(depth)]
    return [{4: (BINARY, b"schema"), 5: (I32, 1)}, *groups, {1: (I32, 1), 3: (I32, 0), 4: (BINARY, b"element")}]


def squeezed(size: int, codec: str) -> bytes:
    return pa.compress(bytes(size), codec=codec, asbytes=True)


def run_of(values: int, bit_width: int) -> bytes:
    """A run of equal levels or indices, with no length before it."""
    return varint(values << 1) + bytes((bit_width + 7) // 8)


def with_length(levels: bytes) -> bytes:
    return struct.pack("<I", len(levels)) + levels


def delta(block: int, parts: int, count: int, rest: bytes = bytes(40)) -> bytes:
    return varint(block) + varint(parts) + varint(count) + varint(2) + rest


def delta_file(block: int, parts: int, count: int) -> bytes:
    """A file whose page of deltas has a header with these numbers."""
    values = count & MOST
    return parquet(data_page(delta(block, parts, count), values, encoding=DELTA), values=values, rows=values)


#: Bytes of Parquet files. Reading one must fail, unless it says something sensible.
PARQUET: dict[str, Callable[[], bytes]] = {
    "rows": lambda: parquet(data_page(FOUR, 4), rows=HUGE),
    "rows of the file": lambda: parquet(data_page(FOUR, 4), file_rows=HUGE),
    "rows without pages": lambda: parquet(b"", rows=HUGE, values=HUGE),
    "values": lambda: parquet(data_page(FOUR, 4), values=HUGE, rows=HUGE),
    "values of a page": lambda: parquet(data_page(FOUR, MOST), values=MOST, rows=MOST),
    "row groups": lambda: parquet(data_page(FOUR, 4), groups=100_000),
    "rows of row groups": lambda: parquet(data_page(FOUR, 4), rows=HUGE, groups=100),
    **{
        f"page that claims to inflate, {name}": lambda codec=codec, body=body: parquet(
            data_page(body, MOST // 4, inflated=MOST), values=MOST // 4, rows=MOST // 4, codec=codec
        )
        for name, codec, body in [
            ("none", NONE, FOUR), ("snappy", SNAPPY, b"\x04\x0cabcd"), ("gzip", GZIP, bytes(20)),
            ("zstd", ZSTD, bytes.fromhex("28b52ffd200421000061626364")), ("lz4", LZ4_RAW, b"\x40abcd"),
        ]
    },
    **{
        f"page that inflates, {name}": lambda codec=codec, name=name: parquet(
            data_page(squeezed(1 << 28, name), 1 << 26, inflated=1 << 28), values=1 << 26, rows=1 << 26, codec=codec
        )
        for name, codec in [("zstd", ZSTD), ("gzip", GZIP)]
    },
    "page that inflates beyond its claim": lambda: parquet(
        data_page(squeezed(1 << 28, "zstd"), 4, inflated=16), codec=ZSTD
    ),
    "page for the arrow reader that claims to inflate": lambda: parquet(
        data_page(bytes(20), MOST // 4, inflated=MOST, levels=BIT_PACKED), schema=list_schema(), path=LIST_PATH,
        values=MOST // 4, rows=MOST // 4, codec=ZSTD,
    ),
    "page for the arrow reader that inflates": lambda: parquet(
        data_page(squeezed(1 << 28, "zstd"), 1 << 26, inflated=1 << 28, levels=BIT_PACKED), schema=list_schema(),
        path=LIST_PATH, values=1 << 26, rows=1 << 26, codec=ZSTD,
    ),
    "page for the arrow reader of many values": lambda: parquet(
        data_page(bytes(20), MOST, levels=BIT_PACKED), schema=list_schema(), path=LIST_PATH, values=MOST, rows=MOST,
    ),
    "run of indices": lambda: parquet(
        dictionary_page(FOUR[:4], 1) + data_page(b"\0" + run_of(MOST, 0), MOST, encoding=DICTIONARY),
        values=MOST, rows=MOST, data_at=len(dictionary_page(FOUR[:4], 1)),
    ),
    "run of levels": lambda: parquet(
        dictionary_page(FOUR[:4], 1)
        + data_page(with_length(run_of(MOST, 1)) + b"\0" + run_of(MOST, 0), MOST, encoding=DICTIONARY),
        values=MOST, rows=MOST, data_at=len(dictionary_page(FOUR[:4], 1)), schema=list_schema(), path=LIST_PATH,
    ),
    "dictionary of many values": lambda: parquet(
        dictionary_page(FOUR[:4], MOST) + data_page(b"\0" + run_of(4, 0), 4, encoding=DICTIONARY),
        data_at=len(dictionary_page(FOUR[:4], MOST)),
    ),
    "dictionary that claims to inflate": lambda: parquet(
        dictionary_page(FOUR[:4], MOST // 4, inflated=MOST) + data_page(b"\0" + run_of(4, 0), 4, encoding=DICTIONARY),
        data_at=len(dictionary_page(FOUR[:4], MOST // 4, inflated=MOST)), codec=ZSTD,
    ),
    **{
        f"delta of blocks of {block} in {parts} parts, {count} values": (
            lambda block=block, parts=parts, count=count: delta_file(block, parts, count)
        )
        for block, parts, count in [
            (128, 4, MOST), (1 << 62, 1, 4), (1 << 31, 1 << 24, 4), (128, 1 << 62, 4), (0, 0, 4), (128, 4, HUGE + 4),
            (1 << 40, 4, MOST),
        ]
    },
    "schema nested 10^4 deep": lambda: parquet(
        data_page(FOUR, 4), schema=nested_schema(10_000), path=[b"input_ids"] * 10_000 + [b"element"]
    ),
    "schema nested 10^6 deep": lambda: parquet(data_page(FOUR, 4), schema=nested_schema(1_000_000)),
    "schema of many children": lambda: parquet(
        data_page(FOUR, 4), schema=[{4: (BINARY, b"schema"), 5: (I32, MOST)}, *column_schema()[1:]]
    ),
    "string": lambda: parquet(data_page(FOUR, 4), more={6: (STRUCT, varint(HUGE) + b"forebay")}),
    "list": lambda: parquet(data_page(FOUR, 4), more={15: (STRUCT, b"\x19\xfc" + varint(HUGE))}),
    "fields nested 10^6 deep": lambda: parquet(data_page(FOUR, 4), more={15: (STRUCT, b"\x1c" * 1_000_000)}),
    "lists nested 10^6 deep": lambda: parquet(data_page(FOUR, 4), more={14: (LIST, (STRUCT, []))}).replace(
        b"\x0c\0", b"\x19" * 1_000_000
    ),
    "length of the footer": lambda: parquet(data_page(FOUR, 4))[:-8] + struct.pack("<I", MOST * 2 + 1) + b"PAR1",
}  # fmt: skip


# --- Arrow


def arrow(rows: pa.Array, *, stream: bool = False, compression: str | None = None) -> bytes:
    table = pa.table({"input_ids": rows})
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def nested_arrow(depth: int) -> bytes:
    kind = pa.int32()
    for _ in range(depth):
        kind = pa.list_(kind)
    return arrow(pa.array([], kind))


def wrong_lengths(sound: bytes) -> dict[str, bytes]:
    """The file with an absurd number at each place of each length before its data."""
    found = {}
    for at in range(0, len(sound) - 8, 4):
        for name, number in (
            ("2^31-1", struct.pack("<i", MOST)),
            ("-1", b"\xff" * 4),
            ("2^62", struct.pack("<q", 1 << 62)),
        ):
            found[f"{name} at {at}"] = sound[:at] + number + sound[at + len(number) :]
    return found


# --- Flat files


def npy(shape: str, data: bytes = FOUR, *, length: int | None = None) -> bytes:
    head = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(head) if length is None else length) + head + data


def megatron_index(
    sizes: list[int], pointers: list[int], documents: list[int], *, counts: tuple[int, int] | None = None, code: int = 4
) -> bytes:
    """Index of a pair. `code` 4 means int32 ids."""
    head = b"MMIDIDX\0\0" + struct.pack("<QB", 1, code)
    head += struct.pack("<QQ", *(counts or (len(sizes), len(documents))))
    parts = (np.array(sizes, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8"))
    return head + b"".join(part.tobytes() for part in parts)


def flat_files() -> dict[str, dict[str, bytes]]:
    """Files of each bomb, by their names."""
    pairs = {
        "sequences": megatron_index([4], [0], [0, 1], counts=(HUGE, 2)),
        "documents": megatron_index([4], [0], [0, 1], counts=(1, HUGE)),
        "both": megatron_index([4], [0], [0, 1], counts=((1 << 64) - 1, (1 << 64) - 1)),
        "sizes": megatron_index([MOST], [0], [0, 1]),
        "many sizes": megatron_index([MOST] * 4, [0] * 4, [0, 4]),
        "pointers": megatron_index([4], [1 << 62], [0, 1]),
        "ends of documents": megatron_index([4], [0], [0, 1 << 62]),
    }
    return {
        "npy: values": {"a.npy": npy(f"({HUGE},)")},
        "npy: rows and columns": {"a.npy": npy(f"({1 << 40}, {1 << 40})")},
        "npy: columns without values": {"a.npy": npy(f"({HUGE}, 0)", b"")},
        "npy: digits": {"a.npy": npy(f"({'9' * 100_000},)")},
        "npy: dimensions": {"a.npy": npy("(" + "1, " * 100_000 + ")")},
        "npy: nested": {"a.npy": npy("(" * 1_000_000)},
        "npy: header": {"a.npy": npy("(4,)", length=(1 << 32) - 1)},
        "llm.c": {"a.bin": np.array([20240520, 1, MOST, *[0] * 253], "<i4").tobytes() + FOUR},
        **{f"megatron: {name}": {"a.bin": FOUR, "a.idx": index} for name, index in pairs.items()},
        "datatrove": {"a.ds": FOUR, "a.ds.index": np.array([2, HUGE, HUGE], "<u8").tobytes()},
        "datatrove: ends fall": {"a.ds": FOUR, "a.ds.index": np.array([8, 2, 8], "<u8").tobytes()},
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes the files, and returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))
