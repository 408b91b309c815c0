"""Tests that values of documents reach batches with the stretches of their documents.

Plain Python on top of pyarrow is the judge. It lays out the number of each document in place of its
tokens, so that a row tells the documents of its stretches.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch
from reference import read_table, shards
from reference_documents import Documents, chunk_order, laid_out, window_starts
from reference_layout import LayoutSettings
from reference_order import block_order, global_order
from support import clean_environment

import forebay
from forebay.torch import DataLoader, TokenDataset

ORDER = {"chunk_tokens": 64, "window_tokens": 512, "lanes": 2}
#: Columns: type in the file, and type in a batch. Strings come as a list.
COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "url": (pa.string(), "text"),
    "language": (pa.dictionary(pa.int32(), pa.string()), "text"),
    "long": (pa.large_string(), "text"),
    "tiny": (pa.int8(), "int8"),
    "short": (pa.int16(), "int16"),
    "year": (pa.int32(), "int32"),
    "id": (pa.int64(), "int64"),
    "level": (pa.uint8(), "uint8"),
    "port": (pa.uint16(), "int32"),
    "count": (pa.uint32(), "int64"),
    "hash": (pa.uint64(), "uint64"),
    "half": (pa.float16(), "float16"),
    "score": (pa.float32(), "float32"),
    "exact": (pa.float64(), "float64"),
    "clean": (pa.bool_(), "bool"),
}
#: Groups of columns that are read together: a loader takes up to eight.
GROUPS = (list(COLUMNS)[:8], list(COLUMNS)[7:])
#: Lengths of documents.
SIZES = [0, 1, 3, 9, 40]
CONTAINERS = {
    "arrow": (".arrow", "none"),
    "arrow-zstd": (".arrow", "zstd"),
    "parquet": (".parquet", "none"),
    "parquet-zstd": (".parquet", "zstd"),
}


def value(name: str, draw: random.Random) -> Any:
    kind = COLUMNS[name][0]
    if pa.types.is_boolean(kind):
        return draw.random() < 0.5
    if pa.types.is_floating(kind):
        return draw.randrange(-64, 64) / 8
    if pa.types.is_integer(kind):
        bits, signed = kind.bit_width, pa.types.is_signed_integer(kind)
        return draw.randrange(-(1 << bits - 1), 1 << bits - 1) if signed else draw.randrange(1 << bits)
    return draw.choice(["", "en", "größer", "https://example.org/" + "x" * draw.randrange(40)])


def column(name: str, rows: int, draw: random.Random) -> pa.Array:
    kind = COLUMNS[name][0]
    values = [None if draw.random() < 0.2 else value(name, draw) for _ in range(rows)]
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    if pa.types.is_float16(kind):
        return pa.array([None if number is None else np.float16(number) for number in values], kind)
    return pa.array(values, kind)


def write(path: Path, codec: str, draw: random.Random, names: list[str], sizes: list[int]) -> None:
    lengths = [draw.choice(sizes) for _ in range(60)]
    ids = [[draw.randrange(50_000) for _ in range(length)] for length in lengths]
    table = pa.table({name: column(name, len(ids), draw) for name in names})
    table = table.add_column(len(names) // 2, "input_ids", pa.array([row or None for row in ids], pa.list_(pa.int32())))
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression=codec, row_group_size=17, data_page_size=64, write_batch_size=4)
        return
    options = pyarrow.ipc.IpcWriteOptions(compression=None if codec == "none" else codec, unify_dictionaries=True)
    with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=13)


def corpus(folder: Path, container: str, names: list[str], sizes: list[int] = SIZES) -> Path:
    suffix, codec = CONTAINERS[container]
    folder.mkdir()
    draw = random.Random(1)
    for shard in range(3):
        write(folder / f"{shard}{suffix}", codec, draw, names, sizes)
    return folder


def numbered(data: Path, bos_id: int | None, eos_id: int | None) -> Documents:
    """The documents, with the number of the document in place of each of its tokens."""
    found = Documents(data, bos_id, eos_id)
    count = 0
    for shard in found.shards:
        for index, document in enumerate(shard):
            shard[index] = [count] * len(document)
            count += 1
    return found


def values_of(data: Path, name: str) -> list[Any]:
    """The values of all non-empty documents."""
    found: list[Any] = []
    for path in shards(data):
        table = read_table(path)
        rows = zip(table.column("input_ids").to_pylist(), table.column(name).to_pylist(), strict=True)
        found += [value for tokens, value in rows if tokens]
    return found


def stretches(corpus: Documents, s: LayoutSettings) -> list[list[int | None]]:
    """The documents of each row's stretches, as `cu_seqlens` has them. Padding has none."""
    found = []
    for row in laid_out(corpus, s):
        places: list[int | None] = [cut[0] for place, cut in row if place < s.seq_len]
        end = max(place + len(cut) for place, cut in row)
        found.append(places + ([None] if end < s.seq_len else []))
    return found


