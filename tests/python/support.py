"""Parts that several test files share.

They make loaders from reference settings, turn batches to plain rows, and start processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference, Row, Settings, token_stream

HERE = Path(__file__).resolve().parent

# Every variable that can give ranks. Tests choose themselves which of them is set.
RANK_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_CPUS_PER_TASK", "SLURM_STEP_ID",
)  # fmt: skip


def arguments(settings: Settings) -> dict[str, Any]:
    """Converts reference settings to arguments of `Loader`."""
    given = dict(vars(settings))
    given["shuffle"] = False if settings.shuffle == "off" else settings.shuffle
    return given


def open_loader(data: Any, settings: Settings, **more: Any) -> Any:
    import forebay

    return forebay.Loader(data, **{**arguments(settings), **more})


def reference_of(data: Any, settings: Settings, *, column: str | None = None) -> Reference:
    stream = token_stream(data, column=column, bos_id=settings.bos_id, eos_id=settings.eos_id)
    return Reference(stream, settings)


def names_of(targets: str) -> tuple[str, str]:
    return ("x", "y") if targets == "shifted" else ("input_ids", "labels")


def assert_batch(batch: dict[str, Any], rows: list[Row], targets: str = "labels", where: str = "") -> None:
    """Asserts that all values are equal. A failure names the place of the first difference."""
    for name, wanted in zip(names_of(targets), zip(*rows, strict=True), strict=True):
        found = np.asarray(batch[name])
        expected = np.array(wanted, dtype=np.int64)
        assert found.shape == expected.shape, f"{where}: `{name}` has shape {found.shape}, expected {expected.shape}"
        if not np.array_equal(found, expected):
            row, column = np.argwhere(found != expected)[0]
            raise AssertionError(
                f"{where}: `{name}`[{row}, {column}] is {found[row, column]}, expected {expected[row, column]}; "
                f"row: {found[row, :12]}..., expected {expected[row, :12]}..."
            )


def first_ids(batch: dict[str, Any]) -> list[int]:
    """First token of each row. If tokens are unique, it identifies the sequence."""
    return [int(value) for value in np.asarray(batch["input_ids"])[:, 0]]


def clean_environment(**names: str) -> dict[str, str]:
    """The environment without ranks and `FOREBAY_*`, but with `names`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_") and k not in RANK_NAMES}
    path = os.pathsep.join(filter(None, [str(HERE), kept.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONPATH": path, **names}


def run_python(
    program: str, *args: Any, timeout: float = 120, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs `program` in a new interpreter, with a time limit."""
    command = [sys.executable, "-c", textwrap.dedent(program), *(str(arg) for arg in args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=env or clean_environment(), check=False
    )
    if check:
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done


def json_from(program: str, *args: Any, **more: Any) -> Any:
    """Last line of the output of `program`, as JSON."""
    return json.loads(run_python(program, *args, **more).stdout.splitlines()[-1])


def shown_for(consumer: str, **names: Any) -> dict[str, Any]:
    """Runs the code of docs/torch.md for a consumer, and returns its names."""
    text = (HERE.parents[1] / "docs" / "torch.md").read_text()
    blocks = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    [lines] = [block.splitlines() for block in blocks if consumer in block.splitlines()[0]]
    assert sum(line.startswith("+") for line in lines) <= 3, f"more than three lines change for {consumer}"
    exec("\n".join(line[1:] for line in lines if not line.startswith("-")), names)
    return names


def shown_by_a_browser(address: str, profile: Path, milliseconds: int = 5000) -> str:
    """The document at an address as Chromium holds it after some time. Skips the test without
    Chromium.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--disable-web-security",
    ]
    options += [f"--user-data-dir={profile}", f"--virtual-time-budget={milliseconds}", "--window-size=1600,1000"]
    done = subprocess.run([browser, *options, "--dump-dom", address], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
