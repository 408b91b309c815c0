"""Runs the recipes of docs/clusters.md: parts on engines, writers of corpora, elastic ranks.

An engine whose package is missing is skipped. `requirements/trainers-more.txt` names the packages.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import clean_environment

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

import forebay

pytestmark = [pytest.mark.thread_unsafe(reason="each test starts processes"), pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text()
CLUSTER = ROOT / "examples" / "cluster"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def environment(**more: str) -> dict[str, str]:
    """The environment with the commands of this Python first, and without a launcher."""
    clean = {k: v for k, v in clean_environment().items() if not k.startswith("SLURM_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    return {**clean, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def run(*command: object, folder: Path, status: int = 0, **more: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def command(*arguments: object, folder: Path, status: int = 0) -> str:
    return run(sys.executable, "-m", "forebay", *arguments, folder=folder, status=status)


def write_corpus(folder: Path, shards: int, documents: int = 40) -> list[list[int]]:
    """Writes `shards` files, and returns their documents in order."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(3)
    written = []
    for shard in range(shards):
        rows = [draw.integers(0, 50_000, draw.integers(1, 90)).tolist() for _ in range(documents)]
        table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
        pq.write_table(table, folder / f"{shard:03}.parquet", row_group_size=16)
        written += rows
    return written


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "data" / "corpus", 10)
    (tmp_path / "shared").mkdir()
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def index_of_one_run(root: Path) -> dict[str, bytes]:
    command("index", root / "data" / "corpus", "--index-dir", root / "once", folder=root)
    return files(root / "once")


def program(word: str, root: Path) -> Path:
    """The program of the page that has `word`, with the paths in `root`."""
    [text] = [text for text in PROGRAMS if word in text]
    path = root / "program.py"
    path.write_text(text.replace('"/data/', f'"{root}/data/').replace('"/shared/', f'"{root}/shared/'))
    return path


def test_tasks_of_ray_index_a_corpus(root: Path) -> None:
    pytest.importorskip("ray", reason="`requirements/trainers-more.txt` names it")
    run(sys.executable, program("import ray", root), folder=root, RAY_DEDUP_LOGS="0", RAY_USAGE_STATS_ENABLED="0")
    assert files(root / "shared" / "index") == index_of_one_run(root)


def stream_of(corpus: Path, tokens: int) -> list[int]:
    """The tokens of a corpus in order."""
    with forebay.Loader(str(corpus), seq_len=tokens, batch_size=1, num_threads=1) as loader:
        [batch] = list(loader)
    return np.asarray(batch["input_ids"]).reshape(-1).tolist()


@pytest.mark.parametrize("engine", ["pyspark", "dask"])
def test_what_an_engine_writes_is_a_corpus(engine: str, tmp_path: Path) -> None:
    package = {"pyspark": "pyspark", "dask": "dask.dataframe"}[engine]
    pytest.importorskip(package, reason="`requirements/trainers-more.txt` names it")
    if engine == "pyspark" and subprocess.run(["java", "-version"], capture_output=True).returncode != 0:
        pytest.skip("Spark needs Java")
    run(sys.executable, program(engine, tmp_path), folder=tmp_path, PYSPARK_PYTHON=sys.executable)
    [folder] = [path for path in tmp_path.iterdir() if path.name.startswith("from-")]
    expected = [token for n in range(2000) for token in [n % 500] * (n % 90 + 1)]
    found = json.loads(command("check", folder, "--json", folder=tmp_path))
    assert (found["shards"], found["documents"], found["tokens"]) == (4, 2000, len(expected))
    assert stream_of(folder, len(expected)) == expected


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip"])
def test_a_folder_in_the_shape_of_spark_is_a_corpus(codec: str, tmp_path: Path) -> None:
    folder = tmp_path / "from-spark"
    folder.mkdir()
    rows = [[n % 500] * (n % 7 + 1) for n in range(300)]
    suffix = {"snappy": "snappy.", "zstd": "zstd.", "gzip": "gz."}[codec]
    items = pa.list_(pa.field("element", pa.int32(), nullable=False))
    collected: list[Any] = []
    for part in range(3):
        name = f"part-{part:05}-5f0c1d6e-91f0-4f8e-8a3c-0d8f1b0a7c11-c000.{suffix}parquet"
        table = pa.table({"input_ids": pa.array(rows[part * 100 : part * 100 + 100], items)})
        pq.write_table(table, folder / name, compression=codec, metadata_collector=collected)
        collected[-1].set_file_path(name)
        (folder / f".{name}.crc").write_bytes(b"crc\0")
    (folder / "_SUCCESS").touch()
    (folder / "._SUCCESS.crc").write_bytes(b"crc\0")
    pq.write_metadata(table.schema, folder / "_metadata", metadata_collector=collected)
    pq.write_metadata(table.schema, folder / "_common_metadata")
    expected = [token for row in rows for token in row]
    assert stream_of(folder, len(expected)) == expected
    assert json.loads(command("check", folder, "--json", folder=tmp_path))["shards"] == 3


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_are_sound(path: Path, tmp_path: Path) -> None:
    run("bash", "-n", path, folder=tmp_path)
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH ") and "set -euo pipefail" in text


