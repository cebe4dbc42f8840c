"""Arrays of zarr as others write them: by zarr-python, which shares no code with TensorStore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

NANOMETRES = {"unit": "nanometer"}


def write_zarr(
    folder: Path,
    data: NDArray[Any],
    *,
    chunks: tuple[int, ...],
    version: int = 3,
    axes: str = "zyx",
    voxel_size: tuple[float, ...] = (40.0, 4.0, 4.0),
    translation: tuple[float, ...] | None = None,
    **options: Any,
) -> None:
    """Write an OME-Zarr image of one scale.

    Args:
        folder: Where to.
        data: The voxels, with a dimension for each letter of ``axes``.
        chunks: Size of a storage chunk.
        version: Of zarr: 2 (OME-Zarr 0.4) or 3 (0.5).
        axes: What each dimension is, of ``tczyx``.
        voxel_size: In nm, zyx.
        translation: Position of the first voxel, in nm, zyx.
        options: More of ``zarr.create_array``.
    """
    if version == 2:
        options = {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}} | options
    array = zarr.create_array(
        store=folder / "0",
        shape=data.shape,
        dtype=data.dtype,
        chunks=chunks,
        zarr_format=version,  # type: ignore[arg-type]
        config={"write_empty_chunks": True},
        **options,
    )
    array[:] = data
    size = dict(zip("zyx", voxel_size, strict=True))
    kinds = {"t": {"type": "time"}, "c": {"type": "channel"}}
    changes = [{"type": "scale", "scale": [size.get(axis, 1.0) for axis in axes]}]
    if translation is not None:
        start = dict(zip("zyx", translation, strict=True))
        changes.append({"type": "translation", "translation": [start.get(axis, 0.0) for axis in axes]})
    image = {
        "axes": [{"name": axis} | kinds.get(axis, {"type": "space", **NANOMETRES}) for axis in axes],
        "datasets": [{"path": "0", "coordinateTransformations": changes}],
    }
    if version == 3:
        ome = {"ome": {"version": "0.5", "multiscales": [image]}}
        content = {"zarr_format": 3, "node_type": "group", "attributes": ome}
        (folder / "zarr.json").write_text(json.dumps(content))
    else:
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps({"multiscales": [{"version": "0.4"} | image]}))


def random_voxels(shape: tuple[int, ...], dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    """Voxels without any that are 0."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return (rng.random(shape) + 0.5).astype(dtype)
    return rng.integers(1, min(np.iinfo(dtype).max, 2**40), shape).astype(dtype)
