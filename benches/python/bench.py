"""Limits of this machine, forebay, and its peers, side by side: `make bench`, or `make bench ARGS=--quick`.

Every measurement is a fresh process, and they take turns in random order. Everything written is in `out/bench`:
`results.md` (also printed), `results.jsonl` with every run, `index.html` with plots, and the corpus. A quick run's
results are in `out/bench/quick`.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cold
import corpus
import latency
import measure
import memory
import report
import resume
import startup
import trainer
import workers
from contestants import SHAPES, contestants

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = ROOT / "out" / "bench"
PACKAGES = ("forebay", "torch", "torchdata", "numpy", "pyarrow")
LIMIT_S = 180


@dataclass(frozen=True)
class Plan:
    tokens: int
    #: Of the Parquet files, enough that no window reaches the end.
    copies: int
    repeats: int
    warm_up_s: float
    window_s: float
    limit_s: float
    minutes: float
    shapes: int


DEFAULT = Plan(tokens=100_000_000, copies=16, repeats=3, warm_up_s=1, window_s=3, limit_s=0.7, minutes=19, shapes=2)
QUICK = Plan(tokens=20_000_000, copies=32, repeats=1, warm_up_s=0.3, window_s=1, limit_s=0.3, minutes=1.8, shapes=1)


@dataclass(frozen=True)
class Job:
    """One process to start, and what its result is filed under."""

    labels: dict[str, Any]
    command: list[str]
    reads: Path
    #: A first guess, which the progress bar corrects.
    seconds: float


@dataclass
class Progress:
    """A bar with the remaining time on a terminal, a line per tenth elsewhere."""

    total_s: float
    began: float = field(default_factory=time.monotonic)
    done_s: float = 0.0
    told: int = -1

    def show(self, text: str) -> None:
        share = min(self.done_s / self.total_s, 1.0)
        elapsed = time.monotonic() - self.began
        # Guesses are trusted until a twentieth is done.
        pace = elapsed / self.done_s if share > 0.05 else 1.0
        left = max(self.total_s - self.done_s, 0) * pace
        line = f"{share:4.0%}  {left / 60:4.1f} min left  {text}"
        if sys.stderr.isatty():
            bar = "#" * int(share * 30)
            print(f"\r\x1b[K[{bar:30}] {line[:100]}", end="", file=sys.stderr, flush=True)
        elif int(share * 10) > self.told:
            self.told = int(share * 10)
            print(f"bench: {line}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.strip()


def binary(name: str, source: str) -> Path:
    """A program of `benches/src`, built if it is missing or older than its source."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or cache / "forebay" / "target")
    built = target / "release" / name
    written = ROOT / "benches" / "src" / source
    if not built.exists() or built.stat().st_mtime < written.stat().st_mtime:
        print(f"bench: building {name}", file=sys.stderr, flush=True)
        environment = {**os.environ, "CARGO_TARGET_DIR": str(target)}
        command = ["cargo", "build", "--release", "--quiet", "-p", "forebay-benches", "--bin", name]
        subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=True)
        os.utime(built)
    return built


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def header(kind: str, quick: bool, seed: int) -> dict[str, Any]:
    commit = output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = bool(output("git", "status", "--porcelain", "--untracked-files=no"))
    return {
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + (" with changes" if changed else ""),
        "command": "make bench" + (f" ARGS='{' '.join(sys.argv[1:])}'" if sys.argv[1:] else ""),
        "quick": quick,
        "seed": seed,
        "machine": machine(),
        "versions": versions(),
    }


