"""Compares the whole order contract with the lists of `reference_run.py`, in random cases.

A case is a corpus or a mixture, settings, and a run of it that is stopped at random steps and
resumed by new loaders with other ranks, batch sizes, threads, skips and more shards. Every row of
every rank is compared, and every state.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from reference import token_stream
from reference_order import block_order, derive, global_order
from reference_run import Draw, Position, Skip, Stage, course, mixture, phased, side

from forebay import Loader

pa = pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")
pq = pytest.importorskip("pyarrow.parquet")

CASES = 220
IGNORE = -100
SOURCE_KEY = 5
#: More places of an endless mixture than any case asks for.
MOST = 3000


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Corpora of one to four shards in both formats, empty documents and shards included; no token
    twice in one.
    """
    random = Random(1)
    found = []
    for number in range(14):
        folder = tmp_path_factory.mktemp(f"corpus{number}")
        token, shards = 3, []
        for shard in range(random.randint(1, 4)):
            rows = []
            for _ in range(random.choice([0, 1, 5, 12])):
                length = random.choice([0, 1, 3, 10, 40])
                rows.append(list(range(token, token + length)))
                token += length
            table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
            if number % 2:
                path = folder / f"{shard}.parquet"
                pq.write_table(table, path, row_group_size=random.choice([1, 3, 100]), compression="zstd")
            else:
                path = folder / f"{shard}.arrow"
                with ipc.new_file(str(path), table.schema) as writer:
                    writer.write_table(table, max_chunksize=random.choice([1, 4, 100]))
            shards.append(path)
        if token > 40:
            found.append(shards)
    return found


_streams: dict[tuple[Any, ...], list[int]] = {}


def stream_of(shards: list[Path], eos_id: int | None) -> list[int]:
    key = (*shards, eos_id)
    if key not in _streams:
        _streams[key] = token_stream(list(shards), column="input_ids", eos_id=eos_id)
    return _streams[key]


@dataclass
class Case:
    """Content settings, and what they mean in lists."""

    corpora: list[list[Path]]
    given: dict[str, Any]
    stages: list[Stage] | None = None
    epochs: list[int | None] = field(default_factory=list)
    drop: bool = False
    exact_per: int | None = None
    growth: list[tuple[int, int]] = field(default_factory=lambda: [(0, 10**6)])
    skips: list[Skip] = field(default_factory=list)
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def shards(self, source: int, epoch: int) -> list[Path]:
        count = [count for start, count in self.growth if start <= epoch][-1] if self.stages is None else 10**6
        return self.corpora[source][:count]

    def seed(self, source: int) -> int:
        """Seed of the orders of a source."""
        seed: int = self.given["seed"]
        return seed if self.stages is None else derive(seed, SOURCE_KEY, source)

    def sequences(self, source: int, epoch: int) -> tuple[int, list[int], bool]:
        """Full sequences of the corpus, those of this side, and whether there is a tail."""
        seq_len, overlap = self.given["seq_len"], self.given["targets"] == "shifted"
        stream = stream_of(self.shards(source, epoch), self.given["eos_id"])
        count = max(len(stream) - overlap, 0) // seq_len
        tail = len(stream) - count * seq_len - overlap > 0 and self.given["split"] != "holdout"
        return count, side(count, self.given["holdout"], self.given["split"]), tail

    def order(self, source: int, epoch: int) -> list[int]:
        """Sequences of an epoch of a source, in order."""
        key = (source, epoch, len(self.shards(source, epoch)))
        if key not in self._known:
            _, mine, _ = self.sequences(source, epoch)
            given, seed = self.given, self.seed(source)
            order = list(range(len(mine)))
            if given["shuffle"] == "global":
                order = global_order(len(mine), seed=seed, epoch=epoch)
            elif given["shuffle"] == "block":
                shape = {name: given[name] for name in ("seq_len", "chunk_tokens", "window_tokens", "lanes")}
                order = block_order(len(mine), seed=seed, epoch=epoch, **shape)
            self._known[key] = [mine[index] for index in order]
        return self._known[key]  # type: ignore[no-any-return]

    def draws(self, epoch: int) -> list[Draw]:
        assert self.stages is not None
        if "draws" not in self._known:
            sizes = [len(self.sequences(source, 0)[1]) for source in range(len(self.corpora))]
            self._known["draws"] = mixture(
                self.given["lanes"],
                sizes,
                self.epochs,
                self.stages,
                self.drop,
                runs=4,
                most=MOST,
                exact_per=self.exact_per,
            )
        return self._known["draws"][epoch]  # type: ignore[no-any-return]

    @property
    def is_endless(self) -> bool:
        return self.stages is not None and len(self.draws(0)) >= MOST

    def positions(self, epoch: int) -> int:
        if self.stages is not None:
            return len(self.draws(epoch))
        tail = self.sequences(0, epoch)[2] and self.given["remainder"] != "drop"
        return len(self.order(0, epoch)) + tail

    def row(self, at: Position | None) -> tuple[int, int, list[int], list[int]]:
        """Source, sequence, inputs and targets of what stands at a position, or of padding."""
        seq_len, shift = self.given["seq_len"], int(self.given["targets"] == "shifted")
        stream: list[int] = []
        source = sequence = -1
        if at is not None:
            epoch, position = at
            source = 0
            if self.stages is not None:
                source, epoch, position = self.draws(epoch)[position]
            order = self.order(source, epoch)
            all_of_it = stream_of(self.shards(source, epoch), self.given["eos_id"])
            where = {"seed": self.seed(source), "epoch": epoch, "seq_len": seq_len}
            all_of_it = phased(all_of_it, self.given["phase"], **where)
            sequence = order[position] if position < len(order) else self.sequences(source, epoch)[0]
            stream = all_of_it[sequence * seq_len :][: seq_len + shift]
            if self.given["remainder"] == "wrap":
                while len(stream) < seq_len + shift:
                    stream = stream + all_of_it[: seq_len + shift - len(stream)]
        pad = seq_len + shift - len(stream)
        inputs = (stream + [self.given["pad_id"]] * pad)[:seq_len]
        targets = (stream + [IGNORE] * pad)[shift:]
        return source, sequence, inputs, targets


