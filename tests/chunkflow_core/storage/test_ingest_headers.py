"""NRRD, MRC and NIfTI: voxels, axes and voxel sizes as headers say, or a refusal in a line."""

from __future__ import annotations

import bz2
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import nibabel
import nrrd
import numpy as np
import pytest
from cloudvolume import CloudVolume
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError, SpecError, UsageError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.sources import open_stack
from tests.support.flat_files import write_nrrd

DATA = np.random.default_rng(11).integers(0, 250, (6, 7, 8), np.uint8)
"""No axis is like another, zyx."""


def whole(source: Path, **choice: Any) -> NDArray[Any]:
    stack = open_stack(str(source), Choice(**choice))
    try:
        return np.concatenate([stack.read(z, min(z + 4, stack.shape[0])) for z in range(0, stack.shape[0], 4)])
    finally:
        stack.close()


def sizes(source: Path, **choice: Any) -> Any:
    stack = open_stack(str(source), Choice(**choice))
    stack.close()
    return stack.voxel_size


def refused(source: Path, kind: type[Exception] = DataError, **choice: Any) -> str:
    with pytest.raises(kind) as caught:
        whole(source, **choice)
    assert "\n" not in str(caught.value) and source.name in str(caught.value)
    return str(caught.value)


def write_mrc(file: Path, data: NDArray[Any], **fields: Any) -> Path:
    """An MRC file; fields of the header, ``stamp`` among them for IMOD's, are set afterwards."""
    stamp = fields.pop("stamp", None)
    with mrcfile.new(file, data.view("i1") if data.dtype == "u1" else data, overwrite=True) as mrc:
        for name, value in fields.items():
            mrc.header[name] = value
    if stamp is not None:
        content = bytearray(file.read_bytes())
        content[152:160] = np.array([1146047817, stamp], "<i4").tobytes()
        file.write_bytes(content)
    return file


def write_nifti(
    file: Path, data: NDArray[Any], *, unit: str = "mm", zooms: tuple[float, ...] = (), **scale: Any
) -> Path:
    """A NIfTI file of an array with the slowest axis first."""
    image = nibabel.Nifti1Image(data.T, np.diag([-1.0, 1, 1, 1]), dtype=data.dtype)
    image.header.set_xyzt_units(unit)
    image.header.set_zooms(zooms or (1,) * data.ndim)
    if scale:
        image.header.set_slope_inter(**scale)
    nibabel.save(image, file)
    return file


# ------------------------------------------------------------------------------------------ NRRD


@pytest.mark.parametrize("dtype", ["<i1", ">u2", "<u2", ">i4", "<f4", ">u8"])
@pytest.mark.parametrize("encoding", ["raw", "gzip", "gz", "bzip2"])
def test_nrrd_of_each_encoding(tmp_path: Path, dtype: str, encoding: str) -> None:
    data = DATA.astype(dtype) * 3
    write_nrrd(tmp_path / "a.nrrd", data, encoding=encoding)
    found = whole(tmp_path / "a.nrrd")
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found, data)
    np.testing.assert_array_equal(nrrd.read(str(tmp_path / "a.nrrd"))[0].T, data)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bz2"])
@pytest.mark.parametrize("files", ["one", "LIST", "LIST 3", "pattern", "pattern down"])
def test_detached_headers(tmp_path: Path, encoding: str, files: str) -> None:
    write_nrrd(tmp_path / "a.nhdr", DATA, encoding=encoding, files=files)
    np.testing.assert_array_equal(whole(tmp_path / "a.nhdr"), DATA)
    missing = sorted(tmp_path.glob("part*"))[-1]
    missing.unlink()
    assert missing.name in refused(tmp_path / "a.nhdr", MissingInputError)


