"""Corpora written by the writers people use: pyarrow, polars, DuckDB, Hugging Face `datasets`,
NumPy, Megatron and datatrove.

Every cell of the matrix is a writer, a container, a codec, an encoding, a column type and what is
special about it. Documents are deterministic; where the type is wide enough every token of the
corpus is unique, so that a lost or repeated token cannot hide.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

Documents = list["list[int] | None"]

DTYPES = {"u8": pa.uint8(), "u16": pa.uint16(), "u32": pa.uint32(), "i32": pa.int32(), "i64": pa.int64()}
SIGNED = {"i8": pa.int8(), "i16": pa.int16()}
"""Types that few corpora have. They meet every writer and container, but not every codec."""
FIXED = 48
"""Tokens of every document in a `fixed_size_list` corpus."""


@dataclass(frozen=True)
class Cell:
    """One way to write a corpus."""

    writer: str
    container: str
    codec: str = "none"
    encoding: str = "plain"
    kind: str = "list"
    dtype: str = "i32"
    # What is special: pages, row groups, versions, shapes. Shown in the matrix.
    note: str = ""
    column: str = "input_ids"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        parts = (self.writer, self.container, self.codec, self.encoding, self.type, self.note)
        return "-".join(part.replace(" ", "_") for part in parts if part)

    @property
    def type(self) -> str:
        return self.dtype if self.kind == "plain" else f"{self.kind}<{self.dtype}>"

    @property
    def flat(self) -> bool:
        """Whether the files hold ids alone."""
        return self.container in FLAT_WRITERS

    @property
    def bin_dtype(self) -> str | None:
        """The setting `bin_dtype` that the files need."""
        return np.dtype(NUMPY_DTYPES[self.dtype]).name if self.container == "raw" else None

    @property
    def document_end_id(self) -> int | None:
        """The setting `document_end_id` that splits the files. They then lack document lengths."""
        found: int | None = self.options.get("document_end_id")
        return found

    @property
    def reading(self) -> dict[str, Any]:
        """The settings that the files need to be read."""
        given = {"bin_dtype": self.bin_dtype, "document_end_id": self.document_end_id}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def has_documents(self) -> bool:
        """Whether files of ids say where documents end, or an id does."""
        return not self.flat or self.kind != "plain" or self.document_end_id is not None

    @property
    def decoded(self) -> bool:
        """Whether the corpus has to be decoded by blocks."""
        return self.container == "parquet" or self.codec != "none"


def available(writer: str) -> bool:
    return importlib.util.find_spec(writer) is not None


# --- Documents


def lengths(rng: np.random.Generator, count: int) -> list[int]:
    """Ragged lengths with many short documents, and some of the awkward ones: none, one, and longer
    than a block.
    """
    ragged = [int(n) for n in rng.lognormal(3.0, 1.0, count)]
    awkward = [0, 1, 0, 0, 2, 1500, 0]
    for at, length in enumerate(awkward):
        ragged.insert(at * max(1, count // len(awkward)), length)
    return ragged


class Tokens:
    """Hands out token ids: unique ones, or ids of a small vocabulary that suits dictionaries and
    narrow types.
    """

    def __init__(self, dtype: str, vocabulary: int | None, seed: int = 7) -> None:
        limit = {"u8": 1 << 8, "u16": 1 << 16, "i8": 1 << 7, "i16": 1 << 15}.get(dtype)
        self.vocabulary = vocabulary or limit
        self.rng = np.random.default_rng(seed)
        self.next = 1000

    def take(self, n: int) -> list[int]:
        if self.vocabulary:
            return self.rng.integers(0, self.vocabulary, n).tolist()
        self.next += n
        return list(range(self.next - n, self.next))


def documents_of(cell: Cell, *, tokens_per_shard: int = 3000, equal: bool = False) -> list[Documents]:
    """Documents of every shard of a cell: three shards with tokens and an empty one between
    them.

    With `equal`, each document with tokens has `FIXED` of them.
    """
    rng = np.random.default_rng(11)
    vocabulary = 300 if cell.encoding.startswith("dictionary") and "fallback" not in cell.encoding else None
    vocabulary = cell.options.get("vocabulary", vocabulary)
    if vocabulary and cell.dtype in ("u8", "i8"):
        vocabulary = 100
    tokens = Tokens(cell.dtype, vocabulary)
    if equal:
        # A raw file without a byte is refused.
        counts = (1, 50, 20) if cell.container == "raw" else (1, 0, 50, 20)
        return [ended(cell, equal_documents(cell, tokens, many)) for many in counts]
    if cell.options.get("giant_document"):
        return [[tokens.take(10)], [tokens.take(60_000)], [tokens.take(5)]]
    if cell.options.get("many_rows"):
        return [[tokens.take(int(n)) for n in rng.integers(0, 8, 20_000)]]
    made: list[Documents] = []
    for shard in range(3):
        if shard == 1 and not cell.options.get("single"):
            made.append([])
        if cell.kind == "plain":
            made.append([tokens.take(tokens_per_shard + 37 * shard)])
        elif cell.kind == "fixed_size_list":
            rows: Documents = [tokens.take(FIXED) for _ in range(tokens_per_shard // FIXED)]
            made.append(with_nulls(rows) if cell.options.get("nulls", True) else rows)
        else:
            rows = [tokens.take(n) for n in lengths(rng, 80 + 5 * shard)]
            made.append(with_nulls(rows) if cell.options.get("nulls", True) else rows)
        if cell.options.get("single"):
            break
    # The last document of the last shard has no id at its end.
    return [ended(cell, rows, whole=shard < len(made) - 1) for shard, rows in enumerate(made)]


def ended(cell: Cell, rows: Documents, *, whole: bool = True) -> Documents:
    """The documents with the id at their ends that splits them, and nowhere else. Without `whole`,
    the last document lacks it.
    """
    end_id = cell.document_end_id
    if end_id is None:
        return rows
    bodies = [[end_id + 1 if token == end_id else token for token in row] for row in rows if row]
    last = len(bodies) - 1
    return [row if at == last and not whole else [*row[:-1], end_id] for at, row in enumerate(bodies)]


def equal_documents(cell: Cell, tokens: Tokens, many: int) -> Documents:
    if cell.kind == "plain":
        return [tokens.take(FIXED)]
    rows: Documents = [tokens.take(FIXED) for _ in range(many)]
    return with_nulls(rows) if cell.options.get("nulls", True) and not cell.flat else rows


def with_nulls(rows: Documents) -> Documents:
    """The documents with a null one at the start, in the middle and at the end."""
    half = len(rows) // 2
    return [None, *rows[:half], None, None, *rows[half:], None]


# --- Tables


def arrow_type(cell: Cell) -> pa.DataType:
    item = pa.field("item", (DTYPES | SIGNED)[cell.dtype], nullable=not cell.options.get("required"))
    match cell.kind:
        case "list":
            return pa.list_(item)
        case "large_list":
            return pa.large_list(item)
        case "fixed_size_list":
            return pa.list_(item, FIXED)
        case _:
            return (DTYPES | SIGNED)[cell.dtype]


def table_of(cell: Cell, rows: Documents) -> pa.Table:
    """The documents as an Arrow table, beside columns that must not be taken for tokens."""
    if cell.kind == "plain":
        rows = rows[0] if rows else []  # type: ignore[assignment]
    schema = pa.schema(
        [
            pa.field("text", pa.string()),
            pa.field(cell.column, arrow_type(cell), nullable=not cell.options.get("required")),
            pa.field("score", pa.float64()),
        ]
    )
    count = len(rows)
    columns = [[f"document {i}" for i in range(count)], rows, [i / 2 for i in range(count)]]
    arrays = [pa.array(values, type=f.type) for values, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


# --- Writers


def write(cell: Cell, folder: Path, shards: list[Documents] | None = None) -> Path:
    """Writes the corpus of `cell` into `folder` and returns what to give to the loader."""
    shards = documents_of(cell) if shards is None else shards
    folder.mkdir(parents=True, exist_ok=True)
    if cell.writer == "datasets" and cell.container == "save_to_disk":
        return save_to_disk(cell, folder, shards)
    suffix = SUFFIXES.get(cell.container, "arrow")
    for index, rows in enumerate(shards):
        path = folder / f"shard-{index:03}.{suffix}"
        if cell.flat:
            FLAT_WRITERS[cell.container](cell, path, [row or [] for row in rows])
            continue
        table = table_of(cell, rows)
        WRITERS[cell.writer](cell, path, table)
    return folder


def write_pyarrow(cell: Cell, path: Path, table: pa.Table) -> None:
    if cell.container == "parquet":
        write_pyarrow_parquet(cell, path, table)
        return
    options = pa.ipc.IpcWriteOptions(compression=None if cell.codec == "none" else cell.codec)
    new = pa.ipc.new_file if cell.container == "arrow file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=cell.options.get("batch_rows", 17))


def write_pyarrow_parquet(cell: Cell, path: Path, table: pa.Table) -> None:
    leaf = cell.column if cell.kind == "plain" else f"{cell.column}.list.element"
    encodings = {
        "plain": {"use_dictionary": False},
        "dictionary": {"use_dictionary": True},
        "dictionary fallback": {"use_dictionary": True, "dictionary_pagesize_limit": 512},
        "delta": {"use_dictionary": False, "column_encoding": {leaf: "DELTA_BINARY_PACKED"}},
        "byte_stream_split": {"use_dictionary": False, "column_encoding": {leaf: "BYTE_STREAM_SPLIT"}},
    }
    options: dict[str, Any] = {
        "compression": cell.codec,
        "row_group_size": 40,
        "data_page_size": 1024,
        "write_batch_size": 16,
        **encodings[cell.encoding],
    }
    known = ("row_group_size", "data_page_size", "data_page_version", "version", "write_page_index", "write_statistics")
    extra = ("use_compliant_nested_type", "write_page_checksum", "store_schema", "write_batch_size")
    options |= {name: cell.options[name] for name in (*known, *extra) if name in cell.options}
    pq.write_table(table, path, **options)


def write_polars(cell: Cell, path: Path, table: pa.Table) -> None:
    import polars as pl

    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    codec = {"none": "uncompressed"}.get(cell.codec, cell.codec)
    if cell.container == "parquet":
        options = {name: cell.options[name] for name in ("row_group_size", "data_page_size") if name in cell.options}
        frame.write_parquet(path, compression=codec, **options)
    elif cell.container == "arrow file":
        frame.write_ipc(path, compression=codec)
    else:
        frame.write_ipc_stream(path, compression=codec)


def write_duckdb(cell: Cell, path: Path, table: pa.Table) -> None:
    import duckdb

    codec = {"none": "uncompressed"}.get(cell.codec, cell.codec)
    options = f"FORMAT parquet, COMPRESSION {codec}"
    if "row_group_size" in cell.options:
        options += f", ROW_GROUP_SIZE {cell.options['row_group_size']}"
    if "version" in cell.options:
        options += f", PARQUET_VERSION {cell.options['version']}"
    with duckdb.connect() as connection:
        connection.execute("SET preserve_insertion_order = true")
        connection.register("corpus", table)
        connection.execute(f"COPY (SELECT * FROM corpus) TO '{path}' ({options})")


def write_datasets(cell: Cell, path: Path, table: pa.Table) -> None:
    import datasets

    made = datasets.Dataset(table)
    made.to_parquet(path)


def save_to_disk(cell: Cell, folder: Path, shards: list[Documents]) -> Path:
    import datasets

    made = datasets.Dataset(pa.concat_tables([table_of(cell, rows) for rows in shards]))
    made.save_to_disk(folder / "saved", num_shards=cell.options.get("num_shards", 3))
    return folder / "saved"


def write_npy(cell: Cell, path: Path, rows: list[list[int]]) -> None:
    """A vector of all tokens, or a matrix with a document in each row."""
    dtype = NUMPY_DTYPES[cell.dtype]
    flat = np.array([token for row in rows for token in row], dtype)
    array = flat.reshape(len(rows), FIXED) if cell.kind == "fixed_size_list" else flat
    with open(path, "wb") as file:
        np.lib.format.write_array(file, array, version=cell.options.get("version"))


def write_raw(cell: Cell, path: Path, rows: list[list[int]]) -> None:
    np.array([token for row in rows for token in row], NUMPY_DTYPES[cell.dtype]).tofile(path)


def write_llmc(cell: Cell, path: Path, rows: list[list[int]]) -> None:
    """Writes 256 integers, then the ids. The script of llm.c is no package."""
    tokens = [token for row in rows for token in row]
    header = np.zeros(256, "<i4")
    header[:3] = *{"u16": (20240520, 1), "u32": (20240801, 7)}[cell.dtype], len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, NUMPY_DTYPES[cell.dtype]).tobytes())


def write_megatron(cell: Cell, path: Path, rows: list[list[int]]) -> None:
    """With `sentences`, a document is several sequences."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(path), dtype=getattr(np, np.dtype(NUMPY_DTYPES[cell.dtype]).name))
    most = cell.options.get("sentences", 1 << 30)
    for row in rows:
        for start in range(0, len(row), most):
            builder.add_item(torch.tensor(row[start : start + most], dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(path.with_suffix(".idx")))


def write_datatrove(cell: Cell, path: Path, rows: list[list[int]]) -> None:
    """With `loss`, every third id of a document is masked."""
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    loss = bool(cell.options.get("loss"))
    file = TokenizedFile(
        str(path.parent), path.name, token_size=np.dtype(NUMPY_DTYPES[cell.dtype]).itemsize,
        save_loss_metadata=loss, save_final_metadata=bool(cell.options.get("metadata")), tokenizer_name_or_path="gpt2",
    )  # fmt: skip
    for row in rows:
        file.write(row, np.arange(len(row)) % 3 != 1 if loss else None)
    file.close()


SUFFIXES = {"parquet": "parquet", "npy": "npy", "raw": "bin", "llm.c": "bin", "megatron": "bin", "datatrove": "ds"}
FLAT_WRITERS = {
    "npy": write_npy, "raw": write_raw, "llm.c": write_llmc, "megatron": write_megatron, "datatrove": write_datatrove,
}  # fmt: skip
NUMPY_DTYPES = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "i8": "<i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"}
WRITERS = {"pyarrow": write_pyarrow, "polars": write_polars, "duckdb": write_duckdb, "datasets": write_datasets}


