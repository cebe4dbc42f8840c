"""Object storage that fails, stays away or refuses: it is tried again, or told."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.errors import SpecError, StorageError
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.output import open_output
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage import clients
from chunkflow_core.storage.clients import open_files
from chunkflow_core.storage.files import storage_errors
from tests.support.object_storage import BUCKET, Fault, Proxy
from tests.support.stores import CREDENTIALS, Store, spec_for
from tests.support.volume import write_layer
from tests.support.web import serving

Chunkflow = Callable[..., CompletedProcess[str]]


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_burst_of_failures(
    use: Callable[[str], Store], tmp_path: Path, kind: str, chunkflow: Chunkflow, reference: dict[str, NDArray[Any]]
) -> None:
    store = use(kind)
    faults = [
        Fault("refuse", every=3, times=5),
        Fault("reset", every=5, times=3),
        Fault("refuse", every=4, times=2, status=500),
        Fault("delay", every=6, times=6, seconds=0.2),
    ]
    store.proxy.faults += faults
    path = spec_for(store, tmp_path)
    # Google's client waits longer; there it is one block
    outcome = chunkflow("run", path, "--seams", 0, *(["--bbox", 0, 0, 0, 1, 1, 1] if kind == "gs" else []))
    assert outcome.returncode == 0, outcome.stderr
    assert [fault.done for fault in faults] == [5, 3, 2, 6]
    spec = load_spec(path)
    box = spec.grid.block((0, 0, 0)).core if kind == "gs" else spec.grid.roi
    np.testing.assert_array_equal(
        Workspace(spec).output.read(box), reference["identity"][(slice(None), *box.slices((0, 0, 0)))]
    )


def test_storage_that_stays_away(
    use: Callable[[str], Store], tmp_path: Path, chunkflow: Chunkflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = use("s3")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("CHUNKFLOW_STORAGE_PATIENCE", "1")
    spec = spec_for(store, tmp_path)
    assert chunkflow("prepare", spec).returncode == 0
    away = [Fault("refuse", "PUT .*donations")]
    store.proxy.faults += away
    outcome = chunkflow("run", spec)
    assert outcome.returncode == 75
    place = f"{store.root}/{tmp_path.name}/exchange"
    for text in (f"writing {place}", "SlowDown", "tried again for 1 s", "CHUNKFLOW_STORAGE_PATIENCE", "run again"):
        assert text in outcome.stderr
    assert away[0].done >= 2
    left = sorted(name.rpartition("/")[2] for name in open_files(place).list())
    assert left == ["reference.json", "trial.json"], "no receipt"
    store.proxy.faults.clear()
    assert chunkflow("run", spec, "--seams", 0, "--bbox", 0, 0, 0, 1, 1, 1).returncode == 0


def test_storage_that_is_not_there(
    use: Callable[[str], Store], tmp_path: Path, chunkflow: Chunkflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = use("s3")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("CHUNKFLOW_STORAGE_PATIENCE", "0.1")
    spec = spec_for(store, tmp_path, input={"path": f"s3://http://127.0.0.1:9/{BUCKET}/input"})
    outcome = chunkflow("prepare", spec)
    assert outcome.returncode == 75
    assert f"s3://http://127.0.0.1:9/{BUCKET}/input" in outcome.stderr
    monkeypatch.setenv("CHUNKFLOW_STORAGE_PATIENCE", "long")
    outcome = chunkflow("prepare", spec)
    assert outcome.returncode == 78 and "CHUNKFLOW_STORAGE_PATIENCE: 'long'" in outcome.stderr


@contextmanager
def dropping() -> Iterator[str]:
    """Host and port to which connections are not even refused, as behind a network policy.

    The queue of a socket that accepts nobody is full, so the kernel drops who comes.
    """
    with ExitStack() as sockets:
        server = sockets.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    """Host and port where connections are taken, and requests never answered."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"127.0.0.1:{server.getsockname()[1]}"


NEVER_ANSWERED: dict[str, dict[str, Any]] = {
    "the input": {"input": {"path": "s3://http://{place}/lab/input"}},
    "the output": {"output": {"path": "s3://http://{place}/lab/output", "chunk_size": [6, 12, 12]}},
    "the exchange": {"exchange": {"path": "s3://http://{place}/lab/exchange"}},
    "an input of HTTP": {"input": {"path": "http://{place}/input"}},
}


