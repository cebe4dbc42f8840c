"""The input of a block: the planes that its patches need, read in steps, and a digest of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.inference.content import Content
from chunkflow_core.inference.mask import MaskWindow
from chunkflow_core.inference.patches import Patches, Planes
from chunkflow_core.lattice.blocks import Block
from chunkflow_core.lattice.boxes import Box, Vector, indices, vector
from chunkflow_core.timing import Timings


class Reader(Protocol):
    """Gives input voxels: an ``InputLayer`` or anything like it."""

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of a box, ``(channels, z, y, x)``, also where it extends past the layer."""


class BlockReading:
    """Reads the input of one block, a tier of patches at a time, ahead of its caller."""

    def __init__(self, patches: Patches, block: Block, reader: Reader, z_step: int, timings: Timings) -> None:
        """Read nothing yet.

        Args:
            patches: What is done with each patch of the volume.
            block: The block.
            reader: Gives input voxels.
            z_step: Depth of the input's storage chunks: reading is cut there, so that none is
                fetched twice.
            timings: Where seconds and bytes are counted.
        """
        self._patches, self._block, self._reader, self._z_step = patches, block, reader, z_step
        self._timings = timings
        mask = patches.mask
        self.content = Content(patches.spec.input_scale, *([mask.scale] if mask else []))

    @cached_property
    def tiers(self) -> list[list[Vector]]:
        """Lattice positions of the block's patches that the mask touches, by tier."""
        (first, *low), (stop, *high) = self._block.first_patch, self._block.stop_patch
        return [
            self._patches.inside_mask(list(indices(vector((z, *low)), vector((z + 1, *high)))), self.mask)
            for z in range(first, stop)
        ]

    @cached_property
    def mask(self) -> MaskWindow | None:
        """The mask over all voxels that the block's patches touch; None if there is no mask.

        It is read once: what chooses patches, what is written, and what is digested are the same.
        """
        mask, grid = self._patches.mask, self._patches.grid
        return self._timings.measure("read", mask.window, self._block.reach & grid.roi) if mask else None

    @cached_property
    def whole(self) -> Box:
        """The input voxels that the block's patches need; may extend past the layer."""
        last = vector(k - 1 for k in self._block.stop_patch)
        return Box.around([self._patches.input_box(self._block.first_patch), self._patches.input_box(last)])

    def planes(self) -> Generator[Planes, None, None]:
        """Yield the input planes that each tier needs, none where it has no patches.

        The next planes are read meanwhile.
        """
        with closing(self._steps()) as arriving:
            held: deque[Planes] = deque()
            for box, tier in zip(self._boxes, self.tiers, strict=True):
                start, stop = box.start[0], box.stop[0]
                while held and held[0][0].stop[0] <= start:
                    held.popleft()
                while tier and (not held or held[-1][0].stop[0] < stop):
                    held.append(next(arriving))
                yield joined(held if tier else [], self.whole.with_z(start, stop))

    def digest(self) -> str:
        """Digest of the block's input, without running anything."""
        for _ in self._steps():
            pass
        return self.content.digest

    def _steps(self) -> Generator[Planes, None, None]:
        """Read what is needed in steps, and add it to ``content``."""
        patches = self._patches
        if self.mask is not None:
            self.content.add_mask(self.mask)
        steps = (step for step in self._cut() if any(z in self._used for z in range(step.start[0], step.stop[0])))
        return read_ahead(
            steps, lambda box: self._timings.measure("read", self._read, box), patches.spec.input.prefetch
        )

    def _read(self, box: Box) -> NDArray[Any]:
        data = self._reader.read(box)
        self._timings.count("bytes read", data.nbytes)
        self.content.add(box.start[0], data, self._used)
        return data

    @cached_property
    def _boxes(self) -> list[Box]:
        """The box around the input of each tier's first patch."""
        z, y, x = self._block.first_patch
        return [self._patches.input_box((z + number, y, x)) for number in range(len(self.tiers))]

    @cached_property
    def _used(self) -> set[int]:
        """The planes that a patch needs.

        Others decide nothing, and are read only since storage chunks are read whole.
        """
        used = (box for box, tier in zip(self._boxes, self.tiers, strict=True) if tier)
        return {z for box in used for z in range(box.start[0], box.stop[0])}

    def _cut(self) -> list[Box]:
        """All planes of the block's input, cut at storage chunks."""
        start, stop = self.whole.start[0], self.whole.stop[0]
        origin = self._patches.spec.input_scale.bounds.start[0]
        first_cut = start + (origin - start) % self._z_step
        cuts = [start, *(z for z in range(first_cut, stop, self._z_step) if z > start), stop]
        return [self.whole.with_z(a, b) for a, b in pairwise(cuts)]


def joined(held: Iterable[Planes], box: Box) -> Planes:
    """Planes of a box, put together from stretches of them, contiguous.

    An empty array is made from none.
    """
    parts = [
        data[:, max(box.start[0], source.start[0]) - source.start[0] : box.stop[0] - source.start[0]]
        for source, data in held
    ]
    if len(parts) < 2:
        return box, np.ascontiguousarray(parts[0]) if parts else np.empty((0, 0, 0, 0))
    return box, np.concatenate(parts, axis=1)


def read_ahead(boxes: Iterable[Box], read: Callable[[Box], NDArray[Any]], ahead: int) -> Generator[Planes, None, None]:
    """Read boxes in turn, ``ahead`` of them while the caller works on the one before."""
    with ThreadPoolExecutor(ahead, thread_name_prefix="read") as pool:
        reading: deque[tuple[Box, Future[NDArray[Any]]]] = deque()
        try:
            for box in boxes:
                reading.append((box, pool.submit(read, box)))
                if len(reading) > ahead:
                    first, future = reading.popleft()
                    yield first, future.result()
            for first, future in reading:
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
