"""Oracle for numbers: what a block's patches add up to, and what the output has to be.

The whole input is padded at once, and every patch is run alone. It shares no code with
``chunkflow_core``: weights of patches, sums and skipped patches are computed anew, and arrays are
kept where the library keeps digests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.support.oracle.geometry import Block, Case, Geometry, Index, Mask

MASK_VOXEL = (1, 2, 3)
"""Size of a mask voxel in voxels of the input, zyx."""


class Read(NamedTuple):
    """What decides what a block gives."""

    axes: Block
    mask: bytes
    planes: tuple[tuple[int, bytes], ...]
    """Number of each tier of patches that the mask touches, and its input with padding and halo."""


class Inferred(NamedTuple):
    """A block's inference."""

    read: Read
    sums: NDArray[np.int64]
    """What its patches add up to over its reach, in exact steps; czyx."""
    inside: Mask
    """The mask over its reach."""
    patches: int
    """How many were run, not skipped."""


def mix(patch: NDArray[np.float32], case: Case, model: int) -> NDArray[np.float32]:
    """A nonlinear stand-in for a convnet: depends on the place in the patch and on the context.

    Args:
        patch: Input patch, ``(1, z, y, x)``, with halo.
        case: Says sizes and seed.
        model: Number of the model.

    Returns:
        Output patch, ``(2, z, y, x)``, without halo.
    """
    rng = np.random.default_rng([case.seed, model])
    kernel = rng.random((2, 3), dtype=np.float32)
    mean = np.ascontiguousarray(patch[0]).mean(dtype=np.float64).astype(np.float32)
    index = tuple(slice(h, h + p) for h, p in zip(case.halo, case.patch, strict=True))
    position = rng.random(case.patch, dtype=np.float32)
    values = [(k[0] * patch[0][index] + k[1] * mean + k[2] * position) / np.float32(3.5) for k in kernel]
    return np.stack(values).astype(np.float32)


def bits(model: int, machine: int) -> int:
    """The number of a model for ``mix``, with the last bits that a kind of machine gives."""
    return model + 2 * machine


def infer(geometry: Geometry, layers: Mapping[str, NDArray[np.uint8]], model: int) -> dict[Index, Inferred]:
    """The inference of each block.

    Args:
        geometry: The blocks.
        layers: Voxels (zyx) of layer ``input`` and, where the case has one, of ``mask``.
        model: Number of the model, with its machine: see ``bits``.
    """
    case = geometry.case
    inside = np.ones(case.size, bool)
    if case.masked:
        whole = np.kron(layers["mask"] != 0, np.ones(MASK_VOXEL, bool))
        inside = whole[tuple(map(slice, case.size))]
    inference = _Inference(geometry, layers["input"], inside, model)
    return {index: inference.block(block) for index, block in geometry.blocks.items()}


