"""Damages shards at seeded places, reads them, and counts what came of it.

`run` gives the counts of one family of cases. A child process reads the files, with a limit on its
memory. The parent ends a child that makes no progress, and goes on after the case at which a child
died. The child keeps the number of its case in a file, so that a crash has a name.

Outcomes of a case:

- `right`: the tokens of the sound file, with the ends of its documents.
- `refused`: an error that names the file.
- `as stored`: other tokens, and another reader finds the same in the damaged file. Only checksums
  can find such damage.
- `wrong`: other tokens, which no other reader finds in the file. With checksums, any other tokens.
- `lost`: fewer tokens than another reader finds, without an error.
- `unnamed`: an error that does not name the file.
- `panic`, `crash`, `hang`: the fault of a reader.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from support import HERE, clean_environment

EOS = 60_000
"""Id after each document, so that a moved border changes the stream."""
LIMIT_BYTES = 1 << 30
"""Memory that a child may take beyond its start."""
STALL_S = 60
"""Time without a finished case after which a child counts as hanging."""
BAD = ("wrong", "lost", "unnamed", "panic", "crash", "hang")

Files = dict[str, bytes]


def documents() -> list[list[int]]:
    """Ragged documents of ids below `EOS`, and some that are empty."""
    rng = random.Random(5)
    lengths = [rng.choice([0, 1, 3, 7, 20]) for _ in range(40)]
    return [[rng.randrange(EOS) for _ in range(length)] for length in lengths]


# --- Sound shards


def parquet(**options: Any) -> Files:
    sink = io.BytesIO()
    table = pa.table({"input_ids": pa.array(documents(), pa.list_(options.pop("dtype", pa.int32())))})
    pq.write_table(table, sink, row_group_size=16, data_page_size=64, write_batch_size=4, **options)
    return {"a.parquet": sink.getvalue()}


def arrow(stream: bool = False, dtype: Any = None, **options: Any) -> Files:
    table = pa.table({"input_ids": pa.array(documents(), pa.list_(dtype or pa.uint16()))})
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=16)
    return {"a.arrow": sink.getvalue().to_pybytes()}


def stream_of_ids() -> list[int]:
    return [token for document in documents() for token in document]


def npy() -> Files:
    sink = io.BytesIO()
    np.save(sink, np.array(stream_of_ids(), "<u2"))
    return {"a.npy": sink.getvalue()}


def matrix() -> Files:
    sink = io.BytesIO()
    ids = stream_of_ids()
    np.save(sink, np.array(ids[: len(ids) // 8 * 8], "<i4").reshape(-1, 8))
    return {"a.npy": sink.getvalue()}


def llmc() -> Files:
    ids = stream_of_ids()
    return {"a.bin": np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes() + np.array(ids, "<u2").tobytes()}


def megatron() -> Files:
    rows = [document for document in documents() if document]
    sizes = [len(row) for row in rows]
    starts = np.cumsum([0, *sizes])[:-1] * 4
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(rows), len(rows) + 1)
    index += np.array(sizes, "<i4").tobytes() + np.array(starts, "<i8").tobytes()
    index += np.arange(len(rows) + 1, dtype="<i8").tobytes()
    return {"a.bin": np.array(stream_of_ids(), "<i4").tobytes(), "a.idx": index}


def datatrove() -> Files:
    rows = [document for document in documents() if document]
    ends = np.cumsum([len(row) for row in rows]).astype("<u8").tobytes()
    return {"a.ds": np.array(stream_of_ids(), "<u2").tobytes(), "a.ds.index": ends}


#: Makers of sound shards. The first file of each is the one that is opened.
KINDS: dict[str, Callable[[], Files]] = {
    "parquet plain": lambda: parquet(use_dictionary=False, compression="none"),
    "parquet dictionary snappy": lambda: parquet(compression="snappy"),
    "parquet delta zstd v2": lambda: parquet(
        use_dictionary=False, column_encoding="DELTA_BINARY_PACKED", compression="zstd", data_page_version="2.0"
    ),
    "parquet gzip int64": lambda: parquet(use_dictionary=False, compression="gzip", dtype=pa.int64()),
    "parquet lz4 split": lambda: parquet(use_dictionary=False, column_encoding="BYTE_STREAM_SPLIT", compression="lz4"),
    "parquet crc": lambda: parquet(use_dictionary=False, compression="snappy", write_page_checksum=True),
    "arrow file": arrow,
    "arrow stream": lambda: arrow(stream=True, dtype=pa.int32()),
    "arrow zstd": lambda: arrow(compression="zstd", dtype=pa.int32()),
    "arrow lz4": lambda: arrow(compression="lz4"),
    "npy": npy,
    "npy matrix": matrix,
    "llm.c": llmc,
    "megatron": megatron,
    "datatrove": datatrove,
}


# --- Damage


def damage(sound: Files, rng: random.Random, *, keeps_size: bool = False) -> Files:
    """The files with one fault: a flipped bit, bytes of zero, an absurd number, or a cut."""
    files = dict(sound)
    name = rng.choice([*files, *files]) if len(files) == 1 else rng.choice(list(files))
    content = bytearray(files[name])
    at = rng.randrange(len(content))
    fault = rng.choices(["flip", "zero", "number", "noise", "cut"], [6, 2, 2, 1, 0 if keeps_size else 1])[0]
    if fault == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif fault == "zero":
        part = slice(at, at + rng.choice([1, 4, 16, 64]))
        content[part] = bytes(len(content[part]))
    elif fault == "number":
        number = rng.choice(
            [b"\xff\xff\xff\x7f", b"\xff" * 4, b"\0\0\0\x80", bytes(7) + b"\x40", b"\xff" * 8, b"\xff" * 9 + b"\1"]
        )
        part = slice(at, at + len(number))
        content[part] = number[: len(content[part])]
    elif fault == "noise":
        part = slice(at, at + rng.randrange(1, 20))
        content[part] = rng.randbytes(len(content[part]))
    else:
        del content[at:]
    files[name] = bytes(content)
    return files


# --- The child


@dataclass
class Job:
    """A run of cases of one kind."""

    kind: str
    seed: int
    first: int
    count: int
    checksums: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, files: Files, time_ns: int) -> Path:
    """Writes the files, with the same time as always. Size and time do not show the damage."""
    for name, content in files.items():
        path = folder / name
        path.write_bytes(content)
        os.utime(path, ns=(time_ns, time_ns))
    return folder / next(iter(files))


def read(path: Path, **settings: Any) -> list[int]:
    import forebay

    given = {"seq_len": 1, "batch_size": 256, "remainder": "short", "eos_id": EOS, "num_threads": 0, **settings}
    with forebay.Loader(path, memory_budget=64 << 20, **given) as loader:
        parts = [np.asarray(batch["input_ids"]).ravel() for batch in loader]
    return [int(token) for part in parts for token in part]


def other_reader(path: Path) -> list[int] | None:
    """The stream that another reader finds in the file, or None if it refuses the file."""
    from reference import token_stream

    try:
        if path.suffix == ".arrow":
            # Without the check, pyarrow delivers whatever lies behind damaged offsets.
            from reference import read_table

            read_table(path).validate(full=True)
        return token_stream(path, eos_id=EOS)
    except Exception:
        return None


def outcome(
    path: Path, sound: list[int], job: Job, state: Callable[[bytes], None], settings: dict[str, Any]
) -> tuple[str, str]:
    """The outcome of a case, and what there is to say."""
    import forebay

    try:
        found = read(path, **settings)
    except forebay.InternalError as error:
        return "panic", str(error)
    except forebay.ForebayError as error:
        text = str(error)
        named = path.stem in text or getattr(error, "path", None) is not None or "memory_budget" in text
        return ("refused", "") if named else ("unnamed", text)
    except MemoryError as error:
        return "crash", repr(error)
    if found == sound:
        return "right", ""
    text = f"{len(found)} tokens, the sound file has {len(sound)}"
    if job.checksums:
        return "wrong", text
    state(b"judge")
    wanted = other_reader(path)
    if wanted == found:
        return "as stored", ""
    if wanted is None:
        return "as stored, other readers refuse it", text
    return ("lost" if len(found) < len(wanted) else "wrong"), f"{text}, another reader finds {len(wanted)}"


def cases(job: Job, folder: Path, status: int) -> Iterator[tuple[int, str, str]]:
    from forebay import _core

    def state(what: bytes) -> None:
        os.pwrite(status, what.ljust(8), 8)

    sound = KINDS[job.kind]()
    time_ns = 1_700_000_000_000_000_000
    path = write(folder, sound, time_ns)
    tokens = read(path)
    settings = dict(job.more)
    if job.checksums:
        settings["cache_dir"] = str(folder / "cache")
        assert (
            _core.run_command(["forebay", "index", str(path), "--cache-dir", settings["cache_dir"], "--checksums"]) == 0
        )
        assert read(path, **settings) == tokens
    for number in range(job.first, job.first + job.count):
        os.pwrite(status, str(number).encode().ljust(8), 0)
        state(b"read")
        rng = random.Random(f"{job.kind} {job.seed} {number}")
        damaged = damage(sound, rng, keeps_size=job.checksums)
        write(folder, damaged, time_ns)
        yield number, *outcome(path, tokens, job, state, settings)


def main() -> None:
    job, folder = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    status = os.open(folder / "status", os.O_RDWR | os.O_CREAT)
    # What commands print is not for the parent.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Allocators reserve address space at their first use: it belongs to the start.
    (folder / "first").mkdir(exist_ok=True)
    read(write(folder / "first", KINDS[job.kind](), time.time_ns()))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: Counter[str] = Counter()
    for number, found, text in cases(job, folder, status):
        counts[found] += 1
        if found in BAD:
            print(json.dumps({"case": number, "outcome": found, "detail": text[:300]}), file=answers, flush=True)
        if number % 50 == 0:
            print(json.dumps({"counts": counts, "next": number + 1}), file=answers, flush=True)
            counts.clear()
    print(json.dumps({"counts": counts, "next": job.first + job.count}), file=answers, flush=True)


# --- The parent


def run(
    kind: str, folder: Path, *, seed: int, count: int, checksums: bool = False, **more: Any
) -> tuple[Counter[str], list[str]]:
    """The outcomes of `count` cases, and a line for each bad one."""
    counts: Counter[str] = Counter()
    bad: list[str] = []
    at = 0
    while at < count:
        folder.mkdir(parents=True, exist_ok=True)
        job = json.dumps(
            {"kind": kind, "seed": seed, "first": at, "count": count - at, "checksums": checksums, "more": more}
        )
        command = [sys.executable, str(HERE / "damage.py"), job, str(folder)]
        log, out = folder / "errors", folder / "answers"
        with open(log, "w") as errors, open(out, "w") as answers:
            child = subprocess.Popen(command, stdout=answers, stderr=errors, env=clean_environment())
        last, known, hangs = time.monotonic(), b"", False
        while child.poll() is None:
            time.sleep(0.02)
            status = (folder / "status").read_bytes() if (folder / "status").exists() else b""
            if status != known:
                known, last = status, time.monotonic()
            elif time.monotonic() - last > STALL_S:
                child.kill()
                hangs = True
        known = (folder / "status").read_bytes()
        lines = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
        for line in lines:
            counts.update(line.get("counts", {}))
            at = line.get("next", at)
            if "outcome" in line:
                bad.append(f"{kind} {seed} {line['case']}: {line['outcome']}: {line['detail']}")
        if child.returncode == 0 and at >= count:
            break
        assert known, f"the reader did not begin: status {child.returncode}\n{log.read_text()[-2000:]}"
        # The cases since the last counts are read again up to the case that ended the child.
        number, what = int(known[:8]), known[8:].strip()
        counts["read again"] += number - at
        at = number + 1
        fault = "the judge died" if what == b"judge" else "hang" if hangs else "crash"
        counts[fault] += 1
        if fault in BAD:
            bad.append(f"{kind} {seed} {number}: {fault}: status {child.returncode}: {log.read_text()[-300:]}")
    return counts, bad


if __name__ == "__main__":
    main()
