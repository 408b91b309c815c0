"""Reads, sets and protects the random state of the process: `random`, NumPy and torch."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import threading
from types import TracebackType
from typing import Any

import numpy as np
import torch

#: Held with `OwnRandomState`. Only one thread at a time may change the random state of the process.
seeding = threading.RLock()


def to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


class OwnRandomState:
    """Puts the random state of the process back at the end of a ``with seeding, OwnRandomState()``
    block.

    This is a class because ``contextlib.contextmanager`` assigns to exceptions that pass through,
    and some refuse it.
    """

    def __enter__(self) -> None:
        self._kept = random.getstate(), np.random.get_state(), torch.get_rng_state(), _device_states()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        of_python, of_numpy, of_torch, of_devices = self._kept
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_devices is not None:
            torch.cuda.set_rng_state_all(of_devices)


def _device_states() -> Any:
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if initialized else None


def process_state() -> list[Any]:
    """Returns the random state of the process as texts and numbers."""
    version, words, gauss = random.getstate()
    of_numpy = np.random.get_state()
    assert isinstance(of_numpy, tuple)
    name, keys, *more = of_numpy
    return [to_text(torch.get_rng_state()), [version, list(words), gauss], [name, keys.tolist(), *more]]


def set_process_state(state: list[Any]) -> None:
    of_torch, (version, words, gauss), (name, keys, *more) = state
    torch.set_rng_state(from_text(of_torch))
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *more))


def seeded_process_state(seed: int) -> list[Any]:
    """Returns the random state that `seed` would give the process. The process keeps its own."""
    with seeding, OwnRandomState():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        return process_state()


def drawn_seed(generator: torch.Generator | None) -> int:
    """Draws a seed in the same way as torch's loader and RandomSampler."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def derived_seed(value: Any) -> int:
    """Derives a seed from `value` alone. JSON must be able to write `value`."""
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
