"""Axes and voxel sizes of zarr and N5 as writers in the field say them, and what goes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.signatures import LayerSignatures
from tests.chunkflow_core.storage.test_zarr_layers import add, edit, opened, read_all, write_n5
from tests.support.volume import output_of, write_volume
from tests.support.zarrs import random_voxels, write_zarr

Command = Callable[..., Any]
COSEM = {"axes": ["z", "y", "x"], "scale": [40, 4, 4], "translate": [80, 4, 8], "units": ["nm"] * 3}


def array(folder: Path, shape: tuple[int, ...] = (4, 6, 8), version: int = 3, **attributes: Any) -> str:
    """A plain array with attributes; returns its address."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = zarr.create_array(
        store=folder,
        shape=shape,
        chunks=(2,) * len(shape),
        dtype="uint8",
        zarr_format=version,  # type: ignore[arg-type]
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
    made[:] = random_voxels(shape)
    return f"zarr://file://{folder}"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cosems_transform_beside_zarr(tmp_path: Path, version: int, order: str) -> None:
    address = array(tmp_path / "raw", version=version, transform=COSEM | {"order": order})
    voxels = random_voxels((4, 6, 8))
    scale, expected = read_scale(address, 0), voxels if order == "C" else voxels.T
    assert (scale.resolution, scale.bounds.start) == ((40, 4, 4), (2, 1, 2))
    np.testing.assert_array_equal(read_all(address)[0], expected)


@pytest.mark.parametrize("order", ["C", "F"])
def test_cosems_transform_beside_n5(tmp_path: Path, order: str) -> None:
    voxels = random_voxels((4, 6, 8))
    write_n5(tmp_path / "raw", voxels)
    add(tmp_path / "raw/attributes.json", transform=COSEM | {"order": order})
    expected = voxels.T if order == "C" else voxels
    np.testing.assert_array_equal(read_all(f"n5://file://{tmp_path}/raw")[0], expected)


def test_axes_of_n5_are_in_the_order_of_its_dimensions(tmp_path: Path) -> None:
    voxels = random_voxels((2, 6, 5, 4))
    write_n5(tmp_path / "raw", voxels, blockSize=[2, 4, 4, 4])
    attributes = {"axes": ["c", "x", "y", "z"], "resolution": [1, 4, 4, 40], "units": ["", "nm", "nm", "nm"]}
    add(tmp_path / "raw/attributes.json", **attributes)
    address = f"n5://file://{tmp_path}/raw"
    assert read_scale(address, 0).resolution == (40, 4, 4)
    np.testing.assert_array_equal(read_all(address), voxels.transpose(0, 3, 2, 1))


@pytest.mark.parametrize("axes", ["zyxc", "xyz", "cyx", "czyx"])
def test_an_array_of_an_image_has_the_images_axes(tmp_path: Path, axes: str) -> None:
    shape = tuple({"z": 4, "y": 5, "x": 6, "c": 2}[axis] for axis in axes)
    write_zarr(tmp_path / "images/em", random_voxels(shape), chunks=(2,) * len(axes), axes=axes)
    whole, alone = (f"zarr://file://{tmp_path}/images/em{end}" for end in ("", "/0"))
    assert read_scale(alone, 0).resolution == read_scale(whole, 0).resolution
    np.testing.assert_array_equal(read_all(alone), read_all(whole))


def test_time_is_not_taken_for_channels(tmp_path: Path) -> None:
    write_zarr(tmp_path / "em", random_voxels((2, 4, 4, 4)), chunks=(1, 4, 4, 4), axes="tzyx")
    for end in ("", "/0"):
        with pytest.raises(MissingInputError, match="2 time points"):
            read_scale(f"zarr://file://{tmp_path}/em{end}", 0)


