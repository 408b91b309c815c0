"""Tests batches on a real CUDA device.

A batch that is copied while its memory is dropped and refilled never differs. `make test-gpu`
prints the measured bandwidth and step times. Without a device, every test here is skipped.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import torch

from forebay.torch import DataLoader, TokenDataset

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch finds no CUDA device: `make test-gpu` where there is one"
    ),
    pytest.mark.timeout(900),
]

SEQ_LEN = 1024
ROWS = 8
TOKENS = 2_000_000
ROUNDS = 10_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("gpu") / "corpus", "arrow", TOKENS, shards=4)


def loader_of(corpus: Path, **more: Any) -> Any:
    dataset = TokenDataset(corpus, seq_len=SEQ_LEN)
    return DataLoader(dataset, batch_size=ROWS, shuffle="global", seed=1, drop_last=True, num_threads=4, **more)


def forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def expected(corpus: Path) -> list[Any]:
    """First ids of the rows of each batch of the first epochs.

    Rows are runs of consecutive numbers.
    """
    plain = loader_of(corpus)
    return [
        torch.from_numpy(np.ascontiguousarray(batch["input_ids"][:, 0].numpy()))
        for batch in itertools.islice(forever(plain), ROUNDS)
    ]


def wrong_rows(batch: Any, first: Any, run: Any) -> Any:
    """Number of values that differ, counted on the device."""
    wanted = first[:, None] + run
    return (batch["input_ids"] != wanted).sum() + (batch["labels"] != wanted).sum()


def test_batches_are_pinned(corpus: Path) -> None:
    for batch in itertools.islice(loader_of(corpus, pin_memory=True), 3):
        assert all(tensor.is_pinned() for tensor in batch.values())


@pytest.mark.parametrize("how", ["by hand", "device"])
def test_copies_never_differ_while_memory_is_dropped_and_refilled(corpus: Path, how: str) -> None:
    firsts = expected(corpus)
    run = torch.arange(SEQ_LEN, device="cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    busy = torch.randn(2048, 2048, device="cuda")
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    loader = loader_of(corpus, **({"pin_memory": True} if how == "by hand" else {"device": "cuda"}))
    batches = forever(loader)
    for turn, first in enumerate(firsts):
        with torch.cuda.stream(streams[turn % 2]):
            if turn % 5 == 0:
                busy @ busy  # so that copies queue up behind work, and their memory is dropped long before
            batch = next(batches)
            if how == "by hand":
                batch = {name: tensor.to("cuda", non_blocking=True) for name, tensor in batch.items()}
            assert all(tensor.is_cuda for tensor in batch.values())
            wrong[turn % 2] += wrong_rows(batch, first.to("cuda", non_blocking=False), run)
            del batch
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]


def test_the_state_counts_what_was_handed_over(corpus: Path) -> None:
    loader = loader_of(corpus, device="cuda", device_prefetch=3)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    fresh = loader_of(corpus)
    fresh.load_state_dict(loader.state_dict())
    for ours, plain in itertools.islice(zip(batches, fresh, strict=False), 20):
        assert torch.equal(ours["input_ids"].cpu(), plain["input_ids"])


def rate(copy: Any, nbytes: int, rounds: int = 200) -> float:
    for _ in range(10):
        copy()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        copy()
    torch.cuda.synchronize()
    return nbytes * rounds / (time.perf_counter() - start)


def test_bandwidth_against_the_links(corpus: Path, record_property: Any) -> None:
    """Large batches, so that the link is the limit."""
    loader = DataLoader(
        TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=256, drop_last=True, num_threads=8, device="cuda",
        prefetch_batches=8, device_prefetch=4, shuffle=False,
    )  # fmt: skip
    nbytes = 2 * 256 * SEQ_LEN * 8
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    link = rate(lambda: there.copy_(host, non_blocking=True), nbytes)
    batches = forever(loader)
    ours = rate(lambda: next(batches), nbytes)
    record_property("link_bytes_per_s", link)
    record_property("loader_bytes_per_s", ours)
    print(f"\nlink {link / 1e9:.1f} GB/s, loader to device {ours / 1e9:.1f} GB/s ({ours / link:.0%})")
    assert ours > 0.05 * link


def step_time(model: Any, optimizer: Any, batches: Iterator[Any], steps: int = 100) -> float:
    times = []
    for turn in range(steps + 20):
        start = time.perf_counter()
        ids = next(batches)["input_ids"] % 1000
        loss = model(ids).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if turn >= 20:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def test_a_step_takes_as_long_as_on_one_cached_batch(corpus: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Embedding(1000, 1024), *[torch.nn.Linear(1024, 1024) for _ in range(8)], torch.nn.Linear(1024, 1000)
    ).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = loader_of(corpus, device="cuda")
    cached = step_time(model, optimizer, itertools.repeat(next(iter(loader))))
    fed = step_time(model, optimizer, forever(loader))
    print(f"\nstep on one cached batch {cached * 1e3:.2f} ms, with the loader {fed * 1e3:.2f} ms ({fed / cached:.3f})")
    assert fed < 1.2 * cached + 1e-3
