"""Tests that transformers and TRL take the batches of their formats.

Their own collators make the expected batches, and a tiny Llama gives the expected losses.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")
pytest.importorskip("transformers", reason="transformers is not installed: `make test-trainers`")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

import forebay
from forebay import adapters
from forebay.torch import DataLoader, TokenDataset

VOCABULARY = 64
SEQ_LEN = 32
ROWS = 3
PAD = 0
IGNORED = -100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and answers. Labels exist for answers alone."""
    folder = tmp_path_factory.mktemp("consumers")
    draw = random.Random(4)
    documents = [[draw.randrange(1, VOCABULARY) for _ in range(draw.choice([3, 8, 15, 32]))] for _ in range(40)]
    prompts = [draw.randrange(1, len(document)) for document in documents]
    labels = [[IGNORED] * prompt + document[prompt:] for document, prompt in zip(documents, prompts, strict=True)]
    masks = [[int(label != IGNORED) for label in row] for row in labels]
    table = pa.table(
        {
            "input_ids": pa.array(documents, pa.list_(pa.int32())),
            "labels": pa.array(labels, pa.list_(pa.int64())),
            "completion_mask": pa.array(masks, pa.list_(pa.int8())),
        }
    )
    pq.write_table(table, folder / "a.parquet")
    return folder


def open_loader(corpus: Path, name: str, field: str = "labels", **more: Any) -> Any:
    dataset = TokenDataset(corpus, seq_len=SEQ_LEN, fields=[field], layout=more.pop("layout", "pack"))
    return DataLoader(dataset, batch_size=ROWS, batch_format=name, drop_last=True, pad_id=PAD, **more)


