"""The grid of a layer's storage chunks, and what has to be known to ask storage for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.layer_info import LayerScale

Column = tuple[int, int]
"""Position (y, x) in the layer's grid of storage chunks."""
Wanted = dict[Column, list[int]]
"""Storage chunks to ask for: their positions in z, by column."""
Found = list[tuple[str, str]]
"""Names and signatures of storage chunks that are there."""
VERSION = "\0"
"""Stands in a signature before what tells one write from another one of the same content."""

_Item = TypeVar("_Item")


class Chunks:
    """The grid of a scale's storage chunks, and their names."""

    def __init__(self, scale: LayerScale) -> None:
        """Lay out the storage chunks of one scale of a layer."""
        self._bounds, self._size = scale.bounds, scale.chunk
        self.names = [
            [f"{a}-{min(a + size, stop)}" for a in range(start, stop, size)]
            for start, stop, size in zip(scale.bounds.start, scale.bounds.stop, scale.chunk, strict=True)
        ]
        """Names of the ranges along each axis, by position; axes in the order z, y, x."""
        self._positions = [{name: i for i, name in enumerate(names)} for names in self.names]

    def touching(self, box: Box) -> tuple[range, range, range]:
        """Positions of the storage chunks that touch a box, in z, y and x."""
        inside = box & self._bounds
        if not inside:
            return range(0), range(0), range(0)
        z, y, x = (
            range((inside.start[a] - start) // size, (inside.stop[a] - 1 - start) // size + 1)
            for a, (start, size) in enumerate(zip(self._bounds.start, self._size, strict=True))
        )
        return z, y, x

    def name(self, column: Column, z: int) -> str:
        """Name of a storage chunk's file."""
        return f"{self.names[2][column[1]]}_{self.names[1][column[0]]}_{self.names[0][z]}"

    def all_names(self, wanted: Wanted) -> list[str]:
        """Names of the wanted storage chunks' files."""
        return [self.name(column, z) for column, zs in wanted.items() for z in zs]

    def place(self, name: str) -> tuple[Column, int] | None:
        """Column and position in z of a storage chunk, by its name; None if there is none."""
        try:
            x, y, z = name.split("_")
            return (self._positions[1][y], self._positions[2][x]), self._positions[0][z]
        except (ValueError, KeyError):
            return None


class CannotTell(Exception):
    """A storage chunk is there, but storage says nothing of its content."""


class Store(Protocol):
    """Storage that can be asked for the storage chunks of a scale."""

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of storage chunks that are there, among them all that are wanted."""

    def everything(self) -> Iterator[tuple[str, str]]:
        """Names and signatures of all that lies among the storage chunks, but for subfolders."""

    def names(self) -> Iterator[str]:
        """Names as ``everything`` has them, each asked for when it is needed.

        ``CannotTell`` is raised if the storage has no listing, or refuses it.
        """

    def holds(self, names: list[str]) -> bool:
        """Whether there is any file of some names."""


def in_parallel(ask: Callable[[_Item], Found], items: Iterable[_Item], threads: int) -> Iterator[tuple[str, str]]:
    """All that is found for some items, in their order.

    Args:
        ask: Finds what there is for one item.
        items: The items.
        threads: How many items are asked for at the same time.
    """
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(ask, items):
            yield from found


def batches(items: list[_Item], size: int) -> Iterator[list[_Item]]:
    """The items in lists of at most ``size``."""
    return (items[i : i + size] for i in range(0, len(items), size))
