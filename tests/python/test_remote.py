"""Protects: a corpus in an object store gives the batches of its local copy.

That holds whatever the network does.

moto serves the objects. A proxy before it counts requests and makes faults.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("moto", reason="moto serves the objects")
pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora
import object_stores
from corpora import Cell
from object_stores import S3
from support import clean_environment

import forebay

CELLS = {
    "parquet": Cell("pyarrow", "parquet"),
    "parquet zstd": Cell("pyarrow", "parquet", codec="zstd"),
    "arrow file": Cell("pyarrow", "arrow file"),
    "arrow stream": Cell("pyarrow", "arrow stream"),
    "arrow lz4": Cell("pyarrow", "arrow file", codec="lz4"),
    "npy": Cell("numpy", "npy", dtype="u16", options={"single": True, "document_end_id": 7}),
    "raw": Cell("numpy", "raw", dtype="u16", options={"single": True, "document_end_id": 7}),
    "megatron": Cell("megatron", "megatron", dtype="i32", options={"single": True, "sentences": 9}),
    "datatrove": Cell("datatrove", "datatrove", dtype="u16", options={"single": True}),
}


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch, object_stores.s3() as store:
        for name, value in object_stores.CREDENTIALS.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(autouse=True)
def calm(store: S3) -> Iterator[None]:
    """Ends the faults of a test."""
    yield
    store.proxy.fault, store.proxy.latency = None, 0.0


def large(kind: str, folder: Path) -> Path:
    """A corpus of some megabytes."""
    return corpora.unique_corpus(folder, CELLS[kind].container, 2_000_000, shards=4)


def written(kind: str, folder: Path) -> Path:
    cell = CELLS[kind]
    if not corpora.available(cell.writer):
        pytest.skip(f"{cell.writer} is not installed")
    return corpora.write(cell, folder, corpora.documents_of(cell, tokens_per_shard=3000))


def epoch(data: Any, **settings: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The batches of an epoch, and the state in its middle."""
    chosen = {"seq_len": 64, "batch_size": 4, "shuffle": True, "seed": 3, "lanes": 2, **settings}
    with forebay.Loader(data, **chosen) as loader:
        batches, state = [], {}
        for number, batch in enumerate(loader):
            batches.append(np.array(batch["input_ids"]))
            if number == 2:
                state = loader.state_dict()
        return batches, state


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(left, right)


def of_shards(store: S3) -> list[object_stores.Request]:
    """The listings, without the questions whether a folder above is a table with a log."""
    logs = ("_delta_log", "hoodie", "metadata")
    return [request for request in store.proxy.listings() if not any(log in request.path for log in logs)]


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("layout", ["concat", "pack"])
def test_batches_and_states_are_those_of_the_local_copy(store: S3, tmp_path: Path, kind: str, layout: str) -> None:
    folder = written(kind, tmp_path / "corpus")
    url = store.upload(folder, f"{kind.replace(' ', '-')}/{layout}")
    settings: dict[str, Any] = {"layout": layout, **CELLS[kind].reading}
    # Rows of these files are read in place. In a store, a way to shuffle has to be named.
    if kind in ("arrow file", "arrow stream", "npy", "raw", "megatron", "datatrove"):
        settings["shuffle"] = "global"
    batches, state = epoch(folder, **settings)
    found, remote = epoch(url, **settings, **store.settings)
    same(found, batches)
    assert remote == state


def test_every_way_to_name_shards_gives_the_same_corpus(store: S3, tmp_path: Path) -> None:
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "names/deep/corpus")
    names = sorted(path.name for path in folder.iterdir())
    expected = epoch(str(folder))
    for data in (url, f"{url}/", f"{url}/*.parquet", [f"{url}/{name}" for name in names]):
        found = epoch(data, **store.settings)
        same(found[0], expected[0])
        assert found[1] == expected[1]
    deep = epoch(f"s3://{object_stores.BUCKET}/names/**/*.parquet", **store.settings)
    same(deep[0], expected[0])


