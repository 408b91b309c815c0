"""Measures the time to the first batch: `make bench ARGS=--startup`.

- A thousand Arrow shards without an index, against a program that opens them and reads their
  footers.
- The same shards with the saved index.
- Parquet, against the decoding of one block.

Files are in the page cache. Each run is a fresh process, and time begins after the imports.
"""

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import corpus
from targets import (
    Record,
    Tell,
    Verdict,
    built,
    child,
    failures,
    in_turn,
    number,
    read_once,
    run,
    small_corpus,
    spread,
    verdicts,
)

LEAD = "Time to the first batch"
SHARDS, BATCHES, DOCUMENTS, LENGTH = 1000, 6, 16, 512
REPEATS = 9


def shards(folder: Path) -> Path:
    """Returns a folder of many small Arrow files, and writes it at the first call."""
    target = folder / "startup-corpus"
    description = {"version": 1, "shape": [SHARDS, BATCHES, DOCUMENTS, LENGTH]}
    return corpus.written_once(target, description, write)


def write(partial: Path) -> None:
    import pyarrow as pa

    (partial / "arrow").mkdir(parents=True)
    rows = BATCHES * DOCUMENTS
    offsets = pa.array(np.arange(0, rows * LENGTH + 1, LENGTH, dtype=np.int32))
    for number_of in range(SHARDS):
        ids = np.random.default_rng([5, number_of]).integers(0, 50_000, rows * LENGTH).astype(np.uint16)
        table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids))})
        path = partial / "arrow" / f"{number_of:05d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=DOCUMENTS)


def once(job: Record) -> Record:
    """Milliseconds from before the constructor to the first batch."""
    import forebay

    settings: dict[str, Any] = dict(job.get("settings", {}))
    began = time.perf_counter()
    loader = forebay.Loader(job["path"], shuffle=True, seed=job["seed"], **settings)
    opened = time.perf_counter()
    batch = next(iter(loader))
    ended = time.perf_counter()
    # The workers keep running, so the count may include a few more blocks than the first batch
    # needed.
    blocks = loader.stats()["decoded_blocks"]
    assert batch["input_ids"].shape[0] == settings["batch_size"]
    loader.close()
    return {"ms": (ended - began) * 1e3, "open_ms": (opened - began) * 1e3, "blocks": blocks}


def start(job: Record) -> Record:
    if job["what"] in ("footers", "block"):
        return run([job["program"], job["what"], job["path"]])
    return child("startup", {**job, "seed": random.randrange(1 << 30)})


def measure(folder: Path, seed: int, tell: Tell) -> list[Record]:
    program = str(built("forebay-floors"))
    many, parquet = shards(folder) / "arrow", small_corpus(folder) / "parquet-zstd"
    read_once(many)
    base = {"kind": "startup"}
    with tempfile.TemporaryDirectory(dir=folder) as index:
        arrow = {"seq_len": 512, "batch_size": 8}
        indexed = {**arrow, "cache_dir": index, "num_threads": 1}
        # This run writes the index.
        first = start({"what": "index", "path": str(many), "settings": indexed})
        if "failed" in first:
            return [{**base, "what": "index", **first}]
        jobs: list[Record] = [
            {**base, "what": "footers", "program": program, "path": str(many)},
            {**base, "what": "block", "program": program, "path": str(sorted(parquet.glob("*.parquet"))[3])},
            {**base, "what": "index", "path": str(many), "settings": indexed},
        ]
        for threads in (1, 2):
            settings = {**arrow, "num_threads": threads}
            jobs.append({**base, "what": "no index", "threads": threads, "path": str(many), "settings": settings})
        for rows in (1, 8):
            settings = {"seq_len": 2048, "batch_size": rows, "num_threads": 1, "prefetch_batches": 1}
            jobs.append({**base, "what": "parquet", "rows": rows, "path": str(parquet), "settings": settings})
        return in_turn(jobs, REPEATS, seed, tell, start)


def section(records: list[Record]) -> list[str]:
    def of(what: str, field: str = "ms", **only: Any) -> list[float]:
        return [
            run[field]
            for run in records
            if run["what"] == what and "failed" not in run and all(run[name] == value for name, value in only.items())
        ]

    rows = []
    floor, block = of("footers"), of("block", "first_ms")
    for threads in (1, 2):
        found = of("no index", threads=threads)
        if found and floor:
            ratio = float(np.median(found) / np.median(floor))
            text = f"{number(ratio)} x: {spread(found)} against {spread(floor)} ms"
            what = f"{SHARDS} Arrow shards, no index, {threads} thread{'s' * (threads > 1)}"
            rows.append(Verdict(what, "3 x opening them and reading their footers", text, ratio <= 3))
    if indexed := of("index"):
        text = f"{spread(indexed)} ms, of which opening {spread(of('index', 'open_ms'))}"
        rows.append(Verdict(f"{SHARDS} Arrow shards, saved index", "20 ms", text, float(np.median(indexed)) <= 20))
    for count in (1, 8):
        whole, opening = of("parquet", rows=count), of("parquet", "open_ms", rows=count)
        if whole and block:
            after = [all_of_it - part for all_of_it, part in zip(whole, opening, strict=True)]
            ratio = float(np.median(after) / np.median(block))
            blocks = of("parquet", "blocks", rows=count)
            text = (
                f"{number(ratio)} x: {spread(after)} ms after opening ({spread(opening)}), {number(np.median(blocks))}"
                f" blocks decoded by then; one alone {spread(block)} ms"
            )
            what = f"Parquet, B={count}" + (", each row from another lane" if count > 1 else "")
            # A row may begin in one block and end in the next. The time also includes starting
            # threads and handing over.
            rows.append(Verdict(what, f"{2 * count} x decoding one block", text, ratio <= 2 * count))
    return [
        f"The time runs from before the constructor to the first batch, without the imports. Fresh processes take"
        f" turns, and the files are in the page cache. Numbers are medians and range of {REPEATS} runs. Shards have"
        f" {BATCHES} record batches. For Parquet, the first batch may take the blocks of its rows, at most two each,"
        " and no window.", "",
        *failures(records, "what"), *verdicts(rows),
    ]  # fmt: skip
