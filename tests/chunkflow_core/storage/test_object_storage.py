"""Input, output, exchange and model in object storage.

The bits are the same, requests are few, and what fails is tried again or told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import yaml
from cloudfiles.interfaces import reset_connection_pools
from cloudvolume import CloudVolume
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.reports import manifest
from chunkflow_core.spec import load_spec, parse_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.output import open_output
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.clients import located, open_files
from chunkflow_core.storage.files import put_file, storage_errors
from chunkflow_core.storage.layers import NewLayer
from chunkflow_core.storage.model_files import fetch
from tests.support.object_storage import BUCKET, Fault, Proxy, gcs_server, proxy_before, s3_server
from tests.support.volume import output_of
from tests.support.web import serving

Chunkflow = Callable[..., CompletedProcess[str]]

SHAPE = (20, 48, 40)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
NETWORK = """
import torch

from layers import Shift

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = Shift()

    def forward(self, x):
        return torch.sigmoid(self.shift(x))

InstantiatedModel = Net()
"""
LAYERS = """
import torch

class Shift(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.by
"""


@dataclass
class Store:
    """A bucket behind a proxy, with an input layer and a model in it."""

    proxy: Proxy
    root: str
    """Address of the bucket."""
    variables: dict[str, str] = field(default_factory=dict)


def spec_for(store: Store, folder: Path, **changes: Any) -> Path:
    """A spec of 2 × 2 × 2 blocks; all places but the input are below ``store.root/folder.name``."""
    place = f"{store.root}/{folder.name}"
    content = {
        "name": "small",
        "input": {"path": f"{store.root}/input"},
        "output": {"path": f"{place}/output", "chunk_size": [6, 12, 12]},
        "exchange": {"path": f"{place}/exchange"},
        "patch_size": [8, 16, 16],
        "patch_overlap": [2, 4, 4],
        "block_size": [12, 24, 24],
        "model": {"engine": "identity"},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that imports a sibling, and its weights."""
    import torch

    folder = tmp_path_factory.mktemp("models")
    (folder / "net.py").write_text(NETWORK)
    (folder / "layers.py").write_text(LAYERS)
    (folder / "unrelated.py").write_text("raise RuntimeError\n")
    torch.save({"shift.by": torch.tensor([0.25])}, folder / "net.pt")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> dict[str, NDArray[Any]]:
    """What a run on a disk writes, by engine; the input layer is in the folder ``input``."""
    found = {}
    folder = tmp_path_factory.mktemp("reference")
    store = Store(Proxy(""), f"file://{folder}")
    write_input(store)
    for engine, model in models(f"file://{model_files}").items():
        (folder / engine).mkdir()
        spec = spec_for(store, folder / engine, model=model)
        assert main(["run", str(spec)]) == 0
        found[engine] = output_of(spec)
    assert not np.array_equal(found["identity"], found["pytorch"])
    return found


def models(place: str) -> dict[str, dict[str, Any]]:
    """Model sections by engine."""
    return {
        "identity": {"engine": "identity"},
        "pytorch": {"engine": "pytorch", "path": f"{place}/net.py", "weights": f"{place}/net.pt"},
    }


def write_input(store: Store) -> None:
    """Write a layer of random voxels."""
    data = np.random.default_rng(1).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    layer = NewLayer(f"{store.root}/input", SHAPE, dtype="uint8", resolution=(40, 4, 4), chunk=(10, 24, 20))
    layer.write(Box((0, 0, 0), SHAPE), data)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[dict[str, Store]]:
    """A store by each protocol."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        s3, gcs = (stack.enter_context(server(folder)) for server in (s3_server, gcs_server))
        proxies = [stack.enter_context(proxy_before(url)) for url in (s3, gcs)]
        found = {
            "s3": Store(proxies[0], f"s3://{proxies[0].url}/{BUCKET}", CREDENTIALS),
            "gs": Store(proxies[1], f"gs://{BUCKET}", {"STORAGE_EMULATOR_HOST": proxies[1].url}),
        }
        for store in found.values():
            for name, value in store.variables.items():
                patch.setenv(name, value)
            write_input(store)
            for file in model_files.iterdir():
                put_file(f"{store.root}/models", file.name, file.read_bytes())
        yield found


@pytest.fixture
def use(stores: dict[str, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Store]]:
    """Gives the store of a protocol, all well.

    The variables that it needs are set, and no connection is left of before.
    """
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(home / "cache"))

    def choose(kind: str) -> Store:
        store = stores[kind]
        store.proxy.clear()
        for name, value in store.variables.items():
            monkeypatch.setenv(name, value)
        reset_connection_pools()
        fetch.cache_clear()
        return store

    yield choose
    for store in stores.values():
        store.proxy.clear()


@pytest.mark.parametrize("kind", [pytest.param("s3", marks=pytest.mark.long), "gs"])
def test_all_commands(
    use: Callable[[str], Store],
    tmp_path: Path,
    kind: str,
    chunkflow: Chunkflow,
    python: Chunkflow,
    reference: dict[str, NDArray[Any]],
) -> None:
    store = use(kind)
    spec = spec_for(store, tmp_path)
    assert chunkflow("prepare", spec).returncode == 0
    if kind == "s3":
        infer = python("-m", "chunkflow_core.inference_and_donate", spec, "--block", 0, 0, 0)
        assert infer.returncode == 0, infer.stderr
    plan = python("-m", "chunkflow_core", "plan", spec, "--json")
    due = json.loads(plan.stdout)  # nothing else may be on standard output
    assert len(due["infer"]) == (7 if kind == "s3" else 8)
    assert chunkflow("run", spec, "--seams", 0).returncode == 0
    if kind == "s3":
        blend = python("-m", "chunkflow_core.receive_and_blend", spec, "--block", 1, 1, 1)
        assert blend.returncode == 0 and "up to date" in blend.stdout, blend.stderr
    verified = chunkflow("verify", spec, "--json")
    assert (verified.returncode, json.loads(verified.stdout)["findings"]) == (0, [])
    assert json.loads(chunkflow("report", spec, "--json").stdout)["inferred"] == 8
    assert "0 donations deleted" in chunkflow("cleanup", spec).stdout  # `run` has deleted them
    left = list(open_files(f"{store.root}/{tmp_path.name}/exchange").list())
    assert len([name for name in left if "/receipts/" in name]) == 15
    assert not [name for name in left if "/donations/" in name]

    np.testing.assert_array_equal(output_of(spec), reference["identity"])
    stored = CloudVolume(**located(load_spec(spec).output.path), progress=False)[:, :, :]
    np.testing.assert_array_equal(np.asarray(stored).T, reference["identity"])


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_headers(use: Callable[[str], Store], tmp_path: Path, kind: str) -> None:
    store = use(kind)
    spec = load_spec(spec_for(store, tmp_path))
    workspace = Workspace(spec)
    assert main(["prepare", str(tmp_path / "spec.yaml")]) == 0
    inference_and_donate(workspace, (0, 0, 0))

    def header(path: str, name: str) -> tuple[Any, Any, Any]:
        head = open_files(path).head(name)
        return head["Content-Encoding"], head["Cache-Control"], head["Content-Type"]

    chunk = spec.grid.block((0, 0, 0)).core
    name = f"4_4_40/{next(workspace.output.expected_chunks(chunk)).key}"
    assert header(spec.output.path, name) == ("gzip", "public, max-age=3600", "application/octet-stream")
    raw = open_files(spec.output.path).get(name, raw=True)
    assert raw[:2] == b"\x1f\x8b"  # compressed,
    assert open_files(spec.output.path).get(name)[:2] != b"\x1f\x8b"  # once
    exchange = workspace.exchange.path
    donation = next(iter(workspace.exchange.donation_keys()))
    assert header(exchange, f"donations/0_0_0/{donation}") == (None, "no-cache", "application/octet-stream")
    receipt = workspace.exchange.receipt("infer", (0, 0, 0))
    assert receipt is not None
    assert header(exchange, f"receipts/infer/0_0_0/{receipt.name}") == (None, "no-cache", "application/json")


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_layer_that_grows(use: Callable[[str], Store], tmp_path: Path, kind: str, chunkflow: Chunkflow) -> None:
    """The layer's info is replaced, and what its old end has cut short is deleted.

    A run's manifest is beside it.
    """
    path = spec_for(use(kind), tmp_path, roi=[[0, 0, 0], [14, 24, 24]])
    assert chunkflow("prepare", path).returncode == 0
    spec = load_spec(path)
    open_output(spec).write(spec.grid.roi, np.ones((1, 14, 24, 24), np.uint8))
    manifest.begin(spec, "run", {})
    manifest.complete(spec, "run", [])
    files = open_files(spec.output.path)

    outcome = chunkflow("prepare", path, "--set", "roi=[[0, 0, 0], [20, 24, 24]]")

    assert outcome.returncode == 0, outcome.stderr
    assert len(list(files.list(prefix="4_4_40/"))) == 8
    assert not [name for name in files.list(prefix="4_4_40/") if name.endswith("_12-14")]
    assert json.loads(files.get("info"))["scales"][0]["size"] == [24, 24, 20]
    for name in ("info", "provenance", "runs/run.json"):
        head = files.head(name)
        assert (head["Cache-Control"], head["Content-Type"]) == ("no-cache", "application/json")
    stored = CloudVolume(**located(spec.output.path), progress=False)
    assert [step["method"]["mode"] for step in stored.provenance.processing] == ["new", "extend"]


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_requests_of_a_block(use: Callable[[str], Store], tmp_path: Path, kind: str) -> None:
    """A block takes one request for each object that is read, written or deleted.

    It takes another for each layer's ``info``, and few listings. The output's provenance is read at
    first, before each piece that is written, and before the receipt. Listings are of the block's
    receipts (to find, and to retract them), of its donations, and of the input's storage chunks.
    """
    store = use(kind)
    path = spec_for(store, tmp_path)
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    for index in spec.grid.indices():
        inference_and_donate(Workspace(load_spec(path)), index)
    store.proxy.clear()
    write = {"s3": "PUT", "gs": "POST list"}[kind]

    result = inference_and_donate(Workspace(load_spec(path)), (0, 0, 0), why="forced").receipt
    assert result is not None
    given = sum(entry.checksum is not None for entry in result.donations)
    counts = store.proxy.counts()
    pieces = sum(bool(piece.core) for piece in spec.grid.pieces(spec.grid.block((0, 0, 0))))
    reads = {"GET info": 2, "GET provenance": 2 + pieces, "GET receipts": 1, "GET chunk": 8}
    reads |= {"GET list receipts": 2, "GET list donations": 1, "GET list other": 2}
    written = sum(count for what, count in counts.items() if what.startswith(write))
    assert {what: count for what, count in counts.items() if what.startswith("GET")} == reads
    assert written == result.storage_chunks + given + 1
    assert counts.total() == sum(reads.values()) + written + 1

    store.proxy.clear()
    last = (1, 1, 1)
    workspace = Workspace(load_spec(path))
    blended = receive_and_blend(workspace, last).receipt
    assert blended is not None
    received = sum(len(spec.grid.donations(donor, last)) for donor in spec.grid.donors(last))
    counts = store.proxy.counts()
    reads = {"GET info": 2, "GET provenance": 2, "GET receipts": 8, "GET donations": received, "GET list receipts": 10}
    written = sum(count for what, count in counts.items() if what.startswith(write))
    assert {what: count for what, count in counts.items() if what.startswith("GET")} == reads
    assert written == blended.storage_chunks + 1
    assert counts.total() == sum(reads.values()) + written


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_model_in_storage(
    use: Callable[[str], Store], tmp_path: Path, kind: str, model_files: Path, reference: dict[str, NDArray[Any]]
) -> None:
    store = use(kind)
    path = spec_for(store, tmp_path, model=models(f"{store.root}/models")["pytorch"])
    local = load_spec(path, [f"model.path={model_files}/net.py", f"model.weights={model_files}/net.pt"])
    assert load_spec(path).fingerprint == local.fingerprint  # what is in the files counts, not where they are
    assert [file.name for file in load_spec(path).model_files] == ["net.pt", "layers.py", "net.py"]
    fetched = [request for request in store.proxy.requests if request.startswith("GET") and "net.p" in request]
    assert len(fetched) == (2 if kind == "s3" else 6)  # GCS is asked for an object's version by GET too
    if kind == "s3":
        assert main(["run", str(path), "--seams", "0"]) == 0
        np.testing.assert_array_equal(output_of(path), reference["pytorch"])

    fetch.cache_clear()  # as in another process on this machine, which finds them in the cache
    store.proxy.clear()
    assert load_spec(path).fingerprint == local.fingerprint
    contents = "/download/" if kind == "gs" else f"/{BUCKET}/models/"
    assert not [r for r in store.proxy.requests if r.startswith(f"GET {contents}") and "net.p" in r]


def test_a_model_that_is_replaced(use: Callable[[str], Store], tmp_path: Path) -> None:
    store = use("s3")
    place = f"{store.root}/{tmp_path.name}"
    put_file(place, "net.pt", b"first")
    assert fetch(f"{place}/net.pt").read_bytes() == b"first"
    put_file(place, "net.pt", b"other")
    fetch.cache_clear()
    assert fetch(f"{place}/net.pt").read_bytes() == b"other"


def test_companions_of_a_model(use: Callable[[str], Store], tmp_path: Path) -> None:
    place = f"{use('gs').root}/{tmp_path.name}"
    package = {
        "net.py": "import pack, os",
        "pack/__init__.py": "",
        "pack/deep/a.py": "",
        "pack/data.txt": "",
        "os.py": "",
    }
    files = package | {
        "net.xml": "", "net.bin": "", "net2.bin": "",
        "net.onnx": "", "net.onnx.data": "", "net.onnx_data_1": "", "net.onnx2": "",
        "pz/net.so": "", "pz/weights/0": "", "pz/lib/made.so": "",
    }  # fmt: skip
    for name, content in files.items():
        put_file(place, name, content.encode())

    def fetched(name: str, *, folder: bool = False) -> set[str]:
        path = fetch(f"{place}/{name}", folder=folder)
        root = path if folder else path.parent
        return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}

    assert fetched("net.py") == {"net.py", "os.py", "pack/__init__.py", "pack/deep/a.py"}
    assert fetched("net.xml") == {"net.xml", "net.bin"}
    assert fetched("net.onnx") == {"net.onnx", "net.onnx.data", "net.onnx_data_1"}
    assert fetched("pz", folder=True) == {"net.so", "weights/0"}
    for missing, folder in (("nothing.pt", False), ("nothing", True)):
        with pytest.raises(MissingInputError, match=f"{place}/nothing"):
            fetch(f"{place}/{missing}", folder=folder)


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
    assert [name.partition("/")[2] for name in open_files(place).list()] == ["trial.json"], "no receipt"
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


def test_endpoints_with_buckets_of_the_same_name(use: Callable[[str], Store], tmp_path: Path) -> None:
    store = use("s3")
    with proxy_before(f"http://{store.proxy.upstream}") as other:
        for proxy, content in ((store.proxy, b"one"), (other, b"other")):
            put_file(f"s3://{proxy.url}/{BUCKET}/{tmp_path.name}", "file", content)
            assert proxy.requests[-1] == f"PUT /{BUCKET}/{tmp_path.name}/file"


def test_an_endpoint_by_alias_and_by_variable(
    use: Callable[[str], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Chunkflow
) -> None:
    store = use("s3")
    (tmp_path / "aliases.json").write_text(json.dumps({"minio": {"host": f"s3://{store.proxy.url}/"}}))
    monkeypatch.setenv("CLOUD_FILES_DIR", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.proxy.url)
    spec = spec_for(store, tmp_path, input={"path": f"minio://{BUCKET}/input"})
    place = f"s3://{BUCKET}/{tmp_path.name}"
    changes = [f"output.path={place}/output", f"exchange.path={place}/exchange"]
    outcome = python("-m", "chunkflow_core", "prepare", spec, "--set", changes[0], "--set", changes[1])
    assert outcome.returncode == 0, outcome.stderr
    assert [r for r in store.proxy.requests if r.startswith(f"PUT /{BUCKET}/{tmp_path.name}/output/info")]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input.path", "s3://https://minio.example.org", "expected endpoint, bucket and path"),
        ("input.path", "s3://https://minio.example.org/", "expected endpoint, bucket and path"),
        ("input.path", "gs:///em", "expected a storage path"),
        ("input.path", "minio://bucket/em", "expected a storage path"),
        ("output.path", "https://example.org/em", "not http"),
        ("model.path", "https://example.org/net.py", "expected a path, or an address"),
        ("model.weights", "file://net.pt", "expected a path, or an address"),
    ],
)
def test_addresses_that_are_refused(
    tmp_path: Path, chunkflow: Chunkflow, key: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_FILES_DIR", str(tmp_path))
    store = Store(Proxy(""), f"file://{tmp_path}")
    model = {"engine": "pytorch", "path": "net.py"}
    outcome = chunkflow("plan", spec_for(store, tmp_path, model=model), "--set", f"{key}={value}")
    assert outcome.returncode == 78
    assert message in outcome.stderr and value in outcome.stderr


def test_addresses_that_are_taken(tmp_path: Path) -> None:
    content = yaml.safe_load(spec_for(Store(Proxy(""), "gs://bucket"), tmp_path).read_text())
    for address in ("s3://https://minio.example.org:9000/bucket/em", "precomputed://s3://http://127.0.0.1:1/b/em"):
        assert parse_spec(content | {"input": {"path": address}}).input.path == address


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
