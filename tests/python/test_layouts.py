"""Tests rows of whole documents, and their boundaries, against the specification.

Every layout is read from every cell of the matrix of formats and writers, with shuffling off and by
blocks. Threads, ranks, targets, document marks and the settings of layouts take turns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_layouts
import numpy as np
import pytest
from reference_documents import Documents, arrays, batch, chunk_order, laid_out, window_starts
from reference_layout import LayoutSettings
from reference_order import block_order, global_order
from reference_run import side

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from corpora import Cell

import forebay

CELLS = corpora.cells()
LAYOUTS = ("pack", "pad", "concat")
MARKS = ((None, None), (None, 2), (1, 2), (1, None))
ORDER = {"chunk_tokens": 512, "window_tokens": 2048, "lanes": 4}
PAD_ID = 7


def test_the_golden_rows_are_those_of_the_specification() -> None:
    assert golden_layouts.GOLDEN.read_text() == golden_layouts.text(), "run tests/python/golden_layouts.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[Cell, Path] = {}

    def write(cell: Cell) -> Path:
        if cell not in known:
            if not corpora.available(cell.writer):
                pytest.skip(f"{cell.writer} is not installed")
            known[cell] = corpora.write(cell, tmp_path_factory.mktemp("cell"))
        return known[cell]

    return write


class Expected:
    """All batches of a run, by the specification."""

    def __init__(self, data: Any, s: LayoutSettings, boundaries: bool, **given: Any) -> None:
        self.s, self.given = s, given
        corpus = Documents(data, given.get("bos_id"), given.get("eos_id"), given.get("bin_dtype"))
        found = [arrays(row, s, PAD_ID, boundaries) for row in laid_out(corpus, s)]
        rows = list(range(len(found)))
        if s.layout in ("concat", "rows"):
            rows = side(len(found), s.holdout, s.split)
        self.rows = [found[row] for row in rows]
        # A holdout changes the number of rows before each window.
        self.starts = window_starts(corpus, s) if s.layout in ("pack", "pad") and not s.holdout else [0]

    def order(self, epoch: int) -> list[int]:
        n, s, seed = len(self.rows), self.s, self.given["seed"]
        if self.given["shuffle"] == "block":
            shape = {"seed": seed, "epoch": epoch, "seq_len": s.seq_len, **ORDER}
            if s.layout in ("pack", "pad"):
                return chunk_order(n, self.starts, **shape)
            return block_order(n, **shape)
        if self.given["shuffle"] == "global":
            return global_order(n, seed=seed, epoch=epoch)
        return list(range(n))

    def batches(self, epoch: int, rank: int, world_size: int, batch_size: int) -> list[dict[str, Any]]:
        order, size = self.order(epoch), batch_size * world_size
        steps = [order[at : at + size] for at in range(0, len(order) - size + 1, size)]
        return [batch([self.rows[row] for row in step[rank::world_size]], self.s.seq_len) for step in steps]


def assert_same(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    assert set(found) == set(wanted), where
    for name, values in wanted.items():
        if name == "max_seqlen":
            assert type(found[name]) is int and found[name] == values, f"{where}: {name}"
        else:
            assert np.array_equal(np.asarray(found[name]), np.array(values)), f"{where}: {name}"


def arguments(s: LayoutSettings, boundaries: bool) -> dict[str, Any]:
    given = {name: value for name, value in vars(s).items() if value is not None}
    return {**given, "boundaries": boundaries, "pad_id": PAD_ID, **ORDER}


def settings_of(layout: str, turn: int) -> LayoutSettings:
    given: dict[str, Any] = {"targets": ("labels", "shifted")[turn % 2], "seq_len": (64, 32, 128)[turn % 3]}
    given["ignore_index"] = (-100, -1)[turn // 2 % 2]
    if layout in ("pack", "pad"):
        given["overflow"] = ("split", "truncate", "drop")[turn % 3]
    if layout == "pack":
        given["max_docs_per_row"] = (None, 3, None)[turn % 3]
        given["pack_align"] = (1, 4, 8)[turn // 2 % 3]
    return LayoutSettings(layout=layout, **given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", range(len(CELLS)), ids=[str(cell) for cell in CELLS])
def test_batches_equal_the_specification(written: Any, index: int, layout: str) -> None:
    path, turn = written(CELLS[index]), index + LAYOUTS.index(layout)
    s, boundaries = settings_of(layout, turn), turn % 4 != 3
    bos, eos = MARKS[turn // 2 % 4]
    given = {"seed": 11 + index, "shuffle": ("off", "block", "global")[turn % 3], "bos_id": bos, "eos_id": eos}
    if CELLS[index].bin_dtype is not None:
        given["bin_dtype"] = CELLS[index].bin_dtype
    expected = Expected(path, s, boundaries, **given)
    if not expected.rows:
        # Every document of this cell is longer than a row.
        s = replace(s, overflow="split")
        expected = Expected(path, s, boundaries, **given)
    world_size, epoch, batch_size = 1 + index % 2, index % 2, 1 + turn % 3
    if len(expected.rows) < batch_size * world_size:
        world_size = batch_size = 1
    shuffle = False if given["shuffle"] == "off" else given["shuffle"]
    for rank in range(world_size):
        options = {**given, "shuffle": shuffle, "batch_size": batch_size, "num_threads": (0, 1, 4)[turn % 3]}
        ranks = {"dp_rank": rank, "dp_world_size": world_size, "block_tokens": (1000, 1 << 17)[turn % 2]}
        with forebay.Loader(path, **arguments(s, boundaries), **options, **ranks) as loader:
            assert loader.num_sequences == len(expected.rows)
            loader.set_epoch(epoch)
            wanted = expected.batches(epoch, rank, world_size, batch_size)
            for step, (found, rows) in enumerate(zip(loader, wanted, strict=True)):
                assert_same(found, rows, f"rank {rank} of {world_size}, step {step}")
            assert wanted, "a corpus too small to give a batch proves nothing"
            last = len(wanted) - 1
            assert_same(loader.batch_at(last, epoch), wanted[last], "batch_at")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["parquet", "arrow file"])
def test_resume_and_ranks_keep_the_order(written: Any, layout: str, container: str) -> None:
    path = written(next(c for c in CELLS if (c.writer, c.container) == ("pyarrow", container)))
    s = settings_of(layout, 0)
    given = {"seed": 3, "shuffle": "block"}
    expected = Expected(path, s, True, **given)
    states = []
    with forebay.Loader(path, **arguments(s, True), **given, batch_size=4) as loader:
        wanted = expected.batches(0, 0, 1, 4)
        for found, rows in zip(loader, wanted, strict=True):
            assert_same(found, rows, "whole")
            states.append(loader.state_dict())
    for done in (0, len(states) // 2):
        for rank in range(2):
            ranks = {"dp_rank": rank, "dp_world_size": 2, "batch_size": 2}
            with forebay.Loader(path, **arguments(s, True), **given, **ranks) as loader:
                loader.load_state_dict(states[done])
                for found, rows in zip(loader, expected.batches(0, rank, 2, 2)[done + 1 :], strict=True):
                    assert_same(found, rows, f"rank {rank} after {done}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_holdout_draws_documents(written: Any, layout: str) -> None:
    path = written(next(c for c in CELLS if (c.writer, c.container) == ("pyarrow", "parquet")))
    for part in ("train", "holdout"):
        s = LayoutSettings(layout=layout, seq_len=64, holdout=3, split=part)
        expected = Expected(path, s, True, seed=0, shuffle="off")
        with forebay.Loader(path, **arguments(s, True)) as loader:
            for found, rows in zip(loader, expected.batches(0, 0, 1, 1), strict=True):
                assert_same(found, rows, part)


def test_consumers_of_a_split_loader_get_borders_of_their_own_rows(written: Any) -> None:
    path = written(next(c for c in CELLS if (c.writer, c.container) == ("pyarrow", "arrow file")))
    s = settings_of("pack", 0)
    expected = Expected(path, s, True, seed=0, shuffle="off")
    with forebay.Loader(path, **arguments(s, True), batch_size=4) as loader:
        parts = [iter(part) for part in loader.split(2)]
        for step in range(len(expected.batches(0, 0, 2, 2))):
            for rank, part in enumerate(parts):
                assert_same(next(part), expected.batches(0, rank, 2, 2)[step], f"consumer {rank}")


def test_cu_seqlens_of_a_fixed_width(tmp_path: Path) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", [[5] * 3, [6] * 4, [7] * 2])
    given = {"layout": "pack", "seq_len": 10}
    with forebay.Loader(path, **given, cu_seqlens_width=6) as loader:
        [found] = list(loader)
        assert found["cu_seqlens"].tolist() == [0, 3, 7, 9, 10, 10] and found["max_seqlen"] == 4
    with forebay.Loader(path, **given, cu_seqlens_width=4) as loader, pytest.raises(ValueError, match="raise it"):
        list(loader)


def test_documents_that_are_rows(tmp_path: Path) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", [[at * 4 + k for k in range(4)] for at in range(9)])
    with forebay.Loader(path, layout="rows", seq_len=4, batch_size=3) as loader:
        assert [row.tolist() for found in loader for row in found["input_ids"]][8] == [32, 33, 34, 35]
    with pytest.raises(ValueError, match="exactly 5 tokens"):
        forebay.Loader(path, layout="rows", seq_len=5)


@pytest.mark.parametrize(
    "given",
    [
        {"overflow": "drop"},
        {"max_docs_per_row": 2},
        {"layout": "pad", "pack_align": 4},
        {"layout": "pack", "pack_align": 3},
        {"layout": "pad", "cu_seqlens_width": 8},
        {"layout": "pack", "batch_size": 1 << 30},
    ],
)
def test_settings_of_another_layout_are_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"layout|boundaries|multiple"):
        forebay.Loader(path, seq_len=4, **given)
