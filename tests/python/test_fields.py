"""Tests that labels, masks, weights and other columns reach batches beside their tokens.

Plain Python on top of pyarrow is the judge.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from reference import Reference, Settings, read_table, resolve_shuffle, shards, token_stream
from reference_documents import Documents, laid_out
from reference_layout import LayoutSettings
from support import arguments, clean_environment

import forebay
from forebay.torch import DataLoader, TokenDataset

#: Columns: type in the file, type in a batch, whether a value belongs to the target at its place.
COLUMNS: dict[str, tuple[pa.DataType, str, bool]] = {
    "labels": (pa.int32(), "int64", True),
    "loss_mask": (pa.bool_(), "bool", True),
    "weights": (pa.float16(), "float32", True),
    "attention_mask": (pa.uint8(), "int64", False),
    "small": (pa.int8(), "int8", False),
    "count": (pa.uint16(), "int32", False),
    "score": (pa.float32(), "float32", False),
    "exact": (pa.float64(), "float64", False),
}
CONTAINERS = {
    "arrow": (".arrow", "none"),
    "arrow-zstd": (".arrow", "zstd"),
    "parquet": (".parquet", "none"),
    "parquet-zstd": (".parquet", "zstd"),
}


def values(name: str, count: int, draw: random.Random) -> list[Any]:
    if name in ("loss_mask", "attention_mask"):
        return [draw.random() < 0.5 if name == "loss_mask" else 1 for _ in range(count)]
    if name in ("weights", "score", "exact"):
        return [draw.randrange(64) / 8 for _ in range(count)]
    low, high = {"labels": (-100, 50_000), "small": (-128, 127), "count": (0, 65_535)}[name]
    return [draw.randint(low, high) for _ in range(count)]


def write(path: Path, codec: str, draw: random.Random, names: list[str], rows: int = 60) -> None:
    lengths = [draw.choice([0, 1, 3, 9, 40]) for _ in range(rows)]
    ids = [[draw.randrange(50_000) for _ in range(length)] for length in lengths]
    columns = {"input_ids": pa.array([row or None for row in ids], pa.list_(pa.int32()))}
    for index, name in enumerate(names):
        kind = pa.large_list(COLUMNS[name][0]) if index % 2 else pa.list_(COLUMNS[name][0])
        lists = [np.array(values(name, length, draw), COLUMNS[name][0].to_pandas_dtype()) for length in lengths]
        columns[name] = pa.array([list(values) for values in lists], kind)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression=codec, row_group_size=17, data_page_size=256)
        return
    options = pyarrow.ipc.IpcWriteOptions(compression=None if codec == "none" else codec)
    with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=13)


def corpus(folder: Path, container: str, names: list[str], seed: int = 1) -> Path:
    suffix, codec = CONTAINERS[container]
    folder.mkdir()
    draw = random.Random(seed)
    for shard in range(3):
        write(folder / f"{shard}{suffix}", codec, draw, names)
    return folder


@cache
def stream_of(data: Path, name: str, settings: Settings) -> list[Any]:
    """The values of a column, and its own value at every special."""
    stream: list[Any] = []
    special = {"labels": settings.ignore_index, "attention_mask": 1}.get(name, 0)
    for path in shards(data):
        for document in read_table(path).column(name).to_pylist():
            if document:
                stream += [special] if settings.bos_id is not None else []
                stream += document
                stream += [special] if settings.eos_id is not None else []
    return stream


@cache
def tokens_of(data: Path, settings: Settings) -> list[int]:
    return token_stream(data, bos_id=settings.bos_id, eos_id=settings.eos_id)


@cache
def reference_of(data: Path, name: str | None, settings: Settings) -> Reference:
    """Rows over the values of a column, or over the places of tokens."""
    if name is None:
        return Reference(list(range(len(tokens_of(data, settings)))), settings)
    return Reference(stream_of(data, name, settings), settings)


def expected(data: Path, name: str, settings: Settings, step: int, rank: int, world: int) -> Any:
    """The array of a column in a batch: the reference's rows over the column's stream."""
    padding = settings.ignore_index if name == "labels" else 0
    assert len(tokens_of(data, settings)) == len(stream_of(data, name, settings))
    padded = Settings(**{**vars(settings), "pad_id": padding})
    rows = reference_of(data, name, padded).batch_at(step, rank=rank, world_size=world)
    side = int(settings.shifted and COLUMNS[name][2])
    # The reference fills targets up with `ignore_index`; a field has its own padding.
    cut = [list(row[side]) for row in rows]
    if side and padding != settings.ignore_index:
        places = reference_of(data, None, settings).batch_at(step, rank=rank, world_size=world)
        cut = [
            [padding if place == settings.ignore_index else value for value, place in zip(row, place[1], strict=True)]
            for row, place in zip(cut, places, strict=True)
        ]
    return np.array(cut).astype(COLUMNS[name][1])


def assert_fields(
    batch: dict[str, Any], data: Path, names: list[str], settings: Settings, where: str, *at: int
) -> None:
    for name in names:
        key = "y" if settings.shifted and name == "labels" else name
        found, wanted = np.asarray(batch[key]), expected(data, name, settings, *at)
        assert found.dtype == wanted.dtype, f"{where} {name}"
        assert np.array_equal(found, wanted), f"{where}: `{name}` of {at} is {found}, expected {wanted}"


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("targets", ["labels", "shifted"])
@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_batches_hold_what_plain_python_reads(tmp_path: Path, container: str, targets: str, remainder: str) -> None:
    names = list(COLUMNS)
    data = corpus(tmp_path / "corpus", container, names)
    draw = random.Random(f"{container} {targets} {remainder}")
    for shuffle in ("off", "global", "block"):
        settings = Settings(
            seq_len=draw.choice([5, 16, 33]),
            batch_size=draw.choice([1, 3]),
            targets=targets,
            bos_id=draw.choice([None, 50_001]),
            eos_id=draw.choice([None, 50_002]),
            shuffle=shuffle,
            seed=draw.randrange(100),
            chunk_tokens=64,
            window_tokens=512,
            lanes=2,
            remainder=remainder,
            ignore_index=draw.choice([-100, -1]),
        )
        given = dict(arguments(settings), fields=names, block_tokens=draw.choice([1, 64, 4096]))
        world = draw.choice([1, 2])
        for rank in range(world):
            where = f"{container} {settings} rank {rank} of {world}"
            with forebay.Loader(data, dp_rank=rank, dp_world_size=world, **given) as loader:
                batches = list(loader)
                assert len(batches) == len(loader) > 0
                for step in range(0, len(batches), 7):
                    assert_fields(batches[step], data, names, settings, where, step, rank, world)
                last = len(batches) - 1
                assert_fields(batches[last], data, names, settings, where, last, rank, world)
                assert_fields(loader.batch_at(last), data, names, settings, where, last, rank, world)


def laid_out_fields(data: Path, s: LayoutSettings, boundaries: bool, **marks: int | None) -> list[dict[str, Any]]:
    """Columns of every row, by the specification of layouts: values go where their tokens go."""
    tokens = Documents(data, marks["bos_id"], marks["eos_id"])
    # Lays out the number of each token in the stream, so that a row tells the place of its values.
    numbered = Documents(data, marks["bos_id"], marks["eos_id"])
    count = 0
    for shard in numbered.shards:
        for index, document in enumerate(shard):
            shard[index] = list(range(count, count + len(document)))
            count += len(document)
    settings = Settings(seq_len=1, batch_size=1, ignore_index=s.ignore_index, **marks)
    streams = {name: stream_of(data, name, settings) for name in COLUMNS}
    streams["input_ids"] = [token for shard in tokens.shards for document in shard for token in document]
    lead = s.capacity - s.seq_len
    found = []
    for row in laid_out(numbered, s):
        arrays = {}
        for name, stream in streams.items():
            padding = {"labels": s.ignore_index, "input_ids": 7}.get(name, 0)
            values = [padding] * s.capacity
            is_target = name != "input_ids" and COLUMNS[name][2]
            for place, cut in row:
                for at, number in enumerate(cut, place):
                    is_masked = boundaries and is_target and at == place
                    values[at] = padding if is_masked else stream[number]
            arrays[name] = values[lead:] if is_target else values[: s.seq_len]
        found.append(arrays)
    return found


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("layout", ["concat", "pack", "pad"])
@pytest.mark.parametrize("targets", ["labels", "shifted"])
@pytest.mark.parametrize("boundaries", [False, True])
def test_columns_follow_their_tokens_in_every_layout(
    tmp_path: Path, container: str, layout: str, targets: str, boundaries: bool
) -> None:
    data = corpus(tmp_path / "corpus", container, list(COLUMNS))
    draw = random.Random(f"{container} {layout} {targets}")
    for turn in range(4):
        overflow = "split" if layout == "concat" else draw.choice(["split", "truncate", "drop"])
        align = draw.choice([1, 4]) if layout == "pack" else 1
        s = LayoutSettings(
            layout=layout,
            seq_len=draw.choice([8, 16, 64]),
            targets=targets,
            overflow=overflow,
            pack_align=align,
            ignore_index=draw.choice([-100, -1]),
        )
        marks = {"bos_id": draw.choice([None, 50_001]), "eos_id": draw.choice([None, 50_002])}
        wanted = laid_out_fields(data, s, boundaries, **marks)
        given = {name: value for name, value in {**vars(s), **marks}.items() if value is not None}
        block_tokens, num_threads = draw.choice([1, 64, 4096]), draw.choice([0, 2])
        with forebay.Loader(
            data,
            **given,
            boundaries=boundaries,
            pad_id=7,
            fields=list(COLUMNS),
            block_tokens=block_tokens,
            num_threads=num_threads,
        ) as loader:
            where = f"{container} {s} {marks} {turn}"
            for found, row in zip(loader, wanted, strict=True):
                for name, values in row.items():
                    key = {"input_ids": "x", "labels": "y"}.get(name, name) if targets == "shifted" else name
                    array = np.asarray(found[key])
                    kind = "int64" if name == "input_ids" else COLUMNS[name][1]
                    assert array.dtype == kind, f"{where} {name}"
                    assert np.array_equal(array[0], np.array(values).astype(kind)), f"{where} {name}"


@pytest.mark.parametrize("encoding", ["dictionary", "plain", "delta", "split"])
@pytest.mark.parametrize("page", ["1.0", "2.0"])
@pytest.mark.parametrize("statistics", [True, False])
def test_labels_of_64_bits_take_four_bytes_if_they_fit(
    tmp_path: Path, encoding: str, page: str, statistics: bool
) -> None:
    """The statistics of the file tell whether all values fit. Batches are the same either way."""
    draw = np.random.default_rng(5)
    for most, size in ((2**31 - 1, 4), (2**31, 8), (2**40, 8)):
        ids = draw.integers(0, 50_000, (64, 16), np.int32)
        labels = draw.choice([-(2**31), -100, 0, 7, most], (64, 16))
        labels[0, 0] = most
        table = pa.table({"input_ids": ids.tolist(), "labels": labels.tolist()})
        table = table.cast(pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int64()))]))
        path = tmp_path / f"{most}.parquet"
        leaf = "labels.list.element"
        names = {"plain": "PLAIN", "delta": "DELTA_BINARY_PACKED", "split": "BYTE_STREAM_SPLIT"}
        pq.write_table(
            table, path, data_page_version=page, write_statistics=statistics, use_dictionary=encoding == "dictionary",
            column_encoding={leaf: names[encoding]} if encoding in names else None, row_group_size=16,
        )  # fmt: skip
        # A consumer of a service decodes nothing.
        with forebay.Loader(path, seq_len=16, batch_size=8, fields=["labels"], service=[]) as loader:
            found = np.concatenate([batch["labels"] for batch in loader])
            decoded = loader.stats()["decoded_bytes"]
        assert found.dtype == np.int64
        assert found.tolist() == labels.tolist()
        # The ids take two bytes in the cache if statistics show that they fit.
        assert decoded == 64 * 16 * (2 + size if statistics else 4 + 8)


@pytest.mark.parametrize("stored", [pa.int16(), pa.int32(), pa.int64()])
@pytest.mark.parametrize("targets", ["labels", "shifted"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
def test_places_that_are_no_target_have_the_ignored_index(
    tmp_path: Path, ignore_index: int, targets: str, stored: pa.DataType
) -> None:
    # A stored label stays as it is, though it is the default of the ignored index.
    documents, labels = [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10]], [[-100, -100, 3, 4, 5], [6, 7, -100, 9], [10]]
    columns = {"input_ids": pa.array(documents, pa.list_(pa.int32())), "labels": pa.array(labels, pa.list_(stored))}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pq.write_table(pa.table({"input_ids": columns["input_ids"]}), tmp_path / "b.parquet")
    streams = {
        0: [label for document in labels for label in [*document, ignore_index]],
        1: [token for document in documents for token in [*document, 0]],
    }
    first = int(targets == "shifted")
    wanted = {
        (source, row): stream[first + 4 * row :][:4] for source, stream in streams.items() for row in range(3)
    } | {(-1, -1): [ignore_index] * 4}
    given: dict[str, Any] = dict(seq_len=4, batch_size=4, eos_id=0, targets=targets, ignore_index=ignore_index)
    given |= dict(fields=["labels"], remainder="pad", sample_ids=True, lanes=1)
    sources = [{"name": name, "data": tmp_path / f"{name}.parquet", "weight": 1, "epochs": 1} for name in "ab"]
    seen = set()
    with forebay.Loader(mixture={"sources": sources}, **given) as loader:
        for batch in loader:
            places = zip(batch["source"].tolist(), batch["sample_index"].tolist(), strict=True)
            for place, row in zip(places, batch["y" if first else "labels"].tolist(), strict=True):
                assert row == wanted[place], place
                seen.add(place)
    assert {source for source, _ in seen} == {0, 1, -1}
    with forebay.Loader(tmp_path / "a.parquet", **given) as loader:
        rows = np.concatenate([batch["y" if first else "labels"] for batch in loader]).tolist()
    stream = streams[0][first:]
    assert rows[:4] == [(stream[start : start + 4] + [ignore_index] * 4)[:4] for start in (0, 4, 8, 12)]


@pytest.mark.parametrize("container", ["arrow", "parquet-zstd"])
def test_tensors_have_the_columns_that_are_named(tmp_path: Path, container: str) -> None:
    torch = pytest.importorskip("torch")
    names = list(COLUMNS)
    data = corpus(tmp_path / "corpus", container, names)
    settings = Settings(seq_len=16, batch_size=4, shuffle=resolve_shuffle(True, decoded=container != "arrow"), seed=3)
    dataset = TokenDataset(data, seq_len=16, fields=names)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, seed=3, num_workers=2, drop_last=True)
    batches = list(loader)
    for step in (0, len(batches) - 1):
        assert list(batches[step]) == ["input_ids", "labels", *names[1:]]
        assert all(isinstance(tensor, torch.Tensor) for tensor in batches[step].values())
        assert_fields(batches[step], data, names, settings, container, step, 0, 1)
    row = dataset[3]
    unshuffled = Settings(seq_len=16, batch_size=1)
    assert_fields({key: tensor[None] for key, tensor in row.items()}, data, names, unshuffled, "row", 3, 0, 1)


def test_consumers_of_a_split_loader_get_their_rows_of_every_column(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus", "parquet", ["labels", "loss_mask"])
    with forebay.Loader(data, seq_len=8, batch_size=4, fields=["labels", "loss_mask"]) as loader:
        whole = list(loader)
        parts = loader.split(2)
        for batch in whole[:3]:
            for index, part in enumerate(iter(part) for part in parts):
                rows = next(part)
                assert all(np.array_equal(rows[name], batch[name][index::2]) for name in batch)
            break


def test_a_resumed_run_continues_every_column(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus", "parquet-zstd", ["labels", "score"])
    given: dict[str, Any] = dict(seq_len=16, batch_size=2, shuffle=True, fields=["labels", "score"])
    with forebay.Loader(data, **given) as loader:
        batches = list(loader)
    with forebay.Loader(data, **given) as loader:
        before = iter(loader)
        for _ in range(5):
            next(before)
        state = loader.state_dict()
    with forebay.Loader(data, **given) as loader:
        loader.load_state_dict(state)
        for found, wanted in zip(loader, batches[5:], strict=True):
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    with (
        forebay.Loader(data, **{**given, "fields": ["score"]}) as other,
        pytest.raises(Exception, match="`fields` was `labels,score` when saved and is `score` now"),
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("container", ["arrow", "parquet"])
def test_a_shard_without_tokens_hides_no_column(tmp_path: Path, container: str, place: int) -> None:
    data = corpus(tmp_path / "corpus", container, ["labels"])
    settings: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "fields": ["labels"]}
    with forebay.Loader(data, **settings) as loader:
        wanted = [batch["labels"].tolist() for batch in loader]
    first, *_ = names = [path.name for path in shards(data)]
    assert len(names) >= 2
    table = pa.table({"input_ids": pa.array([[], []], pa.list_(pa.int32()))})
    # A name that sorts before, between or after the others.
    stem = ["!", Path(first).stem + "~", "~"][place]
    path = data / f"{stem}{CONTAINERS[container][0]}"
    if container == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    assert [path.name for path in shards(data)].index(path.name) == (0, 1, len(names))[place]
    with forebay.Loader(data, **settings) as loader:
        assert [batch["labels"].tolist() for batch in loader] == wanted


def test_what_fields_cannot_be_is_said(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus", "parquet", ["labels"])
    with pytest.raises(ValueError, match="up to 8 columns, each once"):
        forebay.Loader(data, fields=["labels", "labels"])
    with pytest.raises(ValueError, match="none called `input_ids`"):
        forebay.Loader(data, fields=["input_ids"])
    with pytest.raises(
        Exception, match="column `mask` of `fields` is missing: the file has `input_ids`, `labels`"
    ) as found:
        forebay.Loader(data, fields=["mask"])
    text = str(found.value)
    assert "; correct `fields`, or write the column into every file" in text
    assert text.count("missing") == text.count("mask` of"), f"said once of each file: {text}"


def verified(*given: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "forebay", "verify", *map(str, given), "--json"],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["proven"] == (done.returncode == 0)
    return found


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("targets", ["labels", "shifted"])
def test_verify_proves_every_column(tmp_path: Path, container: str, targets: str) -> None:
    names = list(COLUMNS)
    data = corpus(tmp_path / "corpus", container, names)
    given: list[Any] = [data, "--seq-len", 16, "--shuffle", "--set", f"targets={targets}", "--set", "eos_id=50001"]
    given += ["--set", "lanes=2", "--set", "chunk_tokens=64", "--set", "window_tokens=512", "--set", "remainder=pad"]
    with_fields = verified(*given, "--set", f"fields={','.join(names)}", "--world-size", 2)
    assert with_fields["proven"]
    alone = verified(*given)
    assert alone["proven"] and alone["found"]["rows"] == with_fields["found"]["rows"]
    assert alone["found"]["hash"] != with_fields["found"]["hash"]


def test_a_value_that_changed_after_the_run_is_not_proven(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus", "arrow", ["labels", "small"])
    log = tmp_path / "log"
    given: dict[str, Any] = dict(seq_len=16, remainder="pad", fields=["labels", "small"])
    with forebay.Loader(data, delivery_log=log, **given) as loader:
        assert len(list(loader)) > 10
    asked = [data, "--seq-len", 16, "--set", "remainder=pad", "--set", "fields=labels,small", "--delivery-log", log]
    assert verified(*asked)["proven"]
    shard = data / "1.arrow"
    labels = read_table(shard).column("labels").chunk(0).flatten().to_numpy()
    content = shard.read_bytes()
    at = content.index(labels.tobytes())
    shard.write_bytes(content[:at] + np.int32(labels[0] ^ 1).tobytes() + content[at + 4 :])
    assert not verified(*asked)["proven"]


def rewritten(data: Path, target: Path, *given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forebay", "rewrite", str(data), str(target), *map(str, given)],
        capture_output=True, text=True, env=clean_environment(), timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("container", ["arrow", "arrow-zstd", "parquet-zstd"])
@pytest.mark.parametrize("to", ["arrow", "parquet"])
def test_rewrite_carries_every_column(tmp_path: Path, container: str, to: str) -> None:
    names = list(COLUMNS)
    data = corpus(tmp_path / "corpus", container, names)
    named = f"fields={','.join(names)}"
    # Shards are cut, or joined.
    for tokens in (150, 1500):
        target = tmp_path / f"target-{tokens}"
        done = rewritten(data, target, "--to", to, "--shard-tokens", tokens, "--batch-tokens", 100, "--set", named)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (len(shards(target)) > 3) == (tokens == 150)
        assert_same(data, target, names)


def assert_same(data: Path, target: Path, names: list[str]) -> None:
    for path in shards(target):
        for name in names:
            assert read_table(path).schema.field(name).type.value_type == COLUMNS[name][0], f"{path} {name}"
    given: dict[str, Any] = dict(seq_len=16, batch_size=2, shuffle="global", seed=2, remainder="pad", fields=names)
    with forebay.Loader(data, **given) as before, forebay.Loader(target, **given) as after:
        for found, wanted in zip(after, before, strict=True):
            assert list(found) == list(wanted)
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("names", "them"), [(["labels"], "it"), (["labels", "weights"], "them")])
def test_rewrite_tells_how_to_keep_the_columns_that_it_leaves_out(tmp_path: Path, names: list[str], them: str) -> None:
    data = corpus(tmp_path / "corpus", "parquet", names)
    listed = ", ".join(f"`{name}`" for name in names)
    advice = f"{listed}: `--set fields={','.join(names)}` keeps {them}"
    assert advice in rewritten(data, tmp_path / "arrow").stdout
    flat = rewritten(data, tmp_path / "flat", "--to", "npy").stdout
    assert listed in flat and "keeps" not in flat, "flat files hold no further columns"
    kept = rewritten(data, tmp_path / "kept", "--set", f"fields={','.join(names)}").stdout
    assert "left out" not in kept and "sound" in kept


@pytest.mark.parametrize("has_labels", [False, True])
def test_a_mask_of_attention_that_is_not_read_is_not_told_as_a_mask_of_the_loss(
    tmp_path: Path, caplog: Any, has_labels: bool
) -> None:
    path = tmp_path / "a.parquet"
    columns = {"input_ids": [[1, 2]] * 4, "attention_mask": [[1, 1]] * 4}
    pq.write_table(pa.table({**columns, **({"labels": [[1, 2]] * 4} if has_labels else {})}), path)
    with caplog.at_level("WARNING", "forebay"):
        forebay.Loader(path, seq_len=2).close()
    assert f"`attention_mask` is not read, as in `{path}`: rows must hold no padding" in caplog.text
    assert ("`labels` is not read" in caplog.text) == ("become targets" in caplog.text) == has_labels
    caplog.clear()
    with caplog.at_level("WARNING", "forebay"), forebay.Loader(path, seq_len=2, fields=["attention_mask"]) as loader:
        assert len(list(loader)) == len(loader)
    assert "attention_mask" not in caplog.text


def test_rewrite_names_the_row_that_does_not_fit(tmp_path: Path) -> None:
    data = tmp_path / "corpus"
    data.mkdir()
    columns = {"input_ids": [[1, 2], [3], [4, 5]], "labels": [[1, 2], [3, 4], [5]]}
    pq.write_table(pa.table(columns), data / "a.parquet")
    done = rewritten(data, tmp_path / "target", "--set", "fields=labels")
    assert done.returncode == 1
    assert "column `labels` must have a value for each token: expected 1, found 2" in done.stderr
    assert "a.parquet" in done.stderr and "row 1" in done.stderr


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("special", [None, 7])
def test_an_attention_mask_that_hides_a_token_is_refused(tmp_path: Path, container: str, special: int | None) -> None:
    suffix, codec = CONTAINERS[container]
    rows = [[1, 2, 3], [], None, [4] * 40, [5, 6], [], [7, 8, 9]]
    masks = [[1] * len(row or []) for row in rows]
    masks[4] = [1, 0]
    table = pa.table({"input_ids": rows, "attention_mask": pa.array(masks, pa.list_(pa.int8()))})
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, compression=codec, row_group_size=2)
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression=None if codec == "none" else codec)
        with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=2)
    loader = forebay.Loader(path, seq_len=4, fields=["attention_mask"], eos_id=special)
    with pytest.raises(forebay.DataError, match="`attention_mask` is 0 at a token: expected 1 at every token") as found:
        for _ in loader:
            pass
    assert (found.value.path, found.value.row) == (str(path), 4)
    assert "leave the column out of `fields`" in str(found.value)


@pytest.mark.parametrize("kind", [pa.uint16(), pa.int64()])
@pytest.mark.parametrize("layout", ["pack", "pad", "concat"])
def test_positions_of_a_column_replace_derived_ones(tmp_path: Path, layout: str, kind: pa.DataType) -> None:
    rows = [[number * 10 + place for place in range(1 + number % 5)] for number in range(30)]
    # No position is derived: they count backwards.
    positions = [list(range(len(row)))[::-1] for row in rows]
    pairs = zip(rows, positions, strict=True)
    of_token = {token: place for row, places in pairs for token, place in zip(row, places, strict=True)}
    table = pa.table({"input_ids": rows, "position_ids": pa.array(positions, pa.list_(kind))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    given: dict[str, Any] = {"seq_len": 8, "batch_size": 2, "layout": layout, "boundaries": True, "pad_id": 9999}
    with (
        forebay.Loader(tmp_path, fields=["position_ids"], **given) as own,
        forebay.Loader(tmp_path, **given) as without,
    ):
        for batch, other in zip(own, without, strict=True):
            wanted = [[of_token.get(token, 0) for token in row] for row in batch["input_ids"].tolist()]
            assert batch["position_ids"].tolist() == wanted
            assert batch["position_ids"].dtype == np.int64
            for name in ("input_ids", "labels", "doc_ids", "cu_seqlens"):
                assert np.array_equal(batch[name], other[name])
    asked = [tmp_path, "--seq-len", 8, "--set", f"layout={layout}", "--set", "boundaries=true"]
    hashes = [verified(*asked, "--set", f"fields={names}")["found"]["hash"] for names in ("none", "position_ids")]
    assert hashes[0] != hashes[1]
    with pytest.raises(forebay.ConfigError, match="`position_ids` does not go with `bos_id` and `eos_id`"):
        forebay.Loader(tmp_path, fields=["position_ids"], eos_id=0, **given)
