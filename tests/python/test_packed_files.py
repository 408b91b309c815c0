"""Tests that files which were packed before give the boundaries that their own columns say.

Plain Python on top of pyarrow is the judge. The files are those of TRL's own packing, and files in
the layouts that Megatron-Bridge and writers of `position_ids` publish.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import golden_batches
import golden_packed
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference import read_table, shards
from reference_documents import Cut, arrays, batch_of, chunk_order
from reference_layout import LayoutSettings, is_held_out, pieces, windows
from reference_order import block_order, in_buckets
from reference_run import side
from test_layout_runs import assert_rows, taken
from test_layouts import PAD_ID, assert_same
from test_verify_layouts import verified

import forebay

COLUMNS = ("seq_lengths", "seq_start_id", "position_ids")
ORDER: dict[str, Any] = {"chunk_tokens": 128, "window_tokens": 512, "lanes": 2}


def values_of(column: str, lengths: list[int]) -> list[int]:
    """The list of a row whose documents have these lengths."""
    if column == "seq_lengths":
        return lengths
    if column == "seq_start_id":
        return list(accumulate([0, *lengths[:-1]]))
    return [place for length in lengths for place in range(length)]


def lengths_of(column: str, values: list[int], tokens: int) -> list[int]:
    """The lengths of the documents in a row, as its list says."""
    if column == "seq_lengths":
        return [length for length in values if length]
    if column == "position_ids":
        values = [place for place, position in enumerate(values) if position == 0 or place == 0]
    starts = sorted({start for start in values if start < tokens})
    return [end - start for start, end in zip(starts, [*starts[1:], tokens], strict=True)]


def write(path: Path, rows: list[tuple[list[int], list[int]]], column: str, codec: str = "zstd") -> None:
    """A shard of rows, each with its tokens and the lengths of its documents."""
    kind = {"seq_lengths": pa.int64(), "seq_start_id": pa.int32(), "position_ids": pa.uint16()}[column]
    table = pa.table(
        {
            "input_ids": pa.array([tokens for tokens, _ in rows], pa.list_(pa.int32())),
            "loss_mask": pa.array([[1] * len(tokens) for tokens, _ in rows], pa.list_(pa.uint8())),
            column: pa.array(
                [values_of(column, lengths) if tokens else [] for tokens, lengths in rows], pa.list_(kind)
            ),
        }
    )
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression=codec, row_group_size=7, data_page_size=64, use_dictionary=False)
        return
    options = pa.ipc.IpcWriteOptions(compression=None if codec == "none" else codec)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=5)


def packed(draw: random.Random, length: int) -> tuple[list[int], list[int]]:
    """A row of `length` tokens, and the lengths of its documents."""
    cuts = sorted(draw.sample(range(1, length), min(length - 1, draw.randrange(5)))) if length > 1 else []
    lengths = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    return [draw.randrange(1000) for _ in range(length)], lengths


def corpus(folder: Path, column: str, suffix: str, codec: str, layout: str) -> Path:
    folder.mkdir()
    draw = random.Random(3)
    for shard in range(3):
        lengths = [16] * 40 if layout == "rows" else [draw.choice([0, 1, 7, 16, 40]) for _ in range(40)]
        write(folder / f"{shard}{suffix}", [packed(draw, length) for length in lengths], column, codec)
    return folder


def rows_of(data: Path, s: LayoutSettings, column: str) -> tuple[list[list[Cut]], list[int]]:
    """Every row with its documents, and the first row of each window. In `pad`, a holdout draws
    rows of the files.
    """
    found: list[list[Cut]] = []
    starts: list[int] = []
    before = 0
    for path in shards(data):
        table = read_table(path)
        lists = [table.column(name).to_pylist() for name in ("input_ids", column)]
        rows = [(tokens, values) for tokens, values in zip(*lists, strict=True) if tokens]
        numbers = range(before, before + len(rows))
        before += len(rows)
        for window in windows(pieces([len(tokens) for tokens, _ in rows], s)):
            starts.append(len(found))
            for document, offset, length in window:
                tokens, values = rows[document]
                held = s.layout == "pad" and s.holdout and is_held_out(numbers[document], s.holdout)
                if s.layout == "pad" and s.holdout and held != (s.split == "holdout"):
                    continue
                ends = list(accumulate(lengths_of(column, values, len(tokens))))
                row: list[Cut] = []
                for at in range(offset, offset + length):
                    if at == offset or at in ends:
                        row.append((at - offset, []))
                    row[-1][1].append(tokens[at])
                found.append(row)
    return found, starts


def expected(data: Path, s: LayoutSettings, column: str, batch_size: int, seed: int) -> list[dict[str, Any]]:
    rows, starts = rows_of(data, s, column)
    shape: dict[str, Any] = {"seed": seed, "epoch": 0, "seq_len": s.seq_len, **ORDER}
    order = block_order(len(rows), **shape) if s.layout == "rows" else chunk_order(len(rows), starts, **shape)
    if s.bucket:
        lengths = [sum(len(cut) for _, cut in row) for row in rows]
        order = in_buckets(order, lengths, size=s.bucket, seed=seed, epoch=0, lanes=ORDER["lanes"])
    steps = [order[at : at + batch_size] for at in range(0, len(order) - batch_size + 1, batch_size)]
    return [batch_of([rows[row] for row in step], s, PAD_ID, True) for step in steps]


SETTINGS = [
    LayoutSettings(layout="rows", seq_len=16),
    LayoutSettings(layout="rows", seq_len=15, targets="shifted"),
    LayoutSettings(layout="pad", seq_len=16),
    LayoutSettings(layout="pad", seq_len=24, targets="shifted", overflow="truncate"),
    LayoutSettings(layout="pad", seq_len=16, overflow="drop", pad_to_multiple=4, bucket=16),
]
FILES = [(".parquet", "zstd"), (".arrow", "none"), (".arrow", "lz4")]


@pytest.mark.parametrize("s", SETTINGS, ids=str)
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("suffix, codec", FILES)
def test_boundaries_are_those_of_the_column(
    tmp_path: Path, suffix: str, codec: str, column: str, s: LayoutSettings
) -> None:
    data = corpus(tmp_path / "corpus", column, suffix, codec, s.layout)
    given: dict[str, Any] = {name: value for name, value in vars(s).items() if value is not None}
    given |= {**ORDER, "shuffle": "block", "seed": 5, "pad_id": PAD_ID, "packed_by": column, "cache_dir": tmp_path}
    wanted = expected(data, s, column, 4, 5)
    assert any(max(map(max, batch["doc_ids"])) > 1 for batch in wanted)
    states = []
    with forebay.Loader(data, batch_size=4, **given) as loader:
        for step, (found, batch) in enumerate(zip(loader, wanted, strict=True)):
            assert_same(found, batch, f"step {step}")
            states.append(loader.state_dict())
        assert_same(loader.batch_at(1, 0), wanted[1], "batch_at")
    # Two ranks continue the run of one.
    for rank in range(2):
        with forebay.Loader(data, batch_size=2, dp_rank=rank, dp_world_size=2, **given) as loader:
            loader.load_state_dict(states[2])
            rows = [row.tolist() for batch in loader for row in batch["doc_ids"]]
            of_rank = [row for batch in wanted[3:] for row in batch["doc_ids"][rank::2]]
            assert [row[: len(other)] for row, other in zip(rows, of_rank, strict=True)] == [
                other[: len(row)] for row, other in zip(rows, of_rank, strict=True)
            ]


@pytest.mark.parametrize("s", [SETTINGS[0], SETTINGS[3], SETTINGS[4]], ids=str)
@pytest.mark.parametrize("column", COLUMNS)
def test_packed_files_are_proven_and_wrong_borders_are_not(tmp_path: Path, column: str, s: LayoutSettings) -> None:
    data = corpus(tmp_path / "corpus", column, ".parquet", "none", s.layout)
    given: dict[str, Any] = {name: value for name, value in vars(s).items() if value is not None}
    settings = {**ORDER, **given, "packed_by": column, "shuffle": "block"}
    with forebay.Loader(data, delivery_log=tmp_path / "log", batch_size=4, **settings) as loader:
        assert len(list(loader)) > 0
    log = ("--delivery-log", tmp_path / "log")
    assert verified(data, {**settings, "batch_size": 4}, "--world-size", 2)["proven"]
    assert verified(data, settings, *log)["proven"]
    # The same tokens in the same rows of a file of the same size, and one other border.
    path = data / "0.parquet"
    table, size = read_table(path), path.stat().st_size
    rows = []
    for tokens, values in zip(table.column("input_ids").to_pylist(), table.column(column).to_pylist(), strict=True):
        rows.append((tokens, lengths_of(column, values, len(tokens)) if tokens else []))
    _, lengths = next(row for row in rows if len(row[0]) == 16 and len(row[1]) > 1 and row[1][1] > 1)
    lengths[:2] = lengths[0] + 1, lengths[1] - 1
    write(path, rows, column, "none")
    assert path.stat().st_size == size
    assert not verified(data, settings, *log)["proven"]


RUNS = [LayoutSettings(layout="rows", seq_len=16), LayoutSettings(layout="pad", seq_len=16)]
BOTH = pytest.mark.parametrize("suffix, codec", [(".parquet", "zstd"), (".arrow", "none")])


def arrays_of(data: Path, s: LayoutSettings, column: str) -> list[dict[str, Any]]:
    return [arrays(row, s, PAD_ID, True) for row in rows_of(data, s, column)[0]]


def run_settings(s: LayoutSettings, column: str) -> dict[str, Any]:
    given = {name: value for name, value in vars(s).items() if value is not None}
    return {**ORDER, **given, "shuffle": "block", "seed": 5, "pad_id": PAD_ID, "packed_by": column, "sample_ids": True}


@BOTH
@pytest.mark.parametrize("s", RUNS, ids=str)
@pytest.mark.parametrize("column", COLUMNS)
def test_a_mixture_draws_packed_rows(tmp_path: Path, suffix: str, codec: str, column: str, s: LayoutSettings) -> None:
    sources = [corpus(tmp_path / name, column, suffix, codec, s.layout) for name in ("a", "b")]
    parts = [
        {"name": path.name, "data": str(path), "weight": weight} for path, weight in zip(sources, (3, 1), strict=True)
    ]
    with forebay.Loader(mixture={"sources": parts}, batch_size=2, **run_settings(s, column)) as loader:
        whole = taken(loader)
    assert_rows(whole, [arrays_of(path, s, column) for path in sources])
    numbers = [[number for source, number, _ in whole if source == index] for index in range(2)]
    assert all(numbers) and all(len(set(of_source)) == len(of_source) for of_source in numbers)
    ranks = []
    for rank in range(2):
        more = {"dp_rank": rank, "dp_world_size": 2}
        with forebay.Loader(mixture={"sources": parts}, **more, **run_settings(s, column)) as loader:
            ranks.append(taken(loader))
    merged = [row[:2] for pair in zip(*ranks, strict=True) for row in pair]
    assert merged == [row[:2] for row in whole[: len(merged)]]


@BOTH
@pytest.mark.parametrize("s", RUNS, ids=str)
@pytest.mark.parametrize("column", COLUMNS)
def test_packed_rows_are_skipped_and_held_out(
    tmp_path: Path, suffix: str, codec: str, column: str, s: LayoutSettings
) -> None:
    data = corpus(tmp_path / "corpus", column, suffix, codec, s.layout)
    with forebay.Loader(data, **run_settings(s, column)) as loader:
        whole = taken(loader)
    assert_rows(whole, [arrays_of(data, s, column)])
    with forebay.Loader(data, skip=[(2, 9)], **run_settings(s, column)) as loader:
        found = taken(loader)
    assert_rows(found, [arrays_of(data, s, column)])
    assert [row[:2] for row in found] == [row[:2] for row in [*whole[:2], *whole[9:]]]
    sides = []
    for split in ("train", "holdout"):
        held = replace(s, holdout=3, split=split)
        rows = arrays_of(data, held, column)
        with forebay.Loader(data, **run_settings(held, column)) as loader:
            found = taken(loader)
        assert_rows(found, [rows])
        mine = side(len(rows), 3, split) if s.layout == "rows" else list(range(len(rows)))
        assert sorted(number for _, number, _ in found) == mine
        sides.append(len(found))
    assert sum(sides) == len(whole) and sides[0] > sides[1] > 0


@BOTH
@pytest.mark.parametrize("s", RUNS, ids=str)
@pytest.mark.parametrize("column", COLUMNS)
def test_new_packed_shards_join_at_the_next_epoch(
    tmp_path: Path, suffix: str, codec: str, column: str, s: LayoutSettings
) -> None:
    data = corpus(tmp_path / "corpus", column, suffix, codec, s.layout)
    before = arrays_of(data, s, column)
    with forebay.Loader(data, **run_settings(s, column)) as loader:
        whole = taken(loader)
    with forebay.Loader(data, **run_settings(s, column)) as loader:
        batches = iter(loader)
        for _ in range(5):
            next(batches)
        state = loader.state_dict()
    draw = random.Random(8)
    write(data / f"3{suffix}", [packed(draw, 16) for _ in range(20)], column, codec)
    after = arrays_of(data, s, column)
    assert after[: len(before)] == before and len(after) > len(before)
    with forebay.Loader(data, epochs=2, extend=True, **run_settings(s, column)) as loader:
        loader.load_state_dict(state)
        found = taken(loader)
    assert_rows(found, [after])
    rest = len(before) - 5
    assert [row[:2] for row in found[:rest]] == [row[:2] for row in whole[5:]]
    assert sorted(number for _, number, _ in found[rest:]) == list(range(len(after)))


def test_a_source_without_the_column_is_refused(tmp_path: Path) -> None:
    for name, column in (("a", "seq_lengths"), ("b", "position_ids")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "0.parquet", [([1, 2], [1, 1])] * 9, column)
    parts = [{"name": name, "data": str(tmp_path / name), "weight": 1} for name in ("a", "b")]
    with pytest.raises(forebay.DataError, match="column `seq_lengths` of `packed_by` is missing") as caught:
        forebay.Loader(mixture={"sources": parts}, lanes=1, layout="rows", seq_len=2, packed_by="seq_lengths")
    assert str(tmp_path / "b") in str(caught.value)


def test_the_golden_packed_batches_are_those_of_the_specification() -> None:
    assert golden_packed.GOLDEN.read_text() == golden_packed.text(), "run tests/python/golden_packed.py"


@pytest.mark.parametrize("suffix, codec", FILES)
def test_golden_packed_batches_stay_as_they_are(tmp_path: Path, suffix: str, codec: str) -> None:
    for case in json.loads(golden_packed.GOLDEN.read_text()):
        column, settings = case["packed_by"], case["settings"]
        folder = tmp_path / column / settings["layout"]
        if not folder.exists():
            golden_packed.corpus(folder, column, suffix, codec, settings["layout"] == "rows")
        given = {**ORDER, **settings, "shuffle": "block", "seed": golden_packed.SEED, "pad_id": PAD_ID}
        with forebay.Loader(folder, packed_by=column, batch_size=golden_packed.BATCH_SIZE, **given) as loader:
            found = [dict(batch) for batch in loader]
        assert (len(found), golden_batches.hashed(found)) == (case["batches"], case["sha256"]), case


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_files_as_trl_packs_them(tmp_path: Path, strategy: str) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    draw = random.Random(1)
    documents = [[draw.randrange(1000) for _ in range(draw.choice([3, 9, 20, 50]))] for _ in range(300)]
    made = datasets.Dataset.from_dict({"input_ids": documents})
    made = trl.pack_dataset(made, seq_length=32, strategy=strategy)
    made.to_parquet(tmp_path / "packed.parquet")
    s = LayoutSettings(layout="pad", seq_len=32)
    rows, _ = rows_of(tmp_path, s, "seq_lengths")
    with forebay.Loader(tmp_path, layout="pad", seq_len=32, packed_by="seq_lengths", pad_id=PAD_ID) as loader:
        for found, row in zip(loader, rows, strict=True):
            assert_same(found, batch_of([row], s, PAD_ID, True), "a row of TRL")
    delivered = [cut for row in rows for _, cut in row]
    assert sum(map(len, delivered)) == sum(map(len, delivered if strategy == "bfd" else documents))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"seq_lengths": [[3, 2], [4, 4]]}, "add up to the length of the row: non-empty row 1 has 5 tokens"),
        ({"seq_lengths": [[3, 2], [6, -1]]}, "add up"),
        ({"seq_lengths": [[3, 2], []]}, "a list for each of the 2 rows"),
        ({"seq_start_id": [[0, 3], [2, 4]]}, "the first of them 0"),
        ({"seq_start_id": [[0, 3], [0, 4, 2]]}, "rising"),
        ({"seq_start_id": [[0, 3], [0, 6]]}, "inside the row"),
        ({"position_ids": [[0, 1, 2, 0, 1], [0, 1, 2]]}, "a position for each token"),
        ({"other": [[0], [0]]}, "column `seq_lengths` of `packed_by` is missing"),
    ],
)
def test_columns_that_do_not_fit_name_the_row(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    [column] = values
    ids = pa.array([[1] * 5, [2] * 5], pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": ids, column: pa.array(values[column])}), tmp_path / "a.parquet")
    packed_by = "seq_lengths" if column == "other" else column
    with pytest.raises(forebay.DataError, match=message) as caught:
        list(forebay.Loader(tmp_path, layout="rows", seq_len=5, packed_by=packed_by))
    assert "a.parquet" in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"layout": "pack"},
        {"layout": "concat"},
        {"layout": "rows", "boundaries": False},
        {"layout": "rows", "eos_id": 3},
        {"layout": "pad", "bos_id": 3},
    ],
)
def test_settings_that_do_not_go_with_packed_files_are_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    write(tmp_path / "a.parquet", [([1, 2], [1, 1])], "seq_lengths")
    with pytest.raises(ValueError, match="packed_by"):
        forebay.Loader(tmp_path, seq_len=2, packed_by="seq_lengths", **given)


def test_files_that_were_packed_before_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.parquet", [([1, 2], [1, 1])], "seq_start_id")
    given: dict[str, Any] = {"seq_len": 2, "layout": "rows", "fields": ["loss_mask"]}
    forebay.Loader(tmp_path, **given)
    assert "`seq_start_id` says where documents begin in rows, and is not read" in caplog.text
    assert "set `packed_by`" in caplog.text
    caplog.clear()
    forebay.Loader(tmp_path, packed_by="seq_start_id", **given)
    assert "seq_start_id" not in caplog.text
