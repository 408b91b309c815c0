"""Compares the consumers of a split loader with separate ranks.

They share one pass, and wait for each other.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora

import forebay

SEQ_LEN = 16
CONSUMERS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("split") / "corpus", "parquet", 20_000, shards=3)


def of_numpy(corpus: Path, **settings: Any) -> Any:
    return forebay.Loader(corpus, seq_len=SEQ_LEN, **settings)


def of_torch(corpus: Path, **settings: Any) -> Any:
    pytest.importorskip("torch", reason="the loader of forebay.torch")
    from forebay.torch import DataLoader, TokenDataset

    targets = {name: settings.pop(name) for name in ("targets",) if name in settings}
    return DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN, **targets), **settings)


MAKERS = [of_numpy, of_torch]
Make = Callable[..., Any]
SETTINGS: list[dict[str, Any]] = [
    {"shuffle": "global", "remainder": "drop"},
    {"shuffle": "block", "remainder": "pad", "chunk_tokens": 64},
    {"shuffle": False, "remainder": "wrap"},
    {"shuffle": "block", "remainder": "pad", "targets": "shifted"},
]


def rows(batch: dict[str, Any]) -> list[Any]:
    return [np.asarray(array).tolist() for array in batch.values()]


def in_threads(work: Callable[[int], Any], count: int = CONSUMERS) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return [future.result(120) for future in [pool.submit(work, index) for index in range(count)]]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("place", [(0, 1), (1, 2)])
def test_consumers_get_the_batches_of_separate_ranks(
    corpus: Path, make: Make, settings: dict[str, Any], place: tuple[int, int]
) -> None:
    rank, world = place
    loader = make(corpus, batch_size=3 * CONSUMERS, seed=4, dp_rank=rank, dp_world_size=world, **settings)
    consumers = loader.split(CONSUMERS)
    assert [len(consumer) for consumer in consumers] == [len(loader)] * CONSUMERS
    found = in_threads(lambda index: [[rows(batch) for batch in consumers[index]] for _ in range(2)])
    for index in range(CONSUMERS):
        alone = make(
            corpus,
            batch_size=3,
            seed=4,
            dp_rank=rank + index * world,
            dp_world_size=world * CONSUMERS,
            **settings,
        )
        assert found[index] == [[rows(batch) for batch in alone] for _ in range(2)]


@pytest.mark.parametrize("make", MAKERS)
def test_batches_are_whole_pieces_of_memory_of_their_own(corpus: Path, make: Make) -> None:
    consumers = make(corpus, batch_size=8, remainder="drop").split(4)
    batches = [next(iter(consumer)) for consumer in consumers]
    arrays = [np.asarray(array) for batch in batches for array in batch.values()]
    assert all(array.flags.c_contiguous and array.shape == (2, SEQ_LEN) for array in arrays)
    assert not any(np.shares_memory(a, b) for at, a in enumerate(arrays) for b in arrays[:at])


@pytest.mark.parametrize("ahead", [1, 3])
def test_who_is_ahead_waits_for_the_slowest(corpus: Path, ahead: int) -> None:
    first, second = (
        iter(part) for part in of_torch(corpus, batch_size=4, drop_last=True, timeout=0.3).split(2, ahead=ahead)
    )
    for _ in range(ahead):
        next(first)
    with pytest.raises(RuntimeError, match=f"consumer 1 is {ahead} batches behind consumer 0"):
        next(first)
    next(second)
    next(first)
    taken = threading.Event()

    def wait() -> None:
        next(first)
        taken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    next(second)
    assert taken.wait(30), "a consumer that was waiting goes on as soon as the slow one took its batch"
    thread.join()


@pytest.mark.parametrize("how", ["close", "drop", "end", "part"])
def test_who_leaves_is_not_waited_for(corpus: Path, how: str) -> None:
    loader = of_numpy(corpus, batch_size=4, remainder="drop")
    consumers = loader.split(2, ahead=2)
    first, second = (iter(consumer) for consumer in consumers)
    next(first), next(second)
    if how == "close":
        consumers[1].close()
        with pytest.raises(forebay.ClosedError):
            next(second)
    elif how == "part":
        second.close()  # type: ignore[attr-defined]
    elif how == "drop":
        del second
        gc.collect()
    else:
        in_threads(lambda index: list((first, second)[index]), 2)
        assert list(first) == list(second) == []
        return
    assert len(list(first)) == len(loader) - 1


def test_consumers_share_one_pass(corpus: Path) -> None:
    """One pass's worth of batches is computed, and its threads are those of the loader."""
    loader = of_numpy(
        corpus, batch_size=CONSUMERS, remainder="drop", num_threads=2, shuffle="block", prefetch_batches=2
    )
    consumers = loader.split(CONSUMERS)
    in_threads(lambda index: sum(1 for _ in consumers[index]))
    assert loader.stats()["batches"] == len(loader)


