"""Tests that a service gives the same batches and states as a loader in this process.

A server may die, restart, or stop answering. Consumers continue at their positions.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server
from support import clean_environment, run_python

from forebay import ConfigError, Loader

pa = pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ipc = pytest.importorskip("pyarrow.ipc")

SHARDS = 3


def write_corpus(folder: Path, *, documents: int = 120, first: int = 3) -> Path:
    """A Parquet corpus with labels, a mask, and a number and a name for each document."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    token = first
    for shard in range(SHARDS):
        rows, names = [], []
        for number in range(documents):
            length = int(rng.integers(1, 40))
            rows.append(list(range(token, token + length)))
            names.append(None if number % 5 == 0 else f"document {number}")
            token += length
        table = pa.table(
            {
                "input_ids": pa.array(rows, pa.list_(pa.int32())),
                "labels": pa.array([[-100, *row[1:]] for row in rows], pa.list_(pa.int64())),
                "loss_mask": pa.array([[id % 3 > 0 for id in row] for row in rows], pa.list_(pa.bool_())),
                "weights": pa.array([[id / 8 for id in row] for row in rows], pa.list_(pa.float32())),
                "number": pa.array(
                    [None if name is None else len(row) for name, row in zip(names, rows, strict=True)], pa.int32()
                ),
                "name": pa.array(names, pa.string()),
            }
        )
        pq.write_table(table, folder / f"{shard}.parquet", row_group_size=50, compression="zstd")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def corpus(root: Path) -> Path:
    return write_corpus(root / "corpus")


@pytest.fixture(scope="module")
def arrow(root: Path) -> Path:
    """An uncompressed Arrow corpus, which is read at random."""
    path = root / "tokens.arrow"
    table = pa.table(
        {"input_ids": pa.array([list(range(i, i + 30)) for i in range(0, 3000, 30)], pa.list_(pa.uint16()))}
    )
    with ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


