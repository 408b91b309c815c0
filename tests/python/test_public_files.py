"""Compares files that other projects published with pyarrow.

A file gives pyarrow's tokens or a clear error.

The files are no part of this project. ``FOREBAY_TEST_FILES`` names their folder: one sub-folder for
each project. Each group of files is read in a process of its own, so that a crash is a failure of
the file that was being read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import TEST_FILES
from support import HERE, clean_environment

pytest.importorskip("pyarrow", reason="pyarrow judges what the files hold")

GROUP = 24
LIMIT_S = 240
FOLDER = Path(TEST_FILES) if TEST_FILES else None
PROJECTS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) if FOLDER else []

#: Files that the loader reads and `rewrite` refuses with a clear error. Each has a column, and the
#: reason. `rewrite` reads by arrow-rs on purpose, so that its reader shares no code with the loader
#: that reads the copy back.
KNOWN = {
    ("data__dict-page-offset-zero.parquet", "l_partkey"): "arrow-rs refuses the footer",
    ("data__repeated_no_annotation.parquet", "id"): "arrow-rs finds no tokens",
}

#: Outcomes that break the promise.
FAULTS = ("wrong", "died", "hung", "accepted, though pyarrow refuses it")


def read_group(files: list[Path], out: Path) -> list[dict[str, str]]:
    """Results of the files; a file at which the process dies or hangs gets one of its own, and the
    rest go on.
    """
    found: list[dict[str, str]] = []
    left = list(files)
    while left:
        out = out.with_name(out.name + "-")
        command = [sys.executable, str(HERE / "public_files_worker.py"), str(out), *map(str, left)]
        outcome = "died"
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=clean_environment())
            lines, code = done.stdout.splitlines(), done.returncode
        except subprocess.TimeoutExpired as expired:
            lines, code, outcome = (expired.stdout or b"").decode().splitlines(), None, "hung"
        answers = [json.loads(line) for line in lines]
        found += [answer for answer in answers if "outcome" in answer]
        if code == 0:
            break
        begun = [answer["begin"] for answer in answers if "begin" in answer]
        assert begun, f"the reader did not begin: status {code}"
        at = next(index for index, path in enumerate(left) if path.name == begun[-1])
        found.append({"file": begun[-1], "column": "", "outcome": outcome, "detail": f"status {code}"})
        left = left[at + 1 :]
    return found


@pytest.mark.skipif(FOLDER is None, reason="FOREBAY_TEST_FILES names no folder with files of other projects")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("project", PROJECTS or [None])
def test_files_of_others_give_their_tokens_or_a_clear_error(project: str, tmp_path: Path) -> None:
    assert FOLDER is not None
    files = sorted(path for path in (FOLDER / project).rglob("*") if path.is_file())
    results: list[dict[str, str]] = []
    for start in range(0, len(files), GROUP):
        results += read_group(files[start : start + GROUP], tmp_path / f"group-{start}")
    report = os.environ.get("PUBLIC_FILES_REPORT")
    if report:
        Path(report).mkdir(parents=True, exist_ok=True)
        (Path(report) / f"{project}.json").write_text(json.dumps(results, indent=1))
    print(project, dict(Counter(result["outcome"] for result in results)))
    faults = [result for result in results if result["outcome"] in FAULTS]
    known = [fault for fault in faults if (fault["file"], fault["column"]) in KNOWN]
    faults = [fault for fault in faults if fault not in known]
    files_here = {path.name for path in files}
    expected = {entry for entry in KNOWN if entry[0] in files_here}
    assert {(fault["file"], fault["column"]) for fault in known} == expected, "mended: take it from the list"
    assert all("`forebay rewrite` fails" in fault["detail"] for fault in known)
    lines = [f"{fault['file']} `{fault['column']}`: {fault['outcome']}: {fault['detail']}" for fault in faults]
    assert not faults, f"{len(faults)} of {len(results)} columns:\n" + "\n".join(lines)
    assert any(result["outcome"] == "equal" for result in results), "no file was read: the lane proves nothing"
