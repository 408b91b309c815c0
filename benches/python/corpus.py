"""Writes the corpus that every contestant reads: the same tokens as Arrow, Parquet and flat files.

Token ids follow Zipf's law over 50,257 ids and are drawn independently, so they compress somewhat worse than text;
documents have log-normal lengths, 900 tokens in the mean. The stream of tokens depends on the size alone. Arrow record
batches and Parquet row groups hold 1024 documents, near what Hugging Face `datasets` writes; all else is pyarrow's
default.

Each Parquet folder has a sibling of many copies, as hard links: forebay keeps decoded blocks within its memory budget,
and a corpus that fits there is decoded only once, which no real one is.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 50_257
SHARDS = 16
DOCUMENTS_PER_GROUP = 1024
#: Shards are whole rows of every shape, so that rows of the copies are rows of the corpus.
MULTIPLE = 4096
COPIES = "-copies"
CODECS = ("zstd", "snappy")
DTYPES = ("uint16", "int32")


def token_table() -> np.ndarray:
    """Ids such that a uniformly drawn entry follows Zipf's law."""
    cumulated = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    entries = 1 << 22
    return np.searchsorted(cumulated / cumulated[-1], (np.arange(entries) + 0.5) / entries).astype(np.uint16)


def shard(number: int, tokens: int, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a shard, and the offsets of its documents in them."""
    rng = np.random.default_rng([20, number])
    ids = table[rng.integers(0, len(table), tokens, dtype=np.uint32)]
    lengths = np.clip(rng.lognormal(6.2, 1.1, tokens // 200 + 10), 1, 65_536).astype(np.int64)
    ends = np.cumsum(lengths)
    offsets = np.concatenate(([0], ends[ends < tokens], [tokens]))
    return ids, offsets.astype(np.int32)


def written_once(target: Path, description: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """`target`, which `write` fills unless what is there was written to the same description."""
    try:
        if json.loads((target / "corpus.json").read_text()) == description:
            return target
    except (OSError, ValueError):
        pass
    # Complete or absent: a run that is stopped half way leaves only the folder that the next one removes.
    partial = target.with_suffix(".partial")
    for stale in (partial, target):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    (partial / "corpus.json").write_text(json.dumps(description))
    partial.rename(target)
    return target


def prepare(folder: Path, tokens: int, copies: int, tell: Callable[[int, int], None]) -> Path:
    """The folder of the corpus, written at the first call; `tell` hears of shards done and all shards."""
    shard_tokens = tokens // SHARDS // MULTIPLE * MULTIPLE
    description = {"version": 2, "shard_tokens": shard_tokens, "shards": SHARDS, "copies": copies}
    target = folder / f"corpus-{tokens // 1_000_000}M"
    return written_once(target, description, lambda partial: write(partial, shard_tokens, copies, tell))


def write(partial: Path, shard_tokens: int, copies: int, tell: Callable[[int, int], None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet = [f"parquet-{codec}" for codec in CODECS]
    for name in [f"arrow-{dtype}" for dtype in DTYPES] + parquet + [name + COPIES for name in parquet]:
        (partial / name).mkdir(parents=True)
    table = token_table()
    flat = {dtype: (partial / f"tokens-{dtype}.bin").open("wb") for dtype in DTYPES}
    for number in range(SHARDS):
        tell(number, SHARDS)
        ids, offsets = shard(number, shard_tokens, table)
        stem = f"{number:05d}"
        for dtype in DTYPES:
            values = ids.astype(dtype)
            values.tofile(flat[dtype])
            documents = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
            path = partial / f"arrow-{dtype}" / f"{stem}.arrow"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, documents.schema) as writer:
                writer.write_table(documents, max_chunksize=DOCUMENTS_PER_GROUP)
        # The last table is int32, what tokenizers' output is usually saved as.
        for codec in CODECS:
            path = partial / f"parquet-{codec}" / f"{stem}.parquet"
            pq.write_table(documents, path, compression=codec, row_group_size=DOCUMENTS_PER_GROUP)
            for copy in range(copies):
                os.link(path, partial / f"parquet-{codec}{COPIES}" / f"{copy:03d}-{path.name}")
    for file in flat.values():
        file.close()
    tell(SHARDS, SHARDS)