#: Settings for the corpus `long`: batches of 33 kB.
LONG: dict[str, Any] = {
    "seq_len": 1024, "batch_size": 8, "shuffle": "block", "seed": 9, "window_tokens": 200_000, "prefetch_batches": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def long(root: Path) -> Path:
    """A corpus of which most batches are not yet on their way when a server dies.

    The window of a stream and the buffers of a socket hold some 20 batches of `LONG`.
    """
    folder = root / "long"
    folder.mkdir()
    for shard in range(SHARDS):
        rows = [list(range(first, first + 2000)) for first in range(shard * 600_000, (shard + 1) * 600_000, 2000)]
        table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
        pq.write_table(table, folder / f"{shard}.parquet", row_group_size=50)
    return folder


@pytest.fixture(scope="module")
def server(root: Path, corpus: Path, arrow: Path) -> Iterator[Server]:
    with Server("--under", root, listen=f"unix:{root / 'socket'}") as server:
        yield server


def same(found: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, tuple):
        # torchtitan takes pairs.
        wanted, found = ({**pair[0], "second": pair[1]} for pair in (wanted, found))
    assert found.keys() == wanted.keys(), where
    for name, values in wanted.items():
        if isinstance(values, np.ndarray):
            assert found[name].dtype == values.dtype, f"{where} {name}"
            assert found[name].shape == values.shape, f"{where} {name}"
            assert np.array_equal(found[name], values), f"{where} {name}"
        else:
            assert found[name] == values, f"{where} {name}"


PLAIN: dict[str, Any] = {"seq_len": 16, "batch_size": 4}
#: Settings that change what a batch holds, one family a line.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"targets": "shifted", "input_dtype": "int32"},
    "block": {"shuffle": "block", "seed": 5, "window_tokens": 1000, "chunk_tokens": 100},
    "global": {"shuffle": "global", "seed": 2**64 - 1, "epochs": 2},
    "pad-remainder": {"remainder": "pad", "sample_ids": True, "pad_id": 70000},
    "wrap": {"remainder": "wrap", "batch_size": 7, "sample_ids": True},
    "short": {"remainder": "short", "batch_size": 7},
    "specials": {"bos_id": 1, "eos_id": 100_000, "boundaries": True},
    "pack": {"layout": "pack", "shuffle": True, "seed": 3, "document_mask": True},
    "pack-shifted": {"layout": "pack", "targets": "shifted", "cu_seqlens_width": 90, "max_docs_per_row": 4},
    "pad": {"layout": "pad", "pad_to_multiple": 4, "bucket": 16, "shuffle": True},
    "pad-dropped": {"layout": "pad", "overflow": "drop", "boundaries": True},
    "fields": {"fields": ["labels", "loss_mask", "weights"], "sample_ids": True},
    "fields-packed": {"fields": ["loss_mask", "weights"], "layout": "pack", "targets": "shifted"},
    "labels-shifted": {"fields": ["labels"], "layout": "pack", "targets": "shifted"},
    "documents": {"fields": ["number", "name"], "layout": "pack"},
    "documents-joined": {"fields": ["name", "number"], "boundaries": True, "cu_seqlens_width": 200},
    "holdout": {"holdout": 5, "split": "holdout"},
    "skips": {"skip": "3-9,20-21", "epochs": 2, "max_steps": 60},
    "phase": {"phase": "epoch", "epochs": 2},
    "hf": {"batch_format": "hf", "layout": "pad"},
    "titan": {"batch_format": "titan", "layout": "pack"},
    "threads": {"num_threads": 0, "prefetch_batches": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_batches_and_states_are_those_of_this_process(case: str, server: Server, corpus: Path) -> None:
    settings = {**PLAIN, **CASES[case]}
    here = Loader(corpus, **settings)
    served = Loader(corpus, **settings, service=server.address)
    assert (len(served), served.num_sequences, served.num_tokens, served.dropped_tokens) == (
        len(here), here.num_sequences, here.num_tokens, here.dropped_tokens,
    )  # fmt: skip
    assert served.state_dict() == here.state_dict()
    count = 0
    for wanted, found in zip(here, served, strict=True):
        same(found, wanted, f"batch {count}")
        assert served.state_dict() == here.state_dict(), f"batch {count}"
        count += 1
    assert count == len(here) > 0
    # Another pass is the next epoch.
    same(next(iter(served)), next(iter(here)), "next epoch")
    same(served.batch_at(1, epoch=0), here.batch_at(1, epoch=0), "batch_at")
    same(served.batch_at(0, epoch=1, rank=1, world_size=2), here.batch_at(0, epoch=1, rank=1, world_size=2), "batch_at")
    same(served.sequences_at(0, 2, 3), here.sequences_at(0, 2, 3), "sequences_at")


@pytest.mark.parametrize("case", ["plain", "block", "pack", "wrap"])
def test_a_state_continues_in_this_process_and_at_the_service(case: str, server: Server, corpus: Path) -> None:
    settings = {**PLAIN, **CASES[case]}
    for first, then in [({}, {"service": server.address}), ({"service": server.address}, {})]:
        loader = Loader(corpus, **settings, **first)
        batches = iter(loader)
        for _ in range(5):
            next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
        other = Loader(corpus, **{**settings, "batch_size": 2}, dp_rank=1, dp_world_size=2, **then)
        other.load_state_dict(state)
        reference = Loader(corpus, **{**settings, "batch_size": 2}, dp_rank=1, dp_world_size=2)
        reference.load_state_dict(state)
        for wanted, found in zip(reference, other, strict=True):
            same(found, wanted)
        other.seek(3)
        reference.seek(3)
        same(next(iter(other)), next(iter(reference)))


def test_ranks_share_a_corpus_and_get_their_own_rows(server: Server, arrow: Path) -> None:
    settings = {**PLAIN, "shuffle": True, "seed": 1, "dp_world_size": 3}
    for rank in range(3):
        here = Loader(arrow, **settings, dp_rank=rank)
        served = Loader(arrow, **settings, dp_rank=rank, service=server.address)
        for wanted, found in zip(here, served, strict=True):
            same(found, wanted)


def test_a_mixture_and_its_shares(server: Server, corpus: Path, arrow: Path) -> None:
    mixture = {
        "sources": [
            {"name": "a", "data": str(corpus), "weight": 3},
            {"name": "b", "data": [str(arrow)], "weight": 1, "epochs": 2},
        ],
        "stages": [{"at_sequences": 40, "weights": {"a": 1, "b": 1}}],
        "exhausted": "drop",
    }
    settings = {**PLAIN, "shuffle": True, "lanes": 4, "sample_ids": True}
    here, served = Loader(mixture=mixture, **settings), Loader(mixture=mixture, **settings, service=server.address)
    for step, (wanted, found) in enumerate(zip(here, served, strict=False)):
        same(found, wanted, f"step {step}")
        assert served.state_dict() == here.state_dict()
        if step == 40:
            break
    assert served.stats()["sources"] == here.stats()["sources"]


def test_consumers_that_share_a_pass(server: Server, corpus: Path) -> None:
    settings = {**PLAIN, "layout": "pack", "fields": ["name"]}
    here = Loader(corpus, **settings).split(2)
    served = Loader(corpus, **settings, service=server.address).split(2)
    for left, right, wanted, other in zip(*served, *here, strict=True):
        same(left, wanted)
        same(right, other)


def test_tensors_and_pinned_memory_of_torch(server: Server, corpus: Path) -> None:
    torch = pytest.importorskip("torch")
    from forebay.torch import DataLoader, TokenDataset

    dataset = TokenDataset(corpus, seq_len=16, layout="pack")
    here = DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True)
    served = DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True, service=[server.address])
    for epoch in range(2):
        here.set_epoch(epoch)
        served.set_epoch(epoch)
        for wanted, found in zip(here, served, strict=True):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


