"""Tests that mixtures, skips, extension and ranks work on rows in every layout.

The rows are those of the specification. `sample_ids` gives the source and the number of each row.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_documents import Documents, arrays, laid_out
from reference_layout import LayoutSettings

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora

import forebay

LAYOUTS = [
    {"layout": "pack"},
    {"layout": "pack", "overflow": "drop", "max_docs_per_row": 2, "pack_align": 4},
    {"layout": "pad", "overflow": "truncate"},
    {"layout": "pad", "pad_to_multiple": 4, "bucket": 24},
    {"layout": "concat"},
    {"layout": "rows"},
]
ORDER: dict[str, Any] = {"shuffle": "block", "lanes": 4, "chunk_tokens": 128, "window_tokens": 512, "seed": 5}
PAD_ID = 7


def shard(path: Path, seed: int, layout: dict[str, Any], many: int = 60) -> None:
    draw = random.Random(seed)
    choices = [16] if layout["layout"] == "rows" else [1, 3, 9, 20, 40]
    lengths = [draw.choice(choices) for _ in range(many)]
    corpora.write_rows(path, [[draw.randrange(1000) for _ in range(length)] for length in lengths])


def corpus(folder: Path, suffix: str, shards: int, layout: dict[str, Any], seed: int = 1) -> Path:
    folder.mkdir()
    for number in range(shards):
        shard(folder / f"{number}{suffix}", seed * 100 + number, layout)
    return folder


def rows_of(data: Path, layout: dict[str, Any]) -> list[dict[str, Any]]:
    s = LayoutSettings(seq_len=16, **layout)
    return [arrays(row, s, PAD_ID, True) for row in laid_out(Documents(data, **corpora.SPLIT), s)]


def settings_of(layout: dict[str, Any], suffix: str = "") -> dict[str, Any]:
    split = corpora.SPLIT if suffix == ".bin" else {}
    return {**ORDER, **layout, **split, "seq_len": 16, "boundaries": True, "pad_id": PAD_ID, "sample_ids": True}


def taken(loader: Any) -> list[tuple[int, int, dict[str, Any]]]:
    """Source, number and arrays of each row that a pass delivers, in order."""
    found = []
    for batch in loader:
        for row, (source, number) in enumerate(zip(batch["source"], batch["sample_index"], strict=True)):
            found.append((int(source), int(number), {name: batch[name][row] for name in NAMES}))
    return found


NAMES = ("input_ids", "labels", "position_ids", "doc_ids")


def assert_rows(found: list[tuple[int, int, dict[str, Any]]], wanted: list[list[dict[str, Any]]]) -> None:
    for source, number, row in found:
        for name in NAMES:
            # With `pad_to_multiple`, a row may end before `seq_len`.
            whole, end = wanted[source][number][name], len(row[name])
            assert np.array_equal(row[name], whole[:end]), f"row {number} of {source}: {name}"
            assert name != "doc_ids" or set(whole[end:]) <= {-1}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("suffixes", [(".parquet",) * 2, (".arrow",) * 2, (".bin",) * 2, (".parquet", ".bin")], ids=str)
def test_a_mixture_draws_rows_of_the_layout(tmp_path: Path, layout: dict[str, Any], suffixes: tuple[str, str]) -> None:
    sources = [
        corpus(tmp_path / name, suffix, 2, layout, seed)
        for seed, (name, suffix) in enumerate(zip("ab", suffixes, strict=True), 1)
    ]
    mixture = {
        "sources": [
            {"name": path.name, "data": str(path), "weight": weight}
            for path, weight in zip(sources, (0.75, 0.25), strict=True)
        ]
    }
    wanted = [rows_of(path, layout) for path in sources]
    settings = settings_of(layout, suffixes[1])
    with forebay.Loader(mixture=mixture, batch_size=2, **settings) as loader:
        whole = taken(loader)
    assert_rows(whole, wanted)
    numbers = [[number for source, number, _ in whole if source == index] for index in range(2)]
    assert all(numbers)
    # `exhausted` is `stop`: no row comes twice.
    assert all(len(set(of_source)) == len(of_source) for of_source in numbers)
    share = len(numbers[0]) / len(whole)
    assert abs(share - 0.75) < 0.05
    # Two ranks take turns in the same order.
    ranks = []
    for rank in range(2):
        with forebay.Loader(mixture=mixture, dp_rank=rank, dp_world_size=2, **settings) as loader:
            ranks.append(taken(loader))
    merged = [row[:2] for pair in zip(*ranks, strict=True) for row in pair]
    assert merged == [row[:2] for row in whole[: len(merged)]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".bin"])
def test_skipped_positions_are_left_out(tmp_path: Path, layout: dict[str, Any], suffix: str) -> None:
    data = corpus(tmp_path / "corpus", suffix, 3, layout)
    with forebay.Loader(data, **settings_of(layout, suffix)) as loader:
        whole = taken(loader)
    assert_rows(whole, [rows_of(data, layout)])
    with forebay.Loader(data, skip=[(3, 10), (20, 21)], **settings_of(layout, suffix)) as loader:
        found = taken(loader)
    kept = [row for position, row in enumerate(whole) if not (3 <= position < 10 or position == 20)]
    assert [row[:2] for row in found] == [row[:2] for row in kept]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".bin"])
def test_new_shards_join_at_the_next_epoch(tmp_path: Path, layout: dict[str, Any], suffix: str) -> None:
    data = corpus(tmp_path / "corpus", suffix, 2, layout)
    settings = settings_of(layout, suffix)
    before = rows_of(data, layout)
    with forebay.Loader(data, epochs=2, **settings) as loader:
        first = taken(loader)[: len(before)]
    state = None
    with forebay.Loader(data, **settings) as loader:
        for step, _ in enumerate(loader):
            if step == 4:
                state = loader.state_dict()
                break
    assert state is not None
    shard(data / f"2{suffix}", 999, layout)
    after = rows_of(data, layout)
    # The rows of the first shards are the same rows in the larger corpus.
    assert after[: len(before)] == before and len(after) > len(before)
    with forebay.Loader(data, epochs=2, extend=True, **settings) as loader:
        loader.load_state_dict(state)
        found = taken(loader)
    assert_rows(found, [after])
    rest = len(before) - 5
    assert [row[:2] for row in found[:rest]] == [row[:2] for row in first[5:]]
    assert sorted(row[1] for row in found[rest:]) == list(range(len(after)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("suffix", [".parquet", ".bin"])
def test_a_holdout_shares_out_what_it_draws(tmp_path: Path, layout: dict[str, Any], suffix: str) -> None:
    data = corpus(tmp_path / "corpus", suffix, 3, layout)
    tokens = []
    for split in ("train", "holdout"):
        with forebay.Loader(data, holdout=4, split=split, **settings_of(layout, suffix)) as loader:
            tokens.append(sum(int((row["doc_ids"] >= 0).sum()) for _, _, row in taken(loader)))
    with forebay.Loader(data, **settings_of(layout, suffix)) as loader:
        whole = sum(int((row["doc_ids"] >= 0).sum()) for _, _, row in taken(loader))
    assert all(tokens) and sum(tokens) == whole
    assert tokens[1] < tokens[0]
