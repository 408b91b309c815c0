"""Tests that models which keep documents apart have the losses of documents run alone.

An attention model gets `position_ids`, or a mask made of `cu_seqlens`. A state-space model gets
`doc_ids` as `seq_idx`.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")
pytest.importorskip("transformers", reason="transformers is not installed: `make test-trainers`")

import corpora
import torch
import torch.nn.functional as F
import transformers

from forebay.torch import DataLoader, TokenDataset

VOCABULARY = 64
SEQ_LEN = 48
#: Losses of the documents with these tokens, by places.
Losses = dict[tuple[int, ...], list[list[float]]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps torch from starting threads, which cost these tiny models more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    found: list[float] = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
    return found


def add_losses(found: Losses, model: Any, batch: Any, targets: str, **more: Any) -> None:
    """Runs the model on a batch, and adds the losses of each of its documents to `found`."""
    inputs, labels = ("input_ids", "labels") if targets == "labels" else ("x", "y")
    with torch.no_grad():
        logits = model(input_ids=batch[inputs], use_cache=False, **more).logits
    wanted = batch[labels]
    if targets == "labels":
        # The trainer shifts labels by one place.
        logits, wanted = logits[:, :-1], wanted[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    for row in range(len(batch[inputs])):
        for number in range(int(batch["doc_ids"][row].max()) + 1):
            places = (batch["doc_ids"][row] == number).nonzero()[:, 0].tolist()
            # A place has the loss of the next token.
            inside = [place for place in places if place < losses.shape[1] and wanted[row, place] != -100]
            tokens = [int(batch[inputs][row, place]) for place in places]
            if targets == "shifted" and len(inside) == len(places):
                # The last token of the row is a target alone.
                tokens.append(int(wanted[row, places[-1]]))
            found.setdefault(tuple(tokens), []).append([float(losses[row, place]) for place in inside])


def assert_as_alone(found: Losses, model: Any, known: list[list[int]]) -> None:
    assert sum(map(len, found.values())) == len(known)
    for document in known:
        assert found[tuple(document)].pop() == pytest.approx(losses_alone(model, document), abs=1e-5)


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
    found: Losses = {}
    for batch in DataLoader(dataset, batch_size=3):
        rows = len(batch["doc_ids"])
        more = {} if attention == "position_ids" else {"attention_mask": mask_of(batch["cu_seqlens"], rows)}
        add_losses(found, model, batch, targets, position_ids=batch["position_ids"], **more)
    assert_as_alone(found, model, known)


class WholeMamba2:
    """Passes `seq_idx` to the layers. transformers 5.24 loses it in `Mamba2ForCausalLM.forward`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Any, **more: Any) -> Any:
        hidden = self.model.backbone(input_ids, **more).last_hidden_state
        return SimpleNamespace(logits=self.model.lm_head(hidden))


def state_space_model(name: str) -> Any:
    """Makes a tiny model of state-space layers, with one layer of attention in `bamba`."""
    torch.manual_seed(1)
    if name == "mamba2":
        mamba2 = transformers.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=16,
            n_groups=2,
            state_size=8,
            chunk_size=16,
            time_step_limit=(0.0, float("inf")),
        )
        return WholeMamba2(transformers.Mamba2ForCausalLM(mamba2).eval())
    bamba = transformers.BambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        attn_layer_indices=[1],
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=16,
        max_position_embeddings=SEQ_LEN,
        attn_implementation="eager",
    )
    return transformers.BambaForCausalLM(bamba).eval()


def causal_conv(states: Any, weight: Any, bias: Any, activation: str, seq_idx: Any = None, **_more: Any) -> Any:
    """Convolves each token with the tokens before it that have the same `seq_idx`."""
    if seq_idx is None:
        seq_idx = states.new_zeros(states.shape[0], states.shape[2])
    length, width = states.shape[2], weight.shape[1]
    found = bias[None, :, None].expand(states.shape).clone()
    for back in range(min(width, length)):
        same = seq_idx[:, None, back:] == seq_idx[:, None, : length - back]
        found[:, :, back:] += weight[:, width - 1 - back, None] * states[:, :, : length - back] * same
    return transformers.activations.ACT2FN[activation](found)


def state_space_scan(
    states: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, seq_idx: Any = None, **_more: Any
) -> Any:
    """Steps through the tokens, and clears the state where `seq_idx` changes."""
    rows, length, heads, _ = states.shape
    B, C = (part.repeat_interleave(heads // part.shape[2], dim=2) for part in (B, C))
    dt = F.softplus(dt + dt_bias)
    state = states.new_zeros(rows, heads, states.shape[3], B.shape[3])
    found = []
    for place in range(length):
        if seq_idx is not None and place > 0:
            state = state * (seq_idx[:, place] == seq_idx[:, place - 1])[:, None, None, None]
        step = dt[:, place, :, None, None]
        taken = states[:, place, :, :, None] * B[:, place, :, None, :]
        state = state * torch.exp(A[:, None, None] * step) + taken * step
        found.append((state * C[:, place, :, None, :]).sum(-1) + D[:, None] * states[:, place])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("name", ["mamba2", "bamba"])
@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("targets", ["labels", "shifted"])
def test_losses_of_a_packed_state_space_model_are_those_of_documents_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, align: int, targets: str
) -> None:
    """Runs transformers' models with `doc_ids` as `seq_idx`.

    transformers keeps documents apart with the CUDA kernels of `mamba_ssm` and `causal_conv1d`
    alone. Without them, it refuses `seq_idx`. This test therefore puts two functions in their
    place, which step through the tokens as the kernels are documented. The documents alone run
    through transformers' own functions.
    """
    model = state_space_model(name)
    known = documents(random.Random(f"{name} {align}"))
    corpora.write_rows(tmp_path / "a.parquet", known)
    dataset = TokenDataset(tmp_path, seq_len=SEQ_LEN, layout="pack", pack_align=align, targets=targets)
    found: Losses = {}
    mixed: Losses = {}
    with monkeypatch.context() as patch:
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        patch.setattr(modeling, "causal_conv1d_fn", causal_conv)
        patch.setattr(modeling, "mamba2_chunk_scan", state_space_scan)
        for batch in DataLoader(dataset, batch_size=3):
            more = {"position_ids": batch["position_ids"]} if name == "bamba" else {}
            add_losses(found, model, batch, targets, seq_idx=batch["doc_ids"], **more)
            add_losses(mixed, model, batch, targets, **more)
    assert mixed != found, "the model must notice the documents before, else the test shows nothing"
    assert_as_alone(found, model, known)


@pytest.mark.parametrize("name", ["mamba2", "bamba"])
def test_losses_of_a_padded_state_space_model_are_those_of_documents_alone(tmp_path: Path, name: str) -> None:
    """Needs no kernel: a row holds one document, and padding comes after it."""
    model = state_space_model(name)
    known = documents(random.Random(name))
    corpora.write_rows(tmp_path / "a.parquet", known)
    dataset = TokenDataset(tmp_path, seq_len=SEQ_LEN, layout="pad", boundaries=True)
    found: Losses = {}
    for batch in DataLoader(dataset, batch_size=3):
        add_losses(found, model, batch, "labels", attention_mask=(batch["doc_ids"] >= 0).long())
    assert_as_alone(found, model, known)
