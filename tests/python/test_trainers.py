"""Protects: trainers that others wrote take a forebay loader as it is, see every batch, and resume where they were.

Each test skips itself where its trainer is not installed: requirements/trainers.txt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import torch
from support import first_ids

from forebay.torch import DataLoader, TokenDataset

SEQ_LEN = 8
STEPS = 9
ROWS = 4
VOCABULARY = STEPS * ROWS * SEQ_LEN + 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = STEPS * ROWS * SEQ_LEN
    return corpora.unique_corpus(tmp_path_factory.mktemp("trainers") / "corpus", "parquet", tokens, shards=2)


def loader_of(corpus: Path) -> Any:
    dataset = TokenDataset(corpus, seq_len=SEQ_LEN)
    loader = DataLoader(dataset, batch_size=ROWS, shuffle=True, seed=5, chunk_tokens=64, drop_last=True)
    assert len(loader) == STEPS
    return loader


def epochs(corpus: Path, count: int) -> list[list[list[int]]]:
    """The first tokens of each batch, as a plain loop gets them."""
    loader = loader_of(corpus)
    return [[first_ids(batch) for batch in loader] for _ in range(count)]


def flat(parts: list[list[Any]]) -> list[Any]:
    return [batch for part in parts for batch in part]


class Tiny(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Predicts the next token badly; remembers what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, 4, generator=generator))
        self.out = torch.nn.Parameter(torch.randn(4, VOCABULARY, generator=generator) / 2)
        self.seen: list[list[int]] = []

    def forward(self, input_ids: Any, labels: Any, **_: Any) -> Any:
        self.seen.append(first_ids({"input_ids": input_ids}))
        logits = self.table[input_ids] @ self.out
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def weights(model: Any) -> list[Any]:
    return [value.detach().clone() for value in model.parameters()]


def assert_equal(left: list[Any], right: list[Any]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_plain_loop_resumes_with_the_same_weights(corpus: Path, tmp_path: Path) -> None:
    def train(model: Any, optimizer: Any, loader: Any, steps: int) -> None:
        while steps:
            for batch in loader:
                optimizer.zero_grad()
                model(**batch)["loss"].backward()
                optimizer.step()
                if (steps := steps - 1) == 0:
                    break

    def make() -> tuple[Any, Any, Any]:
        model = Tiny()
        return model, torch.optim.Adam(model.parameters(), lr=0.1), loader_of(corpus)

    whole = make()
    train(*whole, 2 * STEPS)
    model, optimizer, loader = make()
    train(model, optimizer, loader, STEPS + 3)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
    torch.save(states, tmp_path / "state.pt")
    resumed = make()
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, name in zip(resumed, ("model", "optimizer", "loader"), strict=True):
        part.load_state_dict(states[name])
    train(*resumed, STEPS - 3)
    assert model.seen + resumed[0].seen == whole[0].seen == flat(epochs(corpus, 2))
    assert_equal(weights(resumed[0]), weights(whole[0]))


@pytest.mark.filterwarnings("ignore:.*(torch.distributed is|single process|deprecated).*")
def test_distributed_checkpoints_keep_the_position(corpus: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    loader = loader_of(corpus)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    dcp.save({"loader": loader}, checkpoint_id=str(tmp_path / "checkpoint"))
    # A loader that has not begun is the template: its keys must be those of one that has.
    fresh = loader_of(corpus)
    dcp.load({"loader": fresh}, checkpoint_id=str(tmp_path / "checkpoint"))
    assert fresh.state_dict() == loader.state_dict()
    assert [first_ids(batch) for batch in fresh] == epochs(corpus, 1)[0][4:]


# Accelerate.


@pytest.fixture
def accelerator() -> Any:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_accelerate_takes_the_step_of_a_partial_accumulation(corpus: Path, accelerator: Any) -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ours = loader_of(corpus)
    model, optimizer, loader = accelerator.prepare(model, optimizer, ours)
    assert loader is ours
    for wanted in epochs(corpus, 2):
        synced, seen = [], []
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                synced.append(accelerator.sync_gradients)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(first_ids(batch))
        assert seen == wanted
        assert synced == [False, False, False, True] * 2 + [True]
    assert accelerator.gradient_state.active_dataloader is None


@pytest.mark.parametrize("at", [3, STEPS])
def test_accelerate_stores_the_position(corpus: Path, tmp_path: Path, accelerator: Any, at: int) -> None:
    loader = accelerator.prepare(loader_of(corpus))
    iterator = iter(loader)
    for _ in range(at):
        next(iterator)
    accelerator.save_state(str(tmp_path / "state"))
    wanted = epochs(corpus, 2)
    rest = [first_ids(batch) for batch in iterator]
    assert rest == wanted[0][at:]
    accelerator.load_state(str(tmp_path / "state"))
    assert [first_ids(batch) for batch in loader] == (rest or wanted[1])


@pytest.mark.parametrize("skipped", [0, 5])
def test_accelerate_skips_first_batches(corpus: Path, accelerator: Any, skipped: int) -> None:
    from accelerate import skip_first_batches

    rest = skip_first_batches(accelerator.prepare(loader_of(corpus)), skipped)
    assert len(rest) == STEPS - skipped
    assert [first_ids(batch) for batch in rest] == epochs(corpus, 1)[0][skipped:]


# Hugging Face Trainer.


def hugging_face(corpus: Path, folder: Path, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):  # type: ignore[misc,name-defined]
        def get_train_dataloader(self) -> Any:
            return loader_of(corpus)

    class TellEpoch(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        """Trainer tells the epoch to whatever it iterates, which after a resume is a loader of its own making."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            parts["train_dataloader"].set_epoch(int(state.epoch))

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=ROWS, use_cpu=True, report_to=[],
        save_strategy="steps", save_steps=1, logging_strategy="no", disable_tqdm=True, learning_rate=0.1, **more,
    )  # fmt: skip
    return Trainer(model=Tiny(), args=arguments, callbacks=[TellEpoch()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_resumes_by_itself(corpus: Path, tmp_path: Path, accumulated: int) -> None:
    whole = hugging_face(corpus, tmp_path, gradient_accumulation_steps=accumulated)
    whole.train()
    wanted = flat(epochs(corpus, 2))
    assert whole.model.seen == wanted
    an_epoch = -(-STEPS // accumulated)
    for steps in (2, an_epoch, an_epoch + 2):
        resumed = hugging_face(corpus, tmp_path / "again", gradient_accumulation_steps=accumulated)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
        trained = STEPS * (steps // an_epoch) + steps % an_epoch * accumulated
        assert resumed.model.seen == wanted[trained:]
        assert_equal(weights(resumed.model), weights(whole.model))


# Lightning.


def lightning(folder: Path) -> tuple[Any, Any]:
    module = pytest.importorskip("lightning")

    class Model(module.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.tiny(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    kept = module.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = module.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, callbacks=[kept], default_root_dir=str(folder), logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    return Model(), trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_in_the_middle_of_an_epoch(corpus: Path, tmp_path: Path) -> None:
    whole, trainer = lightning(tmp_path)
    trainer.fit(whole, loader_of(corpus))
    wanted = flat(epochs(corpus, 2))
    assert whole.tiny.seen == wanted
    for steps in (4, STEPS + 4):
        resumed, trainer = lightning(tmp_path / "again")
        trainer.fit(resumed, loader_of(corpus), ckpt_path=str(tmp_path / f"step={steps}.ckpt"))
        assert resumed.tiny.seen == wanted[steps:]
        assert_equal(weights(resumed), weights(whole))


@pytest.mark.filterwarnings("ignore")
def test_fabric_keeps_the_state(corpus: Path, tmp_path: Path) -> None:
    module = pytest.importorskip("lightning")
    fabric = module.Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(loader_of(corpus))
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    fabric.save(tmp_path / "state.ckpt", {"loader": loader})
    fresh = fabric.setup_dataloaders(loader_of(corpus))
    fabric.load(tmp_path / "state.ckpt", {"loader": fresh})
    assert [first_ids(batch) for batch in fresh] == epochs(corpus, 1)[0][4:]
