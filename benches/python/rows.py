"""Shows the flat file of the corpus as rows, for peers that gather and widen them by NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Batch = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    batch_size: int
    seq_len: int

    def __str__(self) -> str:
        return f"B={self.batch_size} S={self.seq_len}"


def map_rows(path: Path, shape: Shape) -> np.ndarray:
    # A plain view costs less to index than a memmap object.
    flat = np.asarray(np.memmap(path, path.stem.rpartition("-")[2], "r"))
    return flat[: len(flat) // shape.seq_len * shape.seq_len].reshape(-1, shape.seq_len)


def widen(rows: np.ndarray) -> Batch:
    import torch

    return {"input_ids": torch.from_numpy(rows.astype(np.int64)), "labels": torch.from_numpy(rows.astype(np.int64))}


class IndexBatches:
    """A sampler of whole batches: one permutation per epoch, cut into arrays."""

    def __init__(self, rows: int, batch_size: int) -> None:
        self.rows, self.batch_size, self.rng = rows, batch_size, np.random.default_rng(0)

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def __iter__(self) -> Iterator[np.ndarray]:
        order = self.rng.permutation(self.rows)
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


class Rows:
    """A map-style dataset of one flat file. An index of several rows gives them as one batch."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.rows = map_rows(path, shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | np.ndarray) -> Batch:
        return widen(self.rows[index])


def as_it_is(batch: Batch) -> Batch:
    return batch