# --- The matrix


def cells() -> list[Cell]:
    """Every cell of the matrix. Columns take turns, so that each of the names that are found alone
    is met.
    """
    made = [
        *pyarrow_parquet(),
        *pyarrow_arrow(),
        *polars_cells(),
        *duckdb_cells(),
        *duckdb_small_vocabulary(),
        *datasets_cells(),
        *numpy_cells(),
        *megatron_cells(),
        *datatrove_cells(),
        *signed_cells(),
    ]
    names = cycle(("input_ids", "tokens", "token_ids", "ids"))
    # Numbers called `tokens` or `ids` beside other columns may be counts: they are no token
    # column by name alone.
    plain = {"tokens": "input_ids", "ids": "token_ids"}
    return [
        Cell(**{**vars(cell), "column": plain.get(name, name) if cell.kind == "plain" else name})
        for cell, name in zip(made, names, strict=False)
    ]


def pyarrow_parquet() -> list[Cell]:
    made = []

    def add(note: str = "", *, codec: str = "zstd", encoding: str = "plain", **more: Any) -> None:
        options = more.pop("options", {})
        made.append(Cell("pyarrow", "parquet", codec, encoding, note=note, options=options, **more))

    kinds = ("list", "large_list", "fixed_size_list", "plain")
    for e, encoding in enumerate(("plain", "dictionary", "dictionary fallback", "delta", "byte_stream_split")):
        for d, dtype in enumerate(DTYPES):
            # Narrow types are stored as 32-bit integers, which readers must narrow.
            for c, codec in enumerate(("none", "snappy", "gzip", "lz4", "zstd")):
                page = 1 + (c + d) % 2
                if codec in ("none", "zstd") or (e + d + c) % 3 == 0:
                    options = {"data_page_version": f"{page}.0", "write_page_index": (c + e) % 2 == 0}
                    kind = kinds[(c + d + e) % 4]
                    add(f"pages v{page}", codec=codec, encoding=encoding, dtype=dtype, kind=kind, options=options)
    for kind in ("list", "large_list", "fixed_size_list", "plain"):
        for page in ("1.0", "2.0"):
            add(
                f"required v{page[0]}", kind=kind, options={"required": True, "nulls": False, "data_page_version": page}
            )
    for version in ("1.0", "2.4", "2.6"):
        for dtype in ("u32", "u16"):
            add(f"version {version}", dtype=dtype, options={"version": version})
    add("old list names", options={"use_compliant_nested_type": False})
    add("page index", options={"write_page_index": True})
    add("page checksums", options={"write_page_checksum": True, "data_page_version": "2.0"})
    add("no statistics", options={"write_statistics": False})
    add("no arrow schema", dtype="u16", options={"store_schema": False})
    add("one row group", options={"row_group_size": 1 << 20, "data_page_size": 1 << 20, "write_batch_size": 1024})
    add("one row per group", options={"row_group_size": 1})
    add("giant row group", dtype="u32", options={"many_rows": True, "row_group_size": 1 << 20, "data_page_size": 4096})
    add("giant document", dtype="u32", options={"giant_document": True, "data_page_size": 4096})
    add(
        "giant document v2",
        codec="snappy",
        dtype="u16",
        options={"giant_document": True, "data_page_size": 4096, "data_page_version": "2.0"},
    )
    return made


