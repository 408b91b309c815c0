"""The contestants. Each delivers shuffled batches without end.

A batch is a dict of `input_ids` and `labels`, int64 [batch_size, seq_len], in memory of their own.
Peers get the fastest form that we know. Permutations are drawn as one array, and collation is
skipped if there is nothing to collate. NumPy widens the gathered rows, once for the inputs and once
for the labels. Peers with a format or an environment of their own are in `peers.py`.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import peers
from corpus import COPIES
from rows import Batch, IndexBatches, Rows, Shape, as_it_is, widen

GROUPS = {
    "uint16": "Uncompressed, 2 bytes per token",
    "int32": "Uncompressed, 4 bytes per token",
    "zstd": "Parquet, zstd",
    "snappy": "Parquet, snappy",
}

#: A description of how each contestant is used. The key is the longest one that its label begins
#: with.
HOW = {
    "forebay, Arrow": "Loader's defaults; documents joined to one stream, rows shuffled over the whole epoch",
    "forebay, raw .bin": "Loader's defaults; a flat file of uint16 read in place, rows shuffled over the whole epoch",
    "forebay, Parquet": "Loader's defaults; documents joined to one stream, block shuffle: chunks of 4 Mi tokens in"
    " random order over the epoch, then rows within windows of 16 Mi, which is less of a shuffle",
    "torch DataLoader, batched": "a flat file mapped by NumPy; one index is a whole batch (batch_size=None)",
    "torch DataLoader, per row": "a flat file mapped by NumPy; shuffle=True, default collation, persistent workers",
    "StatefulDataLoader, batched": "as torch DataLoader, batched, with torchdata's stateful loader",
    "StatefulDataLoader, per row": "as torch DataLoader, per row, with torchdata's stateful loader",
    "torchdata.nodes": "Mapper (ParallelMapper with threads) over a sampler of whole batches of a mapped flat file",
    "dataloader-rs": "PyDataloader, __getitems__ gives views of a mapped flat file, collate_fn gathers and widens",
    "HF datasets, map-style": "rows in Arrow, with_format('torch'), DataLoader(shuffle=True), fetched by __getitems__",
    "HF datasets, map-style, per row": "the same, but without __getitems__",
    "HF datasets, map-style, batched": "rows in Arrow, with_format('numpy'), one index is a whole batch",
    "HF datasets, iterable": "Hugging Face: to_iterable_dataset(num_shards=16), shuffle(buffer_size=1000), batch(B)",
    "MosaicML Streaming": "MDS shards of 64 MB read in place, StreamingDataset(shuffle=True), StreamingDataLoader",
    "LitData": "chunks of 64 MB by optimize, StreamingDataset(TokensLoader(block_size=S), shuffle=True)",
    "Grain": "MapDataset over a mapped flat file: shuffle, repeat, batch, to_iter_dataset; mp_prefetch for processes",
    "SPDL": "PipelineBuilder over whole batches of a mapped flat file, queue.Queue as output",
    "Megatron-core": "indexed dataset of documents, GPTDataset with cached indices, no attention mask; labels shifted",
    "Lance, rows by index": "rows as fixed-size lists, dataset.take of a batch of indices",
    "Lance, whole batches": "rows as fixed-size lists, LanceDataset with ShardedBatchSampler(randomize=True): rows of a"
    " batch are neighbours, which is less of a shuffle",
    "pyarrow": "our own script: row groups in random order, decoded, cut into rows and shuffled within the group, which"
    " is less of a shuffle",
}


#: The shapes, in the order of measuring.
SHAPES = (Shape(8, 2048), Shape(32, 4096))


@dataclass(frozen=True)
class Contestant:
    name: str
    label: str
    group: str
    #: Number of helper threads or processes.
    helpers: int
    #: File or folder below the corpus. May contain `{seq_len}`, the length of its rows.
    reads: str
    make: Callable[[Path, Shape, int], Any]
    #: Path that it reads in the window, if that differs.
    reads_long: str | None = None
    ours: bool = False
    tensors: bool = True
    quick: bool = False
    #: Whether only `make bench-all` measures it.
    every: bool = False
    both_shapes: bool = True
    #: Whether it stands beside the comparison. Then it is no peer, and forebay is not compared with
    #: it.
    reference: bool = False
    #: Modules that are imported before its first batch is timed.
    imports: tuple[str, ...] = ("torch.utils.data",)
    #: Gives the starts of its rows, if they are not the multiples of `seq_len`.
    starts: Callable[[Path, Shape], np.ndarray] | None = None
    #: Whether it reorders documents, joins and cuts them, and shifts labels by one.
    joins: bool = False
    #: Largest share of rows that their neighbour in the corpus may follow.
    neighbours: float = 0.1
    #: Whether it has a state from which it can resume.
    resumes: bool = False
    #: A name in `environments.REQUIREMENTS`, or empty for the benchmark's own environment.
    environment: str = ""
    #: The distribution whose version the report shows.
    package: str = "torch"
    #: Writes its form of the corpus: takes the corpus, the path to write, and the shape.
    write: Callable[[Path, Path, Shape], None] | None = None

    @property
    def offered(self) -> bool:
        """Whether another project offers it, so that it is not a script of ours."""
        return not self.label.endswith("by hand")

    @property
    def how(self) -> str:
        return HOW[max((text for text in HOW if self.label.startswith(text)), key=len)]

    def path(self, corpus: Path, shape: Shape) -> Path:
        return corpus / self.reads.format(seq_len=shape.seq_len)


def forebay_tensors(path: Path, shape: Shape, threads: int):
    from forebay.torch import DataLoader, TokenDataset

    bin_dtype = "uint16" if path.suffix == ".bin" else None
    dataset = TokenDataset(path, seq_len=shape.seq_len, bin_dtype=bin_dtype)
    return DataLoader(dataset, batch_size=shape.batch_size, shuffle=True, seed=0, drop_last=True, num_threads=threads)


def forebay_arrays(path: Path, shape: Shape, threads: int):
    from forebay import Loader

    return Loader(
        path, seq_len=shape.seq_len, batch_size=shape.batch_size, shuffle=True, seed=0, remainder="drop",
        num_threads=threads,
    )  # fmt: skip


def torch_batched(path: Path, shape: Shape, workers: int):
    from torch.utils.data import DataLoader

    dataset = Rows(path, shape)
    sampler = IndexBatches(len(dataset), shape.batch_size)
    return DataLoader(
        dataset, batch_size=None, sampler=sampler, collate_fn=as_it_is, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip


def torch_rows(path: Path, shape: Shape, workers: int):
    from torch.utils.data import DataLoader

    more = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    return DataLoader(Rows(path, shape), shape.batch_size, shuffle=True, drop_last=True, num_workers=workers, **more)


def stateful_rows(path: Path, shape: Shape, workers: int):
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(
        Rows(path, shape), shape.batch_size, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip


def nodes_batched(path: Path, shape: Shape, workers: int):
    import torchdata.nodes as nodes

    dataset = Rows(path, shape)
    indices = nodes.SamplerWrapper(IndexBatches(len(dataset), shape.batch_size))
    return nodes.Loader(nodes.Mapper(indices, dataset.__getitem__))


class RowGroups:
    """The row groups of a folder of Parquet files, for several threads. Each thread opens the files
    for itself.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq

        self.groups: list[tuple[Path, int]] = []
        #: Tokens of each row group. No document is empty, so the values of the list column are
        #: tokens.
        self.tokens: list[int] = []
        for path in sorted(folder.glob("*.parquet")):
            metadata = pq.ParquetFile(path).metadata
            self.groups.extend((path, group) for group in range(metadata.num_row_groups))
            self.tokens.extend(
                metadata.row_group(group).column(0).num_values for group in range(metadata.num_row_groups)
            )
        self.local = threading.local()

    def __len__(self) -> int:
        return len(self.groups)

    def read(self, number: int) -> np.ndarray:
        import pyarrow.parquet as pq

        path, group = self.groups[number]
        files = self.local.__dict__
        if str(path) not in files:
            files[str(path)] = pq.ParquetFile(path)
        table = files[str(path)].read_row_group(group, columns=["input_ids"], use_threads=False)
        return table.column(0).combine_chunks().flatten().to_numpy()


