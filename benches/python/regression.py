"""Compares the instructions of the hot paths with `benches/baseline.json`.

Run it with `make bench-regression`, or with ARGS=--record to record new counts.

`forebay-steps` counts the instructions by stepping through them. So neither other work on the
machine nor a missing counter of the processor matters. A count fails if it exceeds the recorded
count by more than the margin. A much lower count asks for a new record. A record holds for
processors with the same vector instructions; other processors skip the comparison.
"""

import argparse
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from targets import ROOT, built, environment

BASELINE = ROOT / "benches" / "baseline.json"
#: On a busy machine, the same code gives the same Rust counts within 3 %, and Python counts within
#: 6 %.
MARGINS = {"rust": 0.08, "python": 0.15}
#: Number of runs of Python's paths. The least count is used.
REPEATS = 20
ENCODINGS: dict[str, dict[str, Any]] = {
    "plain": {"use_dictionary": False, "compression": "none"},
    "dictionary": {"compression": "none"},
    "delta": {"use_dictionary": False, "column_encoding": "DELTA_BINARY_PACKED", "compression": "none"},
    "byte-stream-split": {"use_dictionary": False, "column_encoding": "BYTE_STREAM_SPLIT", "compression": "none"},
    "plain-zstd": {"use_dictionary": False, "compression": "zstd"},
    "dictionary-snappy": {"compression": "snappy"},
}


def prepare(folder: Path) -> None:
    """Writes corpora that are small enough to be stepped through."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = (np.random.default_rng(1).zipf(1.3, 1 << 20) % 50_000).astype(np.uint16)
    for name, dtype in (("arrow-uint16", np.uint16), ("arrow-int32", np.int32)):
        (folder / name).mkdir()
        documents = pa.array(list(ids.astype(dtype).reshape(-1, 1 << 12)), pa.list_(pa.from_numpy_dtype(dtype)))
        table = pa.table({"input_ids": documents})
        with pa.OSFile(str(folder / name / "0.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "parquet").mkdir()
    few = pa.array(list(ids[: 1 << 12].astype(np.int32).reshape(-1, 512)), pa.list_(pa.int32()))
    for name, how in ENCODINGS.items():
        how = dict(how)
        if "column_encoding" in how:
            how["column_encoding"] = {"input_ids.list.element": how["column_encoding"]}
        pq.write_table(pa.table({"input_ids": few}), folder / "parquet" / f"{name}.parquet", **how)


def work(folder: str) -> None:
    """The Python work that is stepped through: `next()` on a batch that is ready."""
    import forebay
    from forebay.torch import DataLoader, TokenDataset

    names = []
    gc.disable()

    def marked(name: str, iterator: Any) -> None:
        for _ in range(REPEATS):
            time.sleep(0.005)
            signal.raise_signal(signal.SIGUSR1)
            batch = next(iterator)
            signal.raise_signal(signal.SIGUSR2)
            names.append(name)
            # The batch is released outside of the marks, because the caller decides when its memory
            # goes back.
            del batch

    path = f"{folder}/arrow-uint16"
    more: dict[str, Any] = {"shuffle": True, "seed": 1, "epochs": "endless", "num_threads": 1}
    marked("nothing in Python", iter([()] * REPEATS))
    marked("next(), NumPy arrays", iter(forebay.Loader(path, seq_len=512, batch_size=1, **more)))
    loader = DataLoader(TokenDataset(path, seq_len=512), batch_size=1, drop_last=True, **more)
    marked("next(), tensors", iter(loader))
    print("\n".join(names), flush=True)
    os._exit(0)


def stepped(program: Path, command: list[str]) -> dict[str, int]:
    """The least count of each name that the command printed, minus the count of an empty
    function.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".json") as counts:
        traced = [str(program), "trace", counts.name, *command]
        told = subprocess.run(
            traced, cwd=ROOT, env={**environment(), "PYTHONHASHSEED": "0"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if "cannot trace" in told.stderr:
            # Some containers forbid stepping.
            raise PermissionError(told.stderr.strip())
        if told.returncode != 0:
            raise RuntimeError(told.stderr.strip() or f"ended with status {told.returncode}")
        found: dict[str, int] = {}
        for name, count in zip(told.stdout.split("\n")[:-1], json.load(counts), strict=True):
            found[name] = min(count, found.get(name, count))
    nothing = found.pop(next(name for name in found if name.startswith("nothing")))
    return {name: count - nothing for name, count in found.items()}


def vectors() -> str:
    """The widest vector instructions that both the loader and this processor support."""
    flags = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    wide = {"avx512f", "avx512bw", "avx512vl"} <= flags
    return f"{platform.machine()} {'avx512' if wide else 'avx2' if 'avx2' in flags else 'baseline'}"


def counted() -> dict[str, dict[str, int]]:
    program = built("forebay-steps")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        return {
            "rust": stepped(program, [str(program), "work", folder]),
            "python": stepped(program, [sys.executable, str(Path(__file__)), "--work", folder]),
        }


def versions() -> dict[str, str]:
    rustc = subprocess.run(["rustc", "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    found = {name: version(name) for name in ("torch", "numpy", "pyarrow")}
    return {"rustc": " ".join(rustc.split()[1:2]), "python": platform.python_version(), **found}


def compare(baseline: dict[str, Any], found: dict[str, dict[str, int]]) -> tuple[int, int]:
    """Prints a line for each path. Returns how many passed and how many failed."""
    passed = failed = 0
    for side, counts in found.items():
        known = baseline["counts"].get(side, {})
        for name in sorted(counts.keys() | known.keys()):
            if name not in counts or name not in known:
                where = "the baseline" if name in counts else "this run"
                print(f"FAILED   {name}: is not in {where}; record anew with `make bench-regression ARGS=--record`")
                failed += 1
                continue
            ratio = counts[name] / known[name]
            bad = ratio > 1 + MARGINS[side]
            note = "; far fewer: record them" if ratio < 1 - MARGINS[side] else ""
            print(f"{'FAILED' if bad else 'ok':8} {name}: {counts[name]:,} instructions, {known[name]:,} recorded"
                  f" ({ratio - 1:+.1%}, at most {MARGINS[side]:+.0%}){note}")  # fmt: skip
            passed, failed = passed + (not bad), failed + bad
    return passed, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benches/baseline.json anew")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
    all_of_it: dict[str, Any] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    kind = vectors() if sys.platform.startswith("linux") else sys.platform
    if not options.record and kind not in all_of_it:
        print(f"regression: nothing is recorded for {kind}, only for {', '.join(all_of_it) or 'nothing'}: skipped")
        print("0 passed, 0 failed, 1 skipped")
        return
    try:
        found = counted()
    except PermissionError as error:
        print(f"regression: {error}: skipped")
        print("0 passed, 0 failed, 1 skipped")
        return
    if options.record:
        all_of_it[kind] = {"versions": versions(), "counts": found}
        BASELINE.write_text(json.dumps(all_of_it, indent=2) + "\n")
        print(f"regression: recorded {sum(map(len, found.values()))} counts for {kind}")
        return
    passed, failed = compare(all_of_it[kind], found)
    recorded, here = all_of_it[kind]["versions"], versions()
    if recorded != here:
        changed = [
            f"{name} {recorded.get(name)} is {here[name]} here" for name in here if recorded.get(name) != here[name]
        ]
        print(f"regression: recorded with other versions: {', '.join(changed)}")
    print(f"{passed} passed, {failed} failed, 0 skipped")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