def same(made: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(made) == set(wanted)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert made[name].dtype == value.dtype, name
            assert torch.equal(made[name], value), name
        else:
            assert made[name] == value and type(made[name]) is type(value), name


def documents_of(batch: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The documents of a packed batch, and its padding."""
    borders = batch["cu_seq_lens_q"].tolist()
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return [{"input_ids": ids[start:end], "labels": labels[start:end]} for start, end in pairwise(borders)]


@pytest.mark.parametrize("field", ["labels", "completion_mask"])
def test_packed_batches_are_those_of_the_collators(corpus: Path, field: str) -> None:
    of_transformers = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    for batch in open_loader(corpus, "hf-packed", field):
        same(batch, of_transformers(documents_of(batch)))


def test_packed_batches_are_those_of_trl(corpus: Path) -> None:
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason="TRL is not installed")
    collator = sft.DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
    for batch in open_loader(corpus, "hf-packed"):
        same(batch, collator(documents_of(batch)))


def test_padded_batches_are_those_of_trl(corpus: Path) -> None:
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason="TRL is not installed")
    collator = sft.DataCollatorForLanguageModeling(pad_token_id=PAD, pad_to_multiple_of=SEQ_LEN)
    rows = pq.read_table(corpus).select(["input_ids", "labels"]).to_pylist()
    batches = list(open_loader(corpus, "hf", layout="pad"))
    assert len(batches) == len(rows) // ROWS
    for number, batch in enumerate(batches):
        same(batch, collator(rows[number * ROWS : (number + 1) * ROWS]))


def llama(attention: str, places: int = SEQ_LEN) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=places,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).double()


def loss_alone(model: Any, documents: list[dict[str, Any]]) -> float:
    """The mean loss of the targets of documents that the model reads one by one."""
    total, targets = 0.0, 0
    for document in documents:
        ids, labels = (torch.tensor([document[name]]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        wanted = labels[0, 1:]
        total += float(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
        targets += int((wanted != IGNORED).sum())
    return total / targets


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "layout"), [("hf", "pad"), ("hf", "pack"), ("hf-packed", "pack")])
@torch.no_grad()
def test_a_model_has_the_losses_of_documents_alone(corpus: Path, name: str, layout: str, attention: str) -> None:
    model = llama(attention).eval()
    rows = pq.read_table(corpus).select(["input_ids", "labels"]).to_pylist()
    for batch in open_loader(corpus, name, layout=layout):
        ids = [row for row in batch["input_ids"].flatten().tolist()]
        documents = [row for row in rows if contains(ids, row["input_ids"])]
        assert float(model(**batch, use_cache=False).loss) == pytest.approx(loss_alone(model, documents), abs=1e-6)


def contains(ids: list[int], document: list[int]) -> bool:
    length = len(document)
    return any(ids[at : at + length] == document for at in range(len(ids) - length + 1))


@pytest.mark.parametrize(("name", "layout"), [("hf", "pad"), ("hf", "pack"), ("hf-packed", "pack")])
def test_trainer_trains_on_every_batch(corpus: Path, tmp_path: Path, name: str, layout: str) -> None:
    loader = open_loader(corpus, name, layout=layout)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, learning_rate=0.0, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = llama("sdpa")
    trainer = transformers.Trainer(model=model, args=arguments)
    adapters.hugging_face(trainer, loader)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    with torch.no_grad():
        wanted = [float(model(**batch, use_cache=False).loss) for batch in open_loader(corpus, name, layout=layout)]
    assert losses == pytest.approx(wanted, abs=2e-4)


def test_the_programs_of_the_page_on_fine_tuning_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text()
    programs = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shown: dict[str, Any] = {"model": llama("sdpa", places=128)}
    for program in programs:
        exec(compile(program, "docs/fine-tuning.md", "exec"), shown)
    trainer = shown["trainer"]
    assert trainer.state.global_step == 5
    assert float(shown["loss"]) > 0

    # The rows for evaluation are the other examples, with labels for the answers alone.
    trained = TokenDataset("chats.parquet", fields=["labels"], seq_len=128, layout="pad", holdout=20)
    assert len(shown["held_out"]) == 1_000 - len(trained) > 0
    model = trainer.model.eval()
    losses = []
    with torch.no_grad():
        for batch in DataLoader(shown["held_out"], batch_size=trainer.args.per_device_eval_batch_size):
            targets = batch["labels"] != -100
            # The answers of the page have two or three tokens, from 10 on.
            assert set(targets.sum(1).tolist()) <= {2, 3} and (batch["labels"][targets] >= 10).all()
            losses += [float(model(**batch).loss)] * len(targets)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def test_a_packed_run_resumes_at_the_end_of_an_epoch_and_is_refused_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text()
    data, loop, program = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []

    def run(steps: int, call: str = "", save: str = "epoch") -> None:
        model = llama("sdpa", places=128)
        forward = model.forward
        model.forward = lambda **batch: seen.append(batch["labels"].tolist()) or forward(**batch)
        shown: dict[str, Any] = {"model": model}
        exec(compile(loop[: loop.index("for batch")], "docs/fine-tuning.md", "exec"), shown)
        text = program.replace("max_steps=5", f"max_steps={steps}, save_steps=1").replace('"epoch"', f'"{save}"')
        text = text.replace("trainer.train()\ntrainer.evaluate()", f"trainer.train({call})")
        seen.clear()
        exec(compile(text, "docs/fine-tuning.md", "exec"), shown)

    exec(compile(data, "docs/fine-tuning.md", "exec"), {})
    run(12)
    wanted = list(seen)
    assert len(wanted) == 12 and all(len(labels) == 1 for labels in wanted), "batches are packed"
    run(12, 'resume_from_checkpoint="out/checkpoint-10"')
    assert seen == wanted[10:]
    run(3, save="steps")
    with pytest.raises(forebay.ConfigError, match="cannot resume within an epoch"):
        run(12, 'resume_from_checkpoint="out/checkpoint-3"')
    assert seen == []


def test_the_programs_of_the_page_on_hugging_face_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "from-hugging-face.md").read_text()
    programs = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenised").mkdir()
    pq.write_table(pa.table({"input_ids": [[1, 2, 3, 4]] * 1_000}), tmp_path / "tokenised" / "a.parquet")
    shown: dict[str, Any] = {"model": llama("sdpa", places=128)}
    assert "save_to_disk" in programs[0], "test_docs.py runs it, with datasets"
    for program in programs[1:]:
        exec(compile(program, "docs/from-hugging-face.md", "exec"), shown)
    assert shown["trainer"].state.global_step == 5
    assert "eval_loss" in shown["trainer"].evaluate()
    every = len(TokenDataset("tokenised", seq_len=64))
    assert len(shown["dataset"]) + len(shown["held_out"]) == every and len(shown["held_out"]) == every // 8
