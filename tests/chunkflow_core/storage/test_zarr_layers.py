"""Layers of zarr, OME-Zarr and N5: read as their writers mean them, or refused in one sentence.

They are written by zarr-python; N5, which it has no more, by TensorStore's own driver on a disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numcodecs
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr import codecs

from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError, SpecError, StorageError
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import check_decoder
from chunkflow_core.storage.layers import InputLayer
from chunkflow_core.storage.signatures import LayerSignatures
from tests.chunkflow_core.storage.test_hostile_info import VALUES, changed, make_old, places
from tests.support.random_examples import examples
from tests.support.zarrs import random_voxels, write_zarr

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "float32", "float64"]
AXES = ["zyx", "czyx", "tczyx", "tzyx", "zyxc", "xyz", "yx"]


def opened(address: str, mip: int = 0, *, fill_missing: bool = False) -> InputLayer:
    scale = read_scale(address, mip)
    return InputLayer(address, mip, scale, scale.bounds, padding="constant", fill_missing=fill_missing)


def read_all(address: str, mip: int = 0, *, fill_missing: bool = False) -> NDArray[Any]:
    layer = opened(address, mip, fill_missing=fill_missing)
    return layer.read(layer.bounds)


def as_planes(data: NDArray[Any], axes: str) -> NDArray[Any]:
    """An array as ``(c, z, y, x)``."""
    index = tuple(0 if axis == "t" else slice(None) for axis in axes)
    kept = axes.replace("t", "")
    data = data[index].transpose([kept.index(axis) for axis in "czyx" if axis in kept])
    for i, axis in enumerate("czyx"):
        if axis not in kept:
            data = np.expand_dims(data, i)
    return data


COMPRESSORS_3 = [
    None,
    codecs.GzipCodec(level=2),
    codecs.ZstdCodec(level=1),
    codecs.BloscCodec(cname="lz4", shuffle="bitshuffle"),
    codecs.BloscCodec(cname="zstd", shuffle="shuffle"),
]


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    axes = draw(st.sampled_from(AXES))
    shape = tuple(1 if a == "t" else draw(st.integers(1, 3 if a == "c" else 11)) for a in axes)
    chunks = tuple(draw(st.integers(1, 6)) for _ in axes)
    version, options = draw(st.sampled_from([2, 3])), dict[str, Any]()
    separator = draw(st.sampled_from(["/", "."]))
    if version == 2:
        options["compressors"] = draw(
            st.sampled_from([None, numcodecs.GZip(1), numcodecs.Zlib(1), numcodecs.BZ2(1), numcodecs.Blosc("lz4hc")])
        )
        options["chunk_key_encoding"] = {"name": "v2", "configuration": {"separator": separator}}
        options["order"] = draw(st.sampled_from("CF"))
    else:
        options["compressors"] = draw(st.sampled_from(COMPRESSORS_3))
        name = draw(st.sampled_from(["default", "v2"]))
        options["chunk_key_encoding"] = {"name": name, "configuration": {"separator": separator}}
        options["serializer"] = codecs.BytesCodec(endian=draw(st.sampled_from(["little", "big"])))
        if draw(st.booleans()):
            options["shards"] = tuple(n * draw(st.integers(1, 3)) for n in chunks)
        if draw(st.booleans()) and len(axes) > 2:
            options["filters"] = [codecs.TransposeCodec(order=tuple(reversed(range(len(axes)))))]
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    if version == 2 and draw(st.booleans()):
        dtype = dtype.newbyteorder(">")
    return {"axes": axes, "shape": shape, "chunks": chunks, "version": version, "dtype": dtype, "options": options}


@examples(150)
@given(array=arrays(), data=st.data())
def test_whatever_a_writer_writes(array: dict[str, Any], data: st.DataObject) -> None:
    voxels = random_voxels(array["shape"], array["dtype"].name).astype(array["dtype"])
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_zarr(
            folder,
            voxels,
            chunks=array["chunks"],
            version=array["version"],
            axes=array["axes"],
            translation=(80, 20, 0),
            **array["options"],
        )
        prefix = data.draw(st.sampled_from(["zarr", f"zarr{array['version']}"]))
        layer = opened(f"{prefix}://file://{folder}")
        expected = as_planes(voxels, array["axes"])
        start = vector(n if a in array["axes"] else 0 for a, n in zip("zyx", (2, 5, 0), strict=True))
        assert layer.bounds.start == start
        assert layer.scale.dtype == array["dtype"].name and layer.scale.channels == expected.shape[0]
        low = [data.draw(st.integers(0, n - 1)) for n in expected.shape[1:]]
        high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, expected.shape[1:], strict=True)]
        box = Box(*(vector(a + s for a, s in zip(corner, start, strict=True)) for corner in (low, high)))
        read = layer.read(box)
        assert read.dtype.isnative
        np.testing.assert_array_equal(read, expected[(slice(None), *map(slice, low, high))])


@pytest.mark.parametrize("compression", ["raw", "gzip", "bzip2", "xz", "zstd", "blosc"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_n5(tmp_path: Path, compression: str, dtype: str) -> None:
    voxels = random_voxels((13, 20, 6), dtype)  # xyz, as N5 has it
    more = {"cname": "lz4", "clevel": 5, "shuffle": 1} if compression == "blosc" else {}
    write_n5(tmp_path / "s0", voxels, compression={"type": compression, **more})
    (tmp_path / "attributes.json").write_text(json.dumps({"n5": "2.0.0"}))
    for address in (f"n5://file://{tmp_path}", f"n5://file://{tmp_path}/s0"):
        np.testing.assert_array_equal(read_all(address), voxels.T[None])


def write_n5(folder: Path, voxels: NDArray[Any], **metadata: Any) -> None:
    metadata = {
        "dimensions": list(voxels.shape),
        "blockSize": [5, 8, 4, 2][: voxels.ndim],
        "dataType": voxels.dtype.name,
        "compression": {"type": "gzip"},
    } | metadata
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{folder}/"}, "metadata": metadata, "create": True}
    tensorstore.open(spec).result().write(voxels).result()


def add(file: Path, **attributes: Any) -> None:
    """Add attributes to a JSON file, which may not be there."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | attributes))


