"""A model in object storage: which of its files are fetched, and when again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.errors import MissingInputError
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
