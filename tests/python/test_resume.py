"""Tests resuming.

It jumps to the next batch that was not handed over, in a new process, any number of times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference, Settings, token_stream

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from support import assert_batch, json_from, open_loader

import forebay

CONTENT: dict[str, Any] = {
    "seq_len": 16, "shuffle": "block", "seed": 77, "chunk_tokens": 160, "window_tokens": 640, "lanes": 4, "eos_id": 0,
}  # fmt: skip
SETTINGS = Settings(batch_size=4, **CONTENT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("resume") / "corpus", "parquet", 4000, shards=3)


@pytest.fixture(scope="module")
def epochs(corpus: Path) -> list[list[Any]]:
    """Returns the batches of three epochs by the reference."""
    reference = Reference(token_stream(corpus, eos_id=0), SETTINGS)
    return [list(reference.batches(epoch=epoch)) for epoch in range(3)]


RESUME = """
import json, sys
import forebay
path, content, state, take = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
with forebay.Loader(path, **content) as loader:
    loader.load_state_dict(state)
    found = []
    for batch in loader:
        found.append(batch["input_ids"].tolist())
        if len(found) == take:
            break
    print(json.dumps([found, loader.state_dict()]))
"""


def resume(corpus: Path, state: dict[str, Any], take: int, **more: Any) -> tuple[list[Any], dict[str, Any]]:
    content = {**CONTENT, "batch_size": 4, **more}
    found, state = json_from(RESUME, corpus, json.dumps(content), json.dumps(state), take)
    return found, state


def inputs(batches: list[Any]) -> list[Any]:
    return [[ids for ids, _ in rows] for rows in batches]


@pytest.mark.parametrize("taken", [0, 1, 7, "all but one"])
def test_a_new_process_continues_at_the_next_batch_twice(
    corpus: Path, epochs: list[list[Any]], taken: int | str
) -> None:
    steps = len(epochs[0])
    count = steps - 1 if isinstance(taken, str) else taken
    with open_loader(corpus, SETTINGS, prefetch_batches=16) as loader:
        for _ in zip(range(count), loader, strict=False):
            pass
        state = loader.state_dict()
    assert state == json.loads(json.dumps(state))
    first, state = resume(corpus, state, 1)
    assert first == inputs(epochs[0][count : count + 1])
    rest, state = resume(corpus, state, steps)
    if count + 1 < steps:
        assert rest == inputs(epochs[0][count + 1 :])
    else:
        assert rest == inputs(epochs[1])


def test_a_state_saved_after_len_batches_begins_the_next_epoch(corpus: Path, epochs: list[list[Any]]) -> None:
    """Trainers take exactly `len()` batches and never see `StopIteration`."""
    with open_loader(corpus, SETTINGS) as loader:
        iterator = iter(loader)
        for _ in range(len(loader)):
            next(iterator)
        state = loader.state_dict()
        assert state["epoch"] == 0
        assert_batch(next(iter(loader)), epochs[1][0])
    with open_loader(corpus, SETTINGS) as loader:
        loader.load_state_dict(state)
        assert_batch(next(iter(loader)), epochs[1][0])
        assert loader.state_dict()["epoch"] == 1


def test_state_counts_batches_handed_over_not_prefetched(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS, prefetch_batches=32, num_threads=4) as loader:
        iterator = iter(loader)
        for step in range(10):
            assert loader.state_dict()["position"] == step * 4
            next(iterator)
        assert loader.state_dict()["position"] == 40


def test_state_is_small_flat_and_the_same_on_all_ranks(corpus: Path) -> None:
    states = []
    for rank in range(2):
        with open_loader(corpus, SETTINGS, dp_rank=rank, dp_world_size=2) as loader:
            before = loader.state_dict()
            for _ in zip(range(3), loader, strict=False):
                pass
            states.append(loader.state_dict())
            assert list(before) == list(states[-1])
    assert states[0] == states[1]
    state = states[0]
    assert len(json.dumps(state)) < 1000
    assert type(state) is dict
    assert all(type(value) in (int, str) for value in state.values()), state
    assert str(corpus.parent) not in json.dumps(state), "a state must not hold paths of the machine"


def test_loading_a_state_again_goes_back(corpus: Path, epochs: list[list[Any]]) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        iterator = iter(loader)
        next(iterator)
        state = loader.state_dict()
        for _ in range(3):
            loader.load_state_dict(state)
            assert_batch(next(iter(loader)), epochs[0][1])


def test_a_restored_epoch_is_followed_by_the_next(corpus: Path, epochs: list[list[Any]]) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        loader.set_epoch(1)
        iterator = iter(loader)
        next(iterator)
        state = loader.state_dict()
    with open_loader(corpus, SETTINGS) as loader:
        loader.load_state_dict(state)
        for expected in (epochs[1][1:], epochs[2]):
            for batch, rows in zip(loader, expected, strict=True):
                assert_batch(batch, rows)


def test_an_empty_state_changes_nothing(corpus: Path, epochs: list[list[Any]]) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        before = loader.state_dict()
        loader.load_state_dict({})
        assert loader.state_dict() == before
        assert_batch(next(iter(loader)), epochs[0][0])


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 2), (1, 8), (2, 4), (4, 2), (8, 1)])
def test_grouping_may_change_on_resume(corpus: Path, epochs: list[list[Any]], world_size: int, batch_size: int) -> None:
    """Takes eight positions as two global batches of four.

    Another grouping continues at the ninth.
    """
    with open_loader(corpus, SETTINGS) as loader:
        for _ in zip(range(2), loader, strict=False):
            pass
        state = loader.state_dict()
    rest = [row for rows in epochs[0][2:] for row in rows]
    size = world_size * batch_size
    for rank in range(world_size):
        settings = Settings(batch_size=batch_size, **CONTENT)
        with open_loader(corpus, settings, dp_rank=rank, dp_world_size=world_size) as loader:
            loader.load_state_dict(state)
            for step, batch in zip(range(3), loader, strict=False):
                mine = range(step * size + rank, (step + 1) * size, world_size)
                assert_batch(batch, [rest[at] for at in mine], where=f"rank {rank}, step {step}")


def test_operational_settings_may_change_on_resume(corpus: Path, epochs: list[list[Any]]) -> None:
    with open_loader(corpus, SETTINGS, num_threads=1) as loader:
        for _ in zip(range(5), loader, strict=False):
            pass
        state = loader.state_dict()
    with open_loader(corpus, SETTINGS, num_threads=8, prefetch_batches=1, block_tokens=50, io="pread") as loader:
        loader.load_state_dict(state)
        assert_batch(next(iter(loader)), epochs[0][5])


@pytest.mark.parametrize(
    ("name", "other"),
    [("seed", 78), ("seq_len", 32), ("shuffle", "global"), ("targets", "shifted"), ("eos_id", 1), ("bos_id", 5),
     ("ignore_index", -1), ("ignore_index", 7), ("chunk_tokens", 320), ("window_tokens", 1280), ("lanes", 2)],
)  # fmt: skip
def test_other_content_is_refused_with_both_values_named(corpus: Path, name: str, other: Any) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        state = loader.state_dict()
    saved = {**vars(SETTINGS)}[name]
    with open_loader(corpus, Settings(batch_size=4, **{**CONTENT, name: other})) as loader:
        before = loader.state_dict()
        with pytest.raises(forebay.StateMismatchError) as caught:
            loader.load_state_dict(state)
        message = str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert loader.state_dict() == before, "a refused state must change nothing"
        named = [str(value) for value in (saved, other) if value is not None]
        if name not in ("chunk_tokens", "window_tokens", "lanes"):
            assert name in message
        assert all(value in message for value in named), message


def two_columns(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    columns = {"input_ids": [list(range(100))] * 20, "labels": [list(range(1000, 1100))] * 20}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("indexed", [False, True])
def test_a_state_of_another_column_is_refused(tmp_path: Path, indexed: bool) -> None:
    path = two_columns(tmp_path / "a.parquet")
    more: dict[str, Any] = {"seq_len": 10, "cache_dir": tmp_path / "index" if indexed else None}

    def opened(**given: Any) -> forebay.Loader:
        return forebay.Loader(path, **more, **given)

    for _ in range(1 + indexed):
        state = opened().state_dict()
        assert (state["token_column"], state["format"]) == ("input_ids", "parquet")
        opened(token_column="input_ids", format="parquet").load_state_dict(state)
        with pytest.raises(forebay.StateMismatchError, match="`token_column` was `input_ids` when saved"):
            opened(token_column="labels").load_state_dict(state)


def test_a_state_of_other_columns_of_a_mixture_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    two_columns(tmp_path / "a.parquet")
    pq.write_table(pa.table({"labels": [list(range(100))] * 20, "tokens": [[7] * 100] * 20}), tmp_path / "b.parquet")
    sources = [{"name": name, "data": tmp_path / f"{name}.parquet", "weight": 1} for name in "ab"]
    given: dict[str, Any] = {"mixture": {"sources": sources}, "seq_len": 10, "lanes": 2}
    state = forebay.Loader(**given).state_dict()
    assert state["token_column"] == "a: input_ids, b: tokens"
    with pytest.raises(forebay.StateMismatchError, match="a: labels, b: labels"):
        forebay.Loader(**given, token_column="labels").load_state_dict(state)


def test_another_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        state = loader.state_dict()
    other = corpora.unique_corpus(tmp_path / "corpus", "parquet", 4100, shards=3)
    with open_loader(other, SETTINGS) as loader:
        with pytest.raises(forebay.StateMismatchError, match="fingerprint") as caught:
            loader.load_state_dict(state)
        assert state["fingerprint"] in str(caught.value)
        assert loader.state_dict()["fingerprint"] in str(caught.value)


def test_the_same_corpus_elsewhere_is_accepted(corpus: Path, epochs: list[list[Any]], tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(corpus, moved)
    with open_loader(corpus, SETTINGS) as loader:
        next(iter(loader))
        state = loader.state_dict()
    with open_loader(moved, SETTINGS) as loader:
        loader.load_state_dict(state)
        assert_batch(next(iter(loader)), epochs[0][1])


@pytest.mark.parametrize("damage", [{"version": 99}, {"epoch": "two"}, {"position": -1}, {"position": 10**15}])
def test_a_damaged_state_is_refused(corpus: Path, damage: dict[str, Any]) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        with pytest.raises((forebay.StateMismatchError, TypeError, OverflowError)):
            loader.load_state_dict({**loader.state_dict(), **damage})
        with pytest.raises(forebay.StateMismatchError):
            loader.load_state_dict({"epoch": 1})


def test_a_whole_checkpoint_is_refused_with_the_key_of_the_state(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        state = loader.state_dict()
        for checkpoint in ({"loader": state}, {"model": {"weight": [0.5] * 100}, "step": 7, "data": state}):
            key = list(checkpoint)[-1]
            with pytest.raises(forebay.StateMismatchError, match=f"holds a state under `{key}`: give that value"):
                loader.load_state_dict(checkpoint)
        with pytest.raises(forebay.StateMismatchError, match=r"found \[0, 1, 2, .* \.\.\.$"):
            loader.load_state_dict({**state, "epoch": list(range(100))})
        with pytest.raises(forebay.StateMismatchError, match=r"found \[0, 1\]$"):
            loader.load_state_dict({**state, "epoch": [0, 1]})


def test_iter_has_no_effect_before_the_first_next(corpus: Path, epochs: list[list[Any]]) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        for _ in zip(range(3), loader, strict=False):
            pass
        state = loader.state_dict()
        unused = [iter(loader) for _ in range(4)]
        assert loader.state_dict() == state
        del unused
        assert loader.state_dict() == state
        loader.load_state_dict(state)
        iter(loader)
        assert_batch(next(iter(loader)), epochs[0][3])


def test_the_epoch_advances_at_the_first_next_of_a_new_iterator(corpus: Path, epochs: list[list[Any]]) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        for expected in epochs:
            for batch, rows in zip(loader, expected, strict=True):
                assert_batch(batch, rows)
        iterator = iter(loader)
        assert loader.state_dict()["epoch"] == 2
        next(iterator)
        assert loader.state_dict()["epoch"] == 3


def test_leaving_an_epoch_early_begins_the_next_one(corpus: Path, epochs: list[list[Any]]) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        for expected in epochs:
            for step, batch in enumerate(loader):
                assert_batch(batch, expected[step])
                if step == 2:
                    break


def test_set_epoch_is_idempotent_and_keeps_a_restored_position(corpus: Path, epochs: list[list[Any]]) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        loader.set_epoch(1)
        loader.set_epoch(1)
        iterator = iter(loader)
        assert_batch(next(iterator), epochs[1][0])
        assert_batch(next(iterator), epochs[1][1])
        state = loader.state_dict()
    with open_loader(corpus, SETTINGS) as loader:
        loader.load_state_dict(state)
        loader.set_epoch(1)
        assert_batch(next(iter(loader)), epochs[1][2])
        loader.set_epoch(0)
        assert_batch(next(iter(loader)), epochs[0][0])


def test_state_follows_the_newest_iterator(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        old = iter(loader)
        next(old)
        new = iter(loader)
        next(new)
        state = loader.state_dict()
        next(old)
        assert loader.state_dict() == state
        assert (state["epoch"], state["position"]) == (1, 4)


def test_resume_works_from_plain_values_of_other_stores(corpus: Path, epochs: list[list[Any]]) -> None:
    """Checkpoint libraries return numbers as NumPy scalars."""
    with open_loader(corpus, SETTINGS) as loader:
        next(iter(loader))
        state = {k: np.int64(v) if isinstance(v, int) else v for k, v in loader.state_dict().items()}
    state["seed"] = int(state["seed"])
    with open_loader(corpus, SETTINGS) as loader:
        loader.load_state_dict(state)
        assert_batch(next(iter(loader)), epochs[0][1])
