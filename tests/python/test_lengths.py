"""Protects: document lengths are read once and saved, and counts that follow from them are exact.

`reference_layout.py` and plain sums are the judges.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_layout import LayoutSettings, is_held_out, rows
from support import clean_environment

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora

import forebay

SETTINGS: list[dict[str, Any]] = [
    {"layout": "pack", "seq_len": 32},
    {"layout": "pack", "seq_len": 64, "overflow": "drop", "targets": "shifted"},
    {"layout": "pack", "seq_len": 16, "overflow": "truncate", "max_docs_per_row": 2, "pack_align": 4},
    {"layout": "pad", "seq_len": 32, "overflow": "truncate"},
    {"layout": "pad", "seq_len": 8, "holdout": 4, "split": "holdout"},
]


def documents(draw: random.Random, many: int) -> list[list[int]]:
    lengths = [draw.choice([0, 1, 3, 9, 30, 31, 70, 200]) for _ in range(many)]
    return [[draw.randrange(1000) for _ in range(length)] for length in lengths]


def corpus(folder: Path, suffix: str, seed: int = 5) -> list[list[int]]:
    """Writes three shards, one of them empty, and returns the lengths of their documents."""
    folder.mkdir()
    draw = random.Random(seed)
    lengths = []
    for number, many in enumerate([150, 0, 90]):
        found = documents(draw, many)
        corpora.write_rows(folder / f"{number}{suffix}", found)
        lengths.append([len(document) for document in found if document])
    return lengths


def forebay_json(*given: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "forebay", *map(str, given), "--json"],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def damage(folder: Path) -> None:
    """Overwrites all shards, and keeps what a start compares: size and time."""
    for path in folder.iterdir():
        stat = path.stat()
        path.write_bytes(b"\xff" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_start_from_saved_lengths_reads_no_shard(tmp_path: Path, suffix: str) -> None:
    lengths = corpus(tmp_path / "corpus", suffix)
    cache = tmp_path / "cache"
    with forebay.Loader(tmp_path / "corpus", cache_dir=cache, **SETTINGS[0]) as loader:
        assert loader.num_sequences == len(rows(lengths, LayoutSettings(**SETTINGS[0])))
    damage(tmp_path / "corpus")
    for settings in SETTINGS:
        # The second time, the number of rows comes from a table, and the lengths are not read.
        for _ in range(2):
            with forebay.Loader(tmp_path / "corpus", cache_dir=cache, **settings) as loader:
                assert loader.num_sequences == len(rows(lengths, LayoutSettings(**settings))), settings


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_batches_are_the_same_from_saved_lengths(tmp_path: Path, suffix: str, settings: dict[str, Any]) -> None:
    corpus(tmp_path / "corpus", suffix)
    given = {**settings, "shuffle": "block", "lanes": 2, "chunk_tokens": 256, "window_tokens": 512}
    with forebay.Loader(tmp_path / "corpus", **given) as loader:
        wanted = list(loader)
    assert wanted
    for _ in range(3):
        with forebay.Loader(tmp_path / "corpus", cache_dir=tmp_path / "cache", **given) as loader:
            for found, batch in zip(loader, wanted, strict=True):
                assert all(np.array_equal(found[name], batch[name]) for name in batch)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_only_lengths_of_changed_shards_are_read_again(tmp_path: Path, suffix: str) -> None:
    lengths = corpus(tmp_path / "corpus", suffix)
    settings = {"cache_dir": tmp_path / "cache", **SETTINGS[0]}
    with forebay.Loader(tmp_path / "corpus", **settings):
        pass
    damage(tmp_path / "corpus")
    added = documents(random.Random(8), 40)
    corpora.write_rows(tmp_path / "corpus" / f"9{suffix}", added)
    corpora.write_rows(tmp_path / "corpus" / f"1{suffix}", added)
    new = [len(document) for document in added if document]
    lengths = [lengths[0], new, lengths[2], new]
    with forebay.Loader(tmp_path / "corpus", **settings) as loader:
        assert loader.num_sequences == len(rows(lengths, LayoutSettings(**SETTINGS[0])))


@pytest.mark.parametrize("suffix", ["lengths", "rows"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    lengths = corpus(tmp_path / "corpus", ".parquet")
    wanted = len(rows(lengths, LayoutSettings(**SETTINGS[0])))
    for cut in (0, 5, 60):
        with forebay.Loader(tmp_path / "corpus", cache_dir=tmp_path / "cache", **SETTINGS[0]):
            pass
        [path] = (tmp_path / "cache").glob(f"*.forebay-{suffix}")
        path.write_bytes(path.read_bytes()[:cut])
        if suffix == "lengths":
            # Without the table, the layout needs the lengths.
            [table] = (tmp_path / "cache").glob("*.forebay-rows")
            table.unlink()
        with forebay.Loader(tmp_path / "corpus", cache_dir=tmp_path / "cache", **SETTINGS[0]) as loader:
            assert loader.num_sequences == wanted
    assert "it is made anew" in caplog.text


@pytest.mark.parametrize("side", [{}, {"holdout": 3, "split": "train"}, {"holdout": 3, "split": "holdout"}], ids=str)
@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_plan_and_stats_count_padding_and_losses(
    tmp_path: Path, settings: dict[str, Any], side: dict[str, Any]
) -> None:
    lengths = corpus(tmp_path / "corpus", ".parquet")
    settings = {**settings, **side}
    s = LayoutSettings(**settings)
    found = rows(lengths, s)
    tokens = sum(segment.length for row in found for segment in row)
    places = len(found) * s.capacity
    all_lengths = [length for shard in lengths for length in shard]
    if s.holdout:
        held = s.split == "holdout"
        all_lengths = [length for number, length in enumerate(all_lengths) if is_held_out(number, s.holdout) == held]
    long = [length for length in all_lengths if length > s.capacity]
    lost = sum(length - s.capacity for length in long)
    wanted = {
        "truncated_documents": len(long) if s.overflow == "truncate" else 0,
        "truncated_tokens": lost if s.overflow == "truncate" else 0,
        "dropped_documents": len(long) if s.overflow == "drop" else 0,
        "dropped_tokens": sum(long) if s.overflow == "drop" else 0,
    }
    assert tokens + wanted["truncated_tokens"] + wanted["dropped_tokens"] == sum(all_lengths)
    assert long, "without long documents nothing is lost"

    sets = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    [source] = forebay_json("plan", tmp_path / "corpus", *sets)["sources"]
    assert {name: source[name] for name in wanted} == wanted
    assert (source["row_tokens"], source["padding_places"]) == (tokens, places - tokens)
    assert source["padding_share"] == pytest.approx((places - tokens) / places)

    with forebay.Loader(tmp_path / "corpus", **settings) as loader:
        for _ in loader:
            pass
        stats = loader.stats()
    assert {name: stats[name] for name in wanted} == wanted
    assert stats["tokens"] == tokens
    assert stats["padding_share"] == pytest.approx((places - tokens) / places)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("block_tokens", [64, 1 << 17])
def test_check_shows_the_distribution_of_lengths(tmp_path: Path, suffix: str, block_tokens: int) -> None:
    lengths = corpus(tmp_path / "corpus", suffix)
    found = forebay_json("check", tmp_path / "corpus", "--set", f"block_tokens={block_tokens}")["lengths"]
    known = sorted(length for shard in lengths for length in shard)
    assert found["p50"] == known[-(-len(known) // 2) - 1]
    assert found["p99"] == known[-(-len(known) * 99 // 100) - 1]
    assert found["longest"] == known[-1]
    before = 0
    for line in found["histogram"]:
        assert line["documents"] == sum(before < length <= line["up_to"] for length in known)
        before = line["up_to"]
    assert sum(line["documents"] for line in found["histogram"]) == len(known)
