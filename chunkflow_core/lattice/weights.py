"""Weights of patches, and sums that do not depend on their order.

The weight of a patch is a separable bump, normalised over the lattice. Since the lattice is a
tensor product too, the sum of all weights at a voxel is a product of three one-dimensional sums,
and the normalised weight a product of three vectors.

Each weighted value is rounded to a multiple of one exact step before it is added. Sums of a few
such multiples are exact in float32, hence the same in any order: across patches, blocks, donations
and retries. Only multiplication by float32 weights, rounding half to even, and addition are used,
which IEEE 754 defines to the last bit, so every processor agrees.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal
from functools import cache

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.blocks import AxisLattice
from chunkflow_core.lattice.boxes import ceil_to

MAX_PATCH = 2048
"""Longest patch edge whose bump stays clear of the smallest float64 numbers, in voxels."""

NUMERICS_VERSION = 1
"""Version to be raised with any change of this module that changes a bit of the output."""

MANTISSA_BITS = 23

_EXACT = Context(prec=40)


@cache
def bump(length: int) -> NDArray[np.float64]:
    """The blending weight along one axis of a patch, before normalisation.

    It is ``w(i) = exp(-1 / (1 - x²))`` with ``x = 2(i + 1)/(p + 1) - 1``, the test function of the
    field's "wu" patch mask, here in the form ``exp(-(p + 1)² / (4 (i + 1)(p - i)))``. It is
    computed in decimal, as ``exp`` of C libraries differs in the last bit between processors.

    Args:
        length: Length ``p`` of the patch in voxels, from 1 to ``MAX_PATCH``; ``ValueError``
            otherwise.

    Returns:
        Float64 ``(length,)``.
    """
    if not 1 <= length <= MAX_PATCH:
        raise ValueError(f"patch length must be 1 to {MAX_PATCH}, got {length}")
    half = [
        float(_EXACT.exp(_EXACT.divide(Decimal(-((length + 1) ** 2)), Decimal(4 * (i + 1) * (length - i)))))
        for i in range((length + 1) // 2)
    ]
    return np.array(half + half[: length // 2][::-1])


@cache
def normalised_weight(axis: AxisLattice, position: int, offset: int = 0) -> NDArray[np.float32]:
    """Weight along one axis of the patch at a lattice position, normalised over the lattice.

    It is divided by the sum over all patches that exist at each voxel.

    Args:
        axis: The lattice along the axis.
        position: Position of the patch in it.
        offset: What was moved in the patch by so many voxels has values only at those ``i`` for
            which ``i + offset`` lies in the patch. All other weights are 0, in each patch, and sums
            are over those that are left.

    Returns:
        Float32 ``(axis.patch,)``.
    """
    weight = bump(axis.patch).copy()
    weight[max(0, axis.patch - offset) :] = 0
    weight[: max(0, -offset)] = 0
    total = np.zeros(axis.patch)
    for other in range(max(0, position - axis.neighbours), min(axis.count, position + axis.neighbours + 1)):
        shift = (other - position) * axis.stride
        low, high = max(0, shift), min(axis.patch, axis.patch + shift)
        total[low:high] += weight[low - shift : high - shift]
    return np.divide(weight, total, out=np.zeros(axis.patch), where=total > 0).astype(np.float32)


def strips(width: int) -> tuple[int, int]:
    """Number of strips in which sums over a ``width`` are stored, and their width in voxels.

    A strip is about a patch wide: rows of a patch in a plane thousands of voxels wide would each be
    in another page of memory. It has whole cache lines: rows that end within one are half as fast.
    """
    count = -(-width // 128)
    return count, ceil_to(-(-width // count), 16)


class ExactStep:
    """The step to which contributions are rounded, for values within a declared range.

    With ``R`` the smallest power of two that bounds the range, the step is ``2⁻²³·R``: a sum within
    ``±2R`` is at most ``2²⁴`` steps, all of which float32 represents.
    """

    def __init__(self, low: float, high: float) -> None:
        """Choose the step for values in ``[low, high]``."""
        self.low, self.high = float(np.float32(low)), float(np.float32(high))
        mantissa, exponent = math.frexp(max(abs(low), abs(high)))
        self.step = math.ldexp(1.0, (exponent - 1 if mantissa == 0.5 else exponent) - MANTISSA_BITS)

    @property
    def uint8(self) -> tuple[np.float32, np.float32]:
        """What is subtracted from values, and then what they are multiplied by, to become uint8."""
        return np.float32(self.low), np.float32(255 / (self.high - self.low))

    @property
    def uint16(self) -> tuple[float, float]:
        """What is subtracted from values, and then what they are multiplied by, to become uint16.

        These are float64: float32 has too few bits to tell the halves between 65,536 numbers.
        """
        return self.low, 65535 / (self.high - self.low)
