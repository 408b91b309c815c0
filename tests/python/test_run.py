"""Tests settings of a run beside its order, and their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import clean_environment, first_ids, json_from

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora

from forebay import ConfigError, Loader, StateMismatchError

SEQ_LEN = 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 1000 sequences of 10 tokens that count up, in 5 shards."""
    return corpora.unique_corpus(tmp_path_factory.mktemp("run") / "corpus", "arrow", 10_000, shards=5)


def shards(corpus: Path) -> list[Path]:
    return sorted(corpus.iterdir())


def sequences(loader: Any) -> list[int]:
    return [value // SEQ_LEN for batch in loader for value in first_ids(batch)]


def open_run(data: Any, **settings: Any) -> Loader:
    return Loader(data, **{"seq_len": SEQ_LEN, "shuffle": True, "batch_size": 4, **settings})


def test_seek_goes_to_a_position(corpus: Path) -> None:
    with open_run(corpus) as loader:
        whole = sequences(loader)
        loader.seek(36, epoch=0)
        assert sequences(loader) == whole[36:]
        loader.seek(7)
        assert first_ids(next(iter(loader)))[0] // SEQ_LEN == whole[7]
        with pytest.raises(ConfigError, match="cannot seek to position 1001: epoch 0 has 1000 positions"):
            loader.seek(1001)
        for bad in (-1, 1.5, "3", None):
            with pytest.raises(ConfigError, match="`position` must be a whole number from 0"):
                loader.seek(bad)  # type: ignore[arg-type]


def test_consumed_samples_of_another_trainer_are_skipped(corpus: Path) -> None:
    with open_run(corpus) as loader:
        whole = sequences(loader)
    with open_run(corpus, skip=[(0, 100), (200, 250)]) as loader:
        assert sequences(loader) == (whole[100:200] + whole[250:])[:848], "two rows fill no batch"
        assert loader.state_dict()["skipped"] == "0-100,200-250"
        assert [int(v) // SEQ_LEN for v in loader.sequences_at(0, 0, 3)["input_ids"][:, 0]] == whole[:3]


def test_a_skip_that_has_begun_cannot_be_taken_back(corpus: Path) -> None:
    with open_run(corpus, skip=[(4, 8)]) as loader:
        batches = iter(loader)
        next(batches), next(batches)
        state = loader.state_dict()
    with open_run(corpus) as loader, pytest.raises(StateMismatchError, match=r"`skipped` was `4-8` when saved"):
        loader.load_state_dict(state)
    with open_run(corpus, skip=[(4, 8), (900, 950)]) as loader:
        loader.load_state_dict(state)


def test_a_holdout_is_the_same_for_every_seed_and_never_trained_on(corpus: Path) -> None:
    def of(split: str, seed: int, **more: Any) -> set[int]:
        with open_run(corpus, holdout=20, split=split, seed=seed, batch_size=1, **more) as loader:
            found = sequences(loader)
        assert len(found) == len(set(found))
        return set(found)

    held = of("holdout", 1)
    assert len(held) == 50
    assert of("holdout", 2, shuffle=False) == held
    assert of("train", 1) == of("train", 3) == set(range(1000)) - held
    with pytest.raises(ConfigError, match="`split` = holdout needs `holdout`"):
        open_run(corpus, split="holdout")


def test_validation_runs_whole_on_any_number_of_ranks(corpus: Path) -> None:
    for world_size in (1, 3, 7):
        labels: list[int] = []
        steps = set()
        for rank in range(world_size):
            with open_run(corpus, holdout=20, split="holdout", shuffle=False, remainder="pad",
                          dp_rank=rank, dp_world_size=world_size) as loader:  # fmt: skip
                batches = [batch["labels"] for batch in loader]
            steps.add(len(batches))
            labels += [int(value) for batch in batches for value in np.asarray(batch)[:, 0] if value >= 0]
        assert len(steps) == 1
        assert len(labels) == len(set(labels)) == 50


def test_batches_run_on_across_epochs(corpus: Path) -> None:
    with open_run(corpus, batch_size=7) as loader:
        one_by_one = [sequences(loader.sequences_at(epoch, 0, 1000) for epoch in [e]) for e in range(3)]
    flat = [sequence for epoch in one_by_one for sequence in epoch]
    with open_run(corpus, batch_size=7, epochs=3) as loader:
        assert len(loader) == 3000 // 7
        assert sequences(loader) == flat[: 3000 // 7 * 7]
    with open_run(corpus, batch_size=7, epochs="endless", max_steps=300) as loader:
        assert len(loader) == 300
        assert sequences(loader) == flat[:2100]
    with open_run(corpus, epochs="endless") as loader:
        with pytest.raises(TypeError, match="has no end"):
            len(loader)
        assert "endless" in repr(loader)


def test_a_corpus_that_grew_is_continued_if_that_is_said(corpus: Path) -> None:
    files = shards(corpus)
    with open_run(files[:3], epochs=2) as loader:
        batches = iter(loader)
        seen = [value // SEQ_LEN for _ in range(50) for value in first_ids(next(batches))]
        state = json.loads(json.dumps(loader.state_dict()))
        rest = [value // SEQ_LEN for batch in batches for value in first_ids(batch)]
    grown = "has grown: it had 3 shards when the state was saved, and 5 now"
    with open_run(files, epochs=2) as loader, pytest.raises(StateMismatchError, match=grown):
        loader.load_state_dict(state)
    with open_run(files, epochs=2, extend=True) as loader:
        loader.load_state_dict(state)
        batches = iter(loader)
        here = [value // SEQ_LEN for _ in range(100) for value in first_ids(next(batches))]
        assert here == rest[:400], "the present epoch is as it was"
        middle = loader.state_dict()
        assert middle["growth"] == "0:3,1:5"
        found = seen + here + [value // SEQ_LEN for batch in batches for value in first_ids(batch)]
    assert sorted(found[:600]) == list(range(600))
    assert sorted(found[600:]) == list(range(1000))
    with open_run(files, epochs=2) as loader:
        loader.load_state_dict(middle)
        assert sequences(loader) == found[600:], "what has joined needs no leave any more"
    with open_run([files[1], files[0], *files[2:]], extend=True) as loader, pytest.raises(StateMismatchError):
        loader.load_state_dict(state)


def mixture(corpus: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    a, b, c, *_ = shards(corpus)
    sources = [{"name": "a", "data": [a, b], "weight": 0.75}, {"name": "b", "data": c, "weight": 0.25, "epochs": None}]
    return {"sources": sources, "stages": list(stages), **more}


def test_a_mixture_has_its_shares_and_says_so(corpus: Path) -> None:
    with Loader(mixture=mixture(corpus), seq_len=SEQ_LEN, shuffle=True, batch_size=8, sample_ids=True) as loader:
        sources = [int(value) for batch in loader for value in batch["source"]]
        a, b = loader.stats()["sources"]
    assert (sources.count(0), sources.count(1)) == (a["sequences"], b["sequences"])
    assert abs(a["share"] - 0.75) < 0.01 and 0.95 < a["epochs"] <= 1
    assert a["tokens"] == a["sequences"] * SEQ_LEN


@pytest.mark.parametrize("exhausted", ["stop", "drop"])
def test_one_source_is_delivered_whole_whatever_the_lanes(corpus: Path, exhausted: str) -> None:
    for lanes in (1, 7, 8, 253):
        recipe = {"sources": [{"name": "all", "data": corpus, "weight": np.float32(1)}], "exhausted": exhausted}
        with Loader(mixture=recipe, seq_len=SEQ_LEN, shuffle=True, lanes=lanes) as loader:
            assert sorted(sequences(loader)) == list(range(1000))


def test_what_cannot_be_is_an_error_with_its_name(corpus: Path) -> None:
    with open_run(corpus) as loader:
        with pytest.raises(ConfigError, match="rows at once take"):
            Loader(mixture={"sources": [{"name": "a", "data": corpus, "weight": 1, "epochs": None}]},
                   seq_len=SEQ_LEN).sequences_at(0, 5, 2**50)  # fmt: skip
        state = loader.state_dict()
        with pytest.raises(StateMismatchError, match="is past 4294967296"):
            loader.load_state_dict({**state, "epoch": 2**64 - 1})
    with pytest.raises(TypeError, match="`skip` must be a list of"):
        open_run(corpus, skip=[(1.5, 3)])
    with open_run(corpus, skip=np.array([[10, 20]])) as loader:
        assert loader.config["skip"] == [(0, 10, 20)]
    with pytest.raises(ConfigError, match=r"`sources\[0\].weight` must be given"):
        Loader(mixture={"sources": [{"name": "a", "data": corpus}]})


def test_a_later_stage_may_change_and_one_that_has_begun_may_not(corpus: Path) -> None:
    first = {"at_sequences": 16, "weights": {"a": 1, "b": 1}}

    def opened(*stages: dict[str, Any]) -> Loader:
        return Loader(mixture=mixture(corpus, *stages), seq_len=SEQ_LEN, shuffle=True, batch_size=8, sample_ids=True)

    with opened(first) as loader:
        batches = iter(loader)
        for _ in range(4):
            next(batches)
        state = loader.state_dict()
        rest = [batch["sample_index"].tolist() for batch in batches]
    assert len(json.dumps(state)) < 1024
    with opened(first, {"at_sequences": 80, "ramp_sequences": 64, "weights": {"b": 1}}) as loader:
        loader.load_state_dict(state)
        now = [next(batches)["sample_index"].tolist() for batches in [iter(loader)] for _ in range(12)]
    assert now[:6] == rest[:6] and now != rest[:12]
    with opened({**first, "weights": {"a": 2, "b": 1}}) as loader, pytest.raises(StateMismatchError, match="`mixture`"):
        loader.load_state_dict(state)


def test_global_batches_have_exact_counts_where_that_is_asked_for(corpus: Path) -> None:
    recipe = mixture(corpus, exact_per=24)
    with Loader(mixture=recipe, seq_len=SEQ_LEN, shuffle=True, batch_size=24, sample_ids=True) as loader:
        assert {int(batch["source"].sum()) for batch in loader} == {6}
    with pytest.raises(ConfigError, match="`exact_per` must be a multiple of `lanes` = 7"):
        Loader(mixture=recipe, seq_len=SEQ_LEN, lanes=7)


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_every_world_size_has_the_same_global_batches(corpus: Path, shuffle: str) -> None:
    together = 192
    content = {"shuffle": shuffle, "chunk_tokens": 500, "window_tokens": 3000}
    with open_run(corpus, batch_size=together, **content) as loader:
        wanted = [first_ids(loader.batch_at(step, epoch=2)) for step in range(len(loader))]
    for world_size in (2, 3, 4, 6, 8, 64):
        with open_run(corpus, batch_size=together // world_size, **content) as loader:
            for step, ids in enumerate(wanted):
                ranks = [first_ids(loader.batch_at(step, 2, rank, world_size)) for rank in range(world_size)]
                assert [value for row in zip(*ranks, strict=True) for value in row] == ids


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("{", "not valid JSON"),
        ('{"sources": []}', "`sources` must be a list of sources"),
        ('{"sources": [{"name": "a", "data": "nowhere/", "weight": 1}]}', "nowhere"),
    ],
)
def test_an_unusable_mixture_is_refused(recipe: str, words: str) -> None:
    with pytest.raises((ConfigError, FileNotFoundError), match=words):
        Loader(mixture=recipe, seq_len=SEQ_LEN)


def test_a_mixture_and_data_exclude_each_other(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="`data` and `mixture` are both set"):
        Loader(corpus, mixture=mixture(corpus))
    with pytest.raises(ConfigError, match="fewer than `lanes` = 4096"):
        Loader(mixture=mixture(corpus), seq_len=SEQ_LEN, lanes=4096)


def test_the_cluster_can_configure_a_mixture(corpus: Path, tmp_path: Path) -> None:
    a, b, *_ = shards(corpus)
    file = tmp_path / "run.toml"
    file.write_text(
        f"seq_len = {SEQ_LEN}\nepochs = 'endless'\nmax_steps = 5\n[mixture]\nexhausted = 'repeat'\n"
        f"sources = [{{ name = 'a', data = '{a}', weight = 3 }}, {{ name = 'b', data = ['{b}'], weight = 1 }}]\n"
    )
    program = """
        import json, forebay
        loader = forebay.Loader.from_env()
        print(json.dumps([len(loader), len(list(loader)), loader.config["dp_rank"], loader.config["dp_world_size"],
                          [source["name"] for source in loader.stats()["sources"]]]))
    """
    names = {"FOREBAY_CONFIG": str(file), "FOREBAY_MODEL_PARALLEL_SIZE": "2", "RANK": "3", "WORLD_SIZE": "4"}
    assert json_from(program, env=clean_environment(**names)) == [5, 5, 1, 2, ["a", "b"]]


def test_a_mesh_says_the_data_parallel_rank(corpus: Path) -> None:
    pytest.importorskip("torch")
    from forebay.torch import DataLoader, TokenDataset

    class Mesh:
        """The part of a DeviceMesh that the loader uses."""

        def __init__(self, **sizes: tuple[int, int]) -> None:
            self.mesh_dim_names, self._dims = tuple(sizes), list(sizes.values())
            self.ndim = len(self._dims)

        def size(self, dim: int) -> int:
            return self._dims[dim][1]

        def get_local_rank(self, dim: int) -> int:
            return self._dims[dim][0]

    def ranks(mesh: Mesh, **more: Any) -> tuple[int, int]:
        loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), mesh=mesh, **more)
        return loader.config["dp_rank"], loader.config["dp_world_size"]

    assert ranks(Mesh(dp=(2, 4), tp=(1, 2))) == (2, 4)
    assert ranks(Mesh(dp_replicate=(1, 2), dp_shard=(3, 4), cp=(0, 8))) == (7, 8)
    assert ranks(Mesh(mine=(1, 3))) == (1, 3)
    with pytest.raises(ConfigError, match="needs a data-parallel dimension"):
        ranks(Mesh(pp=(0, 2), tp=(1, 2)))
    with pytest.raises(ConfigError, match="leave `dp_rank`"):
        ranks(Mesh(dp=(2, 4)), dp_rank=0, dp_world_size=4)
