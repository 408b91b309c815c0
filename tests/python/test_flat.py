"""Protects: flat files of ids are known by what they hold and by what lies beside them.

No damage gives other tokens or a shorter epoch.

The naive reader in `reference_flat.py` is the judge.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_flat import flat_documents, loss_mask_of_datatrove

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from corpora import Cell
from support import clean_environment

import forebay

SINGLE = {"single": True}
CELLS = {
    "npy": Cell("numpy", "npy", kind="plain", dtype="u16", options=SINGLE),
    "matrix": Cell("numpy", "npy", kind="fixed_size_list", dtype="i32", options={**SINGLE, "nulls": False}),
    "raw": Cell("numpy", "raw", kind="plain", dtype="u16", options=SINGLE),
    "gpt-2": Cell("numpy", "llm.c", kind="plain", dtype="u16", options=SINGLE),
    "llama-3": Cell("numpy", "llm.c", kind="plain", dtype="u32", options=SINGLE),
    "megatron": Cell("megatron", "megatron", dtype="i32", options={**SINGLE, "sentences": 9}),
    "datatrove": Cell("datatrove", "datatrove", dtype="u16", options={**SINGLE, "loss": True, "metadata": True}),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a shard of a kind once, and gives its path."""
    known: dict[str, Path] = {}

    def written(kind: str) -> Path:
        cell = CELLS[kind]
        if not corpora.available(cell.writer):
            pytest.skip(f"{cell.writer} is not installed")
        if kind not in known:
            folder = corpora.write(
                cell, tmp_path_factory.mktemp("flat"), corpora.documents_of(cell, tokens_per_shard=900)
            )
            known[kind] = folder / f"shard-000.{corpora.SUFFIXES[cell.container]}"
        return known[kind]

    return written


