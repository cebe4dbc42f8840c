"""Files appear whole, and once."""

from __future__ import annotations

import os
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from cloudvolume import CloudVolume

from chunkflow_core.__main__ import main
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.disk import delete_partials
from chunkflow_core.storage.files import put_file
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import open_layer
from tests.support.volume import write_volume
from tests.support.web import serving


@pytest.mark.parametrize("compression", ["gzip", "br", "zstd", "none"])
def test_cloudvolume_reads_what_is_written(tmp_path: Path, compression: str) -> None:
    output = {"path": f"file://{tmp_path}/output", "channels": 2, "chunk_size": [4, 8, 8], "compression": compression}
    path = write_volume(tmp_path, output=output)
    assert main(["run", str(path)]) == 0

    volume = CloudVolume(f"file://{tmp_path}/output", progress=False)
    stored = np.asarray(volume[:, :, :])

    source = np.asarray(CloudVolume(f"file://{tmp_path}/input", progress=False)[:, :, :])
    np.testing.assert_array_equal(stored, np.concatenate([source, source], axis=3))
    np.testing.assert_array_equal(Workspace(load_spec(path)).output.read(load_spec(path).grid.roi), stored.T)


def test_a_file_in_another_compression_is_replaced(tmp_path: Path) -> None:
    place = f"file://{tmp_path}"
    put_file(place, "scale/chunk", b"first", compression="br")
    put_file(place, "scale/chunk", b"second", compression="gzip")

    assert [file.name for file in (tmp_path / "scale").iterdir()] == ["chunk.gz"]
    assert (tmp_path / "scale" / "chunk.gz").read_bytes() == b"second"


def test_only_old_partial_files_are_deleted(tmp_path: Path) -> None:
    old, new, other = tmp_path / ".a.partial", tmp_path / ".b.partial", tmp_path / "c"
    for file in (old, new, other):
        file.write_bytes(b"")
    for file in (old, other):
        os.utime(file, (time.time() - 100, time.time() - 100))

    delete_partials(f"file://{tmp_path}", older_than=50)

    assert not old.exists()
    assert new.exists() and other.exists()


def test_single_voxels_by_cloudvolume(tmp_path: Path) -> None:
    """Asked for one voxel of several channels, CloudVolume gives one channel of another voxel."""
    voxels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 8), dtype=np.uint8)
    info = CloudVolume.create_new_info(
        2, "image", "uint8", "raw", (4, 4, 40), (0, 0, 0), (8, 8, 8), chunk_size=(8, 8, 8)
    )
    volume = CloudVolume(f"file://{tmp_path}", info=info, progress=False, compress=False)
    volume.commit_info()
    volume[:, :, :] = voxels.T
    with serving(partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as address:
        layer = open_layer(address, read_scale(address, 0))
        for z, y, x in [(0, 0, 0), (3, 1, 6), (7, 7, 7)]:
            voxel = layer.read(Box((z, y, x), (z + 1, y + 1, x + 1)))
            np.testing.assert_array_equal(voxel, voxels[:, z : z + 1, y : y + 1, x : x + 1])
