"""A stack is stored as a new layer: there is one only once it is whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np

from chunkflow_core.errors import ChunkflowError, UsageError
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.machine import user
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.disk import local_path
from chunkflow_core.storage.files import is_on_disk, storage_errors
from chunkflow_core.storage.info_file import read_info
from chunkflow_core.storage.ingest.stack import Stack
from chunkflow_core.storage.layers import NewLayer, layer_exists, layer_files

HELD_BYTES = 1 << 28
"""Memory in bytes of the sections that are held at a time.

It is more where a single storage chunk's depth of sections is.
"""

_CHUNK = re.compile(r"(-?\d+--?\d+_){2}-?\d+--?\d+(\.|$)")
"""Names of storage chunks, such as ``0-64_-8-0_0-16``."""


def ingest(
    source: Stack,
    path: str,
    *,
    resolution: tuple[float, ...],
    chunk: Vector,
    offset: Vector = (0, 0, 0),
    overwrite: bool = False,
    planes_done: Callable[[int], object] = lambda _: None,
) -> None:
    """Store a stack as a new layer, a few sections at a time.

    The layer's ``info`` comes last: what ends before leaves no layer, also not one that was to be
    replaced.

    Args:
        source: The stack.
        path: Address of the layer.
        resolution: Voxel size in nm, zyx.
        chunk: Storage chunk size in voxels, zyx.
        offset: Position of the first voxel, zyx.
        overwrite: Whether to replace a layer that is there.
        planes_done: Called with the number of sections written since the last call.

    Raises:
        UsageError: There is a layer, and ``overwrite`` is off.
        DataError: The stack can't be read.
        StorageError: The storage does not answer.
    """
    if layer_exists(path):
        if not overwrite:
            raise UsageError(f"{path}: there is a layer here already; give another path, or --overwrite")
        _delete_layer(path, [scale["key"] for scale in read_info(path)["scales"]])
    layer = NewLayer(
        path,
        source.shape,
        dtype=str(source.dtype),
        resolution=resolution,
        chunk=chunk,
        offset=offset,
        provenance=_provenance(source),
        at_once=False,
    )
    _delete_chunks(path, layer.key)
    try:
        _write(source, layer, chunk, offset, planes_done)
        layer.publish()
    except BaseException:
        with suppress(ChunkflowError):
            _delete_chunks(path, layer.key)
            _delete_layer(path, [])
        raise


def _write(source: Stack, layer: NewLayer, chunk: Vector, offset: Vector, planes_done: Callable[[int], object]) -> None:
    layer_bytes = chunk[0] * source.shape[1] * source.shape[2] * source.dtype.itemsize
    step = chunk[0] * max(1, HELD_BYTES // layer_bytes)
    for start in range(0, source.shape[0], step):
        stop = min(start + step, source.shape[0])
        box = Box(offset, vector(np.add(offset, source.shape).tolist())).with_z(offset[0] + start, offset[0] + stop)
        layer.write(box, source.read(start, stop)[None])
        planes_done(stop - start)


def _provenance(source: Stack) -> dict[str, Any]:
    """What the layer's provenance says of where its voxels come from."""
    step = {"task": "chunkflow-core ingest", "source": source.name, "time": datetime.now(UTC).isoformat("T", "seconds")}
    return {"sources": [source.name], "processing": [{"by": user(), "method": step | source.notes}]}


def _delete_layer(path: str, keys: Iterable[str]) -> None:
    """Delete a layer's ``info``, so that there is none from then on, and then its scales.

    What a new layer does not overwrite would be left among its own.
    """
    with storage_errors(f"deleting the layer {path}"):
        files = layer_files(path)
        files.delete(["info", "provenance"])
        for key in keys:
            files.delete(files.list(prefix=f"{key}/"))
    if is_on_disk(plain(path)):
        for folder in [local_path(plain(path)) / key for key in keys] + [local_path(plain(path))]:
            with suppress(OSError):  # it holds something else
                folder.rmdir()


def _delete_chunks(path: str, key: str) -> None:
    """Delete storage chunks that belong to no layer, of a scale that is to be written."""
    with storage_errors(f"deleting storage chunks of {path}"):
        files = layer_files(path)
        names = files.list(prefix=f"{key}/")
        files.delete([name for name in names if _CHUNK.match(name.removeprefix(f"{key}/"))])
    if is_on_disk(plain(path)):
        with suppress(OSError):
            (local_path(plain(path)) / key).rmdir()
