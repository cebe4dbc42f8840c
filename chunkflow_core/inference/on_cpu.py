"""Patches on CPUs: several at a time, each in a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.inference.patches import Patches, Planes
from chunkflow_core.lattice.blocks import Block
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.lattice.conversion import Conversion
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.timing import Timings


class OnCpu:
    """Runs patches of a block, tier by tier.

    The next tier's patches may start before the last ones of a tier are done, so that no stream has
    to wait: what they give is added when the sums of the tier before have left.
    """

    ahead = 1
    """Tiers that may be started before the one before them has been finished."""

    def __init__(
        self, patches: Patches, block: Block, timings: Timings, patch_done: Callable[[], object], streams: int
    ) -> None:
        """Make the slab and the threads.

        Args:
            patches: What is done with each patch of the volume.
            block: The block.
            timings: Where seconds and patches are counted.
            patch_done: Called after each patch, from several threads.
            streams: Number of patches to run at a time.
        """
        self._patches, self._timings, self._patch_done = patches, timings, patch_done
        grid = patches.grid
        self._copying = ThreadPoolExecutor(streams, thread_name_prefix="copy")
        self._slab = Slab(
            grid,
            block.reach,
            grid.slab_depth(block),
            patches.spec.output.summed_channels,
            patches.values,
            self._copying.map,
        )
        self.sums = SlabSums(self._slab, patches.spec.output.conversion, timings)
        """What the finished patches add up to."""
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="stream")
        self._tiers: deque[list[Future[None]]] = deque()

    def start(self, positions: list[Vector], planes: Planes) -> None:
        """Start a tier of patches, given the input planes that they need."""
        self._tiers.append([self._pool.submit(self._run, position, planes) for position in positions])

    def finish(self) -> None:
        """Wait for the tier that was started first; an error of any of its patches arises here."""
        for future in self._tiers.popleft():
            future.result()

    def advance(self, plane: int) -> None:
        """Drop the sums below a plane."""
        self._timings.measure("convert", self._slab.advance, plane)

    def close(self) -> None:
        """Give up what has not been done."""
        self._slab.cancel()
        self._pool.shutdown(cancel_futures=True)
        self._copying.shutdown()

    def _run(self, position: Vector, planes: Planes) -> None:
        wait = partial(self._slab.wait_for_room, position)
        self._patches.run(self._slab, position, planes, self._timings, wait)
        self._patch_done()


class SlabSums:
    """Sums of final pieces, copied out of a slab when they are asked for."""

    def __init__(self, slab: Slab, conversion: Conversion, timings: Timings) -> None:
        """Name the slab, and what becomes of complete sums; nothing is copied yet."""
        self._slab, self._conversion, self._timings = slab, conversion, timings

    def sum(self, box: Box) -> Callable[[], NDArray[np.float32]]:
        """Sums of a box: float32 ``(channels, z, y, x)``; see ``block.Sums``."""
        data = self._timings.measure("convert", self._slab.sum, box)
        return lambda: data

    def converted(self, box: Box) -> Callable[[], NDArray[Any]]:
        """What becomes of complete sums of a box; see ``block.Sums``."""
        data = self._timings.measure("convert", self._slab.converted, box, self._conversion)
        return lambda: data
