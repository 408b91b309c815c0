"""Tests that a copy on the device is whole when the caller's stream uses it.

Host memory outlives its copy.

The device here is slow on purpose: a copy reads its source only when somebody waits for it, and
memory that is let go is overwritten at once. The real one is in test_gpu.py.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference, Settings, token_stream

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import torch
from support import assert_batch

import forebay
from forebay.torch import DataLoader, TokenDataset

SEQ_LEN = 16
POISON = 0x5A


class Copy:
    """A copy that waits, and its event."""

    def __init__(self, link: SlowLink, source: Any) -> None:
        self.link = link
        self.source: Any = weakref.ref(source)
        self.block = torch.full_like(source, POISON)
        # The memory itself, as a copying engine has it: no owner of it is kept alive.
        self.address, self.nbytes = source.data_ptr(), source.nbytes
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.link.waited += 1
        while not self.done:
            self.link.run(1)


class SlowLink:
    def __init__(self) -> None:
        self.queue: deque[Copy] = deque()
        self.copies: list[Copy] = []
        self.ordered: set[int] = set()
        self.waited = 0
        self.fail = False

    def __call__(self) -> SlowLink:
        return self

    def copy(self, block: Any) -> tuple[Any, Copy]:
        copy = Copy(self, block)
        self.queue.append(copy)
        self.copies.append(copy)
        return copy.block, copy

    def order(self, block: Any, event: Copy) -> None:
        assert block is event.block
        self.ordered.add(block.untyped_storage().data_ptr())

    def run(self, count: int) -> None:
        """Does the next copies."""
        import ctypes

        for _ in range(min(count, len(self.queue))):
            copy = self.queue.popleft()
            ctypes.memmove(copy.block.data_ptr(), copy.address, copy.nbytes)
            copy.done = True

    def is_safe(self, batch: Any) -> bool:
        return all(tensor.untyped_storage().data_ptr() in self.ordered for tensor in batch.values())


class Poisoning:
    """Memory that is overwritten when the last one lets go of it, and never given back."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.released = 0

    def __call__(self, nbytes: int) -> Any:
        memory = np.zeros(nbytes, dtype=np.uint8)
        self.kept.append(memory)
        lent = memory[:]
        weakref.finalize(lent, self.release, memory)
        return torch.from_numpy(lent)

    def release(self, memory: Any) -> None:
        memory[:] = POISON
        self.released += 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("device") / "corpus", "arrow", 4000, shards=2)


def loader_of(corpus: Path, link: SlowLink, memory: Any, prefetch: int = 2, **settings: Any) -> Any:
    return DataLoader(
        TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4, _link=link, _allocator=memory, device_prefetch=prefetch,
        drop_last=True, **settings,
    )  # fmt: skip


def wanted(corpus: Path) -> list[Any]:
    return list(Reference(token_stream(corpus), Settings(seq_len=SEQ_LEN, batch_size=4)).batches())


@pytest.mark.parametrize("prefetch", [0, 2, 5])
@pytest.mark.parametrize("late", [0, 1, 7])
def test_batches_are_whole_however_late_they_are_copied(corpus: Path, prefetch: int, late: int) -> None:
    link, memory = SlowLink(), Poisoning()
    loader = loader_of(corpus, link, memory, prefetch)
    held = []
    for batch in loader:
        assert link.is_safe(batch), "the caller's stream was not told to wait"
        held.append(batch)
        if late and len(held) > late:
            link.run(1)
    assert len(link.copies) == len(held) == len(loader), "one block for a batch"
    link.run(len(link.queue))
    for batch, rows in zip(held, wanted(corpus), strict=True):
        assert_batch(batch, rows)


def test_host_memory_is_let_go_after_its_copy_and_not_before(corpus: Path) -> None:
    link, memory = SlowLink(), Poisoning()
    iterator = iter(loader_of(corpus, link, memory))
    for _ in range(6):
        next(iterator)
    gc.collect()
    assert memory.released == 0
    link.run(3)
    next(iterator)
    deadline = time.monotonic() + 20
    while memory.released < 3:
        gc.collect()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert memory.released == 3


