"""Boxes and vectors of voxels: pure integers, order z, y, x."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

Vector = tuple[int, int, int]
"""Three integers in the order z, y, x."""

AXES = "zyx"

_KEY = re.compile(r"(-?\d+)-(-?\d+)_(-?\d+)-(-?\d+)_(-?\d+)-(-?\d+)")


def vector(values: Iterable[int]) -> Vector:
    """A vector of three integers; ``ValueError`` if there are not exactly three."""
    z, y, x = values
    return (z, y, x)


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """An axis-aligned box of voxels, half-open: ``start`` is inside, ``stop`` is not.

    Order z, y, x.
    """

    start: Vector
    stop: Vector

    @property
    def shape(self) -> Vector:
        """Number of voxels along each axis, never negative."""
        return vector(max(0, b - a) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def voxels(self) -> int:
        """Number of voxels inside."""
        return math.prod(self.shape)

    def __bool__(self) -> bool:
        """Whether the box holds any voxel."""
        return self.voxels > 0

    def __and__(self, other: Box) -> Box:
        """The intersection, which is empty (falsy) where the boxes don't meet."""
        start = vector(map(max, self.start, other.start))
        stop = vector(map(min, self.stop, other.stop))
        return Box(start, vector(map(max, start, stop)))

    def __contains__(self, other: Box) -> bool:
        """Whether ``other`` lies wholly inside."""
        return (self & other) == other

    @classmethod
    def around(cls, boxes: Sequence[Box]) -> Box:
        """The smallest box that holds all of some boxes; at least one has to be given."""
        return cls(
            vector(min(box.start[a] for box in boxes) for a in range(3)),
            vector(max(box.stop[a] for box in boxes) for a in range(3)),
        )

    def grown(self, low: Vector, high: Vector) -> Box:
        """The box with its low faces moved down by ``low`` and its high faces up by ``high``."""
        return Box(
            vector(a - m for a, m in zip(self.start, low, strict=True)),
            vector(b + m for b, m in zip(self.stop, high, strict=True)),
        )

    def with_z(self, start: int, stop: int) -> Box:
        """The same box with another extent in z."""
        return Box((start, *self.start[1:]), (stop, *self.stop[1:]))

    def minus_high_corner(self, inner: Box) -> list[Box]:
        """The box without ``inner``, which shares its high corner, as at most three disjoint boxes.

        They are cut from the low side: a slab in z, then one in y, then one in x::

            +-----------+
            |  z slab   |      (seen along x)
            +--+--------+
            |y |        |
            |  | inner  |
            +--+--------+
        """
        if not inner:
            return [self] if self else []
        rest, pieces = self, []
        for axis in range(3):
            stop, start = list(rest.stop), list(rest.start)
            stop[axis] = start[axis] = inner.start[axis]
            pieces.append(Box(rest.start, vector(stop)))
            rest = Box(vector(start), rest.stop)
        return [piece for piece in pieces if piece]

    @property
    def corners(self) -> list[Vector]:
        """Start and stop, the form that boxes have in specs and JSON."""
        return [self.start, self.stop]

    def slices(self, origin: Vector) -> tuple[slice, slice, slice]:
        """Index of this box in an array whose first voxel is at ``origin``."""
        z, y, x = (slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True))
        return (z, y, x)

    @property
    def key(self) -> str:
        """Name of the box in storage keys, in the order x, y, z: ``x0-x1_y0-y1_z0-z1``."""
        return "_".join(f"{a}-{b}" for a, b in zip(reversed(self.start), reversed(self.stop), strict=True))

    @classmethod
    def from_key(cls, key: str) -> Box:
        """The box with a key, the inverse of ``key``; ``ValueError`` if the text is not a key."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is not a box key such as 0-64_0-64_0-16 (xyz)")
        x0, x1, y0, y1, z0, z1 = map(int, match.groups())
        return cls((z0, y0, x0), (z1, y1, x1))

    def __str__(self) -> str:
        """The box for people: ``z 0–16 y 0–64 x 0–64``."""
        return " ".join(f"{n} {a}–{b}" for n, a, b in zip(AXES, self.start, self.stop, strict=True))


def ceil_to(value: int, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``value``."""
    return -(-value // step) * step


def indices(start: Vector, stop: Vector) -> Iterator[Vector]:
    """All integer vectors from ``start`` up to, and without, ``stop``; x fastest."""
    yield from map(vector, product(*(range(a, b) for a, b in zip(start, stop, strict=True))))
