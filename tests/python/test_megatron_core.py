"""Tests that `batch_format="megatron"` gives the batches of Megatron-LM's own dataset.

The code of `megatron.core` makes tokens, labels, masks and positions of the same rows. Its
documents end with an id, after which positions and attention begin anew.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")
pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed")

import corpora
import torch
from corpora import Cell
from megatron.core.datasets import gpt_dataset
from torch.utils.data import default_collate

from forebay.torch import DataLoader, TokenDataset

SEQ_LEN, ROWS, EOD = 16, 3, 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Megatron. Its documents have no end of their own."""
    draw = Random(3)
    lengths = [draw.choice([1, 2, 5, 20, 50]) for _ in range(30)]
    documents = [[draw.randrange(10, 30_000) for _ in range(length)] for length in lengths]
    cell = Cell("megatron", "megatron", dtype="i32")
    return corpora.write(cell, tmp_path_factory.mktemp("megatron"), [documents])


def of_megatron(text: Any, resets: bool) -> dict[str, Any]:
    """The sample that Megatron-LM makes of `SEQ_LEN + 1` ids."""
    config = SimpleNamespace(
        add_extra_token_to_sequence=True,
        tokenizer=SimpleNamespace(eod=EOD),
        reset_position_ids=resets,
        reset_attention_mask=resets,
        eod_mask_loss=resets,
        create_attention_mask=resets,
    )
    dataset = SimpleNamespace(
        config=config,
        _query_document_sample_shuffle_indices=lambda _: (text.numpy(), None),
        _pad_token_id=-1,
        masks_and_position_ids_are_cacheable=False,
        masks_and_position_ids_are_cached=False,
    )
    made: dict[str, Any] = gpt_dataset.GPTDataset.__getitem__(dataset, 0)
    return made


@pytest.mark.parametrize("resets", [False, True])
def test_batches_are_those_of_megatron_core(corpus: Path, resets: bool) -> None:
    settings: dict[str, Any] = {"seq_len": SEQ_LEN, "eos_id": EOD, "boundaries": resets, "document_mask": resets}
    loader = DataLoader(
        TokenDataset(corpus, **settings), batch_size=ROWS, shuffle=True, drop_last=True, batch_format="megatron"
    )
    plain = DataLoader(
        TokenDataset(corpus, seq_len=SEQ_LEN, eos_id=EOD, targets="shifted"),
        batch_size=ROWS, shuffle=True, drop_last=True,
    )  # fmt: skip
    steps = 0
    for made, rows in zip(loader, plain, strict=True):
        texts = torch.cat([rows["x"], rows["y"][:, -1:]], dim=1)
        wanted = default_collate([of_megatron(text, resets) for text in texts])
        # The label does not matter where the loss is masked.
        wanted["labels"] *= wanted["loss_mask"].long()
        assert set(wanted) == set(made) - {"cu_seqlens", "cu_seqlens_padded", "max_seqlen"}
        for name, tensor in wanted.items():
            assert made[name].dtype == tensor.dtype, name
            assert torch.equal(made[name], tensor), name
        steps += 1
    assert steps == len(loader) > 10
