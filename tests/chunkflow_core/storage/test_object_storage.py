"""Input, output and exchange in object storage: the bits are the same, and requests are few."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.exchange.leases import Lease
from chunkflow_core.reports import manifest
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.output import open_output
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.clients import located, open_files
from tests.support.stores import Store, spec_for
from tests.support.volume import output_of

Chunkflow = Callable[..., CompletedProcess[str]]


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
    assert header(exchange, f"donations/0_0_0/0_0_0/{donation}") == (None, "no-cache", "application/octet-stream")
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

    It takes another for each layer's ``info``, and for the file of reference patches, and few
    listings. The output's claims are listed once, and the last one is read; two requests at a time
    tell that it still is the last: at first, before each piece that is written, and before the
    receipt. So are its leases, if the stage is part of a run. Other listings are of the block's
    receipts (to find, and to retract them), of its donations, and of the input's storage chunks,
    before they are read and afterwards. Of what it has written nothing is asked.
    """
    store = use(kind)
    path = spec_for(store, tmp_path)
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    for index in spec.grid.indices():
        inference_and_donate(Workspace(load_spec(path)), index)
    Lease(spec, "run").take()
    store.proxy.clear()
    write = {"s3": "PUT", "gs": "POST list"}[kind]
    workspace = Workspace(load_spec(path))
    workspace.lease = Lease(workspace.spec, "run")

    result = inference_and_donate(workspace, (0, 0, 0), why="forced").receipt
    assert result is not None
    given = sum(entry.checksum is not None for entry in result.donations)
    counts = store.proxy.counts()
    pieces = sum(bool(piece.core) for piece in spec.grid.pieces(spec.grid.block((0, 0, 0))))
    reads = {"GET info": 2, "GET list claims": 1, "GET claims": 1 + 2 * (2 + pieces), "GET receipts": 1, "GET chunk": 8}
    reads |= {"GET list leases": 1, "GET leases": 1 + 2 * (1 + pieces)}  # the first look lists
    reads |= {"GET list receipts": 2, "GET list donations": 1, "GET list other": 4, "GET other": 1}
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
    reads = {"GET info": 2, "GET list claims": 1, "GET claims": 7, "GET receipts": 8, "GET donations": received}
    reads |= {"GET list receipts": 10}
    written = sum(count for what, count in counts.items() if what.startswith(write))
    assert {what: count for what, count in counts.items() if what.startswith("GET")} == reads
    assert written == blended.storage_chunks + 1
    assert counts.total() == sum(reads.values()) + written
