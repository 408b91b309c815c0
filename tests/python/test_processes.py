"""Tests that signals, forks, exits and forgotten objects end a loader cleanly.

`test_threads.py` has the cases of one process with an ordinary consumer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from support import clean_environment, run_python

pytestmark = [
    pytest.mark.hostile,
    pytest.mark.thread_unsafe(reason="it starts processes"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no signals of POSIX"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("processes"), "parquet", 100_000, shards=2)


def started(program: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip


# A parent such as nohup may have left SIGHUP ignored.
SIGTERM = """
    import signal, sys
    import forebay
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    loader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=2, epochs="endless")
    for step, batch in enumerate(loader):
        if step == 3:
            print("ready", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_signal_ends_the_process_at_once(corpus: Path, name: str) -> None:
    child = started(SIGTERM, corpus)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        sent = time.monotonic()
        child.send_signal(getattr(signal, name))
        child.wait(10)
        assert child.returncode == -getattr(signal, name)
        assert time.monotonic() - sent < 5
    finally:
        child.kill()
        child.communicate()


HANDLER = """
    import signal, sys
    import forebay
    def handler(*_):
        raise SystemExit(7)
    signal.signal(signal.SIGTERM, handler)
    with forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=2, epochs="endless") as loader:
        for step, batch in enumerate(loader):
            if step == 3:
                print("ready", flush=True)
"""


def test_a_handler_of_sigterm_runs_and_its_exit_is_clean(corpus: Path) -> None:
    child = started(HANDLER, corpus)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=30)
        assert (child.returncode, err) == (7, "")
    finally:
        child.kill()
        child.wait()


MULTIPROCESSING = """
    import multiprocessing, sys, warnings
    import forebay

    def child(path, queue):
        with forebay.Loader(path, seq_len=32, batch_size=4, num_threads=2) as own:
            queue.put(sum(1 for _ in own))

    if __name__ == "__main__":
        warnings.simplefilter("ignore", DeprecationWarning)
        path, method = sys.argv[1:]
        loader = forebay.Loader(path, seq_len=32, batch_size=4, num_threads=2)
        iterator = iter(loader)
        next(iterator)
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        processes = [context.Process(target=child, args=(path, queue)) for _ in range(2)]
        for process in processes:
            process.start()
        counts = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0, process.exitcode
        assert counts == [len(loader)] * 2, counts
        assert 1 + sum(1 for _ in iterator) == len(loader)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_a_process_with_a_live_loader_open_their_own(corpus: Path, tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(MULTIPROCESSING))
    done = subprocess.run(
        [sys.executable, str(program), str(corpus), method],
        capture_output=True, text=True, timeout=120, env=clean_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


PICKLE = """
    import pickle, sys
    import forebay
    loader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4)
    try:
        pickle.dumps(iter(loader))
    except TypeError as error:
        print(error)
"""


def test_a_pass_cannot_be_sent_to_a_child(corpus: Path) -> None:
    assert "cannot pickle" in run_python(PICKLE, corpus).stdout


DROPS = """
    import gc, itertools, sys
    import forebay
    for order in itertools.permutations(["loader", "first", "second", "batch", "view", "parts"]):
        loader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=2)
        first, second = iter(loader), iter(loader)
        batch = next(second)
        view = batch["input_ids"][1:]
        total = int(view.sum())
        parts = loader.batch_at(3)
        names = dict(loader=loader, first=first, second=second, batch=batch, view=view, parts=parts)
        del loader, first, second, batch, view, parts
        for name in order:
            del names[name]
            if "view" in names:
                assert int(names["view"].sum()) == total, order
    gc.collect()
"""


def test_objects_may_be_dropped_in_any_order(corpus: Path) -> None:
    assert run_python(DROPS, corpus, timeout=240).stderr == ""


RAISES = """
    import sys
    import forebay
    loader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=2)
    for times in range(3):
        iterator, seen, raised = iter(loader), [], 0
        while len(seen) < len(loader):
            try:
                for batch in iterator:
                    seen.append(int(batch["input_ids"][0, 0]))
                    if len(seen) % 7 == 0:
                        raise RuntimeError("of the consumer")
            except RuntimeError as error:
                assert str(error) == "of the consumer"
                raised += 1
                assert loader.state_dict()["position"] == 4 * len(seen)
        assert len(set(seen)) == len(seen) == len(loader) and raised == len(loader) // 7
        assert next(iterator, None) is None
