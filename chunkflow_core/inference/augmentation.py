"""Test-time augmentation: a patch is run in several orientations, and the outputs are averaged.

Each output is turned back first. That moves its voxels, and for affinities more than that: a value
belongs to an *edge*, which is stored at the higher one of its two voxels, in the channel of its
axis. A transposition of y and x therefore swaps the channels of y and x, and under a flip the other
end of the edge is the higher one. One axis of four voxels, ``a1`` the edge of voxels 0 and 1,
``a0`` and ``a4`` those that leave the patch::

    the patch                    a0 (0) a1 (1) a2 (2) a3 (3) a4
      the network gives              a0     a1     a2     a3     each at the voxel to its right

    the patch, flipped           a4 (3) a3 (2) a2 (1) a1 (0) a0
      the network gives              a4     a3     a2     a1
      flipped back                   a1     a2     a3     a4     each at the voxel to its left
      shifted by one                  ·     a1     a2     a3     unflipped, but for plane 0

The mean is a sum of contributions with the same share, ``1/n`` of ``n`` orientations. In the first
plane of an axis, in its channel, it is the mean over those that have a value there: the
orientations that flip this axis (of the patch, before any transposition), which are exactly half of
them, contribute 0, and the others twice their value. Doubling is exact, and so are the shares,
powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", NDArray[np.float32], "Tensor")
"""A numpy array or a torch tensor."""

AFFINITY_CHANNELS = (2, 1, 0)
"""Channels of the affinities along z, y, x."""

_TRANSPOSED_CHANNELS = (2, 0, 1)
"""Channels of the affinities along z, y, x of a patch whose y and x were exchanged."""


@dataclass(frozen=True, slots=True)
class Transform:
    """One of the orientations in which a patch is run: flipped, then transposed."""

    flips: tuple[bool, bool, bool]
    """Which axes of the patch are flipped; order z, y, x."""
    transpose: bool
    """Whether y and x are exchanged after the flips."""
    affinity: bool = False
    """Whether the output's channels are affinities, to be turned back as such.

    They are those of each voxel to the one before it along x, y, z, in this order. What is turned
    back is a contribution to a mean over orientations, half of which flip any one axis.
    """

    def apply(self, patch: Array) -> Array:
        """The patch ``(..., z, y, x)`` in this orientation; a view if the library can make one."""
        flipped = self._flip(patch)
        return flipped.swapaxes(-1, -2) if self.transpose else flipped

    def undo(self, output: Array) -> Array:
        """What the network gave in this orientation, turned back: a contribution to the mean.

        Args:
            output: ``(..., channels, z, y, x)``; not changed. It may share its memory with the
                result if there is nothing to do.

        Returns:
            Contiguous, in the shape and order that the patch as it is would have got; a numpy array
            is float32. With ``affinity``, values of first planes are 0 or doubled (see the module),
            so the range of values has to be checked before.

        Raises:
            ValueError: There are affinities in other than three channels.
        """
        restored = self._flip(output.swapaxes(-1, -2) if self.transpose else output)
        if not self.affinity:
            return _contiguous(restored)
        if restored.shape[-4] != 3:
            raise ValueError(f"affinities have 3 channels, got {restored.shape[-4]}")
        result = _empty_like(restored)
        for axis, (channel, flipped) in enumerate(zip(AFFINITY_CHANNELS, self.flips, strict=True)):
            source = _TRANSPOSED_CHANNELS[axis] if self.transpose else channel
            if flipped:
                result[_planes(channel, axis, 0, 1)] = 0
                result[_planes(channel, axis, 1, None)] = restored[_planes(source, axis, 0, -1)]
            else:
                result[_planes(channel, axis, 0, None)] = restored[_planes(source, axis, 0, None)]
                result[_planes(channel, axis, 0, 1)] *= 2
        return result

    def _flip(self, array: Array) -> Array:
        axes = tuple(axis - 3 for axis in range(3) if self.flips[axis])
        return np.flip(array, axes) if isinstance(array, np.ndarray) else array.flip(axes)


def contributions(augmentation: str, *, affinity: bool) -> tuple[Transform, ...]:
    """The orientations whose mean is the output.

    It is the sum of all ``undo(network(apply(patch)))``, divided by their number.

    Args:
        augmentation: ``model.augmentation``: ``none`` (1 orientation), ``flips`` (8) or
            ``flips_transpose`` (16, for which the network has to take patches with y and x
            exchanged).
        affinity: Whether the network's channels are affinities along x, y, z, rather than
            independent of directions.

    Returns:
        The orientations, the patch as it is first. If that is the only one, its contribution is the
        network's output as it is.

    Raises:
        ValueError: There is no such augmentation.
    """
    if augmentation == "none":
        return (Transform((False, False, False), False),)
    if augmentation not in ("flips", "flips_transpose"):
        raise ValueError(f"augmentation: expected none, flips or flips_transpose, got {augmentation!r}")
    both = (False, True)
    transposes = both if augmentation == "flips_transpose" else (False,)
    return tuple(Transform((z, y, x), t, affinity) for t, z, y, x in product(transposes, both, both, both))


def _planes(channel: int, axis: int, start: int, stop: int | None) -> tuple[Any, ...]:
    """Index of some planes across an axis, in one channel."""
    planes = [slice(start, stop) if a == axis else slice(None) for a in range(3)]
    return (..., channel, *planes)


def _contiguous(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32) if isinstance(array, np.ndarray) else array.contiguous()


def _empty_like(array: Array) -> Array:
    return np.empty(array.shape, np.float32) if isinstance(array, np.ndarray) else array.new_empty(array.shape)