@pytest.mark.parametrize("skips", [{"lines": 2}, {"skipped": 5}, {"lines": 1, "skipped": 3}, {"skipped": -1}])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_lines_and_bytes_that_are_skipped(tmp_path: Path, skips: dict[str, int], encoding: str) -> None:
    write_nrrd(tmp_path / "a.nrrd", DATA, encoding=encoding, **skips)  # type: ignore[arg-type]
    if skips.get("skipped") == -1 and encoding == "gzip":
        assert "byte skip -1" in refused(tmp_path / "a.nrrd")
    else:
        np.testing.assert_array_equal(whole(tmp_path / "a.nrrd"), DATA)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize(
    "kinds", ["vector domain domain domain", "domain domain domain list", "RGB-color space space space"]
)
def test_nrrd_with_channels(tmp_path: Path, kinds: str, encoding: str) -> None:
    place = 3 - next(k for k, kind in enumerate(kinds.split()) if kind not in ("domain", "space"))
    data = np.stack([DATA, DATA + 1, DATA + 2], place)
    write_nrrd(tmp_path / "a.nrrd", data, encoding=encoding, fields={"kinds": kinds})
    assert "--channel N" in refused(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(whole(tmp_path / "a.nrrd", channel=2), DATA + 2)
    write_nrrd(tmp_path / "b.nrrd", data, encoding=encoding)
    assert "--axes" in refused(tmp_path / "b.nrrd")
    axes = "".join("C" if k == place else next(letters) for letters in [iter("ZYX")] for k in range(4))
    np.testing.assert_array_equal(whole(tmp_path / "b.nrrd", axes=axes, channel=1), DATA + 1)


def test_nrrd_over_time(tmp_path: Path) -> None:
    write_nrrd(tmp_path / "a.nrrd", np.stack([DATA, DATA + 1]), fields={"kinds": "space space space time"})
    assert "--time N" in refused(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(whole(tmp_path / "a.nrrd", time=1), DATA + 1)


def test_sections_that_are_not_the_slowest_axis(tmp_path: Path) -> None:
    """Mapped, any axis may be z; decompressed, the whole file would be read for each slab."""
    write_nrrd(tmp_path / "raw.nrrd", DATA)
    np.testing.assert_array_equal(whole(tmp_path / "raw.nrrd", axes="XYZ"), DATA.T)
    write_nrrd(tmp_path / "gz.nrrd", DATA, encoding="gzip")
    assert "store it uncompressed" in refused(tmp_path / "gz.nrrd", axes="XYZ")
    np.testing.assert_array_equal(whole(tmp_path / "gz.nrrd", axes="ZXY"), DATA.swapaxes(1, 2))


@pytest.mark.parametrize("unit", [("m", 1e-9), ("mm", 1e-6), ("um", 1e-3), ("µm", 1e-3), ("micron", 1e-3), ("nm", 1)])
def test_voxel_size_of_nrrd(tmp_path: Path, unit: tuple[str, float]) -> None:
    x, y, z = (float(f"{n * unit[1]:.12g}") for n in (3, 4.5, 40))
    directions = {"space": "left-posterior-superior", "space directions": f"(0,{-x},0) ({y},0,0) (0,0,{z})"}
    units = " ".join([f'"{unit[0]}"'] * 3)
    write_nrrd(tmp_path / "a.nrrd", DATA, fields=directions | {"space units": units})
    assert sizes(tmp_path / "a.nrrd") == (40, 4.5, 3)
    write_nrrd(tmp_path / "b.nrrd", DATA, fields={"spacings": f"{x} {y} {z}", "units": units})
    assert sizes(tmp_path / "b.nrrd") == (40, 4.5, 3)
    assert sizes(tmp_path / "b.nrrd", axes="XYZ") == (3, 4.5, 40)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"spacings": "1 1 1"},
        {"spacings": "1 1 nan", "units": '"nm" "nm" "nm"'},
        {"spacings": "1 1 1", "units": '"pixel" "pixel" "pixel"'},
        {"space": "RAS", "space directions": "(1,0,0) (0,1,0) (0,0,1)"},
        {"space": "RAS", "space directions": "(1,0,0) (0,1,0) (0,0,1)", "space units": '"nm" "nm" "mm"'},
    ],
)
def test_a_voxel_size_without_a_unit_is_none(tmp_path: Path, fields: dict[str, str]) -> None:
    write_nrrd(tmp_path / "a.nrrd", DATA, fields=fields)
    assert sizes(tmp_path / "a.nrrd") is None
    np.testing.assert_array_equal(whole(tmp_path / "a.nrrd"), DATA)