def order_of(data: Path, s: LayoutSettings, marks: dict[str, Any], shuffle: Any, seed: int, n: int) -> list[int]:
    if shuffle is False:
        return list(range(n))
    if shuffle == "global":
        return global_order(n, seed=seed, epoch=0)
    shape: dict[str, Any] = {"seed": seed, "epoch": 0, "seq_len": s.seq_len, **ORDER}
    if s.layout in ("pack", "pad"):
        starts = window_starts(Documents(data, marks["bos_id"], marks["eos_id"]), s)
        return chunk_order(n, starts, **shape)
    return block_order(n, **shape)


def assert_values(batch: dict[str, Any], names: list[str], values: dict[str, list[Any]], wanted: list[Any]) -> None:
    for name in names:
        expected = [None if document is None else values[name][document] for document in wanted]
        if COLUMNS[name][1] == "text":
            assert batch[name] == expected, name
            continue
        nulls = np.asarray(batch[f"{name}_is_null"])
        assert nulls.dtype == bool and nulls.tolist() == [one is None for one in expected], name
        found = np.asarray(batch[name])
        assert found.dtype == COLUMNS[name][1], name
        assert found.tolist() == [0 if one is None else one for one in expected], name


@pytest.mark.parametrize("layout", ["pack", "pad", "concat", "rows"])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("container", CONTAINERS)
def test_batches_hold_what_plain_python_reads(tmp_path: Path, container: str, group: int, layout: str) -> None:
    names, draw = GROUPS[group], random.Random(f"{container} {group} {layout}")
    sizes = [0, 40] if layout == "rows" else SIZES[draw.choice([0, 1]) :]
    data = corpus(tmp_path / "corpus", container, names, sizes)
    values = {name: values_of(data, name) for name in names}
    for shuffle in (False, "global", "block"):
        targets = draw.choice(["labels", "shifted"])
        seq_len = 40 - (targets == "shifted") if layout == "rows" else draw.choice([5, 16, 33])
        overflow = draw.choice(["split", "truncate", "drop"])
        settings: dict[str, Any] = {"layout": layout, "seq_len": seq_len, "targets": targets}
        if layout in ("pack", "pad"):
            settings["overflow"] = overflow
        s = LayoutSettings(**settings)
        marks: dict[str, Any] = {"bos_id": draw.choice([None, 50_001]), "eos_id": draw.choice([None, 50_002])}
        if layout == "rows":
            # Every document has the length of a row.
            marks = {"bos_id": None, "eos_id": None}
        numbers = numbered(data, **marks)
        rows = stretches(numbers, s)
        seed, world, size = draw.randrange(100), draw.choice([1, 2]), draw.choice([1, 3])
        order = order_of(data, s, marks, shuffle, seed, len(rows))
        given: dict[str, Any] = {**settings, **marks, **ORDER, "shuffle": shuffle, "seed": seed, "batch_size": size}
        given |= {"fields": names, "num_threads": draw.choice([0, 1, 4]), "block_tokens": draw.choice([1, 64, 4096])}
        steps = len(rows) // (size * world)
        assert steps > 1
        for rank in range(world):
            with forebay.Loader(data, dp_rank=rank, dp_world_size=world, **given) as loader:
                for step, batch in enumerate(loader):
                    chosen = order[step * size * world : (step + 1) * size * world][rank::world]
                    wanted = [document for row in chosen for document in rows[row]]
                    assert len(batch["cu_seqlens"]) == len(wanted) + 1
                    assert_values(batch, names, values, wanted)
                assert step + 1 == steps
                assert_values(loader.batch_at(step), names, values, wanted)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether two batches have the same content."""
    same_type = {name: type(values) for name, values in found.items()} == {n: type(v) for n, v in wanted.items()}
    return same_type and all(
        found[name] == values if isinstance(values, list | int) else np.array_equal(found[name], values)
        for name, values in wanted.items()
    )


def test_cu_seqlens_of_fixed_length_have_values_of_fixed_length(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus", "arrow", ["url", "year"])
    given: dict[str, Any] = dict(seq_len=64, layout="pack", fields=["url", "year"], batch_size=2)
    with forebay.Loader(data, **given) as plain, forebay.Loader(data, **given, cu_seqlens_width=80) as fixed:
        for free, batch in zip(plain, fixed, strict=True):
            count = len(free["url"])
            assert batch["url"] == free["url"] + [None] * (79 - count)
            assert batch["year"].tolist() == free["year"].tolist() + [0] * (79 - count)
            assert batch["year_is_null"].tolist() == free["year_is_null"].tolist() + [True] * (79 - count)


def test_consumers_of_a_split_loader_get_the_values_of_their_rows(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus", "parquet", ["url", "year"])
    given: dict[str, Any] = dict(seq_len=16, layout="pack", fields=["url", "year"], batch_size=4)
    with forebay.Loader(data, **given) as loader:
        wholes = list(loader)
    with forebay.Loader(data, **given) as loader:
        parts = [iter(part) for part in loader.split(2)]
        for whole in wholes:
            rows = whole["cu_seqlens"][:-1] // 16
            for index, part in enumerate(parts):
                batch = next(part)
                mine = [at for row in range(index, 4, 2) for at in np.flatnonzero(rows == row)]
                assert batch["url"] == [whole["url"][at] for at in mine]
                assert batch["year"].tolist() == whole["year"][mine].tolist()
                assert batch["year_is_null"].tolist() == whole["year_is_null"][mine].tolist()


@pytest.mark.parametrize("pinned", [False, True])
def test_tensors_hold_what_arrays_hold(tmp_path: Path, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["url", "year", "clean", "half"]
    data = corpus(tmp_path / "corpus", "arrow-zstd", names)
    given: dict[str, Any] = dict(seq_len=32, layout="pack", fields=names)
    with forebay.Loader(data, batch_size=3, shuffle=True, **given) as loader:
        wanted = list(loader)
    dataset = TokenDataset(data, **given)
    with DataLoader(dataset, batch_size=3, shuffle=True, drop_last=True) as tensors:
        assert all(same({**b}, w) for b, w in zip(as_arrays(tensors), wanted, strict=True))
    with forebay.Loader(data, batch_size=3, shuffle=False, **given) as loader:
        first = loader.batch_at(0)
    starts = first["cu_seqlens"][:-1]
    for row in range(3):
        item = dataset[row]
        mine = [at for at, start in enumerate(starts) if start // 32 == row]
        assert item["url"] == [first["url"][at] for at in mine]  # type: ignore[comparison-overlap]
        assert item["year"].tolist() == first["year"][mine].tolist()


def as_arrays(loader: Any) -> Any:
    for batch in loader:
        yield {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_a_resumed_run_continues_the_values(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus", "parquet-zstd", ["url", "score"])
    given: dict[str, Any] = dict(seq_len=16, batch_size=2, shuffle=True, layout="pack", fields=["url", "score"])
    with forebay.Loader(data, **given) as loader:
        wanted = list(loader)
    with forebay.Loader(data, **given) as loader:
        before = iter(loader)
        for _ in range(5):
            next(before)
        state = loader.state_dict()
    with forebay.Loader(data, cache_dir=tmp_path / "cache", **given) as loader:
        loader.load_state_dict(state)
        assert all(same(found, batch) for found, batch in zip(loader, wanted[5:], strict=True))
    # The second start takes the types from the saved index.
    with forebay.Loader(data, cache_dir=tmp_path / "cache", **given) as loader:
        assert all(same(found, batch) for found, batch in zip(loader, wanted, strict=True))


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_a_holdout_has_the_values_of_its_documents(tmp_path: Path, split: str) -> None:
    data = corpus(tmp_path / "corpus", "arrow", ["id"])
    s = LayoutSettings(layout="pack", seq_len=64, holdout=3, split=split)
    values, rows = {"id": values_of(data, "id")}, stretches(numbered(data, None, None), s)
    given: dict[str, Any] = dict(layout="pack", seq_len=64, holdout=3, split=split, fields=["id"])
    with forebay.Loader(data, **given) as loader:
        for batch, wanted in zip(loader, rows, strict=True):
            assert_values(batch, ["id"], values, wanted)


def test_a_mixture_draws_the_values_of_all_sources(tmp_path: Path) -> None:
    folders = [
        corpus(tmp_path / name, container, ["url", "year"]) for name, container in (("a", "arrow"), ("b", "parquet"))
    ]
    mixture = {"sources": [{"name": f.name, "data": str(f), "weight": 1} for f in folders]}
    given: dict[str, Any] = dict(mixture=mixture, seq_len=32, layout="pack", shuffle=True, lanes=1, sample_ids=True)
    rows = [stretches(numbered(folder, None, None), LayoutSettings(seq_len=32)) for folder in folders]
    values = [{name: values_of(folder, name) for name in ("url", "year")} for folder in folders]
    seen = set()
    with forebay.Loader(fields=["url", "year"], **given) as loader:
        for batch, _ in zip(loader, range(40), strict=False):
            source, row = int(batch["source"][0]), int(batch["sample_index"][0])
            assert_values(batch, ["url", "year"], values[source], rows[source][row])
            seen.add(source)
    assert seen == {0, 1}
    for missing, other in (("absent", None), ("changed", pa.int64())):
        plain = tmp_path / missing
        plain.mkdir()
        table = pa.table({"input_ids": pa.array([[1, 2, 3]] * 60, pa.list_(pa.int32()))})
        if other is not None:
            table = table.append_column("year", pa.array([1] * 60, other))
        pq.write_table(table, plain / "0.parquet")
        mixture["sources"][1] = {"name": missing, "data": str(plain), "weight": 1}
        said = (
            "column `year` of source `absent` is missing"
            if other is None
            else "types of column `year` differ between sources: int64 of source `changed`, int32 before"
        )
        with pytest.raises(Exception, match=said):
            forebay.Loader(fields=["year"], **given)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("targets", ["labels", "shifted"])
@pytest.mark.parametrize("layout", ["pack", "concat"])
def test_verify_proves_the_values(tmp_path: Path, container: str, targets: str, layout: str) -> None:
    names = GROUPS[layout == "pack"]
    data = corpus(tmp_path / "corpus", container, names)
    log = tmp_path / "log"
    given: dict[str, Any] = dict(seq_len=16, layout=layout, targets=targets, eos_id=50_001, fields=names)
    with forebay.Loader(data, delivery_log=log, remainder="pad", **given) as loader:
        assert len(list(loader)) > 10
    asked = [data, "--set", "remainder=pad", "--delivery-log", log]
    asked += [part for name, value in given.items() if name != "fields" for part in ("--set", f"{name}={value}")]
    asked += ["--set", f"fields={','.join(names)}"]
    assert verified(*asked)["proven"]
    if container != "arrow":
        return
    # Every byte of the column's values in a shard counts.
    shard, kind = data / "1.arrow", COLUMNS[names[3]][0]
    values = read_table(shard).column(names[3]).chunk(0)
    content, stored = shard.read_bytes(), values.buffers()[1].to_pybytes()[: 13 * kind.bit_width // 8]
    assert content.count(stored) == 1
    at = content.index(stored)
    place = next(
        place for place in range(13) if values[place].as_py() and read_table(shard)["input_ids"][place].as_py()
    )
    at += place * kind.bit_width // 8
    shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert not verified(*asked)["proven"]


def rewrite(path: Path, table: pa.Table, codec: str) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression=codec)
        return
    options = pyarrow.ipc.IpcWriteOptions(compression=None if codec == "none" else codec, unify_dictionaries=True)
    with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)


def command(*given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forebay", *map(str, given)],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip


def verified(*given: Any) -> dict[str, Any]:
    done = command("verify", *given, "--json")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["proven"] == (done.returncode == 0)
    return found


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("to", ["arrow", "parquet"])
def test_rewrite_carries_the_values(tmp_path: Path, container: str, to: str) -> None:
    names = GROUPS[to == "arrow"]
    data = corpus(tmp_path / "corpus", container, names)
    for tokens in (150, 1500):
        target = tmp_path / f"target-{tokens}"
        done = command(
            "rewrite", data, target, "--to", to, "--shard-tokens", tokens, "--set", f"fields={','.join(names)}"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (len(shards(target)) > 3) == (tokens == 150)
        for name in names:
            assert values_of(target, name) == values_of(data, name), name
        given: dict[str, Any] = dict(seq_len=16, batch_size=2, seed=2, remainder="pad", fields=names)
        with forebay.Loader(data, **given) as before, forebay.Loader(target, **given) as after:
            assert all(same(found, wanted) for found, wanted in zip(after, before, strict=True))


@pytest.mark.parametrize("container", CONTAINERS)
def test_columns_that_cannot_be_delivered_are_refused(tmp_path: Path, container: str) -> None:
    suffix, codec = CONTAINERS[container]
    path = tmp_path / f"a{suffix}"
    columns = {
        "input_ids": pa.array([[1, 2], [3]], pa.list_(pa.int32())),
        "labels": pa.array([1, 2], pa.int64()),
        "day": pa.array([1, 2], pa.date32()),
        "blob": pa.array([b"a", b"b"], pa.binary()),
        "year": pa.array([1, 2], pa.int32()),
        "year_is_null": pa.array([[1, 2], [3]], pa.list_(pa.int32())),
        "doc_ids": pa.array([1, 2], pa.int32()),
    }
    rewrite(path, pa.table(columns), codec)
    for fields, said, more in (
        (["labels"], "column `labels` has one value in each row: expected a list", {}),
        (["day"], "column `day` has type [dD]ate32", {}),
        (["blob"], "column `blob` has type [bB]inary", {}),
        (["year"], "column `year` has one value for each document, and needs `boundaries`", {"boundaries": False}),
        (["year", "year_is_null"], "tells which values of `year` are null", {}),
        (["doc_ids"], "holds boundaries of documents", {}),
        (["absent"], "column `absent` of `fields` is missing", {}),
    ):
        with pytest.raises(Exception, match=said):
            forebay.Loader(path, fields=fields, seq_len=2, **more)
