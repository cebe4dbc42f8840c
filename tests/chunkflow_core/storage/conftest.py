"""Object stores for the tests that need one, and what has to stand there in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudfiles.interfaces import reset_connection_pools
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.files import put_file
from chunkflow_core.storage.layers import NewLayer
from chunkflow_core.storage.model_files import fetch
from tests.support.object_storage import BUCKET, Proxy, gcs_server, proxy_before, s3_server
from tests.support.stores import CREDENTIALS, Store, models, spec_for
from tests.support.volume import SHAPE, output_of

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
        reset_connection_pools()  # of the file before, whose servers are gone
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
