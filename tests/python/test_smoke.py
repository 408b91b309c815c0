"""Tests the binding: memory outlives its loader, capsules are sound, threads run datasets."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from support import clean_environment

import forebay

SEQ_LEN = 16


@pytest.fixture(scope="module")
def stream() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(4000, dtype=np.int64)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, stream: Any) -> Path:
    path = tmp_path_factory.mktemp("smoke") / "a,b\\c.parquet"
    rows = [stream[at : at + 37].tolist() for at in range(0, len(stream), 37)]
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.uint16()))}), path)
    return path


def open_loader(corpus: Path, **settings: Any) -> forebay.Loader:
    return forebay.Loader(corpus, **{"seq_len": SEQ_LEN, "batch_size": 4, **settings})


def test_batches_are_writable_views_that_outlive_everything(corpus: Path, stream: Any) -> None:
    loader = open_loader(corpus)
    batches = list(loader)
    state = loader.stats()
    loader.close()
    del loader
    gc.collect()
    assert state["batches"] == len(batches) == 62
    for step, batch in enumerate(batches):
        for array in batch.values():
            assert array.dtype == np.int64 and array.flags.writeable
            assert array.ravel().tolist() == stream[step * 64 : step * 64 + 64].tolist()
            array.fill(0)
    assert all(not array.any() for batch in batches for array in batch.values())


def test_memory_goes_back_when_the_last_view_dies(corpus: Path) -> None:
    loader = open_loader(corpus, prefetch_batches=1)
    one = 2 * 4 * SEQ_LEN * 8
    views = [batch["labels"][1:, 2:] for batch in loader]
    assert loader.stats()["buffer_bytes"] >= len(views) * one
    del views
    assert loader.stats()["buffer_bytes"] <= 4 * one


def test_shifted_targets_are_two_contiguous_arrays(corpus: Path) -> None:
    for batch in open_loader(corpus, targets="shifted"):
        assert all(array.flags.c_contiguous and array.shape == (4, SEQ_LEN) for array in batch.values())
        assert not np.shares_memory(batch["x"], batch["y"])
        assert (batch["x"][:, 1:] == batch["y"][:, :-1]).all()


def test_rows_follow_each_other_in_memory(corpus: Path) -> None:
    array = open_loader(corpus, targets="shifted")._core.sequences_at(0, 0, 2).fields()[0][1]
    assert memoryview(array).cast("B").tobytes() == np.asarray(array).tobytes()
    assert memoryview(array).c_contiguous and not memoryview(array).f_contiguous


def test_an_unused_capsule_frees_its_batch(corpus: Path) -> None:
    loader = open_loader(corpus)
    batch = next(iter(loader))
    del batch
    before = loader.stats()["buffer_bytes"]
    for _ in range(200):
        array = loader._core.batch_at(0, 0, 0, 1).fields()[0][1]
        capsule = array.__dlpack__()
        del array, capsule
    assert loader.stats()["buffer_bytes"] <= before
    array = loader._core.batch_at(0, 0, 0, 1).fields()[0][1]
    assert array.__dlpack_device__() == (1, 0)
    for wrong in ({"stream": 1}, {"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            array.__dlpack__(**wrong)


def test_submitted_memory_is_filled_and_its_owner_dropped(corpus: Path, stream: Any) -> None:
    loader = open_loader(corpus, num_threads=2)
    batches = loader._core.iter(external=True)
    owners: list[Any] = []

    def submit() -> np.ndarray[Any, Any]:
        buffer = np.full(batches.batch_bytes // 8, -7, dtype=np.int64)
        batches.submit(buffer.ctypes.data, buffer.nbytes, buffer)
        owners.append(weakref.ref(buffer))
        return buffer

    kept = [submit() for _ in range(batches.buffers_wanted)]
    step = 0
    while (batch := batches.next()) is not None:
        buffer = kept.pop(0)
        assert batch.address == buffer.ctypes.data
        assert buffer[:64].tolist() == stream[step * 64 : step * 64 + 64].tolist()
        del buffer, batch
        kept.append(submit())
        step += 1
    assert step == len(loader)
    kept.clear()
    batches.close()
    gc.collect()
    assert not any(owner() is not None for owner in owners)
    with pytest.raises(forebay.ConfigError, match="aligned"):
        batches.submit(4, 64, None)


def test_a_loader_is_a_python_object(corpus: Path) -> None:
    loader = open_loader(corpus, shuffle="global", seed=3)
    assert weakref.ref(loader)() is loader
    loader.note = "x"  # type: ignore[attr-defined]
    iterator = iter(loader)
    first = [next(iterator) for _ in range(5)][-1]
    other = pickle.loads(pickle.dumps(loader))
    assert other.config == loader.config and other.state_dict() == loader.state_dict()
    after, wanted = next(iter(other)), next(iterator)
    assert (after["input_ids"] == wanted["input_ids"]).all() and (after["input_ids"] != first["input_ids"]).any()
    assert "62 batches" in repr(loader)
    assert loader.origins["seed"] == "argument" and loader.origins["lanes"] == "default"


def test_errors_say_where_and_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        forebay.Loader(tmp_path / "none.parquet")
    assert isinstance(missing.value, forebay.ForebayError)
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    with pytest.raises(forebay.DataError) as damaged:
        forebay.Loader(path)
    assert damaged.value.path == str(path)
    for name in ("seq_len", "input_dtype", "delivery_log", "cache_dir"):
        with pytest.raises(TypeError, match=f"`{name}` must be"):
            forebay.Loader(path, **{name: 3.5})  # type: ignore[arg-type]
    with pytest.raises(forebay.ConfigError, match="pin_memory"):
        forebay.Loader(path, pin_memory=True)


def test_a_closed_loader_says_so(corpus: Path) -> None:
    with open_loader(corpus) as loader:
        iterator = iter(loader)
        next(iterator)
    for call in (lambda: next(iterator), lambda: iter(loader), lambda: loader.batch_at(0)):
        with pytest.raises(forebay.ClosedError, match="closed"):
            call()


def test_the_command_is_in_the_package(corpus: Path) -> None:
    for start in (["-m", "forebay"], ["-c", "import sys; from forebay.__main__ import main; sys.exit(main())"]):
        done = subprocess.run(
            [sys.executable, *start, "check", str(corpus)],
            capture_output=True, text=True, timeout=60, env=clean_environment(), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "4000" in done.stdout.replace(",", "").replace("_", "").replace(" ", "")
    done = subprocess.run([sys.executable, "-m", "forebay", "nonsense"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2


# Tensors and Python datasets.

torch = pytest.importorskip("torch", reason="tests of forebay.torch")

from forebay.torch import DataLoader, TokenDataset  # noqa: E402


@pytest.mark.parametrize("targets", ["labels", "shifted"])
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_submitted_tensors_give_the_same_batches(corpus: Path, targets: Any, dtype: str) -> None:
    dataset = TokenDataset(corpus, seq_len=SEQ_LEN, targets=targets, input_dtype=dtype)
    allocated: list[weakref.ref[Any]] = []

    def allocate(nbytes: int) -> Any:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        allocated.append(weakref.ref(buffer))
        return buffer

    for _ in range(2):
        plain = list(DataLoader(dataset, batch_size=7, shuffle=True))
        external = list(DataLoader(dataset, batch_size=7, shuffle=True, _allocator=allocate))
        assert len(plain) == len(external) == 36
        for a, b in zip(plain, external, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype
    del a, b, plain, external
    gc.collect()
    wait_until_gone(allocated)


def wait_until_gone(buffers: list[weakref.ref[Any]]) -> None:
    # A worker lets go of the buffer that it was filling when it is done with it.
    deadline = time.monotonic() + 30
    while any(buffer() is not None for buffer in buffers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(buffer() is not None for buffer in buffers)


def test_break_drops_submitted_tensors(corpus: Path) -> None:
    allocated: list[weakref.ref[Any]] = []

    def allocate(nbytes: int) -> Any:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        allocated.append(weakref.ref(buffer))
        return buffer

    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4, num_workers=2, _allocator=allocate)
    for _ in loader:
        break
    del _
    loader.close()
    gc.collect()
    assert allocated
    wait_until_gone(allocated)


def test_a_subclass_of_the_dataset_runs_its_own_code(corpus: Path) -> None:
    class Doubled(TokenDataset):
        def __getitems__(self, indices: Any) -> Any:
            return [{"input_ids": row["input_ids"] * 2} for row in super().__getitems__(indices)]

    loader = DataLoader(Doubled(corpus, seq_len=SEQ_LEN), batch_size=4, num_workers=2)
    assert next(iter(loader))["input_ids"].ravel().tolist() == list(range(0, 128, 2))
    with pytest.raises(TypeError, match="only a native loader"):
        loader.config  # noqa: B018
    assert loader.stats()["batches"] == 1
    with pytest.raises(forebay.ConfigError, match="seed"):
        DataLoader(Doubled(corpus), seed=3)


class Letters(torch.utils.data.IterableDataset):  # type: ignore[misc]
    """Each worker has its own letter and length."""

    def __iter__(self) -> Iterator[str]:
        info = torch.utils.data.get_worker_info()
        worker, count = (info.id, 5 - 2 * info.id) if info else (9, 3)
        assert info is None or info.dataset is self
        yield from (f"{worker}{at}" for at in range(count))


@pytest.mark.thread_unsafe(reason="torch starts processes, which it does once for the whole process")
@pytest.mark.parametrize("batch_size", [None, 2])
def test_iterable_datasets_are_taken_as_torch_does(batch_size: Any) -> None:
    arguments: dict[str, Any] = dict(batch_size=batch_size, num_workers=3)
    ours = list(DataLoader(Letters(), **arguments))
    stock = list(torch.utils.data.DataLoader(Letters(), **arguments))
    assert ours == stock and len(ours) == (9 if batch_size is None else 6)
    assert list(DataLoader(Letters(), batch_size=batch_size)) == list(
        torch.utils.data.DataLoader(Letters(), batch_size=batch_size)
    )
    assert torch.utils.data.get_worker_info() is None


class Slow(torch.utils.data.Dataset):  # type: ignore[misc]
    """Later items are faster; item 40 ends its epoch in the wrong way."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> int:
        time.sleep(0.002 * (index % 3 == 0))
        if index == 40:
            raise StopIteration
        return index


