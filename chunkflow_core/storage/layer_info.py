"""What a precomputed layer's ``info`` says about one scale, read without importing cloudvolume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_core.errors import MissingInputError, StorageError
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.storage.addresses import PRECOMPUTED

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

FARTHEST = 2**53
"""Largest coordinate or length in voxels. Readers such as Neuroglancer tell no larger ones apart,
and sums of some of them still fit 64 bits."""

_SHARDED = "sharded"
_MOST_CHANNELS, _FINEST, _COARSEST, _LONGEST_NAME = 2**16, 1e-9, 1e9, 255
"""Limits of what an ``info`` may say: channels, voxel size in nm, bytes of a folder's name."""


@dataclass(frozen=True, slots=True)
class LayerScale:
    """One scale of a layer; vectors are in the order z, y, x."""

    bounds: Box
    resolution: tuple[float, ...]
    """Voxel size in nm, as the layer gives it."""
    chunk: Vector
    """Storage chunk size in voxels."""
    dtype: str
    channels: int
    encoding: str
    """Encoding of storage chunks, such as ``raw``; ``sharded`` if they share files."""
    info: dict[str, Any] = field(compare=False, repr=False)
    """The whole layer's ``info``, so that whoever opens the layer need not read it again."""

    @property
    def meaning(self) -> str:
        """What decides the meaning of voxels: dtype, channels, and their size in nm, zyx."""
        return f"{self.dtype} {self.channels} {self.resolution}"

    def storage_chunks(self, box: Box) -> Iterator[Box]:
        """The storage chunks that touch a box inside the layer, whole."""
        ranges = [
            [
                (p, min(p + c, self.bounds.stop[a]))
                for p in range(box.start[a] - (box.start[a] - self.bounds.start[a]) % c, box.stop[a], c)
            ]
            for a, c in enumerate(self.chunk)
        ]
        for z, y, x in product(*ranges):
            yield Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))


def read_info(path: str) -> dict[str, Any]:
    """The ``info`` of the layer at ``path``.

    Raises:
        MissingInputError: There is no layer at ``path``, or its ``info`` is not that of a layer.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage did not answer.
    """
    path = path.removeprefix(PRECOMPUTED)
    try:
        if path.startswith("file://"):
            text: bytes | None = (Path(path.removeprefix("file://")).expanduser() / "info").read_bytes()
        else:
            # imports that a DAG of file:// layers need not pay
            from chunkflow_core.storage.files import open_files, storage_errors

            with storage_errors(f"{path}: cannot read the layer's info"):
                text = open_files(path).get("info")
    except (FileNotFoundError, NotADirectoryError):
        text = None
    except OSError as error:
        raise StorageError(f"{path}: cannot read the layer's info: {error}") from error
    if text is None:
        raise MissingInputError(
            f"{path}: there is no layer here (no info file). Check the path; prepare makes output layers"
        )
    try:
        info: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MissingInputError(f"{path}: the layer's info file is not JSON: {error}") from error
    if not isinstance(info, dict) or not isinstance(info.get("scales"), list) or not info["scales"]:
        raise MissingInputError(f"{path}: the info file is not that of a precomputed layer, it lists no scales")
    return info


def read_scale(path: str, mip: int) -> LayerScale:
    """One scale of the layer at ``path``.

    Raises:
        MissingInputError: There is no layer at ``path``, its ``info`` is not that of a layer, or
            the layer does not have this mip.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage did not answer.
    """
    info = read_info(path)
    scales = info["scales"]
    if mip >= len(scales):
        raise MissingInputError(f"{path}: mip {mip} does not exist; the layer has mips 0 to {len(scales) - 1}")
    try:
        return _scale(info, scales[mip])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise MissingInputError(
            f"{path}: the info file is not that of a precomputed layer, its mip {mip} can't be understood "
            f"({type(error).__name__}: {error!s:.300})"
        ) from error


def _scale(info: dict[str, Any], scale: dict[str, Any]) -> LayerScale:
    start = _three("voxel_offset", scale.get("voxel_offset", [0, 0, 0]), positive=False)
    size = _three("size", scale["size"])
    channels, dtype, resolution = info["num_channels"], info["data_type"], scale["resolution"]
    sharding = scale.get("sharding")
    if sharding and not (isinstance(sharding, dict) and "@type" in sharding):
        raise ValueError(f"sharding is {_shown(sharding)}, expected keys and values with @type")
    encoding = _SHARDED if sharding else scale.get("encoding", "raw")
    if type(channels) is not int or not 1 <= channels <= _MOST_CHANNELS:
        raise ValueError(f"num_channels is {_shown(channels)}, expected an integer >= 1, at most {_MOST_CHANNELS}")
    for key, text in {"data_type": dtype, "key": scale["key"], "encoding": encoding}.items():
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{key} is {_shown(text)}, expected a text")
    _check_key(scale["key"])
    if encoding not in ENCODINGS and not sharding:
        raise ValueError(f"encoding is {_shown(encoding)}, expected one of {', '.join(ENCODINGS)}")
    if not _are_three(resolution, int, float) or not all(_is_size(value) for value in resolution):
        raise ValueError(f"resolution is {_shown(resolution)}, expected three numbers of nm")
    np.dtype(dtype)  # TypeError for one that isn't known
    return LayerScale(
        bounds=Box(start, vector(a + n for a, n in zip(start, size, strict=True))),
        resolution=tuple(reversed(resolution)),
        chunk=_three("chunk_sizes", scale["chunk_sizes"][0]),
        dtype=dtype,
        channels=channels,
        encoding=encoding,
        info=info,
    )


def _three(key: str, values: Any, *, positive: bool = True) -> Vector:
    """Three integers of an ``info``, xyz there and zyx here; ``ValueError`` if they are none."""
    if not _are_three(values, int) or (positive and min(values) < 1):
        raise ValueError(f"{key} is {_shown(values)}, expected three integers" + " >= 1" * positive)
    if max(map(abs, values)) > FARTHEST:
        raise ValueError(f"{key} is {_shown(values)}, expected integers within 2^53 (9.0e15)")
    return vector(reversed(values))


def _is_size(value: float) -> bool:
    """Whether a number can be a voxel size in nm; 0 stands for one that is not known."""
    return value == 0 or _FINEST <= value <= _COARSEST


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