@pytest.mark.parametrize("names", [["x", "y", None], ["cell_z", "cell_y", "cell_x"], ["tomogram", "y", "x"]])
def test_names_that_are_none_of_an_axis_are_refused(tmp_path: Path, names: list[str | None]) -> None:
    write = zarr.create_array(store=tmp_path / "raw", shape=(4, 4, 4), dtype="uint8", dimension_names=names)
    write[:] = 1
    with pytest.raises(MissingInputError, match="expected names such as z, y, x"):
        read_scale(f"zarr://file://{tmp_path}/raw", 0)


SIZES: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[float, ...]]] = {
    "a unit of each axis": ((4, 6, 8), {"resolution": [0.04, 4, 4], "units": ["um", "nm", "nm"]}, (40, 4, 4)),
    "channels with a unit": (
        (2, 4, 6, 8),
        {"resolution": [1, 0.04, 0.004, 0.004], "units": ["", "um", "um", "um"]},
        (40, 4, 4),
    ),
    "channels last": (
        (4, 6, 8, 2),
        {"axis_names": ["z", "y", "x", "c^"], "resolution": [40, 4, 6, 1], "units": "nm"},
        (40, 4, 6),
    ),
    "quantities": ((4, 6, 8), {"dimension_units": ["40 nm", [0.004, "um"], "4 nanometers"]}, (40, 4, 4)),
    "British": ((4, 6, 8), {"resolution": [40, 4, 4], "units": "nanometres"}, (40, 4, 4)),
    "a large prefix": ((4, 6, 8), {"resolution": [40, 4, 4], "units": "Mm"}, (0, 0, 0)),
    "factors beside a resolution": (
        (4, 6, 8),
        {"pixelResolution": {"unit": "nm", "dimensions": [40, 4, 4]}, "downsamplingFactors": [1, 2, 2]},
        (40, 8, 8),
    ),
}


@pytest.mark.parametrize("how", SIZES)
def test_voxel_sizes(tmp_path: Path, how: str) -> None:
    shape, attributes, size = SIZES[how]
    assert read_scale(array(tmp_path / "raw", shape, **attributes), 0).resolution == pytest.approx(size)


@pytest.mark.parametrize(
    ("changes", "size"),
    [([], 0), ([{"type": "identity"}], 0), ([{"type": "scale", "scale": [8, 8, 8]}], 8)],
)
def test_a_size_that_is_not_said_is_none(tmp_path: Path, changes: list[Any], size: float) -> None:
    write_zarr(tmp_path, random_voxels((4, 4, 4)), chunks=(2, 2, 2))
    edit(tmp_path / "zarr.json", lambda c: datasets(c)[0].update(coordinateTransformations=changes))
    assert read_scale(f"zarr://file://{tmp_path}", 0).resolution == (size,) * 3


def datasets(content: dict[str, Any]) -> Any:
    return content["attributes"]["ome"]["multiscales"][0]["datasets"]


@pytest.mark.parametrize("scale", [[8], 8, [8, 8], ["8", "x", "8"]])
def test_a_scale_of_too_few_numbers_is_refused(tmp_path: Path, scale: Any) -> None:
    write_zarr(tmp_path, random_voxels((4, 4, 4)), chunks=(2, 2, 2))
    change = [{"type": "scale", "scale": scale}]
    edit(tmp_path / "zarr.json", lambda c: datasets(c)[0].update(coordinateTransformations=change))
    with pytest.raises(MissingInputError, match="can't be understood"):
        read_scale(f"zarr://file://{tmp_path}", 0)


def test_pieces_that_are_left_out_of_a_shard(tmp_path: Path) -> None:
    """zarr-python leaves out what is full of the fill value."""
    voxels = random_voxels((8, 8, 8))
    voxels[:4, :4, 4:] = 0
    sparse = zarr.create_array(store=tmp_path / "0", data=voxels, chunks=(4, 4, 4), shards=(8, 8, 8))
    assert sparse.shape == voxels.shape
    layer = opened(f"zarr://file://{tmp_path}/0")
    for box in (layer.bounds, Box((0, 0, 4), (4, 4, 8)), Box((1, 1, 5), (2, 2, 6)), Box((0, 0, 0), (8, 8, 7))):
        np.testing.assert_array_equal(layer.read(box)[0], voxels[box.slices((0, 0, 0))])


