"""Measures a service against loaders in the training processes: `make bench ARGS=--service`.

- `share`: eight processes read one epoch of Parquet, by one service or by a loader each. Counts the
  memory and the CPU time of all processes, and the decoded blocks.
- `hand-over`: one consumer takes batches over a Unix socket that are ready, and tells the time of
  `next()`. The CPU time is that of both sides.
- `rate`: one consumer takes batches of Arrow files as fast as it can, over a Unix socket or TCP.
- `stopped`: a paced consumer, while another consumer of the same service stops. Blocks alternate.
- `scrape`: the time of a request for the metrics of a service with eight consumers.
- `kills`: kills a server, a consumer, or one of two servers, again and again. Compares the rows
  with those of an undisturbed run.
- `torch`: eight processes with a torch DataLoader and workers each, for comparison.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from targets import ROOT, Record, Tell, Verdict, child, environment, failures, in_turn, small_corpus, spread, verdicts

LEAD = "The service"
REPEATS = 3
CONSUMERS = 8
KILLS = 50
SHARE_STEPS = 150
SHAPE: dict[str, Any] = {"seq_len": 2048, "batch_size": 16, "shuffle": True, "seed": 3}


# --- Servers and consumers


@contextmanager
def served(folder: Path, listen: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A server of everything in a folder."""
    server = started(folder, listen, **variables)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def started(folder: Path, listen: str, **variables: str) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "forebay", "serve", "--under", str(folder), "--listen", listen],
        cwd=ROOT, env={**environment(), **variables}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("ready at "), line
    return server


def cpu_seconds(pid: int) -> float:
    """CPU time of a living process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_mb(pid: int) -> float:
    """Memory of a process. Shared pages count by the share of the process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    # The pages of mapped files belong to the page cache.
    return (int(found["Pss"]) - int(found.get("Pss_File", "0"))) / 1024


CONSUMER = """
import json, sys, time
job = json.loads(sys.argv[1])
if job["kind"] == "torch":
    import numpy as np, torch
    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            import pyarrow.parquet as pq, glob
            self.files = [pq.ParquetFile(path) for path in sorted(glob.glob(job["path"] + "/*.parquet"))]
        def __len__(self):
            return job["steps"] * 16 * 8
        def __getitem__(self, index):
            # Each worker keeps the tokens of one row group, which it reads in order.
            group = index // 64 % self.files[0].num_row_groups
            if getattr(self, "group", None) != group:
                column = self.files[0].read_row_group(group, ["input_ids"]).column(0).combine_chunks()
                self.group, self.ids = group, column.values.to_numpy()
            at = index % 64 * 2048 % (len(self.ids) - 2048)
            return torch.from_numpy(self.ids[at : at + 2048].astype(np.int64))
    sampler = range(job["rank"] * job["steps"] * 16, (job["rank"] + 1) * job["steps"] * 16)
    source = torch.utils.data.DataLoader(Rows(), batch_size=16, sampler=sampler, num_workers=2)
    stats = dict
else:
    from forebay import Loader
    source = Loader(job["path"], dp_rank=job["rank"], dp_world_size=job["world"], **job["settings"])
    stats = source.stats
batches, tokens = iter(source), 0
print("open", flush=True)
sys.stdin.readline()
for step in range(job["steps"]):
    batch = next(batches)
    tokens += 16 * 2048
print(json.dumps({"tokens": tokens, "decoded": stats().get("decoded_bytes", 0)}), flush=True)
sys.stdin.readline()
"""


def tree(pid: int) -> list[int]:
    """The ids of a process and all its descendants."""
    found, at = [pid], 0
    while at < len(found):
        for tasks in Path(f"/proc/{found[at]}/task").glob("*/children"):
            found.extend(int(part) for part in tasks.read_text().split())
        at += 1
    return found


# --- The measurements