@pytest.mark.parametrize(
    ("old", "new", "piece"),
    [
        (b"encoding: raw", b"encoding: hex", "encoding hex"),
        (b"encoding: raw", b"encoding: ascii", "raw or gzip"),
        (b"type: uint8", b"type: block", "can't be read"),
        (b"type: uint8", b"type: double", "endian"),
        (b"sizes: 8 7 6", b"sizes: 8 7 7", "it may be truncated"),
        (b"sizes: 8 7 6", b"sizes: 8 7 5", "too long"),
        (b"sizes: 8 7 6", b"sizes: 8 7", "3 axes"),
        (b"sizes: 8 7 6", b"sizes: 8 0 6", "sizes"),
        (b"NRRD0005", b"NRRD0009", "version"),
        (b"NRRD0005", b"NIRD0005", "does not begin with NRRD"),
        (b"type: uint8", b"type; uint8", "can't be read"),
    ],
)
def test_nrrd_headers_that_are_wrong(tmp_path: Path, old: bytes, new: bytes, piece: str) -> None:
    write_nrrd(tmp_path / "a.nrrd", DATA)
    content = (tmp_path / "a.nrrd").read_bytes()
    assert old in content
    (tmp_path / "a.nrrd").write_bytes(content.replace(old, new))
    assert piece in refused(tmp_path / "a.nrrd")


def test_a_users_own_fields_are_no_fields_of_the_format(tmp_path: Path) -> None:
    write_nrrd(
        tmp_path / "a.nrrd", DATA, fields={"# sizes": "1 1 1", "sizes:=": "1 1 1", "Kinds": "domain domain domain"}
    )
    np.testing.assert_array_equal(whole(tmp_path / "a.nrrd"), DATA)


# ------------------------------------------------------------------------------------------- MRC


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("ending", ["mrc", "st"])
def test_mrc_of_each_mode(tmp_path: Path, dtype: str, order: str, ending: str) -> None:
    data = (DATA.astype("int16") - 120).astype(dtype)
    with mrcfile.new(tmp_path / f"a.{ending}", data.astype(order + np.dtype(dtype).str[1:])) as mrc:
        mrc.set_extended_header(np.zeros(3, "V80"))
    found = whole(tmp_path / f"a.{ending}")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, data)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"stamp": 1}, "i1"),
        ({"stamp": 0}, "u1"),
        ({"stamp": 16}, "u1"),
        ({"stamp": 17, "nversion": 0}, "i1"),
        ({"nversion": 20140}, "i1"),
        ({"nversion": 20141, "dmin": 0, "dmax": 249}, "i1"),
        ({"nversion": 0, "dmin": 0, "dmax": 249}, "u1"),
        ({"nversion": 0, "dmin": -100, "dmax": 90}, "i1"),
        ({"nversion": 0, "dmin": 3, "dmax": 100}, ""),
        ({"nversion": 0, "dmin": -3, "dmax": 200}, ""),
        ({"nversion": 0, "dmin": 0, "dmax": -1}, ""),
        ({"nversion": 0, "dmin": 0, "dmax": 4000}, ""),
    ],
)
def test_bytes_of_mrc_are_signed_or_not(tmp_path: Path, fields: dict[str, Any], dtype: str) -> None:
    write_mrc(tmp_path / "a.mrc", DATA, **fields)
    if not dtype:
        assert "signed or unsigned" in refused(tmp_path / "a.mrc")
        return
    found = whole(tmp_path / "a.mrc")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, DATA.view(dtype))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (3, 1, 2), (2, 3, 1), (1, 3, 2)])
def test_axes_of_mrc(tmp_path: Path, order: tuple[int, int, int]) -> None:
    """Columns, rows and sections may be any of x, y, z."""
    axes = [3 - number for number in reversed(order)]  # of zyx, that of sections, rows, columns
    data = DATA.astype("int16").transpose(axes)
    write_mrc(tmp_path / "a.mrc", data, mapc=order[0], mapr=order[1], maps=order[2], cella=(8 * 3, 7 * 4.5, 6 * 40))
    with mrcfile.open(tmp_path / "a.mrc", mode="r+") as mrc:
        mrc.header.mx, mrc.header.my, mrc.header.mz = 8, 7, 6
    np.testing.assert_array_equal(whole(tmp_path / "a.mrc"), DATA)
    assert sizes(tmp_path / "a.mrc") == (4, 0.45, 0.3)


def test_volumes_in_one_mrc_file_are_not_taken_for_sections(tmp_path: Path) -> None:
    mrcfile.new(tmp_path / "a.mrc", np.stack([DATA, DATA + 1]).astype("int16")).close()
    assert "--axes" in refused(tmp_path / "a.mrc")
    np.testing.assert_array_equal(whole(tmp_path / "a.mrc", axes="TZYX", time=1), DATA + 1)
    mrcfile.new(tmp_path / "b.mrc", DATA[:, None].astype("int16")).close()  # of one section each
    assert "--axes" in refused(tmp_path / "b.mrc")
    write_nifti(tmp_path / "b.nii", DATA[:, None, None, None])
    assert "--axes" in refused(tmp_path / "b.nii")


