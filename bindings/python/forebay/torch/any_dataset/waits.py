"""Counts the time that the consumers of a loader waited for its batches."""

from __future__ import annotations

import threading
from typing import Any

from forebay import _core


class Waits:
    """Sums over all passes of a loader.

    Each thread adds to its own sums, so that nothing is locked.
    """

    def __init__(self) -> None:
        #: Number of batches, seconds of waiting, and seconds in total, of each consumer.
        self._sums: dict[int, tuple[int, float, float]] = {}

    def add(self, waited: float, elapsed: float) -> None:
        """Counts a batch of the calling thread."""
        me = threading.get_ident()
        batches, all_waited, all_elapsed = self._sums.get(me, (0, 0.0, 0.0))
        self._sums[me] = batches + 1, all_waited + waited, all_elapsed + elapsed

    def stats(self) -> dict[str, Any]:
        """Returns the number of batches handed over, and the time that consumers waited, in
        seconds.
        """
        sums = list(self._sums.values())
        waited, elapsed = sum(one[1] for one in sums), sum(one[2] for one in sums)
        return {
            "batches": sum(one[0] for one in sums),
            "elapsed_seconds": elapsed,
            "wait_seconds": waited,
            "wait_share": waited / elapsed if elapsed > 0 else 0.0,
        }

    def verdict(self) -> str:
        """Tells in one line whether the dataset or its consumers are slower."""
        found = self.stats()
        return _core.verdict_of_dataset(found["batches"], found["wait_share"])
