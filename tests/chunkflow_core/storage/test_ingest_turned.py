"""Sections that their files say to turn are turned as Pillow's viewer would, or refused."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.sources import open_stack

DATA = np.random.default_rng(5).integers(0, 256, (4, 6, 9), np.uint8)
TAG = 274


def whole(source: Path, **choice: Any) -> NDArray[Any]:
    stack = open_stack(str(source), Choice(**choice))
    try:
        return stack.read(0, stack.shape[0])
    finally:
        stack.close()


def refused(source: Path, *pieces: str, **choice: Any) -> None:
    with pytest.raises(DataError) as caught:
        whole(source, **choice)
    for piece in pieces:
        assert piece in str(caught.value)


def upright(section: NDArray[Any], orientation: int) -> NDArray[Any]:
    """The section as Pillow shows it."""
    image = Image.fromarray(section)
    image.getexif()[TAG] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def write_image(file: Path, section: NDArray[Any], orientation: int) -> None:
    if file.suffix == ".tif":
        tifffile.imwrite(file, section, photometric="minisblack", extratags=[(TAG, 3, 1, orientation, False)])
        return
    exif = Image.Exif()
    exif[TAG] = orientation
    Image.fromarray(section).save(file, exif=exif, quality=95)


def write_tiff(file: Path, sections: NDArray[Any], orientations: list[int], **options: Any) -> None:
    """A TIFF file of pages, each with its own tag."""
    with tifffile.TiffWriter(file) as writer:
        for section, orientation in zip(sections, orientations, strict=True):
            tag = [(TAG, 3, 1, orientation, False)]
            writer.write(section, photometric="minisblack", metadata=None, extratags=tag, **options)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
def test_folder(tmp_path: Path, ending: str, orientation: int) -> None:
    (tmp_path / "f").mkdir()
    for z, section in enumerate(DATA):
        write_image(tmp_path / "f" / f"{z}.{ending}", section, orientation)
    if orientation == 9 or (orientation == 0 and ending == "tif"):
        refused(tmp_path / "f", f"0.{ending}", "not a valid ORIENTATION" if ending == "tif" else "no meaning")
        return
    found = whole(tmp_path / "f")
    for z in range(len(DATA)):
        with Image.open(tmp_path / "f" / f"{z}.{ending}") as image:
            stored = DATA[z] if ending != "jpg" else np.asarray(image)
            np.testing.assert_array_equal(found[z], upright(stored, orientation))


@pytest.mark.parametrize("turns", [[1, 3, 1, 2], [6, 8, 5, 7], [4, 4, 1, 3]])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_each_file_of_a_folder_is_turned_by_its_own_tag(
    tmp_path: Path, chunkflow: Callable[..., Any], ending: str, turns: list[int]
) -> None:
    (tmp_path / "f").mkdir()
    for z, (section, turn) in enumerate(zip(DATA, turns, strict=True)):
        write_image(tmp_path / "f" / f"{z}.{ending}", section, turn)
    expected = np.stack([upright(*pair) for pair in zip(DATA, turns, strict=True)])
    np.testing.assert_array_equal(whole(tmp_path / "f"), expected)
    outcome = chunkflow("ingest", tmp_path / "f", f"file://{tmp_path}/layer", "--voxel-size", 1, 1, 1)
    assert "turned: " in outcome.stdout
    method = json.loads((tmp_path / "layer" / "provenance").read_text())["processing"][0]["method"]
    assert len(method["turned"]) == len(set(turns) - {1})


def test_one_section_that_lies_on_its_side_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    for z, section in enumerate(DATA):
        write_image(tmp_path / "f" / f"{z}.png", section, 6 if z == 2 else 1)
    refused(tmp_path / "f", "2.png: section 2 is uint8 (9, 6)", "(6, 9)")


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zlib": {"compression": "zlib"},
    "tiles": {"tile": (16, 16)},
    "contiguous": {"contiguous": True},
}


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiff_stack(tmp_path: Path, layout: str, orientation: int) -> None:
    write_tiff(tmp_path / "a.tif", DATA, [orientation] * 4, **LAYOUTS[layout])
    expected = np.stack([upright(section, orientation) for section in DATA])
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("kind", ["ome", "imagej", "shaped", "planes", "rgb"])
def test_tiff_of_other_kinds(tmp_path: Path, kind: str) -> None:
    tag = [(TAG, 3, 1, 6, False)]
    options: dict[str, Any] = {kind: True, "metadata": {"axes": "ZYX"}} if kind in ("ome", "imagej") else {}
    data, choice = (np.stack([DATA] * 3, -1), {"channel": 1}) if kind == "rgb" else (DATA, {})
    if kind == "planes":
        options = {"volumetric": True, "tile": (16, 16, 16)}
    photometric = "rgb" if kind == "rgb" else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", data, photometric=photometric, extratags=tag, **options)
    expected = np.stack([upright(section, 6) for section in DATA])
    np.testing.assert_array_equal(whole(tmp_path / "a.tif", **choice), expected)


@pytest.mark.parametrize("turns", [[1, 1, 1, 3], [6, 6, 1, 6], [5, 6, 7, 8], [2, 1, 1, 1]])
@pytest.mark.parametrize("layout", ["plain", "zlib", "tiles"])
def test_pages_with_different_tags_are_refused(tmp_path: Path, layout: str, turns: list[int]) -> None:
    write_tiff(tmp_path / "a.tif", DATA, turns, **LAYOUTS[layout])
    refused(tmp_path / "a.tif", "a.tif", "orientations", "tag 274")


def test_axes_that_the_user_turns_as_well(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", DATA, [6] * 4)
    refused(tmp_path / "a.tif", "a.tif", "--axes", axes="ZXY")
    assert whole(tmp_path / "a.tif", axes="ZYX").shape == (4, 9, 6)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("orientation", [1, 2, 6])
@pytest.mark.parametrize("kind", ["exif", "xmp"])
def test_an_orientation_after_the_pixels_is_noticed(tmp_path: Path, kind: str, orientation: int) -> None:
    """Reading it beforehand would decode every section twice."""
    (tmp_path / "f").mkdir()
    Image.fromarray(DATA[0]).save(tmp_path / "f" / "0.png")
    exif = Image.Exif()
    exif[TAG] = orientation
    text = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    late = {
        "exif": png_chunk(b"eXIf", exif.tobytes()[6:]),
        "xmp": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text),
    }
    content = (tmp_path / "f" / "0.png").read_bytes()
    (tmp_path / "f" / "0.png").write_bytes(content[:-12] + late[kind] + content[-12:])
    if orientation == 1:
        np.testing.assert_array_equal(whole(tmp_path / "f")[0], DATA[0])
    else:
        refused(tmp_path / "f", "0.png", "orientation (EXIF) after its pixels")
