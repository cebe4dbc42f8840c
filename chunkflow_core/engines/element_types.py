"""What a compiled network takes: the type of its input's elements, as its file declares it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, SpecError
from chunkflow_core.spec import VolumeSpec

BFLOAT16 = "bfloat16"
"""Name of the type that numpy does not have: the upper half of float32."""
_FLOATS = ("float16", BFLOAT16, "float32", "float64")
_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_LARGEST_HALF = float(np.finfo(np.float16).max)


def input_type(spec: VolumeSpec, declared: str) -> str:
    """The name of the type of a network's input, if the numbers of a spec can be given in it.

    Args:
        spec: The volume.
        declared: What the file declares, by numpy's name, or the format's own if there is none.

    Raises:
        SpecError: No numbers are made in this type, or those of the spec would not be the same in
            it.
    """
    path = spec.model.path
    if declared not in _FLOATS + _INTEGERS:
        raise SpecError(
            f"model.path: {path} takes {declared}, expected a network that takes {', '.join(_FLOATS + _INTEGERS)}. "
            "Convert its input"
        )
    if declared in _INTEGERS:
        _check_whole_numbers(spec, np.dtype(declared))
    return declared


def _check_whole_numbers(spec: VolumeSpec, dtype: np.dtype[Any]) -> None:
    """Refuse to give a network that takes integers anything that is none."""
    path, values, layer = spec.model.path, spec.input.values, np.dtype(spec.input_scale.dtype)
    if values.form != "raw":
        raise SpecError(
            f"input.values.scale: {path} takes {dtype}, the layer's numbers as they are, but the spec makes fractions "
            f"of them ({values.form}); set input.values to {{scale: raw}}"
        )
    if layer.itemsize > 2 or not np.can_cast(layer, dtype):
        raise SpecError(
            f"input.path: the layer has {layer} voxels, but {path} takes {dtype}, which does not hold them all; "
            "convert the layer, or the network's input"
        )
    if isinstance(values.clip, tuple):
        low, high = values.clip
        if not low.is_integer() or not high.is_integer() or not _holds(dtype, low, high):
            raise SpecError(
                f"input.values.clip: [{low:g}, {high:g}]: {path} takes {dtype}, expected two integers of that type"
            )


def _holds(dtype: np.dtype[Any], low: float, high: float) -> bool:
    limits = np.iinfo(dtype)
    return int(limits.min) <= low and high <= int(limits.max)


def cast(patches: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Patches in the type that the network takes; float16 and bfloat16 round to nearest.

    Those of bfloat16 are its bits, in uint16.

    Raises:
        DataError: A number is larger than the type goes.
    """
    if dtype == "float32":
        return patches
    if dtype == BFLOAT16:
        return _to_bfloat16(patches)
    if dtype == "float16":
        check_half(float(np.abs(patches).max()))
    return patches.astype(dtype)


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest numbers of bfloat16, half to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    even = (bits >> 16) & 1
    rounded = (bits + (np.uint32(2**15 - 1) + even)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def of_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers of bfloat16 with some bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def check_half(largest: float) -> None:
    """Check that float16 holds numbers up to some size; NaN is told by the output.

    Raises:
        DataError: It doesn't.
    """
    if largest > _LARGEST_HALF:
        raise DataError(
            f"the model takes float16, which ends at {_LARGEST_HALF:g}, and a patch has a number of size {largest:g}; "
            "set input.values so that numbers are smaller, such as scale: unit, or clip"
        )
