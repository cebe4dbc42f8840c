"""Files appear whole, and once."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from cloudvolume import CloudVolume

from chunkflow_core.__main__ import main
from chunkflow_core.audit.audit import repair, verify
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


def test_only_what_is_in_its_place_is_a_storage_chunk(tmp_path: Path) -> None:
    """What lies in a subfolder is no storage chunk, whatever its name, and it is left alone."""
    path = write_volume(tmp_path)
    assert main(["run", str(path), "--seams", "0"]) == 0
    scale = tmp_path / "output" / "4_4_40"
    lost, copied = "0-8_0-8_0-4", "8-16_0-8_0-4"
    (scale / "backup" / "old").mkdir(parents=True)
    (scale / f"{lost}.gz").rename(scale / "backup" / f"{lost}.gz")
    shutil.copy(scale / f"{copied}.gz", scale / "backup" / "old")

    found = verify(Workspace(load_spec(path)), seams=0).findings
    assert {(finding.kind, finding.subject) for finding in found} == {("missing chunk", lost)}

    assert repair(Workspace(load_spec(path))) == {(0, 0, 0)}
    assert main(["run", str(path), "--seams", "0"]) == 0
    assert verify(Workspace(load_spec(path)), seams=0, deep=True).findings == []
    assert len([file for file in (scale / "backup").rglob("*") if file.is_file()]) == 2


def test_a_layer_is_made_where_a_crash_left_an_empty_info(tmp_path: Path) -> None:
    """What is left of ``provenance`` may be no JSON. Neither file is written in place."""
    path, output = write_volume(tmp_path), tmp_path / "output"
    output.mkdir()
    (output / "info").touch()
    (output / "provenance").write_text('{"sources": [')
    for name in ("info", "provenance"):
        (tmp_path / name).hardlink_to(output / name)

    assert main(["prepare", str(path)]) == 0

    assert (tmp_path / "info").read_text() == "", "another file has taken its place"
    assert (tmp_path / "provenance").read_text() == '{"sources": ['
    volume = CloudVolume(f"file://{output}", progress=False)
    assert volume.info["scales"][0]["size"] == [40, 48, 20]
    assert [step["method"]["mode"] for step in volume.provenance.processing] == ["new"]
    assert (volume.provenance.sources, volume.provenance.owners) == ([f"file://{tmp_path}/input"], [])
    assert main(["run", str(path), "--seams", "0"]) == 0


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
