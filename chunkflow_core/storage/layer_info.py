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
    except ValueError as error:
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
            f"({type(error).__name__}: {error})"
        ) from error


def _scale(info: dict[str, Any], scale: dict[str, Any]) -> LayerScale:
    start = _three("voxel_offset", scale.get("voxel_offset", [0, 0, 0]), positive=False)
    size = _three("size", scale["size"])
    channels, dtype, resolution = info["num_channels"], info["data_type"], scale["resolution"]
    encoding = "sharded" if scale.get("sharding") else scale.get("encoding", "raw")
    if type(channels) is not int or channels < 1:
        raise ValueError(f"num_channels is {channels!r}, expected an integer >= 1")
    for key, text in {"data_type": dtype, "key": scale["key"], "encoding": encoding}.items():
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{key} is {text!r}, expected a text")
    if not _are_three(resolution, int, float):
        raise ValueError(f"resolution is {resolution!r}, expected three numbers")
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
        raise ValueError(f"{key} is {values!r}, expected three integers" + " >= 1" * positive)
    return vector(reversed(values))


def _are_three(values: Any, *types: type) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(type(value) in types for value in values)
