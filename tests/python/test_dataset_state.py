"""Tests that a loader over any dataset resumes after the last batch that it handed over.

It loses and repeats none.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import pickle
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import forebay
from forebay.torch import DataLoader

SIZE = 50


class Numbers(torch.utils.data.Dataset):  # type: ignore[misc,name-defined]
    """0 to `SIZE`, some of them late; counts what was computed."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        self.fetched.append(index)
        time.sleep(0.002 if index % 7 == 0 else 0)
        return index


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(state))
    return found


class OwnOrder:
    """A sampler of a user: draws from everything that the process has."""

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(SIZE).tolist()
        random.shuffle(order)
        return iter(np.random.permutation(order).tolist())


class Counting:
    """A sampler with a state of its own."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        while self.at < SIZE:
            self.at += 1
            yield (self.at * 7) % SIZE
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orders(name: str) -> dict[str, Any]:
    """Arguments of a loader, made anew for every loader. Seeds that a user would give anew are
    those of the run.
    """
    plain: dict[str, dict[str, Any]] = {
        "in order": {},
        "shuffled": {"shuffle": True},
        "generator": {"shuffle": True, "generator": seeded(3)},
        "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(SIZE)), 4, True)},
        "replacement": {"sampler": RandomSampler(range(SIZE), replacement=True, num_samples=77, generator=seeded(4))},
        "subset": {"sampler": SubsetRandomSampler(range(5, 45))},
        "weights": {"sampler": WeightedRandomSampler(list(range(1, SIZE + 1)), 40, generator=seeded(5))},
        "own": {"sampler": OwnOrder()},
        "own state": {"sampler": Counting()},
        "list": {"batch_sampler": [[i, i + 1] for i in range(0, 40, 3)]},
        "own single": {"batch_size": None, "sampler": OwnOrder()},
        "single": {"batch_size": None, "shuffle": True},
    }
    given = plain[name]
    return given if {"batch_sampler", "batch_size"} & set(given) else {"batch_size": 4, **given}


NAMES = [
    "in order", "shuffled", "generator", "batch sampler", "replacement", "subset", "weights", "own", "own state",
    "list", "single", "own single",
]  # fmt: skip


def seed_process(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def values(batches: Any) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in batches]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", [(0, 0), (3, 2), (0, 3), (2, 0)])
@pytest.mark.parametrize("at", [0, 1, 6])
def test_map_style_resumes_with_any_number_of_workers(name: str, workers: tuple[int, int], at: int) -> None:
    seed_process(1)
    loader = DataLoader(Numbers(), num_workers=workers[0], **orders(name))
    iterator = iter(loader)
    values([next(iterator) for _ in range(at)])
    state = through_json(loader.state_dict())
    assert state["batches"] == at
    rest = values(iterator)
    seed_process(99)
    dataset = Numbers()
    resumed = DataLoader(dataset, num_workers=workers[1], **orders(name))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    found = values(resumed)
    if at:
        assert found == rest
        assert len(dataset.fetched) == len(np.concatenate([np.ravel(batch) for batch in rest])), "nothing is recomputed"
    else:
        assert len(found) == len(rest), "a state before the first batch begins an epoch"


@pytest.mark.parametrize("name", ["generator", "weights", "replacement", "own state", "in order"])
@pytest.mark.parametrize("at", [3, None])
def test_epochs_after_the_resumed_one_are_those_of_the_whole_run(name: str, at: int | None) -> None:
    loader = DataLoader(Numbers(), num_workers=2, **orders(name))
    epochs = [values(loader) for _ in range(3)]
    loader = DataLoader(Numbers(), num_workers=2, **orders(name))
    assert values(loader) == epochs[0]
    iterator = iter(loader)
    taken = len(epochs[1]) if at is None else at
    for _ in range(taken):
        next(iterator)
    resumed = DataLoader(Numbers(), num_workers=1, **orders(name))
    resumed.load_state_dict(through_json(loader.state_dict()))
    if at is not None:
        assert values(resumed) == epochs[1][at:]
    assert values(resumed) == epochs[2]


def test_resuming_draws_nothing_of_the_trainers() -> None:
    """An interrupted run and a whole one have the same dropout, if the trainer stores its random
    state.
    """
    torch.manual_seed(5)
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    state, trainers = loader.state_dict(), torch.get_rng_state()
    torch.manual_seed(77)
    fresh = DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2)
    fresh.load_state_dict(state)
    torch.set_rng_state(trainers)
    next(iter(fresh))
    assert torch.equal(torch.get_rng_state(), trainers)


def test_an_iterator_that_is_thrown_away_takes_no_position() -> None:
    """Lightning makes one only to see whether it can."""
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True, generator=seeded(1), num_workers=2)
    iterator = iter(loader)
    next(iterator)
    state, rest = loader.state_dict(), values(iterator)
    fresh = DataLoader(Numbers(), batch_size=4, shuffle=True, generator=seeded(1), num_workers=2)
    fresh.load_state_dict(state)
    iter(fresh)
    assert fresh.state_dict() == state
    assert values(fresh) == rest


def test_out_of_order_batches_are_each_handed_over_once() -> None:
    loader = DataLoader(Numbers(), batch_size=1, num_workers=3, in_order=False)
    iterator = iter(loader)
    seen = [int(next(iterator)) for _ in range(11)]
    state = through_json(loader.state_dict())
    fresh = DataLoader(Numbers(), batch_size=1, num_workers=2, in_order=False)
    fresh.load_state_dict(state)
    assert sorted(seen + [int(batch) for batch in fresh]) == list(range(SIZE))
    iterator.close()


def test_a_batch_that_failed_is_counted() -> None:
    class Failing(Numbers):
        def __getitem__(self, index: int) -> int:
            if index == 9:
                raise OSError("gone")
            return index

    loader = DataLoader(Failing(), batch_size=2, num_workers=2)
    iterator = iter(loader)
    found = []
    for _ in range(7):
        try:
            found.append(next(iterator).tolist())
        except OSError:
            found.append([])
    assert found[4] == []
    assert loader.state_dict()["batches"] == 7


def test_distributed_samplers_are_put_into_their_epoch() -> None:
    def make() -> tuple[Any, Any]:
        sampler: Any = DistributedSampler(range(SIZE), num_replicas=2, rank=1, shuffle=True, seed=3)
        return sampler, DataLoader(Numbers(), batch_size=4, sampler=sampler, num_workers=2)

    sampler, loader = make()
    sampler.set_epoch(2)
    iterator = iter(loader)
    next(iterator)
    state, rest = through_json(loader.state_dict()), values(iterator)
    for told in (None, 2):
        sampler, loader = make()
        loader.load_state_dict(state)
        if told is not None:
            loader.set_epoch(told)
        assert values(loader) == rest
    sampler, loader = make()
    loader.load_state_dict(state)
    loader.set_epoch(3)
    other = make()
    other[0].set_epoch(3)
    assert values(loader) == values(other[1]), "who tells another epoch gets it from its start"


# Iterable datasets.


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    """Each worker has its part, of another length."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker, count = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(worker, 37, count):
            if worker == 1 and index > 12:
                return
            time.sleep(0.002 if index % 5 == 0 else 0)
            yield index