def pyarrow_arrow() -> list[Cell]:
    made = []
    for container in ("arrow file", "arrow stream"):
        for codec in ("none", "lz4", "zstd"):
            for kind in ("list", "large_list", "fixed_size_list", "plain"):
                for at, dtype in enumerate(DTYPES):
                    # Every type meets every kind uncompressed; codecs are of buffers, so a diagonal
                    # is enough.
                    if codec == "none" or (at + len(kind) + len(codec)) % 3 == 0:
                        made.append(Cell("pyarrow", container, codec, kind=kind, dtype=dtype))
            made.append(Cell("pyarrow", container, codec, note="one batch", options={"batch_rows": 1 << 20}))
            made.append(Cell("pyarrow", container, codec, note="one row per batch", options={"batch_rows": 1}))
            made.append(
                Cell("pyarrow", container, codec, dtype="u32", note="giant document", options={"giant_document": True})
            )
            made.append(
                Cell(
                    "pyarrow",
                    container,
                    codec,
                    dtype="u16",
                    note="required",
                    options={"required": True, "nulls": False},
                )
            )
    return made


def polars_cells() -> list[Cell]:
    made = []
    for codec in ("none", "snappy", "gzip", "lz4", "zstd"):
        for at, dtype in enumerate(DTYPES):
            kind = "plain" if at % 3 == 2 else "large_list"
            made.append(Cell("polars", "parquet", codec, "chosen by writer", kind, dtype))
    made.append(
        Cell(
            "polars",
            "parquet",
            "zstd",
            "chosen by writer",
            "large_list",
            "u16",
            note="many row groups",
            options={"row_group_size": 20, "data_page_size": 512},
        )
    )
    made.append(Cell("polars", "parquet", "zstd", "chosen by writer", kind="fixed_size_list", note="array"))
    for dtype in DTYPES:
        made.append(
            Cell(
                "polars", "parquet", "zstd", "chosen by writer", "large_list", dtype,
                note="small vocabulary", options={"vocabulary": 5},
            )
        )  # fmt: skip
    for container in ("arrow file", "arrow stream"):
        for codec in ("none", "lz4", "zstd"):
            for dtype in ("u16", "i32", "i64"):
                made.append(Cell("polars", container, codec, kind="large_list", dtype=dtype))
            made.append(Cell("polars", container, codec, kind="fixed_size_list", dtype="u32", note="array"))
            made.append(Cell("polars", container, codec, kind="plain", dtype="u8"))
    return made