def jobs(plan: Plan, quick: bool, data: Path) -> list[Job]:
    """What one repeat consists of."""
    found = []
    gather = str(binary("forebay-limits", "main.rs"))
    one_loader = [sys.executable, str(HERE / "measure.py")]
    chosen = [one for one in contestants() if one.quick or not quick]
    groups = {one.group for one in chosen}
    for number, shape in enumerate(SHAPES[: plan.shapes]):
        sizes = {"batch_size": shape.batch_size, "seq_len": shape.seq_len}
        for one in chosen:
            if number > 0 and not one.both_shapes:
                continue
            asked = {"contestant": one.name, "corpus": str(data), **sizes}
            asked |= {"warm_up_s": plan.warm_up_s, "window_s": plan.window_s}
            labels = {"kind": "loader", "name": one.name, "group": one.group, **sizes}
            seconds = 3.5 + plan.warm_up_s + plan.window_s
            found.append(Job(labels, [*one_loader, json.dumps(asked)], data / one.reads, seconds))
        for dtype in sorted(groups & set(corpus.DTYPES)):
            path = data / f"tokens-{dtype}.bin"
            for threads in (1, 2):
                arguments = [str(path), dtype, shape.seq_len, shape.batch_size, threads, plan.limit_s]
                labels = {"kind": "limit", "name": "gather", "group": dtype, "threads": threads, **sizes}
                # Three kernels, and copying.
                found.append(Job(labels, [gather, *map(str, arguments)], path, 0.5 + 4 * plan.limit_s))
    for codec in sorted(groups & set(corpus.CODECS)):
        for name in ("decompress", "decode"):
            for threads in (1, 2):
                asked = {"limit": name, "codec": codec, "threads": threads}
                asked |= {"corpus": str(data), "window_s": 2 * plan.limit_s}
                labels = {"kind": "limit", "name": name, "group": codec, "threads": threads}
                path = data / f"parquet-{codec}"
                found.append(Job(labels, [*one_loader, json.dumps(asked)], path, 1 + 2 * plan.limit_s))
    return found


