"""A map-style dataset of the sequences of a corpus."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt
from torch.utils.data import Dataset

from forebay import _core
from forebay._loader import Data, finite
from forebay._shown import data_text, shown, table
from forebay.torch.tensors import Tensors, row_of, tensors_of


class TokenDataset(Dataset[Tensors]):
    """Sequences of a corpus, in corpus order.

    ``dataset[i]`` is a dict of 1-D tensors with ``seq_len`` elements. Each process opens the corpus
    at its first use, so that the dataset can be pickled and forked. The DataLoader takes the other
    settings.

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
    holdout:
        Keeps one sequence of each run of this many out of training. The seed does not change the
        choice. Default: none. Accepted: an integer from 2 to 2^32, or `none`.
    split:
        Side of the holdout that is delivered. `train`: All sequences that are not held out.
        `holdout`: The held-out sequences. Default: train. Accepted: `train` or `holdout`.
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
    """

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
        holdout: int | None = None,
        split: Literal["train", "holdout"] | None = None,
        pad_to_multiple: int | None = None,
        cu_seqlens_width: int | None = None,
        document_mask: bool | None = None,
        input_dtype: npt.DTypeLike | None = None,
        memory_budget: int | None = None,
        block_tokens: int | None = None,
        io: Literal["auto", "mmap", "pread"] | None = None,
        index_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        storage_endpoint: str | None = None,
        storage_region: str | None = None,
        storage_anonymous: bool | None = None,
        storage_timeout: int | None = None,
        storage_requests: int | None = None,
        # settings: end
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
            holdout=holdout,
            split=split,
            pad_to_multiple=pad_to_multiple,
            cu_seqlens_width=cu_seqlens_width,
            document_mask=document_mask,
            input_dtype=input_dtype,
            memory_budget=memory_budget,
            block_tokens=block_tokens,
            io=io,
            index_dir=index_dir,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            storage_endpoint=storage_endpoint,
            storage_region=storage_region,
            storage_anonymous=storage_anonymous,
            storage_timeout=storage_timeout,
            storage_requests=storage_requests,
            # settings: end
        )
        self._given = _core.typed(settings)
        self._opened: tuple[int, _core.Loader] | None = None

    def _core(self) -> _core.Loader:
        process = os.getpid()
        if self._opened is None or self._opened[0] != process:
            alone = dict(dp_rank=0, dp_world_size=1, prefetch_batches=1)
            # A DataLoader pins the rows, if they are to be pinned.
            self._opened = (
                process,
                _core.Loader.open(_core.Settings({**self._given, **alone}, from_env=True), can_pin=True),
            )
        return self._opened[1]

    def __len__(self) -> int:
        """Returns the number of full sequences of the corpus."""
        return finite(self._core().num_sequences)

    def __getitem__(self, index: int) -> Tensors:
        """Returns sequence ``index``: ``input_ids`` and ``labels``, or ``x`` and ``y``."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensors]:
        """Returns several sequences. Neighbouring sequences are read together."""
        core, length = self._core(), len(self)
        rows: list[Tensors] = []
        at = 0
        while at < len(indices):
            first = int(indices[at])
            if not -length <= first < length:
                raise IndexError(f"sequence {first} is out of range: the corpus has {length} sequences")
            first %= length
            n = 1
            while at + n < len(indices) and indices[at + n] == first + n < length:
                n += 1
            batch = tensors_of(core.sequences_at(0, first, n))
            rows.extend(row_of(batch, row) for row in range(n))
            at += n
        return rows

    def __repr__(self) -> str:
        if "_given" not in self.__dict__:
            return f"<{type(self).__name__} that was not made>"
        facts = self._facts()
        settings = ", ".join(f"{name}={value}" for name, value in facts.items() if name not in ("data", "sequences"))
        size = f": {facts['sequences']} sequences" if "sequences" in facts else ""
        return f"<{type(self).__name__} of {facts['data']}{size}{f', {settings}' if settings else ''}>"

    def _repr_html_(self) -> str:
        return table(type(self).__name__, ("", ""), self._facts().items())

    def _facts(self) -> dict[str, str]:
        """The settings that were given, and the size if the corpus is open. Opens nothing."""
        given = {name: value for name, value in self._given.items() if name not in ("data", "mixture")}
        facts = {"data": data_text(self._given), **{name: shown(value) for name, value in given.items()}}
        if self._opened is not None and self._opened[0] == os.getpid():
            facts["sequences"] = f"{len(self):,}"
        return facts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
