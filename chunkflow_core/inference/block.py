"""A block's patches, streamed along z: input planes come in, and pieces with final sums leave.

In memory is one tier of patches deep of input and of sums, whatever the depth of the block.
Reading, patches, and what the caller does with final pieces go on at the same time::

    reading    read ─► read ─► read ─►                  as many steps ahead as the spec says
    streams    take, forward, blend │ take, forward, …  a patch each; on an accelerator batches
    caller     convert, write, donate                   while the streams run the next tier
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, islice
from threading import Lock
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.inference.content import Content
from chunkflow_core.inference.mask import Mask, MaskWindow
from chunkflow_core.inference.on_cpu import OnCpu
from chunkflow_core.inference.patches import Patches, Planes
from chunkflow_core.inference.reading import BlockReading, Reader, joined
from chunkflow_core.inference.values import Measured
from chunkflow_core.lattice.blocks import Block, Piece
from chunkflow_core.lattice.boxes import Box, Vector, indices, vector
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.timing import Timings

T = TypeVar("T")


class Sums(Protocol):
    """The sums of a final piece, until the next piece is asked for.

    What the methods return may be called later.
    """

    def sum(self, box: Box) -> Callable[[], NDArray[np.float32]]:
        """Sums of a box: float32 ``(channels, z, y, x)``, in the units of the values."""

    def converted(self, box: Box) -> Callable[[], NDArray[Any]]:
        """What becomes of complete sums of a box: ``(stored channels, z, y, x)``."""


class Runner(Protocol):
    """Runs the patches of a block, tier by tier."""

    ahead: int
    """Tiers that may be started before the one before them has been finished."""

    def start(self, positions: list[Vector], planes: Planes) -> None:
        """Start a tier of patches, given the input planes that they need."""

    def finish(self) -> None:
        """Wait for the tier that was started first."""

    @property
    def sums(self) -> Sums:
        """What the finished patches add up to."""

    def advance(self, plane: int) -> None:
        """Drop the sums below a plane."""

    def close(self) -> None:
        """Give up what has not been done."""


@dataclass(frozen=True, slots=True)
class FinalPiece:
    """A piece of a block that no later patch touches, and its sums."""

    piece: Piece
    sums: Sums


class Inference:
    """Runs patches of the lattice and sums them, block by block or in any other range."""

    def __init__(
        self,
        spec: VolumeSpec,
        load: Callable[[], Engine],
        reader: Reader,
        z_step: int,
        mask: Mask | None = None,
        measured: Callable[[], Measured] = Measured,
    ) -> None:
        """Prepare for a spec.

        Args:
            spec: The volume.
            load: Gives the engine; called when the first patch is run.
            reader: Gives input voxels.
            z_step: Depth of the input's storage chunks: reading is cut there, so that none is
                fetched twice.
            mask: Mask that says which patches are run; None for all.
            measured: Gives what ``prepare`` has measured in the input, if the spec needs that.
        """
        self.spec, self.reader, self.z_step = spec, reader, z_step
        self.patches = Patches(spec, load, mask, measured)

    def run(self, block: Block, timings: Timings, patch_done: Callable[[], object] = lambda: None) -> BlockRun:
        """A run of a block's patches, not yet begun.

        Args:
            block: The block.
            timings: Where seconds, bytes and patches are counted.
            patch_done: Called after each patch, from several threads, but not at once.
        """
        return BlockRun(self.patches, block, self.reading(block, timings), timings, patch_done)

    def reading(self, block: Block, timings: Timings | None = None) -> BlockReading:
        """The reading of a block's input, nothing of it read yet."""
        return BlockReading(self.patches, block, self.reader, self.z_step, timings or Timings())

    def window(self, window: Box) -> NDArray[np.float32]:
        """Sums of a window of the output, as one machine with endless memory would get them.

        All lattice patches that touch the window are run.

        Returns:
            Float32 ``(channels, z, y, x)``, in the units of the values.
        """
        grid = self.spec.grid
        slab = Slab(grid, window, window.shape[0], self.spec.output.summed_channels, self.patches.values)
        origin = grid.roi.start
        touching = [
            axis.touching(window.start[a] - origin[a], window.stop[a] - origin[a]) for a, axis in enumerate(grid.axes)
        ]
        positions = indices(vector(r.start for r in touching), vector(r.stop for r in touching))
        for position in self.patches.inside_mask(positions):
            self.patches.run(slab, position, self._read_patch(position), Timings(), lambda: None)
        return slab.sum(window)

    def take(self, position: Vector) -> NDArray[np.float32]:
        """A patch as the network gets it: float32 ``(channels, z, y, x)``."""
        return self.patches.take(position, self._read_patch(position))

    def try_patch(self, position: Vector, before: Sequence[Callable[[], T]]) -> tuple[float, list[T]]:
        """Run and check one patch, in all streams at once.

        Args:
            position: Position of the patch in the lattice, zyx.
            before: Each of them runs another patch. It is called before, in a stream, as the first
                time takes longer there: some several times, if there are more streams.

        Returns:
            Seconds per patch, in all of its orientations; and what each of ``before`` gave.

        Raises:
            DataError: The output is not as declared.
        """
        patches, window = self.patches, self.spec.grid.patch_box(position) & self.spec.grid.roi
        patch = self.take(position)
        engine = patches.engine
        with ThreadPoolExecutor(engine.streams) as pool:
            number = max(len(before), engine.streams)
            given = list(pool.map(lambda run: run(), islice(cycle(before), number)))
            start = perf_counter()
            outputs = list(pool.map(patches.forward, [patch] * engine.streams))
            seconds = (perf_counter() - start) * len(patches.transforms) / (engine.streams * engine.batch_size)
        slab = Slab(self.spec.grid, window, window.shape[0], self.spec.output.summed_channels, patches.values)
        limits = (patches.values.low, patches.values.high)
        # this also compiles what blending needs, once for all processes
        if not slab.add(position, outputs[0], limits=limits) or patches.alters_values:
            patches.check(position, outputs[0])
        slab.converted(window, self.spec.output.conversion)
        return seconds, given[: len(before)]

    def _read_patch(self, position: Vector) -> Planes:
        box = self.patches.input_box(position)
        return joined([(box, self.reader.read(box))], box)


