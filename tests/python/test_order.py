"""Tests that a batch is a pure function, and that an epoch gives each token once.

A batch depends on corpus, settings, epoch and position alone.

Large corpora count up, so a sequence is known by its first token, and whole epochs are checked in
NumPy.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference, Settings, token_stream
from reference_order import block_order, global_order

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from support import assert_batch, first_ids, open_loader

SEQ_LEN = 512
ORDERS = ("off", "global", "block")


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory, stress: bool) -> Any:
    """Corpora that count up to 5M, or 200M under `--stress`, in Parquet with zstd and in Arrow."""
    tokens = 200_000_003 if stress else 5_000_000
    folder = tmp_path_factory.mktemp("counting")
    known: dict[str, Path] = {}
    making = threading.Lock()

    def make(container: str) -> tuple[Path, int]:
        with making:
            if container not in known:
                known[container] = corpora.unique_corpus(folder / container, container, tokens)
            return known[container], tokens

    return make


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3000 tokens that count up, in 3 shards of Parquet."""
    return corpora.unique_corpus(tmp_path_factory.mktemp("small") / "corpus", "parquet", 3000, shards=3)


_KNOWN_ORDERS: dict[tuple[object, ...], list[int]] = {}


def expected_order(shuffle: str, n: int, epoch: int, settings: Settings) -> list[int]:
    key = (shuffle, n, epoch, repr(settings))
    if key not in _KNOWN_ORDERS:
        _KNOWN_ORDERS[key] = reference_order(shuffle, n, epoch, settings)
    return _KNOWN_ORDERS[key]


def reference_order(shuffle: str, n: int, epoch: int, settings: Settings) -> list[int]:
    if shuffle == "global":
        return global_order(n, seed=settings.seed, epoch=epoch)
    if shuffle == "block":
        return block_order(
            n, seed=settings.seed, epoch=epoch, seq_len=settings.seq_len, chunk_tokens=settings.chunk_tokens,
            window_tokens=settings.window_tokens, lanes=settings.lanes,
        )  # fmt: skip
    return list(range(n))


@pytest.mark.parametrize("shuffle", ORDERS)
@pytest.mark.parametrize(("container", "threads"), [("parquet", 1), ("parquet", 2), ("parquet", 8), ("arrow", 1),
                                                    ("arrow", 2), ("arrow", 8)])  # fmt: skip
