"""The random state of the process, as texts and numbers."""

from __future__ import annotations

import base64
import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


_seeding = threading.Lock()


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """What is drawn or seeded inside leaves the state of `random`, NumPy and torch as it was. One thread at a time."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with _seeding, torch.random.fork_rng(devices=devices):
        of_python, of_numpy = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def process_state() -> list[Any]:
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


def drawn_seed(generator: torch.Generator | None) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
