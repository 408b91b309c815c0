"""Tests that saved checksums find every change of a file that its size and time do not show."""

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

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import damage
import pyarrow as pa
import pyarrow.parquet as pq
from support import clean_environment

import forebay

pytestmark = pytest.mark.hostile

TIME_NS = 1_700_000_000_000_000_000
KINDS = {name: make for name, make in damage.KINDS.items() if "parquet" not in name or "plain" in name}


def index(path: Path, cache: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "forebay", "index", str(path), "--cache-dir", str(cache), "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment(), check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def place_of_ids(files: damage.Files, name: str) -> int:
    """A place in the middle of the ids of a shard that holds them as they are."""
    needle = {1: "<u2", 2: "<i4"}
    content = next(iter(files.values()))
    for dtype in needle.values():
        ids = np.array(damage.stream_of_ids()[100:104], dtype).tobytes()
        if content.count(ids) == 1:
            return content.index(ids)
    raise AssertionError(f"{name} does not hold its ids as they are")


@pytest.mark.parametrize(
    "kind", ["parquet plain", "arrow file", "arrow stream", "npy", "llm.c", "megatron", "datatrove"]
)
def test_a_flipped_bit_is_refused_with_file_block_rows_and_both_checksums(kind: str, tmp_path: Path) -> None:
    files = damage.KINDS[kind]()
    path = damage.write(tmp_path, files, TIME_NS)
    found = index(path, tmp_path / "cache", "--checksums")
    pack = {"layout": "pack", "seq_len": 32, "eos_id": None}
    if kind in ("npy", "llm.c"):
        # The blocks of a file depend on this setting, so that an index and its checksums do, too.
        pack["document_end_id"] = 7
        index(path, tmp_path / "cache", "--checksums", "--set", "document_end_id=7")
    assert Path(found["checksums"]).stat().st_size == found["checksums_bytes"]
    sound = damage.read(path)
    assert damage.read(path, cache_dir=str(tmp_path / "cache")) == sound

    at = place_of_ids(files, kind)
    first = next(iter(files))
    damaged = bytearray(files[first])
    damaged[at] ^= 1
    damage.write(tmp_path, {**files, first: bytes(damaged)}, TIME_NS)
    without = damage.read(path)
    assert without != sound and len(without) == len(sound), "without checksums nothing shows"
    for settings in ({}, {"num_threads": 2}, {"shuffle": True}, pack):
        with pytest.raises(forebay.DataError) as caught:
            damage.read(path, cache_dir=str(tmp_path / "cache"), **settings)
        text = str(caught.value)
        assert os.fspath(caught.value.path) == os.fspath(path)
        assert caught.value.block is not None and caught.value.row is not None
        for words in ("rows ", " to ", "expected checksum ", "found ", "restore the file"):
            assert words in text, text
    damage.write(tmp_path, files, TIME_NS)
    assert damage.read(path, cache_dir=str(tmp_path / "cache")) == sound


def test_without_checksums_an_index_changes_nothing(tmp_path: Path) -> None:
    path = damage.write(tmp_path, damage.arrow(), TIME_NS)
    found = index(path, tmp_path / "cache")
    assert found["checksums"] is None
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".forebay-index"]


def test_a_damaged_file_of_checksums_is_an_error(tmp_path: Path) -> None:
    path = damage.write(tmp_path, damage.arrow(), TIME_NS)
    file = Path(index(path, tmp_path / "cache", "--checksums")["checksums"])
    sound = file.read_bytes()
    records = 48 + 32
    for at in range(len(sound)):
        changed = bytearray(sound)
        changed[at] ^= 4
        file.write_bytes(bytes(changed))
        with pytest.raises(forebay.DataError) as caught:
            damage.read(path, cache_dir=str(tmp_path / "cache"))
        if at < records:
            assert "saved checksums are damaged" in str(caught.value)
    for length in (0, 1, 47, 48, records - 1, records, len(sound) - 8, len(sound) - 1):
        file.write_bytes(sound[:length])
        with pytest.raises(forebay.DataError, match="saved checksums are damaged"):
            damage.read(path, cache_dir=str(tmp_path / "cache"))
    file.write_bytes(sound)
    damage.read(path, cache_dir=str(tmp_path / "cache"))


