"""Packs documents with the tools of other projects, each in an environment of its own.

    packing_peers.py '{"what": "speed", "peer": "trl", "corpus": FOLDER, "seq_len": 2048,
                      "batch_size": 8, "labels": false, "warm_up_s": 0.5, "window_s": 2}'
    packing_peers.py '{"what": "padding", "peer": "trl", "median": 500, "seq_len": 2048,
                      "tokens": 10000000}'

Prints one JSON line. Each peer is used as its documentation recommends. `prepare_s` is what it does
before its first batch: reading, packing, and writing of files of its own.
"""

import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import documents
from measure import cpu_seconds, memory_mb

Job = dict[str, Any]
#: Bins of Grain's packer. More bins pad less, and shuffle documents further apart.
GRAIN_BINS = 128
#: Default buffer of torchtitan's packer, in documents.
TITAN_BUFFER = 100


def tokens_of(batch: Any) -> int:
    """Number of tokens of documents in a batch. Padding does not count."""
    if "doc_ids" in batch:
        return int((batch["doc_ids"] >= 0).sum())
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int(batch["input_ids"].numel())


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# Speed: each function returns an iterable of batches.


def forebay_loader(job: Job) -> Any:
    import forebay.torch

    folder, _, layout = job["peer"].partition("-")[2].partition("-")
    dataset = forebay.torch.TokenDataset(
        str(Path(job["corpus"]) / {"parquet": "parquet-copies"}.get(folder, folder)),
        seq_len=job["seq_len"],
        layout=layout or "pack",
        boundaries=True,
        fields=["labels"] if job["labels"] else None,
        cache_dir=job["index"],
    )
    return forebay.torch.DataLoader(
        dataset, batch_size=job["batch_size"], shuffle=True, seed=0, num_workers=job["helpers"], drop_last=True
    )


def read_with_datasets(job: Job) -> Any:
    from datasets import load_dataset

    shards = sorted(str(path) for path in (Path(job["corpus"]) / "parquet").glob("*.parquet"))
    columns = ["input_ids", "labels"] if job["labels"] else ["input_ids"]
    return load_dataset("parquet", data_files=shards, split="train", columns=columns)


def torch_loader(rows: Any, job: Job, collate: Callable[[Any], Any] | None) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        rows, job["batch_size"], shuffle=True, drop_last=True, collate_fn=collate, num_workers=job["helpers"],
        persistent_workers=job["helpers"] > 0,
    )  # fmt: skip


def trl_loader(job: Job) -> Any:
    """`SFTTrainer` with `packing=True`: its packing, its collator, and datasets' lists.

    `trl-numpy` reads NumPy arrays instead of lists, which `SFTTrainer` does not do.
    """
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = pack_dataset(read_with_datasets(job), job["seq_len"], strategy="bfd_split")
    if job["peer"] == "trl-numpy":
        rows = rows.with_format("numpy")
    job["rows"] = len(rows)
    return torch_loader(rows, job, DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))


def datasets_loader(job: Job) -> Any:
    """`Dataset.map` cuts documents into rows and pads them. A loader of torch joins its tensors."""
    seq_len = job["seq_len"]

    def pad(batch: dict[str, Any]) -> dict[str, Any]:
        ids, masks = [], []
        for document in batch["input_ids"]:
            for start in range(0, len(document), seq_len):
                piece = document[start : start + seq_len]
                ids.append(np.pad(piece, (0, seq_len - len(piece))))
                masks.append(np.arange(seq_len) < len(piece))
        return {"input_ids": ids, "attention_mask": masks}

    documents = read_with_datasets(job)
    rows = documents.with_format("numpy").map(pad, batched=True, remove_columns=documents.column_names)
    job["rows"] = len(rows)

    def collate(found: list[dict[str, Any]]) -> dict[str, Any]:
        from torch.utils.data import default_collate

        batch = default_collate(found)
        return {**batch, "labels": batch["input_ids"].masked_fill(~batch["attention_mask"], -100)}

    return torch_loader(rows.with_format("torch"), job, collate)


class Pieces:
    """The documents of mapped Arrow shards, cut to rows. Reading one copies nothing."""

    def __init__(self, folder: Path, seq_len: int) -> None:
        import pyarrow as pa

        self.found: list[tuple[np.ndarray, int, int]] = []
        for path in sorted(folder.glob("*.arrow")):
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            for chunk in table.column("input_ids").chunks:
                values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
                for start, end in itertools.pairwise(offsets.tolist()):
                    for cut in range(start, end, seq_len):
                        self.found.append((values, cut, min(end, cut + seq_len)))

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        values, start, end = self.found[index]
        return {"input_ids": values[start:end]}


