"""The loader that gives batches as dicts of NumPy arrays."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, cast, overload

import numpy as np
import numpy.typing as npt

from forebay import _core
from forebay._errors import ClosedError, ConfigError
from forebay._formats import Format, NumPy, format_of
from forebay._shown import Plan, Stats, data_text, size_text, table
from forebay._split import Consumer, Split
from forebay._transform import Taken, Transform, Transformed, default_threads, transformed

if TYPE_CHECKING:
    from typing_extensions import TypeVar, Unpack

    from forebay import batches
    from forebay._keywords import LoaderKeywords

    B = TypeVar("B", default=batches.Batch)
else:
    from typing import TypeVar

    B = TypeVar("B")

Data = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
#: Ranges of positions: ``(start, end)`` in epoch 0, or ``(epoch, start, end)``.
Skip = str | Sequence[tuple[int, int] | tuple[int, int, int]]
Arrays = dict[str, npt.NDArray[Any]]

_logger = logging.getLogger("forebay")
_LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
_once = threading.RLock()
_level_is_set = False
_said: set[str] = set()


def first_time(text: str) -> bool:
    """Tells whether this process logs `text` for the first time.

    A program may open many loaders, but should tell its user only once.
    """
    with _once:
        if text in _said:
            return False
        _said.add(text)
        return True


def _set_log_level() -> None:
    """Applies ``FOREBAY_LOG`` once. A level that the program sets later stays."""
    global _level_is_set
    with _once:
        found = os.environ.get("FOREBAY_LOG", "")
        if _level_is_set or not found:
            return
        level = _LEVELS.get(found.strip().lower())
        if level is None:
            raise ConfigError(f"`FOREBAY_LOG` must be error, warn, info or debug, found `{found}`")
        _logger.setLevel(level)
        # The last resort of `logging` shows nothing below a warning.
        handler = logging.StreamHandler()
        handler.addFilter(lambda _: not logging.getLogger().handlers)
        _logger.addHandler(handler)
        _level_is_set = True


def log_notes(warnings: Sequence[str], notes: Sequence[str], rank: int | None) -> None:
    """Logs each text once per process.

    All ranks have the same notes, so that only the first rank logs them.
    """
    _set_log_level()
    for text in [*warnings, *(() if rank else notes)]:
        if first_time(text):
            _logger.warning("%s", text)


def tell(level: str, text: str) -> None:
    """Logs a notice of the core. The core calls this in the threads that ask it for batches."""
    _set_log_level()
    _logger.log(_LEVELS[level], "%s", text)


class Handed:
    """The position after the batches that were handed over. Batches that are ahead do not count."""

    def __init__(self, state: Any) -> None:
        self.state = state


class Batches(Generic[B]):
    """A pass over one or several epochs, which gives batches as dicts of NumPy arrays.

    It begins at its first ``next()``. Several threads may take batches from it.
    """

    def __init__(self, loader: Loader[B]) -> None:
        self._loader = loader  # its end closes the pass
        self._core = core = loader._open_core().iter(external=False)
        self._format = loader._format
        self._transformed: Transformed | None = None
        if loader._transform is not None:
            make = functools.partial(_taken, core, loader._format)
            self._transformed = loader._transformed(make, core)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> B:
        if self._transformed is not None:
            found = self._transformed.take()
            if found is None:
                raise StopIteration
            return cast(B, found[1])
        batch = self._core.next()
        if batch is None:
            raise StopIteration
        arrays = _arrays(batch)
        # A call of a function here would cost as much as the hand-over of an array.
        return arrays if self._format is None else self._format(arrays)  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the pass and its threads. Batches that were handed over stay valid."""
        self._core.close()
        if self._transformed is not None:
            self._transformed.close()


def _taken(core: _core.Batches, format: Format | None) -> Taken | None:
    batch = core.next()
    if batch is None:
        return None
    arrays = _arrays(batch)
    return Taken(batch.epoch, batch.step, arrays if format is None else format(arrays))


def _arrays(batch: _core.Batch) -> Arrays:
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in batch.fields()}
    facts = batch.facts()
    if facts is not None:
        arrays.update(facts)
    return arrays


