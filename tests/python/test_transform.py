"""Tests functions of the user that run on batches, on Python threads of their own."""

from __future__ import annotations

import gc
import os
import pickle
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import json_from

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora

import forebay

torch = pytest.importorskip("torch", reason="tests of forebay.torch")
from test_device import SlowLink  # noqa: E402

from forebay.torch import DataLoader, TokenDataset  # noqa: E402

SEQ_LEN = 8
STEPS = 24
counts_threads = pytest.mark.thread_unsafe(reason="looks at all threads of the process")
KINDS = ("numpy", "torch", "torch, own memory")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transform") / "corpus"
    return corpora.unique_corpus(folder, "parquet", STEPS * 2 * SEQ_LEN, shards=2)


def open_loader(kind: str, corpus: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {"batch_size": 2, "shuffle": True, "seed": 3, **more}
    if kind == "numpy":
        return forebay.Loader(corpus, seq_len=SEQ_LEN, **settings)
    if kind == "torch, own memory":
        settings["_allocator"] = lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)
    return DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), drop_last=True, **settings)


def firsts(batches: Any) -> list[int]:
    return [int(batch["input_ids"][0, 0]) for batch in batches]


def threads_of_transforms() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("forebay-transform")]


def wait_until_no_thread_runs() -> None:
    deadline = time.monotonic() + 20
    while threads_of_transforms():
        assert time.monotonic() < deadline, threads_of_transforms()
        time.sleep(0.01)


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    time.sleep(random.random() / 200)
    return {"input_ids": batch["input_ids"] * 2, "thread": threading.current_thread().name}


