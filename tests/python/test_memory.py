"""Tests the memory of batches.

A batch belongs to its holder. Its memory comes back when the last view dies. All memory is bounded.
"""

from __future__ import annotations

import gc
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Settings

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from support import json_from, open_loader

SETTINGS = Settings(seq_len=64, batch_size=4, shuffle="block", chunk_tokens=4096, window_tokens=1 << 15)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of about 1500 batches of 4 x 64 tokens."""
    return corpora.unique_corpus(tmp_path_factory.mktemp("memory") / "corpus", "parquet", 400_000, shards=2)


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def test_held_batches_never_change(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS, num_threads=4, prefetch_batches=8) as loader:
        iterator = iter(loader)
        held = list(islice(iterator, 100))
        copies = [{name: array.copy() for name, array in batch.items()} for batch in held]
        assert sum(1 for _ in islice(iterator, 1000)) == 1000
    for batch, copy in zip(held, copies, strict=True):
        for name, array in copy.items():
            assert np.array_equal(batch[name], array)


@pytest.mark.parametrize("view", ["slice", "transposed", "memoryview", "torch", "other field", "torch slice"])
def test_a_view_keeps_its_batch(corpus: Path, view: str) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        iterator = iter(loader)
        batch = next(iterator)
        wanted = batch["input_ids"].copy()
        kept: Any
        match view:
            case "slice":
                kept, wanted = batch["input_ids"][1:, ::2], wanted[1:, ::2]
            case "transposed":
                kept, wanted = batch["input_ids"].T, wanted.T
            case "memoryview":
                kept = memoryview(batch["input_ids"])
            case "other field":
                kept = batch["labels"]
            case _:
                torch = pytest.importorskip("torch", reason="views of torch")
                kept = torch.from_numpy(batch["input_ids"])
                if view == "torch slice":
                    kept, wanted = kept[2, 5:], wanted[2, 5:]
        del batch
        gc.collect()
        assert sum(1 for _ in islice(iterator, 1000)) == 1000
        assert np.array_equal(np.asarray(kept), wanted)


def test_memory_is_used_again_once_a_batch_is_dropped(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS, prefetch_batches=4, num_threads=2) as loader:
        seen = {address(batch["input_ids"]) for batch in loader}
        assert len(loader) > 1000
    assert len(seen) < 50, f"{len(seen)} buffers for {len(loader)} batches"


def test_memory_of_a_held_slice_is_not_handed_out(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS, prefetch_batches=2) as loader:
        iterator = iter(loader)
        kept = [next(iterator)["input_ids"][0, 60:] for _ in range(20)]
        starts = {address(array) - 60 * array.itemsize for array in kept}
        assert len(starts) == 20
        assert not starts & {address(batch["input_ids"]) for batch in iterator}


def test_batches_can_be_written_without_harm(corpus: Path) -> None:
    """Masks labels in place, as many trainers do. Neither inputs nor later batches may change."""
    with open_loader(corpus, SETTINGS) as loader:
        for step, batch in enumerate(islice(loader, 200)):
            ids = batch["input_ids"].copy()
            batch["labels"][:] = -100
            assert np.array_equal(batch["input_ids"], ids)
            assert np.array_equal(loader.batch_at(step)["labels"], ids)


def test_batches_outlive_their_loader(corpus: Path) -> None:
    loader = open_loader(corpus, SETTINGS)
    batches = list(islice(loader, 30))
    copies = [batch["input_ids"].copy() for batch in batches]
    loader.close()
    del loader
    gc.collect()
    filler = [np.full(4 * 64, 7) for _ in range(100)]
    assert all(np.array_equal(b["input_ids"], c) for b, c in zip(batches, copies, strict=True))
    del filler


RSS = """
import gc, json, sys
from pathlib import Path
import numpy
import forebay

def rss():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no RssAnon in /proc/self/status")
"""

WHOLE_EPOCHS = (
    RSS
    + """
