"""Reads public test files by forebay and by pyarrow, in a process that may crash without ending the
tests.

Arguments: a folder for rewritten corpora, then files. Prints one line of JSON per integer column of
each file: ``{"file": ..., "column": ..., "outcome": ..., "detail": ...}``. Before each file it
prints ``{"begin": file}``, so that the parent knows which file was being read when this process
died.

Outcomes: ``equal`` (forebay gave exactly what pyarrow reads), ``refused`` (a clear error),
``wrong`` (anything else).
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

import forebay
from forebay import _core

SEQ_LEN, BATCH_SIZE = 7, 5
MOST_TOKENS = 2_000_000
#: More than any of these small files needs; a length taken from a damaged header would pass it.
MOST_BYTES = 8 << 30


def is_integer(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) and kind != pa.uint64()


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def read_column(path: Path, column: str) -> pa.Table | str:
    """Returns the column as pyarrow reads it, or the reason why it does not."""
    head = path.read_bytes()[:6]
    try:
        if head.startswith(b"PAR1"):
            return pq.ParquetFile(path).read(columns=[column])
        source = pa.memory_map(str(path))
        reader = pa.ipc.open_file(source) if head == b"ARROW1" else pa.ipc.open_stream(source)
        return reader.read_all().select([column])
    except Exception as error:  # whatever a fuzzed file makes pyarrow raise
        return f"{type(error).__name__}: {error}"


def integer_columns(path: Path) -> list[str]:
    """Names of integer and list-of-integer columns, from the schema alone, so that damaged data
    keeps its columns.
    """
    head = path.read_bytes()[:6]
    try:
        if head.startswith(b"PAR1"):
            schema = pq.read_schema(path)
        elif head == b"ARROW1":
            schema = pa.ipc.open_file(pa.memory_map(str(path))).schema
        else:
            schema = pa.ipc.open_stream(pa.memory_map(str(path))).schema
    except Exception:
        return []
    fits = lambda kind: is_integer(kind) or (is_list(kind) and is_integer(kind.value_type))  # noqa: E731
    return [field.name for field in schema if fits(field.type)]


def expected_tokens(table: pa.Table, column: str) -> list[int] | str:
    """Returns the documents of the column in order, or the reason why no loader can deliver it."""
    if table.column_names.count(column) != 1:
        return "several columns have this name"
    values: list[Any] = table.column(column).to_pylist()
    tokens: list[int] = []
    for value in values:
        document = value if isinstance(value, list) else [value]
        if value is None and not is_list(table.schema.field(column).type):
            return "a token is null"
        if value is None:
            continue
        for token in document:
            if token is None:
                return "a token is null"
            if token < 0:
                return "a token is negative"
            tokens.append(token)
    return tokens


def loaded_tokens(path: Path, column: str) -> list[int]:
    options: dict[str, Any] = {"num_threads": 1, "memory_budget": 256 << 20, "remainder": "short"}
    with forebay.Loader(str(path), token_column=column, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, **options) as loader:
        rows = [np.asarray(batch["labels"]).reshape(-1) for batch in loader]
    labels = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return [int(label) for label in labels if label != -100]


def command(*arguments: str) -> int:
    return _core.run_command(["forebay", *arguments])


def compare(path: Path, column: str, table: pa.Table | str, out: Path) -> tuple[str, str]:
    wanted = expected_tokens(table, column) if isinstance(table, pa.Table) else table
    try:
        found = loaded_tokens(path, column)
    except forebay.InternalError as error:
        return "wrong", f"a panic: {error}"
    except forebay.ForebayError as error:
        text = str(error)
        if "\n" in text.strip() or len(text) > 2000:
            return "wrong", f"the error is no single sentence: {text[:500]}"
        if path.name not in text and getattr(error, "path", None) is None:
            return "wrong", f"the error names no file: {text[:500]}"
        return ("refused" if isinstance(wanted, str) else "refused, though pyarrow reads it"), text
    if isinstance(wanted, str):
        return "accepted, though pyarrow refuses it", wanted[:300]
    if found != wanted:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
        )
        return "wrong", f"{len(found)} tokens, pyarrow has {len(wanted)}; the first difference is at {at}"
    if not wanted:
        return "equal", "no tokens"
    if command("check", str(path), "--set", f"token_column={column}") != 0:
        return "wrong", "`forebay check` fails where the loader delivers"
    target = out / "rewritten"
    if command("rewrite", str(path), str(target), "--set", f"token_column={column}") != 0:
        return "wrong", "`forebay rewrite` fails where the loader delivers"
    if loaded_tokens(target, column) != wanted:
        return "wrong", "the rewritten corpus holds other tokens"
    if (
        command(
            "verify",
            str(path),
            "--set",
            f"token_column={column}",
            "--seq-len",
            str(SEQ_LEN),
            "--set",
            "remainder=short",
        )
        != 0
    ):
        return "wrong", "`forebay verify` fails where the loader delivers"
    return "equal", f"{len(wanted)} tokens"


def results(path: Path, out: Path) -> Iterator[dict[str, str]]:
    for number, column in enumerate(integer_columns(path) or ["input_ids"]):
        table = read_column(path, column)
        if isinstance(table, pa.Table) and table.num_rows > MOST_TOKENS:
            continue
        folder = out / str(number)
        folder.mkdir(parents=True)
        outcome, detail = compare(path, column, table, folder)
        yield {"file": path.name, "column": column, "outcome": outcome, "detail": detail}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    out = Path(sys.argv[1])
    # The output of the commands is not for the parent.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    for number, name in enumerate(sys.argv[2:]):
        path = Path(name)
        print(json.dumps({"begin": path.name}), file=answers, flush=True)
        for result in results(path, out / str(number)):
            print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
