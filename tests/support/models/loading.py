"""The engine of a spec, and patches to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.spec import load_spec

MakeSpec = Callable[..., Path]
Section = dict[str, Any]
"""A section of a spec."""

BATCH = 3
PATCH = (8, 16, 16)


def patches(count: int = BATCH) -> NDArray[np.float32]:
    return np.random.default_rng(3).random((count, 1, *PATCH), np.float32)


def load(path: Path, *overrides: str) -> Engine:
    return load_engine(load_spec(path, overrides))
