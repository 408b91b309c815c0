"""Tests datasets of others on threads.

Whatever they raise, hold or return, a loader does not hang, and neither mixes nor loses data.
"""

from __future__ import annotations

import contextvars
import copy
import ctypes
import dataclasses
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")

import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, Sampler, Subset, get_worker_info

import forebay
from forebay.torch import DataLoader
from forebay.torch.any_dataset import worker_info
from forebay.torch.any_dataset.copies import LARGE_BYTES, LARGE_ITEMS, copied_for_thread

SIZE = 24


class Numbers(torch.utils.data.Dataset):  # type: ignore[misc,name-defined]
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return index


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    """Gives the numbers of one worker."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(SIZE) if info is None else range(info.id, SIZE, info.num_workers))


def flat(batches: Any) -> list[int]:
    return [int(value) for batch in batches for value in batch.tolist()]


def within(seconds: float, run: Any) -> Any:
    """Runs `run` on a separate thread for at most `seconds`. Returns or raises its outcome."""
    found: list[Any] = []

    def keep() -> None:
        try:
            found.append((run(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"it takes longer than {seconds} s"
    if found[0][1] is not None:
        raise found[0][1]
    return found[0][0]


# States of others.


class TakesArguments:
    def state_dict(self, count: int, *, start: bool) -> dict[str, Any]:
        return {"count": count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nobody has a state")


class Raises:
    def state_dict(self) -> dict[str, Any]:
        raise OSError("the position is on another machine")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class HoldsALock:
    def state_dict(self) -> dict[str, Any]:
        return {"lock": threading.Lock()}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RandomIndices(Sampler):  # type: ignore[type-arg]
    def __init__(self) -> None: ...

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("base", [Numbers, Stream, RandomIndices])
@pytest.mark.parametrize("states", [TakesArguments, Raises, HoldsALock])
def test_states_that_cannot_be_had_disturb_only_who_asks(states: Any, base: Any, workers: int) -> None:
    odd = type("Odd", (states, base), {})()
    more = {"dataset": Numbers(), "sampler": odd} if base is RandomIndices else {"dataset": odd}
    loader = DataLoader(batch_size=4, num_workers=workers, **more)
    iterator = iter(loader)
    first = flat([next(iterator)])
    shared = base is Numbers and workers > 1
    if states is TakesArguments or shared:
        state = loader.state_dict()
    else:
        with pytest.raises(OSError if states is Raises else TypeError):
            loader.state_dict()
    rest = flat(iterator)
    assert sorted(first + rest) == list(range(SIZE))
    if states is TakesArguments:
        resumed = DataLoader(batch_size=4, num_workers=workers, **more)
        resumed.load_state_dict(state)
        assert flat(resumed) == rest
    copy.copy(loader)


def test_a_dataset_on_the_callers_thread_is_asked_only_when_a_user_asks() -> None:
    class Counted(Stream):
        asked = 0

        def state_dict(self) -> dict[str, Any]:
            self.asked += 1
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    dataset = Counted()
    loader = DataLoader(dataset, batch_size=4)
    list(loader)
    assert dataset.asked == 0
    loader.state_dict()
    assert dataset.asked == 1


class Positioned(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    """Keeps the very object that it receives as a state, and returns the very object that it
    changes.
    """

    def __init__(self) -> None:
        self.at = {"i": 0}

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker, count = (0, 1) if info is None else (info.id, info.num_workers)
        while self.at["i"] * count + worker < SIZE:
            self.at["i"] += 1
            yield (self.at["i"] - 1) * count + worker

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_states_share_nothing_with_the_dataset(workers: int) -> None:
    def make(state: Any) -> Any:
        loader = DataLoader(Positioned(), batch_size=2, num_workers=workers)
        loader.load_state_dict(state)
        return loader

    loader = DataLoader(Positioned(), batch_size=2, num_workers=workers)
    iterator = iter(loader)
    seen = flat(itertools.islice(iterator, 4))
    state = loader.state_dict()
    kept = copy.deepcopy(state)
    rest = flat(iterator)
    assert state == kept, "the pass went on"
    for _ in range(3):
        second = make(state)
        iterator = iter(second)
        found = flat([next(iterator)])
        time.sleep(0.05)
        found += flat(make(second.state_dict()))
        assert found == rest
        assert state == kept
    assert sorted(seen + rest) == list(range(SIZE))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_state_that_is_asked_for_inside_a_batch_is_that_before_it(interrupted: bool) -> None:
    """Asks for the state like a handler of SIGTERM."""
    asked: list[Any] = []

    class Asking(Positioned):
        def __iter__(self) -> Iterator[int]:
            for value in super().__iter__():
                if value == 9:
                    asked.append(loader.state_dict())
                    if interrupted:
                        raise KeyboardInterrupt
                yield value

    loader = DataLoader(Asking(), batch_size=4)
    iterator = iter(loader)
    seen = flat(itertools.islice(iterator, 2))
    try:
        next(iterator)
    except KeyboardInterrupt:
        asked.append(loader.state_dict())
    for state in asked:
        resumed = DataLoader(Positioned(), batch_size=4)
        resumed.load_state_dict(state)
        assert seen + flat(resumed) == list(range(SIZE))


class Draws(Numbers):
    """A map-style dataset with its own generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, index: int) -> int:
        return int(torch.randint(10**9, (), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state().tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("at", [0, 2, 6])
def test_the_state_of_a_map_style_dataset_is_stored(workers: int, at: int) -> None:
    loader = DataLoader(Draws(), batch_size=4, num_workers=workers)
    iterator = iter(loader)
    list(itertools.islice(iterator, at))
    state = loader.state_dict()
    expected = flat(iterator) if at < 6 else flat(loader)
    resumed = DataLoader(Draws(), batch_size=4, num_workers=1 - workers)
    resumed.load_state_dict(state)
    assert flat(resumed) == expected


def test_a_state_that_threads_change_at_once_is_not_stored_and_that_is_said(caplog: Any) -> None:
    class Shared(Draws):
        pass

    loader = DataLoader(Shared(), num_workers=2)
    next(iter(loader))
    with caplog.at_level("WARNING", "forebay"):
        assert loader.state_dict()["dataset"] == []
    assert "the state of Shared is not stored: 2 threads" in caplog.text


def test_a_state_at_the_end_lets_a_dataset_go_on_that_counts_its_epochs() -> None:
    class Counting(Positioned):
        epoch = 0

        def __iter__(self) -> Iterator[int]:
            yield from np.random.default_rng(self.epoch).permutation(SIZE).tolist()
            self.epoch += 1

        def state_dict(self) -> dict[str, Any]:
            return {"epoch": self.epoch}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.epoch = state["epoch"]

    whole = DataLoader(Counting(), batch_size=4)
    epochs = [flat(whole) for _ in range(2)]
    first = DataLoader(Counting(), batch_size=4)
    assert flat(first) == epochs[0]
    resumed = DataLoader(Counting(), batch_size=4)
    resumed.load_state_dict(first.state_dict())
    assert flat(resumed) == epochs[1]


def test_a_state_at_the_end_that_a_dataset_takes_for_its_end_begins_the_next_epoch() -> None:
    """Checks a dataset that resumes like an iterable dataset of Hugging Face.

    Such a dataset starts from the state that it was given, until it is given another state.
    """

    class Started(Positioned):
        start = 0

        def __iter__(self) -> Iterator[int]:
            for value in range(self.start, SIZE):
                self.at["i"] = value + 1
                yield value

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.start = state["at"]["i"]

    loader = DataLoader(Started(), batch_size=4)
    assert flat(loader) == list(range(SIZE))
    resumed = DataLoader(Started(), batch_size=4)
    resumed.load_state_dict(loader.state_dict())
    assert flat(resumed) == list(range(SIZE))


def test_a_subclass_extends_the_state() -> None:
    class OfRank(DataLoader[Any]):
        def state_dict(self) -> dict[str, Any]:
            return {"of rank": super().state_dict()}

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict["of rank"])

    loader = OfRank(Numbers(), batch_size=4)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert list(state) == ["of rank"]
    assert loader.__dict__["state_dict"]() == state, "wrappers copy `__dict__`"
    resumed = copy.copy(OfRank(Numbers(), batch_size=4))
    resumed.load_state_dict(state)
    assert flat(resumed) == flat(iterator)


# Exceptions.


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    key: str


class Slotted(Exception):
    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key


class Deaf(Exception):
    def __setattr__(self, name: str, value: Any) -> None:
        raise KeyboardInterrupt

    def add_note(self, note: str) -> None:
        raise SystemExit


class Basic(BaseException):
    pass


@pytest.mark.parametrize("kind", [Frozen, Slotted, Deaf, Basic, GeneratorExit, SystemExit])
@pytest.mark.parametrize("place", ["item", "stream", "iter", "init", "collate"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_exception_ends_the_wait_and_keeps_its_type(kind: Any, place: str, workers: int) -> None:
    class Items(Numbers):
        def __getitem__(self, index: int) -> int:
            if index == 5:
                raise kind("part-5")
            return index

    class Failing(Stream):
        def __iter__(self) -> Iterator[int]:
            if place == "iter":
                raise kind("part-5")
            return self.items()

        def items(self) -> Iterator[int]:
            yield from range(5)
            raise kind("part-5")

    def fail(_: Any) -> Any:
        raise kind("part-5")

    if place == "init" and workers == 0:
        pytest.skip("there is no worker to set up")
    places: dict[str, Any] = {
        "item": (Items(), {}), "stream": (Failing(), {}), "iter": (Failing(), {}),
        "init": (Numbers(), {"worker_init_fn": fail}), "collate": (Numbers(), {"collate_fn": fail}),
    }  # fmt: skip
    dataset, more = places[place]
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, **more)
    with pytest.raises(kind):
        within(60, lambda: list(loader))


@pytest.mark.parametrize("place", ["init", "iter"])
def test_a_set_up_that_failed_fails_again_and_grows_nothing(place: str) -> None:
    class Failing(Stream):
        def __iter__(self) -> Iterator[int]:
            raise PermissionError("no")

    def fail(worker: int) -> None:
        raise PermissionError(f"no {worker}")

    more: Any = {"dataset": Numbers(), "worker_init_fn": fail} if place == "init" else {"dataset": Failing()}
    loader = DataLoader(batch_size=2, num_workers=2, **more)
    iterator = iter(loader)
    lengths = set()
    for _ in range(100):
        with pytest.raises(PermissionError) as raised:
            within(60, lambda: next(iterator))
        lengths.add((len(raised.traceback), len(getattr(raised.value, "__notes__", []))))
    assert len(lengths) == 1, lengths
    assert loader.state_dict()["batches"] == 0


def test_a_thread_that_is_killed_ends_the_wait() -> None:
    began = threading.Event()

    class Slow(Numbers):
        def __getitem__(self, index: int) -> int:
            began.set()
            time.sleep(0.3)
            return index

    loader = DataLoader(Slow(), batch_size=None, num_workers=1)
    iterator = iter(loader)
    next(iterator)
    (thread,) = iterator._workers._threads
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(MemoryError))

    def rest() -> None:
        for _ in iterator:
            pass

    with pytest.raises((MemoryError, RuntimeError)):
        within(60, rest)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_sampler_comes_after_the_batches_before_it(workers: int) -> None:
    def indices() -> Iterator[int]:
        yield from range(10)
        raise OSError("no more indices")

    class Failing(RandomIndices):
        def __iter__(self) -> Iterator[int]:
            return indices()

    loader = DataLoader(Numbers(), batch_size=None, sampler=Failing(), num_workers=workers)
    iterator = iter(loader)
    assert [int(next(iterator)) for _ in range(10)] == list(range(10))
    with pytest.raises(OSError, match="no more indices"):
        next(iterator)
    assert next(iterator, None) is None
    assert loader.state_dict()["finished"] == 0


def test_a_time_limit_during_set_up_is_only_a_wait() -> None:
    go_on = threading.Event()
    loader = DataLoader(Numbers(), batch_size=4, num_workers=2, worker_init_fn=lambda _: go_on.wait(60), timeout=0.2)
    iterator = iter(loader)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="timed out"):
            next(iterator)
    assert loader.state_dict()["finished"] == 0
    go_on.set()
    assert flat(iterator) == list(range(SIZE))


