"""Affinities: which edge a channel holds, at which voxel, and what becomes of that in orientations.

A channel with the offset ``o``, zyx, holds at the voxel ``v`` the affinity of ``v`` and ``v + o``.
So each edge can be stored at either of its two voxels: with ``-o`` it is stored at the other one.
This is the vocabulary of gunpowder, affogato and PyTorch Connectomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from chunkflow_core.lattice.boxes import Vector, vector

Offsets = tuple[Vector, ...]
"""Offsets of channels, in their order."""

_XYZ: Offsets = ((0, 0, -1), (0, -1, 0), (-1, 0, 0))
_ZYX: Offsets = _XYZ[::-1]

CONVENTIONS: dict[str, Offsets] = {
    "abiss": _XYZ,
    "deepem": _XYZ,
    "waterz": _ZYX,
    "pytc_deepem": _ZYX,
    "pytc_banis": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
}
"""Conventions of programs, by name.

Sources: ``basic_watershed.hpp`` of https://github.com/seung-lab/abiss and
https://github.com/funkey/waterz; ``vec2aff`` of https://github.com/seung-lab/DeepEM;
``seg_to_affinity`` of https://github.com/PytorchConnectomics/pytorch_connectomics with each of its
two values of ``affinity_mode``.
"""


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a patch is turned: flipped, then transposed."""

    flips: tuple[bool, bool, bool] = (False, False, False)
    """Which axes of the patch are flipped; order z, y, x."""
    transpose: bool = False
    """Whether y and x are exchanged after the flips."""

    def turned_back(self, offset: Vector) -> Vector:
        """The offset in the patch, given one in the patch as it was turned."""
        z, y, x = offset
        straight = (z, x, y) if self.transpose else offset
        return vector(-n if flipped else n for n, flipped in zip(straight, self.flips, strict=True))


def orientations(augmentation: str) -> tuple[Orientation, ...]:
    """The orientations in which patches are run, the patch as it is first.

    Args:
        augmentation: ``model.augmentation``: ``none`` (1 orientation), ``flips`` (8) or
            ``flips_transpose`` (16).

    Raises:
        ValueError: There is no such augmentation.
    """
    if augmentation == "none":
        return (Orientation(),)
    if augmentation not in ("flips", "flips_transpose"):
        raise ValueError(f"augmentation: expected none, flips or flips_transpose, got {augmentation!r}")
    both = (False, True)
    transposes = both if augmentation == "flips_transpose" else (False,)
    return tuple(Orientation((z, y, x), t) for t, z, y, x in product(transposes, both, both, both))


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values of a channel come from."""

    channel: int
    """Channel of the network."""
    moved: bool
    """Whether it stores edges at the other voxel.

    The value of a voxel is then found at the voxel plus the offset.
    """


def source(given: Offsets, wanted: Vector, orientation: Orientation) -> Source | None:
    """Where a channel comes from when a patch was run in some orientation.

    Args:
        given: Offsets of the network's channels.
        wanted: Offset of the channel.
        orientation: How the patch was turned.

    Returns:
        The channel that stores the edges at the same voxel if there is one, else the one that
        stores them at the other voxel; None if none has these edges.
    """
    back = [orientation.turned_back(offset) for offset in given]
    if wanted in back:
        return Source(back.index(wanted), moved=False)
    if opposite(wanted) in back:
        return Source(back.index(opposite(wanted)), moved=True)
    return None


def opposite(offset: Vector) -> Vector:
    """The offset of the same edges, stored at the other voxel."""
    return vector(-n for n in offset)


def edges(offsets: Sequence[Vector]) -> list[Vector]:
    """The edges that channels hold, sorted, wherever they are stored."""
    return sorted(max(offset, opposite(offset)) for offset in offsets)
