"""Object storage on this machine: servers that speak the protocols of S3 and GCS.

A proxy makes requests fail. All are real HTTP servers on loopback ports; the servers are processes
of their own.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.request import Request, urlopen

BUCKET = "lab"

_ONLY_S3 = """
import logging, sys
from moto.server import create_backend_app
from werkzeug.serving import run_simple
logging.getLogger("werkzeug").setLevel(logging.ERROR)
run_simple("127.0.0.1", int(sys.argv[1]), create_backend_app("s3"), threaded=True)
"""
"""What ``moto_server`` runs, without asking of each request which of AWS's services it is for."""

_STRICT_GCS = """
import json, sys
from http import HTTPStatus
from gcp_storage_emulator.__main__ import main
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

upload = objects._multipart_upload

def upload_if_asked(request, response, storage):
    name = request.query.get("name", [request.data["meta"].get("name")])[0]
    if request.query.get("ifGenerationMatch") == ["0"]:
        try:
            storage.get_file_obj(request.params["bucket_name"], name)
        except NotFound:
            pass
        else:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return
    upload(request, response, storage)

objects._multipart_upload = upload_if_asked
main(sys.argv[1:])
"""
"""``gcp_storage_emulator``, which does one thing at a time, and here one condition."""

_CODES = {401: "InvalidToken", 403: "AccessDenied", 500: "InternalError", 501: "NotImplemented", 503: "SlowDown"}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Fault:
    """What goes wrong with some of the requests."""

    kind: Literal["refuse", "reset", "lose", "ignore", "delay"]
    """What happens to a request.

    ``refuse``: an answer of status ``status``; ``reset``: the connection is reset; ``lose``: it is
    done, and the connection reset instead of an answer; ``ignore``: its condition is not looked at;
    ``delay``: an answer after ``seconds``.
    """
    pattern: str = ""
    """Regular expression for requests, as ``METHOD /path?query``; all by default."""
    every: int = 1
    """The fault happens to one of so many requests."""
    times: float = float("inf")
    """The fault happens at most so often."""
    status: int = 503
    seconds: float = 0.0
    seen: int = 0
    done: int = 0

    def strikes(self, request: str) -> bool:
        """Whether the fault happens to a request, which is counted."""
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        if self.seen % self.every or self.done >= self.times:
            return False
        self.done += 1
        return True


@dataclass
class Proxy:
    """Hands requests on to a server, keeps a list of them, and lets some fail."""

    upstream: str
    """Host and port of the server."""
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """All requests that were handed on, as ``METHOD /path?query``."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def strike(self, request: str) -> Fault | None:
        """The fault that happens to a request."""
        with self.lock:
            fault = next((fault for fault in self.faults if fault.strikes(request)), None)
            if fault is None or fault.kind == "delay":
                self.requests.append(request)
            return fault

    def clear(self) -> None:
        """Forget all faults and requests."""
        with self.lock:
            self.faults.clear()
            self.requests.clear()

    def counts(self) -> Counter[str]:
        """How many requests there were, by what they were for."""
        return Counter(map(purpose, self.requests))


def purpose(request: str) -> str:
    """What a request was for: method, and the kind of object."""
    method, _, path = request.partition(" ")
    kinds = ("claims", "leases", "info", "provenance", "donations", "receipts", "trial", "models", "batch")
    listing = re.search(r"list-type=2|/o\?", path)
    kind = next((k for k in kinds if k in path), "chunk" if re.search(r"\d+-\d+_\d+-\d+_\d+-\d+", path) else "other")
    return f"{method} {'list ' if listing else ''}{kind}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.strike(f"{self.command} {self.path}")
        if fault is not None and fault.kind == "reset":
            self.reset()
            return
        if fault is not None and fault.kind == "refuse":
            body = f"<Error><Code>{_CODES[fault.status]}</Code><Message>as asked for</Message></Error>".encode()
            self.answer(fault.status, {"Content-Type": "application/xml"}, body)
            return
        if fault is not None:
            time.sleep(fault.seconds)
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        try:
            asked = dict(self.headers)
            if fault is not None and fault.kind == "ignore":
                asked.pop("If-None-Match", None)
            connection.request(self.command, self.path, body, asked)
            response = connection.getresponse()
            content, headers = response.read(), dict(response.getheaders())
            if fault is not None and fault.kind == "lose":
                self.reset()
                return
            if response.status == 200 and self.path.startswith("/download/storage/"):
                headers |= self.encoding()
            self.answer(response.status, headers, content)
        finally:
            connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any

    def reset(self) -> None:
        # closing with a linger time of 0 sends RST instead of FIN
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def encoding(self) -> dict[str, str]:
        """The encoding of an object, as a header.

        GCS tells it of a download; the emulator keeps it, but does not tell it.
        """
        name = self.path.removeprefix("/download").partition("?")[0]
        with urlopen(f"http://{self.proxy.upstream}{name}", timeout=30) as response:
            encoding = json.load(response).get("contentEncoding")
        return {"Content-Encoding": encoding} if encoding else {}

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away in the middle of things; the requests that matter are asserted on."""


@contextmanager
def proxy_before(url: str) -> Iterator[Proxy]:
    """A proxy before a server."""
    proxy = Proxy(url.removeprefix("http://"))
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A server that speaks S3's protocol, with one bucket; its URL."""
    port = _free_port()
    with _running([sys.executable, "-c", _ONLY_S3, str(port)], port, folder / "s3.log"):
        url = f"http://127.0.0.1:{port}"
        with urlopen(Request(f"{url}/{BUCKET}", method="PUT"), timeout=30):
            yield url


@contextmanager
def gcs_server(folder: Path) -> Iterator[str]:
    """A server that speaks GCS's protocol, with one bucket; its URL."""
    port = _free_port()
    options = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--quiet"]
    with _running([sys.executable, "-c", _STRICT_GCS, *options], port, folder / "gcs.log"):
        url, body = f"http://127.0.0.1:{port}", json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{url}/storage/v1/b?project=test", body, headers, method="POST"), timeout=30):
            yield url


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            _wait_for(port, process, log)
            yield
        finally:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {log.read_text()}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