@pytest.mark.parametrize(
    ("fields", "piece"),
    [
        ({"mode": 3}, "mode"),
        ({"mode": 101}, "mode"),
        ({"mode": 4}, "file size"),
        ({"mode": 12}, "float16"),
        ({"nz": 7}, "file size"),
        ({"nz": 5}, "larger than expected"),
        ({"map": b"XYZ "}, "Map ID"),
        ({"machst": [1, 2, 0, 0]}, "achine stamp"),
        ({"mapc": 2}, "--axes"),
    ],
)
def test_mrc_headers_that_are_wrong(tmp_path: Path, fields: dict[str, Any], piece: str) -> None:
    write_mrc(tmp_path / "a.mrc", DATA.astype("int16"), **fields)
    assert piece in refused(tmp_path / "a.mrc")


# ----------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("dtype", ["uint8", ">i2", "<u2", ">f4", "int8", "uint32"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".hdr", ".img"])
def test_nifti_of_each_kind(tmp_path: Path, dtype: str, ending: str) -> None:
    data = DATA.astype(dtype) * 3
    header = nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(dtype)
    kind = nibabel.Nifti1Pair if ending in (".hdr", ".img") else nibabel.Nifti1Image
    nibabel.save(kind(data.T, np.diag([-1.0, 2, 3, 1]), header), tmp_path / f"a{ending}")
    found = whole(tmp_path / f"a{ending}")
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found, data)


def test_half_of_a_nifti_pair(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(DATA.T, np.eye(4)), tmp_path / "a.hdr")
    (tmp_path / "a.img").unlink()
    refused(tmp_path / "a.hdr", MissingInputError)


@pytest.mark.parametrize("kind", [nibabel.Nifti2Image, nibabel.AnalyzeImage])
def test_other_kinds_of_images(tmp_path: Path, kind: Any) -> None:
    ending = "nii" if kind is nibabel.Nifti2Image else "img"
    nibabel.save(kind(DATA.T, np.eye(4)), tmp_path / f"a.{ending}")
    if ending == "nii":
        np.testing.assert_array_equal(whole(tmp_path / "a.nii"), DATA)
    else:
        assert "expected NIfTI" in refused(tmp_path / "a.img")


@pytest.mark.parametrize(("unit", "nanometres"), [("meter", 10**9), ("mm", 10**6), ("micron", 1000), ("unknown", None)])
def test_voxel_size_of_nifti(tmp_path: Path, unit: str, nanometres: int | None) -> None:
    write_nifti(tmp_path / "a.nii.gz", DATA, unit=unit, zooms=(0.25, 0.5, 2))
    expected = None if nanometres is None else (2 * nanometres, nanometres / 2, nanometres / 4)
    assert sizes(tmp_path / "a.nii.gz") == expected
    write_nifti(tmp_path / "b.nii", DATA, unit="mm", zooms=(0.004, 0.00358, 0.04))
    assert sizes(tmp_path / "b.nii") == (40_000, 3580, 4000)  # float32 has no such numbers


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "made"),
    [
        ("uint8", 2, 0, "uint16"),
        ("uint8", 1, -128, "int8"),
        ("int16", 1, -1024, "int32"),
        ("int16", 1, 32768, "uint16"),
        ("uint8", -1, 255, "uint8"),
        ("uint32", 3, 1, "int64"),
        ("uint8", 0.5, 0, None),
        ("int16", 1, 0.25, None),
        ("float32", 2, 0, None),
        ("uint64", 2, 0, None),
        ("uint8", 1, 0, "uint8"),
    ],
)
def test_scaled_nifti(tmp_path: Path, dtype: str, slope: float, intercept: float, made: str | None) -> None:
    data = DATA.astype(dtype)
    write_nifti(tmp_path / "a.nii", data, slope=slope, inter=intercept)
    content = bytearray((tmp_path / "a.nii").read_bytes())  # nibabel divides by it as it saves
    content[-data.nbytes :] = data.tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    if made is None:
        assert "scl_slope" in refused(tmp_path / "a.nii")
        return
    found = whole(tmp_path / "a.nii")
    assert found.dtype == made
    np.testing.assert_array_equal(found, np.asarray(nibabel.load(tmp_path / "a.nii").dataobj).T)


