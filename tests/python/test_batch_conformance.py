"""Compares the batches of every layout, writer, column and format with the specification.

`cells()` generates the list. Each choice of three among layout, writer, column and format is met.
The other settings are drawn from the name of the cell. `reference_batches.py` is the judge. It also
says which cells are refused, and with which words.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from reference import documents, shards
from reference_batches import MASKS, BatchSettings, Shards, formatted
from reference_formats import DTYPES, FORMATS, SHIFTED
from reference_layout import LayoutSettings

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import pyarrow as pa
from corpora import Cell as Written
from reference import read_table

import forebay

HAS_TORCH = importlib.util.find_spec("torch") is not None
SEQ_LEN, EQUAL = 12, 12
BOS, EOS = 90_001, 90_002

#: Settings of each layout. All rows of `equal` and `packed` files have `EQUAL` tokens.
LAYOUTS: dict[str, dict[str, Any]] = {
    "concat": {},
    "concat, boundaries": {"boundaries": True},
    "pack": {"layout": "pack"},
    "pack, aligned": {"layout": "pack", "pack_align": 4, "overflow": "truncate", "max_docs_per_row": 3},
    "pack, no boundaries": {"layout": "pack", "boundaries": False},
    "pad": {"layout": "pad", "overflow": "drop"},
    "pad, boundaries": {"layout": "pad", "boundaries": True, "overflow": "truncate"},
    "pad, short batches": {"layout": "pad", "pad_to_multiple": 4},
    "rows": {"layout": "rows"},
    "rows, boundaries": {"layout": "rows", "boundaries": True},
    "packed rows": {"layout": "rows", "packed_by": "seq_lengths"},
    "packed, padded": {"layout": "pad", "packed_by": "seq_lengths"},
}
FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "labels": ("labels",),
    "loss_mask": ("loss_mask",),
    "two masks and labels": ("labels", "completion_mask", "assistant_masks"),
    "attention_mask": ("attention_mask", "loss_mask"),
    "weights": ("weights", "labels"),
    "position_ids": ("position_ids",),
    "bool": ("flag",),
    "int8": ("byte",),
    "int16": ("short",),
    "int32": ("word",),
    "int64": ("long",),
    "float16": ("half",),
    "float32": ("single",),
    "number of a document": ("year",),
    "string of a document": ("url",),
    "all": ("labels", "loss_mask", "weights", "byte", "half", "long", "year", "url"),
}
PRESETS = (None, *FORMATS)

#: Types of the columns in the file. Writers of the same container take turns with the second one.
TYPES: dict[str, tuple[pa.DataType, pa.DataType]] = {
    "labels": (pa.int32(), pa.int64()),
    "loss_mask": (pa.bool_(), pa.uint8()),
    "completion_mask": (pa.int64(), pa.bool_()),
    "assistant_masks": (pa.int8(), pa.int32()),
    "attention_mask": (pa.uint8(), pa.int64()),
    "weights": (pa.float32(), pa.float32()),
    "position_ids": (pa.int64(), pa.uint16()),
    "seq_lengths": (pa.int64(), pa.int32()),
    "flag": (pa.bool_(), pa.bool_()),
    "byte": (pa.int8(), pa.int8()),
    "short": (pa.int16(), pa.uint16()),
    "word": (pa.int32(), pa.int32()),
    "long": (pa.int64(), pa.uint32()),
    "half": (pa.float16(), pa.float16()),
    "single": (pa.float32(), pa.float64()),
}
OF_DOCUMENTS = {"year": pa.int16(), "url": pa.string()}
#: Columns whose type in a batch differs from the type in the file.
WIDENED = {"uint16": "int32", "uint32": "int64"}
ALWAYS = {"labels": "int64", "attention_mask": "int64", "position_ids": "int64", "weights": "float32"}

WRITERS: dict[str, Written] = {
    str(cell): cell
    for cell in (
        Written("pyarrow", "parquet", "none", kind="list"),
        Written("pyarrow", "parquet", "zstd", "dictionary", kind="large_list"),
        Written("pyarrow", "parquet", "snappy", note="pages v2", options={"data_page_version": "2.0"}),
        Written("pyarrow", "arrow file", "none", kind="large_list"),
        Written("pyarrow", "arrow file", "lz4"),
        Written("pyarrow", "arrow stream", "zstd", kind="large_list"),
        Written("polars", "parquet", "zstd", kind="large_list"),
        Written("polars", "arrow file", "none", kind="large_list"),
        Written("duckdb", "parquet", "zstd"),
        Written("datasets", "parquet", "snappy"),
    )
}
#: Files of ids alone say by an id where documents end.
SPLIT: dict[str, Any] = {"document_end_id": 60_001, "version": (1, 0)}
FLAT: dict[str, Written] = {
    str(cell): cell
    for cell in (
        Written("numpy", "npy", dtype="u16", options=SPLIT),
        Written("numpy", "npy", kind="fixed_size_list", dtype="i32"),
        Written("numpy", "raw", dtype="u32", options=SPLIT),
        Written("numpy", "llm.c", dtype="u16", options=SPLIT),
        Written("megatron", "megatron", dtype="i32"),
        Written("datatrove", "datatrove", dtype="u16", options={"loss": True}),
    )
}


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix."""

    layout: str
    writer: str
    fields: str
    preset: str | None

    def __str__(self) -> str:
        return f"{self.layout} | {self.writer} | {self.fields} | {self.preset}"


