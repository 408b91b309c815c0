"""Answers ``torch.utils.data.get_worker_info()`` for threads. README.md beside this file describes
the patch.

Only ``answer_per_thread`` changes something of torch. ``undo`` takes that back.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils import collate as torch_collate
from torch.utils.data._utils import worker as torch_worker

from forebay.torch.any_dataset.random_state import OwnRandomState, seeding

#: `here.info` is the answer for the calling thread, where the thread belongs to a loader of
#: forebay.
here = threading.local()

_patching = threading.RLock()
_original: CodeType | None = None


def answer_per_thread() -> None:
    """Makes ``get_worker_info`` answer for the calling thread.

    The function reads a global of its module, and other modules hold the function itself. So its
    code is replaced, which reaches all of them.
    """
    global _original
    with _patching:
        if _original is None:
            torch_worker._forebay_worker_info = _of_thread  # type: ignore[attr-defined]
            _original = torch_worker.get_worker_info.__code__
            torch_worker.get_worker_info.__code__ = _replacement.__code__


def undo() -> None:
    """Gives ``get_worker_info`` its own code back. Loaders with threads must not be iterating
    meanwhile.
    """
    global _original
    with _patching:
        if _original is not None:
            torch_worker.get_worker_info.__code__ = _original
            del torch_worker._forebay_worker_info  # type: ignore[attr-defined]
            _original = None


def _replacement():  # type: ignore[no-untyped-def]
    # These globals are those of torch's module: only the code moves there.
    return _forebay_worker_info()  # type: ignore[name-defined]  # noqa: F821


def _of_thread() -> Any:
    info = getattr(here, "info", None)
    if info is None:
        return torch_worker._worker_info
    # For a worker, torch stacks tensors into shared memory, which costs a file for each tensor of a
    # batch. Threads need none of that: this caller alone is told that there is no worker.
    if sys._getframe(2).f_code is torch_collate.collate_tensor_fn.__code__:
        return None
    return info


def make_worker_info(worker: int, count: int, base_seed: int, dataset: Any) -> torch_worker.WorkerInfo:
    """Makes the answer for thread `worker` of `count`, with the fields that this version of torch
    has.
    """
    known = getattr(torch_worker.WorkerInfo, "__dataclass_fields__", ())
    more: dict[str, Any] = {"worker_method": "thread"} if "worker_method" in known else {}
    seed = base_seed + worker
    if "rng" in known:
        words = torch_worker._generate_state(base_seed, worker)  # type: ignore[no-untyped-call]
        more["rng"] = torch_worker._RNG(
            random_generator=random.Random(seed),
            torch_generator=torch.Generator().manual_seed(seed),
            numpy_generator=np.random.default_rng(words),
        )
    return torch_worker.WorkerInfo(id=worker, num_workers=count, seed=seed, dataset=dataset, **more)


def run_init_fn(init_fn: Callable[[int], None], worker: int, base_seed: int) -> None:
    """Runs `init_fn` with the random state that torch gives a worker process, and puts the
    process's own back.
    """
    with seeding, OwnRandomState():
        random.seed(base_seed + worker)
        torch.manual_seed(base_seed + worker)
        np.random.seed(torch_worker._generate_state(base_seed, worker))  # type: ignore[no-untyped-call]
        init_fn(worker)
