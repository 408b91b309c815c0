"""Tests that our DataLoader keeps the promises of PyTorch's.

Where both must agree a test runs with torch's class, without workers, and with ours, without and
with threads. What differs on purpose stands in docs/torch.md, and under "Differences" below.
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")

import torch
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
    random_split,
)
from torch.utils.data.distributed import DistributedSampler

import forebay.torch

#: Class and number of workers.
KINDS = [
    pytest.param((torch.utils.data.DataLoader, 0), id="torch"),
    pytest.param((forebay.torch.DataLoader, 0), id="caller"),
    pytest.param((forebay.torch.DataLoader, 1), id="thread"),
    pytest.param((forebay.torch.DataLoader, 4), id="threads"),
]
both = pytest.mark.parametrize("kind", KINDS)


def make(kind: Any, dataset: Any, **arguments: Any) -> Any:
    cls, workers = kind
    return cls(dataset, num_workers=workers, **arguments)


def flat(batches: Any) -> list[int]:
    return [int(value) for batch in batches for value in torch.as_tensor(batch).flatten()]


class Squares(Dataset):  # type: ignore[type-arg]
    def __init__(self, size: int = 20) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return index * index


class Count(IterableDataset):  # type: ignore[type-arg]
    """Dealt out over the workers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(self.size)) if info is None else iter(range(info.id, self.size, info.num_workers))


# Batches of map-style datasets.


@both
@pytest.mark.parametrize("batch_size", [1, 3, 20, 50])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_come_in_order_and_the_last_may_be_short(kind: Any, batch_size: int, drop_last: bool) -> None:
    loader = make(kind, Squares(), batch_size=batch_size, drop_last=drop_last)
    sizes = [len(batch) for batch in loader]
    whole, rest = divmod(20, batch_size)
    assert sizes == [batch_size] * whole + ([rest] if rest and not drop_last else [])
    assert len(loader) == len(sizes)
    assert flat(loader) == [i * i for i in range(sum(sizes))]