SIZES: dict[str, tuple[Callable[[Path], object], tuple[float, ...], tuple[int, ...]]] = {
    "pixelResolution, as BigStitcher has it": (
        lambda f: add(f / "s0/attributes.json", pixelResolution={"unit": "um", "dimensions": [0.0081, 0.004, 0.04]}),
        (40, 4, 8.1),
        (0, 0, 0),
    ),
    "in the group, with scales": (
        lambda f: add(
            f / "attributes.json",
            pixelResolution={"unit": "nm", "dimensions": [4, 4, 40]},
            scales=[[1, 1, 1], [2, 2, 1]],
        ),
        (40, 4, 4),
        (0, 0, 0),
    ),
    "resolution, a plain list": (
        lambda f: add(f / "s0/attributes.json", resolution=[4, 4, 40], offset=[8, 16, 80]),
        (40, 4, 4),
        (2, 4, 2),
    ),
    "transform, as COSEM has it": (
        lambda f: add(
            f / "s0/attributes.json",
            transform={"axes": ["z", "y", "x"], "scale": [5.24, 4, 4], "translate": [0, 4, 8], "units": ["nm"] * 3},
        ),
        (5.24, 4, 4),
        (0, 1, 2),
    ),
    "nothing": (lambda f: None, (0, 0, 0), (0, 0, 0)),
}


@pytest.mark.parametrize("how", SIZES)
def test_voxel_sizes_of_n5(tmp_path: Path, how: str) -> None:
    write_n5(tmp_path / "s0", random_voxels((13, 20, 6)))
    write, size, start = SIZES[how]
    write(tmp_path)
    if not (tmp_path / "attributes.json").exists():
        (tmp_path / "attributes.json").write_text('{"n5": "2.0.0"}')
    scale = read_scale(f"n5://file://{tmp_path}", 0)
    assert (scale.resolution, scale.bounds.start) == (size, start)


