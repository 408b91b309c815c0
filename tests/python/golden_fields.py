"""Writes `tests/golden/fields.json`: what the specification says of batches with further columns.

`test_golden_fields.py` compares the loader with that file, for all containers. It fails where the
file is out of date.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from reference_documents import Documents, arrays, batch, chunk_order, laid_out, window_starts
from reference_layout import LayoutSettings
from reference_order import block_order, derive, global_order

GOLDEN = Path(__file__).parents[1] / "golden" / "fields.json"
ORDER = {"chunk_tokens": 32, "window_tokens": 128, "lanes": 2}
BATCH_SIZE, SEED, PAD_ID = 2, 3, 0
FIELDS = ["labels", "loss_mask", "weights", "kind", "url", "year"]
#: Columns of tokens: padding, value at `bos_id` and `eos_id`, and whether a value belongs to the
#: target at its place.
PLACES: dict[str, tuple[Any, Any, bool]] = {
    "labels": (-100, -100, True),
    "loss_mask": (False, False, True),
    "weights": (0.0, 0.0, True),
    "kind": (0, 0, False),
}
CASES: list[dict[str, Any]] = [
    {"layout": layout, "targets": targets, "shuffle": shuffle, "bos_id": bos_id, "eos_id": eos_id}
    for layout, targets, shuffle, bos_id, eos_id in (
        ("pack", "labels", "off", None, 99),
        ("pack", "shifted", "block", 98, 99),
        ("pad", "labels", "block", None, None),
        ("pad", "shifted", "global", None, 99),
        ("concat", "labels", "block", 98, None),
        ("concat", "shifted", "global", None, 99),
    )
]


def documents() -> list[list[dict[str, Any]]]:
    """The rows of two shards. The second has a row without tokens."""
    shards: list[list[dict[str, Any]]] = []
    for shard in range(2):
        rows = []
        for row in range(7):
            draw = derive(5, shard, row)
            ids = [1 + (draw >> 8 * place) % 90 for place in range(0 if (shard, row) == (1, 2) else 1 + draw % 7)]
            rows.append({
                "input_ids": ids,
                "labels": [token if (draw + token) % 3 else -100 for token in ids],
                "loss_mask": [(draw + token) % 2 == 0 for token in ids],
                "weights": [token / 8 for token in ids],
                "kind": [token % 5 - 2 for token in ids],
                "url": None if draw % 4 == 0 else f"https://example.org/{shard}/{row}",
                "year": None if draw % 5 == 0 else 1990 + draw % 40,
            })  # fmt: skip
        shards.append(rows)
    return shards


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows of a shard as a table."""
    types = {
        "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_()),
        "weights": pa.list_(pa.float32()), "kind": pa.list_(pa.int8()), "url": pa.string(), "year": pa.int16(),
    }  # fmt: skip
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})


def numbered(rows: list[list[dict[str, Any]]], folder: Path, case: dict[str, Any]) -> Documents:
    """The documents, with the number of the document and the place in it instead of each token."""
    for index, shard in enumerate(rows):
        pq.write_table(table(shard), folder / f"{index}.parquet")
    corpus: Any = Documents(folder, case["bos_id"], case["eos_id"])
    number = 0
    for shard in corpus.shards:
        for index, document in enumerate(shard):
            shard[index] = [(number, place) for place in range(len(document))]
            number += 1
    return corpus


def rows_of(case: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], LayoutSettings, list[int]]:
    """Every row of a case with its arrays, and the first rows of the windows."""
    s = LayoutSettings(layout=case["layout"], seq_len=8, targets=case["targets"])
    shards = documents()
    places: Any = numbered(shards, folder, case)
    full = [row for shard in shards for row in shard if row["input_ids"]]
    lead, before = s.capacity - s.seq_len, int(case["bos_id"] is not None)

    def value(name: str, number: int, place: int) -> Any:
        values = full[number][name]
        inside = before <= place < before + len(values)
        if name == "input_ids" and not inside:
            return case["bos_id"] if place < before else case["eos_id"]
        return values[place - before] if inside else PLACES[name][1]

    found = []
    for row in laid_out(places, s):
        tokens = [(at, [value("input_ids", *place) for place in cut]) for at, cut in row]
        made = arrays(tokens, s, PAD_ID, boundaries=True)
        for name, (padding, _, is_target) in PLACES.items():
            values = [padding] * s.capacity
            for at, cut in row:
                for index, place in enumerate(cut):
                    is_masked = is_target and index == 0
                    values[at + index] = padding if is_masked else value(name, *place)
            key = "y" if lead and name == "labels" else name
            made[key] = values[lead:] if is_target else values[: s.seq_len]
        numbers: list[int | None] = [cut[0][0] for at, cut in row if at < s.seq_len]
        numbers += [None] * (len(made["starts"]) - len(numbers))
        made["url"] = [None if number is None else full[number]["url"] for number in numbers]
        made["year"] = [None if number is None else full[number]["year"] for number in numbers]
        found.append(made)
    return found, s, window_starts(places, s) if s.layout != "concat" else [0]


def batches(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The batches of the first epoch."""
    with tempfile.TemporaryDirectory() as folder:
        rows, s, starts = rows_of(case, Path(folder))
    shape: dict[str, Any] = {"seed": SEED, "epoch": 0, "seq_len": s.seq_len, **ORDER}
    order = list(range(len(rows)))
    if case["shuffle"] == "global":
        order = global_order(len(rows), seed=SEED, epoch=0)
    elif case["shuffle"] == "block":
        is_joined = s.layout == "concat"
        order = block_order(len(rows), **shape) if is_joined else chunk_order(len(rows), starts, **shape)
    found = []
    for at in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        chosen = [rows[row] for row in order[at : at + BATCH_SIZE]]
        of_documents = {name: [value for row in chosen for value in row[name]] for name in ("url", "year")}
        arrays_of = [{name: values for name, values in row.items() if name not in of_documents} for row in chosen]
        found.append(batch(arrays_of, s.seq_len) | of_documents)
    return found


def text() -> str:
    """The file as it has to be."""
    cases = [{"settings": case, "batches": batches(case)} for case in CASES]
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    GOLDEN.write_text(text())
