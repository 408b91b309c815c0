"""Tests trainers of others.

They take a forebay loader as it is, see every batch, and resume at their position. Each test skips
itself if its trainer is not installed: requirements/trainers.txt.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import torch
import torch.distributed as dist
from support import clean_environment, first_ids, json_from, shown_for
from test_adapters import BaseDataLoader, RerunDataIterator, olmo_train

from forebay.torch import DataLoader, TokenDataset

SEQ_LEN = 8
STEPS = 9
ROWS = 4
VOCABULARY = STEPS * ROWS * SEQ_LEN + 1


def missing(package: str) -> str:
    return f"{package} is not installed: `make test-trainers`"


def needs(package: str) -> Any:
    return pytest.importorskip(package, reason=missing(package))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The last label of `targets="shifted"` is one more.
    tokens = STEPS * ROWS * SEQ_LEN + 1
    return corpora.unique_corpus(tmp_path_factory.mktemp("trainers") / "corpus", "parquet", tokens, shards=2)


def shown(consumer: str, corpus: Path, **names: Any) -> Any:
    """Runs the code of the docs.

    All ranks together get the batches that a single rank would get.
    """
    return shown_for(consumer, corpus=corpus, seq_len=SEQ_LEN, batch_size=ROWS // world_size(), **names)


def loader_of(corpus: Path) -> Any:
    loader = shown("plain loop", corpus)["loader"]
    assert len(loader) == STEPS
    return loader


def dataset_loader_of(corpus: Path) -> Any:
    """The same rows as a dataset that knows nothing of forebay, on threads."""
    rows = [{name: tensor for name, tensor in row.items()} for row in iter_rows(corpus)]
    generator = torch.Generator().manual_seed(3)
    batch_size = ROWS // world_size()
    return DataLoader(rows, batch_size=batch_size, shuffle=True, generator=generator, num_workers=2, drop_last=True)


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
    """Predicts the next token badly, and remembers its training data."""

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
    # A loader that has not begun is the template. It must have the keys of a loader that has.
    fresh = loader_of(corpus)
    dcp.load({"loader": fresh}, checkpoint_id=str(tmp_path / "checkpoint"))
    assert fresh.state_dict() == loader.state_dict()
    assert [first_ids(batch) for batch in fresh] == epochs(corpus, 1)[0][4:]


# Accelerate.


@pytest.fixture
def accelerator() -> Any:
    accelerate = needs("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


SYNCED = [False, False, False, True] * 2 + [True]


def accumulating(accelerator: Any, corpus: Path) -> tuple[Any, Callable[[Any], bool]]:
    """Makes a loader, and a function that trains on a batch.

    The function returns whether gradients were synchronised after the batch.
    """
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ours = loader_of(corpus)
    model, optimizer, loader = accelerator.prepare(model, optimizer, ours)
    assert loader is ours

    def train(batch: Any) -> bool:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            return bool(accelerator.sync_gradients)

    return loader, train


def test_accelerate_takes_the_step_of_a_partial_accumulation(corpus: Path, accelerator: Any) -> None:
    loader, train = accumulating(accelerator, corpus)
    for wanted in epochs(corpus, 2):
        found = [(first_ids(batch), train(batch)) for batch in loader]
        assert found == list(zip(wanted, SYNCED, strict=True))
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
    transformers = needs("transformers")
    needs("accelerate")

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=ROWS // world_size(), use_cpu=True,
        report_to=[], save_strategy="steps", save_steps=1, logging_strategy="no", disable_tqdm=True, learning_rate=0.1,
        **more,
    )  # fmt: skip
    trainer = shown("Hugging Face", corpus, Trainer=transformers.Trainer, model=Tiny(), args=arguments)["trainer"]
    trainer.get_eval_dataloader = lambda _=None: loader_of(corpus)
    # Otherwise the trainer treats its loss, a mean, as a part of the sum over all ranks.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def assert_evaluates(trainer: Any, corpus: Path) -> None:
    model = trainer.model
    trained = len(model.seen)
    found = trainer.evaluate()["eval_loss"]
    batches = list(loader_of(corpus))
    assert model.seen[trained:] == [first_ids(batch) for batch in batches]
    with torch.no_grad():
        loss = torch.stack([model(**batch)["loss"] for batch in batches]).mean()
    if world_size() > 1:
        dist.all_reduce(loss)
    assert found == pytest.approx(loss.item() / world_size(), rel=1e-4)
    del model.seen[trained:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_resumes_by_itself(corpus: Path, tmp_path: Path, accumulated: int) -> None:
    whole = hugging_face(corpus, tmp_path, gradient_accumulation_steps=accumulated)
    whole.train()
    wanted = flat(epochs(corpus, 2))
    assert whole.model.seen == wanted
    assert_evaluates(whole, corpus)
    an_epoch = -(-STEPS // accumulated)
    for steps in (2, an_epoch, an_epoch + 2):
        resumed = hugging_face(corpus, tmp_path / "again", gradient_accumulation_steps=accumulated)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
        trained = STEPS * (steps // an_epoch) + steps % an_epoch * accumulated
        assert resumed.model.seen == wanted[trained:]
        assert_equal(weights(resumed.model), weights(whole.model))


# Lightning.


def lightning(folder: Path) -> tuple[Any, Any]:
    module = needs("lightning")

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
        accelerator="cpu", devices=world_size(), max_epochs=2, callbacks=[kept], default_root_dir=str(folder),
        logger=False, enable_progress_bar=False, enable_model_summary=False,
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
    module = needs("lightning")
    fabric = module.Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(make(corpus))
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    fabric.save(tmp_path / "state.ckpt", {"loader": loader})
    fresh = fabric.setup_dataloaders(make(corpus))
    fabric.load(tmp_path / "state.ckpt", {"loader": fresh})
    assert [first_ids(batch) for batch in fresh] == epochs_of(make, corpus, 1)[0][4:]


# Tests with several ranks, or with processes of their own. Each rank calls one of these functions.
# It trains two epochs, stores in the middle of the second, and trains the rest of it again. It
# returns the first ids of both.

AT = STEPS + 4
Found = tuple[list[list[int]], list[list[int]]]


def two_epochs(loader: Any, store: Callable[[], Any], train: Callable[[Any], Any] = lambda _: None) -> list[list[int]]:
    seen: list[list[int]] = []
    for _ in range(2):
        for batch in loader:
            seen.append(first_ids(batch))
            train(batch)
            if len(seen) == AT:
                store()
    return seen


def rest_of(loader: Any) -> list[list[int]]:
    return [first_ids(batch) for batch in loader]


def plain(corpus: Path, folder: Path) -> Found:
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo")
    loader, fresh = loader_of(corpus), loader_of(corpus)
    loader.set_epoch(0)
    seen = two_epochs(loader, lambda: dcp.save({"loader": loader}, checkpoint_id=str(folder)))
    dcp.load({"loader": fresh}, checkpoint_id=str(folder))
    fresh.set_epoch(1)
    return seen, rest_of(fresh)


def accelerate(corpus: Path, folder: Path) -> Found:
    from accelerate import Accelerator, skip_first_batches

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    assert accelerator.num_processes == world_size()
    loader, train = accumulating(accelerator, corpus)
    synced: list[bool] = []
    seen = two_epochs(loader, lambda: accelerator.save_state(str(folder)), lambda batch: synced.append(train(batch)))
    assert synced == 2 * SYNCED
    accelerator.load_state(str(folder))
    rest = rest_of(loader)
    assert rest_of(skip_first_batches(accelerator.prepare(loader_of(corpus)), 5)) == seen[5:STEPS]
    return seen, rest


def hugging_face_trainer(corpus: Path, folder: Path) -> Found:
    whole = hugging_face(corpus, folder)
    whole.train()
    assert_evaluates(whole, corpus)
    rest = []
    for steps in (4, AT):
        resumed = hugging_face(corpus, folder / "again")
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps}"))
        rest = resumed.model.seen
        assert rest == whole.model.seen[steps:]
        assert_equal(weights(resumed.model), weights(whole.model))
    return whole.model.seen, rest


def lightning_trainer(corpus: Path, folder: Path, make: Any = loader_of) -> Found:
    whole, trainer = lightning(folder)
    trainer.fit(whole, make(corpus))
    resumed, trainer = lightning(folder / "again")
    assert trainer.world_size == world_size()
    trainer.fit(resumed, make(corpus), ckpt_path=str(folder / f"step={AT}.ckpt"))
    assert_equal(weights(resumed), weights(whole))
    return whole.tiny.seen, resumed.tiny.seen


def lightning_trainer_dataset(corpus: Path, folder: Path) -> Found:
    """Lightning gives each rank a DistributedSampler that it makes itself."""
    return lightning_trainer(corpus, folder, dataset_loader_of)


def lightning_fabric(corpus: Path, folder: Path) -> Found:
    from lightning import Fabric

    fabric = Fabric(accelerator="cpu", devices=world_size())
    fabric.launch()
    assert fabric.world_size == world_size()
    loader, fresh = (fabric.setup_dataloaders(loader_of(corpus)) for _ in range(2))
    seen = two_epochs(loader, lambda: fabric.save(folder / "state.ckpt", {"loader": loader}))
    fabric.load(folder / "state.ckpt", {"loader": fresh})
    return seen, rest_of(fresh)


def torchtitan(corpus: Path, folder: Path) -> Found:
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo")
    loader, fresh = (shown("torchtitan", corpus, BaseDataLoader=BaseDataLoader)["loader"] for _ in range(2))

    def take(batches: Any, count: int) -> list[list[int]]:
        return [next(batches)[0]["input"].view(-1, SEQ_LEN)[:, 0].tolist() for _ in range(count)]

    batches = iter(loader)
    seen = take(batches, AT)
    dcp.save({"dataloader": loader}, checkpoint_id=str(folder))
    seen += take(batches, 2 * STEPS - AT)
    dcp.load({"dataloader": fresh}, checkpoint_id=str(folder))
    return seen, take(iter(fresh), 2 * STEPS - AT)


def megatron(corpus: Path, folder: Path) -> Found:
    def take(batches: Any, count: int) -> list[list[int]]:
        return [next(batches)["tokens"][:, 0].tolist() for _ in range(count)]

    def make(state: Any) -> Any:
        return RerunDataIterator(shown("Megatron-LM", corpus, state=state)["loader"])

    loader = make(None)
    seen = take(loader, AT)
    # A file for each data-parallel rank.
    stored = folder / f"train_dataloader_dprank{os.environ['RANK']}.pt"
    torch.save({"dataloader_state_dict": loader.iterable.save_state()}, stored)
    seen += take(loader, 2 * STEPS - AT)
    fresh = make(torch.load(stored, weights_only=True)["dataloader_state_dict"])
    return seen, take(fresh, 2 * STEPS - AT)


def olmo_core(corpus: Path, folder: Path) -> Found:
    loader, fresh = (shown("OLMo-core", corpus)["loader"] for _ in range(2))
    assert loader.global_batch_size == ROWS * SEQ_LEN
    seen, state = olmo_train(loader, 2 * STEPS, AT)
    stored = folder / f"rank{os.environ['RANK']}.pt"
    torch.save(state, stored)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    rest, _ = olmo_train(fresh, 2 * STEPS - AT)
    seen, rest = ([[row[0] for row in batch] for batch in batches] for batches in (seen, rest))
    return seen, rest


def deepspeed(corpus: Path, folder: Path) -> Found:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.runtime.dataloader import RepeatingLoader

    def train(loader: Any, steps: int, resume: bool) -> list[list[int]]:
        model, seen = Tiny(), []
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), dist_init_required=True,
            config={"train_micro_batch_size_per_gpu": ROWS // world_size(), "gradient_accumulation_steps": 1},
        )  # fmt: skip
        if resume:
            _, client = engine.load_checkpoint(str(folder))
            loader.load_state_dict(client["loader"])
        for _, batch in zip(range(steps), RepeatingLoader(loader), strict=False):
            seen.append(first_ids(batch))
            engine.backward(engine(**batch)["loss"])
            engine.step()
            if len(seen) == AT:
                engine.save_checkpoint(str(folder), client_state={"loader": loader.state_dict()})
        return seen

    return train(loader_of(corpus), 2 * STEPS, False), train(loader_of(corpus), 2 * STEPS - AT, True)


def jax_arrays(corpus: Path, folder: Path) -> Found:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax
    import numpy as np

    if world_size() > 1:
        jax.distributed.initialize(f"127.0.0.1:{os.environ['MASTER_PORT']}", world_size(), int(os.environ["RANK"]))

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    loader, fresh = (shown("JAX", corpus)["loader"] for _ in range(2))
    arrays: list[Any] = []
    states: list[str] = []

    def train(batch: Any) -> None:
        whole = jax.make_array_from_process_local_data(sharding, batch["input_ids"].astype(np.int32))
        assert whole.shape == (ROWS, SEQ_LEN)
        arrays.append(whole)

    seen = two_epochs(loader, lambda: states.append(json.dumps(loader.state_dict())), train)
    for array, ids in zip(arrays, seen, strict=True):
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        found = [int(token) for shard in shards for token in np.asarray(shard.data)[:, 0]]
        assert found == ids, "an array changed after it was handed over"
    fresh.load_state_dict(json.loads(states[0]))
    return seen, rest_of(fresh)


def ray_train(corpus: Path, folder: Path) -> list[Found]:
    """Starts its two ranks itself."""
    import ray.train.torch

    def train(config: Any) -> None:
        loader = loader_of(corpus)
        states = []
        if config["state"] is None:
            seen = two_epochs(loader, lambda: states.append(loader.state_dict()))
        else:
            loader.load_state_dict(config["state"])
            seen = rest_of(loader)
        rank = ray.train.get_context().get_world_rank()
        (folder / f"{rank}.json").write_text(json.dumps([seen, *states]))

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    runs: list[Any] = []
    for state in (None, 1):
        ray.train.torch.TorchTrainer(
            train, train_loop_config={"state": state and runs[0][0][1]},
            scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=False),
            torch_config=ray.train.torch.TorchConfig("gloo"), run_config=ray.train.RunConfig(storage_path=str(folder)),
        ).fit()  # fmt: skip
        runs.append([json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)])
    return [(runs[0][rank][0], runs[1][rank][0]) for rank in range(2)]


CALL = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import json, test_trainers

found = getattr(test_trainers, sys.argv[1])(*map(Path, sys.argv[2:]))
print(json.dumps(found), flush=True)
if test_trainers.dist.is_initialized():
    test_trainers.dist.destroy_process_group()
"""


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def in_ranks(count: int, call: Any, *args: Path) -> list[Found]:
    """Calls `call` in `count` processes, like torchrun."""
    # DeepSpeed compiles a part of itself with the ninja beside this interpreter.
    names = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "OMP_NUM_THREADS": "1"}
    if count == 0:
        return json_from(CALL, call.__name__, *args, timeout=280, env=clean_environment(**names))  # type: ignore[no-any-return]
    names |= {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start(rank: int) -> Any:
        env = clean_environment(**names, RANK=str(rank), LOCAL_RANK=str(rank))
        return json_from(CALL, call.__name__, *args, timeout=280, env=env)

    with ThreadPoolExecutor(count) as pool:
        runs = [pool.submit(start, rank) for rank in range(count)]
    # The others only lose their peer when one rank fails, so the errors of all ranks are shown.
    errors = [f"rank {rank}: {run.exception()}" for rank, run in enumerate(runs) if run.exception()]
    assert not errors, "\n".join(errors)
    return [run.result() for run in runs]


#: The function, the package that it needs, and its number of processes. 0 if it starts its own.
RUNS = [
    (plain, "torch", 2),
    (accelerate, "accelerate", 2),
    (hugging_face_trainer, "transformers", 2),
    (lightning_trainer, "lightning", 2),
    (lightning_trainer_dataset, "lightning", 2),
    (lightning_fabric, "lightning", 2),
    (torchtitan, "torch", 2),
    (megatron, "torch", 2),
    (olmo_core, "torch", 2),
    (ray_train, "ray", 0),
    (deepspeed, "deepspeed", 1),
    (deepspeed, "deepspeed", 2),
    (jax_arrays, "jax", 1),
    (jax_arrays, "jax", 2),
]


@pytest.mark.parametrize("run, package, count", RUNS, ids=[f"{run.__name__}-{count or 2}" for run, _, count in RUNS])
def test_ranks_share_every_epoch_and_resume(corpus: Path, tmp_path: Path, run: Any, package: str, count: int) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(missing(package))
    found = in_ranks(count, run, corpus, tmp_path)
    for epoch in range(2):
        steps = slice(epoch * STEPS, (epoch + 1) * STEPS)
        shared = sorted(first for seen, _ in found for batch in seen[steps] for first in batch)
        assert shared == sorted(first for batch in epochs(corpus, 1)[0] for first in batch)
    for rank, (seen, rest) in enumerate(found):
        assert len(seen) == 2 * STEPS
        assert rest == seen[AT:]
        if run is not lightning_trainer_dataset:
            assert seen == [batch[rank :: len(found)] for batch in flat(epochs(corpus, 2))]
