"""What everything around the forward passes costs: seconds of a whole block over seconds of its forward passes alone.

    python bench/stitching.py [--rounds 3] [--engine pytorch] [--volume Z Y X] [--output docs/stitching.json]

Real layers on disk are read and written. Both are timed in turn in one run, so that the ratio holds on a noisy machine. Then
the identity engine, which leaves nothing but the stitching: output voxels per second.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from volumes import UNET_FILES, spec_content, write_random

from chunkflow_core.lattice.boxes import Vector, indices, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.prepare import make_output
from chunkflow_core.steps.stages import Workspace, inference_and_donate

PATCH: Vector = (16, 128, 128)
OVERLAP: Vector = (4, 32, 32)


def make_volume(folder: Path, shape: Vector, channels: int, model: dict[str, object]) -> VolumeSpec:
    """Write random input and return a spec of one block, which has lower neighbours, so that it donates all it can."""
    write_random(folder, shape)
    stride = [p - o for p, o in zip(PATCH, OVERLAP, strict=True)]
    block = vector((n - o) // s // 2 * s for n, o, s in zip(shape, OVERLAP, stride, strict=True))
    return parse_spec(spec_content(folder, patch=PATCH, overlap=OVERLAP, block=block, model=model, channels=channels))


def forward_alone(workspace: Workspace, block: Vector) -> float:
    """Seconds of a block's forward passes, in as many streams, the patches being in memory already."""
    owner = workspace.spec.grid.block(block)
    positions = indices(owner.first_patch, owner.stop_patch)
    patches = [workspace.inference.take(position)[None] for position in positions]
    with ThreadPoolExecutor(workspace.engine.streams) as pool:
        return timed(lambda: list(pool.map(workspace.engine, patches)))


def whole_block(workspace: Workspace, block: Vector) -> float:
    """Seconds of inference and donation of a block: reading, forward passes, blending, writing, donating."""
    return timed(lambda: inference_and_donate(workspace, block, force=True))


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(shape: Vector, channels: int, model: dict[str, object], rounds: int) -> dict[str, float]:
    """Both times of the block in the middle, in turn; medians."""
    folder = Path(tempfile.mkdtemp(prefix="stitching-"))
    try:
        spec = make_volume(folder, shape, channels, model)
        make_output(spec)
        workspace, block = Workspace(spec), (1, 1, 1)
        forward_alone(workspace, block)
        pairs = [(whole_block(workspace, block), forward_alone(workspace, block)) for _ in range(rounds)]
        voxels = spec.grid.block(block).chunk.voxels
        return {
            "patches": spec.grid.block(block).patches,
            "voxels": voxels,
            "whole_seconds": statistics.median(whole for whole, _ in pairs),
            "forward_seconds": statistics.median(alone for _, alone in pairs),
            "ratio": statistics.median(whole / alone for whole, alone in pairs),
            "voxels_per_second": voxels / statistics.median(whole for whole, _ in pairs),
        }
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run both measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=("pytorch", "openvino"), default="pytorch", help="default: pytorch")
    volume: dict[str, object] = {"type": int, "nargs": 3, "metavar": ("Z", "Y", "X")}
    parser.add_argument("--volume", help="of both rows (default: 52 608 608, and 100 1184 1184 for identity)", **volume)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    unet, volume = {"engine": options.engine, **UNET_FILES}, options.volume and vector(options.volume)
    results = {
        "unet": measure(volume or (52, 608, 608), 1, unet, options.rounds),
        "identity": measure(volume or (100, 1184, 1184), 3, {"engine": "identity"}, options.rounds),
    }
    for name, figures in results.items():
        print(
            f"{name:<9} {figures['patches']:.0f} patches: whole block {figures['whole_seconds']:.2f} s, forward passes alone "
            f"{figures['forward_seconds']:.2f} s, ratio {figures['ratio']:.3f}; {figures['voxels_per_second'] / 1e6:.1f} Mvoxel/s"
        )
    if options.output:
        facts = {"machine": platform.processor() or platform.machine(), "engine": options.engine, "results": results}
        options.output.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