class _Inference:
    """What all blocks of a volume have in common."""

    def __init__(self, geometry: Geometry, volume: NDArray[np.uint8], inside: Mask, model: int) -> None:
        self.case, self.counts, self.inside, self.model = geometry.case, geometry.counts, inside, model
        self.padded, self.low = self._padded(volume)
        self.weights = self._weights()

    def _padded(self, volume: NDArray[np.uint8]) -> tuple[NDArray[np.float32], list[int]]:
        """The input with all that patches reach, and how much was added at the low ends."""
        case = self.case
        stops = [
            start + (count - 1) * (p - o) + p
            for start, count, p, o in zip(case.start, self.counts, case.patch, case.overlap, strict=True)
        ]
        low = [max(0, h - start) for h, start in zip(case.halo, case.start, strict=True)]
        high = [max(0, stop + h - n) for h, stop, n in zip(case.halo, stops, case.size, strict=True)]
        mode: Any = case.padding
        padded = np.pad(volume, list(zip(low, high, strict=True)), mode=mode)
        return padded.astype(np.float32) / np.float32(255), low

    def _weights(self) -> list[list[NDArray[np.float32]]]:
        """For each axis the weights of each patch along it."""
        case, weights = self.case, []
        for patch, overlap, count in zip(case.patch, case.overlap, self.counts, strict=True):
            places = [slice(k * (patch - overlap), k * (patch - overlap) + patch) for k in range(count)]
            bump = np.array([math.exp(-1 / (1 - (2 * (i + 1) / (patch + 1) - 1) ** 2)) for i in range(patch)])
            total = np.zeros(places[-1].stop)
            for place in places:
                total[place] += bump
            weights.append([(bump / total[place]).astype(np.float32) for place in places])
        return weights

    def block(self, block: Block) -> Inferred:
        """The inference of one block."""
        case = self.case
        stride = np.subtract(case.patch, case.overlap)
        origin = np.array([axis.start for axis in block])
        within = self.inside[tuple(slice(axis.start, axis.reach_stop) for axis in block)]
        extent = [(axis.last - axis.first - 1) * s + p for axis, s, p in zip(block, stride, case.patch, strict=True)]
        sums, planes, run = np.zeros((2, *extent), np.int64), {}, 0
        for k in product(*(range(axis.first, axis.last) for axis in block)):
            at = np.array(case.start) + k * stride  # in the input
            local = tuple(slice(a, a + p) for a, p in zip(at - origin, case.patch, strict=True))
            if not within[local].any():
                continue
            ends = self._ends(at, case.patch)
            if k[0] not in planes:
                whole = self._ends(origin, extent)
                planes[k[0]] = self.padded[(ends[0], *whole[1:])].tobytes()
            part = self.padded[ends]
            if not part.any():
                continue
            run += 1
            z, y, x = (self.weights[a][k[a]] for a in range(3))
            weighted = mix(part[None], case, self.model) * (y[:, None] * x[None, :])
            sums[(slice(None), *local)] += np.rint(weighted * (z * np.float32(2**23))[:, None, None]).astype(np.int64)
        sums = sums[(slice(None), *map(slice, within.shape))]
        mask = within.tobytes() if case.masked else b""
        return Inferred(Read(block, mask, tuple(planes.items())), sums, within, run)

    def _ends(self, start: Any, size: Any) -> tuple[slice, ...]:
        """Where a box of the input layer is in the padded input, with its halo."""
        places = zip(start, self.low, size, self.case.halo, strict=True)
        return tuple(slice(a + m - h, a + m + n + h) for a, m, n, h in places)


def given(geometry: Geometry, inferred: Mapping[Index, Inferred], donor: Index, receiver: Index) -> Any:
    """What a block has given to another; to itself also its mask."""
    blocks, done = geometry.blocks, inferred[donor]
    voxels = geometry.given_voxels(blocks[donor], blocks[receiver])
    mask = done.inside[voxels].tobytes() if donor == receiver else b""
    return done.read.axes, done.sums[:, voxels].tobytes(), mask


def blend(geometry: Geometry, inferred: Mapping[Index, Inferred], receiver: Index) -> NDArray[Any]:
    """A block's output (czyx, of the case's dtype), from the inference of all that give to it."""
    blocks = geometry.blocks
    target = blocks[receiver]
    total = np.zeros((2, *(axis.stop - axis.start for axis in target)), np.int64)
    for donor in {*geometry.donors[receiver], receiver}:
        common = [
            (max(r.start, d.start), min(r.stop, d.reach_stop)) for d, r in zip(blocks[donor], target, strict=True)
        ]
        to, of = (
            (slice(None), *(slice(a - axis.start, b - axis.start) for (a, b), axis in zip(common, at, strict=True)))
            for at in (target, blocks[donor])
        )
        total[to] += inferred[donor].sums[of]
    values = (total / 2**23).astype(np.float32)
    if geometry.case.dtype == "uint8":
        values = np.clip(np.rint(values * np.float32(255)), 0, 255).astype(np.uint8)
    values[:, ~inferred[receiver].inside[tuple(map(slice, values.shape[1:]))]] = 0
    return values
