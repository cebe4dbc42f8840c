"""Oracle for geometry: which blocks there are, what they touch, and who gives voxels to whom.

It asks every block about every other, and marks voxels in dense masks. It shares no code with
``chunkflow_core``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Index = tuple[int, ...]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Case:
    """A small volume and how it is cut; sizes in voxels of the input, zyx."""

    start: Index
    """First voxel of the ROI, in the input layer."""
    stop: Index
    """One past the last voxel of the ROI, in the input layer."""
    beyond: Index
    """Input voxels beyond the ROI's end."""
    patch: Index
    """Size of the output patch, without halo."""
    halo: Index
    """Voxels that the input patch has more than the output patch, on each side."""
    overlap: Index
    block: Index
    chunk: Index
    """Storage chunk of the output layer."""
    input_chunk: Index
    """Storage chunk of the input layer."""
    padding: str = "reflect"
    dtype: str = "uint8"
    masked: bool = False
    seed: int = 0
    """Of the voxels of all layers, and of the weights of the models."""
    format: str = "precomputed"
    """Of the output layer: ``precomputed``, ``ome-zarr``, or ``shards`` of it."""

    @property
    def pieces(self) -> Index:
        """Size of the pieces of a shard."""
        return tuple(n // 2 if n % 2 == 0 else n for n in self.chunk)

    @property
    def size(self) -> Index:
        """Size of the input layer."""
        return tuple(b + n for b, n in zip(self.stop, self.beyond, strict=True))


class Axis(NamedTuple):
    """A block along one axis: all that decides its numbers, besides what it reads."""

    start: int
    stop: int
    reach_stop: int
    """End of what its patches touch."""
    first: int
    last: int
    """One past its last patch."""
    near: int
    """One past the last patch that overlaps one of its own."""
    padded: tuple[int | None, int | None]
    """The input's ends, where it needs voxels beyond them."""


Block = tuple[Axis, ...]


@dataclass(frozen=True)
class Geometry:
    """The blocks of a case.

    The *reach* of a block are the voxels of the ROI from its start to the end of what its patches
    touch.
    """

    case: Case

    @cached_property
    def counts(self) -> list[int]:
        """Patches along each axis."""
        case = self.case
        lengths = zip(case.start, case.stop, case.overlap, case.patch, strict=True)
        return [max(1, math.ceil((b - a - o) / (p - o))) for a, b, o, p in lengths]

    def axis(self, a: int) -> list[Axis]:
        """The blocks along one axis."""
        case, count = self.case, self.counts[a]
        start, stop, patch, halo = case.start[a], case.stop[a], case.patch[a], case.halo[a]
        stride, size = patch - case.overlap[a], case.size[a]
        blocks = []
        for low in range(0, count * stride, case.block[a]):
            first, last = low // stride, min((low + case.block[a]) // stride, count)
            begin, end = start + first * stride - halo, start + (last - 1) * stride + patch + halo
            near = max(k + 1 for k in range(count) if k * stride < (last - 1) * stride + patch)
            padded = 0 if begin < 0 else None, size if end > size else None
            if max(-begin, end - size) >= size:  # reflected more than once
                padded = 0, size
            high = stop if last == count else start + low + case.block[a]
            blocks.append(Axis(start + low, high, min(stop, end - halo), first, last, near, padded))
        return blocks

    @cached_property
    def blocks(self) -> dict[Index, Block]:
        """All blocks by their place in the grid."""
        return {
            index: tuple(axis for axis, _ in both)
            for both in product(*([(axis, i) for i, axis in enumerate(self.axis(a))] for a in range(3)))
            for index in [tuple(i for _, i in both)]
        }

    def frame(self, block: Block) -> Mask:
        """The storage chunks of a block to which others contribute, as voxels of its reach."""
        frame = np.zeros([axis.reach_stop - axis.start for axis in block], bool)
        for a, axis in enumerate(block):
            if axis.first > 0:
                overlap, chunk = self.case.overlap[a], self.case.chunk[a]
                frame[(slice(None),) * a + (slice(0, -(-overlap // chunk) * chunk),)] = True
        frame[~self.own(block)] = False
        return frame

    @cached_property
    def chunks(self) -> dict[str, tuple[str, Index]]:
        """Names of the output's storage chunks, with the stage and the block that write each."""
        case, found = self.case, {}
        for corner in product(*(range(a, b, c) for a, b, c in zip(case.start, case.stop, case.chunk, strict=True))):
            stop = [min(a + c, b) for a, b, c in zip(corner, case.stop, case.chunk, strict=True)]
            index = self.owner(corner)
            block = self.blocks[index]
            in_frame = self.frame(block)[tuple(a - axis.start for a, axis in zip(corner, block, strict=True))]
            name = "_".join(f"{a}-{b}" for a, b in zip(reversed(corner), reversed(stop), strict=True))
            found[name] = "blend" if in_frame else "infer", index
        return found

    def own(self, block: Block) -> Mask:
        """The voxels of a block, among those of its reach."""
        own = np.zeros([axis.reach_stop - axis.start for axis in block], bool)
        own[tuple(slice(0, axis.stop - axis.start) for axis in block)] = True
        return own

    def given_voxels(self, donor: Block, receiver: Block) -> Mask:
        """What a donor gives a receiver, as voxels of the donor's reach."""
        if donor == receiver:
            return self.frame(donor)
        given = np.zeros([axis.reach_stop - axis.start for axis in donor], bool)
        part = [
            (max(r.start, d.start) - d.start, min(r.stop, d.reach_stop) - d.start)
            for d, r in zip(donor, receiver, strict=True)
        ]
        if all(a < b for a, b in part):
            given[tuple(slice(a, b) for a, b in part)] = True
        return given

    @cached_property
    def donors(self) -> dict[Index, list[Index]]:
        """For each block those that give it something, in order; none if it has no frame."""
        return {index: self._donors(receiver) for index, receiver in self.blocks.items()}

    def _donors(self, receiver: Block) -> list[Index]:
        if not self.frame(receiver).any():
            return []
        return [index for index, donor in self.blocks.items() if self.given_voxels(donor, receiver).any()]

    def owner(self, voxel: Index) -> Index:
        """The block that owns a voxel of the ROI, given in the input layer, zyx."""
        return next(
            index
            for index, block in self.blocks.items()
            if all(axis.start <= v < axis.stop for axis, v in zip(block, voxel, strict=True))
        )

    def touching(self, start: Index, stop: Index) -> list[Index]:
        """The blocks that own a voxel of a box, given in the input layer, zyx."""
        return [
            index
            for index, block in self.blocks.items()
            if all(axis.start < b and a < axis.stop for axis, a, b in zip(block, start, stop, strict=True))
        ]


@lru_cache
def _cuts() -> list[tuple[int, int, int, int]]:
    """Ways to cut an axis: patch, overlap, block, storage chunk. The simple ones first."""
    found = []
    for patch in range(1, 7):
        for overlap in range(patch):
            for chunk in range(1, 5):
                step = math.lcm(patch - overlap, chunk)
                found += [(patch, overlap, block, chunk) for block in (step, 2 * step) if overlap <= block <= 9]
    return sorted((c for c in found if c[2] // (c[0] - c[1]) <= 3), key=lambda c: (c[2], c))


_SHAPES = [(1, 1, 2), (2, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 3), (2, 2, 2), (3, 1, 2), (2, 3, 1)]
"""Blocks along each axis."""


_ROWS = [(1, 1, 2), (2, 1, 1), (1, 2, 1), (1, 1, 3), (1, 2, 2)]
"""Blocks along each axis of a tiny volume."""


@st.composite
def _axes(draw: st.DrawFn, blocks: int) -> tuple[int, ...]:
    """One axis: an element of each of the first nine fields of ``Case``."""
    patch, overlap, block, chunk = draw(st.sampled_from(_cuts()))
    start, beyond, halo = draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(st.integers(0, 1))
    length = (blocks - 1) * block + draw(st.integers(overlap + 1 if blocks > 1 else 1, block + overlap))
    return start, start + length, beyond, patch, halo, overlap, block, chunk, draw(st.integers(2, 6))


@st.composite
def _short_axes(draw: st.DrawFn, blocks: int) -> tuple[int, ...]:
    """One axis of a tiny volume, as ``_axes`` has it."""
    if blocks == 1:
        return 0, 1, 0, 1, draw(st.integers(0, 1)), 0, 1, 1, 2
    cuts = [cut for cut in _cuts() if 2 <= cut[2] <= 4 and cut[2] // cut[3] <= 2]
    patch, overlap, block, chunk = draw(st.sampled_from(cuts))
    length = (blocks - 1) * block + draw(st.integers(overlap + 1, block + overlap))
    return 0, length, draw(st.integers(0, 1)), patch, draw(st.integers(0, 1)), overlap, block, chunk, 4


@st.composite
def cases(draw: st.DrawFn, *, tiny: bool = False) -> Case:
    """A volume of two to six blocks, or a tiny one of two to four, with a few storage chunks."""
    shape = draw(st.sampled_from(_ROWS if tiny else _SHAPES))
    start, stop, beyond, patch, halo, overlap, block, chunk, input_chunk = zip(
        *(draw((_short_axes if tiny else _axes)(blocks)) for blocks in shape), strict=True
    )
    return Case(
        start, stop, beyond, patch, halo, overlap, block, chunk, input_chunk,
        padding=draw(st.sampled_from(["reflect", "edge", "constant"])),
        dtype=draw(st.sampled_from(["uint8", "float32"])),
        masked=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        format=draw(st.sampled_from(["precomputed", "ome-zarr", "shards"])),
    )  # fmt: skip
