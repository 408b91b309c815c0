"""Writes `tests/golden/batches.json`: a hash of all batches of an epoch, for each layout.

The specification makes the batches. `test_layouts.py` compares the loader with the file, and fails
where the file is out of date.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from reference_documents import Documents, batch_of, chunk_order, laid_out, window_starts
from reference_layout import LayoutSettings
from reference_order import block_order, derive, in_buckets

GOLDEN = Path(__file__).parents[1] / "golden" / "batches.json"
BATCH_SIZE, PAD_ID, SEED, EPOCH = 4, 7, 5, 1
ORDER: dict[str, Any] = {"chunk_tokens": 256, "window_tokens": 1024, "lanes": 4}

#: Settings of each case. The corpus has documents of one length for `rows`.
CASES: list[dict[str, Any]] = [
    {"layout": "concat", "seq_len": 32},
    {"layout": "concat", "seq_len": 32, "targets": "shifted"},
    {"layout": "pack", "seq_len": 64},
    {"layout": "pack", "seq_len": 64, "targets": "shifted", "overflow": "truncate", "pack_align": 8},
    {"layout": "pack", "seq_len": 64, "overflow": "drop", "max_docs_per_row": 3},
    {"layout": "pad", "seq_len": 64},
    {"layout": "pad", "seq_len": 64, "pad_to_multiple": 8},
    {"layout": "pad", "seq_len": 64, "pad_to_multiple": 8, "bucket": 64, "targets": "shifted"},
    {"layout": "rows", "seq_len": 24},
    {"layout": "rows", "seq_len": 23, "targets": "shifted"},
]


def documents(equal: bool) -> list[list[list[int]]]:
    """The documents of three shards, by arithmetic alone."""
    shards: list[list[list[int]]] = []
    number = 0
    for many in (90, 40, 70):
        shard = []
        for _ in range(many):
            draw = derive(9, number)
            length = 24 if equal else 1 + draw % (10, 40, 40, 200)[draw >> 32 & 3]
            shard.append([derive(draw, at) % 50_000 for at in range(length)])
            number += 1
        shards.append(shard)
    return shards


def expected(settings: dict[str, Any], data: Any) -> list[dict[str, Any]]:
    """The batches of an epoch in block order."""
    s, corpus = LayoutSettings(**settings), Documents(data)
    rows = laid_out(corpus, s)
    shape = {"seed": SEED, "epoch": EPOCH, "seq_len": s.seq_len, **ORDER}
    if s.layout in ("pack", "pad"):
        order = chunk_order(len(rows), window_starts(corpus, s), **shape)
    else:
        order = block_order(len(rows), **shape)
    if s.bucket is not None:
        lengths = [sum(len(cut) for _, cut in row) for row in rows]
        order = in_buckets(order, lengths, size=s.bucket, seed=SEED, epoch=EPOCH, lanes=ORDER["lanes"])
    steps = [order[at : at + BATCH_SIZE] for at in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE)]
    return [batch_of([rows[row] for row in step], s, PAD_ID, True) for step in steps]


def hashed(batches: list[dict[str, Any]]) -> str:
    """Hash of the names, shapes and values of all arrays."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            array = np.asarray(batch[name], "<i8")
            found.update(f"{name}{array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def text(data: dict[bool, Any]) -> str:
    """The file as it has to be. `data` gives the two corpora: ragged and equal documents."""
    lines = []
    for settings in CASES:
        batches = expected(settings, data[settings["layout"] == "rows"])
        lines.append("  " + json.dumps({"settings": settings, "batches": len(batches), "sha256": hashed(batches)}))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def corpora_in(folder: Path) -> dict[bool, Path]:
    """Writes both corpora."""
    from corpora import write_rows

    found = {}
    for equal in (False, True):
        found[equal] = folder / ("equal" if equal else "ragged")
        found[equal].mkdir()
        for number, shard in enumerate(documents(equal)):
            write_rows(found[equal] / f"{number}.parquet", shard)
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(text(corpora_in(Path(folder))))
