"""Protects: `forebay verify` proves every layout, and sees wrong borders of documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import corpora
import pyarrow.parquet as pq
import pytest
import test_fields
from test_fields import COLUMNS, corpus

import forebay

LAYOUTS: list[dict[str, Any]] = [
    {"layout": "pack"},
    {"layout": "pack", "overflow": "drop", "max_docs_per_row": 3, "boundaries": False},
    {"layout": "pack", "overflow": "truncate", "pack_align": 4, "eos_id": 50_001},
    {"layout": "pad"},
    {"layout": "pad", "overflow": "truncate", "boundaries": True},
    {"layout": "pad", "pad_to_multiple": 4, "bucket": 16, "boundaries": True},
    {"layout": "concat", "boundaries": True, "eos_id": 50_001},
    {"layout": "concat", "boundaries": True, "bos_id": 50_002, "remainder": "pad"},
]
ORDER = {"shuffle": "block", "lanes": 2, "chunk_tokens": 64, "window_tokens": 512, "seq_len": 16}


def verified(data: Path, settings: dict[str, Any], *given: Any) -> dict[str, Any]:
    sets = [text for name, value in settings.items() for text in ("--set", f"{name}={str(value).lower()}")]
    return test_fields.verified(data, *sets, *given)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("targets", ["labels", "shifted"])
@pytest.mark.parametrize("container", ["arrow", "parquet-zstd"])
def test_every_layout_is_proven(tmp_path: Path, layout: dict[str, Any], targets: str, container: str) -> None:
    data = corpus(tmp_path / "corpus", container, list(COLUMNS))
    settings = {**ORDER, **layout, "targets": targets}
    alone = verified(data, settings, "--world-size", 2)
    assert alone["proven"] and alone["found"]["rows"] > 0
    with_fields = verified(data, {**settings, "fields": ",".join(COLUMNS)})
    assert with_fields["proven"] and with_fields["found"]["hash"] != alone["found"]["hash"]
    masks = verified(data, {**settings, "fields": "loss_mask,weights"})
    assert masks["proven"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_is_proven_from_its_delivery_log(tmp_path: Path, layout: dict[str, Any]) -> None:
    data = corpus(tmp_path / "corpus", "parquet", ["loss_mask"])
    settings = {**ORDER, **layout, "fields": "loss_mask"}
    given = {**ORDER, **layout, "fields": ["loss_mask"]}
    for rank in range(2):
        ranks: dict[str, Any] = {"dp_rank": rank, "dp_world_size": 2, "batch_size": 2}
        with forebay.Loader(data, delivery_log=tmp_path / "log", **ranks, **given) as loader:
            assert len(list(loader)) > 0
    logged = verified(data, settings, "--delivery-log", tmp_path / "log")
    assert logged["proven"]


@pytest.mark.parametrize("layout", ["pack", "concat"])
def test_wrong_borders_are_not_proven(tmp_path: Path, layout: str) -> None:
    (tmp_path / "corpus").mkdir()
    shard = tmp_path / "corpus" / "0.parquet"
    corpora.write_rows(shard, [[1] * 5, [2] * 11, [3] * 9, [4] * 7])
    settings = {"layout": layout, "boundaries": True, "seq_len": 16}
    with forebay.Loader(tmp_path / "corpus", delivery_log=tmp_path / "log", **settings) as loader:
        assert len(list(loader)) == 2
    given = (tmp_path / "corpus", settings, "--delivery-log", tmp_path / "log")
    assert verified(*given)["proven"]
    # The same tokens in the same rows, with another border.
    corpora.write_rows(shard, [[1] * 5, [2] * 11, [3] * 9 + [4], [4] * 6])
    assert pq.read_table(shard).num_rows == 4
    assert not verified(*given)["proven"]
