"""Code that the measurements against targets share. `make bench ARGS=--targets` runs all of them in
turn.

Each measurement is a module. `LEAD` is its text in the results, `measure(folder, seed, tell)` gives
records, and `section(records)` makes lines of Markdown from them. A run is a fresh process
(`child`). The runs take turns in random order (`in_turn`).
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import corpus

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120

Record = dict[str, Any]
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Verdict:
    """A row of a table: the promised value and the measured value."""

    what: str
    target: str
    found: str
    #: `None` if the row is only shown.
    met: bool | None = None

    def row(self) -> list[str]:
        return [self.what, self.target, self.found, {True: "yes", False: "**no**", None: ""}[self.met]]


HEADS = ["", "target", "found", "met"]


def number(value: float) -> str:
    """Formats a number with three significant digits."""
    for digits, above in ((0, 100), (1, 10), (2, 0.1)):
        if abs(value) >= above:
            return f"{value:.{digits}f}"
    return f"{value:.3f}"


def spread(values: Sequence[float]) -> str:
    """Formats the median and the range of the values."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})"


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """The median and its 95 % interval."""
    found = np.asarray(values)
    drawn = np.random.default_rng(seed).integers(0, len(found), (draws, len(found)))
    low, high = np.percentile(np.median(found[drawn], axis=1), [2.5, 97.5])
    return float(np.median(found)), float(low), float(high)


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]


def verdicts(rows: Sequence[Verdict]) -> list[str]:
    return table(HEADS, [row.row() for row in rows])


def environment() -> dict[str, str]:
    """The environment without settings of the caller's shell, which would change the
    measurement.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}


def run(command: Sequence[object], limit_s: float = LIMIT_S, **more: Any) -> Record:
    """Returns the last line that a process printed, or `failed` with the reason."""
    try:
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, env={**environment(), **more}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=limit_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"did not end within {limit_s} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"ended with status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(module: str, job: Record) -> Record:
    """Runs `once(job)` of a module of this folder, in a process of its own."""
    code = f"import json, sys, {module}; print(json.dumps({module}.once(json.loads(sys.argv[1]))))"
    return run([sys.executable, "-c", code, json.dumps(job)], PYTHONPATH=str(Path(__file__).parent))


def in_turn(jobs: list[Record], repeats: int, seed: int, tell: Tell, start: Callable[[Record], Record]) -> list[Record]:
    """Runs every job `repeats` times, in random order. A failed job is not tried again."""
    shuffler, jobs, records, lost = random.Random(seed), list(jobs), [], set()
    for repeat in range(repeats):
        shuffler.shuffle(jobs)
        for place, job in enumerate(jobs):
            tell(repeat * len(jobs) + place, repeats * len(jobs))
            key = json.dumps(job)
            if key not in lost:
                records.append({**job, "repeat": repeat, **start(job)})
                if "failed" in records[-1]:
                    lost.add(key)
    tell(repeats * len(jobs), repeats * len(jobs))
    return records


def failures(records: list[Record], *fields: str) -> list[str]:
    """A line for each run that failed."""
    return [
        f"- **failed**: {', '.join(str(record[field]) for field in fields)}: {record['failed']}"
        for record in records
        if "failed" in record
    ]


def built(name: str) -> Path:
    """Builds a program of `benches/src` if any of its sources changed, and returns its path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or cache / "forebay" / "target")
    command = ["cargo", "build", "--release", "--quiet", "-p", "forebay-benches", "--bin", name]
    if not (target / "release" / name).exists():
        print(f"bench: building {name}", file=sys.stderr, flush=True)
    changed = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    subprocess.run(command, cwd=ROOT, env=changed, stdin=subprocess.DEVNULL, check=True)
    return target / "release" / name


def read_once(path: Path) -> None:
    """Reads the file so that the page cache holds it."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb", buffering=0) as opened:
            while opened.read(8 << 20):
                pass


def small_corpus(folder: Path) -> Path:
    """Returns a corpus of 20 M tokens in every format, the corpus of `--quick`."""
    found = corpus.prepare(folder, 20_000_000, 32, lambda _done, _all: None)
    for name in ("arrow-uint16", "parquet-zstd", "tokens-uint16.bin"):
        read_once(found / name)
    return found


def anonymous_mb() -> float:
    """Anonymous and shared memory of this process. Mapped files do not count."""
    found = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem"):
            found += int(value.split()[0])
    return found / 1024
