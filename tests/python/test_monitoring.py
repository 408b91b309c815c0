"""Tests of the numbers that `FOREBAY_METRICS` shows, and of `forebay top`."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import Server
from support import clean_environment, run_python, shown_by_a_browser

import forebay

PROGRAM = """
import sys
from forebay import Loader
loader = Loader(sys.argv[1], seq_len=8, batch_size=2, seed=1, dp_rank=1, dp_world_size=2)
batches = iter(loader)
for _ in range(5):
    next(batches)
print("taken", flush=True)
sys.stdin.readline()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a process whose loader has given five batches of two rows of eight tokens."""
    path: Path = tmp_path_factory.mktemp("metrics") / "ids.npy"
    np.save(path, np.arange(4000, dtype=np.uint16))
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path)],
        env=clean_environment(FOREBAY_METRICS=address), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    yield address
    process.communicate("\n", timeout=30)
    assert process.returncode == 0


def get(address: str, path: str) -> tuple[str, str]:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return answer.headers["content-type"], answer.read().decode()


def test_metrics_are_open_metrics_with_the_true_counts(address: str) -> None:
    kind, text = get(address, "/metrics")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    lines = text.splitlines()
    assert lines[-1] == "# EOF"
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['forebay_batches_total{rank="1"}']) == 5
    assert float(values['forebay_tokens_total{rank="1"}']) == 5 * 2 * 8
    assert float(values['forebay_wait_seconds_count{rank="1"}']) == 5
    buckets = [float(value) for name, value in values.items() if name.startswith("forebay_wait_seconds_bucket")]
    assert len(buckets) == 12 and buckets == sorted(buckets) and buckets[-1] == 5
    assert values['forebay_wait_seconds_bucket{le="+Inf",rank="1"}'] == "5"


def test_status_tells_the_progress(address: str) -> None:
    kind, text = get(address, "/status")
    (loader,) = json.loads(text)["loaders"]
    assert kind == "application/json"
    assert (loader["rank"], loader["world_size"], loader["step"], loader["steps"]) == (1, 2, 5, 125)
    assert loader["seconds_left"] > 0


def test_the_page_needs_nothing_else(address: str) -> None:
    kind, page = get(address, "/")
    assert kind.startswith("text/html")
    assert "http://" not in page and "https://" not in page and "src=" not in page and "<link" not in page


def test_a_browser_shows_the_numbers(address: str, tmp_path: Path) -> None:
    shown = shown_by_a_browser(f"http://{address}/", tmp_path / "profile")

    def text(name: str) -> str:
        found = re.search(rf'id="{name}"[^>]*>([^<]*)<', shown)
        assert found is not None, name
        return found[1]

    assert "ids.npy" in text("about") and "5 of 125" in text("steps") and text("progress") == "4.0 %"
    assert text("left") not in ("", "-") and text("verdict").startswith(("loader-bound", "trainer-bound"))
    ranks = re.search(r'<tbody id="ranks">(.*?)</tbody>', shown, re.DOTALL)
    assert ranks is not None
    cells = re.findall(r"<td>([^<]*)</td>", ranks[1])
    assert cells[:3] == ["1", "0", "5"] and len(cells) == 8


def test_the_page_of_monitoring_names_every_metric(address: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    named = set(re.findall(r"`(forebay_[a-z_]+)`", page))
    _, text = get(address, "/metrics")
    families = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    served = {name + ("_total" if kind == "counter" else "") for name, kind in families.items()}
    # A mixture alone has sources.
    assert named == served | {"forebay_source_ratio"}


def test_other_requests_are_refused(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(address, "/etc/passwd")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(urllib.request.Request(f"http://{address}/", method="POST", data=b"x"), timeout=10)
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as peer:
        peer.sendall(b"\xff" * 20_000)
    assert get(address, "/status")


def test_top_shows_the_ranks(address: str) -> None:
    command = [sys.executable, "-m", "forebay", "top", "--once", address, "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment(), check=True)
    assert "5/125" in done.stdout and "127.0.0.1:1: no answer" in done.stdout


def test_each_rank_of_a_node_has_its_port_and_a_taken_one_ends_no_run(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(4000, dtype=np.uint16))
    program = """
    import os, sys, urllib.request
    import forebay
    loader = forebay.Loader(sys.argv[1], seq_len=8)
    host, port = os.environ["FOREBAY_METRICS"].split(":")
    with urllib.request.urlopen(f"http://{host}:{int(port) + int(sys.argv[2])}/status") as answer:
        print(len(answer.read()) > 100, len(list(loader)) > 0)
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for number, name in enumerate(["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"], 1):
            env = clean_environment(FOREBAY_METRICS=f"127.0.0.1:{port}", **{name: str(number)})
            assert run_python(program, path, str(number), env=env).stdout.split() == ["True", "True"]
        # The first rank of this node finds its port taken.
        env = clean_environment(FOREBAY_METRICS=f"127.0.0.1:{port}")
        program = "import sys, forebay; print(len(list(forebay.Loader(sys.argv[1], seq_len=8))))"
        done = run_python(program, path, env=env)
        assert int(done.stdout) > 100 and "no metrics: cannot listen" in done.stderr


def test_the_page_of_a_service_shows_the_progress_of_its_streams(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(4_000_000, dtype=np.uint32))
    metrics = f"127.0.0.1:{free_port()}"
    with Server("--under", tmp_path, listen=f"unix:{tmp_path / 'socket'}", FOREBAY_METRICS=metrics) as server:
        loader = forebay.Loader(tmp_path / "ids.npy", seq_len=1000, batch_size=2, service=server.address)
        loader.seek(1000)
        batches = iter(loader)
        for _ in range(150):
            next(batches)
        (stream,) = json.loads(get(metrics, "/status")[1])["loaders"]
        # The window of the stream holds batches that the consumer has not taken.
        assert 650 <= stream["step"] < 1200 < stream["steps"] == 2000


def test_a_wrong_address_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(4000, dtype=np.uint16))
    program = "import sys, forebay; forebay.Loader(sys.argv[1], seq_len=8)"
    command = [sys.executable, "-c", program, str(tmp_path / "ids.npy")]
    env = clean_environment(FOREBAY_METRICS="nonsense")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode == 1
    assert "`FOREBAY_METRICS` must be an address such as `127.0.0.1:9440`, found `nonsense`" in done.stderr