def test_the_variable_switches_a_program_over(server: Server, corpus: Path) -> None:
    program = """
        import sys
        from forebay import Loader
        loader = Loader(sys.argv[1], seq_len=16, batch_size=4, shuffle=True)
        print(loader.config["service"], [int(batch["input_ids"].sum()) for batch in loader])
    """
    here = run_python(program, corpus).stdout
    served = run_python(program, corpus, env=clean_environment(FOREBAY_SERVICE=server.address)).stdout
    assert served.split(" ", 1)[1] == here.split(" ", 1)[1]
    assert server.address in served.split(" ", 1)[0] and server.address not in here


def test_a_killed_server_costs_a_reconnect(
    root: Path, long: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = list(Loader(long, **LONG, delivery_log=tmp_path / "here"))
    caplog.set_level("WARNING", "forebay")
    with Server("--under", root, listen=f"unix:{tmp_path / 'socket'}") as server:
        found = []
        loader = Loader(long, **LONG, service=server.address, delivery_log=tmp_path / "served")
        for step, batch in enumerate(loader):
            found.append(batch)
            if step % 60 == 20:
                server.kill()
                server.start()
    assert len(found) == len(wanted) > 100
    for left, right in zip(found, wanted, strict=True):
        same(left, right)
    hashes = [
        [
            json.loads(line)["hash"]
            for path in sorted((tmp_path / name).iterdir())
            for line in path.read_text().splitlines()
            if '"hash"' in line
        ]
        for name in ("here", "served")
    ]
    assert hashes[0] == hashes[1]
    assert hashes[0]
    assert "is gone" in caplog.text and "a service answers again" in caplog.text


def test_the_next_address_takes_over(root: Path, long: Path, tmp_path: Path) -> None:
    first, second = (f"unix:{tmp_path / name}" for name in ("first", "second"))
    with Server("--under", root, listen=first) as one, Server("--under", root, listen=second):
        loader = Loader(long, **LONG, service=[first, second])
        for step, (found, wanted) in enumerate(zip(loader, Loader(long, **LONG), strict=True)):
            same(found, wanted)
            if step == 20:
                one.stop()
    with pytest.raises(OSError, match=r"no service answered at .*first.*second.*within 1 s"):
        next(iter(Loader(long, **LONG, service=[first, second], service_timeout=1)))


def test_a_server_that_stops_ends_in_order(root: Path, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Server("--under", root, listen=f"unix:{path}") as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        batches = iter(Loader(corpus, **PLAIN, service=server.address))
        next(batches)
        assert server.stop() == 0
        assert not path.exists()


def test_a_stopped_consumer_holds_nobody_up(server: Server, corpus: Path) -> None:
    stopped = iter(Loader(corpus, **PLAIN, service=server.address))
    next(stopped)
    wanted = Loader(corpus, **PLAIN)
    for left, right in zip(Loader(corpus, **PLAIN, service=server.address), wanted, strict=True):
        same(left, right)
    assert next(stopped)["input_ids"].shape == (4, 16)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seq_len": 32}, ["`seq_len` is 16 at the service, the consumer has 32"]),
        ({"seed": 4, "eos_id": 2}, ["`seed` is 3 at the service", "`eos_id` is 1 at the service, the consumer has 2"]),
    ],
)
def test_other_content_is_refused_with_both_values(
    given: dict[str, Any], words: list[str], root: Path, corpus: Path, tmp_path: Path
) -> None:
    fixed = {"seq_len": 16, "seed": 3, "eos_id": 1}
    sets = [part for name, value in fixed.items() for part in ("--set", f"{name}={value}")]
    with Server(corpus, *sets, listen=f"unix:{tmp_path / 'socket'}") as server:
        with pytest.raises(ConfigError) as error:
            Loader(corpus, **{**fixed, **given}, service=server.address)
        assert all(word in str(error.value) for word in words), str(error.value)
        for other in (root, "/etc", f"{corpus}/../corpus"):
            with pytest.raises(ConfigError, match=rf"`data` is .*{corpus.name} at the service, the consumer has"):
                Loader(other, **fixed, service=server.address)
        same(next(iter(Loader(corpus, **fixed, service=server.address))), next(iter(Loader(corpus, **fixed))))


