"""Measures how long a step waits for its batch: `make bench ARGS=--latency`.

- `ready`: B=1 S=512. One loop alternates `next()` on a batch that is ready with allocating its two
  tensors.
- `paced`: a consumer of 1 ms per step, busy or asleep, takes from the loader for half a second.
  Then it takes the same batch again and again for half a second, and so on. Epochs follow each
  other and windows are small, so that borders of both are frequent.
- `passes`: the first `next()` of every pass, where threads start anew. The pass before it was
  either whole, with 1 ms per step, or broken off.
"""

import itertools
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from targets import Record, Tell, Verdict, child, failures, in_turn, number, small_corpus, spread, verdicts

LEAD = "Latency of `next()`"
REPEATS = 2
STEP_S = 0.001
#: A step that took longer, and did not compute, waited for data.
STALL_S = 0.001
READY_S = 1.0
SEGMENT_S, SEGMENTS = 0.5, 8
FOLDERS = {"Arrow": "arrow-uint16", "Parquet, zstd": "parquet-zstd"}
AFTER = ("a whole one", "one broken off")
PERCENTILES = {"p50": (50, 20), "p99": (99, 100), "p99.9": (99.9, 200)}
#: Settings so small that an epoch has a dozen windows. The budget holds these windows but not the
#: corpus, so that each epoch is decoded.
ORDER: dict[str, Any] = {"window_tokens": 1 << 20, "chunk_tokens": 1 << 18, "memory_budget": 24 << 20}


def opened(path: str, seq_len: int, batch_size: int, threads: int, **more: Any) -> Any:
    from forebay.torch import DataLoader, TokenDataset

    return DataLoader(
        TokenDataset(path, seq_len=seq_len), batch_size=batch_size, shuffle=True, seed=3, drop_last=True,
        num_threads=threads, **more,
    )  # fmt: skip


def ready(job: Record) -> Record:
    """Nanoseconds of `next()` and of allocating. Each call releases the result of the call
    before.
    """
    import torch

    loader = opened(job["path"], 512, 1, job["threads"], epochs="endless")
    batches, clock = iter(loader), time.perf_counter_ns
    batch, pair = next(batches), None
    found: dict[str, list[int]] = {"next": [], "allocate": []}
    deep = clock() + int(READY_S * 1e9)
    while (now := clock()) < deep:
        # The pause is long enough to compute a batch of 512 tokens, so that all batches are ready
        # again.
        while clock() < now + 200_000:
            pass
        began = clock()
        batch = next(batches)
        ended = clock()
        pair = torch.empty((1, 512), dtype=torch.int64), torch.empty((1, 512), dtype=torch.int64)
        allocated = clock()
        found["next"].append(ended - began)
        found["allocate"].append(allocated - ended)
    del batch, pair
    loader._native.close()
    values = {name: np.percentile(some, [50, 99]) / 1e3 for name, some in found.items()}
    return {
        f"{name}_{at}_us": float(value[index]) for name, value in values.items() for index, at in enumerate((50, 99))
    }


def busy(until: float) -> None:
    while time.perf_counter() < until:
        pass


def asleep(until: float) -> None:
    time.sleep(max(0.0, until - time.perf_counter()))


def paced(job: Record) -> Record:
    """Seconds of each `next()` of the loader, and of each step of a loop over one batch."""
    loader = opened(job["path"], 2048, 8, job["threads"], epochs="endless", **ORDER)
    batches, clock = iter(loader), time.perf_counter
    cached = itertools.repeat(next(batches))
    compute = {"busy": busy, "asleep": asleep}[job["consumer"]]
    waits: dict[str, list[float]] = {"loader": [], "cached": []}
    for segment in range(2 * SEGMENTS):
        name = ("loader", "cached")[segment % 2]
        source, kept = (batches, cached)[segment % 2], waits[name]
        # The loader rests before the other's turn, and has its batches ready before its own turn.
        time.sleep(0.05)
        batch, end = None, clock() + SEGMENT_S
        while (began := clock()) < end:
            batch = next(source)
            ended = clock()
            kept.append(ended - began)
            compute(ended + STEP_S)
        del batch
    state = loader.state_dict()
    steps = loader.dataset._loader.num_sequences // 8
    loader._native.close()
    found: Record = {"epochs": state["epoch"] + state["position"] / 8 / steps, "steps": len(waits["loader"])}
    for name, some in waits.items():
        for label, (percentile, _) in PERCENTILES.items():
            found[f"{name}_{label}_us"] = float(np.percentile(some, percentile)) * 1e6
        found[f"{name}_most_us"] = max(some) * 1e6
        found[f"{name}_stalls"] = sum(wait > STALL_S for wait in some)
    return found