"""


def test_an_exception_of_the_consumer_loses_and_repeats_no_batch(corpus: Path) -> None:
    run_python(RAISES, corpus)


CYCLES = """
    import gc, os, sys
    import forebay
    def threads():
        return len(os.listdir("/proc/self/task"))
    def descriptors():
        return len(os.listdir("/proc/self/fd"))
    class Holder:
        pass
    def once():
        holder = Holder()
        holder.loader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=3)
        holder.iterator = iter(holder.loader)
        holder.batch = next(holder.iterator)
        holder.self = holder
        holder.loader_of_transform = forebay.Loader(
            sys.argv[1], seq_len=32, batch_size=4, transform=lambda batch, kept=holder: batch
        )
        next(iter(holder.loader_of_transform))
    once(); gc.collect()
    import time; time.sleep(0.3)
    before = threads(), descriptors()
    for _ in range(20):
        once()
    for _ in range(100):
        # A thread that runs the function keeps it until the thread ends.
        gc.collect()
        if threads() <= before[0] and descriptors() <= before[1]:
            break
        time.sleep(0.1)
    assert threads() <= before[0] and descriptors() <= before[1], (before, threads(), descriptors())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_garbage_in_cycles_ends_its_threads_and_closes_its_files(corpus: Path) -> None:
    run_python(CYCLES, corpus)


IDLE = """
    import os, sys, time
    import forebay
    loader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=4, epochs="endless")
    iterator = iter(loader)
    for _ in range(20):
        next(iterator)
    def memory():
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    time.sleep(1)
    cpu, held = time.process_time(), memory()
    time.sleep(4)
    used, grown = time.process_time() - cpu, memory() - held
    print(used, grown)
    assert used < 0.04, f"{used} s of 4 s"
    assert grown < 1 << 20, grown
    assert len(next(iterator)["input_ids"]) == 4
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="memory is read in /proc")
def test_a_consumer_that_stops_costs_no_cpu_and_no_memory(corpus: Path) -> None:
    run_python(IDLE, corpus)


SUBINTERPRETER = """
    import sys
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    if sys.argv[1] == "main first":
        import forebay
    child = interpreters.create()
    try:
        failed = interpreters.run_string(child, "import forebay._core")
    except Exception as error:
        failed = error
    text = str(getattr(failed, "msg", failed))
    assert "interpreter" in text, repr(failed)
    import forebay
    print(text)
"""


@pytest.mark.parametrize("order", ["main first", "sub-interpreter first"])
def test_a_sub_interpreter_is_refused_clearly(order: str) -> None:
    assert "interpreter" in run_python(SUBINTERPRETER, order).stdout


EXITS = {
    "two loaders, an iterator of each": """
other = forebay.Loader(sys.argv[1], seq_len=8)
a, b = iter(loader), iter(other)
next(a), next(b)
""",
    "a daemon thread waits for a batch": """
import threading, time
def consume():
    for batch in loader:
        pass
    while True:
        for batch in loader:
            pass
threading.Thread(target=consume, daemon=True).start()
time.sleep(0.2)
""",
    "an exception is on its way": "next(iter(loader)); raise KeyError('of the program')",
    "at exit the loader goes on": """
import atexit
iterator = iter(loader)
next(iterator)
atexit.register(lambda: next(iterator))
""",
    "os._exit": "import os; next(iter(loader)); os._exit(0)",
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_exits_with_the_status_of_the_program(corpus: Path, how: str) -> None:
    program = "import sys, forebay\nloader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=4)\n"
    done = run_python(program + EXITS[how] + "\n", corpus, timeout=60, check=False)
    fails = "exception" in how
    assert done.returncode == (1 if fails else 0), (done.returncode, done.stderr)
    assert ("KeyError" in done.stderr) if fails else done.stderr == ""
