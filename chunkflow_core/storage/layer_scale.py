"""What is known of one scale of a layer, in whichever format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final

from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.storage.naming import BY_RANGE, Naming

FARTHEST = 2**53
"""Largest coordinate or length in voxels. Readers such as Neuroglancer tell no larger ones apart,
and sums of some of them still fit 64 bits."""

SHARDED = "sharded"
"""Encoding of scales whose storage chunks share files."""

MOST_CHANNELS: Final = 2**16
"""Largest number of channels."""

_FINEST, _COARSEST = 1e-9, 1e9
"""Limits of voxel sizes, in nm."""


@dataclass(frozen=True, slots=True)
class ZarrArray:
    """What zarr or N5 says of an array."""

    driver: str
    """``zarr`` for version 2, ``zarr3`` for version 3, ``n5``."""
    folder: str
    """The array's folder below the layer's address, with a slash at its end; empty if it is that.

    A scale's ``key`` may be a folder in it.
    """
    axes: str
    """What each dimension is, a letter of ``tczyx`` each, in the array's order."""
    metadata: str
    """The array's metadata file, JSON, without what says nothing of how it is stored."""


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
    """The whole layer's ``info``, so that whoever opens the layer need not read it again.

    What it says of this scale is in the form that CloudVolume takes.
    """
    address: str = ""
    """Where the layer is, if its ``info`` was read: there are its storage chunks, even if redirects
    have led there.
    """
    codec: str = "raw"
    """Encoding of the voxels of a storage chunk, also in files that storage chunks share."""
    key: str = ""
    """The folder of the scale's storage chunks, below the layer's; empty if that is the same."""
    naming: Naming = BY_RANGE
    """How files of storage chunks are named in that folder."""
    array: ZarrArray | None = None
    """What the layer says of the scale if it is in one of the formats of zarr and N5."""

    @property
    def meaning(self) -> str:
        """What decides the meaning of voxels: dtype, channels, and their size in nm, zyx."""
        return f"{self.dtype} {self.channels} {self.resolution}"

    @property
    def has_own_files(self) -> bool:
        """Whether each storage chunk has a file of its own, and only one."""
        return self.encoding != SHARDED and self.naming.parts == 1

    @property
    def folder(self) -> str:
        """What stands before the names of the storage chunks' files: the ``key``, and a slash."""
        return f"{self.key}/" if self.key else ""

    def file(self, chunk: Box, part: int = 0) -> str:
        """Name of a storage chunk's file below the layer's address."""
        return self.folder + self.naming.of(chunk, self.bounds, self.chunk, part)

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


def is_size(value: float) -> bool:
    """Whether a number can be a voxel size in nm; 0 stands for one that is not known."""
    return value == 0 or _FINEST <= value <= _COARSEST
