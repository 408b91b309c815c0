"""Compares limits of this machine, forebay, and its peers.

Run it with `make bench`, or with `make bench ARGS=--quick`.

Every measurement is a fresh process, and the processes take turns in random order. All output goes
to `out/bench`: `results.md` with tables, `results.jsonl` with every run, `index.html` with plots,
and the corpus. The results of a quick run go to `out/bench/quick`, and the results of all peers
(`make bench-all`) to `out/bench/all`. The present results are written after every turn, and when a
run is interrupted.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
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
import decode
import environments
import latency
import layouts
import measure
import memory
import page
import picture
import placement
import report
import resume
import service
import startup
import trainer
import workers
from contestants import SHAPES, Contestant, contestants
from rows import Shape
from targets import built

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = ROOT / "out" / "bench"
PACKAGES = ("forebay", "torch", "torchdata", "numpy", "pyarrow")
LIMIT_S = 180
#: Time limit for writing a peer's own form of the corpus.
WRITE_LIMIT_S = 600
#: Matches the line in which Python shows an exception.
ERROR = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class Plan:
    tokens: int
    #: Number of copies of the Parquet files. They are enough that no window reaches the end.
    copies: int
    repeats: int
    warm_up_s: float
    window_s: float
    limit_s: float
    #: No repeat begins if it would end later than this, judged by the earlier ones. Preparation
    #: does not count.
    minutes: float
    shapes: int


DEFAULT = Plan(tokens=100_000_000, copies=16, repeats=3, warm_up_s=0.7, window_s=2, limit_s=0.5, minutes=18.5, shapes=2)
QUICK = Plan(tokens=20_000_000, copies=32, repeats=1, warm_up_s=0.3, window_s=1, limit_s=0.3, minutes=1.8, shapes=1)


#: Minutes of a run with every peer.
ALL_MINUTES = 90


@dataclass(frozen=True)
class Job:
    """One process to start, and the label of its result."""

    labels: dict[str, Any]
    command: list[str]
    reads: Path
    #: A first guess of its duration. The progress bar corrects it.
    seconds: float
    #: Reason why it cannot run.
    failed: str | None = None


@dataclass
class Progress:
    """Shows a bar with the remaining time on a terminal, and a line for each tenth elsewhere."""

    total_s: float
    began: float = field(default_factory=time.monotonic)
    done_s: float = 0.0
    told: int = -1

    def show(self, text: str) -> None:
        share = min(self.done_s / self.total_s, 1.0)
        elapsed = time.monotonic() - self.began
        # The bar trusts the guesses until a twentieth is done.
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


def command_line(arguments: list[str]) -> str:
    """The command line that a person types."""
    rest = [argument for argument in arguments if argument != "--all"]
    return ("make bench-all" if "--all" in arguments else "make bench") + (f" ARGS='{' '.join(rest)}'" if rest else "")


def header(kind: str, quick: bool, seed: int) -> dict[str, Any]:
    commit = output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = bool(output("git", "status", "--porcelain", "--untracked-files=no"))
    return {
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + (" with changes" if changed else ""),
        "command": command_line(sys.argv[1:]),
        "quick": quick,
        "seed": seed,
        "machine": machine(),
        "versions": versions(),
    }


@dataclass
class Ready:
    """Things that contestants need before they can run: each path, or the reason why it is
    missing.
    """

    pythons: dict[str, Path] = field(default_factory=dict)
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def prepare(chosen: list[Contestant], shapes: tuple[Shape, ...], data: Path, tell: Callable[[str], None]) -> Ready:
    """Makes the environments of the peers and their own forms of the corpus, outside of the timed
    part.
    """
    ready = Ready()
    for name in dict.fromkeys(one.environment for one in chosen):
        try:
            ready.pythons[name] = environments.prepare(name, lambda text, name=name: tell(f"{name}: {text}"))
        except (environments.Unavailable, OSError) as error:
            ready.failed[name] = f"could not be installed: {error}"
    for one in chosen:
        for shape in shapes if one.write else ():
            path = one.path(data, shape)
            if one.environment in ready.failed or str(path) in ready.written or path.exists():
                continue
            tell(f"{one.environment}: writing {path.name}")
            asked = {"write": one.name, "corpus": str(data), **shape.__dict__}
            command = [str(ready.pythons[one.environment]), str(HERE / "measure.py"), json.dumps(asked)]
            ready.written[str(path)] = result = start(command, WRITE_LIMIT_S)
            if "failed" in result:
                ready.failed[str(path)] = f"its form of the corpus could not be written: {result['failed']}"
    return ready


def missing(chosen: list[Contestant], shapes: tuple[Shape, ...], ready: Ready, data: Path) -> list[str]:
    """Lists the contestants that cannot take part, with reasons. The user learns this before the
    measurement, because a comparison without them says less.
    """
    told = []
    for one in chosen:
        paths = (str(one.path(data, shape)) for shape in shapes)
        reason = next((ready.failed[key] for key in (one.environment, *paths) if key in ready.failed), None)
        told += [] if reason is None else [f"{one.label} will be missing: {reason}"]
    return list(dict.fromkeys(told))


def selected(quick: bool, every: bool, only: list[str]) -> list[Contestant]:
    known = contestants()
    if only:
        return [one for one in known if any(text in one.name for text in only)]
    return [one for one in known if every or (one.quick if quick else not one.every)]


def jobs(plan: Plan, chosen: list[Contestant], ready: Ready, data: Path) -> list[Job]:
    """The jobs of one repeat."""
    found = []
    gather, unbuilt = "", None
    try:
        gather = str(built("forebay-limits"))
    except (subprocess.CalledProcessError, OSError) as error:
        unbuilt = f"could not be built: {error}"
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
            path = one.path(data, shape)
            failed = ready.failed.get(one.environment) or ready.failed.get(str(path))
            python = ready.pythons.get(one.environment, Path(sys.executable))
            command = [str(python), str(HERE / "measure.py"), json.dumps(asked)]
            found.append(Job(labels, command, path, seconds, failed))
        for dtype in sorted(groups & set(corpus.DTYPES)):
            path = data / f"tokens-{dtype}.bin"
            for threads in (1, 2):
                arguments = [str(path), dtype, shape.seq_len, shape.batch_size, threads, plan.limit_s]
                labels = {"kind": "limit", "name": "gather", "group": dtype, "threads": threads, **sizes}
                # Three kernels run, and then a copy.
                found.append(Job(labels, [gather, *map(str, arguments)], path, 0.5 + 4 * plan.limit_s, unbuilt))
    for codec in sorted(groups & set(corpus.CODECS)):
        for name in ("decompress", "decode"):
            for threads in (1, 2):
                asked = {"limit": name, "codec": codec, "threads": threads}
                asked |= {"corpus": str(data), "window_s": 2 * plan.limit_s}
                labels = {"kind": "limit", "name": name, "group": codec, "threads": threads}
                path = data / f"parquet-{codec}"
                command = [sys.executable, str(HERE / "measure.py"), json.dumps(asked)]
                found.append(Job(labels, command, path, 1 + 2 * plan.limit_s))
    return found


def read_once(path: Path) -> None:
    """Reads the file so that the page cache holds it."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        with file.open("rb", buffering=0) as opened:
            while opened.read(8 << 20):
                pass