def test_another_corpus_after_a_restart_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    with Server(corpus, listen=f"unix:{tmp_path / 'socket'}") as server:
        batches = iter(Loader(corpus, **PLAIN, service=server.address, prefetch_batches=1))
        next(batches)
        server.kill()
        for path in corpus.iterdir():
            path.unlink()
        corpus.rmdir()
        write_corpus(corpus, first=9000, documents=121)
        server.start()
        with pytest.raises(Exception, match=r"has another corpus: its fingerprint is .* there and was .* before"):
            for _ in batches:
                pass


def test_a_damaged_shard_fails_at_its_batch(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    path = corpus / "1.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    size = column.total_compressed_size
    content[start + size * 2 // 3 : start + size] = b"\xff" * (size - size * 2 // 3)
    path.write_bytes(content)
    here = Loader(corpus, **PLAIN)
    taken, fault = 0, None
    try:
        for _ in here:
            taken += 1
    except Exception as error:
        fault = error
    assert fault is not None
    with Server(corpus, listen=f"unix:{tmp_path / 'socket'}") as server:
        served = Loader(corpus, **PLAIN, service=server.address)
        found = 0
        with pytest.raises(type(fault)) as error:
            for _ in served:
                found += 1
        assert (found, str(error.value)) == (taken, str(fault))


def test_a_forked_child_gets_the_usual_error(server: Server, corpus: Path) -> None:
    program = """
        import os, sys
        from forebay import ClosedError, Loader
        batches = iter(Loader(sys.argv[1], seq_len=16, batch_size=4, service=sys.argv[2]))
        next(batches)
        if os.fork() == 0:
            try:
                next(batches)
            except ClosedError as error:
                print("forked child" in str(error), flush=True)
            os._exit(0)
        os.wait()
        print(len(list(batches)))
    """
    lines = run_python(program, corpus, server.address).stdout.split()
    assert lines[0] == "True" and int(lines[1]) > 100


def test_flight_of_pyarrow_reads_the_same_batches(server: Server, corpus: Path) -> None:
    flight = pytest.importorskip("pyarrow.flight")
    # gRPC would send the path as the authority, which is no host.
    options = [("grpc.default_authority", "localhost")]
    client = flight.FlightClient(server.address.replace("unix:", "grpc+unix://"), generic_options=options)
    request = {"version": 1, "settings": {"data": str(corpus), "seq_len": "16", "shuffle": "block", "seed": "5"}}
    info = client.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(request)))
    ticket = json.loads(info.endpoints[0].ticket.ticket)
    ticket["settings"] = {"batch_size": "4"}
    reader = client.do_get(flight.Ticket(json.dumps(ticket)))
    loader = Loader(corpus, **PLAIN, shuffle="block", seed=5, sample_ids=True)
    count = 0
    for batch in loader:
        chunk = reader.read_chunk()
        data = chunk.data
        ids = data.column("input_ids").flatten().to_numpy().reshape(data.num_rows, -1)
        is_target = data.column("is_target").flatten().to_numpy(zero_copy_only=False).reshape(data.num_rows, -1)
        assert np.array_equal(ids, batch["input_ids"])
        assert np.array_equal(np.where(is_target, ids.astype(np.int64), -100), batch["labels"])
        assert data.column("sample_index").to_pylist() == batch["sample_index"].tolist()
        count += 1
    assert count == len(loader)
    with pytest.raises(StopIteration):
        reader.read_chunk()
    # A damaged ticket is an error, and the server goes on.
    for bad in (b"", b"{}", b'{"version": 2, "handle": "a"}', b"\xff" * 100):
        with pytest.raises(pa.ArrowInvalid):
            client.do_get(flight.Ticket(bad)).read_chunk()
    assert json.loads(next(iter(client.do_action("health"))).body.to_pybytes())["ready"] is True


