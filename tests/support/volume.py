"""A small real volume on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer

SHAPE = (20, 48, 40)
CHUNK = (8, 16, 16)
"""Storage chunk of the input."""
BLOCKS = [[z, y, x] for z in (0, 1) for y in (0, 1) for x in (0, 1)]
"""All blocks, as JSON has them."""
PYTORCH = {"engine": "pytorch", "path": "model.py", "weights": "weights.pt"}
"""A model section; the files are beside the spec."""


def write_layer(path: Path, shape: Vector = SHAPE) -> None:
    """Write a layer of random voxels."""
    data = np.random.default_rng(1).integers(0, 256, (1, *shape), dtype=np.uint8)
    layer = NewLayer(f"file://{path}", shape, dtype="uint8", resolution=(40, 4, 4), chunk=CHUNK)
    layer.write(Box((0, 0, 0), shape), data)


def spec_content(layer: Path, folder: Path) -> dict[str, Any]:
    """A spec of 2 × 2 × 2 blocks for such a layer; everything else is below ``folder``."""
    return {
        "name": "small",
        "input": {"path": f"file://{layer}"},
        "output": {"path": f"file://{folder}/output", "channels": 2, "dtype": "float32", "chunk_size": [4, 8, 8]},
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_size": [8, 16, 16],
        "patch_overlap": [2, 4, 4],
        "block_size": [12, 24, 24],
        "model": {"engine": "identity"},
    }


def write_volume(folder: Path, **changes: object) -> Path:
    """Write layer and spec into ``folder``; return the spec's path."""
    write_layer(folder / "input")
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec_content(folder / "input", folder) | changes))
    return path


def output_of(path: Path) -> NDArray[np.generic]:
    """The whole output of a spec."""
    spec: VolumeSpec = load_spec(path)
    return Workspace(spec).output.read(spec.grid.roi)


def files_below(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path.

    What holds times is left out: the manifests of runs, and who is at work.
    """
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.parent.name not in ("runs", "leases"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of all files below a folder.

    The trial that every ``prepare`` makes is left out, and who is at work.
    """
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file() and file.name != "trial.json" and file.parent.name != "leases"
    }
