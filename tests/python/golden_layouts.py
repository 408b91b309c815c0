"""Writes `tests/golden/layouts.json`: what `reference_layout.py` says of some corpora.

The Rust tests compare the core with that file. `test_layouts.py` fails where the file is out of
date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import reference_layout
from reference_layout import LayoutSettings
from reference_order import derive

GOLDEN = Path(__file__).parents[1] / "golden" / "layouts.json"

CORPORA: dict[str, dict[str, Any]] = {
    "short": {"seed": 1, "documents": [1500, 0, 700], "longest": [30, 300, 3000, 300]},
    "long": {"seed": 2, "documents": [40, 1, 25], "longest": [9000, 100, 70000, 2000]},
    "windows": {"seed": 3, "documents": [17000, 300], "longest": [8, 20, 60, 4]},
    "rows": {"seed": 4, "documents": [5, 0, 9], "longest": [0, 0, 0, 0], "fixed": 64},
}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("short", {"layout": "pack", "seq_len": 2048}),
    ("short", {"layout": "pack", "seq_len": 512, "targets": "shifted"}),
    ("short", {"layout": "pack", "seq_len": 2048, "specials": 2}),
    ("short", {"layout": "pack", "seq_len": 512, "overflow": "truncate", "specials": 1}),
    ("short", {"layout": "pack", "seq_len": 512, "overflow": "drop"}),
    ("short", {"layout": "pack", "seq_len": 2048, "max_docs_per_row": 3}),
    ("short", {"layout": "pack", "seq_len": 2048, "pack_align": 16}),
    ("short", {"layout": "pack", "seq_len": 512, "pack_align": 8, "targets": "shifted"}),
    ("short", {"layout": "pack", "seq_len": 2048, "holdout": 10}),
    ("short", {"layout": "pack", "seq_len": 2048, "holdout": 10, "split": "holdout"}),
    ("short", {"layout": "pad", "seq_len": 512}),
    ("short", {"layout": "pad", "seq_len": 512, "overflow": "truncate", "holdout": 3}),
    ("short", {"layout": "pad", "seq_len": 512, "overflow": "drop", "targets": "shifted", "specials": 2}),
    ("long", {"layout": "pack", "seq_len": 2048}),
    ("long", {"layout": "pack", "seq_len": 65536}),
    ("long", {"layout": "pack", "seq_len": 1024, "targets": "shifted", "specials": 2}),
    ("windows", {"layout": "pack", "seq_len": 128}),
    ("windows", {"layout": "pack", "seq_len": 16, "holdout": 4}),
    ("windows", {"layout": "pad", "seq_len": 16}),
    ("rows", {"layout": "rows", "seq_len": 64}),
]


def lengths(corpus: dict[str, Any], specials: int) -> list[list[int]]:
    """Lengths of the documents of each shard, with their special ids."""
    shards, number = [], 0
    for documents in corpus["documents"]:
        shard = []
        for _ in range(documents):
            draw = derive(corpus["seed"], number)
            longest = corpus["longest"][draw % 4]
            shard.append(corpus.get("fixed", 0) or specials + 1 + (draw >> 32) % longest)
            number += 1
        shards.append(shard)
    return shards


def described(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A case and its rows: the number of them, the first ones, and a digest of all."""
    specials = settings.get("specials", 0)
    named = {key: value for key, value in settings.items() if key != "specials"}
    rows = reference_layout.rows(lengths(CORPORA[name], specials), LayoutSettings(**named))
    numbers = [[len(row), *(number for segment in row for number in segment)] for row in rows]
    digest = derive(0, *(number for row in numbers for number in row))
    first = [[list(segment) for segment in row] for row in rows[:2]]
    return {"corpus": name, "settings": settings, "rows": len(rows), "first": first, "digest": digest}


def text() -> str:
    """The file as it has to be."""
    cases = [described(name, settings) for name, settings in CASES]
    lines = ",\n".join("    " + json.dumps(case) for case in cases)
    return f'{{\n  "corpora": {json.dumps(CORPORA)},\n  "cases": [\n{lines}\n  ]\n}}\n'


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(text())