def duckdb_cells() -> list[Cell]:
    made = []
    for codec in ("none", "snappy", "gzip", "lz4", "zstd"):
        for version in ("V1", "V2"):
            for at, dtype in enumerate(DTYPES):
                if (at + len(codec)) % 2 == (version == "V1"):
                    continue
                kind = "plain" if at == 3 else "list"
                made.append(
                    Cell(
                        "duckdb",
                        "parquet",
                        codec,
                        "chosen by writer",
                        kind,
                        dtype,
                        note=version.lower(),
                        options={"version": version},
                    )
                )
    made.append(
        Cell(
            "duckdb",
            "parquet",
            "zstd",
            "chosen by writer",
            note="giant row group",
            options={"many_rows": True, "row_group_size": 1 << 20},
        )
    )
    made.append(
        Cell(
            "duckdb",
            "parquet",
            "zstd",
            "chosen by writer",
            note="many row groups",
            options={"many_rows": True, "row_group_size": 2048},
        )
    )
    return made


def duckdb_small_vocabulary() -> list[Cell]:
    options = {"vocabulary": 5}
    return [
        Cell(
            "duckdb", "parquet", "zstd", "chosen by writer", "list", dtype,
            note=f"{version.lower()} small vocabulary", options={**options, "version": version},
        )
        for dtype in DTYPES
        for version in ("V1", "V2")
    ]  # fmt: skip


