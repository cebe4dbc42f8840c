"""What a store says of a storage chunk when that is written is what it says when asked later."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.errors import StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.files import open_files, put_file
from chunkflow_core.storage.layers import InputLayer, OutputLayer
from tests.support.object_storage import Proxy
from tests.support.stores import Store, spec_for

from .conftest import write_input

Use = Callable[[str], Store]


@pytest.fixture(params=["file", "s3", pytest.param("gs", marks=pytest.mark.long)])
def path(request: pytest.FixtureRequest, use: Use, tmp_path: Path) -> Path:
    """The spec of a finished volume."""
    if request.param == "file":
        store = Store(Proxy(""), f"file://{tmp_path}")
        write_input(store)
    else:
        store = use(request.param)
    spec = spec_for(store, tmp_path)
    assert main(["run", str(spec), "--seams", "0", "--set", "exchange.donations=keep"]) == 0
    return spec


def due(spec: VolumeSpec) -> Plan:
    return plan(spec, Request(check_input=True), Workspace(spec).state())


def test_it_says_the_same(path: Path) -> None:
    """However it is asked: by one listing of all, or for some storage chunks."""
    spec = load_spec(path)
    layer = Workspace(spec).output
    whole, one = layer.signatures(), layer.signatures()
    assert whole.load_all() == []
    chunks = 0
    for receipt in Exchange(spec).all_receipts():
        for name, chunk in receipt.written.items():
            one.load([Box.from_key(name)])
            assert chunk.stored == whole.number(name) == one.number(name) > 1
            chunks += 1
    assert chunks == sum(1 for _ in layer.expected_chunks(spec.grid.roi))


def test_what_is_written_or_deleted_since(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(path, ["exchange.donations=keep"])
    layer, (first, *_, last) = Workspace(spec).output, list(Workspace(spec).output.expected_chunks(spec.grid.roi))
    with monkeypatch.context() as patch:
        patch.setattr(OutputLayer, "digest", pytest.fail)
        assert due(spec) == Plan((), (), tuple(spec.grid.indices())), "a listing is enough"
    assert main(["verify", str(path), "--seams", "0"]) == 0
    healthy = layer.read(spec.grid.roi)

    layer.write(first, layer.read(first) + 1)
    layer.delete_chunks([last.key])

    assert main(["verify", str(path), "--seams", "0"]) == 65
    assert due(spec).why == {(0, 0, 0): "output", (1, 1, 1): "output"}
    assert main(["run", str(path), "--check-input", "--seams", "0", "--set", "exchange.donations=keep"]) == 0
    np.testing.assert_array_equal(layer.read(spec.grid.roi), healthy)


def test_an_input_that_changes_and_changes_back_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a store says of the content is the same then, so that the write itself has to tell."""
    spec = load_spec(path)
    place, read = spec.input.path, InputLayer.read
    (name,) = [name for name in open_files(place).list() if name.endswith("/0-20_0-24_0-10")]
    raw = open_files(place).get([name], raw=True)[0]
    written = time.time()
    while int(time.time()) <= int(written) + 1:  # S3 tells the second
        time.sleep(0.01)

    def changed_and_back(layer: InputLayer, box: Box) -> NDArray[Any]:
        put_file(place, name, bytes(4800))
        try:
            return read(layer, box)
        finally:
            put_file(place, name, raw["content"], compression=raw["compress"])

    with monkeypatch.context() as patch:
        patch.setattr(InputLayer, "read", changed_and_back)
        with pytest.raises(StorageError, match="was changed while it was read"):
            inference_and_donate(Workspace(spec), (0, 0, 0), why="forced")
    assert main(["run", str(path), "--check-input", "--seams", "0"]) == 0
    assert main(["verify", str(path)]) == 0


def test_what_lies_among_the_storage_chunks(path: Path) -> None:
    """A stray is told by name; what is in a subfolder is somebody else's."""
    spec = load_spec(path)
    layer = Workspace(spec).output
    key = layer.scale.info["scales"][0]["key"]
    for name in ("notes.txt", "0-1_0-1_0-1", "kept/0-12_0-12_0-6"):
        put_file(spec.output.path, f"{key}/{name}", b"something")

    assert sorted(layer.signatures().load_all()) == ["0-1_0-1_0-1", "notes.txt"]


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_questions_only_read(use: Use, tmp_path: Path, kind: str) -> None:
    store = use(kind)
    path = spec_for(store, tmp_path)
    assert main(["run", str(path), "--seams", "0"]) == 0
    first = next(Workspace(load_spec(path)).output.expected_chunks(load_spec(path).grid.roi))
    Workspace(load_spec(path)).output.delete_chunks([first.key])
    store.proxy.clear()

    for question in ("plan --check-input", "verify --deep", "report"):
        command, *options = question.split()
        main([command, str(path), *options])

    assert store.proxy.requests
    assert {request.partition(" ")[0] for request in store.proxy.requests} <= {"GET", "HEAD"}
