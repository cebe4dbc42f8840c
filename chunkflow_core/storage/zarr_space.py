"""Which axis each dimension of an array of zarr or N5 is, and where its voxels are in space.

Sources: the `OME-Zarr specifications <https://ngff.openmicroscopy.org>`_, N5's attributes as
`n5-universe <https://github.com/saalfeldlab/n5-universe>`_, BigStitcher, `fibsem-tools
<https://github.com/janelia-cellmap/fibsem-tools>`_ and `TensorStore
<https://google.github.io/tensorstore/driver/n5>`_ have them, and what `funlib.persistence
<https://github.com/funkelab/funlib.persistence>`_ writes beside an array.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from chunkflow_core.storage.units import nanometres_in

_NAMES: Final = {
    **dict.fromkeys(("t", "time"), "t"),
    **dict.fromkeys(("c", "c^", "channel", "channels"), "c"),
    **dict.fromkeys(("z", "depth"), "z"),
    **dict.fromkeys(("y", "height"), "y"),
    **dict.fromkeys(("x", "width"), "x"),
}
"""Axes by the names that are in use, in small letters."""

_BY_RANK: Final = {2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}
"""What dimensions are, by their number, where nothing says so; in N5 the other way round."""

_QUANTITY: Final = re.compile(r"\s*([0-9.eE+-]*)\s*([^\W\d]*)\s*")


class UnclearError(ValueError):
    """Metadata can't be understood."""


@dataclass(frozen=True)
class Space:
    """Where an array is, by its dimensions."""

    letters: str
    """What each dimension is: a letter of ``tczyx``."""
    step: tuple[float, ...]
    """Size of a voxel in nm; 0 if it is not known."""
    start: tuple[float, ...]
    """Position of the first voxel, in voxels."""


def ome_space(image: dict[str, Any], dataset: dict[str, Any], rank: int, *, is_n5: bool) -> Space:
    """Where one of the arrays of an image is, by the ``multiscales`` of OME.

    Args:
        image: The image.
        dataset: What it says of the array.
        rank: Number of the array's dimensions.
        is_n5: Whether the array is one of N5, whose dimensions are in the order of Fortran.
    """
    if transform := dataset.get("transform"):
        return _cosem_space(transform, is_n5=is_n5)
    axes = image.get("axes") or (list(_BY_RANK[5][::-1] if is_n5 else _BY_RANK[5]) if rank == 5 else [])
    if len(axes) != rank:
        raise UnclearError(f"axes {axes} of an array of {rank} dimensions")
    names = [axis if isinstance(axis, str) else axis["name"] for axis in axes]
    units = [None if isinstance(axis, str) else axis.get("unit") for axis in axes]
    step, start, is_said = np.ones(rank), np.zeros(rank), False
    for change in [*dataset.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]:
        if change["type"] == "scale":
            factors, is_said = _numbers(change["scale"], rank), True
            step, start = step * factors, start * factors
        elif change["type"] == "translation":
            start = start + _numbers(change["translation"], rank)
        elif change["type"] != "identity":
            raise UnclearError(f"coordinate transformation of type {change['type']}, expected scale and translation")
    nm = np.array([_nanometres(unit) for unit in units]) * is_said
    return Space(_letters(names), tuple(step * nm), _in_voxels(start, step))


def _cosem_space(transform: dict[str, Any], *, is_n5: bool) -> Space:
    """Where an array is by COSEM's attribute, whose order is that of C unless it says F."""
    units = transform.get("units") or [None] * len(transform["axes"])
    rows = list(zip(transform["axes"], transform["scale"], transform["translate"], units, strict=True))
    is_fortran = str(transform.get("order", transform.get("ordering", "C"))).upper() == "F"
    names, scale, translate, units = zip(*(reversed(rows) if is_n5 != is_fortran else rows), strict=True)
    step, start = _numbers(scale, len(rows)), _numbers(translate, len(rows))
    nm = [_nanometres(unit) for unit in units]
    return Space(_letters(names), tuple(step * nm), _in_voxels(start, step))


