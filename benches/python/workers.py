"""Compares threads with worker processes, for datasets written in Python.

Measures speed, memory of all processes, start and end.

    workers.py [--quick] [--python NAME ...] [--write-results]

Every cell is a fresh process with one class of loader, one number of workers and one dataset.
torch's workers are forked. They share the dataset until they touch it, which is their best case.
"bare" is the control: as many plain threads call the dataset and hand nothing over, so it shows
what the interpreter itself allows. Results go to out/bench/workers.md. With --write-results they
also go to benches/RESULTS.md.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from processes import descendants

ROOT = Path(__file__).resolve().parents[2]
MARK = "<!-- workers -->"
DATASETS = {
    "releasing": "inflating 100 kB and hashing it, which releases the interpreter",
    "python": "20,000 additions in pure Python, which does not",
    "memory": "a row of an array in memory, 8 kB",
}
BATCH = 16
#: Memory of a process that it shares with no other, even if it was forked.
WORKER_MB = 60


# One cell of the tables.


def dataset_of(name: str, size_mb: int) -> Any:
    import numpy as np
    import torch

    class Releasing(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            noise = np.random.default_rng(1).integers(0, 16, 100_000, dtype=np.uint8)
            self.packed = zlib.compress(noise.tobytes(), 6)

        def __len__(self) -> int:
            return 10**7

        def __getitem__(self, index: int) -> int:
            return hashlib.sha256(zlib.decompress(self.packed)).digest()[0]

    class Python(Releasing):
        def __getitem__(self, index: int) -> int:
            total = 0
            for number in range(20_000):
                total += number
            return total

    class Memory(Releasing):
        def __init__(self) -> None:
            self.rows = np.ones((size_mb << 20) // 8192 * 1024, dtype=np.int64).reshape(-1, 1024)

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(self.rows[index % len(self.rows)].copy())

    return {"releasing": Releasing, "python": Python, "memory": Memory}[name]()


def pss_mb() -> float:
    """Memory of all processes. Each page counts once."""
    total = 0
    for pid in descendants():
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def wait_for(threads: int, children: int) -> None:
    end = time.monotonic() + 60
    while (threading.active_count() > threads or len(descendants()) > children) and time.monotonic() < end:
        time.sleep(0.001)


class Bare:
    """Plain threads take items of the dataset, 16 at a turn. They hand over only the number of
    items.
    """

    def __init__(self, dataset: Any, workers: int) -> None:
        self._dataset, self._stopped = dataset, False
        self._indices = itertools.count()
        self._done: SimpleQueue[None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def _turn(self) -> None:
        for _ in range(BATCH):
            self._dataset[next(self._indices)]

    def _work(self) -> None:
        while not self._stopped:
            self._turn()
            self._done.put(None)

    def __next__(self) -> None:
        if self._threads:
            self._done.get()
        else:
            self._turn()

    def forget(self) -> None:
        """Work that was done before the window, while the consumer had no turn, is not part of the
        window.
        """
        for _ in range(self._done.qsize()):
            self._done.get()

    def stop(self) -> None:
        self._stopped = True


def cpu_s() -> float:
    """CPU seconds of this process and all its descendants, including those that still live."""
    ticks = 0
    for pid in descendants():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def cell(asked: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    import torch

    import forebay.torch

    torch.set_num_threads(1)
    dataset = dataset_of(asked["dataset"], asked["size_mb"])
    threads, children = threading.active_count(), len(descendants())
    workers = asked["workers"]
    before = pss_mb()
    start = time.perf_counter()
    loader: Any = None
    batches: Any
    if asked["loader"] == "bare":
        batches = Bare(dataset, workers)
    elif asked["loader"] == "forebay":
        loader = forebay.torch.DataLoader(dataset, batch_size=BATCH, num_workers=workers)
    else:
        more: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
        loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers, **more)
    if loader is not None:
        batches = iter(loader)
    next(batches)
    first_s = time.perf_counter() - start
    warm = time.perf_counter() + asked["window_s"] / 3
    while time.perf_counter() < warm:
        next(batches)
    start_cpu_s = cpu_s()
    if asked["loader"] == "bare":
        # This comes last, because looking at processes takes seconds if threads fight for the
        # interpreter.
        batches.forget()
    taken, start = 0, time.perf_counter()
    # Take at least one batch. If threads fight for the interpreter, it may take longer than the
    # window.
    while taken == 0 or (now := time.perf_counter()) < start + asked["window_s"]:
        next(batches)
        taken += BATCH
    cpu = cpu_s() - start_cpu_s
    memory = pss_mb() - before
    # A full collection would take longer than the measured window.
    gc.freeze()
    end = time.perf_counter()
    if asked["loader"] == "bare":
        batches.stop()
    del batches, loader
    wait_for(threads, children)
    return {
        "rate": taken / (now - start),
        "cpu_us": cpu / taken * 1e6,
        "memory_mb": max(memory, 0.0),
        "first_ms": first_s * 1e3,
        "shutdown_ms": (time.perf_counter() - end) * 1e3,
        "python": platform.python_version() + ("t" if not getattr(sys, "_is_gil_enabled", lambda: True)() else ""),
        "torch": torch.__version__,
    }


# All cells.


def free_mb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 1024


def measure(python: str, asked: dict[str, Any]) -> dict[str, Any]:
    needed = 2 * WORKER_MB * asked["workers"]
    if asked["loader"] == "torch" and free_mb() < needed:
        return {"failed": f"not run: {asked['workers']} processes may need {needed} MB, {free_mb():.0f} MB are free"}
    command = [python, __file__, "--cell", json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": "did not end within 180 s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:120]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[tuple[str, str, int, dict[str, Any]]], dataset: str) -> list[str]:
    """The table of one dataset. Bold marks cells where torch's loader with as many workers is ahead
    of ours.
    """
    lines = [
        f"### {dataset}: {DATASETS[dataset]}",
        "",
        "| Python | loader | workers | samples/s | CPU us/sample | memory MB | first batch ms | shutdown ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by = {(python, loader, workers): found for python, loader, workers, found in rows}
    for python, loader, workers, found in rows:
        what = "processes" if loader == "torch" else "threads"
        if "failed" in found:
            lines.append(f"| {python} | {loader} | {workers} {what} | {found['failed']} | | | | |")
            continue
        peer = by.get((python, "torch", workers), {})
        cells = []
        for name, noise in (
            ("rate", 0.0),
            ("cpu_us", 0.0),
            ("memory_mb", 5.0),
            ("first_ms", 2.0),
            ("shutdown_ms", 2.0),
        ):
            value, other, more_is_better = found[name], peer.get(name), name == "rate"
            if loader == "bare" and name not in ("rate", "cpu_us"):
                cells.append("")
                continue
            lost = loader == "forebay" and other is not None and (
                other > 1.05 * value if more_is_better else value > 1.05 * other + noise
            )  # fmt: skip
            text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
            cells.append(f"**{text}**" if lost else text)
        lines.append(f"| {python} | {loader} | {workers} {what} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="short windows, and no 72 workers: does it all work")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters with forebay and torch")
    parser.add_argument("--write-results", action="store_true", help="put the tables into benches/RESULTS.md as well")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(json.loads(options.cell))))
        return
    counts = (0, 2, 8) if options.quick else (0, 2, 8, 72)
    window_s, size_mb = (0.6, 16) if options.quick else (3.0, 256)
    sections: list[str] = []
    load = os.getloadavg()
    versions: set[str] = set()
    for dataset in DATASETS:
        rows = []
        for python in options.python:
            for workers in counts:
                for loader in ("torch", "forebay", "bare"):
                    asked = dict(dataset=dataset, loader=loader, workers=workers, window_s=window_s, size_mb=size_mb)
                    found = measure(python, asked)
                    print(f"workers: {dataset}, {loader}, {workers}: {found}", file=sys.stderr)
                    versions |= {found["torch"]} if "torch" in found else set()
                    rows.append((found.get("python", Path(python).name), loader, workers, found))
        sections += table(rows, dataset)
    command = "make bench-workers" + (" ARGS=--quick" if options.quick else "")
    date = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    text = "\n".join([
        "## Threads against worker processes",
        "",
        f"- {os.cpu_count()} cores; torch {', '.join(sorted(versions))}; {date}; commit {commit}; `{command}`",
        f"- The load of the machine was {load[0]:.1f} before and {os.getloadavg()[0]:.1f} after. Windows take"
        f" {window_s} s, one run each, with batches of {BATCH}. The array in memory takes {size_mb} MB.",
        "- **bare** is the control: plain threads that call the dataset and hand nothing over.",
        "- **memory**: all processes, each page once (PSS), beyond the memory that one process with the dataset had"
        " before.",
        "- **shutdown**: the time until the last thread or process is gone.",
        "- torch's workers are forked, which is its best case.",
        "- Bold numbers: torch with as many workers is ahead by more than 5 %.",
        "",
        *sections,
    ])  # fmt: skip
    if options.quick:
        text = text.replace(
            "\n\n###", "\n\n**A --quick run: it shows that everything works; it is no measurement.**\n\n###", 1
        )
    out = ROOT / "out" / "bench" / "workers.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    # Imported late: the interpreters of the cells need not have what the report needs.
    from report import wrapped

    text = wrapped(text)
    out.write_text(text)
    print(text)
    if options.write_results:
        results = ROOT / "benches" / "RESULTS.md"
        results.write_text(results.read_text().split(MARK)[0].rstrip() + f"\n\n{MARK}\n\n{text}")


if __name__ == "__main__":
    main()
