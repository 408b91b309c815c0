"""Tests the stand-in for `torch.utils.data`, with PyTorch's meaning of every argument."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from reference import Reference, Settings, token_stream

pytest.importorskip("torch", reason="tests of forebay.torch")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import torch
from support import assert_batch, run_python

from forebay.torch import DataLoader, TokenDataset

SEQ_LEN = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("torch") / "corpus", "parquet", 2000, shards=2)


@pytest.fixture
def dataset(corpus: Path) -> Any:
    return TokenDataset(corpus, seq_len=SEQ_LEN)


def reference(corpus: Path, **settings: Any) -> Reference:
    return Reference(token_stream(corpus), Settings(seq_len=SEQ_LEN, **settings))


def test_importing_forebay_does_not_import_torch() -> None:
    run_python("import sys, forebay; assert 'torch' not in sys.modules")


def test_dataset_is_map_style(corpus: Path, dataset: Any) -> None:
    assert isinstance(dataset, torch.utils.data.Dataset)
    assert not isinstance(dataset, torch.utils.data.IterableDataset)
    wanted = reference(corpus)
    assert len(dataset) == wanted.num_sequences == 125
    for index in (0, 1, 77, 124, -1):
        row = dataset[index]
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
        assert row["input_ids"].tolist() == wanted.sequence(index % 125)[0]
    with pytest.raises(IndexError):
        dataset[125]
    with pytest.raises(IndexError):
        dataset[-126]


@pytest.mark.thread_unsafe(reason="torch starts processes, which it does once for the whole process")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataset_works_in_the_stock_loader(dataset: Any, corpus: Path, workers: int, context: str) -> None:
    _ = dataset[3]
    stock = torch.utils.data.DataLoader(
        dataset, batch_size=10, num_workers=workers, multiprocessing_context=context if workers else None
    )
    wanted = reference(corpus, batch_size=10, remainder="short")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for batch, rows in zip(stock, wanted.batches(), strict=True):
            assert_batch(batch, rows)


def test_dataset_pickles_small(dataset: Any) -> None:
    import pickle

    _ = dataset[0]
    data = pickle.dumps(dataset)
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data)[5]["input_ids"], dataset[5]["input_ids"])


@pytest.mark.parametrize("shuffle", [False, True, "global"])
@pytest.mark.parametrize("workers", [0, 3])
def test_loader_gives_the_batches_of_the_reference(corpus: Path, dataset: Any, shuffle: Any, workers: int) -> None:
    loader = DataLoader(dataset, batch_size=4, shuffle=shuffle, seed=3, num_workers=workers, drop_last=True)
    kind = "block" if shuffle is True else shuffle or "off"
    wanted = reference(corpus, batch_size=4, shuffle=kind, seed=3)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert loader.batch_size == 4
    assert len(loader.dataset) == len(dataset)
    for epoch in range(2):
        assert len(loader) == wanted.steps() == 31
        for batch, rows in zip(loader, wanted.batches(epoch=epoch), strict=True):
            assert type(batch) is dict
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            assert_batch(batch, rows)


def test_drop_last_has_the_meaning_of_torch(dataset: Any) -> None:
    for drop_last in (True, False):
        ours = DataLoader(dataset, batch_size=10, drop_last=drop_last)
        stock = torch.utils.data.DataLoader(dataset, batch_size=10, drop_last=drop_last)
        assert len(ours) == len(stock)
        for mine, theirs in zip(ours, stock, strict=True):
            assert mine["input_ids"].shape == theirs["input_ids"].shape
            assert torch.equal(mine["input_ids"], theirs["input_ids"])
    assert len(DataLoader(dataset, batch_size=10)) == 13


def test_without_a_seed_the_seed_is_zero_and_a_generator_gives_one(dataset: Any, corpus: Path) -> None:
    wanted = reference(corpus, batch_size=4, shuffle="global", seed=0)
    first = next(iter(DataLoader(dataset, batch_size=4, shuffle="global", drop_last=True)))
    assert_batch(first, wanted.batch_at(0))

    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(dataset, batch_size=4, shuffle=True, generator=generator)
        return [int(ids) for ids in next(iter(loader))["input_ids"][:, 0]]

    assert drawn(1) == drawn(1) != drawn(2)


def test_dataset_of_a_loader_is_its_rows(corpus: Path, dataset: Any) -> None:
    """Trainers that resume read the dataset, batch its rows again, and skip some."""
    loader = DataLoader(dataset, batch_size=4, shuffle=True, seed=3, drop_last=True)
    rows = loader.dataset
    assert isinstance(rows, torch.utils.data.IterableDataset)
    assert rows.tokens is dataset
    assert loader.sampler is None and loader.batch_sampler is None
    wanted = reference(corpus, batch_size=4, shuffle="block", seed=3)
    rows.set_epoch(1)
    for batch, expected in zip(torch.utils.data.DataLoader(rows, batch_size=4), wanted.batches(epoch=1), strict=True):
        assert_batch(batch, expected)
    assert rows[7]["input_ids"].tolist() == wanted.sequence(7)[0]


@pytest.mark.thread_unsafe(reason="torch starts processes, which it does once for the whole process")
def test_rows_in_a_worker_process_are_refused(dataset: Any) -> None:
    rows = DataLoader(dataset, batch_size=4).dataset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(RuntimeError, match="TokenDataset"):
            next(iter(torch.utils.data.DataLoader(rows, num_workers=1, multiprocessing_context="fork")))


def test_labels_do_not_alias_inputs(dataset: Any) -> None:
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    before = batch["input_ids"].clone()
    batch["labels"].fill_(-100)
    assert torch.equal(batch["input_ids"], before)


def test_state_resumes_in_another_loader(corpus: Path) -> None:
    def make() -> Any:
        return DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=4, shuffle=True, seed=9, drop_last=True)

    loader = make()
    wanted = [batch["input_ids"] for batch in make()]
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    fresh = make()
    fresh.load_state_dict(state)
    rest = [batch["input_ids"] for batch in fresh]
    assert len(rest) == len(wanted) - 5
    assert all(torch.equal(a, b) for a, b in zip(rest, wanted[5:], strict=True))


def test_state_survives_torch_save_with_weights_only(dataset: Any, tmp_path: Path) -> None:
    loader = DataLoader(dataset, batch_size=4)
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == loader.state_dict()


@pytest.mark.parametrize("shuffle", [False, True])
def test_distributed_sampler_is_translated(corpus: Path, dataset: Any, shuffle: bool) -> None:
    from torch.utils.data.distributed import DistributedSampler

    seen: list[int] = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=shuffle, seed=4, drop_last=True)
        loader = DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True)
        sampler.set_epoch(1)
        kind = "block" if shuffle else "off"
        wanted = reference(corpus, batch_size=4, shuffle=kind, seed=4)
        assert len(loader) == wanted.steps(2)
        for batch, rows in zip(loader, wanted.batches(epoch=1, rank=rank, world_size=2), strict=True):
            assert_batch(batch, rows)
            seen += batch["input_ids"].flatten().tolist()
    assert len(seen) == len(set(seen)) == 15 * 2 * 4 * SEQ_LEN


def test_another_sampler_takes_its_own_order(corpus: Path, dataset: Any) -> None:
    order = [5, 3, 99, 0, 0, 7]
    loader = DataLoader(dataset, batch_size=2, sampler=order, num_workers=2)
    wanted = reference(corpus)
    for batch, at in zip(loader, range(0, 6, 2), strict=True):
        assert_batch(batch, [wanted.sequence(index) for index in order[at : at + 2]])


def test_batch_sampler_and_collate_fn_are_used(dataset: Any) -> None:
    loader = DataLoader(dataset, batch_sampler=[[1, 2], [9]], collate_fn=lambda rows: len(rows), num_workers=2)
    assert list(loader) == [2, 1]


class Squares(torch.utils.data.Dataset):  # type: ignore[misc,name-defined]
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> int:
        if index == 17:
            raise KeyError("seventeen")
        return index * index


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc,name-defined]
    def __iter__(self) -> Any:
        return iter(range(10))


@pytest.mark.parametrize("workers", [0, 3])
def test_any_other_dataset_runs_on_threads_in_order(workers: int) -> None:
    loader = DataLoader(range(50), batch_size=4, num_workers=workers)
    stock = torch.utils.data.DataLoader(range(50), batch_size=4)
    assert len(loader) == len(stock)
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in stock]
    streamed = DataLoader(Stream(), batch_size=4, num_workers=min(workers, 1))
    assert [batch.tolist() for batch in streamed] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("workers", [0, 3])
def test_an_exception_of_the_dataset_keeps_its_type_and_its_batch(workers: int) -> None:
    iterator = iter(DataLoader(Squares(), batch_size=4, num_workers=workers))
    got = [next(iterator).tolist() for _ in range(4)]
    assert got[3] == [144, 169, 196, 225]
    with pytest.raises(KeyError, match="seventeen"):
        next(iterator)


UNPINNED = """
import sys, warnings
from forebay.torch import DataLoader, TokenDataset
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        batch = next(iter(DataLoader(TokenDataset(sys.argv[1], seq_len=16), batch_size=4, pin_memory=True)))
assert not batch["input_ids"].is_pinned()
assert len(caught) == 1 and caught[0].category is UserWarning, caught
print(caught[0].message)
"""


def test_pin_memory_without_cuda_warns_as_torch_does_and_once(corpus: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA: see the test of pinned batches")
    assert "'pin_memory' argument is set as true but no accelerator" in run_python(UNPINNED, corpus).stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_batches_survive_asynchronous_copies(corpus: Path, dataset: Any) -> None:
    wanted = reference(corpus, batch_size=4, remainder="short")
    loader = DataLoader(dataset, batch_size=4, pin_memory=True)
    copies = []
    for batch in loader:
        assert batch["input_ids"].is_pinned()
        copies.append({name: tensor.to("cuda", non_blocking=True) for name, tensor in batch.items()})
    torch.cuda.synchronize()
    for copy, rows in zip(copies, wanted.batches(), strict=True):
        assert_batch({name: tensor.cpu() for name, tensor in copy.items()}, rows)


DISAGREE = """
import os, sys
import torch.distributed as dist
import forebay
from forebay.torch import DataLoader, TokenDataset
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
os.environ.update(RANK="1", WORLD_SIZE="2")
try:
    iter(DataLoader(TokenDataset(sys.argv[1], seq_len=16), batch_size=2))
