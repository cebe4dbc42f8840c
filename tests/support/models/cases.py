"""An engine with a model, for what is asked of every engine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.models.two_convolutions import onnx_file, openvino_file, python_file

STREAMS = 3
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@dataclass(frozen=True)
class Case:
    """An engine with a model."""

    path: Path
    expected: NDArray[np.float32]
    """Outputs of ``patches()`` by PyTorch in float32."""
    tolerance: float


CASES: dict[str, Any] = {
    "identity": lambda folder: {"engine": "identity"},
    "pytorch": lambda folder: python_file(folder, engine="pytorch"),
    "pytorch bfloat16": lambda folder: python_file(folder, engine="pytorch", precision="bfloat16"),
    "pytorch two threads": lambda folder: python_file(folder, engine="pytorch", threads=2),
    "pytorch compiled": lambda folder: python_file(folder, engine="pytorch", compile=True),
    "openvino": lambda folder: python_file(folder, engine="openvino"),
    "openvino two threads": lambda folder: python_file(folder, engine="openvino", threads=2),
    "openvino bfloat16": lambda folder: python_file(folder, engine="openvino", precision="bfloat16"),
    "openvino xml": lambda folder: openvino_file(folder, engine="openvino"),
    "openvino onnx": lambda folder: onnx_file(folder, engine="openvino"),
    "onnx": lambda folder: onnx_file(folder, engine="onnx"),
    "pznet module": ...,
    "pznet package": ...,
}


def can(precision: str) -> bool:
    """Whether OpenVINO can compute in a precision here."""
    import openvino

    return precision in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
