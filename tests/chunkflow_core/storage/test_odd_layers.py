"""Layers as others write them, and damaged ones.

They give the voxels that an independent reader finds, or one line that names the file.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import zstandard
from cloudvolume import CloudVolume, chunks
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.errors import EXIT_CODES, ChunkflowError, DataError, MissingInputError, StorageError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.codecs import check_codec
from chunkflow_core.storage.layer_info import ENCODINGS, read_scale
from chunkflow_core.storage.layers import InputLayer
from tests.support.random_examples import examples
from tests.support.volume import write_volume

Command = Callable[..., Any]
Change = Callable[[dict[str, Any]], object]

SHAPE = (6, 20, 13)
ALL = Box((0, 0, 0), SHAPE)
NAME = "0-8_16-20_4-6"
"""A storage chunk, cut short at two ends."""
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".br": brotli.compress,
    ".zstd": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
DTYPES = {"raw": "uint16", "jpeg": "uint8", "jxl": "uint8", "compressed_segmentation": "uint64"}
"""Encodings whose codecs are installed, each with a dtype that it takes."""


def voxels_for(encoding: str) -> NDArray[Any]:
    return np.random.default_rng(2).integers(1, 250, SHAPE).astype(DTYPES[encoding])


def write(folder: Path, encoding: str, extension: str) -> None:
    """Write a layer, a file for each storage chunk; neither reader nor writer of ours is used."""
    voxels = voxels_for(encoding)
    scale = {
        "key": "s",
        "size": [13, 20, 6],
        "voxel_offset": [0, 0, 0],
        "chunk_sizes": [[8, 8, 4]],
        "resolution": [4, 4, 40],
        "encoding": encoding,
    }
    if encoding == "compressed_segmentation":
        scale["compressed_segmentation_block_size"] = [8, 8, 8]
    info = {"type": "image", "data_type": DTYPES[encoding], "num_channels": 1, "scales": [scale]}
    (folder / "s").mkdir(parents=True)
    (folder / "info").write_text(json.dumps(info))
    for z in range(0, 6, 4):
        for y in range(0, 20, 8):
            for x in range(0, 13, 8):
                part = voxels[z : z + 4, y : y + 8, x : x + 8]
                encoded = chunks.encode(np.asfortranarray(part.T[..., None]), encoding, (8, 8, 8), {"level": 100})
                ends = [min(a + n, end) for a, n, end in ((x, 8, 13), (y, 8, 20), (z, 4, 6))]
                name = "_".join(f"{a}-{b}" for a, b in zip((x, y, z), ends, strict=True))
                (folder / "s" / f"{name}{extension}").write_bytes(COMPRESSIONS[extension](encoded))


def read(folder: Path, mip: int = 0, *, fill_missing: bool = False) -> NDArray[Any]:
    path = f"file://{folder}"
    scale = read_scale(path, mip)
    return InputLayer(path, mip, scale, scale.bounds, padding="reflect", fill_missing=fill_missing).read(scale.bounds)


def make_old(file: Path) -> None:
    os.utime(file, (time.time() - 1e6,) * 2)


def edit(folder: Path, change: Change) -> None:
    info = json.loads((folder / "info").read_text())
    change(info)
    (folder / "info").write_text(json.dumps(info))


def texts(info: dict[str, Any]) -> None:
    info["scales"][0].update(size=["13", "20", "6.0"])


READABLE: dict[str, Change] = {
    "decimals": lambda info: info["scales"][0].update(size=[13.0, 20.0, 6.0], chunk_sizes=[[8.0, 8, 4]]),
    "texts": texts,
    "channels": lambda info: info.update(num_channels=1.0),
    "capitals": lambda info: (info.update(data_type="UINT16", type="IMAGE"), info["scales"][0].update(encoding="RAW")),
    "no offset": lambda info: info["scales"][0].pop("voxel_offset"),
    "empty offset": lambda info: info["scales"][0].update(voxel_offset=None),
    "decimal offset": lambda info: info["scales"][0].update(voxel_offset=[-0.0, 0.0, 0]),
    "no type": lambda info: info.pop("type"),
    "no encoding": lambda info: info["scales"][0].pop("encoding"),
    "no sharding": lambda info: info["scales"][0].update(sharding=None),
    "folder": lambda info: info["scales"][0].update(key="./s"),
    "folder with slash": lambda info: info["scales"][0].update(key="s/"),
    "more": lambda info: (info.update({"@type": "neuroglancer_multiscale_volume", "x": {}}), info["scales"].append(7)),
    "sizes": lambda info: info["scales"][0].update(chunk_sizes=[[8, 8, 4], [13, 20, 1]]),
    "resolution": lambda info: info["scales"][0].update(resolution=[4.25, 4.0, 40]),
}


@pytest.mark.parametrize("extension", ["", ".gz"])
@pytest.mark.parametrize("change", READABLE.values(), ids=READABLE)
def test_clear_infos_are_read(tmp_path: Path, change: Change, extension: str) -> None:
    write(tmp_path, "raw", extension)
    edit(tmp_path, change)
    np.testing.assert_array_equal(read(tmp_path)[0], voxels_for("raw"))
    assert read_scale(f"file://{tmp_path}", 0).info["scales"][0]["key"] == "s", "to a bucket, ./s is another folder"


def test_a_compressed_info_is_read(tmp_path: Path) -> None:
    write(tmp_path, "raw", ".gz")
    (tmp_path / "info.gz").write_bytes(gzip.compress((tmp_path / "info").read_bytes()))
    (tmp_path / "info").unlink()
    np.testing.assert_array_equal(read(tmp_path)[0], voxels_for("raw"))


UNCLEAR: dict[str, Change] = {
    "size is missing": lambda info: info["scales"][0].pop("size"),
    "num_channels is missing": lambda info: info.pop("num_channels"),
    "data_type is missing": lambda info: info.pop("data_type"),
    "key is missing": lambda info: info["scales"][0].pop("key"),
    "resolution is missing": lambda info: info["scales"][0].pop("resolution"),
    r"size is \[13.5, 20, 6\]": lambda info: info["scales"][0].update(size=[13.5, 20, 6]),
    "key is '../s'": lambda info: info["scales"][0].update(key="../s"),
    "encoding is 'webp'": lambda info: info["scales"][0].update(encoding="webp"),
}


@pytest.mark.parametrize("told", UNCLEAR)
def test_unclear_infos_are_refused_with_the_key(tmp_path: Path, told: str) -> None:
    write(tmp_path, "raw", "")
    edit(tmp_path, UNCLEAR[told])
    with pytest.raises(MissingInputError, match=rf"^file://{tmp_path}: .*{told}"):
        read(tmp_path)


@pytest.mark.parametrize("extension", COMPRESSIONS)
@pytest.mark.parametrize("encoding", DTYPES)
def test_damaged_files_are_named(tmp_path: Path, encoding: str, extension: str) -> None:
    write(tmp_path, encoding, extension)
    np.testing.assert_array_equal(read(tmp_path)[0], np.asarray(CloudVolume(f"file://{tmp_path}")[:, :, :]).T[0])
    file = tmp_path / "s" / f"{NAME}{extension}"
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:1], b"<html>gone</html>", b"\xff" * len(whole)):
        if encoding == "raw" and not extension and len(content) == len(whole):
            continue  # such voxels can be right
        file.write_bytes(content)
        with pytest.raises(StorageError, match=rf"s/{NAME}.* It has just been written"):
            read(tmp_path)
        make_old(file)
        with pytest.raises(DataError, match=f"s/{NAME}"):
            read(tmp_path)
    file.unlink()
    with pytest.raises(MissingInputError, match=f"s/{NAME}"):
        read(tmp_path)


@pytest.mark.parametrize("block", [[0, 8, 8], [8, 8], [2**40] * 3, "8", [8.5, 8, 8]])
def test_block_sizes_that_cannot_be(tmp_path: Path, block: object) -> None:
    write(tmp_path, "compressed_segmentation", "")
    edit(tmp_path, lambda info: info["scales"][0].update(compressed_segmentation_block_size=block))
    with pytest.raises(MissingInputError, match="compressed_segmentation_block_size is"):
        read(tmp_path)


@pytest.mark.parametrize("command", ["plan", "prepare"])
@pytest.mark.parametrize("layer", ["input", "skip.mask"])
def test_codecs_that_are_not_installed(tmp_path: Path, chunkflow: Command, command: str, layer: str) -> None:
    path = write_volume(tmp_path)
    assert chunkflow("plan", path).returncode == 0
    absent = sorted(set(ENCODINGS) & set(chunks.NEEDS_INSTALL))
    if not absent:
        pytest.skip("all codecs are installed")
    write(tmp_path / "odd", "raw", "")
    for encoding in absent:
        info = json.loads((tmp_path / "odd" / "info").read_text())
        info["scales"][0]["encoding"] = encoding
        (tmp_path / "odd" / "info").write_text(json.dumps(info))
        outcome = chunkflow(command, path, "--set", f"{layer}.path=file://{tmp_path}/odd")
        assert outcome.returncode == 78
        assert f"file://{tmp_path}/odd: encoding {encoding}" in outcome.stderr
        assert f"pip install {chunks.NEEDS_INSTALL[encoding]}" in outcome.stderr
        assert outcome.stdout == ""


def test_codecs_that_are_installed() -> None:
    for encoding in ENCODINGS:
        codec = "fpzip" if encoding == "kempressed" else encoding
        if codec not in chunks.NEEDS_INSTALL:
            check_codec("", encoding)


JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 30),
    st.floats(),
    st.sampled_from(["", "s", "./s", "S", "raw", "JPEG", "uint8", "UINT16", "13", "4.0", "../s", "file:///", "\ud800"]),
    st.lists(st.one_of(st.integers(-1, 20), st.floats(-1, 20), st.just("8"), st.none()), max_size=4),
    st.just({"@type": "neuroglancer_uint64_sharded_v1"}),
)
KEYS = ["size", "voxel_offset", "chunk_sizes", "resolution", "encoding", "key", "sharding"]
KEYS += ["compressed_segmentation_block_size"]


@given(
    encoding=st.sampled_from(sorted(DTYPES)),
    extension=st.sampled_from(sorted(COMPRESSIONS)),
    scale=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2),
    info=st.dictionaries(st.sampled_from(["type", "num_channels", "data_type", "redirect", "@type"]), JSON, max_size=1),
    gone=st.lists(st.sampled_from([*KEYS, ""]), max_size=1),
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 60),
    fill_missing=st.booleans(),
)
@examples(150)
def test_odd_and_hostile_layers(
    tmp_path_factory: pytest.TempPathFactory,
    encoding: str,
    extension: str,
    scale: dict[str, Any],
    info: dict[str, Any],
    gone: list[str],
    damage: list[tuple[int, int]],
    cut: int,
    fill_missing: bool,
) -> None:
    """CloudVolume itself is asked only where it can't bring the process down."""
    folder = tmp_path_factory.mktemp("layer")
    write(folder, encoding, extension)
    plain, expected = read_scale(f"file://{folder}", 0), read(folder)

    def change(whole: dict[str, Any]) -> None:
        whole.update(info)
        whole["scales"][0].update(scale)
        for key in gone:
            whole["scales"][0].pop(key, None)

    edit(folder, change)
    file = folder / "s" / f"{NAME}{extension}"
    content = bytearray(file.read_bytes())
    for place, value in damage:
        content[place % len(content)] = value
    file.write_bytes(content[: len(content) - cut])
    make_old(file)
    try:
        found = read(folder, fill_missing=fill_missing)
    except ChunkflowError as error:
        assert error.exit_code in EXIT_CODES and error.exit_code not in (0, 1)
        assert f"file://{folder}" in str(error)
        return
    if scale or info or gone:  # CloudVolume takes what is written plainly
        is_same = replace(read_scale(f"file://{folder}", 0), resolution=plain.resolution) == plain
        assert not is_same or damage or cut or np.array_equal(found, expected)
        return
    expected = np.asarray(CloudVolume(f"file://{folder}", progress=False, fill_missing=fill_missing)[:, :, :]).T
    np.testing.assert_array_equal(found, expected)
