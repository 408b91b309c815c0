"""Protects: trainers that others wrote take a forebay loader as it is, see every batch, and resume where they were.

Each test skips itself where its trainer is not installed: requirements/trainers.txt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import torch
from support import clean_environment, first_ids, json_from

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


def dataset_loader_of(corpus: Path) -> Any:
    """The same rows as a dataset that knows nothing of forebay, on threads."""
    rows = [{name: tensor for name, tensor in row.items()} for row in iter_rows(corpus)]
    generator = torch.Generator().manual_seed(3)
    return DataLoader(rows, batch_size=ROWS, shuffle=True, generator=generator, num_workers=2, drop_last=True)


def iter_rows(corpus: Path) -> Any:
    dataset = TokenDataset(corpus, seq_len=SEQ_LEN)
    return (dataset[index] for index in range(len(dataset)))


MAKERS = [loader_of, dataset_loader_of]


def epochs_of(make: Any, corpus: Path, count: int) -> list[list[list[int]]]:
    loader = make(corpus)
    return [[first_ids(batch) for batch in loader] for _ in range(count)]


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
@pytest.mark.parametrize("make", MAKERS)
def test_lightning_resumes_in_the_middle_of_an_epoch(corpus: Path, tmp_path: Path, make: Any) -> None:
    whole, trainer = lightning(tmp_path)
    trainer.fit(whole, make(corpus))
    wanted = flat(epochs_of(make, corpus, 2))
    assert whole.tiny.seen == wanted
    for steps in (4, STEPS + 4):
        resumed, trainer = lightning(tmp_path / "again")
        trainer.fit(resumed, make(corpus), ckpt_path=str(tmp_path / f"step={steps}.ckpt"))
        assert resumed.tiny.seen == wanted[steps:]
        assert_equal(weights(resumed), weights(whole))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MAKERS)
def test_fabric_keeps_the_state(corpus: Path, tmp_path: Path, make: Any) -> None:
    module = pytest.importorskip("lightning")
    fabric = module.Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(make(corpus))
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    fabric.save(tmp_path / "state.ckpt", {"loader": loader})
    fresh = fabric.setup_dataloaders(make(corpus))
    fabric.load(tmp_path / "state.ckpt", {"loader": fresh})
    assert [first_ids(batch) for batch in fresh] == epochs_of(make, corpus, 1)[0][4:]


# Two ranks, and what wants processes of its own. Each program trains two epochs, stores in the middle of the second,
# and trains the rest again; it prints the first ids of both.

PROGRAM = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from forebay.torch import DataLoader, TokenDataset

CORPUS, FOLDER = sys.argv[1:3]
SEQ_LEN, ROWS, AT = 8, 4, 2

def loader_of():
    return DataLoader(TokenDataset(CORPUS, seq_len=SEQ_LEN), batch_size=ROWS, shuffle=True, seed=5, chunk_tokens=64,
                      drop_last=True)

def ids(batch):
    return batch["input_ids"][:, 0].tolist()
"""

GLOO = (
    PROGRAM
    + """
import torch.distributed.checkpoint as dcp

dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=int(sys.argv[3]), world_size=2)
loader, seen, rest = loader_of(), [], []
for epoch in range(2):
    loader.set_epoch(epoch)
    for step, batch in enumerate(loader):
        seen.append(ids(batch))
        if (epoch, step) == (1, AT):
            dcp.save({"loader": loader}, checkpoint_id=f"{FOLDER}/checkpoint")
fresh = loader_of()
dcp.load({"loader": fresh}, checkpoint_id=f"{FOLDER}/checkpoint")
fresh.set_epoch(1)
rest = [ids(batch) for batch in fresh]
print(json.dumps([seen, rest, len(loader)]))
dist.destroy_process_group()
"""
)

ACCELERATE = (
    PROGRAM
    + """
from accelerate import Accelerator, InitProcessGroupKwargs

os.environ.update(RANK=sys.argv[3], LOCAL_RANK=sys.argv[3], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=sys.argv[4], ACCELERATE_USE_CPU="true")
dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=int(sys.argv[3]), world_size=2)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
loader, seen, rest = accelerator.prepare(loader_of()), [], []
for epoch in range(2):
    loader.set_epoch(epoch)
    for step, batch in enumerate(loader):
        seen.append(ids(batch))
        if (epoch, step) == (1, AT):
            accelerator.save_state(f"{FOLDER}/state")
accelerator.load_state(f"{FOLDER}/state")
rest = [ids(batch) for batch in loader]
print(json.dumps([seen, rest, len(loader)]))
dist.destroy_process_group()
"""
)


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def two_ranks(program: str, corpus: Path, folder: Path) -> list[Any]:
    from concurrent.futures import ThreadPoolExecutor

    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(json_from, program, corpus, folder, rank, port, timeout=240) for rank in range(2)]
        return [run.result() for run in runs]


def assert_resumed(found: Any) -> None:
    seen, rest, steps = found
    assert len(seen) == 2 * steps
    assert rest == seen[steps + 3 :]


