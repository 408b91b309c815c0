"""Measures how much the loader slows the trainer down: `make bench ARGS=--trainer`.

A small language model on the CPU takes some steps with batches of a loader. Then it takes as many
steps with one batch again and again, and so on, in one process. The order within each pair is drawn
at random. With a spare core, the model runs on core 0 alone and the loader's threads run anywhere.
Without one, the model has a thread on each core.
"""

import itertools
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from targets import Record, Tell, Verdict, bootstrap, child, failures, in_turn, number, small_corpus, verdicts

LEAD = "A training step beside the loader"
BATCH_SIZE, SEQ_LEN = 8, 2048
PAIRS, SECONDS = 40, 9.0
#: Steps of each turn, and steps at its start that do not count, because they see work that the turn
#: before left.
STEPS, IGNORED = 10, 3
REPEATS = 2
TARGETS = {"spare": 1.01, "none": 1.05}
#: The control has the cost that no loader can avoid: other ids in every step, which are in no
#: cache.
LIST = "64 batches in a list, no loader"
LOADERS = {
    LIST: "arrow-uint16",
    "forebay, Arrow": "arrow-uint16",
    "forebay, Parquet, zstd": "parquet-zstd",
    "torch, 2 workers": "tokens-uint16.bin",
}


def rows_of(path: str) -> Any:
    """Rows of a flat file for torch's DataLoader. Each row is widened twice, as in forebay."""
    import torch

    class Rows(torch.utils.data.Dataset):
        def __init__(self) -> None:
            flat = np.asarray(np.memmap(path, np.uint16, "r"))
            self.rows = flat[: len(flat) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> Any:
            row = self.rows[index]
            return {name: torch.from_numpy(row.astype(np.int64)) for name in ("input_ids", "labels")}

    return Rows()


def opened(job: Record) -> Any:
    import torch

    if job["name"].startswith("torch"):
        return torch.utils.data.DataLoader(
            rows_of(job["path"]), BATCH_SIZE, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
        )
    from forebay.torch import DataLoader, TokenDataset

    return DataLoader(
        TokenDataset(job["path"], seq_len=SEQ_LEN), batch_size=BATCH_SIZE, shuffle=True, seed=3, drop_last=True,
        num_threads=1 if job["cores"] == "spare" else None,
    )  # fmt: skip


def endless(loader: Any) -> Any:
    while True:
        yield from loader


def model() -> Any:
    """Runs forward and backward through embeddings and some square layers. It takes some 10 ms,
    most of it in matrix products.

    The table of embeddings is small. Rows of a large table would stay in the caches if the model
    sees one batch again and again. They would not stay with other ids, whichever loader brings
    them.
    """
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512) for _ in range(3)]
    network = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.GELU())))
    embedding = torch.nn.Embedding(256, 512)
    every = SEQ_LEN // 32

    def step(batch: Any) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            inputs = embedding(batch["input_ids"].view(-1, every)[:, :2] % 256).mean(1)
            wanted = batch["labels"].view(-1, every)[:, :1].to(torch.float32) / 50_257
        loss = ((network(inputs) - wanted) ** 2).mean()
        loss.backward()
        for parameter in network.parameters():
            parameter.grad = None
        return time.perf_counter() - began

    return step


def once(job: Record) -> Record:
    import torch

    cores = sorted(os.sched_getaffinity(0))
    own = cores[:1] if job["cores"] == "spare" else cores
    loader = opened(job)
    batches = endless(loader)
    if job["name"] == LIST:
        kept = [{name: ids.clone() for name, ids in batch.items()} for batch in itertools.islice(batches, 64)]
        loader._native.close()
        batches = itertools.cycle(kept)
    cached = next(batches)
    # Threads and workers began with all cores. Only the model's thread, and the threads that it
    # starts, are pinned.
    os.sched_setaffinity(0, own)
    torch.set_num_threads(len(own))
    step = model()
    for _ in range(20):
        step(cached)
    shuffler = random.Random(job["seed"])
    pairs, wholes = [], []
    end = time.perf_counter() + SECONDS
    while len(pairs) < PAIRS and time.perf_counter() < end:
        took = {}
        for name in shuffler.sample(("loader", "cached"), 2):
            for number_of in range(STEPS):
                if number_of == IGNORED:
                    began, inside = time.perf_counter(), 0.0
                batch = next(batches) if name == "loader" else cached
                spent = step(batch)
                inside = inside + spent if number_of >= IGNORED else 0.0
                del batch
            took[name] = time.perf_counter() - began, inside
        # The time of `next()` is part of a step. The model's share alone shows what the loader
        # takes from it.
        pairs.append(took["loader"][0] / took["cached"][0])
        wholes.append((took["cached"][0] / (STEPS - IGNORED), took["loader"][1] / took["cached"][1]))
    if job["name"].startswith("forebay"):
        loader._native.close()
    return {"ratios": pairs, "step_ms": float(np.median([each[0] for each in wholes])) * 1e3,
            "inside": float(np.median([each[1] for each in wholes]))}  # fmt: skip


def measure(folder: Path, seed: int, tell: Tell) -> list[Record]:
    data = small_corpus(folder)
    jobs = [
        {"kind": "trainer", "name": name, "path": str(data / below), "cores": cores, "seed": seed}
        for name, below in LOADERS.items()
        for cores in TARGETS
    ]
    return in_turn(jobs, REPEATS, seed, tell, lambda job: child("trainer", job))


def section(records: list[Record]) -> list[str]:
    rows = []
    for cores, target in TARGETS.items():
        for name in LOADERS:
            runs = [run for run in records if (run["name"], run["cores"]) == (name, cores) and "failed" not in run]
            if not runs:
                continue
            ratio, low, high = bootstrap([ratio for run in runs for ratio in run["ratios"]])
            step, inside = (float(np.median([run[field] for run in runs])) for field in ("step_ms", "inside"))
            found = f"{ratio:.4f} ({low:.4f} to {high:.4f}); without `next()` {inside:.4f}; steps of {number(step)} ms"
            what = {"spare": "model on one core, one spare", "none": "model on all cores"}[cores]
            peer = not name.startswith("forebay")
            rows.append(
                Verdict(
                    f"{what}: {name}", "beside" if peer else f"{target:.2f}", found, None if peer else ratio <= target
                )
            )
    return [
        f"Each number is the time of a step with the loader running, divided by the time of a step with one cached"
        f" batch. It is the median of pairs of turns of {STEPS - IGNORED} steps, with its 95 % interval (bootstrap)."
        f" B={BATCH_SIZE} S={SEQ_LEN}. The time includes `next()`.",
        "", *failures(records, "name", "cores"), *verdicts(rows),
    ]  # fmt: skip
