"""Runs the test tensors of a package as a volume of one patch, and compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.planning.planner import Request, plan
from chunkflow_core.spec import parse_spec
from chunkflow_core.steps.local import run_here
from chunkflow_core.steps.packages.package import Package, TestTensors
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer

_LAYERS = ("uint8", "uint16", "int8", "int16", "float32")
"""Dtypes that a test tensor keeps as a layer; others become float32."""


@dataclass(frozen=True)
class Outcome:
    """How near the output was."""

    difference: float
    """Largest difference to an expected number."""
    mismatches: float
    """Numbers in a million that differ by more than the package says."""
    is_within: bool
    """Whether there are no more of them than it says."""


def try_package(package: Package, tests: TestTensors, folder: Path) -> Outcome:
    """Run a package's test tensors, all the way from a layer to a layer.

    Args:
        package: The package; its patches are as large as the tensors.
        tests: Its test tensors.
        folder: An empty folder to work in.

    Raises:
        DataError: The tensors are none of one patch, or the network gives another shape.
        SpecError, MissingInputError: The model can't be run.
    """
    given, expected = _volume(tests.given), _volume(tests.expected)
    if not np.isfinite(expected).all():
        raise DataError(f"{tests.expected}: expected finite numbers")
    size, result = vector(given.shape[1:]), vector(expected.shape[1:])
    halo = vector((n - m) // 2 for n, m in zip(size, result, strict=True))
    _layer(f"file://{folder}/input", given, size)
    largest = 2.0 * max(1.0, float(np.abs(expected).max()))
    content = package.sections | {
        "name": "test",
        "input": {"path": f"file://{folder}/input"} | package.sections["input"],
        "exchange": {"path": f"file://{folder}/exchange"},
        "roi": [list(halo), [h + n for h, n in zip(halo, result, strict=True)]],
        "patch_size": list(size),
        "output_patch_size": list(result),
        "patch_overlap": [0, 0, 0],
        "block_size": list(result),
        "skip": {"zeros": False},
    }
    content["output"] = {
        "path": f"file://{folder}/output",
        "channels": len(expected),
        "dtype": "float32",
        "range": [-largest, largest],
        "chunk_size": list(result),
    }
    spec = parse_spec(content, source=package.title, folder=".")
    workspace = Workspace(spec)
    prepare(workspace, run="test")
    due = plan(spec, Request(), workspace.state(confirm=True))
    for _ in run_here(workspace, due, "test", lambda: None):
        pass
    return _compared(workspace.output.read(spec.grid.roi), expected, tests)


def _compared(output: NDArray[Any], expected: NDArray[Any], tests: TestTensors) -> Outcome:
    difference = np.abs(output.astype(np.float64) - expected)
    wrong = difference > tests.absolute + tests.relative * np.abs(expected)
    mismatches = 1e6 * float(np.mean(wrong))
    return Outcome(float(difference.max()), mismatches, mismatches <= tests.mismatches)


def _volume(file: Path) -> NDArray[Any]:
    """The only patch of a tensor, ``(channels, z, y, x)``."""
    array = np.load(file, allow_pickle=False)
    if len(array) != 1:
        raise DataError(f"{file}: has {len(array)} patches in a batch, expected 1")
    volume: NDArray[Any] = array[0] if array.ndim == 5 else array[0][:, None]
    return volume


def _layer(path: str, array: NDArray[Any], size: Vector) -> None:
    dtype = str(array.dtype) if str(array.dtype) in _LAYERS else "float32"
    layer = NewLayer(path, size, dtype=dtype, resolution=(1, 1, 1), chunk=size, channels=len(array))
    layer.write(Box((0, 0, 0), size), array.astype(dtype))