ABSURD = [
    "0",
    "-1",
    "1",
    "2147483647",
    "4294967296",
    "18446744073709551615",
    "1e9",
    "",
    "nan",
    "x" * 70_000,
    "\0",
    "0-9" * 99,
]


def mutated(value: Any, rng: random.Random, names: list[str]) -> Any:
    """A ticket or a request with one thing changed."""
    value = json.loads(json.dumps(value))
    settings = value.setdefault("settings", {})
    match rng.randrange(4):
        case 0:
            settings[rng.choice(names)] = rng.choice(ABSURD)
        case 1:
            value[rng.choice(list(value))] = rng.choice([*ABSURD, 0, -1, 2**63, 2**64, [], {}, None, [[]] * 99])
        case 2:
            settings[rng.choice([*names, "data", "delivery_log", "index_dir"])] = rng.choice(
                [1, None, [], "/etc/passwd"]
            )
        case _:
            value.pop(rng.choice(list(value)))
    return value


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.hostile
def test_no_request_ends_the_server_or_takes_its_memory(root: Path, corpus: Path, tmp_path: Path, stress: bool) -> None:
    flight = pytest.importorskip("pyarrow.flight")
    with Server("--under", root, listen=f"unix:{tmp_path / 'socket'}") as server:
        options = [("grpc.default_authority", "localhost")]
        client = flight.FlightClient(server.address.replace("unix:", "grpc+unix://"), generic_options=options)
        request = {"version": 1, "settings": {"data": str(corpus), "seq_len": "16"}, "shards": []}
        info = client.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(request)))
        ticket = json.loads(info.endpoints[0].ticket.ticket)
        of_ticket = [
            "batch_size",
            "dp_rank",
            "dp_world_size",
            "prefetch_batches",
            "max_steps",
            "skip",
            "pad_id",
            "remainder",
        ]
        of_request = ["seq_len", "seed", "chunk_tokens", "lanes", "bos_id", "layout", "pack_align", "bucket", "holdout"]
        rng = random.Random(8)
        outcomes: Counter[str] = Counter()
        calls = flight.FlightCallOptions(timeout=20)
        for _ in range(20_000 if stress else 400):
            is_ticket = rng.random() < 0.5
            asked = json.dumps(mutated(ticket if is_ticket else request, rng, of_ticket if is_ticket else of_request))
            sent = asked.encode()
            if rng.random() < 0.2:
                at = rng.randrange(len(sent))
                sent = sent[:at] + rng.randbytes(3) + sent[at + rng.randrange(4) :]
            try:
                if is_ticket:
                    client.do_get(flight.Ticket(sent), calls).read_chunk()
                else:
                    client.get_flight_info(flight.FlightDescriptor.for_command(sent), calls)
                outcomes["answered"] += 1
            except StopIteration:
                outcomes["empty"] += 1
            except (pa.ArrowException, OSError) as error:
                outcomes["refused"] += 1
                assert "defect" not in str(error), (sent, error)
                assert "timeout" not in str(error).lower(), (sent, error)
        assert outcomes["refused"] > 50 and outcomes["answered"] > 50, outcomes
        assert server.process.poll() is None
        assert resident_mb(server.process.pid) < 400
        assert len(list(Loader(corpus, **PLAIN, service=server.address))) == len(Loader(corpus, **PLAIN))