def share(job: Record) -> Record:
    """Eight consumers take some batches. They begin together, and are looked at before they end."""
    with tempfile.TemporaryDirectory() as folder:
        address, port = f"unix:{folder}/socket", free_port()
        settings: dict[str, Any] = dict(SHAPE)
        server = None
        if job["way"] == "service":
            server = started(Path(job["path"]).parent, address, FOREBAY_METRICS=f"127.0.0.1:{port}")
            settings["service"] = address
        kind = "torch" if job["way"] == "torch" else "forebay"
        world = 1 if job.get("replicated") else CONSUMERS
        consumers = []
        for rank in range(CONSUMERS):
            given = {"kind": kind, "path": job["path"], "rank": rank if world > 1 else 0, "world": world,
                     "steps": job["steps"], "settings": settings}  # fmt: skip
            consumers.append(subprocess.Popen(
                [sys.executable, "-c", CONSUMER, json.dumps(given)], env=environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ))  # fmt: skip
        try:
            for one in consumers:
                assert one.stdout is not None and one.stdout.readline() == "open\n"
            everyone = [one.pid for one in consumers] + ([server.pid] if server else [])
            cpu_before = sum(cpu_seconds(pid) for all_ in map(tree, everyone) for pid in all_)
            began = time.perf_counter()
            for one in consumers:
                assert one.stdin is not None
                one.stdin.write("go\n")
                one.stdin.flush()
            most = 0.0
            results: list[Record] = []
            for one in consumers:
                assert one.stdout is not None
                # The processes are looked at while most of them read.
                most = max(most, memory_of(everyone))
                results.append(json.loads(one.stdout.readline()))
            seconds = time.perf_counter() - began
            cpu = sum(cpu_seconds(pid) for all_ in map(tree, everyone) for pid in all_) - cpu_before
            decoded = [result["decoded"] for result in results]
            if server:
                # All streams of a server share one cache, and each tells its count.
                decoded = [max(counts_of(port, "forebay_decoded_bytes_total"), default=0.0)]
        finally:
            for one in consumers:
                one.kill()
                one.wait()
            if server:
                server.kill()
                server.wait()
    tokens = sum(result["tokens"] for result in results)
    return {"memory_mb": most, "cpu_s": cpu, "seconds": seconds, "tokens": tokens,
            "decoded_mb": sum(decoded) / 2**20}  # fmt: skip


