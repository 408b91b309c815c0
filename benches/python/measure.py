"""Takes one measurement in this process and prints one JSON line. It measures a contestant, or a
limit that Python can measure.

    measure.py '{"contestant": NAME, "corpus": FOLDER, "batch_size": 8, "seq_len": 2048,
                 "warm_up_s": 1, "window_s": 3}'
    measure.py '{"write": NAME, "corpus": FOLDER, "batch_size": 8, "seq_len": 2048}'
    measure.py '{"limit": "decode" | "decompress", "codec": "zstd", "threads": 1, "corpus": FOLDER,
                 "window_s": 1}'

The second form writes the files that NAME reads. A contestant's first batches are checked against
the corpus before the contestant is timed. A contestant that fails this check ends with an error.
"""

import copy
import gc
import importlib
import itertools
import json
import os
import pickle
import platform
import shutil
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from chains import Chains, four
from contestants import Contestant, RowGroups, contestants
from processes import descendants
from rows import Batch, Shape, map_rows

CHECKED_BATCHES = 48
#: Longest time to iterate to a peer's state. States further into the epoch are not taken.
REACHED_S = 15
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """CPU seconds of this process and its descendants. Those of descendants come in ticks of the
    kernel, usually 10 ms.
    """
    total = time.process_time()
    for pid in descendants()[1:]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return total


