"""Peers with a format or an environment of their own. Each is used as its documentation recommends
for tokens.

A `write_...` function makes the peer's own form of the corpus, outside of the timed part. Its rows
are the rows of the flat file. A peer's modules are imported only when its turn comes.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rows import Batch, IndexBatches, Rows, Shape, as_it_is, map_rows, widen

#: Bytes of a shard that is written for a peer. Streaming and LitData call this size usual.
SHARD_BYTES = 1 << 26


def flat_rows(corpus: Path, shape: Shape) -> np.ndarray:
    return map_rows(corpus / "tokens-uint16.bin", shape)


def twice(tokens: Any) -> Batch:
    """Makes a batch of a tensor of tokens of any type."""
    import torch

    return {"input_ids": tokens.to(torch.int64), "labels": tokens.to(torch.int64, copy=True)}


# torchdata.nodes with threads, and StatefulDataLoader over whole batches.


def nodes_threads(path: Path, shape: Shape, threads: int):
    import torchdata.nodes as nodes

    dataset = Rows(path, shape)
    indices = nodes.SamplerWrapper(IndexBatches(len(dataset), shape.batch_size))
    return nodes.Loader(nodes.ParallelMapper(indices, dataset.__getitem__, num_workers=threads, method="thread"))


def stateful_batched(path: Path, shape: Shape, workers: int):
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = Rows(path, shape)
    sampler = IndexBatches(len(dataset), shape.batch_size)
    return StatefulDataLoader(dataset, batch_size=None, sampler=sampler, collate_fn=as_it_is, num_workers=workers)


# Hugging Face datasets: rows of the sequence's length in Arrow, mapped.


def write_datasets(corpus: Path, target: Path, shape: Shape) -> None:
    import pyarrow as pa
    from datasets import Dataset

    tokens = pa.array(flat_rows(corpus, shape).reshape(-1))
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(tokens, shape.seq_len)})
    Dataset(table).save_to_disk(str(target), max_shard_size=SHARD_BYTES)


class RowByRow:
    """Hides `__getitems__`, so that rows are fetched one by one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


def datasets_rows(path: Path, shape: Shape, workers: int):
    return datasets_map(path, shape, workers, RowByRow)