@pytest.mark.thread_unsafe(reason="torch starts processes, which it does once for the whole process")
def test_threads_keep_order_and_report_what_is_raised() -> None:
    initialised: list[int] = []
    loader = DataLoader(Slow(), batch_size=None, num_workers=4, worker_init_fn=initialised.append)
    iterator = iter(loader)
    assert [int(next(iterator)) for _ in range(40)] == list(range(40))
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(iterator)
    assert [int(item) for item in iterator] == list(range(41, 50))
    assert sorted(initialised) == [0, 1, 2, 3]
    shuffled = [
        [int(i) for i in kind(range(30), shuffle=True, generator=torch.Generator().manual_seed(5), num_workers=2)]
        for kind in (DataLoader, torch.utils.data.DataLoader)
    ]
    assert shuffled[0] == shuffled[1]


def test_break_ends_the_threads_and_a_slow_dataset_times_out() -> None:
    # An exception that pytest keeps from another test may keep that test's threads.
    before = set(threading.enumerate())
    for _ in DataLoader(Slow(), num_workers=3):
        break
    del _
    gc.collect()
    end = time.monotonic() + 20
    while any(thread.name.startswith("forebay-python") for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < end
        time.sleep(0.01)

    held = threading.Event()

    class Held(Slow):
        def __getitem__(self, index: int) -> int:
            held.wait(20)
            return index

    try:
        with pytest.raises(RuntimeError, match="timed out"):
            next(iter(DataLoader(Held(), num_workers=1, timeout=0.05)))
    finally:
        held.set()


def test_processes_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="threads"):
        DataLoader(Slow(), num_workers=2, multiprocessing_context="spawn")


def test_a_copied_loader_dict_keeps_the_state(corpus: Path) -> None:
    """Lightning Fabric and Ray make their wrappers so."""
    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4)
    wrapper = type("Wrapper", (), {})()
    wrapper.__dict__.update(copy.copy(loader.__dict__))
    next(iter(loader))
    assert wrapper.state_dict()["position"] == 4
    assert wrapper.num_workers == 0 and wrapper.sampler is None and wrapper.batch_size == 4
