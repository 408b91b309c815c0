"""Tests that `phase="epoch"` moves the cuts of `concat`, and loses no token.

`test_contract.py` compares random runs with the specification. Here the moves are pinned, and the
settings that do not go together are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora

import forebay

SETTINGS: dict[str, Any] = {"seq_len": 8, "phase": "epoch", "seed": 7}
#: The first token of each epoch's first row, where token `n` stands at place `n`.
FIRST = [1, 5, 4, 3, 0, 3]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    corpora.write_rows(folder / "0.arrow", [list(range(10)), list(range(10, 30))])
    corpora.write_rows(folder / "1.arrow", [list(range(30, 43))])
    return folder


def test_the_phases_are_pinned(data: Path) -> None:
    with forebay.Loader(data, epochs=6, **SETTINGS) as loader:
        rows = [batch["input_ids"][0].tolist() for batch in loader]
    assert len(rows) == 6 * 5
    for epoch, first in enumerate(FIRST):
        places = [(first + place) % 43 for place in range(40)]
        assert rows[epoch * 5 : epoch * 5 + 5] == [places[at : at + 8] for at in range(0, 40, 8)], epoch


@pytest.mark.parametrize("targets", ["labels", "shifted"])
@pytest.mark.parametrize("shuffle", [False, True, "block"])
def test_every_epoch_has_each_token_once(data: Path, targets: str, shuffle: Any) -> None:
    settings = {**SETTINGS, "targets": targets, "shuffle": shuffle, "remainder": "pad", "pad_id": 99}
    seen = set()
    for epoch in range(4):
        with forebay.Loader(data, **settings) as loader:
            loader.set_epoch(epoch)
            inputs = "x" if targets == "shifted" else "input_ids"
            rows = [tuple(row.tolist()) for batch in loader for row in batch[inputs]]
        tokens = sorted(token for row in rows for token in row if token != 99)
        if targets == "labels":
            assert tokens == list(range(43))
        else:
            # The last token of the epoch is a target alone, unless padding follows it.
            assert len(tokens) == len(set(tokens)) and len(tokens) >= 42
        seen.add(frozenset(rows))
    assert len(seen) > 1, "epochs are cut at different places"


def test_the_seam_is_a_border_of_documents(data: Path) -> None:
    with forebay.Loader(data, boundaries=True, epochs=6, **SETTINGS) as loader:
        for batch in loader:
            [ids], [labels], [numbers] = batch["input_ids"], batch["labels"], batch["doc_ids"]
            starts = [at for at, token in enumerate(ids) if at == 0 or token in (0, 10, 30)]
            assert [int(np.argmax(numbers == number)) for number in range(numbers.max() + 1)] == starts
            assert [at for at, label in enumerate(labels) if label == -100] == starts


def test_a_state_belongs_to_its_phase(data: Path) -> None:
    with forebay.Loader(data, **SETTINGS) as loader:
        next(iter(loader))
        state = loader.state_dict()
    other = forebay.Loader(data, **{**SETTINGS, "phase": "fixed"})
    with other, pytest.raises(ValueError, match="`phase`") as refused:
        other.load_state_dict(state)
    assert "epoch" in str(refused.value) and "fixed" in str(refused.value), "both values are named"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"holdout": 4}, "rows of `holdout` would be trained on in another epoch"),
        ({"layout": "pack"}, "`phase` is for `layout` = concat, found `layout` = pack"),
    ],
    ids=["holdout", "pack"],
)
def test_settings_that_moved_cuts_would_break_are_refused(data: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forebay.Loader(data, **SETTINGS, **more)