def chopped_starts(folder: Path, shape: Shape) -> np.ndarray:
    tokens = RowGroups(folder).tokens
    firsts = np.cumsum([0, *tokens[:-1]])
    within = [np.arange(count // shape.seq_len) * shape.seq_len for count in tokens]
    return np.concatenate([first + starts for first, starts in zip(firsts, within, strict=True)])


class Chopped:
    """Decodes row groups in random order with pyarrow, and cuts each into rows, which it shuffles.

    This shuffles less than the others. Tokens at the end of a row group that do not fill a row are
    dropped. With two threads, one thread decodes the next row groups while the current one is in
    use.
    """

    def __init__(self, path: Path, shape: Shape, threads: int) -> None:
        self.groups, self.shape, self.threads = RowGroups(path), shape, threads
        self.rng = np.random.default_rng(0)
        self.pool = ThreadPoolExecutor(threads) if threads else None

    def decode(self, number: int) -> np.ndarray:
        tokens = self.groups.read(number)
        rows = len(tokens) // self.shape.seq_len
        return tokens[: rows * self.shape.seq_len].reshape(rows, self.shape.seq_len)

    def decoded(self) -> Iterator[np.ndarray]:
        order = self.rng.permutation(len(self.groups))
        if self.pool is None:
            yield from map(self.decode, order)
            return
        ahead: deque[Any] = deque()
        for number in order:
            ahead.append(self.pool.submit(self.decode, number))
            if len(ahead) > self.threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def __iter__(self) -> Iterator[Batch]:
        size = self.shape.batch_size
        rest = np.empty((0, self.shape.seq_len), np.int32)
        for rows in self.decoded():
            order = self.rng.permutation(len(rows))
            at = 0
            if len(rest):
                at = size - len(rest)
                rest = np.concatenate((rest, rows[order[:at]]))
                if len(rest) < size:
                    continue
                yield widen(rest)
            while at + size <= len(order):
                yield widen(rows[order[at : at + size]])
                at += size
            rest = rows[order[at:]]


def contestants() -> list[Contestant]:
    found = []

    def add(*given: Any, **more: Any) -> None:
        found.append(Contestant(*given, **more))

    for dtype in ("uint16", "int32"):
        for threads in (0, 1, 2):
            add(
                f"forebay-arrow-{dtype}-{threads}", "forebay, Arrow", dtype, threads, f"arrow-{dtype}",
                forebay_tensors, ours=True, quick=dtype == "uint16" and threads > 0, imports=("forebay.torch",),
            )  # fmt: skip
    for threads in (0, 1, 2):
        add(
            f"forebay-bin-{threads}", "forebay, raw .bin", "uint16", threads, "tokens-uint16.bin",
            forebay_tensors, ours=True, reference=True, both_shapes=False, imports=("forebay.torch",),
        )  # fmt: skip
    for codec in ("zstd", "snappy"):
        for threads in (1, 2):
            add(
                f"forebay-parquet-{codec}-{threads}", "forebay, Parquet", codec, threads, f"parquet-{codec}",
                forebay_tensors, reads_long=f"parquet-{codec}{COPIES}", ours=True, quick=codec == "zstd",
                imports=("forebay.torch",),
            )  # fmt: skip
    add(
        "forebay-numpy", "forebay, Arrow, NumPy arrays", "uint16", 1, "arrow-uint16",
        forebay_arrays, ours=True, tensors=False, reference=True, both_shapes=False, imports=("forebay",),
    )  # fmt: skip
    for dtype in ("uint16", "int32"):
        flat, first = f"tokens-{dtype}.bin", dtype == "uint16"
        add(f"torch-batched-{dtype}", "torch DataLoader, batched", dtype, 0, flat, torch_batched, quick=first)
        add(
            f"nodes-batched-{dtype}", "torchdata.nodes, batched", dtype, 0, flat, nodes_batched,
            quick=first, imports=("torchdata.nodes",), package="torchdata", resumes=True,
        )  # fmt: skip
    flat = "tokens-uint16.bin"
    add("torch-rows-0", "torch DataLoader, per row", "uint16", 0, flat, torch_rows, quick=True)
    add("torch-rows-2", "torch DataLoader, per row, processes", "uint16", 2, flat, torch_rows, both_shapes=False)
    for codec in ("zstd", "snappy"):
        for threads in (0, 2):
            add(
                f"pyarrow-{codec}-{threads}", "pyarrow row groups, by hand", codec, threads, f"parquet-{codec}",
                Chopped, quick=codec == "zstd", starts=chopped_starts,
                imports=("torch", "pyarrow.parquet"), package="pyarrow",
            )  # fmt: skip
    return found + every_peer()


def every_peer() -> list[Contestant]:
    """The contestants that only `make bench-all` measures. Excludes dataloader-rs and the threads
    of torchdata.nodes.
    """
    found = []
    flat = "tokens-uint16.bin"

    def add(name: str, label: str, helpers: int, make: Any, reads: str = flat, every: bool = True, **more: Any) -> None:
        found.append(Contestant(name, label, "uint16", helpers, reads, make, every=every, **more))

    add("torch-rows-4", "torch DataLoader, per row, processes", 4, torch_rows)
    for workers in (2, 4):
        add(f"torch-batched-{workers}", "torch DataLoader, batched, processes", workers, torch_batched)
    more: dict[str, Any] = {"imports": ("torchdata.stateful_dataloader",), "package": "torchdata", "resumes": True}
    add("stateful-rows-0", "StatefulDataLoader, per row", 0, stateful_rows, **more)
    add("stateful-rows-2", "StatefulDataLoader, per row, processes", 2, stateful_rows, **more)
    add("stateful-batched", "StatefulDataLoader, batched", 0, peers.stateful_batched, **more)
    more["imports"] = ("torchdata.nodes",)
    add("nodes-threads", "torchdata.nodes, batched, threads", 2, peers.nodes_threads, every=False, **more)
    for threads in (0, 2):
        add(
            f"dataloader-rs-{threads}", "dataloader-rs", threads, peers.dataloader_rs, every=False,
            imports=("torch", "dataloader_rs"), environment="dataloader-rs", package="dataloader-rs",
        )  # fmt: skip
    more = {"reads": "datasets-{seq_len}", "write": peers.write_datasets, "environment": "datasets"}
    more |= {"package": "datasets", "imports": ("torch.utils.data", "datasets")}
    add("datasets-rows", "HF datasets, map-style, per row", 0, peers.datasets_rows, **more)
    for workers in (0, 2):
        add(f"datasets-map-{workers}", "HF datasets, map-style", workers, peers.datasets_map, **more)
    add("datasets-map-batched", "HF datasets, map-style, batched", 0, peers.datasets_map_batched, **more)
    for workers in (0, 2):
        add(
            f"datasets-iterable-{workers}", "HF datasets, iterable", workers, peers.DatasetsIterable, **more,
            resumes=workers == 0,
        )  # fmt: skip
    more = {"reads": "streaming-{seq_len}", "write": peers.write_streaming, "environment": "streaming"}
    more |= {"package": "mosaicml-streaming", "imports": ("torch.utils.data", "streaming"), "resumes": True}
    for workers in (0, 2):
        add(f"streaming-{workers}", "MosaicML Streaming", workers, peers.streaming_loader, **more)
    more = {"reads": "litdata", "write": peers.write_litdata, "environment": "litdata"}
    more |= {"package": "litdata", "imports": ("torch.utils.data", "litdata"), "resumes": True}
    for workers in (0, 2):
        add(f"litdata-{workers}", "LitData, TokensLoader", workers, peers.litdata_loader, **more)
    more = {"environment": "grain", "package": "grain", "imports": ("torch", "grain"), "resumes": True}
    for threads in (0, 2):
        add(f"grain-{threads}", "Grain, threads", threads, peers.GrainLoader, **more)
    add("grain-processes", "Grain, processes", 2, peers.grain_processes, **more)
    more = {"environment": "spdl", "package": "spdl", "imports": ("torch", "spdl.pipeline")}
    for threads in (1, 2):
        add(f"spdl-{threads}", "SPDL, threads", threads, peers.SpdlLoader, **more)
    more = {"reads": "megatron-{seq_len}", "write": peers.write_megatron, "environment": "megatron", "joins": True}
    more |= {"package": "megatron-core", "imports": ("torch.utils.data", "megatron.core.datasets.gpt_dataset")}
    for workers in (0, 2):
        add(f"megatron-{workers}", "Megatron-core GPTDataset", workers, peers.megatron_loader, **more)
    more = {"reads": "lance-{seq_len}", "write": peers.write_lance, "environment": "lance", "package": "pylance"}
    more |= {"imports": ("torch.utils.data", "lance.torch.data")}
    add("lance-take", "Lance, rows by index", 0, peers.lance_take, **more)
    # The loader shuffles whole batches, so within a batch each row is followed by its neighbour.
    add("lance-batches", "Lance, whole batches shuffled", 0, peers.lance_batches, **more, neighbours=1.0)
    return found
