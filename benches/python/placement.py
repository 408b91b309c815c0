"""Measures what workers take from a trainer on every CPU, by their placement: `make bench
ARGS=--placement`.

Each step computes matrix products with a thread on each CPU, after it took a large batch of
Parquet. Turns with the loader alternate with turns that use one batch again and again, in one
process.
"""

import itertools
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from corpus import COPIES
from targets import Record, Tell, child, failures, in_turn, number, small_corpus, spread, table

LEAD = "Affinity and priority of the workers"
REPEATS, PAIRS, TURN_S = 3, 5, 0.7
BATCH_SIZE, SEQ_LEN = 256, 2048
#: A budget so small that the blocks decoded during the other's turn are soon used up.
BUDGET = 96 << 20
LAST = "on the last CPU"
WAYS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "`thread_priority=10`": {"thread_priority": 10},
    "`thread_priority=19`": {"thread_priority": 19},
    f"`cpu_affinity` {LAST}": {},
    f"`cpu_affinity` {LAST}, `thread_priority=19`": {"thread_priority": 19},
}


def once(job: Record) -> Record:
    import torch

    from forebay.torch import DataLoader, TokenDataset

    cpus = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(len(cpus))
    weights = torch.randn(1024, 1024)
    settings = {**WAYS[job["way"]], **({"cpu_affinity": cpus[-1:]} if LAST in job["way"] else {})}
    loader = DataLoader(
        TokenDataset(job["path"], seq_len=SEQ_LEN), batch_size=BATCH_SIZE, shuffle=True, seed=3, epochs="endless",
        num_threads=len(cpus), memory_budget=BUDGET, **settings,
    )  # fmt: skip
    batches = iter(loader)
    cached = itertools.repeat(next(batches))
    steps, waits, ratios = [], [], []
    for _ in range(PAIRS):
        took: dict[bool, list[float]] = {True: [], False: []}
        for is_loader, source in ((True, batches), (False, cached)):
            # By now the loader has done all its work ahead.
            time.sleep(0.3)
            end = time.perf_counter() + TURN_S
            while (began := time.perf_counter()) < end:
                batch = next(source)
                waited = time.perf_counter()
                torch.tanh(weights @ weights * 0.01)
                took[is_loader].append(time.perf_counter() - waited)
                if is_loader:
                    waits.append(waited - began)
        del batch
        steps.append(median(took[False]))
        ratios.append(median(took[True]) / steps[-1])
    loader._native.close()
    return {"ratio": median(ratios), "step_ms": median(steps) * 1e3, "wait_ms": sum(waits) / len(waits) * 1e3}


def measure(folder: Path, seed: int, tell: Tell) -> list[Record]:
    path = small_corpus(folder) / f"parquet-zstd{COPIES}"
    jobs = [{"kind": "placement", "path": str(path), "way": way} for way in WAYS]
    return in_turn(jobs, REPEATS, seed, tell, lambda job: child("placement", job))


def section(records: list[Record]) -> list[str]:
    rows = []
    for way in WAYS:
        runs = [run for run in records if run["way"] == way and "failed" not in run]
        if runs:
            ratio, wait = ([run[field] for run in runs] for field in ("ratio", "wait_ms"))
            rows.append([way, spread(ratio), spread(wait), number(median(run["step_ms"] for run in runs))])
    return [
        "A step of matrix products runs one thread on each CPU. One worker for each CPU runs beside it, and decodes"
        f" Parquet (zstd) for batches of {BATCH_SIZE} x {SEQ_LEN}. The table shows the time of the step,"
        " divided by its time beside idle workers, and the time that it waited for a batch. Numbers are"
        " medians over the runs, and their range.", "",
        *failures(records, "way"),
        *table(["workers", "step, over one beside idle workers", "waited for a batch, ms", "step beside idle ones, ms"],
               rows),
    ]  # fmt: skip
