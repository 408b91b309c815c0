"""Tests the choice of the token column.

No column is taken by its name alone, and whole files are not called damaged.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
from support import clean_environment

import forebay

CONTAINERS = ("parquet", "arrow", "stream", "zstd")
LISTS = {
    "list": pa.list_(pa.int32()),
    "large_list": pa.large_list(pa.int32()),
}


def write(path: Path, table: pa.Table, container: str) -> None:
    if container == "parquet":
        pq.write_table(table, path)
        return
    options = ipc.IpcWriteOptions(compression="zstd" if container == "zstd" else None)
    new = ipc.new_stream if container == "stream" else ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)


def write_corpus(root: Path, tables: list[pa.Table], container: str) -> Path:
    root.mkdir(parents=True)
    for at, table in enumerate(tables):
        write(root / f"{at}.{'parquet' if container == 'parquet' else 'arrow'}", table, container)
    return root


def tokens(data: Path, **settings: Any) -> list[int]:
    with forebay.Loader(data, seq_len=1, batch_size=1, **settings) as loader:
        return [int(batch["input_ids"][0, 0]) for batch in loader]


def ids(rows: list[Any], kind: pa.DataType = LISTS["list"]) -> pa.Array:
    return pa.array(rows, kind)


def command(*arguments: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "forebay", *map(str, arguments), "--json"],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- Which column


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["tokens", "ids"])
@pytest.mark.parametrize("number", [pa.int64(), pa.uint16(), pa.int32()])
def test_a_number_beside_other_columns_is_not_taken_for_a_token(
    tmp_path: Path, container: str, name: str, number: pa.DataType
) -> None:
    for at, other in enumerate((pa.array(["a b", "c"]), ids([[5, 6], [7]]), pa.array([0.5, 1.5]))):
        table = pa.table({name: pa.array([311, 27], number), "other": other})
        root = write_corpus(tmp_path / str(at), [table], container)
        with pytest.raises(forebay.DataError) as caught:
            tokens(root)
        for part in (f"`{name}`", "`other`", "`token_column`", str(root)):
            assert part in str(caught.value), str(caught.value)
        assert tokens(root, token_column=name) == [311, 27]


@pytest.mark.parametrize("container", CONTAINERS)
def test_lists_are_taken_before_numbers(tmp_path: Path, container: str) -> None:
    table = pa.table({"tokens": pa.array([2, 1], pa.int64()), "ids": pa.array([0, 1]), "token_ids": ids([[5, 6], [7]])})
    root = write_corpus(tmp_path / "corpus", [table], container)
    assert tokens(root) == [5, 6, 7]
    assert command("check", root)["tokens"] == 3
    assert command("verify", root, "--seq-len", 1, "--batch-size", 1)["proven"]
    command("rewrite", root, tmp_path / "new")
    assert tokens(tmp_path / "new") == [5, 6, 7]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_number_alone_is_taken_with_a_word(tmp_path: Path, container: str, caplog: pytest.LogCaptureFixture) -> None:
    for name, warned in (("tokens", True), ("ids", True), ("input_ids", False), ("token_ids", False)):
        root = write_corpus(tmp_path / name, [pa.table({name: pa.array([4, 5, 6], pa.uint16())})], container)
        with caplog.at_level(logging.WARNING, "forebay"):
            caplog.clear()
            assert tokens(root) == [4, 5, 6]
        assert bool(caplog.messages) == warned, (name, caplog.messages)
        with caplog.at_level(logging.WARNING, "forebay"):
            caplog.clear()
            assert tokens(root, token_column=name) == [4, 5, 6]
        assert not caplog.messages


@pytest.mark.parametrize("container", CONTAINERS)
def test_shards_of_other_columns_are_refused(tmp_path: Path, container: str) -> None:
    lists, plain = ids([[1, 2], [3]]), pa.array([1, 2, 3], pa.int32())
    pairs = {
        "name": ({"input_ids": lists}, {"tokens": lists}),
        "later name": ({"ids": lists}, {"token_ids": lists}),
        "kind": ({"input_ids": lists}, {"input_ids": plain}),
        "kind, other order": ({"input_ids": plain}, {"input_ids": lists}),
        "row numbers": ({"input_ids": lists}, {"ids": plain, "text": pa.array(["a", "b", "c"])}),
    }
    for at, (first, second) in enumerate(pairs.values()):
        root = write_corpus(tmp_path / str(at), [pa.table(first), pa.table(second)], container)
        for more in ({}, {"cache_dir": tmp_path / "cache"}):
            with pytest.raises(forebay.DataError) as caught:
                tokens(root, **more)
            assert "1." in str(caught.value), str(caught.value)
        done = subprocess.run(
            [sys.executable, "-m", "forebay", "rewrite", str(root), str(tmp_path / f"new{at}")],
            capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode != 0 and "column" in done.stderr, done.stderr


@pytest.mark.parametrize("container", CONTAINERS)
def test_lists_of_several_widths_and_the_column_that_is_named_may_differ(tmp_path: Path, container: str) -> None:
    both = {"mine": ids([[8], [9, 7]]), "input_ids": ids([[1], [2]])}
    tables = [pa.table(both), pa.table({**both, "mine": ids([[8], [9, 7]], LISTS["large_list"])})]
    root = write_corpus(tmp_path / "corpus", tables, container)
    assert tokens(root, token_column="mine") == [8, 9, 7] * 2


@pytest.mark.parametrize("container", CONTAINERS)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, container: str) -> None:
    for at, other in enumerate((ids([[5], [6]]), pa.array([1, 2]), pa.array(["a", "b"]))):
        table = pa.Table.from_arrays([ids([[1], [2]]), other], names=["input_ids", "input_ids"])
        root = write_corpus(tmp_path / str(at), [table], container)
        for more in ({}, {"token_column": "input_ids"}):
            with pytest.raises(forebay.DataError, match="several columns named `input_ids`"):
                tokens(root, **more)


# --- Shards without tokens

EMPTY: dict[str, pa.Table] = {
    "list<null>, empty lists": pa.table({"input_ids": pa.array([[], []])}),
    "list<null>, null lists": pa.table({"input_ids": pa.array([None, []], pa.list_(pa.null()))}),
    "list<null>, no rows": pa.table({"input_ids": pa.array([], pa.list_(pa.null()))}),
    "large_list<null>": pa.table({"input_ids": pa.array([[], []], pa.large_list(pa.null()))}),
    "list<double>": pa.table({"input_ids": pa.array([[], [], None], pa.list_(pa.float64()))}),
    "list<string>": pa.table({"input_ids": pa.array([[], []], pa.list_(pa.string()))}),
    "list<int64>, no rows": pa.table({"input_ids": ids([], pa.list_(pa.int64()))}),
    "list<uint16>, empty lists": pa.table({"input_ids": ids([[], []], pa.list_(pa.uint16()))}),
    "nulls": pa.table({"input_ids": pa.nulls(2)}),
    "numbers, no rows": pa.table({"input_ids": pa.array([], pa.int64())}),
    "double, no rows": pa.table({"input_ids": pa.array([], pa.float64())}),
    "text, no rows": pa.table({"input_ids": pa.array([], pa.string())}),
    "struct, no rows": pa.table({"input_ids": pa.array([], pa.struct([("a", pa.int32())]))}),
    "another name": pa.table({"tokens": ids([[], []])}),
    "no such column, no rows": pa.table({"text": pa.array([], pa.string())}),
    "no columns": pa.table({}),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", list(EMPTY))
def test_a_shard_without_tokens_fits_to_all(tmp_path: Path, container: str, name: str) -> None:
    full = pa.table({"input_ids": ids([[1, 2], [], [3]])})
    for at, order in enumerate(([full, EMPTY[name]], [EMPTY[name], full], [EMPTY[name], full, EMPTY[name]])):
        root = write_corpus(tmp_path / str(at), order, container)
        assert tokens(root) == [1, 2, 3]
        cached = {"cache_dir": tmp_path / f"cache{at}"}
        assert tokens(root, **cached) == tokens(root, **cached) == [1, 2, 3]
    assert command("check", root)["tokens"] == 3
    assert command("verify", root, "--seq-len", 1, "--batch-size", 1)["proven"]
    assert command("rewrite", root, tmp_path / "new")["tokens"] == 3
    assert tokens(tmp_path / "new") == [1, 2, 3]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "column",
    [
        pa.array([[], [None]], pa.list_(pa.null())),
        pa.array([[], [1.5]], pa.list_(pa.float64())),
        pa.array([[], ["a"]], pa.list_(pa.string())),
        pa.array([1.5, 2.5]),
        pa.array(["a", "b"]),
    ],
    ids=str,
)
def test_a_column_of_another_type_with_values_is_refused(tmp_path: Path, container: str, column: pa.Array) -> None:
    tables = [pa.table({"input_ids": ids([[1]])}), pa.table({"input_ids": column})]
    root = write_corpus(tmp_path / "corpus", tables, container)
    with pytest.raises(forebay.DataError) as caught:
        tokens(root)
    assert "`input_ids`" in str(caught.value) and "1." in str(caught.value), str(caught.value)


# --- Files that others read


def with_file_path(path: Path, name: str) -> None:
    """Names `name` as the file of every column chunk of a Parquet file."""
    raw = path.read_bytes()
    metadata = pq.read_metadata(path)
    metadata.set_file_path(name)
    sink = io.BytesIO()
    metadata.write_metadata_file(sink)
    old = struct.unpack("<I", raw[-8:-4])[0]
    path.write_bytes(raw[: -8 - old] + sink.getvalue()[4:])


def test_a_chunk_may_name_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "part=1"
    folder.mkdir()
    path = folder / "shard.parquet"
    for name in ("", "shard.parquet", "./shard.parquet", "part=1/shard.parquet", str(path)):
        pq.write_table(pa.table({"input_ids": ids([[1, 2], [3]])}), path)
        with_file_path(path, name)
        assert tokens(path) == [1, 2, 3], name
        monkeypatch.chdir(folder)
        assert tokens(Path("shard.parquet")) == [1, 2, 3], name
    for name in ("other.parquet", "part=2/shard.parquet", "shard.parquet/other"):
        pq.write_table(pa.table({"input_ids": ids([[1, 2], [3]])}), path)
        with_file_path(path, name)
        with pytest.raises(forebay.DataError, match="another file"):
            tokens(path)


def encrypted(path: Path, columns: list[str], plaintext_footer: bool) -> None:
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Kms(encryption.KmsClient):  # type: ignore[name-defined, misc]
        def wrap_key(self, key: bytes, name: str) -> bytes:
            return base64.b64encode(name.encode().ljust(16) + key)

        def unwrap_key(self, wrapped: bytes, name: str) -> bytes:
            return base64.b64decode(wrapped)[16:]

    how = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": columns}, plaintext_footer=plaintext_footer
    )
    factory = encryption.CryptoFactory(lambda _: Kms())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    rows = [list(range(i)) for i in range(40)]
    table = pa.table({"input_ids": ids(rows), "other": ids(rows), "text": ["a"] * 40})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_an_encrypted_column_is_called_encrypted(tmp_path: Path, plaintext_footer: bool) -> None:
    path = tmp_path / "a.parquet"
    encrypted(path, ["input_ids.list.element"], plaintext_footer)
    for run in (lambda: tokens(path), lambda: command("check", path)):
        with pytest.raises((forebay.DataError, AssertionError), match="encrypt"):
            run()


def test_columns_beside_an_encrypted_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    encrypted(path, ["text"], plaintext_footer=True)
    assert tokens(path) == [id for i in range(40) for id in range(i)]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed", "plain"])
@pytest.mark.parametrize("dtype", [pa.int32(), pa.int64()])
@pytest.mark.parametrize("bos", [None, 1])
def test_a_negative_id_names_its_row(
    tmp_path: Path, container: str, kind: str, dtype: pa.DataType, bos: int | None
) -> None:
    rows: list[Any] = [[k] * 3 for k in range(1, 9)]
    rows[7] = [1, -100, 2]
    if kind == "plain":
        table = pa.table({"input_ids": pa.array([id for row in rows for id in row], dtype)})
        expected = 22
    else:
        if kind != "fixed":
            rows[2], rows[4] = [], None
        of = {"list": pa.list_(dtype), "large_list": pa.large_list(dtype), "fixed": pa.list_(dtype, 3)}[kind]
        table, expected = pa.table({"input_ids": pa.array(rows, of)}), 7
    path = tmp_path / "shard"
    write(path, table, container)
    for more in ({}, {"io": "pread"}):
        with pytest.raises(forebay.DataError, match="-100") as caught:
            tokens(path, bos_id=bos, **more)
        assert caught.value.row == expected, str(caught.value)
        assert os.fspath(caught.value.path) == os.fspath(path)


def test_an_id_too_large_for_the_delivered_type_names_its_row(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    write(path, pa.table({"input_ids": ids([[1], [2, 3], [4, 3_000_000_000]], pa.list_(pa.uint32()))}), "arrow")
    with pytest.raises(forebay.DataError, match="3000000000") as caught:
        tokens(path, input_dtype="int32")
    assert caught.value.row == 2


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (bytes(range(1, 200)), "dtype"), (b"\x93NUMPY\x01\x00", "NumPy"), (b"\x1f\x8b\x08\x00abc", "decompress"),
        (b"\x28\xb5\x2f\xfd0000", "decompress"), (b"PK\x03\x04zip!", "unpack"), (b'{"text": "a"}\n', "tokenize"),
    ],
)  # fmt: skip
def test_a_file_of_another_format_gets_a_remedy(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(forebay.DataError, match=word):
        tokens(path)


# --- Columns that are not read


@pytest.mark.parametrize("container", CONTAINERS)
def test_check_lists_every_column_that_is_not_read(tmp_path: Path, container: str) -> None:
    others = {name: ids([[1, 0], [1]]) for name in ("a_mask_of_mine", "n-grams", "odd\nname")}
    tables = [
        pa.table({"input_ids": ids([[1, 2], [3]]), **others, "text": ["a", "b"]}),
        pa.table({"text": ["c"], "input_ids": ids([[4]])}),
    ]
    root = write_corpus(tmp_path / "corpus", tables, container)
    found = {entry["column"]: entry["shards"] for entry in command("check", root)["not_read"]}
    assert found == {"text": 2, **dict.fromkeys(others, 1)}


# --- First mistakes


class Dataset:
    """A dataset of another library, as it looks from outside."""

    column_names = ("input_ids",)

    def __iter__(self) -> Any:
        return iter([{"input_ids": [1]}])


@pytest.mark.parametrize("data", [Dataset(), {"train": "a"}, [{"input_ids": [1]}], 7, [Path("a"), None]], ids=repr)
def test_what_is_no_path_is_refused_with_the_remedy(data: Any) -> None:
    with pytest.raises(TypeError, match="save_to_disk"):
        forebay.Loader(data)


@pytest.mark.parametrize("data", ["ftp://host/corpus/*.parquet", "s3n://b", "dbfs://x/y", "abfs://host/a.parquet"])
def test_a_url_of_another_scheme_is_refused_with_the_remedy(data: str) -> None:
    with pytest.raises(forebay.ConfigError, match="object store") as caught:
        forebay.Loader(data)
    assert data in str(caught.value) and "s3://" in str(caught.value)
