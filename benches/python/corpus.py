"""Writes the corpus that every contestant reads: the same tokens as Arrow, Parquet and flat files.

Token ids follow Zipf's law over 50,257 ids and are drawn independently, so they compress somewhat worse than text;
documents have log-normal lengths, 900 tokens in the mean. The stream of tokens depends on the size alone. Arrow record
batches and Parquet row groups hold 1024 documents, near what Hugging Face `datasets` writes; all else is pyarrow's
default.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

VOCABULARY = 50_257
SHARDS = 16
DOCUMENTS_PER_GROUP = 1024
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


def prepare(folder: Path, tokens: int, tell: Callable[[int, int], None]) -> Path:
    """The folder of the corpus, written at the first call; `tell` hears of shards done and all shards."""
    description = {"version": 1, "tokens": tokens, "shards": SHARDS, "documents_per_group": DOCUMENTS_PER_GROUP}
    target = folder / f"corpus-{tokens // 1_000_000}M"
    try:
        if json.loads((target / "corpus.json").read_text()) == description:
            return target
    except (OSError, ValueError):
        pass

    import pyarrow as pa
    import pyarrow.parquet as pq

    # Complete or absent: a run that is stopped half way leaves only the folder that the next one removes.
    partial = target.with_suffix(".partial")
    for stale in (partial, target):
        shutil.rmtree(stale, ignore_errors=True)
    for name in [f"arrow-{dtype}" for dtype in DTYPES] + [f"parquet-{codec}" for codec in CODECS]:
        (partial / name).mkdir(parents=True)
    table = token_table()
    flat = {dtype: (partial / f"tokens-{dtype}.bin").open("wb") for dtype in DTYPES}
    for number in range(SHARDS):
        tell(number, SHARDS)
        ids, offsets = shard(number, tokens // SHARDS, table)
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
    for file in flat.values():
        file.close()
    (partial / "corpus.json").write_text(json.dumps(description))
    partial.rename(target)
    tell(SHARDS, SHARDS)
    return target
