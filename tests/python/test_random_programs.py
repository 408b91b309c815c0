"""Runs random programs of a loader over any dataset, and compares them with torch's loader.

They lose and repeat nothing.

A program is a list of steps: take batches, leave the pass, interrupt, store a state, restore one
(in this loader or in a new one), tell an epoch. A model follows it step by step. Its batches come
from torch's loader with 0 workers, which is fast; for iterable datasets it deals the workers'
batches out as torch does. One test checks that against processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")

import torch
from torch.utils.data import DistributedSampler, get_worker_info

from forebay.torch import DataLoader

PARTS, PROGRAMS = 12, 170
STEPS = 14

#: A batch as the model knows it: its values, or the name of the error that is raised in its place.
Result = list[int] | str


class Gone(Exception):
    pass


class Interrupted(KeyboardInterrupt):
    pass


class Items(torch.utils.data.Dataset):  # type: ignore[misc,name-defined]
    def __init__(self, size: int, bad: frozenset[int]) -> None:
        self.size, self.bad = size, bad
        self.interrupts = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if self.interrupts:
            self.interrupts -= 1
            raise Interrupted
        if index in self.bad:
            raise Gone(index)
        return int(index)


class Reading:
    """An iterator that goes on after an error, and that an interrupt does not move."""

    def __init__(self, source: Stream, numbers: list[int]) -> None:
        self.source, self.numbers, self.at = source, numbers, 0

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> int:
        if self.at == len(self.numbers):
            raise StopIteration
        if self.source.interrupts:
            self.source.interrupts -= 1
            raise Interrupted
        self.at += 1
        number = self.numbers[self.at - 1]
        if number in self.source.bad:
            raise Gone(number)
        return number


class ReadingWithState(Reading):
    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    """The numbers of a worker, in an order of the epoch. `part` stands for the worker in the
    model.
    """

    def __init__(self, size: int, bad: frozenset[int], kind: str, part: tuple[int, int] | None = None) -> None:
        self.size, self.bad, self.kind, self.part = size, bad, kind, part
        self.epoch = self.interrupts = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker, count = self.part or ((0, 1) if info is None else (info.id, info.num_workers))
        order = list(range(self.size))
        random.Random(self.epoch).shuffle(order)
        kind = ReadingWithState if self.kind == "state" else Reading
        items = kind(self, order[worker::count])
        return (value for value in items) if self.kind == "generator" else items


def results(loader: Any) -> Iterator[Result]:
    """The batches and errors of a pass of `loader`."""
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Gone as error:
            yield f"Gone {error}"
            continue
        yield batch.reshape(-1).tolist() if isinstance(batch, torch.Tensor) else [batch]


class Pass:
    """The model of a pass over `lists`, one for each worker of an iterable dataset, or a single
    one.

    `at` is where each worker stands, `kept` where it would stand after a restart: after the last
    batch of a map-style dataset, failed or not, and after the last good one of an iterable dataset.
    """

    def __init__(self, lists: list[list[Result]], retries: bool, kept: list[int], done: list[int], epoch: int) -> None:
        self.lists, self.retries, self.kept, self.epoch = lists, retries, list(kept), epoch
        self.done, self.first, self.at = list(done), list(done), list(kept)
        self.number = 0
        self.ended: set[int] = set()

    def next(self) -> tuple[int, Result] | None:
        """Worker and result of the next batch, None at the end. Changes nothing before `took`."""
        count = len(self.lists)
        while len(self.ended) < count:
            worker = self.number % count
            if worker not in self.ended and self.number // count >= self.first[worker]:
                if self.at[worker] < len(self.lists[worker]):
                    return worker, self.lists[worker][self.at[worker]]
                self.ended.add(worker)
            self.number += 1
        return None

    def took(self, worker: int, result: Result) -> None:
        self.at[worker] += 1
        self.number += 1
        if not self.retries or not isinstance(result, str):
            self.kept[worker] = self.at[worker]
            self.done[worker] += 1

    @property
    def finished(self) -> bool:
        if not self.retries:
            return self.kept[0] == len(self.lists[0])
        return len(self.ended) == len(self.lists) and self.kept == self.at


class Program:
    def __init__(self, seed: int, workers: int | None = None, processes: bool = False) -> None:
        self.random = random.Random(seed)
        draw = self.random
        self.workers = draw.choice((0, 0, 0, 1, 4)) if workers is None else workers
        self.kind = draw.choice(("map", "map", "items", "generator", "state"))
        self.size = draw.choice((0, 1, 5, 17, 30))
        self.bad = frozenset(draw.sample(range(self.size), min(self.size, draw.choice((0, 0, 0, 1, 3)))))
        self.order = draw.choice(("in order", "generator", "epochs", "process")) if self.kind == "map" else "stream"
        self.batch: Any = draw.choice((None, 1, 2, 4))
        self.more: dict[str, Any] = {"drop_last": draw.random() < 0.3} if self.batch else {}
        self.processes = processes
        self.seeds = itertools.count(seed * 1000)
        self.log: list[str] = []
        self.states: list[tuple[Any, Any]] = []
        self.make()

    def __str__(self) -> str:
        names = ("workers", "kind", "size", "bad", "order", "batch", "more")
        return f"{ {name: getattr(self, name) for name in names} }: {', '.join(self.log)}"

    def make(self) -> None:
        """Makes a new loader, and torch's loader beside it."""
        seed = next(self.seeds)
        self.loader, self.sampler = self.made(DataLoader, seed, self.workers)
        self.torch, self.torch_sampler = self.made(torch.utils.data.DataLoader, seed, 0)
        self.iterator: Any = None
        self.model: Pass | None = None
        self.restored: Any = None
        self.epoch = 0

    def made(self, kind: Any, seed: int, workers: int) -> tuple[Any, Any]:
        more, sampler = dict(self.more), None
        if self.order == "generator":
            more |= {"shuffle": True, "generator": torch.Generator().manual_seed(seed)}
        elif self.order == "process":
            more["shuffle"] = True
        elif self.order == "epochs":
            sampler = more["sampler"] = DistributedSampler(range(max(self.size, 1)), 1, 0, seed=7, shuffle=True)
        data = Items(self.size, self.bad) if self.kind == "map" else Stream(self.size, self.bad, self.kind)
        if self.size == 0 and self.kind == "map":
            more = {key: value for key, value in more.items() if key == "drop_last"}
        return kind(data, batch_size=self.batch, num_workers=workers, **more), sampler

    def lists(self) -> list[list[Result]]:
        """The batches of torch's loader in a new pass."""
        if self.kind == "map":
            return [list(results(self.torch))]
        lists = []
        for worker in range(max(self.workers, 1)):
            part = Stream(self.size, self.bad, self.kind, (worker, max(self.workers, 1)))
            part.set_epoch(self.epoch)
            lists.append(list(results(torch.utils.data.DataLoader(part, batch_size=self.batch, **self.more))))
        return lists

    def generator_state(self) -> Any:
        return self.torch.generator.get_state() if self.order == "generator" and self.torch.generator else None

    def begin(self) -> None:
        """The model of a pass that begins now. It forgets a restored position of another epoch."""
        restored, self.restored = self.restored, None
        told = self.order in ("epochs", "stream")
        if restored is not None and told and restored["epoch"] != self.epoch:
            restored = None
        if restored is not None and not restored["finished"] and any(restored["done"]):
            self.model = Pass(restored["lists"], self.kind != "map", restored["kept"], restored["done"], self.epoch)
            self.pass_state = restored["generator"]
        else:
            if self.generator_state() is not None and not (restored and restored["finished"]):
                # The window of a pass that was left decides how far it has drawn ahead.
                self.torch.generator.set_state(self.loader.generator.get_state())
            seed = next(self.seeds)
            torch.manual_seed(seed)
            found = self.lists()
            torch.manual_seed(seed)
            self.model = Pass(found, self.kind != "map", [0] * len(found), [0] * len(found), self.epoch)
            self.pass_state = self.generator_state()

    def take(self) -> None:
        first = self.iterator is None
        if first:
            self.begin()
            self.iterator = iter(self.loader)
        assert self.model is not None
        expected = self.model.next()
        found: list[Any] = []
        # An interrupt during an error could leave open whether the error was raised.
        is_good = expected is not None and not isinstance(expected[1], str)
        interrupt = self.random.choice(("none", "none", "data", "signal")) if is_good and not first else "none"
        if interrupt == "data" and self.workers == 0 and self.kind != "generator":
            self.loader.dataset.interrupts = 1
        try:
            if interrupt == "signal" and (self.workers or self.kind == "map"):
                interrupted_take(self.iterator, found, self.random.uniform(1e-5, 1e-3))
            else:
                found.extend(itertools.islice(self.iterator, 1))
        except Gone as error:
            found.append(f"Gone {error}")
        except Interrupted:
            self.log.append("interrupted")
        self.loader.dataset.interrupts = 0
        got = [one if isinstance(one, (str, int)) else one.reshape(-1).tolist() for one in found]
        got = [[one] if isinstance(one, int) else one for one in got]
        self.log.append(f"take {got}")
        if self.log[-2:-1] == ["interrupted"] and not got:
            return
        assert got == ([] if expected is None else [expected[1]]), f"expected {expected}"
        if expected is not None:
            self.model.took(*expected)
        else:
            self.iterator = None

    def leave(self) -> None:
        self.iterator = None
        self.log.append("leave")

    def glance(self) -> None:
        if self.order not in ("generator", "process"):  # these draw where an iterator is made, as torch does
            iter(self.loader)
            self.log.append("glance")

    def store(self) -> None:
        state = json.loads(json.dumps(self.loader.state_dict()))
        model = self.model if self.restored is None else None
        known = self.restored
        if model is not None:
            known = {
                "lists": model.lists, "kept": list(model.kept), "done": list(model.done), "finished": model.finished,
                "epoch": model.epoch, "generator": self.pass_state,
            }  # fmt: skip
            assert (sum(model.done), int(model.finished)) == (state["batches"], state["finished"]), "position"
        if known is not None:
            self.states.append((state, known))
        self.log.append(f"store {state['batches']}")

    def restore(self) -> None:
        if not self.states:
            return
        state, known = self.random.choice(self.states)
        if self.random.random() < 0.5:
            if self.kind == "map":
                self.workers = self.random.choice((0, 1, self.workers))
            self.make()
        self.loader.load_state_dict(json.loads(json.dumps(state)))
        self.iterator, self.restored, self.epoch = None, dict(known), known["epoch"]
        self.told(known["epoch"])
        if known["generator"] is not None and (any(known["done"]) or known["finished"]):
            self.torch.generator.set_state(known["generator"])
        self.log.append(f"restore {state['batches']}")

    def told(self, epoch: int) -> None:
        for part in (self.torch_sampler, self.torch.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def tell(self) -> None:
        if self.order not in ("epochs", "stream"):
            return
        self.epoch = self.random.randrange(4)
        self.loader.set_epoch(self.epoch)
        self.told(self.epoch)
        self.log.append(f"epoch {self.epoch}")

    def drain(self) -> None:
        for _ in range(self.size + 20):
            self.take()
            if self.iterator is None:
                return

    def run(self) -> None:
        steps = [self.take] * 8 + [self.leave, self.glance, self.store, self.store, self.restore, self.tell, self.drain]
        for _ in range(STEPS):
            self.random.choice(steps)()
        self.drain()


def interrupted_take(iterator: Any, found: list[Any], after_s: float) -> None:
    """Takes a batch while a signal comes.

    Afterwards the batch is in `found`, or is still to come.
    """
    armed = [True]

    def interrupt(*_: Any) -> None:
        if armed:
            armed.clear()
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s)
        found.extend(itertools.islice(iterator, 1))
        armed.clear()
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The test's own timer replaces the timer of the signal method.
@pytest.mark.timeout(120, method="thread")
@pytest.mark.thread_unsafe(reason="signals belong to the main thread, and seeds to the process")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs_lose_and_repeat_nothing(part: int, stress: bool) -> None:
    for seed in range(PROGRAMS * (20 if stress else 1)):
        program = Program(part * 100_000 + seed)
        try:
            program.run()
        except BaseException as error:
            with contextlib.suppress(Exception):
                error.add_note(f"program {part * 100_000 + seed}: {program}")
            raise
    assert threading.active_count() < 200


@pytest.mark.timeout(120)
@pytest.mark.thread_unsafe(reason="it forks")
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("kind", ["map", "items", "generator", "state"])
def test_the_model_is_torchs_loader_with_processes(kind: str, workers: int) -> None:
    size, bad = 30, frozenset({4, 11})
    data: Any = Items(size, bad) if kind == "map" else Stream(size, bad, kind)
    whole = {
        name: list(results(loader(data, batch_size=4, num_workers=workers)))
        for name, loader in (("torch", torch.utils.data.DataLoader), ("forebay", DataLoader))
    }
    # torch raises an error anew from its text.
    assert [type(one) for one in whole["torch"]] == [type(one) for one in whole["forebay"]]
    assert [one for one in whole["torch"] if isinstance(one, list)] == [
        one for one in whole["forebay"] if isinstance(one, list)
    ]