def start(command: list[str], limit_s: float) -> dict[str, Any]:
    """Runs a process of its own. Returns its result, or `failed` with the reason."""
    # Settings of the caller's shell would change the measurement.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        told, complaints = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"did not end within {limit_s} s"}
    finally:
        # Workers of a crashed contestant must not disturb the next contestant.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode != 0:
        lines = complaints.strip().splitlines()
        # Lines that a library prints about its own end come after the error.
        error = next((line for line in reversed(lines) if ERROR.match(line)), lines[-1] if lines else "")
        return {"failed": error[:300] or f"ended with status {child.returncode}"}
    try:
        return json.loads(told.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": f"told no result, but {told.strip()[-100:]!r}"}


def run(job: Job) -> dict[str, Any]:
    """Returns the result of a job, or `failed` with the reason."""
    if job.failed is not None:
        return {"failed": job.failed}
    try:
        read_once(job.reads)
        result = start(job.command, LIMIT_S)
    except OSError as error:
        return {"failed": str(error)}
    if "kernels" in result:
        speed = result["tokens_per_second"]
        threads = job.labels["threads"]
        # The threads of this job do nothing but run.
        result = {
            "tokens_per_s": speed,
            "cores": float(threads),
            "cpu_s_per_gtok": threads / speed * 1e9,
            "copy_bytes_per_s": result["copy_bytes_per_second"],
            "kernel": max(result["kernels"], key=result["kernels"].get),
        }
    return result


def benchmark(
    plan: Plan, chosen: list[Contestant], quick: bool, out: Path, report_so_far: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Returns the records of all runs. An interrupted run returns the records so far."""
    out.mkdir(parents=True, exist_ok=True)

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rbench: writing the corpus, shard {done} of {total}", end=end, file=sys.stderr, flush=True)

    data = corpus.prepare(OUT, plan.tokens, plan.copies, tell)
    shapes = SHAPES[: plan.shapes]
    ready = prepare(chosen, shapes, data, lambda text: print(f"bench: {text}", file=sys.stderr, flush=True))
    for text in missing(chosen, shapes, ready, data):
        print(f"bench: WARNING: {text}", file=sys.stderr, flush=True)
    seed = random.SystemRandom().randrange(1 << 32)
    shuffler = random.Random(seed)
    turn = jobs(plan, chosen, ready, data)
    one_turn_s = sum(job.seconds for job in turn if job.failed is None)
    progress = Progress(plan.repeats * one_turn_s)
    written = {Path(path).name: result for path, result in ready.written.items()}
    records = [{**header("benchmark", quick, seed), "plan": plan.__dict__, "written": written}]
    lost: set[str] = set()
    measuring = time.monotonic()
    with (out / "results.jsonl").open("w") as file:

        def keep(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        keep(records[0])
        try:
            for repeat in range(plan.repeats):
                elapsed = time.monotonic() - measuring
                if repeat > 0 and elapsed + elapsed / repeat > plan.minutes * 60:
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
                    progress.done_s += job.seconds if job.failed is None else 0
                try:
                    report_so_far(records)
                except Exception as error:
                    # The records matter most. The report at the end shows the error again.
                    print(f"\nbench: no report yet: {type(error).__name__}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            records.append({"kind": "interrupted", "repeat": 0, "name": "", "group": ""})
            keep(records[-1])
    progress.finish()
    return records


def resuming(seed: int) -> list[dict[str, Any]]:
    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rbench: resuming, round {done} of {total}", end=end, file=sys.stderr, flush=True)

    return resume.measure(OUT, seed, resume.REPEATS, tell)


def at_scale(_seed: int) -> list[dict[str, Any]]:
    command = [str(built("forebay-scale"))]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in told.splitlines()]


#: Measurements of forebay alone, each under a minute. One process runs at a time, otherwise as for
#: the tables.
ALONE: dict[str, Callable[[int], list[dict[str, Any]]]] = {"resume": resuming, "scale": at_scale}

#: Measurements against a target of their own, or shown beside these. All of them take 20 minutes.
TARGETS: dict[str, Any] = {
    "latency": latency, "trainer": trainer, "placement": placement, "memory": memory, "startup": startup, "cold": cold,
    "decode": decode,
    "service": service,
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
    """The part of the results for a measurement of forebay alone."""
    kind = records[0]["kind"]
    if kind not in TARGETS:
        return report.section(records)
    lines = [f"## {TARGETS[kind].LEAD}", "", *report.circumstances(records[0]), ""]
    lines += [f"**failed**: {records[0]['failed']}"] if "failed" in records[0] else TARGETS[kind].section(records[1:])
    return "\n".join(lines) + "\n"


def alone(name: str) -> str:
    """Runs one part alone, and returns its section of the results."""
    OUT.mkdir(parents=True, exist_ok=True)
    seed = random.SystemRandom().randrange(1 << 32)
    taken, cpu, began = measure.machine_cpu_seconds(), cpu_seconds(), time.monotonic()
    try:
        found, failed = (ALONE.get(name) or against_target(name))(seed), {}
    except Exception as error:
        # If one of several parts fails, the user still wants the other parts.
        if name not in TARGETS:
            raise
        traceback.print_exc()
        found, failed = [], {"failed": f"{type(error).__name__}: {error}"}
    elapsed = time.monotonic() - began
    others = (measure.machine_cpu_seconds() - taken - (cpu_seconds() - cpu)) / elapsed
    records = [{**header(name, False, seed), "other_cores": max(0.0, others), **failed}, *found]
    (OUT / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return section(records)


def alone_if_possible(name: str) -> str | None:
    """Returns the section. Prints a complaint on failure, because the earlier measurements must not
    be lost.
    """
    try:
        return alone(name)
    except Exception as error:
        print(f"bench: {name} failed: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def cpu_seconds() -> float:
    """CPU seconds of this process and of the children that it waited for."""
    return sum(os.times()[:4])


def load(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        sys.exit(f"bench: {path.name} is not there yet: run `make bench` first")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every peer, each in an environment of its own")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="only contestants named like one of these"
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes, one repeat: shows that it works")
    parser.add_argument(
        "--write-results", action="store_true", help="measure nothing: write benches/RESULTS.md from the last results"
    )
    parser.add_argument("--resume", action="store_true", help="only what resuming costs, wherever in the epoch")
    parser.add_argument("--scale", action="store_true", help="only the order, and 10^6 shards on 4096 ranks")
    parser.add_argument("--targets", action="store_true", help="only these, in turn, each against its target:")
    for name, module in TARGETS.items():
        parser.add_argument(f"--{name}", action="store_true", help=module.__doc__.partition(":")[0])
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"of measuring: no further repeat past this (default: {DEFAULT.minutes}; with --all {ALL_MINUTES})",
    )
    options = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        sys.exit("bench: measures through /proc, which only Linux has")
    out = OUT / ("all" if options.all else "only" if options.only else "") / ("quick" if options.quick else "")
    if options.write_results:
        results = ROOT / "benches" / "RESULTS.md"
        # Keep the text that layouts.py and workers.py wrote below their marks, at the end.
        old = results.read_text() if results.exists() else ""
        marks = [at for mark in (layouts.MARK, workers.MARK) if (at := old.find(mark)) >= 0]
        parts = [
            report.markdown(load(out / "results.jsonl"), "Where targets are missed, and why: [README.md](README.md)")
        ]
        parts += [section(load(path)) for name in [*TARGETS, *ALONE] if (path := OUT / f"{name}.jsonl").exists()]
        parts += [old[min(marks) :]] if marks else []
        results.write_text(report.wrapped("\n".join(parts)))
        picture.write()
        print("bench: wrote benches/RESULTS.md and benches/picture.svg", file=sys.stderr)
        return
    chosen = [name for name in [*TARGETS, *ALONE] if getattr(options, name) or (options.targets and name in TARGETS)]
    if chosen:
        for name in chosen:
            print(report.wrapped(alone(name)), flush=True)
        return
    taking_part = selected(options.quick, options.all, options.only)
    if not taking_part:
        sys.exit(f"bench: no contestant is named like {' or '.join(options.only)}")
    plan = QUICK if options.quick else DEFAULT
    minutes = options.minutes or (ALL_MINUTES if options.all else plan.minutes)

    def write_report(records: list[dict[str, Any]], sections: Iterable[str] = ()) -> None:
        (out / "results.md").write_text(report.wrapped("\n".join([report.markdown(records), *sections])))
        (out / "index.html").write_text(page.page(records))

    # A process that is ended from outside writes its results so far, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    records = benchmark(replace(plan, minutes=minutes), taking_part, options.quick, out, write_report)
    interrupted = records[-1]["kind"] == "interrupted"
    more = not (options.quick or options.only or interrupted)
    sections = [finished for name in ALONE if (finished := alone_if_possible(name))] if more else []
    write_report(records, sections)
    print("\n".join(report.summary(records)))
    print(f"Tables and every run: results.md and results.jsonl in {out.relative_to(ROOT)}")
    print(f"The page with plots: file://{out / 'index.html'}", flush=True)
    if interrupted:
        sys.exit("bench: interrupted; the results are those until then")
    if all("failed" in record for record in records[1:]):
        sys.exit("bench: every measurement failed")
    if any("failed" in record and record["name"].startswith("forebay") for record in records[1:]):
        sys.exit("bench: forebay failed")


if __name__ == "__main__":
    main()
