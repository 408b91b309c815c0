"""Compares the batches of every format and writer with the naive reference loader.

Every cell of the matrix is read with shuffling off, global and by blocks. Threads, document marks,
targets, remainder, epoch and ranks take turns over the cells, so that each pair of them meets
several writers.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from reference import Reference, Settings, resolve_shuffle, token_stream

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from corpora import Cell
from support import assert_batch, open_loader

CELLS = corpora.cells()
THREADS = (1, 2, 8)
MARKS = ((None, None), (None, 2), (1, 2), (1, None))
TARGETS = ("labels", "shifted")
REMAINDERS = ("drop", "pad", "wrap", "short")
SHUFFLES = ("off", "global", "block")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a cell's corpus once for all of its tests."""
    known: dict[Cell, tuple[Path, dict[str, str]]] = {}

    def write(cell: Cell) -> tuple[Path, dict[str, str]]:
        if cell not in known:
            if not corpora.available(cell.writer):
                pytest.skip(f"{cell.writer} is not installed")
            path = corpora.write(cell, tmp_path_factory.mktemp("cell"))
            known[cell] = path, corpora.observed(cell, path)
        return known[cell]

    return write


def settings_of(index: int, shuffle: str) -> Settings:
    """Settings for one cell; strides differ so that every pair of values meets."""
    turn = index * 3 + SHUFFLES.index(shuffle)
    bos, eos = MARKS[(turn // 2) % 4]
    return Settings(
        seq_len=(64, 33, 128)[turn % 3],
        batch_size=4,
        targets=TARGETS[(turn // 3) % 2],
        ignore_index=(-100, -1, 0)[(turn // 4) % 3],
        bos_id=bos,
        eos_id=eos,
        shuffle=shuffle,
        seed=1234 + index,
        chunk_tokens=(512, 1, 2000)[(turn // 5) % 3],
        window_tokens=(4096, 300, 1 << 20)[(turn // 7) % 3],
        lanes=(4, 1, 8)[(turn // 2) % 3],
        remainder=REMAINDERS[(turn // 3) % 4],
        pad_id=7,
    )


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("index", range(len(CELLS)), ids=[str(cell) for cell in CELLS])
def test_batches_equal_the_reference(written: Any, record_property: Any, index: int, shuffle: str) -> None:
    cell = CELLS[index]
    record_property("cell", str(cell))
    path, facts = written(cell)
    settings = settings_of(index, shuffle)
    threads = THREADS[(index + SHUFFLES.index(shuffle)) % 3]
    epoch, world_size = index % 2, 1 + index % 3
    stream = token_stream(path, bos_id=settings.bos_id, eos_id=settings.eos_id, **cell.reading)
    reference = Reference(stream, settings)
    if settings.remainder == "short" and reference.short_is_refused(world_size):
        world_size = 1

    seen = 0
    for rank in range(world_size):
        options: dict[str, Any] = {"num_threads": threads, "block_tokens": (1000, 1 << 17)[index % 2]}
        options |= cell.reading
        with open_loader(path, settings, dp_rank=rank, dp_world_size=world_size, **options) as loader:
            assert loader.num_sequences == reference.num_sequences
            assert len(loader) == reference.steps(world_size)
            loader.set_epoch(epoch)
            expected = reference.batches(epoch=epoch, rank=rank, world_size=world_size)
            step = -1
            for step, (batch, rows) in enumerate(zip(loader, expected, strict=True)):
                assert_batch(batch, rows, settings.targets, f"rank {rank} of {world_size}, step {step}")
                seen += len(rows)
            assert step + 1 == reference.steps(world_size)
    assert seen > 0, "a corpus too small to give a batch proves nothing"
    record_property("facts", {"writer": cell.writer, "format": cell.container, "note": cell.note, **facts})


@pytest.mark.parametrize("container", ["parquet", "arrow file", "arrow stream"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_shuffle_true_is_global_for_plain_arrow_and_block_otherwise(written: Any, container: str, codec: str) -> None:
    cell = next(c for c in CELLS if (c.writer, c.container, c.codec) == ("pyarrow", container, codec))
    path, _ = written(cell)
    settings = Settings(
        seq_len=32, batch_size=4, seed=5, shuffle=resolve_shuffle(True, decoded=cell.decoded),
        chunk_tokens=256, window_tokens=1024, lanes=4,
    )  # fmt: skip
    reference = Reference(token_stream(path), settings)
    with open_loader(path, settings, shuffle=True) as loader:
        for step, (batch, rows) in enumerate(zip(loader, reference.batches(), strict=True)):
            assert_batch(batch, rows, where=f"step {step}")


def test_all_formats_give_the_same_batches(tmp_path: Path) -> None:
    """Files are cut into shards differently too: the order is one of sequences, not of files."""
    docs = corpora.documents_of(Cell("pyarrow", "parquet", dtype="u32"))
    joined = [[document for shard in docs for document in shard]]
    made = [
        (Cell("pyarrow", "parquet", "zstd", dtype="u32"), docs),
        (Cell("pyarrow", "parquet", "none", "delta", dtype="u32"), joined),
        (Cell("pyarrow", "arrow file", dtype="u32"), joined),
        (Cell("pyarrow", "arrow stream", "lz4", kind="large_list", dtype="i64"), docs),
    ]
    paths = [corpora.write(cell, tmp_path / str(at), rows) for at, (cell, rows) in enumerate(made)]
    for shuffle, threads in zip(SHUFFLES, cycle((1, 2, 8)), strict=False):
        settings = Settings(
            seq_len=50, batch_size=3, eos_id=0, shuffle=shuffle, seed=9,
            chunk_tokens=400, window_tokens=2000, lanes=3, remainder="pad",
        )  # fmt: skip
        expected = list(Reference(token_stream(paths[0], eos_id=0), settings).batches())
        for path in paths:
            with open_loader(path, settings, num_threads=threads) as loader:
                for step, (batch, rows) in enumerate(zip(loader, expected, strict=True)):
                    assert_batch(batch, rows, where=f"{path.name}, {shuffle}, step {step}")


def test_inputs_are_a_file_a_folder_a_glob_or_a_list(tmp_path: Path) -> None:
    cell = Cell("pyarrow", "parquet", "snappy", dtype="i32")
    folder = corpora.write(cell, tmp_path / "corpus")
    files = sorted(folder.iterdir())
    (folder / "_hidden.parquet").write_bytes(b"not a shard")
    (folder / ".hidden.parquet").write_bytes(b"not a shard")
    nested = tmp_path / "nested"
    (nested / "b").mkdir(parents=True)
    (nested / "a").mkdir()
    corpora.write_rows(nested / "b" / "1.parquet", [[1, 2, 3, 4]])
    corpora.write_rows(nested / "a" / "2.parquet", [[5, 6, 7, 8]])
    corpora.write_rows(nested / "a-0.parquet", [[9, 10, 11, 12]])
    settings = Settings(seq_len=4, batch_size=1)
    inputs = [
        str(folder), folder, f"{folder}/*.parquet", files[0], str(files[2]), [files[2], str(files[0])],
        nested, [nested / "b", files[0]],
    ]  # fmt: skip
    for data in inputs:
        wanted = token_stream(files if data == f"{folder}/*.parquet" else data)
        with open_loader(data, settings) as loader:
            found = [int(v) for batch in loader for v in batch["input_ids"][0]]
        assert found == wanted[: len(wanted) // 4 * 4], f"{data}"


def test_token_column_is_found_by_name_or_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "shard.parquet"
    ids = {name: [[at * 10 + k for k in range(4)]] for at, name in enumerate(["ids", "token_ids", "tokens", "mine"])}
    pq.write_table(pa.table(ids), path)
    settings = Settings(seq_len=4, batch_size=1)
    for column, first in [(None, 20), ("ids", 0), ("token_ids", 10), ("mine", 30)]:
        with open_loader(path, settings, token_column=column) as loader:
            assert [int(b["input_ids"][0, 0]) for b in loader] == [first]


def test_types_and_shapes_of_a_batch(tmp_path: Path) -> None:
    import numpy as np

    path = corpora.write_rows(tmp_path / "shard.parquet", [list(range(1, 101))])
    for dtype in ("int64", "int32"):
        with open_loader(path, Settings(seq_len=10, batch_size=3), input_dtype=dtype) as loader:
            batch = next(iter(loader))
            assert type(batch) is dict
            assert list(batch) == ["input_ids", "labels"]
            assert batch["input_ids"].dtype == np.dtype(dtype)
            assert batch["labels"].dtype == np.int64
            assert not np.shares_memory(batch["input_ids"], batch["labels"])
    with open_loader(path, Settings(seq_len=10, batch_size=3, targets="shifted")) as loader:
        batch = next(iter(loader))
        assert list(batch) == ["x", "y"]
        assert batch["x"].dtype == batch["y"].dtype == np.int64
        assert np.array_equal(batch["x"][:, 1:], batch["y"][:, :-1])
        assert batch["x"].flags.c_contiguous and batch["y"].flags.c_contiguous
        assert not np.shares_memory(batch["x"], batch["y"])
