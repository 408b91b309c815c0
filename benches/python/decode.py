"""Decoding of Parquet, alone: forebay, its limit and pyarrow over the same files, per encoding, codec and type.

Prints a table, and JSON lines with `--out`. Files hold the corpus of the other benchmarks, written by pyarrow;
`forebay-decode` measures the limit (decompress, widen), forebay's blocks and its loader in turns, and pyarrow decodes
the same row groups with one thread right before and after. All speeds are per second of CPU time.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import corpus

ENCODINGS = {
    "plain": "PLAIN",
    "dictionary": None,
    "delta": "DELTA_BINARY_PACKED",
    "byte stream split": "BYTE_STREAM_SPLIT",
}
CODECS = ("none", "snappy", "zstd")
LEAF = "input_ids.list.element"


def write(folder: Path, tokens: int) -> list[tuple[tuple[str, str, str], Path]]:
    """A file for each (type, encoding, codec), of the same documents."""
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
    """Tokens per CPU second of one pass over the row groups, with one thread."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    began, found = time.process_time(), 0
    for group in range(file.num_row_groups):
        for chunk in file.read_row_group(group, use_threads=False).column(0).chunks:
            found += len(chunk.values)
    took = time.process_time() - began
    assert found == tokens, f"{path.name}: {found} tokens of {tokens}"
    return tokens / took


def measure(binary: Path, tokens: int, seconds: float) -> list[dict[str, Any]]:
    """A record per file."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for (dtype, encoding, codec), path in write(Path(folder), tokens):
            pyarrow_turn(path, tokens)
            turns = [pyarrow_turn(path, tokens) for _ in range(2)]
            line = subprocess.run([binary, str(seconds), path], check=True, capture_output=True, text=True).stdout
            turns += [pyarrow_turn(path, tokens) for _ in range(2)]
            record = json.loads(line)
            record.update(dtype=dtype, encoding=encoding, codec=codec, pyarrow=statistics.median(turns))
            records.append(record)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, speeds in millions of tokens per CPU second."""
    head = [
        "type",
        "encoding",
        "codec",
        "limit",
        "blocks",
        "of limit",
        "loader",
        "of limit",
        "pyarrow",
        "blocks over pyarrow",
    ]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for record in records:
        cells = [record["dtype"], record["encoding"], record["codec"], f"{record['limit'] / 1e6:.0f}"]
        cells += [f"{record['blocks'] / 1e6:.0f}", f"{record['blocks_of_limit']:.2f}"]
        cells += [f"{record['loader'] / 1e6:.0f}", f"{record['loader_of_limit']:.2f}"]
        cells += [f"{record['pyarrow'] / 1e6:.0f}", f"{record['blocks'] / record['pyarrow']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", type=Path, required=True, help="forebay-decode")
    parser.add_argument("--tokens", type=int, default=8 << 20)
    parser.add_argument("--seconds", type=float, default=1.0, help="per file, after its first five turns")
    parser.add_argument("--out", type=Path, help="JSON lines go here")
    arguments = parser.parse_args()
    records = measure(arguments.binary, arguments.tokens, arguments.seconds)
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(table(records))


if __name__ == "__main__":
    main()