@pytest.mark.parametrize(
    ("unit", "factor"), [("nanometer", 1), ("micrometer", 1000), ("millimeter", 10**6), ("angstrom", 0.1), (None, 0)]
)
def test_units(tmp_path: Path, unit: str | None, factor: float) -> None:
    write_zarr(tmp_path, random_voxels((4, 4, 4)), chunks=(2, 2, 2))
    file = tmp_path / "zarr.json"
    content = json.loads(file.read_text())
    for axis in content["attributes"]["ome"]["multiscales"][0]["axes"]:
        axis.pop("unit")
        axis |= {"unit": unit} if unit else {}
    file.write_text(json.dumps(content))
    assert read_scale(f"zarr://file://{tmp_path}", 0).resolution == pytest.approx((40 * factor, 4 * factor, 4 * factor))


def test_smaller_scales_are_where_the_large_one_is(tmp_path: Path) -> None:
    """By the convention of OME-Zarr, a voxel's position is that of its centre."""
    write_zarr(tmp_path, random_voxels((8, 16, 16)), chunks=(4, 4, 4), translation=(80, 40, 40))
    data = random_voxels((4, 8, 8), seed=1)
    zarr.create_array(store=tmp_path / "1", data=data, chunks=(4, 4, 4))
    content = json.loads((tmp_path / "zarr.json").read_text())
    image = content["attributes"]["ome"]["multiscales"][0]
    changes = [{"type": "scale", "scale": [80, 8, 8]}, {"type": "translation", "translation": [100, 42, 42]}]
    image["datasets"].append({"path": "1", "coordinateTransformations": changes})
    (tmp_path / "zarr.json").write_text(json.dumps(content))
    scale = read_scale(f"zarr://file://{tmp_path}", 1)
    assert (scale.bounds.start, scale.resolution) == ((1, 5, 5), (80, 8, 8))
    np.testing.assert_array_equal(read_all(f"zarr://file://{tmp_path}", 1)[0], data)


def plain(folder: Path, **options: Any) -> Path:
    """A plain array, of no image."""
    defaults = {"shape": (4, 6, 8), "chunks": (2, 3, 4), "dtype": "uint8"}
    array = zarr.create_array(store=folder, config={"write_empty_chunks": True}, **defaults | options)
    array[:] = random_voxels(array.shape)
    return folder


@pytest.mark.parametrize("version", [2, 3])
def test_plain_arrays_with_what_funlib_writes_beside(tmp_path: Path, version: int) -> None:
    attributes = {"resolution": [40, 4, 4], "offset": [400, 8, 0]}
    plain(tmp_path / "raw", attributes=attributes, zarr_format=version)
    scale = read_scale(f"zarr://file://{tmp_path}/raw", 0)
    assert (scale.resolution, scale.bounds) == ((40, 4, 4), Box((10, 2, 0), (14, 8, 8)))
    np.testing.assert_array_equal(read_all(f"zarr://file://{tmp_path}/raw")[0], random_voxels((4, 6, 8)))


def test_names_of_dimensions_count(tmp_path: Path) -> None:
    plain(tmp_path / "raw", dimension_names=["x", "y", "z"])
    np.testing.assert_array_equal(read_all(f"zarr://file://{tmp_path}/raw")[0], random_voxels((4, 6, 8)).T)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def of_group(content: dict[str, Any]) -> Any:
    return content["attributes"]["ome"]["multiscales"]


def use_codec(name: str) -> Callable[[Path], None]:
    return lambda f: edit(f / "0/zarr.json", lambda c: c.update(codecs=[{"name": "bytes"}, {"name": name}]))


