"""What all but the forward passes costs: a whole block over its forward passes alone.

    python -m bench.stitching --volume 28 224 224 --rounds 1      # a look
    python -m bench.stitching --engine openvino

Real layers on disk are read and written. Both are timed in turn in one run, so that the ratio holds
on a noisy machine. Then the identity engine, which leaves nothing but the stitching: output voxels
per second.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.common import (
    SIZE,
    UNET,
    command_line,
    median_ratio,
    run_passes,
    spec_content,
    timed,
    write_json,
    write_random,
)
from chunkflow_core.lattice.boxes import Vector, indices, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import make_output
from chunkflow_core.steps.workspace import Workspace

PATCH: Vector = (16, 128, 128)
OVERLAP: Vector = (4, 32, 32)
"""Overlap of patches in voxels, zyx."""
MIDDLE: Vector = (1, 1, 1)
"""The block that is timed: it has lower neighbours, so that it donates all it can."""


def make_volume(folder: Path, shape: Vector, channels: int, model: dict[str, object]) -> VolumeSpec:
    """Write random input, and make a spec of blocks half as large along each axis.

    Args:
        folder: Where the layers are made.
        shape: Size of the input in voxels, zyx.
        channels: Channels of the output.
        model: The section ``model``.
    """
    write_random(folder, shape)
    stride = [p - o for p, o in zip(PATCH, OVERLAP, strict=True)]
    block = vector((n - o) // s // 2 * s for n, o, s in zip(shape, OVERLAP, stride, strict=True))
    output: dict[str, object] = {"channels": channels}
    return parse_spec(spec_content(folder, patch=PATCH, overlap=OVERLAP, block=block, model=model, output=output))


def measure(shape: Vector, channels: int, model: dict[str, object], rounds: int) -> dict[str, float]:
    """Time the whole block and its forward passes alone, in turn.

    Args:
        shape: Of the input in voxels, zyx.
        channels: Of the output.
        model: Section ``model`` of the spec.
        rounds: How often both are timed.

    Returns:
        Medians of wall seconds of the whole block and of its forward passes alone, of their ratio,
        and of output voxels per second; the block's patches and voxels.
    """
    with tempfile.TemporaryDirectory(prefix="stitching-") as folder:
        spec = make_volume(Path(folder), shape, channels, model)
        make_output(spec)
        workspace, block = Workspace(spec), spec.grid.block(MIDDLE)
        positions = indices(block.first_patch, block.stop_patch)
        patches = [workspace.inference.take(position)[None] for position in positions]

        def forward_alone() -> float:
            return timed(lambda: run_passes(workspace.engine, patches, len(patches)))[0]

        def whole_block() -> float:
            return timed(lambda: inference_and_donate(workspace, MIDDLE, why="forced"))[0]

        forward_alone()
        pairs = [(whole_block(), forward_alone()) for _ in range(rounds)]
    whole, alone = zip(*pairs, strict=True)
    voxels = block.reach.voxels
    return {
        "patches": block.patches,
        "voxels": voxels,
        "whole_seconds": median(whole),
        "forward_seconds": median(alone),
        "ratio": median_ratio(whole, alone),
        "voxels_per_second": voxels / median(whole),
    }


def main() -> int:
    """Measure and print."""
    parser = command_line("stitching", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--engine", choices=("pytorch", "openvino"), default="pytorch", help="default: pytorch")
    parser.add_argument("--volume", help="of both rows (default: 52 608 608, and 100 1184 1184 for identity)", **SIZE)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    unet, volume = {"engine": options.engine, **UNET}, options.volume and vector(options.volume)
    results = {
        "unet": measure(volume or (52, 608, 608), 1, unet, options.rounds),
        "identity": measure(volume or (100, 1184, 1184), 3, {"engine": "identity"}, options.rounds),
    }
    for name, figures in results.items():
        print(
            f"{name:<9} {figures['patches']:.0f} patches: whole block {figures['whole_seconds']:.2f} s, forward passes "
            f"alone {figures['forward_seconds']:.2f} s, ratio {figures['ratio']:.3f}; "
            f"{figures['voxels_per_second'] / 1e6:.1f} Mvoxel/s"
        )
    facts = {"machine": platform.processor() or platform.machine(), "engine": options.engine, "results": results}
    write_json(options.output, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