def random_case(random: Random, pool: list[list[Path]]) -> Case:
    given: dict[str, Any] = {
        "seq_len": random.choice([1, 2, 5, 7, 16]),
        "targets": random.choice(["labels", "shifted"]),
        "eos_id": random.choice([None, 2]),
        "shuffle": random.choice([False, "global", "block"]),
        "seed": random.choice([0, 1, 2**64 - 1]),
        "chunk_tokens": random.choice([1, 20, 100]),
        "window_tokens": random.choice([1, 30, 200]),
        "lanes": random.choice([1, 2, 3, 8]),
        "holdout": random.choice([None, None, 2, 10]),
        "split": "train",
        "remainder": random.choice(["drop", "pad", "wrap", "short"]),
        "pad_id": 1,
    }
    if given["holdout"] and random.random() < 0.4:
        given["split"] = "holdout"
    # A draw of its own leaves the other settings of a case as they were.
    moves = not given["holdout"] and Random(repr(given)).random() < 0.5
    given["phase"] = "epoch" if moves else "fixed"
    if random.random() < 0.6:
        case = Case([random.choice(pool)], given)
        if len(case.corpora[0]) > 1 and random.random() < 0.5:
            case.growth = [(0, random.randint(1, len(case.corpora[0])))]
        else:
            case.growth = [(0, len(case.corpora[0]))]
        return case
    # Sources of both formats, so that blocks and windows are read side by side.
    case = Case(random.sample(pool, random.randint(1, 4)), given)
    fits = [corpus for s, corpus in enumerate(case.corpora) if len(case.sequences(s, 0)[1]) >= given["lanes"]]
    if not fits:
        return random_case(random, pool)
    case = Case(fits, given)
    weights = [random.choice([0, 1, 3, 7]) for _ in fits]
    weights[0] += 1
    case.stages = [Stage(0, 0, weights)]
    if random.random() < 0.5:
        later = [random.choice([0, 1, 5]) for _ in fits]
        later[-1] += 1
        case.stages.append(Stage(random.choice([0, 10, 77]), random.choice([0, 50]), later))
    case.epochs = [random.choice([1, 2, None]) for _ in fits]
    case.drop = random.random() < 0.5
    # Every weight has a place in so many sequences.
    case.exact_per = random.choice([None, given["lanes"] * 24])
    return case


def settings_of(case: Case) -> dict[str, Any]:
    given = dict(case.given)
    if case.stages is None:
        return given
    first, *later = case.stages
    sources = [
        {"name": f"s{index}", "data": [str(path) for path in corpus], "weight": first.weights[index],
         "epochs": case.epochs[index]}
        for index, corpus in enumerate(case.corpora)
    ]  # fmt: skip
    stages = [
        {"at_sequences": stage.start, "ramp_sequences": stage.ramp,
         "weights": {f"s{index}": weight for index, weight in enumerate(stage.weights)}}
        for stage in later
    ]  # fmt: skip
    return {
        **given,
        "mixture": {
            "sources": sources,
            "stages": stages,
            "exhausted": "drop" if case.drop else "stop",
            "exact_per": case.exact_per,
        },
    }


def open_ranks(case: Case, world_size: int, **more: Any) -> list[Loader]:
    given = {**settings_of(case), **more, "skip": [tuple(skip) for skip in case.skips], "sample_ids": True}
    data = None if case.stages is not None else case.corpora[0][: case.growth[-1][1]]
    return [Loader(data, dp_rank=rank, dp_world_size=world_size, **given) for rank in range(world_size)]


def whole_course(case: Case, first: int, epochs: int | str) -> list[Position]:
    if epochs == "endless":
        # More of it than any case asks for.
        return course(range(200), case.positions, case.skips)
    return course(range(first, first + int(epochs)), case.positions, case.skips)


