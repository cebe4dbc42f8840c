"""A model in object storage: which of its files are fetched, and when again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.engines import load_engine
from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.files import put_file
from chunkflow_core.storage.model_files import fetch
from tests.support.object_storage import BUCKET
from tests.support.stores import Store, models, spec_for
from tests.support.volume import output_of


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


def onnx_with(*locations: str) -> bytes:
    """An ONNX file whose tensors are in other files."""
    model = onnx.ModelProto()
    for location in locations:
        tensor = model.graph.initializer.add(data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
    content: bytes = model.SerializeToString()
    return content


def test_a_listed_file_of_a_model_in_storage(use: Callable[[str], Store], tmp_path: Path) -> None:
    """It is fetched to where the network opens it, and is in the fingerprint."""
    place = f"{use('s3').root}/{tmp_path.name}"
    text = "import pathlib, torch\nSHIFT = float((pathlib.Path(__file__).parent / 'parts/shift').read_text())\n"
    put_file(place, "net.py", f"{text}def InstantiatedModel(x): return torch.sigmoid(x + SHIFT)\n".encode())
    put_file(place, "parts/shift", b"0.5")
    path = spec_for(use("s3"), tmp_path, model={"engine": "pytorch", "path": f"{place}/net.py"})
    with pytest.raises(SpecError, match=r"parts/shift.* has to stand in model\.files"):
        load_engine(load_spec(path))
    listed = [f'model.files=["{place}/parts/*"]']
    fingerprint = load_spec(path, listed).fingerprint
    assert main(["prepare", str(path), "--set", *listed]) == 0
    put_file(place, "parts/shift", b"0.25")
    fetch.cache_clear()
    assert load_spec(path, listed).fingerprint != fingerprint


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
        "net.onnx.data": "", "conv.weight": "", "parts/0": "", "net.onnx_data_1": "", "net.onnx2": "",
        "pz/net.so": "", "pz/weights/0": "", "pz/lib/made.so": "",
        "settings/a.json": "", "settings/b.json": "", "settings/deep/c.json": "", "settings/__pycache__/d.json": "",
    }  # fmt: skip
    for name, content in files.items():
        put_file(place, name, content.encode())
    put_file(place, "net.onnx", onnx_with("net.onnx.data", "conv.weight", "./parts/0"))
    put_file(place, "torn.onnx", onnx_with("gone"))

    def fetched(name: str, *files: str, folder: bool = False) -> set[str]:
        path = fetch(f"{place}/{name}", folder=folder, files=files)
        root = path if folder else path.parent
        return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}

    assert fetched("net.py") == {"net.py", "os.py", "pack/__init__.py", "pack/deep/a.py"}
    assert fetched("net.xml") == {"net.xml", "net.bin"}
    assert fetched("net.onnx") == {"net.onnx", "net.onnx.data", "conv.weight", "parts/0"}
    with pytest.raises(MissingInputError, match=f"there is no {place}/gone, where torn.onnx says that it has tensors"):
        fetched("torn.onnx")
    assert fetched("pz", folder=True) == {"net.so", "weights/0"}
    known = fetched("net.py")
    listed = {
        "settings/a.json": {"a.json"},
        "settings/*.json": {"a.json", "b.json"},
        "settings/**": {"a.json", "b.json", "deep/c.json"},
        "**/?.json": {"a.json", "b.json", "deep/c.json"},
        "settings/*/[ce].json": {"deep/c.json"},
    }
    for name, found in listed.items():
        assert fetched("net.py", name) - known == {f"settings/{file}" for file in found}, name
    with pytest.raises(MissingInputError, match=f"model.files: there is no file {place}/settings/nothing"):
        fetched("net.py", "settings/nothing")
    for missing, folder in (("nothing.pt", False), ("nothing", True)):
        with pytest.raises(MissingInputError, match=f"{place}/nothing"):
            fetch(f"{place}/{missing}", folder=folder)