def test_a_job_array_indexes_a_corpus(root: Path) -> None:
    index = {"FOREBAY_DATA": str(root / "data" / "corpus"), "FOREBAY_INDEX_DIR": str(root / "shared")}
    for task in range(4):
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "4"}
        run("bash", CLUSTER / "index-array.sbatch", folder=root, **index, **slurm)
    # A task that is submitted again runs in a smaller array.
    slurm = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "1", "PARTS": "4"}
    run("bash", CLUSTER / "index-array.sbatch", folder=root, **index, **slurm)
    run("bash", CLUSTER / "index-merge.sbatch", folder=root, **index)
    assert files(root / "shared") == index_of_one_run(root)


def test_the_script_of_a_job_starts_torchrun_on_each_node(root: Path) -> None:
    torchrun = pytest.importorskip("torch.distributed.run", reason="the script starts torchrun")
    for name, text in (("scontrol", "echo node1; echo node2"), ("srun", 'printf "%s\\n" "$@"')):
        (root / name).write_text(f"#!/bin/sh\n{text}\n")
        (root / name).chmod(0o755)
    given = environment(SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES="2", SLURM_JOB_ID="7")
    given["PATH"] = f"{root}{os.pathsep}{given['PATH']}"
    script = ["bash", str(CLUSTER / "train.sbatch"), "train.py", "--steps", "9"]
    done = subprocess.run(script, cwd=root, env=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name, *arguments = done.stdout.splitlines()
    parsed = torchrun.get_args_parser().parse_args(arguments)
    assert (name, parsed.rdzv_endpoint, parsed.nnodes) == ("torchrun", "node1:29500", "2")
    assert [parsed.training_script, *parsed.training_script_args] == ["train.py", "--steps", "9"]
    misspelt = {**given, "FOREBAY_SEQLEN": "2048"}
    assert subprocess.run(script, cwd=root, env=misspelt, capture_output=True, timeout=60).returncode == 2


@pytest.mark.parametrize("of", ["index", "rewrite"])
def test_parts_that_are_killed_run_again(of: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 30, documents=400)
    before, after = {
        "index": (["index", corpus, "--checksums", "--index-dir"], []),
        "rewrite": (["rewrite", corpus], ["--dtype", "uint16", "--shard-tokens", "20000"]),
    }[of]

    def of_part(target: str, *last: str) -> list[str]:
        arguments = [*before, tmp_path / target, *after, "--set", "num_threads=1", *last]
        return [sys.executable, "-m", "forebay", *map(str, arguments)]

    began = time.monotonic()
    run(*of_part("once"), folder=tmp_path)
    whole = time.monotonic() - began
    draw = random.Random(5)
    for part in range(3):
        for _ in range(4):
            process = subprocess.Popen(
                of_part("parts", "--part", f"{part}/3"), cwd=tmp_path, env=environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            time.sleep(draw.uniform(0.1, whole))
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
        run(*of_part("parts", "--part", f"{part}/3"), folder=tmp_path)
    run(*of_part("parts", "--merge"), folder=tmp_path)

    def contents(target: str) -> dict[str, Any]:
        found: dict[str, Any] = dict(files(tmp_path / target))
        notes = "_forebay_rewrite.jsonl"
        if notes in found:
            found[notes] = sorted(found[notes].splitlines())
        return found

    assert contents("parts") == contents("once")


def test_the_advice_of_the_page_is_that_of_the_command(root: Path) -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+)([MG]i) \|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [8, 64, 512, 4096]
    for ranks, lanes, window, unit in rows:
        plan = ["plan", root / "data" / "corpus", "--seq-len", 16, "--shuffle", "--world-size", ranks, "--advise"]
        advice = json.loads(command(*plan, "--json", folder=root))["advice"]
        tokens = int(window) * {"Mi": 2**20, "Gi": 2**30}[unit]
        assert (advice["lanes"], advice["window_tokens"]) == (int(lanes), tokens)


@pytest.mark.parametrize("ranks", [1, 6, 8, 24])
def test_a_run_that_follows_the_advice_decodes_once(ranks: int, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 8, documents=2000)
    content = ["--seq-len", 32, "--shuffle", "--set", "chunk_tokens=1024", "--set", "block_tokens=4096"]
    plan = ["plan", corpus, "--world-size", ranks, "--json", *content]
    advice = json.loads(command(*plan, "--set", "window_tokens=16384", "--advise", "--cpus", 32, folder=tmp_path))[
        "advice"
    ]
    assert advice["num_threads"] == min(8, max(1, 32 // min(8, ranks) - 1))
    assert advice["lanes"] % ranks == 0 and advice["window_tokens"] // advice["lanes"] == 2048
    names = ["lanes", "window_tokens", "num_threads", "memory_budget"]
    advised = [part for name in names for part in ("--set", f"{name}={advice[name]}")]
    found = json.loads(command(*plan, *advised, folder=tmp_path))
    assert found["pass"]["sharing_ranks"] == 1
    assert [warning for warning in found["warnings"] if "decoded several times" in warning] == []
    assert found["memory"]["budgeted_bytes"] <= advice["memory_budget"]


def test_each_choice_is_shown_with_its_arithmetic(root: Path) -> None:
    plan = ["plan", root / "data" / "corpus", "--seq-len", 16, "--shuffle", "--world-size", 64, "--advise"]
    said = command(*plan, "--cpus", 192, folder=root)
    advice = said[said.index("advice ") :]
    for words in (
        "64 ranks on 8 nodes with 192 CPUs each",
        "lanes=64",
        "smallest multiple of 64 ranks that is not below 8",
        "window_tokens=128Mi",
        "16Mi tokens / 8 lanes x 64 lanes",
        "num_threads=8",
        "192 CPUs / 8 ranks - 1 = 23",
        "memory_budget=",
        "5 batches of",
    ):
        assert words in advice, advice
    shown = PAGE[PAGE.index("\nadvice ") :]
    assert shown.splitlines()[1:4] == advice.splitlines()[:3], "the page shows other lines"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.timeout(600)
def test_nodes_may_leave_and_join_during_a_run(tmp_path: Path, stress: bool) -> None:
    pytest.importorskip("torch", reason="torchrun starts the ranks")
    if not stress and importlib.util.find_spec("ray") is None:
        pytest.skip("minutes of restarts: `make test-trainers` and `make stress` run it")
    corpus, log = tmp_path / "corpus", tmp_path / "delivered"
    write_corpus(corpus, 4, documents=200)
    arguments = [corpus, "--seq-len", 16, "--state", tmp_path / "state.json", "--delivery-log", log]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    launch = [
        *torchrun, "--nnodes", "1:2", "--max-restarts", 9, "--monitor-interval", 0.2, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "run",
        "--rdzv-conf", "last_call_timeout=2,join_timeout=60", CLUSTER / "elastic.py", *arguments, "--seconds", 0.5,
    ]  # fmt: skip

    def node(name: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / f"{name}.log", "wb") as out:
            return subprocess.Popen(
                list(map(str, launch)), cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT,
                env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
            )  # fmt: skip

    def said() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))

    def wait_for(words: str, count: int = 1) -> None:
        limit = time.monotonic() + 120
        while len(re.findall(words, said())) < count:
            assert time.monotonic() < limit, f"`{words}` is not in\n{said()[-6000:]}"
            time.sleep(0.1)

    def wait_for_steps(more: int) -> None:
        state = tmp_path / "state.json"
        first = json.loads(state.read_text())["step"] if state.exists() else 0
        limit = time.monotonic() + 120
        while not state.exists() or json.loads(state.read_text())["step"] < first + more:
            assert time.monotonic() < limit, said()[-6000:]
            time.sleep(0.1)

    nodes = [node("first")]
    try:
        wait_for_steps(5)
        nodes.append(node("second"))
        wait_for(r"rank \d of 4 begins at step [1-9]", 4)
        wait_for_steps(5)
        nodes[1].send_signal(signal.SIGTERM)
        nodes[1].wait(timeout=60)
        wait_for(r"rank \d of 2 begins at step [1-9]", 2)
        wait_for_steps(5)
    finally:
        for process in nodes:
            process.terminate()
        for process in nodes:
            process.wait(timeout=60)
    # The rest of the epoch, on another number of ranks.
    run(*torchrun[:-1], 1, "--standalone", CLUSTER / "elastic.py", *arguments, folder=tmp_path)
    verify = ["verify", corpus, "--seq-len", 16, "--shuffle", "--delivery-log", log]
    assert "proven" in command(*verify, folder=tmp_path)


def test_the_dashboard_shows_metrics_that_are_served(tmp_path: Path) -> None:
    for name in ("web", "code"):
        write_corpus(tmp_path / name, 2)
    program = """
import json, sys, urllib.request, forebay
sources = [{"name": name, "data": name, "weight": 1} for name in ("web", "code")]
with forebay.Loader(mixture={"sources": sources}, seq_len=16, batch_size=2, layout="pack") as loader:
    next(iter(loader))
    print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics").read().decode())
"""
    port = free_port()
    served = run(sys.executable, "-c", program, port, folder=tmp_path, FOREBAY_METRICS=f"127.0.0.1:{port}")
    names = {re.split(r"[{ ]", line)[0] for line in served.splitlines() if line and not line.startswith("#")}
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in dashboard["templating"]["list"]]
    found = {name for text in asked for name in re.findall(r"forebay_\w+", text)}
    assert len(found) >= 10 and found <= names, found - names
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(set(places)) == len(places)