class Loader(Generic[B]):
    """Gives batches of token sequences from Parquet and Arrow shards.

    A batch is a dict of NumPy arrays of shape ``(batch_size, seq_len)``: ``input_ids`` and
    ``labels``, or ``x`` and ``y``. They are int64, or int32 for inputs on request. The arrays may
    be changed, and stay valid for as long as they are held.

    Seed and epoch decide the order of the batches. Every argument is a setting, and None means that
    it is not given. Settings that are not given have these values:

    - Operational settings come from environment variables ``FOREBAY_<NAME>``, or from the file that
      ``FOREBAY_CONFIG`` names.
    - Ranks come from the same places, or from the launcher.
    - All others have their defaults.

    ``transform`` is a function that takes a batch and returns another. It runs on
    ``transform_threads`` Python threads of its own, between the loader and the consumer. Batches
    stay in order.

    ``Loader.config`` and ``Loader.origins`` show the result. ``Loader.from_env`` takes every
    setting from the environment.

    Parameters
    ----------
    data:
        The corpus: a file, a folder, a glob pattern, or a list of these, in order.
    mixture:
        Several corpora with weights, in place of `data`. It has `sources` (each with `name`,
        `data`, `weight`, and `epochs` as a limit), `stages` that change the weights, and
        `exhausted`, the rule for a source that has ended. Default: none. Accepted: sources, weights
        and stages as JSON, or `none`.
    format:
        Expected format of the files. `auto`: The content of the files tells the format. `parquet`:
        Parquet only. `arrow`: Arrow IPC file or stream only. `npy`: NumPy arrays only. `llm.c`:
        Files of llm.c only. `megatron`: Megatron's pairs only. `datatrove`: Files of datatrove
        only. `raw`: Ids without a header only. Default: auto. Accepted: `auto`, `parquet`, `arrow`,
        `npy`, `llm.c`, `megatron`, `datatrove` or `raw`.
    token_column:
        Column that holds the tokens. `none` takes the first of `input_ids`, `tokens`, `token_ids`
        and `ids` that has lists of ids. If none has lists, it takes the first with an id in each
        row. Default: none. Accepted: a column's name, or `none`.
    fields:
        Further columns to deliver. A column of lists has one value for each token: labels, masks,
        weights, or any numbers. `labels` replace the labels made of the tokens. In padding,
        `labels` are `ignore_index` and all other columns are 0. A column of numbers or strings has
        one value for each document, and a batch one for each stretch in `cu_seqlens`. Default:
        none. Accepted: up to 8 columns, each once and none called `input_ids`, `x`, `y`, `source`,
        `sample_index`, or `none`.
    bin_dtype:
        Type of the ids in raw files, which have no header that says it. Files of all other formats
        say it themselves. Default: none. Accepted: `uint8`, `uint16`, `uint32`, `int32`, `int64`,
        `int8` or `int16`, or `none`.
    vocab_size:
        Number of ids of the tokenizer. A batch with another id is an error with file, block and
        row. `none` checks only that no id is negative. Default: none. Accepted: an integer from 1
        to 2^31, or `none`.
    document_end_id:
        Last id of each document in files of ids without document lengths: raw files, files of
        llm.c, and NumPy arrays of a single axis. It belongs to the document that it ends. `none`
        makes each of these files a single document, which only `concat` takes. Default: none.
        Accepted: an id below 2^31, or `none`.
    seq_len:
        Tokens per sequence. Default: 2048. Accepted: a number of tokens from 1 to 2^32.
    targets:
        Arrays of a batch. `labels`: `input_ids` and `labels` at the same positions. The model
        shifts them, as in Hugging Face's models. `shifted`: `x` and `y`, one token apart in
        `seq_len + 1` tokens. Neighbouring sequences overlap by one token. Default: labels.
        Accepted: `labels` or `shifted`.
    ignore_index:
        Label of places that are no target, such as padding. Give the same number to the loss.
        Values of a column `labels` are delivered as they are stored. Default: -100. Accepted: an
        integer of 64 bits.
    bos_id:
        Id put before every non-empty document. Default: none. Accepted: an id below 2^31, or
        `none`.
    eos_id:
        Id put after every non-empty document. Default: none. Accepted: an id below 2^31, or `none`.
    layout:
        Way to make rows from documents. `concat`: All documents are joined, and the stream is cut
        into rows. `pack`: Rows hold several whole documents each. `pad`: Rows hold one document
        each. `rows`: Documents have exactly the length of a row already. Default: concat. Accepted:
        `concat`, `pack`, `pad` or `rows`.
    phase:
        Places where `concat` cuts the joined documents. `fixed`: Every epoch cuts at the same
        places. `epoch`: The cuts move from epoch to epoch. The row at the end of the corpus goes on
        at its start, so that each token still comes once. Default: fixed. Accepted: `fixed` or
        `epoch`.
    boundaries:
        Adds the starts of documents to the batch: `position_ids`, `doc_ids`, `cu_seqlens` and
        `max_seqlen`. No label then asks for the first token of a document. `none` means `true` for
        `pack`, with `packed_by`, and for columns with one value for each document. Else it means
        `false`. Default: none.
    packed_by:
        Column that says where documents begin in rows of files that were packed before. For `rows`
        and `pad`. `none`: A row of a file is one document. `seq_lengths`: The column of TRL holds
        the lengths of the documents. `seq_start_id`: The column of Megatron-Bridge holds the places
        where documents begin. `position_ids`: The column holds a position for each token. A
        document begins at each 0. Default: none. Accepted: `none`, `seq_lengths`, `seq_start_id` or
        `position_ids`.
    overflow:
        Rule for documents that are longer than a row, in `pack` and `pad`. `split`: The document is
        cut into pieces of the length of a row. The last piece may be shorter. `truncate`: The row
        takes the beginning of the document. The rest is left out. `drop`: The document is left out.
        Default: split. Accepted: `split`, `truncate` or `drop`.
    max_docs_per_row:
        Limit of documents in a row of `pack`. Default: none. Accepted: an integer from 1 to 2^31,
        or `none`.
    pack_align:
        In `pack`, every document begins at a multiple of this number. Default: 1. Accepted: an
        integer from 1 to 2^20.
    bucket:
        Sorts rows of `pad` by length, inside runs of this many positions of an epoch, so that a
        batch has rows of similar length. Needs `pad_to_multiple`. Default: none. Accepted: an
        integer from 2 to 2^24, or `none`.
    shuffle:
        Order of an epoch. `global` is one permutation of all sequences. `block` permutes chunks,
        then sequences within windows. `true` is `global` for files that are read in place, and
        `block` for files that have to be decoded. Default: false. Accepted: `true`, `false`,
        `global` or `block`.
    seed:
        Key of the order, together with the epoch. `forebay.torch.DataLoader` takes it from the
        sampler or the generator if you give none. Default: 0. Accepted: an integer from 0 to 2^64 -
        1.
    chunk_tokens:
        Tokens in a chunk. Block shuffling permutes the chunks of the corpus. Default: 4Mi.
        Accepted: a number of tokens from 1 to 2^48, such as `1Mi`.
    window_tokens:
        Tokens in the windows of all lanes together. Block shuffling permutes the sequences of a
        window. Default: 16Mi. Accepted: a number of tokens from 1 to 2^48, such as `16Mi`.
    lanes:
        Virtual shards that block shuffling interleaves. World sizes that divide it decode each
        block about once. Default: 8. Accepted: an integer from 1 to 2^20.
    holdout:
        Keeps one sequence of each run of this many out of training. The seed does not change the
        choice. Default: none. Accepted: an integer from 2 to 2^32, or `none`.
    split:
        Side of the holdout that is delivered. `train`: All sequences that are not held out.
        `holdout`: The held-out sequences. Default: train. Accepted: `train` or `holdout`.
    skip:
        Positions that are never delivered. All others keep their numbers. Default: none. Accepted:
        a list of `(start, end)` or `(epoch, start, end)`, as text `100-200,3:0-50` (epoch 0 and
        epoch 3), or `none`.
    extend:
        Continues a state of the first shards of this corpus. The new shards join at the next epoch.
        Default: false.
    batch_size:
        Sequences per rank and step. Default: 1. Accepted: an integer from 1 to 2^32.
    dp_rank:
        Data-parallel rank. `none` takes it from the launcher, else 0. Default: none. Accepted: an
        integer below `dp_world_size`, or `none`.
    dp_world_size:
        Number of data-parallel ranks. `none` takes it from the launcher, else 1. Default: none.
        Accepted: an integer from 1 to 2^32, or `none`.
    model_parallel_size:
        Neighbouring ranks of the launcher that read the same rows: tensor-, context- and
        pipeline-parallel peers. Default: 1. Accepted: an integer from 1 to 2^32.
    epochs:
        Epochs of one pass. With more than one, batches run on across their borders. Default: 1.
        Accepted: an integer from 1 to 2^32, or `endless`.
    max_steps:
        Steps after which a pass ends, counted from the start of its first epoch. Default: none.
        Accepted: an integer from 1, or `none`.
    remainder:
        Rule for the tokens and sequences at an epoch's end that fill no whole sequence or global
        batch. `drop`: They are left out, and counted. `pad`: They are delivered in full rows and
        batches, filled up with `pad_id` and ignored labels. `wrap`: They are filled up from the
        start of the epoch. `short`: The last batch has fewer rows. This is refused if a rank would
        have none. Default: drop. Accepted: `drop`, `pad`, `wrap` or `short`.
    balance:
        Rule that moves rows between ranks. It needs ranks that can read each other's rows without
        decoding more. `off`: Rows stay where the order puts them. `ranks`: The rows of each global
        batch are permuted, so that ranks get about equal sums of squared document lengths. Default:
        off. Accepted: `off` or `ranks`.
    pad_id:
        Id that fills padded rows. Their labels are `ignore_index`. Default: 0. Accepted: an id
        below 2^31.
    pad_to_multiple:
        In `pad`, a batch is as long as its longest row, rounded up to a multiple of this number.
        `none` makes all batches `seq_len` long. Default: none. Accepted: an integer from 1 to 2^20,
        or `none`.
    cu_seqlens_width:
        Length of `cu_seqlens`: further values repeat the last one. `none` gives no further values.
        Default: none. Accepted: an integer from 2 to 2^31, or `none`.
    document_mask:
        Adds `document_mask`, bool of shape `(batch_size, 1, seq_len, seq_len)`, to boundaries. It
        is true where a place may attend to a place: to itself, and to earlier places of its
        document. Default: false.
    input_dtype:
        Type of delivered input ids. Labels are always int64. Default: int64. Accepted: `int64` or
        `int32`.
    batch_format:
        Names, shapes and types of the arrays of a batch, as a trainer takes them. It decides
        `targets` if you do not set it. `none` gives the arrays that `targets` names. Default: none.
        Accepted: `hf`, `hf-packed`, `titan`, `megatron`, `olmo`, `xy` or `jax`, or `none`.
    sample_ids:
        Adds the place of each row to the batch: `source` and `sample_index`, int64 of shape
        `(batch_size,)`, -1 for padding. Default: false.
    num_threads:
        Worker threads. With 0, the thread that asks for a batch computes it. `none` takes the CPUs
        of this rank less one, from 1 to 8. Default: none. Accepted: an integer from 0 to 1024, or
        `none`.
    cpu_affinity:
        CPUs that worker threads may run on, as `0,2-5` or a list. Linux only. `none` allows all
        CPUs of the process. Default: none. Accepted: CPUs such as `0,2-5`, or `none`.
    thread_priority:
        Number added to the `nice` value of worker threads, so that they take less from a trainer on
        the same CPUs. Linux only. Default: 0. Accepted: an integer from 0 to 19.
    prefetch_batches:
        Batches computed ahead of the consumer. Default: 4. Accepted: an integer from 1 to 65536.
    transform_threads:
        Threads that run the function `transform` of a loader. `none` takes 1 where one thread at a
        time runs Python, and else `num_threads`. Default: none. Accepted: an integer from 1 to
        1024, or `none`.
    memory_budget:
        Memory for decoded blocks and batches in flight. Default: 512MiB. Accepted: a number of
        bytes, such as `512MiB` or `1GB`.
    block_tokens:
        Approximate number of tokens in a block that is decoded at once. It never changes a batch.
        Default: 128Ki. Accepted: a number of tokens from 1 to 2^31, such as `128Ki`.
    io:
        Access to file bytes. `auto`: Files are mapped on local file systems, and read by position
        on network and FUSE ones. `mmap`: Files are always mapped. `pread`: Files are always read by
        position. Default: auto. Accepted: `auto`, `mmap` or `pread`.
    on_error:
        Rule for rows that cannot be read. `raise`: The batch of the row is an error, and so is the
        rest of the pass. `retry`: Passing errors of files are tried again for half a minute, in
        place of a second. Damage is an error. `substitute`: A damaged row is replaced by another
        row of its source. Seed, epoch and row decide which, so all ranks, restarts and numbers of
        threads choose alike. Default: raise. Accepted: `raise`, `retry` or `substitute`.
    max_substitutions:
        Rows of this rank that a loader may replace, with `on_error` = substitute. The batch with
        one more such row is an error. Default: 100. Accepted: an integer from 0 to 2^32.
    index_dir:
        Folder for the saved index of the corpus, which nodes may share. With it, shards are opened
        when they are first read. `none` takes `cache_dir`. Without both, all are opened at the
        start. Default: none. Accepted: a folder, or `none`.
    cache_dir:
        Folder on a local disk that keeps what was read from object stores. The processes of a node
        share it. Without `index_dir` it holds the saved index too. Default: none. Accepted: a
        folder, or `none`.
    cache_bytes:
        Limit of the bytes from object stores that `cache_dir` keeps. Default: 100GiB. Accepted: a
        number of bytes, such as `512MiB` or `1GB`.
    storage_endpoint:
        URL of a server that speaks the protocol of the object store, such as MinIO. `none` takes it
        from the store's own variables and files, else the store's own server. Default: none.
        Accepted: a URL, or `none`.
    storage_region:
        Region of the S3 buckets. `none` takes it from the standard variables and files. Default:
        none. Accepted: a name, or `none`.
    storage_anonymous:
        Reads public buckets without credentials. Default: false.
    storage_timeout:
        Seconds after which a request to an object store fails, all its tries included. Default:
        120. Accepted: an integer from 1 to 86400.
    storage_requests:
        Limit of the requests that a process has in flight at an object store. Default: 32.
        Accepted: an integer from 1 to 4096.
    service:
        Addresses of a service that computes the batches in place of this process: `unix:PATH`,
        `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`. If a service does not answer, the loader takes
        the next address. Batches and states are the same as without a service. Default: none.
        Accepted: addresses such as `unix:PATH`, `grpc://HOST:PORT` and `grpc+tls://HOST:PORT`, or
        `none`.
    service_timeout:
        Seconds that a loader waits for a service before it fails. It tries all addresses meanwhile.
        Default: 60. Accepted: an integer from 1 to 86400.
    service_fallback:
        Computes batches in this process while no service answers. Needs local data, and `index_dir`
        or `cache_dir`. Takes a further `memory_budget` while it does so. Default: false.
    pin_memory:
        Gives batches in page-locked memory. Only `forebay.torch.DataLoader` can do this. Default:
        false.
    delivery_log:
        Folder where every rank writes a line for each batch it hands over. `forebay verify` proves
        the run from it. Default: none. Accepted: a folder, or `none`.

    Raises
    ------
    ConfigError, NotFoundError, ReadError, DataError
        All faults that opening can find, listed together.
    """

    if TYPE_CHECKING:
        # The type of a batch follows from the settings that name its arrays.
        @overload
        def __init__(
            self: Loader[batches.Batch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Literal["labels"] | None = ...,
            batch_format: None = ...,
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[batches.ShiftedBatch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Literal["shifted"],
            batch_format: None = ...,
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[batches.HfBatch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Any = ...,
            batch_format: Literal["hf"],
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[batches.HfPackedBatch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Any = ...,
            batch_format: Literal["hf-packed"],
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[batches.TitanBatch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Any = ...,
            batch_format: Literal["titan"],
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[batches.MegatronBatch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Any = ...,
            batch_format: Literal["megatron"],
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[batches.OlmoBatch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Any = ...,
            batch_format: Literal["olmo"],
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[batches.XyBatch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Any = ...,
            batch_format: Literal["xy"],
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[batches.JaxBatch],
            data: Data | None = ...,
            *,
            fields: Iterable[batches.KnownField] | None = ...,
            targets: Any = ...,
            batch_format: Literal["jax"],
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[dict[str, Any]],
            data: Data | None = ...,
            *,
            fields: Iterable[str] | None = ...,
            targets: Any = ...,
            batch_format: Any = ...,
            transform: None = ...,
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: Loader[B],
            data: Data | None = ...,
            *,
            fields: Iterable[str] | None = ...,
            targets: Any = ...,
            batch_format: Any = ...,
            transform: Callable[[Any], B],
            **settings: Unpack[LoaderKeywords],
        ) -> None: ...

    def __init__(
        self,
        # settings: keywords, from `make generate`
        data: Data | None = None,
        *,
        mixture: Mapping[str, Any] | str | None = None,
        format: Literal["auto", "parquet", "arrow", "npy", "llm.c", "megatron", "datatrove", "raw"] | None = None,
        token_column: str | None = None,
        fields: Iterable[str] | None = None,
        bin_dtype: npt.DTypeLike | None = None,
        vocab_size: int | None = None,
        document_end_id: int | None = None,
        seq_len: int | None = None,
        targets: Literal["labels", "shifted"] | None = None,
        ignore_index: int | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        layout: Literal["concat", "pack", "pad", "rows"] | None = None,
        phase: Literal["fixed", "epoch"] | None = None,
        boundaries: bool | None = None,
        packed_by: Literal["none", "seq_lengths", "seq_start_id", "position_ids"] | None = None,
        overflow: Literal["split", "truncate", "drop"] | None = None,
        max_docs_per_row: int | None = None,
        pack_align: int | None = None,
        bucket: int | None = None,
        shuffle: bool | Literal["global", "block"] | None = None,
        seed: int | None = None,
        chunk_tokens: int | None = None,
        window_tokens: int | None = None,
        lanes: int | None = None,
        holdout: int | None = None,
        split: Literal["train", "holdout"] | None = None,
        skip: Skip | None = None,
        extend: bool | None = None,
        batch_size: int | None = None,
        dp_rank: int | None = None,
        dp_world_size: int | None = None,
        model_parallel_size: int | None = None,
        epochs: int | Literal["endless"] | None = None,
        max_steps: int | None = None,
        remainder: Literal["drop", "pad", "wrap", "short"] | None = None,
        balance: Literal["off", "ranks"] | None = None,
        pad_id: int | None = None,
        pad_to_multiple: int | None = None,
        cu_seqlens_width: int | None = None,
        document_mask: bool | None = None,
        input_dtype: npt.DTypeLike | None = None,
        batch_format: Literal["hf", "hf-packed", "titan", "megatron", "olmo", "xy", "jax"] | None = None,
        sample_ids: bool | None = None,
        num_threads: int | None = None,
        cpu_affinity: str | Iterable[int] | None = None,
        thread_priority: int | None = None,
        prefetch_batches: int | None = None,
        transform_threads: int | None = None,
        memory_budget: int | None = None,
        block_tokens: int | None = None,
        io: Literal["auto", "mmap", "pread"] | None = None,
        on_error: Literal["raise", "retry", "substitute"] | None = None,
        max_substitutions: int | None = None,
        index_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        storage_endpoint: str | None = None,
        storage_region: str | None = None,
        storage_anonymous: bool | None = None,
        storage_timeout: int | None = None,
        storage_requests: int | None = None,
        service: str | Iterable[str] | None = None,
        service_timeout: int | None = None,
        service_fallback: bool | None = None,
        pin_memory: bool | None = None,
        delivery_log: str | os.PathLike[str] | None = None,
        # settings: end
        transform: Transform | None = None,
    ) -> None:
        settings = dict(
            # settings: values, from `make generate`
            data=data,
            mixture=mixture,
            format=format,
            token_column=token_column,
            fields=fields,
            bin_dtype=bin_dtype,
            vocab_size=vocab_size,
            document_end_id=document_end_id,
            seq_len=seq_len,
            targets=targets,
            ignore_index=ignore_index,
            bos_id=bos_id,
            eos_id=eos_id,
            layout=layout,
            phase=phase,
            boundaries=boundaries,
            packed_by=packed_by,
            overflow=overflow,
            max_docs_per_row=max_docs_per_row,
            pack_align=pack_align,
            bucket=bucket,
            shuffle=shuffle,
            seed=seed,
            chunk_tokens=chunk_tokens,
            window_tokens=window_tokens,
            lanes=lanes,
            holdout=holdout,
            split=split,
            skip=skip,
            extend=extend,
            batch_size=batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            model_parallel_size=model_parallel_size,
            epochs=epochs,
            max_steps=max_steps,
            remainder=remainder,
            balance=balance,
            pad_id=pad_id,
            pad_to_multiple=pad_to_multiple,
            cu_seqlens_width=cu_seqlens_width,
            document_mask=document_mask,
            input_dtype=input_dtype,
            batch_format=batch_format,
            sample_ids=sample_ids,
            num_threads=num_threads,
            cpu_affinity=cpu_affinity,
            thread_priority=thread_priority,
            prefetch_batches=prefetch_batches,
            transform_threads=transform_threads,
            memory_budget=memory_budget,
            block_tokens=block_tokens,
            io=io,
            on_error=on_error,
            max_substitutions=max_substitutions,
            index_dir=index_dir,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            storage_endpoint=storage_endpoint,
            storage_region=storage_region,
            storage_anonymous=storage_anonymous,
            storage_timeout=storage_timeout,
            storage_requests=storage_requests,
            service=service,
            service_timeout=service_timeout,
            service_fallback=service_fallback,
            pin_memory=pin_memory,
            delivery_log=delivery_log,
            # settings: end
        )
        self._open(_core.Settings(settings), can_pin=False, transform=transform)

    def _open(self, settings: _core.Settings, can_pin: bool, transform: Transform | None) -> None:
        if transform is not None and not callable(transform):
            raise TypeError(f"`transform` must be a function of a batch, found {type(transform).__name__}")
        self._settings = settings
        self._transform = transform
        self._handed: Handed | None = None
        self._closed = False
        self._split: Split[Any] | None = None
        rank = settings.values()["dp_rank"]
        log_notes(settings.warnings, settings.notes, rank)
        self._core: _core.Loader = _core.Loader.open(settings, can_pin)
        log_notes(self._core.warnings(), [], rank)
        self._format = format_of(self._core.config(), NumPy())

    @classmethod
    def _of(cls, settings: _core.Settings, can_pin: bool = False, transform: Transform | None = None) -> Self:
        loader = cls.__new__(cls)
        loader._open(settings, can_pin, transform)
        return loader

    @classmethod
    def from_env(cls, data: Data | None = None, *, transform: Transform | None = None, **settings: Any) -> Self:
        """Opens a loader. Every setting may come from the environment or the configuration file.

        The arguments win over both.
        """
        return cls._of(_core.Settings({"data": data, **settings}, from_env=True), transform=transform)

    def _open_core(self) -> _core.Loader:
        if self._closed:
            raise ClosedError("the loader was closed")
        return self._core

    def __iter__(self) -> Batches[B]:
        """Makes a new pass.

        The pass continues a restored position, begins the first epoch, or begins the next epoch. It
        decides this at its first ``next()``.
        """
        return Batches(self)

    def __len__(self) -> int:
        """Returns the number of batches of this rank in a pass. It is the same on every rank.

        Raises TypeError if a pass has no end.
        """
        return finite(self._core.len)

    def set_epoch(self, epoch: int) -> None:
        """Lets the next pass begin this epoch.

        A restored position of this epoch stays in force until a pass has continued it.
        """
        before = self._core.state()
        self._core.set_epoch(epoch)
        if self._core.state() != before:
            self._handed = None

    def seek(self, position: int, epoch: int | None = None) -> None:
        """Lets the next pass begin at `position` of `epoch`, by default the present epoch.

        If the position is skipped, the pass begins at the next position that is not. Raises
        ConfigError if the epoch has fewer positions.
        """
        self._core.seek(position, epoch)
        self._handed = None
        if self._split is not None:
            self._split.restored()

    @property
    def epoch(self) -> int:
        """Epoch of the newest pass.

        After `set_epoch`, `seek` or `load_state_dict` it is the epoch of the next pass.
        """
        return self._core.epoch

    def state_dict(self) -> dict[str, int | str]:
        """Returns the position after the batches that the newest pass handed over.

        It is a flat dict of ints and strings, equal on all ranks.
        """
        if self._split is not None:
            return self._split.state()
        return dict(self._core.state() if self._handed is None else self._handed.state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Lets the next pass continue at a position that ``state_dict`` returned.

        World size, batch size and number of threads may differ. An empty dict changes nothing.

        Raises
        ------
        StateMismatchError
            The state belongs to another corpus or to other content settings. Both values are named.
        TypeError
            The state is not a mapping.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"a state is a dict, as `state_dict()` gives it; found {type(state_dict).__name__}")
        if state_dict:
            self._core.load_state(list(state_dict.items()))
            self._handed = None
            if self._split is not None:
                self._split.restored()

    @property
    def num_sequences(self) -> int:
        """Full sequences of the present epoch, over all ranks.

        Raises TypeError if the epoch has no end.
        """
        return finite(self._core.num_sequences)

    @property
    def num_tokens(self) -> int:
        """Tokens of the present epoch, special ids included.

        Raises TypeError if the epoch has no end.
        """
        return finite(self._core.num_tokens)

    @property
    def dropped_tokens(self) -> int:
        """Tokens of the present epoch that `remainder` leaves out, over all ranks."""
        return self._core.dropped_tokens

    @property
    def config(self) -> dict[str, Any]:
        """Every setting in force, by name."""
        return self._core.config()

    @property
    def origins(self) -> dict[str, str]:
        """Origin of each setting: an argument, a variable, a file, the launcher, or the default."""
        return self._settings.origins()

    def sequences_at(self, epoch: int, position: int, n: int = 1) -> Arrays:
        """Returns the rows at `n` positions of an epoch's order, from `position` on.

        The rows are those of all ranks. Skipped positions have rows, too. Raises ConfigError if the
        epoch has fewer positions.
        """
        return _arrays(self._open_core().sequences_at(epoch, position, n))

    def batch_at(
        self, step: int, epoch: int | None = None, rank: int | None = None, world_size: int | None = None
    ) -> B:
        """Returns the batch that a rank gets at a step of the pass that begins with `epoch`.

        The defaults are this loader's epoch and ranks. `transform` does not run on it. Raises
        ConfigError if the pass has fewer steps.
        """
        return self._formatted(_arrays(self._open_core().batch_at(step, epoch, rank, world_size)))

    def _transformed(self, take: Callable[[], Taken | None], core: _core.Batches) -> Transformed:
        """Makes the threads of a new pass, which run `transform` on the batches of `take`.

        The position of the loader becomes the position of the batches that were handed over.
        """
        assert self._transform is not None
        config = self._core.config()
        handed = Handed(None)

        def begins(state: Any) -> None:
            handed.state = state
            self._handed = handed

        def hands_over(state: Any) -> None:
            handed.state = state

        def fails() -> None:
            # The next pass continues at the batch that failed.
            if self._handed is handed:
                self._core.load_state(handed.state)

        return Transformed(
            take,
            self._transform,
            config["transform_threads"] or default_threads(config["num_threads"]),
            state=self._core.state,
            close=core.close,
            begins=begins,
            handed=hands_over,
            failed=fails,
        )

    def _formatted(self, arrays: Arrays) -> B:
        return cast(B, arrays if self._format is None else self._format(arrays))

    def split(self, count: int, *, ahead: int | None = None) -> list[Consumer[B]]:
        """Shares this loader among `count` consumers, one per thread.

        The consumers share this loader's threads, files and decoded blocks. Each consumer is a rank
        of its own. Consumer `i` gets every `count`-th row of each batch, from the `i`-th row on.
        Rank ``dp_rank + i * dp_world_size`` of ``dp_world_size * count`` ranks gets the same rows
        with a `count`-th of the batch size.

        A consumer may be `ahead` batches before the slowest one (default: ``prefetch_batches``).
        Then it waits. ``state_dict`` gives the position after the last batch that all consumers
        have.

        Raises
        ------
        ConfigError
            Rows cannot be dealt out evenly: `batch_size` is not a multiple of `count`, or a last
            batch may be short.
        """
        split = Split(self, self._open_core().split(count, ahead, False), count, self._take_part)
        self._split = split
        return split.consumers

    def _take_part(self, part: _core.Parts) -> B | None:
        batch = part.next()
        if batch is None:
            return None
        made = self._formatted(_arrays(batch))
        # A consumer of a part has a thread of its own already.
        if self._transform is None:
            return made
        return cast(B, transformed(self._transform, Taken(batch.epoch, batch.step, made)))

    def stats(self) -> Stats:
        """Returns counters since the loader was opened. ``Stats`` tells their meaning and unit."""
        return Stats(self._core.stats())

    def plan(self) -> Plan:
        """Computes the size and cost of a pass: steps, remainder, memory, shuffling and decoding.

        It decodes nothing but a sample, to estimate padding. ``print(loader.plan())`` shows it.
        """
        values, text = self._open_core().plan()
        return Plan(json.loads(values), text)

    def verdict(self) -> str:
        """Tells in one line whether the loader or its consumers are slower."""
        return self._core.verdict()

    def close(self) -> None:
        """Stops every pass and waits for its threads. Batches that were handed over stay valid."""
        self._closed = True
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), *self._settings.arguments(), self.state_dict(), self._transform)

    def __repr__(self) -> str:
        # Debuggers and test runners show an object even if its constructor failed.
        if not hasattr(self, "_core"):
            return f"<{type(self).__name__} that was not opened>"
        facts = self._facts()
        shape = f"{facts['sequences']}, rank {facts['rank']}, {facts['batches']}"
        return f"<{type(self).__name__} of {facts['data']}: {shape}>"

    def _repr_html_(self) -> str:
        if not hasattr(self, "_core"):
            return table(type(self).__name__, ("", ""), [("", "not opened")])
        return table(type(self).__name__, ("", ""), self._facts().items())

    def _facts(self) -> dict[str, str]:
        """The facts that a terminal and a notebook show."""
        config = self._core.config()
        return {
            "data": data_text(config),
            "sequences": f"{size_text(self._core.num_sequences, 'sequences')} of {config['seq_len']:,}",
            "rank": f"{config['dp_rank']} of {config['dp_world_size']}",
            "batches": f"{size_text(self._core.len, 'batches')} of {config['batch_size']:,}",
            "layout": str(config["layout"]),
            "shuffle": f"{config['shuffle']}, seed {config['seed']}",
            "epoch": str(self._core.epoch),
            "verdict": self._core.verdict(),
        }


def finite(count: int | None) -> int:
    if count is None:
        raise TypeError("this loader has no end, so it has no length")
    return count


def _reopen(
    kind: type[Loader[Any]],
    given: dict[str, Any],
    from_env: bool,
    state: Mapping[str, Any],
    transform: Transform | None,
) -> Loader[Any]:
    # The first loader was opened with these settings, page-locked memory included.
    loader = kind._of(_core.Settings(given, from_env), can_pin=True, transform=transform)
    loader.load_state_dict(state)
    return loader