def test_known_checksums_are_kept_and_new_shards_are_read(tmp_path: Path, caplog: Any) -> None:
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    corpus.mkdir()
    sound = damage.arrow()["a.arrow"]
    damage.write(corpus, {"a.arrow": sound}, TIME_NS)
    index(corpus, cache, "--checksums")
    # A second run must not take the damage for the content.
    at = place_of_ids({"a.arrow": sound}, "arrow")
    damage.write(corpus, {"a.arrow": sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :]}, TIME_NS)
    index(corpus, cache, "--checksums")
    with pytest.raises(forebay.DataError, match="expected checksum"):
        damage.read(corpus, cache_dir=str(cache))
    damage.write(corpus, {"a.arrow": sound, "b.arrow": sound}, TIME_NS)
    with caplog.at_level("WARNING", "forebay"):
        tokens = damage.read(corpus, cache_dir=str(cache))
    assert any("1 of 2 shards have no checksums" in record.getMessage() for record in caplog.records)
    caplog.clear()
    index(corpus, cache, "--checksums")
    with caplog.at_level("WARNING", "forebay"):
        assert damage.read(corpus, cache_dir=str(cache)) == tokens
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_further_columns_have_checksums_too(tmp_path: Path, suffix: str) -> None:
    rows = [[row * 8 + place for place in range(8)] for row in range(64)]
    table = pa.table(
        {
            "input_ids": pa.array(rows, pa.list_(pa.int32())),
            "labels": pa.array([[token + 100_000 for token in row] for row in rows], pa.list_(pa.int32())),
            "year": pa.array([row + 1_000_000 for row in range(64)], pa.int32()),
        }
    )
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    sound = path.read_bytes()
    damage.write(tmp_path, {path.name: sound}, TIME_NS)
    cache, fields = str(tmp_path / "cache"), ["labels", "year"]
    index(path, tmp_path / "cache", "--checksums", "--set", "fields=labels,year")

    def epoch() -> None:
        with forebay.Loader(path, seq_len=8, batch_size=4, fields=fields, cache_dir=cache) as loader:
            for _ in loader:
                pass

    epoch()
    for value, words in ((100_100, "rows 0 to 63"), (1_000_020, "values of documents"), (100, "rows 0 to 63")):
        at = sound.index(np.array([value, value + 1], "<i4").tobytes())
        damaged = sound[:at] + bytes([sound[at] ^ 2]) + sound[at + 1 :]
        damage.write(tmp_path, {path.name: damaged}, TIME_NS)
        with pytest.raises(forebay.DataError, match="expected checksum") as caught:
            epoch()
        assert words in str(caught.value), str(caught.value)
    damage.write(tmp_path, {path.name: sound}, TIME_NS)
    epoch()


def test_large_shards_are_compared_piece_by_piece(tmp_path: Path) -> None:
    """A file of one document has many pieces. Damage ends only the batches that touch its piece."""
    ids = np.arange(1_000_000, dtype="<u4") % 50_000
    np.save(tmp_path / "a.npy", ids)
    cache = str(tmp_path / "cache")
    index(tmp_path / "a.npy", tmp_path / "cache", "--checksums")
    stat = (tmp_path / "a.npy").stat()
    rng = random.Random(3)
    for _ in range(5):
        damaged = ids.copy()
        at = rng.randrange(len(ids))
        damaged[at] ^= 1 << rng.randrange(16)
        np.save(tmp_path / "a.npy", damaged)
        os.utime(tmp_path / "a.npy", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with forebay.Loader(tmp_path / "a.npy", seq_len=1000, batch_size=1, cache_dir=cache) as loader:
            for step in range(0, 1000, 7):
                piece = (128 << 10) * (at // (128 << 10))
                touches = step * 1000 < piece + (128 << 10) and (step + 1) * 1000 > piece
                if touches:
                    with pytest.raises(forebay.DataError, match="expected checksum"):
                        loader.batch_at(step)
                else:
                    assert np.array_equal(np.asarray(loader.batch_at(step)["input_ids"])[0], ids[step * 1000 :][:1000])


@pytest.mark.parametrize("kind", ["parquet plain", "arrow file", "npy"])
def test_check_compares_saved_checksums(kind: str, tmp_path: Path) -> None:
    files = damage.KINDS[kind]()
    path = damage.write(tmp_path, files, TIME_NS)
    cache = tmp_path / "cache"

    def check(*more: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "forebay", "check", str(path), "--json", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment(), check=False)
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if found["sound"] else 1)
        broken: list[dict[str, Any]] = found["broken"]
        return broken

    here = ("--set", f"cache_dir={cache}")
    assert check(*here) == [] and not cache.exists(), "without checksums, nothing is saved"
    index(path, cache, "--checksums")
    assert check(*here) == []
    damaged = bytearray(files[first := next(iter(files))])
    damaged[place_of_ids(files, kind)] ^= 1
    damage.write(tmp_path, {**files, first: bytes(damaged)}, TIME_NS)
    assert check() == [], "without checksums nothing shows"
    [error] = check(*here)
    assert "expected checksum " in error["error"] and error["path"] == str(path)
    assert error["block"] is not None and error["row"] is not None
