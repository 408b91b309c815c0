"""Writes `tests/golden/packed.json`: a hash of all batches of an epoch, for files packed before.

The specification of `test_packed_files.py` makes the batches. That test compares the loader with
the file, and fails where the file is out of date.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from golden_batches import hashed
from reference_layout import LayoutSettings
from reference_order import derive

GOLDEN = Path(__file__).parents[1] / "golden" / "packed.json"
BATCH_SIZE, SEED = 3, 11
COLUMNS = ("seq_lengths", "seq_start_id", "position_ids")
CASES: list[dict[str, Any]] = [
    {"layout": "rows", "seq_len": 16},
    {"layout": "rows", "seq_len": 15, "targets": "shifted"},
    {"layout": "pad", "seq_len": 16},
    {"layout": "pad", "seq_len": 24, "targets": "shifted", "overflow": "truncate"},
    {"layout": "pad", "seq_len": 16, "overflow": "drop", "pad_to_multiple": 4, "bucket": 16},
]


def rows(shard: int, equal: bool) -> list[tuple[list[int], list[int]]]:
    """The rows of a shard, by arithmetic alone: tokens, and the lengths of their documents."""
    found = []
    for row in range(50):
        draw = derive(13, shard, row)
        length = 16 if equal else (0, 1, 7, 16, 40)[draw % 5]
        lengths, left, at = [], length, 0
        while left:
            lengths.append(min(left, 1 + derive(draw, at) % 9))
            left, at = left - lengths[-1], at + 1
        found.append(([derive(draw, place) % 30_000 for place in range(length)], lengths))
    return found


def corpus(folder: Path, column: str, suffix: str, codec: str, equal: bool) -> Path:
    """Three shards."""
    from test_packed_files import write

    folder.mkdir(parents=True)
    for shard in range(3):
        write(folder / f"{shard}{suffix}", rows(shard, equal), column, codec)
    return folder


def text() -> str:
    """The file as it has to be."""
    from test_packed_files import expected

    lines = []
    with tempfile.TemporaryDirectory() as name:
        for column in COLUMNS:
            data = [
                corpus(Path(name, column, str(equal)), column, ".parquet", "zstd", equal) for equal in (False, True)
            ]
            for settings in CASES:
                s = LayoutSettings(**settings)
                batches = expected(data[s.layout == "rows"], s, column, BATCH_SIZE, SEED)
                case = {"packed_by": column, "settings": settings}
                lines.append("  " + json.dumps({**case, "batches": len(batches), "sha256": hashed(batches)}))
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    GOLDEN.write_text(text())
