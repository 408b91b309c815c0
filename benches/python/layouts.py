"""Measures layouts and further columns, and compares packing with other projects.

    layouts.py [--quick] [--only PART ...] [--write-results]

`make bench-layouts` runs it. Every measurement is a fresh process. Two forebay loaders that are
compared share a process and take turns of a fraction of a second, so a busy machine slows both.
Results go to out/bench/layouts.md. With --write-results they also go to benches/RESULTS.md.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import documents
import environments
import report
from targets import Record, Verdict, anonymous_mb, bootstrap, child, number, run, spread, table, verdicts

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = ROOT / "out" / "bench"
MARK = "<!-- layouts -->"
BATCH, SEQ_LEN = 8, 2048
#: Memory beyond the budget that the documentation allows.
BESIDE_MB = 40
BUDGET_MB = 512
RANKS = 8
#: Time limit for a peer. TRL packs the whole corpus before its first batch.
PEER_LIMIT_S = 400


@dataclass(frozen=True)
class Plan:
    #: Turns of each of two loaders that are compared, and the seconds of a turn.
    turns: int
    turn_s: float
    #: Processes of each loader whose start is measured, and of each peer.
    starts: int
    peers: int
    window_s: float
    #: Tokens whose padding is compared with peers.
    padding_tokens: int
    medians: tuple[int, ...]
    seq_lens: tuple[int, ...]


DEFAULT = Plan(24, 0.3, 15, 3, 3.0, 10_000_000, (250, 500, 1000, 2000, 4000), (2048, 8192))
QUICK = Plan(10, 0.2, 5, 1, 1.0, 2_000_000, (250, 4000), (2048,))


# One process.


def turn(loader: Any, batches: Any, seconds: float) -> tuple[float, float]:
    """Tokens per second, and CPU seconds of the process per 10^9 tokens."""
    before, cpu, began = loader.stats()["tokens"], time.process_time(), time.perf_counter()
    end = began + seconds
    while time.perf_counter() < end:
        next(batches)
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    tokens = loader.stats()["tokens"] - before
    return tokens / elapsed, cpu / tokens * 1e9


def pair(job: Record) -> Record:
    """Two loaders in turns, with one thread beside the consumer."""
    from forebay import Loader

    loaders = []
    for given in job["settings"]:
        settings = {"seq_len": SEQ_LEN, "batch_size": BATCH, "num_threads": 1, "epochs": "endless", **given}
        loader = Loader(settings.pop("path"), shuffle=True, seed=7, **settings)
        loaders.append((loader, iter(loader)))
    found: list[list[tuple[float, float]]] = [[], []]
    for number_of in range(-1, job["turns"]):
        for which in (0, 1) if number_of % 2 else (1, 0):
            what = turn(*loaders[which], job["turn_s"])
            if number_of >= 0:
                found[which].append(what)
    shares = [loader.stats()["padding_share"] for loader, _ in loaders]
    return {"found": found, "padding": shares}


def start(job: Record) -> Record:
    """Milliseconds from before the constructor to the first batch, with a saved index."""
    from forebay import Loader

    settings = {"seq_len": SEQ_LEN, "batch_size": BATCH, "shuffle": True, "num_threads": 1, **job["settings"]}
    began = time.perf_counter()
    loader = Loader(settings.pop("path"), seed=job["seed"], **settings)
    opened = time.perf_counter()
    if job["share"]:
        step = int(len(loader) * job["share"])
        loader.load_state_dict({**loader.state_dict(), "position": step * BATCH})
    batch = next(iter(loader))
    ended = time.perf_counter()
    if job["share"]:
        wanted = loader.batch_at(step)
        assert all((batch[name] == wanted[name]).all() for name in ("input_ids", "labels"))
    loader.close()
    return {"ms": (ended - began) * 1e3, "open_ms": (opened - began) * 1e3}


def whole(job: Record) -> Record:
    """Decoded bytes, tokens and the most memory of a pass."""
    from forebay import Loader

    settings = {"seq_len": SEQ_LEN, "batch_size": BATCH, "num_threads": 1, "seed": 7, **job["settings"]}
    bare = anonymous_mb()
    loader = Loader(settings.pop("path"), **settings)
    most, cpu = 0.0, time.process_time()
    for step, _batch in enumerate(loader):
        if step % 100 == 0:
            most = max(most, anonymous_mb())
    stats = loader.stats()
    found = {name: stats[name] for name in ("decoded_bytes", "tokens", "padding_share")}
    return {**found, "memory_mb": most - bare, "cpu_s": time.process_time() - cpu}


def once(job: Record) -> Record:
    return {"pair": pair, "start": start, "whole": whole}[job["kind"]](job)


# Parts. Each returns records; `section` of the same name makes Markdown of them.

Folders = dict[str, str]


def folders() -> Folders:
    """The corpora, read once, and an index that holds what opening them finds."""
    found = documents.prepare(OUT)
    index = OUT / "layouts-index"
    index.mkdir(exist_ok=True)
    paths = {path.name: str(path) for path in found.iterdir() if path.is_dir()}
    for path in sorted(found.rglob("*.*")):
        with path.open("rb", buffering=0) as opened:
            while opened.read(8 << 20):
                pass
    return {**paths, "index": str(index), "corpus": str(found)}


def settings_of(at: Folders, folder: str, **more: Any) -> Record:
    return {"path": at[folder], "cache_dir": at["index"], **more}


def in_pairs(plan: Plan, jobs: list[Record], tell: Callable[[str], None]) -> list[Record]:
    records = []
    for job in jobs:
        tell(job["what"])
        records.append({**job, **child("layouts", {**job, "kind": "pair", "turns": plan.turns, "turn_s": plan.turn_s})})
    return records


def speed(plan: Plan, at: Folders, tell: Callable[[str], None]) -> list[Record]:
    jobs = []
    for name, folder in (("Arrow", "arrow"), ("Parquet, zstd", "parquet-copies")):
        for other, boundaries in (("`concat`", False), ("`concat` with boundaries", True)):
            jobs.append({
                "what": f"{name}: `pack` against {other}",
                "target": None if boundaries else 0.8,
                "settings": [
                    settings_of(at, folder, layout="pack"),
                    settings_of(at, folder, layout="concat", boundaries=boundaries),
                ],
            })  # fmt: skip
    return in_pairs(plan, jobs, tell)


PAIR_HEADS = [
    "", "Mtok/s", "of the other", "tokens/s, ratio (95 %)", "target", "met", "CPU s/Gtok", "of the other", "ratio",
]  # fmt: skip


def pair_rows(records: list[Record], more_cpu: float | None = None) -> list[list[str]]:
    """A row for each pair. The target is about tokens/s, or about CPU if `more_cpu` is given."""
    rows = []
    for record in records:
        if "failed" in record:
            rows.append([record["what"], f"**failed**: {record['failed']}", *[""] * 7])
            continue
        ours, other = record["found"]
        ratio, low, high = bootstrap([a[0] / b[0] for a, b in zip(ours, other, strict=True)])
        cpu = median(a[1] / b[1] for a, b in zip(ours, other, strict=True))
        if more_cpu is not None:
            target, met = f"CPU <= {more_cpu}", cpu <= more_cpu
        else:
            target, met = (f">= {record['target']}", ratio >= record["target"]) if record["target"] else ("", None)
        rows.append([
            record["what"], number(median(a[0] for a in ours) / 1e6), number(median(b[0] for b in other) / 1e6),
            f"{ratio:.2f} ({low:.2f} to {high:.2f})", target, {True: "yes", False: "**no**", None: ""}[met],
            number(median(a[1] for a in ours)), number(median(b[1] for b in other)), f"{cpu:.2f}",
        ])  # fmt: skip
    return rows


def speed_section(records: list[Record]) -> list[str]:
    return [
        "### `pack` with boundaries against `concat`", "",
        f"Block shuffling for Parquet, a global order for `concat` of Arrow; B={BATCH} S={SEQ_LEN}, one helper, warm."
        " `pack` gives two arrays more than `concat` without boundaries.", "",
        *table(PAIR_HEADS, pair_rows(records)), "",
    ]  # fmt: skip


def starting(plan: Plan, at: Folders, tell: Callable[[str], None]) -> list[Record]:
    jobs = []
    for layout in ("pack", "concat"):
        for share in (0.0, 0.5):
            settings = settings_of(at, "parquet-copies", layout=layout)
            jobs.append({"kind": "start", "layout": layout, "share": share, "settings": settings})
    records: list[Record] = []
    # The first round writes the index, and does not count.
    for repeat in range(-1, plan.starts):
        tell(f"start {repeat + 1} of {plan.starts}")
        random.shuffle(jobs)
        found = [{**job, **child("layouts", {**job, "seed": random.randrange(1 << 30)})} for job in jobs]
        if repeat >= 0:
            records += found
    return records


def starting_section(records: list[Record]) -> list[str]:
    rows = []
    for share, what in ((0.0, "first batch"), (0.5, "resume at 50 %, and its first batch")):
        by = {
            layout: [r for r in records if r["layout"] == layout and r["share"] == share and "failed" not in r]
            for layout in ("pack", "concat")
        }
        if not all(by.values()):
            rows.append(Verdict(what, "", "failed", False))
            continue
        pack, concat = ([r["ms"] for r in by[layout]] for layout in ("pack", "concat"))
        opening = [spread([r["open_ms"] for r in by[layout]]) for layout in ("pack", "concat")]
        ratio = median(pack) / median(concat)
        text = (
            f"{number(ratio)} x: {spread(pack)} against {spread(concat)} ms; of which opening {opening[0]} and"
            f" {opening[1]}"
        )
        rows.append(Verdict(f"`pack` from Parquet: {what}", "3 x `concat`'s", text, ratio <= 3))
    return [
        "### Start with a saved index", "",
        f"{documents.SHARDS * documents.COPIES} Parquet shards with"
        f" {documents.SHARDS * documents.COPIES * documents.SHARD_TOKENS >> 20} Mi tokens. Fresh processes take turns;"
        " the time runs from before the constructor.", "",
        *verdicts(rows), "",
    ]  # fmt: skip


def told(settings: Record) -> Record:
    """The answer of `forebay plan`."""
    more = {"seq_len": SEQ_LEN, "batch_size": BATCH, **settings}
    path, world = more.pop("path"), more.pop("dp_world_size", 1)
    more.pop("dp_rank", None)
    names = ",".join(more.pop("fields", []) or [])
    sets = [f"--set={name}={str(value).lower() if value is True else value}" for name, value in more.items()]
    sets += [f"--set=fields={names}"] if names else []
    command = [sys.executable, "-m", "forebay", "plan", path, "--json", "--world-size", world, *sets]
    return run(command)


def decoding(plan: Plan, at: Folders, tell: Callable[[str], None]) -> list[Record]:
    del plan
    base = settings_of(at, "parquet-copies", layout="pack")
    labels = {**base, "fields": ["labels"]}
    records = []
    for what, settings, ranks in (
        ("1 rank, 8 lanes", base, 1),
        (f"{RANKS} ranks", base, RANKS),
        ("int64 `labels` beside int32 ids, 1 rank", labels, 1),
    ):
        tell(f"decoding: {what}")
        # A pass in the order of the files decodes each block once.
        plain = child("layouts", {"kind": "whole", "settings": {**settings, "path": at["parquet"], "layout": "concat"}})
        runs = [
            child(
                "layouts",
                {"kind": "whole", "settings": {**settings, "shuffle": True, "dp_world_size": ranks, "dp_rank": rank}},
            )
            for rank in range(ranks)
        ]
        plan_says = told({**settings, "shuffle": True, "dp_world_size": ranks})
        records.append({"what": what, "ranks": ranks, "plain": plain, "runs": runs, "plan": plan_says})
    return records


def decoding_section(records: list[Record]) -> list[str]:
    rows = []
    for record in records:
        failed = [r["failed"] for r in (record["plain"], record["plan"], *record["runs"]) if "failed" in r]
        if failed:
            rows.append([record["what"], f"**failed**: {failed[0]}", *[""] * 5])
            continue
        per_token = record["plain"]["decoded_bytes"] / record["plain"]["tokens"]
        ratios = [r["decoded_bytes"] / r["tokens"] / per_token for r in record["runs"]]
        decoded = sum(r["decoded_bytes"] for r in record["runs"]) / sum(r["tokens"] for r in record["runs"]) / per_token
        memory = max(r["memory_mb"] for r in record["runs"])
        said = record["plan"]["decoding"]["amplification"]
        allowed = BUDGET_MB + BESIDE_MB
        rows.append([
            record["what"], f"{decoded:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", f"{said:.3f}", "<= 1.15",
            "yes" if decoded <= 1.15 else "**no**", f"{memory:.0f}, in {BUDGET_MB} and {BESIDE_MB}",
            "yes" if memory <= allowed else "**no**",
        ])  # fmt: skip
    heads = ["", "decoded per token", "as `plan` said", "target", "met", "memory MB", "met"]
    return [
        "### Decoding of `pack` from Parquet", "",
        "A whole pass in block order, against what a pass in the order of the files decodes per token. In parentheses:"
        " the ranks. **memory** is the largest rank's, beyond its imports; the second number is what may lie beside"
        " `memory_budget`.", "",
        *table(heads, rows), "",
    ]  # fmt: skip


def fields(plan: Plan, at: Folders, tell: Callable[[str], None]) -> list[Record]:
    jobs = []
    for name, folder in (("Arrow", "arrow"), ("Parquet, zstd", "parquet-copies")):
        for layout in ("concat", "pack"):
            base = settings_of(at, folder, layout=layout)
            both = [{**base, "fields": ["loss_mask"]}, base]
            jobs.append({"what": f"{name}, `{layout}`: int8 beside ids", "settings": both})
    records = in_pairs(plan, jobs, tell)
    raw = {"path": at["raw"], "format": "raw", "bin_dtype": "uint16"}
    flat = {"what": "raw `.bin` of uint16 against Arrow", "target": 1.0}
    flat["settings"] = [raw, settings_of(at, "arrow-uint16")]
    return records + in_pairs(plan, [flat], tell)


def fields_section(records: list[Record]) -> list[str]:
    columns = [record for record in records if "target" not in record]
    flat = [record for record in records if "target" in record]
    return [
        "### Further columns, and flat files", "",
        "The first lines compare a loader with a second column of one byte per token with the same loader without it."
        " The last compares flat files with Arrow, both in a global order.", "",
        *table(PAIR_HEADS, pair_rows(columns, 1.2) + pair_rows(flat)), "",
    ]  # fmt: skip


#: Peers and their helpers for each of the two jobs.
PACKERS = [
    ("forebay-arrow", 1), ("forebay-parquet", 1), ("trl", 0), ("trl-numpy", 0), ("grain", 0), ("datasets", 0),
]  # fmt: skip
TUNERS = [("forebay-arrow", 1), ("forebay-parquet", 1), ("trl", 0), ("trl-numpy", 0), ("trl", 2), ("trl-numpy", 2)]
ENVIRONMENTS = {"trl": "trl", "datasets": "trl", "grain": "grain", "torchtitan": "torchtitan", "forebay": ""}


def python_of(peer: str, known: dict[str, str]) -> str:
    """The interpreter of a peer's environment, or the reason why there is none."""
    name = ENVIRONMENTS[peer.partition("-")[0]]
    if name not in known:
        try:
            known[name] = str(environments.prepare(name, lambda text: print(f"layouts: {name}: {text}", flush=True)))
        except environments.Unavailable as error:
            known[name] = f"! {error}"
    return known[name]


