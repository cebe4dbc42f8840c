"""HDF5 reads fill values for what is not there; a layer is made only of what is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from numpy.typing import NDArray

from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError, UsageError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.sources import open_stack

DATA = np.random.default_rng(3).integers(1, 200, (12, 8, 10), np.uint8)
BLOCKING = "import sys; sys.modules['hdf5plugin'] = None; from chunkflow_core.__main__ import main; sys.exit(main())"


def whole(source: object, **choice: Any) -> NDArray[Any]:
    stack = open_stack(str(source), Choice(**choice))
    found = stack.read(0, stack.shape[0])
    stack.close()
    return found


def check_refused(source: object, kind: type[ChunkflowError], *pieces: str, **choice: Any) -> None:
    with pytest.raises(kind) as caught:
        whole(source, **choice)
    for piece in pieces:
        assert piece in str(caught.value)


# ------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"fillvalue": 7}, {"maxshape": (None, 8, 10)}])
@pytest.mark.parametrize("written", [slice(0, 8), slice(4, 12), slice(0, 0)])
def test_chunks_that_were_never_written(tmp_path: Path, options: dict[str, Any], written: slice) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("raw", DATA.shape, "u1", chunks=(4, 8, 5), **options)
        if written.stop:
            dataset[written] = DATA[written]
    lost = 6 - 2 * len(range(*written.indices(12))) // 4
    first = 8 if written.start == 0 and written.stop else 0
    check_refused(tmp_path / "a.h5", DataError, f"{lost} of 6 chunks", f"at ({first}, 0, 0)", "--gaps blank")
    expected = np.full_like(DATA, options.get("fillvalue", 0))
    expected[written] = DATA[written]
    np.testing.assert_array_equal(whole(tmp_path / "a.h5", gaps="blank"), expected)


def test_a_dataset_in_one_piece_that_was_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", DATA.shape, "u1")
    check_refused(tmp_path / "a.h5", DataError, "a.h5:raw", "never written")


@pytest.mark.parametrize("lost", ["file", "dataset", "rows", "chunks", "mapping"])
def test_virtual_sources(tmp_path: Path, lost: str) -> None:
    """Each third of the dataset lies in a file; in the second one, something is wrong."""
    layout = h5py.VirtualLayout(DATA.shape, "u1")
    for number in range(3):
        with h5py.File(tmp_path / f"part{number}.h5", "w") as file:
            file.create_dataset("raw", data=DATA[4 * number : 4 * number + 4], chunks=(1, 8, 10))
        layout[4 * number : 4 * number + 4] = h5py.VirtualSource(f"part{number}.h5", "raw", (4, 8, 10))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("raw", layout)
    np.testing.assert_array_equal(whole(tmp_path / "a.h5"), DATA)
    kind: type[ChunkflowError] = MissingInputError if lost in ("file", "dataset") else DataError
    (tmp_path / "part1.h5").unlink()
    if lost != "file":
        with h5py.File(tmp_path / "part1.h5", "w") as file:
            rows = 3 if lost == "rows" else 4
            dataset = file.create_dataset(
                "other" if lost == "dataset" else "raw", (rows, 8, 10), "u1", chunks=(1, 8, 10)
            )
            dataset[: 2 if lost == "chunks" else rows] = 1
    if lost == "mapping":
        layout = h5py.VirtualLayout(DATA.shape, "u1")
        layout[:4] = h5py.VirtualSource("part0.h5", "raw", (4, 8, 10))
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_virtual_dataset("raw", layout)
    check_refused(tmp_path / "a.h5", kind, "a.h5:raw", "(4, 0, 0)" if lost == "mapping" else "part1.h5")


@pytest.mark.parametrize("lost", ["file", "bytes"])
def test_raw_bytes_in_other_files(tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(DATA.tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", DATA.shape, "u1", external=[("a.bin", 0, DATA.nbytes)])
    np.testing.assert_array_equal(whole(tmp_path / "a.h5"), DATA)
    (tmp_path / "a.bin").write_bytes(DATA.tobytes()[:-1])
    if lost == "file":
        (tmp_path / "a.bin").unlink()
    check_refused(tmp_path / "a.h5", MissingInputError, "a.h5:raw", "a.bin")


def test_links(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["data"] = DATA
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = h5py.ExternalLink("b.h5", "data")
        file["same"] = h5py.SoftLink("/raw")
    np.testing.assert_array_equal(whole(tmp_path / "a.h5"), DATA)
    (tmp_path / "b.h5").unlink()
    check_refused(f"{tmp_path}/a.h5:raw", MissingInputError, "a.h5", "raw", "b.h5")
    check_refused(tmp_path / "a.h5", UsageError, "['raw', 'same']")


# ---------------------------------------------------------------------------------- axes, filters


@pytest.mark.parametrize("shape", [(1, 12, 8, 10), (12, 8, 10, 1), (1, 1, 12, 8, 10), (12, 1, 8, 10)])
def test_axes_of_one_element_are_passed_over(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = DATA.reshape(shape)
    np.testing.assert_array_equal(whole(tmp_path / "a.h5"), DATA)


@pytest.mark.parametrize("order", ["CZYX", "ZYXC", "XYZC", "TCZYX", "XYZ", "ZXY"])
@pytest.mark.parametrize("by", ["labels", "axistags", "option"])
def test_axes_are_as_the_file_or_the_user_says(tmp_path: Path, order: str, by: str) -> None:
    full = np.stack([np.stack([DATA + 10 * c + t for c in range(3)]) for t in range(2)])  # t c z y x
    data = full[tuple(slice(None) if axis in order else 0 for axis in "TC")]
    data = data.transpose([[a for a in "TCZYX" if a in order].index(axis) for axis in order])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = data
        if by == "labels":
            for dimension, axis in zip(file["raw"].dims, order, strict=True):
                dimension.label = axis.lower()
        if by == "axistags":
            file["raw"].attrs["axistags"] = json.dumps({"axes": [{"key": axis.lower()} for axis in order]})
    said = {"axes": order} if by == "option" else {}
    chosen = {name: 1 for letter, name in {"C": "channel", "T": "time"}.items() if letter in order}
    if chosen:
        check_refused(tmp_path / "a.h5", DataError, "a.h5:raw", "--", **said)
    expected = DATA + 10 * chosen.get("channel", 0) + chosen.get("time", 0)
    np.testing.assert_array_equal(whole(tmp_path / "a.h5", **said, **chosen), expected)


def test_axes_that_nobody_names(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = np.zeros((2, 12, 8, 10), "u1")
        file["flat"] = np.zeros((5, 1, 6, 1), "u1")
    check_refused(f"{tmp_path}/a.h5:raw", DataError, "4 dimensions (2, 12, 8, 10)", "--axes CZYX --channel 0")
    check_refused(f"{tmp_path}/a.h5:flat", DataError, "4 dimensions (5, 1, 6, 1)", "--axes")
    check_refused(f"{tmp_path}/a.h5:raw", UsageError, "names 3 axes", axes="ZYX")


@pytest.mark.parametrize("plugin", ["Blosc", "Zstd", "LZ4", "Bitshuffle", "BZip2"])
def test_filters_of_hdf5plugin(tmp_path: Path, plugin: str) -> None:
    """In processes of their own, since a filter that was imported stays."""
    np.save(tmp_path / "a.npy", np.repeat(DATA, 30, axis=2))
    text = (
        "import h5py, hdf5plugin, numpy as np; file = h5py.File('a.h5', 'w'); "
        f"file.create_dataset('raw', data=np.load('a.npy'), chunks=(4, 8, 300), **hdf5plugin.{plugin}())"
    )
    subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=120)
    np.testing.assert_array_equal(whole(tmp_path / "a.h5"), np.load(tmp_path / "a.npy"))


def test_a_filter_that_is_missing(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", data=np.repeat(DATA, 30, axis=2), chunks=(4, 8, 300), **hdf5plugin.Zstd())
    arguments = ["ingest", tmp_path / "a.h5", f"file://{tmp_path}/layer", "--voxel-size", "40", "4", "4"]
    outcome = subprocess.run(
        [sys.executable, "-c", BLOCKING, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.returncode == 78, outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    for piece in ("a.h5:raw", "32015", "pip install hdf5plugin"):
        assert piece in outcome.stderr
    assert not (tmp_path / "layer").exists()


# ------------------------------------------------------------------------------ nothing is left


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_layer_is_there_once_it_is_whole(
    tmp_path: Path, overwrite: bool, chunkflow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that is damaged in its last part leaves no layer, and nothing of one."""
    monkeypatch.setattr("chunkflow_core.storage.ingest.store.HELD_BYTES", 1)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", data=DATA, chunks=(4, 8, 10), compression="gzip", fletcher32=True)
    sizes = ["--voxel-size", 40, 4, 4, "--chunk-size", 4, 8, 8]
    call = ["ingest", tmp_path / "a.h5", f"file://{tmp_path}/layer", *sizes]
    if overwrite:
        assert chunkflow(*call).returncode == 0
        call.append("--overwrite")
    with h5py.File(tmp_path / "a.h5") as file:
        last = file["raw"].id.get_chunk_info_by_coord((8, 0, 0))
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[last.byte_offset + 9 : last.byte_offset + 60] = bytes(51)
    (tmp_path / "a.h5").write_bytes(content)
    outcome = chunkflow(*call)
    assert outcome.returncode == 65, outcome.stderr
    assert "sections 8–12 can't be read" in outcome.stderr
    assert not (tmp_path / "layer").exists()
