"""Tests that batches of each format are those of `tests/golden/formats.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from golden_fields import documents, table
from golden_formats import GOLDEN, ORDER, SHOWN, hashed, text
from test_batch_formats import plain

import forebay

CASES = json.loads(GOLDEN.read_text())
NAMES = ["-".join(case["settings"][name] for name in ("batch_format", "layout")) for case in CASES]


def test_the_golden_formats_are_those_of_the_specification() -> None:
    assert GOLDEN.read_text() == text(), "run tests/python/golden_formats.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    for index, rows in enumerate(documents()):
        pq.write_table(table(rows), folder / f"{index}.parquet", row_group_size=3)
    return folder


def listed(value: Any) -> Any:
    """A batch as JSON has it."""
    return json.loads(json.dumps(plain(value)))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_batches_are_the_golden_ones(corpus: Path, case: dict[str, Any], library: str) -> None:
    settings = dict(case["settings"])
    # The format decides the targets.
    del settings["targets"]
    of_loader = {"batch_size": 2, "batch_format": settings.pop("batch_format"), **ORDER}
    if library == "numpy":
        loader: Any = forebay.Loader(corpus, seq_len=8, eos_id=99, **settings, **of_loader)
    else:
        of_torch = pytest.importorskip("forebay.torch")
        dataset = of_torch.TokenDataset(corpus, seq_len=8, eos_id=99, **settings)
        loader = of_torch.DataLoader(dataset, drop_last=True, **of_loader)
    found = [listed(batch) for batch in loader]
    assert found[:SHOWN] == case["first"]
    assert (len(found), hashed(found)) == (case["batches"], case["sha256"])
