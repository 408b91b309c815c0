"""Compares the order contract with the specification, with labels, masks and other columns.

The cases are those of `test_contract.py` and `test_contract_layouts.py`: random corpora and
mixtures that are stopped and resumed with other ranks. Here the files have further columns. No
token comes twice in a corpus, so that each value follows from its token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import test_contract
import test_contract_layouts
from reference_documents import arrays
from test_contract import IGNORE, Case
from test_contract_layouts import LENGTHS, PAD_ID, LayoutCase, Row

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

CASES = 30
EOS = 2
#: Columns that some corpora lack. A mixture then takes what stands for them.
REPLACED = ("labels", "loss_mask", "weights")
OF_TARGETS = REPLACED
TYPES = {"labels": pa.int32(), "loss_mask": pa.bool_(), "weights": pa.float16(), "kind": pa.int8()}
PADDING = {"labels": IGNORE, "loss_mask": 0, "weights": 0.0, "kind": 0}

#: Whether a corpus has these columns, by its first file.
_has: dict[Path, bool] = {}
#: The year of the document of each token of a corpus, by its first file.
_years: dict[Path, dict[int, int | None]] = {}


def value_of(name: str, token: int, has: bool) -> Any:
    """The value of a column at a token."""
    if name == "kind":
        return 0 if token == EOS else token % 100 - 50
    if not has:
        return token if name == "labels" else 1
    if token == EOS:
        return PADDING[name]
    return {"labels": token if token % 3 else IGNORE, "loss_mask": token % 2, "weights": token % 16 / 8}[name]


def year_of(first: int) -> int | None:
    return None if first % 5 == 0 else first % 3000


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Path]]]:
    """Corpora of one to four shards in both formats."""
    random = Random(5)
    found: dict[str, list[list[Path]]] = {"rows": [], "other": []}
    for number in range(24):
        kind = ("rows", "other")[number % 2]
        has = number % 6 < 4
        folder, token, shards = tmp_path_factory.mktemp(f"corpus{number}"), 3, []
        years: dict[int, int | None] = {}
        choices = random.choice(LENGTHS[kind])
        for shard in range(random.randint(1, 4)):
            rows = []
            for _ in range(random.choice([1, 9, 25])):
                length = random.choice(choices)
                rows.append(list(range(token, token + length)))
                years |= dict.fromkeys(rows[-1], year_of(token))
                token += length
            path = folder / f"{shard}{('.parquet', '.arrow')[number // 2 % 2]}"
            write(path, rows, has)
            shards.append(path)
        if token > 40:
            found[kind].append(shards)
            _has[shards[0]], _years[shards[0]] = has, years
    return found


def write(path: Path, rows: list[list[int]], has: bool) -> None:
    columns: dict[str, Any] = {"input_ids": pa.array(rows, pa.list_(pa.int32()))}
    for name, kind in TYPES.items():
        if has or name not in REPLACED:
            values = [np.array([value_of(name, token, True) for token in row], kind.to_pandas_dtype()) for row in rows]
            columns[name] = pa.array([list(row) for row in values], pa.large_list(kind))
    columns["year"] = pa.array([year_of(row[0]) if row else 7 for row in rows], pa.int32())
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=8)
        return
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=8)


def with_fields(make: Callable[[Random, Any], Any]) -> Callable[[Random, Any], Any]:
    """Adds columns to the cases of `make`."""

    def made(random: Random, pool: Any) -> Any:
        case = make(random, pool)
        draw = Random(repr(case.given))
        all_have = all(_has[corpus[0]] for corpus in case.corpora)
        names = [name for name in TYPES if name not in REPLACED or all_have or case.stages is not None]
        if case.given.get("boundaries"):
            names.append("year")
        case.given["fields"] = draw.sample(names, draw.randint(1, len(names)))
        return case

    return made


def has_columns(case: Case, source: int) -> bool:
    return source < 0 or _has[case.corpora[source][0]]


def assert_columns(batch: dict[str, Any], rows: list[dict[str, Any]], case: Case, where: str) -> None:
    """Asserts that the columns and all other arrays of a batch are those of `rows`."""
    for name in rows[0]:
        values = [row[name] for row in rows]
        assert np.array_equal(batch[name], np.array(values)), f"{where} `{name}`: {batch[name]}, not {values}, {case}"


def check_joined(batch: Any, wanted: list[tuple[int, int, list[int], list[int]]], case: Case, where: str) -> None:
    inputs_name, targets_name = ("x", "y") if case.given["targets"] == "shifted" else ("input_ids", "labels")
    rows = []
    for source, sequence, inputs, targets in wanted:
        # Padding has the id 1, which no document has, and no target.
        row: dict[str, Any] = {"source": source, "sample_index": sequence, inputs_name: inputs, targets_name: targets}
        for name in case.given["fields"]:
            tokens = targets if name in OF_TARGETS else inputs
            values = [
                PADDING[name] if token in (1, IGNORE) else value_of(name, token, has_columns(case, source))
                for token in tokens
            ]
            row[targets_name if name == "labels" else name] = values
        rows.append(row)
    assert_columns(batch, rows, case, where)


def check_laid_out(batch: Any, wanted: list[tuple[int, int, Row]], case: LayoutCase, where: str) -> None:
    s, boundaries = case.layout, case.given["boundaries"]
    lead = s.capacity - s.seq_len
    rows, years = [], []
    for source, sequence, cuts in wanted:
        row = arrays(cuts, s, PAD_ID, boundaries)
        starts = row.pop("starts", [])
        firsts = [next((t for t in tokens if t != EOS), None) for at, tokens in cuts if at < s.seq_len]
        of_token = {} if source < 0 else _years[case.corpora[source][0]]
        # The token `EOS` alone does not tell its document.
        years += [... if first is None else of_token[first] for first in firsts]
        years += [None] * (len(starts) - len(firsts))
        row |= {"source": source, "sample_index": sequence}
        for name in set(case.given["fields"]) - {"year"}:
            values = [PADDING[name]] * s.capacity
            for at, tokens in cuts:
                for place, token in enumerate(tokens, at):
                    is_masked = boundaries and name in OF_TARGETS and place == at
                    values[place] = PADDING[name] if is_masked else value_of(name, token, has_columns(case, source))
            key = "y" if lead and name == "labels" else name
            row[key] = values[lead:] if name in OF_TARGETS else values[: s.seq_len]
        rows.append(row)
    assert_columns(batch, rows, case, where)
    if "year" in case.given["fields"]:
        found = [None if null else year for year, null in zip(batch["year"], batch["year_is_null"], strict=True)]
        assert len(found) == len(years), where
        known = [(year, wanted) for year, wanted in zip(found, years, strict=True) if wanted is not ...]
        assert all(year == wanted for year, wanted in known), f"{where} `year`: {found}, expected {years}, {case}"


@pytest.mark.parametrize("part", range(4))
def test_random_runs_of_joined_documents_carry_every_column(
    part: int, pools: dict[str, list[list[Path]]], stress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_contract, "random_case", with_fields(test_contract.random_case))
    monkeypatch.setattr(test_contract, "check", check_joined)
    cases = CASES * (20 if stress else 1)
    pool = [corpus for corpora in pools.values() for corpus in corpora]
    compared = sum(test_contract.run_case(seed, pool) for seed in range(part * cases, (part + 1) * cases))
    assert compared > cases * 10, "most cases deliver something"


@pytest.mark.parametrize("part", range(4))
def test_random_runs_of_every_layout_carry_every_column(
    part: int, pools: dict[str, list[list[Path]]], stress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_contract_layouts, "random_case", with_fields(test_contract_layouts.random_case))
    monkeypatch.setattr(test_contract_layouts, "check", check_laid_out)
    cases = CASES * (20 if stress else 1)
    compared = sum(test_contract_layouts.run_case(seed, pools) for seed in range(part * cases, (part + 1) * cases))
    assert compared > cases * 10, "most cases deliver something"
