"""Tests threads, signals, forks and exits.

The interpreter is never held, and every way of stopping is clean.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from reference import Settings

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import pyarrow as pa
from support import clean_environment, first_ids, open_loader, run_python

pytestmark = pytest.mark.hostile

SETTINGS = Settings(seq_len=32, batch_size=4, shuffle="block", chunk_tokens=1024, window_tokens=1 << 14)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("threads") / "corpus", "parquet", 200_000, shards=2)


@pytest.fixture(scope="module")
def slow_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of few large batches that take long to decode: gzip over random ids in one row
    group.
    """
    import numpy as np
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("slow") / "shard.parquet"
    ids = np.random.default_rng(1).integers(0, 1 << 30, 6_000_000, dtype=np.int32)
    offsets = pa.array(np.arange(0, len(ids) + 1, 10_000, dtype=np.int32))
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids))})
    pq.write_table(table, path, compression="gzip", compression_level=1, use_dictionary=False)
    return path


def os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def wait_until(holds: Any, what: str, limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.01)


@pytest.mark.parametrize("consumers", [2, 8])
def test_several_threads_share_one_iterator_and_each_batch_comes_once(corpus: Path, consumers: int) -> None:
    with open_loader(corpus, SETTINGS, num_threads=4) as loader:
        wanted = sorted(tuple(first_ids(loader.batch_at(step))) for step in range(len(loader)))
        iterator = iter(loader)
        found: list[list[tuple[int, ...]]] = [[] for _ in range(consumers)]
        start = threading.Barrier(consumers)

        def consume(mine: list[tuple[int, ...]]) -> None:
            start.wait()
            for batch in iterator:
                mine.append(tuple(first_ids(batch)))

        threads = [threading.Thread(target=consume, args=(mine,)) for mine in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert sorted(batch for mine in found for batch in mine) == wanted
        assert loader.state_dict()["position"] == len(loader) * 4


def test_batches_come_in_order_to_one_consumer_while_others_read_by_position(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS, num_threads=4) as loader:
        stop = threading.Event()
        wrong: list[int] = []
        wanted = [first_ids(loader.batch_at(step)) for step in range(50)]

        def read() -> None:
            step = 0
            while not stop.is_set():
                if first_ids(loader.batch_at(step)) != wanted[step]:
                    wrong.append(step)
                step = (step + 7) % 50

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        try:
            for step, batch in enumerate(loader):
                assert step >= 50 or first_ids(batch) == wanted[step]
        finally:
            stop.set()
            for reader in readers:
                reader.join(60)
        assert not wrong


def test_the_interpreter_is_free_while_next_waits(slow_corpus: Path) -> None:
    """Counts turns of a second thread.

    It gets a turn only where the loader releases the interpreter.
    """
    turns = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0.0002)

    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    settings = Settings(seq_len=1 << 18, batch_size=4)
    with open_loader(slow_corpus, settings, num_threads=1, prefetch_batches=1) as loader:
        counter.start()
        try:
            wait_until(lambda: turns > 0, "the counting thread starts")
            sys.setswitchinterval(1000)
            iterator = iter(loader)
            waited, turned = 0.0, 0
            for _ in range(len(loader)):
                before, start = turns, time.perf_counter()
                next(iterator)
                waited += time.perf_counter() - start
                turned += turns - before
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            counter.join(20)
    assert waited > 0.02, "the corpus must be slow enough to wait for"
    assert turned > waited / 0.02, f"{turned} turns in {waited:.3f} s of waiting"


INTERRUPT = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with SIGINT ignored
    import forebay
    loader = forebay.Loader(sys.argv[1], seq_len=1 << 18, batch_size=4, num_threads=1, prefetch_batches=1)
    iterator = iter(loader)
    next(iterator)
    print("ready", flush=True)
    try:
        while True:
            for batch in loader:
                pass
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    again = sum(1 for _ in loader)
    assert again == len(loader), again
    loader.close()
    print("closed", flush=True)
