"""Tests that `on_error="substitute"` replaces damaged rows alike on all ranks and after restarts.

The files are damaged for real. The expected rows come from a sound copy, and from the formula of
the choice in plain Python.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from reference_order import derive
from support import clean_environment

import forebay

pytestmark = [
    pytest.mark.hostile,
    pytest.mark.thread_unsafe(reason="it damages files, and reads the log of the process"),
    pytest.mark.skipif("--service" in sys.argv, reason="a service replaces no rows, which is refused"),
]

TIME_NS = 1_700_000_000_000_000_000
SUBSTITUTE = 0x7375627374697400
"""Separates the choice of rows in the place of others from all other choices."""
VOCABULARY = 5000

Row = tuple[int, ...]


def documents(shard: int, count: int = 60) -> list[list[int]]:
    rng = random.Random(shard)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 3, 9, 16, 30]))] for _ in range(count)]


def write_parquet(path: Path, rows: list[list[int]], **options: Any) -> None:
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
    pq.write_table(table, path, row_group_size=12, data_page_size=64, write_batch_size=4, **options)


def write_arrow(path: Path, rows: list[list[int]]) -> None:
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.uint16()))})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=12)


def flip_in_a_page(path: Path) -> None:
    """Flips a bit of the values of the second row group, whose page has a checksum."""
    chunk = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 4
    path.write_bytes(content)


def flip_an_id(path: Path) -> None:
    """Flips a bit of an id, which only saved checksums show."""
    content = bytearray(path.read_bytes())
    ids = [token for row in documents(1) for token in row]
    at = content.index(np.array(ids[40:44], "<u2").tobytes())
    content[at] ^= 1
    path.write_bytes(content)


def write_a_foreign_id(path: Path) -> None:
    """Writes an id of another tokenizer, in place."""
    content = bytearray(path.read_bytes())
    ids = [token for row in documents(1) for token in row]
    at = content.index(np.array(ids[40:44], "<u2").tobytes())
    content[at : at + 2] = (VOCABULARY + 7).to_bytes(2, "little")
    path.write_bytes(content)


@dataclass(frozen=True)
class Kind:
    """A way to write a shard, and to damage it."""

    suffix: str
    write: Callable[[Path, list[list[int]]], None]
    damage: Callable[[Path], None]
    checksums: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "parquet snappy": Kind(
        "parquet",
        lambda path, rows: write_parquet(path, rows, compression="snappy", write_page_checksum=True),
        flip_in_a_page,
        settings={"block_tokens": 64},
    ),
    "parquet zstd v2": Kind(
        "parquet",
        lambda path, rows: write_parquet(
            path, rows, compression="zstd", write_page_checksum=True, data_page_version="2.0", use_dictionary=False
        ),
        flip_in_a_page,
        settings={"block_tokens": 64},
    ),
    "arrow vocabulary": Kind("arrow", write_arrow, write_a_foreign_id, settings={"vocab_size": VOCABULARY}),
    "arrow checksums": Kind("arrow", write_arrow, flip_an_id, checksums=True),
    "npy checksums": Kind(
        "npy",
        lambda path, rows: np.save(path, np.array([token for row in rows for token in row], "<u2")),
        flip_an_id,
        checksums=True,
    ),
}


@dataclass
class Corpus:
    """A corpus of three shards, the second of which is damaged, and a sound copy of it."""

    damaged: Path
    sound: Path
    settings: dict[str, Any]

    def open(self, path: Path, **settings: Any) -> forebay.Loader:
        given = {"seq_len": 16, "shuffle": True, "seed": 3, "sample_ids": True, "batch_size": 4, "num_threads": 2}
        own = {} if path == self.sound and "cache_dir" in self.settings else self.settings
        return forebay.Loader(path, **{**given, **own, **settings})

    def substituting(self, **settings: Any) -> forebay.Loader:
        return self.open(self.damaged, **{"on_error": "substitute", "max_substitutions": 10_000, **settings})


def make(kind: Kind, folder: Path) -> Corpus:
    damaged, sound = folder / "damaged", folder / "sound"
    settings = dict(kind.settings)
    for root in (damaged, sound):
        root.mkdir(parents=True)
        for shard in range(3):
            kind.write(root / f"{shard}.{kind.suffix}", documents(shard))
            os.utime(root / f"{shard}.{kind.suffix}", ns=(TIME_NS, TIME_NS))
    if kind.checksums:
        settings["cache_dir"] = str(folder / "cache")
        command = [sys.executable, "-m", "forebay", "index", damaged, "--cache-dir", folder / "cache", "--checksums"]
        subprocess.run(command, check=True, capture_output=True, env=clean_environment(), timeout=60)
    kind.damage(damaged / f"1.{kind.suffix}")
    os.utime(damaged / f"1.{kind.suffix}", ns=(TIME_NS, TIME_NS))
    return Corpus(damaged, sound, settings)


def places(batch: dict[str, Any], first: int, rank: int, world_size: int) -> dict[int, tuple[int, Row]]:
    """The sequence and the content of each row, by its position."""
    rows = np.concatenate([batch["input_ids"], batch["labels"]], axis=1)
    indices = batch["sample_index"].tolist()
    found = zip(indices, (tuple(row) for row in rows.tolist()), strict=True)
    return {first + number * world_size + rank: row for number, row in enumerate(found)}


def deliver(
    opened: Callable[..., forebay.Loader], world_size: int = 1, *, state: Any = None, steps: int | None = None
) -> tuple[dict[int, tuple[int, Row]], list[dict[str, Any]], int]:
    """All rows that the ranks get, by position; the states of the ranks; and the replaced rows."""
    rows: dict[int, tuple[int, Row]] = {}
    states, replaced = [], 0
    batch_size = 8 // world_size
    for rank in range(world_size):
        with opened(batch_size=batch_size, dp_rank=rank, dp_world_size=world_size) as loader:
            if state is not None:
                loader.load_state_dict(state)
            first = state["position"] if state is not None else 0
            for step, batch in enumerate(loader):
                rows.update(places(batch, first + step * 8, rank, world_size))
                if step + 1 == steps:
                    break
            states.append(loader.state_dict())
            replaced += loader.stats()["substituted_rows"]
    return rows, states, replaced


def expected(
    corpus: Corpus, **settings: Any
) -> tuple[dict[int, tuple[int, Row]], dict[int, tuple[int, Row]], set[int]]:
    """The rows by position, those of the sound copy, and the sequences that cannot be read."""
    sound, _, none = deliver(lambda **more: corpus.open(corpus.sound, **settings, **more))
    assert none == 0
    lost, every = set(), {}
    with corpus.open(corpus.sound, **settings) as whole, corpus.open(corpus.damaged, **settings) as broken:
        count = whole.num_sequences
        for position in range(count):
            every[position] = places(whole.sequences_at(0, position, 1), position, 0, 1)[position]
            try:
                broken.sequences_at(0, position, 1)
            except forebay.DataError:
                lost.add(every[position][0])
    content = dict(every.values())
    wanted = {}
    for position, (sequence, row) in sound.items():
        attempt = 0
        chosen = sequence
        while chosen in lost:
            chosen = (derive(3, SUBSTITUTE, 0, sequence, attempt) * count) >> 64
            attempt += 1
        wanted[position] = (chosen, content[chosen])
        assert chosen != sequence or content[chosen] == row
    return wanted, sound, lost


@pytest.mark.parametrize("layout", ["concat", "pack", "pad"])
@pytest.mark.parametrize("name", KINDS)
def test_damaged_rows_are_replaced_by_the_formula_on_all_ranks(name: str, layout: str, tmp_path: Path) -> None:
    if name == "npy checksums" and layout != "concat":
        pytest.skip("the array is one document")
    corpus = make(KINDS[name], tmp_path)
    wanted, sound, lost = expected(corpus, layout=layout)
    assert lost, "the damage met no row"
    assert len(lost) < len(sound), "no row is sound"
    replaced = sum(wanted[position] != sound[position] for position in sound)
    for world_size, threads in ((1, 2), (1, 0), (2, 2), (4, 1)):
        found, states, count = deliver(
            lambda threads=threads, **more: corpus.substituting(layout=layout, num_threads=threads, **more), world_size
        )
        assert found == wanted, f"{world_size} ranks, {threads} threads"
        assert count == sum(sequence in lost for sequence, _ in sound.values()) >= replaced > 0
        assert all(state == states[0] for state in states), "ranks have equal steps and states"


@pytest.mark.parametrize("name", ["parquet snappy", "arrow vocabulary"])
def test_a_run_that_resumes_with_other_ranks_replaces_the_same_rows(name: str, tmp_path: Path) -> None:
    corpus = make(KINDS[name], tmp_path)
    whole, _, _ = deliver(corpus.substituting)
    for stop in (1, 5, 9):
        first, states, _ = deliver(corpus.substituting, 2, steps=stop)
        rest, _, _ = deliver(corpus.substituting, 4, state=states[0])
        assert {**first, **rest} == whole
        assert len(first) + len(rest) == len(whole)


def test_a_state_saved_before_the_damage_continues_with_another_rule(tmp_path: Path) -> None:
    corpus = make(KINDS["parquet snappy"], tmp_path)
    whole, _, _ = deliver(corpus.substituting)
    with corpus.open(corpus.damaged, batch_size=8) as loader:
        with pytest.raises(forebay.DataError):
            for _ in loader:
                pass
        state = loader.state_dict()
    rest, _, _ = deliver(corpus.substituting, state=state)
    assert rest and rest == {position: row for position, row in whole.items() if position >= state["position"]}


def test_batch_at_gives_the_batches_of_the_run(tmp_path: Path) -> None:
    corpus = make(KINDS["parquet snappy"], tmp_path)
    with corpus.substituting() as loader:
        for step, batch in enumerate(loader):
            again = loader.batch_at(step)
            assert all(np.array_equal(again[name], batch[name]) for name in batch)


def test_sources_of_a_mixture_keep_their_shares(tmp_path: Path) -> None:
    corpus = make(KINDS["parquet snappy"], tmp_path)

    def mixture(folder: Path) -> dict[str, Any]:
        sources = [
            {"name": "broken", "data": str(folder), "weight": 1},
            {"name": "whole", "data": str(corpus.sound), "weight": 2},
        ]
        return {"sources": sources}

    given = {"seq_len": 16, "shuffle": True, "seed": 3, "sample_ids": True, "block_tokens": 64, "num_threads": 2}

    def run(folder: Path, world_size: int, **settings: Any) -> dict[int, tuple[int, int, Row]]:
        rows = {}
        for rank in range(world_size):
            ranks = {"batch_size": 8 // world_size, "dp_rank": rank, "dp_world_size": world_size}
            with forebay.Loader(mixture=mixture(folder), **given, **ranks, **settings) as loader:
                for step, batch in enumerate(loader):
                    found = places(batch, step * 8, rank, world_size)
                    sources = batch["source"].tolist()
                    rows.update({at: (source, *row) for (at, row), source in zip(found.items(), sources, strict=True)})
        return rows

    sound = run(corpus.sound, 1)
    one, two = (run(corpus.damaged, size, on_error="substitute") for size in (1, 2))
    assert one == two
    content = {(source, sequence): row for source, sequence, row in run(corpus.sound, 1).values()}
    replaced = 0
    for position, (source, sequence, row) in one.items():
        assert source == sound[position][0]
        assert content.get((source, sequence), row) == row
        replaced += sequence != sound[position][1]
        assert source == 0 or sequence == sound[position][1]
    assert replaced > 0


def test_more_replaced_rows_than_allowed_end_the_run_at_the_same_batch(tmp_path: Path) -> None:
    corpus = make(KINDS["parquet snappy"], tmp_path)
    _, sound, lost = expected(corpus)
    bad = sorted(position for position, (sequence, _) in sound.items() if sequence in lost)
    assert len(bad) > 2
    for most in (0, 1, len(bad) - 1):
        for threads in (0, 3):
            with corpus.substituting(batch_size=1, max_substitutions=most, num_threads=threads) as loader:
                batches = []
                with pytest.raises(forebay.DataError, match=f"more than `max_substitutions` = {most}") as caught:
                    batches.extend(loader)
                assert caught.value.path is not None
                state = loader.state_dict()
                assert state["position"] == bad[most], "the position is before the batch that failed"
                assert loader.stats()["substituted_rows"] == most
    with corpus.substituting(batch_size=1, max_substitutions=len(bad)) as loader:
        assert len(list(loader)) == len(sound)


def test_the_log_names_file_block_and_row_once(tmp_path: Path, caplog: Any) -> None:
    corpus = make(KINDS["arrow vocabulary"], tmp_path)
    with corpus.substituting(epochs=2) as loader, caplog.at_level("WARNING", "forebay"):
        for _ in loader:
            pass
        count = loader.stats()["substituted_rows"]
    told = [record.getMessage() for record in caplog.records if "stands in its place" in record.getMessage()]
    assert count == 2 * len(told) > 0
    for text in told:
        assert "1.arrow" in text and "block" in text and "row" in text and "vocabulary" in text, text


def test_only_damage_is_replaced(tmp_path: Path) -> None:
    corpus = make(KINDS["parquet snappy"], tmp_path)
    with pytest.raises(forebay.DataError), corpus.open(corpus.damaged) as loader:
        list(loader)
    with pytest.raises(forebay.ConfigError, match="on_error"):
        corpus.open(corpus.damaged, on_error="ignore")
    with pytest.raises(forebay.ConfigError, match="`service`"):
        corpus.substituting(service=["unix:/nowhere"])
    with pytest.raises(forebay.NotFoundError):
        corpus.open(tmp_path / "nothing", on_error="substitute")
    # A file that changes during the run is no damage: other ranks may still see the old one.
    with corpus.substituting(num_threads=0, shuffle=False, io="pread") as loader:
        batches = iter(loader)
        next(batches)
        path = corpus.damaged / "2.parquet"
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(forebay.ForebayError) as caught:
            list(batches)
        assert "2.parquet" in str(caught.value)


def test_a_corpus_without_a_sound_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.full(400, VOCABULARY + 1, "<u2"))
    settings = {"seq_len": 16, "vocab_size": VOCABULARY, "on_error": "substitute"}
    with forebay.Loader(path, **settings) as loader, pytest.raises(forebay.DataError, match="damaged too"):
        next(iter(loader))


def verify(data: Path, log: Path, *more: str) -> subprocess.CompletedProcess[str]:
    sets = ["seq_len=16", "shuffle=true", "seed=3"]
    command = [sys.executable, "-m", "forebay", "verify", str(data), "--delivery-log", str(log), *more]
    command += [part for text in sets for part in ("--set", text)]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=60, check=False)


def test_verify_tells_replaced_rows_from_lost_rows(tmp_path: Path) -> None:
    corpus = make(KINDS["parquet snappy"], tmp_path)
    _, sound, lost = expected(corpus)
    bad = sorted(position for position, (sequence, _) in sound.items() if sequence in lost)
    log = tmp_path / "log"
    deliver(lambda **more: corpus.substituting(delivery_log=str(log), **more), 2)
    broken = verify(corpus.damaged, log)
    assert broken.returncode != 0 and "put a sound copy in its place" in broken.stderr, broken.stderr
    # A sound copy has the same fingerprint. All other rows are proven against it.
    proven = verify(corpus.sound, log, "--json")
    assert proven.returncode == 0, proven.stderr + proven.stdout
    answer = json.loads(proven.stdout)
    assert answer["proven"] and [place for _, place in answer["epochs"][0]["substituted"]] == bad
    text = verify(corpus.sound, log).stdout
    assert "SUBSTITUTED" in text and f"proven except for {len(bad)} rows" in text, text
    # A row that neither came nor was replaced is still a hole.
    path = log / "rank-00000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3] + lines[4:]) + "\n")
    holed = verify(corpus.sound, log)
    assert holed.returncode != 0 and "HOLE" in holed.stdout and "NOT PROVEN" in holed.stdout
