"""Tests that batches with further columns are those of `tests/golden/fields.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from golden_fields import BATCH_SIZE, FIELDS, GOLDEN, ORDER, PAD_ID, SEED, documents, table, text

import forebay

CONTAINERS = {"arrow": "none", "arrow-zstd": "zstd", "parquet": "none", "parquet-zstd": "zstd"}


def test_the_golden_fields_are_those_of_the_specification() -> None:
    assert GOLDEN.read_text() == text(), "run tests/python/golden_fields.py"


def write(folder: Path, container: str) -> None:
    for index, rows in enumerate(documents()):
        kind, codec = container.split("-")[0], CONTAINERS[container]
        path = folder / f"{index}.{kind}"
        if kind == "parquet":
            pq.write_table(table(rows), path, compression=codec, row_group_size=3)
            continue
        options = pyarrow.ipc.IpcWriteOptions(compression=None if codec == "none" else codec)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table(rows).schema, options=options) as writer:
            writer.write_table(table(rows), max_chunksize=3)


@pytest.mark.parametrize("container", CONTAINERS)
def test_batches_are_the_golden_ones(tmp_path: Path, container: str) -> None:
    write(tmp_path, container)
    for case in json.loads(GOLDEN.read_text()):
        settings = {**case["settings"]}
        settings["shuffle"] = settings["shuffle"] != "off" and settings["shuffle"]
        given: dict[str, Any] = dict(seq_len=8, batch_size=BATCH_SIZE, seed=SEED, pad_id=PAD_ID, fields=FIELDS)
        with forebay.Loader(tmp_path, boundaries=True, **given, **ORDER, **settings) as loader:
            for found, wanted in zip(loader, case["batches"], strict=True):
                nulls = found.pop("year_is_null").tolist()
                assert nulls == [year is None for year in wanted["year"]]
                wanted["year"] = [year or 0 for year in wanted["year"]]
                assert set(found) == set(wanted)
                for name, values in wanted.items():
                    array = found[name]
                    same = array == values if isinstance(array, list | int) else np.array_equal(array, np.array(values))
                    assert same, f"{case['settings']} {name}: {array}, expected {values}"
