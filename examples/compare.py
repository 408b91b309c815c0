"""Compares forebay with torch's `DataLoader` on one corpus: speed, memory, first batch.

    python examples/compare.py measure LOADER DATA --workers N   one measurement, as JSON
    python examples/compare.py epoch LOADER DATA                 a digest of one epoch, as JSON

`compare()` runs each measurement in a fresh process, in alternating rounds, and keeps medians.
Every loader delivers shuffled `input_ids` and `labels`, int64 [batch_size, seq_len], to a consumer
that does nothing else. forebay decodes documents from Parquet or gathers them from Arrow. PyTorch
indexes one flat uint16 file through a memory map.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

BATCH_SIZE = 8
SEQ_LEN = 2048
WARM_UP_S = 0.3
LABELS = {
    "torch-batched": "PyTorch, whole batches",
    "torch-rows": "PyTorch, row by row",
    "forebay-parquet": "forebay, Parquet",
    "forebay-arrow": "forebay, Arrow",
}


def torch_loader(path: str, workers: int, batched: bool):
    import torch
    from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

    class Rows(Dataset):
        def __init__(self) -> None:
            # A plain view: slicing a memmap object costs more than the copy.
            self.rows = np.asarray(np.memmap(path, np.uint16, "r")).reshape(-1, SEQ_LEN)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int | list[int]) -> dict[str, torch.Tensor]:
            input_ids = torch.from_numpy(self.rows[index].astype(np.int64))
            return {"input_ids": input_ids, "labels": input_ids.clone()}

    # The comparison runs 4 processes on 2 cores on purpose.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    dataset = Rows()
    options = {"num_workers": workers}
    if workers:
        options |= {"persistent_workers": True, "multiprocessing_context": "fork"}
    generator = torch.Generator().manual_seed(0)
    if not batched:
        return DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True, generator=generator, **options)
    sampler = BatchSampler(RandomSampler(dataset, generator=generator), BATCH_SIZE, drop_last=True)
    return DataLoader(dataset, sampler=sampler, batch_size=None, **options)


def forebay_loader(path: str, workers: int):
    from forebay.torch import DataLoader, TokenDataset

    dataset = TokenDataset(path, seq_len=SEQ_LEN)
    return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, seed=0, drop_last=True, num_workers=workers)


def make_loader(name: str, path: str, workers: int):
    if name.startswith("forebay"):
        return forebay_loader(path, workers)
    return torch_loader(path, workers, batched=name == "torch-batched")


def memory_mb() -> dict[str, float]:
    """Memory of this process and its descendants.

    Gives private and shared pages, and the mapped files beside them.
    """
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    tree = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    pages = {"Pss_Anon": 0, "Pss_Shmem": 0, "Pss_File": 0}
    for pid in tree:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in pages:
                pages[name] += int(value.split()[0])
    return {
        "memory_mb": (pages["Pss_Anon"] + pages["Pss_Shmem"]) / 1024,
        "mapped_files_mb": pages["Pss_File"] / 1024,
        "processes": len(tree),
    }


def measure(name: str, path: str, workers: int, seconds: float) -> dict[str, float]:
    import torch

    if name.startswith("forebay"):
        import forebay.torch  # noqa: F401  (imports are not part of the first batch)
    bare_mb = memory_mb()["memory_mb"]

    def endless(loader) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from loader

    start = time.perf_counter()
    batches = endless(make_loader(name, path, workers))
    first = next(batches)
    first_batch_s = time.perf_counter() - start
    for key in ("input_ids", "labels"):
        if first[key].shape != (BATCH_SIZE, SEQ_LEN) or first[key].dtype != torch.int64:
            sys.exit(f"{name}: `{key}` is {first[key].dtype} {tuple(first[key].shape)}")
    warm = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm:
        next(batches)
    count, cpu = 0, sum(os.times()[:2])
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    cpu = sum(os.times()[:2]) - cpu
    return {
        "tokens_per_s": count * BATCH_SIZE * SEQ_LEN / elapsed,
        "first_batch_ms": first_batch_s * 1e3,
        "main_process_cores": cpu / elapsed,
        "bare_torch_mb": bare_mb,
        **memory_mb(),
    }


def epoch(name: str, path: str) -> dict[str, int | str]:
    """Digest of the rows of one epoch in any order.

    Equal digests mean the same rows, each the same number of times.
    """
    weights = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, SEQ_LEN, np.int64)
    sums = [batch["input_ids"].numpy() @ weights for batch in make_loader(name, path, 0)]
    rows = np.sort(np.concatenate(sums))
    return {"rows": len(rows), "digest": hashlib.sha256(rows.tobytes()).hexdigest()}


def child(*arguments: str) -> dict:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=120)
    if done.returncode != 0:
        sys.exit(f"compare: `{' '.join(command)}` ended with status {done.returncode}")
    return json.loads(done.stdout)


def machine() -> dict[str, str | int]:
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gb": memory_gb, "system": platform.platform()}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def compare(folder: Path, quick: bool, progress) -> dict:
    """Measures every loader on the corpus that `corpus.prepare` left in `folder`."""
    data = {
        "torch-batched": str(folder / "tokens.bin"),
        "torch-rows": str(folder / "tokens.bin"),
        "forebay-parquet": str(folder / "parquet"),
        "forebay-arrow": str(folder / "arrow"),
    }
    torch_workers, forebay_threads = ((0, 2), (0,)) if quick else ((0, 2, 4), (0, 1, 2))
    rounds, seconds = (1, 0.5) if quick else (3, 1.0)
    cells = [(name, n) for name in data for n in (torch_workers if name.startswith("torch") else forebay_threads)]

    epochs = {name: child("epoch", name, data[name]) for name in data if name != "torch-rows"}
    samples: dict[tuple[str, int], list[dict]] = {cell: [] for cell in cells}
    started, done, total = time.monotonic(), 0, rounds * len(cells)
    for k in range(rounds):
        # Every second round runs backwards, so that a machine that slows down affects all loaders.
        for name, n in cells if k % 2 == 0 else reversed(cells):
            left = f", {(time.monotonic() - started) / done * (total - done):.0f} s left" if done else ""
            done += 1
            progress(f"{done} of {total}{left}: {cell_label({'loader': name, 'workers': n})}")
            arguments = ("measure", name, data[name], "--workers", str(n), "--seconds", str(seconds))
            samples[name, n].append(child(*arguments))
    results = []
    for (name, n), runs in samples.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        results.append({"loader": name, "workers": n, **medians, "rounds": runs})
    return {
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("forebay", "torch", "numpy", "pyarrow")},
        },
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "seconds": seconds,
        "epochs": epochs,
        "results": results,
    }


def cell_label(result: dict) -> str:
    n = result["workers"]
    if result["loader"].startswith("torch"):
        return f"{LABELS[result['loader']]}, {n} processes" if n else f"{LABELS[result['loader']]}, in the trainer"
    return f"{LABELS[result['loader']]}, {f'{n} thread' + 's' * (n > 1) if n else 'default threads'}"


def print_table(report: dict) -> None:
    print(
        f"{'loader':44} {'Mtokens/s':>10} {'(min-max)':>15} {'memory MB':>10} {'processes':>10} {'first batch ms':>15}"
    )
    for result in report["results"]:
        speeds = [run["tokens_per_s"] / 1e6 for run in result["rounds"]]
        print(
            f"{cell_label(result):44} {result['tokens_per_s'] / 1e6:10.1f} {f'{min(speeds):.3g}-{max(speeds):.4g}':>15}"
            f" {result['memory_mb']:10.0f} {result['processes']:10.0f} {result['first_batch_ms']:15.1f}"
        )
    bare = statistics.median(result["bare_torch_mb"] for result in report["results"])
    print(f"Memory is private and shared pages of all processes; a bare `import torch` is {bare:.0f} MB of it.")
    print("The consumer does nothing but take batches. `in the trainer`: the training loop itself makes each batch.")
    print("The corpus fits forebay's `memory_budget` of 512 MiB, so only the first epoch decoded Parquet.")
    print("`make bench` measures a corpus that does not fit.")


def verdicts(report: dict) -> list[str]:
    """Tells where forebay wins and loses against PyTorch's fastest way.

    Compares it with and without processes.
    """
    results = {(result["loader"], result["workers"]): result for result in report["results"]}
    lines = []
    for name in ("forebay-parquet", "forebay-arrow"):
        ours = results[name, 0]
        alone = results["torch-batched", 0]
        processes = max((r for (n, w), r in results.items() if n.startswith("torch") and w), key=_speed)
        rows = results["torch-rows", 0]
        parts = [
            f"{_ratio(_speed(ours) / _speed(other))} {what}"
            for what, other in (
                ("whole-batch indexing in the trainer", alone),
                ("row-by-row indexing in the trainer", rows),
                ("PyTorch's fastest worker processes", processes),
            )
        ]
        lines.append(f"{LABELS[name]}: " + ", ".join(parts))
        lines.append(
            f"  memory {ours['memory_mb']:.0f} MB against {alone['memory_mb']:.0f} and {processes['memory_mb']:.0f};"
            f" first batch after {ours['first_batch_ms']:.1f} ms against {alone['first_batch_ms']:.1f}"
            f" and {processes['first_batch_ms']:.1f} (in the trainer, with processes)"
        )
    return lines


def _speed(result: dict) -> float:
    return result["tokens_per_s"]


def _ratio(ratio: float) -> str:
    return f"{ratio:.1f} x as fast as" if ratio >= 1 else f"LOSES at {ratio:.2f} x the speed of"


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = list(reversed(report["results"]))
    colours = ["#d9822b" if result["loader"].startswith("forebay") else "#8a9ba8" for result in results]
    panels = [
        ("Speed: million tokens per second\n(log scale, more is better)", "tokens_per_s", 1e-6, True),
        ("Memory of all processes: MB\n(private and shared, less is better)", "memory_mb", 1, False),
        ("Time to the first batch: ms\n(log scale, less is better)", "first_batch_ms", 1, True),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 1.8 + 0.36 * len(results)), sharey=True, layout="constrained")
    for axis, (title, key, scale, logarithmic) in zip(axes, panels, strict=True):
        values = [result[key] * scale for result in results]
        ranges = [[run[key] * scale for run in result["rounds"]] for result in results]
        errors = [
            [value - min(r) for value, r in zip(values, ranges, strict=True)],
            [max(r) - value for value, r in zip(values, ranges, strict=True)],
        ]
        axis.barh(range(len(results)), values, color=colours, xerr=errors, error_kw={"ecolor": "#394b59", "capsize": 2})
        if logarithmic:
            axis.set_xscale("log")
            axis.set_xlim(min(min(r) for r in ranges) / 2, max(max(r) for r in ranges) * 4)
        else:
            axis.set_xlim(0, max(max(r) for r in ranges) * 1.2)
        for k, (value, r) in enumerate(zip(values, ranges, strict=True)):
            axis.annotate(f"{value:,.0f}" if value >= 10 else f"{value:.1f}", (max(r), k), (5, 0), va="center",
                          textcoords="offset points", fontsize=9)  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(results)), [cell_label(result) for result in results])
    where, versions = report["machine"], report["versions"]
    shape, rounds = f"{report['batch_size']} x {report['seq_len']}, int64", len(results[0]["rounds"])
    figure.suptitle(
        f"The same shuffled token batches ({shape}) from forebay and from PyTorch's DataLoader, to an idle consumer\n"
        f"{where['cpu']}, {where['cores']} cores; torch {versions['torch']}, forebay {versions['forebay']};"
        f" median and range of {rounds} round{'s' * (rounds > 1)}, {report['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["measure", "epoch"])
    parser.add_argument("loader", choices=list(LABELS))
    parser.add_argument("data")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes (PyTorch) or threads (forebay; 0: its default)"
    )
    parser.add_argument("--seconds", type=float, default=1.5)
    args = parser.parse_args()
    if args.what == "epoch":
        found = epoch(args.loader, args.data)
    else:
        found = measure(args.loader, args.data, args.workers, args.seconds)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
