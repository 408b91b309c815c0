"""Writes the corpora of `layouts.py`: documents with labels and a mask, and lengths alone."""

import os
import runpy
from pathlib import Path

import numpy as np

import corpus

SHARDS, SHARD_TOKENS, COPIES = 8, 4 << 20, 16
DOCUMENTS_PER_GROUP = 1024
#: Spread of the logarithm of document lengths.
SIGMA = 1.1
LONGEST = 65_536
#: The name of the demo's corpus, in place of a median.
DEMO = "demo"


def lengths(tokens: int, median: int, seed: int) -> np.ndarray:
    """Draws log-normal document lengths that add up to `tokens`."""
    drawn = np.random.default_rng([31, median, seed]).lognormal(np.log(median), SIGMA, tokens // median + 1000)
    return ending_after(np.clip(drawn, 1, LONGEST).astype(np.int64), tokens)


def demo_lengths(folder: Path, tokens: int) -> np.ndarray:
    """Lengths of the documents of the demo's corpus, repeated until they add up to `tokens`.

    The demo tokenises the sources of Python's standard library, with an id at the end of each. The
    first call writes the lengths below `folder`.
    """
    path = folder / "demo-lengths.npy"
    if not path.exists():
        # A module of the same name lies beside this one.
        source = Path(__file__).resolve().parents[2] / "examples" / "corpus.py"
        demo = runpy.run_path(str(source))
        texts = demo["read_documents"]()
        encoded = demo["train_tokenizer"](texts).encode_batch_fast(texts)
        np.save(path, [len(encoding.ids) + 1 for encoding in encoded])
    found = np.load(path)
    repeated = np.tile(found, -(-tokens // int(found.sum())))
    return ending_after(repeated, tokens)


def ending_after(found: np.ndarray, tokens: int) -> np.ndarray:
    """The first lengths, which add up to `tokens`. The last one may be cut."""
    ends = np.cumsum(found)
    last = int(np.searchsorted(ends, tokens))
    found = found[: last + 1].copy()
    found[last] -= ends[last] - tokens
    return found


def pieces(found: np.ndarray, seq_len: int) -> np.ndarray:
    """Cuts documents that are longer than a row, as `overflow="split"` does."""
    counts = -(-found // seq_len)
    cut = np.full(int(counts.sum()), seq_len)
    cut[np.cumsum(counts) - 1] = found - (counts - 1) * seq_len
    return cut


def prepare(folder: Path) -> Path:
    """Returns the folder of the corpus, and writes it at the first call.

    `arrow` and `parquet` hold `input_ids` (int32), `labels` (int64) and `loss_mask` (int8).
    `parquet-copies` has hard links to the shards of `parquet`. `arrow-uint16` and `raw` hold the
    same ids in two bytes each.
    """
    description = {"version": 1, "shards": SHARDS, "shard_tokens": SHARD_TOKENS, "copies": COPIES}
    return corpus.written_once(folder / "documents-corpus", description, write)


def write(partial: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("arrow", "arrow-uint16", "parquet", "parquet-copies", "raw"):
        (partial / name).mkdir(parents=True)
    table = corpus.token_table()
    for number in range(SHARDS):
        rng = np.random.default_rng([32, number])
        ids = table[rng.integers(0, len(table), SHARD_TOKENS, dtype=np.uint32)]
        found = lengths(SHARD_TOKENS, 500, number)
        offsets = np.concatenate(([0], np.cumsum(found))).astype(np.int32)
        # The first third of each document is a prompt.
        places = np.arange(SHARD_TOKENS) - np.repeat(offsets[:-1], found)
        supervised = places >= np.repeat(found // 3, found)
        labels = np.where(supervised, ids.astype(np.int64), -100)

        def lists(values: np.ndarray, offsets: np.ndarray = offsets) -> pa.ListArray:
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

        columns = {"input_ids": lists(ids.astype(np.int32)), "labels": lists(labels)}
        documents = pa.table({**columns, "loss_mask": lists(supervised.astype(np.int8))})
        stem = f"{number:05d}"
        for name, what in (("arrow", documents), ("arrow-uint16", pa.table({"input_ids": lists(ids)}))):
            path = str(partial / name / f"{stem}.arrow")
            with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, what.schema) as writer:
                writer.write_table(what, max_chunksize=DOCUMENTS_PER_GROUP)
        ids.tofile(partial / "raw" / f"{stem}.bin")
        path = partial / "parquet" / f"{stem}.parquet"
        pq.write_table(documents, path, compression="zstd", row_group_size=DOCUMENTS_PER_GROUP)
        for copy in range(COPIES):
            os.link(path, partial / "parquet-copies" / f"{copy:03d}-{path.name}")


def write_lengths(path: Path, found: np.ndarray) -> None:
    """Writes a Megatron shard of documents with these lengths. Its ids are a hole of zeros, which
    takes no disk.
    """
    with path.with_suffix(".bin").open("wb") as ids:
        ids.truncate(int(found.sum()) * 2)
    with path.with_suffix(".idx").open("wb") as index:
        index.write(b"MMIDIDX\x00\x00")
        # Version 1, and 8: ids of uint16.
        index.write(np.uint64(1).tobytes() + np.uint8(8).tobytes())
        index.write(np.uint64(len(found)).tobytes() + np.uint64(len(found) + 1).tobytes())
        index.write(found.astype(np.int32).tobytes())
        index.write((np.concatenate(([0], np.cumsum(found)[:-1])) * 2).astype(np.int64).tobytes())
        index.write(np.arange(len(found) + 1, dtype=np.int64).tobytes())