class Stateful(Stream):
    """Knows its position, and the items that it has read."""

    def __init__(self) -> None:
        self.at = 0
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        items = list(super().__iter__())
        while self.at < len(items):
            self.at += 1
            self.read += 1
            yield items[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Steps:
    """An iterator with a state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> int:
        self.at += 1
        if self.at > 30:
            raise StopIteration
        return self.at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class OfSteps(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    def __iter__(self) -> Steps:
        return Steps()


@pytest.mark.parametrize("kind", [Stream, Stateful, OfSteps])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("at", [0, 1, 4, 8])
@pytest.mark.parametrize("batch_size", [2, None])
def test_iterables_resume_where_each_worker_was(kind: Any, workers: int, at: int, batch_size: int | None) -> None:
    loader = DataLoader(kind(), batch_size=batch_size, num_workers=workers)
    iterator = iter(loader)
    for _ in range(at):
        next(iterator)
    state, rest = through_json(loader.state_dict()), values(iterator)
    assert state["batches"] == at == sum(state["counts"])
    fresh = DataLoader(kind(), batch_size=batch_size, num_workers=workers)
    fresh.load_state_dict(state)
    assert values(fresh) == rest
    assert values(DataLoader(kind(), batch_size=batch_size, num_workers=workers)) == values(fresh), "and the next epoch"


class Aliased(Stateful):
    """Its plain copies share their attributes, as those of Hugging Face's IterableDataset do."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state


@pytest.mark.parametrize("source", ["own", "hugging face"])
def test_each_thread_has_attributes_of_its_own(source: str) -> None:
    def make() -> Any:
        if source == "own":
            return Aliased()
        datasets = pytest.importorskip("datasets", reason="Hugging Face's iterable datasets")
        rows = datasets.IterableDataset.from_generator(
            lambda shards: ({"value": shard * 100 + row} for shard in shards for row in range(10)),
            gen_kwargs={"shards": list(range(6))},
        )
        return rows

    def run(state: dict[str, Any] | None, count: int | None) -> tuple[list[Any], dict[str, Any]]:
        loader = DataLoader(make(), batch_size=4, num_workers=3)
        if state is not None:
            loader.load_state_dict(state)
        found = [
            batch if isinstance(batch, torch.Tensor) else batch["value"] for batch in itertools.islice(loader, count)
        ]
        return values(found), through_json(loader.state_dict())

    whole, _ = run(None, None)
    first, state = run(None, 5)
    rest, _ = run(state, None)
    assert first + rest == whole


def test_an_iterable_with_a_state_replays_nothing() -> None:
    dataset = Stateful()
    loader = DataLoader(Stateful(), batch_size=2)
    iterator = iter(loader)
    for _ in range(10):
        next(iterator)
    fresh = DataLoader(dataset, batch_size=2)
    fresh.load_state_dict(loader.state_dict())
    assert len(list(fresh)) == 9
    assert dataset.read == 37 - 20


def test_a_replay_is_told_once(caplog: Any) -> None:
    class Untold(Stream):
        pass

    loader = DataLoader(Untold(), batch_size=2)
    next(iter(loader))
    state = loader.state_dict()
    with caplog.at_level(logging.WARNING, "forebay"):
        for _ in range(2):
            fresh = DataLoader(Untold(), batch_size=2)
            fresh.load_state_dict(state)
            next(iter(fresh))
    told = [record.getMessage() for record in caplog.records if "Untold" in record.getMessage()]
    assert len(told) == 1 and "1 batches" in told[0]


@pytest.mark.parametrize("kind", [Stream, Stateful])
def test_a_replay_asks_only_a_dataset_without_a_state_for_one(kind: type[Stream], caplog: Any) -> None:
    """A dataset that stands inside a batch gives no position, though it has a state."""

    class Broken(kind):  # type: ignore[misc,valid-type]
        def __iter__(self) -> Iterator[int]:
            for at, item in enumerate(super().__iter__()):
                if at == 3:
                    raise ValueError("broken")
                yield item

    Broken.__name__ = f"Broken{kind.__name__}"
    loader = DataLoader(Broken(), batch_size=2)
    batches = iter(loader)
    next(batches)
    with pytest.raises(ValueError, match="broken"):
        next(batches)
    fresh = DataLoader(Broken(), batch_size=2)
    fresh.load_state_dict(loader.state_dict())
    with caplog.at_level(logging.WARNING, "forebay"), pytest.raises(ValueError, match="broken"):
        next(iter(fresh))
    (told,) = [record.getMessage() for record in caplog.records if Broken.__name__ in record.getMessage()]
    assert ("`load_state_dict`" in told) is (kind is Stream)


def test_another_number_of_workers_is_refused_for_iterables_with_the_reason() -> None:
    loader = DataLoader(Stream(), batch_size=2, num_workers=2)
    next(iter(loader))
    with pytest.raises(forebay.StateMismatchError, match=r"`num_workers` is 3 here, but 2 in the state.*worker id"):
        DataLoader(Stream(), batch_size=2, num_workers=3).load_state_dict(loader.state_dict())


# What a state is.


def test_states_that_do_not_fit_are_refused_naming_both_values() -> None:
    state = DataLoader(Numbers(), batch_size=4).state_dict()
    with pytest.raises(forebay.StateMismatchError, match="`batch_size` is 5 here, but 4 in the state"):
        DataLoader(Numbers(), batch_size=5).load_state_dict(state)
    with pytest.raises(forebay.StateMismatchError, match="`samples` is 9 here, but 50 in the state"):
        DataLoader(range(9), batch_size=4).load_state_dict(state)
    with pytest.raises(forebay.StateMismatchError, match="`kind` is iterable here, but map in the state"):
        DataLoader(Stream(), batch_size=4).load_state_dict(state)
    with pytest.raises(forebay.StateMismatchError, match="`order` is seed here, but fixed in the state"):
        DataLoader(Numbers(), batch_size=4, shuffle=True).load_state_dict(state)
    with pytest.raises(forebay.StateMismatchError, match="lacks"):
        DataLoader(Numbers(), batch_size=4).load_state_dict({"position": 3})
    with pytest.raises(TypeError):
        DataLoader(Numbers(), batch_size=4).load_state_dict(3)  # type: ignore[arg-type]
    loader = DataLoader(Numbers(), batch_size=4)
    loader.load_state_dict({})
    assert loader.state_dict() == state


@pytest.mark.parametrize("name", NAMES)
def test_states_have_the_same_keys_at_all_times_and_load_with_weights_only(name: str, tmp_path: Path) -> None:
    loader = DataLoader(Numbers(), num_workers=2, **orders(name))
    before = loader.state_dict()
    iterator = iter(loader)
    next(iterator)
    middle = loader.state_dict()
    list(iterator)
    after = loader.state_dict()
    assert set(before) == set(middle) == set(after)
    assert after["finished"] == 1
    torch.save(middle, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == middle


def test_a_copy_of_a_loader_continues_where_it_was() -> None:
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    copies = [pickle.loads(pickle.dumps(loader)), copy.copy(loader), copy.deepcopy(loader)]
    rest = values(iterator)
    for other in copies:
        assert values(other) == rest


def test_several_threads_get_each_batch_once() -> None:
    iterator = iter(DataLoader(Numbers(), batch_size=1, num_workers=3))
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.extend(int(batch) for batch in iterator)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(found) == list(range(SIZE))


# Random state.


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index,union-attr]


def test_a_seeding_worker_init_fn_does_not_reseed_the_trainer() -> None:
    seen: dict[int, tuple[int, int]] = {}

    def seed_all(worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        seen[worker] = (torch.initial_seed(), info.seed)
        time.sleep(0.02 * worker)
        seed_process(torch.initial_seed() % 2**32)

    seed_process(3)
    iterator = iter(DataLoader(Numbers(), batch_size=4, num_workers=4, worker_init_fn=seed_all))
    before = states()
    next(iterator)
    assert states() == before
    assert len(seen) == 4, "all threads are set up before the first batch is handed over"
    assert len(set(seen.values())) == 4
    assert all(initial == seed for initial, seed in seen.values())
    list(iterator)
    assert states() == before


def test_a_failing_worker_init_fn_leaves_the_random_state_too() -> None:
    def fail(worker: int) -> None:
        seed_process(5)
        raise PermissionError("no")

    iterator = iter(DataLoader(Numbers(), num_workers=2, worker_init_fn=fail))
    before = states()
    with pytest.raises(PermissionError):
        next(iterator)
    assert states() == before


def test_a_worker_init_fn_that_hangs_runs_into_the_timeout() -> None:
    go_on = threading.Event()
    iterator = iter(DataLoader(Numbers(), num_workers=2, timeout=0.3, worker_init_fn=lambda _: go_on.wait(60)))
    with pytest.raises(RuntimeError, match="timed out"):
        next(iterator)
    go_on.set()
    iterator.close()


def test_a_thread_has_generators_of_its_own_where_torch_has_a_place_for_them() -> None:
    class Noise(Numbers):
        def __getitem__(self, index: int) -> tuple[int, float, float]:
            info: Any = get_worker_info()
            if not hasattr(info, "rng"):
                pytest.skip("this torch has no `rng` in WorkerInfo")
            drawn = torch.rand((), generator=info.rng.torch_generator)
            return info.id, float(drawn), info.rng.random_generator.random()

    def run() -> dict[int, list[tuple[float, float]]]:
        torch.manual_seed(8)
        found: dict[int, list[tuple[float, float]]] = {}
        for worker, *drawn in DataLoader(Noise(), batch_size=None, num_workers=2):
            found.setdefault(worker, []).append(tuple(drawn))  # type: ignore[arg-type]
        return found

    first, second = run(), run()
    for worker in set(first) & set(second):
        shared = min(len(first[worker]), len(second[worker]))
        assert first[worker][:shared] == second[worker][:shared]
    assert all(len(set(drawn)) == len(drawn) for drawn in first.values())
