"""Compiled loops over voxels: one pass over memory where numpy takes several, and without the GIL.

They use only IEEE 754 operations of single precision, in a fixed order and never fused, so that
they give the bits that numpy gives. Arrays are whole and contiguous, and parts of them are told by
offsets: the compiler vectorises only along an axis whose stride it knows. Planes of sums are stored
as strips along y, a patch wide: the rows of a patch in a plane thousands of voxels wide would each
be in another page of memory, at a third of the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Vector

Function = TypeVar("Function", bound=Callable[..., Any])


def _compile(function: Function) -> Function:
    """Compile at the first call.

    The result is kept for other processes where there is a place for it.
    """
    for cache in (True, False):
        with suppress(RuntimeError):  # neither this folder nor the user's can be written
            compiled = numba.njit(nogil=True, cache=cache, error_model="numpy")(function)
            break
    return cast(Function, compiled)


@_compile
def _in_strip(width: int, x: int, count: int) -> tuple[int, int, int]:
    """The strip of a given width that holds ``x``, and the part of ``count`` voxels that is in it.

    Returns:
        Number of the strip, position of ``x`` within it, and how many of the ``count`` voxels from
        ``x`` on it holds.
    """
    strip = x // width
    first = x - strip * width
    return strip, first, min(width - first, count)


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
        sums: Float32 ``(channels, z, strips, y, x of a strip)``, in steps; changed.
        to: Position in ``sums`` of the first value's sum: index of the plane, y, x.
        values: Float32 ``(channels, z, y, x)``.
        source: Position of the first value in ``values``, zyx.
        weight_yx: Float32 ``(y, x)``, whose shape says how much of the plane is added.
        weight_z: Weight of the plane, in steps per unit.
        low: Least value allowed.
        high: Largest value allowed.

    Returns:
        Whether all values were within ``[low, high]``.
    """
    within = True
    height, width = weight_yx.shape
    for c in range(values.shape[0]):
        done = 0
        while done < width:
            strip, first, count = _in_strip(sums.shape[4], to[2] + done, width - done)
            x = source[2] + done
            for y in range(height):
                total = sums[c, to[0], strip, to[1] + y, first : first + count]
                value = values[c, source[0], source[1] + y, x : x + count]
                weight = weight_yx[y, done : done + count]
                good = np.int32(0)  # a sum of integers, which compilers vectorise
                for i in range(count):
                    good += np.int32((low <= value[i]) & (value[i] <= high))
                    total[i] += np.rint(value[i] * weight[i] * weight_z)
                within &= good == count
            done += count
    return within


@_compile
def to_float32(
    sums: NDArray[np.float32], start: Vector, unit: np.float32, result: NDArray[np.float32], plane: int
) -> None:
    """Copy a part of a plane of sums, times ``unit``; arguments as :func:`to_uint8`."""
    height, width = result.shape[2:]
    for c in range(sums.shape[0]):
        done = 0
        while done < width:
            strip, first, count = _in_strip(sums.shape[4], start[2] + done, width - done)
            for y in range(height):
                total = sums[c, start[0], strip, start[1] + y, first : first + count]
                copied = result[c, plane, y, done : done + count]
                for i in range(count):
                    copied[i] = total[i] * unit
            done += count


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
    """Convert a part of a plane of sums: ``(sum · unit - low) · scale``, as uint8.

    Values are rounded half to even, and clipped to 0–255.

    Args:
        sums: Float32 ``(channels, z, strips, y, x of a strip)``.
        start: Position of the part in ``sums``: index of the plane, y, x.
        unit: Value of one step.
        low: Value that becomes 0.
        scale: 255 over the range of values.
        result: ``(channels, z, y, x)``; its plane ``plane`` is filled.
        plane: Index of the plane of ``result`` that is filled.
    """
    height, width = result.shape[2:]
    for c in range(sums.shape[0]):
        done = 0
        while done < width:
            strip, first, count = _in_strip(sums.shape[4], start[2] + done, width - done)
            for y in range(height):
                total = sums[c, start[0], strip, start[1] + y, first : first + count]
                converted = result[c, plane, y, done : done + count]
                for i in range(count):
                    value = np.rint((total[i] * unit - low) * scale)
                    converted[i] = np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))
            done += count


@_compile
def take_scaled(planes: NDArray[Any], start: Vector, divisor: np.float32, patch: NDArray[np.float32]) -> None:
    """Copy a part of the input, divided by ``divisor``.

    Args:
        planes: ``(channels, z, y, x)``, of any dtype.
        start: Position of the part in ``planes``, zyx.
        divisor: What each voxel is divided by.
        patch: Float32 ``(channels, z, y, x)``; filled. Its shape says how much is copied.
    """
    channels, depth, height, width = patch.shape
    for c in range(channels):
        for z in range(depth):
            for y in range(height):
                row = planes[c, start[0] + z, start[1] + y, start[2] : start[2] + width]
                taken = patch[c, z, y]
                for x in range(width):
                    taken[x] = np.float32(row[x]) / divisor


@_compile
def split_bytes(words: NDArray[np.uint32], planes: NDArray[np.uint8]) -> None:
    """Put bytes of equal rank together: ``(n,)`` words into ``(4, n)`` bytes, the lowest first."""
    first, second, third, fourth = planes[0], planes[1], planes[2], planes[3]
    for i in range(len(words)):
        word = words[i]
        first[i] = np.uint8(word & np.uint32(255))
        second[i] = np.uint8((word >> np.uint32(8)) & np.uint32(255))
        third[i] = np.uint8((word >> np.uint32(16)) & np.uint32(255))
        fourth[i] = np.uint8(word >> np.uint32(24))


@_compile
def join_bytes(planes: NDArray[np.uint8], words: NDArray[np.uint32]) -> None:
    """Put words together from bytes by rank, the inverse of :func:`split_bytes`."""
    first, second, third, fourth = planes[0], planes[1], planes[2], planes[3]
    for i in range(len(words)):
        low = np.uint32(first[i]) | (np.uint32(second[i]) << np.uint32(8))
        words[i] = low | (np.uint32(third[i]) << np.uint32(16)) | (np.uint32(fourth[i]) << np.uint32(24))