except forebay.ConfigError as error:
    assert "torch.distributed" in str(error), error
    print("refused")
dist.destroy_process_group()
"""


ASSUMED = """
import os, sys
import torch.distributed as dist
from forebay.torch import DataLoader, TokenDataset
os.environ["WORLD_SIZE"] = "2"
dist.get_world_size = lambda: 2
if sys.argv[2] != "launcher":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for rank in (1, 0, 0):
    print("rank", rank, file=sys.stderr, flush=True)
    if sys.argv[2] == "torch.distributed":
        os.environ.pop("WORLD_SIZE", None)
    else:
        os.environ["RANK"] = str(rank)
    dist.get_rank = lambda: rank
    loader = DataLoader(TokenDataset(sys.argv[1], seq_len=16), batch_size=2)
    assert (loader.config["dp_rank"], loader.config["dp_world_size"]) == (rank, 2)
print("end", file=sys.stderr)
"""


@pytest.mark.parametrize("how", ["launcher", "torch.distributed", "both"])
def test_assumed_ranks_are_told_once_and_by_the_first(corpus: Path, how: str) -> None:
    lines = run_python(ASSUMED, corpus, how).stderr.splitlines()
    told = [line for line in lines if line.startswith(("rank", "assuming", "end"))]
    assert [line.split()[0] for line in told] == ["rank", "rank", "assuming", "rank", "end"], lines
    assert "over 2 ranks (from " + ("torch.distributed" if how == "torch.distributed" else "RANK") in told[2]


def test_ranks_that_disagree_with_torch_distributed_are_an_error(corpus: Path) -> None:
    assert run_python(DISAGREE, corpus).stdout.splitlines()[-1] == "refused"
