"""What a plan will cost: patches, bytes, memory and time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np

from chunkflow_core.exchange import Receipt
from chunkflow_core.geometry import Box
from chunkflow_core.lattice import Block
from chunkflow_core.planner import Plan
from chunkflow_core.spec import VolumeSpec

_FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """Costs of a plan."""

    patches: int
    donated_bytes: int
    """Before compression."""
    slab_bytes: int
    """Largest memory of the data of one inference task: input planes, sums, and pieces on their way to storage. The
    interpreter and the network come on top."""
    seconds: float | None
    """On one process, by the median time per patch of the blocks that are done; None if none is."""


def estimate(spec: VolumeSpec, due: Plan, done: Iterable[Receipt]) -> Estimate:
    """Estimate a plan from geometry, and from the receipts of blocks that are done."""
    grid, channels = spec.grid, spec.output.channels
    blocks = [grid.block(index) for index in due.infer]
    patches = sum(block.patches for block in blocks)
    donated = sum(d.box.voxels for b in blocks for piece in grid.pieces(b) for d in piece.donations)
    rates = [r.facts["wall"] / r.patches for r in done if r.patches and "wall" in r.facts]
    return Estimate(
        patches=patches,
        donated_bytes=donated * channels * _FLOAT,
        slab_bytes=max((slab_bytes(spec, block) for block in blocks), default=0),
        seconds=patches * median(rates) if rates else None,
    )


def slab_bytes(spec: VolumeSpec, block: Block) -> int:
    """Memory of the data of a block's inference; see ``Estimate.slab_bytes``."""
    grid, source = spec.grid, spec.input_scale
    _, height, width = block.chunk.shape
    depth = min(grid.patch[0] + grid.storage_chunk[0] - 1, block.chunk.shape[0])
    sums = spec.output.channels * depth * height * width * _FLOAT
    read_depth = spec.patch_size[0] + 2 * source.chunk[0]
    plane = Box((0, 0, 0), (1, height + 2 * spec.halo[1], width + 2 * spec.halo[2])).voxels
    planes = 2 * source.channels * read_depth * plane * np.dtype(source.dtype).itemsize
    deepest = max(piece.box.shape[0] for piece in grid.pieces(block))
    leaving = 2 * spec.output.channels * deepest * height * width * _FLOAT
    return sums + planes + leaving
