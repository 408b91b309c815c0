"""The compiled part of forebay. It is private: use `forebay.Loader` and `forebay.torch`.

Its functions raise the exceptions of `forebay`. Each exception has `path`, `block` and `row`, and
carries its causes as notes.
"""

import sys
from collections.abc import Sequence
from typing import Any, TypedDict, final, type_check_only

from typing_extensions import CapsuleType

__all__ = [
    "Array",
    "Batch",
    "Batches",
    "Loader",
    "Parts",
    "Settings",
    "SharedLoader",
    "Tensors",
    "__version__",
    "run_command",
    "typed",
    "verdict_of_dataset",
]

__version__: str

@type_check_only
class Torch(TypedDict):
    """The facts that torch states beside the settings. The core decides what they mean."""

    drop_last: bool
    num_workers: int
    prefetch_factor: int | None
    generator_seed: int | None
    sampler: tuple[int, int, int, bool] | None
    mesh: list[tuple[str | None, int, int]] | None
    process_group: tuple[int, int] | None

@final
class Settings:
    """The settings of a loader, resolved once."""

    def __new__(cls, given: dict[str, Any], from_env: bool = False, torch: Torch | None = None) -> Settings:
        """Resolves the settings `given` by name. ``None`` means that a setting is not given.

        With `from_env`, every setting may come from the environment or the configuration file.
        Without it, only operational settings and ranks may.

        Raises TypeError for a name or a type that no setting has. Raises ConfigError for all other
        faults, listed together.
        """
    def values(self) -> dict[str, Any]:
        """Every setting in force, by name."""
    def origins(self) -> dict[str, str]:
        """The origin of each setting, by name."""
    @property
    def warnings(self) -> list[str]:
        """Probable mistakes."""
    @property
    def notes(self) -> list[str]:
        """Assumptions that were made."""
    def arguments(self) -> tuple[dict[str, Any], bool]:
        """Returns settings that give the same loader in a process without torch, and `from_env`."""

def typed(given: dict[str, Any]) -> dict[str, Any]:
    """Checks names and types of the settings `given`, and leaves out those that are ``None``.

    The values become Python's own types, which can be pickled. Raises TypeError.
    """

def verdict_of_dataset(batches: int, wait_share: float) -> str:
    """Tells in one line whether the consumers or the dataset are slower.

    `batches` counts the delivered batches of a loader of any dataset. `wait_share` is the part of
    the time that its consumers waited, from 0 to 1.
    """

