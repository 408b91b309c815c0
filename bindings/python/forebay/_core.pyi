"""The compiled part. Private: use `forebay.Loader` and `forebay.torch`.

Errors are the exceptions of `forebay`; each has `path`, `block` and `row`, and its causes as notes.
"""

import sys
from collections.abc import Sequence
from typing import Any, final

from typing_extensions import CapsuleType

__all__ = [
    "Array",
    "Batch",
    "Batches",
    "Loader",
    "Parts",
    "SharedLoader",
    "Tensors",
    "__version__",
    "resolve",
    "run_command",
    "verdict_of_dataset",
]

__version__: str

def resolve(
    settings: Sequence[tuple[str, str]], from_env: bool
) -> tuple[dict[str, Any], dict[str, str], list[str], list[str]]:
    """Settings in force if these are given as names and texts: values, where each is from, warnings, and notes.

    `from_env`: the environment and the file may give all of them, not only operational ones and ranks.
    Raises ConfigError, with all faults listed together.
    """

def verdict_of_dataset(batches: int, wait_share: float) -> str:
    """Who waited for whom, of a loader of any dataset whose consumers waited for `wait_share` of the time."""

def run_command(arguments: Sequence[str]) -> int:
    """Runs the command line; `arguments` begin with the program's name. Returns the exit status."""

@final
class Loader:
    """A loader over one corpus. Its methods may be called from any thread; those that wait release the interpreter."""

    @staticmethod
    def open(settings: Sequence[tuple[str, str]], from_env: bool) -> Loader:
        """Opens and indexes the corpus under the settings that `resolve` gives for the same arguments.

        Raises ConfigError, NotFoundError, ReadError or DataError, with all faults listed together.
        """
    def iter(self) -> Batches:
        """A new pass, in memory of forebay's pool. It has no effect before its first `next`."""
    def iter_external(self) -> Batches:
        """A new pass, in memory that is submitted by the caller."""
    def split(self, count: int, ahead: int | None, external: bool) -> SharedLoader:
        """`count` consumers, of which each may be `ahead` batches before the slowest one; None: ``prefetch_batches``.

        `external`: batches lie in memory that is submitted by the caller. Raises ConfigError if rows cannot be dealt
        out evenly.
        """
    @property
    def len(self) -> int | None:
        """Batches of this rank in a pass; None where it has no end."""
    @property
    def num_sequences(self) -> int | None:
        """Full sequences of the present epoch, over all ranks; None where it has no end."""
    @property
    def num_tokens(self) -> int | None:
        """Tokens of the present epoch, specials included; None where it has no end."""
    @property
    def dropped_tokens(self) -> int:
        """Tokens of the present epoch that the remainder rule leaves out, over all ranks."""
    @property
    def epoch(self) -> int:
        """Epoch of the newest pass, or of the next one if that was set or restored."""
    def set_epoch(self, epoch: int) -> None:
        """The next pass begins this epoch, unless a position of it was restored and not continued yet."""
    def seek(self, epoch: int, position: int) -> None:
        """The next pass begins at `position` of `epoch`. Raises ConfigError past the epoch's end."""
    def state(self) -> list[tuple[str, int | str]]:
        """Keys and values of the position, in a fixed order."""
    def load_state(self, pairs: Sequence[tuple[str, int | str]]) -> None:
        """The next pass continues there. Raises StateMismatchError."""
    def sequences_at(self, epoch: int, position: int, n: int) -> Batch:
        """`n` rows from `position` of the epoch's order, over all ranks. Raises ConfigError past the epoch's end."""
    def batch_at(self, epoch: int, step: int, rank: int, world_size: int) -> Batch:
        """What a rank gets at a step. Raises ConfigError past the epoch's end."""
    def stats(self) -> dict[str, Any]:
        """Counters since opening. Keys end in their unit; `*_share` is a part of 1."""
    def warnings(self) -> list[str]:
        """What makes these settings slow on this corpus, with the remedy."""
    def verdict(self) -> str:
        """Who waits for whom, in one line."""
    def config(self) -> dict[str, Any]:
        """Every setting in force, by name."""
    def close(self) -> None:
        """Stops every pass and waits for its threads; nothing in a forked child."""

