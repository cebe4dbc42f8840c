"""TIFF files are more than their pages: series, axes, levels, members, and what numbers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError, UsageError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.sources import open_stack

RANDOM = np.random.default_rng(5)
GREY: dict[str, Any] = {"photometric": "minisblack"}


def numbers(shape: tuple[int, ...], dtype: str = "uint8") -> NDArray[Any]:
    """Random numbers over the whole range of the dtype."""
    if np.dtype(dtype).kind == "f":
        return RANDOM.normal(0, 1e3, shape).astype(dtype)
    return RANDOM.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def whole(source: Path, **choice: Any) -> NDArray[Any]:
    """The stack of a source, read in two parts."""
    stack = open_stack(str(source), Choice(**choice))
    middle = stack.shape[0] // 2
    parts = [stack.read(a, b) for a, b in ((0, middle), (middle, stack.shape[0])) if a < b]
    stack.close()
    return np.concatenate(parts)


def check_refused(source: Path, kind: type[ChunkflowError], *pieces: str, **choice: Any) -> None:
    with pytest.raises(kind) as caught:
        whole(source, **choice)
    for piece in (source.name, *pieces):
        assert piece in str(caught.value)


# -------------------------------------------------------------------------------- series and axes


@pytest.mark.parametrize("layout", ["ome", "imagej"])
@pytest.mark.parametrize("axes", ["CYX", "TYX", "TZYX", "ZCYX", "TZCYX", "ZYX", "YX"])
def test_only_z_is_taken_for_sections(tmp_path: Path, layout: str, axes: str) -> None:
    size = {"T": 2, "Z": 4, "C": 3, "Y": 5, "X": 7}
    data = numbers(tuple(size[axis] for axis in axes))
    tifffile.imwrite(tmp_path / "a.tif", data, metadata={"axes": axes}, **(GREY | {layout: True}))
    choice = {name: 1 for letter, name in {"C": "channel", "T": "time"}.items() if letter in axes}
    chosen = data[tuple(1 if axis in "CT" else slice(None) for axis in axes)]
    np.testing.assert_array_equal(whole(tmp_path / "a.tif", **choice), chosen.reshape(-1, 5, 7))
    for option in choice:
        rest = {name: 1 for name in choice if name != option}
        check_refused(tmp_path / "a.tif", DataError, axes, f"--{option} N", **rest)
        check_refused(tmp_path / "a.tif", UsageError, f"--{option} 9", **choice | {option: 9})
    if axes in ("CYX", "TYX"):
        np.testing.assert_array_equal(whole(tmp_path / "a.tif", axes="ZYX"), data)


@pytest.mark.parametrize("shapes", [[(5, 6), (4, 5, 6)], [(4, 5, 6), (5, 6)], [(4, 5, 6)] * 2, [(4, 5, 6), (2, 3)]])
@pytest.mark.parametrize("ome", [False, True])
def test_several_series_are_chosen_from(tmp_path: Path, shapes: list[tuple[int, ...]], ome: bool) -> None:
    data = [numbers(shape) for shape in shapes]
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=ome) as writer:
        for one in data:
            writer.write(one, metadata={"axes": "ZYX"[-one.ndim :]}, **GREY)
    check_refused(tmp_path / "a.tif", DataError, "2 series", str(shapes[0]), str(shapes[1]), "--series N")
    for number, one in enumerate(data):
        np.testing.assert_array_equal(whole(tmp_path / "a.tif", series=number), one.reshape(-1, *one.shape[-2:]))
    check_refused(tmp_path / "a.tif", UsageError, "no series 2", series=2)


@pytest.mark.parametrize("options", [{}, {"metadata": None}])
@pytest.mark.parametrize("compressions", [[None], ["zlib", None], ["lzw", "zlib", "zlib"]])
def test_pages_that_were_appended_one_by_one(
    tmp_path: Path, options: dict[str, Any], compressions: list[str | None]
) -> None:
    data = numbers((7, 5, 6), "int16")
    for z, section in enumerate(data):
        compression = compressions[z % len(compressions)]
        tifffile.imwrite(tmp_path / "a.tif", section, append=True, compression=compression, **options, **GREY)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), data)


@pytest.mark.parametrize("other", [{"photometric": "miniswhite"}, {"dtype": "uint16"}, {"subfiletype": 1}])
def test_a_page_unlike_the_others_is_no_section(tmp_path: Path, other: dict[str, Any]) -> None:
    """Such as a thumbnail, a mask, or an overview."""
    dtype = other.pop("dtype", "uint8")
    for z in range(4):
        options = GREY | (other if z == 2 else {})
        section = numbers((5, 6), dtype if z == 2 else "uint8")
        tifffile.imwrite(tmp_path / "a.tif", section, append=True, metadata=None, **options)
    check_refused(tmp_path / "a.tif", DataError)


def test_pages_that_metadata_do_not_describe(tmp_path: Path) -> None:
    data = numbers((3, 5, 6))
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        text = "ImageJ=1.54f\nimages=3\nslices=3\nloop=false\n"
        writer.write(data, description=text, metadata=None, contiguous=False, **GREY)
        writer.write(data[:2], metadata=None, contiguous=False, **GREY)
    check_refused(tmp_path / "a.tif", DataError, "5 images", "describe 3", "--series 0")
    np.testing.assert_array_equal(whole(tmp_path / "a.tif", series=0), data)


@pytest.mark.parametrize("metadata", [{"axes": "ZYX"}, None])
@pytest.mark.parametrize("ome", [False, True])
def test_levels_of_a_pyramid(tmp_path: Path, metadata: dict[str, str] | None, ome: bool) -> None:
    if ome and metadata is None:
        return
    data = numbers((3, 64, 64))
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=ome) as writer:
        for part in [data] if metadata else list(data):
            writer.write(part, subifds=2, metadata=metadata, tile=(16, 16), **GREY)
            for step in (2, 4):
                more: dict[str, Any] = {"metadata": None} if ome or not metadata else {}
                writer.write(part[..., ::step, ::step], subfiletype=1, tile=(16, 16), **GREY, **more)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), data)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif", level=2), data[:, ::4, ::4])
    check_refused(tmp_path / "a.tif", UsageError, "no level 3", level=3)


def ome_files(folder: Path, data: NDArray[Any], files: int) -> list[Path]:
    """One OME image whose sections lie in several files, each of which has all metadata."""
    each = len(data) // files
    names = [f"part_{number}.ome.tif" for number in range(files)]
    planes = "".join(
        f'<TiffData FirstZ="{z}" FirstT="0" FirstC="0" IFD="{z % each}" PlaneCount="1">'
        f'<UUID FileName="{names[z // each]}">urn:uuid:{z // each}</UUID></TiffData>'
        for z in range(len(data))
    )
    z, y, x = data.shape
    for number, name in enumerate(names):
        text = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{number}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
            f'Type="{data.dtype}" SizeX="{x}" SizeY="{y}" SizeZ="{z}" SizeC="1" SizeT="1">'
            f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image></OME>'
        )
        with tifffile.TiffWriter(folder / name) as writer:
            for k in range(each):
                section = data[number * each + k]
                writer.write(section, description=text if k == 0 else None, metadata=None, contiguous=False, **GREY)
    return [folder / name for name in names]


@pytest.mark.parametrize("files", [2, 3, 6])
def test_an_image_in_several_files(tmp_path: Path, files: int) -> None:
    data = numbers((12, 5, 7), "uint16")
    parts = ome_files(tmp_path, data, files)
    for part in parts:
        np.testing.assert_array_equal(whole(part), data)
    parts[-1].unlink()
    check_refused(parts[0], MissingInputError, "1 of", parts[-1].name)
    parts[0].rename(tmp_path / "renamed.ome.tif")
    check_refused(tmp_path / "renamed.ome.tif", MissingInputError, "missing", parts[-1].name)


def test_a_part_whose_metadata_are_elsewhere(tmp_path: Path) -> None:
    text = '<?xml version="1.0"?><OME><BinaryOnly MetadataFile="main.companion.ome" UUID="urn:uuid:1"/></OME>'
    tifffile.imwrite(tmp_path / "a.ome.tif", numbers((3, 5, 6)), description=text, metadata=None, **GREY)
    check_refused(tmp_path / "a.ome.tif", MissingInputError, "main.companion.ome")


@pytest.mark.parametrize("change", [('SizeZ="4"', 'SizeZ="5"'), ('SizeZ="4"', 'SizeZ="3"'), ("</OME>", "</OMF>")])
def test_metadata_that_do_not_fit(tmp_path: Path, change: tuple[str, str]) -> None:
    tifffile.imwrite(tmp_path / "a.ome.tif", numbers((4, 5, 6)), ome=True, metadata={"axes": "ZYX"}, **GREY)
    content = (tmp_path / "a.ome.tif").read_bytes()
    (tmp_path / "a.ome.tif").write_bytes(content.replace(change[0].encode(), change[1].encode()))
    check_refused(tmp_path / "a.ome.tif", ChunkflowError)


# ------------------------------------------------------------------------------- what numbers mean


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32"])
@pytest.mark.parametrize("options", [{}, {"byteorder": ">", "compression": "zlib", "predictor": True}])
def test_dtypes_are_kept_alike_in_a_stack_and_a_folder(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    data = numbers((4, 5, 6), dtype)
    (tmp_path / "folder").mkdir()
    options = {key: value for key, value in options.items() if key != "predictor" or dtype[-2:] != "64"}
    tifffile.imwrite(tmp_path / "a.tif", data, **options, **GREY)
    for z, section in enumerate(data):
        tifffile.imwrite(tmp_path / "folder" / f"{z}.tif", section, **options, **GREY)
    for source in (tmp_path / "a.tif", tmp_path / "folder"):
        assert whole(source).dtype == dtype
        np.testing.assert_array_equal(whole(source), data)


@pytest.mark.parametrize("dtype", ["float64", "float16", "complex64"])
def test_dtypes_that_no_layer_holds(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "a.tif", tmp_path / "folder" / "1.tif"):
        tifffile.imwrite(file, np.ones((1, 5, 6), dtype), **GREY)
        check_refused(file, DataError, "convert it to")
    check_refused(tmp_path / "folder", DataError, "convert it to")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("truncate", [False, True])
def test_white_that_is_zero_is_turned_over(tmp_path: Path, dtype: str, truncate: bool) -> None:
    data = numbers((4, 5, 6), dtype)
    (tmp_path / "folder").mkdir()
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="miniswhite", truncate=truncate)
    for z, section in enumerate(data):
        tifffile.imwrite(tmp_path / "folder" / f"{z}.tif", section, photometric="miniswhite")
    for source in (tmp_path / "a.tif", tmp_path / "folder"):
        np.testing.assert_array_equal(whole(source), np.iinfo(dtype).max - data)
        assert "0 is white" in open_stack(str(source)).notes["grey_values"]


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_white_that_is_zero_of_signed_numbers(tmp_path: Path, dtype: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", numbers((4, 5, 6), dtype), photometric="miniswhite")
    check_refused(tmp_path / "a.tif", DataError, "min-is-white", "convert")


@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12])
@pytest.mark.parametrize("kind", ["stack", "folder"])
def test_bit_depths(tmp_path: Path, bits: int, kind: str) -> None:
    """Numbers of 10 and 12 bits are kept; of fewer than 8, readers make different grey values."""
    data = RANDOM.integers(0, 2**bits, (1, 16, 16)).astype("uint8" if bits < 8 else "uint16")
    file = tmp_path / "folder" / "a.tif"
    file.parent.mkdir()
    written = data.astype(bool) if bits == 1 else data
    more: dict[str, Any] = {} if bits == 1 else {"bitspersample": bits, "compression": None}
    try:
        tifffile.imwrite(file, written, metadata=None, **more, **GREY)
    except ValueError:
        packed = np.packbits(((data[..., None] >> np.arange(bits)[::-1]) & 1).astype(np.uint8).ravel())
        tifffile.imwrite(file, np.zeros((16, 16), data.dtype), metadata=None, **GREY)
        content = bytearray(file.read_bytes())
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            start, place = page.dataoffsets[0], page.tags[258].valueoffset
        content[start : start + len(packed)] = packed.tobytes()
        content[place : place + 2] = bits.to_bytes(2, "little")
        file.write_bytes(content)
    source = file if kind == "stack" else file.parent
    if bits < 8:
        check_refused(source, DataError, f"{bits} bit", "convert it to 8 bits")
    else:
        np.testing.assert_array_equal(whole(source), data)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bit_depths_of_png(tmp_path: Path, bits: int) -> None:
    image = Image.fromarray(RANDOM.integers(0, 256, (16, 16), np.uint8))
    (tmp_path / "folder").mkdir()
    if bits == 1:
        image.convert("1").save(tmp_path / "folder" / "1.png")
    else:
        write_png(tmp_path / "folder" / "1.png", bits)
    check_refused(tmp_path / "folder", DataError, f"{bits} bit", "convert it to 8 bits")


def write_png(file: Path, bits: int) -> None:
    """A grey PNG of 16 × 16 pixels of few bits, which Pillow reads but does not write."""
    import struct
    import zlib

    rows = b"".join(b"\0" + bytes(RANDOM.integers(0, 256, 16 * bits // 8).tolist()) for _ in range(16))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    file.write_bytes(content)


@pytest.mark.parametrize("factor", [257, 256])
@pytest.mark.parametrize("kind", ["stack", "folder"])
def test_palettes_of_grey_values(tmp_path: Path, factor: int, kind: str) -> None:
    data = numbers((1, 9, 8))
    levels = RANDOM.permutation(256).astype(np.uint16)
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "a.tif"
    colormap = np.stack([levels * factor] * 3).astype(np.uint16)
    tifffile.imwrite(file, data[0], photometric="palette", colormap=colormap)
    np.testing.assert_array_equal(whole(file if kind == "stack" else file.parent), levels[data])
    for wrong in (np.stack([levels, levels[::-1], levels]) * 257, np.stack([levels * 255 + 3] * 3)):
        tifffile.imwrite(file, data[0], photometric="palette", colormap=wrong.astype(np.uint16))
        check_refused(file if kind == "stack" else file.parent, DataError, "palette")


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("samples", [2, 3, 4])
@pytest.mark.parametrize("kind", ["stack", "folder"])
def test_colours_and_alpha_are_chosen_from(tmp_path: Path, planar: str, samples: int, kind: str) -> None:
    data = numbers((5, 6, samples))
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "a.tif"
    photometric = "minisblack" if samples == 2 else "rgb"
    extra = {2: ["unassalpha"], 3: None, 4: ["assocalpha"]}[samples]
    written = data if planar == "contig" else data.transpose(2, 0, 1)
    tifffile.imwrite(file, written, photometric=photometric, planarconfig=planar, extrasamples=extra, metadata=None)
    source = file if kind == "stack" else file.parent
    check_refused(source, DataError, "expected grey images", "--channel N")
    np.testing.assert_array_equal(whole(source, channel=1), data[None, ..., 1])


@pytest.mark.parametrize("photometric", ["separated", "cielab", "cfa", "linear_raw", "mask"])
def test_other_photometric_interpretations(tmp_path: Path, photometric: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", numbers((5, 6)), **GREY)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        place = page.tags[262].valueoffset
    value = int(tifffile.PHOTOMETRIC[photometric.upper()])
    content[place : place + 2] = value.to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes(content)
    check_refused(tmp_path / "a.tif", DataError, photometric.upper(), "convert")


def test_tiles_that_are_not_there(tmp_path: Path) -> None:
    """GDAL leaves out tiles of zeros; a file that was cut has none either."""
    data = numbers((32, 32))
    tifffile.imwrite(tmp_path / "a.tif", data, tile=(16, 16), compression="zlib", **GREY)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        places = [page.tags[code] for code in (324, 325)]
    content = bytearray((tmp_path / "a.tif").read_bytes())
    for tag in places:
        size = tag.valuebytecount // 4
        content[tag.valueoffset : tag.valueoffset + size] = bytes(size)
    (tmp_path / "a.tif").write_bytes(content)
    check_refused(tmp_path / "a.tif", DataError, "1 of 4 strips or tiles", "--gaps blank")
    data[:16, :16] = 0
    np.testing.assert_array_equal(whole(tmp_path / "a.tif", gaps="blank")[0], data)
