"""Protects: an id splits files of ids that do not say where documents end, and nothing is guessed.

`test_layouts.py`, `test_conformance.py`, `test_layout_runs.py` and `test_contract_layouts.py` read
such files in every layout. Here are the edges, the saved ends, the commands and the refusals.
`split_at` of `reference_flat.py` is the judge.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_flat import split_at
from support import clean_environment

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from corpora import Cell

import forebay

END = 9


def write(path: Path, ids: list[int], dtype: str = "<u2") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.array(ids, dtype).tofile(path)
    return path


def documents_of(data: Any, **settings: Any) -> list[list[int]]:
    """The documents, as rows of `pad` hold them."""
    given = {"bin_dtype": "uint16", "document_end_id": END, **settings}
    with forebay.Loader(data, layout="pad", seq_len=1 << 10, boundaries=True, **given) as loader:
        return [batch["input_ids"][0][batch["doc_ids"][0] == 0].tolist() for batch in loader]


def forebay_json(*given: Any, status: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "forebay", *map(str, given), "--json"],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sets(**settings: Any) -> list[str]:
    given = {"bin_dtype": "uint16", "document_end_id": END, **settings}
    return [text for name, value in given.items() for text in ("--set", f"{name}={str(value).lower()}")]


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, END, 3, END],
        [1, 2, END, 3],
        [1, 2, 3],
        [END],
        [END, END, END],
        [END, 1, END, END, 2],
        [1, END, *[2] * 500, END, *[3] * 700],
        [1, END] * 9000,
    ],
    ids=["ended", "unended", "no such id", "one id", "ids alone", "ids side by side", "long", "many"],
)
def test_documents_end_with_their_id(tmp_path: Path, ids: list[int], io: str) -> None:
    path = write(tmp_path / "a.bin", ids)
    assert documents_of(path, io=io) == split_at(ids, END)
    assert documents_of(path, io=io, cache_dir=tmp_path / "cache") == split_at(ids, END)
    assert documents_of(path, io=io, cache_dir=tmp_path / "cache") == split_at(ids, END)


def test_a_document_does_not_go_on_in_the_next_file(tmp_path: Path) -> None:
    shards = [[1, END, 2], [3, END], [END], [4, 5]]
    for number, ids in enumerate(shards):
        write(tmp_path / f"{number}.bin", ids)
    assert documents_of(tmp_path) == [document for ids in shards for document in split_at(ids, END)]


def test_a_later_start_scans_nothing_and_another_id_scans_again(tmp_path: Path) -> None:
    draw = random.Random(1)
    data, cache = tmp_path / "corpus", tmp_path / "cache"
    shards = [[draw.randrange(12) for _ in range(5000)] for _ in range(3)]
    for number, ids in enumerate(shards):
        write(data / f"{number}.bin", ids)

    def planned(**settings: Any) -> tuple[int, int]:
        given = {"cache_dir": cache, "layout": "pack", "seq_len": 32, **settings}
        plan = forebay_json("plan", data, *sets(**given))
        return plan["start"]["scan"]["bytes"], plan["sources"][0]["documents"]

    def documents(end: int) -> int:
        return sum(len(split_at(ids, end)) for ids in shards)

    size = sum(2 * len(ids) for ids in shards)
    assert planned() == (size, documents(END))
    assert planned() == planned(layout="pad", seq_len=64) == planned(block_tokens=64) == (0, documents(END))
    assert planned(document_end_id=3) == (size, documents(3)) != (size, documents(END))
    assert planned(document_end_id=3) == (0, documents(3))
    assert planned() == (0, documents(END))
    # The same number of documents at other places: lengths of one id are not those of another.
    twice = write(tmp_path / "twice" / "a.bin", [1, 3, 1, 1, END, 1, 1])
    for end in (3, END, 3, END):
        wanted = split_at([1, 3, 1, 1, END, 1, 1], end)
        assert documents_of(twice, document_end_id=end, cache_dir=cache) == wanted
    # A changed shard alone is scanned again.
    shards[1] = [draw.randrange(12) for _ in range(4000)]
    write(data / "1.bin", shards[1])
    assert planned() == (8000, documents(END))
    assert planned() == (0, documents(END))
    assert forebay_json("plan", data, *sets(document_end_id="none"))["start"]["scan"] is None


def test_a_start_from_saved_ends_does_not_read_the_ids(tmp_path: Path) -> None:
    data, cache = tmp_path / "corpus", tmp_path / "cache"
    ids = [random.Random(2).randrange(12) for _ in range(5000)]
    path = write(data / "a.bin", ids)
    given: dict[str, Any] = {"bin_dtype": "uint16", "document_end_id": END, "cache_dir": cache, "layout": "pack"}
    with forebay.Loader(data, seq_len=64, **given) as loader:
        wanted = loader.num_sequences
    # Other ids of the same size and time. A scan would find no end among them.
    stat = path.stat()
    write(path, [1] * 5000)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with forebay.Loader(data, seq_len=64, **given) as loader:
        assert loader.num_sequences == wanted
        # Rows are read with the ends that were saved.
        lengths = [np.diff(batch["cu_seqlens"]).tolist() for batch in loader]
    assert sum(map(sum, lengths)) == wanted * 64


@pytest.mark.parametrize("layout", ["pack", "pad", "rows"])
@pytest.mark.parametrize("container", ["npy", "raw", "llm.c"])
def test_a_layout_of_documents_asks_for_the_id(tmp_path: Path, layout: str, container: str) -> None:
    cell = Cell("numpy", container, kind="plain", dtype="u16")
    path = corpora.write(cell, tmp_path, [[list(range(64))]]) / f"shard-000.{corpora.SUFFIXES[container]}"
    with pytest.raises(forebay.ConfigError) as caught:
        forebay.Loader(path, layout=layout, seq_len=16, **cell.reading)
    text = str(caught.value)
    assert f"`layout` = {layout}" in text and "`document_end_id`" in text and container in text and path.name in text
    with forebay.Loader(path, seq_len=16, boundaries=True, **cell.reading) as loader:
        assert loader.num_sequences == 4


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "matrix.npy", "a.ds"])
def test_files_with_documents_refuse_the_id_and_keep_theirs_in_a_mixture(tmp_path: Path, name: str) -> None:
    documents = [[1, END, 2, 3], [4, 5, END, 6]]
    path = tmp_path / "known" / name
    path.parent.mkdir()
    if name == "matrix.npy":
        np.save(path, np.array(documents, np.uint16))
    elif name == "a.ds":
        np.array(documents, "<u2").tofile(path)
        np.array([4, 8], "<u8").tofile(f"{path}.index")
    else:
        corpora.write_rows(path, documents)
    with pytest.raises(forebay.ConfigError, match="leave `document_end_id` out") as caught:
        documents_of(path)
    assert name in str(caught.value)
    raw = write(tmp_path / "raw" / "a.bin", [7, END, 8])
    sources = [{"name": kind, "data": str(of), "weight": 1} for kind, of in (("known", path), ("raw", raw))]
    found = documents_of(None, mixture={"sources": sources, "exhausted": "drop"}, lanes=1)
    assert sorted(found) == sorted([*documents, [7, END], [8]])


def test_an_id_that_no_value_can_be_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [1, 2, 3])
    with pytest.raises(forebay.ConfigError, match="no id of type uint16"):
        documents_of(path, document_end_id=70_000)
    with pytest.raises(forebay.ConfigError, match="`document_end_id`"):
        documents_of(path, document_end_id=-1)


def test_an_id_that_splits_no_shard_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.bin", [1, 2, 3, END])
    write(tmp_path / "b.bin", [1, 2, 3])
    documents_of(tmp_path)
    assert "no shard has more than one document" in caplog.text


def test_a_state_belongs_to_its_id(tmp_path: Path) -> None:
    ids = [random.Random(3).randrange(12) for _ in range(600)]
    path = write(tmp_path / "a.bin", ids)
    given: dict[str, Any] = {"bin_dtype": "uint16", "seq_len": 8, "layout": "pack", "shuffle": True}
    with forebay.Loader(path, document_end_id=END, **given) as loader:
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = [batch["input_ids"].tolist() for batch in batches]
    with forebay.Loader(path, document_end_id=END, num_threads=0, **given) as loader:
        loader.load_state_dict(state)
        assert [batch["input_ids"].tolist() for batch in loader] == rest
    with (
        forebay.Loader(path, document_end_id=3, **given) as loader,
        pytest.raises(forebay.StateMismatchError) as caught,
    ):
        loader.load_state_dict(state)
        next(iter(loader))
    assert "`document_end_id`" in str(caught.value)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", "uint8"])
def test_commands_see_the_documents(tmp_path: Path, dtype: str) -> None:
    draw = random.Random(4)
    data = tmp_path / "corpus"
    shards = [[draw.randrange(12) for _ in range(many)] for many in (3000, 1, 2000)]
    for number, ids in enumerate(shards):
        write(data / f"{number}.bin", ids, np.dtype(dtype).str)
    documents = [document for ids in shards for document in split_at(ids, END)]
    found = forebay_json("check", data, *sets(bin_dtype=dtype))
    assert found["sound"] and found["documents"] == len(documents)
    lengths = sorted(map(len, documents))
    assert found["lengths"]["longest"] == lengths[-1]
    assert found["lengths"]["p50"] == lengths[-(-len(lengths) // 2) - 1]
    for layout in ("pack", "pad", "concat"):
        more = {"layout": layout, "seq_len": 16, "boundaries": True, "shuffle": "block", "bin_dtype": dtype}
        proof = forebay_json("verify", data, *sets(**more), "--world-size", 2)
        assert proof["proven"] and proof["found"]["rows"] > 100
    for to in ("arrow", "parquet", "datatrove"):
        if to == "datatrove" and dtype == "int64":
            continue
        forebay_json("rewrite", data, tmp_path / to, *sets(bin_dtype=dtype), "--to", to)
        assert documents_of(tmp_path / to, document_end_id=None) == documents


def test_wrong_ends_are_not_proven(tmp_path: Path) -> None:
    data = tmp_path / "corpus"
    path = write(data / "a.bin", [1, 2, END, 3, 4, 5, END, 6] * 8)
    given = {"layout": "pack", "seq_len": 16}
    with forebay.Loader(
        data,
        bin_dtype="uint16",
        document_end_id=END,
        delivery_log=tmp_path / "log",
        cache_dir=tmp_path / "cache",
        **given,
    ) as loader:
        assert len(list(loader)) == 4
    log = ("--delivery-log", tmp_path / "log")
    assert forebay_json("verify", data, *sets(**given), *log)["proven"]
    # The same ids with the end of a document elsewhere.
    write(path, [1, 2, END, 3, 4, END, 5, 6] * 8)
    assert not forebay_json("verify", data, *sets(**given), *log, status=1)["proven"]
