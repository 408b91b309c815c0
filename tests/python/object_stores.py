"""Starts object stores on loopback, with a proxy before them that logs requests and makes faults."""

from __future__ import annotations

import http.client
import random
import threading
import time
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
            for name, value in answer.headers:
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
                elif name.lower() == "content-length" and is_head:
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

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = forward  # noqa: N815

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that is killed closes its connections


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """Starts a proxy before the server at `target`, which is `host:port`."""
    proxy = Proxy(target)
    server = Server(("127.0.0.1", 0), handler(proxy))
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body)

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
        client.create_bucket(Bucket=BUCKET)
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