def datasets_cells() -> list[Cell]:
    made = []
    for dtype in DTYPES:
        made.append(Cell("datasets", "parquet", "snappy", "chosen by writer", dtype=dtype))
        made.append(Cell("datasets", "save_to_disk", dtype=dtype))
    made.append(Cell("datasets", "parquet", "snappy", "chosen by writer", "large_list", "u16"))
    made.append(Cell("datasets", "save_to_disk", kind="large_list", dtype="u16"))
    made.append(Cell("datasets", "save_to_disk", kind="fixed_size_list", dtype="i32", note="fixed length"))
    made.append(Cell("datasets", "save_to_disk", dtype="i32", note="one shard", options={"num_shards": 1}))
    return made


def numpy_cells() -> list[Cell]:
    made = []
    for at, dtype in enumerate(DTYPES):
        for kind in ("plain", "fixed_size_list"):
            version = [(1, 0), (2, 0), (3, 0)][at % 3]
            options = {"version": version, "nulls": False}
            made.append(Cell("numpy", "npy", kind=kind, dtype=dtype, note=f"version {version[0]}", options=options))
        # A raw file without a byte is refused.
        made.append(Cell("numpy", "raw", kind="plain", dtype=dtype, options={"single": True}))
        options = {"single": True, "document_end_id": 5 + at}
        made.append(Cell("numpy", "raw", dtype=dtype, note="split", options=options))
    for at, (container, dtype) in enumerate([("npy", "u16"), ("npy", "i64"), ("llm.c", "u16"), ("llm.c", "u32")]):
        options = {"document_end_id": 11 * at, "version": (1, 0)}
        made.append(Cell("numpy", container, dtype=dtype, note="split", options=options))
    made.append(Cell("numpy", "llm.c", kind="plain", dtype="u16", note="layout as published"))
    made.append(Cell("numpy", "llm.c", kind="plain", dtype="u32", note="layout as published"))
    return made


