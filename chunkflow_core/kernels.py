"""Loops over voxels, compiled: one pass over memory where numpy takes several, and without Python's lock.

Only IEEE 754 operations of single precision, in a fixed order and never fused, so that they give the bits that numpy gives.
Arrays are whole and contiguous, and parts of them are told by offsets: the compiler vectorises only along an axis whose
stride it knows.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from chunkflow_core.geometry import Vector

_compile = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compile
def add_plane(
    sums: NDArray[np.float32],
    to: Vector,
    values: NDArray[np.float32],
    source: Vector,
    weight_yx: NDArray[np.float32],
    weight_z: np.float32,
    low: np.float32,
    high: np.float32,
) -> bool:
    """Add a plane of weighted values to a plane of sums, rounded to whole steps.

    Args:
        sums: ``(channels, z, y, x)``, in steps; changed.
        to: where in ``sums``, zyx.
        values: ``(channels, z, y, x)``.
        source: where in ``values``, zyx.
        weight_yx: ``(y, x)``: as much of the plane is added.
        weight_z: weight of the plane, in steps per unit.
        low: least value allowed.
        high: largest value allowed.

    Returns:
        Whether all values were within ``[low, high]``.
    """
    beyond = np.int32(0)
    height, width = weight_yx.shape
    for c in range(values.shape[0]):
        for y in range(height):
            total = sums[c, to[0], to[1] + y, to[2] : to[2] + width]
            value = values[c, source[0], source[1] + y, source[2] : source[2] + width]
            weight = weight_yx[y]
            for x in range(width):
                beyond |= np.int32(not ((low <= value[x]) & (value[x] <= high)))
                total[x] += np.rint(value[x] * weight[x] * weight_z)
    return bool(beyond == 0)


@_compile
def to_uint8(
    sums: NDArray[np.float32],
    start: Vector,
    unit: np.float32,
    low: np.float32,
    scale: np.float32,
    result: NDArray[np.uint8],
    plane: int,
) -> None:
    """Convert a part of a plane of sums: ``(sum · unit - low) · scale``, rounded half to even and clipped to 0–255.

    Args:
        sums: ``(channels, z, y, x)``.
        start: where in ``sums``, zyx.
        unit: value of one step.
        low: value that becomes 0.
        scale: 255 over the range of values.
        result: ``(channels, z, y, x)``; its plane ``plane`` is filled.
        plane: see ``result``.
    """
    height, width = result.shape[2:]
    for c in range(sums.shape[0]):
        for y in range(height):
            total = sums[c, start[0], start[1] + y, start[2] : start[2] + width]
            converted = result[c, plane, y]
            for x in range(width):
                value = np.rint((total[x] * unit - low) * scale)
                converted[x] = np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))


@_compile
def split_bytes(words: NDArray[np.uint32], planes: NDArray[np.uint8]) -> None:
    """Put bytes of equal rank together: ``(n,)`` into ``(4, n)``, lowest first."""
    first, second, third, fourth = planes[0], planes[1], planes[2], planes[3]
    for i in range(len(words)):
        word = words[i]
        first[i] = np.uint8(word & np.uint32(255))
        second[i] = np.uint8((word >> np.uint32(8)) & np.uint32(255))
        third[i] = np.uint8((word >> np.uint32(16)) & np.uint32(255))
        fourth[i] = np.uint8(word >> np.uint32(24))


@_compile
def join_bytes(planes: NDArray[np.uint8], words: NDArray[np.uint32]) -> None:
    """The inverse of ``split_bytes``."""
    first, second, third, fourth = planes[0], planes[1], planes[2], planes[3]
    for i in range(len(words)):
        low = np.uint32(first[i]) | (np.uint32(second[i]) << np.uint32(8))
        words[i] = low | (np.uint32(third[i]) << np.uint32(16)) | (np.uint32(fourth[i]) << np.uint32(24))
