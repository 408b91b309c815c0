"""Tests that memory and descriptors stay flat in long runs.

With `--stress` a run has 10^6 batches, or 10^3 epochs of a small corpus with a resume in each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from support import run_python

pytestmark = [
    pytest.mark.hostile,
    pytest.mark.thread_unsafe(reason="it measures the memory of a process of its own"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read in /proc"),
]

#: Growth that allocators and tables of the interpreter may show, in bytes.
NOISE_BYTES = 4 << 20

MEASURES = """
    import gc, json, os, sys
    import forebay

    def measured():
        gc.collect()
        pages = int(open("/proc/self/statm").read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    path, count, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    noise = int(sys.argv[4])

    def flat(samples):
        # The first quarter fills caches and pools.
        rest = samples[len(samples) // 4 :]
        grown = rest[-1][0] - rest[0][0]
        assert grown < noise, (grown, samples)
        assert rest[-1][1:] <= rest[0][1:], samples
"""
BATCHES = (
    MEASURES
    + """
    loader = forebay.Loader(path, epochs="endless", **settings)
    samples, tokens = [], 0
    for step, batch in enumerate(loader):
        tokens += int(batch["input_ids"][0, 0])
        if step % (count // 20) == 0:
            samples.append(measured())
        if step == count:
            break
    loader.close()
    flat(samples)
    print(step, tokens, samples[-1])
"""
)
EPOCHS = (
    MEASURES
    + """
    samples, state, seen = [], None, set()
    for epoch in range(count):
        loader = forebay.Loader(path, **settings)
        if state is not None:
            loader.load_state_dict(state)
        first = None
        for batch in loader:
            first = first or batch["input_ids"].tobytes()
        seen.add(first)
        state = loader.state_dict()
        assert len(json.dumps(state)) < 4096
        if epoch % 3:
            loader.close()
        if epoch % (count // 20) == 0:
            del loader, batch
            samples.append(measured())
    flat(samples)
    assert len(seen) > count * 0.9, "epochs repeat an order"
    print(len(seen), samples[-1])
"""
)


@pytest.fixture(scope="module", params=["parquet", "arrow"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("long"), request.param, 40_000, shards=4)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("more", ["{}", '{"layout": "pack", "boundaries": true}'], ids=["concat", "pack"])
def test_many_batches_take_no_more_memory_and_files(corpus: Path, stress: bool, more: str) -> None:
    settings = '{"seq_len": 32, "batch_size": 2, "num_threads": 2, "shuffle": true, ' + more.strip("{}") + "}"
    count = 1_000_000 if stress else 20_000
    run_python(BATCHES, corpus, count, settings.replace(", }", "}"), NOISE_BYTES, timeout=3500)


@pytest.mark.timeout(3600)
def test_many_epochs_and_resumes_take_no_more_memory_and_files(corpus: Path, stress: bool) -> None:
    settings = '{"seq_len": 64, "batch_size": 16, "num_threads": 2, "shuffle": true}'
    count = 1000 if stress else 60
    run_python(EPOCHS, corpus, count, settings, NOISE_BYTES, timeout=3500)