def grain_loader(job: Job) -> Any:
    """Documents in a global order through best-fit packing, batched, on Grain's own threads."""
    import grain
    import torch
    from grain.experimental import BestFitPackIterDataset

    source = grain.MapDataset.source(Pieces(Path(job["corpus"]) / "arrow", job["seq_len"])).shuffle(seed=0).repeat()
    packed = BestFitPackIterDataset(
        source.to_iter_dataset(), length_struct={"input_ids": job["seq_len"]}, num_packing_bins=GRAIN_BINS
    )

    def finish(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        ids = torch.from_numpy(batch["input_ids"].astype(np.int64))
        positions = torch.from_numpy(batch["input_ids_positions"].astype(np.int64))
        documents_of = torch.from_numpy(batch["input_ids_segment_ids"])
        return {
            "input_ids": ids, "position_ids": positions, "doc_ids": documents_of - 1,
            "labels": torch.where((documents_of > 0) & (positions > 0), ids, -100),
        }  # fmt: skip

    return packed.batch(job["batch_size"], drop_remainder=True).map(finish)


def speed(job: Job) -> Job:
    """Measures what a peer does before its first batch, and then its tokens per second."""
    import torch

    # Workers and collators of the peers are not to start threads beside the loader's.
    torch.set_num_threads(1)
    bare, cpu, began = memory_mb(), cpu_seconds(), time.perf_counter()
    make = {"forebay": forebay_loader, "trl": trl_loader, "datasets": datasets_loader, "grain": grain_loader}
    batches = endless(make[job["peer"].partition("-")[0]](job))
    next(batches)
    prepare_s, prepare_cpu_s = time.perf_counter() - began, cpu_seconds() - cpu
    end = time.perf_counter() + job["warm_up_s"]
    while time.perf_counter() < end:
        next(batches)
    found, places, batch = 0, 0, None
    cpu, began = cpu_seconds(), time.perf_counter()
    end = began + job["window_s"]
    held = []
    while time.perf_counter() < end:
        batch = next(batches)
        places += batch["input_ids"].numel()
        # A sample is enough to know the share of padding.
        if len(held) < 64:
            held.append(tokens_of(batch) / batch["input_ids"].numel())
    elapsed, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    found = int(places * float(np.mean(held)))
    fill = found / places
    if "rows" in job:
        # Rows of TRL hold no padding themselves. They count as rows of the full length.
        fill = documents.SHARDS * documents.SHARD_TOKENS / (job["rows"] * job["seq_len"])
    return {
        "tokens_per_s": found / elapsed, "cpu_s_per_gtok": cpu / found * 1e9, "padding": 1 - fill,
        "prepare_s": prepare_s, "prepare_cpu_s": prepare_cpu_s, "memory_mb": memory_mb() - bare,
    }  # fmt: skip


# Padding: each function returns the number of rows.


def forebay_rows(found: np.ndarray, job: Job, folder: Path) -> int:
    import forebay

    documents.write_lengths(folder / "a", found)
    settings = {"layout": "pack", "seq_len": job["seq_len"], "batch_size": 1, "shuffle": True}
    with forebay.Loader(str(folder / "a.bin"), **settings) as loader:
        return len(loader)


def lists(found: np.ndarray) -> Any:
    import pyarrow as pa

    offsets = np.concatenate(([0], np.cumsum(found))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(int(found.sum()), np.int8)))


def trl_rows(found: np.ndarray, job: Job, _folder: Path) -> int:
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    rows = pack_dataset(Dataset(pa.table({"input_ids": lists(found)})), job["seq_len"], strategy="bfd_split")
    return len(rows)


def grain_rows(found: np.ndarray, job: Job, _folder: Path) -> int:
    import grain
    from grain.experimental import BestFitPackIterDataset

    pieces, ids = documents.pieces(found, job["seq_len"]).tolist(), np.zeros(job["seq_len"], np.int8)

    class Source:
        def __len__(self) -> int:
            return len(pieces)

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return {"input_ids": ids[: pieces[index]]}

    packed = BestFitPackIterDataset(
        grain.MapDataset.source(Source()).to_iter_dataset(), length_struct={"input_ids": job["seq_len"]},
        num_packing_bins=GRAIN_BINS,
    )  # fmt: skip
    return sum(1 for _ in packed)


def titan_rows(found: np.ndarray, job: Job, _folder: Path) -> int:
    import torch
    from torchtitan.hf_datasets.multimodal.utils.packing import MMSamplePacker

    ids = torch.zeros(job["seq_len"], dtype=torch.int8)
    packer = MMSamplePacker(job["seq_len"], TITAN_BUFFER, 1)
    rows = 0
    for length in documents.pieces(found, job["seq_len"]).tolist():
        part = ids[:length]
        packer.add_sample({"input_ids": part, "labels": part, "positions": part})
        rows += len(packer.packed_samples)
        packer.packed_samples.clear()
    packer.flush()
    return rows + len(packer.packed_samples)


def padding(job: Job) -> Job:
    if job["median"] == documents.DEMO:
        found = documents.demo_lengths(Path(job["folder"]), job["tokens"])
    else:
        found = documents.lengths(job["tokens"], job["median"], 0)
    make = {"forebay": forebay_rows, "trl": trl_rows, "grain": grain_rows, "torchtitan": titan_rows}[job["peer"]]
    with tempfile.TemporaryDirectory() as folder:
        cpu = time.process_time()
        rows = make(found, job, Path(folder))
        cpu = time.process_time() - cpu
    return {"padding": 1 - job["tokens"] / (rows * job["seq_len"]), "cpu_s": cpu}


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=job["folder"]) as cache:
        # Hugging Face's packages write what they make below this folder.
        os.environ.update(HF_HOME=cache, HF_DATASETS_CACHE=cache, HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
        print(json.dumps({"speed": speed, "padding": padding}[job["what"]](job)), flush=True)
        # Peers' threads and processes may wait for more work.
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
