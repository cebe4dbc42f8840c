"""zarr in object stores: the same voxels and receipts as on a disk, and few requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.clients import open_files
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layers import InputLayer
from chunkflow_core.storage.signatures import LayerSignatures
from tests.support.stores import Store, spec_for
from tests.support.volume import SHAPE, output_of
from tests.support.web import serving
from tests.support.zarrs import random_voxels, write_zarr


def upload(folder: Path, address: str) -> None:
    """Copy a folder into a bucket."""
    files = open_files(address)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            files.put(str(file.relative_to(folder)), file.read_bytes(), cache_control="no-cache")


def opened(address: str) -> InputLayer:
    scale = read_scale(address, 0)
    return InputLayer(address, 0, scale, scale.bounds, padding="constant")


@pytest.mark.parametrize("kind", ["s3", pytest.param("gs", marks=pytest.mark.long)])
def test_pieces_of_shards_and_changes(use: Callable[[str], Store], tmp_path: Path, kind: str) -> None:
    store, voxels = use(kind), random_voxels((16, 32, 32))
    write_zarr(tmp_path, voxels, chunks=(4, 4, 4), shards=(8, 16, 16))
    place = f"{store.root}/{tmp_path.name}.zarr"
    upload(tmp_path, place)
    layer = opened(f"zarr://{place}")
    np.testing.assert_array_equal(layer.read(layer.bounds)[0], voxels)
    store.proxy.clear()
    np.testing.assert_array_equal(layer.read(Box((7, 15, 15), (9, 17, 17)))[0], voxels[7:9, 15:17, 15:17])
    assert sum(store.proxy.counts().values()) == 8 * 3  # of eight shards: their size, their index, a piece
    scale, everything = layer.scale, Box((0, 0, 0), (16, 32, 32))
    before = LayerSignatures(place, scale).digest(everything)
    name = "0/c/1/0/1"
    open_files(place).put(name, (tmp_path / name).read_bytes() + b"x", cache_control="no-cache")
    assert before and LayerSignatures(place, scale).digest(everything) != before


@pytest.mark.long
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_volume_from_zarr_to_zarr(
    use: Callable[[str], Store], tmp_path: Path, kind: str, chunkflow: Callable[..., Any]
) -> None:
    store, voxels = use(kind), random_voxels(SHAPE)
    write_zarr(tmp_path / "em", voxels, chunks=(8, 16, 16))
    upload(tmp_path / "em", f"{store.root}/{tmp_path.name}/em")
    output: dict[str, Any] = {
        "path": f"{store.root}/{tmp_path.name}/output",
        "format": "ome-zarr",
        "compression": "zstd",
    }
    output |= {"chunk_size": [6, 12, 12], "read_chunk_size": [3, 6, 6]}
    spec = spec_for(store, tmp_path, input={"path": f"zarr://{store.root}/{tmp_path.name}/em"}, output=output)
    assert chunkflow("run", spec, "--seams", 1).returncode == 0
    stored: NDArray[Any] = output_of(spec)
    np.testing.assert_array_equal(stored[0], voxels)
    verified = chunkflow("verify", spec, "--deep", "--json")
    assert (verified.returncode, json.loads(verified.stdout)["findings"]) == (0, [])
    planned = json.loads(chunkflow("plan", spec, "--check-input", "--json").stdout)
    assert not planned["infer"] and not planned["blend"]
    (first, *_) = sorted(name for name in open_files(output["path"]).list() if "/c/" in name)
    open_files(output["path"]).delete(first)
    assert chunkflow("verify", spec).returncode != 0
    assert chunkflow("run", spec, "--repair").returncode == 0
    np.testing.assert_array_equal(output_of(spec), stored)
    files = {name: open_files(output["path"]).get(name) for name in open_files(output["path"]).list()}
    assert independent(files)[:].tolist() == stored[0].tolist()


def independent(files: dict[str, bytes]) -> NDArray[Any]:
    """The array of a layer's files, by TensorStore's own eyes."""
    context = tensorstore.Context()
    memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    for name in filter(lambda name: name.startswith("0/"), files):
        memory[name.removeprefix("0/")] = files[name]
    opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "memory"}}, context=context, open=True)
    return np.asarray(opened.result().read().result())


@pytest.mark.parametrize("version", [2, 3])
def test_a_bucket_that_may_not_be_listed(use: Callable[[str], Store], tmp_path: Path, version: int) -> None:
    """S3 refuses whoever may not list it what isn't there: 403 instead of 404."""
    use("s3")  # credentials
    voxels = random_voxels((4, 6, 8))
    write_zarr(tmp_path / "lab/em", voxels, chunks=(4, 4, 4), version=version)
    array = zarr.create_array(store=tmp_path / "lab/plain", data=voxels, chunks=(4, 4, 4), zarr_format=version)  # type: ignore[arg-type]
    assert array.shape == voxels.shape
    with serving(partial(Unlisted, directory=str(tmp_path))) as url:
        for name in ("zarr://{}/em", f"zarr{version}://{{}}/em", "zarr://{}/em/0", "zarr://{}/plain"):
            layer = opened(name.format(f"s3://{url}/lab"))
            np.testing.assert_array_equal(layer.read(layer.bounds)[0], voxels)
        with pytest.raises(SpecError, match="refuses"):
            opened(f"zarr://s3://{url}/lab/nothing")


class Unlisted(SimpleHTTPRequestHandler):
    """A bucket's objects, as S3 answers for them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        content = file.read_bytes() if file.is_file() else b"<Error><Code>AccessDenied</Code></Error>"
        self.send_response(200 if file.is_file() else 403)
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Last-Modified", "Sun, 29 Nov 2020 11:28:30 GMT")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""