def test_two_epochs_hold_each_token_once_in_the_order_of_the_reference(
    counting: Any, container: str, threads: int, shuffle: str, stress: bool
) -> None:
    path, tokens = counting(container)
    batch_size = 16
    settings = Settings(
        seq_len=SEQ_LEN, batch_size=batch_size, shuffle=shuffle, seed=17, remainder="short",
        chunk_tokens=1 << 16, window_tokens=1 << 20, lanes=8,
    )  # fmt: skip
    n, tail = divmod(tokens, SEQ_LEN)
    assert tail, "the tail is part of what is tested"
    # Drawn from all of Parquet at once, blocks that do not stay decoded would be decoded for a row
    # each.
    budget = "2GiB" if stress else "256MiB"
    with open_loader(path, settings, num_threads=threads, memory_budget=budget) as loader:
        assert loader.num_sequences == n
        for epoch in range(2):
            order = np.array(expected_order(shuffle, n, epoch, settings))
            seen = np.zeros(tokens, dtype=np.uint8)
            step = -1
            for step, batch in enumerate(loader):
                ids, labels = batch["input_ids"], batch["labels"]
                starts = order[step * batch_size : (step + 1) * batch_size] * SEQ_LEN
                whole = ids[: len(starts)]
                assert np.array_equal(whole, starts[:, None] + np.arange(SEQ_LEN)), f"epoch {epoch}, step {step}"
                assert np.array_equal(labels[: len(starts)], whole)
                np.add.at(seen, labels[labels >= 0], 1)
                if len(ids) > len(starts):
                    assert np.array_equal(ids[-1, :tail], np.arange(tokens - tail, tokens))
                    assert (ids[-1, tail:] == 0).all()
                    assert (labels[-1, tail:] == -100).all()
            assert step + 1 == len(loader) == -(-(n + 1) // batch_size)
            assert (seen == 1).all(), f"{(seen == 0).sum()} tokens missing, {(seen > 1).sum()} repeated"


@pytest.mark.parametrize("shuffle", ORDERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_gather_to_the_same_global_batches(small: Path, shuffle: str, world_size: int) -> None:
    settings = Settings(
        seq_len=10, batch_size=12 // world_size, shuffle=shuffle, seed=3, remainder="pad",
        chunk_tokens=100, window_tokens=600, lanes=4, eos_id=0,
    )  # fmt: skip
    whole = Reference(token_stream(small, eos_id=0), Settings(**{**vars(settings), "batch_size": 12}))
    ranks = [open_loader(small, settings, dp_rank=r, dp_world_size=world_size) for r in range(world_size)]
    assert {len(loader) for loader in ranks} == {whole.steps()}
    for epoch in range(2):
        for step, batches in enumerate(zip(*ranks, strict=True)):
            rows = [
                (batches[rank]["input_ids"][j], batches[rank]["labels"][j])
                for j in range(settings.batch_size)
                for rank in range(world_size)
            ]
            gathered = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
            assert_batch(gathered, whole.batch_at(step, epoch=epoch), where=f"epoch {epoch}, step {step}")


@pytest.mark.parametrize("shuffle", ORDERS)
def test_batch_at_and_sequences_at_equal_iteration(small: Path, shuffle: str) -> None:
    settings = Settings(
        seq_len=16, batch_size=4, shuffle=shuffle, seed=8, remainder="short",
        chunk_tokens=160, window_tokens=640, lanes=2,
    )  # fmt: skip
    reference = Reference(token_stream(small), settings)
    with open_loader(small, settings) as loader:
        for epoch in range(2):
            for step, batch in enumerate(loader):
                again = loader.batch_at(step, epoch=epoch)
                across = loader.sequences_at(epoch, step * 4, len(batch["input_ids"]))
                for name in ("input_ids", "labels"):
                    assert np.array_equal(batch[name], again[name]), f"epoch {epoch}, step {step}"
                    assert np.array_equal(batch[name], across[name]), f"epoch {epoch}, step {step}"
        for rank in range(3):
            rows = reference.batch_at(2, epoch=5, rank=rank, world_size=3)
            assert_batch(loader.batch_at(2, epoch=5, rank=rank, world_size=3), rows)


def test_batch_at_does_not_move_the_loader(small: Path) -> None:
    settings = Settings(seq_len=16, batch_size=4, shuffle="global")
    with open_loader(small, settings) as loader:
        iterator = iter(loader)
        next(iterator)
        before = loader.state_dict()
        loader.batch_at(20, epoch=4)
        loader.sequences_at(9, 3, 5)
        assert loader.state_dict() == before
        assert np.array_equal(next(iterator)["input_ids"], loader.batch_at(1)["input_ids"])


def test_positions_out_of_range_are_refused(small: Path) -> None:
    import forebay

    with open_loader(small, Settings(seq_len=16, batch_size=4)) as loader:
        for call in (
            lambda: loader.batch_at(len(loader)),
            lambda: loader.sequences_at(0, loader.num_sequences, 1),
            lambda: loader.batch_at(0, rank=2, world_size=2),
        ):
            with pytest.raises(forebay.ConfigError):
                call()


@pytest.mark.parametrize("remainder", ["drop", "pad", "wrap", "short"])
@pytest.mark.parametrize("targets", ["labels", "shifted"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 31, 32, 33, 47])
def test_the_end_of_an_epoch_follows_the_remainder(tmp_path: Path, tokens: int, targets: str, remainder: str) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", [list(range(1, tokens + 1))])
    for world_size in (1, 2):
        ignore_index = (-100, -1)[tokens % 2]
        settings = Settings(
            seq_len=8, batch_size=2, targets=targets, ignore_index=ignore_index, remainder=remainder, pad_id=99
        )
        reference = Reference(token_stream(path), settings)
        if remainder == "short" and reference.short_is_refused(world_size):
            import forebay

            with pytest.raises(forebay.ConfigError, match="short"):
                open_loader(path, settings, dp_rank=0, dp_world_size=world_size)
            continue
        for rank in range(world_size):
            with open_loader(path, settings, dp_rank=rank, dp_world_size=world_size) as loader:
                expected = list(reference.batches(rank=rank, world_size=world_size))
                found = list(loader)
                assert len(found) == len(loader) == len(expected)
                for batch, rows in zip(found, expected, strict=True):
                    assert_batch(batch, rows, targets, f"rank {rank} of {world_size}")


def test_operational_settings_never_change_a_batch(small: Path) -> None:
    settings = Settings(seq_len=16, batch_size=4, shuffle="block", seed=4, chunk_tokens=160, window_tokens=640, lanes=2)
    expected = list(Reference(token_stream(small), settings).batches())
    for more in (
        {"num_threads": 0}, {"num_threads": 8}, {"prefetch_batches": 1}, {"prefetch_batches": 64}, {"block_tokens": 1},
        {"block_tokens": 37, "num_threads": 3}, {"io": "pread"}, {"io": "mmap"}, {"memory_budget": 32 << 20},
    ):  # fmt: skip
        with open_loader(small, settings, **more) as loader:
            for step, (batch, rows) in enumerate(zip(loader, expected, strict=True)):
                assert_batch(batch, rows, where=f"{more}, step {step}")


# Orders below are literal: one that changes is a new version of the order, or a broken resume for
# everyone.


def order_of(tmp_path: Path, n: int, epoch: int, settings: Settings) -> list[int]:
    path = corpora.write_rows(tmp_path / "shard.parquet", [list(range(n * settings.seq_len))])
    with open_loader(path, settings) as loader:
        loader.set_epoch(epoch)
        return [first // settings.seq_len for batch in loader for first in first_ids(batch)]


def test_global_order_is_pinned(tmp_path: Path) -> None:
    settings = Settings(seq_len=2, shuffle="global", seed=0)
    assert order_of(tmp_path, 12, 0, settings) == [5, 10, 0, 1, 8, 6, 2, 4, 7, 3, 11, 9]
    assert order_of(tmp_path, 12, 1, settings) == [7, 1, 5, 8, 4, 11, 0, 9, 2, 3, 6, 10]
    settings = Settings(seq_len=2, shuffle="global", seed=1)
    assert order_of(tmp_path, 300, 2, settings)[:12] == [74, 241, 22, 189, 228, 229, 171, 20, 139, 178, 76, 33]


def test_block_order_is_pinned(tmp_path: Path) -> None:
    settings = Settings(seq_len=8, shuffle="block", seed=0, chunk_tokens=32, window_tokens=64, lanes=2)
    first = [9, 18, 10, 19, 8, 5, 11, 7, 2, 6, 3, 4, 1, 13, 0, 14, 17, 12, 16, 15]
    second = [17, 11, 16, 10, 18, 2, 19, 1, 15, 0, 12, 3, 13, 7, 14, 6, 9, 5, 8, 4]
    assert order_of(tmp_path, 20, 0, settings) == first
    assert order_of(tmp_path, 20, 1, settings) == second
    settings = Settings(seq_len=8, shuffle="block", seed=1, chunk_tokens=80, window_tokens=4800, lanes=2)
    assert order_of(tmp_path, 3000, 2, settings)[:12] == [
        345,
        250,
        2117,
        1196,
        101,
        885,
        1679,
        2233,
        2657,
        2371,
        470,
        1453,
    ]