def counts_of(port: int, name: str) -> list[float]:
    """The values of a metric for all ranks."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")]


def memory_of(pids: list[int]) -> float:
    total = 0.0
    for all_ in map(tree, pids):
        for pid in all_:
            try:
                total += own_mb(pid)
            except OSError:
                continue
    return total


def consumer(path: str, address: str, **more: Any) -> Any:
    from forebay import Loader

    return Loader(path, service=address, epochs="endless", **{**SHAPE, **more})


def hand_over(job: Record) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/socket"
        with served(Path(job["path"]).parent, address) as server:
            batches = iter(consumer(job["path"], address))
            for _ in range(20):
                next(batches)
            cpu = cpu_seconds(server.pid) + time.process_time()
            waits = []
            for _ in range(job["steps"]):
                until = time.perf_counter() + 0.002
                time.sleep(max(0.0, until - time.perf_counter()))
                began = time.perf_counter()
                next(batches)
                waits.append(time.perf_counter() - began)
            cpu = cpu_seconds(server.pid) + time.process_time() - cpu
    p50, p99 = np.percentile(waits, [50, 99]) * 1e6
    return {"p50_us": float(p50), "p99_us": float(p99), "cpu_s_per_1e9": cpu / (job["steps"] * 16 * 2048) * 1e9}


def rate(job: Record) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/socket" if job["over"] == "unix" else "grpc://127.0.0.1:0"
        with served(Path(job["path"]).parent, address) as server:
            if job["over"] == "tcp":
                address = listening_at(server)
            # The ids stay narrow, so that the hand-over is measured and not the widening.
            batches = iter(consumer(job["path"], address, input_dtype=job["dtype"]))
            for _ in range(50):
                next(batches)
            began, taken = time.perf_counter(), 0
            while time.perf_counter() < began + 3:
                next(batches)
                taken += 1
            seconds = time.perf_counter() - began
    return {"mtok_s": taken * 16 * 2048 / seconds / 1e6}


def listening_at(server: subprocess.Popen[str]) -> str:
    """The address at which a server listens, from the table of sockets of its process."""
    inodes = set()
    for link in Path(f"/proc/{server.pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    for line in Path(f"/proc/{server.pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            return f"grpc://127.0.0.1:{int(fields[1].split(':')[1], 16)}"
    raise RuntimeError("the server listens at no port")


def stopped(job: Record) -> Record:
    """Waits of a paced consumer, in turn beside a consumer that reads and one that has stopped."""
    found: dict[str, list[float]] = {"beside none": [], "beside a stopped one": []}
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/socket"
        with served(Path(job["path"]).parent, address):
            batches = iter(consumer(job["path"], address))
            next(batches)
            for _ in range(job["rounds"]):
                for name, kept in found.items():
                    other = iter(consumer(job["path"], address)) if name != "beside none" else None
                    if other is not None:
                        next(other)
                        time.sleep(0.3)
                    for _ in range(300):
                        time.sleep(0.001)
                        began = time.perf_counter()
                        next(batches)
                        kept.append(time.perf_counter() - began)
                    del other
    p99 = {name: float(np.percentile(waits, 99)) for name, waits in found.items()}
    return {"alone_us": p99["beside none"] * 1e6, "beside_us": p99["beside a stopped one"] * 1e6}


def scrape(job: Record) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        address, port = f"unix:{folder}/socket", free_port()
        with served(Path(job["path"]).parent, address, FOREBAY_METRICS=f"127.0.0.1:{port}"):
            held = []
            for rank in range(CONSUMERS):
                batches = iter(consumer(job["path"], address, dp_rank=rank, dp_world_size=CONSUMERS))
                next(batches)
                held.append(batches)
            times, size = [], 0
            for _ in range(200):
                began = time.perf_counter()
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                    size = len(answer.read())
                times.append(time.perf_counter() - began)
    return {"p50_ms": float(np.percentile(times, 50)) * 1e3, "p99_ms": float(np.percentile(times, 99)) * 1e3,
            "bytes": size}  # fmt: skip


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kills(job: Record) -> Record:
    """Kills something `KILLS` times, and compares all rows with an undisturbed run's."""
    from forebay import Loader

    settings: dict[str, Any] = {"seq_len": 256, "batch_size": 16, "shuffle": True, "seed": 3, "epochs": "endless"}
    wanted = Loader(job["path"], **settings)
    undisturbed = iter(wanted)
    wrong, slowest, steps = 0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        addresses = [f"unix:{folder}/{name}" for name in ("first", "second")]
        used = addresses if job["what"] == "one of two servers" else addresses[:1]
        under = Path(job["path"]).parent
        servers = [started(under, address) for address in used]
        loader = Loader(job["path"], **settings, service=used)
        try:
            batches = iter(loader)
            for kill in range(KILLS):
                for _ in range(10):
                    wrong += not np.array_equal(next(batches)["input_ids"], next(undisturbed)["input_ids"])
                    steps += 1
                began = time.perf_counter()
                if job["what"] == "a consumer":
                    state = loader.state_dict()
                    victim = os.fork()
                    if victim == 0:
                        os.execv(sys.executable, [
                            sys.executable, "-c",
                            "import sys, json\nfrom forebay import Loader\n"
                            "loader = Loader(sys.argv[1], service=sys.argv[2], **json.loads(sys.argv[3]))\n"
                            "for batch in loader: pass",
                            job["path"], used[0], json.dumps(settings),
                        ])  # fmt: skip
                    time.sleep(0.3)
                    os.kill(victim, signal.SIGKILL)
                    os.waitpid(victim, 0)
                    began = time.perf_counter()
                    loader = Loader(job["path"], **settings, service=used)
                    loader.load_state_dict(state)
                    batches = iter(loader)
                else:
                    place = kill % len(servers)
                    servers[place].kill()
                    servers[place].wait()
                    if job["what"] == "the server":
                        servers[place] = started(under, used[place])
                        began = time.perf_counter()
                # Batches that had arrived come first.
                for _ in range(8):
                    wrong += not np.array_equal(next(batches)["input_ids"], next(undisturbed)["input_ids"])
                    steps += 1
                slowest = max(slowest, time.perf_counter() - began)
                if job["what"] == "one of two servers":
                    servers[place] = started(under, used[place])
        finally:
            for server in servers:
                server.kill()
                server.wait()
        left = sorted(path.name for path in Path(folder).iterdir() if path.name not in ("first", "second"))
    return {"wrong": wrong, "steps": steps, "slowest_s": slowest, "left": left}


WAYS = {"share": share, "hand-over": hand_over, "rate": rate, "stopped": stopped, "scrape": scrape, "kills": kills}


def once(job: Record) -> Record:
    return WAYS[job["kind"]](job)