def read_once(path: Path) -> None:
    """So that the page cache holds it."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb", buffering=0) as opened:
            while opened.read(8 << 20):
                pass


def run(job: Job) -> dict[str, Any]:
    """The result of a job, or `failed` and why."""
    read_once(job.reads)
    # Settings of the caller's shell would change what is measured.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    child = subprocess.Popen(
        job.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        told, complaints = child.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"did not end within {LIMIT_S} s"}
    finally:
        # Workers of a contestant that crashed must not disturb the next one.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode != 0:
        lines = complaints.strip().splitlines()
        return {"failed": lines[-1] if lines else f"ended with status {child.returncode}"}
    result = json.loads(told.strip().splitlines()[-1])
    if "kernels" in result:
        speed = result["tokens_per_second"]
        threads = job.labels["threads"]
        # Its threads do nothing but run.
        result = {
            "tokens_per_s": speed,
            "cores": float(threads),
            "cpu_s_per_gtok": threads / speed * 1e9,
            "copy_bytes_per_s": result["copy_bytes_per_second"],
            "kernel": max(result["kernels"], key=result["kernels"].get),
        }
    return result


def benchmark(quick: bool, out: Path, minutes: float | None) -> list[dict[str, Any]]:
    plan = QUICK if quick else DEFAULT
    if minutes is not None:
        plan = replace(plan, minutes=minutes)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rbench: writing the corpus, shard {done} of {total}", end=end, file=sys.stderr, flush=True)

    data = corpus.prepare(OUT, plan.tokens, plan.copies, tell)
    seed = random.SystemRandom().randrange(1 << 32)
    shuffler = random.Random(seed)
    turn = jobs(plan, quick, data)
    one_turn_s = sum(job.seconds for job in turn)
    progress = Progress(plan.repeats * one_turn_s)
    records = [{**header("benchmark", quick, seed), "plan": plan.__dict__}]
    lost: set[str] = set()
    measuring = time.monotonic()
    with (out / "results.jsonl").open("w") as file:

        def keep(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        keep(records[0])
        for repeat in range(plan.repeats):
            now = time.monotonic()
            if repeat > 0 and (now - started) + (now - measuring) / repeat > plan.minutes * 60:
                print(f"\nbench: stopped after {repeat} repeats, as the time is up", file=sys.stderr)
                break
            shuffler.shuffle(turn)
            for job in turn:
                key = json.dumps(job.labels)
                progress.show(f"{job.labels['group']}: {job.labels['name']}")
                if key not in lost:
                    result = run(job)
                    if "failed" in result:
                        lost.add(key)
                    records.append({**job.labels, "repeat": repeat, **result})
                    keep(records[-1])
                progress.done_s += job.seconds
    progress.finish()
    return records


def resuming(seed: int) -> list[dict[str, Any]]:
    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rbench: resuming, round {done} of {total}", end=end, file=sys.stderr, flush=True)

    return resume.measure(OUT, seed, resume.REPEATS, tell)


def at_scale(_seed: int) -> list[dict[str, Any]]:
    command = [str(binary("forebay-scale", "scale.rs"))]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in told.splitlines()]


#: What is measured of forebay alone, in under a minute each: one process at a time, all else as in the tables.
ALONE: dict[str, Callable[[int], list[dict[str, Any]]]] = {"resume": resuming, "scale": at_scale}

#: What is measured against a target of its own; all of them in 12 minutes.
TARGETS: dict[str, Any] = {
    "latency": latency, "trainer": trainer, "memory": memory, "startup": startup, "cold": cold,
}  # fmt: skip


def against_target(name: str) -> Callable[[int], list[dict[str, Any]]]:
    def measured(seed: int) -> list[dict[str, Any]]:
        def tell(done: int, total: int) -> None:
            if sys.stderr.isatty():
                end = "\n" if done == total else ""
                print(f"\rbench: {name}, {done} of {total}", end=end, file=sys.stderr, flush=True)

        return TARGETS[name].measure(OUT, seed, tell)

    return measured


def section(records: list[dict[str, Any]]) -> str:
    """The part of the results that a run of forebay alone gave."""
    kind = records[0]["kind"]
    if kind not in TARGETS:
        return report.section(records)
    lines = [f"## {TARGETS[kind].LEAD}", "", *report.circumstances(records[0]), ""]
    lines += [f"**failed**: {records[0]['failed']}"] if "failed" in records[0] else TARGETS[kind].section(records[1:])
    return "\n".join(lines) + "\n"


def alone(name: str) -> str:
    """Runs a part of its own; its section of the results."""
    OUT.mkdir(parents=True, exist_ok=True)
    seed = random.SystemRandom().randrange(1 << 32)
    taken, cpu, began = measure.machine_cpu_seconds(), cpu_seconds(), time.monotonic()
    try:
        found, failed = (ALONE.get(name) or against_target(name))(seed), {}
    except Exception as error:
        # Of several parts, the others are still wanted.
        if name not in TARGETS:
            raise
        traceback.print_exc()
        found, failed = [], {"failed": f"{type(error).__name__}: {error}"}
    elapsed = time.monotonic() - began
    others = (measure.machine_cpu_seconds() - taken - (cpu_seconds() - cpu)) / elapsed
    records = [{**header(name, False, seed), "other_cores": max(0.0, others), **failed}, *found]
    (OUT / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return section(records)


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    return sum(os.times()[:4])


def load(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        sys.exit(f"bench: {path.name} is not there yet: run `make bench` first")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes, one repeat: shows that it works")
    parser.add_argument(
        "--write-results", action="store_true", help="measure nothing: write benches/RESULTS.md from the last results"
    )
    parser.add_argument("--resume", action="store_true", help="only what resuming costs, wherever in the epoch")
    parser.add_argument("--scale", action="store_true", help="only the order, and 10^6 shards on 4096 ranks")
    parser.add_argument("--targets", action="store_true", help="only these, in turn, each against its target:")
    for name, module in TARGETS.items():
        parser.add_argument(f"--{name}", action="store_true", help=module.__doc__.partition(":")[0])
    parser.add_argument("--minutes", type=float, help="no further repeat that would pass this (default: 19)")
    options = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        sys.exit("bench: measures through /proc, which only Linux has")
    if options.write_results:
        results = ROOT / "benches" / "RESULTS.md"
        # What workers.py wrote below its mark stays.
        kept = results.read_text().partition(workers.MARK) if results.exists() else ("", "", "")
        parts = [report.markdown(load(OUT / "results.jsonl"))]
        parts += [section(load(path)) for name in [*TARGETS, *ALONE] if (path := OUT / f"{name}.jsonl").exists()]
        parts += ["".join(kept[1:])] if kept[1] else []
        results.write_text("\n".join(parts))
        print("bench: wrote benches/RESULTS.md", file=sys.stderr)
        return
    chosen = [name for name in [*TARGETS, *ALONE] if getattr(options, name) or (options.targets and name in TARGETS)]
    if chosen:
        for name in chosen:
            print(alone(name), flush=True)
        return
    out = OUT / "quick" if options.quick else OUT
    records = benchmark(options.quick, out, options.minutes)
    text = "\n".join([report.markdown(records), *([] if options.quick else map(alone, ALONE))])
    (out / "results.md").write_text(text)
    (out / "index.html").write_text(report.page(records))
    print(text)
    print(f"bench: results.md, results.jsonl and index.html are in {out.relative_to(ROOT)}", file=sys.stderr)
    if all("failed" in record for record in records[1:]):
        sys.exit("bench: every measurement failed")
    if any("failed" in record and record["name"].startswith("forebay") for record in records[1:]):
        sys.exit("bench: forebay failed")


if __name__ == "__main__":
    main()
