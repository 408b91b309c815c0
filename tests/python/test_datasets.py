"""Tests `forebay.torch.DataLoader` with datasets of others on threads, and memory of the caller.

A program that changes one import line must see the batches, exceptions and ends of PyTorch's
loader.
"""

from __future__ import annotations

import gc
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from reference import Reference, Settings, token_stream

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import torch
from support import assert_batch, run_python
from torch.utils.data import get_worker_info

from forebay.torch import DataLoader, TokenDataset

SEQ_LEN = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("datasets") / "corpus", "arrow", 2000, shards=2)


class Numbers(torch.utils.data.Dataset):  # type: ignore[misc,name-defined]
    """Gives 0 to `size`, some of them late, so that threads finish out of order."""

    def __init__(self, size: int = 60) -> None:
        self.size = size
        self.fetched = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.fetched += 1
        time.sleep(0.004 if index % 12 == 0 else 0)
        return index


class Shards(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    """PyTorch's own example: a range from which each worker takes its part."""

    def __init__(self, end: int) -> None:
        self.start, self.end = 0, end

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        if info is None:
            return iter(range(self.start, self.end))
        return iter(range(self.start + info.id, self.end, info.num_workers))


def take_part(worker: int) -> None:
    """PyTorch's other example: the worker changes its copy of the dataset."""
    info = get_worker_info()
    assert info is not None and info.id == worker
    part = 24 // info.num_workers
    info.dataset.start, info.dataset.end = worker * part, (worker + 1) * part


class Plain(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    start, end = 0, 24

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))


def worker_threads() -> int:
    return sum("worker" in thread.name.lower() for thread in threading.enumerate())


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_and_shuffles_are_those_of_torch(workers: int, shuffle: bool) -> None:
    def run(kind: Any, num_workers: int) -> list[list[list[int]]]:
        torch.manual_seed(11)
        loader = kind(Numbers(), batch_size=7, shuffle=shuffle, num_workers=num_workers)
        return [[batch.tolist() for batch in loader] for _ in range(2)]

    assert run(DataLoader, workers) == run(torch.utils.data.DataLoader, 0)


def test_a_generator_shuffles_as_in_torch() -> None:
    def run(kind: Any, num_workers: int) -> list[int]:
        generator = torch.Generator().manual_seed(5)
        loader = kind(Numbers(), batch_size=None, shuffle=True, num_workers=num_workers, generator=generator)
        return [int(number) for number in loader]

    assert run(DataLoader, 2) == run(torch.utils.data.DataLoader, 0)


def test_threads_stay_a_bounded_number_of_batches_ahead() -> None:
    fetched = []

    class Counting(Numbers):
        def __getitem__(self, index: int) -> int:
            fetched.append(index)
            return index

    iterator = iter(DataLoader(Counting(1000), batch_size=1, num_workers=2, prefetch_factor=3))
    assert not fetched, "nothing is fetched before the first next"
    next(iterator)
    time.sleep(0.2)
    assert len(fetched) <= 2 * 3 + 2


def test_leaving_early_ends_the_threads() -> None:
    before = worker_threads()
    for step, _ in enumerate(DataLoader(Numbers(1000), batch_size=2, num_workers=4)):
        if step == 3:
            break
    gc.collect()
    wait_until(lambda: worker_threads() <= before, "threads of a dropped iterator end")


def test_an_exhausted_iterator_ends_its_threads_and_stays_exhausted() -> None:
    before = worker_threads()
    iterator = iter(DataLoader(Numbers(9), batch_size=2, num_workers=3))
    assert len(list(iterator)) == 5
    assert list(iterator) == []
    wait_until(lambda: worker_threads() <= before, "threads of an exhausted iterator end")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_iterable_datasets_split_by_worker_info(workers: int) -> None:
    batches = [batch.tolist() for batch in DataLoader(Shards(50), batch_size=4, num_workers=workers)]
    assert sorted(number for batch in batches for number in batch) == list(range(50))
    assert batches[0] == list(range(0, 4 * workers, workers))


def test_worker_init_fn_changes_the_copy_of_its_thread() -> None:
    dataset = Plain()
    loader = DataLoader(dataset, batch_size=3, num_workers=4, worker_init_fn=take_part)
    for _ in range(2):
        assert sorted(number for batch in loader for number in batch.tolist()) == list(range(24))
    assert (dataset.start, dataset.end) == (0, 24)


