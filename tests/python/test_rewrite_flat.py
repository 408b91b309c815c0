"""Tests that `rewrite` writes flat formats which their own readers read.

NumPy reads `.npy` and raw files. megatron-core and datatrove read theirs where they are installed,
and `reference_flat.py` reads all formats by their published layout.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference import documents, shards
from reference_flat import flat_documents
from support import clean_environment

import forebay

#: Formats, the suffix of their ids, and whether they have ends of documents.
FORMATS = {
    "npy": ("npy", False),
    "raw": ("bin", False),
    "llm.c": ("bin", False),
    "megatron": ("bin", True),
    "datatrove": ("ds", True),
}
ROWS = [[5, 6, 7], [], [8], None, [9] * 40, [1, 2], []]


def corpus(folder: Path, top: int, kind: Any = None) -> Path:
    folder.mkdir()
    for shard in range(3):
        rows = [None if row is None else [*row[:-1], top - shard] if row else [] for row in ROWS]
        table = pa.table({"input_ids": pa.array(rows, pa.list_(kind or pa.int64()))})
        pq.write_table(table, folder / f"{shard}.parquet", row_group_size=3)
    return folder


def rewritten(data: Path, target: Path, *given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forebay", "rewrite", str(data), str(target), *map(str, given)],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip


def ids_of(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*.{suffix}"))


def read_back(path: Path, to: str, bin_dtype: str) -> list[list[int]]:
    """The documents of a file, by the reader of its own project."""
    if to == "npy":
        return [np.load(path).tolist()]
    if to == "raw":
        return [np.fromfile(path, bin_dtype).tolist()]
    if to == "megatron":
        indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
        dataset = indexed.IndexedDataset(str(path.with_suffix("")))
        starts = dataset.document_indices.tolist()
        pairs = itertools.pairwise(starts)
        return [[int(i) for sequence in range(a, b) for i in dataset[sequence]] for a, b in pairs]
    found = flat_documents(path, bin_dtype)
    assert found is not None
    return found


@pytest.mark.parametrize("top", [100, 60_000, 70_000, 3_000_000_000])
@pytest.mark.parametrize("to", FORMATS)
def test_their_own_readers_read_what_is_written(tmp_path: Path, to: str, top: int) -> None:
    suffix, lists = FORMATS[to]
    data = corpus(tmp_path / "corpus", top)
    wanted = [document for path in shards(data) for document in documents(path)]
    for size in (30, 1 << 20):
        target = tmp_path / f"target-{size}"
        done = rewritten(data, target, "--to", to, "--shard-tokens", size)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("9 documents joined" not in done.stdout) and ("documents joined" in done.stdout) == (not lists)
        files = ids_of(target, suffix)
        assert (len(files) > 1) == (size == 30)
        dtype = next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("dtype"))
        found = [document for path in files for document in read_back(path, to, dtype)]
        assert [token for document in found for token in document] == [token for row in wanted for token in row]
        if lists:
            assert found == wanted
        assert not [path for path in target.iterdir() if path.name.startswith(".")]
        given: dict[str, Any] = {"seq_len": 8, "shuffle": "global", "seed": 3}
        more = {"bin_dtype": dtype} if to == "raw" else {}
        with forebay.Loader(data, **given) as before, forebay.Loader(target, **given, **more) as after:
            batches = zip(after, before, strict=True)
            assert all(np.array_equal(now["input_ids"], then["input_ids"]) for now, then in batches)


@pytest.mark.parametrize("to", [name for name, (_, lists) in FORMATS.items() if not lists])
def test_ids_around_documents_are_written_where_no_ends_are(tmp_path: Path, to: str) -> None:
    data, target = corpus(tmp_path / "corpus", 100), tmp_path / "target"
    done = rewritten(data, target, "--to", to, "--set", "eos_id=50256", "--set", "bos_id=50257")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "joined" not in done.stdout
    [path] = ids_of(target, FORMATS[to][0])
    wanted = [document for shard in shards(data) for document in documents(shard) if document]
    assert read_back(path, to, "uint16") == [[token for row in wanted for token in [50257, *row, 50256]]]


@pytest.mark.parametrize("kind", [pa.bool_(), pa.uint8(), pa.int64()])
def test_datatrove_files_hold_a_mask(tmp_path: Path, kind: Any) -> None:
    data, target = tmp_path / "corpus", tmp_path / "target"
    data.mkdir()
    rows = [[5, 6, 7], [], [8], [9] * 40]
    masks = [[index % 2 for index in range(len(row))] for row in rows]
    table = pa.table({"input_ids": rows, "loss_mask": pa.array(masks, pa.list_(pa.int64())).cast(pa.list_(kind))})
    pq.write_table(table, data / "a.parquet")
    done = rewritten(data, target, "--to", "datatrove", "--set", "fields=loss_mask")
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = ids_of(target, "ds")
    assert path.with_name(path.name + ".loss").read_bytes() == bytes(bit for row in masks for bit in row)
    with forebay.Loader(target, seq_len=4, fields=["loss_mask"]) as loader:
        found = [bit for batch in loader for bit in batch["loss_mask"].ravel().tolist()]
    assert found == [bit == 1 for row in masks for bit in row]


def test_datatrove_reads_the_files(tmp_path: Path) -> None:
    dataset = pytest.importorskip("datatrove.utils.dataset")
    data, target = corpus(tmp_path / "corpus", 60_000), tmp_path / "target"
    assert rewritten(data, target, "--to", "datatrove").returncode == 0
    [path] = ids_of(target, "ds")
    ids = [token for shard in shards(data) for row in documents(shard) for token in row]
    # The merger of datatrove reads the first two lines: name and bytes of an id, and their number.
    first, count, _ = path.with_name(path.name + ".metadata").read_text().split("\n")
    assert (first.split("|"), int(count)) == (["Unknown Tokenizer", "2"], len(ids))
    read = dataset.DatatroveFileDataset(str(path), seq_len=4, token_size=2)
    rows = [read[index]["input_ids"].tolist() for index in range(len(read))]
    assert rows == [ids[start : start + 5] for start in range(0, len(ids) - 4, 5)][: len(rows)] and len(rows) > 5


def test_a_file_of_llm_c_has_the_published_header(tmp_path: Path) -> None:
    for top, dtype, magic, version in ((60_000, "<u2", 20240520, 1), (70_000, "<u4", 20240801, 7)):
        data, target = corpus(tmp_path / f"corpus-{top}", top), tmp_path / f"target-{top}"
        assert rewritten(data, target, "--to", "llm.c").returncode == 0
        [path] = ids_of(target, "bin")
        header = np.fromfile(path, "<i4", 256)
        ids = [token for shard in shards(data) for row in documents(shard) for token in row]
        assert header[:3].tolist() == [magic, version, len(ids)] and not header[3:].any()
        assert np.fromfile(path, dtype, offset=1024).tolist() == ids


def test_flat_files_are_rewritten_to_each_other(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus", 60_000)
    ids = [token for shard in shards(source) for row in documents(shard) for token in row]
    more: list[str] = []
    for number, to in enumerate([*FORMATS, *reversed(FORMATS)]):
        target = tmp_path / f"target-{number}"
        done = rewritten(source, target, "--to", to, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        found = [flat_documents(path, "uint16") or [] for path in ids_of(target, FORMATS[to][0])]
        assert [token for file in found for row in file for token in row] == ids, to
        source, more = target, (["--set", "bin_dtype=uint16"] if to == "raw" else [])


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "corpus"
    data.mkdir()
    columns = {"input_ids": [[1, 1 << 40], [3]], "labels": [[1, 2], [3]], "loss_mask": [[0, 1], [2]], "url": ["a", "b"]}
    pq.write_table(pa.table(columns), data / "a.parquet")
    for number, (to, given, said) in enumerate(
        [
            (
                "npy",
                ["--set", "fields=labels"],
                "`--to npy` holds no columns beside the ids, and `fields` names `labels`",
            ),
            ("megatron", ["--set", "fields=url"], "holds no columns beside the ids, and `fields` names `url`"),
            ("datatrove", ["--set", "fields=url", "--dtype", "uint32"], "but `loss_mask`, with a value for each token"),
            ("llm.c", [], "`--to llm.c` holds ids below 2^32, and the ids need int64"),
            ("datatrove", [], "`--to datatrove` holds ids below 2^32, and the ids need int64"),
            (
                "megatron",
                ["--dtype", "uint32"],
                "`--to megatron` has no ids of type uint32: choose another `--dtype`, such as int64",
            ),
            (
                "llm.c",
                ["--dtype", "uint8"],
                "`--to llm.c` has no ids of type uint8: choose another `--dtype`, such as uint16",
            ),
            ("raw", ["--dtype", "uint16"], "token id 1099511627776 does not fit uint16"),
        ]
    ):
        target = tmp_path / f"target-{number}"
        done = rewritten(data, target, "--to", to, *given)
        assert done.returncode != 0 and said in done.stderr, done.stderr
    pq.write_table(pa.table({"input_ids": [[1, 2]], "loss_mask": [[0, 2]]}), data / "a.parquet")
    done = rewritten(data, tmp_path / "mask", "--to", "datatrove", "--set", "fields=loss_mask")
    assert done.returncode != 0 and "column `loss_mask` has a value other than 0 and 1" in done.stderr


@pytest.mark.parametrize("to", ["megatron", "datatrove"])
def test_an_interrupted_rewriting_goes_on(tmp_path: Path, to: str) -> None:
    data, target = corpus(tmp_path / "corpus", 100), tmp_path / "target"
    given = ["--to", to, "--shard-tokens", 30]
    assert rewritten(data, target, *given).returncode == 0
    before = {path.name: path.read_bytes() for path in ids_of(target, FORMATS[to][0])}
    first = next(iter(before))
    # The ids of a shard are missing, and the file beside them is there; another shard is half done.
    manifest = target / "_forebay_rewrite.jsonl"
    manifest.write_text("".join(line for line in manifest.read_text().splitlines(True) if '"complete"' not in line))
    (target / first).unlink()
    (target / f".part-{first}").write_bytes(b"half")
    done = rewritten(data, target, *given)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in ids_of(target, FORMATS[to][0])} == before