def run_peer(job: Record, known: dict[str, str]) -> Record:
    python = python_of(job["peer"], known)
    if python.startswith("!"):
        return {"failed": python[2:]}
    return run([python, HERE / "packing_peers.py", json.dumps({**job, "folder": str(OUT)})], PEER_LIMIT_S)


def peers(plan: Plan, at: Folders, tell: Callable[[str], None]) -> list[Record]:
    known: dict[str, str] = {}
    base = {"what": "speed", "corpus": at["corpus"], "index": at["index"], "seq_len": SEQ_LEN, "batch_size": BATCH}
    jobs = [
        {**base, "peer": peer, "helpers": helpers, "labels": labels, "warm_up_s": 0.3, "window_s": plan.window_s}
        for labels, those in ((False, PACKERS), (True, TUNERS))
        for peer, helpers in those
    ]
    records = []
    for repeat in range(plan.peers):
        random.shuffle(jobs)
        for job in jobs:
            tell(f"{job['peer']} {repeat + 1} of {plan.peers}")
            records.append({**job, **run_peer(job, known)})
    return records


def peers_section(records: list[Record]) -> list[str]:
    lines = ["### Packing, by forebay and by others", ""]
    for labels, title in ((False, "Packing of token ids"), (True, "Fine-tuning batches: ids and labels, packed")):
        cells: dict[tuple[str, int], list[Record]] = {}
        for record in records:
            if record["labels"] == labels:
                cells.setdefault((record["peer"], record["helpers"]), []).append(record)
        rows = []
        worst = {}
        for (peer, helpers), found in sorted(cells.items()):
            good = [one for one in found if "failed" not in one]
            if not good:
                rows.append([peer, str(helpers), f"**failed**: {found[0]['failed']}", *[""] * 5])
                continue
            of = {name: [one[name] for one in good] for name in good[0] if isinstance(good[0][name], float)}
            worst[peer, helpers] = {name: median(values) for name, values in of.items()}
            rows.append([
                f"**{peer}**" if peer.startswith("forebay") else peer, str(helpers),
                spread([value / 1e6 for value in of["tokens_per_s"]]), spread(of["cpu_s_per_gtok"]),
                f"{median(of['padding']):.2%}", spread(of["prepare_s"]), spread(of["prepare_cpu_s"]),
                number(median(of["memory_mb"])),
            ])  # fmt: skip
        heads = ["", "helpers", "Mtok/s", "CPU s/Gtok", "padding", "prepare s", "prepare CPU s", "memory MB"]
        lines += [f"{title}:", "", *table(heads, rows), "", *lost(worst), ""]
    return lines