def test_an_iterable_that_fails_says_so_and_does_not_end_early() -> None:
    class Failing(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
        def __iter__(self) -> Iterator[int]:
            yield from range(4)
            raise OSError("the disk is gone")

    iterator = iter(DataLoader(Failing(), batch_size=2, num_workers=1))
    assert [next(iterator).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)


def test_stop_iteration_of_an_item_is_an_error_and_not_the_end() -> None:
    class Stopping(Numbers):
        def __getitem__(self, index: int) -> int:
            return index if index < 5 else next(iter(()))

    with pytest.raises(RuntimeError):
        list(DataLoader(Stopping(), batch_size=2, num_workers=2))


def test_an_exception_has_the_frames_of_its_thread() -> None:
    class Failing(Numbers):
        def __getitem__(self, index: int) -> int:
            raise LookupError(f"no item {index}")

    with pytest.raises(LookupError) as caught:
        next(iter(DataLoader(Failing(), batch_size=2, num_workers=2)))
    names = [entry.name for entry in caught.traceback]
    assert "__getitem__" in names


def test_worker_init_fn_that_fails_is_reported() -> None:
    def fail(worker: int) -> None:
        raise PermissionError(f"worker {worker} may not")

    with pytest.raises(PermissionError):
        next(iter(DataLoader(Numbers(), num_workers=2, worker_init_fn=fail)))


def test_a_slow_dataset_runs_into_the_timeout() -> None:
    class Slow(Numbers):
        def __getitem__(self, index: int) -> int:
            time.sleep(1.5)
            return index

    with pytest.raises(RuntimeError, match="timed out"):
        next(iter(DataLoader(Slow(), num_workers=1, timeout=0.2)))


def test_the_order_of_arrival_is_torchs_other_choice() -> None:
    loader = DataLoader(Numbers(), batch_size=1, num_workers=3, in_order=False)
    assert sorted(int(batch) for batch in loader) == list(range(60))


@pytest.mark.parametrize(
    ("busy_s", "cpu_s", "waited_s", "told"),
    [
        (4.0, 2.0, 1.9, True), (4.0, 3.9, 1.9, False), (4.0, 0.2, 1.9, False), (2.1, 2.0, 1.9, False),
        (4.0, 2.0, 0.1, False),
    ],
)  # fmt: skip
def test_threads_that_wait_for_the_interpreter_are_noticed(
    busy_s: float, cpu_s: float, waited_s: float, told: bool
) -> None:
    """Runs five phases in two seconds: held, parallel, asleep, single, and a slow consumer."""
    from forebay.torch.any_dataset.workers import Workers

    workers = Workers([lambda: abs] * 2, own_data=False, window=4, in_order=True, timeout_s=0)
    workers._shared.busy_s, workers._shared.cpu_s, workers._waited_s = busy_s, cpu_s, waited_s
    workers._started_s = time.monotonic() - 2
    assert (workers.contention() is not None) == told


def test_the_hint_is_given_once_with_its_measurement(monkeypatch: Any, caplog: Any) -> None:
    from forebay.torch.any_dataset import iterator, workers

    monkeypatch.setattr(iterator, "_has_gil", lambda: True)
    monkeypatch.setattr(workers.Workers, "contention", lambda self: (2.1, 2.0))
    monkeypatch.setattr(iterator.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with caplog.at_level("WARNING", "forebay"):
        for _ in range(2):
            list(DataLoader(Plain(), num_workers=2))
    told = [record.getMessage() for record in caplog.records if "holds the interpreter" in record.getMessage()]
    assert len(told) == 1 and "2 threads did 2.1 s of work of Plain in 2.0 s" in told[0]


def test_processes_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="thread"):
        DataLoader(Numbers(), num_workers=2, multiprocessing_context="spawn")


def test_arguments_are_checked_as_torch_checks_them(corpus: Path) -> None:
    tokens = TokenDataset(corpus, seq_len=SEQ_LEN)
    both: list[dict[str, Any]] = [
        {"num_workers": -1}, {"timeout": -1}, {"sampler": range(3), "shuffle": True}, {"batch_size": 0},
    ]  # fmt: skip
    # The native way has threads even if no workers are asked for.
    without_workers: list[dict[str, Any]] = [{"prefetch_factor": 2}, {"persistent_workers": True}]
    for dataset, wrongs in ((Numbers(), both + without_workers), (tokens, both)):
        for wrong in wrongs:
            with pytest.raises(ValueError):
                DataLoader(dataset, **wrong)


def test_settings_of_the_native_way_are_not_ignored_elsewhere() -> None:
    with pytest.raises(ValueError, match="dp_rank"):
        DataLoader(Numbers(), dp_rank=0, dp_world_size=2)


EXIT = """
import time, torch
from forebay.torch import DataLoader
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.zeros(1000)
iterator = iter(DataLoader(Slow(), batch_size=4, num_workers=4))
next(iterator)
"""


def test_the_interpreter_exits_cleanly_with_live_threads() -> None:
    done = run_python(EXIT, timeout=60)
    assert done.stderr == ""


# The path of page-locked memory, with memory that is not.


class Allocator:
    """Ordinary memory of torch, filled with a poison. It fails on demand."""

    def __init__(self) -> None:
        self.blocks: list[torch.Tensor] = []
        self.fail = False

    def __call__(self, nbytes: int) -> torch.Tensor:
        if self.fail:
            raise MemoryError("no more pages can be locked")
        block = torch.full((nbytes,), 0x5A, dtype=torch.uint8)
        self.blocks.append(block)
        return block


@pytest.mark.parametrize("settings", [{}, {"targets": "shifted"}, {"input_dtype": "int32"}])
def test_batches_lie_in_the_callers_memory(corpus: Path, settings: dict[str, Any]) -> None:
    allocator = Allocator()
    dataset = TokenDataset(corpus, seq_len=SEQ_LEN, **settings)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, seed=2, _allocator=allocator)
    content = {name: value for name, value in settings.items() if name == "targets"}
    wanted = Reference(
        token_stream(corpus),
        Settings(seq_len=SEQ_LEN, batch_size=4, shuffle="global", seed=2, remainder="short", **content),
    )
    for epoch in range(2):
        held = list(loader)
        for batch, rows in zip(held, wanted.batches(epoch=epoch), strict=True):
            assert_batch(batch, rows, content.get("targets", "labels"))
            starts = {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
            assert len(starts) == 1, "one block for all tensors of a batch, so that one copy can take it"
            assert starts <= {block.data_ptr() for block in allocator.blocks}
        first = next(iter(held[0].values()))
        assert first.dtype == getattr(torch, settings.get("input_dtype", "int64"))


def test_a_failing_allocator_loses_no_batch_and_hangs_nobody(corpus: Path) -> None:
    allocator = Allocator()
    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4, prefetch_batches=2, _allocator=allocator)
    wanted = [batch["input_ids"].tolist() for batch in DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4)]
    iterator = iter(loader)
    found = [next(iterator)["input_ids"].tolist()]
    allocator.fail = True
    with pytest.raises(MemoryError):
        for _ in range(10):
            found.append(next(iterator)["input_ids"].tolist())
    allocator.fail = False
    found += [batch["input_ids"].tolist() for batch in iterator]
    assert found == wanted


