"""Tests that a wheel works where nothing but NumPy is installed.

tiny.arrow and tiny.parquet hold the tokens 0 to 999 in documents of 100; the environment has
nothing to write such files with.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
free_threaded = not getattr(sys, "_is_gil_enabled", lambda: True)()

import forebay  # noqa: E402

assert "site-packages" in forebay.__file__, forebay.__file__
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("pyarrow") is None
assert not free_threaded or not sys._is_gil_enabled(), "the import turned the GIL on"

for name in ("tiny.arrow", "tiny.parquet"):
    path = HERE / name
    with forebay.Loader(path, seq_len=50, batch_size=4) as loader:
        batches = list(loader)
        assert [batch["input_ids"].ravel().tolist() for batch in batches] == [
            list(range(at, at + 200)) for at in range(0, 1000, 200)
        ]
        state = json.loads(json.dumps(loader.state_dict()))
        assert loader.stats()["batches"] == 5
    shuffled = {"seq_len": 50, "batch_size": 2, "shuffle": True, "seed": 7, "num_threads": 2}
    with forebay.Loader(path, **shuffled) as loader:
        iterator = iter(loader)
        seen = [next(iterator) for _ in range(4)]
        state = json.loads(json.dumps(loader.state_dict()))
        rest = [batch["input_ids"].tolist() for batch in iterator]
        assert len({row[0] for batch in seen for row in batch["input_ids"].tolist()}) == 8
    with forebay.Loader(path, **shuffled) as loader:
        loader.load_state_dict(state)
        assert [batch["input_ids"].tolist() for batch in loader] == rest and len(rest) == 6
        assert loader.batch_at(3)["input_ids"].tolist() == seen[3]["input_ids"].tolist()

try:
    forebay.Loader(HERE / "missing.parquet")
except FileNotFoundError as error:
    assert "missing.parquet" in str(error)
else:
    raise AssertionError("a missing file was opened")

for command in ([Path(sys.executable).with_name("forebay")], [sys.executable, "-I", "-m", "forebay"]):
    for name in ("tiny.arrow", "tiny.parquet"):
        done = subprocess.run([*command, "check", HERE / name], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0 and re.search("tokens +1,000\n", done.stdout), done.stdout + done.stderr
damaged = Path("damaged.parquet")
damaged.write_bytes((HERE / "tiny.parquet").read_bytes()[:-20])
done = subprocess.run([sys.executable, "-m", "forebay", "check", damaged], capture_output=True, text=True, check=False)
assert done.returncode == 1 and "damaged.parquet" in done.stdout + done.stderr, done.stdout + done.stderr

assert not free_threaded or not sys._is_gil_enabled()
print(f"smoke: forebay {forebay.__version__} on Python {sys.version.split()[0]}{'t' if free_threaded else ''}: ok")
