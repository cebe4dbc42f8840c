"""The grid of a layer's storage chunks, and what has to be known to ask storage for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.naming import BY_RANGE, Labels

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
    """The grid of a scale's storage chunks: their keys ``x0-x1_y0-y1_z0-z1``, and their files."""

    def __init__(self, scale: LayerScale) -> None:
        """Lay out the storage chunks of one scale of a layer."""
        self._bounds, self._size, self._naming = scale.bounds, scale.chunk, scale.naming
        self.ranges = BY_RANGE.along(scale.bounds, scale.chunk)
        """Ranges of voxels along each axis, by position; axes in the order z, y, x."""
        self._labels = self._naming.along(scale.bounds, scale.chunk)
        self._of_range, self._of_label = _positions(self.ranges), _positions(self._labels)

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
        return self._naming.name(self._labels[0][z], self._labels[1][column[0]], self._labels[2][column[1]])

    def all_names(self, wanted: Wanted) -> list[str]:
        """Names of the wanted storage chunks' files."""
        return [self.name(column, z) for column, zs in wanted.items() for z in zs]

    def place(self, name: str) -> tuple[Column, int] | None:
        """Column and position in z of a storage chunk, by its file's name; None if it is none."""
        return _place(self._of_label, self._naming.split(name))

    def place_of(self, key: str) -> tuple[Column, int] | None:
        """Column and position in z of a storage chunk, by its key; None if there is none."""
        return _place(self._of_range, BY_RANGE.split(key))

    def key(self, place: tuple[Column, int]) -> str:
        """Key of a storage chunk, by its column and position in z."""
        (y, x), z = place
        return BY_RANGE.name(self.ranges[0][z], self.ranges[1][y], self.ranges[2][x])

    def fewest(self, wanted: Wanted, page: int) -> tuple[list[str], list[str]]:
        """Prefixes to list and names to look at, so that the fewest requests are made.

        That is so if all storage chunks are there. Where numbers are equal, the smaller answers
        win, which also come at the same time.

        Args:
            wanted: The storage chunks.
            page: Number of files in one answer to a listing, at most.
        """
        axes = self._naming.order
        if len(axes) < 3:
            return [], self.all_names(wanted)
        counts = [len(self.ranges["zyx".index(axis)]) for axis in axes]
        of_column, of_row = -(-counts[2] // page), -(-(counts[1] * counts[2]) // page)
        prefixes, names = [], []
        for first, columns in self._rows(wanted, axes).items():
            if of_row < sum(min(of_column, len(found)) for found in columns.values()):
                prefixes.append(self._naming.prefix({axes[0]: first}))
                continue
            for second, found in columns.items():
                if of_column < len(found):
                    prefixes.append(self._naming.prefix({axes[0]: first, axes[1]: second}))
                else:
                    names += [self._naming.name(*labels) for labels in found]
        return prefixes, names

    def _rows(self, wanted: Wanted, axes: str) -> dict[str, dict[str, list[Labels]]]:
        """Labels of files by the one of the first axis of a name, and that of the second."""
        rows: dict[str, dict[str, list[Labels]]] = defaultdict(lambda: defaultdict(list))
        first, second = ("zyx".index(axis) for axis in axes[:2])
        for column, zs in wanted.items():
            for z in zs:
                labels = self._labels[0][z], self._labels[1][column[0]], self._labels[2][column[1]]
                rows[labels[first]][labels[second]].append(labels)
        return rows


def _positions(names: list[list[str]]) -> list[dict[str, int]]:
    return [{name: i for i, name in enumerate(along)} for along in names]


def _place(positions: list[dict[str, int]], found: Labels | None) -> tuple[Column, int] | None:
    """Column and position in z of what stands for each axis, zyx; None if there is no such one."""
    if found is None:
        return None
    try:
        z, y, x = (at[label] for at, label in zip(positions, found, strict=True))
    except KeyError:
        return None
    return (y, x), z


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
