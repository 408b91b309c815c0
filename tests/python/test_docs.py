"""Runs the programs that the README and the pages show.

Each runs as it stands. Only positions that lie past a small corpus are replaced.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="most of what is shown is for torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import numpy as np
import object_stores
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from object_stores import S3

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SEQUENCES = 400
#: The pages, each with the number of programs that it shows.
PAGES = {
    "README.md": 1,
    "docs/clusters.md": 4,
    "docs/data.md": 2,
    "docs/fine-tuning.md": 3,
    "docs/formats.md": 2,
    "docs/from-bin.md": 2,
    "docs/from-hugging-face.md": 3,
    "docs/from-litdata.md": 2,
    "docs/from-megatron.md": 2,
    "docs/from-pytorch.md": 1,
    "docs/layouts.md": 3,
    "docs/mixtures.md": 1,
    "docs/monitoring.md": 1,
    "docs/performance.md": 1,
    "docs/quick-start.md": 4,
    "docs/remote.md": 1,
    "docs/resume.md": 4,
    "docs/runs.md": 3,
    "docs/service.md": 1,
    "docs/torch.md": 3,
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "raw").mkdir()
    ids = np.random.default_rng(2).integers(0, 50_257, 8192)
    ids[99::100] = 50_256
    ids.astype(np.uint16).tofile(folder / "raw" / "a.bin")
    for name in ("corpus", "web", "code"):
        (folder / name).mkdir()
        documents = np.random.default_rng(1).integers(0, 50_000, (SEQUENCES, 2048)).tolist()
        facts = {"url": ["https://example.org"] * SEQUENCES, "year": pa.array([2026] * SEQUENCES, pa.int32())}
        pq.write_table(pa.table({"input_ids": documents, **facts}), folder / name / "a.parquet")
    rewrite = ["rewrite", str(folder / "corpus"), str(folder / "pairs"), "--to", "megatron", "--dtype", "uint16"]
    subprocess.run([sys.executable, "-m", "forebay", *rewrite], check=True, capture_output=True, timeout=120)
    for path in (folder / "pairs").glob("tokens-00000-000.*"):
        path.rename(folder / f"my-corpus_text_document{path.suffix}")
    return folder


def test_every_page_with_programs_is_known() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = {path.relative_to(ROOT).as_posix(): len(BLOCK.findall(path.read_text())) for path in pages}
    assert {name: count for name, count in found.items() if count} == PAGES


@pytest.fixture(scope="module")
def bucket(corpora: Path) -> Iterator[S3]:
    """Serves the bucket that docs/remote.md reads."""
    pytest.importorskip("moto", reason="moto serves the objects")
    with object_stores.s3() as store:
        store.upload(corpora / "corpus", "tokens")
        yield store


@pytest.mark.parametrize("name", PAGES)
def test_every_program_that_is_shown_runs(
    name: str,
    corpora: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    from threading import Thread

    from forebay.torch import DataLoader, TokenDataset

    monkeypatch.chdir(corpora)
    if name == "docs/clusters.md":
        line = re.findall(r"^export (FOREBAY_DATA.*)$", (ROOT / name).read_text(), re.MULTILINE)[0]
        for variable, value in (part.split("=") for part in line.split()):
            monkeypatch.setenv(variable, value.replace("/data/", ""))
        monkeypatch.setenv("FOREBAY_CACHE_DIR", "index")
    if name == "docs/remote.md":
        for variable, value in object_stores.CREDENTIALS.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("bucket").proxy.url)
    rows: list[int] = []

    def train(rank: int, part: Any) -> None:
        rows.extend(len(batch["input_ids"]) for batch in part)

    dataset = TokenDataset("corpus/", seq_len=2048)
    shown: dict[str, Any] = {
        "DataLoader": DataLoader, "TokenDataset": TokenDataset, "Thread": Thread, "train": train, "checkpoint": {},
        "dataset": dataset, "loader": DataLoader(dataset, batch_size=8, drop_last=True),
        "model": lambda **_: SimpleNamespace(loss=0.0), "documents": [[1, 2, 3]] * 20_000,
    }  # fmt: skip
    for program in BLOCK.findall((ROOT / name).read_text()):
        if 'device="cuda"' in program and not torch.cuda.is_available():
            continue
        if "from transformers" in program:
            continue  # test_format_consumers.py runs it
        if re.search(r"^(import|from) (ray|pyspark|dask)\b", program, re.MULTILINE):
            continue  # test_clusters.py runs it
        if re.search(r"^\s*(import|from) datasets\b", program, re.MULTILINE):
            pytest.importorskip("datasets", reason="the page begins with a dataset of Hugging Face")
        if "pyarrow.flight" in program:
            continue  # test_service.py runs it
        program = program.replace("/tmp/forebay", str(corpora / "cache"))
        exec(compile(program.replace("12_000", "12").replace("120_", "").replace("121_", "1"), name, "exec"), shown)
    if name == "README.md":
        assert "of the time was spent waiting for data" in capsys.readouterr().out
    elif name == "docs/clusters.md":
        assert len(shown["loader"]) == SEQUENCES // 8 and "FOREBAY_SEQ_LEN" in shown["loader"].origins["seq_len"]
    elif name == "docs/monitoring.md":
        assert 0 <= shown["metrics"]["loader/wait_share"] <= 1
    elif name == "docs/mixtures.md":
        assert {source["name"] for source in shown["loader"].stats()["sources"]} == {"web", "code"}
    elif name == "docs/fine-tuning.md":
        labels = shown["batch"]["labels"]
        assert 0.3 < float((labels == -100).double().mean()) < 0.8, "prompts are no targets"
    elif name == "docs/torch.md":
        for thread in shown["threads"]:
            thread.start()
        for thread in shown["threads"]:
            thread.join()
        assert rows == [1] * SEQUENCES