def test_a_mixture_of_local_and_remote_sources_is_that_of_local_sources(store: S3, tmp_path: Path) -> None:
    first = written("parquet", tmp_path / "first")
    second = written("parquet zstd", tmp_path / "second")
    url = store.upload(second, "mixture/second")

    def mixture(data: str) -> dict[str, Any]:
        sources = [{"name": "a", "data": str(first), "weight": 1}, {"name": "b", "data": data, "weight": 2}]
        return {"mixture": {"sources": sources}, "max_steps": 20}

    expected = epoch(None, **mixture(str(second)))
    found = epoch(None, **mixture(url), **store.settings)
    same(found[0], expected[0])


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "raw"])
def test_each_part_is_fetched_once_into_the_cache(store: S3, tmp_path: Path, kind: str) -> None:
    folder = written(kind, tmp_path / "corpus")
    url = store.upload(folder, f"once/{kind.replace(' ', '-')}")
    settings = {"cache_dir": str(tmp_path / "cache"), "num_threads": 4, **store.settings}
    if CELLS[kind].bin_dtype is not None:
        settings["bin_dtype"] = CELLS[kind].bin_dtype
    store.proxy.clear()
    first = epoch(url, **settings)[0]
    asked = store.proxy.gets()
    assert len({(request.path, request.range) for request in asked}) == len(asked) > 0
    assert len(of_shards(store)) == 1
    store.proxy.clear()
    same(epoch(url, **settings)[0], first)
    assert store.proxy.gets() == [], "the second epoch reads the cache alone"


def test_a_replaced_object_is_refused_by_name(store: S3, tmp_path: Path) -> None:
    # Opening reads little of these files, so that most is read after the change.
    folder = large("arrow file", tmp_path / "corpus")
    url = store.upload(folder, "replaced")
    name = min(path.name for path in folder.iterdir())
    body = (folder / name).read_bytes()
    loader = forebay.Loader(f"{url}/*.arrow", seq_len=64, batch_size=64, **store.settings)
    # The same size and other bytes, so that only the version tells.
    middle = len(body) // 3
    store.put(f"replaced/{name}", body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])
    with pytest.raises(forebay.ReadError, match="replaced") as caught, loader:
        for _ in loader:
            pass
    assert name in str(caught.value)


def test_a_saved_index_opens_only_objects_that_changed(store: S3, tmp_path: Path) -> None:
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "indexed")
    settings = {"index_dir": str(tmp_path / "index"), **store.settings}
    before = epoch(url, **settings)[0]
    store.proxy.clear()
    with forebay.Loader(url, seq_len=64, **settings):
        pass
    assert store.proxy.gets() == [], "no shard is opened"
    # A new object of the same content has the same version in S3, whose ETag is a digest.
    name = min(path.name for path in folder.iterdir())
    other = corpora.write(CELLS["parquet"], tmp_path / "other", corpora.documents_of(CELLS["parquet"])[::-1])
    store.put(f"indexed/{name}", min(other.iterdir()).read_bytes())
    store.proxy.clear()
    after = epoch(url, **settings)[0]
    assert {request.path.rsplit("/", 1)[1] for request in store.proxy.gets()} >= {name}
    assert not np.array_equal(np.concatenate([b.ravel() for b in before]), np.concatenate([b.ravel() for b in after]))