@pytest.mark.parametrize("how", ["drop", "close"])
def test_a_pass_that_is_left_waits_for_its_copies(corpus: Path, how: str) -> None:
    link, memory = SlowLink(), Poisoning()
    iterator = iter(loader_of(corpus, link, memory))
    batch = next(iterator)
    assert link.queue
    if how == "close":
        iterator.close()
    del iterator
    deadline = time.monotonic() + 20
    while link.queue:
        gc.collect()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert link.waited > 0
    assert_batch(batch, wanted(corpus)[0])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_so_many_batches_are_ahead_and_the_state_counts_none_of_them(corpus: Path, prefetch: int) -> None:
    link = SlowLink()
    loader = loader_of(corpus, link, Poisoning(), prefetch, shuffle=True, prefetch_batches=8)
    plain = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4, drop_last=True, shuffle=True)
    beside = iter(plain)
    assert loader.state_dict() == plain.state_dict()
    most = 0
    iterator = iter(loader)
    for handed, _ in enumerate(iterator, 1):
        next(beside)
        assert loader.state_dict() == plain.state_dict()
        assert len(link.copies) <= handed + prefetch
        most = max(most, len(link.copies) - handed)
        time.sleep(0.002)
        if handed == 9:
            break
    assert most == prefetch
    rest = [batch["input_ids"].tolist() for batch in beside]
    fresh_link = SlowLink()
    fresh = loader_of(corpus, fresh_link, Poisoning(), prefetch, shuffle=True)
    fresh.load_state_dict(loader.state_dict())
    found = list(fresh)
    fresh_link.run(10**6)
    assert [batch["input_ids"].tolist() for batch in found] == rest
    # Also in the loader itself, whose pass is ahead.
    loader.load_state_dict(loader.state_dict())
    found = list(loader)
    link.run(10**6)
    assert [batch["input_ids"].tolist() for batch in found] == rest


def test_several_threads_take_from_one_pass(corpus: Path) -> None:
    link = SlowLink()
    iterator = iter(loader_of(corpus, link, Poisoning()))
    held: list[Any] = []
    threads = [threading.Thread(target=lambda: held.extend(iterator)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    link.run(10**6)
    found = sorted(int(batch["input_ids"][0, 0]) for batch in held)
    assert found == sorted(rows[0][0][0] for rows in wanted(corpus))


# Datasets written in Python.


class Nested(torch.utils.data.Dataset):  # type: ignore[misc,name-defined]
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        if index == 17:
            raise KeyError("seventeen")
        return {"image": torch.full((3, 2), float(index)), "name": str(index), "more": (index, [index * 2])}


@pytest.mark.parametrize("workers", [0, 2])
def test_any_batch_is_copied_and_errors_stay_at_their_place(workers: int) -> None:
    link = SlowLink()
    loader = DataLoader(Nested(), batch_size=4, num_workers=workers, _link=link, device_prefetch=3)
    iterator = iter(loader)
    held = []
    for step in range(4):
        held.append(next(iterator))
        assert loader.state_dict()["batches"] == step + 1
        time.sleep(0.05)
    with pytest.raises(KeyError, match="seventeen"):
        next(iterator)
    held.append(next(iterator))
    assert list(iterator) == []
    link.run(10**6)
    for batch, first in zip(held, (0, 4, 8, 12, 20), strict=True):
        numbers = list(range(first, first + 4))
        assert batch["image"][:, 2, 1].tolist() == numbers
        assert batch["name"] == [str(number) for number in numbers]
        assert batch["more"][0].tolist() == numbers
        assert batch["more"][1][0].tolist() == [2 * number for number in numbers]


def test_a_small_view_of_a_large_tensor_is_copied_alone() -> None:
    large = torch.arange(100_000)
    link = SlowLink()
    loader = DataLoader([large[5:9], large[90:99]], batch_size=None, _link=link)  # type: ignore[arg-type]
    found = list(loader)
    link.run(10**6)
    assert [batch.tolist() for batch in found] == [list(range(5, 9)), list(range(90, 99))]
    assert all(copy.nbytes < 100 for copy in link.copies)


# Arguments.


def test_devices_that_cannot_be_are_refused(corpus: Path) -> None:
    with pytest.raises(forebay.ConfigError, match="CUDA device or cpu, found meta"):
        DataLoader(Nested(), device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(forebay.ConfigError, match="torch finds no CUDA device"):
            DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), device="cuda")
    with pytest.raises(ValueError, match="device_prefetch"):
        DataLoader(Nested(), device="cpu", device_prefetch=-1)
    assert next(iter(DataLoader(range(4), batch_size=4, device="cpu"))).tolist() == [0, 1, 2, 3]
    with pytest.raises(forebay.ConfigError, match="thread of each consumer"):
        loader_of(corpus, SlowLink(), None).split(2)
