"""What a precomputed layer's ``info`` says about one scale, read without importing cloudvolume."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from chunkflow_core.errors import MissingInputError
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.storage.addresses import layer_format
from chunkflow_core.storage.info_file import find_info
from chunkflow_core.storage.layer_scale import FARTHEST, MOST_CHANNELS, SHARDED, LayerScale, is_size
from chunkflow_core.storage.zarr_info import read_array

ENCODINGS = (
    "raw",
    "jpeg",
    "png",
    "jxl",
    "compressed_segmentation",
    "compresso",
    "crackle",
    "fpzip",
    "kempressed",
    "zfpc",
)
"""The encodings of storage chunks that CloudVolume reads."""


_LONGEST_NAME, _LARGEST_BLOCK = 255, 2**10
"""Limits of what an ``info`` may say: bytes of a folder's name, voxels along a block of
``compressed_segmentation``.
"""

_INTEGER = re.compile(r"(-?\d{1,20})(\.0*)?", re.ASCII)

_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
"""Data types of the format, which some write in capitals."""


def read_scale(path: str, mip: int) -> LayerScale:
    """One scale of the layer at ``path``, or where its ``info`` redirects to.

    Raises:
        MissingInputError: There is no layer at ``path``, its ``info`` is not that of a layer, or
            the layer does not have this mip.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage did not answer.
    """
    if layer_format(path) != "precomputed":
        return read_array(path, mip)
    address, info = find_info(path)
    scales = info["scales"]
    if mip >= len(scales):
        raise MissingInputError(f"{address}: mip {mip} does not exist; the layer has mips 0 to {len(scales) - 1}")
    try:
        return scale_of(address, info, mip)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        told = (
            f"{error.args[0]} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error!s:.300}"
        )
        raise MissingInputError(
            f"{address}: the info file is not that of a precomputed layer, its mip {mip} can't be understood ({told})"
        ) from error


def scale_of(address: str, info: dict[str, Any], mip: int) -> LayerScale:
    """What an ``info`` says of a scale; an error of Python's own if it can't be understood."""
    info = _tidy(info, mip)
    scale = info["scales"][mip]
    start, size = _three("voxel_offset", scale["voxel_offset"], positive=False), _three("size", scale["size"])
    channels, dtype, resolution = info["num_channels"], info["data_type"], scale["resolution"]
    sharding, codec = scale.get("sharding"), scale["encoding"]
    if sharding and not (isinstance(sharding, dict) and "@type" in sharding):
        raise ValueError(f"sharding is {_shown(sharding)}, expected keys and values with @type")
    if type(channels) is not int or not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"num_channels is {_shown(channels)}, expected an integer >= 1, at most {MOST_CHANNELS}")
    for key, text in {"data_type": dtype, "key": scale["key"], "encoding": codec}.items():
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{key} is {_shown(text)}, expected a text")
    _check_key(scale["key"])
    if codec not in ENCODINGS:
        raise ValueError(f"encoding is {_shown(codec)}, expected one of {', '.join(ENCODINGS)}")
    if not _are_three(resolution, int, float) or not all(is_size(value) for value in resolution):
        raise ValueError(f"resolution is {_shown(resolution)}, expected three numbers of nm")
    np.dtype(dtype)  # TypeError for one that isn't known
    return LayerScale(
        bounds=Box(start, vector(a + n for a, n in zip(start, size, strict=True))),
        resolution=tuple(reversed(resolution)),
        chunk=_three("chunk_sizes", scale["chunk_sizes"][0]),
        dtype=dtype,
        channels=channels,
        encoding=SHARDED if sharding else codec,
        info=info,
        address=address,
        codec=codec,
        key=scale["key"],
    )


def _tidy(info: dict[str, Any], mip: int) -> dict[str, Any]:
    """An ``info`` whose scale ``mip`` is written as CloudVolume takes it.

    Other writers leave out what has one meaning only, write integers as decimals, names in
    capitals, and folders as ``./4_4_40/``. What is not clear stays as it is.
    """
    scale: dict[str, Any] = {**info["scales"][mip]}
    if not scale.get("sharding"):
        scale.pop("sharding", None)
    if scale.get("voxel_offset") is None:
        scale["voxel_offset"] = [0, 0, 0]
    scale["voxel_offset"], scale["size"] = _whole(scale["voxel_offset"]), _whole(scale["size"])
    scale["chunk_sizes"] = [_whole(sizes) for sizes in scale["chunk_sizes"]]
    scale["encoding"] = _lower(scale.get("encoding", "raw"), ENCODINGS)
    if isinstance(scale["key"], str):
        parts = scale["key"].removesuffix("/").split("/")
        scale["key"] = "/".join(part for part in parts if part != ".") or scale["key"]
    if scale["encoding"] == "compressed_segmentation":
        _tidy_blocks(scale)
    return {
        **info,
        "type": info.get("type", "image"),
        "num_channels": _whole_number(info["num_channels"]),
        "data_type": _lower(info["data_type"], _DTYPES),
        "scales": [scale if i == mip else other for i, other in enumerate(info["scales"])],
    }


def _tidy_blocks(scale: dict[str, Any]) -> None:
    """Check the block size of ``compressed_segmentation``, on which its decoder relies."""
    key = "compressed_segmentation_block_size"
    scale[key] = _whole(scale.get(key) or [8, 8, 8])
    if max(_three(key, scale[key])) > _LARGEST_BLOCK:
        raise ValueError(f"{key} is {_shown(scale[key])}, expected integers up to {_LARGEST_BLOCK}")


def _whole(values: Any) -> Any:
    return [_whole_number(value) for value in values] if isinstance(values, list) else values


def _whole_number(value: Any) -> Any:
    """The integer that a JSON number or a text stands for, such as ``10.0``; else the value."""
    if isinstance(value, str) and (digits := _INTEGER.fullmatch(value)):
        return int(digits[1])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lower(text: Any, known: tuple[str, ...]) -> Any:
    """The text in small letters, if that is a known name; else as it is."""
    return text.lower() if isinstance(text, str) and text.lower() in known else text


def _three(key: str, values: Any, *, positive: bool = True) -> Vector:
    """Three integers of an ``info``, xyz there and zyx here; ``ValueError`` if they are none."""
    if not _are_three(values, int) or (positive and min(values) < 1):
        raise ValueError(f"{key} is {_shown(values)}, expected three integers" + " >= 1" * positive)
    if max(map(abs, values)) > FARTHEST:
        raise ValueError(f"{key} is {_shown(values)}, expected integers within 2^53 (9.0e15)")
    return vector(reversed(values))


def _check_key(key: str) -> None:
    """Check that a scale's key names a folder below the layer's; ``ValueError`` if not."""
    parts = key.split("/")
    if "" in parts or ".." in parts or max(len(part.encode()) for part in parts) > _LONGEST_NAME:
        raise ValueError(f"key is {_shown(key)}, expected the name of a folder in the layer's")


def _shown(value: Any) -> str:
    """A value for messages, cut to a length that leaves one line readable."""
    return f"{value!r:.100}"


def _are_three(values: Any, *types: type) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(type(value) in types for value in values)