FAULTS = {
    "500": object_stores.at_random(1, 0.05, object_stores.status(500)),
    "503 with Retry-After": object_stores.at_random(2, 0.05, object_stores.status(503, "0")),
    "429": object_stores.at_random(3, 0.05, object_stores.status(429, "0")),
    "truncated": object_stores.at_random(4, 0.05, object_stores.truncated),
    "shortened": object_stores.at_random(5, 0.05, object_stores.shortened),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_passing_faults_change_no_batch(store: S3, tmp_path: Path, fault: str, cached: bool) -> None:
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "faults")
    expected = epoch(folder)[0]
    store.proxy.fault = FAULTS[fault]
    for attempt in range(3):
        settings = {"cache_dir": str(tmp_path / f"cache-{attempt}")} if cached else {}
        same(epoch(url, num_threads=4, **settings, **store.settings)[0], expected)


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (object_stores.status(403), forebay.ReadError, "check the credentials"),
        (object_stores.status(404), forebay.NotFoundError, "check the names"),
        (object_stores.status(503), forebay.ReadError, "503"),
        (object_stores.shortened, forebay.ReadError, "read another copy"),
    ],
    ids=["403", "404", "503", "wrong length"],
)
def test_lasting_faults_name_the_url_and_the_remedy(
    store: S3, tmp_path: Path, fault: object_stores.Fault, error: type[Exception], text: str
) -> None:
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "lasting")
    file = f"{url}/{min(path.name for path in folder.iterdir())}"

    def on_reads(request: object_stores.Request, answer: object_stores.Answer) -> object_stores.Answer:
        is_read = request.method == "GET" and not request.is_listing
        return fault(request, answer) if is_read else answer

    store.proxy.fault = on_reads
    with pytest.raises(error, match=text) as caught:
        epoch(file, storage_timeout=3, **store.settings)
    assert file in str(caught.value)
    assert "testing" not in str(caught.value), "no credentials are shown"


def test_retry_after_is_honoured(store: S3, tmp_path: Path) -> None:
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "retry-after")
    asked: list[float] = []

    def busy_once(request: object_stores.Request, answer: object_stores.Answer) -> object_stores.Answer:
        if request.method != "GET" or request.is_listing:
            return answer
        asked.append(request.began)
        return object_stores.status(503, "2")(request, answer) if len(asked) == 1 else answer

    store.proxy.fault = busy_once
    epoch(f"{url}/{min(path.name for path in folder.iterdir())}", num_threads=1, **store.settings)
    assert asked[1] - asked[0] >= 2


def test_rows_in_any_order_are_refused_if_the_cache_is_too_small(store: S3, tmp_path: Path) -> None:
    folder = written("arrow file", tmp_path / "corpus")
    url = store.upload(folder, "scattered")
    size = sum(path.stat().st_size for path in folder.iterdir())
    cache = {"cache_dir": str(tmp_path / "cache")}
    for settings in ({}, {**cache, "cache_bytes": size - 1}):
        with pytest.raises(forebay.ConfigError, match="block") as caught:
            forebay.Loader(url, shuffle=True, seq_len=64, **settings, **store.settings)
        assert str(size) in str(caught.value)
    for settings in ({**cache, "cache_bytes": size}, {"shuffle": "block"}, {"shuffle": "global"}):
        with forebay.Loader(url, seq_len=64, **{"shuffle": True, **settings}, **store.settings):
            pass


