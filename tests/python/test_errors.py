"""Tests that bad data is an error that names the file and the place.

It is never a hang or a shorter epoch.

What opening can see fails in the constructor; what only decoding sees fails at its batch, and the
state points there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Settings

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import pyarrow as pa
import pyarrow.parquet as pq
from support import open_loader

import forebay

pytestmark = pytest.mark.hostile

SETTINGS = Settings(seq_len=8, batch_size=2)
SUFFIXES = ("parquet", "arrow")


def rows(count: int = 64, *, start: int = 1) -> list[list[int]]:
    return [list(range(start + 8 * i, start + 8 * i + 8)) for i in range(count)]


def drain(data: Any, **more: Any) -> None:
    with open_loader(data, SETTINGS, **more) as loader:
        for _ in loader:
            pass


def failure(data: Any, kind: type[BaseException] = forebay.ForebayError, **more: Any) -> Any:
    with pytest.raises(kind) as caught:
        drain(data, **more)
    assert isinstance(caught.value, forebay.ForebayError)
    return caught.value


def place_of(error: Any, path: Path) -> None:
    assert os.fspath(error.path) == os.fspath(path)
    assert str(path) in str(error)
    assert error.block is not None or error.row is not None, f"no place inside the file: {error}"


def test_exceptions_are_the_builtin_ones_too() -> None:
    for kind, builtin in [
        (forebay.ConfigError, ValueError), (forebay.DataError, ValueError), (forebay.StateMismatchError, ValueError),
        (forebay.NotFoundError, FileNotFoundError),
    ]:  # fmt: skip
        assert issubclass(kind, forebay.ForebayError)
        assert issubclass(kind, builtin)


@pytest.mark.parametrize("what", ["missing.parquet", "missing/", "*.parquet", "."])
def test_no_shards_found_names_what_was_searched(tmp_path: Path, what: str) -> None:
    error = failure(f"{tmp_path}/{what}", FileNotFoundError)
    assert str(tmp_path) in str(error)


@pytest.mark.parametrize(("count", "said"), [(0, "0 other files;"), (1, "1 other file;"), (2, "2 other files;")])
def test_a_folder_without_shards_counts_its_other_files(tmp_path: Path, count: int, said: str) -> None:
    for number in range(count):
        (tmp_path / f"{number}.txt").touch()
    assert f"found {said}" in str(failure(tmp_path, FileNotFoundError))


def test_no_data_is_refused() -> None:
    with pytest.raises(forebay.ConfigError, match="data"):
        forebay.Loader([])


def test_an_epoch_without_a_batch_is_told_when_the_loader_opens(tmp_path: Path, caplog: Any) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", rows())
    for batch_size, told in [(64, []), (65, ["64 sequences of `seq_len` = 8 make none of 65"])]:
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, "forebay"),
            forebay.Loader(path, seq_len=8, batch_size=batch_size) as loader,
        ):
            assert len(loader) == 1 - len(told)
        found = [record.getMessage() for record in caplog.records]
        assert len(found) == len(told) and all(text in message for text, message in zip(told, found, strict=True))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_token_column_lists_the_columns(tmp_path: Path, suffix: str) -> None:
    path = corpora.write_rows(tmp_path / f"shard.{suffix}", rows(), column="words")
    error = failure(path, forebay.DataError)
    assert "words" in str(error) and "token_column" in str(error)
    assert os.fspath(error.path) == os.fspath(path)
    error = failure(path, forebay.DataError, token_column="input_ids")
    assert "input_ids" in str(error) and "words" in str(error)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [pa.list_(pa.float32()), pa.list_(pa.string()), pa.string(), pa.float64()], ids=str)
def test_a_column_that_holds_no_ids_is_named_with_its_type(tmp_path: Path, suffix: str, dtype: pa.DataType) -> None:
    values: list[Any] = ["1.5"] if dtype == pa.string() else [1.5]
    if dtype == pa.list_(pa.float32()):
        values = [[1.5, 2.5]]
    elif dtype == pa.list_(pa.string()):
        values = [["a", "b"]]
    path = corpora.write_rows(tmp_path / f"shard.{suffix}", values, dtype=dtype)
    error = failure(path, forebay.DataError)
    assert os.fspath(error.path) == os.fspath(path)
    text = str(error).lower()
    assert "input_ids" in text
    assert any(name in text for name in ("float", "double", "utf8", "string", "byte_array")), text


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("parquet", {"row_group_size": 16}),
        ("arrow", {}),
        ("arrow", {"stream": True}),
        ("arrow", {"compression": "lz4"}),
    ],
)
def test_null_tokens_are_refused_with_their_place(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    bad: list[Any] = rows()
    bad[40] = [1, None, 3, 4, 5, 6, 7, 8]
    path = corpora.write_rows(tmp_path / f"shard.{suffix}", bad, **options)
    error = failure(path, forebay.DataError)
    assert "null" in str(error)
    place_of(error, path)


@pytest.mark.parametrize("dtype", [pa.int32(), pa.int64()], ids=str)
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("parquet", {"row_group_size": 16}),
        ("arrow", {}),
        ("arrow", {"stream": True}),
        ("arrow", {"compression": "zstd"}),
    ],
)
def test_a_negative_id_fails_at_its_batch(
    tmp_path: Path, suffix: str, options: dict[str, Any], dtype: pa.DataType
) -> None:
    bad = rows()
    bad[40][3] = -7
    path = corpora.write_rows(tmp_path / f"shard.{suffix}", bad, dtype=pa.list_(dtype), **options)
    with open_loader(path, SETTINGS, block_tokens=64, num_threads=2) as loader:
        iterator = iter(loader)
        got = 0
        with pytest.raises(forebay.DataError, match="-7") as caught:
            for _ in range(len(loader)):
                next(iterator)
                got += 1
        place_of(caught.value, path)
        # Rows are sequences here, so id -7 is in batch 20; blocks before its own are whole.
        assert 16 <= got <= 20
        assert loader.state_dict()["position"] == got * 2
        with pytest.raises(forebay.ForebayError):
            next(iterator)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_id_too_large_for_int32_delivery_is_refused(tmp_path: Path, suffix: str) -> None:
    bad = rows()
    bad[40][3] = 3_000_000_000
    path = corpora.write_rows(tmp_path / f"shard.{suffix}", bad, dtype=pa.list_(pa.uint32()))
    error = failure(path, input_dtype="int32")
    assert "3000000000" in str(error)
    drain(path, input_dtype="int64")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mixed_types_between_shards_are_refused(tmp_path: Path, suffix: str) -> None:
    corpora.write_rows(tmp_path / f"a.{suffix}", rows(), dtype=pa.list_(pa.int32()))
    second = corpora.write_rows(tmp_path / f"b.{suffix}", rows(), dtype=pa.list_(pa.uint16()))
    error = failure(tmp_path, forebay.DataError)
    assert "int32" in str(error) and "uint16" in str(error) and second.name in str(error)


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    corpora.write_rows(tmp_path / "a.arrow", rows())
    corpora.write_rows(tmp_path / "b.parquet", rows())
    text = str(failure(tmp_path)).lower()
    assert "arrow" in text and "parquet" in text


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0, 1, 4, 7, 11, 0.5, -1, -5])
def test_a_truncated_file_is_refused_when_opened(tmp_path: Path, suffix: str, kept: float) -> None:
    path = corpora.write_rows(tmp_path / f"shard.{suffix}", rows())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(forebay.ForebayError) as caught:
        open_loader(path, SETTINGS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
def test_a_truncated_stream_is_refused(tmp_path: Path, cut: float) -> None:
    path = corpora.write_rows(tmp_path / "shard.arrow", rows(), stream=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut)])
    assert str(path) in str(failure(path))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    path.write_bytes(b"this is no token file" * 100)
    text = str(failure(path))
    assert str(path) in text and "found `this is `; the file is damaged, or its name is wrong" in text
    assert "bin_dtype" not in text
    raw = tmp_path / "ids.tokens"
    raw.write_bytes(bytes([0, 200, 3]) * 100)
    text = str(failure(raw))
    assert str(raw) in text and "found 00 c8 03 00 c8 03 00 c8; " in text and "set `bin_dtype`" in text


def test_all_faults_of_a_corpus_are_listed_together(tmp_path: Path) -> None:
    corpora.write_rows(tmp_path / "a-good.parquet", rows())
    (tmp_path / "b-empty.parquet").write_bytes(b"")
    corpora.write_rows(tmp_path / "c-column.parquet", rows(), column="words")
    corpora.write_rows(tmp_path / "d-float.parquet", [[0.5]], dtype=pa.list_(pa.float32()))
    whole = corpora.write_rows(tmp_path / "e-cut.parquet", rows()).read_bytes()
    (tmp_path / "e-cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(forebay.ForebayError) as caught:
        open_loader(tmp_path, SETTINGS)
    text = str(caught.value)
    assert all(name in text for name in ("b-empty", "c-column", "d-float", "e-cut")), text
    assert "a-good" not in text


def test_all_faults_of_the_settings_are_listed_together(tmp_path: Path) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", rows())
    with pytest.raises(forebay.ConfigError) as caught:
        forebay.Loader(path, seq_len=0, batch_size=0, dp_rank=3, dp_world_size=2)
    text = str(caught.value)
    assert all(name in text for name in ("seq_len", "batch_size", "dp_rank")), text


@pytest.mark.parametrize(
    ("name", "value"),
    [("shuffle", "sideways"), ("targets", "both"), ("remainder", "keep"), ("input_dtype", "int16"), ("io", "tape"),
     ("format", "csv"), ("seq_len", -1), ("eos_id", 1 << 40)],
)  # fmt: skip
def test_a_bad_setting_names_itself_and_its_value(tmp_path: Path, name: str, value: Any) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", rows())
    with pytest.raises((forebay.ConfigError, OverflowError)) as caught:
        forebay.Loader(path, **{name: value})
    if isinstance(caught.value, forebay.ConfigError):
        assert name in str(caught.value)
        assert str(value) in str(caught.value)


def test_an_unknown_setting_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="sequence_length"):
        forebay.Loader(tmp_path, sequence_length=3)


def damage_page(path: Path, group: int) -> None:
    """Destroys the compressed bytes of a token page, leaving all metadata and the size as they
    were.
    """
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    data = bytearray(path.read_bytes())
    frame = data.index(b"\x28\xb5\x2f\xfd", column.data_page_offset)
    data[frame : frame + 12] = bytes(12)
    path.write_bytes(data)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_damaged_page_fails_at_its_batch_and_a_repaired_file_continues_there(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "shard.parquet"
    # Pages of version 2 keep the levels apart from the values, so that opening does not see the
    # damage.
    pages = {"use_dictionary": False, "data_page_version": "2.0"}
    corpora.write_rows(path, rows(400), compression="zstd", row_group_size=100, **pages)
    whole = path.read_bytes()
    damage_page(path, 2)
    more = {"num_threads": threads, "block_tokens": 800}
    with open_loader(path, SETTINGS, **more) as loader:
        got = []
        with pytest.raises(forebay.DataError) as caught:
            for batch in loader:
                got.append(batch["input_ids"].copy())
        place_of(caught.value, path)
        state = loader.state_dict()
        assert len(got) == 100, "two row groups of 100 rows are whole, two rows make a batch"
        assert state["position"] == 200
    path.write_bytes(whole)
    with open_loader(path, SETTINGS, **more) as loader:
        loader.load_state_dict(state)
        got += [batch["input_ids"] for batch in loader]
    assert np.array_equal(np.concatenate(got).ravel(), np.arange(1, 3201))


@pytest.mark.parametrize("torch", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_after_an_error_the_next_loop_continues_at_the_failed_batch(tmp_path: Path, torch: bool, told: bool) -> None:
    path = tmp_path / "shard.parquet"
    pages = {"use_dictionary": False, "data_page_version": "2.0"}
    corpora.write_rows(path, rows(400), compression="zstd", row_group_size=100, **pages)
    whole, status = path.read_bytes(), path.stat()

    def keep_time() -> None:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def overwrite(data: bytes) -> None:
        with open(path, "r+b") as file:
            file.write(data)
        keep_time()

    if torch:
        pytest.importorskip("torch", reason="the loader of forebay.torch")
        from forebay.torch import DataLoader, TokenDataset

        dataset = TokenDataset(path, seq_len=SETTINGS.seq_len)
        loader: Any = DataLoader(dataset, batch_size=2, drop_last=True, block_tokens=800)
    else:
        loader = open_loader(path, SETTINGS, block_tokens=800)
    damage_page(path, 2)
    damaged = path.read_bytes()
    keep_time()
    got = []

    def loop() -> None:
        if told:
            loader.set_epoch(0)
        for batch in loader:
            got.append(np.asarray(batch["input_ids"]).copy())

    for _ in range(2):
        with pytest.raises(forebay.DataError):
            loop()
        assert len(got) == 100, "a second loop fails at the same batch"
    overwrite(whole)
    loop()
    assert np.array_equal(np.concatenate(got).ravel(), np.arange(1, 3201)), "nothing was lost"
    assert damaged != whole
    if not told:
        loop()
        assert loader.epoch == 1 if not torch else len(got) == 400, "the next epoch follows"
    loader.close()


def changed_files() -> list[tuple[str, Callable[[Path], None]]]:
    def longer(path: Path) -> None:
        with open(path, "ab") as file:
            file.write(bytes(4096))

    def touched(path: Path) -> None:
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 5_000_000_000))

    def shorter(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    return [("longer", longer), ("touched", touched), ("shorter", shorter)]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("what", "change"), changed_files(), ids=[name for name, _ in changed_files()])
def test_a_file_that_changes_after_opening_is_noticed(
    tmp_path: Path, suffix: str, what: str, change: Callable[[Path], None]
) -> None:
    path = corpora.write_rows(
        tmp_path / f"shard.{suffix}", rows(20_000), **({} if suffix == "arrow" else {"row_group_size": 500})
    )
    # A mapped file that shrinks is a race that only `pread` closes.
    options = {"io": "pread"} if what == "shorter" else {}
    with open_loader(path, SETTINGS, block_tokens=1000, num_threads=1, prefetch_batches=1, **options) as loader:
        iterator = iter(loader)
        next(iterator)
        change(path)
        with pytest.raises(forebay.ForebayError) as caught:
            for _ in range(len(loader)):
                next(iterator)
        assert str(path) in str(caught.value)


def test_a_file_that_vanishes_does_not_end_the_epoch_early(tmp_path: Path) -> None:
    """An open file stays readable after its name is gone; either all batches come or an error
    does.
    """
    path = corpora.write_rows(tmp_path / "shard.arrow", rows(2000))
    with open_loader(path, SETTINGS) as loader:
        iterator = iter(loader)
        next(iterator)
        path.unlink()
        try:
            count = 1 + sum(1 for _ in iterator)
        except forebay.ForebayError as error:
            assert str(path) in str(error)
        else:
            assert count == len(loader)


def test_a_closed_loader_says_so(tmp_path: Path) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", rows())
    loader = open_loader(path, SETTINGS)
    iterator = iter(loader)
    batch = next(iterator)
    kept = batch["input_ids"].copy()
    loader.close()
    loader.close()
    with pytest.raises(forebay.ForebayError, match="closed"):
        next(iterator)
    assert np.array_equal(batch["input_ids"], kept)


def test_a_corpus_without_a_sequence_has_no_batches(tmp_path: Path) -> None:
    path = corpora.write_rows(tmp_path / "shard.parquet", [[1, 2, 3]])
    with open_loader(path, SETTINGS) as loader:
        assert len(loader) == 0
        assert list(loader) == []


def test_what_a_failed_constructor_leaves_can_be_shown(tmp_path: Path) -> None:
    for arguments in ({"data": tmp_path / "nowhere"}, {"data": tmp_path, "pin_memory": True}):
        loader = forebay.Loader.__new__(forebay.Loader)
        with pytest.raises(forebay.ForebayError):
            loader.__init__(**arguments)  # type: ignore[misc]
        assert repr(loader) == "<Loader that was not opened>"