def megatron_cells() -> list[Cell]:
    made = [Cell("megatron", "megatron", dtype=dtype) for dtype in ("u8", "u16", "i32", "i64")]
    made.append(Cell("megatron", "megatron", dtype="u16", note="sentences", options={"sentences": 7}))
    made.append(Cell("megatron", "megatron", dtype="i32", note="many rows", options={"many_rows": True}))
    made.append(Cell("megatron", "megatron", dtype="i32", note="giant document", options={"giant_document": True}))
    return made


def datatrove_cells() -> list[Cell]:
    made = [Cell("datatrove", "datatrove", dtype=dtype) for dtype in ("u16", "u32")]
    options = {"loss": True, "metadata": True}
    made.append(Cell("datatrove", "datatrove", dtype="u16", note="loss and metadata", options=options))
    made.append(Cell("datatrove", "datatrove", dtype="u32", note="many rows", options={"many_rows": True}))
    made.append(Cell("datatrove", "datatrove", dtype="u32", note="giant document", options={"giant_document": True}))
    return made


def signed_cells() -> list[Cell]:
    made = []
    kinds = ("list", "large_list", "fixed_size_list", "plain")
    for at, dtype in enumerate(SIGNED):
        for place, encoding in enumerate(("plain", "dictionary", "dictionary fallback", "delta", "byte_stream_split")):
            page = 1 + (at + place) % 2
            options = {"data_page_version": f"{page}.0"}
            codec, kind = ("none", "zstd")[place % 2], kinds[(at + place) % 4]
            made.append(
                Cell("pyarrow", "parquet", codec, encoding, kind, dtype, note=f"pages v{page}", options=options)
            )
        for place, kind in enumerate(kinds):
            made.append(
                Cell("pyarrow", ("arrow file", "arrow stream")[(at + place) % 2], "none", kind=kind, dtype=dtype)
            )
            made.append(Cell("pyarrow", "arrow file", "zstd", kind=kind, dtype=dtype))
        made.append(Cell("polars", "parquet", "zstd", "chosen by writer", "large_list", dtype))
        made.append(
            Cell("duckdb", "parquet", "zstd", "chosen by writer", "list", dtype, note="v1", options={"version": "V1"})
        )
        made.append(Cell("datasets", "save_to_disk", dtype=dtype))
        made.append(Cell("numpy", "npy", kind="plain", dtype=dtype, note="version 1", options={"nulls": False}))
        made.append(Cell("numpy", "raw", kind="plain", dtype=dtype, options={"single": True}))
        options = {"single": True, "document_end_id": 5 + at}
        made.append(Cell("numpy", "raw", dtype=dtype, note="split", options=options))
        made.append(Cell("megatron", "megatron", dtype=dtype))
    return made


