"""Oracle for the output layer: which storage chunks are there, and who writes to them late.

It opens files. It shares no code with ``chunkflow_core``.
"""

from __future__ import annotations

import gzip
import os
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
    (scale,) = output.glob(_SCALE)
    file, time = scale / f"{name}.gz", next(_times)
    file.write_bytes(gzip.compress(voxels))
    os.utime(file, ns=(time, time))


def delete(output: Path, name: str) -> None:
    """Delete a storage chunk."""
    for file in output.glob(f"{_SCALE}/{name}.*"):
        file.unlink()


def _voxels(file: Path) -> bytes:
    content = file.read_bytes()
    return gzip.decompress(content) if file.suffix == ".gz" else content