def run_command(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status.

    `arguments` begin with the name of the program.
    """

@final
class Loader:
    """A loader over one corpus.

    Any thread may call its methods. Methods that wait release the interpreter.
    """

    @staticmethod
    def open(settings: Settings, can_pin: bool) -> Loader:
        """Opens and indexes the corpus under `settings`.

        `can_pin` says whether batches can lie in page-locked memory.

        Raises ConfigError, NotFoundError, ReadError or DataError, which lists all faults together.
        """
    def iter(self, external: bool) -> Batches:
        """Makes a new pass, which begins at its first `next`. Until then it has no effect.

        With `external`, batches lie in memory that the caller submits. Otherwise they lie in memory
        of forebay's pool.
        """
    def split(self, count: int, ahead: int | None, external: bool) -> SharedLoader:
        """Shares the loader among `count` consumers.

        A consumer may be at most `ahead` batches before the slowest consumer; None means
        ``prefetch_batches``. With `external`, batches lie in memory that the caller submits.

        Raises ConfigError if the rows of a batch cannot be dealt out evenly.
        """
    @property
    def len(self) -> int | None:
        """Batches of this rank in a pass. None if the pass has no end."""
    @property
    def num_sequences(self) -> int | None:
        """Full sequences of the present epoch, over all ranks. None if the epoch has no end."""
    @property
    def num_tokens(self) -> int | None:
        """Tokens of the present epoch, special ids included. None if the epoch has no end."""
    @property
    def dropped_tokens(self) -> int:
        """Tokens of the present epoch that `remainder` leaves out, over all ranks."""
    @property
    def epoch(self) -> int:
        """Epoch of the newest pass.

        After `set_epoch`, `seek` or `load_state` it is the epoch of the next pass.
        """
    def set_epoch(self, epoch: int) -> None:
        """Lets the next pass begin this epoch.

        A restored position of this epoch stays in force until a pass has continued it.
        """
    def seek(self, position: int, epoch: int | None) -> None:
        """Lets the next pass begin at `position` of `epoch`. None means the present epoch.

        Raises ConfigError if the epoch has fewer positions.
        """
    def state(self) -> list[tuple[str, int | str]]:
        """Returns the position of the newest pass as keys and values, in a fixed order."""
    def load_state(self, pairs: Sequence[tuple[str, int | str]]) -> None:
        """Lets the next pass continue at a position that `state` returned.

        Raises StateMismatchError if the position belongs to another corpus or to other content
        settings.
        """
    def sequences_at(self, epoch: int, position: int, n: int) -> Batch:
        """Returns `n` rows of the epoch's order, from `position` on, over all ranks.

        Raises ConfigError if the epoch has fewer positions.
        """
    def batch_at(self, step: int, epoch: int | None, rank: int | None, world_size: int | None) -> Batch:
        """Returns the batch that a rank gets at a step of the pass that begins with `epoch`.

        None means this loader's epoch, rank or number of ranks. Raises ConfigError if the pass has
        fewer steps.
        """
    def stats(self) -> dict[str, Any]:
        """Returns counters since the loader was opened.

        A key ends in its unit. Values of `*_share` lie between 0 and 1.
        """
    def plan(self) -> tuple[str, str]:
        """Returns the plan of a pass as JSON, and as lines of text."""
    def warnings(self) -> list[str]:
        """Lists what makes these settings slow on this corpus, each with its remedy."""
    def verdict(self) -> str:
        """Tells in one line whether the loader or its consumers are slower."""
    def config(self) -> dict[str, Any]:
        """Returns every setting in force, by name."""
    def close(self) -> None:
        """Stops every pass and waits for its threads. In a forked child it does nothing."""

@final
class Batches:
    """A pass over one or several epochs.

    Several threads may take batches from it. Each batch is given to only one of them.
    """

    def next(self, timeout_seconds: float | None = None) -> Batch | None:
        """Waits for the next batch and returns it. Returns None at the end.

        The method checks for signals while it waits. `timeout_seconds` limits the wait; None means
        no limit.

        Raises TimeoutError, which loses no batch, and ClosedError. Raises DataError or ReadError
        for a batch that failed. Every later call then raises the same error, and the next pass
        continues at that batch.
        """
    def next_tensors(self, tensors: Tensors, timeout_seconds: float | None = None) -> tuple[int, dict[str, Any]] | None:
        """Waits as ``next`` does, and returns the step of the batch and its arrays as tensors."""
    def submit(self, ptr: int, nbytes: int, owner: object) -> None:
        """Gives memory to the next batch that has none.

        The memory begins at address `ptr`, a multiple of 8, and has `nbytes` bytes, at least
        `batch_bytes`. It must stay valid while `owner` lives. `owner` is dropped with the batch, on
        any thread.
        """
    @property
    def batch_bytes(self) -> int:
        """Smallest size of a submitted buffer, in bytes."""
    @property
    def buffers_wanted(self) -> int:
        """Number of buffers that should be submitted and not yet delivered at any time."""
    def close(self) -> None:
        """Ends the pass and waits for its threads."""

@final
class SharedLoader:
    """A loader that several consumers share. Each consumer gets every n-th row of its batches."""

    def iter(self, consumer: int) -> Parts:
        """Makes the next pass of a consumer. All consumers take part in the same pass of the
        loader.

        The pass begins at its first `next`.
        """
    def set_epoch(self, consumer: int, epoch: int) -> None:
        """Lets the next pass of the consumer begin this epoch."""
    def begins_pass(self, consumer: int) -> bool:
        """Tells whether a pass that the consumer begins now also begins a pass of the loader."""
    def close(self, consumer: int) -> None:
        """Ends a consumer. The others go on without it."""
    def state(self) -> list[tuple[str, int | str]]:
        """Returns the position after the last batch that every consumer has, as keys and values."""
    def restored(self) -> None:
        """Tells the consumers that the loader has a new position.

        Every consumer continues there in its next pass.
        """

@final
class Parts:
    """A pass of one consumer of a shared loader."""

    def next(self, timeout_seconds: float | None = None) -> Batch | None:
        """Waits for the next rows of this consumer and returns them. Returns None at the end.

        The method checks for signals while it waits. `timeout_seconds` limits the wait; None means
        no limit.

        Raises TimeoutError, which loses no rows and names the consumer that the others wait for.
        Raises RuntimeError if this consumer was told another epoch than the others. Raises the
        errors of `Batches.next` as well.
        """
    def buffers_missing(self) -> int:
        """Returns the number of buffers to submit before the next rows can be taken."""
    def batch_bytes(self) -> int:
        """Returns the smallest size of a submitted buffer, in bytes."""
    def submit(self, ptr: int, nbytes: int, owner: object) -> None:
        """Gives memory to the next batch that has none, like `Batches.submit`."""
    def close(self) -> None:
        """Ends this consumer's part in the pass. The other consumers no longer wait for it."""

@final
class Batch:
    """A delivered batch, or the rows of one consumer in it."""

    @property
    def epoch(self) -> int:
        """Epoch of the batch."""
    @property
    def step(self) -> int:
        """Step of the batch in its epoch, from 0."""
    @property
    def rows(self) -> int:
        """Number of rows: `batch_size`, or fewer in a short last batch."""
    @property
    def owner(self) -> Any:
        """The `owner` that the buffer was submitted with. None for memory of forebay's pool."""
    @property
    def address(self) -> int:
        """Address of the first byte of the buffer. For a submitted buffer it is the given `ptr`."""
    def fields(self) -> list[tuple[str, Array]]:
        """Returns the arrays with their names."""
    def tensors(self, tensors: Tensors) -> dict[str, Any]:
        """Returns the facts and the arrays by name, as tensors that share the batch's memory."""
    def facts(self) -> dict[str, Any] | None:
        """Returns the values outside arrays, by name: `max_seqlen`, and strings of documents. None
        if there are none.
        """
    def beside(self) -> list[tuple[str, Array]]:
        """Returns the arrays that lie beside the buffer, with their names: numbers of documents."""
    def layout(self) -> list[tuple[str, str, int, list[int]]]:
        """Returns name, dtype, offset in bytes, and shape of each array in the buffer."""

@final
class Tensors:
    """Makes tensors of a library through DLPack's exchange table in C."""

    @staticmethod
    def by(api: CapsuleType) -> Tensors | None:
        """Reads the ``__dlpack_c_exchange_api__`` of a tensor class.

        Returns None if the version of the table is unknown.
        """

@final
class Array:
    """A writable view of one array of a batch, with shape (rows, seq_len) or (rows,).

    The memory of the batch lives as long as its views.
    """

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
        """Returns a capsule of the unversioned form.

        Raises BufferError if a stream, a copy or another device than host memory is asked for.
        """
    def __dlpack_device__(self) -> tuple[int, int]:
        """Returns (1, 0), the number of host memory in DLPack."""
