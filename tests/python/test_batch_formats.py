"""Tests that batches have the names, shapes, types and values that each trainer takes.

`reference_formats.py` is the judge. It makes the batch of a trainer of the batch without a format.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference_formats import DTYPES, FORMATS, SHIFTED, expected

import forebay

torch = pytest.importorskip("torch", reason="tests of forebay.torch")
from forebay.torch import DataLoader, TokenDataset  # noqa: E402

SEQ_LEN = 12
LAYOUTS: dict[str, dict[str, Any]] = {
    "concat": {},
    "concat with boundaries": {"boundaries": True},
    "concat, padded": {"remainder": "pad", "batch_size": 5},
    "pack": {"layout": "pack"},
    "pack, aligned": {"layout": "pack", "pack_align": 4, "cu_seqlens_width": 40},
    "pad": {"layout": "pad"},
    "pad with boundaries": {"layout": "pad", "boundaries": True},
    "pad, padded": {"layout": "pad", "remainder": "pad", "batch_size": 5},
}
FIELDS: dict[str, tuple[str, ...]] = {
    "no fields": (),
    "labels": ("labels",),
    "mask": ("loss_mask",),
    "labels and masks": ("labels", "completion_mask", "assistant_masks", "attention_mask"),
    "weights": ("loss_mask", "weights", "score"),
}
TYPES = {
    "labels": pa.int32(), "loss_mask": pa.bool_(), "completion_mask": pa.uint8(), "assistant_masks": pa.int64(),
    "attention_mask": pa.int8(), "weights": pa.float32(), "score": pa.int16(),
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    draw = random.Random(7)
    for shard in range(2):
        lengths = [draw.choice([1, 2, 5, 9, 30]) for _ in range(24)]
        ids = [[draw.randrange(1, 50_000) for _ in range(length)] for length in lengths]
        columns: dict[str, Any] = {"input_ids": pa.array(ids, pa.list_(pa.int32()))}
        for name, kind in TYPES.items():
            values = [
                {"attention_mask": 1, "labels": draw.choice([-100, 17, 40_000]), "weights": draw.randrange(8) / 4}.get(
                    name, draw.randrange(2)
                )
                for _ in range(sum(lengths))
            ]
            ends = np.cumsum([0, *lengths]).astype(np.int32)
            columns[name] = pa.ListArray.from_arrays(ends, pa.array(values).cast(kind))
        pq.write_table(pa.table(columns), folder / f"{shard}.parquet")
    return folder


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(plain(part) for part in value)
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def fits(name: str, layout: dict[str, Any], fields: tuple[str, ...]) -> bool:
    has_boundaries = layout.get("boundaries", layout.get("layout") == "pack")
    if name == "hf-packed" and not has_boundaries:
        return False
    return not (name in ("titan", "xy") and "weights" in fields)


def settings_of(layout: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    return {"seq_len": SEQ_LEN, "batch_size": 3, "shuffle": True, "fields": fields, "eos_id": 0, **layout}


def assert_types(name: str, made: Any) -> None:
    arrays = made
    if name == "titan":
        arrays = made[0]
        assert str(made[1].dtype).endswith("int64")
    elif name == "xy":
        assert [str(array.dtype).removeprefix("torch.") for array in made] == ["int64", "int64"]
        return
    for key, dtype in DTYPES[name].items():
        if key in arrays:
            assert str(arrays[key].dtype).removeprefix("torch.") == dtype, key
    for key in ("max_length_q", "max_length_k"):
        assert type(arrays.get(key, 0)) is int


CASES = [
    (name, layout, fields)
    for name in FORMATS
    for layout in LAYOUTS
    for fields in FIELDS
    # All others are refused: see below.
    if fits(name, LAYOUTS[layout], FIELDS[fields])
]


@pytest.mark.parametrize(("name", "layout", "fields"), CASES)
def test_batches_are_those_of_the_reference(corpus: Path, name: str, layout: str, fields: str) -> None:
    settings = settings_of(LAYOUTS[layout], FIELDS[fields])
    targets = "shifted" if name in SHIFTED else "labels"
    usual = list(forebay.Loader(corpus, targets=targets, **settings))
    loader = forebay.Loader(corpus, batch_format=name, **settings)
    assert loader.config["targets"] == targets
    of_torch = {key: settings.pop(key) for key in ("batch_size", "shuffle", "remainder") if key in settings}
    tensors = DataLoader(TokenDataset(corpus, **settings), batch_format=name, drop_last=True, **of_torch)
    kind = settings.get("layout", "concat")
    ones = settings_of(LAYOUTS[layout], ("attention_mask",)) | {"targets": targets}
    real_rows = [plain(batch["attention_mask"]) for batch in forebay.Loader(corpus, **ones)]
    steps = 0
    for step, (batch, arrays, of_tensors) in enumerate(zip(usual, loader, tensors, strict=True)):
        shape: dict[str, Any] = {"layout": kind, "ignore_index": -100, "fields": FIELDS[fields]}
        wanted = expected(name, plain(batch), real_rows[step], **shape)
        for made in (arrays, of_tensors):
            assert plain(made) == wanted
            assert_types(name, made)
        assert plain(loader.batch_at(step)) == plain(tensors.batch_at(step)) == wanted
        steps += 1
    assert steps == len(loader) > 0


@pytest.mark.parametrize("name", SHIFTED)
def test_labels_at_the_places_of_their_tokens_can_be_asked_for(corpus: Path, name: str) -> None:
    settings = settings_of({"layout": "pack", "targets": "labels"}, ("labels", "loss_mask"))
    usual = forebay.Loader(corpus, **settings)
    loader = forebay.Loader(corpus, batch_format=name, **settings)
    batches = iter(loader)
    for step, batch in enumerate(usual):
        real = [[int(number >= 0) for number in row] for row in plain(batch["doc_ids"])]
        assert plain(next(batches)) == expected(name, plain(batch), real, layout="pack", ignore_index=-100)
        if step == 3:
            # The position of a run does not depend on the format.
            state = usual.state_dict()
            assert state == loader.state_dict()
            fresh = forebay.Loader(corpus, batch_format="hf-packed", **settings)
            fresh.load_state_dict(state)
            assert plain(next(iter(fresh))) == plain(
                forebay.Loader(corpus, batch_format="hf-packed", **settings).batch_at(4)
            )


@pytest.mark.parametrize("name", FORMATS)
def test_consumers_of_a_split_get_batches_of_the_format(corpus: Path, name: str) -> None:
    settings = {**settings_of({"layout": "pack"}, ("loss_mask",)), "batch_size": 4}
    targets = "shifted" if name in SHIFTED else "labels"
    parts = [iter(part) for part in forebay.Loader(corpus, targets=targets, **settings).split(2)]
    formatted = [iter(part) for part in forebay.Loader(corpus, batch_format=name, **settings).split(2)]
    of_torch = {key: settings.pop(key) for key in ("batch_size", "shuffle")}
    whole: Any = DataLoader(TokenDataset(corpus, **settings), batch_format=name, drop_last=True, **of_torch)
    tensors = [iter(part) for part in whole.split(2)]
    for _ in range(3):
        for usual, arrays, of_torch_part in zip(parts, formatted, tensors, strict=True):
            batch = plain(next(usual))
            real = [[int(number >= 0) for number in row] for row in batch["doc_ids"]]
            wanted = expected(name, batch, real, layout="pack", ignore_index=-100)
            assert plain(next(arrays)) == plain(next(of_torch_part)) == wanted


def test_arrays_stay_views_of_the_batch(corpus: Path) -> None:
    settings = settings_of({"layout": "pack"}, ("loss_mask",))
    packed = forebay.Loader(corpus, batch_format="hf-packed", **settings).batch_at(0)
    assert not any(packed[name].flags.owndata for name in ("input_ids", "labels", "position_ids", "cu_seq_lens_q"))
    inputs, labels = forebay.Loader(corpus, batch_format="titan", **settings).batch_at(0)
    assert not any(array.flags.owndata for array in (inputs["input"], inputs["positions"], labels))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_format": "hf-packed"}, ["starts of documents", "`layout` = pack", "`boundaries` = true"]),
        ({"batch_format": "hf", "targets": "shifted"}, ["`targets` = labels"]),
        ({"batch_format": "olmo", "targets": "shifted"}, ["`targets` = labels"]),
        ({"batch_format": "xy", "sample_ids": True}, ["no place for `sample_ids`"]),
        ({"batch_format": "titan", "fields": ["score"]}, ["no place for the column `score`", "another format"]),
        ({"batch_format": "xy", "fields": ["weights"]}, ["no place for the column `weights`"]),
        ({"batch_format": "llama"}, ["`hf`, `hf-packed`, `titan`"]),
    ],
)
def test_settings_that_do_not_fit_a_format_are_refused(
    corpus: Path, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(forebay.ConfigError) as raised:
        forebay.Loader(corpus, seq_len=SEQ_LEN, **settings)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_column_with_the_name_of_an_array_of_the_format_is_refused(tmp_path: Path) -> None:
    table = {"input_ids": [[1, 2, 3]] * 20, "tokens": [[1, 2, 3]] * 20}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(forebay.ConfigError, match="an array `tokens` of its own: leave that column out of `fields`"):
        forebay.Loader(tmp_path, seq_len=4, fields=["tokens"], batch_format="megatron")


def test_the_origin_of_targets_names_the_format(corpus: Path) -> None:
    loader = forebay.Loader(corpus, seq_len=SEQ_LEN, batch_format="xy")
    assert loader.origins["targets"] == "`batch_format` = xy"
    with pytest.raises(forebay.StateMismatchError, match="targets"):
        loader.load_state_dict(forebay.Loader(corpus, seq_len=SEQ_LEN).state_dict())
