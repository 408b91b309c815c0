"""Compares the order contract with the specification in every layout, in random cases.

A case is a corpus or a mixture, a layout, and a run that is stopped at random steps. New loaders
with other ranks, batch sizes, threads and more shards resume it. The cases of `test_contract.py`
give the run. Here the rows come from `reference_layout.py`, with their boundaries, and may be
balanced between ranks.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from math import gcd
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from reference_documents import Documents, arrays, chunk_order
from reference_layout import LayoutSettings, window_rows
from reference_order import block_order, global_order
from reference_run import Position, Skip, Stage, balanced, side
from test_contract import MOST, Case, expected_row, open_ranks, whole_course

import forebay

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora

CASES = 40
PAD_ID = 1
#: Lengths of documents. The layout `rows` needs equal lengths.
LENGTHS: dict[str, list[list[int]]] = {"rows": [[6]], "other": [[0, 1, 3, 10, 40], [1, 2], [0, 5, 6, 7]]}

Row = list[tuple[int, list[int]]]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Path]]]:
    """Corpora of one to four shards in three formats. No token comes twice in a corpus, but for the
    id that ends documents in raw files.
    """
    random = Random(2)
    found: dict[str, list[list[Path]]] = {"rows": [], "other": []}
    for number in range(36):
        kind = ("rows", "other")[number % 2]
        folder, token, shards = tmp_path_factory.mktemp(f"corpus{number}"), 3, []
        choices = random.choice(LENGTHS[kind])
        for shard in range(random.randint(1, 4)):
            rows = []
            for _ in range(random.choice([1, 9, 25])):
                length = random.choice(choices)
                rows.append(list(range(token, token + length)))
                token += length
            path = folder / f"{shard}{('.parquet', '.arrow', '.bin')[number // 2 % 3]}"
            if path.suffix == ".bin" and not any(rows):
                # A raw file without a byte is refused.
                rows.append([token])
                token += 1
            corpora.write_rows(path, rows)
            shards.append(path)
        if token > 40:
            found[kind].append(shards)
    return found


_known: dict[Any, list[list[Row]]] = {}


class LayoutCase(Case):
    """A case whose rows are those of a layout."""

    @property
    def layout(self) -> LayoutSettings:
        names = [name for name in LayoutSettings.__dataclass_fields__ if name in self.given]
        s = LayoutSettings(**{name: self.given[name] for name in names})
        # The layout `rows` draws rows, and the others draw documents.
        return replace(s, holdout=None) if s.layout == "rows" else s

    def windows(self, source: int, epoch: int) -> list[list[Row]]:
        """The rows of each window, as places and tokens of documents."""
        shards, s = self.shards(source, epoch), self.layout
        key = (*shards, s, self.given["eos_id"])
        if key not in _known:
            corpus = Documents([str(path) for path in shards], eos_id=self.given["eos_id"], **corpora.SPLIT)
            lengths = [[len(document) for document in shard] for shard in corpus.shards]
            _known[key] = [
                [
                    [(at.place, corpus.shards[at.shard][at.document][at.offset :][: at.length]) for at in row]
                    for row in window
                ]
                for window in window_rows(lengths, s)
            ]
        return _known[key]

    def rows(self, source: int, epoch: int) -> list[Row]:
        return [row for window in self.windows(source, epoch) for row in window]

    def sequences(self, source: int, epoch: int) -> tuple[int, list[int], bool]:
        count = len(self.rows(source, epoch))
        # The other layouts draw documents, so that all of these rows are on the side.
        drawn = self.given["layout"] == "rows"
        mine = side(count, self.given["holdout"], self.given["split"]) if drawn else list(range(count))
        return count, mine, False

    def order(self, source: int, epoch: int) -> list[int]:
        key = (source, epoch, len(self.shards(source, epoch)))
        if key not in self._known:
            _, mine, _ = self.sequences(source, epoch)
            given, where = self.given, {"seed": self.seed(source), "epoch": epoch}
            order = list(range(len(mine)))
            shape = {name: given[name] for name in ("seq_len", "chunk_tokens", "window_tokens", "lanes")}
            if given["shuffle"] == "global":
                order = global_order(len(mine), **where)
            elif given["shuffle"] == "block" and given["layout"] == "rows":
                order = block_order(len(mine), **where, **shape)
            elif given["shuffle"] == "block":
                ends = np.cumsum([len(window) for window in self.windows(source, epoch)]).tolist()
                starts = sorted({start for start in [0, *ends] if start < len(mine)})
                order = chunk_order(len(mine), starts, **where, **shape)
            self._known[key] = [mine[index] for index in order]
        return self._known[key]  # type: ignore[no-any-return]

    def cuts(self, at: Position | None) -> tuple[int, int, Row]:
        """Source, number and content of the row at a position, or of padding."""
        if at is None:
            return -1, -1, []
        source, (epoch, position) = 0, at
        if self.stages is not None:
            source, epoch, position = self.draws(epoch)[position]
        number = self.order(source, epoch)[position]
        return source, number, self.rows(source, epoch)[number]

    def dealt(self, rows: list[Position], at: int, size: int, world_size: int) -> list[list[int]]:
        """The places of each rank in the global batch at place `at`."""
        ranks = [list(range(at + rank, at + size, world_size)) for rank in range(world_size)]
        if self.given["balance"] == "off" or at + size > len(rows):
            return ranks
        stride = self.stride(world_size)
        for first in range(stride):
            places = list(range(at + first, at + size, stride))
            costs = [sum(len(tokens) ** 2 for _, tokens in self.cuts(rows[place])[2]) for place in places]
            for turn, mine in enumerate(balanced(costs, world_size // stride)):
                ranks[first + turn * stride] = [places[number] for number in mine]
        return ranks

    def stride(self, world_size: int) -> int:
        """Ranks share rows with every rank that is so much higher."""
        decodes = any(path.suffix == ".parquet" for corpus in self.corpora for path in corpus)
        return gcd(self.given["lanes"], world_size) if decodes and self.given["shuffle"] == "block" else 1


def random_case(random: Random, pools: dict[str, list[list[Path]]]) -> LayoutCase:
    layout = random.choice(["pack", "pack", "pad", "rows"])
    pool = pools["rows" if layout == "rows" else "other"]
    given: dict[str, Any] = {
        "layout": layout,
        "seq_len": random.choice([3, 7, 16]),
        "targets": random.choice(["labels", "shifted"]),
        "eos_id": random.choice([None, 2]),
        "boundaries": random.choice([True, False]),
        "shuffle": random.choice([False, "global", "block", "block"]),
        "seed": random.choice([0, 1, 2**64 - 1]),
        "chunk_tokens": random.choice([1, 20, 100]),
        "window_tokens": random.choice([1, 30, 200]),
        "lanes": random.choice([1, 2, 3, 8]),
        "holdout": random.choice([None, None, 2, 5]),
        "split": "train",
        "remainder": random.choice(["drop", "pad", "wrap", "short"]),
        "balance": random.choice(["off", "ranks"]),
        "pad_id": PAD_ID,
    }
    if layout == "rows":
        given["seq_len"] = 6 + (given["eos_id"] is not None) - (given["targets"] == "shifted")
    else:
        given["overflow"] = random.choice(["split", "truncate", "drop"])
    if layout == "pack":
        given["max_docs_per_row"] = random.choice([None, None, 1, 3])
        given["pack_align"] = random.choice([1, given["seq_len"]])
    if given["holdout"] and random.random() < 0.4:
        given["split"] = "holdout"
    if random.random() < 0.7:
        case = LayoutCase([random.choice(pool)], given)
        shards = len(case.corpora[0])
        case.growth = [(0, random.randint(1, shards) if random.random() < 0.5 else shards)]
        return case if case.sequences(0, 0)[1] else random_case(random, pools)
    case = LayoutCase(random.sample(pool, random.randint(1, 3)), given)
    fits = [corpus for s, corpus in enumerate(case.corpora) if len(case.sequences(s, 0)[1]) >= given["lanes"]]
    if not fits:
        return random_case(random, pools)
    case = LayoutCase(fits, given)
    weights = [random.choice([1, 3, 7]) for _ in fits]
    case.stages = [Stage(0, 0, weights)]
    case.epochs = [random.choice([1, 2]) for _ in fits]
    case.drop = random.random() < 0.5
    return case


def run_case(seed: int, pools: dict[str, list[list[Path]]]) -> int:
    """Runs one case and returns how many rows were compared."""
    random = Random(seed)
    case = random_case(random, pools)
    epochs = random.choice([1, 2]) if case.stages is None else 1
    if random.random() < 0.3:
        case.skips = [Skip(0, start := random.randint(0, 9), start + random.randint(1, 5))]
    at, state, compared = 0, None, 0
    rows = whole_course(case, 0, epochs)
    assert len(rows) < MOST
    for phase in range(phases := random.randint(1, 3)):
        world_size, batch_size = random.choice([1, 2, 3, 4]), random.choice([1, 2, 3])
        size = world_size * batch_size
        if phase and case.stages is None and case.growth[-1][1] < len(case.corpora[0]):
            assert state is not None
            joins = state["epoch"] + (state["position"] > 0)
            count = random.randint(case.growth[-1][1] + 1, len(case.corpora[0]))
            case.growth = [entry for entry in case.growth if entry[0] < joins] + [(joins, count)]
            rows = whole_course(case, 0, epochs)
        left = len(rows) - at
        if case.given["remainder"] == "short" and left % size and left % size < world_size:
            world_size, size = 1, batch_size
        steps = left // size if case.given["remainder"] == "drop" else -(-left // size)
        if steps <= 0:
            return compared
        with contextlib.ExitStack() as stack:
            # Ranks that share no lane of files that are decoded cannot be balanced.
            refused = case.given["balance"] == "ranks" and world_size == case.stride(world_size) > 1
            is_raw = any(path.suffix == ".bin" for corpus in case.corpora for path in corpus)
            more = {
                **(corpora.SPLIT if is_raw else {}),
                "batch_size": batch_size, "epochs": epochs, "extend": case.stages is None,
                "num_threads": random.choice([0, 1, 3]), "block_tokens": random.choice([1, 64, 1 << 17]),
                "io": random.choice(["mmap", "pread"]),
            }  # fmt: skip
            try:
                ranks = open_ranks(case, world_size, **more)
            except ValueError as error:
                assert refused == ("none of them shares a lane" in str(error)), error
                assert refused or "without a row" in str(error), error
                if not refused:
                    return compared
                ranks = open_ranks(case, world_size, **{**more, "balance": "off"})
            for rank in ranks:
                stack.callback(rank.close)
                if state is not None:
                    rank.load_state_dict(json.loads(json.dumps(state)))
            asked = steps if phase == phases - 1 else min(steps, random.randint(0, 4))
            passes = [iter(rank) for rank in ranks]
            for step in range(asked):
                dealt = LayoutCase.dealt(case, rows, at, size, world_size)
                if refused:
                    dealt = [list(range(at + rank, at + size, world_size)) for rank in range(world_size)]
                for index, batches in enumerate(passes):
                    wanted = [expected_row(case, rows, place) for place in dealt[index]]
                    check(
                        next(batches), [case.cuts(w) for w in wanted if w != "none"], case, f"{seed=} {step=} {index=}"
                    )
                    compared += batch_size
                at += size
            at = min(at, len(rows))
            states = [rank.state_dict() for rank in ranks]
            assert all(other == states[0] for other in states), seed
            if at < len(rows):
                assert (states[0]["epoch"], states[0]["position"]) == rows[at], f"{seed=} {phase=}"
            state = states[0]
    return compared


def check(batch: dict[str, Any], wanted: list[tuple[int, int, Row]], case: LayoutCase, where: str) -> None:
    assert batch["source"].tolist() == [source for source, _, _ in wanted], where
    assert batch["sample_index"].tolist() == [number for _, number, _ in wanted], where
    found = [arrays(row, case.layout, PAD_ID, case.given["boundaries"]) for _, _, row in wanted]
    for name in found[0]:
        if name != "starts":
            values = np.array([row[name] for row in found])
            assert np.array_equal(batch[name], values), f"{where} `{name}`: {batch[name]}, expected {values}, {case}"


@pytest.mark.parametrize("part", range(8))
def test_random_runs_of_every_layout_are_those_of_the_specification(
    part: int, pools: dict[str, list[list[Path]]], stress: bool
) -> None:
    cases = CASES * (20 if stress else 1)
    compared = sum(run_case(seed, pools) for seed in range(part * cases, (part + 1) * cases))
    assert compared > cases * 10, "most cases deliver something"


@pytest.mark.parametrize("layout", ["pack", "pad"])
@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_balance_moves_rows_within_global_batches_alone(tmp_path: Path, layout: str, suffix: str) -> None:
    draw = Random(3)
    corpora.write_rows(tmp_path / f"0{suffix}", [[1] * draw.randint(1, 200) for _ in range(900)])
    settings: dict[str, Any] = {"layout": layout, "seq_len": 256, "shuffle": "block", "lanes": 3, "sample_ids": True}
    size = {"dp_world_size": 4, "batch_size": 12}

    def batches(balance: str) -> list[list[Any]]:
        of_rank = []
        for rank in range(4):
            with forebay.Loader(tmp_path, balance=balance, dp_rank=rank, boundaries=True, **size, **settings) as loader:
                of_rank.append(list(loader))
        return [list(step) for step in zip(*of_rank, strict=True)]

    def cost(batch: Any) -> int:
        return sum(int(np.sum(row == number)) ** 2 for row in batch["doc_ids"] for number in range(row.max() + 1))

    plain, moved = batches("off"), batches("ranks")
    assert len(plain) == len(moved) > 1
    spread = {"off": 0, "ranks": 0}
    for before, after in zip(plain, moved, strict=True):
        for balance, step in (("off", before), ("ranks", after)):
            costs = [cost(batch) for batch in step]
            spread[balance] += max(costs) - min(costs)
        numbers = [
            sorted(np.concatenate([batch["sample_index"] for batch in step]).tolist()) for step in (before, after)
        ]
        assert numbers[0] == numbers[1]
    assert spread["ranks"] * 3 < spread["off"], spread
    with forebay.Loader(tmp_path, balance="ranks", dp_rank=1, **size, **settings) as loader:
        again = loader.batch_at(1)
        assert np.array_equal(again["sample_index"], moved[1][1]["sample_index"])
        assert np.array_equal(loader.batch_at(1, rank=3, world_size=4)["sample_index"], moved[1][3]["sample_index"])


def test_balance_that_would_decode_more_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    corpora.write_rows(tmp_path / "0.parquet", [[1] * 9] * 200)
    given: dict[str, Any] = {"seq_len": 16, "balance": "ranks", "dp_rank": 0, "shuffle": "block"}
    with pytest.raises(ValueError, match="4 ranks have 2 of 8 `lanes` each, and none of them shares a lane"):
        forebay.Loader(tmp_path, layout="pack", dp_world_size=4, **given)
    # Three ranks have no divisor in common with eight lanes.
    shared = forebay.Loader(tmp_path, layout="pack", dp_world_size=3, **given)
    with shared, pytest.raises(ValueError, match="4 ranks have 2 of 8 `lanes` each"):
        shared.batch_at(0, rank=0, world_size=4)
    with pytest.raises(ValueError, match="`balance` is for `layout` = pack, pad or rows"):
        forebay.Loader(tmp_path, dp_world_size=3, **given)
