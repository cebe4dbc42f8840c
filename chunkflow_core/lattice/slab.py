"""Sums over the planes of a region that patches still touch, in a ring; final ones leave it.

Several threads add patches at once. Sums are exact, so their order is of no matter; each plane has
a lock, and threads start at different planes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import Condition, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import ChunkflowError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.lattice.conversion import Conversion
from chunkflow_core.lattice.kernels import add_plane, to_float32, to_uint8
from chunkflow_core.lattice.weights import ExactStep, normalised_weight, strips

Map = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]
"""The builtin ``map``, or that of an executor."""


class Cancelled(ChunkflowError):
    """A thread waited for room in a slab that was given up."""


class Slab:
    """Sums over consecutive planes of a region, in exact steps.

    It moves up along z as planes become final.
    """

    def __init__(
        self, grid: BlockGrid, region: Box, depth: int, channels: int, values: ExactStep, mapping: Map = map
    ) -> None:
        """Start at the first plane of ``region``, with all sums 0.

        Args:
            grid: The lattice of patches.
            region: Voxels whose sums are kept; sums outside are dropped.
            depth: Number of planes that there is room for.
            channels: Number of channels of the patches.
            values: Range of the values, and the step of their sums.
            mapping: What goes over planes that are copied out or cleared; the ``map`` of an
                executor does it in several threads.
        """
        self.grid, self.region, self.values, self._map = grid, region, values, mapping
        self.depth = min(depth, region.shape[0])
        count, strip = strips(region.shape[2])
        self.sums = np.zeros((channels, self.depth, count, region.shape[1], strip), np.float32)
        self.start = region.start[0]
        self._moved = Condition()
        self._cancelled = False
        self._locks = [Lock() for _ in range(self.depth)]

    def add(
        self,
        position: Vector,
        patch: NDArray[np.float32],
        *,
        share: float = 1.0,
        limits: tuple[float, float] = (-np.inf, np.inf),
        moved: Sequence[Vector] = (),
    ) -> bool:
        """Add a patch, weighted. There has to be room for it.

        Args:
            position: Position of the patch in the lattice, zyx.
            patch: Float32 ``(channels, z, y, x)``, contiguous.
            share: A power of two by which the weights are multiplied.
            limits: Least and largest value allowed.
            moved: For each channel the offset, zyx, by which its values were moved in the patch
                (see ``normalised_weight``); empty if none were.

        Returns:
            Whether all values were within the limits. If not, the sums must not be used.
        """
        parts = channel_parts(moved)
        return all(self._add(position, patch[own], self.sums[own], offset, share, limits) for own, offset in parts)

    def _add(
        self,
        position: Vector,
        patch: NDArray[np.float32],
        sums: NDArray[np.float32],
        moved: Vector,
        share: float,
        limits: tuple[float, float],
    ) -> bool:
        """Add some channels of a patch to theirs of the sums; arguments as :func:`add`."""
        box = self.grid.patch_box(position)
        inside = box & self.region
        if not inside:
            return True
        z, y, x = (
            normalised_weight(axis, k, offset)[part]
            for axis, k, offset, part in zip(self.grid.axes, position, moved, inside.slices(box.start), strict=True)
        )
        weight_yx, weight_z = y[:, None] * x[None, :], z * np.float32(share / self.values.step)
        first, low, high = self._place(inside), np.float32(limits[0]), np.float32(limits[1])
        source = [a - b for a, b in zip(inside.start, box.start, strict=True)]
        within = True
        for i in range(len(z)):
            plane = (i + 7 * position[2] + 3 * position[1]) % len(z)
            slot = (first[0] + plane) % self.depth
            to, taken = (slot, first[1], first[2]), (source[0] + plane, source[1], source[2])
            with self._locks[slot]:
                within &= add_plane(sums, to, patch, taken, weight_yx, weight_z[plane], low, high)
        return within

    def sum(self, box: Box) -> NDArray[np.float32]:
        """A copy of the sums in a box: float32 ``(channels, z, y, x)``, in units of the values."""
        result = np.empty((len(self.sums), *box.shape), np.float32)

        def copy(plane: int) -> None:
            to_float32(self.sums, self._start(box, plane), np.float32(self.values.step), result, plane)

        self._for_each(copy, range(box.shape[0]))
        return result

    def converted(self, box: Box, conversion: Conversion) -> NDArray[Any]:
        """What becomes of the complete sums in a box: ``(stored channels, z, y, x)``."""
        result = np.empty((conversion.channels(len(self.sums)), *box.shape), conversion.dtype)

        def convert_plane(plane: int) -> None:
            _fill(conversion, self.sums, self._start(box, plane), np.float32(self.values.step), result, plane)

        self._for_each(convert_plane, range(box.shape[0]))
        return result

    def advance(self, plane: int) -> None:
        """Drop the planes below ``plane`` and make room above."""

        def clear(z: int) -> None:
            self.sums[:, (z - self.region.start[0]) % self.depth] = 0

        self._for_each(clear, range(self.start, min(plane, self.start + self.depth)))
        with self._moved:
            self.start = plane
            self._moved.notify_all()

    def wait_for_room(self, position: Vector) -> None:
        """Return when there is room for a patch.

        It does return, if patches are started tier by tier, each by the next free thread, and
        pieces leave as they become final. Take the first tier that is not finished, and let it
        start at plane ``a``. All sums below ``a`` are final, so that all pieces that end there have
        left. Pieces end at most a storage chunk ``c`` apart, so the slab has moved to ``a - (c -
        1)`` at least. It has room for ``p + c - 1`` planes (``BlockGrid.slab_depth``), so up to
        ``a + p``, where the tier's patches end: none of them waits. Patches of later tiers may wait
        in their threads, but each was started after all of this tier, which so have threads too,
        and end. Then the next tier is the first. What copies sums out has threads of its own.

        Raises:
            Cancelled: The slab was given up.
        """
        stop = (self.grid.patch_box(position) & self.region).stop[0]
        with self._moved:
            self._moved.wait_for(lambda: self._cancelled or stop <= self.start + self.depth)
            if self._cancelled:
                raise Cancelled("the slab was given up")

    def cancel(self) -> None:
        """Give up: whoever waits for room gets ``Cancelled``."""
        with self._moved:
            self._cancelled = True
            self._moved.notify_all()

    def _place(self, box: Box) -> Vector:
        z, y, x = (a - b for a, b in zip(box.start, self.region.start, strict=True))
        return z % self.depth, y, x

    def _start(self, box: Box, plane: int) -> Vector:
        """Position in ``sums`` of a plane of a box: index of the plane, y, x."""
        z, y, x = self._place(box)
        return (z + plane) % self.depth, y, x

    def _for_each(self, function: Callable[[int], None], planes: Iterable[int]) -> None:
        deque(self._map(function, planes), maxlen=0)


def channel_parts(moved: Sequence[Vector]) -> list[tuple[slice, Vector]]:
    """The channels that are added with the same weights, and the offset by which they were moved.

    ``moved`` has an offset for each channel, or is empty if none was moved.
    """
    return [(slice(c, c + 1), offset) for c, offset in enumerate(moved)] or [(slice(None), (0, 0, 0))]


def convert(sums: NDArray[np.float32], conversion: Conversion) -> NDArray[Any]:
    """What becomes of complete sums, once, after the last addition.

    Args:
        sums: Float32 ``(channels, z, y, x)``, in the units of the values, contiguous.
        conversion: What is made of them.

    Returns:
        ``(stored channels, z, y, x)`` in the output's dtype; for float32 the sums themselves.
    """
    if conversion.dtype == "float32":
        return sums
    result = np.empty((conversion.channels(len(sums)), *sums.shape[1:]), conversion.dtype)
    for plane in range(sums.shape[1]):
        _fill(conversion, sums[:, :, None], (plane, 0, 0), np.float32(1), result, plane)
    return result


def _fill(
    conversion: Conversion,
    sums: NDArray[np.float32],
    start: Vector,
    unit: np.float32,
    result: NDArray[Any],
    plane: int,
) -> None:
    """Convert a part of a plane of complete sums; arguments as :func:`to_uint8` has them."""
    if conversion.dtype == "float32":
        to_float32(sums, start, unit, result, plane)
    elif conversion.dtype == "uint8" and conversion.is_plain:
        to_uint8(sums, start, unit, *conversion.values.uint8, result, plane)
    else:
        values = np.empty((len(sums), 1, *result.shape[2:]), np.float32)
        to_float32(sums, start, unit, values, 0)
        result[:, plane] = conversion.of_plane(values[:, 0])
