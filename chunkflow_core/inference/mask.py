"""A layer that says where there is something to do, seen from the input's voxels.

The two layers are aligned by where their voxels are, not by mip: a voxel's position times the voxel
size is its low corner in nm, in every layer and at every mip. An input voxel is inside the mask if
the mask voxel that contains its centre is nonzero. With input voxel size ``r`` and mask voxel size
``R`` along an axis, that is mask voxel ``floor((v + 1/2) · r / R)``::

    mask  R = 9    |        0        |        1        |        2    …
    input r = 4    |   0   |   1   |   2   |   3   |   4   |   5   | …
    its centre         ·       ·       ·       ·       ·       ·
    mask voxel         0       0       1       1       2       2

It is computed in rational numbers: in floating point, a centre that lies on a mask voxel's face
could fall on either side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.files import storage_errors
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import open_layer
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.presence import Absence, nothing_there


@dataclass(frozen=True, slots=True)
class MaskWindow:
    """The mask in a box of input voxels, in memory.

    It holds one bool for each mask voxel that contains the centre of an input voxel.
    """

    box: Box
    """The box, in input voxels."""
    present: NDArray[np.bool_]
    """Whether each mask voxel is nonzero, ``(z, y, x)``."""
    index: tuple[NDArray[np.intp], ...]
    """Index in ``present`` of the mask voxel of each input voxel of ``box``, axis by axis.

    It never decreases, and has no gaps.
    """

    def touches(self, box: Box) -> bool:
        """Whether any voxel of a box, in input voxels, is inside the mask.

        Raises:
            ValueError: The box leaves the window.
        """
        parts = self._index(box)
        return bool(box) and bool(self._between(parts).any())

    def voxels(self, box: Box) -> NDArray[np.bool_]:
        """Which voxels of a box, in input voxels, are inside the mask: ``(z, y, x)``, of its shape.

        Raises:
            ValueError: The box leaves the window.
        """
        return self.present[np.ix_(*self._index(box))]

    def cut(self, box: Box) -> MaskWindow:
        """The part of the window that covers a box: what reading the mask there would have given.

        Raises:
            ValueError: The box leaves the window.
        """
        parts = self._index(box)
        return MaskWindow(box, self._between(parts), tuple(part - part[0] for part in parts))

    def _between(self, parts: list[NDArray[np.intp]]) -> NDArray[np.bool_]:
        """The mask voxels from the first to the last of an index, axis by axis."""
        return self.present[tuple(slice(part[0], part[-1] + 1) for part in parts)]

    def _index(self, box: Box) -> list[NDArray[np.intp]]:
        if box not in self.box:
            raise ValueError(f"the box {box} is not inside the mask's window {self.box}")
        return [index[part] for index, part in zip(self.index, box.slices(self.box.start), strict=True)]


def mask_digest(windows: Iterable[MaskWindow]) -> str:
    """Digest of the mask in some windows; empty if there are none."""
    contents = [window.present.tobytes() for window in windows]
    return short_digest(b"".join(contents)) if contents else ""


class Mask:
    """The mask layer of a spec.

    Where the layer ends, so does the mask: voxels beyond its bounds are 0.
    """

    def __init__(self, spec: VolumeSpec) -> None:
        """Open the layer of ``spec.skip.mask``.

        Raises:
            ValueError: The spec has no mask.
            MissingInputError: The layer, its mip, or the input layer isn't there.
            SpecError: The layer can't be a mask: several channels, not numbers, voxels without a
                size.
            StorageError: The storage does not answer.
        """
        mask = spec.skip.mask
        if mask is None:
            raise ValueError("the spec has no skip.mask")
        self.scale, self._mip = read_scale(mask.path, mask.mip), mask.mip
        self.path = self.scale.address
        if self.scale.channels != 1:
            raise SpecError(f"skip.mask.path: {self.path} has {self.scale.channels} channels, expected 1")
        if not _is_number(self.scale.dtype):
            raise SpecError(f"skip.mask.path: {self.path} has dtype {self.scale.dtype}, expected a number type")
        sizes = _voxel_size("input.path", spec.input.path, spec.input_scale)
        mask_sizes = _voxel_size("skip.mask.path", self.path, self.scale)
        self._ratios = [size / mask_size for size, mask_size in zip(sizes, mask_sizes, strict=True)]
        with storage_errors(f"opening {self.path}"):
            self._reader = open_layer(self.path, self.scale, mask.mip, fill_missing=bool(mask.fill_missing))

    def window(self, box: Box) -> MaskWindow:
        """Read the mask where it covers a box, in input voxels.

        Only voxels that decide something are kept. The layer is read in steps of its storage
        chunks' depth: in its own dtype, no more than that is in memory.

        Raises:
            MissingInputError: A storage chunk isn't there, and ``fill_missing`` is off.
            StorageError: The storage does not answer.
        """
        positions, index = zip(
            *(np.unique(self._mask_voxels(a, box.start[a], box.stop[a]), return_inverse=True) for a in range(3)),
            strict=True,
        )
        present = np.zeros([len(p) for p in positions], np.bool_)
        inside = [
            slice(*np.searchsorted(p, (low, high)))
            for p, low, high in zip(positions, self.scale.bounds.start, self.scale.bounds.stop, strict=True)
        ]
        self._fill(present[tuple(inside)], [p[part] for p, part in zip(positions, inside, strict=True)])
        return MaskWindow(box, present, index)

    def region(self, box: Box) -> Box:
        """The mask voxels that decide something in a box of input voxels; may leave the layer."""
        ends = [[self._mask_voxels(a, v, v + 1)[0] for v in (box.start[a], box.stop[a] - 1)] for a in range(3)]
        return Box(vector(int(low) for low, _ in ends), vector(int(high) + 1 for _, high in ends))

    def nothing_in(self, box: Box) -> Absence:
        """What is missing if no storage chunk over a box, in input voxels, can be found."""
        return nothing_there(self.path, self.scale, self._mip, self.region(box))

    def _advice(self) -> str:
        """What to say about a storage chunk that isn't there."""
        absence = nothing_there(self.path, self.scale, self._mip, self.scale.bounds)
        zeros = "If missing chunks of this layer mean zeros, set skip.mask.fill_missing: true"
        return absence.text if absence.text and absence.is_sure else zeros

    def _fill(self, present: NDArray[np.bool_], positions: list[NDArray[np.int64]]) -> None:
        """Read the mask voxels at positions, ascending and inside the layer, into ``present``."""
        if not present.size:
            return
        z, y, x = positions
        layer = (z - self.scale.bounds.start[0]) // self.scale.chunk[0]
        for part in np.split(np.arange(len(z)), np.flatnonzero(np.diff(layer)) + 1):
            wanted = (z[part], y, x)
            region = Box(vector(int(p[0]) for p in wanted), vector(int(p[-1]) + 1 for p in wanted))
            with storage_errors(f"reading the mask {self.path} at {region}", missing=self._advice):
                data = self._reader.read(region)[0] != 0
            present[part] = data[np.ix_(*(p - start for p, start in zip(wanted, region.start, strict=True)))]

    def _mask_voxels(self, axis: int, start: int, stop: int) -> NDArray[np.int64]:
        """The mask voxels of the input voxels ``start`` to ``stop - 1``, along one axis.

        They are those that contain the input voxels' centres.
        """
        ratio = self._ratios[axis]
        numerator, denominator = ratio.numerator, 2 * ratio.denominator
        # Python's integers: the terms of a ratio of two decimals can be too long for those of numpy
        return np.array([(2 * v + 1) * numerator // denominator for v in range(start, stop)], np.int64)


def _is_number(dtype: str) -> bool:
    try:
        return np.dtype(dtype).kind in "uif"
    except TypeError:
        return False


def _voxel_size(key: str, path: str, scale: LayerScale) -> list[Fraction]:
    """Voxel size in nm, exactly as the layer's ``info`` has it; order z, y, x."""
    sizes = [_fraction(value) for value in scale.resolution]
    if len(sizes) != 3 or min(sizes) <= 0:
        raise SpecError(f"{key}: {path} has a resolution of {scale.resolution} nm (zyx), expected three sizes > 0")
    return sizes


def _fraction(value: Any) -> Fraction:
    """The decimal number that stands in the file (0.1 is 1/10); 0 if there is none.

    It is not the binary number nearest to it.
    """
    try:
        return Fraction(str(value))
    except ValueError:
        return Fraction(0)
