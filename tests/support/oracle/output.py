"""Oracle for the output layer: which storage chunks are there, and who writes to them late.

It opens files. It shares no code with ``chunkflow_core``.
"""

from __future__ import annotations

import gzip
import os
import zlib
from itertools import count
from pathlib import Path

_SCALE = "*_*_*"
"""The folder of the layer's only scale, which is named after its voxel size."""

_times = count(10**9)
"""Times of last change, in ns, of what is written late.

None comes twice: the file system's own clock may be coarser than the test.
"""


def stored(output: Path) -> dict[str, bytes]:
    """Names of the storage chunks of a layer, with their voxels."""
    return {file.name.partition(".")[0]: _voxels(file) for file in sorted(output.glob(f"{_SCALE}/*-*_*-*_*-*"))}


def write(output: Path, name: str, voxels: bytes) -> None:
    """Write a storage chunk, as whoever does not ask whether the layer is still his to write to."""
    for scale in output.glob(_SCALE):  # after a power loss there may be none
        put(scale / f"{name}.gz", gzip.compress(voxels), time=next(_times))


def put(file: Path, content: bytes, *, time: int | None = None) -> None:
    """Put a file in its place so that it lasts, at a time in ns if one is given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(".late.partial")
    with partial.open("wb") as written:
        written.write(content)
        written.flush()
        os.fsync(written.fileno())
    if time is not None:
        os.utime(partial, ns=(time, time))
    partial.replace(file)
    for above in file.parents[:5]:  # up to the folders of output and exchange
        folder = os.open(above, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def delete(output: Path, name: str) -> None:
    """Delete a storage chunk."""
    for file in output.glob(f"{_SCALE}/{name}.*"):
        file.unlink()


def voxels(content: bytes, *, compressed: bool) -> bytes:
    """The voxels in a storage chunk's file; something else if a part of it is lost."""
    try:
        return gzip.decompress(content) if compressed else content
    except (EOFError, OSError, zlib.error):
        return b"cut short"


def _voxels(file: Path) -> bytes:
    return voxels(file.read_bytes(), compressed=file.suffix == ".gz")