def test_a_batch_that_is_late_runs_into_the_timeout_and_is_not_lost(corpus: Path) -> None:
    tokens = TokenDataset(corpus, seq_len=SEQ_LEN)
    loader = DataLoader(tokens, batch_size=4, timeout=0.3)
    assert len(list(loader)) == len(loader), "a limit that is kept changes nothing"
    iterator = iter(loader)
    take, late = iterator._take, True

    def late_at_first(limit_s: float | None) -> Any:
        assert limit_s == 0.3
        if late:
            raise TimeoutError
        return take(limit_s)

    iterator._take = late_at_first
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.3 seconds"):
        next(iterator)
    late = False
    assert len(list(iterator)) == len(loader)


def test_the_core_waits_as_long_as_it_is_told(corpus: Path) -> None:
    """A pass waits for memory that is not submitted."""
    from forebay import _core

    loader = _core.Loader.open(_core.Settings({"data": str(corpus), "seq_len": 16}), False)
    batches = loader.iter(external=True)
    for limit_s in (0.0, 0.12):
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            batches.next(limit_s)
        assert limit_s <= time.monotonic() - start < 10
    block = torch.empty(batches.batch_bytes, dtype=torch.uint8)
    batches.submit(block.data_ptr(), block.nbytes, block)
    batch = batches.next(30.0)
    assert batch is not None and (batch.step, batch.address) == (0, block.data_ptr())


