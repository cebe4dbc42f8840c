"""A small real volume on disk, for tests of the stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from chunkflow_core.geometry import Box
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.stages import Workspace
from chunkflow_core.volumes import NewLayer

SHAPE = (20, 48, 40)


def write_volume(folder: Path, **changes: object) -> Path:
    """Write an input layer and a spec of 2 × 2 × 2 blocks into ``folder``; return the spec's path."""
    data = np.random.default_rng(1).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    layer = NewLayer(f"file://{folder}/input", SHAPE, dtype="uint8", resolution=(40, 4, 4), chunk=(8, 16, 16))
    layer.write(Box((0, 0, 0), SHAPE), data)
    spec = {
        "name": "small",
        "input": {"path": f"file://{folder}/input"},
        "output": {"path": f"file://{folder}/output", "channels": 2, "dtype": "float32", "chunk_size": [4, 8, 8]},
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_size": [8, 16, 16],
        "patch_overlap": [2, 4, 4],
        "block_size": [12, 24, 24],
        "model": {"engine": "identity"},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return path


def output_of(path: Path) -> NDArray[np.generic]:
    """The whole output of a spec."""
    spec: VolumeSpec = load_spec(path)
    return Workspace(spec).output.read(spec.grid.roi)


def files_below(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