def test_a_full_cache_costs_requests_and_no_batch(store: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = large("parquet", tmp_path / "corpus")
    url = store.upload(folder, "full")
    cache = tmp_path / "cache"
    settings = {"cache_dir": str(cache), "index_dir": str(tmp_path / "index"), "cache_bytes": 1_000_000}
    same(epoch(url, **settings, **store.settings)[0], epoch(folder)[0])
    assert "keeps no more objects" in caplog.text
    kept = sum(path.stat().st_blocks * 512 for path in (cache / "objects").glob("*.bytes"))
    assert kept <= 1_000_000


def test_stats_count_the_requests_and_their_bytes(store: S3, tmp_path: Path) -> None:
    folder = large("parquet", tmp_path / "corpus")
    url = store.upload(folder, "counted")
    counts = []
    store.proxy.clear()
    with forebay.Loader(url, seq_len=64, batch_size=16, **store.settings) as loader:
        for _ in loader:
            counts.append({name: loader.stats()[name] for name in ("storage_requests", "storage_bytes")})
        # Other tests of this process asked stores, too.
        first, last = counts[0], counts[-1]
        with forebay.Loader(url, seq_len=64, batch_size=16, **store.settings) as other:
            sum(1 for _ in other)
            asked = len(store.proxy.requests)
            found = other.stats()["storage_requests"] - last["storage_requests"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert first["storage_requests"] > 0 and 0 < found <= asked
    assert other.stats()["storage_bytes"] - last["storage_bytes"] >= size / 2


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http://", "http:// x", "nonsense"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str, store: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "the endpoint must be a URL such as"
    with pytest.raises(forebay.ForebayError, match=words) as caught:
        forebay.Loader("s3://bucket/t/", seq_len=8, storage_endpoint=endpoint)
    assert not isinstance(caught.value, forebay.InternalError)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(forebay.ForebayError, match=words):
        forebay.Loader("s3://bucket/t/", seq_len=8)


def test_a_public_bucket_is_read_without_credentials(store: S3, tmp_path: Path, monkeypatch: Any) -> None:
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "public")
    for name in object_stores.CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    store.proxy.clear()
    found = epoch(url, storage_anonymous=True, storage_region="us-east-1", **store.settings)
    same(found[0], epoch(folder)[0])
    assert not any("authorization" in {name.lower() for name in request.headers} for request in store.proxy.requests)


def test_renewed_credentials_in_the_file_are_used(store: S3, tmp_path: Path, monkeypatch: Any) -> None:
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "profile")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"

    def write(key: str) -> None:
        file.write_text(f"[other]\naws_access_key_id = no\n[me]\naws_access_key_id={key}\naws_secret_access_key=s\n")

    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "me")
    write("OLDKEY")
    store.proxy.clear()
    files = sorted(path.name for path in folder.iterdir())
    with forebay.Loader(
        f"{url}/*.parquet",
        seq_len=16,
        batch_size=1,
        prefetch_batches=1,
        num_threads=1,
        storage_requests=9,
        **store.settings,
    ) as loader:
        batches = iter(loader)
        next(batches)
        write("NEWKEY")
        for _ in batches:
            pass
    signed = [request.headers.get("authorization", "") for request in store.proxy.gets()]
    assert files and any("OLDKEY" in text for text in signed)


def test_the_first_batch_from_a_saved_index_needs_four_round_trips(store: S3, tmp_path: Path) -> None:
    folder = large("parquet", tmp_path / "corpus")
    url = store.upload(folder, "first")
    settings = {"index_dir": str(tmp_path / "index"), "seq_len": 64, "batch_size": 1, "num_threads": 1}
    with forebay.Loader(f"{url}/*.parquet", **settings, **store.settings):
        pass
    store.proxy.latency = 0.05
    store.proxy.clear()
    with forebay.Loader(f"{url}/*.parquet", cache_dir=str(tmp_path / "cache"), **settings, **store.settings) as loader:
        next(iter(loader))
    requests = sorted(store.proxy.requests, key=lambda request: request.began)
    trips, free = 0, 0.0
    for request in requests:
        if request.began >= free:
            trips, free = trips + 1, request.began + 0.05
    assert trips <= 4, [(request.method, request.path, request.range) for request in requests]