# --- What the files really hold


def observed(cell: Cell, path: Path) -> dict[str, str]:
    """Codec, encodings and type of the tokens as the files say, for the matrix: writers do not
    always do as asked.
    """
    from reference import read_table, shards

    if cell.flat:
        return {"codec": "none", "encoding": "plain", "type": cell.type}
    files = shards(path)
    types = {str(read_table(file).schema.field(cell.column).type) for file in files}
    types = {re.sub(r"(item|element): |\[\d+\]", "", name) for name in types}
    if cell.container != "parquet":
        return {"codec": cell.codec if compressed_arrow(files) else "none", "encoding": "plain", "type": join(types)}
    codecs, encodings = set(), set()
    for file in files:
        metadata = pq.ParquetFile(file).metadata
        for group in range(metadata.num_row_groups):
            for at in range(metadata.num_columns):
                column = metadata.row_group(group).column(at)
                if column.path_in_schema.split(".")[0] == cell.column:
                    codecs.add({"UNCOMPRESSED": "none"}.get(column.compression, column.compression.lower()))
                    encodings |= set(column.encodings)
    # Levels are always RLE.
    return {"codec": join(codecs), "encoding": join(encodings - {"RLE"}), "type": join(types)}


def compressed_arrow(files: list[Path]) -> bool:
    """Whether reading from a mapping allocates, which only decompression does."""
    before = pa.total_allocated_bytes()
    kept = []
    for file in files:
        with open(file, "rb") as opened:
            random = opened.read(6) == b"ARROW1"
        source = pa.memory_map(str(file))
        kept.append((pa.ipc.open_file(source) if random else pa.ipc.open_stream(source)).read_all())
    return pa.total_allocated_bytes() > before


def join(names: set[str]) -> str:
    return " + ".join(sorted(names)).lower()


# --- Large corpora with unique tokens, without Python lists


def unique_corpus(folder: Path, container: str, tokens: int, *, shards: int = 8) -> Path:
    """`tokens` consecutive ids as `list<uint32>` documents of ragged lengths, in Parquet (zstd) or
    an Arrow file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    bounds = np.linspace(0, tokens, shards + 1).astype(np.int64)
    for shard, (low, high) in enumerate(pairwise(bounds)):
        sizes = rng.integers(0, 2000, max(1, int(high - low) // 900))
        ends = np.minimum(np.concatenate([[0], np.cumsum(sizes)]), high - low)
        ends[-1] = high - low
        values = pa.array(np.arange(low, high, dtype=np.uint32))
        rows = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)
        table = pa.table({"input_ids": rows})
        if container == "parquet":
            path = folder / f"shard-{shard:03}.parquet"
            pq.write_table(table, path, compression="zstd", compression_level=1, use_dictionary=False)
        else:
            path = folder / f"shard-{shard:03}.arrow"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=1000)
    return folder


#: The settings that read raw files of `write_rows`, which do not say where documents end.
SPLIT: dict[str, Any] = {"bin_dtype": "uint16", "document_end_id": 60_000}


def write_rows(
    path: Path, rows: Any, *, dtype: pa.DataType | None = None, column: str = "input_ids", **options: Any
) -> Path:
    """One small shard: Parquet or an Arrow file, stream or compressed file, by the suffix and
    `options`. With the suffix `.bin`, raw ids whose documents `SPLIT` tells apart.
    """
    if path.suffix == ".bin":
        bodies = [[*row[:-1], SPLIT["document_end_id"]] for row in rows if row]
        np.array([token for row in bodies for token in row], "<u2").tofile(path)
        return path
    table = pa.table({column: pa.array(rows, type=dtype or pa.list_(pa.int32()))})
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
        return path
    stream = options.pop("stream", False)
    rows_per_batch = options.pop("batch_rows", 16)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    settings = pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=settings) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return path
