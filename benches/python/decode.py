"""Compares the decoding of Parquet alone: forebay, its limit and pyarrow, per encoding, codec and
type.

Run it with `make bench ARGS=--decode`. pyarrow writes files that hold the corpus of the other
benchmarks. `forebay-decode` measures three things in turns: the limit (decompress, widen),
forebay's blocks, and its loader. pyarrow decodes the same row groups with one thread right before
and right after. All speeds are per second of CPU time.
"""

import statistics
import tempfile
import time
from pathlib import Path

import corpus
from targets import Record, Tell, built, failures, run, table

LEAD = "Decoding Parquet"
TOKENS, SECONDS = 8 << 20, 0.5

ENCODINGS = {
    "plain": "PLAIN",
    "dictionary": None,
    "delta": "DELTA_BINARY_PACKED",
    "byte stream split": "BYTE_STREAM_SPLIT",
}
CODECS = ("none", "snappy", "zstd")
LEAF = "input_ids.list.element"


def write(folder: Path, tokens: int) -> list[tuple[tuple[str, str, str], Path]]:
    """Writes one file for each (type, encoding, codec), all of the same documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids, offsets = corpus.shard(0, tokens, corpus.token_table())
    files = []
    for dtype in corpus.DTYPES:
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.astype(dtype)))
        for encoding, name in ENCODINGS.items():
            for codec in CODECS:
                path = folder / f"{dtype}-{encoding.replace(' ', '-')}-{codec}.parquet"
                pq.write_table(
                    pa.table({"input_ids": lists}),
                    path,
                    compression=codec,
                    row_group_size=corpus.DOCUMENTS_PER_GROUP,
                    use_dictionary=name is None,
                    column_encoding=None if name is None else {LEAF: name},
                )
                files.append(((dtype, encoding, codec), path))
    return files


def pyarrow_turn(path: Path, tokens: int) -> float:
    """Tokens per second of CPU time in one pass over the row groups with one thread."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    began, found = time.process_time(), 0
    for group in range(file.num_row_groups):
        for chunk in file.read_row_group(group, use_threads=False).column(0).chunks:
            found += len(chunk.values)
    took = time.process_time() - began
    assert found == tokens, f"{path.name}: {found} tokens of {tokens}"
    return tokens / took


def measure(folder: Path, seed: int, tell: Tell) -> list[Record]:
    """Returns one record per file."""
    del folder, seed  # files are small, and `forebay-decode` orders its turns itself
    binary, records = built("forebay-decode"), []
    with tempfile.TemporaryDirectory() as folder_of_files:
        files = write(Path(folder_of_files), TOKENS)
        for done, ((dtype, encoding, codec), path) in enumerate(files):
            tell(done, len(files))
            pyarrow_turn(path, TOKENS)
            turns = [pyarrow_turn(path, TOKENS) for _ in range(2)]
            record = run([binary, SECONDS, path])
            turns += [pyarrow_turn(path, TOKENS) for _ in range(2)]
            record.update(dtype=dtype, encoding=encoding, codec=codec, pyarrow=statistics.median(turns))
            records.append(record)
        tell(len(files), len(files))
    return records


def section(records: list[Record]) -> list[str]:
    head = ["type", "encoding", "codec", "limit", "blocks", "of limit", "loader", "of limit", "pyarrow", "over pyarrow"]
    rows = []
    for record in records:
        if "failed" in record:
            continue
        ahead = record["blocks"] / record["pyarrow"]
        most = {"zstd": 2.0, "snappy": 4.0 if record["encoding"] in ("dictionary", "delta") else 0.0}
        limit, blocks, loader, pyarrow = (
            f"{record[key] / 1e6:.0f}" for key in ("limit", "blocks", "loader", "pyarrow")
        )
        rows.append([
            record["dtype"], record["encoding"], record["codec"], limit, blocks, judged(record["blocks_of_limit"], 0.9),
            loader, judged(record["loader_of_limit"], 0.9), pyarrow, judged(ahead, most.get(record["codec"], 0.0)),
        ])  # fmt: skip
    return [
        "Numbers are millions of tokens per second of CPU time.", "",
        "- **limit**: decompresses the bytes of the pages (copies them if there is no codec) and widens them to 64"
        " bits, nothing else.",
        "- **blocks**: decodes the blocks, and widens them in the same way.",
        "- **loader**: gives batches with labels, which the limit does not write. Block shuffling decodes some blocks"
        " twice.",
        "- **pyarrow**: decodes the same row groups on one thread.",
        "", "Bold numbers are below the target: 0.9 of the limit; 2 times pyarrow on zstd; 4 times pyarrow on snappy"
        " with dictionaries or deltas.", "",
        *failures(records, "dtype", "encoding", "codec"), *table(head, rows),
    ]  # fmt: skip


def judged(ratio: float, target: float) -> str:
    text = f"{ratio:.2f}"
    return text if ratio >= target else f"**{text}**"