def own_space(
    attributes: dict[str, Any], group: dict[str, Any], rank: int, names: Sequence[Any] | None, *, is_n5: bool
) -> Space:
    """Where an array is, by what stands beside it, or beside its group.

    Args:
        attributes: Of the array.
        group: Of the group above the array, and the array's ``key`` in it; empty if there is none.
        rank: Number of dimensions.
        names: Names of the dimensions, in their order, if the array has them.
        is_n5: Whether the array is one of N5.
    """
    if "transform" in attributes:
        return _cosem_space(attributes["transform"], is_n5=is_n5)
    if names is None:
        names = _BY_RANK.get(rank, "?" * rank)
        names = names[::-1] if is_n5 else names
    letters = _letters(names)
    spatial = [i for i, letter in enumerate(letters) if letter in "zyx"]
    if (quantities := attributes.get("dimension_units")) is not None:
        known = [_quantity(each) for each in quantities]
        return Space(letters, tuple(known[i] if i in spatial else 0.0 for i in range(rank)), (0.0,) * rank)
    size, units = _size_beside(attributes, group)
    step, start = np.zeros(rank), np.zeros(rank)
    if size is not None:
        sizes, offset = _of(spatial, rank, size), _of(spatial, rank, attributes.get("offset") or [0.0] * len(spatial))
        if isinstance(units, str) or len(units) == 1:
            units = [units if isinstance(units, str) else units[0]] * len(spatial)
        factors = [_nanometres(unit) for unit in _of(spatial, rank, units)]
        step[spatial] = np.array(sizes, float) * factors
        start[spatial] = np.array(_in_voxels(offset, sizes))
    return Space(letters, tuple(step), tuple(start))


def has_space(attributes: dict[str, Any], names: Sequence[Any] | None) -> bool:
    """Whether something stands beside an array about its axes, or its size."""
    own = ("transform", "dimension_units", "pixelResolution", "resolution", "voxel_size")
    return names is not None or any(key in attributes for key in own)


def _of(spatial: list[int], rank: int, values: Sequence[Any]) -> list[Any]:
    """Those of some values, one for each dimension or each of space, that are of space."""
    if len(values) == rank:
        return [values[i] for i in spatial]
    if len(values) == len(spatial):
        return list(values)
    raise UnclearError(f"{list(values)} for {rank} dimensions")


def _size_beside(attributes: dict[str, Any], group: dict[str, Any]) -> tuple[list[float] | None, Any]:
    """Voxel size by one of the attributes in use, and its units: one, or one for each value."""
    for place in (attributes, group):
        units = place.get("units") or ("nm" if place is attributes else "")
        found = place.get("pixelResolution") or place.get("resolution") or place.get("voxel_size")
        if isinstance(found, dict):
            found, units = found["dimensions"], found.get("unit") or units
        elif place is group and not units:  # BigDataViewer has it in a unit that stands elsewhere
            units = "" if place.get("multiScale") else "nm"
        if found:
            factors = attributes.get("downsamplingFactors") or (_factors_of(group) if place is group else None)
            return [a * b for a, b in zip(found, factors, strict=True)] if factors else found, units
    return None, ""


def _factors_of(group: dict[str, Any]) -> Any:
    """How much coarser than the group an array is, by the group's list."""
    number, scales = re.fullmatch(r"s(\d+)", group["key"]), group.get("scales") or group.get("downsamplingFactors")
    return scales[int(number[1])] if number and isinstance(scales, list) else None


def _quantity(value: Any) -> float:
    """Nanometres of one of TensorStore's quantities, such as ``"4 nm"`` or ``[4, "nm"]``."""
    number, unit = value if isinstance(value, list) else (None, value)
    if number is None:
        match = _QUANTITY.fullmatch(unit or "")
        number, unit = (float(match[1] or 1), match[2]) if match else (0.0, "")
    return float(number) * _nanometres(unit)


def _numbers(values: Any, rank: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if not isinstance(values, list | tuple) or len(values) != rank:
        raise UnclearError(f"{values!r:.100}, expected {rank} numbers")
    numbers = np.array(values, float)
    if not np.isfinite(numbers).all():
        raise UnclearError(f"{values!r:.100}, expected {rank} numbers")
    return numbers


def _in_voxels(start: Any, step: Any) -> tuple[float, ...]:
    return tuple(float(a) / float(b) if b else 0.0 for a, b in zip(start, step, strict=True))


def _letters(names: Sequence[Any]) -> str:
    """What dimensions are, a letter each, by their names."""
    found = [_NAMES.get(str(name).strip().lower(), "?") for name in names]
    if "?" in found:
        told = ", ".join(map(str, names))
        raise UnclearError(f"its dimensions are {told}, expected names such as z, y, x, c, t")
    return "".join(found)


def _nanometres(unit: Any) -> float:
    """Nanometres in a unit; 0 for one that is not known or not said."""
    return float(nanometres_in(str(unit or "")) or 0)
