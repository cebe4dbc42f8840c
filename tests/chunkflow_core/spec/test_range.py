"""The widest and the narrowest ``output.range``: sums are exact in them as they are in others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkflow_core.lattice.conversion import Conversion
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.lattice.weights import ExactStep
from chunkflow_core.spec import VolumeSpec, load_spec

MakeSpec = Callable[..., Path]


def blended(spec: VolumeSpec, unit: float, dtype: str) -> NDArray[Any]:
    """What becomes of random patches of values over the whole range, which is ``unit`` wide."""
    grid, (low, high) = spec.grid, spec.output.range
    slab = Slab(grid, grid.roi, grid.roi.shape[0], 1, ExactStep(low, high))
    random = np.random.default_rng(0)
    for z, y, x in np.ndindex(*(axis.count for axis in grid.axes)):
        patch = random.random((1, *grid.patch), np.float32)
        patch[0, 0, 0, :2] = 0, 1
        patch = patch * np.float32(unit) + np.float32(low)
        assert slab.add((z, y, x), patch, limits=(low, high))
    return slab.converted(grid.roi, Conversion(dtype, slab.values))


@pytest.mark.parametrize("exponent", [-100, 126])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_of_what_is_taken_give_the_same_bits(make_spec: MakeSpec, exponent: int, sign: int) -> None:
    unit = 2.0**exponent
    usual, least_or_largest = (
        load_spec(make_spec(), [f"output.range=[{min(0, sign * size)}, {max(0, sign * size)}]"]) for size in (1.0, unit)
    )
    expected = blended(usual, 1.0, "float32")
    np.testing.assert_array_equal(blended(least_or_largest, unit, "float32") / np.float32(unit), expected)
    for dtype in ("uint8", "uint16"):
        np.testing.assert_array_equal(blended(least_or_largest, unit, dtype), blended(usual, 1.0, dtype))
    assert len(np.unique(expected)) > 1000


def test_the_widest_range_around_zero(make_spec: MakeSpec) -> None:
    usual, widest = (load_spec(make_spec(), [f"output.range=[{-size!r}, {size!r}]"]) for size in (1.0, 2.0**126))
    for dtype in ("uint8", "uint16"):
        np.testing.assert_array_equal(blended(widest, 2.0**127, dtype), blended(usual, 2.0, dtype))
