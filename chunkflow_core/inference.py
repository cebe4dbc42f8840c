"""A chunk, streamed along z: input planes come in, patches run, and pieces whose sums are final leave.

In memory are one layer of patches deep of input and of sums, whatever the depth of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, pairwise
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.blending import Grid, Slab
from chunkflow_core.engines.base import Engine
from chunkflow_core.errors import DataError
from chunkflow_core.geometry import Box, Vector, indices, vector
from chunkflow_core.lattice import Block, Piece
from chunkflow_core.spec import VolumeSpec


class Reader(Protocol):
    """Gives input voxels: an ``InputLayer`` or anything like it."""

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of ``box``, ``(channels, z, y, x)``, also where it reaches past the layer."""


@dataclass
class Timings:
    """Seconds spent, by phase; those of concurrent phases overlap."""

    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, phase: str, function: Callable[[], Any]) -> Any:
        """Call ``function`` and add the time it takes to ``phase``."""
        start = perf_counter()
        try:
            return function()
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start


class ChunkInference:
    """Runs lattice patches and sums them, block by block or in any other range of the lattice."""

    def __init__(self, spec: VolumeSpec, engine: Engine, reader: Reader, z_step: int) -> None:
        """Prepare for a spec.

        Args:
            spec: the volume.
            engine: runs batches of patches.
            reader: gives input voxels.
            z_step: depth of the input's storage chunks: reading is cut there, so that none is fetched twice.
        """
        self.spec, self.engine, self.reader, self.z_step = spec, engine, reader, z_step
        self.values = Grid(*spec.output.range)

    def block(
        self, block: Block, timings: Timings, patch_done: Callable[[], object]
    ) -> Iterator[tuple[Piece, Callable[[Box], NDArray[np.float32]]]]:
        """Run a block's patches; yield each final piece and a function that copies the sums of a box in it.

        The function is valid until the next piece is asked for. ``patch_done`` is called after each patch.
        """
        grid = self.spec.grid
        depth = grid.patch[0] + grid.storage_chunk[0] - 1
        slab = Slab(grid, block.chunk, depth, self.spec.output.channels, self.values)
        pieces = iter(grid.pieces(block))
        piece = next(pieces, None)
        layers = range(block.first_patch[0], block.stop_patch[0])
        for layer, planes in zip(layers, self._layers(block, timings), strict=True):
            low, high = (layer, *block.first_patch[1:]), (layer + 1, *block.stop_patch[1:])
            self._run(slab, indices(low, high), planes, timings, patch_done)
            last = layer == layers[-1]
            final = block.chunk.stop[0] if last else grid.patch_box((layer + 1, 0, 0)).start[0]
            while piece is not None and piece.box.stop[0] <= final:
                yield piece, slab.sum
                slab.advance(piece.box.stop[0])
                piece = next(pieces, None)

    def window(self, window: Box) -> NDArray[np.float32]:
        """Sums of a window of the output, from all lattice patches that touch it, as one machine would get them."""
        grid = self.spec.grid
        slab = Slab(grid, window, window.shape[0], self.spec.output.channels, self.values)
        origin = grid.roi.start
        touching = [
            axis.touching(window.start[a] - origin[a], window.stop[a] - origin[a]) for a, axis in enumerate(grid.axes)
        ]
        for position in indices(vector(r.start for r in touching), vector(r.stop for r in touching)):
            box = self._input_box(position)
            self._run(slab, [position], (box, self.reader.read(box)), Timings(), lambda: None)
        return slab.sum(window)

    def try_patch(self, position: Vector) -> float:
        """Run and check one patch, without blending it; seconds of the forward pass of its batch.

        Raises:
            DataError: the output is not as declared.
        """
        box = self._input_box(position)
        batch = self._gather((position,), (box, self.reader.read(box)), self.spec.model.batch_size)
        start = perf_counter()
        outputs = self.engine(batch)
        seconds = perf_counter() - start
        self._check(position, batch[0], outputs[0])
        return seconds

    def _run(
        self,
        slab: Slab,
        positions: Iterable[Vector],
        planes: tuple[Box, NDArray[Any]],
        timings: Timings,
        patch_done: Callable[[], object],
    ) -> None:
        size = self.spec.model.batch_size
        remaining = iter(positions)
        while group := tuple(islice(remaining, size)):
            batch = self._gather(group, planes, size)
            outputs = timings.measure("forward", lambda batch=batch: self.engine(batch))  # type: ignore[misc]
            for position, patch, output in zip(group, batch, outputs, strict=False):
                self._check(position, patch, output)
                timings.measure("blend", lambda p=position, o=output: slab.add(p, o))  # type: ignore[misc]
                patch_done()

    def _gather(self, group: tuple[Vector, ...], planes: tuple[Box, NDArray[Any]], size: int) -> NDArray[np.float32]:
        """A batch of input patches, scaled. A short last one is filled up: another batch shape could give other bits."""
        box, data = planes
        batch = np.zeros((size, data.shape[0], *self.spec.patch_size), np.float32)
        for slot, position in zip(batch, group, strict=False):
            slot[:] = data[(slice(None), *self._input_box(position).slices(box.start))]
        if data.dtype.kind != "f":
            batch /= np.float32(np.iinfo(data.dtype).max)
        return batch

    def _check(self, position: Vector, patch: NDArray[np.float32], output: NDArray[np.float32]) -> None:
        low, high = self.spec.output.range
        least, most = output.min(), output.max()
        if not (low <= least and most <= high):
            what = "NaN or infinity" if not np.isfinite(output).all() else f"values from {least:.6g} to {most:.6g}"
            given = "" if np.isfinite(patch).all() else ", whose input has NaN or infinity already,"
            raise DataError(
                f"the model gave {what} for the patch{given} at lattice position {position} ({self.spec.grid.patch_box(position)}), "
                f"expected values within output.range [{low:g}, {high:g}]"
            )

    def _input_box(self, position: Vector) -> Box:
        return self.spec.grid.patch_box(position).grown(self.spec.halo, self.spec.halo)

    def _layers(self, block: Block, timings: Timings) -> Iterator[tuple[Box, NDArray[Any]]]:
        """For each layer of patches, the input planes it needs; the next ones are read meanwhile."""
        first = self._input_box(block.first_patch)
        last = self._input_box((block.stop_patch[0] - 1, block.stop_patch[1] - 1, block.stop_patch[2] - 1))
        whole = Box(first.start, last.stop)
        arriving = read_ahead(
            self._read_steps(whole), lambda box: timings.measure("read", lambda: self.reader.read(box))
        )
        held, held_start = None, whole.start[0]
        for layer in range(block.first_patch[0], block.stop_patch[0]):
            box = self._input_box((layer, *block.first_patch[1:]))
            start, stop = box.start[0], box.stop[0]
            parts: list[NDArray[Any]] = [] if held is None else [held[:, start - held_start :]]
            reached = start + sum(part.shape[1] for part in parts)
            while reached < stop:
                parts.append(timings.measure("wait for input", lambda: next(arriving)))
                reached += parts[-1].shape[1]
            held, held_start = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1), start
            yield whole.with_z(start, stop), held[:, : stop - start]

    def _read_steps(self, whole: Box) -> list[Box]:
        start, stop = whole.start[0], whole.stop[0]
        origin = self.spec.input_scale.bounds.start[0]
        first_cut = start + (origin - start) % self.z_step
        cuts = [start, *(z for z in range(first_cut, stop, self.z_step) if z > start), stop]
        return [whole.with_z(a, b) for a, b in pairwise(cuts)]


def read_ahead(boxes: Iterable[Box], read: Callable[[Box], NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Read the boxes in turn, each while the caller works on the one before it."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        ahead = None
        for box in boxes:
            following = pool.submit(read, box)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
