"""Starts object stores on loopback.

A proxy before them logs requests and makes faults.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "corpus"
#: Credentials that moto accepts. They are made up.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


@dataclass
class Request:
    """A request that reached the proxy."""

    method: str
    path: str
    range: str
    headers: dict[str, str]
    began: float
    status: int = 0

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.path


@dataclass
class Answer:
    """An answer of the server, which a fault may change."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    #: Bytes of the body after which the connection is closed.
    cut: int | None = None


#: Changes an answer, or makes one in place of it.
Fault = Callable[[Request, Answer], Answer]


@dataclass
class Proxy:
    """A proxy on loopback. It may be changed while it runs."""

    target: str
    latency: float = 0.0
    fault: Fault | None = None
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def clear(self) -> list[Request]:
        with self.lock:
            before, self.requests = self.requests, []
        return before

    def gets(self) -> list[Request]:
        with self.lock:
            return [request for request in self.requests if request.method == "GET" and not request.is_listing]

    def listings(self) -> list[Request]:
        with self.lock:
            return [request for request in self.requests if request.is_listing]


def handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def forward(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length)
            headers = dict(self.headers.items())
            request = Request(self.command, self.path, headers.get("range", ""), headers, time.monotonic())
            with proxy.lock:
                proxy.requests.append(request)
            if proxy.latency:
                time.sleep(proxy.latency)
            connection = http.client.HTTPConnection(proxy.target)
            try:
                connection.request(self.command, self.path, sent, headers)
                found = connection.getresponse()
                answer = Answer(found.status, found.getheaders(), found.read())
            finally:
                connection.close()
            if proxy.fault is not None:
                answer = proxy.fault(request, answer)
            request.status = answer.status
            self.reply(answer)

        def reply(self, answer: Answer) -> None:
            is_head = self.command == "HEAD"
            self.send_response_only(answer.status)
            dropped = ("connection", "transfer-encoding", *(() if is_head else ("content-length",)))
            for name, value in answer.headers:
                if name.lower() not in dropped:
                    self.send_header(name, value)
            if not is_head:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if is_head:
                return
            self.wfile.write(answer.body if answer.cut is None else answer.body[: answer.cut])
            if answer.cut is not None:
                self.wfile.flush()
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = forward

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing. A client that is killed closes its connections."""


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """Serves `handler` on a free port, and gives the URL."""
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """Starts a proxy before the server at `target`, which is `host:port`."""
    proxy = Proxy(target)
    with serving(handler(proxy)) as proxy.url:
        yield proxy


@dataclass
class S3:
    """A server of moto with a bucket."""

    proxy: Proxy
    client: Any

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a loader that reads the bucket."""
        return {"storage_endpoint": self.proxy.url}

    def upload(self, folder: Path, prefix: str) -> str:
        """Uploads the files below `folder`, and returns the URL of the new folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body, ACL="public-read")

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)


@contextmanager
def s3() -> Iterator[S3]:
    """Starts moto with an empty bucket, and a proxy before it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET, ACL="public-read")
        with proxied(f"{host}:{port}") as proxy:
            yield S3(proxy, client)
    finally:
        server.stop()


def at_random(seed: int, share: float, fault: Fault) -> Fault:
    """Applies `fault` to a share of the answers with objects."""
    generator = random.Random(seed)
    lock = threading.Lock()

    def chosen(request: Request, answer: Answer) -> Answer:
        with lock:
            hit = generator.random() < share
        return fault(request, answer) if hit else answer

    return chosen


def status(code: int, retry_after: str | None = None) -> Fault:
    """Answers with an error."""

    def fault(request: Request, answer: Answer) -> Answer:
        headers = [("Content-Type", "application/xml")]
        if retry_after is not None:
            headers.append(("Retry-After", retry_after))
        return Answer(code, headers, b"<Error><Code>SlowDown</Code></Error>")

    return fault


def truncated(request: Request, answer: Answer) -> Answer:
    """Closes the connection in the middle of the body."""
    return Answer(answer.status, answer.headers, answer.body, cut=len(answer.body) // 2)


def shortened(request: Request, answer: Answer) -> Answer:
    """Sends a whole body that lacks its last byte."""
    if request.method != "GET" or request.is_listing or not answer.body:
        return answer
    return Answer(answer.status, answer.headers, answer.body[:-1])


@dataclass
class Hub:
    """A server that follows the interface of the Hugging Face Hub for data sets."""

    files: dict[str, bytes]
    token: str
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    #: Entries of a page of a listing.
    page: int = 2
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""


def hub_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    repository = "datasets/someone/corpus"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            path = urllib.parse.unquote(url.path)
            hub.requests.append((path, self.headers.get("Range", "")))
            if path.startswith("/cdn/"):
                # The files lie on another server, which must not see the token.
                assert "Authorization" not in self.headers or self.headers["Host"] in hub.url
                return self.send_range(hub.files[path.removeprefix("/cdn/")])
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.reply(401, b'{"error": "Unauthorized"}')
            if path == f"/api/{repository}/revision/main":
                return self.reply(200, json.dumps({"sha": hub.commit}).encode())
            tree = f"/api/{repository}/tree/{hub.commit}"
            if path.startswith(tree):
                return self.send_tree(path.removeprefix(tree).strip("/"), url.query)
            resolve = f"/{repository}/resolve/{hub.commit}/"
            if path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
                return self.reply(302, b"", Location=f"/cdn/{urllib.parse.quote(path.removeprefix(resolve))}")
            return self.reply(404, b'{"error": "Entry not found"}')

        def send_tree(self, folder: str, query: str) -> None:
            given = dict(urllib.parse.parse_qsl(query))
            assert given["recursive"] == "true"
            names = sorted(name for name in hub.files if not folder or name.startswith(f"{folder}/"))
            if not names:
                return self.reply(404, b'{"error": "Entry not found"}')
            start = int(given.get("cursor", "0"))
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(hub.files[name]),
                    "oid": "0" * 40,
                    "lfs": {"oid": hashlib.sha256(hub.files[name]).hexdigest()},
                }
                for name in names[start : start + hub.page]
            ]
            folders = [{"type": "directory", "path": folder or "data", "size": 0, "oid": "1" * 40}]
            headers = {}
            if start + hub.page < len(names):
                target = f"{hub.url}{urllib.parse.urlsplit(self.path).path}?recursive=true&cursor={start + hub.page}"
                headers["Link"] = f'<{target}>; rel="next"'
            self.reply(200, json.dumps(folders + entries).encode(), **headers)

        def send_range(self, body: bytes) -> None:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = body[int(first) : int(last) + 1]
            self.reply(206, part, Content_Range=f"bytes {first}-{last}/{len(body)}")

    return Handler


@contextmanager
def hub(folder: Path, prefix: str, token: str) -> Iterator[Hub]:
    """Serves the files of `folder` as those of a data set, below `prefix`."""
    files = {f"{prefix}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    served = Hub(files, token)
    with serving(hub_handler(served)) as served.url:
        yield served
