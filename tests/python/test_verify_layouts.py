"""Protects: `forebay verify` proves every layout, and sees wrong borders of documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import corpora
import pyarrow.parquet as pq
import pytest
import test_fields
from support import clean_environment
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
    {"layout": "concat", "phase": "epoch", "remainder": "pad"},
    {"layout": "concat", "phase": "epoch", "boundaries": True, "eos_id": 50_001},
    {"layout": "pack", "holdout": 3, "split": "train", "overflow": "drop"},
    {"layout": "pack", "holdout": 3, "split": "holdout", "eos_id": 50_001},
    {"layout": "pad", "holdout": 2, "split": "holdout", "overflow": "truncate"},
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


@pytest.mark.parametrize("boundaries", [True, False])
def test_every_epoch_with_moved_cuts_is_proven(tmp_path: Path, boundaries: bool) -> None:
    data = corpus(tmp_path / "corpus", "parquet", ["loss_mask"])
    settings = {**ORDER, "phase": "epoch", "boundaries": boundaries, "remainder": "pad"}
    hashes = {verified(data, settings, "--epoch", epoch)["found"]["hash"] for epoch in range(3)}
    assert len(hashes) == 3, "the rows of an epoch are its own"
    with forebay.Loader(data, epochs=3, delivery_log=tmp_path / "log", **settings) as loader:
        assert len(list(loader)) > 0
    assert verified(data, settings, "--delivery-log", tmp_path / "log")["proven"]
    # The shortest corpus has one row, which is padded.
    (tmp_path / "short").mkdir()
    corpora.write_rows(tmp_path / "short" / "0.arrow", [[1, 2], [3]])
    assert verified(tmp_path / "short", settings, "--epoch", 2)["proven"]


SEARCHED: list[dict[str, Any]] = [
    {"layout": "pack"},
    {"layout": "pack", "overflow": "drop", "holdout": 3, "split": "train", "balance": "ranks"},
    {"layout": "pad", "overflow": "truncate", "holdout": 2, "split": "holdout"},
    {"layout": "pad", "targets": "shifted"},
    {"layout": "concat", "targets": "shifted"},
    {"layout": "concat", "phase": "epoch", "remainder": "pad"},
]


@pytest.mark.parametrize("layout", SEARCHED, ids=str)
@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_documents_of_steps_and_steps_of_documents_are_those_that_were_delivered(
    tmp_path: Path, layout: dict[str, Any], suffix: str
) -> None:
    draw, token, of_token = Random(1), 1, {}
    (tmp_path / "corpus").mkdir()
    for shard in range(2):
        rows = []
        for row in range(40):
            rows.append(list(range(token, token + draw.choice([0, 1, 5, 16, 40]))))
            of_token.update({token: (f"{shard}{suffix}", row) for token in rows[-1]})
            token += len(rows[-1])
        corpora.write_rows(tmp_path / "corpus" / f"{shard}{suffix}", rows)
    # Ranks that share a lane can be balanced.
    settings = {**ORDER, **layout, "lanes": 1}
    seen: dict[tuple[int, int, int], set[tuple[str, int]]] = {}
    for rank in range(2):
        given: dict[str, Any] = {"dp_rank": rank, "dp_world_size": 2, "batch_size": 2, "epochs": 2, "sample_ids": True}
        with forebay.Loader(tmp_path / "corpus", delivery_log=tmp_path / "log", **given, **settings) as loader:
            inputs, targets = ("x", "y") if layout.get("targets") == "shifted" else ("input_ids", "labels")
            for step, batch in enumerate(loader):
                for ids, labels, number in zip(batch[inputs], batch[targets], batch["sample_index"], strict=True):
                    tokens = {int(token) for token in [*ids, *labels] if token > 0}
                    if number >= 0:
                        seen[step, rank, int(number)] = {of_token[token] for token in tokens}
    log = ["--delivery-log", tmp_path / "log"]
    proof = verified(tmp_path / "corpus", settings, *log)
    assert proof["proven"]
    # Batches run on across epochs, so that both epochs are one group.
    for step in (0, 1, max(step for step, _, _ in seen)):
        shown = searched(tmp_path / "corpus", settings, *log, "--step", step)
        found = {(one["sequence"], one["shard"], one["row"]) for one in shown["documents"]}
        assert found == {
            (number, *document) for (at, _, number), documents in seen.items() if at == step for document in documents
        }
    delivered = {document for documents in seen.values() for document in documents}
    for document in draw.sample(sorted(delivered), 3):
        shown = searched(tmp_path / "corpus", settings, *log, "--document", "{}:{}".format(*document))
        found = {(hit["step"], hit["rank"], hit["sequence"]) for hit in shown["deliveries"] if hit["step"] is not None}
        wanted = {place for place, documents in seen.items() if document in documents}
        if layout.get("balance") == "ranks":
            assert all(rank is None for _, rank, _ in found)
            wanted = {(step, None, number) for step, _, number in wanted}
        assert found == wanted


def searched(data: Path, settings: dict[str, Any], *given: Any) -> dict[str, Any]:
    sets = [text for name, value in settings.items() for text in ("--set", f"{name}={str(value).lower()}")]
    command = [sys.executable, "-m", "forebay", "verify", data, *sets, *given, "--json"]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=clean_environment(), timeout=60, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


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
