"""Runs test lanes one after the other, and ends with one line of totals.

    test.py [--stress] LANE...

Lanes: rust, python, ft, parallel, service, tsan, trainers, trainers-more, hostile.

Counts come from the closing lines of the runners. A lane that breaks before it can count, such as
by a compile error or a crash, is one failure. A lane that cannot run on this machine is named as
skipped, and fails if `CI=true`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETUP = str(ROOT / "scripts" / "setup.sh")
LANE_LIMIT_S = 45 * 60
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# The words of the runners, each with the word for it here.
MEANING = {
    "passed": "passed",
    "xpassed": "passed",
    "failed": "failed",
    "timed out": "failed",
    "exec failed": "failed",
    "error": "failed",
    "errors": "failed",
    "skipped": "skipped",
    "ignored": "skipped",
    "xfailed": "skipped",
}
COUNT = re.compile(r"(\d+) (timed out|exec failed|[a-z]+)")
CLOSING_LINE = re.compile(
    r"^test result: \w+\."  # cargo test
    r"|^\s*Summary \[.*\] +[\d/]+ tests? run:"  # cargo nextest
    r"|^=* ?(?=\d+ (?:passed|failed|skipped|xfailed|xpassed|deselected|errors?)\b).* in [\d.]+s",  # pytest
)


@dataclass
class Lane:
    name: str
    counts: dict[str, int] = field(default_factory=lambda: {"passed": 0, "failed": 0, "skipped": 0})
    seconds: float = 0.0
    why: str = ""
    #: The tests that the lane left out without being skipped as a whole.
    note: str = ""

    def count(self, line: str) -> None:
        if CLOSING_LINE.match(line):
            for number, word in COUNT.findall(line):
                if word in MEANING:
                    self.counts[MEANING[word]] += int(number)

    def fail(self, why: str) -> None:
        self.counts["failed"] += 1
        self.why = why

    def skip(self, why: str) -> None:
        if os.environ.get("CI") == "true":
            self.fail(f"{why} (a skipped lane fails in CI)")
        else:
            self.counts["skipped"] += 1
            self.why = f"SKIPPED: {why}"


def run(lane: Lane, *command: str) -> None:
    """Runs one command of a lane. Passes its output on, and counts the results in it."""
    print(f"\n== {lane.name}: {' '.join(command)}", flush=True)
    before = sum(lane.counts.values())
    failed_before = lane.counts["failed"]
    child = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    limit = threading.Timer(LANE_LIMIT_S, os.killpg, (child.pid, signal.SIGKILL))
    limit.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lane.count(ANSI.sub("", line))
        code = child.wait()
    except KeyboardInterrupt:
        os.killpg(child.pid, signal.SIGINT)
        child.wait()
        raise
    finally:
        limit.cancel()
    if code != 0 and lane.counts["failed"] == failed_before:
        lane.fail(f"`{' '.join(command[:4])} ...` ended with status {code}")
    elif code == 0 and sum(lane.counts.values()) == before:
        lane.fail(f"`{' '.join(command[:4])} ...` ran no tests")


def set_up(lane: Lane, *command: str) -> bool:
    if subprocess.run([SETUP, *command], cwd=ROOT, stdin=subprocess.DEVNULL).returncode != 0:
        lane.fail(f"`scripts/setup.sh {' '.join(command)}` failed")
        return False
    return True


def rust(lane: Lane) -> None:
    # The binding is a cdylib without tests of its own. The Python tests cover it.
    chosen = ("--workspace", "--exclude", "forebay-python")
    if shutil.which("cargo-nextest"):
        run(lane, "cargo", "nextest", "run", *chosen)
        documented = subprocess.run(["git", "grep", "-qE", r"//[/!] ```$", "--", "*.rs"], cwd=ROOT).returncode == 0
        if documented and not lane.why:
            run(lane, "cargo", "test", "--doc", *chosen)
    else:
        run(lane, "cargo", "test", "--no-fail-fast", *chosen)


def pytest(lane: Lane, venv: str, group: str, *arguments: str) -> None:
    notes = []
    if lane.name == "python" and os.environ.get("FOREBAY_HOSTILE_APART") == "1":
        arguments = ("-m", "not hostile", *arguments)
        notes.append("tests of hostile things (`make hostile` runs them)")
    if lane.name == "ft" and "--stress" not in arguments:
        notes.append("two of three cells of the matrices; files that do not depend on the interpreter (--stress)")
    if set_up(lane, "venv", venv, group) and set_up(lane, "wheel", venv):
        run(lane, f"{venv}/bin/python", "-m", "pytest", "tests/python", "-q", "-ra", *arguments)
        if not os.environ.get("FOREBAY_TEST_FILES"):
            notes.append("files of other projects (FOREBAY_TEST_FILES names no folder)")
        lane.note = f"LEFT OUT of it: {'; '.join(notes)}" if notes else ""


def trainers(lane: Lane, *groups: str) -> None:
    """Runs the tests of trainers.

    Every trainer of the groups must be installed: a test that skips itself because it lacks a
    trainer fails the lane.
    """
    everything = "trainers-more" in groups
    names = ["trainers", "adapters", "packed_models", "packed_files", "format_consumers", "examples"]
    names += ["clusters"] if everything else []
    files = tuple(f"tests/python/test_{name}.py" for name in names)
    # The notebook and the examples without a trainer belong to the lane `python`.
    left_out = "not notebook" if everything else "not notebook and not ray and not deepspeed and not jax and not trl"
    chosen = ("-k", left_out)
    if set_up(lane, "venv", ".venv-trainers", *groups) and set_up(lane, "wheel", ".venv-trainers"):
        run(lane, ".venv-trainers/bin/python", "-m", "pytest", *files, "-q", "-ra", *chosen)
        if lane.counts["skipped"]:
            lane.fail("a trainer is missing")


def free_threaded(lane: Lane, *arguments: str) -> None:
    found = subprocess.run([SETUP, "python-ft"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if found:
        pytest(lane, ".venv-ft", "ft", *arguments)
    else:
        lane.skip("no python3.14t found (on the PATH, or named in FOREBAY_PYTHON_FT; `uv python install 3.14t`)")


def hostile(lane: Lane, *arguments: str) -> None:
    """Runs the tests of hostile things in Python, and 20 seconds of random damage in Rust."""
    os.environ.setdefault("FOREBAY_FUZZ_SECONDS", "20")
    run(lane, "cargo", "test", "-p", "forebay-tests", "--test", "fuzz", "--", "--nocapture", "--test-threads=1")
    pytest(lane, ".venv", "test", "-m", "hostile", *arguments)


#: Tests that use something of the whole process, or that start a process of their own. Threads of
#: this process would prove nothing there.
ALONE = """
support.run_python
support.json_from
subprocess.run
subprocess.Popen
serving.Server
os.fork
signal.signal
sys.setswitchinterval
torch.manual_seed
torch.get_rng_state
random.seed
numpy.random.seed
gc.collect
"""


def parallel(lane: Lane, *arguments: str) -> None:
    """Runs every test body in several threads at once. Skips those that cannot, with the reason."""
    options = ("-o", f"thread_unsafe_functions={ALONE}", "--parallel-threads=3", "--skip-thread-unsafe=true")
    free_threaded(lane, *options, *arguments)


def tsan(lane: Lane) -> None:
    """Runs the Rust tests of the core under ThreadSanitizer.

    It needs a standard library that is built for it, so only nightly Rust can do this.
    """
    nightly = subprocess.run(["rustc", "+nightly", "--print", "sysroot"], capture_output=True, text=True).stdout.strip()
    if not nightly or not Path(nightly, "lib/rustlib/src/rust/library/Cargo.lock").exists():
        lane.skip("no nightly Rust with rust-src (`rustup toolchain install nightly --component rust-src`)")
        return
    os.environ.setdefault("TSAN_OPTIONS", "halt_on_error=1")
    os.environ["RUSTFLAGS"] = "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer"
    host = subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True).stdout
    target = next(line.split()[1] for line in host.splitlines() if line.startswith("host:"))
    target_dir = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target")) + "-tsan"
    run(
        lane, "cargo", "+nightly", "test", "-Zbuild-std", "--target", target, "--target-dir", target_dir,
        "-p", "forebay", "-p", "forebay-tests", "--lib", "--tests",
    )  # fmt: skip


def main() -> int:
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    options = [name for name in sys.argv[1:] if name.startswith("--")]
    runners = {
        "rust": rust,
        "python": lambda lane: pytest(lane, ".venv", "test", *options),
        "ft": lambda lane: free_threaded(lane, *options),
        "parallel": lambda lane: parallel(lane, *options),
        "service": lambda lane: pytest(lane, ".venv", "test", "--service", "-k", "contract", *options),
        "tsan": tsan,
        "trainers": lambda lane: trainers(lane, "trainers"),
        "trainers-more": lambda lane: trainers(lane, "trainers", "trainers-more"),
        "hostile": lambda lane: hostile(lane, *options),
    }
    lanes = []
    for name in names:
        lane = Lane(name)
        lanes.append(lane)
        start = time.monotonic()
        runners[name](lane)
        lane.seconds = time.monotonic() - start
    print()
    for lane in lanes:
        state = "FAILED" if lane.counts["failed"] else "skipped" if lane.why else "ok"
        numbers = ", ".join(f"{number} {word}" for word, number in lane.counts.items())
        print(
            f"{lane.name:13} {state:7} {numbers} in {lane.seconds:.0f} s"
            + "".join(f"  {text}" for text in (lane.why, lane.note) if text)
        )
    total = {word: sum(lane.counts[word] for lane in lanes) for word in ("passed", "failed", "skipped")}
    print(", ".join(f"{number} {word}" for word, number in total.items()))
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
