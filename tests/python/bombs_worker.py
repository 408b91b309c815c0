"""Opens and reads files that claim absurd sizes, in a process with little memory.

Arguments: files. Prints one line of JSON before each file, and one after it. So the parent knows at
which file this process died.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import forebay

LIMIT_BYTES = 768 << 20
"""Memory beyond the start of the process."""
BUDGET_BYTES = 64 << 20


def outcome(path: str) -> str:
    """The error of the file, or the number of its first tokens."""
    found = 0
    settings = {"seq_len": 1, "batch_size": 64, "remainder": "short", "num_threads": 1, "memory_budget": BUDGET_BYTES}
    try:
        with forebay.Loader(path, **settings) as loader:
            for batch in loader:
                found += len(batch["input_ids"])
                if found >= 1024:
                    break
    except forebay.InternalError as error:
        return f"panic: {error}"
    except forebay.ForebayError as error:
        return f"refused: {error}"
    return f"{found} tokens"


def main() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for path in sys.stdin.read().splitlines():
        print(json.dumps({"begin": path}), flush=True)
        began = time.monotonic()
        print(json.dumps({"outcome": outcome(path)[:300], "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
