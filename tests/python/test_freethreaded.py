"""Tests that free-threaded CPython stays free-threaded, and that consumers run in parallel."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from support import clean_environment, run_python

pytestmark = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded interpreter, such as python3.14t"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("free") / "corpus", "parquet", 400_000, shards=2)


def test_the_import_leaves_the_gil_off() -> None:
    program = """
    import sys
    assert not sys._is_gil_enabled(), "the interpreter began with the GIL"
    import forebay
    assert not sys._is_gil_enabled(), "the import turned the GIL on"
    """
    env = clean_environment()
    env.pop("PYTHON_GIL", None)
    done = run_python(program, env=env)
    assert done.stderr == ""


def test_using_it_leaves_the_gil_off(corpus: Path) -> None:
    program = """
    import sys
    import forebay
    with forebay.Loader(sys.argv[1], seq_len=64, batch_size=4, num_threads=2) as loader:
        assert sum(1 for _ in loader) == len(loader)
    assert not sys._is_gil_enabled()
    """
    run_python(program, corpus)


PARALLEL = """
import sys, threading
import numpy as np
import forebay

path, consumers = sys.argv[1], 8
with forebay.Loader(path, seq_len=64, batch_size=4, shuffle="block", chunk_tokens=4096, num_threads=4) as loader:
    for epoch in range(3):
        seen = np.zeros(400_000, dtype=np.int64)
        lock = threading.Lock()
        iterator = iter(loader)
        start = threading.Barrier(consumers)
        failures = []

        def consume():
            try:
                start.wait()
                mine = [batch["input_ids"] for batch in iterator]
                loader.state_dict(), loader.stats(), len(loader)
                with lock:
                    for ids in mine:
                        np.add.at(seen, ids.ravel(), 1)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=consume) for _ in range(consumers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert seen.max() == 1
        assert seen.sum() == len(loader) * 4 * 64
assert not sys._is_gil_enabled()
"""


def test_parallel_consumers_get_each_batch_once(corpus: Path) -> None:
    run_python(PARALLEL, corpus)


CHURN = """
import sys, threading
import forebay

loader = forebay.Loader(sys.argv[1], seq_len=64, batch_size=4, num_threads=2)
failures = []

def churn(which):
    try:
        for turn in range(20):
            if which == 0:
                for step, batch in zip(range(5), loader):
                    batch["input_ids"].sum()
            elif which == 1:
                loader.load_state_dict(loader.state_dict())
            elif which == 2:
                loader.batch_at(turn)["labels"].sum()
            else:
                with forebay.Loader(sys.argv[1], seq_len=64, num_threads=1) as other:
                    next(iter(other))
    except BaseException as error:
        failures.append((which, error))

threads = [threading.Thread(target=churn, args=(which,)) for which in range(4) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
loader.close()
"""


def test_methods_of_one_loader_may_be_called_in_parallel(corpus: Path) -> None:
    run_python(CHURN, corpus)
