"""Oracle for the output layer: which storage chunks are there, and who writes to them late.

It opens files. It shares no code with ``chunkflow_core``, nor with the libraries that it uses for
zarr: a file there has all voxels of a storage chunk, also those past the layer's end, in order. A
shard has its pieces, each compressed, and where they begin and how long they are; then a checksum.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from tests.support.oracle.geometry import Case, Index

_SCALE = "*_*_*"
"""The folder of a precomputed layer's only scale, which is named after its voxel size."""

_CHANNELS = 2

_NONE = 2**64 - 1
"""Where a piece of a shard begins that is not there."""

_times = count(10**9)
"""Times of last change, in ns, of what is written late.

None comes twice: the file system's own clock may be coarser than the test.
"""


@dataclass(frozen=True)
class Output:
    """The output layer of a case."""

    folder: Path
    case: Case

    @property
    def is_gone(self) -> bool:
        """Whether there is no output layer."""
        info = self.folder / ("info" if self.case.format == "precomputed" else "zarr.json")
        return not info.exists() or not info.stat().st_size

    def stored(self) -> dict[str, bytes]:
        """Names of the storage chunks, ``x0-x1_y0-y1_z0-z1``, with their voxels."""
        if self.case.format == "precomputed":
            files = sorted(self.folder.glob(f"{_SCALE}/*-*_*-*_*-*"))
        else:
            files = sorted(self.folder.glob("0/c/0/*/*/*"))
        return {name: self.voxels(file, file.read_bytes()) for file in files if (name := self.name(file))}

    def name(self, file: Path) -> str:
        """Name of the storage chunk in a file of the layer; empty if it is none."""
        if self.case.format == "precomputed":
            return file.name.partition(".")[0]
        parts = file.relative_to(self.folder).parts
        if parts[:3] != ("0", "c", "0") or len(parts) != 6 or not all(map(str.isdecimal, parts[3:])):
            return ""
        low, high = self._corners(tuple(map(int, parts[3:])))
        return "_".join(f"{a}-{b}" for a, b in zip(reversed(low), reversed(high), strict=True))

    def voxels(self, file: Path, content: bytes) -> bytes:
        """The voxels of a storage chunk's file; something else if a part of it is lost."""
        try:
            if self.case.format == "precomputed":
                return gzip.decompress(content) if file.suffix == ".gz" else content
            place = tuple(map(int, file.parts[-3:]))
            low, high = self._corners(place)
            whole = self._whole(content)
        except (EOFError, OSError, zlib.error, ValueError):
            return b"cut short"
        return whole[(slice(None), *(slice(0, b - a) for a, b in zip(low, high, strict=True)))].tobytes()

    def write(self, name: str, voxels: bytes) -> None:
        """Write a storage chunk, as whoever does not ask whether the layer is still his."""
        if self.case.format == "precomputed":
            for scale in self.folder.glob(_SCALE):  # after a power loss there may be none
                put(scale / f"{name}.gz", gzip.compress(voxels), time=next(_times))
            return
        if not (self.folder / "0").exists():
            return
        place, shape = self._place(name)
        whole = np.zeros((_CHANNELS, *self.case.chunk), self.case.dtype)
        whole[(slice(None), *map(slice, shape))] = np.frombuffer(voxels, self.case.dtype).reshape(_CHANNELS, *shape)
        put(self._file(place), self._content(whole), time=next(_times))

    def delete(self, name: str) -> None:
        """Delete a storage chunk."""
        if self.case.format == "precomputed":
            for file in self.folder.glob(f"{_SCALE}/{name}.*"):
                file.unlink()
        else:
            self._file(self._place(name)[0]).unlink(missing_ok=True)

    def _file(self, place: Index) -> Path:
        return self.folder.joinpath("0", "c", "0", *map(str, place))

    def _corners(self, place: Index) -> tuple[Index, Index]:
        low = [s + i * c for s, i, c in zip(self.case.start, place, self.case.chunk, strict=True)]
        high = [min(a + c, stop) for a, c, stop in zip(low, self.case.chunk, self.case.stop, strict=True)]
        return tuple(low), tuple(high)

    def _place(self, name: str) -> tuple[Index, Index]:
        """Position of a storage chunk in the grid, and its size, zyx."""
        ends = [tuple(map(int, part.split("-"))) for part in reversed(name.split("_"))]
        place = [(a - s) // c for (a, _), s, c in zip(ends, self.case.start, self.case.chunk, strict=True)]
        return tuple(place), tuple(b - a for a, b in ends)

    def _pieces(self) -> list[tuple[slice, ...]]:
        sizes = self.case.pieces
        corners = product(*(range(0, n, s) for n, s in zip(self.case.chunk, sizes, strict=True)))
        return [(slice(None), *(slice(a, a + s) for a, s in zip(corner, sizes, strict=True))) for corner in corners]

    def _whole(self, content: bytes) -> NDArray[np.generic]:
        """All voxels of a file, ``(channels, z, y, x)``; ``ValueError`` if it is damaged."""
        whole = np.empty((_CHANNELS, *self.case.chunk), self.case.dtype)
        if self.case.format == "ome-zarr":
            whole[:] = np.frombuffer(gzip.decompress(content), self.case.dtype).reshape(whole.shape)
            return whole
        pieces = self._pieces()
        index, checksum = content[-16 * len(pieces) - 4 : -4], content[-4:]
        if google_crc32c.value(index) != int.from_bytes(checksum, "little"):
            raise ValueError("checksum")
        for piece, (start, size) in zip(pieces, np.frombuffer(index, "<u8").reshape(-1, 2).tolist(), strict=True):
            if start == _NONE:  # of a piece that lies past the layer's end
                whole[piece] = 0
                continue
            voxels = gzip.decompress(content[start : start + size])
            whole[piece] = np.frombuffer(voxels, self.case.dtype).reshape(_CHANNELS, *self.case.pieces)
        return whole

    def _content(self, whole: NDArray[np.generic]) -> bytes:
        """The file of a storage chunk."""
        if self.case.format == "ome-zarr":
            return gzip.compress(whole.tobytes())
        parts = [gzip.compress(whole[piece].tobytes()) for piece in self._pieces()]
        starts = np.cumsum([0, *map(len, parts[:-1])])
        index = np.array([[start, len(part)] for start, part in zip(starts, parts, strict=True)], "<u8").tobytes()
        return b"".join([*parts, index, google_crc32c.value(index).to_bytes(4, "little")])


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
    for above in file.parents[:7]:  # up to the folders of output and exchange
        folder = os.open(above, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
