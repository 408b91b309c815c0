"""Protects: a corpus in an object store gives the batches of its local copy, whatever the network does.

moto serves the objects. A proxy before it counts requests and makes faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("moto", reason="moto serves the objects")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import object_stores
from corpora import Cell
from object_stores import S3

import forebay

CELLS = {
    "parquet": Cell("pyarrow", "parquet"),
    "parquet zstd": Cell("pyarrow", "parquet", codec="zstd"),
    "arrow file": Cell("pyarrow", "arrow file"),
    "arrow stream": Cell("pyarrow", "arrow stream"),
    "arrow lz4": Cell("pyarrow", "arrow file", codec="lz4"),
    "npy": Cell("numpy", "npy", kind="plain", dtype="u16", options={"single": True}),
    "raw": Cell("numpy", "raw", kind="plain", dtype="u16", options={"single": True}),
    "megatron": Cell("megatron", "megatron", dtype="i32", options={"single": True, "sentences": 9}),
    "datatrove": Cell("datatrove", "datatrove", dtype="u16", options={"single": True}),
}


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch, object_stores.s3() as store:
        for name, value in object_stores.CREDENTIALS.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(autouse=True)
def calm(store: S3) -> Iterator[None]:
    """Ends the faults of a test."""
    yield
    store.proxy.fault, store.proxy.latency = None, 0.0


def written(kind: str, folder: Path) -> Path:
    cell = CELLS[kind]
    if not corpora.available(cell.writer):
        pytest.skip(f"{cell.writer} is not installed")
    return corpora.write(cell, folder, corpora.documents_of(cell, tokens_per_shard=3000))


def epoch(data: Any, **settings: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The batches of an epoch, and the state in its middle."""
    chosen = {"seq_len": 64, "batch_size": 4, "shuffle": True, "seed": 3, "lanes": 2, **settings}
    with forebay.Loader(data, **chosen) as loader:
        batches, state = [], {}
        for number, batch in enumerate(loader):
            batches.append(np.array(batch["input_ids"]))
            if number == 2:
                state = loader.state_dict()
        return batches, state


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("layout", ["concat", "pack"])
def test_batches_and_states_are_those_of_the_local_copy(store: S3, tmp_path: Path, kind: str, layout: str) -> None:
    folder = written(kind, tmp_path / "corpus")
    url = store.upload(folder, f"{kind.replace(' ', '-')}/{layout}")
    settings: dict[str, Any] = {"layout": layout}
    if CELLS[kind].bin_dtype is not None:
        settings["bin_dtype"] = CELLS[kind].bin_dtype
    batches, state = epoch(folder, **settings)
    found, remote = epoch(url, **settings, **store.settings)
    same(found, batches)
    assert remote == state


def test_every_way_to_name_shards_gives_the_same_corpus(store: S3, tmp_path: Path) -> None:
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "names/deep/corpus")
    names = sorted(path.name for path in folder.iterdir())
    expected = epoch(str(folder))
    for data in (url, f"{url}/", f"{url}/*.parquet", [f"{url}/{name}" for name in names]):
        found = epoch(data, **store.settings)
        same(found[0], expected[0])
        assert found[1] == expected[1]
    deep = epoch(f"s3://{object_stores.BUCKET}/names/**/*.parquet", **store.settings)
    same(deep[0], expected[0])
