"""A single patch: which one is run, what goes in, what may come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.errors import DataError
from chunkflow_core.inference.augmentation import Transform, contributions, moved_throughout
from chunkflow_core.inference.mask import Mask, MaskWindow
from chunkflow_core.inference.values import InputValues, Measured
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.lattice.kernels import take_scaled
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.lattice.weights import ExactStep
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.timing import Timings

Planes = tuple[Box, NDArray[Any]]
"""A box of the input, and its voxels ``(channels, z, y, x)``."""


class Patches:
    """What is done with each patch of a volume."""

    def __init__(
        self,
        spec: VolumeSpec,
        load: Callable[[], Engine],
        mask: Mask | None = None,
        measured: Callable[[], Measured] = Measured,
    ) -> None:
        """Prepare for a spec.

        Args:
            spec: The volume.
            load: Gives the engine when the first patch is run.
            mask: Mask that says which patches are run; None for all.
            measured: Gives what ``prepare`` has measured in the input, if the spec needs that.
        """
        self.spec, self.mask, self._load = spec, mask, load
        self.given = InputValues(spec, measured)
        self.grid = spec.grid
        self.values = ExactStep(*spec.output.range)
        self.transforms = contributions(spec.model.augmentation, spec.network_affinities, spec.layer_affinities)
        self.share = 1 / len(self.transforms)
        self.moved = moved_throughout(self.transforms)

    @property
    def alters_values(self) -> bool:
        """Whether what is added has other values than the network's output, which are checked."""
        return self.share < 1 or bool(self.moved)

    @cached_property
    def engine(self) -> Engine:
        """The engine that runs patches, loaded at first use."""
        return self._load()

    def input_box(self, position: Vector) -> Box:
        """The input voxels that a patch needs."""
        return self.grid.patch_box(position).grown(self.spec.halo, self.spec.halo)

    def inside_mask(self, positions: Iterable[Vector], window: MaskWindow | None = None) -> list[Vector]:
        """The patches among these that a voxel of the mask touches; all if there is no mask.

        Args:
            positions: Positions in the lattice, zyx.
            window: The mask over all of these patches, if it has been read already.
        """
        positions = list(positions)
        if self.mask is None or not positions:
            return positions
        boxes = [self.grid.patch_box(position) & self.grid.roi for position in positions]
        window = window or self.mask.window(Box.around(boxes))
        return [position for position, box in zip(positions, boxes, strict=True) if window.touches(box)]

    def is_skipped(self, position: Vector, planes: Planes) -> bool:
        """Whether a patch is not run since its input is all zeros."""
        box, data = planes
        part = data[(slice(None), *self.input_box(position).slices(box.start))]
        few = part[:, ::4, ::8, ::8]  # enough to tell that most patches are not
        return self.spec.skip.zeros and not few.any() and not part.any()

    def take(self, position: Vector, planes: Planes) -> NDArray[np.float32]:
        """A patch as the network gets it: float32 ``(channels, z, y, x)``.

        Args:
            position: Position of the patch in the lattice, zyx.
            planes: Input planes that hold the patch, contiguous.
        """
        box, data = planes
        patch = np.empty((data.shape[0], *self.spec.patch_size), np.float32)
        own = self.input_box(position)
        z, y, x = (a - b for a, b in zip(own.start, box.start, strict=True))
        numbers = self.given.numbers(data.dtype, own.start[0], own.stop[0])
        if numbers.is_division:
            take_scaled(data, (z, y, x), numbers.divisor.flat[0], patch)
            return patch
        take_scaled(data, (z, y, x), np.float32(1), patch)
        return numbers.made_of(patch)

    def run(self, slab: Slab, position: Vector, planes: Planes, timings: Timings, wait: Callable[[], None]) -> None:
        """Run a patch and add it to a slab; ``wait`` returns when there is room for it."""
        if timings.measure("stitch", self.is_skipped, position, planes):
            timings.count("zeros")
            return
        patch = timings.measure("stitch", self.take, position, planes)
        for transform in self.transforms:
            turned = timings.measure("stitch", np.ascontiguousarray, transform.apply(patch))
            output = timings.measure("forward", self.forward, turned)
            wait()
            timings.measure("stitch", self._add, slab, position, transform, output)
        timings.count("patches")

    def forward(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run one patch: float32 ``(channels, z, y, x)``.

        It runs in a batch that is filled up: another batch shape could give other bits.
        """
        if self.engine.batch_size == 1:
            batch = patch[None]
        else:
            batch = np.zeros((self.engine.batch_size, *patch.shape), np.float32)
            batch[0] = patch
        output: NDArray[np.float32] = self.engine(batch)[0]
        return output

    def check(self, position: Vector, output: NDArray[np.float32]) -> None:
        """Check that an output's values are within the declared range; ``DataError`` if not."""
        self.check_extremes(position, float(output.min()), float(output.max()))

    def check_extremes(self, position: Vector, least: float, most: float) -> None:
        """Check that the least and the largest value of a patch's output are in the declared range.

        Args:
            position: Position of the patch in the lattice, zyx.
            least: Least value; NaN if there is one among the values.
            most: Largest value; NaN if there is one among the values.

        Raises:
            DataError: A value is out of range, or not finite.
        """
        if self.values.low <= least and most <= self.values.high:
            return
        finite = isfinite(least) and isfinite(most)
        what = f"values from {least:.6g} to {most:.6g}" if finite else "NaN or infinity (or its input has them already)"
        raise DataError(
            f"the model gave {what} for the patch at lattice position {position} ({self.grid.patch_box(position)}), "
            f"expected values within output.range [{self.values.low:g}, {self.values.high:g}]"
        )

    def _add(self, slab: Slab, position: Vector, transform: Transform, output: NDArray[np.float32]) -> None:
        limits, share = (self.values.low, self.values.high), self.share
        if self.alters_values:  # contributions may be beyond the range
            self.check(position, output)
            limits = (-inf, inf)
        if not slab.add(position, transform.undo(output), share=share, limits=limits, moved=self.moved):
            self.check(position, output)
            raise AssertionError("only a value beyond the range is refused")