@pytest.mark.parametrize("program", ["gloo", "accelerate"])
def test_two_ranks_share_every_epoch_and_resume(corpus: Path, tmp_path: Path, program: str) -> None:
    if program == "accelerate":
        pytest.importorskip("accelerate")
    found = two_ranks(GLOO if program == "gloo" else ACCELERATE, corpus, tmp_path)
    whole = DataLoader(
        TokenDataset(corpus, seq_len=SEQ_LEN),
        batch_size=2 * ROWS,
        shuffle=True,
        seed=5,
        chunk_tokens=64,
        drop_last=True,
    )
    wanted = [first_ids(batch) for _ in range(2) for batch in whole]
    for rank, run in enumerate(found):
        assert_resumed(run)
        assert run[0] == [batch[rank::2] for batch in wanted]


RAY = (
    PROGRAM
    + """
import ray, ray.train, ray.train.torch

def train(config):
    assert "RANK" in os.environ
    loader, seen = loader_of(), []
    if config.get("state"):
        loader.load_state_dict(config["state"])
        seen = [ids(batch) for batch in loader]
        state = None
    else:
        for epoch in range(2):
            for step, batch in enumerate(loader):
                seen.append(ids(batch))
                if (epoch, step) == (1, AT):
                    state = loader.state_dict()
    with open(f"{FOLDER}/ray-{ray.train.get_context().get_world_rank()}.json", "w") as file:
        json.dump([seen, state, len(loader)], file)

ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
scaling = ray.train.ScalingConfig(num_workers=2, use_gpu=False)
runs = []
for state in (None, 1):
    config = {} if state is None else {"state": runs[0][0][1]}
    ray.train.torch.TorchTrainer(
        train, train_loop_config=config, scaling_config=scaling, torch_config=ray.train.torch.TorchConfig("gloo"),
        run_config=ray.train.RunConfig(storage_path=FOLDER),
    ).fit()
    runs.append([json.load(open(f"{FOLDER}/ray-{rank}.json")) for rank in range(2)])
print(json.dumps([[runs[0][rank][0], runs[1][rank][0], runs[0][rank][2]] for rank in range(2)]))
"""
)


def test_ray_train_resumes(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for run in json_from(RAY, corpus, tmp_path, timeout=280):
        assert_resumed(run)


DEEPSPEED = (
    PROGRAM
    + """
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3],
                  DS_ACCELERATOR="cpu")
import deepspeed
from deepspeed.runtime.dataloader import RepeatingLoader

def engine_of():
    torch.manual_seed(0)
    model = torch.nn.Linear(SEQ_LEN, 1)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-6), dist_init_required=True,
        config={"train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": 1},
    )
    return engine

def train(engine, loader, steps, seen, at=None):
    batches = iter(RepeatingLoader(loader))
    for step in range(steps):
        batch = next(batches)
        seen.append(ids(batch))
        engine.backward(engine(batch["input_ids"].float()).mean())
        engine.step()
        if step == at:
            engine.save_checkpoint(f"{FOLDER}/deepspeed", client_state={"loader": loader.state_dict()})

loader, seen, rest = loader_of(), [], []
train(engine_of(), loader, 2 * len(loader), seen, len(loader) + AT)
engine, fresh = engine_of(), loader_of()
_, client = engine.load_checkpoint(f"{FOLDER}/deepspeed")
fresh.load_state_dict(client["loader"])
train(engine, fresh, len(loader) - AT - 1, rest)
print(json.dumps([seen, rest, len(loader)]))
"""
)


def test_deepspeed_resumes(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    # It compiles a part of itself, with the ninja that stands beside this interpreter.
    env = clean_environment(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert_resumed(json_from(DEEPSPEED, corpus, tmp_path, free_port(), timeout=280, env=env))


JAX = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
import forebay

def loader_of():
    return forebay.Loader(sys.argv[1], seq_len=8, batch_size=4, shuffle=True, seed=5, chunk_tokens=64,
                          dp_rank=jax.process_index(), dp_world_size=jax.process_count())

sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec("data"))
loader, seen, rest = loader_of(), [], []
arrays = []
for epoch in range(2):
    for step, batch in enumerate(loader):
        whole = jax.make_array_from_process_local_data(sharding, batch["input_ids"].astype(np.int32))
        assert len(whole.addressable_shards) == 2
        arrays.append(whole)
        seen.append(batch["input_ids"][:, 0].tolist())
        if (epoch, step) == (1, 2):
            state = loader.state_dict()
assert [np.asarray(array)[:, 0].tolist() for array in arrays] == seen, "an array changed after it was handed over"
fresh = loader_of()
fresh.load_state_dict(json.loads(json.dumps(state)))
rest = [batch["input_ids"][:, 0].tolist() for batch in fresh]
print(json.dumps([seen, rest, len(loader)]))
"""


def test_jax_arrays_are_sharded_and_keep_their_values(corpus: Path) -> None:
    pytest.importorskip("jax")
    assert_resumed(json_from(JAX, corpus, timeout=240))