def lost(found: dict[tuple[str, int], dict[str, float]]) -> list[str]:
    """Names each measure in which a peer is ahead of a row of forebay."""
    lines = []
    more_is_better = {"tokens_per_s"}
    for (peer, helpers), theirs in found.items():
        if peer.startswith("forebay"):
            continue
        for (ours, _), mine in found.items():
            if not ours.startswith("forebay"):
                continue
            ahead = [
                name
                for name in theirs
                if (theirs[name] > mine[name] if name in more_is_better else theirs[name] < mine[name])
            ]
            if ahead:
                lines.append(f"- {peer} ({helpers} helpers) is ahead of {ours} in: {', '.join(sorted(ahead))}")
    return lines or ["- No peer is ahead in any column."]


def padding(plan: Plan, at: Folders, tell: Callable[[str], None]) -> list[Record]:
    del at
    known: dict[str, str] = {}
    records = []
    documents.demo_lengths(OUT, 1)
    for seq_len in plan.seq_lens:
        for median_of in (*plan.medians, documents.DEMO):
            for peer, tokens in (
                ("forebay", 100_000_000), ("forebay", plan.padding_tokens), ("trl", plan.padding_tokens),
                ("grain", plan.padding_tokens), ("torchtitan", plan.padding_tokens),
            ):  # fmt: skip
                tell(f"padding: {peer}, {median_of}, {seq_len}")
                job = {"what": "padding", "peer": peer, "median": median_of, "seq_len": seq_len, "tokens": tokens}
                records.append({**job, **run_peer(job, known)})
    return records


