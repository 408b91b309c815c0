"""Tests that `vocab_size` refuses every id outside of the vocabulary, and names its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import pyarrow as pa
from support import clean_environment

import forebay

pytestmark = pytest.mark.hostile

SIZE = 200
ROW, PLACE = 40, 3
#: Suffix, type, and the options of the writer.
FILES: dict[str, tuple[str, pa.DataType, dict[str, Any]]] = {
    "parquet": ("parquet", pa.list_(pa.int32()), {"row_group_size": 16, "use_dictionary": False}),
    "parquet-dictionary": ("parquet", pa.list_(pa.int64()), {"row_group_size": 16}),
    "parquet-delta": (
        "parquet", pa.list_(pa.int32()), {"use_dictionary": False, "column_encoding": "DELTA_BINARY_PACKED"},
    ),
    "arrow": ("arrow", pa.list_(pa.int64()), {}),
    "arrow-u8": ("arrow", pa.list_(pa.uint8()), {}),
    "arrow-u16": ("arrow", pa.large_list(pa.uint16()), {}),
    "arrow-i16": ("arrow", pa.list_(pa.int16()), {"stream": True}),
    "arrow-fixed": ("arrow", pa.list_(pa.uint32(), 8), {}),
    "arrow-zstd": ("arrow", pa.list_(pa.int32()), {"compression": "zstd"}),
}  # fmt: skip
FLAT = {"npy": "u16", "raw": "u32", "llm.c": "u16"}


def rows(id_there: int) -> list[list[int]]:
    """Rows of ids below `SIZE`, with one id at a known place."""
    all_rows = [[(8 * row + place) % SIZE for place in range(8)] for row in range(64)]
    all_rows[ROW][PLACE] = id_there
    return all_rows


def written(folder: Path, name: str, id_there: int) -> tuple[Path, dict[str, Any]]:
    """The path of a file with the rows, and the settings that it needs."""
    if name in FLAT:
        suffix = corpora.SUFFIXES[name]
        cell = corpora.Cell("numpy", name, kind="plain", dtype=FLAT[name])
        corpora.FLAT_WRITERS[name](cell, folder / f"shard.{suffix}", rows(id_there))
        return folder / f"shard.{suffix}", {} if cell.bin_dtype is None else {"bin_dtype": cell.bin_dtype}
    suffix, dtype, options = FILES[name]
    path = corpora.write_rows(folder / f"shard.{suffix}", rows(id_there), dtype=dtype, **options)
    return path, {}


def delivered(path: Path, **settings: Any) -> list[int]:
    batches = []
    with forebay.Loader(path, **{"seq_len": 8, "batch_size": 2, **settings}) as loader:
        name = "x" if settings.get("targets") == "shifted" else "input_ids"
        for batch in loader:
            batches.append(np.asarray(batch[name]).ravel())
    return [int(token) for batch in batches for token in batch]


@pytest.mark.parametrize("name", [*FILES, *FLAT])
def test_ids_of_the_vocabulary_pass_and_the_next_one_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    path, settings = written(tmp_path, name, SIZE - 1)
    whole = [token for row in rows(SIZE - 1) for token in row]
    assert delivered(path, vocab_size=SIZE, **settings) == whole
    for id_there in {SIZE, SIZE + 1, 255}:
        path, settings = written(tmp_path, name, id_there)
        assert delivered(path, **settings) == [token for row in rows(id_there) for token in row], "nothing is checked"
        for more in ({"input_dtype": "int32"}, {"targets": "shifted"}, {"num_threads": 0}, {"shuffle": True}):
            with pytest.raises(forebay.DataError) as caught:
                delivered(path, vocab_size=SIZE, **settings, **more)
            text = str(caught.value)
            assert f"token id {id_there}" in text and f"`vocab_size` = {SIZE}" in text, text
            assert os.fspath(caught.value.path) == os.fspath(path)
            place = ROW if name not in FLAT else ROW * 8 + PLACE
            assert caught.value.row == place or (name in FLAT and caught.value.block is not None), text


def test_a_loader_refuses_the_batch_of_the_id_and_gives_all_before_it(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "arrow", SIZE)
    with forebay.Loader(path, seq_len=8, batch_size=2, vocab_size=SIZE) as loader:
        assert np.asarray(loader.batch_at(0)["input_ids"]).max() < SIZE
        with pytest.raises(forebay.DataError, match="token id 200"):
            loader.batch_at(ROW // 2)
        got = 0
        with pytest.raises(forebay.DataError, match="token id 200"):
            for _ in loader:
                got += 1
        assert got == ROW // 2
        assert loader.state_dict()["position"] == ROW


def test_a_state_does_not_depend_on_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "arrow", SIZE - 1)
    with forebay.Loader(path, seq_len=8, batch_size=2) as loader:
        next(iter(loader))
        state = loader.state_dict()
    with forebay.Loader(path, seq_len=8, batch_size=2, vocab_size=SIZE) as loader:
        loader.load_state_dict(state)
        assert np.asarray(next(iter(loader))["input_ids"])[0, 0] == 16


@pytest.mark.parametrize("name", ["bos_id", "eos_id", "pad_id"])
def test_special_ids_belong_to_the_vocabulary(tmp_path: Path, name: str) -> None:
    path, _ = written(tmp_path, "arrow", 0)
    given: dict[str, Any] = {name: SIZE}
    with pytest.raises(forebay.ConfigError, match=f"`{name}` = 200 must be below `vocab_size` = 200"):
        forebay.Loader(path, seq_len=8, vocab_size=SIZE, **given)
    forebay.Loader(path, seq_len=8, vocab_size=SIZE + 1, **given).close()


@pytest.mark.parametrize("name", ["parquet", "arrow", "arrow-zstd", "npy"])
def test_check_finds_the_id_and_its_row(tmp_path: Path, name: str) -> None:
    path, settings = written(tmp_path, name, SIZE)
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]

    def check(*more: str) -> tuple[int, Any]:
        command = [sys.executable, "-m", "forebay", "check", str(path), "--json", *sets, *more]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=clean_environment(), check=False
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout)

    assert check()[0] == 0
    assert check("--vocab-size", str(SIZE + 1))[0] == 0
    status, found = check("--vocab-size", str(SIZE))
    assert status == 1 and not found["sound"]
    [fault] = found["broken"]
    assert "token id 200" in fault["error"] and fault["path"] == str(path)
    if name not in FLAT:
        assert fault["row"] == ROW
