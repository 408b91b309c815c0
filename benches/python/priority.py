"""What workers take from a trainer that uses every CPU, by `thread_priority`.

A step of matrix products on all CPUs, and a batch before each; turns without a loader and with each priority alternate.
Prints the median step, the same over the turn without a loader, and what the trainer waited for batches:

    python benches/python/priority.py CORPUS [--turns 8] [--tokens 262144]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

import forebay

SEQ_LEN = 2048
PRIORITIES = (None, 0, 10, 19)


def turn(corpus: str, priority: int | None, tokens: int, seconds: float, weights: torch.Tensor) -> tuple[float, float]:
    """Median step and mean wait, in milliseconds; without a loader where there is no priority."""
    steps, waits = [], []
    loader = None
    if priority is not None:
        loader = forebay.Loader(
            corpus, seq_len=SEQ_LEN, batch_size=max(1, tokens // SEQ_LEN), shuffle="block", epochs="endless",
            num_threads=len(os.sched_getaffinity(0)), thread_priority=priority,
        )  # fmt: skip
    batches = iter(loader) if loader is not None else None
    try:
        if batches is not None:
            next(batches)
        ended = time.perf_counter() + seconds
        while (began := time.perf_counter()) < ended:
            if batches is not None:
                next(batches)
            waited = time.perf_counter()
            torch.tanh(weights @ weights * 0.01)
            steps.append(time.perf_counter() - began)
            waits.append(waited - began)
    finally:
        if loader is not None:
            loader.close()
    return statistics.median(steps) * 1e3, statistics.mean(waits) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=262_144, help="tokens of a batch")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = torch.randn(1024, 1024)
    found: dict[int | None, list[tuple[float, float]]] = {priority: [] for priority in PRIORITIES}
    for _ in range(options.turns):
        for priority in PRIORITIES:
            found[priority].append(turn(options.corpus, priority, options.tokens, options.seconds, weights))
    alone = [step for step, _ in found[None]]
    for priority, turns in found.items():
        step = statistics.median(step for step, _ in turns)
        ratio = statistics.median(step / other for (step, _), other in zip(turns, alone, strict=True))
        wait = statistics.median(wait for _, wait in turns)
        name = "no loader" if priority is None else f"thread_priority={priority}"
        print(f"{name:20} step {step:7.2f} ms, {ratio:5.3f} of the step alone; waited {wait:6.2f} ms of it")


if __name__ == "__main__":
    main()
