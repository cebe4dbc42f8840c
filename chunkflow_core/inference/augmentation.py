"""Test-time augmentation: a patch is run in several orientations, and the outputs are averaged.

Each output is turned back first. That moves its voxels, and for affinities more than that: a value
belongs to an *edge*, which is stored at one of its two voxels, in the channel of its offset (see
``lattice.affinities``). A transposition of y and x therefore exchanges channels, and under a flip
edges are stored at the other one of their voxels. One axis of four voxels, and the channel with the
offset -1; ``a1`` is the edge of voxels 0 and 1, ``a0`` and ``a4`` are those that leave the patch::

    the patch                    a0 (0) a1 (1) a2 (2) a3 (3) a4
      the network gives              a0     a1     a2     a3     each at the voxel to its right

    the patch, flipped           a4 (3) a3 (2) a2 (1) a1 (0) a0
      the network gives              a4     a3     a2     a1
      flipped back                   a1     a2     a3     a4     each at the voxel to its left
      moved by one                   ·      a1     a2     a3     unflipped, but for plane 0

The mean is a sum of contributions with the same share, ``1/n`` of ``n`` orientations. At the
*border* of a channel, voxels whose edges leave the patch, it is the mean over those that have a
value there: the orientations whose values were moved, which are exactly half of them, contribute 0,
and the others twice their value. Doubling is exact, and so are the shares, powers of two.

The layer may have another convention than the network: its channels are sought in the same way. If
patches are run in one orientation, and the layer stores edges at the other voxel, no value is left
at the border. It has no weight then, and other patches have more (``normalised_weight``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.affinities import Offsets, Orientation, Source, orientations, source
from chunkflow_core.lattice.boxes import Vector

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", NDArray[np.float32], "Tensor")
"""A numpy array or a torch tensor."""


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel of affinities of the layer, and where it comes from in one orientation."""

    offset: Vector
    """Offset of its edges, zyx."""
    source: Source
    """The channel of the network's output, turned back."""
    doubled: bool
    """Whether values at the border count twice, as half of the orientations have none there."""


@dataclass(frozen=True, slots=True)
class Transform:
    """One of the orientations in which a patch is run."""

    orientation: Orientation
    """How the patch is turned."""
    channels: tuple[Channel, ...] = ()
    """The layer's channels of affinities; empty if the output's channels are the layer's."""

    def apply(self, patch: Array) -> Array:
        """The patch ``(..., z, y, x)`` in this orientation; a view if the library can make one."""
        flipped = self._flip(patch)
        return flipped.swapaxes(-1, -2) if self.orientation.transpose else flipped

    def undo(self, output: Array) -> Array:
        """What the network gave in this orientation, turned back: a contribution to the mean.

        Args:
            output: ``(..., channels, z, y, x)``; not changed. It may share its memory with the
                result if there is nothing to do.

        Returns:
            Contiguous, in the shape and order that the patch as it is would have got; a numpy array
            is float32. With ``channels``, values at borders are 0 or doubled (see the module), so
            the range of values has to be checked before.

        Raises:
            ValueError: There are affinities in another number of channels.
        """
        restored = self._flip(output.swapaxes(-1, -2) if self.orientation.transpose else output)
        if not self.channels:
            return _contiguous(restored)
        if restored.shape[-4] != len(self.channels):
            raise ValueError(f"affinities have {len(self.channels)} channels, got {restored.shape[-4]}")
        result = _empty_like(restored)
        for number, channel in enumerate(self.channels):
            _fill(result[..., number, :, :, :], restored[..., channel.source.channel, :, :, :], channel)
        return result

    def _flip(self, array: Array) -> Array:
        axes = tuple(axis - 3 for axis in range(3) if self.orientation.flips[axis])
        return np.flip(array, axes) if isinstance(array, np.ndarray) else array.flip(axes)


def contributions(augmentation: str, given: Offsets = (), wanted: Offsets = ()) -> tuple[Transform, ...]:
    """The orientations whose mean is the output.

    It is the sum of all ``undo(network(apply(patch)))``, divided by their number.

    Args:
        augmentation: ``model.augmentation``: ``none`` (1 orientation), ``flips`` (8) or
            ``flips_transpose`` (16, for which the network has to take patches with y and x
            exchanged).
        given: Offsets of the affinities that the network gives; empty if its channels are
            independent of directions.
        wanted: Offsets of the affinities that the layer holds.

    Returns:
        The orientations, the patch as it is first. If that is the only one, and the layer has the
        network's channels, its contribution is the network's output as it is.

    Raises:
        ValueError: There is no such augmentation, or a channel can't be had in all orientations.
    """
    turns = orientations(augmentation)
    if given == wanted and len(turns) == 1:
        return (Transform(turns[0]),)
    found = {offset: _sources(given, offset, turns) for offset in wanted}
    moved = {offset: any(s.moved for s in sources) for offset, sources in found.items()}
    return tuple(
        Transform(turn, tuple(Channel(offset, found[offset][i], moved[offset]) for offset in wanted))
        for i, turn in enumerate(turns)
    )


def moved_throughout(transforms: tuple[Transform, ...]) -> tuple[Vector, ...]:
    """The offset of each channel that has no value at its border in any orientation.

    It is zeros for a channel that has one; there are none if no channel lacks any.
    """
    rows = zip(*(transform.channels for transform in transforms), strict=True)
    moved = tuple(row[0].offset if all(c.source.moved for c in row) else (0, 0, 0) for row in rows)
    return moved if any(map(any, moved)) else ()


def _sources(given: Offsets, offset: Vector, turns: tuple[Orientation, ...]) -> list[Source]:
    found = [source(given, offset, turn) for turn in turns]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        raise ValueError(f"affinities: no channel for the offset {list(offset)} in some orientation")
    return known


def _fill(result: Any, given: Any, channel: Channel) -> None:
    """Write a channel's contribution, given its source turned back, both ``(..., z, y, x)``."""
    if not channel.source.moved:
        result[...] = given
        if channel.doubled:
            for border in _border(result.shape[-3:], channel.offset):
                result[border] *= 2
        return
    sizes = result.shape[-3:]
    if all(abs(n) < size for n, size in zip(channel.offset, sizes, strict=True)):
        result[(..., *map(_having, channel.offset, sizes))] = given[
            (..., *(_having(-n, size) for n, size in zip(channel.offset, sizes, strict=True)))
        ]
    for border in _border(sizes, channel.offset):
        result[border] = 0


def _border(sizes: tuple[int, ...], offset: Vector) -> Iterator[tuple[Any, ...]]:
    """Indices of the voxels ``v`` for which ``v + offset`` is outside, each of them in one part."""
    rest = [slice(None)] * 3
    for axis, (n, size) in enumerate(zip(offset, sizes, strict=True)):
        if n:
            outside = slice(max(0, size - n), size) if n > 0 else slice(0, min(size, -n))
            yield (..., *rest[:axis], outside, *rest[axis + 1 :])
            rest[axis] = _having(n, size)


def _having(n: int, size: int) -> slice:
    """The voxels of an axis for which the voxel ``n`` further is inside."""
    return slice(max(0, -n), max(0, size - max(0, n)))


def _contiguous(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32) if isinstance(array, np.ndarray) else array.contiguous()


def _empty_like(array: Array) -> Array:
    return np.empty(array.shape, np.float32) if isinstance(array, np.ndarray) else array.new_empty(array.shape)
