"""Gives one pass to eight consumers in one process, each in a thread of its own.

    python3.14t examples/eight_consumers.py [FOLDER]

The consumers share one loader: its threads, its mapped files and its decoded blocks. On
free-threaded Python their own work runs in parallel, too. On other Pythons they take turns.
"""

import sys
import threading
from pathlib import Path

import numpy as np

import small
from forebay import Loader

CONSUMERS, ROWS = 8, 16


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else "out/eight")
    corpus = small.documents(folder / "corpus")
    sums = np.zeros(CONSUMERS, np.int64)
    rows = np.zeros(CONSUMERS, np.int64)

    def consume(number: int, part: object) -> None:
        for batch in part:  # type: ignore[attr-defined]
            sums[number] += batch["input_ids"].sum()
            rows[number] += len(batch["input_ids"])

    with Loader(corpus, seq_len=64, batch_size=ROWS, shuffle=True) as loader:
        threads = [
            threading.Thread(target=consume, args=(number, part)) for number, part in enumerate(loader.split(CONSUMERS))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Loader(corpus, seq_len=64, batch_size=ROWS, shuffle=True) as loader:
        wanted = sum(int(batch["input_ids"].sum()) for batch in loader)
        batches = len(loader)

    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"{CONSUMERS} consumers, {'with' if gil else 'without'} a GIL; rows of each: {rows.tolist()}")
    if sums.sum() != wanted or set(rows.tolist()) != {batches * ROWS // CONSUMERS}:
        sys.exit(f"expected a sum of {wanted} and equal shares, found {sums.sum()}")
    print("together they had every row of the pass, each in equal shares")


if __name__ == "__main__":
    main()
