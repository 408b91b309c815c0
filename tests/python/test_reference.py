"""Tests the reference and the corpora, by examples that were worked out by hand.

Nothing here imports forebay, so a failure here means that the tests are wrong, not the loader.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from reference import Reference, Settings, resolve_shuffle, token_stream
from reference_order import block_order, derive, feistel, fisher_yates, global_order, mix64, permute

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from corpora import Cell

IGNORE = -100


def test_mix64_is_the_finaliser_of_splitmix64() -> None:
    # First outputs of splitmix64 seeded with 1234567, published with its C source.
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(mix64(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 255, 256, 257, 258, 300, 1000, 1023, 1024, 1025, 4097, 10_007])
def test_permute_is_a_bijection(n: int) -> None:
    for key in (0, 1, derive(5, 1, 9), 2**64 - 1):
        assert sorted(permute(key, n, i) for i in range(n)) == list(range(n))


def test_feistel_is_a_bijection_for_every_small_n_too() -> None:
    for n in range(2, 120):
        assert sorted(feistel(n, n, i) for i in range(n)) == list(range(n)), n


def test_tables_of_three_are_all_about_equally_frequent() -> None:
    counts = dict.fromkeys([fisher_yates(derive(key), 3) for key in range(50)], 0)
    assert len(counts) == 6
    for key in range(6000):
        counts[fisher_yates(derive(0, key), 3)] += 1
    # 6000 draws over 6 tables: 1000 each, with a standard deviation of 29.
    assert all(850 < count < 1150 for count in counts.values()), counts


def test_orders_hold_every_sequence_once() -> None:
    for n in (0, 1, 2, 7, 63, 64, 65, 300, 1234):
        for epoch in (0, 1):
            assert sorted(global_order(n, seed=3, epoch=epoch)) == list(range(n))
            for chunk, window, lanes in [(1, 1, 1), (64, 512, 4), (100, 1000, 3), (10**9, 10**9, 8), (8, 9, 50)]:
                order = block_order(
                    n, seed=3, epoch=epoch, seq_len=8, chunk_tokens=chunk, window_tokens=window, lanes=lanes
                )
                assert sorted(order) == list(range(n)), (n, chunk, window, lanes)


def test_block_order_stays_within_windows_of_lanes() -> None:
    """Two lanes of 10 sequences, windows of 5, one chunk; the second lane's windows are staggered
    by half of one.
    """
    order = block_order(20, seed=1, epoch=0, seq_len=1, chunk_tokens=100, window_tokens=10, lanes=2)
    first, second = order[::2], order[1::2]
    assert [sorted(first[:5]), sorted(first[5:])] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [sorted(second[:3]), sorted(second[3:8]), sorted(second[8:])] == [
        [10, 11, 12],
        [13, 14, 15, 16, 17],
        [18, 19],
    ]
    assert first != sorted(first)


def test_chunks_stay_together_where_windows_are_one_sequence() -> None:
    order = block_order(12, seed=2, epoch=0, seq_len=4, chunk_tokens=12, window_tokens=4, lanes=1)
    runs = [order[i : i + 3] for i in range(0, 12, 3)]
    assert sorted(runs) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert runs != sorted(runs)


def test_stream_of_marks_nulls_and_empty_documents(tmp_path: Path) -> None:
    corpora.write_rows(tmp_path / "a.parquet", [[1, 2], None, [], [3]])
    corpora.write_rows(tmp_path / "b.parquet", [])
    corpora.write_rows(tmp_path / "c.parquet", [[4]])
    assert token_stream(tmp_path) == [1, 2, 3, 4]
    assert token_stream(tmp_path, bos_id=8, eos_id=9) == [8, 1, 2, 9, 8, 3, 9, 8, 4, 9]


def test_plain_column_is_one_document_per_file(tmp_path: Path) -> None:
    import pyarrow as pa

    corpora.write_rows(tmp_path / "a.arrow", [1, 2, 3], dtype=pa.uint16())
    corpora.write_rows(tmp_path / "b.arrow", [], dtype=pa.uint16())
    corpora.write_rows(tmp_path / "c.arrow", [4], dtype=pa.uint16())
    assert token_stream(tmp_path, eos_id=9) == [1, 2, 3, 9, 4, 9]


def rows_of(stream: list[int], **settings: object) -> list[list[tuple[list[int], list[int]]]]:
    return list(Reference(stream, Settings(**settings)).batches())  # type: ignore[arg-type]


def test_labels_and_each_remainder() -> None:
    stream = list(range(10, 17))
    common = {"seq_len": 2, "batch_size": 2, "pad_id": 5}
    full = [([10, 11], [10, 11]), ([12, 13], [12, 13])], ([14, 15], [14, 15])
    assert rows_of(stream, **common) == [full[0]]
    assert rows_of(stream, remainder="pad", **common) == [full[0], [full[1], ([16, 5], [16, IGNORE])]]
    assert rows_of(stream, remainder="short", **common) == [full[0], [full[1], ([16, 5], [16, IGNORE])]]
    assert rows_of(stream, remainder="wrap", **common) == [full[0], [full[1], ([16, 10], [16, 10])]]


def test_rows_past_the_end() -> None:
    stream = list(range(10, 16))
    common = {"seq_len": 2, "batch_size": 2, "pad_id": 5}
    last = ([14, 15], [14, 15])
    assert rows_of(stream, remainder="pad", **common)[1] == [last, ([5, 5], [IGNORE, IGNORE])]
    assert rows_of(stream, remainder="wrap", **common)[1] == [last, ([10, 11], [10, 11])]
    assert rows_of(stream, remainder="short", **common)[1] == [last]
    assert rows_of(stream, remainder="pad", ignore_index=-1, **common)[1] == [last, ([5, 5], [-1, -1])]


def test_shifted_targets_overlap_by_one() -> None:
    common = {"seq_len": 2, "batch_size": 1, "targets": "shifted", "pad_id": 5}
    assert rows_of([1, 2, 3, 4, 5], **common) == [[([1, 2], [2, 3])], [([3, 4], [4, 5])]]
    # One token after a full sequence is already a target, so nothing is left for the tail.
    assert len(rows_of([1, 2, 3], remainder="pad", **common)) == 1
    assert rows_of([1, 2, 3, 4], remainder="pad", **common)[1] == [([3, 4], [4, IGNORE])]
    assert rows_of([1, 2, 3, 4], remainder="wrap", **common)[1] == [([3, 4], [4, 1])]


def test_ranks_interleave_to_the_same_global_batches() -> None:
    settings = Settings(seq_len=2, batch_size=2, shuffle="global", remainder="pad")
    stream = list(range(41))
    whole = Reference(stream, Settings(**{**vars(settings), "batch_size": 4}))
    split = Reference(stream, settings)
    assert split.steps(2) == whole.steps(1) == 6
    for step in range(6):
        ranks = [split.batch_at(step, rank=rank, world_size=2) for rank in range(2)]
        assert [ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]] == whole.batch_at(step)


def test_short_is_refused_where_a_rank_would_be_empty() -> None:
    reference = Reference(list(range(10)), Settings(seq_len=1, batch_size=2, remainder="short"))
    assert [reference.short_is_refused(world) for world in (1, 2, 3, 4)] == [False, False, False, True]


def test_shuffle_true_depends_on_decoding() -> None:
    assert resolve_shuffle(True, decoded=True) == "block"
    assert resolve_shuffle(True, decoded=False) == "global"
    assert resolve_shuffle(False, decoded=True) == "off"
    assert resolve_shuffle("global", decoded=True) == "global"


CELLS = corpora.cells()


@pytest.mark.parametrize("cell", CELLS[::5], ids=str)
def test_corpora_hold_their_documents_and_are_written_as_they_say(cell: Cell, tmp_path: Path) -> None:
    if not corpora.available(cell.writer):
        pytest.skip(f"{cell.writer} is not installed")
    shards = corpora.documents_of(cell)
    path = corpora.write(cell, tmp_path, shards)
    wanted = [token for shard in shards for document in shard for token in document or []]
    assert token_stream(path, **cell.reading) == wanted
    facts = corpora.observed(cell, path)
    assert facts["codec"] == cell.codec
    if cell.writer == "pyarrow" and cell.container == "parquet":
        encodings = {"dictionary fallback": "dictionary", "delta": "delta_binary_packed"}
        assert encodings.get(cell.encoding, cell.encoding) in facts["encoding"]
    if cell.dtype in ("u32", "i32", "i64") and not cell.encoding.startswith("dictionary"):
        unique = "vocabulary" not in cell.options and cell.document_end_id is None
        assert (len(set(wanted)) == len(wanted)) == unique


def test_cells_are_distinct_and_cover_what_is_promised() -> None:
    assert len({str(cell) for cell in CELLS}) == len(CELLS)
    pyarrow = [cell for cell in CELLS if cell.writer == "pyarrow" and cell.container == "parquet"]
    assert {cell.codec for cell in pyarrow} == {"none", "snappy", "gzip", "lz4", "zstd"}
    for encoding in ("plain", "dictionary", "delta", "byte_stream_split"):
        assert {cell.dtype for cell in pyarrow if cell.encoding == encoding} == {*corpora.DTYPES, *corpora.SIGNED}
        kinds = {cell.kind for cell in pyarrow if cell.encoding == encoding}
        assert kinds == {"list", "large_list", "fixed_size_list", "plain"}
    assert {cell.column for cell in CELLS} == {"input_ids", "tokens", "token_ids", "ids"}


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_unique_corpus_counts_up(container: str, tmp_path: Path) -> None:
    folder = corpora.unique_corpus(tmp_path / "corpus", container, 20_000, shards=3)
    assert token_stream(folder) == list(range(20_000))
