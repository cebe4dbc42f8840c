"""Sources that are larger than memory: a few slabs are held at a time; threads mix nothing up."""

from __future__ import annotations

import logging
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import tifffile
from cloudvolume import CloudVolume
from numpy.typing import NDArray
from PIL import Image

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest import store
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.folder import threads
from chunkflow_core.storage.ingest.sources import open_stack
from chunkflow_core.storage.ingest.tiff import Complaints
from tests.chunkflow_core.storage.test_ingest_headers import write_mrc, write_nifti
from tests.support.flat_files import write_nrrd

CHUNK = (8, 128, 128)


def written(folder: Path, kind: str, data: NDArray[Any]) -> Path:
    file = folder / f"a.{kind}"
    match kind:
        case "png" | "tif":
            (folder / "sections").mkdir()
            for z, section in enumerate(data):
                Image.fromarray(section).save(folder / "sections" / f"{z}.{kind}", compress_level=1)
            return folder / "sections"
        case "nrrd":
            write_nrrd(file, data, encoding="gzip")
        case "nhdr":
            write_nrrd(file, data, encoding="raw", files="LIST")
        case "mrc":
            write_mrc(file, data, stamp=0)
        case _:
            write_nifti(file, data)
    return file


@pytest.mark.long
@pytest.mark.parametrize("kind", ["png", "tif", "nrrd", "nhdr", "mrc", "nii", "nii.gz"])
def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Six slabs are held at most: two, and what it takes to turn and pack them."""
    monkeypatch.setattr(store, "HELD_BYTES", 1)
    data = np.random.default_rng(0).integers(0, 9, (20 * CHUNK[0], 384, 384), np.uint8)
    slab = CHUNK[0] * 384 * 384
    source, layer = written(tmp_path, kind, data), f"file://{tmp_path}/layer"
    np.save(tmp_path / "small.npy", data[:1, :9, :9])
    with closing(open_stack(str(tmp_path / "small.npy"), Choice())) as small:
        store.ingest(small, f"file://{tmp_path}/small", resolution=(40, 4, 4), chunk=CHUNK)  # imports what it needs
    tracemalloc.start()
    try:
        with closing(open_stack(str(source), Choice())) as stack:
            store.ingest(stack, layer, resolution=(40, 4, 4), chunk=CHUNK)
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.asarray(CloudVolume(layer, progress=False)[:, :, :])[..., 0].T, data)
    assert peak < 6 * slab, f"{peak / slab:.1f} slabs"


@pytest.mark.parametrize("harm", ["cut", "other numbers"])
@pytest.mark.parametrize("wrong", [0, 7, 39])
def test_threads_name_the_section_that_is_wrong(tmp_path: Path, wrong: int, harm: str) -> None:
    """Other sections are read at the same time, and tifffile's log is one for all."""
    folder = tmp_path / "sections"
    folder.mkdir()
    data = np.random.default_rng(1).integers(0, 9, (40, 64, 64), np.uint8)
    for z, section in enumerate(data):
        tifffile.imwrite(folder / f"{z}.tif", section, photometric="minisblack", compression="zlib", rowsperstrip=8)
    content = bytearray((folder / f"{wrong}.tif").read_bytes())
    with tifffile.TiffFile(folder / f"{wrong}.tif") as tiff:
        place = tiff.pages[0].dataoffsets[3]
    content[place : place + 20] = b"\xff" * 20
    (folder / f"{wrong}.tif").write_bytes(content if harm == "other numbers" else content[:place])
    assert threads() > 1
    with pytest.raises(DataError, match=rf"/{wrong}\.tif"), closing(open_stack(str(folder), Choice())) as stack:
        stack.read(0, 40)


def test_what_tifffile_logs_is_of_the_file_of_its_thread() -> None:
    """Two threads read files; each meets one complaint, and so does a third, which reads none."""
    log, together = logging.getLogger("tifffile"), Barrier(2)

    def read(name: str) -> list[str]:
        with Complaints() as complaints:
            together.wait()
            log.warning(f"damage in {name}")
            together.wait()
            if name == "a":
                other = Thread(target=log.warning, args=["damage in a strip"])
                other.start()
                other.join()
            together.wait()
        return complaints.texts

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(read, ["a", "b"])
    assert (first[0], second[0]) == ("damage in a", "damage in b")
    assert [*first[1:], *second[1:]] == ["damage in a strip"], "what nobody owns is not lost"