def measure(folder: Path, seed: int, tell: Tell) -> list[Record]:
    data = small_corpus(folder)
    arrow, parquet = str(data / "arrow-uint16"), str(data / "parquet-zstd")
    steps = min(SHARE_STEPS, 20_000_000 // (2048 * 16 * CONSUMERS) - 1)
    jobs: list[Record] = [
        *({"kind": "share", "way": way, "path": parquet, "steps": steps} for way in ("loaders", "service", "torch")),
        {"kind": "share", "way": "service", "path": parquet, "steps": steps, "replicated": True},
        {"kind": "hand-over", "path": arrow, "steps": 1500},
        *({"kind": "rate", "path": arrow, "over": over, "dtype": dtype} for over in ("unix", "tcp")
          for dtype in ("int32",)),
        {"kind": "stopped", "path": arrow, "rounds": 4},
        {"kind": "scrape", "path": arrow},
    ]  # fmt: skip
    records = in_turn(jobs, REPEATS, seed, tell, lambda job: child("service", job))
    for what in ("the server", "a consumer", "one of two servers"):
        job = {"kind": "kills", "what": what, "path": arrow}
        records.append({**job, **child("service", job)})
    return records


def section(records: list[Record]) -> list[str]:
    good = [record for record in records if "failed" not in record]

    def values(name: str, **wanted: Any) -> list[float]:
        chosen = [one for one in good if all(one.get(key) == value for key, value in wanted.items())]
        return [one[name] for one in chosen]

    rows: list[Verdict] = []

    def shared(name: str, target: float, what: str) -> None:
        ours = values(name, kind="share", way="service", replicated=None)
        theirs = values(name, kind="share", way="loaders")
        if ours and theirs:
            ratio = median(ours) / median(theirs)
            rows.append(Verdict(what, f"{target}", f"{ratio:.2f}: {spread(ours)} against {spread(theirs)}",
                                ratio <= target))  # fmt: skip

    shared("memory_mb", 0.25, "8 consumers, memory in MB, against 8 loaders")
    shared("cpu_s", 0.6, "8 consumers, CPU seconds, against 8 loaders")
    for name, label in (("p50_us", "p50"), ("p99_us", "p99")):
        found = values(name, kind="hand-over")
        if found:
            most = 150 if label == "p50" else 1000
            rows.append(Verdict(f"hand-over, {label}", f"{most} us", f"{spread(found)} us", median(found) <= most))
    if found := values("cpu_s_per_1e9", kind="hand-over"):
        rows.append(Verdict("CPU seconds for 10^9 tokens, both sides", "3", spread(found), median(found) <= 3))
    for over in ("unix", "tcp"):
        if found := values("mtok_s", kind="rate", over=over):
            rows.append(Verdict(f"one consumer over {over}", "300 Mtok/s", f"{spread(found)} Mtok/s",
                                median(found) >= 300))  # fmt: skip
    alone, beside = values("alone_us", kind="stopped"), values("beside_us", kind="stopped")
    if alone and beside:
        ratio = median(beside) / median(alone)
        found_text = f"{ratio:.2f}: {spread(beside)} against {spread(alone)} us"
        rows.append(Verdict("p99 beside a stopped consumer", "1.05", found_text, ratio <= 1.05))
    if found := values("p99_ms", kind="scrape"):
        rows.append(Verdict("a scrape, p99", "5 ms", f"{spread(found)} ms", median(found) <= 5))
    for one in good:
        if one["kind"] == "kills":
            text = f"{one['wrong']} wrong of {one['steps']} batches, at most {one['slowest_s']:.2f} s"
            text += f", left {one['left']}" if one["left"] else ""
            met = one["wrong"] == 0 and one["slowest_s"] <= 2 and not one["left"]
            rows.append(Verdict(f"kill -9 of {one['what']}, {KILLS} times", "0 wrong, 2 s", text, met))
    for way, replicated, what in (
        ("service", None, "8 consumers, a service"), ("service", True, "8 consumers of the same rows, a service"),
        ("loaders", None, "8 consumers, a loader each"), ("torch", None, "8 consumers, torch with 2 workers each"),
    ):  # fmt: skip
        chosen = {"kind": "share", "way": way, "replicated": replicated}
        if memory := values("memory_mb", **chosen):
            tokens, seconds = values("tokens", **chosen), values("seconds", **chosen)
            speed = [count / took / 1e6 for count, took in zip(tokens, seconds, strict=True)]
            decoded = spread(values("decoded_mb", **chosen)) + " MB decoded" if way != "torch" else "all rows decoded"
            cpu = spread(values("cpu_s", **chosen))
            text = f"{decoded}, {spread(memory)} MB of memory, {cpu} CPU s, {spread(speed)} Mtok/s"
            rows.append(Verdict(what, "", text))
    return [
        "Eight processes read one epoch of Parquet with zstd together. Memory is the sum over all processes, where a"
        " shared page counts once; mapped files do not count. CPU time begins when all have opened.", "",
        *failures(records, "kind", "path"), *verdicts(rows),
    ]  # fmt: skip