"""


def test_ctrl_c_ends_a_waiting_next_and_the_loader_stays_usable(slow_corpus: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPT), str(slow_corpus)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.2)
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
        assert time.monotonic() - sent < 5
        out, err = child.communicate(timeout=60)
        assert out == "closed\n", err
        assert child.returncode == 0, err
    finally:
        child.kill()
        child.wait()


LATENCY = """
    import signal, sys, time
    import forebay
    late = []

    def handler(signum, frame):
        late.append(time.monotonic() - due)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGALRM, lambda signum, frame: handler(signum, frame))
    loader = forebay.Loader(sys.argv[1], seq_len=1 << 18, batch_size=4, num_threads=1, prefetch_batches=1)
    for _ in range(6):
        due = time.monotonic() + 0.3
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            while True:
                for batch in loader:
                    pass
        except KeyboardInterrupt:
            pass
    loader.close()
    print(sorted(late)[len(late) // 2])
"""


def test_a_signal_inside_next_is_answered_within_200_ms(slow_corpus: Path) -> None:
    # The middle of six tries: a machine that does other work may delay single ones.
    assert float(run_python(LATENCY, slow_corpus).stdout) < 0.2


FORK = """
    import os, sys, warnings
    import forebay
    warnings.simplefilter("ignore", DeprecationWarning)
    loader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=2)
    iterator = iter(loader)
    next(iterator)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        texts = []
        for call in (lambda: next(iterator), lambda: next(iter(loader)), lambda: loader.batch_at(0)):
            try:
                call()
                texts.append("no error")
            except forebay.ForebayError as error:
                texts.append(str(error))
        os.write(write, "\\n".join(texts).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        texts = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert len(texts) == 3 and all("fork" in text for text in texts), texts
    assert 1 + sum(1 for _ in iterator) == len(loader)
"""

FORK_AND_DROP = """
    import gc, os, sys, warnings
    import forebay
    warnings.simplefilter("ignore", DeprecationWarning)
    loader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=2)
    iterator = iter(loader)
    batch = next(iterator)
    child = os.fork()
    if child == 0:
        del iterator, batch
        loader.close()
        del loader
        gc.collect()
        fresh = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=2)
        sys.exit(0 if sum(1 for _ in fresh) == len(fresh) else 3)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert 1 + sum(1 for _ in iterator) == len(loader)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("program", [FORK, FORK_AND_DROP], ids=["used in the child", "dropped in the child"])
def test_a_forked_child_gets_an_error_and_the_parent_goes_on(corpus: Path, program: str) -> None:
    run_python(program, corpus, timeout=60)


EXITS = {
    "iterator alive": "iterator = iter(loader); batch = next(iterator)",
    "iterator never started": "iterator = iter(loader)",
    "unhandled exception": "iterator = iter(loader); next(iterator); raise SystemExit(0)",
    "in a daemon thread": """
import threading
started = threading.Event()
def consume():
    while True:
        for batch in loader:
            started.set()
threading.Thread(target=consume, daemon=True).start()
started.wait(30)
""",
    "held in a cycle": "iterator = iter(loader); c = [loader, iterator, next(iterator)]; c.append(c); del c",
    "held by a module": "import json; json.kept = iter(loader); next(json.kept)",
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_exits_cleanly_with_a_live_loader(corpus: Path, how: str) -> None:
    program = "import sys, forebay\nloader = forebay.Loader(sys.argv[1], seq_len=32, batch_size=4, num_threads=4)\n"
    done = run_python(program + EXITS[how] + "\n", corpus, timeout=60)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_break_and_drop_stop_the_threads(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS, num_threads=2) as loader:
        next(iter(loader))
    before = os_threads()
    for _ in range(5):
        loader = open_loader(corpus, SETTINGS, num_threads=8)
        for step, _ in enumerate(loader):
            if step == 3:
                break
        del loader, _
    wait_until(lambda: os_threads() <= before, "threads of dropped loaders end")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_threads_start_at_the_first_next_and_end_at_close(corpus: Path) -> None:
    with open_loader(corpus, SETTINGS) as loader:
        next(iter(loader))
    before = os_threads()
    loader = open_loader(corpus, SETTINGS, num_threads=4)
    iterators = [iter(loader) for _ in range(10)]
    # The system lists a thread for a moment after it was joined.
    wait_until(lambda: os_threads() <= before, "no thread is started by iter()")
    next(iterators[0])
    loader.close()
    wait_until(lambda: os_threads() <= before, "all threads end at close()")


def test_close_from_another_thread_ends_a_waiting_next(slow_corpus: Path) -> None:
    import forebay

    loader = open_loader(slow_corpus, Settings(seq_len=1 << 18, batch_size=4), num_threads=1, prefetch_batches=1)
    outcome: list[str] = []

    def consume() -> None:
        try:
            while True:
                for _ in loader:
                    pass
        except forebay.ForebayError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=consume)
    thread.start()
    time.sleep(0.05)
    loader.close()
    thread.join(30)
    assert not thread.is_alive()
    assert outcome and "closed" in outcome[0]


@pytest.mark.parametrize("consumers", [1, 3])
def test_without_threads_the_callers_compute_every_batch(corpus: Path, consumers: int) -> None:
    with open_loader(corpus, SETTINGS, num_threads=4) as loader:
        expected = [batch["input_ids"].tobytes() for batch in loader]
    before = len(os.listdir("/proc/self/task"))
    with open_loader(corpus, SETTINGS, num_threads=0) as loader:
        batches, found, lock = iter(loader), [], threading.Lock()

        def consume() -> None:
            for batch in batches:
                with lock:
                    found.append(batch["input_ids"].tobytes())

        threads = [threading.Thread(target=consume) for _ in range(consumers - 1)]
        for thread in threads:
            thread.start()
        consume()
        for thread in threads:
            thread.join()
        stats = loader.stats()
    assert sorted(found) == sorted(expected) and (consumers > 1 or found == expected)
    assert len(stats["fill_seconds"]) == 1 and stats["fill_seconds"][0] > 0
    # Threads that opened the shards may take a moment to end.
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/task")) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
