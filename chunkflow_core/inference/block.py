"""A chunk, streamed along z: input planes come in, patches run, and pieces whose sums are final leave.

In memory are one layer of patches deep of input and of sums, whatever the depth of the block. Reading, patches, and what the
caller does with final pieces go on at the same time::

    reading    read ─► read ─► read ─►                      as many steps ahead as the spec says
    streams    take, forward, blend │ take, forward, …      a patch each; on an accelerator batches, in one queue
    caller     convert, write, donate                       while the streams go on with the next layer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from threading import Lock
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.inference.content import Content
from chunkflow_core.inference.mask import Mask
from chunkflow_core.inference.on_cpu import Streams
from chunkflow_core.inference.patches import Patches, Planes
from chunkflow_core.lattice.blocks import Block, Piece
from chunkflow_core.lattice.boxes import Box, Vector, indices, vector
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.timing import Timings


class Reader(Protocol):
    """Gives input voxels: an ``InputLayer`` or anything like it."""

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of ``box``, ``(channels, z, y, x)``, also where it reaches past the layer."""


class Sums(Protocol):
    """Where a final piece's numbers are until the next piece is asked for. What the methods return may be called later."""

    def sum(self, box: Box) -> Callable[[], NDArray[np.float32]]:
        """Sums of a box: float32 ``(channels, z, y, x)``, in the units of the values."""

    def converted(self, box: Box) -> Callable[[], NDArray[Any]]:
        """Complete sums of a box: ``(channels, z, y, x)`` in the output's dtype."""


class Runner(Sums, Protocol):
    """Runs the patches of a block, layer by layer."""

    ahead: int
    """Layers that may be started before the one before them has been finished."""

    def start(self, positions: list[Vector], planes: Planes) -> None:
        """Start a layer of patches, given the input planes that they need."""

    def finish(self) -> None:
        """Wait for the layer that was started first."""

    def advance(self, plane: int) -> None:
        """Drop the sums below a plane."""

    def close(self) -> None:
        """Give up what has not been done."""