class BlockRun:
    """The patches of one block, run as its input comes in."""

    def __init__(
        self,
        patches: Patches,
        block: Block,
        reading: BlockReading,
        timings: Timings,
        patch_done: Callable[[], object],
    ) -> None:
        """Take a block's patches and the reading of its input; nothing is run yet.

        Args:
            patches: What is done with each patch of the volume.
            block: The block.
            reading: The reading of its input.
            timings: Where seconds, bytes and patches are counted.
            patch_done: Called after each patch, from several threads, but not at once.
        """
        self._patches, self._block, self._reading, self._timings = patches, block, reading, timings
        self._patch_done = _one_at_a_time(patch_done)

    @property
    def content(self) -> Content:
        """Digest of what has been read: of all the block's input once its last piece has come."""
        return self._reading.content

    @property
    def mask(self) -> MaskWindow | None:
        """The mask over all voxels that the block's patches touch; None if there is no mask."""
        return self._reading.mask

    def pieces(self) -> Generator[FinalPiece, None, None]:
        """Run the patches, and yield each piece as soon as it is final, in order of z."""
        tiers, block = self._reading.tiers, self._block
        outside = block.patches - sum(map(len, tiers))
        self._timings.count("outside mask", outside)
        for _ in range(outside):
            self._patch_done()
        if any(tiers):
            self._timings.measure("load", lambda: self._patches.engine)
        pieces = deque(self._patches.grid.pieces(block))
        with closing(self._runner()) as runner, closing(self._reading.planes()) as arriving:
            started = 0
            for done in range(len(tiers)):
                while started < min(len(tiers), done + 1 + runner.ahead):
                    runner.start(tiers[started], next(arriving))
                    started += 1
                runner.finish()
                final = self._final_plane(done)
                while pieces and pieces[0].box.stop[0] <= final:
                    piece = pieces.popleft()
                    yield FinalPiece(piece, runner.sums)
                    runner.advance(piece.box.stop[0])

    def _final_plane(self, tier: int) -> int:
        """The plane below which all sums are final once a tier has been finished."""
        if tier == len(self._reading.tiers) - 1:
            return self._block.reach.stop[0]
        return self._patches.grid.patch_box((self._block.first_patch[0] + tier + 1, 0, 0)).start[0]

    def _runner(self) -> Runner:
        idle = not any(self._reading.tiers)
        if idle or self._patches.engine.device is None:
            streams = 1 if idle else self._patches.engine.streams
            return OnCpu(self._patches, self._block, self._timings, self._patch_done, streams)
        from chunkflow_core.inference.on_gpu import OnDevice  # torch, which takes seconds to import, is there already

        return OnDevice(self._patches, self._block, self._timings, self._patch_done)


def _one_at_a_time(function: Callable[[], object]) -> Callable[[], None]:
    lock = Lock()

    def call() -> None:
        with lock:
            function()

    return call
