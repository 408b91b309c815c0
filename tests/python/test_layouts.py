"""Tests rows of whole documents, and their boundaries, against the specification.

Every layout is read from every cell of the matrix of formats and writers, with shuffling off and by
blocks. Threads, ranks, targets, document marks and the settings of layouts take turns.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_batches
import golden_layouts
import numpy as np
import pytest
from reference_documents import Documents, batch_of, chunk_order, laid_out, window_starts
from reference_layout import LayoutSettings
from reference_order import block_order, global_order, in_buckets
from reference_run import side

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from corpora import Cell

import forebay

CELLS = corpora.cells()
LAYOUTS = ("pack", "pad", "concat", "rows")
MARKS = ((None, None), (None, 2), (1, 2), (1, None))
ORDER = {"chunk_tokens": 512, "window_tokens": 2048, "lanes": 4}
PAD_ID = 7


def test_the_golden_rows_are_those_of_the_specification() -> None:
    assert golden_layouts.GOLDEN.read_text() == golden_layouts.text(), "run tests/python/golden_layouts.py"


def test_golden_batches_stay_as_they_are(tmp_path: Path) -> None:
    data = golden_batches.corpora_in(tmp_path)
    assert golden_batches.GOLDEN.read_text() == golden_batches.text(data), "run tests/python/golden_batches.py"
    for case in json.loads(golden_batches.GOLDEN.read_text()):
        settings = case["settings"]
        given: dict[str, Any] = {**settings, **golden_batches.ORDER, "pad_id": golden_batches.PAD_ID}
        given |= {"shuffle": "block", "seed": golden_batches.SEED, "batch_size": golden_batches.BATCH_SIZE}
        with forebay.Loader(data[settings["layout"] == "rows"], boundaries=True, **given) as loader:
            loader.set_epoch(golden_batches.EPOCH)
            found = [dict(batch) for batch in loader]
        assert (len(found), golden_batches.hashed(found)) == (case["batches"], case["sha256"]), settings


def test_a_batch_is_as_long_as_its_longest_row(tmp_path: Path) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", [[1] * 3, [2] * 5, [3], [4] * 2, [5] * 30, [6]])
    given: dict[str, Any] = {"layout": "pad", "seq_len": 16, "batch_size": 2, "pad_to_multiple": 4}
    lengths = [8, 4, 16, 4]
    for targets in ("labels", "shifted"):
        with forebay.Loader(path, targets=targets, overflow="split", remainder="pad", **given) as loader:
            found = [batch["x" if targets == "shifted" else "input_ids"].shape for batch in loader]
            assert found == [(2, length) for length in lengths]
            assert loader.sequences_at(0, 2, 1)["y" if targets == "shifted" else "labels"].shape == (1, 4)
            assert 0 < loader.stats()["padding_share"] < 0.5


@pytest.mark.parametrize(
    "given",
    [
        {"layout": "pack", "pack_align": 4},
        {"layout": "pack", "targets": "shifted"},
        {"layout": "pad", "pad_to_multiple": 4},
        {"layout": "concat"},
    ],
    ids=str,
)
def test_a_mask_lets_places_see_their_own_document(tmp_path: Path, given: dict[str, Any]) -> None:
    rows = [[at + 1] * (1 + at * 7 % 19) for at in range(40)]
    path = corpora.write_rows(tmp_path / "shard.parquet", rows)
    given = {**given, "seq_len": 16, "batch_size": 2, "boundaries": True, "document_mask": True, "shuffle": True}
    with forebay.Loader(path, **given) as loader:
        batches = list(loader)
        parts = [batch for part in loader.split(2) for batch in [next(iter(part))]]
    assert len(batches) > 3
    for batch in [*batches, *parts]:
        shape = batch["position_ids"].shape
        mask = batch["document_mask"]
        assert mask.dtype == bool and mask.shape == (shape[0], 1, shape[1], shape[1])
        for row, positions in enumerate(batch["position_ids"]):
            # A place sees as many places before it as its position says.
            wanted = [
                [0 <= at - other <= position for other in range(shape[1])] for at, position in enumerate(positions)
            ]
            assert mask[row, 0].tolist() == wanted
    with pytest.raises(ValueError, match="document_mask"):
        forebay.Loader(path, **{**given, "boundaries": False})


def test_a_mask_is_a_tensor_for_attention(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from forebay.torch import DataLoader, TokenDataset

    path = corpora.write_rows(tmp_path / "shard.parquet", [[7] * 3, [8] * 5, [9] * 2, [6] * 7])
    dataset = TokenDataset(path, seq_len=10, layout="pack", document_mask=True)
    [batch] = list(DataLoader(dataset, batch_size=2))
    mask = batch["document_mask"]
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 10, 10) and mask.is_contiguous()
    values = torch.rand(2, 3, 10, 4)
    attended = torch.nn.functional.scaled_dot_product_attention(values, values, values, attn_mask=mask)
    # The first document of each row alone gives the same.
    for row, numbers in enumerate(batch["doc_ids"]):
        first = values[row : row + 1, :, : int((numbers == 0).sum())]
        alone = torch.nn.functional.scaled_dot_product_attention(first, first, first, is_causal=True)
        assert torch.allclose(attended[row : row + 1, :, : first.shape[2]], alone, atol=1e-6)


def test_buckets_save_padding_and_lose_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(3, 1, 4000).astype(int) + 1, 256)
    path = corpora.write_rows(tmp_path / "shard.parquet", [[at] * int(n) for at, n in enumerate(lengths)])
    given: dict[str, Any] = {"layout": "pad", "seq_len": 256, "batch_size": 16, "pad_to_multiple": 1, "pad_id": 5000}
    shares = []
    for bucket in (None, 2000):
        more = {} if bucket is None else {"bucket": bucket}
        with forebay.Loader(path, shuffle=True, window_tokens=1 << 19, **given, **more) as loader:
            seen = np.concatenate([batch["input_ids"][:, 0] for batch in loader])
            assert sorted(seen) == list(range(4000))
            shares.append(loader.stats()["padding_share"])
    assert shares[1] < 0.2 and shares[1] < shares[0] / 3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[tuple[Cell, bool], Path] = {}

    def write(cell: Cell, equal: bool = False) -> Path:
        if (cell, equal) not in known:
            if not corpora.available(cell.writer):
                pytest.skip(f"{cell.writer} is not installed")
            documents = corpora.documents_of(cell, equal=equal)
            known[cell, equal] = corpora.write(cell, tmp_path_factory.mktemp("cell"), documents)
        return known[cell, equal]

    return write


class Expected:
    """All batches of a run, by the specification."""

    def __init__(self, data: Any, s: LayoutSettings, boundaries: bool, **given: Any) -> None:
        self.s, self.boundaries, self.given = s, boundaries, given
        corpus = Documents(
            data, given.get("bos_id"), given.get("eos_id"), given.get("bin_dtype"), given.get("document_end_id")
        )
        found = laid_out(corpus, s)
        rows = list(range(len(found)))
        if s.layout in ("concat", "rows"):
            rows = side(len(found), s.holdout, s.split)
        self.rows = [found[row] for row in rows]
        # A holdout changes the number of rows before each window.
        self.starts = window_starts(corpus, s) if s.layout in ("pack", "pad") and not s.holdout else [0]

    def order(self, epoch: int) -> list[int]:
        order = self.shuffled(epoch)
        if self.s.bucket is None:
            return order
        lengths = [sum(len(cut) for _, cut in row) for row in self.rows]
        lanes = ORDER["lanes"] if self.given["shuffle"] == "block" else 1
        return in_buckets(order, lengths, size=self.s.bucket, seed=self.given["seed"], epoch=epoch, lanes=lanes)

    def shuffled(self, epoch: int) -> list[int]:
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
        return [
            batch_of([self.rows[row] for row in step[rank::world_size]], self.s, PAD_ID, self.boundaries)
            for step in steps
        ]


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
    if layout == "pad":
        given["pad_to_multiple"] = (None, 8, 16, 1)[turn // 2 % 4]
        given["bucket"] = None if given["pad_to_multiple"] is None else (None, 2, 24, 300)[turn // 3 % 4]
    if layout == "pack":
        given["max_docs_per_row"] = (None, 3, None)[turn % 3]
        given["pack_align"] = (1, 4, 8)[turn // 2 % 3]
    return LayoutSettings(layout=layout, **given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", range(len(CELLS)), ids=[str(cell) for cell in CELLS])
def test_batches_equal_the_specification(written: Any, index: int, layout: str) -> None:
    path, turn = written(CELLS[index], layout == "rows"), index + LAYOUTS.index(layout)
    s, boundaries = settings_of(layout, turn), turn % 4 != 3
    bos, eos = MARKS[turn // 2 % 4]
    if layout == "rows":
        marks = (bos is not None) + (eos is not None)
        s = replace(s, seq_len=corpora.FIXED + marks - (s.targets == "shifted"))
    given = {"seed": 11 + index, "shuffle": ("off", "block", "global")[turn % 3], "bos_id": bos, "eos_id": eos}
    given |= CELLS[index].reading
    if layout != "concat" and not CELLS[index].has_documents:
        with pytest.raises(forebay.ConfigError, match="set `document_end_id` to the last id of each document"):
            forebay.Loader(path, **arguments(s, boundaries), **CELLS[index].reading)
        return
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
    cell = next(c for c in CELLS if (c.writer, c.container, c.kind) == ("pyarrow", container, "list"))
    path = written(cell, layout == "rows")
    s = settings_of(layout, 0)
    if layout == "rows":
        s = replace(s, seq_len=corpora.FIXED)
    if layout == "pad":
        s = replace(s, pad_to_multiple=8, bucket=32)
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
    cell = next(c for c in CELLS if (c.writer, c.container, c.kind) == ("pyarrow", "parquet", "list"))
    path = written(cell, layout == "rows")
    for part in ("train", "holdout"):
        seq_len = corpora.FIXED if layout == "rows" else 64
        more: dict[str, Any] = {"pad_to_multiple": 4, "bucket": 20} if layout == "pad" else {}
        s = LayoutSettings(layout=layout, seq_len=seq_len, holdout=3, split=part, **more)
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
        {"layout": "pack", "pad_to_multiple": 4},
        {"layout": "pad", "pad_to_multiple": 3},
        {"layout": "pad", "bucket": 8},
        {"layout": "rows", "bucket": 8},
    ],
)
def test_settings_of_another_layout_are_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"layout|boundaries|multiple"):
        forebay.Loader(path, seq_len=4, **given)