@pytest.mark.parametrize("names", ["RGB", "RGBA"])
def test_colours_of_nifti(tmp_path: Path, names: str) -> None:
    data = np.zeros(DATA.shape[::-1], [(name, "u1") for name in names])
    for k, name in enumerate(names):
        data[name] = DATA.T + k
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    assert "--channel N" in refused(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(whole(tmp_path / "a.nii.gz", channel=2), DATA + 2)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_times_and_vectors_of_nifti(tmp_path: Path, ending: str) -> None:
    write_nifti(tmp_path / f"a{ending}", np.stack([DATA, DATA + 1]))
    assert "--time N" in refused(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(whole(tmp_path / f"a{ending}", time=1), DATA + 1)
    assert refused(tmp_path / f"a{ending}", UsageError, time=2)
    write_nifti(tmp_path / f"b{ending}", np.stack([DATA, DATA + 1, DATA + 2])[:, None])
    np.testing.assert_array_equal(whole(tmp_path / f"b{ending}", channel=2), DATA + 2)


# ----------------------------------------------------------------------------- all of these formats

WRITERS: dict[str, Callable[[Path], object]] = {
    "a.nrrd": lambda file: write_nrrd(file, DATA),
    "b.nrrd": lambda file: write_nrrd(file, DATA, encoding="gzip"),
    "c.nrrd": lambda file: write_nrrd(file, DATA, encoding="bz2"),
    "a.mrc": lambda file: write_mrc(file, DATA.astype("int16")),
    "a.nii": lambda file: write_nifti(file, DATA),
    "a.nii.gz": lambda file: write_nifti(file, DATA),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_cut_anywhere_are_refused(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    np.testing.assert_array_equal(whole(tmp_path / name), DATA)
    for length in [*range(0, len(content), 17), len(content) - 1]:
        (tmp_path / name).write_bytes(content[:length])
        refused(tmp_path / name)


@pytest.mark.parametrize("name", ["b.nrrd", "c.nrrd", "a.nii.gz"])
def test_more_than_the_header_says_is_refused(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    packing = bz2.compress if name == "c.nrrd" else gzip.compress
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + packing(b"more"))
    assert "too long" in refused(tmp_path / name)


@pytest.mark.parametrize(("package", "name"), [("nrrd", "a.nrrd"), ("mrcfile", "a.mrc"), ("nibabel", "a.nii.gz")])
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    WRITERS[name](tmp_path / name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SpecError, match=rf"{package}: pip install 'chunkflow-airflow\[ingest\]'"):
        open_stack(str(tmp_path / name))


UNITS = {"space": "RAS", "space directions": "(3,0,0) (0,4,0) (0,0,40)", "space units": '"nm" "nm" "nm"'}


@pytest.mark.parametrize(("name", "code"), [("a.nrrd", 0), ("b.nrrd", 64), ("a.mrc", 0), ("a.nii", 0)])
def test_voxel_size_of_the_header_is_taken_and_on_record(
    tmp_path: Path, chunkflow: Callable[..., Any], name: str, code: int
) -> None:
    write_nrrd(tmp_path / "a.nrrd", DATA, fields=UNITS)
    write_nrrd(tmp_path / "b.nrrd", DATA)
    with mrcfile.new(tmp_path / "a.mrc", DATA.astype("int16")) as mrc:
        mrc.voxel_size = (30, 40, 400)
    write_nifti(tmp_path / "a.nii", DATA, unit="micron", zooms=(0.003, 0.004, 0.04))
    layer = f"file://{tmp_path}/layer"
    outcome = chunkflow("ingest", tmp_path / name, layer)
    assert outcome.returncode == code, outcome.stderr
    if code:
        assert "--voxel-size" in outcome.stderr and not (tmp_path / "layer").exists()
        assert chunkflow("ingest", tmp_path / name, layer, "--voxel-size", 40, 4, 3).returncode == 0
    else:
        assert "voxel size: 40 × 4 × 3 nm (zyx), from the header" in outcome.stdout
        method = json.loads((tmp_path / "layer" / "provenance").read_text())["processing"][0]["method"]
        assert method["voxel_size"] == "40 × 4 × 3 nm (zyx), from the header"
        assert ("orientation" in method) == ("orientation: as stored" in outcome.stdout) == (name != "a.mrc")
    volume = CloudVolume(layer, progress=False)
    assert volume.resolution.tolist() == [3, 4, 40]
    np.testing.assert_array_equal(np.asarray(volume[:, :, :])[..., 0].T, DATA)