@pytest.mark.parametrize("what", NEVER_ANSWERED)
def test_storage_that_a_network_policy_hides(
    what: str, tmp_path: Path, chunkflow: Chunkflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry may help, and the message names the place and who may be in the way."""
    for name, value in (CREDENTIALS | {"AWS_MAX_ATTEMPTS": "1", "CHUNKFLOW_STORAGE_PATIENCE": "0.1"}).items():
        monkeypatch.setenv(name, value)
    write_layer(tmp_path / "input")
    with dropping() as place:
        changes = json.loads(json.dumps(NEVER_ANSWERED[what]).replace("{place}", place))
        spec = spec_for(Store(Proxy(""), f"file://{tmp_path}"), tmp_path, **changes)
        spec.write_text(spec.read_text().replace(f"{tmp_path}/{tmp_path.name}", str(tmp_path)))
        began = time.monotonic()
        outcome = chunkflow("prepare", spec)
        lasted = time.monotonic() - began
    assert outcome.returncode == 75, outcome.stderr
    for text in (place.partition(":")[0], place.partition(":")[2], "timeout", "a network policy may", "tried again"):
        assert text in outcome.stderr
    assert 9 < lasted < 50, "one connection takes ten seconds"


def wait_for_answers(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setenv("CHUNKFLOW_STORAGE_PATIENCE", "0.1")
    monkeypatch.setattr(clients, "_CONNECT_SECONDS", seconds)
    monkeypatch.setattr(clients, "_READ_SECONDS", seconds)


@pytest.mark.parametrize(("server", "said"), [(dropping, "a network policy may"), (silent, "Read timed out")])
def test_a_web_server_that_never_answers(
    server: Callable[[], AbstractContextManager[str]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_answers(monkeypatch, 0.3)
    with server() as place, pytest.raises(StorageError, match=said), storage_errors("reading"):
        open_files(f"http://{place}/input").get("info")


@pytest.mark.long
def test_gcs_behind_a_network_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client tries again for two minutes by itself."""
    wait_for_answers(monkeypatch, 1.0)
    with dropping() as place:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{place}")
        began = time.monotonic()
        with pytest.raises(StorageError, match="a network policy may"), storage_errors("reading"):
            open_files("gs://never-answered/input").get("info")
    assert time.monotonic() - began < 200


@pytest.mark.parametrize("kind", ["s3", "gs"])
@pytest.mark.parametrize("status", [401, 403])
def test_no_permission(
    use: Callable[[str], Store], tmp_path: Path, kind: str, status: int, chunkflow: Chunkflow
) -> None:
    """A refusal is told at once: nothing is tried again."""
    store = use(kind)
    spec = spec_for(store, tmp_path)
    for request, command, place in (("info", "prepare", f"{store.root}/input"), ("receipts", "plan", "exchange")):
        refusal = Fault("refuse", request, status=status)
        store.proxy.faults[:] = [refusal]
        outcome = chunkflow(command, spec)
        assert (outcome.returncode, refusal.done) == (78, 1), outcome.stderr
        for text in (place, "aws-secret.json", "GOOGLE_APPLICATION_CREDENTIALS"):
            assert text in outcome.stderr


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_an_output_that_cannot_be_listed(use: Callable[[str], Store], tmp_path: Path, kind: str) -> None:
    store = use(kind)
    path = spec_for(store, tmp_path)
    assert main(["prepare", str(path)]) == 0
    layer = open_output(load_spec(path))
    refusal = Fault("refuse", "prefix=.*4_4_40", status=403)
    store.proxy.faults[:] = [refusal]
    with pytest.raises(SpecError, match=f"listing {layer.path}"):
        layer.stored_chunks()
    assert refusal.done == 1


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_layer_that_is_not_made_to_the_end(use: Callable[[str], Store], tmp_path: Path, kind: str) -> None:
    """``info`` is written last: without it there is no layer, and the next ``prepare`` makes it."""
    store = use(kind)
    spec = spec_for(store, tmp_path)
    # the request that uploads a file to GCS has its name in the body
    store.proxy.faults[:] = [Fault("refuse", {"s3": "PUT .*/info", "gs": "POST /upload"}[kind], status=403)]
    if kind == "gs":
        store.proxy.faults[
            0
        ].every = 8  # after reference, trial, lease and claim (twice: they are tried out), and provenance
    assert main(["prepare", str(spec)]) == 78
    store.proxy.faults.clear()
    left = ["claims/00000001.json", "leases/00000001.json", "provenance"]
    assert list(open_files(load_spec(spec).output.path).list()) == left

    assert main(["prepare", str(spec)]) == 0
    assert open_output(load_spec(spec)).stored_chunks() == set()


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_no_credentials(
    use: Callable[[str], Store], tmp_path: Path, kind: str, chunkflow: Chunkflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = use(kind)
    for name in (*CREDENTIALS, "AWS_SESSION_TOKEN", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    outcome = chunkflow("prepare", spec_for(store, tmp_path))
    assert outcome.returncode == 78, outcome.stderr
    assert "redentials" in outcome.stderr and "finds none" in outcome.stderr
    assert not store.proxy.requests


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_no_such_bucket(use: Callable[[str], Store], tmp_path: Path, kind: str, chunkflow: Chunkflow) -> None:
    store = use(kind)
    nowhere = store.root.replace(f"/{BUCKET}", "/nowhere")
    spec = spec_for(store, tmp_path)
    for key in ("input", "output", "exchange"):
        outcome = chunkflow("prepare", spec, "--set", f"{key}.path={nowhere}/em")
        assert outcome.returncode == 66, outcome.stderr
        assert f"{nowhere}/em" in outcome.stderr
    outcome = chunkflow("plan", spec, "--set", "model={engine: pytorch, path: " + nowhere + "/net.py}")
    assert outcome.returncode == 66 and f"{nowhere}/net.py" in outcome.stderr


class _RefusingDeletions(BaseHTTPRequestHandler):
    """Answers as S3 does to a role that may not delete: the request as a whole is fine."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        error = "<Error><Key>{}/gone</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        body = f'<DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{error}</DeleteResult>'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_deletions_that_are_refused_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were they not told, receipts would go on vouching for what is being replaced."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    with serving(_RefusingDeletions) as url:
        files = open_files(f"s3://{url}/bucket/exchange")
        with pytest.raises(SpecError, match="gone: Access Denied"), storage_errors("deleting receipts"):
            files.delete(["gone"])
