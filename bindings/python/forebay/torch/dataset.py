"""The sequences of a corpus as a map-style dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt
from torch.utils.data import Dataset

from forebay import _core
from forebay._loader import Data, finite, settings_of
from forebay.torch.tensors import Tensors, tensors_of


class TokenDataset(Dataset[Tensors]):
    """Sequences of a corpus, in corpus order: ``dataset[i]`` is a dict of 1-D tensors of ``seq_len`` tokens.

    Opened at its first use in each process, so that it can be pickled and forked. The arguments are those of
    ``forebay.Loader``.
    """

    def __init__(
        self,
        data: Data | None = None,
        *,
        mixture: Mapping[str, Any] | str | None = None,
        format: Literal["auto", "parquet", "arrow"] | None = None,
        token_column: str | None = None,
        seq_len: int | None = None,
        targets: Literal["labels", "shifted"] | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        holdout: int | None = None,
        split: Literal["train", "holdout"] | None = None,
        input_dtype: npt.DTypeLike | None = None,
        memory_budget: int | None = None,
        block_tokens: int | None = None,
        io: Literal["auto", "mmap", "pread"] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        settings = dict(
            mixture=mixture,
            format=format,
            token_column=token_column,
            seq_len=seq_len,
            targets=targets,
            bos_id=bos_id,
            eos_id=eos_id,
            holdout=holdout,
            split=split,
            input_dtype=input_dtype,
            memory_budget=memory_budget,
            block_tokens=block_tokens,
            io=io,
            cache_dir=cache_dir,
        )
        self._pairs = settings_of(data, settings)
        self._opened: tuple[int, _core.Loader] | None = None

    def _core(self) -> _core.Loader:
        process = os.getpid()
        if self._opened is None or self._opened[0] != process:
            alone = dict(shuffle=False, batch_size=1, dp_rank=0, dp_world_size=1, remainder="drop", prefetch_batches=1)
            self._opened = process, _core.Loader.open(self._pairs + settings_of(None, alone), False)
        return self._opened[1]

    def __len__(self) -> int:
        """Full sequences of the corpus."""
        return finite(self._core().num_sequences)

    def __getitem__(self, index: int) -> Tensors:
        """Sequence ``index``: ``input_ids`` and ``labels``, or ``x`` and ``y``."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensors]:
        """Several sequences at once; neighbours are read together."""
        core, length = self._core(), len(self)
        rows: list[Tensors] = []
        at = 0
        while at < len(indices):
            first = int(indices[at])
            if not -length <= first < length:
                raise IndexError(f"sequence {first} is asked for, the corpus has {length}")
            first %= length
            n = 1
            while at + n < len(indices) and indices[at + n] == first + n < length:
                n += 1
            batch = tensors_of(core.sequences_at(0, first, n))
            rows.extend({name: tensor[row] for name, tensor in batch.items()} for row in range(n))
            at += n
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
