"""Tests that a model with attention inside documents has the losses of documents run alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")
pytest.importorskip("transformers", reason="transformers is not installed: `make test-trainers`")

import corpora
import torch
import transformers

from forebay.torch import DataLoader, TokenDataset

VOCABULARY = 64
SEQ_LEN = 48


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def documents(draw: random.Random) -> list[list[int]]:
    lengths = [draw.choice([2, 3, 7, 20, 45]) for _ in range(40)]
    return [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def losses_alone(model: Any, document: list[int]) -> list[float]:
    ids = torch.tensor([document])
    logits = model(input_ids=ids).logits[0]
    found: list[float] = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
    return found


def mask_of(cu_seqlens: Any, rows: int) -> Any:
    """An additive mask that lets a token see the tokens before it between the same borders."""
    owner = torch.bucketize(torch.arange(rows * SEQ_LEN), cu_seqlens[1:].long(), right=True).view(rows, SEQ_LEN)
    sees = (owner[:, :, None] == owner[:, None, :]) & torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    mask = torch.zeros(rows, 1, SEQ_LEN, SEQ_LEN, dtype=torch.float64)
    return mask.masked_fill(~sees[:, None], torch.finfo(torch.float64).min)


@pytest.mark.parametrize("attention", ["position_ids", "cu_seqlens"])
@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("targets", ["labels", "shifted"])
def test_losses_of_packed_documents_are_those_of_documents_alone(
    tmp_path: Path, model: Any, attention: str, align: int, targets: str
) -> None:
    known = documents(random.Random(f"{attention} {align}"))
    corpora.write_rows(tmp_path / "a.parquet", known)
    dataset = TokenDataset(tmp_path, seq_len=SEQ_LEN, layout="pack", pack_align=align, targets=targets)
    inputs, labels = ("input_ids", "labels") if targets == "labels" else ("x", "y")
    found: dict[tuple[int, ...], list[list[float]]] = {}
    for batch in DataLoader(dataset, batch_size=3):
        rows = len(batch[inputs])
        more = {} if attention == "position_ids" else {"attention_mask": mask_of(batch["cu_seqlens"], rows)}
        with torch.no_grad():
            logits = model(input_ids=batch[inputs], position_ids=batch["position_ids"], use_cache=False, **more).logits
        wanted = batch[labels]
        if targets == "labels":
            # The trainer shifts labels by one place.
            logits, wanted = logits[:, :-1], wanted[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        for row in range(rows):
            for number in range(int(batch["doc_ids"][row].max()) + 1):
                places = (batch["doc_ids"][row] == number).nonzero()[:, 0].tolist()
                # The loss at a place is that of the next token.
                inside = [place for place in places if place < losses.shape[1] and wanted[row, place] != -100]
                tokens = [int(batch[inputs][row, place]) for place in places]
                if targets == "shifted" and len(inside) == len(places):
                    # The last token of the row is a target alone.
                    tokens.append(int(wanted[row, places[-1]]))
                found.setdefault(tuple(tokens), []).append([float(losses[row, place]) for place in inside])
    assert sum(map(len, found.values())) == len(known)
    for document in known:
        alone = losses_alone(model, document)
        assert found[tuple(document)].pop() == pytest.approx(alone, abs=1e-5)