@both
def test_every_epoch_is_a_new_permutation(kind: Any) -> None:
    loader = make(kind, Squares(), batch_size=3, shuffle=True)
    epochs = [flat(loader) for _ in range(3)]
    assert all(sorted(epoch) == [i * i for i in range(20)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


@both
def test_a_generator_decides_the_permutation(kind: Any) -> None:
    def run() -> list[list[int]]:
        loader = make(kind, Squares(), shuffle=True, generator=torch.Generator().manual_seed(9))
        return [flat(loader) for _ in range(2)]

    expected = torch.utils.data.DataLoader(Squares(), shuffle=True, generator=torch.Generator().manual_seed(9))
    assert run() == run() == [flat(expected) for _ in range(2)]


@both
def test_without_batching_items_come_as_they_are(kind: Any) -> None:
    assert [int(item) for item in make(kind, Squares(5), batch_size=None)] == [0, 1, 4, 9, 16]
    rows = make(kind, TensorDataset(torch.arange(6).view(3, 2)), batch_size=None)
    assert [row[0].tolist() for row in rows] == [[0, 1], [2, 3], [4, 5]]
    arrays = make(kind, [np.ones(2), "text", 3.5], batch_size=None)
    ones, text, number = list(arrays)
    assert isinstance(ones, torch.Tensor) and text == "text" and number == 3.5


@both
def test_an_empty_dataset_is_an_empty_epoch(kind: Any) -> None:
    loader = make(kind, Squares(0), batch_size=3)
    assert list(loader) == [] and len(loader) == 0


@both
def test_datasets_made_of_datasets(kind: Any) -> None:
    joined = ConcatDataset([Squares(3), Subset(Squares(), [7, 5]), range(100, 102)])  # type: ignore[list-item]
    assert flat(make(kind, joined, batch_size=2)) == [0, 1, 4, 49, 25, 100, 101]
    one, other = random_split(Squares(10), [7, 3], generator=torch.Generator().manual_seed(1))
    assert sorted(flat(make(kind, one)) + flat(make(kind, other))) == [i * i for i in range(10)]
    stacked = next(iter(make(kind, StackDataset(a=Squares(4), b=range(4)), batch_size=4)))
    assert stacked["a"].tolist() == [0, 1, 4, 9] and stacked["b"].tolist() == [0, 1, 2, 3]
    chained = ChainDataset([Count(3), Count(2)])
    assert sorted(flat(make(kind, chained))) == [0, 0, 1, 1, 2]


@both
def test_getitems_is_given_whole_batches(kind: Any) -> None:
    class Whole(Squares):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [-index for index in indices]

    assert flat(make(kind, Whole(5), batch_size=2)) == [0, -1, -2, -3, -4]


# Samplers.


@both
def test_samplers_decide_what_comes(kind: Any) -> None:
    data = Squares(10)
    assert flat(make(kind, data, sampler=[3, 1, 1], batch_size=2)) == [9, 1, 1]
    assert flat(make(kind, data, sampler=SequentialSampler(range(4)))) == [0, 1, 4, 9]
    drawn = flat(make(kind, data, sampler=RandomSampler(data, replacement=True, num_samples=33), batch_size=4))
    assert len(drawn) == 33
    some = flat(make(kind, data, sampler=SubsetRandomSampler([2, 4, 6])))
    assert sorted(some) == [4, 16, 36]
    weighted = flat(make(kind, data, sampler=WeightedRandomSampler([0, 0, 1], 5)))
    assert weighted == [4] * 5
    assert len(make(kind, data, sampler=[3, 1, 1], batch_size=2)) == 2


@both
def test_batch_samplers_decide_the_batches(kind: Any) -> None:
    given = [[1, 2, 3], [], [4]]
    assert [len(batch) for batch in make(kind, Squares(), batch_sampler=given, collate_fn=list)] == [3, 0, 1]
    sampler = BatchSampler(RandomSampler(range(8), generator=torch.Generator().manual_seed(2)), 3, True)
    loader = make(kind, Squares(), batch_sampler=sampler)
    assert [len(batch) for batch in loader] == [3, 3] and loader.batch_size is None and len(loader) == 2
    endless = make(kind, Squares(), batch_sampler=([i % 20] for i in itertools.count()))
    assert flat(itertools.islice(endless, 30)) == [(i % 20) ** 2 for i in range(30)]
    with pytest.raises(TypeError):
        len(endless)


@both
def test_distributed_samplers_share_the_dataset(kind: Any) -> None:
    seen: list[int] = []
    for rank in range(3):
        sampler: Any = DistributedSampler(Squares(), num_replicas=3, rank=rank, shuffle=True, seed=1)
        sampler.set_epoch(4)
        seen += flat(make(kind, Squares(), sampler=sampler, batch_size=4))
    assert len(seen) == 21 and set(seen) == {i * i for i in range(20)}


# Collation.

Point = namedtuple("Point", ["x", "y"])


@both
def test_batches_have_the_form_of_their_items(kind: Any) -> None:
    items = [
        {
            "t": torch.full((2,), i),
            "n": np.float32(i),
            "s": str(i),
            "p": Point(i, [i]),
            "d": OrderedDict(a=i),
            "l": (i, 0.5),
        }
        for i in range(4)
    ]
    batch = next(iter(make(kind, items, batch_size=4)))
    expected = default_collate(items)
    assert type(batch["p"]) is Point and type(batch["d"]) is type(expected["d"])
    assert batch["t"].shape == (4, 2) and batch["n"].dtype == torch.float32 and batch["s"] == ["0", "1", "2", "3"]
    assert batch["p"].y[0].tolist() == [0, 1, 2, 3] and batch["l"][1].dtype == torch.float64


@both
def test_a_collate_fn_gets_the_list_of_items(kind: Any) -> None:
    def collate(items: list[int]) -> tuple[int, ...]:
        assert type(items) is list
        return tuple(items)

    assert list(make(kind, Squares(5), batch_size=2, collate_fn=collate)) == [(0, 1), (4, 9), (16,)]
    assert list(make(kind, Squares(3), batch_size=None, collate_fn=lambda item: -item)) == [0, -1, -4]


@both
def test_items_that_do_not_fit_together_are_an_error(kind: Any) -> None:
    with pytest.raises(RuntimeError):
        next(iter(make(kind, [torch.zeros(2), torch.zeros(3)], batch_size=2)))
    with pytest.raises(TypeError):
        next(iter(make(kind, [object()], batch_size=1)))


# Iterable datasets.


@both
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_iterables_give_all_they_have(kind: Any, batch_size: int | None) -> None:
    loader = make(kind, Count(23), batch_size=batch_size)
    assert sorted(flat(loader)) == list(range(23)) == sorted(flat(loader))
    assert len(loader) == {None: 23, 1: 23, 4: 6}[batch_size]


@both
def test_drop_last_is_by_worker(kind: Any) -> None:
    loader = make(kind, Count(23), batch_size=5, drop_last=True)
    workers = max(kind[1], 1)
    assert [len(batch) for batch in loader] == [5] * sum(
        len(range(worker, 23, workers)) // 5 for worker in range(workers)
    )


@both
def test_iterables_without_a_length_have_none(kind: Any) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(TypeError):
        len(make(kind, Stream()))


@both
def test_more_items_than_the_length_said_are_warned_of(kind: Any) -> None:
    class Wrong(Count):
        def __len__(self) -> int:
            return 2

    loader = make(kind, Wrong(12), batch_size=1)
    assert len(loader) == 2
    with pytest.warns(UserWarning, match="was reported to be 2"):
        assert len(list(loader)) == 12


@both
def test_iterables_take_no_sampler(kind: Any) -> None:
    for wrong in ({"shuffle": True}, {"sampler": [1]}, {"batch_sampler": [[1]]}):
        with pytest.raises(ValueError, match="IterableDataset"):
            make(kind, Count(3), **wrong)
    assert sorted(flat(make(kind, Count(3), shuffle=False))) == [0, 1, 2]


# Arguments.


@both
def test_arguments_that_exclude_each_other(kind: Any) -> None:
    for wrong in (
        {"batch_sampler": [[1]], "batch_size": 2}, {"batch_sampler": [[1]], "shuffle": True},
        {"batch_sampler": [[1]], "sampler": [1]}, {"batch_sampler": [[1]], "drop_last": True},
        {"sampler": [1], "shuffle": True}, {"batch_size": None, "drop_last": True}, {"batch_size": 0},
        {"batch_size": -1}, {"timeout": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            make(kind, Squares(), **wrong)


@pytest.mark.parametrize("cls", [torch.utils.data.DataLoader, forebay.torch.DataLoader])
def test_workers_are_counted_from_none(cls: Any) -> None:
    for wrong in ({"num_workers": -1}, {"prefetch_factor": 2}, {"persistent_workers": True}):
        with pytest.raises(ValueError):
            cls(Squares(), **wrong)


@both
def test_what_was_given_can_be_read_and_not_be_changed(kind: Any) -> None:
    data = Squares()
    loader = make(kind, data, batch_size=3, drop_last=True)
    assert (loader.dataset, loader.batch_size, loader.drop_last) == (data, 3, True)
    assert isinstance(loader.sampler, SequentialSampler) and isinstance(loader.batch_sampler, BatchSampler)
    for name in ("batch_size", "sampler", "batch_sampler", "drop_last", "dataset", "persistent_workers"):
        with pytest.raises(ValueError, match="should not be set"):
            setattr(loader, name, getattr(loader, name))


# Errors and ends.


@both
def test_an_exception_comes_at_its_batch_and_the_pass_goes_on(kind: Any) -> None:
    class Failing(Squares):
        def __getitem__(self, index: int) -> int:
            if index == 5:
                raise FileNotFoundError(2, "no such shard", "five.bin")
            return index

    iterator = iter(make(kind, Failing(12), batch_size=2))
    found: list[Any] = []
    for _ in range(6):
        try:
            found.append(next(iterator).tolist())
        except FileNotFoundError as error:
            found.append(error.filename)
    assert found == [[0, 1], [2, 3], "five.bin", [6, 7], [8, 9], [10, 11]]
    with pytest.raises(StopIteration):
        next(iterator)


@both
def test_exceptions_with_arguments_of_their_own_survive(kind: Any) -> None:
    class Odd(Exception):
        def __init__(self, one: int, *, two: int) -> None:
            super().__init__(f"{one} and {two}")

    class Failing(Squares):
        def __getitem__(self, index: int) -> int:
            raise Odd(1, two=2)

    with pytest.raises(Odd, match="1 and 2"):
        next(iter(make(kind, Failing())))


@both
def test_a_failing_sampler_is_an_error(kind: Any) -> None:
    def failing() -> Iterator[int]:
        yield 0
        raise OSError("the sampler is gone")

    with pytest.raises(OSError, match="sampler is gone"):
        list(make(kind, Squares(), sampler=failing()))


@both
def test_an_ended_iterator_stays_ended(kind: Any) -> None:
    iterator = iter(make(kind, Squares(3)))
    list(iterator)
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(iterator)


@both
def test_two_iterators_and_nested_loops_do_not_disturb_each_other(kind: Any) -> None:
    loader = make(kind, Squares(5), batch_size=2)
    one, other = iter(loader), iter(loader)
    pairs = list(zip(flat(one), flat(other), strict=True))
    assert pairs == [(i * i, i * i) for i in range(5)]
    assert sum(1 for _ in loader for _ in loader) == 9


@both
def test_loaders_inside_of_datasets(kind: Any) -> None:
    class Outer(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            return sum(flat(make(kind, Squares(index + 2), batch_size=2)))

    assert flat(make(kind, Outer())) == [1, 5, 14]


@both
def test_worker_info_is_for_workers_only(kind: Any) -> None:
    class Info(Squares):
        def __getitem__(self, index: int) -> int:
            info = get_worker_info()
            return -1 if info is None else info.num_workers * 100 + info.id

    seen = set(flat(make(kind, Info(40))))
    count = kind[1]
    assert seen <= ({-1} if count == 0 else {count * 100 + worker for worker in range(count)})
    assert get_worker_info() is None


@both
def test_batches_of_pinned_memory_are_asked_for_without_an_accelerator(kind: Any) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator: see test_gpu.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert flat(make(kind, Squares(3), pin_memory=True)) == [0, 1, 4]


# Kinds of tensors, arrival, and what a worker does to itself.


@both
def test_tensors_of_every_layout_come_through(kind: Any) -> None:
    sparse = torch.eye(3).to_sparse()
    (batch,) = make(kind, [sparse], batch_size=1, collate_fn=lambda items: items[0])
    assert batch.is_sparse and torch.equal(batch.to_dense(), torch.eye(3))
    # Not of the jagged layout: that imports triton, which turns the GIL on.
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    (batch,) = make(kind, [ragged], batch_size=1, collate_fn=lambda items: items[0])
    assert batch.is_nested and [len(row) for row in batch.unbind()] == [2, 3]


@both
def test_large_indices_of_a_sampler_stay_what_they_are(kind: Any) -> None:
    class Echo(Squares):
        def __getitem__(self, index: int) -> int:
            return index

    large = [2**62, 2**53 + 1, 0]
    assert flat(make(kind, Echo(), sampler=large)) == large


@both
@pytest.mark.parametrize("in_order", [True, False])
def test_slow_items_hold_up_the_order_only_where_it_is_asked_for(kind: Any, in_order: bool) -> None:
    late = threading.Event()

    class Slow(Squares):
        def __getitem__(self, index: int) -> int:
            if index == 0 and kind[1] > 1 and not in_order:
                assert late.wait(60)
            if index == 5:
                late.set()
            return index

    found = flat(make(kind, Slow(6), batch_size=1, in_order=in_order))
    assert sorted(found) == list(range(6))
    assert found == list(range(6)) or not in_order
    assert found[0] != 0 or in_order or kind[1] < 2


@both
def test_a_dataset_without_a_method_it_needs_says_so(kind: Any) -> None:
    class Nothing(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 2

    with pytest.raises(NotImplementedError):
        next(iter(make(kind, Nothing())))


@both
def test_a_random_sampler_may_draw_more_than_there_is(kind: Any) -> None:
    sampler = RandomSampler(range(4), num_samples=10, generator=torch.Generator().manual_seed(1))
    found = flat(make(kind, Squares(4), sampler=sampler, batch_size=3))
    assert len(found) == 10 and set(found[:4]) == set(found[4:8]) == {0, 1, 4, 9}


@both
def test_numpy_scalars_and_text_keep_their_type_without_batching(kind: Any) -> None:
    items = list(make(kind, [np.int16(3), b"bytes", None, {"k": np.float64(1)}], batch_size=None))
    assert items[0].dtype == torch.int16 and items[1] == b"bytes" and items[2] is None
    assert items[3]["k"].dtype == torch.float64


# Differences.


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity to set")
def test_a_worker_may_bind_its_own_thread_to_a_processor() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)

    class Where(Squares):
        def __getitem__(self, index: int) -> int:
            return len(os.sched_getaffinity(0))

    loader = forebay.torch.DataLoader(
        Where(4), num_workers=2, worker_init_fn=lambda worker: os.sched_setaffinity(0, {one})
    )
    assert flat(loader) == [1] * 4 and os.sched_getaffinity(0) == before


def test_batches_are_handed_over_without_shared_memory() -> None:
    items = [torch.ones(2)]
    (ours,) = forebay.torch.DataLoader(items, batch_size=None, num_workers=1)  # type: ignore[arg-type]
    assert ours is items[0] and not ours.is_shared()


def test_every_iterator_is_a_new_one_and_no_warning_counts_processors() -> None:
    """Differs from torch: that returns the same iterator again with `persistent_workers`, and warns
    if there are more workers than processors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = forebay.torch.DataLoader(Squares(4), num_workers=64, persistent_workers=True)
        one, other = iter(loader), iter(loader)
    assert one is not other
    assert flat(one) == flat(other) == [0, 1, 4, 9]


class Mutable(Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        self.seen.append(index)
        return index


@pytest.mark.thread_unsafe(reason="torch starts processes, which it does once for the whole process")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", [torch.utils.data.DataLoader, forebay.torch.DataLoader])
def test_a_map_style_dataset_is_shared_where_processes_have_copies(cls: Any) -> None:
    dataset = Mutable()
    context = {} if cls is forebay.torch.DataLoader else {"multiprocessing_context": "fork"}
    assert flat(cls(dataset, num_workers=2, **context)) == list(range(6))
    assert sorted(dataset.seen) == (list(range(6)) if cls is forebay.torch.DataLoader else [])


def test_exceptions_are_themselves_and_no_text() -> None:
    """The text of a traceback crosses as in torch, which makes a new exception of the same type."""
    marker = LookupError("this one")

    class Failing(Squares):
        def __getitem__(self, index: int) -> int:
            raise marker

    with pytest.raises(LookupError) as caught:
        next(iter(forebay.torch.DataLoader(Failing(), num_workers=2)))
    assert caught.value is marker
    assert any("raised in thread" in note for note in marker.__notes__)


def test_persistent_workers_have_nothing_to_keep() -> None:
    """A thread costs too little to be kept; every pass begins with a fresh copy of an iterable
    dataset.
    """
    loader = forebay.torch.DataLoader(Count(9), num_workers=2, persistent_workers=True)
    assert [sorted(flat(loader)) for _ in range(2)] == [list(range(9))] * 2


def test_items_need_not_be_picklable() -> None:
    loader = forebay.torch.DataLoader(
        [lambda: 1, lambda: 2],  # type: ignore[arg-type]
        num_workers=2,
        collate_fn=lambda items: items[0],
    )
    assert [item() for item in loader] == [1, 2]
