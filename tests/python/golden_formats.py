"""Writes `tests/golden/formats.json`: what the specification says of batches of each format.

Each case has its first two batches, and a hash of all batches of the epoch.
`test_golden_formats.py` compares the loader with that file. It fails where the file is out of date.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from golden_fields import documents
from reference_batches import BatchSettings, formatted
from reference_formats import FORMATS, SHIFTED
from reference_layout import LayoutSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "formats.json"
SHOWN = 2
ORDER: dict[str, Any] = {"shuffle": "block", "seed": 3, "chunk_tokens": 32, "window_tokens": 128, "lanes": 2}
#: Formats without room for other columns.
NARROW = ("titan", "xy")

CASES: list[dict[str, Any]] = [
    {
        "batch_format": name,
        "layout": layout,
        "boundaries": layout == "pack" or name == "hf-packed",
        "targets": "shifted" if name in SHIFTED else "labels",
        "fields": ["labels", "loss_mask"] if name in NARROW else ["labels", "loss_mask", "weights", "kind"],
    }
    for name in FORMATS
    for layout in ("concat", "pack", "pad")
]


def batches(case: dict[str, Any]) -> list[Any]:
    """The batches of the first epoch."""
    layout = LayoutSettings(layout=case["layout"], seq_len=8, targets=case["targets"])
    s = BatchSettings(
        layout,
        fields=tuple(case["fields"]),
        boundaries=case["boundaries"],
        eos_id=99,
        batch_size=2,
        batch_format=case["batch_format"],
        **ORDER,
    )
    return formatted(documents(), s)


def hashed(made: list[Any]) -> str:
    """Hash of the names and values of all batches. Names of a dict have no order."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def text() -> str:
    """The file as it has to be."""
    lines = []
    for case in CASES:
        made = batches(case)
        found = {"settings": case, "batches": len(made), "sha256": hashed(made), "first": made[:SHOWN]}
        lines.append("  " + json.dumps(found))
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    GOLDEN.write_text(text())