def passes(job: Record) -> Record:
    """Milliseconds of the first `next()` of every pass after the first one. Each pass is whole, or
    broken off after some steps.
    """
    loader = opened(job["path"], 2048, 8, job["threads"], **ORDER)
    firsts = []
    whole = job["after"] == "a whole one"
    for epoch in range(4 if whole else 16):
        loader.set_epoch(epoch)
        batches = iter(loader)
        began = time.perf_counter()
        batch = next(batches)
        firsts.append((time.perf_counter() - began) * 1e3)
        del batch
        for _ in batches if whole else itertools.islice(batches, 5):
            asleep(time.perf_counter() + STEP_S * whole)
        del batches
    loader._native.close()
    return {"first_ms": float(np.median(firsts[1:])), "first_most_ms": max(firsts[1:])}


def once(job: Record) -> Record:
    import torch

    torch.set_num_threads(1)
    parts: list[Record] = [{"what": "ready"}, *({"what": "passes", "after": after} for after in AFTER)]
    parts += [{"what": "paced", "consumer": consumer} for consumer in ("busy", "asleep")]
    random.shuffle(parts)
    how = {"ready": ready, "paced": paced, "passes": passes}
    return {"parts": [{**part, **how[part["what"]]({**job, **part})} for part in parts]}


def measure(folder: Path, seed: int, tell: Tell) -> list[Record]:
    data = small_corpus(folder)
    jobs = [
        {"kind": "latency", "name": name, "path": str(data / below), "threads": threads}
        for name, below in FOLDERS.items()
        for threads in (1, 2)
    ]
    return in_turn(jobs, REPEATS, seed, tell, lambda job: child("latency", job))


def section(records: list[Record]) -> list[str]:
    rows, borders = [], []
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        for part in record.get("parts", []):
            key = part["what"], record["name"], record["threads"], part.get("consumer", part.get("after"))
            groups.setdefault(key, []).append(part)
    for (what, name, threads, consumer), runs in sorted(groups.items(), key=lambda group: str(group[0])):
        who = f"{name}, {threads} thread{'s' * (threads > 1)}"

        def of(field: str, runs: list[Record] = runs) -> list[float]:
            return [run[field] for run in runs]

        if what == "ready":
            more = [run["next_50_us"] - run["allocate_50_us"] for run in runs]
            found = f"{spread(more)}: {spread(of('next_50_us'))} against {spread(of('allocate_50_us'))}"
            rows.insert(0, Verdict(f"ready, {who}", "+5 µs", found, float(np.median(more)) <= 5))
        elif what == "passes":
            found = f"{spread(of('first_ms'))}, at most {number(max(of('first_most_ms')))}"
            borders.append(
                Verdict(
                    f"first of a pass after {consumer}, {who}", "1 ms", found, float(np.median(of("first_ms"))) <= 1
                )
            )
        else:
            for label, (_, allowed) in PERCENTILES.items():
                more = [run[f"loader_{label}_us"] - run[f"cached_{label}_us"] for run in runs]
                found = (
                    f"+{spread(more)}: {spread(of(f'loader_{label}_us'))} against {spread(of(f'cached_{label}_us'))}"
                )
                rows.append(
                    Verdict(f"{consumer}, {who}, {label}", f"+{allowed} µs", found, float(np.median(more)) <= allowed)
                )
            stalls, other = sum(of("loader_stalls")), sum(of("cached_stalls"))
            found = (
                f"{stalls:.0f} in {sum(of('steps')):,.0f} steps over {number(sum(of('epochs')))} epochs, longest"
                f" {number(max(of('loader_most_us')) / 1e3)} ms; the cached batch {other:.0f}"
            )
            borders.append(Verdict(f"stalls, {consumer}, {who}", "no more than cached", found, stalls <= other))
    return [
        "Times of `next()` are in µs: medians over the runs, and their range.", "",
        "- **ready**: B=1 S=512 with its release, compared with allocating two tensors, in turns.",
        "- **busy**, **asleep**: B=8 S=2048 under a consumer of 1 ms per step, compared with the same loop over one"
        " cached batch. Both take turns of half a second, over epochs without end, with a dozen windows in each.",
        "- **stall**: a step that waits more than 1 ms.",
        "- **first of a pass**: the first batch after a `for` loop begins anew, in ms.", "",
        *failures(records, "name", "threads"), *verdicts(rows + borders),
    ]  # fmt: skip
