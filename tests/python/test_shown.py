"""Tests how loaders, datasets, plans and stats show themselves in terminals and notebooks."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

import forebay
from forebay import Loader, Plan, Stats


class Tables(HTMLParser):
    """Collects the cells of tables. Fails if a tag is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    # The name would change the page, if it were not escaped.
    folder = tmp_path / "a<b>&c"
    folder.mkdir()
    pq.write_table(pa.table({"input_ids": [list(range(100))] * 50}), folder / "a.parquet")
    return folder


def test_a_loader_shows_its_facts(corpus: Path) -> None:
    with Loader(corpus, seq_len=16, batch_size=4) as loader:
        assert "a<b>&c: 312 sequences of 16, rank 0 of 1, 78 batches of 4>" in repr(loader)
        rows = dict(Tables(loader._repr_html_()).rows)
        assert rows["data"].endswith("a<b>&c")
        assert (rows["batches"], rows["rank"], rows["epoch"]) == ("78 batches of 4", "0 of 1", "0")
        assert rows["verdict"] == "no batches yet"
    endless = Loader(corpus, seq_len=16, epochs="endless")
    assert "endless batches of 1" in repr(endless)
    with pytest.raises(TypeError):
        len(endless)
    two = Loader([corpus / "a.parquet", corpus / "*.parquet"][:1], seq_len=16)
    assert "a.parquet: 312 sequences" in repr(two)
    failed = Loader.__new__(Loader)
    assert "not opened" in repr(failed) and "not opened" in failed._repr_html_()


def test_every_value_of_stats_has_a_unit_and_a_meaning(corpus: Path) -> None:
    with Loader(corpus, seq_len=16, batch_size=4) as loader:
        for _ in loader:
            pass
        stats = loader.stats()
    assert type(stats) is Stats and json.loads(json.dumps(stats)) == stats and stats["batches"] == 78
    assert repr(stats).startswith("Stats({'batches': 78")
    documented = set(re.findall(r"- ``(\w+)`` \(", Stats.__doc__ or ""))
    assert documented == set(stats)
    head, *rows = Tables(stats._repr_html_()).rows
    assert head == ["name", "value", "unit", "meaning"] and [row[0] for row in rows] == list(stats)
    assert all(unit and meaning.endswith(".") for _, _, unit, meaning in rows)
    for name in stats:
        for ending, unit in (("_seconds", "seconds"), ("_share", "0 to 1"), ("_bytes", "bytes")):
            if name.endswith(ending):
                assert next(row for row in rows if row[0] == name)[2] == unit, name


def test_a_plan_is_that_of_the_run(corpus: Path) -> None:
    with Loader(corpus, seq_len=16, batch_size=4, dp_rank=0, dp_world_size=2, shuffle=True) as loader:
        plan = loader.plan()
        assert type(plan) is Plan and json.loads(json.dumps(plan)) == plan
        assert plan["pass"]["steps"] == len(loader) == len(list(loader)) == 39
        assert "39 on each of 2 ranks" in str(plan) and str(plan) in repr(plan)
        rows = Tables(plan._repr_html_()).rows
    assert [name for name, _ in rows][:3] == ["corpus", "sequences", "order"]
    assert [line.split() for line in str(plan).splitlines()] == [" ".join(row).split() for row in rows]
    with pytest.raises(forebay.ClosedError):
        loader.plan()


def test_progress_bars_know_the_end(corpus: Path) -> None:
    tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed")
    with Loader(corpus, seq_len=16, batch_size=4) as loader:
        bar = tqdm.tqdm(loader, disable=None, file=open("/dev/null", "w"))  # noqa: SIM115
        assert bar.total == len(loader) == 78 == sum(1 for _ in bar)
    assert tqdm.tqdm(Loader(corpus, seq_len=16, epochs="endless"), disable=True).total is None


def test_torch_loaders_and_datasets_show_themselves(corpus: Path) -> None:
    pytest.importorskip("torch", reason="tests of forebay.torch")
    from forebay.torch import DataLoader, TokenDataset

    dataset = TokenDataset(corpus, seq_len=16)
    assert repr(dataset) == f"<TokenDataset of {corpus}, seq_len=16>"
    assert len(dataset) == 312 and repr(dataset) == f"<TokenDataset of {corpus}: 312 sequences, seq_len=16>"
    assert dict(Tables(dataset._repr_html_()).rows) == {"data": str(corpus), "seq_len": "16", "sequences": "312"}
    loader = DataLoader(dataset, batch_size=4, drop_last=True)
    assert repr(loader) == f"<DataLoader of {corpus}: 312 sequences of 16, rank 0 of 1, 78 batches of 4>"
    assert dict(Tables(loader._repr_html_()).rows)["batches"] == "78 batches of 4"
    assert loader.plan()["pass"]["steps"] == 78 and type(loader.stats()) is Stats
    other = DataLoader([1, 2, 3], num_workers=2)
    assert (
        repr(other)
        == "<DataLoader of any dataset, 2 threads: [1, 2, 3]>"
        in other._repr_html_().replace("&lt;", "<").replace("&gt;", ">")
    )
    assert list(other) and set(other.stats()) == {"batches", "elapsed_seconds", "wait_seconds", "wait_share"}
    assert all(meaning for *_, meaning in Tables(other.stats()._repr_html_()).rows)
