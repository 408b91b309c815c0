"""Reads random windows of files that are not in memory: `make bench ARGS=--cold`.

`forebay-cold` takes the file out of the page cache before each run and proves that it is out. It
then reads random windows of it in five ways: through forebay, by page faults of a mapping, by
read-ahead in the known order, by `pread` on many threads, and through io_uring.
"""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import corpus
from targets import Record, Tell, Verdict, built, failures, in_turn, number, read_once, run, spread, table, verdicts

LEAD = "Cold page cache, random windows"
#: 3 GiB, which is much more than the read-ahead around the page faults of a run can load.
TOKENS = 1536 << 20
REPEATS = 5
SECONDS = 1.0
#: Number of windows to read, by their tokens. Tokens have 2 bytes, so the windows have 4 and 16 kB.
WINDOWS = {2048: 8192, 8192: 4096}
METHODS = (
    ("forebay", 1), ("forebay", 2), ("mmap", 0), ("random", 0), ("willneed", 64), ("willneed", 256),
    ("pread", 1), ("pread", 4), ("pread", 16), ("pread", 64), ("uring", 64), ("uring", 256),
)  # fmt: skip
LABELS = {
    "forebay": "**forebay**, {0} threads", "mmap": "default faults of a mapping", "random": "faults, `MADV_RANDOM`",
    "willneed": "`MADV_WILLNEED`, {0} windows ahead", "pread": "`pread`, {0} threads", "uring": "io_uring, depth {0}",
}  # fmt: skip


def prepare(folder: Path) -> Path:
    """Returns an Arrow file of one record batch. The first call writes it."""
    target = corpus.written_once(folder / "cold-corpus", {"version": 1, "tokens": TOKENS}, write)
    return target / "00000.arrow"


def write(partial: Path) -> None:
    import pyarrow as pa

    length = 1 << 16
    ids = np.tile(np.random.default_rng(8).integers(0, 50_000, TOKENS // 8, dtype=np.uint16), 8)
    documents = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids), length)})
    with pa.OSFile(str(partial / "00000.arrow"), "wb") as sink, pa.ipc.new_file(sink, documents.schema) as writer:
        writer.write_table(documents)


def measure(folder: Path, seed: int, tell: Tell) -> list[Record]:
    program, path = str(built("forebay-cold")), prepare(folder)
    # A layer below this machine may keep the file in memory as well. This read makes it do so
    # before the first run.
    read_once(path)
    jobs = [
        {"kind": "cold", "method": method, "depth": depth, "seq_len": seq_len}
        for seq_len in WINDOWS
        for method, depth in METHODS
    ]

    def start(job: Record) -> Record:
        # All methods read the same windows, so that a round asks the disk for the same data.
        sizes = [job["seq_len"], WINDOWS[job["seq_len"]], SECONDS, seed % 1000]
        return run([program, path, job["method"], job["depth"], *sizes])

    return in_turn(jobs, REPEATS, seed, tell, start)


def section(records: list[Record]) -> list[str]:
    rows, lines = [], []
    for seq_len in WINDOWS:
        runs: dict[tuple[str, int], list[Record]] = {}
        for record in records:
            if record["seq_len"] == seq_len and "failed" not in record:
                runs.setdefault((record["method"], record["depth"]), []).append(record)

        def speed(key: tuple[str, int], runs: Any = runs) -> float:
            return median(run["tokens_per_s"] for run in runs[key])

        others = [key for key in runs if key[0] != "forebay"]
        ours = [key for key in runs if key[0] == "forebay"]
        size = f"{seq_len * 2 // 1024} kB"
        for key in [key for key in METHODS if key in runs]:
            some = runs[key]
            lines.append([
                size, LABELS[key[0]].format(key[1]).replace("1 threads", "1 thread"),
                spread([run["tokens_per_s"] / 1e6 for run in some]),
                number(median(run["seconds"] / run["windows"] for run in some) * 1e6),
                number(median(run["cpu_s_per_gtok"] for run in some)),
                number(median(run["resident_after"] for run in some) * 100),
            ])  # fmt: skip
        if not ours or not others:
            continue
        mine, best = max(ours, key=speed), max(others, key=speed)
        names = [LABELS[key[0]].format(key[1]) for key in (mine, best)]
        ratio = speed(mine) / speed(best)
        rows.append(Verdict(f"{size}: {names[0]}, over the best ({names[1]})", "0.9", f"{ratio:.2f}", ratio >= 0.9))
        if ("mmap", 0) in runs:
            ratio = speed(mine) / speed(("mmap", 0))
            rows.append(Verdict(f"{size}: over default faults", "10", number(ratio), ratio >= 10))
    loaded = [run for run in records if "failed" not in run]
    worst = max((run["resident_before"] for run in loaded), default=0.0)
    file = loaded[0]["bytes"] / 2**30 if loaded else 0.0
    return [
        f"A file of {number(file)} GiB on a local disk was taken out of the page cache before each run. At most"
        f" {worst * 100:.2f} % of its pages were still there. A disk cache below this machine may have kept it. All"
        " methods read the same windows, widen them, and write inputs and labels, in one process without Python."
        " *In memory afterwards* is the share of the file that was loaded.", "",
        *failures(records, "method", "depth", "seq_len"), *verdicts(rows), "",
        *table(["windows", "", "Mtok/s (min to max)", "µs a window", "CPU s/Gtok", "in memory afterwards %"], lines),
    ]  # fmt: skip
