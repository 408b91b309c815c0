"""Measures starts and memory by the number of documents: `many_documents.py --documents 100000000`.

Writes uncompressed Arrow shards of short documents, and Parquet shards of long ones. A loader with
`layout="pack"` starts without an index, with saved lengths alone, and from the whole index. Each
start is a process of its own. The files are in the page cache. The corpora are removed at the end.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from targets import Record, anonymous_mb, child, number, table

PER_SHARD = 5_000_000
SEQ_LEN = 2048
WINDOWS = 40


def write_short(folder: Path, documents: int) -> None:
    """Writes documents of one to three uint16 tokens in uncompressed Arrow."""
    import pyarrow as pa

    for shard, first in enumerate(range(0, documents, PER_SHARD)):
        count = min(PER_SHARD, documents - first)
        random = np.random.default_rng([7, shard])
        offsets = np.zeros(count + 1, np.int32)
        np.cumsum(random.integers(1, 4, count), out=offsets[1:])
        ids = random.integers(0, 50_000, int(offsets[-1])).astype(np.uint16)
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
        rows = pa.table({"input_ids": lists})
        with pa.OSFile(str(folder / f"{shard:05d}.arrow"), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=1 << 17)


def write_long(folder: Path, documents: int, mean: int) -> None:
    """Writes four Parquet shards of documents of about `mean` tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(4):
        random = np.random.default_rng([8, shard])
        lengths = np.maximum(random.lognormal(np.log(mean) - 0.5, 1, documents // 4), 1).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = random.integers(0, 50_000, int(offsets[-1])).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
        pq.write_table(pa.table({"input_ids": lists}), folder / f"{shard}.parquet", compression="zstd")


def once(job: Record) -> Record:
    """Opens a loader, and takes batches. Gives times of the wall, and of all threads."""
    import forebay

    bare = anonymous_mb()
    began, cpu = time.perf_counter(), time.process_time()
    loader = forebay.Loader(
        job["path"], layout="pack", seq_len=job["seq_len"], shuffle=True, cache_dir=job["cache"], num_threads=1,
        batch_size=8, epochs="endless",
    )  # fmt: skip
    opened, cpu = time.perf_counter(), time.process_time() - cpu
    found: Record = {"open_ms": (opened - began) * 1e3, "cpu_s": cpu, "open_mb": anonymous_mb() - bare}
    if job["batches"]:
        batches = iter(loader)
        next(batches)
        found["first_ms"] = (time.perf_counter() - began) * 1e3
        for _ in range(job["batches"]):
            next(batches)
        found["run_mb"] = anonymous_mb() - bare
        found["windows_ms"] = windows(loader)
    loader.close()
    return found


def windows(loader: Any) -> list[float]:
    """Milliseconds that reading a row takes longer if its window has to be planned."""
    places = np.random.default_rng(3).choice(loader.num_sequences, min(WINDOWS, loader.num_sequences), replace=False)
    found = []
    for place in places.tolist():
        times = []
        for _ in range(2):
            began = time.perf_counter()
            loader.sequences_at(0, place, 1)
            times.append((time.perf_counter() - began) * 1e3)
        found.append(times[0] - times[1])
    return found


def starts(path: Path, documents: int, cache: Path) -> list[list[str]]:
    """Rows of the table: the first start, another row length, and a start from the index."""
    rows = []
    for name, seq_len, batches in (
        ("no index", SEQ_LEN, 0),
        ("lengths are saved, other rows", SEQ_LEN // 2, 0),
        ("from the index", SEQ_LEN, 200),
    ):
        job = {"path": str(path), "cache": str(cache), "seq_len": seq_len, "batches": batches}
        runs = [child("many_documents", job) for _ in range(3 if batches else 1)]
        if failed := [run["failed"] for run in runs if "failed" in run]:
            rows.append([name, failed[0], "", "", "", "", ""])
            continue
        middle = {key: median(run[key] for run in runs) for key in runs[0] if key != "windows_ms"}
        planned = [ms for run in runs for ms in run.get("windows_ms", [])]
        rows.append([
            name, number(middle["open_ms"]),
            f"{documents / middle['cpu_s'] / 1e6:.1f}" if not batches else "", number(middle["open_mb"]),
            number(middle["first_ms"]) if batches else "", number(middle["run_mb"]) if batches else "",
            f"{number(median(planned))} (at most {number(max(planned))})" if planned else "",
        ])  # fmt: skip
    return rows


HEADS = ["start", "open, ms", "M documents/s of CPU", "memory after opening, MB", "first batch, ms",
         "memory after 200 batches, MB", "plan a window, ms"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, action="append", help="short documents; may be given several times")
    parser.add_argument("--parquet", type=int, default=400_000, help="documents of the Parquet corpora")
    parser.add_argument("--folder", type=Path, help="parent of the corpora; default: a temporary folder")
    given = parser.parse_args()
    for documents in given.documents or [1_000_000, 10_000_000]:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            report(f"{documents:,} documents of 1 to 3 tokens, Arrow", Path(folder), documents,
                   lambda data, documents=documents: write_short(data, documents))  # fmt: skip
    for mean, documents in ((800, given.parquet // 4), (20, 10 * given.parquet)) if given.parquet else ():
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            report(f"{documents:,} documents of about {mean} tokens, Parquet", Path(folder), documents,
                   lambda data, documents=documents, mean=mean: write_long(data, documents, mean))  # fmt: skip


def report(title: str, folder: Path, documents: int, write: Any) -> None:
    data = folder / "data"
    data.mkdir()
    write(data)
    size = sum(file.stat().st_size for file in data.iterdir())
    rows = starts(data, documents, folder / "cache")
    saved = sum(file.stat().st_size for file in (folder / "cache").iterdir())
    print(f"\n{title}, {size / 1e6:,.0f} MB, index {saved / 1e6:,.1f} MB\n")
    print("\n".join(table(HEADS, rows)), flush=True)
    shutil.rmtree(data)


if __name__ == "__main__":
    main()