def test_several_threads_share_an_iterator_over_the_callers_memory(corpus: Path) -> None:
    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=1, num_workers=3, _allocator=Allocator())
    iterator = iter(loader)
    found: list[int] = []
    start = threading.Barrier(4)

    def consume() -> None:
        start.wait()
        found.extend(int(batch["input_ids"][0, 0]) for batch in iterator)

    threads = [threading.Thread(target=consume) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    wanted = [int(batch["input_ids"][0, 0]) for batch in DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN))]
    assert sorted(found) == sorted(wanted)


def test_the_callers_memory_is_let_go(corpus: Path) -> None:
    import weakref

    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def allocate(nbytes: int) -> torch.Tensor:
        block = torch.empty(nbytes, dtype=torch.uint8)
        alive.add(block)  # type: ignore[arg-type]
        return block

    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4, _allocator=allocate)
    for step, batch in enumerate(loader):
        del batch
        assert len(alive) < 12, f"{len(alive)} blocks are kept at step {step}"
        if step == 20:
            break
    loader.close()
    # A free-threaded interpreter counts references that another thread drops a moment later.
    deadline = time.monotonic() + 30
    while alive and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not alive


# What trainers touch.


def test_a_native_loader_looks_as_trainers_expect(corpus: Path) -> None:
    import weakref

    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4, num_workers=3)
    assert loader.num_workers == 0, "who rebuilds it with processes would multiply the data"
    assert loader.batch_sampler is None and loader.sampler is None
    assert loader._is_accelerate_prepared is True
    assert {"state_dict", "load_state_dict"} <= set(loader.__dict__)
    assert weakref.ref(loader)() is loader
    with pytest.raises(ValueError):
        loader.batch_size = 8
    python = DataLoader(Numbers(), num_workers=3)
    assert {"state_dict", "load_state_dict"} <= set(python.__dict__)
    assert python.num_workers == 3


def test_a_loader_can_be_pickled_with_its_position(corpus: Path) -> None:
    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4, shuffle=True, seed=3)
    iterator = iter(loader)
    next(iterator)
    copy = pickle.loads(pickle.dumps(loader))
    assert torch.equal(next(iter(copy))["input_ids"], next(iterator)["input_ids"])


def test_a_restored_epoch_survives_a_sampler_that_is_told_the_same_one(corpus: Path) -> None:
    from torch.utils.data.distributed import DistributedSampler

    dataset = TokenDataset(corpus, seq_len=SEQ_LEN)

    def make() -> tuple[Any, Any]:
        sampler: Any = DistributedSampler(dataset, num_replicas=1, rank=0, seed=4)
        return sampler, DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True)

    sampler, loader = make()
    sampler.set_epoch(2)
    iterator = iter(loader)
    next(iterator)
    state, wanted = loader.state_dict(), next(iterator)
    assert state["epoch"] == 2
    sampler, loader = make()
    loader.load_state_dict(state)
    sampler.set_epoch(2)
    assert torch.equal(next(iter(loader))["input_ids"], wanted["input_ids"])


class FakeGradientState:
    """The part of accelerate's state that remembers the iterated loaders."""

    active: ClassVar[list[Any]] = []

    def _add_dataloader(self, loader: Any) -> None:
        self.active.append(loader)

    def _remove_dataloader(self, loader: Any) -> None:
        self.active.remove(loader)


@pytest.mark.parametrize("skipped", [0, 3])
def test_accelerate_learns_of_the_last_batch(corpus: Path, monkeypatch: Any, skipped: int) -> None:
    import types

    module = types.ModuleType("accelerate.state")
    module.GradientState = FakeGradientState  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "accelerate.state", module)
    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=10)
    if skipped:
        iterator = iter(loader)
        for _ in range(skipped):
            next(iterator)
        state = loader.state_dict()
        iterator.close()
        loader.load_state_dict(state)
    flags = []
    for _ in loader:
        assert FakeGradientState.active == [loader]
        flags.append(loader.end_of_dataloader)
    assert flags == [False] * (12 - skipped) + [True]
    assert FakeGradientState.active == []


def test_batches_of_threads_lie_in_ordinary_memory() -> None:
    loader = DataLoader([torch.ones(4)] * 8, batch_size=2, num_workers=2)
    assert [batch.is_shared() for batch in loader] == [False] * 4