def padding_section(records: list[Record]) -> list[str]:
    shorter = min(record["tokens"] for record in records)
    rows = []
    for seq_len, median_of in dict.fromkeys((r["seq_len"], r["median"]) for r in records):
        by = {(r["peer"], r["tokens"]): r for r in records if (r["seq_len"], r["median"]) == (seq_len, median_of)}
        cells = []
        for key in (
            ("forebay", 100_000_000), ("forebay", shorter), ("trl", shorter), ("grain", shorter),
            ("torchtitan", shorter),
        ):  # fmt: skip
            found = by.get(key, {"failed": "not measured"})
            cells.append(f"{found['padding']:.2%}" if "padding" in found else f"failed: {found['failed'][:60]}")
        good = [r["padding"] for (peer, tokens), r in by.items() if tokens == shorter and "padding" in r]
        ours = by["forebay", shorter].get("padding", 1.0)
        long = by["forebay", 100_000_000].get("padding", 1.0)
        met = "yes" if long <= 0.003 and ours <= min(good) else "**no**"
        rows.append([str(seq_len), str(median_of), *cells, met])
    heads = ["S", "median", "forebay, 100 M tokens", "forebay", "TRL", "Grain", "torchtitan", "met"]
    return [
        "### Padding of packed rows", "",
        f"Lengths are log-normal: their logarithm has a standard deviation of {documents.SIGMA}. The first column is a"
        f" shard of 100 M tokens. All others pack the same {shorter / 1e6:.0f} M tokens. TRL packs with `bfd_split`,"
        " Grain with"
        " 128 bins, torchtitan with its packer for samples (`MMSamplePacker`, a buffer of 100). Target: at most 0.3 %"
        " with 100 M tokens, and never more than a peer. `demo` stands for the documents of the demo's corpus, Python's"
        " own sources, cut or repeated to as many tokens.", "",
        *table(heads, rows), "",
    ]  # fmt: skip


