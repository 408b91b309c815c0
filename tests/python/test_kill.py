"""Tests that a run that is killed again and again sees the batches of an undisturbed run.

Processes under torchrun are killed with SIGKILL at random moments and started again on another
number of ranks. Their delivery_log has to prove the epoch, and to equal that of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the trainers run under torchrun")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
from support import clean_environment

import forebay

SEQ_LEN = 16
GLOBAL_BATCH = 12
WORLD_SIZES = (4, 2, 1, 3)
STEPS_PER_KILL = 60
LAUNCH_LIMIT_S = 240
CONTENT: dict[str, Any] = {
    "seq_len": SEQ_LEN, "shuffle": "block", "seed": 11, "chunk_tokens": 320, "window_tokens": 3200,
}  # fmt: skip

TRAINER = """
import json, os, sys, time
import torch
import torch.distributed as dist
from forebay.torch import DataLoader, TokenDataset

corpus, folder, content = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
dataset = TokenDataset(corpus, seq_len=content.pop("seq_len"))
loader = DataLoader(
    dataset, batch_size=int(sys.argv[4]) // world_size, drop_last=True, num_threads=1,
    delivery_log=os.path.join(folder, "delivery_log"), **content,
)
checkpoint = os.path.join(folder, "checkpoint.json")

def save():
    if rank == 0:
        with open(checkpoint + ".new", "w") as file:
            json.dump(loader.state_dict(), file)
        os.replace(checkpoint + ".new", checkpoint)
    dist.barrier()

if os.path.exists(checkpoint):
    with open(checkpoint) as file:
        loader.load_state_dict(json.load(file))
loader.set_epoch(0)
dist.barrier()
for step, batch in enumerate(loader):
    dist.all_reduce(batch["input_ids"].sum())
    time.sleep(0.01)
    if step % 4 == 3:
        save()
save()
if rank == 0:
    open(os.path.join(folder, "done"), "w").close()
"""


def descendants(root: int) -> list[int]:
    """`root` and all processes below it; torchrun gives each of its workers a session of its
    own.
    """
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            parents.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    found = [root]
    for process in found:
        found += parents.get(process, [])
    return found


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to all at once; the launcher is stopped first, so that it starts and notices nothing
    meanwhile.
    """
    os.kill(launcher.pid, signal.SIGSTOP)
    for process in descendants(launcher.pid):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait()


class Job:
    """A training that is started again and again."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self.delivery_log = folder / "delivery_log"
        self.script = folder / "trainer.py"
        self.script.write_text(textwrap.dedent(TRAINER))
        self.log = folder / "log.txt"

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    def start(self, world_size: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}",
            self.script, self.corpus, self.folder, json.dumps(CONTENT), GLOBAL_BATCH,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [str(part) for part in command],
                env=clean_environment(OMP_NUM_THREADS="1"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def lines(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.delivery_log.glob("rank-*.jsonl"))

    def run_and_kill(self, world_size: int, moment: float, *, starting: bool) -> bool:
        """Kills it `moment` seconds after its start, or after its first batches; whether it lived
        that long.
        """
        launcher = self.start(world_size)
        try:
            before, limit = self.lines(), time.monotonic() + LAUNCH_LIMIT_S
            # Each rank writes one line as it begins.
            while not starting and self.lines() <= before + world_size and launcher.poll() is None:
                assert time.monotonic() < limit, f"no batch in {LAUNCH_LIMIT_S} s\n{self.log.read_text()[-4000:]}"
                time.sleep(0.02)
            end = time.monotonic() + moment
            while time.monotonic() < end and launcher.poll() is None:
                time.sleep(0.005)
            return launcher.poll() is None
        finally:
            kill(launcher)

    def run(self, world_size: int) -> None:
        launcher = self.start(world_size)
        try:
            launcher.wait(LAUNCH_LIMIT_S)
        finally:
            if launcher.poll() is None:
                kill(launcher)
        assert launcher.returncode == 0 and self.done, self.log.read_text()[-8000:]


def verify(corpus: Path, delivery_log: Path) -> dict[str, Any]:
    settings = [f"--set={name}={value}" for name, value in CONTENT.items()]
    paths = [str(corpus), "--delivery-log", str(delivery_log)]
    command = [sys.executable, "-m", "forebay", "verify", *paths, "--epoch=0", "--json", *settings]
    ran = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def steps_of(proof: dict[str, Any]) -> list[tuple[int, int, str]]:
    (epoch,) = proof["epochs"]
    return [(step["position"], step["rows"], step["hash"]) for step in epoch["steps"]]


@pytest.mark.timeout(1800)
def test_a_killed_run_sees_what_an_undisturbed_one_sees(tmp_path: Path, stress: bool) -> None:
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    # A launch costs seconds for importing torch alone, and nothing here depends on the interpreter.
    kills = 50 if stress else 5 if gil else 2
    steps = STEPS_PER_KILL * kills
    tokens = steps * GLOBAL_BATCH * SEQ_LEN + 5 * SEQ_LEN
    corpus = corpora.unique_corpus(tmp_path / "corpus", "parquet", tokens, shards=3)
    job = Job(corpus, tmp_path)

    undisturbed = tmp_path / "undisturbed"
    with forebay.Loader(corpus, batch_size=GLOBAL_BATCH, delivery_log=undisturbed, num_threads=1, **CONTENT) as loader:
        assert sum(1 for _ in loader) == steps
    expected = verify(corpus, undisturbed)
    assert expected["epochs"][0]["dropped"] == 5

    moments = random.Random(20)
    killed = launches = 0
    while killed < kills:
        assert not job.done, f"the epoch was over after {killed} kills"
        starting = launches % 5 == 4
        moment = moments.uniform(0, 5 if starting else 0.7)
        killed += job.run_and_kill(WORLD_SIZES[launches % len(WORLD_SIZES)], moment, starting=starting)
        launches += 1
    job.run(WORLD_SIZES[launches % len(WORLD_SIZES)])

    proof = verify(corpus, job.delivery_log)
    (epoch,) = proof["epochs"]
    sizes = {step["world_size"] for step in epoch["steps"]}
    assert len(sizes) > 1, f"world sizes {sizes}"
    assert epoch["spare"] > 0, "no kill lost work after a checkpoint"
    assert steps_of(proof) == steps_of(expected)
    assert (epoch["found"], epoch["dropped"]) == (expected["epochs"][0]["found"], 5)