COMMANDS = {
    "check": ["check", "{url}"],
    "index": ["index", "{url}", "--index-dir", "{tmp}/index"],
    "plan": ["plan", "{url}", "--seq-len", "64", "--shuffle"],
    "verify": ["verify", "{url}", "--seq-len", "64", "--shuffle"],
    "rewrite": ["rewrite", "{url}", "{tmp}/rewritten"],
}


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "megatron"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_read_urls(store: S3, tmp_path: Path, kind: str, command: str) -> None:
    folder = written(kind, tmp_path / "corpus")
    url = store.upload(folder, f"commands/{kind.replace(' ', '-')}")
    arguments = [part.format(url=url, tmp=tmp_path) for part in COMMANDS[command]]
    variables = {**clean_environment(), **object_stores.CREDENTIALS, "FOREBAY_STORAGE_ENDPOINT": store.proxy.url}
    if command in ("plan", "verify"):
        variables["FOREBAY_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "forebay", *arguments], env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if command == "plan":
        assert "request" in done.stdout
    if command == "rewrite":
        same(epoch(tmp_path / "rewritten", shuffle="global")[0], epoch(folder, shuffle="global")[0])


WORKER = """
import sys, forebay
rank, url, cache, endpoint = int(sys.argv[1]), *sys.argv[2:5]
with forebay.Loader(url, seq_len=64, batch_size=1, shuffle=True, seed=3, lanes=8, dp_rank=rank, dp_world_size=8,
                    cache_dir=cache, storage_endpoint=endpoint) as loader:
    print(sum(int(batch["input_ids"].sum()) for batch in loader))
"""


def ranks(store: S3, url: str, cache: Path, count: int = 8) -> list[subprocess.Popen[str]]:
    variables = {**clean_environment(), **object_stores.CREDENTIALS}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), url, str(cache), store.proxy.url],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def test_eight_processes_fetch_each_part_once_and_list_once(store: S3, tmp_path: Path) -> None:
    folder = large("parquet", tmp_path / "corpus")
    url = store.upload(folder, "eight")
    store.proxy.clear()
    sums = []
    for process in ranks(store, url, tmp_path / "cache"):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        sums.append(int(out))
    expected = epoch(folder, batch_size=8, lanes=8)[0]
    assert sum(sums) == sum(int(batch.sum()) for batch in expected)
    asked = store.proxy.gets()
    assert len(asked) <= 1.05 * len({(request.path, request.range) for request in asked})
    assert len(of_shards(store)) == 1


def test_a_cache_that_was_killed_at_any_moment_is_right(store: S3, tmp_path: Path) -> None:
    folder = large("parquet", tmp_path / "corpus")
    url = store.upload(folder, "killed")
    expected = epoch(folder)[0]
    generator = random.Random(7)
    cache = tmp_path / "cache"
    store.proxy.latency = 0.01
    for _ in range(6):
        processes = ranks(store, url, cache, count=2)
        for process in processes:
            time.sleep(generator.uniform(0.05, 0.6))
            process.kill()
            process.communicate()
        same(epoch(url, cache_dir=str(cache), storage_timeout=20, **store.settings)[0], expected)
        for path in (cache / "objects").glob("*"):
            if generator.random() < 0.5:
                path.unlink()


def test_a_web_server_gives_named_files(store: S3, tmp_path: Path) -> None:
    folder = written("parquet", tmp_path / "corpus")
    store.upload(folder, "web")
    names = sorted(path.name for path in folder.iterdir())
    urls = [f"{store.proxy.url}/{object_stores.BUCKET}/web/{name}" for name in names]
    same(epoch(urls)[0], epoch(str(folder))[0])
    with pytest.raises(forebay.ForebayError, match="lists no folders"):
        forebay.Loader(f"{store.proxy.url}/{object_stores.BUCKET}/web/*.parquet")


def test_a_data_set_of_the_hub_is_read_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written("parquet", tmp_path / "corpus")
    expected = epoch(folder)
    with object_stores.hub(folder, "data/a b", token="secret") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        root = "hf://datasets/someone/corpus"
        for data in (f"{root}/data/a b/*.parquet", f"{root}@main/data/a b", f"{root}/**/*.parquet"):
            hub.requests.clear()
            found = epoch(data)
            same(found[0], expected[0])
            assert found[1] == expected[1] or "**" in data
            assert len([path for path, _ in hub.requests if "/revision/" in path]) <= 1
        monkeypatch.setenv("HF_TOKEN", "wrong")
        with pytest.raises(forebay.ForebayError, match="check the credentials") as caught:
            epoch(f"{root}/data/*.parquet", storage_timeout=9)
        assert "wrong" not in str(caught.value)


def test_google_storage_is_read_by_its_xml_interface(store: S3, tmp_path: Path) -> None:
    # The interface of Google's store for listings and reads is S3's, so that moto can stand in.
    folder = written("parquet", tmp_path / "corpus")
    url = store.upload(folder, "google").replace("s3://", "gs://")
    expected = epoch(folder)
    found = epoch(f"{url}/*.parquet", storage_anonymous=True, cache_dir=str(tmp_path / "cache"), **store.settings)
    same(found[0], expected[0])
    assert found[1] == expected[1]