def test_codecs_as_other_writers_write_them(tmp_path: Path) -> None:
    voxels = random_voxels((4, 4, 4))
    write_n5(tmp_path / "n5", voxels, compression={"type": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1})
    change = {"type": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0, "nthreads": 1}
    add(tmp_path / "n5/attributes.json", compression=change)
    np.testing.assert_array_equal(read_all(f"n5://file://{tmp_path}/n5")[0], voxels.T)
    write_n5(tmp_path / "zstd", voxels, compression={"type": "zstd", "level": 3})
    add(tmp_path / "zstd/attributes.json", compression={"type": "zstandard", "level": 3, "nbWorkers": 2})
    np.testing.assert_array_equal(read_all(f"n5://file://{tmp_path}/zstd")[0], voxels.T)
    array(tmp_path / "three")
    edit(tmp_path / "three/zarr.json", lambda c: c.update(codecs=["bytes", *c["codecs"][1:]], node_type="group"))
    np.testing.assert_array_equal(read_all(f"zarr://file://{tmp_path}/three")[0], random_voxels((4, 6, 8)))
    write_zarr(tmp_path / "two", voxels, chunks=(2, 2, 2), version=2, compressors=None)
    edit(tmp_path / "two/0/.zarray", lambda c: [c.pop(key) for key in ("filters", "compressor")])
    np.testing.assert_array_equal(read_all(f"zarr://file://{tmp_path}/two")[0], voxels)


@pytest.mark.parametrize("version", [2, 3])
def test_masks_of_truth_values(tmp_path: Path, version: int) -> None:
    mask = random_voxels((4, 4, 4)) > 100
    write_zarr(tmp_path, mask, chunks=(2, 2, 2), version=version)
    read = read_all(f"zarr://file://{tmp_path}")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read[0], mask)


def test_an_empty_file_is_missing_where_that_is_allowed(tmp_path: Path) -> None:
    voxels = random_voxels((4, 4, 4))
    write_zarr(tmp_path, voxels, chunks=(2, 2, 2))
    (tmp_path / "0/c/0/0/0").write_bytes(b"")
    voxels[:2, :2, :2] = 0
    np.testing.assert_array_equal(read_all(f"zarr://file://{tmp_path}", fill_missing=True)[0], voxels)


def test_other_axes_are_another_input(tmp_path: Path) -> None:
    write_zarr(tmp_path, random_voxels((4, 4, 4)), chunks=(2, 2, 2), voxel_size=(4, 4, 4))
    address, box = f"zarr://file://{tmp_path}", Box((0, 0, 0), (2, 2, 2))
    before = LayerSignatures(address, read_scale(address, 0)).digest(box)
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "xyz"]
    edit(tmp_path / "zarr.json", lambda c: c["attributes"]["ome"]["multiscales"][0].update(axes=axes))
    assert LayerSignatures(address, read_scale(address, 0)).digest(box) != before


# ------------------------------------------------------------------------------------ whole volumes


def test_an_input_of_unknown_voxel_size(tmp_path: Path, chunkflow: Command) -> None:
    """The output has none either, and lies where the ROI does."""
    path = write_volume(tmp_path)
    write_zarr(tmp_path / "em", random_voxels((20, 48, 40)), chunks=(8, 16, 16))
    edit(tmp_path / "em/zarr.json", lambda c: [a.pop("unit") for a in image(c)["axes"]])
    options = ("--set", f"input.path=zarr://file://{tmp_path}/em", "--set", "roi=[[12, 0, 0], [20, 24, 24]]")
    for _ in range(2):
        done = chunkflow("run", path, "--seams", 0, *options, "--set", "output.format=ome-zarr")
        assert done.returncode == 0, done.stderr
    assert read_scale(f"zarr://file://{tmp_path}/output", 0).bounds == Box((12, 0, 0), (20, 24, 24))
    changes = datasets(json.loads((tmp_path / "output/zarr.json").read_text()))[0]["coordinateTransformations"]
    assert changes[0]["scale"] == [1, 1, 1, 1]
    assert "unit" not in image(json.loads((tmp_path / "output/zarr.json").read_text()))["axes"][1]


