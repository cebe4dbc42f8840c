"""What a plan will cost: patches, bytes, memory and time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from statistics import median

import numpy as np

from chunkflow_core.blending import strips
from chunkflow_core.exchange import Receipt, Trial
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
    data_bytes: int
    """Largest memory of the data of one inference task: see ``data_bytes``."""
    memory_bytes: int | None
    """The same with interpreter, libraries and network; None before ``prepare`` has tried them out."""
    seconds: float | None
    """On one process, by the median time per patch of the blocks that are done, or by what ``prepare`` has tried."""


def estimate(spec: VolumeSpec, due: Plan, done: Iterable[Receipt], trial: Trial | None) -> Estimate:
    """Estimate a plan from geometry, from the receipts of blocks that are done, and from what ``prepare`` has measured."""
    grid, channels = spec.grid, spec.output.channels
    blocks = [grid.block(index) for index in due.infer]
    patches = sum(block.patches for block in blocks)
    donated = sum(d.box.voxels for b in blocks for piece in grid.pieces(b) for d in piece.donations)
    data = max((data_bytes(spec, block) for block in blocks), default=0)
    seconds = _seconds_per_patch(done, trial)
    return Estimate(
        patches=patches,
        donated_bytes=donated * channels * _FLOAT,
        data_bytes=data,
        memory_bytes=trial.process_bytes + data if trial else None,
        seconds=None if seconds is None else patches * seconds,
    )


def data_bytes(spec: VolumeSpec, block: Block) -> int:
    """Memory of the data of a block's inference: sums, input planes, and a piece on its way to storage."""
    return _sums(spec, block) + _planes(spec, block) + _leaving(spec, block)


def _sums(spec: VolumeSpec, block: Block) -> int:
    _, height, width = block.chunk.shape
    return spec.output.channels * spec.grid.slab_depth(block) * height * prod(strips(width)) * _FLOAT


def _planes(spec: VolumeSpec, block: Block) -> int:
    """Stretches that have been read and are being read, and what of them makes up two layers of patches."""
    source, (depth, height, width) = (
        spec.input_scale,
        (n + 2 * h for n, h in zip(block.chunk.shape, spec.halo, strict=True)),
    )
    patch, step = spec.patch_size[0], source.chunk[0]
    stretches = min(patch + (2 + spec.input.prefetch) * step, depth)
    return source.channels * (stretches + 2 * patch) * height * width * np.dtype(source.dtype).itemsize


def _leaving(spec: VolumeSpec, block: Block) -> int:
    """What of a piece is written, and what of it is donated; with their encoded forms."""
    written, donated = 2 * np.dtype(spec.output.dtype).itemsize, 5 * _FLOAT // 2
    return spec.output.channels * max(
        written * piece.core.voxels + donated * sum(donation.box.voxels for donation in piece.donations)
        for piece in spec.grid.pieces(block)
    )


def _seconds_per_patch(done: Iterable[Receipt], trial: Trial | None) -> float | None:
    patches = [(r.facts["wall"], r.patches + sum(r.skipped.values())) for r in done if "wall" in r.facts]
    rates = [wall / number for wall, number in patches if number]
    if rates:
        return float(median(rates))
    return trial.seconds if trial else None
