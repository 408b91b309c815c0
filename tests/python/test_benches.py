"""The benchmark's own judgement: a loader that delivers wrong rows is found out, and a report
survives failures.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
SOURCES = Path(__file__).resolve().parents[2] / "benches" / "python"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SOURCES))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == SOURCES:
            del sys.modules[name]


LENGTHS = (40, 3, 25, 300, 1, 60, 71)


@pytest.fixture
def documents(tmp_path: Path) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    found = [rng.integers(0, 50_000, length, dtype=np.uint16) for length in LENGTHS]
    (tmp_path / "arrow-uint16").mkdir()
    table = pa.table({"input_ids": pa.array([tokens.tolist() for tokens in found], pa.list_(pa.uint16()))})
    with (
        pa.OSFile(str(tmp_path / "arrow-uint16" / "0.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=3)
    return found


def test_rows_of_joined_documents_are_found_and_others_are_not(bench: Any, documents: list, tmp_path: Path) -> None:
    chains = bench("chains").Chains(tmp_path, np.concatenate(documents))
    begins = dict(enumerate(np.cumsum([0, *LENGTHS[:-1]])))
    order = [5, 1, 0, 4, 6, 3, 2]
    joined = np.concatenate([documents[number] for number in order]).astype(np.int64)
    owners = [(number, at) for number in order for at in range(LENGTHS[number])]
    for begin in range(len(joined) - 50):
        number, at = owners[begin]
        assert chains.find(joined[begin : begin + 50]) == begins[number] + at, begin
    for begin in range(0, len(joined) - 50, 7):
        wrong = joined[begin : begin + 50].copy()
        wrong[begin % 50] += 1
        with pytest.raises(AssertionError, match="none of the corpus"):
            chains.find(wrong)


def record(name: str, group: str, **more: Any) -> dict[str, Any]:
    run = {
        "tokens_per_s": 1e8, "cpu_s_per_gtok": 2.0, "cores": 1.0, "other_cores": 0.0, "memory_mb": 300.0,
        "own_memory_mb": 0.0, "first_batch_ms": 3.0, "p50_us": 1.0, "p99_us": 2.0, "p999_us": 3.0, "checked_rows": 376,
        "version": "torch 2", "python": "3", "repeat": 0,
    }  # fmt: skip
    sizes = {"batch_size": 8, "seq_len": 2048}
    return {"kind": "loader", "name": name, "group": group, **sizes, **(more if "failed" in more else {**run, **more})}


@pytest.mark.parametrize("ours_failed", [False, True])
def test_reports_show_what_failed_and_why(bench: Any, ours_failed: bool) -> None:
    head = {
        "kind": "benchmark", "date": "now", "commit": "c", "command": "make bench", "quick": True, "seed": 1,
        "machine": {"cpu": "x", "cores": 2, "memory_gib": 1, "kernel": "k"}, "versions": {},
        "plan": {"tokens": 10**8, "copies": 16, "warm_up_s": 1, "window_s": 3},
    }  # fmt: skip
    failed = {"failed": "could not <be> installed", "repeat": 0}
    ours = failed if ours_failed else {"resume_1_ms": 1.0, "resume_99_ms": 1.0}
    records = [
        head,
        record("forebay-arrow-uint16-1", "uint16", **ours),
        record("torch-rows-0", "uint16"),
        record("grain-0", "uint16", **failed),
        record("nodes-batched-uint16", "uint16", resume_failed="StopIteration"),
        {
            "kind": "limit",
            "name": "gather",
            "group": "uint16",
            "threads": 1,
            "batch_size": 8,
            "seq_len": 2048,
            **failed,
        },
        record("forebay-parquet-zstd-1", "zstd", **failed),
        {"kind": "interrupted", "name": "", "group": "", "repeat": 0},
    ]
    markdown, page = bench("report").markdown(records), bench("page").page(records)
    assert markdown.count("**failed**: could not <be> installed") == 2 + ours_failed
    assert "could not <be>" not in page
    assert "could not &lt;be&gt; installed" in page
    for text in (markdown, page):
        assert "was interrupted" in text
        assert "StopIteration" in text
        assert text.index("Missing: ") < text.index("Grain, threads") < text.index("p99.9")
    assert ("At a glance" in page) is not ours_failed
    assert any("could not <be> installed" in line for line in bench("report").summary(records))


def test_the_table_that_is_least_favourable_counts(bench: Any) -> None:
    report = bench("report")
    head = {"plan": {"repeats": 3}}
    records = [
        head,
        record("forebay-arrow-uint16-0", "uint16", tokens_per_s=3e8, resume_1_ms=2.0, resume_99_ms=1.0),
        record("forebay-arrow-uint16-2", "uint16", tokens_per_s=6e8, resume_1_ms=2.0, resume_99_ms=1.0),
        record("forebay-numpy", "uint16", tokens_per_s=9e8),
        record("nodes-batched-uint16", "uint16", tokens_per_s=2e8, resume_1_ms=1.0, resume_99_ms=0.5),
        record("stateful-batched", "uint16", resume_1_ms=0.1, resume_99_ms=0.1, resume_exact=False),
        record("torch-rows-2", "uint16", tokens_per_s=1e7),
        record("forebay-arrow-int32-0", "int32", tokens_per_s=3e8, p999_us=4.0),
        record("nodes-batched-int32", "int32", tokens_per_s=2.5e8),
    ]
    first, second = report.groups(records)
    assert first.equal().ratio == 1.5
    assert first.against("tokens_per_s", True).ratio == 3
    assert [name for name, _ in first.lost()] == ["resume at 1 %", "resume at 99 %"]
    assert "torchdata.nodes, batched: 1.00 ms" in first.lost()[0][1].text
    assert [name for name, _ in second.lost()] == ["p99.9"]
    equal, fastest, ahead, *_ = report.summary(records)
    assert "1.20 times faster or more (Uncompressed, 4 bytes" in equal
    assert "1.20 times faster or more (Uncompressed, 4 bytes" in fastest
    assert "resume at 1 % (1 of 2 tables)" in ahead
    records[-1]["repeat"] = 1
    assert report.turns(records) == "numbers are the mean of two turns (3 were planned)"


def test_who_cannot_take_part_is_told_once(bench: Any, tmp_path: Path) -> None:
    run, known = bench("bench"), bench("contestants")
    chosen = [one for one in known.contestants() if one.name.startswith(("dataloader-rs", "streaming", "torch-rows"))]
    ready = run.Ready(failed={"dataloader-rs": "too old", str(tmp_path / "streaming-2048"): "no room"})
    told = run.missing(chosen, known.SHAPES, ready, tmp_path)
    assert told == ["dataloader-rs will be missing: too old", "MosaicML Streaming will be missing: no room"]


@pytest.mark.parametrize(
    ("there", "expected"), [(("ft", "313"), ".venv-ft"), (("313", "314"), ".venv-313"), (("314",), ".venv-314")]
)
def test_a_peer_finds_a_newer_python(
    bench: Any, there: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = bench("environments")
    monkeypatch.setattr(environments.sys, "version_info", (3, 11))
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    made, told = [], []

    def run(_script: str, command: str, *arguments: str) -> str:
        made.extend(arguments[:1])
        return "found" if command.removeprefix("python-") in there else ""

    monkeypatch.setattr(environments, "run", run)
    assert environments.below((3, 13), told.append) == tmp_path / expected / "bin" / "python"
    assert made == [expected]
    assert "some GB" in told[0]
    there = ()
    with pytest.raises(environments.Unavailable, match=r"python3\.13"):
        environments.below((3, 13), told.append)


def test_the_committed_results_are_wrapped_as_the_writer_wraps_them(bench: Any) -> None:
    text = (SOURCES.parent / "RESULTS.md").read_text()
    assert bench("report").wrapped(text) == text
    long = "- " + "word " * 40
    assert max(map(len, bench("report").wrapped(long).splitlines())) <= 100


def test_the_picture_and_the_opening_come_from_the_tables(bench: Any) -> None:
    text, picture = (SOURCES.parent / "RESULTS.md").read_text(), bench("picture")
    assert picture.with_opening(text) == text, "run benches/python/picture.py"
    assert picture.picture(text) == (SOURCES.parent / "picture.svg").read_text(), "run benches/python/picture.py"
    flat = picture.rows(text, picture.FLAT)
    assert flat == sorted(flat, key=lambda row: -row.mtok_per_s)
    assert sum(row.ours for row in flat) == 1 and len(flat) > 5
    slower = text.replace(f"{flat[0].mtok_per_s:.0f}", "12.5")
    assert picture.rows(slower, picture.FLAT)[0].mtok_per_s < flat[0].mtok_per_s
    assert picture.with_opening(slower) != slower
