"""Settings of the whole run: no inherited configuration, `--stress`, and the matrix of what was
really covered.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("writer", "format", "codec", "encoding", "type")

#: Folder with test files of other projects, which this one does not hold; see test_public_files.py.
TEST_FILES = os.environ.get("FOREBAY_TEST_FILES", "")

# A rank or setting of the machine that runs the tests is none of theirs.
for _name in [name for name in os.environ if name.startswith(("FOREBAY_", "SLURM_", "OMPI_", "PMI_"))]:
    del os.environ[_name]
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    os.environ.pop(_name, None)
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    stress = os.environ.get("FOREBAY_TEST_STRESS", "") not in ("", "0")
    parser.addoption("--service", action="store_true", help="loaders take their batches from a service")
    parser.addoption("--stress", action="store_true", default=stress, help="corpora of 200M tokens, more repetitions")

    parser.addoption("--damage-cases", type=int, default=0, help="cases of damage in each family of test_damage.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = defaultdict(lambda: {"facts": None, "failed": False})
    # Large corpora take their time; the limit stays a limit.
    if config.getoption("--stress"):
        config.option.timeout = 3600


@pytest.fixture(scope="session", autouse=True)
def service(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """With `--service`, switches all loaders of the run over to a server by the environment."""
    if not pytestconfig.getoption("--service"):
        yield
        return
    from serving import Server

    root = tmp_path_factory.getbasetemp()
    with Server("--under", root, "--idle", "5", listen=f"unix:{root / 'service'}") as server:
        os.environ["FOREBAY_SERVICE"] = server.address
        yield
        del os.environ["FOREBAY_SERVICE"]


@pytest.fixture(scope="session")
def stress(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--stress"))


#: Tests of what the Rust core reads, in very many cells. It is the same code without a GIL.
MATRICES = ("test_conformance.py", "test_layouts.py", "test_batch_conformance.py", "test_bombs.py", "test_damage.py")

#: Tests of content, pages and commands. Most of their time goes by in Rust, in other processes, or
#: in the reference, so that an interpreter without a GIL changes nothing about them.
ELSEWHERE = (
    "test_check_fields.py", "test_checksums.py", "test_clusters.py", "test_columns.py", "test_config.py",
    "test_docs.py", "test_document_ends.py", "test_examples.py", "test_flat.py", "test_format_consumers.py",
    "test_kill.py", "test_lengths.py", "test_long_runs.py", "test_monitoring.py", "test_order.py",
    "test_packed_files.py", "test_packed_models.py", "test_public_files.py", "test_remote.py",
    "test_rewrite_flat.py", "test_service.py", "test_site.py", "test_verify_layouts.py", "test_vocabulary.py",
)  # fmt: skip
#: The example of these that is made for an interpreter without a GIL.
HERE = "eight_consumers"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GIL, keeps each third cell of the matrices, and leaves out what does not depend on
    the interpreter, unless the run is asked for more.
    """
    if getattr(sys, "_is_gil_enabled", lambda: True)() or config.getoption("--stress"):
        return
    cells = [item for item in items if item.path.name in MATRICES]
    left_out = {item for number, item in enumerate(cells) if number % 3}
    left_out |= {item for item in items if item.path.name in ELSEWHERE and HERE not in item.name}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


RESULTS: pytest.StashKey[dict[str, dict[str, Any]]] = pytest.StashKey()


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Collects what conformance tests recorded; a cell counts only if every test of it passed."""
    properties = dict(item.user_properties)
    if "cell" not in properties or call.when != "call":
        return
    result = item.config.stash[RESULTS][properties["cell"]]
    result["failed"] |= call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception)
    result["facts"] = properties.get("facts") or result["facts"]


def tell_damage(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows the outcomes of all cases of damage, the bad ones too if there are none of them."""
    import damage

    total = sys.modules["test_damage"].TOTAL
    counts = {outcome: total[outcome] for outcome in (*damage.BAD, *sorted(set(total) - set(damage.BAD)))}
    terminalreporter.section("damage: cases by outcome")
    terminalreporter.write_line(
        f"{sum(counts.values())} cases: " + ", ".join(f"{n} {what}" for what, n in counts.items())
    )
    path = ROOT / "out" / "damage.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"cases": sum(counts.values()), **counts}, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if getattr(sys.modules.get("test_damage"), "TOTAL", None):
        tell_damage(terminalreporter)
    results = config.stash[RESULTS]
    if not results:
        return
    passed = [r["facts"] for r in results.values() if not r["failed"] and r["facts"]]
    failed = sum(r["failed"] for r in results.values())
    rust = ROOT / "out" / "conformance-arrow-rs.json"
    if rust.exists():  # what the Rust tests covered with the writers of arrow-rs
        passed += json.loads(rust.read_text())
    terminalreporter.section("conformance: writer x format x codec x encoding x type, as covered")
    rows = matrix(passed)
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(4)]
    for row in [COLUMNS, *rows]:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        terminalreporter.write_line(f"{head}  {row[4]}")
    total = f"{len(passed)} ways of writing a corpus passed, {failed} failed"
    terminalreporter.write_line(total)
    path = ROOT / "out" / "conformance.md"
    path.parent.mkdir(exist_ok=True)
    lines = ["# Conformance", "", f"Batches equalled the naive reference loader: {total}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    path.write_text("\n".join(lines) + "\n")


def matrix(passed: list[dict[str, str]]) -> list[tuple[str, ...]]:
    """One row for each writer, format, codec and encoding, with the types and shapes that were met
    there.
    """
    grouped: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for facts in passed:
        shown = facts["type"] + (f" ({facts['note']})" if facts["note"] else "")
        known = grouped[tuple(facts[name] for name in COLUMNS[:4])]
        if shown not in known:
            known.append(shown)
    return [(*key, ", ".join(sorted(types))) for key, types in sorted(grouped.items())]
