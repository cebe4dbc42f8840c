"""Groups of 8 × 8 × 8 blocks, so that one listing tells of many blocks, and none of too many."""

from __future__ import annotations

from collections.abc import Iterator

from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Vector, ceil_to, indices, vector

_GROUP = 8
"""Edge of a group, in blocks."""


def group_of(block: Vector) -> Vector:
    """The group that a block is in."""
    z, y, x = block
    return (z // _GROUP, y // _GROUP, x // _GROUP)


def blocks_of(group: Vector, grid: BlockGrid) -> Iterator[Vector]:
    """The blocks of a group that a volume has, x fastest."""
    start = vector(_GROUP * g for g in group)
    return indices(start, vector(min(a + _GROUP, n) for a, n in zip(start, grid.shape, strict=True)))


def groups_of(grid: BlockGrid) -> Iterator[Vector]:
    """All groups of the blocks of a volume."""
    return indices((0, 0, 0), vector(ceil_to(n, _GROUP) // _GROUP for n in grid.shape))


def group_name(index: Vector) -> str:
    """Name of the folder of a group, or of a block."""
    return "{}_{}_{}".format(*index)