def image(content: dict[str, Any]) -> Any:
    return content["attributes"]["ome"]["multiscales"][0]


def test_wrong_separator_is_no_volume_of_zeros(tmp_path: Path, chunkflow: Command) -> None:
    path = write_volume(tmp_path)
    write_zarr(tmp_path / "em", random_voxels((2, 20, 48, 40)), chunks=(1, 8, 16, 16), version=2, axes="czyx")
    edit(tmp_path / "em/0/.zarray", lambda c: c.pop("dimension_separator"))
    options = ("--set", f"input.path=zarr://file://{tmp_path}/em", "--set", "input.fill_missing=true")
    done = chunkflow("prepare", path, *options, "--set", "output.channels=2")
    assert done.returncode == 66 and "none of" in done.stderr, done.stderr


def test_formats_that_contradict_each_other(tmp_path: Path, chunkflow: Command) -> None:
    path = write_volume(tmp_path)
    for text in (f"output.path=n5://file://{tmp_path}/o", f"output.path=zarr2://file://{tmp_path}/o"):
        assert chunkflow("plan", path, "--set", text).returncode == 78
    zarr_path = f"output.path=zarr://file://{tmp_path}/o"
    assert chunkflow("plan", path, "--set", zarr_path, "--set", "output.format=precomputed").returncode == 78
    done = chunkflow("plan", path, "--set", "output.format=ome-zarr", "--set", "output.compression=br")
    assert done.returncode == 78 and "br" in done.stderr
    assert load_spec(path, [zarr_path]).output.format == "ome-zarr"


def test_a_layer_of_another_format_is_not_written_over(tmp_path: Path, chunkflow: Command) -> None:
    path = write_volume(tmp_path)
    assert chunkflow("run", path, "--seams", 0).returncode == 0
    before = output_of(path)
    done = chunkflow("prepare", path, "--set", "output.format=ome-zarr")
    assert done.returncode == 78 and "another format" in done.stderr
    np.testing.assert_array_equal(output_of(path), before)
    write_zarr(tmp_path / "two", random_voxels((4, 4, 4)), chunks=(2, 2, 2), version=2)
    for more in ([], ["--set", "output.format=ome-zarr"]):
        done = chunkflow("prepare", path, "--set", f"output.path=file://{tmp_path}/two", *more)
        assert done.returncode == 78 and ".zgroup" in done.stderr


def test_a_layer_of_other_codecs_is_refused(tmp_path: Path, chunkflow: Command) -> None:
    path = write_volume(tmp_path)
    options = ("--set", "output.format=ome-zarr")
    assert chunkflow("prepare", path, *options).returncode == 0
    for other in ("output.compression=zstd", "output.read_chunk_size=[2, 4, 4]"):
        done = chunkflow("prepare", path, *options, "--set", other)
        assert done.returncode == 78 and "codecs" in done.stderr
    with pytest.raises(SpecError, match="divisor"):
        load_spec(path, [*options[1:], "output.read_chunk_size=[3, 4, 4]"])


def test_ingest_writes_no_other_format(tmp_path: Path, chunkflow: Command) -> None:
    np.save(tmp_path / "a.npy", random_voxels((4, 4, 4)))
    done = chunkflow("ingest", tmp_path / "a.npy", f"zarr://file://{tmp_path}/l", "--voxel-size", 40, 4, 4)
    assert done.returncode == 64 and not (tmp_path / "l").exists()


def test_nothing_of_tensorstore_is_there_before_processes_are_forked(python: Command) -> None:
    """It ends a process that was forked from one that has used it."""
    modules = "chunkflow_core.steps.local, chunkflow_core.steps.warm_up, chunkflow_core.commands.volume"
    done = python("-c", f"import sys, {modules}; assert 'tensorstore' not in sys.modules")
    assert done.returncode == 0, done.stderr