@pytest.mark.parametrize("kind", ["generator", "class"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_that_ends_after_an_error_is_not_finished(kind: str, workers: int) -> None:
    broken = [True]

    class Items:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Items:
            return self

        def __next__(self) -> int:
            self.at += 1
            if self.at > SIZE:
                raise StopIteration
            if self.at == 10 and broken:
                raise OSError("gone")
            return self.at - 1

    class Failing(Stream):
        def __iter__(self) -> Iterator[int]:
            return Items() if kind == "class" else (value for value in Items())

    loader = DataLoader(Failing(), batch_size=4, num_workers=workers)
    iterator = iter(loader)
    seen = flat(itertools.islice(iterator, 2))
    with pytest.raises(OSError):
        next(iterator)
    state = loader.state_dict()
    assert (state["batches"], state["finished"]) == (2, 0)
    if kind == "generator":
        assert flat(iterator) == []
        assert loader.state_dict()["finished"] == 0
        state = loader.state_dict()
    else:
        after = flat([next(iterator)])
        assert after == [10, 11, 12, 13], "as torch goes on"
        assert loader.state_dict()["items"] == [14]
    broken.clear()
    resumed = DataLoader(Failing(), batch_size=4, num_workers=workers)
    resumed.load_state_dict(state)
    assert seen + flat(resumed) == list(range(SIZE)), "the batch that failed comes again"


def test_an_interrupted_batch_comes_again() -> None:
    class Interrupted(Numbers):
        interrupts = 3

        def __getitem__(self, index: int) -> int:
            if index == 9 and self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            return index

    class Items:
        def __init__(self, dataset: Interrupted) -> None:
            self.dataset, self.at = dataset, 0

        def __next__(self) -> int:
            if self.at == SIZE:
                raise StopIteration
            found = self.dataset[self.at]
            self.at += 1
            return found

        def __iter__(self) -> Items:
            return self

    class Streamed(Stream):
        def __iter__(self) -> Any:
            return Items(Interrupted())

    for dataset in (Interrupted(), Streamed()):
        loader = DataLoader(dataset, batch_size=4)
        iterator, found, interrupts = iter(loader), [], 0
        while True:
            try:
                found += next(iterator).tolist()
            except KeyboardInterrupt:
                interrupts += 1
                state = loader.state_dict()
                resumed = DataLoader(type(dataset)(), batch_size=4)
                resumed.load_state_dict(state)
                resumed.dataset.interrupts = 0
                if isinstance(dataset, Interrupted):
                    assert found + flat(resumed) == list(range(SIZE))
            except StopIteration:
                break
        assert (found, interrupts) == (list(range(SIZE)), 3)


# Epochs, seeds and indices.


def test_set_epoch_reaches_every_sampler_and_dataset() -> None:
    class Told:
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    class ToldNumbers(Told, Numbers):
        pass

    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __iter__(self) -> Iterator[Any]:
            return iter(self.inner)

    dataset = ToldNumbers()
    sampler: Any = DistributedSampler(dataset, 1, 0)
    loader = DataLoader(Subset(dataset, range(SIZE)), batch_sampler=Wrapper(BatchSampler(sampler, 4, False)))
    loader.set_epoch(3)
    assert (dataset.epoch, sampler.epoch) == (3, 3)
    iterator = iter(loader)
    seen = flat(itertools.islice(iterator, 2))
    state = loader.state_dict()
    dataset.epoch = sampler.epoch = 0
    loader.load_state_dict(state)
    assert (dataset.epoch, sampler.epoch) == (3, 3)
    assert sorted(seen + flat(loader)) == list(range(SIZE))
    loader.load_state_dict(state)
    loader.set_epoch(4)
    assert len(flat(loader)) == SIZE, "another epoch begins at its start"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("says_it", [False, True])
def test_the_epoch_of_an_iterable_dataset_is_in_the_state(workers: int, says_it: bool) -> None:
    class Shuffled(Stream):
        def __init__(self) -> None:
            self.set_epoch(0)

        def set_epoch(self, epoch: int) -> None:
            setattr(self, "epoch" if says_it else "_epoch", epoch)

        def __iter__(self) -> Iterator[int]:
            epoch = self.epoch if says_it else self._epoch  # type: ignore[attr-defined]
            order = np.random.default_rng(epoch).permutation(SIZE).tolist()
            info = get_worker_info()
            return iter(order if info is None else order[info.id :: info.num_workers])

    loader = DataLoader(Shuffled(), batch_size=2, num_workers=workers)
    loader.set_epoch(5)
    iterator = iter(loader)
    list(itertools.islice(iterator, 3))
    state, rest = loader.state_dict(), flat(iterator)
    resumed = DataLoader(Shuffled(), batch_size=2, num_workers=workers)
    resumed.load_state_dict(state)
    assert flat(resumed) == rest


class OwnOrder(RandomIndices):
    """Draws from every generator of the process."""

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(SIZE).tolist()
        random.shuffle(order)
        return iter(np.random.permutation(order).tolist())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("taken", [3, None])
def test_restarts_that_seed_the_process_get_new_orders(own: bool, taken: int | None) -> None:
    def launch(state: Any) -> tuple[list[list[int]], Any]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        loader = DataLoader(Numbers(), batch_size=4, **({"sampler": OwnOrder()} if own else {"shuffle": True}))
        if state is not None:
            loader.load_state_dict(state)
        orders = [flat(loader)]
        if taken is not None:
            orders.append(flat(itertools.islice(loader, taken)))
        return orders, loader.state_dict()

    orders, state = launch(None)
    for _ in range(4):
        found, state = launch(state)
        if taken is not None:
            orders[-1] += found.pop(0)
        orders += found
    whole = [tuple(order) for order in orders if len(order) == SIZE]
    assert len(set(whole)) == len(whole) >= 5
    assert all(sorted(order) == list(range(SIZE)) for order in whole)


def test_a_restored_random_state_gives_the_order_of_the_whole_run() -> None:
    torch.manual_seed(3)
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True)
    assert len(flat(loader)) == SIZE
    state, trainers = loader.state_dict(), torch.get_rng_state()
    expected = flat(loader)
    torch.manual_seed(3)
    resumed = DataLoader(Numbers(), batch_size=4, shuffle=True)
    resumed.load_state_dict(state)
    torch.set_rng_state(trainers)
    assert flat(resumed) == expected


class OwnGenerator(RandomIndices):
    """Takes its order from a generator that no state holds."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rng.permutation(SIZE))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", ["sampler", "batch_sampler", "keys"])
def test_a_sampler_that_draws_another_order_is_refused(workers: int, batches: str) -> None:
    class Keyed(Numbers):
        def __getitem__(self, index: Any) -> int:
            return int(str(index).removeprefix("k"))

    class Keys(OwnGenerator):
        def __iter__(self) -> Iterator[Any]:
            return iter([f"k{index}" for index in super().__iter__()])

    def make() -> Any:
        given: Any = {
            "sampler": {"sampler": OwnGenerator(), "batch_size": 4},
            "batch_sampler": {"batch_sampler": BatchSampler(OwnGenerator(), 4, False)},
            "keys": {"sampler": Keys(), "batch_size": 4},
        }[batches]
        return DataLoader(Keyed(), num_workers=workers, **given)

    loader = make()
    list(loader)
    iterator = iter(loader)
    list(itertools.islice(iterator, 3))
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(forebay.StateMismatchError, match="draws other indices for the 3 batches"):
        next(iter(resumed))
    assert resumed.state_dict()["batches"] == 3, "it still is where it was put"


class OfRank(Sampler):
    """Draws the part of a rank, as the samplers that trainers wrap around others."""

    def __init__(self, name: str, rank: int, seed: int = 0) -> None:
        setattr(self, name, rank)
        self.part, self.seed = rank, seed

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return iter(order[self.part :: 2])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["rank", "process_index", "distributed"])
def test_the_state_of_a_rank_resumes_the_others(workers: int, name: str) -> None:
    def make(rank: int, seed: int = 0) -> Any:
        if name == "distributed":
            sampler: Any = DistributedSampler(Numbers(), 2, rank, shuffle=True, seed=seed)
        else:
            sampler = OfRank(name, rank, seed)
        return DataLoader(Numbers(), batch_size=2, sampler=sampler, num_workers=workers)

    def rest(rank: int, state: Any) -> list[Any]:
        resumed = make(rank)
        resumed.load_state_dict(state)
        iterator = iter(resumed)
        first = next(iterator)
        return [first, *iterator]

    loader = make(0)
    list(itertools.islice(iter(loader), 3))
    state = loader.state_dict()
    for rank in range(2):
        whole = [batch.tolist() for batch in make(rank)]
        batches = rest(rank, state)
        assert [batch.tolist() for batch in batches] == whole[3:]
        # A state that was saved after such a resume tells its own rank's indices.
        again = make(rank)
        again.load_state_dict(state)
        list(itertools.islice(iter(again), 2))
        batches = rest(rank, again.state_dict())
        assert [batch.tolist() for batch in batches] == whole[5:]
        other = make(rank, seed=1)
        other.load_state_dict(again.state_dict())
        with pytest.raises(forebay.StateMismatchError, match="draws other indices for the 5 batches"):
            next(iter(other))


class BeginsAgain:
    """Counts from 0 after each `iter()`, and is its own iterator, like litdata's datasets."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.begun, self.at = items, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.begun, self.at = self.begun + 1, 0
        return self

    def __next__(self) -> Any:
        if self.at == len(self.items):
            raise StopIteration
        self.at += 1
        return self.items[self.at - 1]

    def __len__(self) -> int:
        return len(self.items)


class StreamThatBeginsAgain(BeginsAgain, torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("part", ["dataset", "sampler without batches", "batch_sampler"])
def test_an_iterator_that_begins_again_is_begun_once(workers: int, part: str) -> None:
    def make(kind: Any = DataLoader) -> tuple[Any, Any]:
        # Python 3.14 would start processes that import torch anew.
        forked = kind is torch.utils.data.DataLoader and workers > 0
        more: Any = {"multiprocessing_context": "fork"} if forked else {}
        if part == "dataset":
            begins: Any = StreamThatBeginsAgain(list(range(SIZE)))
            return kind(begins, batch_size=4, num_workers=workers, **more), begins
        order = list(reversed(range(SIZE)))
        alone = part != "batch_sampler"
        begins = BeginsAgain(order if alone else [order[at : at + 4] for at in range(0, SIZE, 4)])
        given: Any = {"sampler": begins, "batch_size": None} if alone else {"batch_sampler": begins}
        return kind(Numbers(), num_workers=workers, **given, **more), begins

    def taken(batches: Any) -> list[Any]:
        return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in batches]

    whole = taken(make(torch.utils.data.DataLoader)[0])
    loader, begins = make()
    assert taken(loader) == whole
    assert begins.begun == (1 if part != "dataset" or workers == 0 else 0), "a thread iterates a copy"
    list(itertools.islice(iter(loader), 2))
    resumed, _ = make()
    resumed.load_state_dict(loader.state_dict())
    assert taken(resumed) == whole[2:]


# What threads share.


class Packed(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    """Packs documents in some kind of buffer, which it keeps between items."""

    def __init__(self, buffer: Any) -> None:
        self.documents = [[d * 100 + i for i in range(1 + d * 7 % 13)] for d in range(60)]
        self.buffer = buffer

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        for document in self.documents[info.id :: info.num_workers]:
            for token in document:
                if self.put(token):
                    yield torch.tensor(self.take())

    def put(self, token: int) -> bool:
        buffer = self.buffer
        if isinstance(buffer, np.ndarray):
            buffer[0] += 1
            buffer[buffer[0]] = token
            return bool(buffer[0] == 8)
        inner = buffer.items if isinstance(buffer, Inner) else buffer["inner"] if isinstance(buffer, dict) else buffer
        inner.append(token)
        time.sleep(0)
        return len(inner) >= 8

    def take(self) -> list[int]:
        buffer = self.buffer
        if isinstance(buffer, np.ndarray):
            buffer[0] = 0
            return [int(value) for value in buffer[1:9]]
        inner = buffer.items if isinstance(buffer, Inner) else buffer["inner"] if isinstance(buffer, dict) else buffer
        found = list(inner)
        inner.clear()
        return found


class Inner:
    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[int] = []


@pytest.mark.parametrize("kind", [list, deque, Inner, "dict", "array"])
def test_threads_do_not_mix_what_a_dataset_keeps(kind: Any) -> None:
    made = {"dict": {"inner": []}, "array": np.zeros(9, dtype=np.int64)}.get(kind) if isinstance(kind, str) else kind()
    dataset = Packed(made)
    found = [row.tolist() for row in DataLoader(dataset, batch_size=None, num_workers=4)]
    expected = torch.utils.data.DataLoader(Packed(copy.deepcopy(made)), batch_size=None, num_workers=4)
    assert found == [row.tolist() for row in expected]


def test_threads_draw_from_generators_of_their_own() -> None:
    class Noise(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.of_python, self.of_numpy = random.Random(1), np.random.default_rng(2)
            self.of_torch = torch.Generator().manual_seed(3)

        def __iter__(self) -> Iterator[tuple[float, float, float]]:
            for _ in range(30):
                drawn = float(torch.rand((), generator=self.of_torch))
                yield self.of_python.random(), float(self.of_numpy.random()), drawn

    found = list(DataLoader(Noise(), batch_size=None, num_workers=3))
    assert found == [list(drawn) for drawn in Noise() for _ in range(3)]


def test_large_data_and_what_cannot_be_copied_is_shared() -> None:
    class Held(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.array = np.zeros(LARGE_BYTES, dtype=np.uint8)
            self.tensor = torch.zeros(LARGE_BYTES // 4)
            self.frozen = np.arange(8)
            self.frozen.flags.writeable = False
            self.many: list[Any] = [[0] for _ in range(LARGE_ITEMS + 1)]
            self.few: list[Any] = [[0], {"a": [1]}]
            self.small, self.lock = np.arange(8), threading.Lock()
            self.call = lambda value: value
            self.method = self.more
            self.itself = self

        def more(self) -> Any:
            return self

        def __iter__(self) -> Iterator[int]:
            return iter(())

    one = Held()
    two = copied_for_thread(one)
    for name in ("array", "tensor", "frozen", "lock", "call"):
        assert getattr(two, name) is getattr(one, name), name
    for name in ("many", "few", "small"):
        assert getattr(two, name) is not getattr(one, name), name
    assert two.many[0] is one.many[0] and two.few[0] is not one.few[0]
    assert two.few == one.few and two.few[1]["a"] is not one.few[1]["a"]
    assert two.itself is two and two.method() is two


def test_a_generator_that_threads_would_share_is_refused_with_the_reason() -> None:
    class Held(Stream):
        def __init__(self) -> None:
            self.items = (value for value in range(SIZE))

        def __iter__(self) -> Iterator[int]:
            return self.items

    with pytest.raises(TypeError, match=r"Held holds a generator.*make it in `__iter__`"):
        next(iter(DataLoader(Held(), num_workers=2)))
    assert flat(DataLoader(Held())) == list(range(SIZE))


@pytest.mark.parametrize("name", ["__copy__", "__deepcopy__"])
def test_a_dataset_may_say_itself_how_it_is_copied(name: str) -> None:
    def copied(self: Any, *_: Any) -> Any:
        made = type(self)()
        made.copies = self.copies + 1
        return made

    kind = type("Copied", (Stream,), {"copies": 0, name: copied})
    assert copied_for_thread(kind()).copies == 1


# Modes and context.

setting: contextvars.ContextVar[str] = contextvars.ContextVar("setting", default="none")


class Asks(Numbers):
    """Tells the modes and the context variable that its code finds."""

    def __getitem__(self, index: int) -> Any:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        return *modes, setting.get()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_the_datasets_code_finds_the_modes_and_variables_of_the_caller(mode: Any, workers: int) -> None:
    # Here torch's loader runs the code in the caller. What its processes inherit depends on their
    # start.
    token = setting.set("mine")
    try:
        with mode():
            expected = list(torch.utils.data.DataLoader(Asks(), batch_size=None))
            found = list(DataLoader(Asks(), batch_size=None, num_workers=workers))
    finally:
        setting.reset(token)
    assert found == expected
    assert found[0][3] == "mine"


@pytest.mark.thread_unsafe(reason="the patch is one for the process")
def test_the_patch_of_torch_can_be_undone() -> None:
    list(DataLoader(Stream(), num_workers=1))
    patched = torch.utils.data.get_worker_info.__code__
    worker_info.undo()
    worker_info.undo()
    assert torch.utils.data.get_worker_info.__code__ is not patched
    assert torch.utils.data.get_worker_info() is None
    assert not [name for name in vars(torch.utils.data._utils.worker) if "forebay" in name]
    assert sorted(flat(DataLoader(Stream(), batch_size=2, num_workers=2))) == list(range(SIZE))


def test_a_loader_that_was_forked_says_so() -> None:
    import os

    iterator = iter(DataLoader(Numbers(), num_workers=1))
    next(iterator)
    child = os.fork()
    if child == 0:
        try:
            next(iterator)
        except RuntimeError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_random_sampler_is_seeded_by_the_process_as_in_torch() -> None:
    def run(kind: Any) -> list[int]:
        torch.manual_seed(4)
        return flat(kind(Numbers(), batch_sampler=BatchSampler(RandomSampler(range(SIZE)), 5, False)))

    assert run(DataLoader) == run(torch.utils.data.DataLoader)
