"""Compares memory with the stated budget: `make bench ARGS=--memory`.

The value is the anonymous memory of a process minus its memory after the imports. The largest value
counts, taken while batches are read until the cache of decoded blocks was full and turned over.
Runs with 1 and with 72 threads.
"""

import time
from pathlib import Path
from typing import Any

from targets import Record, Tell, Verdict, anonymous_mb, child, failures, in_turn, small_corpus, spread, verdicts

LEAD = "Memory"
ALLOWED_MB = 40
REPEATS = 2
#: The Parquet folders are copies, so that a corpus is larger than its budget.
FOLDERS = {"Arrow": "arrow-uint16", "Parquet, zstd": "parquet-zstd-copies", "Parquet, snappy": "parquet-snappy-copies"}
BUDGETS_MB = {"Arrow": (32,), "Parquet, zstd": (128, 512), "Parquet, snappy": (256,)}


def once(job: Record) -> Record:
    import torch

    import forebay.torch

    # torch allocates some memory of its own at its first tensor.
    held = [torch.zeros(8, 2048, dtype=torch.int64).numpy() for _ in range(2)]
    bare, most = anonymous_mb(), 0.0
    data = forebay.torch.TokenDataset(job["path"], seq_len=2048)
    loader = forebay.torch.DataLoader(
        data, batch_size=8, shuffle=True, seed=5, drop_last=True, num_threads=job["threads"],
        memory_budget=job["budget_mb"] << 20, epochs="endless",
    )  # fmt: skip
    began, decoded = time.perf_counter(), 0.0
    for step, _ in enumerate(loader):
        if step % 16 == 0:
            most = max(most, anonymous_mb())
            stats = loader.dataset._loader.stats()
            decoded = stats["decoded_bytes"] / 2**20
            elapsed = time.perf_counter() - began
            full = decoded >= 1.5 * job["budget_mb"] if decoded else elapsed > 1.5
            if full or elapsed > 12:
                break
    loader._native.close()
    del held
    return {"most_mb": most - bare, "imports_mb": bare, "decoded_mb": decoded, "cache_mb": stats["cache_bytes"] / 2**20,
            "steps": step}  # fmt: skip


def measure(folder: Path, seed: int, tell: Tell) -> list[Record]:
    data = small_corpus(folder)
    jobs: list[Record] = [
        {"kind": "memory", "name": name, "path": str(data / below), "threads": threads, "budget_mb": budget}
        for name, below in FOLDERS.items()
        for budget in BUDGETS_MB[name]
        # 73 blocks of some 2 MB do not fit into the smaller budget.
        for threads in ((1, 72) if budget == max(BUDGETS_MB[name]) else (1,))
    ]
    return in_turn(jobs, REPEATS, seed, tell, lambda job: child("memory", job))


def section(records: list[Record]) -> list[str]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for run in records:
        if "failed" not in run:
            groups.setdefault((run["name"], run["budget_mb"], run["threads"]), []).append(run)
    rows = []
    for (name, budget, threads), runs in sorted(groups.items()):
        most = max(run["most_mb"] for run in runs)
        held = spread([run["cache_mb"] for run in runs])
        found = f"{spread([run['most_mb'] for run in runs])} MiB, of which decoded blocks {held}"
        what = f"{name}, budget {budget} MiB, {threads} thread{'s' * (threads > 1)}"
        rows.append(Verdict(what, f"{budget + ALLOWED_MB} MiB", found, most <= budget + ALLOWED_MB))
    return [
        "The table shows the most anonymous memory while batches were taken, beyond the memory of the imports. The"
        " budget and 40 MB are allowed. Parquet was decoded until one and a half budgets had gone through the"
        " cache.", "",
        *failures(records, "name", "budget_mb", "threads"), *verdicts(rows),
    ]  # fmt: skip
