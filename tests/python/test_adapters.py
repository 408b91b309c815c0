"""Tests adapters for trainers with an interface of their own.

These trainers get their batches for two epochs, and after a resume in the middle. The stand-ins
have the published interfaces: torchtitan's abstract class, the calls of Megatron-LM on an external
iterator, and the steps of OLMo-core's trainer around an epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import torch
from support import shown_for
from torch.distributed.checkpoint.stateful import Stateful

import forebay
from forebay import adapters
from forebay.torch import DataLoader, TokenDataset

SEQ_LEN = 8
ROWS = 4
STEPS = 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "corpus"
    return corpora.unique_corpus(folder, "parquet", STEPS * ROWS * SEQ_LEN + 1, shards=2)


def loader_of(corpus: Path, targets: Any = "shifted", **more: Any) -> Any:
    dataset = TokenDataset(corpus, seq_len=SEQ_LEN, targets=targets)
    return DataLoader(dataset, **{"batch_size": ROWS, "shuffle": True, "drop_last": True, **more})


def shown(consumer: str, corpus: Path, **names: Any) -> Any:
    return shown_for(consumer, corpus=corpus, seq_len=SEQ_LEN, batch_size=ROWS, **names)["loader"]


def epochs(corpus: Path, name: str, targets: Any = "shifted") -> list[Any]:
    loader = loader_of(corpus, targets)
    return [batch[name].tolist() for _ in range(2) for batch in loader]


class BaseDataLoader(Stateful, ABC):
    @abstractmethod
    def __iter__(self) -> Any: ...


@pytest.mark.parametrize("flat", [True, False])
def test_torchtitan(corpus: Path, flat: bool) -> None:
    loader = (
        shown("torchtitan", corpus, BaseDataLoader=BaseDataLoader)
        if flat
        else adapters.torchtitan(loader_of(corpus), BaseDataLoader, flat=False)
    )
    assert isinstance(loader, BaseDataLoader)
    assert isinstance(loader, Stateful)
    batches = iter(loader)
    found, state = [], None
    for step in range(2 * STEPS):
        if step == STEPS + 3:
            state = loader.state_dict()
        inputs, labels = next(batches)
        assert torch.equal(inputs["input"].view(ROWS, -1)[:, 1:], labels.view(ROWS, -1)[:, :-1])
        if flat:
            assert inputs["input"].shape == labels.shape == inputs["positions"].shape == (ROWS * SEQ_LEN,)
            assert inputs["positions"].tolist() == list(range(SEQ_LEN)) * ROWS
        found.append(inputs["input"].view(ROWS, -1).tolist())
    assert found == epochs(corpus, "x")
    fresh = adapters.torchtitan(loader_of(corpus), BaseDataLoader, flat=flat)
    fresh.load_state_dict(state)
    rest = iter(fresh)
    assert [next(rest)[0]["input"].view(ROWS, -1).tolist() for _ in range(STEPS - 3)] == found[STEPS + 3 :]
    fresh.close()


class RerunDataIterator:
    """The wrapper of Megatron-LM around an external iterator."""

    def __init__(self, iterable: Any) -> None:
        self.iterable = iterable

    def __next__(self) -> Any:
        return next(self.iterable)


def test_megatron(corpus: Path, tmp_path: Path) -> None:
    iterator = RerunDataIterator(shown("Megatron-LM", corpus, state=None))
    found = []
    for step in range(2 * STEPS):
        if step == STEPS + 3:
            torch.save({"dataloader_state_dict": iterator.iterable.save_state()}, tmp_path / "state.pt")
        batch = next(iterator)
        assert batch["loss_mask"].dtype == torch.float32 and batch["loss_mask"].sum() == ROWS * SEQ_LEN
        assert all(tensor.is_contiguous() and tensor.shape == (ROWS, SEQ_LEN) for tensor in batch.values())
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert batch["position_ids"][1].tolist() == list(range(SEQ_LEN))
        found.append(batch["tokens"].tolist())
    assert found == epochs(corpus, "x")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["dataloader_state_dict"]
    fresh = shown("Megatron-LM", corpus, state=state)
    assert [next(fresh)["tokens"].tolist() for _ in range(STEPS - 3)] == found[STEPS + 3 :]


def test_megatron_masks_what_is_padded(corpus: Path) -> None:
    iterator = adapters.megatron(loader_of(corpus, batch_size=5, remainder="pad"))
    batches = [next(iterator) for _ in range(-(-STEPS * ROWS // 5))]
    masked = sum(int((batch["loss_mask"] == 0).sum()) for batch in batches)
    assert masked == (-STEPS * ROWS % 5) * SEQ_LEN
    assert all(int(batch["labels"].min()) >= 0 for batch in batches)


def olmo_train(loader: Any, batches: int, at: int | None = None) -> tuple[list[Any], Any]:
    """The trainer's loop: epochs from 1, a reset after each."""
    found: list[Any] = []
    state = None
    while len(found) < batches:
        loader.reshuffle(None if not loader.batches_processed else loader.epoch)
        for batch in loader:
            assert batch["input_ids"].numel() == loader.rank_batch_size
            found.append(batch["input_ids"].tolist())
            if len(found) == at:
                state = loader.state_dict()
            if len(found) == batches:
                break
        else:
            loader.reset()
    return found, state


@pytest.mark.parametrize("at", [3, STEPS + 3])
def test_olmo_core(corpus: Path, at: int) -> None:
    loader = shown("OLMo-core", corpus)
    found, state = olmo_train(loader, 2 * STEPS, at)
    assert found == epochs(corpus, "input_ids", "labels")
    fresh = adapters.olmo(loader_of(corpus, "labels"))
    with pytest.raises(RuntimeError, match="reshuffle"):
        _ = fresh.epoch
    fresh.load_state_dict(state)
    assert fresh.batches_processed == at % STEPS and fresh.epoch == at // STEPS + 1
    assert olmo_train(fresh, 2 * STEPS - at)[0] == found[at:]


def test_olmo_core_is_told_sizes_in_tokens(corpus: Path) -> None:
    loader = adapters.olmo(loader_of(corpus, "labels", dp_rank=1, dp_world_size=3), fs_local_rank=2)
    assert (loader.dp_rank, loader.dp_world_size, loader.fs_local_rank) == (1, 3, 2)
    assert loader.rank_batch_size == ROWS * SEQ_LEN and loader.global_batch_size == 3 * ROWS * SEQ_LEN
    assert loader.total_batches == len(loader) == loader.batches_in_epoch(1) == STEPS // 3
    assert loader.get_mock_batch()["input_ids"].shape == (ROWS, SEQ_LEN)
    assert loader.global_num_tokens_in_batch({}) == loader.global_batch_size
    with pytest.raises(ValueError, match="1 or more"):
        loader.reshuffle(0)


def test_wrong_targets_are_refused_with_the_remedy(corpus: Path) -> None:
    for adapter in (adapters.torchtitan, adapters.megatron):
        with pytest.raises(forebay.ConfigError, match='targets="shifted"'):
            adapter(loader_of(corpus, "labels"))
    with pytest.raises(forebay.ConfigError, match='targets="labels"'):
        adapters.olmo(loader_of(corpus))
    with pytest.raises(forebay.ConfigError, match="drop_last=True"):
        adapters.olmo(loader_of(corpus, "labels", drop_last=False))
