"""The naive reader of flat files, in plain Python.

It reads whole files with `struct` and `ast` alone, and shares no code with the Rust core. It
recognises a file by its content and by the files beside it. An id may say where documents end.
"""

from __future__ import annotations

import ast
import struct
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

CODES = {
    "uint8": "B", "uint16": "H", "uint32": "I", "int8": "b", "int16": "h", "int32": "i", "int64": "q",
    "u1": "B", "u2": "H", "u4": "I", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
}  # fmt: skip
LLM_C = {20240520: "H", 20240801: "I"}
MEGATRON = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def values(data: bytes, code: str) -> list[int]:
    """Little-endian integers."""
    return list(struct.unpack(f"<{len(data) // struct.calcsize('<' + code)}{code}", data))


def cut(ids: list[int], ends: list[int]) -> list[list[int]]:
    """Documents that end at `ends`."""
    return [ids[start:end] for start, end in pairwise([0, *ends])]


def split_at(ids: list[int], end_id: int) -> list[list[int]]:
    """Documents whose last id is `end_id`. The last document may lack it."""
    found: list[list[int]] = [[]]
    for token in ids:
        found[-1].append(token)
        if token == end_id:
            found.append([])
    return [document for document in found if document]


def flat_documents(
    path: Path, bin_dtype: str | None = None, document_end_id: int | None = None
) -> list[list[int]] | None:
    """The documents of a flat file. `None` if the file is not flat.

    `document_end_id` splits files that do not say where documents end.
    """
    documents = listed_documents(path, bin_dtype)
    if document_end_id is None or documents is None or has_lengths(path):
        return documents
    return [part for document in documents for part in split_at(document, document_end_id)]


def has_lengths(path: Path) -> bool:
    """Whether a flat file says where documents end."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    is_matrix = head.startswith(b"\x93NUMPY") and len(npy_header(head)[0]["shape"]) == 2
    return is_matrix or path.with_suffix(".idx").exists() or path.with_name(path.name + ".index").exists()


def listed_documents(path: Path, bin_dtype: str | None = None) -> list[list[int]] | None:
    """The documents of a flat file, as the file or its index lists them."""
    data = path.read_bytes()
    if path.with_suffix(".idx").exists():
        return of_megatron(data, path.with_suffix(".idx").read_bytes())
    if (index := path.with_name(path.name + ".index")).exists():
        return of_datatrove(data, index.read_bytes())
    if data.startswith(b"\x93NUMPY"):
        return of_npy(data)
    if len(data) >= 1024 and (code := LLM_C.get(values(data[:4], "i")[0])):
        [tokens] = values(data[8:12], "i")
        return [values(data[1024:], code)[:tokens]]
    if bin_dtype is not None and data[:4] not in (b"PAR1", b"ARRO"):
        return [values(data, CODES[bin_dtype])]
    return None


def of_npy(data: bytes) -> list[list[int]]:
    """One document, or one for each row of a matrix."""
    header, start = npy_header(data)
    ids = values(data[start:], CODES[header["descr"][1:]])
    match header["shape"]:
        case (_,):
            return [ids]
        case (rows, columns):
            return cut(ids, [columns * (row + 1) for row in range(rows)])
    raise AssertionError(header)


def npy_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header of an array, and the place of its first value."""
    start = 10 if data[6] == 1 else 12
    length = int.from_bytes(data[8:start], "little")
    return ast.literal_eval(data[start : start + length].decode("latin1")), start + length


def of_megatron(data: bytes, index: bytes) -> list[list[int]]:
    """Documents as runs of sequences, each sequence with its length."""
    assert index[:9] == b"MMIDIDX\0\0"
    code = MEGATRON[index[17]]
    sequences, entries = values(index[18:34], "Q")
    lengths = values(index[34 : 34 + 4 * sequences], "i")
    start = 34 + 12 * sequences
    documents = values(index[start : start + 8 * entries], "q")
    before = [0, *accumulate(lengths)]
    return cut(values(data, code), [before[first] for first in documents[1:]])


def of_datatrove(data: bytes, index: bytes) -> list[list[int]]:
    """Documents by their ends. Ids have two bytes or four."""
    ends = values(index, "Q")
    width = len(data) // ends[-1] if ends and ends[-1] else 2
    return cut(values(data, {2: "H", 4: "I"}[width]), ends)


def loss_mask_of_datatrove(path: Path) -> list[list[int]]:
    """The mask beside a file of datatrove, document by document."""
    ends = values(path.with_name(path.name + ".index").read_bytes(), "Q")
    return cut(list(path.with_name(path.name + ".loss").read_bytes()), ends)
