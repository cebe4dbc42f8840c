"""The volume of benchmarks: random voxels in a layer on disk, and the spec that runs a model on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.storage.layers import NewLayer

UNET = Path(__file__).resolve().parents[1] / "examples" / "unet"
UNET_FILES = {"path": str(UNET / "model.py"), "weights": str(UNET / "model.pt")}
"""The example network, as a spec names it."""


def write_random(folder: Path, shape: Vector) -> None:
    """Make the layer ``input`` of so many voxels zyx, uint8, from a fixed seed."""
    layer = NewLayer(f"file://{folder}/input", shape, dtype="uint8", resolution=(50, 4, 4), chunk=(16, 128, 128))
    layer.write(Box((0, 0, 0), shape), np.random.default_rng(0).integers(0, 256, (1, *shape), dtype=np.uint8))


def spec_content(
    folder: Path, *, patch: Vector, overlap: Vector, block: Vector, model: dict[str, object], channels: int = 1
) -> dict[str, Any]:
    """A spec of the layer ``input``, its output and exchange beside it; sizes in voxels zyx."""
    return {
        "name": "bench",
        "input": {"path": f"file://{folder}/input"},
        "output": {"path": f"file://{folder}/output", "channels": channels},
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_size": list(patch),
        "patch_overlap": list(overlap),
        "block_size": list(block),
        "model": model,
    }
