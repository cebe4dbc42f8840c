"""The global lattice of patches, and its division into blocks that can be computed apart.

Along one axis, with patch ``p``, overlap ``o``, stride ``s = p - o`` and ``m = 2`` patches a
block::

    patch 0  |--------|
    patch 1        |--------|                 block 0 owns patches 0 and 1
    patch 2              |--------|           block 1 owns patches 2 and 3
    patch 3                    |--------|
    block    |     0     |       1      |     the last block extends to the end of the ROI
    reach    |<-block 0's ->|                 block 0 and its overhang: all that its patches touch
    margin               |<>|                 of block 1: block 0 contributes here

There is one lattice for the whole region of interest (ROI). It is never re-anchored, so what a
voxel receives does not depend on the blocks. Everything here is pure integer arithmetic, order z,
y, x.
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
    """Length of the ROI in voxels, at least 1."""
    patch: int
    """Length of an output patch in voxels."""
    overlap: int
    """Voxels shared by neighbouring patches, at least 0 and less than ``patch``."""

    def __post_init__(self) -> None:
        """Check that the lattice can cover the ROI; ``ValueError`` if not."""
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
    def neighbours(self) -> int:
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
    reach_stop: int
    core_start: int
    first_patch: int
    stop_patch: int
    near: int
    """One past the last patch that can overlap the block's own.

    Patches beyond decide nothing of the block.
    """


@dataclass(frozen=True, slots=True)
class Donation:
    """A box of weighted partial sums that one block computes for another, or for itself."""

    donor: Vector
    """Index of the block that computes the sums, zyx."""
    receiver: Vector
    """Index of the block that owns the voxels, zyx."""
    box: Box
    key: str
    """Name of the donation in the exchange; see :func:`donation_key`."""


def donation_key(donor: Box, given: Box) -> str:
    """Name of a donation in the exchange: ``block-range%box-range``, each in the order x, y, z.

    Args:
        donor: The donor's own box.
        given: The box that is given.
    """
    return f"{donor.key}%{given.key}"


def donor_part(key: str) -> str:
    """The donor's own box in a donation's key, as text."""
    return key.partition("%")[0]


def given_box(key: str) -> Box:
    """The box that is given, in a donation's key; ``ValueError`` if the text is no such key."""
    return Box.from_key(key.partition("%")[2])


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of planes of a block's reach that becomes final at once."""

    box: Box
    """The planes, over the whole reach in y and x."""
    core: Box
    """The part that can be written to the output at once; may be empty."""
    donations: tuple[Donation, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """The part of the output that one task owns. Boxes are in the coordinates of the volume."""

    index: Vector
    box: Box
    """The voxels that the block owns."""
    reach: Box
    """The voxels that the block's patches touch: its own box and its overhang on the high sides."""
    core: Box
    """The storage chunks to which no other block contributes."""
    frame: tuple[Box, ...]
    """The storage chunks that touch the margin, as disjoint boxes; empty without a margin."""
    first_patch: Vector
    """Lattice position of the block's first patch."""
    stop_patch: Vector
    """One past the lattice position of the block's last patch."""

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
    """Region of interest: the voxels that are to be written."""
    patch: Vector
    """Size of an output patch in voxels."""
    overlap: Vector
    """Overlap of neighbouring output patches in voxels."""
    block_size: Vector
    """Size of a block: a multiple of the stride and of ``storage_chunk``, at least ``overlap``."""
    storage_chunk: Vector
    """Storage chunk size of the output layer, whose grid starts at the ROI's start."""
    axes: tuple[AxisLattice, AxisLattice, AxisLattice] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the size; ``ValueError`` if it does not fit stride, storage chunk or overlap."""
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
        """Distance between the starts of neighbouring patches, in voxels."""
        return vector(axis.stride for axis in self.axes)

    @cached_property
    def patches_per_block(self) -> Vector:
        """Number of patches along each axis of a block; the last blocks can have fewer."""
        return vector(b // s for b, s in zip(self.block_size, self.stride, strict=True))

    @cached_property
    def shape(self) -> Vector:
        """Number of blocks along each axis."""
        return vector(-(-axis.count // m) for axis, m in zip(self.axes, self.patches_per_block, strict=True))

    @cached_property
    def axis_blocks(self) -> tuple[list[AxisBlock], ...]:
        """The blocks along each axis: three lists, in the order z, y, x."""
        return tuple([self._axis_block(a, i) for i in range(n)] for a, n in enumerate(self.shape))

    @property
    def patches(self) -> int:
        """Number of patches of the whole lattice."""
        z, y, x = self.axes
        return z.count * y.count * x.count

    def __contains__(self, index: Vector) -> bool:
        """Whether there is a block with this index."""
        return all(0 <= i < n for i, n in zip(index, self.shape, strict=True))

    def indices(self) -> Iterator[Vector]:
        """Indices of all blocks, x fastest."""
        return indices((0, 0, 0), self.shape)

    def patch_box(self, position: Vector) -> Box:
        """The output voxels of the patch at a lattice position; may extend past the ROI."""
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
            reach=Box(box.start, (z.reach_stop, y.reach_stop, x.reach_stop)),
            core=core,
            frame=tuple(box.minus_high_corner(core)),
            first_patch=(z.first_patch, y.first_patch, x.first_patch),
            stop_patch=(z.stop_patch, y.stop_patch, x.stop_patch),
        )

    def slab_depth(self, block: Block) -> int:
        """Number of planes of sums that a block's run keeps in memory.

        They are those that a tier of patches covers, and those that fall short of a storage chunk.
        """
        return min(self.patch[0] + self.storage_chunk[0] - 1, block.reach.shape[0])

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

        Streaming along z needs no more memory for a deep block than for a shallow one: each piece
        is written and donated as soon as no later patch touches its planes.
        """
        sources = [(block.index, box) for box in block.frame] + list(self._overhangs(block))
        cuts = self._z_cuts(block)
        pieces = []
        for start, stop in pairwise(cuts):
            planes = block.reach.with_z(start, stop)
            boxes = ((receiver, box & planes) for receiver, box in sources)
            donations = tuple(
                Donation(block.index, receiver, box, donation_key(block.box, box)) for receiver, box in boxes if box
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
        for tier in range(1, block.stop_patch[0] - block.first_patch[0]):
            final = start + tier * self.stride[0] // depth * depth
            if cuts[-1] < final < stop:
                cuts.append(final)
        return cuts + [stop] + ([block.reach.stop[0]] if block.reach.stop[0] > stop else [])

    def _overhangs(self, block: Block) -> Iterator[tuple[Vector, Box]]:
        for delta in product((0, 1), repeat=3):
            receiver = self._shifted(block.index, delta, 1)
            if any(delta) and receiver in self:
                start = vector(b if d else a for d, a, b in zip(delta, block.box.start, block.box.stop, strict=True))
                stop = vector(c if d else b for d, b, c in zip(delta, block.box.stop, block.reach.stop, strict=True))
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
            reach_stop=stop if i == last else stop + axis.overlap,
            core_start=min(stop, start + ceil_to(margin, self.storage_chunk[a])),
            first_patch=i * m,
            stop_patch=stop_patch,
            near=min(axis.count, stop_patch + axis.neighbours),
        )

    @staticmethod
    def _shifted(index: Vector, delta: tuple[int, ...], sign: int) -> Vector:
        return vector(i + sign * d for i, d in zip(index, delta, strict=True))
