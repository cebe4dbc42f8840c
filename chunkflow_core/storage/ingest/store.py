"""A stack is stored as a new layer: there is one only once it is whole.

An ingest that was killed, or that met storage trouble, goes on where it was when the same command
is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from chunkflow_core.errors import ChunkflowError, StorageError, UsageError
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.machine import available_cpus, user
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.disk import PARTIAL, local_path
from chunkflow_core.storage.files import is_on_disk, storage_errors
from chunkflow_core.storage.info_file import read_info
from chunkflow_core.storage.ingest.progress import PROGRESS, Progress, digest_of, read_progress, write_progress
from chunkflow_core.storage.ingest.stack import Stack
from chunkflow_core.storage.layers import NewLayer, OutputLayer, layer_exists, layer_files

HELD_BYTES = 1 << 27
"""Memory in bytes of a slab: the sections that are written together, while the next are read.

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
    compression: str = "gzip",
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
    planes_done: Callable[[int], object] = lambda _: None,
) -> int:
    """Store a stack as a new layer, a few sections at a time.

    The layer's ``info`` comes last: what ends before leaves no layer, also not one that was to be
    replaced. Storage chunks that are complete stay if a repetition may go on from them.

    Args:
        source: The stack.
        path: Address of the layer.
        resolution: Voxel size in nm, zyx.
        chunk: Storage chunk size in voxels, zyx.
        offset: Position of the first voxel, zyx.
        compression: Compression of storage chunks: ``gzip``, ``br``, ``zstd`` or ``none``.
        overwrite: Whether to replace a layer that is there.
        options: What else decides which voxels the source has, as JSON.
        planes_done: Called with the number of sections written since the last call.

    Returns:
        How many sections an earlier ingest had written, from which this one went on.

    Raises:
        UsageError: There is a layer, and ``overwrite`` is off; or no layer can be so.
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
    try:
        output = OutputLayer(path, layer.scale, compression)
    except ValueError as error:
        raise UsageError(f"{path}: there is no such layer: {error}") from error
    stored = {"resolution": resolution, "chunk": chunk, "offset": offset, "compression": compression}
    begun = Progress(digest_of(source, stored | (options or {})), layer.key, 0)
    try:
        done = _begin(output, begun)
        planes_done(done)
        _write(source, output, replace(begun, sections=done), planes_done)
        _delete_files(path, [PROGRESS])  # before there is a layer: nothing of it is left beside one
        layer.publish()
    except BaseException as error:
        if not (begun.source and isinstance(error, (StorageError, KeyboardInterrupt))):
            with suppress(ChunkflowError):
                _delete_chunks(path, layer.key)
                _delete_layer(path, [])
        raise
    return done


def _begin(output: OutputLayer, begun: Progress) -> int:
    """How many sections are there already; what is there of anything else is deleted."""
    path, found = output.path, read_progress(output.path)
    _delete_partials(path, begun.key)
    if found and begun.source and replace(found, sections=0) == begun and _is_whole(output, found.sections):
        return found.sections
    for key in {begun.key, found.key if found else begun.key}:
        _delete_chunks(path, key)
    write_progress(path, begun)
    return 0


def _is_whole(output: OutputLayer, sections: int) -> bool:
    """Whether all storage chunks of the first sections are there, and none of them goes further."""
    bounds, depth = output.scale.bounds, output.scale.chunk[0]
    if not 0 < sections <= bounds.shape[0] or (sections % depth and sections != bounds.shape[0]):
        return False
    there = output.stored_chunks()
    return all(box.key in there for box in output.expected_chunks(_slab(bounds, 0, sections)))


def _slab(bounds: Box, start: int, stop: int) -> Box:
    """The box of some sections, numbered from 0."""
    return bounds.with_z(bounds.start[0] + start, bounds.start[0] + stop)


def _write(source: Stack, output: OutputLayer, progress: Progress, planes_done: Callable[[int], object]) -> None:
    """Write the sections that are missing; the next are read while some are written."""
    (depth, height, width), chunk = source.shape, output.scale.chunk
    step = chunk[0] * max(1, HELD_BYTES // (chunk[0] * height * width * source.dtype.itemsize))
    slabs = [(start, min(start + step, depth)) for start in range(progress.sections, depth, step)]
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(available_cpus()) as writing:
        coming = reading.submit(source.read, *slabs[0]) if slabs else None
        for number, (start, stop) in enumerate(slabs):
            assert coming is not None
            data = coming.result()
            coming = reading.submit(source.read, *slabs[number + 1]) if number + 1 < len(slabs) else None
            box = _slab(output.scale.bounds, start, stop)

            def write(row: Box, data: Any = data, box: Box = box) -> None:
                output.write(row, data[None][(slice(None), *row.slices(box.start))])

            list(writing.map(write, output.rows(box)))
            write_progress(output.path, replace(progress, sections=stop))
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
        files.delete(["info", "provenance", PROGRESS])
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


def _delete_files(path: str, names: list[str]) -> None:
    with storage_errors(f"deleting files of {path}"):
        layer_files(path).delete(names)


def _delete_partials(path: str, key: str) -> None:
    """Delete what a process that was killed may have left of a file that it was writing."""
    if is_on_disk(plain(path)):
        root = local_path(plain(path))
        for file in [*root.glob(f".*{PARTIAL}"), *(root / key).glob(f".*{PARTIAL}")]:
            file.unlink(missing_ok=True)
