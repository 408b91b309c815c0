"""Tests the corners of PyTorch's DataLoader in ours. The judge is torch's own class.

Torch runs its processes only in tests where workers matter. docs/torch.md lists the differences
that are on purpose. The tests under "Differences" below check them.
"""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
import warnings
import weakref
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")

import torch
from support import run_python
from test_dataloader_contract import Count, Squares, both, flat, make
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    Dataset,
    IterableDataset,
    RandomSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    default_convert,
    get_worker_info,
    random_split,
)
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data.distributed import DistributedSampler

import forebay.torch

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

#: Keywords that give a class its workers: processes in torch, threads in ours.
PROCESSES = pytest.param(
    (torch.utils.data.DataLoader, {"multiprocessing_context": "fork"}),
    id="processes",
    marks=pytest.mark.thread_unsafe(reason="torch starts processes, which it does once for the whole process"),
)
THREADS = pytest.param((forebay.torch.DataLoader, {}), id="threads")
with_workers = pytest.mark.parametrize("kind", [PROCESSES, THREADS])


def employ(kind: Any, dataset: Any, num_workers: int = 2, **arguments: Any) -> Any:
    cls, more = kind
    return cls(dataset, num_workers=num_workers, **more, **arguments)


class Echo(Squares):
    def __getitem__(self, index: int) -> Any:
        return index


class Uneven(IterableDataset):  # type: ignore[type-arg]
    """Gives as many items as its worker has."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is not None
        return iter(range(100 * info.id, 100 * info.id + self.sizes[info.id]))


# Samplers.


class Chunks:
    """Gives batches of indices in a random order, for datasets that read many items at once."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.size, self.batch_size = size, batch_size

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.size).tolist()
        yield from (order[at : at + self.batch_size] for at in range(0, self.size, self.batch_size))


@both
def test_a_sampler_of_lists_reaches_the_dataset_as_lists(kind: Any) -> None:
    class Bulk(Echo):
        def __getitem__(self, index: Any) -> torch.Tensor:
            assert type(index) is list
            return torch.tensor(index)

    loader = make(kind, Bulk(35), batch_size=None, sampler=Chunks(35, 4))
    sizes = [len(batch) for batch in loader]
    assert sizes == [4] * 8 + [3] and len(loader) == 9
    assert sorted(flat(loader)) == list(range(35))


@both
def test_batches_of_any_length_may_be_tuples_and_are_given_again_in_every_epoch(kind: Any) -> None:
    given = [(0, 1), (2, 3, 4), (5,), (6, 7, 8, 9)]
    loader = make(kind, Echo(), batch_sampler=given)
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [list(batch) for batch in given]
    assert len(loader) == 4


@both
def test_iterators_of_one_sampler_are_independent(kind: Any) -> None:
    class Backwards:
        def __iter__(self) -> Iterator[int]:
            yield from range(9, -1, -1)

    loader = make(kind, Echo(10), sampler=Backwards(), batch_size=3)
    one, other = iter(loader), iter(loader)
    head = next(one).tolist()
    assert head == [9, 8, 7] and flat(other) == list(range(9, -1, -1)) and flat(one) == list(range(6, -1, -1))
    with pytest.raises(TypeError):
        len(loader)


@both
def test_a_sampler_without_an_end_is_drawn_from_as_needed(kind: Any) -> None:
    loader = make(kind, Echo(), sampler=itertools.cycle(range(3)), batch_size=2)
    assert flat(itertools.islice(loader, 4)) == [0, 1, 2, 0, 1, 2, 0, 1]