def machine_cpu_seconds() -> float:
    """CPU seconds that all processes of the machine, and other guests of its host, took from its
    cores.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def memory_mb() -> float:
    """Anonymous and shared memory of this process and its descendants. Each page counts once;
    mapped files do not count.
    """
    total = 0
    for pid in descendants():
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("Pss_Anon", "Pss_Shmem"):
                total += int(value.split()[0])
    return total / 1024


def version_of(contestant: Contestant) -> str:
    package = "forebay" if contestant.ours else contestant.package
    return f"{package} {version(package)}"


def endless(loader: Any) -> Iterator[Batch]:
    while True:
        yield from loader


class Checker:
    """Finds each delivered row in the corpus."""

    def __init__(self, corpus: Path, contestant: Contestant, shape: Shape) -> None:
        rows = map_rows(corpus / "tokens-uint16.bin", shape)
        self.flat, self.shape, self.contestant = rows.reshape(-1), shape, contestant
        if contestant.joins:
            self.chains = Chains(corpus, self.flat)
            starts = np.zeros(0, np.int64)
        elif contestant.starts is None:
            starts = np.arange(len(rows)) * shape.seq_len
        else:
            starts = contestant.starts(contestant.path(corpus, shape), shape)
            starts = starts[starts + shape.seq_len <= len(self.flat)]
        keys = four(self.flat[starts[:, None] + np.arange(4)])
        order = np.argsort(keys)
        self.keys, self.starts = keys[order], starts[order]
        self.found: list[int] = []
        self.copies = 1
        if contestant.reads_long:
            counts = [len(list((corpus / name).iterdir())) for name in (contestant.reads_long, contestant.reads)]
            self.copies = counts[0] // counts[1]

    def check(self, batch: Batch) -> None:
        if set(batch) != {"input_ids", "labels"}:
            raise AssertionError(f"a batch has the fields {sorted(batch)}")
        if self.contestant.tensors:
            import torch

            kinds = {type(field) for field in batch.values()}
            if kinds != {torch.Tensor}:
                raise AssertionError(f"a batch has fields of the types {kinds}")
        inputs, labels = (np.asarray(batch[name]) for name in ("input_ids", "labels"))
        expected = (self.shape.batch_size, self.shape.seq_len)
        for field in (inputs, labels):
            if field.shape != expected or field.dtype != np.int64:
                raise AssertionError(f"expected int64 {expected}, found {field.dtype} {field.shape}")
        if np.shares_memory(inputs, labels):
            raise AssertionError("labels share memory with input_ids")
        if self.contestant.joins:
            if not np.array_equal(inputs[:, 1:], labels[:, :-1]):
                raise AssertionError("labels are not the following input_ids")
            self.found += [self.chains.find(row) for row in np.concatenate((inputs, labels[:, -1:]), axis=1)]
            return
        if not np.array_equal(inputs, labels):
            raise AssertionError("labels differ from input_ids")
        for row, key in zip(inputs, four(inputs[:, :4]), strict=True):
            first, last = (np.searchsorted(self.keys, key, side) for side in ("left", "right"))
            for start in self.starts[first:last]:
                if np.array_equal(row, self.flat[start : start + self.shape.seq_len]):
                    self.found.append(int(start))
                    break
            else:
                raise AssertionError(f"a row beginning with {row[:8].tolist()} is none of the corpus")

    def finish(self) -> dict[str, float]:
        most = max(Counter(self.found).values())
        if most > self.copies:
            raise AssertionError(f"of the first {len(self.found)} rows, one was delivered {most} times")
        neighbours = float(np.mean(np.diff(self.found) == self.shape.seq_len))
        if neighbours > self.contestant.neighbours:
            raise AssertionError(f"{neighbours:.0%} of the rows follow their neighbour of the corpus: not shuffled")
        return {"checked_rows": len(self.found), "neighbours": neighbours}


def resume_ms(contestant: Contestant, path: Path, shape: Shape, share: float, state: dict[str, Any]) -> float:
    """Milliseconds from no loader to the first batch after `share` of the epoch."""
    began = time.perf_counter()
    loader = contestant.make(path, shape, contestant.helpers)
    # A state is one position in the epoch, in sequences. Iterating to that position would take the
    # epoch's time.
    loader.load_state_dict({**state, "position": int(len(loader) * share) * shape.batch_size})
    next(iter(loader))
    took = time.perf_counter() - began
    loader.close()
    return took * 1e3


def resume_peer(contestant: Contestant, path: Path, shape: Shape, steps: dict[int, int]) -> dict[str, Any]:
    """Measures the same for a peer, whose state is taken after each of `steps`. Also tells whether
    the peer continued exactly.
    """
    result: dict[str, Any] = {}
    exact = True
    for percent, step in steps.items():
        loader = contestant.make(path, shape, contestant.helpers)
        batches = iter(loader)
        for _ in range(step):
            next(batches)
        state = copy.deepcopy(loader.state_dict())
        wanted = next(batches)
        del batches, loader
        gc.collect()
        began = time.perf_counter()
        loader = contestant.make(path, shape, contestant.helpers)
        loader.load_state_dict(state)
        found = next(iter(loader), None)
        if found is None:
            result["resume_failed"] = f"at {percent} % its epoch was over"
            break
        result[f"resume_{percent}_ms"] = (time.perf_counter() - began) * 1e3
        exact = exact and all(np.array_equal(found[name], wanted[name]) for name in wanted)
        result["resume_state_bytes"] = len(pickle.dumps(state))
        del loader
        gc.collect()
    return {**result, "resume_exact": exact}


def timed(batches: Iterator[Batch], seconds: float) -> array:
    """The duration of each `next()` within `seconds`. It includes the release of the batch
    before.
    """
    waits, clock = array("d"), time.perf_counter
    now = clock()
    end = now + seconds
    batch = None
    while now < end:
        batch = next(batches)
        after = clock()
        waits.append(after - now)
        now = after
    del batch
    return waits


def measure(job: dict[str, Any]) -> dict[str, Any]:
    contestant = next(one for one in contestants() if one.name == job["contestant"])
    shape, corpus = Shape(job["batch_size"], job["seq_len"]), Path(job["corpus"])
    path = contestant.path(corpus, shape)
    for module in contestant.imports:
        importlib.import_module(module)
    bare_mb = memory_mb()

    began = time.perf_counter()
    loader = contestant.make(path, shape, contestant.helpers)
    batches = endless(loader)
    batch = next(batches)
    first_batch_ms = (time.perf_counter() - began) * 1e3
    if contestant.reads_long:
        batches.close()  # type: ignore[attr-defined]
        loader.close()
        loader = contestant.make(corpus / contestant.reads_long, shape, contestant.helpers)
        batches = endless(loader)
        batch = next(batches)

    checker = Checker(corpus, contestant, shape)
    for _ in range(CHECKED_BATCHES - 1):
        # A batch is checked when the next one is ready, so that a reused buffer would show.
        following = next(batches)
        checker.check(batch)
        batch = following
    checked = checker.finish()
    del checker, batch, following

    timed(batches, job["warm_up_s"])
    decoded = loader.stats()["decoded_bytes"] if contestant.ours else 0
    others, cpu, began = machine_cpu_seconds(), cpu_seconds(), time.perf_counter()
    waits = timed(batches, job["window_s"])
    elapsed, cpu, others = time.perf_counter() - began, cpu_seconds() - cpu, machine_cpu_seconds() - others
    held = next(batches)
    used_mb = memory_mb()
    del held
    tokens = len(waits) * shape.batch_size * shape.seq_len
    percentiles = np.percentile(waits, [50, 99, 99.9]) * 1e6
    result = {
        "tokens_per_s": tokens / elapsed,
        "cpu_s_per_gtok": cpu / tokens * 1e9,
        "cores": cpu / elapsed,
        "other_cores": max(0.0, (others - cpu) / elapsed),
        "memory_mb": used_mb,
        "own_memory_mb": used_mb - bare_mb,
        "processes": len(descendants()),
        "python": platform.python_version() + ("" if getattr(sys, "_is_gil_enabled", lambda: True)() else "t"),
        "version": version_of(contestant),
        "first_batch_ms": first_batch_ms,
        **dict(zip(("p50_us", "p99_us", "p999_us"), map(float, percentiles), strict=True)),
        "longest_us": max(waits) * 1e6,
        "batches": len(waits),
        **checked,
    }
    if contestant.ours:
        # The ids of this corpus fit into 16 bits, so decoded blocks hold 16 bits per token.
        result["decoded_per_token"] = (loader.stats()["decoded_bytes"] - decoded) / 2 / tokens
        batches.close()  # type: ignore[attr-defined]
        loader.close()
        with contestant.make(path, shape, contestant.helpers) as fresh:
            state = fresh.state_dict()
        for percent in (1, 99):
            result[f"resume_{percent}_ms"] = resume_ms(contestant, path, shape, percent / 100, state)
    elif contestant.resumes:
        epoch = int(corpus_tokens(corpus) // shape.seq_len // shape.batch_size)
        speed = result["tokens_per_s"] / shape.batch_size / shape.seq_len
        steps = {percent: epoch * percent // 100 for percent in (1, 99)}
        del batches, loader
        gc.collect()
        try:
            possible = {percent: step for percent, step in steps.items() if step / speed <= REACHED_S}
            result |= resume_peer(contestant, path, shape, possible)
        except Exception as error:
            result["resume_failed"] = f"{type(error).__name__}: {error}"[:200]
    return result


def corpus_tokens(corpus: Path) -> int:
    return (corpus / "tokens-uint16.bin").stat().st_size // 2


def write(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the files that a contestant reads. They are complete or absent."""
    contestant = next(one for one in contestants() if one.name == job["write"])
    shape, corpus = Shape(job["batch_size"], job["seq_len"]), Path(job["corpus"])
    target = contestant.path(corpus, shape)
    assert contestant.write is not None
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    began = time.perf_counter()
    contestant.write(corpus, partial, shape)
    partial.rename(target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {"write_s": time.perf_counter() - began, "bytes_per_token": size / corpus_tokens(corpus)}


def decoder(corpus: Path, codec: str) -> Callable[[int], int]:
    """Makes a function with which pyarrow decodes a row group into int32 values, which are not
    used.
    """
    groups = RowGroups(corpus / f"parquet-{codec}")
    return lambda step: len(groups.read(step % len(groups)))


def decompressor(corpus: Path, codec: str) -> Callable[[int], int]:
    """Makes a function that decompresses blocks of 512 Ki tokens of 16 bits. They resemble the
    dictionary's indices in a page.
    """
    import pyarrow as pa

    block = 512 << 10
    tokens = np.memmap(corpus / "tokens-uint16.bin", np.uint16, "r")
    blocks = [
        pa.Codec(codec).compress(np.asarray(tokens[at : at + block]), asbytes=True)
        for at in range(0, 16 * block, block)
    ]
    return lambda step: pa.Codec(codec).decompress(blocks[step % len(blocks)], 2 * block).size // 2


def limit(job: dict[str, Any]) -> dict[str, Any]:
    work = {"decode": decoder, "decompress": decompressor}[job["limit"]](Path(job["corpus"]), job["codec"])
    work(0)
    ready, tokens = threading.Barrier(job["threads"]), [0.0] * job["threads"]

    def loop(thread: int) -> None:
        ready.wait()
        began = time.perf_counter()
        done = 0
        for step in itertools.count(thread * 7):
            done += work(step)
            elapsed = time.perf_counter() - began
            if elapsed >= job["window_s"]:
                break
        tokens[thread] = done / elapsed

    cpu, began = time.process_time(), time.perf_counter()
    threads = [threading.Thread(target=loop, args=(number,)) for number in range(job["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cores = (time.process_time() - cpu) / (time.perf_counter() - began)
    speed = sum(tokens)
    return {"tokens_per_s": speed, "cores": cores, "cpu_s_per_gtok": cores / speed * 1e9}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps((limit if "limit" in asked else write if "write" in asked else measure)(asked)))
