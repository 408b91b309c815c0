"""Writes the corpus that every contestant reads: the same tokens as Arrow, Parquet and flat files.

Token ids follow Zipf's law over 50,257 ids and are drawn independently, so they compress somewhat
worse than text. Documents have log-normal lengths with a mean of 900 tokens. The stream of tokens
depends only on the size. Arrow record batches and Parquet row groups hold 1024 documents, about as
many as Hugging Face `datasets` writes. All other settings are pyarrow's defaults.

Each Parquet folder has a sibling of many copies, as hard links. forebay keeps decoded blocks within
its memory budget, so it would decode a corpus that fits there only once. No real corpus fits.
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
#: A shard's length is a multiple of this, so that it has whole rows of every shape. Rows of the
#: copies are then rows of the corpus.
MULTIPLE = 4096
COPIES = "-copies"
CODECS = ("zstd", "snappy")
DTYPES = ("uint16", "int32")


def token_table() -> np.ndarray:
    """A table of ids. An entry that is drawn uniformly follows Zipf's law."""
    cumulated = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    entries = 1 << 22
    return np.searchsorted(cumulated / cumulated[-1], (np.arange(entries) + 0.5) / entries).astype(np.uint16)


def shard(number: int, tokens: int, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a shard, and the offsets of its documents in them."""
    rng = np.random.default_rng([20, number])
    ids = table[rng.integers(0, len(table), tokens, dtype=np.uint32)]
    lengths = np.clip(rng.lognormal(6.2, 1.1, tokens // 200 + 10), 1, 65_536).astype(np.int64)
    ends = np.cumsum(lengths)
    offsets = np.concatenate(([0], ends[ends < tokens], [tokens]))
    return ids, offsets.astype(np.int32)


def written_once(target: Path, description: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Returns `target`. Calls `write` to fill it unless it was written to the same description
    before.
    """
    try:
        if json.loads((target / "corpus.json").read_text()) == description:
            return target
    except (OSError, ValueError):
        pass
    # The target is complete or absent. A run that stops half way leaves only a partial folder,
    # which the next run removes.
    partial = target.with_suffix(".partial")
    for stale in (partial, target):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    (partial / "corpus.json").write_text(json.dumps(description))
    partial.rename(target)
    return target


def prepare(folder: Path, tokens: int, copies: int, tell: Callable[[int, int], None]) -> Path:
    """Returns the folder of the corpus, and writes it at the first call. Calls `tell` with the
    number of shards done and of all shards.
    """
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
        # The last table is int32, the type in which tokenizers' output is usually saved.
        for codec in CODECS:
            path = partial / f"parquet-{codec}" / f"{stem}.parquet"
            pq.write_table(documents, path, compression=codec, row_group_size=DOCUMENTS_PER_GROUP)
            for copy in range(copies):
                os.link(path, partial / f"parquet-{codec}{COPIES}" / f"{copy:03d}-{path.name}")
    for file in flat.values():
        file.close()
    tell(SHARDS, SHARDS)
