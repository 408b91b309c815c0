"""Tests that `forebay verify` and `forebay rewrite` take the column that a loader takes.

pyarrow writes the files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from support import clean_environment

import forebay

DOCUMENTS = [[10, 11, 12], [], [13, 14], [15], [16, 17, 18]]
IDS = [id for document in DOCUMENTS for id in document]
COUNT = len(DOCUMENTS)

OTHERS: dict[str, pa.Array] = {
    "struct": pa.array([{"input_ids": [-1, -2], "n": 7}] * COUNT),
    "map": pa.array([[("a", 1), ("b", 2)]] * COUNT, pa.map_(pa.string(), pa.int32())),
    "list of structs": pa.array([[{"input_ids": -1}, {"input_ids": -2}]] * COUNT),
    "list of lists": pa.array([[[-1], [-2, -3]]] * COUNT),
    "large list": pa.array([[-1, -2]] * COUNT, pa.large_list(pa.int32())),
    "fixed-size list": pa.array([[-1, -2]] * COUNT, pa.list_(pa.int32(), 2)),
    "dictionary": pa.array(["a", "b"] * COUNT)[:COUNT].dictionary_encode(),
    "null": pa.nulls(COUNT),
    "text": pa.array(["-1"] * COUNT),
    "decimal": pa.array([1] * COUNT, pa.decimal128(12, 3)),
    "dotted.name": pa.array([-1] * COUNT, pa.int32()),
}


def command(*arguments: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "forebay", *map(str, arguments), "--json"],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def loaded(path: Path) -> list[int]:
    with forebay.Loader(path, seq_len=1, batch_size=64, remainder="short", num_threads=0) as loader:
        return [int(id) for batch in loader for id in np.ravel(batch["input_ids"])]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream"])
def test_commands_take_the_tokens_behind_any_column(tmp_path: Path, suffix: str) -> None:
    tokens = pa.array(DOCUMENTS, pa.list_(pa.int32()))
    source = tmp_path / "source"
    source.mkdir()
    for index, (name, other) in enumerate(OTHERS.items()):
        # The shards of one corpus have the token column at another place each.
        table = pa.table({"first": OTHERS["text"], name: other, "input_ids": tokens, "last": other})
        path = source / f"{index:02}.{'arrow' if suffix == 'stream' else suffix}"
        if suffix == "parquet":
            pq.write_table(table, path)
        else:
            opened = ipc.new_file if suffix == "arrow" else ipc.new_stream
            with opened(path, table.schema) as writer:
                writer.write_table(table)
    expected = IDS * len(OTHERS)
    assert loaded(source) == expected
    assert command("verify", source, "--seq-len=1", "--batch-size=1")["proven"] is True
    result = command("rewrite", source, tmp_path / "result")
    assert loaded(tmp_path / "result") == expected
    assert set(result["left_out"]) == {"first", "last", *OTHERS}
