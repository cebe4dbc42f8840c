"""Names of the files in which a layer's storage chunks are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from chunkflow_core.lattice.boxes import Box, Vector

Labels = tuple[str, str, str]
"""What stands for each axis in a name, zyx."""


@dataclass(frozen=True)
class Naming:
    """How files of storage chunks are named, below the folder that they share."""

    template: str = "{x}_{y}_{z}"
    """The name, with what stands for each axis; it may lack an axis, which then has one place.

    With ``{c}``, every channel of a storage chunk, or every few of them, has a file of its own.
    """
    by_range: bool = True
    """Whether an axis is named by the range of its voxels, ``0-64``; else by the position."""
    parts: int = 1
    """Number of files of a storage chunk, which are numbered at ``{c}``."""

    @property
    def is_nested(self) -> bool:
        """Whether the files are in folders of their own."""
        return "/" in self.template

    @cached_property
    def order(self) -> str:
        """The axes in the order in which a name has them, such as ``xyz``."""
        return "".join(axis for axis in self._axes if axis != "c")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pieces = re.split(r"\{([cxyz])\}", self.template)
        found = r"(-?[0-9]+--?[0-9]+)" if self.by_range else r"([0-9]+)"
        return re.compile("".join(re.escape(piece) if i % 2 == 0 else found for i, piece in enumerate(pieces)))

    @cached_property
    def _axes(self) -> list[str]:
        return re.findall(r"\{([cxyz])\}", self.template)

    def along(self, bounds: Box, size: Vector) -> list[list[str]]:
        """What stands for each place along each axis, zyx, of storage chunks that fill bounds."""
        return [
            [f"{a}-{min(a + s, stop)}" if self.by_range else str((a - start) // s) for a in range(start, stop, s)]
            for start, stop, s in zip(bounds.start, bounds.stop, size, strict=True)
        ]

    def name(self, z: str, y: str, x: str, part: int = 0) -> str:
        """The name of a file, by what stands for each axis."""
        return self.template.format(z=z, y=y, x=x, c=part)

    def prefix(self, labels: Mapping[str, str]) -> str:
        """How the names begin that have some labels for the first axes of a name."""
        beginning = self.template.partition("{" + self.order[len(labels)] + "}")[0]
        return beginning.format(**labels)

    def split(self, name: str) -> Labels | None:
        """What stands for each axis, zyx, in a name; None if it is no such name."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        found = dict(zip(self._axes, match.groups(), strict=True))
        return found.get("z", "0"), found.get("y", "0"), found.get("x", "0")

    def of(self, chunk: Box, bounds: Box, size: Vector, part: int = 0) -> str:
        """The name of a storage chunk's file, by its box."""
        if self.by_range:
            z, y, x = (f"{a}-{b}" for a, b in zip(chunk.start, chunk.stop, strict=True))
        else:
            z, y, x = (str((a - s) // n) for a, s, n in zip(chunk.start, bounds.start, size, strict=True))
        return self.name(z, y, x, part)


BY_RANGE = Naming()
"""Names in precomputed layers, ``x0-x1_y0-y1_z0-z1``, and keys of storage chunks in receipts.
"""
