"""Blocks by number, for what has to be known of each block of a volume that may have millions.

A block's index takes 72 bytes in a list, and a hundred in a set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress
from math import prod

from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Vector


def number_of(grid: BlockGrid, block: Vector) -> int:
    """Number of a block of a grid, counted from 0 in the order of ``BlockGrid.indices``."""
    (z, y, x), (_, height, width) = block, grid.shape
    return (z * height + y) * width + x


def block_of(grid: BlockGrid, number: int) -> Vector:
    """The index of the block with a number, zyx: the inverse of :func:`number_of`."""
    _, height, width = grid.shape
    rest, x = divmod(number, width)
    z, y = divmod(rest, height)
    return (z, y, x)


class BlockSet:
    """A set of blocks of a grid. It takes one byte for each block that the grid has."""

    def __init__(self, grid: BlockGrid, blocks: Iterable[Vector] = ()) -> None:
        """Hold some blocks, indices zyx."""
        self._grid, self._flags = grid, bytearray(prod(grid.shape))
        for block in blocks:
            self.add(block)

    def add(self, block: Vector) -> None:
        """Hold a block of the grid, too."""
        self._flags[number_of(self._grid, block)] = True

    def __contains__(self, block: Vector) -> bool:
        """Whether a block is held; of what is no block of the grid, none is."""
        return block in self._grid and bool(self._flags[number_of(self._grid, block)])

    def __len__(self) -> int:
        """Number of blocks held."""
        return self._flags.count(True)

    def __iter__(self) -> Iterator[Vector]:
        """The blocks held, x fastest."""
        return compress(self._grid.indices(), self._flags)
