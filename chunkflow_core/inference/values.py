"""The numbers that the network gets for voxels of the input layer: ``input.values`` of the spec.

They are made of each voxel by itself, in float32, one operation after another::

    (voxel - shift) / divisor      voxel, shift and divisor in float32
    mirror - …                     with ``invert``
    min(max(…, low), high)         with ``clip``

Each of them rounds once, and none depends on what is beside the voxel. So a voxel's number is the
same in any block, patch and engine. Padding comes before: it is of voxels. ``shift`` and
``divisor`` may be those of a channel, and of the section in which the voxel was read: padding has
the numbers of the section that it is copied from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import MissingInputError
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.layers import padded_positions

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", NDArray[np.float32], torch.Tensor)

Pair = tuple[float, float]
"""Shift and divisor, both of float32."""

_WIDEST = 2**24
"""Up to here, float32 has all integers."""


@dataclass(frozen=True)
class Measured:
    """What ``prepare`` has measured in the input layer: shift and divisor, for each channel."""

    whole: tuple[Pair, ...] = ()
    """Those of the whole ROI; empty if each section has its own."""
    sections: dict[int, tuple[Pair, ...]] | None = None
    """Those of each section, by z; None if they are the same for all."""

    def differs_from(self, other: Measured) -> bool:
        """Whether it says something else than another one of what both have measured."""
        if self.sections is None or other.sections is None:
            return self != other
        return any(other.sections[z] != self.sections[z] for z in self.sections.keys() & other.sections.keys())

    def of(self, z: int) -> tuple[Pair, ...]:
        """Shift and divisor of each channel in a section.

        Raises:
            MissingInputError: The section has not been measured.
        """
        if self.sections is None:
            return self.whole
        if z not in self.sections:
            raise MissingInputError(
                f"input.values.per_section: section {z} has not been measured; run `chunkflow-core prepare SPEC` first"
            )
        return self.sections[z]


@dataclass(frozen=True)
class Numbers:
    """How numbers are made of the voxels of a few sections."""

    divisor: Any
    """Float32 ``(channels or 1, sections or 1, 1, 1)``."""
    shift: Any = None
    """Likewise; None if nothing is taken away."""
    mirror: float | None = None
    """What the numbers are taken from in the end; None if they are not."""
    limits: tuple[float, float] | None = None
    """Least and largest number; None if there are none."""

    @property
    def is_division(self) -> bool:
        """Whether voxels are only divided, all by the same number."""
        return self.divisor.size == 1 and (self.shift, self.mirror, self.limits) == (None, None, None)

    def made_of(self, voxels: Array) -> Array:
        """The numbers for voxels, float32 ``(channels, sections, y, x)``, which are overwritten."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told by the output
            if self.shift is not None:
                voxels -= self.shift
            voxels /= self.divisor
            if self.mirror is not None:
                voxels *= -1  # exact
                voxels += self.mirror
            if self.limits is not None:
                voxels = voxels.clip(*self.limits)
                voxels += 0.0  # of -0 and 0, which are equal, either may come of it; this gives 0
        return voxels


class InputValues:
    """The numbers for the voxels of a spec's input."""

    def __init__(self, spec: VolumeSpec, measured: Callable[[], Measured]) -> None:
        """Prepare for a spec; ``measured`` gives what was measured, if the spec needs that."""
        self._spec, self._values, self._measured = spec, spec.input.values, measured
        self._of_sections = lru_cache(maxsize=8)(self._made)

    def numbers(self, dtype: np.dtype[Any], start: int, stop: int) -> Numbers:
        """How numbers are made of voxels of a dtype in the sections ``start`` to ``stop - 1``.

        Sections outside the input's bounds are padded.

        Raises:
            MissingInputError: Something has not been measured.
        """
        if self._values.per_section:
            return self._of_sections(dtype, start, stop)
        return self._of_sections(dtype, 0, 1)

    def sample(self, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Numbers as the network might get them, made of noise from 0 to 1."""
        dtype = np.dtype(self._spec.input_scale.dtype)
        if self._values.form != "raw" or dtype.kind == "f":
            return noise
        whole: NDArray[np.float32] = np.rint(noise * np.float32(min(np.iinfo(dtype).max, _WIDEST)))
        return whole

    def _made(self, dtype: np.dtype[Any], start: int, stop: int) -> Numbers:
        pairs = self._pairs(dtype, start, stop)
        shift, divisor = (np.array([[p[i] for p in row] for row in pairs], np.float32).T for i in range(2))
        made = Numbers(divisor[..., None, None], shift[..., None, None] if shift.any() else None)
        values = self._values
        if values.invert:
            made = replace(made, mirror=self._mirror(dtype))
        if values.clip is True:
            made = replace(made, limits=(-1.0 if values.form == "symmetric" else 0.0, 1.0))
        elif values.clip:
            low, high = values.clip
            made = replace(made, limits=(float(np.float32(low)), float(np.float32(high))))
        return made

    def _mirror(self, dtype: np.dtype[Any]) -> float:
        form = self._values.form
        if form == "raw":
            return float(np.float32(int(np.iinfo(dtype).min) + int(np.iinfo(dtype).max)))
        return 0.0 if form in ("symmetric", "mean") else 1.0

    def _pairs(self, dtype: np.dtype[Any], start: int, stop: int) -> Sequence[Sequence[Pair]]:
        """Shift and divisor for each section, and for each channel or all of them."""
        values, channels = self._values, self._spec.input_scale.channels
        if values.is_measured:
            bounds = self._spec.input_bounds
            low, high = bounds.start[0], bounds.stop[0]
            measured = self._measured()
            return [measured.of(int(z)) for z in padded_positions(start, stop, low, high, self._spec.input.padding)]
        if values.mean is not None and values.std is not None:
            mean, std = (n if isinstance(n, tuple) else (n,) * channels for n in (values.mean, values.std))
            return [[(float(a), float(b)) for a, b in zip(mean, std, strict=True)]]
        if dtype.kind == "f" or values.form == "raw":
            return [[(0.0, 1.0)]]
        least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        if values.form == "symmetric":
            return [[((most + least) / 2, (most - least) / 2)]]
        return [[(0.0, float(most))]]