before = rss()
path, budget, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
peaks = []
settings = {"seq_len": 1024, "batch_size": 8, "shuffle": "block", "memory_budget": budget, "num_threads": 2}
with forebay.Loader(path, **settings) as loader:
    for _ in range(epochs):
        peak = 0
        for step, batch in enumerate(loader):
            if step % 8 == 0:
                peak = max(peak, rss())
        peaks.append(peak - before)
print(json.dumps(peaks))
"""
)

CYCLES = (
    RSS
    + """
path = sys.argv[1]
taken = 0
with forebay.Loader(path, seq_len=1024, batch_size=64, num_threads=2) as loader:
    size = 64 * 1024 * 8 * 2
    low = None
    for _ in range(40):
        for batch in loader:
            cycle = [batch, batch["input_ids"][1:]]
            cycle.append(cycle)
            taken += 1
            del cycle, batch
            if taken % 8 == 0:
                gc.collect()
                low = rss() if taken == 40 else low
    gc.collect()
    print(json.dumps([taken * size, rss() - low]))
"""
)


def needs_proc() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory is read from /proc")


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_memory_stays_under_the_budget_on_a_corpus_ten_times_larger(
    tmp_path: Path, container: str, stress: bool
) -> None:
    needs_proc()
    tokens = 20_000_000 if stress else 1_500_000
    budget = 48 << 20
    small = corpora.unique_corpus(tmp_path / "small", container, tokens)
    large = corpora.unique_corpus(tmp_path / "large", container, tokens * 10)
    (small_peak,) = json_from(WHOLE_EPOCHS, small, budget, 1)
    (large_peak,) = json_from(WHOLE_EPOCHS, large, budget, 1, timeout=600)
    # Besides the budget, there is room for the interpreter's own growth, for code, and for tables.
    assert small_peak < budget + (40 << 20)
    assert large_peak < budget + (40 << 20), f"{large_peak >> 20} MiB, {small_peak >> 20} MiB on a tenth"


def test_epochs_do_not_grow_memory(tmp_path: Path) -> None:
    needs_proc()
    corpus = corpora.unique_corpus(tmp_path / "corpus", "parquet", 1_000_000)
    peaks = json_from(WHOLE_EPOCHS, corpus, 48 << 20, 30)
    assert peaks[-1] < max(peaks[:10]) + (8 << 20), [peak >> 20 for peak in peaks]


def test_batches_in_reference_cycles_are_freed(tmp_path: Path) -> None:
    needs_proc()
    corpus = corpora.unique_corpus(tmp_path / "corpus", "arrow", 1_000_000)
    held, growth = json_from(CYCLES, corpus)
    assert held > 400 << 20
    assert growth < 64 << 20, f"{growth >> 20} MiB of {held >> 20} MiB stayed"


def test_the_pass_that_follows_finds_its_first_block_decoded(tmp_path: Path) -> None:
    corpus = corpora.unique_corpus(tmp_path / "corpus", "parquet", 400_000)
    # The corpus has eight blocks of 200 kB. Four of them fit.
    with open_loader(corpus, Settings(seq_len=64, batch_size=4), num_threads=1, memory_budget=1 << 20) as loader:
        for epoch in range(2):
            batches = iter(loader)
            assert next(batches)["input_ids"][0, 0] == 0
            # Workers end when the last batch is begun, and begin some batches ahead.
            for _ in range(len(loader) - 11):
                next(batches)
            deadline = time.monotonic() + 60
            while loader.stats()["decoded_blocks"] < 8 * (epoch + 1) + 1:
                assert time.monotonic() < deadline, loader.stats()
                time.sleep(0.001)
            assert sum(1 for _ in batches) == 10
            assert loader.stats()["decoded_blocks"] == 8 * (epoch + 1) + 1
        # Every row but those of the windows reads one block or two, which a worker has prepared.
        assert loader.stats()["found_blocks"] > 2 * 400_000 // 64 // 2