def cells() -> list[Cell]:
    """The cells, so that each choice of three of the four is met."""
    made = []
    for at, layout in enumerate(LAYOUTS):
        for writer_at, writer in enumerate(WRITERS):
            for field_at, name in enumerate(FIELDS):
                # Any two of these numbers meet each third one, because the turns have no gaps.
                made.append(Cell(layout, writer, name, PRESETS[(at + writer_at + field_at) % len(PRESETS)]))
        for writer, written in FLAT.items():
            names = ["none", "loss_mask"] if written.container == "datatrove" else ["none"]
            made += [Cell(layout, writer, name, preset) for name in names for preset in PRESETS]
    return [cell for cell in made if fits(cell)]


def fits(cell: Cell) -> bool:
    """Whether files of the writer can have the rows of the layout."""
    if cell.writer in WRITERS:
        return True
    # Documents end at the end of a file, unless something tells their ends.
    has_ends = FLAT[cell.writer].kind != "plain"
    return "packed" not in cell.layout and (has_ends or not cell.layout.startswith("rows"))


# --- Corpora


def made_shards(equal: bool) -> Shards:
    """The rows of three shards. The middle one has no tokens."""
    draw = Random(f"rows {equal}")
    made: Shards = []
    for many in (14, 2, 11):
        rows = []
        for number in range(many):
            length = EQUAL if equal else draw.choice([1, 2, 5, 7, 9, 12, 30])
            length = 0 if many == 2 or (not equal and number % 5 == 4) else length
            cuts = sorted({0, length, *(draw.randrange(length) for _ in range(2 if length else 0))})
            lengths = [end - start for start, end in pairwise(cuts)]
            ids = [draw.randrange(1, 60_000) for _ in range(length)]
            rows.append({
                "input_ids": ids,
                "labels": [draw.choice([-100, 17, token]) for token in ids],
                "loss_mask": [draw.random() < 0.6 for _ in ids],
                "completion_mask": [draw.random() < 0.8 for _ in ids],
                "assistant_masks": [draw.random() < 0.8 for _ in ids],
                "attention_mask": [1] * length,
                "weights": [draw.randrange(1, 9) / 8 for _ in ids],
                "position_ids": [place for part in lengths for place in range(part)],
                "seq_lengths": lengths,
                "flag": [draw.random() < 0.5 for _ in ids],
                "byte": [draw.randrange(-128, 128) for _ in ids],
                "short": [draw.randrange(0, 1 << 15) for _ in ids],
                "word": [draw.randrange(-(1 << 31), 1 << 31) for _ in ids],
                "long": [draw.randrange(0, 1 << 32) for _ in ids],
                "half": [draw.randrange(-64, 64) / 8 for _ in ids],
                "single": [draw.randrange(-(1 << 20), 1 << 20) / 8 for _ in ids],
                "year": None if number % 4 == 2 else draw.randrange(1900, 2100),
                "url": None if number % 7 == 3 else f"https://example.org/{many}/{number}",
            })  # fmt: skip
        made.append(rows)
    return made


@functools.cache
def rows_of(equal: bool) -> Shards:
    return made_shards(equal)


