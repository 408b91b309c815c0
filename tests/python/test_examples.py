"""Runs the examples on small data, as users run them. Each needs packages of its own."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import clean_environment

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")
pytestmark = [pytest.mark.thread_unsafe(reason="each test starts a process"), pytest.mark.timeout(600)]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*command: str, folder: Path) -> str:
    environment = clean_environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: `make test-trainers`")


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_the_demo_says_first_what_it_will_do(tmp_path: Path, quick: list[str]) -> None:
    # Nothing is installed at that time, so the program must need Python alone.
    said = run(sys.executable, "-I", "-S", str(EXAMPLES / "announce.py"), *quick, folder=tmp_path)
    assert all(re.search(rf"^  {word} +\S", said, re.MULTILINE) for word in ("download", "run", "disk", "afterwards"))
    recipe = (EXAMPLES.parent / "Makefile").read_text().split("\ndemo:")[1]
    assert recipe.index("announce.py") < recipe.index("$(SETUP)")


def test_the_quick_demo_holds(tmp_path: Path) -> None:
    said = run(sys.executable, str(EXAMPLES / "quick.py"), folder=tmp_path)
    assert said.count("holds:") == 3 and "proven" in said


def test_eight_consumers_share_a_pass(tmp_path: Path) -> None:
    assert "every row of the pass" in run(sys.executable, str(EXAMPLES / "eight_consumers.py"), folder=tmp_path)


def steps_of(said: str) -> dict[int, list[int]]:
    """The first ids of the rows of each step, over all ranks, sorted."""
    found: dict[int, list[int]] = {}
    # Two ranks may write into one line.
    for step, ids in re.findall(r"step (\d+) loss [\d.]+ first ids (\[[^\]]*\])", said):
        found.setdefault(int(step), []).extend(json.loads(ids))
    return {step: sorted(ids) for step, ids in found.items()}


def test_the_loop_of_nanogpt_goes_on_with_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the example trains with torch")
    np.arange(20_000).astype(np.uint16).tofile(tmp_path / "train.bin")
    one = [sys.executable, str(EXAMPLES / "nanogpt.py"), "train.bin", "--vocab-size", "20000"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *one[1:]]
    whole = steps_of(run(*one, "--steps", "8", "--out", "whole", folder=tmp_path))
    run(*one, "--steps", "4", "--out", "parts", folder=tmp_path)
    rest = steps_of(run(*two, "--steps", "8", "--out", "parts", folder=tmp_path))
    assert sorted(whole) == list(range(8)) and rest == {step: whole[step] for step in range(4, 8)}


def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    kernel = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=kernel).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("text/html" in data for data in shown) >= 3, "loader, plan and stats show themselves as tables"


def test_hugging_face_evaluates_and_resumes(tmp_path: Path) -> None:
    needs("transformers", "accelerate")
    said = run(sys.executable, str(EXAMPLES / "hugging_face.py"), folder=tmp_path)
    assert "as expected: True" in said and "loss of held-out rows" in said


def test_lightning_resumes(tmp_path: Path) -> None:
    needs("lightning")
    assert "as expected: True" in run(sys.executable, str(EXAMPLES / "lightning_gpt.py"), folder=tmp_path)


def test_trl_learns_the_answers(tmp_path: Path) -> None:
    needs("trl", "datasets")
    assert "the loss of answers went" in run(sys.executable, str(EXAMPLES / "trl_sft.py"), folder=tmp_path)


def test_jax_resumes(tmp_path: Path) -> None:
    needs("jax")
    assert "as expected: True" in run(sys.executable, str(EXAMPLES / "jax_loop.py"), folder=tmp_path)
