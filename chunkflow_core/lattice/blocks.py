"""The global lattice of patches, and its division into blocks that can be computed apart.

Along one axis, with patch ``p``, overlap ``o``, stride ``s = p - o`` and ``m = 2`` patches a block::

    patch 0  |--------|
    patch 1        |--------|                 block 0 owns patches 0 and 1
    patch 2              |--------|           block 1 owns patches 2 and 3
    patch 3                    |--------|
    block    |     0     |       1      |     the last block reaches to the end of the ROI
    chunk    |<-  block 0 + overlap ->|
                         |<->|                margin of block 1: block 0 contributes here (its overhang)

There is one lattice for the whole region of interest (ROI). It is never re-anchored, so what a voxel receives does not
depend on the blocks. Everything here is pure integer arithmetic, order z, y, x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, product

from chunkflow_core.lattice.boxes import Box, Vector, ceil_to, indices, vector


@dataclass(frozen=True, slots=True)
class AxisLattice:
    """The patches along one axis; positions are relative to the ROI's start, in voxels."""

    length: int
    """Length of the ROI."""
    patch: int
    """Length of an output patch."""
    overlap: int
    """Voxels shared by neighbouring patches; less than ``patch``."""

    def __post_init__(self) -> None:
        if self.length < 1 or not 0 <= self.overlap < self.patch:
            raise ValueError(f"need length >= 1 and 0 <= overlap < patch, got {self}")

    @property
    def stride(self) -> int:
        """Distance between the starts of neighbouring patches."""
        return self.patch - self.overlap

    @property
    def count(self) -> int:
        """Number of patches: just enough to cover the ROI."""
        return max(1, -(-(self.length - self.overlap) // self.stride))

    @property
    def reach(self) -> int:
        """How many patches on either side overlap a given one."""
        return -(-self.patch // self.stride) - 1

    def touching(self, start: int, stop: int) -> range:
        """Numbers of the patches that share a voxel with ``[start, stop)``."""
        first = max(0, -(-(start - self.patch + 1) // self.stride))
        return range(first, min(self.count, -(-stop // self.stride)))


@dataclass(frozen=True, slots=True)
class AxisBlock:
    """A block along one axis, in the coordinates of the volume."""

    start: int
    stop: int
    chunk_stop: int
    core_start: int
    first_patch: int
    stop_patch: int
    near: int
    """One past the last patch that can overlap the block's own: patches beyond decide nothing of it."""


@dataclass(frozen=True, slots=True)
class Donation:
    """One box of weighted partial sums that one block (the donor) computes for another (or for itself)."""

    donor: Vector
    """Index of the block that computes it."""
    receiver: Vector
    """Index of the block that owns the voxels."""
    box: Box
    key: str
    """Its name in the exchange: ``block-range%chunk-range``, in xyz."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of planes of a chunk that becomes final at once: what of it is written, and what is donated."""

    box: Box
    """The planes, over the whole chunk in y and x."""
    core: Box
    """The part that can be written to the output at once; may be empty."""
    donations: tuple[Donation, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """The part of the output that one task owns. Boxes are in the coordinates of the volume."""

    index: Vector
    box: Box
    """The voxels that the block owns."""
    chunk: Box
    """The voxels that its patches touch: the box and its overhang on the high sides."""
    core: Box
    """The storage chunks to which no other block contributes."""
    frame: tuple[Box, ...]
    """The storage chunks that touch the margin, as disjoint boxes; empty if there is nothing to receive."""
    first_patch: Vector
    """Lattice position of the block's first patch."""
    stop_patch: Vector
    """One past the lattice position of its last patch."""

    @property
    def patches(self) -> int:
        """Number of patches the block owns."""
        return Box(self.first_patch, self.stop_patch).voxels

    @property
    def name(self) -> str:
        """The index as it stands in messages and task ids: ``z_y_x``."""
        return "_".join(map(str, self.index))


@dataclass(frozen=True)
class BlockGrid:
    """The lattice of patches over an ROI, cut into blocks."""

    roi: Box
    """Region of interest: what is to be written."""
    patch: Vector
    """Output patch size."""
    overlap: Vector
    """Overlap of output patches."""
    block_size: Vector
    """A multiple of the stride and of ``storage_chunk``; at least ``overlap``."""
    storage_chunk: Vector
    """Storage chunk size of the output layer, whose grid starts at the ROI's start."""
    axes: tuple[AxisLattice, AxisLattice, AxisLattice] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        z, y, x = map(AxisLattice, self.roi.shape, self.patch, self.overlap)
        object.__setattr__(self, "axes", (z, y, x))
        for axis, block, chunk in zip(self.axes, self.block_size, self.storage_chunk, strict=True):
            if block < 1 or block % axis.stride or block % chunk or block < axis.overlap:
                raise ValueError(
                    f"block size {block} must be a multiple of the stride {axis.stride} and of the storage chunk "
                    f"{chunk}, and at least the overlap {axis.overlap}"
                )

    @property
    def stride(self) -> Vector:
        """Distance between the starts of neighbouring patches."""
        return vector(axis.stride for axis in self.axes)

    @cached_property
    def patches_per_block(self) -> Vector:
        """Patches along each axis of a block (fewer in the last blocks)."""
        return vector(b // s for b, s in zip(self.block_size, self.stride, strict=True))

    @cached_property
    def shape(self) -> Vector:
        """Number of blocks along each axis."""
        return vector(-(-axis.count // m) for axis, m in zip(self.axes, self.patches_per_block, strict=True))

    @cached_property
    def axis_blocks(self) -> tuple[list[AxisBlock], ...]:
        """For each axis, the blocks along it."""
        return tuple([self._axis_block(a, i) for i in range(n)] for a, n in enumerate(self.shape))

    @property
    def patches(self) -> int:
        """Number of patches of the whole lattice."""
        z, y, x = self.axes
        return z.count * y.count * x.count

    def __contains__(self, index: Vector) -> bool:
        return all(0 <= i < n for i, n in zip(index, self.shape, strict=True))

    def indices(self) -> Iterator[Vector]:
        """Indices of all blocks, x fastest."""
        return indices((0, 0, 0), self.shape)

    def patch_box(self, position: Vector) -> Box:
        """The output voxels of the patch at a lattice position; may reach past the ROI."""
        start = vector(o + k * s for o, k, s in zip(self.roi.start, position, self.stride, strict=True))
        return Box(start, vector(a + p for a, p in zip(start, self.patch, strict=True)))

    def block(self, index: Vector) -> Block:
        """The block with an index; ``IndexError`` if there is none."""
        if index not in self:
            raise IndexError(f"no block {index}: the grid has {self.shape} blocks")
        z, y, x = (blocks[i] for blocks, i in zip(self.axis_blocks, index, strict=True))
        box = Box((z.start, y.start, x.start), (z.stop, y.stop, x.stop))
        core = Box((z.core_start, y.core_start, x.core_start), box.stop)
        return Block(
            index=index,
            box=box,
            chunk=Box(box.start, (z.chunk_stop, y.chunk_stop, x.chunk_stop)),
            core=core,
            frame=tuple(box.minus_high_corner(core)),
            first_patch=(z.first_patch, y.first_patch, x.first_patch),
            stop_patch=(z.stop_patch, y.stop_patch, x.stop_patch),
        )

    def slab_depth(self, block: Block) -> int:
        """Planes of sums to keep at a time: those that a layer of patches reaches, and those short of a storage chunk."""
        return min(self.patch[0] + self.storage_chunk[0] - 1, block.chunk.shape[0])

    def has_frame(self, index: Vector) -> bool:
        """Whether other blocks contribute to a block, so that it has a second stage."""
        return any(i > 0 and overlap > 0 for i, overlap in zip(index, self.overlap, strict=True))

    def donors(self, index: Vector) -> list[Vector]:
        """The blocks that contribute to a block's frame, itself last; empty if it has no frame."""
        if not self.has_frame(index):
            return []
        z, y, x = index
        steps = [(1, 0) if i > 0 and overlap > 0 else (0,) for i, overlap in zip(index, self.overlap, strict=True)]
        return [(z - dz, y - dy, x - dx) for dz, dy, dx in product(*steps)]

    def receivers(self, index: Vector) -> list[Vector]:
        """The blocks to whose frames a block contributes, itself included."""
        z, y, x = index
        steps = [
            (0, 1) if i + 1 < n and overlap > 0 else (0,)
            for i, n, overlap in zip(index, self.shape, self.overlap, strict=True)
        ]
        higher = [(z + dz, y + dy, x + dx) for dz, dy, dx in product(*steps)]
        return higher if self.has_frame(index) else higher[1:]

    def pieces(self, block: Block) -> list[Piece]:
        """The block's planes in the order in which they become final, cut at storage chunks in z.

        Streaming along z needs no more memory for a deep block than for a shallow one: each piece is written and
        donated as soon as its planes are beyond the reach of later patches.
        """
        sources = [(block.index, box) for box in block.frame] + list(self._overhangs(block))
        cuts = self._z_cuts(block)
        pieces = []
        for start, stop in pairwise(cuts):
            planes = block.chunk.with_z(start, stop)
            boxes = ((receiver, box & planes) for receiver, box in sources)
            donations = tuple(
                Donation(block.index, receiver, box, f"{block.box.key}%{box.key}") for receiver, box in boxes if box
            )
            pieces.append(Piece(planes, block.core & planes, donations))
        return pieces

    def donations(self, donor: Vector, receiver: Vector) -> list[Donation]:
        """All that one block donates to another, in order of z."""
        pieces = self.pieces(self.block(donor))
        return [donation for piece in pieces for donation in piece.donations if donation.receiver == receiver]

    def blocks_touching(self, box: Box) -> list[Vector]:
        """Indices of the blocks that own a voxel of ``box``, x fastest."""
        inside = box & self.roi
        if not inside:
            return []
        start, stop = [], []
        for a in range(3):
            low, high = inside.start[a] - self.roi.start[a], inside.stop[a] - self.roi.start[a]
            last = self.shape[a] - 1
            start.append(min(last, low // self.block_size[a]))
            stop.append(min(last, (high - 1) // self.block_size[a]) + 1)
        return list(indices(vector(start), vector(stop)))

    def holding(self, voxel: Vector) -> Vector:
        """Index of the block that owns a voxel of the ROI."""
        return vector(
            min(n - 1, (v - origin) // size)
            for v, origin, size, n in zip(voxel, self.roi.start, self.block_size, self.shape, strict=True)
        )

    def _z_cuts(self, block: Block) -> list[int]:
        start, stop, depth = block.box.start[0], block.box.stop[0], self.storage_chunk[0]
        cuts = [start]
        for layer in range(1, block.stop_patch[0] - block.first_patch[0]):
            final = start + layer * self.stride[0] // depth * depth
            if cuts[-1] < final < stop:
                cuts.append(final)
        return cuts + [stop] + ([block.chunk.stop[0]] if block.chunk.stop[0] > stop else [])

    def _overhangs(self, block: Block) -> Iterator[tuple[Vector, Box]]:
        for delta in product((0, 1), repeat=3):
            receiver = self._shifted(block.index, delta, 1)
            if any(delta) and receiver in self:
                start = vector(b if d else a for d, a, b in zip(delta, block.box.start, block.box.stop, strict=True))
                stop = vector(c if d else b for d, b, c in zip(delta, block.box.stop, block.chunk.stop, strict=True))
                yield receiver, Box(start, stop)

    def _axis_block(self, a: int, i: int) -> AxisBlock:
        axis, m, origin, last = self.axes[a], self.patches_per_block[a], self.roi.start[a], self.shape[a] - 1
        start = origin + i * self.block_size[a]
        stop = self.roi.stop[a] if i == last else start + self.block_size[a]
        margin = axis.overlap if i > 0 else 0
        stop_patch = min((i + 1) * m, axis.count)
        return AxisBlock(
            start=start,
            stop=stop,
            chunk_stop=stop if i == last else stop + axis.overlap,
            core_start=min(stop, start + ceil_to(margin, self.storage_chunk[a])),
            first_patch=i * m,
            stop_patch=stop_patch,
            near=min(axis.count, stop_patch + axis.reach),
        )

    @staticmethod
    def _shifted(index: Vector, delta: tuple[int, ...], sign: int) -> Vector:
        return vector(i + sign * d for i, d in zip(index, delta, strict=True))