def test_the_program_of_the_page_reads_batches(server: Server, corpus: Path) -> None:
    pytest.importorskip("pyarrow.flight")
    page = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    program = program.replace("unix:///run/forebay.sock", server.address.replace("unix:", "unix://"))
    program = program.replace("/data/corpus", str(corpus)).replace('"2048"', '"16"')
    shown: dict[str, Any] = {}
    exec(compile(program, "service.md", "exec"), shown)
    rank = Loader(corpus, seq_len=16, seed=7, batch_size=8, dp_rank=0, dp_world_size=2)
    *_, last = rank
    assert np.array_equal(shown["ids"].flatten().to_numpy().reshape(8, 16), last["input_ids"])


def test_noise_at_the_socket_does_not_end_the_server(server: Server, corpus: Path) -> None:
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(server.address.removeprefix("unix:"))
            peer.sendall(noise)
    assert len(list(Loader(corpus, **PLAIN, service=server.address))) == len(Loader(corpus, **PLAIN))


@pytest.mark.parametrize(("served", "asked"), [("corpus/", "corpus"), ("corpus", "corpus/")])
def test_a_slash_at_the_end_of_a_folder_changes_nothing(
    served: str, asked: str, root: Path, corpus: Path, tmp_path: Path
) -> None:
    with Server(f"{root}/{served}", listen=f"unix:{tmp_path / 'socket'}") as server:
        loader = Loader(f"{root}/{asked}", **PLAIN, service=server.address)
        same(next(iter(loader)), next(iter(Loader(corpus, **PLAIN))))


def test_a_port_of_this_machine_serves_too(root: Path, corpus: Path) -> None:
    with Server("--under", root, listen="grpc://127.0.0.1:0") as server:
        for left, right in zip(Loader(corpus, **PLAIN, service=server.address), Loader(corpus, **PLAIN), strict=True):
            same(left, right)


def test_closing_does_not_wait_for_a_silent_server(root: Path, corpus: Path, tmp_path: Path) -> None:
    with Server("--under", root, listen=f"unix:{tmp_path / 'socket'}") as server:
        loader = Loader(corpus, **PLAIN, service=server.address)
        batches = iter(loader)
        next(batches)
        server.pause()
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < 5


def computing_threads() -> int:
    """Number of threads of this process that compute batches in place of a server."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("forebay-stream")


def test_this_process_computes_while_no_server_answers(root: Path, long: Path, tmp_path: Path) -> None:
    wanted = list(Loader(long, **LONG))
    fallback: dict[str, Any] = {"service_fallback": True, "index_dir": tmp_path / "index"}
    found, computing = [], {}
    with Server("--under", root, listen=f"unix:{tmp_path / 'socket'}") as server:
        loader = Loader(long, **LONG, **fallback, service=server.address)
        for step, batch in enumerate(loader):
            found.append(batch)
            computing[step] = computing_threads()
            if step == 20:
                server.kill()
            if step == 100:
                server.start()
                # The consumer tries the server again after 2 s.
                time.sleep(2.2)
    assert len(found) == len(wanted) > 100
    for step, (left, right) in enumerate(zip(found, wanted, strict=True)):
        same(left, right, f"batch {step}")
    assert [computing[step] for step in (20, 80, 150)] == [0, 1, 0]


@pytest.mark.parametrize("case", ["plain", "pack-shifted", "fields", "documents", "wrap", "skips"])
def test_no_server_is_needed_with_a_fallback(case: str, corpus: Path, tmp_path: Path) -> None:
    settings = {**PLAIN, **CASES[case]}
    fallback: dict[str, Any] = {"service_fallback": True, "index_dir": tmp_path / "index"}
    here = Loader(corpus, **settings)
    alone = Loader(corpus, **settings, **fallback, service=f"unix:{tmp_path / 'socket'}")
    assert alone.state_dict() == here.state_dict()
    for wanted, found in zip(here, alone, strict=True):
        same(found, wanted)
    same(alone.batch_at(1, epoch=0), here.batch_at(1, epoch=0), "batch_at")


def test_a_fallback_needs_the_same_local_corpus_and_its_index(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    address = f"unix:{tmp_path / 'socket'}"
    for given, words in [
        ({}, "`service_fallback` needs the saved index of the data: set `index_dir` or `cache_dir`"),
        ({"data": "s3://bucket/corpus", "index_dir": tmp_path / "index"}, "`service_fallback` needs local data"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Loader(**{"data": corpus, **PLAIN, "service": address, "service_fallback": True, **given})
    with Server(corpus, listen=address) as server:
        loader = Loader(
            corpus, **PLAIN, service=address, service_fallback=True, index_dir=tmp_path / "index", prefetch_batches=1
        )
        batches = iter(loader)
        next(batches)
        shutil.rmtree(corpus)
        write_corpus(corpus, first=9000, documents=121)
        server.kill()
        with pytest.raises(Exception, match=r"this process has another corpus: its fingerprint is .* before"):
            list(batches)


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("is_named", [False, True])
def test_a_socket_accepts_the_users_that_the_server_names(is_named: bool, corpus: Path) -> None:
    program = """
        import os, socket, sys
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(30)
            peer.connect(sys.argv[1])
            try:
                peer.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                print(len(peer.recv(9)))
            except ConnectionError:
                print(0)
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "socket"
        users = ["--user", str(NOBODY)] if is_named else []
        with Server(corpus, *users, listen=f"unix:{path}") as server:
            assert stat.S_IMODE(path.stat().st_mode) == (0o666 if is_named else 0o600)
            # Without this, the file's mode would refuse.
            path.chmod(0o666)
            assert run_python(program, path).stdout.split() == (["9"] if is_named else ["0"])
            # The own user gets batches.
            assert len(list(Loader(corpus, **PLAIN, service=server.address))) > 100