def datasets_map(path: Path, shape: Shape, workers: int, wrap: Callable[[Any], Any] = as_it_is):
    """Follows the documentation: format torch, and a DataLoader that fetches by `__getitems__`."""
    from datasets import load_from_disk
    from torch.utils.data import DataLoader, default_collate

    def collate(rows: list[dict[str, Any]]) -> Batch:
        batch = default_collate(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    dataset = wrap(load_from_disk(str(path)).with_format("torch"))
    return DataLoader(
        dataset, shape.batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip


def datasets_map_batched(path: Path, shape: Shape, workers: int):
    """One index of the dataset gives a whole batch, so neither rows nor their collation cost
    anything.
    """
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    dataset = load_from_disk(str(path)).with_format("numpy")
    sampler = IndexBatches(len(dataset), shape.batch_size)
    return DataLoader(
        dataset, batch_size=None, sampler=sampler, collate_fn=lambda batch: widen(batch["input_ids"]),
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip


class DatasetsIterable:
    """Reads shards in random order and draws rows from a buffer. `batch` makes whole arrays."""

    def __init__(self, path: Path, shape: Shape, workers: int) -> None:
        from datasets import load_from_disk
        from torch.utils.data import DataLoader

        rows = load_from_disk(str(path)).to_iterable_dataset(num_shards=16).shuffle(seed=0, buffer_size=1000)
        self.rows = rows.with_format("numpy").batch(shape.batch_size, drop_last_batch=True)
        self.loader = DataLoader(
            self.rows, batch_size=None, collate_fn=lambda batch: widen(batch["input_ids"]), num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def state_dict(self) -> Any:
        return self.rows.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.rows.load_state_dict(state)


# MosaicML Streaming: MDS shards, which are read in place.


def write_streaming(corpus: Path, target: Path, shape: Shape) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{shape.seq_len}"}
    with MDSWriter(out=str(target), columns=columns, size_limit=SHARD_BYTES) as writer:
        for row in flat_rows(corpus, shape):
            writer.write({"tokens": np.asarray(row)})


def streaming_loader(path: Path, shape: Shape, workers: int):
    import torch
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    # A run that was ended early leaves shared memory behind that would stop this run.
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(path), shuffle=True, shuffle_seed=0, batch_size=shape.batch_size)

    def collate(rows: list[dict[str, np.ndarray]]) -> Batch:
        return twice(torch.from_numpy(np.stack([row["tokens"] for row in rows])))

    return StreamingDataLoader(
        dataset, batch_size=shape.batch_size, collate_fn=collate, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip


# LitData: chunks of tokens, cut by the TokensLoader.

#: A multiple of the rows of every shape.
LITDATA_ITEM = 1 << 18


def litdata_item(given: tuple[str, int]) -> Iterator[Any]:
    import torch

    path, begin = given
    tokens = np.memmap(path, np.uint16, "r")[begin : begin + LITDATA_ITEM]
    yield torch.from_numpy(tokens[: len(tokens) // 4096 * 4096].copy())


def write_litdata(corpus: Path, target: Path, shape: Shape) -> None:
    from litdata import TokensLoader, optimize

    path = corpus / "tokens-uint16.bin"
    items = [(str(path), begin) for begin in range(0, path.stat().st_size // 2, LITDATA_ITEM)]
    # LitData prints its progress to the stream of the result.
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        optimize(
            fn=litdata_item, inputs=items, output_dir=str(target), chunk_bytes="64MB", num_workers=1,
            item_loader=TokensLoader(),
        )  # fmt: skip


def litdata_loader(path: Path, shape: Shape, workers: int):
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        str(path), item_loader=TokensLoader(block_size=shape.seq_len), shuffle=True, drop_last=True, seed=0
    )

    def collate(rows: list[Any]) -> Batch:
        return twice(torch.stack(rows))

    return StreamingDataLoader(
        dataset, batch_size=shape.batch_size, collate_fn=collate, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip


# Grain: a random access source, which is shuffled and batched by index. The last step makes
# tensors.


class GrainRows:
    """The interface that Grain requires of a source."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.shape, self.rows = path, shape, map_rows(path, shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index]

    def __reduce__(self) -> Any:
        return GrainRows, (self.path, self.shape)


def grain_batch(rows: Any) -> dict[str, np.ndarray]:
    # Gathers and widens in one step.
    return {name: np.stack(rows, dtype=np.int64, casting="same_kind") for name in ("input_ids", "labels")}


class GrainLoader:
    def __init__(self, path: Path, shape: Shape, threads: int, processes: int = 0) -> None:
        import grain

        self.batches = (
            grain.MapDataset.source(GrainRows(path, shape))
            .shuffle(seed=0)
            .repeat()
            .batch(shape.batch_size, drop_remainder=True, batch_fn=grain_batch)
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 if threads else 0))
        )
        if processes:
            self.batches = self.batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes))
        self.iterator = iter(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        import torch

        for batch in self.iterator:
            yield {name: torch.from_numpy(values) for name, values in batch.items()}

    def state_dict(self) -> Any:
        return self.iterator.get_state()

    def load_state_dict(self, state: Any) -> None:
        self.iterator.set_state(state)


def grain_processes(path: Path, shape: Shape, processes: int):
    # Grain's workers ask for the flags, and would parse the arguments of this process.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    return GrainLoader(path, shape, 1, processes)


# SPDL: a pipeline of threads, over whole batches.


class SpdlLoader:
    def __init__(self, path: Path, shape: Shape, threads: int) -> None:
        from spdl.pipeline import PipelineBuilder

        dataset = Rows(path, shape)
        indices = IndexBatches(len(dataset), shape.batch_size)

        def forever() -> Iterator[np.ndarray]:
            while True:
                yield from indices

        self.pipeline = (
            PipelineBuilder()
            .add_source(forever())
            .pipe(dataset.__getitem__, concurrency=threads)
            .add_sink(4)
            .build(num_threads=threads, use_thread_output_queue=True)
        )

    def __iter__(self) -> Iterator[Batch]:
        with self.pipeline.auto_stop():
            yield from self.pipeline


# Megatron-core: documents in its indexed format, joined in random order and cut by GPTDataset.


def write_megatron(corpus: Path, target: Path, shape: Shape) -> None:
    import pyarrow as pa
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    target.mkdir()
    builder = IndexedDatasetBuilder(str(target / "tokens.bin"), dtype=np.uint16)
    for file in sorted((corpus / "arrow-uint16").iterdir()):
        with pa.memory_map(str(file)) as source:
            column = pa.ipc.open_file(source).read_all().column(0)
            for part in column.chunks:
                values, offsets = part.values.to_numpy(), part.offsets.to_numpy()
                for begin, end in itertools.pairwise(offsets.tolist()):
                    tokens = torch.from_numpy(values[begin:end].astype(np.int32))
                    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(target / "tokens.idx"))
    # The indices of documents, samples and their order are kept in a cache, as the documentation
    # advises.
    megatron_dataset(target, shape)


class MegatronTokenizer:
    vocab_size, eod, pad = 50_257, 0, -1
    unique_identifiers = {"class": "none"}  # noqa: RUF012


def megatron_dataset(path: Path, shape: Shape) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=0, sequence_length=shape.seq_len, blend=([str(path / "tokens")], None), split="1,0,0",
        path_to_cache=str(path / "cache"), tokenizer=MegatronTokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    samples = ((path / "tokens.bin").stat().st_size // 2 - 1) // shape.seq_len
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def megatron_loader(path: Path, shape: Shape, workers: int):
    import torch
    from torch.utils.data import DataLoader

    def collate(samples: list[dict[str, Any]]) -> Batch:
        inputs, labels = (torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels"))
        return {"input_ids": inputs, "labels": labels}

    # The order is the dataset's own, so the dataset is read from its beginning.
    return DataLoader(
        megatron_dataset(path, shape), shape.batch_size, drop_last=True, collate_fn=collate, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip


# dataloader-rs: threads in Rust that call the dataset. Views are gathered and widened when they are
# collated.


def dataloader_rs(path: Path, shape: Shape, threads: int):
    import torch
    from dataloader_rs import PyDataloader, PyDataset

    rows = map_rows(path, shape)

    class Views(PyDataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> np.ndarray:
            return rows[index]

        def __getitems__(self, indices: list[int]) -> list[np.ndarray]:
            return [rows[index] for index in indices]

    def collate(views: list[np.ndarray]) -> Batch:
        batch = grain_batch(views)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    return PyDataloader(
        Views(), batch_size=shape.batch_size, shuffle=True, seed=0, num_workers=threads, collate_fn=collate,
        drop_last=True, prefetch_depth=4,
    )  # fmt: skip


# Lance: rows of the sequence's length. They are taken by index, or read in batches that are
# shuffled.


def write_lance(corpus: Path, target: Path, shape: Shape) -> None:
    import lance
    import pyarrow as pa

    rows = flat_rows(corpus, shape)

    def batches() -> Iterator[pa.RecordBatch]:
        for begin in range(0, len(rows), 1024):
            tokens = pa.array(rows[begin : begin + 1024].reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(tokens, shape.seq_len)
            yield pa.record_batch([column], names=["input_ids"])

    schema = pa.schema([("input_ids", pa.list_(pa.uint16(), shape.seq_len))])
    lance.write_dataset(batches(), str(target), schema=schema)


class LanceRows:
    """Takes a batch of rows by `take`. Opens the dataset at its first use, because forking Lance is
    not safe.
    """

    def __init__(self, path: Path, shape: Shape) -> None:
        import lance

        self.path, self.shape, self.dataset = path, shape, lance.dataset(str(path))

    def __len__(self) -> int:
        return self.dataset.count_rows()

    def __getitem__(self, indices: np.ndarray) -> Batch:
        column = self.dataset.take(indices.tolist(), columns=["input_ids"]).column(0).combine_chunks()
        return widen(column.flatten().to_numpy().reshape(-1, self.shape.seq_len))


def lance_take(path: Path, shape: Shape, workers: int):
    from torch.utils.data import DataLoader

    dataset = LanceRows(path, shape)
    sampler = IndexBatches(len(dataset), shape.batch_size)
    return DataLoader(dataset, batch_size=None, sampler=sampler, collate_fn=as_it_is)


def lance_batches(path: Path, shape: Shape, workers: int):
    import lance
    from lance.sampler import ShardedBatchSampler
    from lance.torch.data import LanceDataset
    from torch.utils.data import DataLoader

    dataset = LanceDataset(
        lance.dataset(str(path)), batch_size=shape.batch_size, columns=["input_ids"],
        sampler=ShardedBatchSampler(0, 1, randomize=True, seed=0),
    )  # fmt: skip
    # The wrapper drops a last batch of fewer than `batch_size` rows.
    return Full(DataLoader(dataset, batch_size=None, collate_fn=twice), shape.batch_size)


class Full:
    def __init__(self, batches: Any, batch_size: int) -> None:
        self.batches, self.batch_size = batches, batch_size

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch in self.batches if len(batch["input_ids"]) == self.batch_size)