def run_case(seed: int, pool: list[list[Path]]) -> int:
    """Runs one case and returns how many rows were compared."""
    random = Random(seed)
    case = random_case(random, pool)
    epochs = random.choice([1, 1, 2, 3, "endless"])
    if case.is_endless or (case.stages is not None and epochs != 1):
        epochs = 1
    if epochs == "endless" and not all(case.positions(epoch) for epoch in range(3)):
        epochs = 2
    endless = epochs == "endless" or case.is_endless
    max_steps = random.choice([None, None, 3])
    if random.random() < 0.4:
        case.skips = [Skip(random.randint(0, 2), start := random.randint(0, 30), start + random.randint(1, 9))]
    at, state, compared = 0, None, 0
    rows = whole_course(case, 0, epochs)
    phases = random.randint(1, 4)
    for phase in range(phases):
        is_last = phase == phases - 1
        world_size, batch_size = random.choice([1, 1, 2, 3]), random.choice([1, 2, 3, 5])
        together = world_size * batch_size
        if phase and case.stages is None and case.growth[-1][1] < len(case.corpora[0]) and random.random() < 0.7:
            assert state is not None
            joins = state["epoch"] + (state["position"] > 0)
            count = random.randint(case.growth[-1][1] + 1, len(case.corpora[0]))
            case.growth = [entry for entry in case.growth if entry[0] < joins] + [(joins, count)]
            rows = whole_course(case, 0, epochs)
        if phase and random.random() < 0.3:
            # Only what comes later can be skipped anew.
            epoch, position = rows[at] if at < len(rows) else (99, 0)
            case.skips = [*case.skips, Skip(epoch, position + 3, position + 6)]
            rows = whole_course(case, 0, epochs)
        left = len(rows) - at
        if case.given["remainder"] == "short" and left % together and left % together < world_size:
            world_size, together = 1, batch_size
        with contextlib.ExitStack() as stack:
            try:
                ranks = open_ranks(
                    case, world_size, batch_size=batch_size, epochs=epochs, max_steps=max_steps,
                    extend=case.stages is None,
                    num_threads=random.choice([0, 1, 2, 3]), prefetch_batches=random.choice([1, 4]),
                    block_tokens=random.choice([1, 64, 1 << 17]), io=random.choice(["mmap", "pread"]),
                )  # fmt: skip
            except ValueError as error:
                # Of the whole epoch, where this phase begins within it.
                assert "without a row" in str(error), error
                return compared
            for rank in ranks:
                stack.callback(rank.close)
                if state is not None:
                    rank.load_state_dict(json.loads(json.dumps(state)))
            drop = case.given["remainder"] == "drop"
            steps = left // together if drop else -(-left // together)
            if max_steps is not None:
                steps = max(min(steps, max_steps - at // together), 0)
            if steps == 0:
                # Over: the next pass is another epoch's.
                return compared
            asked = min(steps, random.randint(0, 6) if endless or not is_last else steps)
            passes = [iter(rank) for rank in ranks]
            for step in range(asked):
                for index, batches in enumerate(passes):
                    batch = next(batches)
                    places = [at + row * world_size + index for row in range(batch_size)]
                    wanted = [expected_row(case, rows, place) for place in places]
                    check(
                        batch, [case.row(w) for w in wanted if w != "none"], case, f"{seed=} {phase=} {step=} {index=}"
                    )
                    compared += batch_size
                at += together
            at = min(at, len(rows))
            states = [rank.state_dict() for rank in ranks]
            assert all(other == states[0] for other in states), seed
            assert len(json.dumps(states[0])) < 1024, seed
            if at < len(rows):
                assert (states[0]["epoch"], states[0]["position"]) == rows[at], f"{seed=} {phase=}"
            if asked == steps and not endless:
                for batches in passes:
                    with pytest.raises(StopIteration):
                        next(batches)
            state = states[0]
    return compared


def expected_row(case: Case, rows: list[Position], place: int) -> Position | str | None:
    """Position of the row, None for padding, "none" where there is no row."""
    if place < len(rows):
        return rows[place]
    if case.given["remainder"] == "pad":
        return None
    if case.given["remainder"] == "wrap":
        last = rows.index(next(row for row in rows if row[0] == rows[-1][0]))
        return rows[last + (place - len(rows)) % (len(rows) - last)]
    return "none"


def check(batch: dict[str, Any], wanted: list[tuple[int, int, list[int], list[int]]], case: Case, where: str) -> None:
    names = ("x", "y") if case.given["targets"] == "shifted" else ("input_ids", "labels")
    for name, values in zip(("source", "sample_index", *names), zip(*wanted, strict=True), strict=True):
        found = np.asarray(batch[name])
        assert np.array_equal(found, np.array(values)), f"{where} `{name}`: {found}, expected {values}, {case}"


@pytest.mark.parametrize("part", range(10))
def test_random_runs_deliver_what_the_lists_say(part: int, pool: list[list[Path]], stress: bool) -> None:
    cases = CASES * (20 if stress else 1)
    compared = sum(run_case(seed, pool) for seed in range(part * cases, (part + 1) * cases))
    assert compared > cases * 10, "most cases deliver something"