def certificate(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Certificate and key of a server at `localhost`, and the certificate of its authority.

    Makes them by the commands of the page, with other names.
    """
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder.mkdir()
    page = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    commands = next(block for block in page.split("```sh\n") if block.startswith("openssl")).split("```")[0]
    commands = commands.replace("node-7", "localhost").replace("training CA", name)
    subprocess.run(["bash", "-euc", commands], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem", folder / "ca.pem"


def test_other_machines_need_tls_and_the_token(
    root: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key, ca = certificate(tmp_path / "tls", "one")
    _, _, other_ca = certificate(tmp_path / "other", "other")
    (tmp_path / "token").write_text("a-token-that-nobody-guesses\n")
    files = ["--tls-cert", cert, "--tls-key", key]
    secret = {"FOREBAY_SERVICE_TOKEN": f"file:{tmp_path / 'token'}"}
    for listen, given, words in [
        ("grpc://0.0.0.0:0", secret, "it needs `grpc\\+tls://` and a token"),
        ("grpc+tls://0.0.0.0:0", {}, "it needs `grpc\\+tls://` and a token"),
        ("grpc+tls://0.0.0.0:0", {"FOREBAY_SERVICE_TOKEN": "short"}, "a token must have 16 to 4096 printable"),
    ]:
        with pytest.raises(AssertionError, match=words):
            Server("--under", root, *files, listen=listen, **given)
    with Server("--under", root, *files, listen="grpc+tls://0.0.0.0:0", **secret) as server:
        place = "localhost:" + server.address.rpartition(":")[2]

        def open_with(token: str, address: str) -> Loader:
            monkeypatch.setenv("FOREBAY_SERVICE_TOKEN", token)
            return Loader(corpus, **PLAIN, service=address, service_timeout=2)

        secure = f"grpc+tls://{place}?ca={ca}"
        for token in ("a-token-that-nobody-guesses", secret["FOREBAY_SERVICE_TOKEN"]):
            for left, right in zip(open_with(token, secure), Loader(corpus, **PLAIN), strict=True):
                same(left, right)
        for token in ("", "a-token-that-somebody-guessed"):
            with pytest.raises(OSError, match="the token is missing or wrong: set `FOREBAY_SERVICE_TOKEN`") as error:
                open_with(token, secure)
            assert "a-token" not in str(error.value)
        for address in (f"grpc+tls://{place}?ca={other_ca}", f"grpc://{place}"):
            with pytest.raises(OSError, match="no service answered at"):
                open_with("a-token-that-nobody-guesses", address)
        with pytest.raises(ConfigError, match="needs the certificates to trust"):
            open_with("a-token-that-nobody-guesses", f"grpc+tls://{place}")