@both
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("more", [-5, 5])
def test_the_length_of_a_random_sampler_is_that_of_its_loader(kind: Any, replacement: bool, more: int) -> None:
    samples = 20 + more
    sampler = RandomSampler(Squares(), replacement=replacement, num_samples=samples)
    for batch_size in (1, 6):
        loader = make(kind, Squares(), sampler=sampler, batch_size=batch_size)
        assert len(loader) == -(-samples // batch_size) == len(list(loader))


@both
def test_ranks_that_drop_the_rest_share_no_item(kind: Any) -> None:
    seen: list[int] = []
    for rank in range(4):
        sampler: Any = DistributedSampler(Echo(9), num_replicas=4, rank=rank, shuffle=False)
        seen += flat(make(kind, Echo(9), sampler=sampler, batch_size=2, drop_last=True))
    assert len(seen) == len(set(seen)) == 8


SAMPLERS = {
    "drawn again": lambda g: RandomSampler(Squares(), replacement=True, num_samples=7, generator=g),
    "permuted": lambda g: RandomSampler(Squares(), generator=g),
    "weighted": lambda g: WeightedRandomSampler([0.1, 0.9, 3.0, 0.6], 6, generator=g),
    "weighted, each once": lambda g: WeightedRandomSampler([0.1, 0.9, 3.0, 0.6], 3, replacement=False, generator=g),
    "subset": lambda g: SubsetRandomSampler(range(3, 13), generator=g),
}


@both
@pytest.mark.parametrize("which", SAMPLERS)
@pytest.mark.thread_unsafe(reason="seeds the generator of the process")
def test_samplers_draw_what_they_draw_in_torch(kind: Any, which: str) -> None:
    def drawn(kind: Any, own: bool) -> list[int]:
        torch.manual_seed(3)
        sampler = SAMPLERS[which](torch.Generator().manual_seed(42) if own else None)  # type: ignore[no-untyped-call]
        loader = make(kind, Echo(), sampler=sampler)
        return flat(loader) + flat(loader)

    for own in (False, True):
        assert drawn(kind, own) == drawn((torch.utils.data.DataLoader, 0), own)


# Datasets.


@both
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_dataset_may_grow(kind: Any, shuffle: bool) -> None:
    dataset = list(range(4))
    loader = make(kind, dataset, shuffle=shuffle)
    assert len(loader) == 4
    dataset.append(4)
    assert len(loader) == 5 and sorted(flat(loader)) == [0, 1, 2, 3, 4]


@both
def test_pairs_of_tensors_come_in_pairs(kind: Any) -> None:
    data, labels = torch.arange(30).view(10, 3), torch.arange(10).flip(0)
    loader = make(kind, TensorDataset(data, labels), batch_size=4, shuffle=True)
    for rows, numbers in loader:
        assert torch.equal(rows, data[9 - numbers]) and len(rows) == len(numbers)
    whole = tuple(make(kind, TensorDataset(data, labels), batch_size=10))
    assert len(whole) == 1 and torch.equal(whole[0][0], data) and torch.equal(whole[0][1], labels)


@both
def test_parts_are_asked_for_plain_indices(kind: Any) -> None:
    class Strict(Echo):
        def __getitem__(self, index: Any) -> Any:
            assert type(index) is int
            return index

    for lengths in ([6, 2, 2], [0.5, 0.3, 0.2]):
        parts = random_split(Strict(10), lengths, generator=torch.Generator().manual_seed(1))
        assert sorted(value for part in parts for value in flat(make(kind, part, batch_size=3))) == list(range(10))


@both
def test_a_subset_that_changes_its_items_is_not_passed_by(kind: Any) -> None:
    class Doubled(Subset):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            return 2 * self.dataset[self.indices[index]]

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    assert flat(make(kind, Doubled(Echo(), [4, 2, 7]), batch_size=2)) == [8, 4, 14]
    assert flat(make(kind, Subset(Doubled(Echo(), [4, 2, 7]), [2, 0]), batch_size=2)) == [14, 8]


@both
def test_stacked_datasets_read_whole_batches_and_say_if_some_is_missing(kind: Any) -> None:
    class Whole(Echo):
        missing = 0

        def __getitems__(self, indices: list[int]) -> list[int]:
            return [10 * index for index in indices][self.missing :]

    class Short(Whole):
        missing = 1

    stacked = make(kind, StackDataset(Whole(4), range(4)), batch_size=4)
    assert [column.tolist() for column in next(iter(stacked))] == [[0, 10, 20, 30], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match="size mismatch"):
        next(iter(make(kind, StackDataset(Short(4), range(4)), batch_size=4)))


@both
def test_an_index_outside_is_an_error_and_not_the_end(kind: Any) -> None:
    for dataset in ([1, 2], ConcatDataset([Squares(1), Squares(1)]), StackDataset(Squares(2))):
        iterator = iter(make(kind, dataset, sampler=[0, 11, 1]))
        next(iterator)
        with pytest.raises(IndexError):
            next(iterator)
        next(iterator)


@both
def test_chains_are_of_iterables_only(kind: Any) -> None:
    assert sorted(flat(make(kind, Count(4) + Count(3), batch_size=2))) == [0, 0, 1, 1, 2, 2, 3]
    with pytest.raises(AssertionError, match="IterableDataset"):
        list(make(kind, ChainDataset([Count(3), Squares(2)])))


@both
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_length_of_an_iterable_is_rounded_as_it_is_cut(kind: Any, drop_last: bool) -> None:
    for batch_size in (1, 2, 3):
        whole, rest = divmod(10, batch_size)
        loader = make(kind, Count(10), batch_size=batch_size, drop_last=drop_last)
        assert len(loader) == whole + bool(rest and not drop_last)


@pytest.mark.thread_unsafe(reason="torch starts processes, and warnings are caught for the whole process")
@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("prefetch_factor", [2, 3])
def test_workers_with_much_and_with_nothing(batch_size: int | None, drop_last: bool, prefetch_factor: int) -> None:
    if batch_size is None and drop_last:
        pytest.skip("there is no batch to drop")

    def run(kind: Any) -> list[list[int]]:
        settings = {"batch_size": batch_size, "drop_last": drop_last, "prefetch_factor": prefetch_factor}
        loader = employ(kind, Uneven([0, 4, 20]), 3, **settings)
        assert len(loader) == (24 if batch_size is None else 24 // 7 + (not drop_last))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            items = list(loader)
        assert batch_size is not None or all(type(item) is int for item in items)
        return [torch.as_tensor(item).flatten().tolist() for item in items]

    assert run(THREADS.values[0]) == run(PROCESSES.values[0])


@with_workers
def test_batches_of_an_iterable_come_from_its_workers_in_turn(kind: Any) -> None:
    class Own(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            info = get_worker_info()
            assert info is not None
            return itertools.repeat(info.id, 20)

    loader = employ(kind, Own(), 2, batch_size=10, persistent_workers=True)
    for _ in range(3):
        assert [set(batch.tolist()) for batch in loader] == [{0}, {1}, {0}, {1}]


@with_workers
@pytest.mark.thread_unsafe(reason="warnings are caught for the whole process")
def test_each_item_beyond_the_length_is_warned_of_once_it_was_asked_for(kind: Any) -> None:
    class Same(IterableDataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Iterator[int]:
            return iter(range(6))

    loader = employ(kind, Same())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(list(loader)) == 12
    assert len(loader) == 6
    iterator = iter(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(6):
            next(iterator)
    for _ in range(3):
        with pytest.warns(UserWarning, match="configuring the IterableDataset replica at each worker"):
            next(iterator)


# Collation.

Pair = namedtuple("Pair", ["left", "right"])


class Named(dict):  # type: ignore[type-arg]
    pass


class Listed(list):  # type: ignore[type-arg]
    pass


class Unmakeable(Mapping):  # type: ignore[type-arg]
    """A mapping that cannot be made from a dict."""

    def __init__(self, one: int, two: int) -> None:
        self.items_ = {"one": one, "two": two}

    def __getitem__(self, name: str) -> int:
        return self.items_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, Iterable) and not isinstance(one, str):
        return all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


ITEMS: dict[str, list[Any]] = {
    "dict": [{"t": torch.full((4, 2), float(i)), "inner": {"n": i}} for i in range(4)],
    "own dict": [Named(a=i, b=-i) for i in range(4)],
    "own list": [Listed([i, 0.5]) for i in range(4)],
    "ranges": [range(2), range(2)],
    "mapping": [Unmakeable(i, 2) for i in range(3)],
    "named tuple": [Pair(Pair(i, -i), str(i)) for i in range(4)],
    "text": [("a", i) for i in range(3)],
    "truth": [True, False],
    "floats": [1.1, 2.3, -0.9],
    "arrays": [np.full((2, 3), i) for i in range(3)],
    "rows of an array": list(np.arange(8, dtype=np.int16).reshape(4, 2)),
}


@both
@pytest.mark.parametrize("what", ITEMS)
def test_batches_and_single_items_are_of_the_types_that_torch_makes(kind: Any, what: str) -> None:
    items = ITEMS[what]
    (batch,) = make(kind, items, batch_size=len(items))
    assert same(batch, default_collate(items))
    for found, item in zip(make(kind, items, batch_size=None), items, strict=True):
        assert same(found, default_convert(item))


@both
def test_numpy_scalars_become_tensors_of_their_type(kind: Any) -> None:
    for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8"):
        scalar = getattr(np, name)
        (batch,) = make(kind, [scalar(1), scalar(2)], batch_size=2)
        assert batch.dtype == getattr(torch, name) and batch.tolist() == [1, 2]


@both
def test_a_mapped_file_becomes_a_batch(kind: Any, tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "rows", dtype=np.int64, mode="w+", shape=(4, 2))
    mapped[:] = np.arange(8).reshape(4, 2)
    (batch,) = make(kind, mapped, batch_size=4)
    assert batch.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@both
def test_what_has_no_place_in_a_batch_is_refused(kind: Any) -> None:
    # The jagged layout is not used, because it imports triton, which turns the GIL on.
    ragged, sparse = torch.nested.nested_tensor([torch.ones(2)]), torch.eye(2).to_sparse()
    for items, error in (
        ([["X"], ["X", "X"]], RuntimeError), ([["X", "X"], ["X"]], RuntimeError),
        ([np.array(["a"]), np.array(["b"])], TypeError), ([np.array([object()])] * 2, TypeError),
        ([ragged] * 2, RuntimeError), ([sparse] * 2, RuntimeError),
    ):  # fmt: skip
        with pytest.raises(error):
            next(iter(make(kind, items, batch_size=2)))


@both
def test_memory_is_not_pinned_where_there_is_nothing_to_pin_it_for(kind: Any) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator: see test_gpu.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for asked in ({"pin_memory": True}, {"pin_memory_device": "cuda"}):
            (batch,) = make(kind, ITEMS["dict"], batch_size=4, **asked)
            assert not batch["t"].is_pinned() and not batch["inner"]["n"].is_pinned()


# Errors.


@both
def test_every_batch_that_fails_is_an_error_of_its_own(kind: Any) -> None:
    class Unwritten(Squares):
        def __getitem__(self, index: int) -> int:
            raise NotImplementedError

    iterator, errors = iter(make(kind, Unwritten(41), batch_size=2, shuffle=True)), 0
    with pytest.raises(StopIteration):
        while True:
            try:
                next(iterator)
            except NotImplementedError:
                errors += 1
    assert errors == 21


@both
def test_an_iterable_that_cannot_begin_is_an_error(kind: Any) -> None:
    class Closed(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            raise RuntimeError("nothing to read")

    with pytest.raises(RuntimeError, match="nothing to read"):
        list(make(kind, Closed()))


@both
def test_errors_keep_their_arguments(kind: Any) -> None:
    def fail(items: Any) -> Any:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no such byte")

    class Missing(Squares):
        def __getitem__(self, index: int) -> int:
            raise KeyError("two\nlines", index)

    with pytest.raises(UnicodeDecodeError) as undecoded:
        next(iter(make(kind, Squares(), collate_fn=fail)))
    assert (undecoded.value.object, undecoded.value.reason) == (b"\xff", "no such byte")
    with pytest.raises(KeyError) as missing:
        next(iter(make(kind, Missing())))
    assert missing.value.args == ("two\nlines", 0)


@both
def test_an_error_of_the_consumer_leaves_many_indices_behind(kind: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        for batch in make(kind, Echo(1_000_000), batch_size=20_000, collate_fn=len):
            _ = batch / 0


@pytest.mark.parametrize("cls", [torch.utils.data.DataLoader, forebay.torch.DataLoader])
def test_a_time_limit_needs_workers(cls: Any) -> None:
    with pytest.raises((AssertionError, ValueError), match="timeout"):
        iter(cls(Squares(), timeout=1))


@with_workers
def test_workers_may_not_prefetch_less_than_nothing(kind: Any) -> None:
    with pytest.raises(ValueError, match="prefetch_factor"):
        employ(kind, Squares(), prefetch_factor=-1)


@both
def test_iterables_refuse_whatever_orders_a_dataset(kind: Any) -> None:
    for wrong in ({"shuffle": 3}, {"sampler": 3}, {"batch_sampler": 3}):
        with pytest.raises(ValueError):
            make(kind, Count(3), **wrong)


@pytest.mark.parametrize("cls", [torch.utils.data.DataLoader, forebay.torch.DataLoader])
def test_the_class_takes_the_type_of_its_items(cls: Any) -> None:
    class Mine(cls[list[int]]):  # type: ignore[misc]
        pass

    assert flat(Mine(Squares(3))) == [0, 1, 4] and isinstance(Mine(Squares(3)), cls)


# Workers.


class Told(IterableDataset):  # type: ignore[type-arg]
    """Gives the facts that its worker knows, and the numbers that its `worker_init_fn` drew."""

    drawn: tuple[float, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None and info.dataset is self
        yield info.id, info.num_workers, info.seed, self.drawn


def draw(worker: int) -> None:
    info = get_worker_info()
    assert info is not None and info.id == worker and info.seed == torch.initial_seed()
    assert all(f"{name}=" in repr(info) for name in ("id", "num_workers", "seed", "dataset"))
    with pytest.raises((AttributeError, RuntimeError)):
        info.id = 7
    info.dataset.drawn = random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.thread_unsafe(reason="torch starts processes, which it does once for the whole process")
def test_workers_know_and_draw_what_they_do_in_torch() -> None:
    def run(kind: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(42)
        loader = employ(kind, Told(), 3, batch_size=None, worker_init_fn=draw, generator=generator)
        return [*loader, *loader]

    found = run(THREADS.values[0])
    assert found == run(PROCESSES.values[0])
    assert len({seed for _, _, seed, _ in found}) == 6 and get_worker_info() is None


@with_workers
def test_late_items_of_one_worker_keep_the_order(kind: Any) -> None:
    class Late(Count):
        def __iter__(self) -> Iterator[int]:
            for item in super().__iter__():
                time.sleep(0.1 if item == 0 else 0)
                yield item

    assert flat(employ(kind, Late(10), in_order=True)) == list(range(10))


def test_arrival_decides_where_order_is_not_asked_for() -> None:
    """Lets one worker wait until all other batches are handed over. The others do its share."""
    held = threading.Event()

    class Held(Echo):
        def __getitem__(self, index: int) -> int:
            assert index != 0 or held.wait(60)
            return index

    class HeldStream(Count):
        def __iter__(self) -> Iterator[int]:
            info = get_worker_info()
            assert info is not None and (info.id == 0 or held.wait(60))
            return iter(range(5 * info.id, 5 * info.id + 5))

    for dataset, early in ((Held(10), 9), (HeldStream(10), 5)):
        held.clear()
        iterator = iter(forebay.torch.DataLoader(dataset, num_workers=2, in_order=False))
        found = flat(itertools.islice(iterator, early))
        held.set()
        rest = flat(iterator)
        assert sorted(found + rest) == list(range(10)) and (rest == [0] or rest == [5, 6, 7, 8, 9])


@with_workers
def test_loaders_take_turns(kind: Any) -> None:
    one, other = iter(employ(kind, Echo(6), 1)), iter(employ(kind, Echo(6), 2))
    found = [int(next(iterator)) for iterator in (one, one, other, other, one, other)]
    assert found == [0, 1, 0, 1, 2, 2]


@both
def test_native_code_runs_in_a_worker_after_its_caller_used_it(kind: Any) -> None:
    class Convolved(Dataset):  # type: ignore[type-arg]
        signal = torch.ones(1, 1, 24_000)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.nn.functional.conv1d(self.signal, torch.ones(1, 1, 2))

    dataset = Convolved()
    expected = dataset[0]
    assert all(torch.equal(batch[0], expected) for batch in make(kind, dataset))


@pytest.mark.parametrize("persistent", [False, True])
def test_a_dropped_iterator_lets_its_dataset_go(persistent: bool) -> None:
    dataset = Echo(1000)
    loader = forebay.torch.DataLoader(dataset, num_workers=3, persistent_workers=persistent)
    iterator = iter(loader)
    next(iterator)
    threads = list(iterator._workers._threads)
    kept = [weakref.ref(thing) for thing in (iterator, loader, dataset)]
    del iterator, loader, dataset
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3


EXIT = """
import sys
import torch
from forebay.torch import DataLoader
class Items(torch.utils.data.Dataset):
    def __len__(self): return 100
    def __getitem__(self, index):
        if sys.argv[1] == "worker" and index == 7: raise RuntimeError("worker error")
        return torch.tensor(index)
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(range(100))
dataset = Items() if sys.argv[1] == "worker" else Stream()
iterator = iter(DataLoader(dataset, num_workers=2, persistent_workers=True))
for batch in iterator:
    if sys.argv[1] == "consumer": raise RuntimeError("consumer error")
"""


@pytest.mark.parametrize("who", ["consumer", "worker"])
def test_the_process_ends_with_the_error_that_nobody_caught(who: str) -> None:
    done = run_python(EXIT, who, timeout=100, check=False)
    assert done.returncode == 1 and f"RuntimeError: {who} error" in done.stderr


# Differences.


@pytest.mark.parametrize("context", ["fork", "spawn", "bad", object()])
def test_no_way_of_starting_processes_is_taken(context: Any) -> None:
    for workers in (0, 1):
        with pytest.raises(ValueError, match="threads of this process"):
            forebay.torch.DataLoader(Squares(), num_workers=workers, multiprocessing_context=context)
    loader = forebay.torch.DataLoader(Squares(), num_workers=1)
    with pytest.raises(ValueError, match="threads of this process"):
        loader.multiprocessing_context = context
    assert loader.multiprocessing_context is None


def test_collated_batches_are_not_shared_though_a_worker_makes_them() -> None:
    items = [torch.ones(2), torch.ones(2)]
    for collate_fn in (None, default_collate):
        for dataset in (items, [item.numpy() for item in items], [{"a": item} for item in items]):
            (batch,) = forebay.torch.DataLoader(
                dataset,  # type: ignore[arg-type]
                batch_size=2,
                num_workers=1,
                collate_fn=collate_fn,
            )
            assert not (batch["a"] if isinstance(batch, dict) else batch).is_shared()


@pytest.mark.thread_unsafe(reason="pretends that the process is a worker of torch's")
def test_workers_of_torch_share_their_batches_as_before(monkeypatch: Any) -> None:
    list(forebay.torch.DataLoader(Squares(2), num_workers=1))
    assert not default_collate([torch.ones(2)]).is_shared()
    monkeypatch.setattr(torch_worker, "_worker_info", "a worker of torch's")
    assert default_collate([torch.ones(2)]).is_shared()


FILES = """
import resource
import torch
from forebay.torch import DataLoader
class Items(torch.utils.data.Dataset):
    def __len__(self): return 400
    def __getitem__(self, index): return torch.ones(2, 2)
list(DataLoader(Items(), num_workers=1))
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
kept = [list(DataLoader(Items(), num_workers=2, batch_size=size)) for size in (None, 2)]
assert [len(batches) for batches in kept] == [400, 200]
"""


def test_batches_that_are_kept_hold_no_open_file() -> None:
    """Each batch of torch holds a file. Too many batches fail with a hint at `ulimit -n`."""
    pytest.importorskip("resource", reason="the system has no limit to set")
    run_python(FILES, timeout=100)


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_iteration_in_an_item_is_an_error(workers: int) -> None:
    """In torch the epoch ends there, without an error."""

    class Stopping(Squares):
        def __getitem__(self, index: int) -> int:
            return index if index < 5 else next(iter(()))

    assert flat(torch.utils.data.DataLoader(Stopping(), batch_size=1)) == list(range(5))
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(forebay.torch.DataLoader(Stopping(), batch_size=1, num_workers=workers))


@with_workers
@pytest.mark.parametrize("iterable", [False, True])
def test_persistent_workers_keep_a_dataset_only_in_torch(kind: Any, iterable: bool) -> None:
    class Items(Squares):
        start, begun = 0, 0

        def __getitem__(self, index: int) -> Any:
            return self.start, self.begun

    class Stream(IterableDataset):  # type: ignore[type-arg]
        start, begun = 0, 0

        def __iter__(self) -> Iterator[Any]:
            return iter([(self.start, self.begun)])

    def begin(worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        info.dataset.begun += 1  # type: ignore[attr-defined]

    dataset: Any = Stream() if iterable else Items(4)
    loader = employ(kind, dataset, 1, batch_size=None, persistent_workers=True, worker_init_fn=begin)
    found = []
    for epoch in range(3):
        dataset.start = epoch
        found.append(tuple(next(iter(loader))))
    if kind[0] is torch.utils.data.DataLoader:
        assert found == [(0, 1)] * 3
    else:  # set up in each pass: a copy of an iterable, or the one dataset there is
        assert found == [(0, 1), (1, 1 if iterable else 2), (2, 1 if iterable else 3)]


@with_workers
def test_batches_go_to_a_worker_in_turn_only_in_torch(kind: Any) -> None:
    held = threading.Event()
    torch_class = kind[0] is torch.utils.data.DataLoader

    class Whose(Squares):
        def __getitem__(self, index: int) -> Any:
            if index == 5:
                held.set()
            assert index != 0 or torch_class or held.wait(60)
            info = get_worker_info()
            assert info is not None
            return info.id

    found = list(employ(kind, Whose(8), batch_size=None, prefetch_factor=4))
    # While one thread is held at the first item, the other computes the next ones.
    if torch_class:
        assert found == [0, 1] * 4
    else:
        assert len(set(found[1:6])) == 1 and found[0] != found[1]


@with_workers
def test_a_worker_has_the_threads_of_its_process(kind: Any) -> None:
    class Threads(Squares):
        def __getitem__(self, index: int) -> int:
            return torch.get_num_threads()

    expected = 1 if kind[0] is torch.utils.data.DataLoader else torch.get_num_threads()
    assert flat(employ(kind, Threads(2))) == [expected] * 2


@pytest.mark.parametrize("name", ["num_workers", "timeout", "device_prefetch"])
def test_numbers_that_are_none_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be a number, found str"):
        forebay.torch.DataLoader([1, 2], **{name: "two"})
    with pytest.raises(ValueError, match=f"`{name}` must not be negative"):
        forebay.torch.DataLoader([1, 2], **{name: -1})