REFUSED: dict[str, tuple[Callable[[Path], object], type[ChunkflowError], str]] = {
    "several points in time": (
        lambda f: write_zarr(f, random_voxels((2, 4, 4, 4)), chunks=(1, 4, 4, 4), axes="tzyx", overwrite=True),
        MissingInputError,
        "2 time points",
    ),
    "two images": (
        lambda f: edit(f / "zarr.json", lambda c: of_group(c).append(of_group(c)[0])),
        MissingInputError,
        "2 images; name the array",
    ),
    "an array that is not there": (
        lambda f: edit(f / "zarr.json", lambda c: of_group(c)[0]["datasets"][0].update(path="9")),
        MissingInputError,
        "no array at 9",
    ),
    "another transformation": (
        lambda f: edit(
            f / "zarr.json",
            lambda c: of_group(c)[0]["datasets"][0].update(
                coordinateTransformations=[{"type": "affine", "affine": [[1, 0, 0, 0]]}]
            ),
        ),
        MissingInputError,
        "type affine",
    ),
    "a container of images": (
        lambda f: (f / "zarr.json").write_text(
            '{"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"bioformats2raw.layout": 3}}}'
        ),
        MissingInputError,
        "container of images",
    ),
    "a plate": (
        lambda f: (f / "zarr.json").write_text(
            '{"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"plate": {}}}}'
        ),
        MissingInputError,
        "plate",
    ),
    "a group of nothing": (
        lambda f: (f / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}'),
        MissingInputError,
        "name the array",
    ),
    "half a file": (
        lambda f: (f / "zarr.json").write_text((f / "zarr.json").read_text()[:50]),
        MissingInputError,
        "zarr.json is not JSON",
    ),
    "complex numbers": (
        lambda f: edit(f / "0/zarr.json", lambda c: c.update(data_type="complex64")),
        MissingInputError,
        "complex64",
    ),
    "a codec that nobody knows": (use_codec("numcodecs.delta"), SpecError, "numcodecs.delta"),
    "another codec": (use_codec("zfp"), SpecError, "zfp"),
    "a grid that is not regular": (
        lambda f: edit(f / "0/zarr.json", lambda c: c["chunk_grid"].update(name="rectilinear")),
        MissingInputError,
        "can't be understood",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_t_be_read_is_refused(tmp_path: Path, what: str) -> None:
    write_zarr(tmp_path, random_voxels((4, 4, 4)), chunks=(2, 2, 2))
    change, kind, text = REFUSED[what]
    change(tmp_path)
    address = f"zarr://file://{tmp_path}"
    with pytest.raises(kind, match=text):
        check_decoder(address, read_scale(address, 0))


def test_scales_that_are_not_there(tmp_path: Path) -> None:
    write_zarr(tmp_path, random_voxels((4, 4, 4)), chunks=(2, 2, 2))
    with pytest.raises(MissingInputError, match="mips 0 to 0"):
        read_scale(f"zarr://file://{tmp_path}", 1)
    with pytest.raises(MissingInputError, match="a single array"):
        read_scale(f"zarr://file://{tmp_path}/0", 1)


def test_an_address_of_another_format_says_which_it_is(tmp_path: Path) -> None:
    write_zarr(tmp_path / "two", random_voxels((4, 4, 4)), chunks=(2, 2, 2), version=2)
    write_n5(tmp_path / "five", random_voxels((4, 4, 4)))
    for address in (f"file://{tmp_path}/two", f"zarr3://file://{tmp_path}/two", f"n5://file://{tmp_path}/two"):
        with pytest.raises(MissingInputError, match=f"write zarr://file://{tmp_path}/two"):
            read_scale(address, 0)
    with pytest.raises(MissingInputError, match=f"write n5://file://{tmp_path}/five"):
        read_scale(f"zarr://file://{tmp_path}/five", 0)
    with pytest.raises(MissingInputError, match="Check the path"):
        read_scale(f"zarr://file://{tmp_path}/nothing", 0)


@pytest.mark.parametrize("shards", [None, (4, 4, 4)])
@pytest.mark.parametrize("compressor", [None, codecs.GzipCodec(), codecs.ZstdCodec(), codecs.BloscCodec()])
@pytest.mark.parametrize("harm", [lambda c: b"", lambda c: c[:-3], lambda c: c[: len(c) // 2]])
def test_damaged_storage_chunks_are_named(
    tmp_path: Path, compressor: Any, shards: Any, harm: Callable[[bytes], bytes]
) -> None:
    write_zarr(tmp_path, random_voxels((8, 8, 8)), chunks=(2, 4, 4), compressors=compressor, shards=shards)
    file = tmp_path / "0/c/0/1/1"
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(StorageError, match=r"0/c/0/1/1.*has just been written"):
        read_all(f"zarr://file://{tmp_path}")
    make_old(tmp_path)
    with pytest.raises(DataError, match="storage chunk 0/c/0/1/1"):
        read_all(f"zarr://file://{tmp_path}")


@pytest.mark.parametrize("fill", [0, 7])
def test_missing_storage_chunks(tmp_path: Path, fill: int) -> None:
    """Writers leave out what is full of the fill value, and whatever they did not get to."""
    voxels = random_voxels((4, 4, 4))
    write_zarr(tmp_path, voxels, chunks=(2, 2, 2), fill_value=fill)
    (tmp_path / "0/c/1/0/1").unlink()
    with pytest.raises(MissingInputError, match="0/c/1/0/1"):
        read_all(f"zarr://file://{tmp_path}")
    voxels[2:, :2, 2:] = fill
    np.testing.assert_array_equal(read_all(f"zarr://file://{tmp_path}", fill_missing=True)[0], voxels)


def test_channels_with_files_of_their_own(tmp_path: Path) -> None:
    voxels = random_voxels((3, 4, 4, 4))
    write_zarr(tmp_path, voxels, chunks=(2, 2, 2, 2), axes="czyx")
    address = f"zarr://file://{tmp_path}"
    np.testing.assert_array_equal(read_all(address), voxels)
    signatures = LayerSignatures(address, read_scale(address, 0))
    assert signatures.digest(Box((0, 0, 0), (4, 4, 4))) == ""  # so that voxels are looked at
    (tmp_path / "0/c/1/0/0/1").unlink()
    with pytest.raises(MissingInputError, match="0/c/1/0/0/1"):
        read_all(address)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("separator", ["/", "."])
def test_changes_are_noticed_where_they_are(tmp_path: Path, version: int, separator: str) -> None:
    name = "v2" if version == 2 else "default"
    keys = {"name": name, "configuration": {"separator": separator}}
    write_zarr(tmp_path, random_voxels((4, 4, 4)), chunks=(2, 2, 2), version=version, chunk_key_encoding=keys)
    address = f"zarr://file://{tmp_path}"
    scale = read_scale(address, 0)
    boxes = list(scale.storage_chunks(scale.bounds))

    def digests() -> list[str]:
        signatures = LayerSignatures(address, scale)
        signatures.load(boxes)
        return [signatures.digest(box) for box in boxes]

    before = digests()
    assert all(before) and len(set(before)) == 8
    file = tmp_path / "0" / scale.file(boxes[3]).removeprefix("0/")
    file.write_bytes(file.read_bytes() + b"x")
    assert [a != b for a, b in zip(before, digests(), strict=True)] == [box == boxes[3] for box in boxes]


@examples(60)
@given(data=st.data())
def test_whatever_metadata_says(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("layer")
    version = data.draw(st.sampled_from([2, 3, 5]))
    if version == 5:
        write_n5(folder / "s0", random_voxels((4, 4, 4)))
        (folder / "attributes.json").write_text(json.dumps({"scales": [[1, 1, 1]], "resolution": [4, 4, 40]}))
    else:
        write_zarr(folder, random_voxels((4, 4, 4)), chunks=(2, 2, 2), version=version)
    files = sorted(f for f in folder.rglob("*") if f.suffix == ".json" or f.name in (".zarray", ".zattrs"))
    file = data.draw(st.sampled_from(files))
    content = json.loads(file.read_text())
    place, value = data.draw(st.sampled_from(list(places(content)))), data.draw(st.sampled_from(VALUES))
    file.write_text(json.dumps(changed(content, place, value)))
    make_old(folder)
    try:
        layer = opened(f"{'n5' if version == 5 else 'zarr'}://file://{folder}")
        corner = Box(layer.bounds.start, vector(a + 4 for a in layer.bounds.start))
        layer.read(corner & layer.bounds)
    except ChunkflowError as error:
        assert error.exit_code in (65, 66, 78), error


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_small_box_needs_only_its_pieces_of_a_shard(tmp_path: Path, location: str, channels: int) -> None:
    shape = (channels, 8, 24, 24) if channels > 1 else (8, 24, 24)
    axes, chunks, shards = ("czyx", (1, 4, 4, 4), (2, 8, 12, 12)) if channels > 1 else ("zyx", (4, 4, 4), (8, 12, 12))
    voxels = random_voxels(shape)
    sharding = codecs.ShardingCodec(chunk_shape=chunks, codecs=[codecs.BytesCodec()], index_location=location)
    write_zarr(tmp_path, voxels, chunks=shards, axes=axes, serializer=sharding, compressors=None)
    layer, expected = opened(f"zarr://file://{tmp_path}"), as_planes(voxels, axes)
    (file,) = tmp_path.glob("0/c/**/1/1")
    content = bytearray(file.read_bytes())
    index = 2 * 3 * 3 * channels * 16 + 4
    body = slice(index, None) if location == "start" else slice(0, len(content) - index)
    size = 4 * 4 * 4
    pieces = len(content[body]) // size
    assert pieces == 18 * channels
    box, one = Box((4, 16, 13), (5, 20, 16)), Box((0, 12, 12), (8, 24, 24))
    np.testing.assert_array_equal(layer.read(box), expected[:, 4:5, 16:20, 13:16])
    content[body] = bytes(size) + content[body][size:]  # the first piece, of none of the box
    file.write_bytes(content)
    np.testing.assert_array_equal(layer.read(box), expected[:, 4:5, 16:20, 13:16])
    assert (layer.read(one) != expected[:, :, 12:, 12:]).any()
    content[-3 if location == "end" else index - 3] ^= 1
    file.write_bytes(content)
    make_old(tmp_path)
    with pytest.raises(DataError, match=r"1/1: its index is damaged"):
        layer.read(box)
    file.write_bytes(content[:40])
    make_old(tmp_path)
    with pytest.raises(DataError, match="1/1 has 40 bytes, fewer than its index"):
        layer.read(box)
    file.unlink()
    with pytest.raises(MissingInputError, match="1/1"):
        layer.read(box)
    filled = opened(f"zarr://file://{tmp_path}", fill_missing=True)
    assert not filled.read(box).any()


@pytest.mark.parametrize("version", [2, 3, 5])
@pytest.mark.parametrize("size", [2**20, 2**40])
def test_storage_chunks_for_which_there_is_no_memory(tmp_path: Path, version: int, size: int) -> None:
    """TensorStore ends the process that tries."""
    if version == 5:
        write_n5(tmp_path, random_voxels((4, 4, 4)))
        add(tmp_path / "attributes.json", blockSize=[size] * 3)
    else:
        write_zarr(tmp_path, random_voxels((4, 4, 4)), chunks=(2, 2, 2), version=version)
        if version == 2:
            add(tmp_path / "0/.zarray", chunks=[size] * 3)
        else:
            edit(tmp_path / "0/zarr.json", lambda c: c["chunk_grid"]["configuration"].update(chunk_shape=[size] * 3))
    with pytest.raises(MissingInputError, match="bytes decoded at a time"):
        read_scale(f"{'n5' if version == 5 else 'zarr'}://file://{tmp_path}", 0)
