"""Shows the idea in a minute, without torch: exact order, exact resume, other ranks, and a proof.

    python examples/quick.py [FOLDER]

The corpus is Python's own standard library, a byte for a token. It goes to FOLDER, `out/quick` by
default. The program ends with status 1 if a claim does not hold.
"""

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forebay import Loader

SETTINGS = {"seq_len": 512, "shuffle": True, "seed": 7, "eos_id": 256}


def claim(holds: bool, text: str) -> None:
    if not holds:
        sys.exit(f"quick: FAILED: {text}")
    print(f"   holds: {text}", flush=True)


def write_corpus(folder: Path) -> int:
    """Writes the sources of the standard library as Parquet. Returns the number of documents."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    documents = [np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16) for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        table = pa.table({"input_ids": documents[shard::4]})
        pq.write_table(table, folder / f"part-{shard}.parquet", compression="zstd")
    return len(documents)


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else "out/quick") / "corpus"
    print(f"== A corpus in {folder}")
    documents = write_corpus(folder)

    with Loader(folder, batch_size=16, num_threads=1, **SETTINGS) as loader:
        print(f"   {documents} documents, {loader.num_tokens:,} tokens, {len(loader)} batches of 16 rows\n")

        print("== One epoch on one rank, with 1 thread and with 4")
        whole = [batch["input_ids"].copy() for batch in loader]
    with Loader(folder, batch_size=16, num_threads=4, **SETTINGS) as loader:
        again = [batch["input_ids"].copy() for batch in loader]
    claim(all(map(np.array_equal, whole, again)), f"all {len(whole)} batches are the same, byte for byte")

    print("\n== A run that stops in the middle, and goes on with two ranks")
    stop = len(whole) // 2
    with Loader(folder, batch_size=16, **SETTINGS) as loader:
        batches = iter(loader)
        for _ in range(stop):
            next(batches)
        state = loader.state_dict()
    print(f"   the state: position {state['position']} of epoch {state['epoch']}, {len(str(state))} characters in all")
    start = time.perf_counter()
    ranks = [Loader(folder, batch_size=8, dp_rank=rank, dp_world_size=2, **SETTINGS) for rank in range(2)]
    parts = []
    for loader in ranks:
        loader.load_state_dict(state)
        parts.append([batch["input_ids"].copy() for batch in loader])
        loader.close()
    milliseconds = (time.perf_counter() - start) * 1e3
    merged = [np.stack(pair, axis=1).reshape(16, -1) for pair in zip(*parts, strict=True)]
    claim(
        len(merged) == len(whole) - stop and all(map(np.array_equal, merged, whole[stop:])),
        f"two ranks of 8 rows give the other {len(merged)} batches, row for row ({milliseconds:.0f} ms in all)",
    )

    print("\n== Proof that each token comes once, by code that shares nothing with the loader")
    options = ["--seq-len", "512", "--batch-size", "16", "--shuffle", "--set", "seed=7", "--set", "eos_id=256"]
    command = [sys.executable, "-m", "forebay", "verify", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    print("".join(f"   {line}\n" for line in done.stdout.splitlines()), end="")
    claim(done.returncode == 0, "`forebay verify` agrees")


if __name__ == "__main__":
    main()