PARTS: dict[str, tuple[Callable[..., list[Record]], Callable[[list[Record]], list[str]]]] = {
    "speed": (speed, speed_section),
    "start": (starting, starting_section),
    "decoding": (decoding, decoding_section),
    "fields": (fields, fields_section),
    "padding": (padding, padding_section),
    "peers": (peers, peers_section),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few and short runs: within five minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure; the others keep what they had")
    parser.add_argument("--write-results", action="store_true", help="put the tables into benches/RESULTS.md as well")
    options = parser.parse_args()
    plan = QUICK if options.quick else DEFAULT
    at = folders()
    kept = OUT / ("layouts-quick.json" if options.quick else "layouts.json")
    records: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for part in options.only or PARTS:
        began, load = time.time(), os.getloadavg()[0]

        def tell(text: str, part: str = part) -> None:
            print(f"layouts: {part}: {text}", file=sys.stderr, flush=True)

        found = PARTS[part][0](plan, at, tell)
        records[part] = {
            "records": found, "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(began)),
            "load": [load, os.getloadavg()[0]], "quick": options.quick, "seconds": time.time() - began,
            "commit": commit(),
        }  # fmt: skip
        kept.write_text(json.dumps(records))
    text = written(records)
    (OUT / "layouts.md").write_text(text)
    print(text)
    if options.write_results:
        put(text)


def commit() -> str:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def written(records: dict[str, Any]) -> str:
    lines = [
        "## Layouts, further columns and packing", "",
        f"- {os.cpu_count()} cores; command: `make bench-layouts`. Ratios are medians of pairs of turns with their 95 %"
        " interval; other numbers are medians, with the range in parentheses.",
        "- A load above the number of cores means that other programs ran meanwhile. Ratios and CPU seconds suffer"
        " least from it, tokens per second most.",
    ]  # fmt: skip
    for part, what in records.items():
        lines.append(
            f"- `{part}`: {what['date']}, commit {what['commit']}, {what['seconds']:.0f} s; load of the machine"
            f" {what['load'][0]:.1f} before, {what['load'][1]:.1f} after"
            + ("; short runs (`--quick`)" if what["quick"] else "")
        )
    lines.append("")
    for part in PARTS:
        if part in records:
            lines += PARTS[part][1](records[part]["records"])
    return report.wrapped("\n".join(lines)).rstrip() + "\n"


def put(text: str) -> None:
    """Replaces the tables in RESULTS.md, and keeps what stands around them."""
    import workers

    results = ROOT / "benches" / "RESULTS.md"
    before, _, after = results.read_text().partition(workers.MARK)
    before = before.partition(MARK)[0].rstrip()
    after = f"\n{workers.MARK}{after}" if after else ""
    results.write_text(f"{before}\n\n{MARK}\n\n{text}{after}")


if __name__ == "__main__":
    main()
