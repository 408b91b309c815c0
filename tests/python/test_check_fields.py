"""Tests that `check` reads the columns beside the tokens, and counts targets.

Plain Python counts what is expected.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from support import clean_environment

import forebay

#: Columns that tell targets: their type, and values that are no targets.
COLUMNS: dict[str, tuple[pa.DataType, Any]] = {
    "labels": (pa.int32(), -100),
    "loss_mask": (pa.bool_(), False),
    "completion_mask": (pa.int8(), 0),
    "assistant_masks": (pa.int64(), 0),
    "weights": (pa.float32(), -0.0),
    "loss_weights": (pa.float16(), 0.0),
}
CONTAINERS = {
    "arrow": (".arrow", "none"),
    "arrow-zstd": (".arrow", "zstd"),
    "parquet": (".parquet", "none"),
    "parquet-zstd": (".parquet", "zstd"),
}


def write(path: Path, table: pa.Table, codec: str = "none") -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression=codec, row_group_size=17, data_page_size=256)
        return
    options = pyarrow.ipc.IpcWriteOptions(compression=None if codec == "none" else codec)
    with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=13)


def check(*given: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "forebay", "check", *map(str, given), "--json"],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["sound"] else 1)
    return found


def value(name: str, is_target: bool, draw: random.Random) -> Any:
    kind, none = COLUMNS[name]
    if not is_target:
        return np.float16(none) if pa.types.is_float16(kind) else none
    if pa.types.is_boolean(kind):
        return True
    return np.float16(0.5) if pa.types.is_float16(kind) else draw.choice([1, 1, 3])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_targets_are_counted(tmp_path: Path, container: str, named: bool) -> None:
    suffix, codec = CONTAINERS[container]
    draw = random.Random(container)
    wanted = {
        name: {"column": name, "tokens": 0, "targets": 0, "documents": 0, "without_target": 0} for name in COLUMNS
    }
    for shard in range(2):
        lengths = [draw.choice([0, 1, 3, 9, 300]) for _ in range(60)]
        columns: dict[str, Any] = {"input_ids": pa.array([[7] * length for length in lengths], pa.list_(pa.int32()))}
        for name, (kind, _) in COLUMNS.items():
            share = draw.choice([0.1, 0.9])
            rows = [[draw.random() < share for _ in range(length)] for length in lengths]
            columns[name] = pa.array([[value(name, bit, draw) for bit in row] for row in rows], pa.list_(kind))
            counts: dict[str, Any] = wanted[name]
            counts["tokens"] += sum(lengths)
            counts["targets"] += sum(map(sum, rows))
            counts["documents"] += sum(length > 0 for length in lengths)
            counts["without_target"] += sum(len(row) > 0 and not any(row) for row in rows)
        write(tmp_path / f"{shard}{suffix}", pa.table(columns), codec)
    more = ["--set", f"fields={','.join(COLUMNS)}"] if named else []
    found = check(tmp_path, *more, "--set", "block_tokens=100")
    assert found["sound"] and found["supervised"] == [wanted[name] for name in sorted(COLUMNS)]
    assert any(counts["without_target"] for counts in wanted.values())


def test_the_mask_of_datatrove_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.ds"
    np.arange(9, dtype=np.uint16).tofile(path)
    np.array([4, 4, 6, 9], "<u8").tofile(f"{path}.index")
    Path(f"{path}.loss").write_bytes(bytes([0, 1, 1, 0, 0, 0, 1, 1, 1]))
    wanted = {"column": "loss_mask", "tokens": 9, "targets": 5, "documents": 3, "without_target": 1}
    assert check(path)["supervised"] == [wanted]


@pytest.mark.parametrize("container", CONTAINERS)
def test_faults_of_named_columns_are_found(tmp_path: Path, container: str) -> None:
    suffix, codec = CONTAINERS[container]
    lists = pa.list_(pa.int32())
    for name, column, said, row in (
        ("labels", pa.array([[1, 2], [3, 4], [5]], lists), "must have a value for each token: expected 1, found 2", 1),
        ("labels", pa.array([[1, 2], None, [5, 6]], lists), "null list", 1),
        ("labels", pa.array([[1, 2], [3], [5, None]], lists), "null value", 2),
        ("loss_mask", pa.array([1, 2, 3], pa.int32()), "", None),
    ):
        path = tmp_path / f"a{suffix}"
        write(path, pa.table({"input_ids": pa.array([[1, 2], [3], [4, 5]], lists), name: column}), codec)
        assert check(path)["sound"], "a column that is not read may hold anything"
        found = check(path, "--set", f"fields={name}")
        if said:
            assert not found["sound"]
            [fault] = found["broken"]
            assert said in fault["error"] and fault["row"] == row and fault["path"] == str(path)
        else:
            assert found["supervised"] == []


#: Columns that a loader refuses: the shards, each with its columns, and words of the error.
REFUSED: dict[str, tuple[str, list[dict[str, pa.Array]], str]] = {
    "float labels": ("labels", [{"labels": pa.array([[1.0, 2.0, 3.0]] * 9)}], "column `labels` has type float64"),
    "labels of rows": ("labels", [{"labels": pa.array([1] * 9)}], "column `labels` has one value in each row"),
    "two types of labels": (
        "labels",
        [{"labels": pa.array([[1, 2, 3]] * 9)}, {"labels": pa.array([[1.0, 2.0, 3.0]] * 9)}],
        "types of column `labels` differ between shards",
    ),
    "a masked token": (
        "attention_mask",
        [{"attention_mask": pa.array([[1, 1, 1]] * 7 + [[1, 1, 0]] + [[1, 1, 1]])}],
        "`attention_mask` is 0 at a token",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("container", CONTAINERS)
def test_check_refuses_the_columns_that_a_loader_refuses(tmp_path: Path, container: str, fault: str) -> None:
    suffix, codec = CONTAINERS[container]
    name, shards, said = REFUSED[fault]
    for number, columns in enumerate(shards):
        write(tmp_path / f"{number}{suffix}", pa.table({"input_ids": pa.array([[1, 2, 3]] * 9), **columns}), codec)
    assert check(tmp_path)["sound"], "no loader reads the column"
    with (
        pytest.raises(forebay.DataError, match=said) as caught,
        forebay.Loader(tmp_path, fields=[name], seq_len=3) as loader,
    ):
        list(loader)
    [error] = check(tmp_path, "--set", f"fields={name}")["broken"]
    assert said in error["error"]
    assert f"0{suffix}" in error["error"] and f"0{suffix}" in str(caught.value), "the file is named"
    if fault == "a masked token":
        assert error["row"] == caught.value.row == 7


@pytest.mark.parametrize("container", CONTAINERS)
def test_check_compares_labels_with_the_vocabulary(tmp_path: Path, container: str) -> None:
    suffix, codec = CONTAINERS[container]
    path = tmp_path / f"a{suffix}"
    for label, sound in ((9, True), (10, False), (-100, True), (-1, False), (10**12, False)):
        labels = pa.array([[1, 2, 3]] * 30 + [[1, label, 3]])
        write(path, pa.table({"input_ids": pa.array([[1, 2, 3]] * 31), "labels": labels}), codec)
        found = check(path, "--vocab-size", "10", "--set", "fields=labels")
        assert found["sound"] == sound, label
        if not sound:
            [error] = found["broken"]
            assert f"label {label} is outside of the vocabulary" in error["error"] and error["row"] == 30
        assert check(path, "--vocab-size", "10")["sound"], "no loader reads the column"