class ChunkInference:
    """Runs lattice patches and sums them, block by block or in any other range of the lattice."""

    def __init__(
        self, spec: VolumeSpec, load: Callable[[], Engine], reader: Reader, z_step: int, mask: Mask | None = None
    ) -> None:
        """Prepare for a spec.

        Args:
            spec: the volume.
            load: gives what runs patches; called when the first is run.
            reader: gives input voxels.
            z_step: depth of the input's storage chunks: reading is cut there, so that none is fetched twice.
            mask: which patches are run; None for all.
        """
        self.spec, self.reader, self.z_step = spec, reader, z_step
        self.patches = Patches(spec, load, mask)

    def block(
        self, block: Block, timings: Timings, patch_done: Callable[[], object], content: Content
    ) -> Iterator[tuple[Piece, Sums]]:
        """Run a block's patches; yield each final piece, and where its numbers are.

        ``patch_done`` is called after each patch, from several threads, but not at once; ``content`` gets the input.
        """
        patch_done = _one_at_a_time(patch_done)
        layers = self._layers(block)
        outside = block.patches - sum(map(len, layers))
        timings.count("outside mask", outside)
        for _ in range(outside):
            patch_done()
        if any(layers):
            timings.measure("load", lambda: self.patches.engine)
        self._add_mask(block, content)
        with closing(self._runner(block, timings, patch_done, idle=not any(layers))) as runner:
            yield from self._stream(runner, block, layers, timings, content)

    def content(self, block: Block) -> str:
        """Digest of a block's input, as ``block`` gives it to its ``content``, without running anything."""
        content = Content()
        self._add_mask(block, content)
        used = [bool(layer) for layer in self._layers(block)]
        planes = self._used_planes(block, used)

        def read(box: Box) -> NDArray[Any]:
            data = self.reader.read(box)
            content.add(box.start[0], data, planes)
            return data

        for _ in read_ahead(self._used_steps(block, used), read, self.spec.input.prefetch):
            pass
        return content.digest

    def reads(self, block: Block) -> Box:
        """The input voxels that a block's patches need; may reach past the layer."""
        last = vector(k - 1 for k in block.stop_patch)
        return Box.around([self.patches.input_box(block.first_patch), self.patches.input_box(last)])

    def window(self, window: Box) -> NDArray[np.float32]:
        """Sums of a window of the output, from all lattice patches that touch it, as one machine would get them."""
        grid = self.spec.grid
        slab = Slab(grid, window, window.shape[0], self.spec.output.channels, self.patches.values)
        origin = grid.roi.start
        touching = [
            axis.touching(window.start[a] - origin[a], window.stop[a] - origin[a]) for a, axis in enumerate(grid.axes)
        ]
        positions = indices(vector(r.start for r in touching), vector(r.stop for r in touching))
        for position in self.patches.inside_mask(positions):
            self.patches.run(slab, position, self._read_patch(position), Timings(), lambda: None)
        return slab.sum(window)

    def take(self, position: Vector) -> NDArray[np.float32]:
        """A patch as the network gets it, ``(channels, z, y, x)``."""
        return self.patches.take(position, self._read_patch(position))

    def try_patch(self, position: Vector) -> float:
        """Run and check one patch, in all streams at once; seconds per patch, in all of its orientations.

        Raises:
            DataError: the output is not as declared.
        """
        patches, window = self.patches, self.spec.grid.patch_box(position) & self.spec.grid.roi
        patch = self.take(position)
        engine = patches.engine
        with ThreadPoolExecutor(engine.streams) as pool:
            outputs = list(pool.map(patches.forward, [patch] * engine.streams))
            start = perf_counter()  # the first time takes longer
            list(pool.map(patches.forward, [patch] * engine.streams))
            seconds = (perf_counter() - start) * len(patches.transforms) / (engine.streams * engine.batch_size)
        patches.check(position, outputs[0])
        slab = Slab(self.spec.grid, window, window.shape[0], self.spec.output.channels, patches.values)
        slab.add(position, outputs[0])  # compiles what blending needs, once for all processes
        slab.converted(window, self.spec.output.dtype)
        return seconds

    def _read_patch(self, position: Vector) -> Planes:
        box = self.patches.input_box(position)
        return _joined([(box, self.reader.read(box))], box)

    def _layers(self, block: Block) -> list[list[Vector]]:
        """The block's patches that the mask touches, by layer in z."""
        (first, *low), (stop, *high) = block.first_patch, block.stop_patch
        return [
            self.patches.inside_mask(list(indices(vector((z, *low)), vector((z + 1, *high)))))
            for z in range(first, stop)
        ]

    def _add_mask(self, block: Block, content: Content) -> None:
        if self.patches.mask is not None:
            content.add_mask(self.patches.mask.window(block.chunk & self.spec.grid.roi))

    def _stream(
        self, runner: Runner, block: Block, layers: list[list[Vector]], timings: Timings, content: Content
    ) -> Iterator[tuple[Piece, Sums]]:
        grid = self.spec.grid
        pieces = deque(grid.pieces(block))
        with closing(self._planes(block, timings, [bool(layer) for layer in layers], content)) as arriving:
            started = 0
            for done in range(len(layers)):
                while started < min(len(layers), done + 1 + runner.ahead):
                    runner.start(layers[started], next(arriving))
                    started += 1
                runner.finish()
                last = done == len(layers) - 1
                above = grid.patch_box((block.first_patch[0] + done + 1, 0, 0)).start[0]
                final = block.chunk.stop[0] if last else above
                while pieces and pieces[0].box.stop[0] <= final:
                    piece = pieces.popleft()
                    yield piece, runner
                    runner.advance(piece.box.stop[0])

    def _runner(self, block: Block, timings: Timings, patch_done: Callable[[], object], *, idle: bool) -> Runner:
        if idle or self.patches.engine.device is None:
            streams = 1 if idle else self.patches.engine.streams
            return Streams(self.patches, block, timings, patch_done, streams)
        from chunkflow_core.inference.on_gpu import OnDevice  # torch, which takes seconds to import, is there already

        return OnDevice(self.patches, block, timings, patch_done)

    def _planes(
        self, block: Block, timings: Timings, used: list[bool], content: Content
    ) -> Generator[Planes, None, None]:
        """For each layer of patches, the input planes it needs (none where it has no patches); the next are read meanwhile."""
        whole, boxes, planes = self.reads(block), self._layer_boxes(block), self._used_planes(block, used)
        reading = read_ahead(
            self._used_steps(block, used),
            lambda box: timings.measure("read", self._read, box, timings, content, planes),
            self.spec.input.prefetch,
        )
        with closing(reading) as arriving:
            held: deque[Planes] = deque()
            for box, there in zip(boxes, used, strict=True):
                start, stop = box.start[0], box.stop[0]
                while held and held[0][0].stop[0] <= start:
                    held.popleft()
                while there and (not held or held[-1][0].stop[0] < stop):
                    held.append(next(arriving))
                yield _joined(held if there else [], whole.with_z(start, stop))

    def _read(self, box: Box, timings: Timings, content: Content, used: Container[int]) -> NDArray[Any]:
        data = self.reader.read(box)
        timings.count("bytes read", data.nbytes)
        content.add(box.start[0], data, used)
        return data

    def _layer_boxes(self, block: Block) -> list[Box]:
        _, y, x = block.first_patch
        return [self.patches.input_box((z, y, x)) for z in range(block.first_patch[0], block.stop_patch[0])]

    def _used_planes(self, block: Block, used: list[bool]) -> set[int]:
        boxes = self._layer_boxes(block)
        return {z for box, there in zip(boxes, used, strict=True) if there for z in range(box.start[0], box.stop[0])}

    def _used_steps(self, block: Block, used: list[bool]) -> list[Box]:
        """What is read, in steps: planes that no layer with patches needs are left out."""
        boxes = self._layer_boxes(block)
        needed = [(box.start[0], box.stop[0]) for box, there in zip(boxes, used, strict=True) if there]
        return [
            s for s in self._read_steps(self.reads(block)) if any(a < s.stop[0] and s.start[0] < b for a, b in needed)
        ]

    def _read_steps(self, whole: Box) -> list[Box]:
        start, stop = whole.start[0], whole.stop[0]
        origin = self.spec.input_scale.bounds.start[0]
        first_cut = start + (origin - start) % self.z_step
        cuts = [start, *(z for z in range(first_cut, stop, self.z_step) if z > start), stop]
        return [whole.with_z(a, b) for a, b in pairwise(cuts)]


def _one_at_a_time(function: Callable[[], object]) -> Callable[[], None]:
    lock = Lock()

    def call() -> None:
        with lock:
            function()

    return call


def _joined(held: Iterable[Planes], box: Box) -> Planes:
    """Planes of ``box``, put together from stretches of them, contiguous; an empty array from none."""
    parts = [
        data[:, max(box.start[0], source.start[0]) - source.start[0] : box.stop[0] - source.start[0]]
        for source, data in held
    ]
    if len(parts) < 2:
        return box, np.ascontiguousarray(parts[0]) if parts else np.empty((0, 0, 0, 0))
    return box, np.concatenate(parts, axis=1)


def read_ahead(boxes: Iterable[Box], read: Callable[[Box], NDArray[Any]], ahead: int) -> Generator[Planes, None, None]:
    """Read the boxes in turn, ``ahead`` of them while the caller works on the one before."""
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
