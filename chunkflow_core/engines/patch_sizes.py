"""Finds patches that a network can take, where it can't take those of the spec.

A network may be for single sections. A U-Net halves its patches several times, and fails with sizes
that can't be halved, or gives an output of another size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from chunkflow_core.engines import load_engine
from chunkflow_core.errors import ChunkflowError
from chunkflow_core.lattice.boxes import Vector, vector
from chunkflow_core.spec import VolumeSpec

_DIVISORS = (2, 4, 8, 16, 32)
"""What patches of U-Nets have to be multiples of: of one to five levels."""

_LARGEST = 2
"""How many times the voxels of the spec's patches may be tried."""


def fitting_patches(spec: VolumeSpec) -> str:
    """What to write in the spec, by trying; empty if nothing near it fits either.

    Each size is tried by a patch of zeros, of the same halo as the spec's.
    """
    other = 5 - spec.model.dimensions
    turned = spec.model_copy(update={"model": spec.model.model_copy(update={"dimensions": other})})
    if (other == 3 or not spec.halo[0]) and _takes(turned, spec.patch_size):
        return f"takes {'single sections' if other == 2 else 'whole patches'}: model.dimensions: {other}"
    for divisor in _DIVISORS:
        tried = [size for size in _near(spec, divisor) if size != spec.patch_size]
        if fitting := [size for size in tried if _takes(spec, size)]:
            nearest = [_kept(spec, size) for size in fitting]
            given = " or ".join(str(list(size)) for size in dict.fromkeys(nearest))
            halo = " (with output_patch_size smaller by as much as now)" if any(spec.halo) else ""
            return f"takes patch_size: {given}{halo}, found by trying multiples of {divisor}"
    return ""


def _near(spec: VolumeSpec, divisor: int) -> Iterator[Vector]:
    """The sizes below and above the spec's that are multiples of a number, zyx.

    The output's are, where there is a halo.
    """
    size = spec.patch_size
    flat = spec.model.dimensions == 2
    for rounded in (math.floor, math.ceil):
        near = vector(max(1, rounded(n / divisor)) * divisor for n in size)
        near = vector((size[0], *near[1:])) if flat else near
        if math.prod(near) <= _LARGEST * math.prod(size) or math.prod(near) <= 2**21:
            yield near


def _kept(spec: VolumeSpec, size: Vector) -> Vector:
    """A size that fits, with as many of the spec's own lengths as fit."""
    for axis in range(3):
        other = vector(spec.patch_size[a] if a == axis else n for a, n in enumerate(size))
        if other != size and _takes(spec, other):
            size = other
    return size


def _takes(spec: VolumeSpec, size: Vector) -> bool:
    output = vector(n - 2 * halo for n, halo in zip(size, spec.halo, strict=True))
    if min(output) < 1:
        return False
    other = spec.model_copy(update={"patch_size": size, "output_patch_size": output})
    try:
        engine = load_engine(other)
        engine(np.zeros((engine.batch_size, spec.input_scale.channels, *size), np.float32))
    except ChunkflowError:
        return False
    return True
