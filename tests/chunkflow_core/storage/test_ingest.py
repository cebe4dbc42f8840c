"""Image stacks as they lie on people's disks become layers; what can't is told in a line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from cloudvolume import CloudVolume
from numpy.typing import NDArray
from PIL import Image

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest.sources import open_stack

Command = Callable[..., Any]
Ingest = Callable[..., Any]

SHAPE = (21, 13, 17)

ROOT = Path(__file__).resolve().parents[3]
EM = Path(os.environ.get("CHUNKFLOW_EM_DATA", ROOT.parent / "shared" / "em"), "isbi2012_image.tif")


def voxels(dtype: str = "uint8", shape: tuple[int, ...] = SHAPE) -> NDArray[Any]:
    """Random voxels over the whole range of the dtype, no axis like another."""
    random = np.random.default_rng(7)
    if dtype == "float32":
        return random.normal(0, 1e3, shape).astype(dtype)
    return random.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.fixture
def layer(tmp_path: Path) -> str:
    return f"file://{tmp_path}/layer"


@pytest.fixture
def ingest(chunkflow: Command, layer: str) -> Ingest:
    """``chunkflow-core ingest SOURCE layer``, with more arguments at will."""

    def call(source: object, *more: object) -> Any:
        return chunkflow("ingest", source, layer, "--voxel-size", 40, 4, 3, "--chunk-size", 4, 8, 16, *more)

    return call


def stored(layer: str) -> NDArray[Any]:
    """The layer as CloudVolume reads it, turned to z, y, x."""
    return np.asarray(CloudVolume(layer, progress=False)[:, :, :])[..., 0].T


def check_failed(outcome: Any, code: int, *pieces: str) -> None:
    assert outcome.returncode == code, outcome.stderr
    told = [line for line in outcome.stderr.splitlines() if "section" not in line.partition(":")[0]]  # progress bar
    assert len(told) == 1, outcome.stderr
    for piece in pieces:
        assert piece in told[0]


# ------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_tiff_stack(tmp_path: Path, layer: str, ingest: Ingest, dtype: str, compression: str | None) -> None:
    data = voxels(dtype)
    tifffile.imwrite(tmp_path / "stack.tif", data, compression=compression, photometric="minisblack")
    outcome = ingest(tmp_path / "stack.tif")
    assert outcome.returncode == 0, outcome.stderr
    assert "21 × 13 × 17 voxels (zyx)" in outcome.stdout
    assert stored(layer).dtype == dtype
    np.testing.assert_array_equal(stored(layer), data)


@pytest.mark.parametrize(
    "options",
    [
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"byteorder": ">"},
        {"truncate": True},  # one header for all sections, as ImageJ writes stacks of more than 4 GB
        {"bigtiff": True},
        {"tile": (16, 16)},
        {"predictor": True, "compression": "zlib"},
        {"metadata": None},  # plain pages, such as of a scanner
    ],
    ids=str,
)
def test_tiff_of_other_programs(tmp_path: Path, layer: str, ingest: Ingest, options: dict[str, Any]) -> None:
    data = voxels("uint16")
    tifffile.imwrite(tmp_path / "stack.TIFF", data, photometric="minisblack", **options)
    outcome = ingest(tmp_path / "stack.TIFF")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(Path(layer.removeprefix("file://"), "info").read_text())["data_type"] == "uint16"
    np.testing.assert_array_equal(stored(layer), data)


def test_voxel_axes_size_offset_and_chunk(tmp_path: Path, layer: str, ingest: Ingest) -> None:
    """A single bright voxel at z 20, y 3, x 5 lies there for CloudVolume, too.

    CloudVolume's axes are x, y, z.
    """
    data = np.zeros(SHAPE, np.uint8)
    data[20, 3, 5] = 200
    np.save(tmp_path / "stack.npy", data)
    assert ingest(tmp_path / "stack.npy", "--offset", 100, -8, 64).returncode == 0
    volume = CloudVolume(layer, progress=False)
    assert volume[64 + 5, -8 + 3, 100 + 20] == 200
    assert np.asarray(volume[:, :, :]).sum() == 200
    assert volume.resolution.tolist() == [3, 4, 40]
    assert volume.voxel_offset.tolist() == [64, -8, 100]
    assert volume.chunk_size.tolist() == [16, 8, 4]
    assert volume.volume_size.tolist() == [17, 13, 21]
    names = {file.name.partition(".")[0] for file in Path(layer.removeprefix("file://"), "3_4_40").iterdir()}
    assert "64-80_-8-0_100-104" in names
    assert "80-81_0-5_120-121" in names


def test_voxel_size_may_be_a_fraction(tmp_path: Path, layer: str, chunkflow: Command) -> None:
    np.save(tmp_path / "stack.npy", voxels())
    outcome = chunkflow("ingest", tmp_path / "stack.npy", layer, "--voxel-size", "35", "3.58", "3.58")
    assert outcome.returncode == 0, outcome.stderr
    assert CloudVolume(layer, progress=False).resolution.tolist() == [3.58, 3.58, 35]
    np.testing.assert_array_equal(stored(layer), voxels())


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_folder_of_images_in_natural_order(tmp_path: Path, layer: str, ingest: Ingest, ending: str) -> None:
    folder = tmp_path / "sections"
    folder.mkdir()
    for z, section in enumerate(voxels()):
        Image.fromarray(section).save(folder / f"section_{z + 1}.{ending}")  # no leading zeros: 9 before 10
    (folder / "notes.txt").write_text("not an image")
    (folder / f"._section_1.{ending}").write_bytes(b"what macOS leaves on foreign disks")
    assert ingest(folder).returncode == 0
    np.testing.assert_array_equal(stored(layer), voxels())


def test_folder_of_16_bit_images_with_odd_names(tmp_path: Path, layer: str, ingest: Ingest) -> None:
    folder = tmp_path / "sections of May: first"
    folder.mkdir()
    for z, name in enumerate(["a²_10_x7.png", "A²_9_x7.PNG", "a²_0011_x7.png", "a²_008_x7.png"]):
        Image.fromarray(voxels("uint16")[z]).save(folder / name)
    assert ingest(folder).returncode == 0
    order = [3, 1, 0, 2]
    np.testing.assert_array_equal(stored(layer), voxels("uint16")[order])


def test_grey_images_with_a_palette(tmp_path: Path, layer: str, ingest: Ingest) -> None:
    """Some programs save grey images with a palette.

    What is stored in the file then is no grey value.
    """
    (tmp_path / "sections").mkdir()
    image = Image.fromarray(voxels()[0]).convert("P")
    image.putpalette([level for index in range(256) for level in [255 - index] * 3])  # inverted
    image.save(tmp_path / "sections" / "1.png")
    assert ingest(tmp_path / "sections").returncode == 0
    np.testing.assert_array_equal(stored(layer)[0], 255 - voxels()[0])


def test_section_larger_than_pillow_takes_for_harmless(tmp_path: Path) -> None:
    """Sections have more than the 179 million pixels at which Pillow refuses by default."""
    Image.new("1", (18_000, 10_000), 1).save(tmp_path / "1.png", compress_level=1)
    with pytest.raises(DataError, match="dtype bool"):  # read it was; one bit a pixel keeps the test fast
        open_stack(str(tmp_path))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("dataset", ["", ":volumes/raw"])
def test_hdf5(tmp_path: Path, layer: str, ingest: Ingest, dtype: str, dataset: str) -> None:
    with h5py.File(tmp_path / "stack.h5", "w") as file:
        file.create_dataset("volumes/raw", data=voxels(dtype), chunks=(4, 4, 4), compression="gzip")
        if dataset:
            file.create_dataset("volumes/labels", data=voxels("uint16"))
    assert ingest(f"{tmp_path}/stack.h5{dataset}").returncode == 0
    np.testing.assert_array_equal(stored(layer), voxels(dtype))


@pytest.mark.parametrize("dtype", ["uint8", ">u2", ">f4", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, layer: str, ingest: Ingest, dtype: str, order: Any) -> None:
    data = voxels("uint8").astype(dtype, order=order) * 3
    np.save(tmp_path / "a:b.npy", data)
    assert ingest(tmp_path / "a:b.npy").returncode == 0
    assert stored(layer).dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(stored(layer), data)


def test_more_sections_than_are_held_at_a_time(
    tmp_path: Path, layer: str, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "chunkflow_core.storage.ingest.store.HELD_BYTES", 9 * 13 * 17
    )  # two storage chunks deep of SHAPE
    np.save(tmp_path / "stack.npy", voxels())
    assert ingest(tmp_path / "stack.npy").returncode == 0
    np.testing.assert_array_equal(stored(layer), voxels())


def test_a_layer_that_was_made_can_be_inferred_from(
    tmp_path: Path, layer: str, ingest: Ingest, make_spec: Callable[..., Path], chunkflow: Command
) -> None:
    np.save(tmp_path / "stack.npy", voxels("uint16"))
    assert ingest(tmp_path / "stack.npy", "--offset", 5, 6, 7).returncode == 0
    outcome = chunkflow("run", make_spec(input={"path": layer}))
    assert outcome.returncode == 0, outcome.stderr
    expected = np.rint(voxels("uint16") / 65535 * 255)
    output = stored(f"file://{tmp_path}/output").astype(float)
    assert abs(output - expected).max() <= 1


# -------------------------------------------------------------------------------------- overwriting


def test_existing_layer_is_kept_without_overwrite(tmp_path: Path, layer: str, ingest: Ingest) -> None:
    np.save(tmp_path / "one.npy", voxels())
    np.save(tmp_path / "two.npy", voxels()[:5, :5, :5] + 1)
    assert ingest(tmp_path / "one.npy").returncode == 0
    check_failed(ingest(tmp_path / "two.npy"), 64, layer, "there is a layer here already", "--overwrite")
    np.testing.assert_array_equal(stored(layer), voxels())
    assert ingest(tmp_path / "two.npy", "--overwrite").returncode == 0
    np.testing.assert_array_equal(stored(layer), voxels()[:5, :5, :5] + 1)


def test_overwrite_leaves_nothing_of_a_layer_of_another_program(tmp_path: Path, layer: str, ingest: Ingest) -> None:
    """Uncompressed storage chunks have other file names.

    Left there, they would be read instead of the new ones.
    """
    info = CloudVolume.create_new_info(1, "image", "uint8", "raw", [3, 4, 40], [0, 0, 0], [17, 13, 21], [16, 8, 4])
    old = CloudVolume(layer, info=info, compress=False, progress=False)
    old.commit_info()
    old[:, :, :] = np.ones((17, 13, 21, 1), np.uint8)
    np.save(tmp_path / "stack.npy", voxels())
    assert ingest(tmp_path / "stack.npy", "--overwrite").returncode == 0
    np.testing.assert_array_equal(stored(layer), voxels())
    names = [file.name for file in Path(layer.removeprefix("file://"), "3_4_40").iterdir()]
    assert names and all(name.endswith(".gz") for name in names)  # which one would be read else depends on the reader


# ------------------------------------------------------------------------------------ what is wrong


def test_missing_source(tmp_path: Path, ingest: Ingest) -> None:
    check_failed(ingest(tmp_path / "nix.tif"), 66, f"{tmp_path}/nix.tif does not exist")
    check_failed(ingest(f"{tmp_path}/nix.h5:raw"), 66, f"{tmp_path}/nix.h5 does not exist")


def test_empty_folder(tmp_path: Path, ingest: Ingest) -> None:
    (tmp_path / "sections").mkdir()
    check_failed(ingest(tmp_path / "sections"), 66, "sections", "no images", ".png")


@pytest.mark.parametrize("name", ["stack.zip", "stack", "stack.h5.gz"])
def test_unknown_format(tmp_path: Path, ingest: Ingest, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    check_failed(ingest(tmp_path / name), 64, name, "unknown format", ".tif")


def test_colour_images(tmp_path: Path, ingest: Ingest) -> None:
    folder = tmp_path / "sections"
    folder.mkdir()
    Image.fromarray(voxels(shape=(5, 6, 3))).save(folder / "1.png")
    check_failed(ingest(folder), 65, "(5, 6, 3)", "expected grey images")
    Image.fromarray(voxels(shape=(5, 6, 3))).convert("P").save(folder / "1.png")
    check_failed(ingest(folder), 65, "(5, 6, 3)", "expected grey images")
    for name, shape in {"one.tif": (5, 6, 3), "many.tif": (4, 5, 6, 3)}.items():
        tifffile.imwrite(tmp_path / name, voxels(shape=shape), photometric="rgb")
        check_failed(ingest(tmp_path / name), 65, name, str(shape))


def test_channels_are_not_taken_for_sections(tmp_path: Path, layer: str, ingest: Ingest) -> None:
    """A hyperstack of two channels has its sections interleaved."""
    tifffile.imwrite(tmp_path / "hyper.tif", voxels(shape=(6, 2, 8, 9)), imagej=True, metadata={"axes": "ZCYX"})
    check_failed(ingest(tmp_path / "hyper.tif"), 65, "4 dimensions (6, 2, 8, 9) (ZCYX)", "expected 3")


def test_sections_of_different_size_or_dtype(tmp_path: Path, ingest: Ingest) -> None:
    folder = tmp_path / "sections"
    folder.mkdir()
    Image.fromarray(voxels()[0]).save(folder / "1.png")
    Image.fromarray(voxels()[0][:-1]).save(folder / "2.png")
    check_failed(ingest(folder), 65, "section 1 is uint8 (12, 17)", "uint8 (13, 17)")
    Image.fromarray(voxels("uint16")[0]).save(folder / "2.png")
    check_failed(ingest(folder, "--overwrite"), 65, "section 1 is uint16 (13, 17)")
    with tifffile.TiffWriter(tmp_path / "stack.tif") as writer:
        writer.write(voxels()[0])
        writer.write(voxels()[0][:, :-1])
    check_failed(ingest(tmp_path / "stack.tif", "--overwrite"), 65, "2 series", "(13, 17)", "(13, 16)", "--series")


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6, 7), (), (0, 5, 6)])
def test_arrays_that_are_no_stack(tmp_path: Path, ingest: Ingest, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "array.npy", np.zeros(shape, np.uint8))
    with h5py.File(tmp_path / "array.h5", "w") as file:
        file.create_dataset("raw", data=np.zeros(shape, np.uint8))
    for name in ("array.npy", "array.h5"):
        check_failed(ingest(tmp_path / name), 65, name, str(shape))


@pytest.mark.parametrize("dtype", ["bool", "float64", "complex64", "S5"])
def test_dtype_that_no_layer_has(tmp_path: Path, layer: str, ingest: Ingest, dtype: str) -> None:
    np.save(tmp_path / "stack.npy", np.ones(SHAPE, dtype))
    check_failed(ingest(tmp_path / "stack.npy"), 65, "stack.npy", "dtype", "can't be stored", "float32")
    assert not Path(layer.removeprefix("file://")).exists()


def test_npy_of_python_objects_is_not_unpickled(tmp_path: Path, ingest: Ingest) -> None:
    np.save(tmp_path / "stack.npy", np.array([[[{}]]], object), allow_pickle=True)
    check_failed(ingest(tmp_path / "stack.npy"), 65, "stack.npy can't be read")


@pytest.mark.parametrize("name", ["stack.tif", "stack.npy", "stack.h5", "sections/1.png", "sections/1.tif"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated"])
def test_damaged_file(tmp_path: Path, ingest: Ingest, name: str, damage: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    data = voxels(shape=(9, 64, 64))
    if name == "stack.npy":
        np.save(path, data)
    elif name == "stack.h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("raw", data=data)
    elif name == "stack.tif":
        tifffile.imwrite(path, data, compression="zlib", photometric="minisblack")
    else:
        Image.fromarray(data[0]).save(path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "garbage": b"no image" * 40, "truncated": whole[: len(whole) * 2 // 3]}[damage])
    source = path.parent if path.parent.name == "sections" else path
    check_failed(ingest(source), 65, str(path), "can't be read")


def test_damage_in_the_middle(tmp_path: Path, ingest: Ingest) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", voxels(shape=(9, 64, 64)), compression="zlib", photometric="minisblack")
    whole = bytearray((tmp_path / "stack.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "stack.tif") as tiff:
        start = tiff.pages[7].dataoffsets[0]
    whole[start : start + 200] = b"\xff" * 200
    (tmp_path / "stack.tif").write_bytes(whole)
    check_failed(ingest(tmp_path / "stack.tif"), 65, "section 7 can't be read")


@pytest.mark.parametrize("writer", ["tifffile", "libtiff"])
def test_tiff_cut_anywhere_is_never_taken_for_a_shorter_stack(tmp_path: Path, writer: str) -> None:
    """A file may be cut after a full disk.

    Headers of sections may come before the voxels (tifffile) or after them (libtiff).
    """
    data = voxels(shape=(5, 16, 16))
    path = tmp_path / "stack.tif"
    if writer == "tifffile":
        tifffile.imwrite(path, data, compression="zlib", photometric="minisblack")
    else:
        first, *others = [Image.fromarray(section) for section in data]
        first.save(path, save_all=True, append_images=others, compression="tiff_lzw")
    whole = path.read_bytes()
    np.testing.assert_array_equal(open_stack(str(path)).read(0, 5), data)
    refused = 0
    for length in range(8, len(whole) - 1, 13):
        path.write_bytes(whole[:length])
        try:
            stack = open_stack(str(path))
            found = stack.read(0, stack.shape[0])
        except DataError:
            refused += 1
        else:
            np.testing.assert_array_equal(found, data)  # without its last bytes, which say that nothing follows
    assert refused > len(whole) // 13 - 4


def test_multi_page_tiff_in_a_folder_is_not_cut_to_its_first_page(tmp_path: Path, ingest: Ingest) -> None:
    (tmp_path / "sections").mkdir()
    tifffile.imwrite(tmp_path / "sections" / "stack.tif", voxels(), photometric="minisblack")
    check_failed(ingest(tmp_path / "sections"), 65, "stack.tif", "holds 21 images")


def test_hdf5_datasets_have_to_be_named_where_there_are_several(tmp_path: Path, ingest: Ingest) -> None:
    with h5py.File(tmp_path / "stack.h5", "w") as file:
        file["raw"], file["labels"] = voxels(), voxels()
        file.create_group("volumes")
    check_failed(ingest(tmp_path / "stack.h5"), 64, "['labels', 'raw']", "stack.h5:DATASET")
    check_failed(ingest(f"{tmp_path}/stack.h5:nix"), 66, "has no dataset nix")
    check_failed(ingest(f"{tmp_path}/stack.h5:volumes"), 66, "has no dataset volumes")


@pytest.mark.parametrize(("package", "source"), [("tifffile", "stack.tif"), ("h5py", "stack.h5"), ("PIL", "sections")])
def test_missing_package(
    tmp_path: Path, ingest: Ingest, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    """These packages are an extra; who has not installed it is told how to."""
    (tmp_path / "sections").mkdir()
    for name in ("stack.tif", "stack.h5", "sections/1.png"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say: can't be imported
    check_failed(ingest(tmp_path / source), 78, package, "pip install 'chunkflow-airflow[ingest]'")


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--voxel-size", 0, 4, 4], "expected nanometres, more than 0"),
        (["--voxel-size", "nan", 4, 4], "expected nanometres, more than 0"),
        (["--voxel-size", "-40", 4, 4], "expected nanometres, more than 0"),
        (["--voxel-size", 40, 4], "expected 3 arguments"),
        (["--voxel-size", "a", 4, 4], "invalid"),
        (["--chunk-size", 0, 64, 64], "expected at least 1"),
        (["--chunk-size", 1.5, 64, 64], "invalid"),
        (["--offset", 1.5, 0, 0], "invalid"),
        (["--compression", "xz"], "invalid choice"),
    ],
)
def test_wrong_numbers(tmp_path: Path, ingest: Ingest, arguments: list[object], piece: str) -> None:
    np.save(tmp_path / "stack.npy", voxels())
    outcome = ingest(tmp_path / "stack.npy", *arguments)
    assert outcome.returncode == 64
    assert f"argument {arguments[0]}: " in outcome.stderr
    assert piece in outcome.stderr


@pytest.mark.parametrize("arguments", [["--voxel-size", "1e10", 4, 4], ["--offset", 2**60, 0, 0]])
def test_numbers_that_no_reader_takes(tmp_path: Path, ingest: Ingest, layer: str, arguments: list[object]) -> None:
    np.save(tmp_path / "stack.npy", voxels())
    check_failed(ingest(tmp_path / "stack.npy", *arguments), 64, layer, "there is no such layer")
    assert not Path(layer.removeprefix("file://")).exists()


@pytest.mark.parametrize("place", ["/data/em", "file://data/em", "em", "zarr:///data/em"])
def test_layer_that_is_no_storage_path(tmp_path: Path, chunkflow: Command, place: str) -> None:
    np.save(tmp_path / "stack.npy", voxels())
    outcome = chunkflow("ingest", tmp_path / "stack.npy", place, "--voxel-size", 1, 1, 1)
    assert outcome.returncode == 64
    assert place in outcome.stderr
    assert "file:///data/em" in outcome.stderr


def test_place_that_can_not_be_written(tmp_path: Path, chunkflow: Command) -> None:
    np.save(tmp_path / "stack.npy", voxels())
    layer = f"file://{tmp_path}/stack.npy/layer"
    check_failed(chunkflow("ingest", tmp_path / "stack.npy", layer, "--voxel-size", 1, 1, 1), 75, layer)


@pytest.mark.em
@pytest.mark.skipif(not EM.is_file(), reason=f"no electron microscopy in {EM}; set CHUNKFLOW_EM_DATA")
def test_real_electron_microscopy(layer: str, chunkflow: Command) -> None:
    outcome = chunkflow("ingest", EM, layer, "--voxel-size", 50, 4, 4)
    assert outcome.returncode == 0, outcome.stderr
    assert "30 × 512 × 512" in outcome.stdout
    np.testing.assert_array_equal(stored(layer), tifffile.imread(EM))