def serves(arguments: list[str], root: Path, **variables: str) -> str:
    """Starts a service, sends SIGTERM once it is ready, and returns what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "forebay", *arguments], cwd=root, env=environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    process.terminate()
    said += process.stdout.read()
    assert process.wait(timeout=60) == 0, said
    return said


def test_the_unit_of_systemd_starts_a_service(root: Path) -> None:
    text = (CLUSTER / "forebay.service").read_text()
    [line] = re.findall(r"^ExecStart=/usr/local/bin/forebay (.*)$", text, re.MULTILINE)
    socket_path = root / "forebay.sock"
    said = serves(
        line.replace("/run/forebay/forebay.sock", str(socket_path)).split(), root,
        FOREBAY_DATA=str(root / "data" / "corpus"),
    )  # fmt: skip
    assert f"ready at unix:{socket_path}" in said
    analyze = "systemd-analyze"
    if subprocess.run(["which", analyze], capture_output=True).returncode != 0:
        pytest.skip(f"{analyze} is not installed")
    unit = root / "forebay.service"
    unit.write_text(text.replace("/usr/local/bin/forebay", "/bin/true"))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "forebay" in line]) == (0, [])


def test_the_daemon_set_starts_a_service_that_answers_its_probes(root: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="the file is YAML")
    daemon_set = yaml.safe_load((CLUSTER / "daemonset.yaml").read_text())
    assert (daemon_set["apiVersion"], daemon_set["kind"]) == ("apps/v1", "DaemonSet")
    template = daemon_set["spec"]["template"]
    assert daemon_set["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    [container] = template["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in template["spec"]["volumes"]}
    [port] = container["ports"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    used = free_port()
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["FOREBAY_METRICS"].endswith(f":{port['containerPort']}")
    variables["FOREBAY_METRICS"] = f"127.0.0.1:{used}"
    variables["FOREBAY_INDEX_DIR"] = str(root / "shared")
    budget = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert int(variables["FOREBAY_MEMORY_BUDGET"].removesuffix("GiB")) < budget
    command, *arguments = [*container["command"], *container["args"]]
    replaced = [
        text.replace("/run/forebay", str(root)).replace("/data/corpus", str(root / "data" / "corpus"))
        for text in arguments
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", command, *replaced], cwd=root, env=environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and "ready at" in process.stdout.readline()
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == port["name"]
            path = container[probe]["httpGet"]["path"]
            with urllib.request.urlopen(f"http://127.0.0.1:{used}{path}", timeout=10) as answer:
                assert answer.status == 200
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