def copied(path: Path, folder: Path) -> Path:
    """A shard and the files beside it, in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in path.parent.iterdir():
        shutil.copy(file, folder / file.name)
    return folder / path.name


def settings_of(kind: str) -> dict[str, Any]:
    dtype = CELLS[kind].bin_dtype
    return {} if dtype is None else {"bin_dtype": dtype}


def tokens(data: Any, **settings: Any) -> list[int]:
    with forebay.Loader(data, seq_len=1, batch_size=64, remainder="short", **settings) as loader:
        return [int(token) for batch in loader for token in np.asarray(batch["input_ids"]).ravel()]


def refused(data: Any, **settings: Any) -> forebay.ForebayError:
    with pytest.raises(forebay.ForebayError) as caught:
        tokens(data, **settings)
    return caught.value


def expected(path: Path, bin_dtype: str | None = None) -> list[int]:
    documents = flat_documents(path, bin_dtype)
    assert documents is not None
    return [token for document in documents for token in document]


def command(*arguments: Any, status: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "forebay", *map(str, arguments)],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout + done.stderr


# --- What a file is


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_shard_gives_its_tokens_whichever_way_it_is_read(sound: Any, kind: str, io: str) -> None:
    path = sound(kind)
    wanted = expected(path, CELLS[kind].bin_dtype)
    assert len(wanted) > 500
    assert tokens(path, io=io, **settings_of(kind)) == wanted


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_borders_are_those_of_the_files_beside(sound: Any, kind: str) -> None:
    path = sound(kind)
    documents = [document for document in flat_documents(path) or [] if document]
    with forebay.Loader(
        path, seq_len=1, eos_id=0, bos_id=1, batch_size=64, remainder="short", block_tokens=100
    ) as loader:
        found = [int(token) for batch in loader for token in np.asarray(batch["input_ids"]).ravel()]
    assert found == [token for document in documents for token in [1, *document, 0]]


@pytest.mark.parametrize("kind", CELLS)
def test_a_folder_a_pattern_and_a_file_are_one_corpus(sound: Any, kind: str, tmp_path: Path) -> None:
    for at in range(2):
        path = copied(sound(kind), tmp_path / str(at))
    wanted = expected(path, CELLS[kind].bin_dtype)
    more = settings_of(kind)
    for data in (tmp_path, f"{tmp_path}/**/*.{path.suffix[1:]}", f"{tmp_path}/*/*", [tmp_path / "0", path]):
        assert tokens(data, **more) == wanted * 2, data
    if kind == "megatron":
        # Megatron's own settings name pairs without a suffix.
        assert tokens(path.with_suffix(""), **more) == wanted
    with forebay.Loader(path, seq_len=4, format=CELLS[kind].container, **more) as loader:
        assert loader.num_tokens == len(wanted)
    with pytest.raises(forebay.ForebayError, match="`format` is arrow"):
        forebay.Loader(path, seq_len=4, format="arrow", **more)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.npy", "tokens.u16", "tokens"])
def test_a_raw_file_asks_for_its_type(tmp_path: Path, name: str) -> None:
    # Old Arrow streams begin with such a length.
    ids = [64, 0, *range(5, 105)]
    path = tmp_path / name
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    if path.suffix:
        error = refused(path)
        assert os.fspath(error.path) == os.fspath(path)
    if path.suffix in (".bin", ".npy"):
        assert "set `bin_dtype`, such as `uint16`" in str(error)
        assert f"--set bin_dtype=uint16 {path}" in str(error) or path.suffix == ".npy"
    for given in ("uint16", np.uint16, np.dtype("uint16")):
        assert tokens(path, bin_dtype=given) == ids
    assert tokens(path, bin_dtype="uint8") == list(path.read_bytes())
    path.write_bytes(path.read_bytes()[:-1])
    text = str(refused(path, bin_dtype="uint16"))
    assert "203 bytes" in text and "no multiple of the 2 bytes" in text
    assert "`bin_dtype`" in str(refused(path, bin_dtype="float32"))


def test_other_files_are_not_taken_for_raw_ones(tmp_path: Path) -> None:
    corpora.write_rows(tmp_path / "a.parquet", [[1, 2, 3]])
    corpora.write_rows(tmp_path / "a.arrow", [[1, 2, 3]])
    for name in ("a.parquet", "a.arrow"):
        path = tmp_path / name
        assert tokens(path, bin_dtype="uint16") == [1, 2, 3]
        path.write_bytes(b"XXXXXXXX" + path.read_bytes()[8:])
        assert "known format" in str(refused(path, bin_dtype="uint16"))
    array = tmp_path / "a.npy"
    np.save(array, np.arange(100, dtype=np.uint16))
    array.write_bytes(b"\x92" + array.read_bytes()[1:])
    assert "known format" in str(refused(array, bin_dtype="uint16"))
    weights = tmp_path / "model.bin"
    weights.write_bytes(b"PK\3\4" + bytes(100))
    for more in ({}, {"bin_dtype": "uint16"}):
        assert "zip archive" in str(refused(weights, **more))


def test_a_column_is_not_asked_of_a_file_of_ids(sound: Any) -> None:
    path = sound("npy")
    assert tokens(path, token_column="input_ids") == expected(path)
    assert "leave `token_column` out" in str(refused(path, token_column="words"))
    assert "has ids alone" in str(refused(path, fields=["labels"]))


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.arange(6, dtype=">u2"), "big-endian"),
        (np.arange(6, dtype=np.float32), "f4"),
        (np.arange(6, dtype=np.uint64), "u8"),
        (np.arange(6) > 2, "b1"),
        (np.array(["a"]), "U1"),
        (np.zeros(3, [("a", "<u2")]), "records"),
        (np.zeros((2, 3, 4), np.uint16), "3 dimensions"),
        (np.zeros((), np.uint16), "0 dimensions"),
        (np.asfortranarray(np.zeros((3, 4), np.uint16)), "Fortran order"),
    ],
)
def test_an_array_that_holds_no_ids_is_refused_by_name(tmp_path: Path, array: Any, text: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array)
    error = refused(path)
    assert text in str(error) and "expected" in str(error)
    assert os.fspath(error.path) == os.fspath(path)


def test_matrices_of_odd_shapes_are_documents_or_none(tmp_path: Path) -> None:
    for shape in [(0, 5), (5, 0), (1, 7), (7, 1)]:
        np.save(tmp_path / "a.npy", np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape))
        if 0 in shape:
            assert tokens(tmp_path / "a.npy") == []
        else:
            found = tokens(tmp_path / "a.npy", eos_id=99)
            wanted = [token for row in flat_documents(tmp_path / "a.npy") or [] for token in [*row, 99]]
            assert found == wanted


# --- Damage


def files_of(path: Path) -> list[Path]:
    return sorted(path.parent.iterdir())


@pytest.mark.hostile
@pytest.mark.parametrize("kind", CELLS)
def test_a_cut_file_is_refused_and_named(sound: Any, kind: str, tmp_path: Path) -> None:
    origin = sound(kind)
    more = {**settings_of(kind), **({"fields": ["loss_mask"]} if kind == "datatrove" else {})}
    for at, file in enumerate(files_of(origin)):
        if file.suffix == ".metadata":
            continue
        whole = file.read_bytes()
        for cut in sorted({0, 1, 5, 9, 33, 34, 1023, 1024, len(whole) // 2 | 1, len(whole) - 3, len(whole) - 1}):
            if not 0 <= cut < len(whole) or (kind == "raw" and cut and cut % 2 == 0):
                continue
            path = copied(origin, tmp_path / f"{at}-{cut}")
            (path.parent / file.name).write_bytes(whole[:cut])
            error = refused(path, **more)
            assert str(path.parent) in str(error), f"{file.name} cut to {cut}: {error}"
            assert isinstance(error, forebay.DataError)


@pytest.mark.hostile
@pytest.mark.parametrize("kind", [kind for kind in CELLS if kind != "raw"])
def test_no_flipped_bit_of_a_header_or_an_index_gives_other_tokens(sound: Any, kind: str, tmp_path: Path) -> None:
    origin = sound(kind)
    wanted = expected(origin)
    path = copied(origin, tmp_path / "flipped")
    for file in files_of(path):
        whole = file.read_bytes()
        header = {".npy": 128, ".bin": 1024 if kind in ("gpt-2", "llama-3") else 0, ".ds": 0, ".loss": 0}
        bits = 8 * min(header.get(file.suffix, len(whole)), len(whole))
        # Every bit of the first bytes, and one of every 37 of the others.
        for bit in [*range(min(bits, 400)), *range(400, bits, 37)]:
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            try:
                found = tokens(path)
            except forebay.ForebayError as error:
                assert str(path.parent) in str(error)
            else:
                # Where documents end may change unseen; what they hold may not.
                assert found == wanted, f"{file.name}, bit {bit}"
        file.write_bytes(whole)
    assert tokens(path) == wanted


def megatron_index(lengths: list[int], firsts: list[int], *, offsets: list[int] | None = None, **more: Any) -> bytes:
    counts = more.get("counts", (len(lengths), len(firsts)))
    places = [sum(lengths[:at]) * 2 for at in range(len(lengths))] if offsets is None else offsets
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", more.get("version", 1), more.get("code", 8), *counts)
    parts = (np.array(lengths, "<i4"), np.array(places, "<i8"), np.array(firsts, "<i8"))
    return head + b"".join(part.tobytes() for part in parts)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("index", "text"),
    [
        (b"", "MMIDIDX"),
        (b"TNTIDX\0\0" + bytes(100), "MMIDIDX"),
        (b"MMIDIDX\0\0", "at least 34 bytes"),
        (megatron_index([4, 6], [0, 1, 2], version=2), "version 2"),
        (megatron_index([4, 6], [0, 1, 2], code=9), "expected 1 to 8"),
        (megatron_index([4, 6], [0, 1, 2], code=7), "float32"),
        (megatron_index([4, 6], [0, 1, 2], code=4), "expected"),
        (megatron_index([4, 6], [0, 1, 2], counts=(1 << 60, 3)), "sequences"),
        (megatron_index([4, 6], [0, 1, 2], counts=(2, 1 << 60)), "entries of documents"),
        (megatron_index([4, 6], [0, 1, 2], counts=((1 << 64) - 1, (1 << 64) - 1)), "2^64"),
        (megatron_index([4, -6], [0, 1, 2]), "length -6"),
        (megatron_index([4, 7], [0, 1, 2]), "22 bytes"),
        (megatron_index([4, 5], [0, 1, 2]), "18 bytes"),
        (megatron_index([2**31 - 1, 2**31 - 1], [0, 1, 2]), "bytes"),
        (megatron_index([4, 6], [0, 1, 2], offsets=[0, 1 << 40]), "outside of the ids"),
        (megatron_index([4, 6], [0, 1, 2], offsets=[0, -8]), "begins at byte -8"),
        (megatron_index([4, 6], [0, 1, 2], offsets=[0, 10]), "expected byte 8"),
        (megatron_index([4, 6], [0, 1, 3]), "expected 1 to 2"),
        (megatron_index([4, 6], [0, 1, 1]), "after 1 sequences"),
        (megatron_index([4, 6], [1, 1, 2]), "begins at sequence 1"),
        (megatron_index([4, 6], [0, 2, 1, 2]), "begins at sequence 1"),
        (megatron_index([4, 6], [0, -1, 2]), "expected 0 to 2"),
        (megatron_index([4, 6], []), "after 0 sequences"),
    ],
)
def test_an_index_of_megatron_that_does_not_fit_is_refused(tmp_path: Path, index: bytes, text: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<10H", *range(10)))
    path.with_suffix(".idx").write_bytes(index)
    error = refused(path)
    assert text in str(error), str(error)
    assert str(path) in str(error) or str(path.with_suffix(".idx")) in str(error)
    # An index that is sound, in the same place.
    path.with_suffix(".idx").write_bytes(megatron_index([4, 0, 6], [0, 1, 1, 3]))
    assert tokens(path, eos_id=77) == [0, 1, 2, 3, 77, 4, 5, 6, 7, 8, 9, 77]


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("ends", "beside", "text"),
    [
        ([4, 9], {}, "expected 18 bytes (uint16) or 36 (uint32), found 20"),
        ([4, 11], {}, "found 20"),
        ([11, 10], {}, "document 0 ends after 11 tokens"),
        ([4, 3, 10], {}, "document 1 ends after 3 tokens"),
        ([1 << 63], {}, "found 20"),
        ([(1 << 64) - 1], {}, "found 20"),
        ([], {}, "found 20"),
        ([4, 10], {".metadata": "gpt2|4\n10\n10 T"}, "number of bytes of an id is 4"),
        ([4, 10], {".metadata": "gpt2|2\n11\n11 T"}, "number of ids is 11"),
    ],
)
def test_an_index_of_datatrove_that_does_not_fit_is_refused(
    tmp_path: Path, ends: list[int], beside: dict[str, str], text: str
) -> None:
    path = tmp_path / "a.ds"
    path.write_bytes(struct.pack("<10H", *range(10)))
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    for suffix, content in beside.items():
        Path(f"{path}{suffix}").write_text(content)
    error = refused(path)
    assert text in str(error), str(error)
    for suffix in beside:
        Path(f"{path}{suffix}").write_text("no metadata of datatrove")
    Path(f"{path}.index").write_bytes(struct.pack("<4Q", 0, 4, 4, 10))
    assert tokens(path, eos_id=77) == [0, 1, 2, 3, 77, 4, 5, 6, 7, 8, 9, 77]


def test_ids_without_their_index_say_what_is_missing(sound: Any, tmp_path: Path) -> None:
    path = copied(sound("megatron"), tmp_path / "m")
    index = path.with_suffix(".idx")
    assert f"name the ids, `{path}`" in str(refused(index))
    index.unlink()
    assert str(index) in str(refused(path)) and "`bin_dtype`" in str(refused(path))
    path = copied(sound("datatrove"), tmp_path / "d")
    for suffix in (".index", ".loss", ".metadata"):
        assert f"name these, `{path}`" in str(refused(f"{path}{suffix}"))
    Path(f"{path}.index").unlink()
    assert f"`{path}.index`" in str(refused(path))


@pytest.mark.parametrize("kind", ["megatron", "datatrove", "npy", "gpt-2"])
def test_a_shard_without_documents_is_sound_beside_others(sound: Any, kind: str, tmp_path: Path) -> None:
    path = copied(sound(kind), tmp_path / "corpus")
    cell = CELLS[kind]
    empty = tmp_path / "corpus" / f"aaa.{path.suffix[1:]}"
    corpora.FLAT_WRITERS[cell.container](cell, empty, [])
    assert tokens(tmp_path / "corpus") == expected(path)
    assert command("check", tmp_path / "corpus", "--json")["sound"]


def test_an_empty_raw_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.touch()
    for more in ({}, {"bin_dtype": "uint16"}):
        assert "shard is empty" in str(refused(path, **more))


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_a_negative_id_or_a_changed_index_fails_with_its_place(sound: Any, kind: str, tmp_path: Path) -> None:
    path = copied(sound(kind), tmp_path)
    beside = path.with_suffix(".idx") if kind == "megatron" else Path(f"{path}.index")
    with forebay.Loader(path, seq_len=4, eos_id=0, num_threads=0, io="pread") as loader:
        batches = iter(loader)
        next(batches)
        beside.write_bytes(beside.read_bytes()[:-8])
        with pytest.raises(forebay.ForebayError, match=r"changed|shrank"):
            for _ in batches:
                pass
    if kind == "megatron":
        path = copied(sound(kind), tmp_path / "negative")
        data = bytearray(path.read_bytes())
        data[4 * 700 : 4 * 701] = struct.pack("<i", -5)
        path.write_bytes(data)
        documents = flat_documents(path) or []
        row = next(at for at, document in enumerate(documents) if -5 in document)
        error = refused(path)
        assert "found -5" in str(error) and error.row == row


# --- What stands beside the ids


def test_the_mask_of_datatrove_is_a_field_and_told_if_it_is_not_read(sound: Any, caplog: Any, tmp_path: Path) -> None:
    path = sound("datatrove")
    wanted = [bool(value) for document in loss_mask_of_datatrove(path) for value in document]
    with forebay.Loader(path, seq_len=1, batch_size=64, remainder="short", fields=["loss_mask"]) as loader:
        found = [bool(value) for batch in loader for value in np.asarray(batch["loss_mask"]).ravel()]
    assert found == wanted and 0 < sum(wanted) < len(wanted)
    # The log says it once of each file, and other tests have read the first one.
    path = copied(path, tmp_path)
    with caplog.at_level(logging.WARNING, "forebay"):
        tokens(path)
    assert "`loss_mask` is not read" in caplog.text
    mask = Path(f"{path}.loss")
    mask.write_bytes(mask.read_bytes()[:-1])
    error = refused(path, fields=["loss_mask"])
    assert str(mask) in str(error)


# --- Runs


@pytest.mark.parametrize("kind", CELLS)
def test_shuffle_ranks_resume_and_a_saved_index_agree(sound: Any, kind: str, tmp_path: Path) -> None:
    for at in range(3):
        path = copied(sound(kind), tmp_path / "corpus" / str(at))
    wanted = expected(path, CELLS[kind].bin_dtype) * 3
    data = tmp_path / "corpus"
    common = {**settings_of(kind), "seq_len": 8, "shuffle": True, "seed": 3, "cache_dir": tmp_path / "index"}

    def rows(rank: int, world: int, state: Any = None, stop: int | None = None) -> Any:
        with forebay.Loader(data, batch_size=12 // world, dp_rank=rank, dp_world_size=world, **common) as loader:
            if state is not None:
                loader.load_state_dict(state)
            found = []
            for step, batch in enumerate(loader):
                found += [tuple(row) for row in np.asarray(batch["input_ids"]).tolist()]
                if step + 1 == stop:
                    break
            return found, loader.state_dict()

    whole, _ = rows(0, 1)
    pieces = [tuple(wanted[at : at + 8]) for at in range(0, len(wanted) - 7, 8)]
    assert len(whole) == len(pieces) // 12 * 12 and whole != pieces[: len(whole)]
    assert not set(whole) - set(pieces)
    shares = [rows(rank, 3)[0] for rank in range(3)]
    assert [row for step in zip(*shares, strict=True) for row in step] == whole
    first, state = rows(0, 1, stop=5)
    rest, _ = rows(0, 1, state=json.loads(json.dumps(state)))
    assert first + rest == whole


def test_a_type_that_differs_from_that_of_the_state_is_refused(sound: Any) -> None:
    path = sound("raw")
    with forebay.Loader(path, seq_len=4, bin_dtype="uint16") as loader:
        next(iter(loader))
        state = loader.state_dict()
    with (
        forebay.Loader(path, seq_len=4, bin_dtype="uint8") as loader,
        pytest.raises(forebay.StateMismatchError) as caught,
    ):
        loader.load_state_dict(state)
        next(iter(loader))
    assert "`bin_dtype`" in str(caught.value) and "uint16" in str(caught.value) and "uint8" in str(caught.value)


def test_formats_do_not_mix_in_a_corpus(sound: Any, tmp_path: Path) -> None:
    copied(sound("npy"), tmp_path)
    copied(sound("gpt-2"), tmp_path)
    assert "formats differ between shards" in str(refused(tmp_path))
    assert tokens(tmp_path, format="npy") == expected(sound("npy"))


@pytest.mark.parametrize("kind", CELLS)
def test_commands_read_flat_files(sound: Any, kind: str, tmp_path: Path) -> None:
    path = copied(sound(kind), tmp_path / "corpus")
    cell = CELLS[kind]
    documents = [document for document in flat_documents(path, cell.bin_dtype) or [] if document]
    more = [] if cell.bin_dtype is None else ["--set", f"bin_dtype={cell.bin_dtype}"]
    found = command("check", tmp_path / "corpus", *more, "--json")
    assert found["sound"] and found["format"] == {cell.container: 1}
    assert (found["documents"], found["tokens"]) == (len(documents), sum(map(len, documents)))
    sizes = ["--seq-len", "16", "--batch-size", "2", "--set", "eos_id=0", *more]
    command("plan", tmp_path / "corpus", *sizes)
    command("verify", tmp_path / "corpus", *sizes, "--set", "shuffle=true")
    command("rewrite", tmp_path / "corpus", tmp_path / "fast", *more)
    assert tokens(tmp_path / "fast", eos_id=0) == tokens(path, eos_id=0, **settings_of(kind))


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_whole_documents_are_packed_as_those_of_arrow(sound: Any, kind: str, tmp_path: Path) -> None:
    path = sound(kind)
    arrow = corpora.write_rows(tmp_path / "a.arrow", [row for row in flat_documents(path) or [] if row])
    settings: dict[str, Any] = {"seq_len": 64, "batch_size": 2, "layout": "pack", "shuffle": True, "seed": 1}
    try:
        loaders = [forebay.Loader(data, **settings) for data in (path, arrow)]
    except (TypeError, forebay.ConfigError):
        pytest.skip("this build has no packing")
    found = [[{k: np.asarray(v).tolist() for k, v in batch.items()} for batch in loader] for loader in loaders]
    assert found[0] == found[1] and len(found[0]) > 2


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_another_index_with_equal_counts_is_noticed(tmp_path: Path, kind: str, newer: bool) -> None:
    data, cache = tmp_path / "corpus", tmp_path / "cache"
    data.mkdir()
    path = data / ("a.bin" if kind == "megatron" else "a.ds")
    np.arange(1, 10, dtype=np.uint16).tofile(path)
    index = path.with_suffix(".idx") if kind == "megatron" else Path(f"{path}.index")

    def write(lengths: list[int], seconds: int) -> None:
        if kind == "megatron":
            index.write_bytes(megatron_index(lengths, list(range(len(lengths) + 1))))
        else:
            np.cumsum(lengths).astype("<u8").tofile(index)
        os.utime(index, (seconds, seconds))

    def documents() -> list[int]:
        with forebay.Loader(data, seq_len=9, layout="pad", boundaries=True, cache_dir=cache) as loader:
            return [int((batch["doc_ids"] == 0).sum()) for batch in loader]

    write([4, 2, 3], 1_700_000_000)
    assert documents() == documents() == [4, 2, 3]
    write([2, 2, 5], 1_700_000_000 + (60 if newer else -60))
    assert documents() == [2, 2, 5]