@counts_threads
@pytest.mark.parametrize("threads", [None, 1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_come_in_order_from_other_threads(corpus: Path, kind: str, threads: int | None) -> None:
    loader = open_loader(kind, corpus, transform=doubled, transform_threads=threads)
    batches = list(loader)
    assert firsts(batches) == [2 * first for first in firsts(open_loader(kind, corpus))]
    names = {batch["thread"] for batch in batches}
    assert all(name.startswith("forebay-transform") for name in names)
    assert len(names) <= (threads or loader.config["num_threads"])
    wait_until_no_thread_runs()


def test_several_threads_run_at_once(corpus: Path) -> None:
    together = threading.Barrier(3, timeout=60)

    def meet(batch: Any) -> Any:
        together.wait()
        return batch

    loader = open_loader("numpy", corpus, transform=meet, transform_threads=3, max_steps=STEPS // 3 * 3)
    assert len(list(loader)) == STEPS // 3 * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1, 7, STEPS])
def test_a_state_counts_batches_that_were_handed_over(corpus: Path, kind: str, at: int) -> None:
    usual, loader = open_loader(kind, corpus), open_loader(kind, corpus, transform=doubled, transform_threads=4)
    one, other = iter(usual), iter(loader)
    for _ in range(at):
        next(one), next(other)
    time.sleep(0.05)  # threads take batches ahead
    assert loader.state_dict() == usual.state_dict()
    fresh = open_loader(kind, corpus, transform=doubled)
    fresh.load_state_dict(loader.state_dict())
    resumed = open_loader(kind, corpus)
    resumed.load_state_dict(usual.state_dict())
    rest = firsts(resumed)
    assert firsts(fresh) == [2 * first for first in rest] and len(rest) == (STEPS - at or STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_are_set_count(corpus: Path, kind: str) -> None:
    usual, loader = open_loader(kind, corpus), open_loader(kind, corpus, transform=doubled)
    for each in (usual, loader):
        next(iter(each))
        each.set_epoch(3)
    assert loader.state_dict() == usual.state_dict()
    assert firsts(loader) == [2 * first for first in firsts(usual)]
    for each in (usual, loader):
        each.seek(6, 1)
    assert loader.state_dict() == usual.state_dict()
    assert firsts(loader) == [2 * first for first in firsts(usual)]
    # A pass that is broken off is followed by the next epoch, as without a function.
    for each in (usual, loader):
        next(iter(each))
    assert firsts(loader) == [2 * first for first in firsts(usual)]


class Odd(Exception):
    """An exception that takes no note and no attribute."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError("frozen")

    def add_note(self, note: str) -> None:
        raise TypeError("frozen")


@counts_threads
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("raised", [KeyError, Odd, StopIteration, None])
def test_an_exception_comes_at_its_batch(corpus: Path, kind: str, threads: int, raised: Any) -> None:
    known = firsts(open_loader(kind, corpus))
    broken = True

    def fail(batch: Any) -> Any:
        if broken and int(batch["input_ids"][0, 0]) == known[5]:
            if raised is None:
                return None
            raise raised("an odd batch")
        return batch

    loader = open_loader(kind, corpus, transform=fail, transform_threads=threads)
    batches = iter(loader)
    assert firsts(next(batches) for _ in range(5)) == known[:5]
    kept = loader.state_dict()
    told = {StopIteration: RuntimeError, None: TypeError}.get(raised, raised)
    for _ in range(2):
        with pytest.raises(told) as caught:
            next(batches)
        if raised is not Odd:
            assert caught.value.__notes__ == ["raised by `transform`, for the batch of epoch 0, step 5"]
    if raised is StopIteration:
        assert isinstance(caught.value.__cause__, StopIteration)
    if raised is not None and raised is not StopIteration:
        assert any("fail" in str(entry.frame.code.name) for entry in caught.traceback)
    assert loader.state_dict() == kept
    broken = False
    assert firsts(loader) == known[5:], "the next pass continues at the batch that failed"
    del batches, caught
    gc.collect()
    wait_until_no_thread_runs()


@counts_threads
@pytest.mark.parametrize("end", ["break", "close the pass", "close the loader", "drop all"])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_end_with_their_pass(corpus: Path, kind: str, end: str) -> None:
    loader = open_loader(kind, corpus, transform=doubled, transform_threads=3)
    batches = iter(loader)
    first = next(batches)
    if end == "close the pass":
        batches.close()
        with pytest.raises(forebay.ClosedError):
            next(batches)
    elif end == "close the loader":
        loader.close()
        with pytest.raises(forebay.ClosedError):
            for _ in range(STEPS):
                next(batches)
    elif end == "drop all":
        del loader
    del batches
    gc.collect()
    wait_until_no_thread_runs()
    assert first["input_ids"].shape == (2, SEQ_LEN)


@counts_threads
def test_making_an_iterator_starts_nothing(corpus: Path) -> None:
    loader = open_loader("numpy", corpus, transform=doubled)
    state = loader.state_dict()
    iter(loader)
    assert loader.state_dict() == state and not threads_of_transforms()


def test_several_consumers_share_a_pass(corpus: Path) -> None:
    loader = open_loader("numpy", corpus, transform=doubled, transform_threads=3)
    batches, found = iter(loader), []

    def consume() -> None:
        found.extend(firsts(batches))

    consumers = [threading.Thread(target=consume) for _ in range(4)]
    for consumer in consumers:
        consumer.start()
    for consumer in consumers:
        consumer.join()
    assert sorted(found) == sorted(2 * first for first in firsts(open_loader("numpy", corpus)))


def test_a_function_runs_before_the_copy_to_the_device(corpus: Path) -> None:
    def marked(batch: Any) -> Any:
        assert batch["input_ids"].device.type == "cpu"
        return {"input_ids": batch["input_ids"] * 2}

    usual = open_loader("torch", corpus)
    loader = open_loader("torch", corpus, transform=marked, transform_threads=2, _link=SlowLink(), device_prefetch=3)
    found = []
    for batch, plain in zip(loader, usual, strict=True):
        loader._link.run(100)
        found.append(int(batch["input_ids"][0, 0]))
        assert found[-1] == 2 * int(plain["input_ids"][0, 0])
        assert loader.state_dict() == usual.state_dict()
    assert len(found) == STEPS


def test_consumers_of_a_split_run_the_function_themselves(corpus: Path) -> None:
    for kind in ("numpy", "torch"):
        usual = [firsts(part) for part in open_loader(kind, corpus, num_threads=1).split(1)]
        [part] = open_loader(kind, corpus, transform=doubled).split(1)
        batches = list(part)
        assert firsts(batches) == [2 * first for first in usual[0]]
        assert {batch["thread"] for batch in batches} == {threading.current_thread().name}


def test_a_function_takes_the_batch_of_the_format(corpus: Path) -> None:
    def flipped(pair: Any) -> Any:
        x, y = pair
        return y, x

    for kind in ("numpy", "torch"):
        usual = open_loader(kind, corpus, batch_format="xy")
        for (y, x), (wanted_x, wanted_y) in zip(
            open_loader(kind, corpus, batch_format="xy", transform=flipped), usual, strict=True
        ):
            assert x.tolist() == wanted_x.tolist() and y.tolist() == wanted_y.tolist()


def test_a_loader_with_a_function_can_be_pickled(corpus: Path) -> None:
    for kind in ("numpy", "torch"):
        loader = open_loader(kind, corpus, transform=doubled)
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        again = pickle.loads(pickle.dumps(loader))
        assert firsts(again) == [2 * first for first in firsts(open_loader(kind, corpus))[3:]]


def test_a_wait_for_a_slow_function_has_a_limit(corpus: Path) -> None:
    go = threading.Event()

    def wait(batch: Any) -> Any:
        assert go.wait(60)
        return batch

    loader = open_loader("torch", corpus, transform=wait, timeout=0.2)
    batches = iter(loader)
    with pytest.raises(RuntimeError, match="timed out"):
        next(batches)
    go.set()
    assert firsts(batches) == firsts(open_loader("torch", corpus)), "no batch is lost"


def test_wrong_functions_and_datasets_are_refused(corpus: Path) -> None:
    with pytest.raises(TypeError, match="`transform` must be a function"):
        open_loader("numpy", corpus, transform=3)
    with pytest.raises(forebay.ConfigError, match="`transform`: only for a TokenDataset"):
        DataLoader([1, 2, 3], transform=doubled)  # type: ignore[arg-type]


PROGRAM = """
import json, os, sys, threading, time
import forebay

def slow(batch):
    time.sleep(0.02)
    return batch

loader = forebay.Loader(sys.argv[1], seq_len=8, batch_size=2, transform=slow, transform_threads=3, epochs="endless")
batches = iter(loader)
next(batches)
"""


@pytest.mark.hostile
def test_a_process_exits_with_a_live_pass(corpus: Path) -> None:
    start = time.monotonic()
    assert json_from(PROGRAM + "print(json.dumps(len(threading.enumerate())))", corpus, timeout=60) == 4
    assert time.monotonic() - start < 30


@pytest.mark.hostile
@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="the platform does not fork")
def test_a_forked_child_is_told_and_can_exit(corpus: Path) -> None:
    program = """
import warnings
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    try:
        next(batches)
    except forebay.ClosedError:
        batches.close()
        loader.close()
        sys.exit(7)
    sys.exit(1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
next(batches)
print(json.dumps(status))
"""
    assert json_from(PROGRAM + program, corpus, timeout=60) == 7


def test_the_default_is_one_thread_with_a_global_lock() -> None:
    from forebay._transform import default_threads

    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    assert default_threads(6) == (1 if has_lock else 6)
    assert default_threads(0) == default_threads(1) == 1
