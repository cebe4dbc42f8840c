"""Oracle for the volume on disk: what its layers say now, after edits and growth.

What the layers have to say is kept as arrays. Of ``chunkflow_core`` it takes what writes layers and
what parses specs: plain data, of which nothing is asked again.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.storage.layers import NewLayer
from tests.support.oracle.geometry import Case, Geometry, Index
from tests.support.oracle.numbers import MASK_VOXEL

MASK_CHUNK = (4, 3, 2)
"""Storage chunk of the mask layer, in its own voxels, zyx."""


class Volume:
    """The layers of a case below ``folder``, which may be edited and grow."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.folder, self.model = folder, 0
        self.geometry = Geometry(case)
        self.layers: dict[str, NDArray[np.uint8]] = {}
        self.first: dict[str, NDArray[np.uint8]] = {}
        self.clock = 1_000_000
        rng = np.random.default_rng(case.seed)
        volume = rng.integers(0, 256, case.size, dtype=np.uint8)
        volume[tuple(slice(0, int(n)) for n in rng.integers(0, np.array(case.size) + 1))] = 0
        self._put("input", volume)
        if case.masked:
            shape = [-(-n // voxel) for n, voxel in zip(case.size, MASK_VOXEL, strict=True)]
            self._put("mask", (rng.random(shape) < 0.1).astype(np.uint8))

    @property
    def case(self) -> Case:
        """With the ROI and the input as they are now."""
        return self.geometry.case

    def spec(self, donations: Any = "keep") -> VolumeSpec:
        """The spec as it is now; ``donations`` as in the spec's exchange."""
        case, place = self.case, f"file://{self.folder}"
        output = {"channels": 2, "dtype": case.dtype, "chunk_size": [*case.chunk]}
        if case.format != "precomputed":
            output |= {"format": "ome-zarr", "read_chunk_size": [*case.pieces] if case.format == "shards" else None}
        return parse_spec(
            {
                "name": "case",
                "input": {"path": f"{place}/input", "padding": case.padding},
                "output": {"path": f"{place}/output", **output},
                "exchange": {"path": f"{place}/exchange", "donations": donations},
                "roi": [list(case.start), list(case.stop)],
                "patch_size": [p + 2 * h for p, h in zip(case.patch, case.halo, strict=True)],
                "output_patch_size": list(case.patch),
                "patch_overlap": list(case.overlap),
                "block_size": list(case.block),
                "skip": {"mask": {"path": f"{place}/mask"} if case.masked else None},
                "model": {"engine": "identity", "options": {"number": self.model}},
            }
        )

    def edit(self, name: str, chunk: int, seed: int) -> None:
        """Change some voxels of one storage chunk of a layer; with seed 0 write it as it is."""
        data, size = self.layers[name].copy(), self.case.input_chunk if name == "input" else MASK_CHUNK
        corners = list(product(*(range(0, n, c) for n, c in zip(data.shape, size, strict=True))))
        corner = corners[chunk % len(corners)]
        if seed:
            rng = np.random.default_rng(seed)
            stop = tuple(min(a + c, n) for a, c, n in zip(corner, size, data.shape, strict=True))
            low = [int(rng.integers(a, b)) for a, b in zip(corner, stop, strict=True)]
            high = [int(rng.integers(a, b)) + 1 for a, b in zip(low, stop, strict=True)]
            data[tuple(map(slice, low, high))] = rng.integers(0, 256) if name == "input" else rng.integers(0, 2)
        self._put(name, data, touched=corner)

    def revert(self, name: str) -> None:
        """Make a layer what it was at first."""
        self._put(name, self.first[name])

    def grow(self, axis: int, of_roi: int, of_input: int) -> None:
        """Move the ROI's end, and the input's, where it is asked for or needs to."""
        stop, size = list(self.case.stop), list(self.case.size)
        stop[axis] += of_roi
        size[axis] = max(size[axis] + of_input, stop[axis])
        beyond = tuple(n - b for n, b in zip(size, stop, strict=True))
        self.geometry = Geometry(replace(self.case, stop=tuple(stop), beyond=beyond))
        for name in self.layers:
            shape = [-(-n // v) for n, v in zip(size, MASK_VOXEL, strict=True)] if name == "mask" else size
            for versions in (self.first, self.layers):
                old = versions[name]
                rng = np.random.default_rng([self.case.seed, *shape])
                new = rng.integers(0, 256, shape, dtype=np.uint8)
                if name == "mask":
                    new = (new < 25).astype(np.uint8)
                new[tuple(map(slice, old.shape))] = old
                if versions is self.layers:
                    self._put(name, new)
                else:
                    versions[name] = new

    def _put(self, name: str, data: NDArray[np.uint8], *, touched: Index | None = None) -> None:
        """Make a layer say ``data`` (zyx).

        Only storage chunks that differ are written, and the one that starts at ``touched``.
        """
        resolution, chunk = ((40, 4, 4), self.case.input_chunk) if name == "input" else ((40, 8, 12), MASK_CHUNK)
        before = self.layers.get(name, np.empty((0, 0, 0), np.uint8))
        layer = NewLayer(
            f"file://{self.folder}/{name}",
            vector(data.shape),
            dtype="uint8",
            resolution=resolution,
            chunk=vector(chunk),
        )
        changed = {}
        for corner in product(*(range(0, n, c) for n, c in zip(data.shape, chunk, strict=True))):
            stop = tuple(min(a + c, n) for a, c, n in zip(corner, chunk, data.shape, strict=True))
            part = tuple(map(slice, corner, stop))
            if before[part].shape != data[part].shape or (before[part] != data[part]).any() or corner == touched:
                changed[corner] = stop
        at_once = {(0, 0, 0): data.shape} if before.size == 0 else changed
        for corner, stop in at_once.items():
            layer.write(Box(vector(corner), vector(stop)), data[tuple(map(slice, corner, stop))][None])
        for corner, stop in changed.items():
            x, y, z = (f"{a}-{b}" for a, b in zip(reversed(corner), reversed(stop), strict=True))
            self.clock += 1
            for file in (self.folder / name).glob(f"*/{x}_{y}_{z}*"):
                os.utime(file, ns=(self.clock, self.clock))  # the file system's own clock may be coarser than the test
        self.layers[name] = data
        self.first.setdefault(name, data)