@pytest.mark.parametrize("make", MAKERS)
def test_the_state_is_that_of_the_slowest_consumer(corpus: Path, make: Make) -> None:
    def opened() -> Any:
        return make(corpus, batch_size=4, remainder="drop", shuffle="global", seed=2)

    loader = opened()
    consumers = loader.split(2, ahead=4)
    first, second = (iter(consumer) for consumer in consumers)
    before = loader.state_dict()
    whole = [rows(batch) for batch in opened()]
    for _ in range(5):
        next(first), next(second)
    exact = loader.state_dict()
    next(first), next(first)
    assert loader.state_dict() == exact == consumers[1].state_dict() != before
    resumed = opened()
    resumed.load_state_dict(exact)
    assert [rows(batch) for batch in resumed] == whole[5:]
    resumed = opened()
    others = resumed.split(2)
    resumed.load_state_dict(exact)
    assert resumed.state_dict() == exact
    found = in_threads(lambda index: [rows(batch) for batch in others[index]], 2)
    assert found[0] == [[field[0::2] for field in batch] for batch in whole[5:]]
    assert found[1] == [[field[1::2] for field in batch] for batch in whole[5:]]
    # In the loader that was split, too: what was begun ends.
    loader.load_state_dict(exact)
    assert loader.state_dict() == exact
    with pytest.raises(forebay.ClosedError, match="another position"):
        list(first)
    found = in_threads(lambda index: [rows(batch) for batch in consumers[index]], 2)
    assert [len(part) for part in found] == [len(whole) - 5] * 2


def test_states_over_an_epochs_end_are_those_of_the_loader(corpus: Path) -> None:
    plain = of_numpy(corpus, batch_size=4, remainder="drop")
    loader = of_numpy(corpus, batch_size=4, remainder="drop")
    consumers = loader.split(4)
    for _ in range(2):
        parts = [iter(consumer) for consumer in consumers]
        for _ in zip(plain, strict=False):
            for part in parts:
                next(part)
            assert loader.state_dict() == plain.state_dict()
        assert all(list(part) == [] for part in parts)


def test_consumers_follow_the_epoch_that_they_are_told(corpus: Path) -> None:
    loader = of_numpy(corpus, batch_size=4, remainder="drop", shuffle="global")
    consumers = loader.split(2)

    def run(index: int) -> list[Any]:
        found = []
        for epoch in (3, 1):
            consumers[index].set_epoch(epoch)
            found.append([rows(batch) for batch in consumers[index]])
        return found

    found = in_threads(run, 2)
    plain = of_numpy(corpus, batch_size=4, remainder="drop", shuffle="global")
    for turn, epoch in enumerate((3, 1)):
        plain.set_epoch(epoch)
        assert found[1][turn] == [[field[1::2] for field in rows(batch)] for batch in plain]
    consumers[0].set_epoch(5)
    next(iter(consumers[0]))
    consumers[1].set_epoch(6)
    with pytest.raises(RuntimeError, match="told epoch 6, but the others are in their pass of epoch 5"):
        next(iter(consumers[1]))


def test_a_failed_batch_fails_for_every_consumer(corpus: Path) -> None:
    loader = of_numpy(corpus, batch_size=4, remainder="drop")
    consumers = loader.split(2)
    parts = [iter(consumer) for consumer in consumers]
    next(parts[0]), next(parts[1])
    loader.close()
    for part in parts:
        with pytest.raises(forebay.ClosedError):
            list(part)


def test_uneven_splits_are_refused_with_the_remedy(corpus: Path) -> None:
    with pytest.raises(forebay.ConfigError, match="multiple of the 3 consumers, found 4"):
        of_numpy(corpus, batch_size=4).split(3)
    with pytest.raises(forebay.ConfigError, match="drop_last=True"):
        of_torch(corpus, batch_size=4).split(2)
    with pytest.raises(forebay.ConfigError):
        of_numpy(corpus, batch_size=4).split(0)
    with pytest.raises(forebay.ConfigError, match="ahead"):
        of_numpy(corpus, batch_size=4).split(2, ahead=0)
