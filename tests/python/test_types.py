"""Tests the types that users see. The stub matches the module, and a strict program checks."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from support import clean_environment

import forebay

needs_mypy = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")

PROGRAM = '''
from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from forebay import ConfigError, DataError, ForebayError, Loader, NotFoundError, StateMismatchError


def train(data: str | Path | list[str]) -> int:
    """A training loop as users write it."""
    tokens = 0
    with Loader(data, seq_len=128, batch_size=4, shuffle=True, seed=1, remainder="pad", eos_id=0) as loader:
        loader.set_epoch(1)
        steps: int = len(loader)
        state: dict[str, int | str] = loader.state_dict()
        loader.load_state_dict(state)
        for batch in loader:
            ids: npt.NDArray[np.generic] = batch["input_ids"]
            tokens += ids.size
        first = loader.batch_at(0, epoch=2, rank=0, world_size=1)
        rows = loader.sequences_at(0, 0, 2)
        tokens += steps + first["labels"].size + rows["labels"].size + loader.num_sequences
        verdict: str = loader.verdict()
    print(verdict)
    return tokens


def place(error: ForebayError) -> str:
    """Reads the location that exceptions carry."""
    if isinstance(error, DataError):
        path: str | None = str(error.path) if error.path is not None else None
        block: int | None = error.block
        row: int | None = error.row
        return f"{path} {block} {row}"
    return str(isinstance(error, (ConfigError, NotFoundError, StateMismatchError)))
'''

#: The types of batches.
TYPED = """
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch

from forebay import Loader
from forebay.batches import HfBatch
from forebay.torch import DataLoader, TokenDataset

Longs = npt.NDArray[np.int64]


def step(batch: HfBatch) -> int:
    return batch["input_ids"].size


def count(batch: HfBatch) -> tuple[HfBatch, int]:
    return batch, step(batch)


for a in Loader("corpus"):
    assert_type(a["labels"], Longs)
for b in Loader("corpus", targets="shifted", seq_len=8):
    assert_type(b["y"], Longs)
for c in Loader("corpus", batch_format="hf"):
    assert_type(c["labels"], Longs)
    step(c)
for d in Loader("corpus", batch_format="hf-packed", layout="pack"):
    assert_type(d["max_length_q"], int)
for inputs, labels in Loader("corpus", batch_format="titan"):
    assert_type(inputs["positions"], Longs)
    assert_type(labels, Longs)
for e in Loader("corpus", batch_format="megatron"):
    assert_type(e["loss_mask"], npt.NDArray[np.float32])
for f in Loader("corpus", batch_format="olmo"):
    assert_type(f["label_mask"], npt.NDArray[np.bool_])
for x, y in Loader("corpus", batch_format="xy"):
    assert_type(y, Longs)
for g in Loader("corpus", batch_format="jax"):
    assert_type(g["targets"], npt.NDArray[np.int32])
for h in Loader("corpus", fields=["score"]):
    assert_type(h, dict[str, Any])
for p in Loader("corpus", fields=["labels", "loss_mask", "weights"]):
    assert_type(p["labels"], Longs)
    assert_type(p["weights"], npt.NDArray[np.float32])
for q in Loader("corpus", fields=("labels",), batch_format="olmo"):
    assert_type(q["labels"], Longs)
for r in Loader("corpus", fields=["labels", "score"], batch_format="hf"):
    assert_type(r, dict[str, Any])
for i in Loader("corpus", batch_format="hf", transform=count):
    assert_type(i[1], int)
assert_type(Loader("corpus", batch_format="hf").batch_at(0)["labels"], Longs)
for part in Loader("corpus", batch_format="hf").split(2):
    for j in part:
        assert_type(j["labels"], Longs)
dataset = TokenDataset("corpus", layout="pack")
for k in DataLoader(dataset, 8, True, batch_format="hf", num_workers=2):
    assert_type(k["input_ids"], torch.Tensor)
for l in DataLoader(dataset, batch_size=8, batch_format="hf-packed"):
    assert_type(l["max_length_k"], int)
for m, n in DataLoader(dataset, batch_size=8, batch_format="xy"):
    assert_type(n, torch.Tensor)
for o in DataLoader(dataset, batch_size=8, transform=len):
    assert_type(o, int)
passes = iter(DataLoader(dataset))
assert_type(next(passes)["labels"], torch.Tensor)
passes.close()
"""

WRONG = """
from forebay import Loader

Loader("corpus", seq_len="long")
Loader("corpus", sequence_length=3)
Loader("corpus").num_sequenses
for batch in Loader("corpus", batch_format="hf", fields=["labels"]):
    batch["input_idz"]
"""


def mypy(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(path.parent / "cache"), str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=path.parent, env=clean_environment(), check=False
    )


@needs_mypy
def test_a_strict_program_checks(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    done = mypy(path)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_mypy
def test_batches_have_the_types_of_their_format(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="types of tensors")
    path = tmp_path / "typed.py"
    path.write_text(TYPED)
    done = mypy(path)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_mypy
def test_mistakes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    done = mypy(path)
    for line in (4, 5, 6, 8):
        assert f"wrong.py:{line}: error" in done.stdout, done.stdout


@needs_mypy
def test_the_stub_says_what_the_module_has() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "forebay._core"],
        capture_output=True, text=True, timeout=280, env=clean_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert forebay.__file__ is not None
    folder = Path(forebay.__file__).parent
    assert (folder / "py.typed").exists()
    assert (folder / "_core.pyi").exists()


def test_public_names_are_documented() -> None:
    for name in ("Loader", "ForebayError", "ConfigError", "DataError", "NotFoundError", "StateMismatchError"):
        assert inspect.getdoc(getattr(forebay, name)), name
    for name in ("set_epoch", "state_dict", "load_state_dict", "batch_at", "sequences_at", "stats", "verdict", "close"):
        assert inspect.getdoc(getattr(forebay.Loader, name)), name
