"""What a plan will cost: patches, bytes, memory and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

import numpy as np

from chunkflow_core.exchange.folder import Trial
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.blocks import AxisBlock, Block
from chunkflow_core.lattice.weights import strips
from chunkflow_core.planning.planner import Plan
from chunkflow_core.spec import VolumeSpec

SAMPLE = 64
"""Number of receipts that are enough to know the time per patch."""

_FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """Costs of a plan."""

    patches: int
    donated_bytes: int
    """Bytes of all donations before compression."""
    data_bytes: int
    """Largest memory in bytes of the data of one inference task; see :func:`data_bytes`."""
    memory_bytes: int | None
    """Largest memory in bytes of one inference task: data, interpreter, libraries, network.

    None before ``prepare`` has tried them out.
    """
    seconds: float | None
    """Seconds on one process; None if nothing is known yet.

    They follow from the median time per patch of the blocks that are done, or else from what
    ``prepare`` has measured.
    """


def estimate(spec: VolumeSpec, due: Plan, done: Iterable[Receipt], trial: Trial | None) -> Estimate:
    """Estimate what a plan costs.

    Args:
        spec: The volume.
        due: The plan.
        done: Receipts of inference, of blocks that are done.
        trial: What ``prepare`` has measured; None if it has not run yet.
    """
    grid = spec.grid
    alike: Counter[tuple[int, ...]] = Counter()
    example: dict[tuple[int, ...], Block] = {}
    kinds = [_kinds(blocks) for blocks in grid.axis_blocks]
    for z, y, x in due.infer:  # most blocks of a volume cost the same
        kind = (kinds[0][z], kinds[1][y], kinds[2][x])
        alike[kind] += 1
        if kind not in example:
            example[kind] = grid.block((z, y, x))
    patches = sum(example[kind].patches * number for kind, number in alike.items())
    donated = sum(_donated(spec, example[kind]) * number for kind, number in alike.items())
    data = max((data_bytes(spec, block) for block in example.values()), default=0)
    seconds = _seconds_per_patch(done, trial)
    return Estimate(
        patches=patches,
        donated_bytes=donated,
        data_bytes=data,
        memory_bytes=trial.process_bytes + data if trial else None,
        seconds=None if seconds is None else patches * seconds,
    )


def _kinds(blocks: Sequence[AxisBlock]) -> list[int]:
    """Numbers of the blocks along an axis: the same for blocks of the same sizes."""
    sizes = [
        (b.stop - b.start, b.reach_stop - b.start, b.core_start - b.start, b.start > blocks[0].start) for b in blocks
    ]
    return [sizes.index(size) for size in sizes]


def _donated(spec: VolumeSpec, block: Block) -> int:
    voxels = sum(donation.box.voxels for piece in spec.grid.pieces(block) for donation in piece.donations)
    return voxels * spec.output.summed_channels * _FLOAT


def data_bytes(spec: VolumeSpec, block: Block) -> int:
    """Memory in bytes of the data of a block's inference.

    It has sums, input planes, and a piece on its way to storage.
    """
    return _sums(spec, block) + _planes(spec, block) + _leaving(spec, block)


def _sums(spec: VolumeSpec, block: Block) -> int:
    _, height, width = block.reach.shape
    return spec.output.summed_channels * spec.grid.slab_depth(block) * height * prod(strips(width)) * _FLOAT


def _planes(spec: VolumeSpec, block: Block) -> int:
    """Bytes of stretches that are read or being read, and of the planes of two tiers of patches."""
    source, (depth, height, width) = (
        spec.input_scale,
        (n + 2 * h for n, h in zip(block.reach.shape, spec.halo, strict=True)),
    )
    patch, step = spec.patch_size[0], source.chunk[0]
    stretches = min(patch + (2 + spec.input.prefetch) * step, depth)
    return source.channels * (stretches + 2 * patch) * height * width * np.dtype(source.dtype).itemsize


def _leaving(spec: VolumeSpec, block: Block) -> int:
    """Bytes of what of a piece is written and what is donated, with their encoded forms."""
    written = 2 * np.dtype(spec.output.dtype).itemsize * spec.output.stored_channels
    donated = 5 * _FLOAT // 2 * spec.output.summed_channels
    return max(
        written * piece.core.voxels + donated * sum(donation.box.voxels for donation in piece.donations)
        for piece in spec.grid.pieces(block)
    )


def _seconds_per_patch(done: Iterable[Receipt], trial: Trial | None) -> float | None:
    patches = [(r.facts["wall"], r.patches + sum(r.skipped.values())) for r in done if "wall" in r.facts]
    rates = [wall / number for wall, number in patches if number]
    if rates:
        return float(median(rates))
    return trial.seconds if trial else None