@final
class Batches:
    """A pass over one epoch; several threads may take batches from it, each batch is given once."""

    def next(self, timeout_seconds: float | None = None) -> Batch | None:
        """Waits for the next batch; None at the end. Signals are seen while it waits.

        Raises TimeoutError, which loses no batch; DataError, ReadError or ClosedError; a failed batch fails again at
        every later call, and the next pass continues there.
        """
    def next_tensors(self, tensors: Tensors, timeout_seconds: float | None = None) -> tuple[int, dict[str, Any]] | None:
        """As ``next``, its step and its arrays as tensors."""
    def submit(self, ptr: int, nbytes: int, owner: object) -> None:
        """Memory for the next batch that has none: `nbytes` (at least `batch_bytes`) at `ptr` (a multiple of 8).

        It must stay valid while `owner` lives; `owner` is dropped with the batch, on any thread.
        """
    @property
    def batch_bytes(self) -> int:
        """Bytes of a submitted buffer."""
    @property
    def buffers_wanted(self) -> int:
        """Buffers to keep submitted and not delivered."""
    def close(self) -> None:
        """Ends the pass and waits for its threads."""

@final
class SharedLoader:
    """A loader that several consumers share. Each gets every n-th row of its batches."""

    def iter(self, consumer: int) -> Parts:
        """A new pass of a consumer, together with the others. It begins at its first `next`."""
    def set_epoch(self, consumer: int, epoch: int) -> None:
        """The consumer's next pass is of this epoch."""
    def begins_pass(self, consumer: int) -> bool:
        """Whether a pass of the consumer that begins now begins a pass of the loader."""
    def close(self, consumer: int) -> None:
        """Ends a consumer; the others go on without it."""
    def state(self) -> list[tuple[str, int | str]]:
        """Keys and values of the position after the last batch that every consumer has."""
    def restored(self) -> None:
        """The loader was given another position: every consumer continues there in its next pass."""

@final
class Parts:
    """A pass of one consumer of a split loader."""

    def next(self, timeout_seconds: float | None = None) -> Batch | None:
        """Waits for the next rows; None at the end. Signals are seen while it waits.

        Raises TimeoutError, which loses no rows and says which consumer is waited for; RuntimeError if this consumer
        was told another epoch than the others; and what `Batches.next` raises.
        """
    def buffers_missing(self) -> int:
        """Buffers to submit before the next rows are taken."""
    def batch_bytes(self) -> int:
        """Bytes of a submitted buffer."""
    def submit(self, ptr: int, nbytes: int, owner: object) -> None:
        """Memory for the next batch that has none, as `Batches.submit` takes it."""
    def close(self) -> None:
        """Takes no more of this pass: the other consumers need not wait."""

@final
class Batch:
    """A delivered batch, or the rows of one consumer in it."""

    @property
    def epoch(self) -> int:
        """Epoch it belongs to."""
    @property
    def step(self) -> int:
        """Step in the epoch, counted from 0."""
    @property
    def rows(self) -> int:
        """Rows, `batch_size` but for a short last batch."""
    @property
    def owner(self) -> Any:
        """The `owner` that its buffer was submitted with; None for memory of forebay's pool."""
    @property
    def address(self) -> int:
        """First byte of its buffer: for a submitted one, the `ptr` it was submitted with."""
    def fields(self) -> list[tuple[str, Array]]:
        """Its arrays by name."""
    def tensors(self, tensors: Tensors) -> dict[str, Any]:
        """Its arrays by name, as tensors that share its memory."""
    def layout(self) -> list[tuple[str, str, int, list[int]]]:
        """Name, dtype, offset in bytes and shape of each array in the batch's buffer."""

@final
class Tensors:
    """How a library makes its tensors, by DLPack's exchange table in C."""

    @staticmethod
    def by(api: CapsuleType) -> Tensors | None:
        """Of the ``__dlpack_c_exchange_api__`` of a tensor class; None where that is of an unknown version."""

@final
class Array:
    """A writable view of shape (rows, seq_len) or (rows,), int64 or int32; its batch's memory lives as long."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

    def __dlpack__(
        self,
        *,
        stream: object | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """A capsule without a version. Raises BufferError for another device, a stream, or a copy."""
    def __dlpack_device__(self) -> tuple[int, int]:
        """Host memory: (1, 0)."""