def table_of(written: Written, rows: list[dict[str, Any]], turn: int) -> pa.Table:
    """The rows of a shard with all columns."""
    made_list = pa.large_list if written.kind == "large_list" else pa.list_
    columns = {"input_ids": pa.array([row["input_ids"] for row in rows], made_list(pa.int32()))}
    for name, kinds in TYPES.items():
        kind = kinds[turn % 2]
        if written.writer == "duckdb" and kind == pa.float16():
            kind = pa.float32()
        values = [np.array(row[name], dtype=kind.to_pandas_dtype()) for row in rows]
        columns[name] = pa.array([list(value) for value in values], made_list(kind))
    for name, kind in OF_DOCUMENTS.items():
        columns[name] = pa.array([row[name] for row in rows], kind)
    return pa.table(columns)


@dataclass
class Corpus:
    """A corpus that was written: its path, its rows, and the types of its columns."""

    path: Path
    rows: Shards
    types: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a corpus once for all of its cells."""

    @functools.cache
    def write(writer: str, equal: bool) -> Corpus:
        folder = tmp_path_factory.mktemp("corpus")
        cell = (WRITERS | FLAT)[writer]
        if not corpora.available(cell.writer):
            pytest.skip(f"{cell.writer} is not installed")
        rows = rows_of(equal)
        suffix = corpora.SUFFIXES.get(cell.container, "arrow")
        for number, shard in enumerate(rows):
            path = folder / f"shard-{number:03}.{suffix}"
            if cell.flat:
                lists = [row["input_ids"] for row in shard if row["input_ids"]]
                if lists and cell.kind == "fixed_size_list":
                    np.save(path, np.array(lists, dtype=np.int32))
                elif lists:
                    corpora.FLAT_WRITERS[cell.container](cell, path, corpora.ended(cell, lists))
                continue
            turn = list(WRITERS).index(writer)
            corpora.WRITERS[cell.writer](cell, path, table_of(cell, shard, turn))
        if cell.flat:
            return Corpus(folder, of_flat(cell, folder))
        schema = read_table(shards(folder)[0]).schema
        item = {name: schema.field(name).type for name in schema.names}
        types = {name: str(kind.value_type if hasattr(kind, "value_type") else kind) for name, kind in item.items()}
        return Corpus(folder, rows, types)

    return write


def of_flat(cell: Written, folder: Path) -> Shards:
    """The rows that a naive reader finds in flat files."""
    found: Shards = []
    for path in shards(folder):
        rows = [{"input_ids": ids} for ids in documents(path, **cell.reading)]
        if cell.container == "datatrove":
            for row in rows:
                row["loss_mask"] = [place % 3 != 1 for place in range(len(row["input_ids"]))]
        found.append(rows)
    return found


# --- Settings


def settings_of(cell: Cell) -> BatchSettings:
    """The settings of a cell. Those that the cell does not name are drawn."""
    draw = Random(str(cell))
    given = dict(LAYOUTS[cell.layout])
    if given.get("overflow") == "drop" and cell.writer in FLAT:
        # All documents of these files may be longer than a row.
        del given["overflow"]
    fields = FIELDS[cell.fields]
    packed_by = given.pop("packed_by", "none")
    boundaries = given.pop("boundaries", None)
    if cell.fields == "position_ids" and given.get("layout") == "rows" and packed_by != "none":
        packed_by = draw.choice(["position_ids", packed_by])
    if boundaries is None:
        boundaries = given.get("layout") == "pack" or packed_by != "none" or bool(set(fields) & set(OF_DOCUMENTS))
    targets = "labels"
    if cell.preset in SHIFTED or cell.preset is None:
        targets = draw.choice(["labels", "shifted", "shifted"])
    specials = "position_ids" not in fields and packed_by == "none"
    bos_id = draw.choice([None, None, BOS]) if specials else None
    eos_id = draw.choice([None, EOS]) if specials else None
    seq_len = SEQ_LEN
    if given.get("layout") == "rows":
        seq_len = EQUAL + (bos_id is not None) + (eos_id is not None) - (targets == "shifted")
    layout = LayoutSettings(seq_len=seq_len, targets=targets, **{"layout": "concat", **given})
    return BatchSettings(
        layout,
        fields=fields,
        boundaries=boundaries,
        packed_by=packed_by,
        bos_id=bos_id,
        eos_id=eos_id,
        batch_size=draw.choice([1, 2, 3]),
        shuffle=draw.choice(["off", "global", "block"]),
        seed=draw.randrange(1 << 64),
        chunk_tokens=draw.choice([24, 60]),
        window_tokens=draw.choice([48, 200]),
        lanes=draw.choice([1, 3]),
        # A flat file without ends is one document, so that few rows are full.
        remainder=draw.choice(["drop", "pad"]) if cell.writer in WRITERS else "pad",
        pad_id=draw.choice([0, 7]),
        document_mask=boundaries and draw.random() < 0.4,
        sample_ids=draw.random() < 0.2,
        batch_format=cell.preset,
    )


def refusal(cell: Cell, s: BatchSettings) -> str | None:
    """The words of the error if no batch can be right. None if there is one."""
    preset, layout = s.batch_format, s.layout
    has_positions, of_documents = "position_ids" in s.fields, set(s.fields) & set(OF_DOCUMENTS)
    # Columns of documents bring boundaries with them, but no setting may count on that.
    known = s.boundaries and not (of_documents and "boundaries" not in LAYOUTS[cell.layout] and not_by_layout(s))
    if s.document_mask and not known:
        return "`document_mask` needs `boundaries`"
    if preset == "hf-packed" and not known:
        return "needs the starts of documents"
    if preset in ("titan", "xy") and (s.sample_ids or s.document_mask):
        return f"has no place for `{'sample_ids' if s.sample_ids else 'document_mask'}`"
    if preset == "hf-packed" and s.document_mask:
        return "joins the rows of a batch"
    if preset == "olmo" and layout.pad_to_multiple is not None:
        return "takes batches of one size: leave `pad_to_multiple` out"
    if has_positions and preset in ("olmo", "xy"):
        return "has no place for the column `position_ids`"
    if has_positions and preset in ("hf", "titan"):
        is_whole = layout.layout == "rows" and (not s.boundaries or s.packed_by == "position_ids")
        has_mask = preset == "hf" and layout.layout == "pad" and s.packed_by == "none"
        if not is_whole and not has_mask:
            return "finds documents by positions that begin at 0"
    others = set(s.fields) - {"labels", *MASKS, "attention_mask", "position_ids"}
    if preset in ("titan", "xy") and others:
        return "has no place for the column"
    if of_documents and cell.layout == "pack, no boundaries":
        return "needs `boundaries`"
    return None


def not_by_layout(s: BatchSettings) -> bool:
    return s.layout.layout != "pack" and s.packed_by == "none"


def arguments(cell: Cell, s: BatchSettings, corpus: Corpus) -> dict[str, Any]:
    """The settings as arguments of a loader. Defaults are left out."""
    draw = Random(f"arguments {cell}")
    given = {name: value for name, value in vars(s).items() if name != "layout"}
    given |= {name: value for name, value in vars(s.layout).items() if value is not None and name != "split"}
    given["shuffle"] = False if s.shuffle == "off" else s.shuffle
    given["num_threads"] = draw.choice([0, 2])
    given["block_tokens"] = draw.choice([1, 16, 1 << 17])
    if cell.preset is not None and s.layout.targets == ("shifted" if cell.preset in SHIFTED else "labels"):
        del given["targets"]
    if "boundaries" not in LAYOUTS[cell.layout]:
        del given["boundaries"]
    return given | (WRITERS | FLAT)[cell.writer].reading


#: Settings of torch's DataLoader. All others belong to the TokenDataset.
OF_LOADER = (
    "batch_size", "shuffle", "seed", "chunk_tokens", "window_tokens", "lanes", "remainder", "pad_id", "sample_ids",
    "batch_format", "num_threads", "block_tokens",
)  # fmt: skip


def open_loader(path: Path, given: dict[str, Any], library: str) -> Any:
    if library == "numpy":
        return forebay.Loader(path, **given)
    from forebay.torch import DataLoader, TokenDataset

    of_loader = {name: given[name] for name in OF_LOADER if name in given}
    dataset = TokenDataset(path, **{name: value for name, value in given.items() if name not in OF_LOADER})
    return DataLoader(dataset, **of_loader)


# --- Comparison


def assert_same(found: Any, wanted: Any, dtypes: dict[str, str], where: str) -> None:
    """Asserts that names, types, shapes and values are equal."""
    if isinstance(wanted, tuple):
        assert isinstance(found, tuple) and len(found) == len(wanted), where
        for part, values in zip(found, wanted, strict=True):
            assert_same(part, values, dtypes, where)
        return
    if isinstance(wanted, dict):
        assert set(found) == set(wanted), f"{where}: names are {sorted(found)}, expected {sorted(wanted)}"
        for name, values in wanted.items():
            assert_same_array(found[name], values, dtypes.get(name), f"{where}: `{name}`")
        return
    assert_same_array(found, wanted, "int64", where)


def assert_same_array(found: Any, wanted: Any, dtype: str | None, where: str) -> None:
    if isinstance(wanted, int) or dtype == "list":
        assert type(found) is type(wanted) and found == wanted, f"{where} is {found}, expected {wanted}"
        return
    assert str(found.dtype).removeprefix("torch.") == dtype, f"{where} has type {found.dtype}, expected {dtype}"
    array = np.asarray(found)
    expected = np.array(wanted).astype(array.dtype)
    assert array.shape == expected.shape, f"{where} has shape {array.shape}, expected {expected.shape}"
    assert np.array_equal(array, expected), f"{where} is\n{array}\nexpected\n{expected}"


def dtypes_of(s: BatchSettings, corpus: Corpus) -> dict[str, str]:
    """The types of all arrays of a batch."""
    stored = {name: WIDENED.get(kind, kind) for name, kind in corpus.types.items()}
    stored = {name: {"halffloat": "float16", "float": "float32", "double": "float64"}.get(kind, kind)
              for name, kind in stored.items()}  # fmt: skip
    plain = dict.fromkeys(("input_ids", "labels", "x", "y", "position_ids", "source", "sample_index"), "int64")
    plain |= {"doc_ids": "int32", "cu_seqlens": "int32", "document_mask": "bool", "year_is_null": "bool"}
    of_flat = {"loss_mask": "bool"}
    of_format = DTYPES.get(s.batch_format or "", {}) | {"max_doc_lens": "list"}
    if s.batch_format == "megatron":
        of_format = {**of_format, "attention_mask": "bool"}
    return of_flat | stored | plain | ALWAYS | {"url": "list"} | of_format


def run(cell: Cell, written: Any) -> tuple[str, int]:
    """Compares one cell, and returns what came of it, and the number of batches."""
    # The rows of a matrix, too, have one length.
    equal = "rows" in cell.layout or (WRITERS | FLAT)[cell.writer].kind == "fixed_size_list"
    corpus, s = written(cell.writer, equal), settings_of(cell)
    given = arguments(cell, s, corpus)
    library = Random(f"library {cell}").choice(["numpy", "torch"]) if HAS_TORCH else "numpy"
    words = refusal(cell, s)
    where = f"{cell} {library} {given}"
    if words is not None:
        with pytest.raises((forebay.ConfigError, forebay.DataError)) as raised:
            open_loader(corpus.path, given, library)
        assert words in str(raised.value), f"{where}: {raised.value}"
        return "refused", 0
    wanted = formatted(corpus.rows, s)
    dtypes = dtypes_of(s, corpus)
    loader = open_loader(corpus.path, given, library)
    found = list(loader)
    assert len(found) == len(wanted) > 0, where
    for step, (batch, values) in enumerate(zip(found, wanted, strict=True)):
        assert_same(batch, values, dtypes, f"{where} step {step}")
    step = Random(f"step {cell}").randrange(len(wanted))
    assert_same(loader.batch_at(step), wanted[step], dtypes, f"{where} batch_at {step}")
    return "right", len(found)


GROUPS: dict[tuple[str, str], list[Cell]] = defaultdict(list)
for _cell in cells():
    GROUPS[_cell.layout, _cell.writer].append(_cell)


@pytest.mark.parametrize(("layout", "writer"), GROUPS)
def test_batches_are_those_of_the_specification(written: Any, layout: str, writer: str) -> None:
    came = [run(cell, written)[0] for cell in GROUPS[layout, writer]]
    assert came.count("right") > 0


def test_each_choice_of_three_is_met() -> None:
    """Flat files have ids alone, so that their cells are all layouts and formats."""
    parts = (LAYOUTS, WRITERS, FIELDS, PRESETS)
    listed = [(cell.layout, cell.writer, cell.fields, cell.preset) for cell in cells() if cell.writer in WRITERS]
    for chosen in combinations(range(4), 3):
        met = {tuple(cell[part] for part in chosen) for cell in listed}
        assert len(met) == math.prod(len(parts[part]) for part in chosen)
    flat = {(cell.layout, cell.writer, cell.preset) for cell in cells() if cell.writer in FLAT}
    assert len(flat) == sum(
        fits(Cell(layout, writer, "none", None)) * len(PRESETS) for layout in LAYOUTS for writer in FLAT
    )
