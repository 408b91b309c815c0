"""Measures the cost of resuming at several places of the epoch: `make bench ARGS=--resume`.

The corpus has more than 10^5 blocks, in Arrow (small record batches) and in Parquet (small pages
and row groups). Every measurement opens the corpus anew, seeks to 1 %, 50 % or 99 % of a shuffled
epoch, and asks for the first batch. Places and formats take turns in random order, many times.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import corpus

SHARDS = 16
#: The size of a shard in blocks, and of a block. `block_tokens` is as small, so that each becomes a
#: block of its own.
BLOCKS, BLOCK_TOKENS, DOCUMENTS_PER_BLOCK = 8192, 128, 2
SETTINGS: dict[str, Any] = {
    "seq_len": 512, "batch_size": 8, "shuffle": True, "seed": 7, "block_tokens": BLOCK_TOKENS,
    "chunk_tokens": 65_536, "window_tokens": 262_144, "num_threads": 1, "memory_budget": 16 << 20,
}  # fmt: skip
SHARES = (0.01, 0.5, 0.99)
FORMATS = ("arrow", "parquet")
REPEATS = 15


def prepare(folder: Path) -> Path:
    """Returns the folder of the corpus, and writes it at the first call."""
    target = folder / "resume-corpus"
    description = {"version": 1, "shards": SHARDS, "blocks": BLOCKS, "block_tokens": BLOCK_TOKENS}
    return corpus.written_once(target, description, write)


def write(partial: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in FORMATS:
        (partial / name).mkdir(parents=True)
    length = BLOCK_TOKENS // DOCUMENTS_PER_BLOCK
    offsets = pa.array(np.arange(0, BLOCKS * BLOCK_TOKENS + 1, length, dtype=np.int32))
    for number in range(SHARDS):
        ids = np.random.default_rng([3, number]).integers(0, 50_000, BLOCKS * BLOCK_TOKENS, dtype=np.int32)
        table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids))})
        with (
            pa.OSFile(str(partial / "arrow" / f"{number:05d}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=DOCUMENTS_PER_BLOCK)
        # A page ends after `write_batch_size` values once it holds `data_page_size` bytes.
        pq.write_table(
            table, partial / "parquet" / f"{number:05d}.parquet", compression="zstd", use_dictionary=False,
            row_group_size=64 * DOCUMENTS_PER_BLOCK, write_batch_size=BLOCK_TOKENS, data_page_size=BLOCK_TOKENS * 4,
        )  # fmt: skip


def blocks(path: Path) -> int:
    """Number of blocks that forebay makes of the corpus."""
    sets = [f"--set={name}={str(value).lower()}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "forebay", "plan", str(path), "--json", *sets]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return json.loads(told.stdout)["sources"][0]["blocks"]


def once(path: Path, share: float) -> dict[str, float]:
    """Times of a process that resumes: the opening, and the time from `load_state_dict` to the
    first batch.
    """
    from forebay import Loader

    began = time.perf_counter()
    loader = Loader(str(path), **SETTINGS)
    opened = time.perf_counter()
    state = loader.state_dict()
    step = int(len(loader) * share)
    state["position"] = step * SETTINGS["batch_size"]
    resuming = time.perf_counter()
    loader.load_state_dict(state)
    batch = next(iter(loader))
    resumed = time.perf_counter()
    wanted = loader.batch_at(step)
    if not all(np.array_equal(batch[name], wanted[name]) for name in wanted):
        raise AssertionError(f"{path.name} resumed at {share:.0%} with another batch than stands there")
    loader.close()
    return {"open_ms": (opened - began) * 1e3, "resume_ms": (resumed - resuming) * 1e3}


def measure(folder: Path, seed: int, repeats: int, tell: Callable[[int, int], None]) -> list[dict[str, Any]]:
    corpus = prepare(folder)
    counted = {name: blocks(corpus / name) for name in FORMATS}
    jobs = [(name, share) for name in FORMATS for share in SHARES]
    records: list[dict[str, Any]] = []
    shuffler = random.Random(seed)
    # The first round may find files that are not in memory yet, so it does not count.
    for repeat in range(-1, repeats):
        tell(repeat + 1, repeats + 1)
        shuffler.shuffle(jobs)
        for name, share in jobs:
            times = once(corpus / name, share)
            if repeat >= 0:
                records.append({
                    "kind": "resume", "name": name, "blocks": counted[name], "share": share, "repeat": repeat, **times,
                })  # fmt: skip
    return records
