"""Which part of an array of any axes is the stack ``(z, y, x)``, and who has to say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, UsageError
from chunkflow_core.lattice.boxes import Vector

AXES = "ZYXCT"
"""Letters that ``--axes`` takes: sections, rows, columns, channels, time."""

_UNNAMED = "IQ"
"""tifffile's letters of axes of which a file says nothing: a sequence of pages, an unknown one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user says of a source that holds more than one stack, or less than one."""

    series: int | None = None
    """Number of the series of a TIFF file."""
    level: int = 0
    """Level of a pyramid in a TIFF file; 0 has the full resolution."""
    channel: int | None = None
    """Number along the axis of channels or samples (colours, alpha)."""
    time: int | None = None
    """Number along the axis of time."""
    axes: str | None = None
    """Axes of the array in their order, in letters of :data:`AXES`, whatever the file says."""
    gaps: Literal["error", "repeat", "blank"] = "error"
    """What stands for sections, or parts of an array, that are not there."""
    step: int = 1
    """Difference of the numbers of two successive files of a folder."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of an array that is the stack."""

    shape: Vector
    """Size of the stack in voxels, zyx."""
    z: int | None
    """The array's axis of sections; None if there is a single one."""
    fixed: tuple[int | None, ...]
    """For each axis of the array, the position that is taken; None for z, y, x."""
    order: tuple[int, ...]
    """Transposition of what is left of the array to (z,) y, x."""
    places: tuple[int | None, int, int]
    """The array's axes of z, y, x; that of z is None if no axis has its name."""

    def index(self, sections: slice) -> tuple[int | slice, ...]:
        """Index of some sections in the array."""
        return tuple(
            sections if axis == self.z else slice(None) if position is None else position
            for axis, position in enumerate(self.fixed)
        )

    def arrange(self, found: NDArray[Any]) -> NDArray[Any]:
        """What an index has given, as ``(z, y, x)``."""
        turned = found.transpose(self.order)
        return turned if self.z is not None else turned[None]


def select(name: str, shape: Sequence[int], axes: str | None, choice: Choice) -> Selection:
    """Find the stack in an array.

    Axes of one element are passed over. Channels and times are chosen by the user, never by
    this function.

    Args:
        name: Name of the source for messages.
        shape: Shape of the array.
        axes: Letter of each axis as the file says, upper case; None if it says nothing.
        choice: What the user says.

    Raises:
        DataError: The array holds more than a stack, and nobody says which part to take.
        UsageError: What the user says does not fit the array.
    """
    axes = _given(name, shape, choice.axes) if choice.axes else axes or _usual(name, shape)
    kept = {axis: a for axis, a in zip(axes, range(len(shape)), strict=True) if shape[a] != 1 or axis in "YX"}
    if not {"Y", "X"} <= kept.keys() or len(kept) != sum(n != 1 or a in "YX" for n, a in zip(shape, axes, strict=True)):
        raise DataError(f"{name}: has the axes {axes} {_shown(shape)}, expected z, y and x; name them with --axes")
    fixed: list[int | None] = [0] * len(shape)
    z = _sections(kept)
    chosen = _chosen(kept, choice)
    for axis, a in kept.items():
        if axis in chosen:
            fixed[a] = _position(name, axis, shape[a], chosen[axis])
        elif axis in ("Y", "X", z):
            fixed[a] = None
        else:
            raise DataError(_too_many(name, axis, shape, axes))
    _check_used(name, kept, choice)
    named = axes.index("Z") if "Z" in axes else None
    return _selection(shape, (kept.get(z, named), kept["Y"], kept["X"]), tuple(fixed), kept.get(z))


def _selection(
    shape: Sequence[int], places: tuple[int | None, int, int], fixed: tuple[int | None, ...], z: int | None
) -> Selection:
    spatial = [a for a in (z, *places[1:]) if a is not None]
    left = sorted(spatial)
    size = [shape[a] for a in spatial]
    full = (1, *size) if z is None else tuple(size)
    return Selection((full[0], full[1], full[2]), z, fixed, tuple(left.index(a) for a in spatial), places)


def _given(name: str, shape: Sequence[int], axes: str) -> str:
    if len(axes) != len(shape):
        raise UsageError(
            f"{name}: --axes {axes} names {len(axes)} axes, the array has {len(shape)} dimensions {_shown(shape)}"
        )
    return axes


def _usual(name: str, shape: Sequence[int]) -> str:
    """Axes of an array of which nothing is said: z, y, x, with axes of one element among them."""
    found = {
        "".join(dict(zip(places, "ZYX", strict=True)).get(a, "I") for a in range(len(shape)))
        for places in combinations(range(len(shape)), 3)
        if all(shape[a] == 1 for a in range(len(shape)) if a not in places)
    }
    if len({tuple(shape[axes.index(letter)] for letter in "ZYX") for axes in found}) != 1:
        raise DataError(
            f"{name}: has {len(shape)} dimensions {_shown(shape)}, expected 3 (z, y, x); name them with --axes, such "
            "as --axes CZYX --channel 0"
        )
    return min(found)


def _sections(kept: dict[str, int]) -> str:
    """The axis of sections, or an empty text if there is a single one."""
    return next((axis for axis in ("Z", *_UNNAMED) if axis in kept), "")


def _chosen(kept: dict[str, int], choice: Choice) -> dict[str, int]:
    channel = "C" if "C" in kept else "S"
    said = {channel: choice.channel, "T": choice.time}
    return {axis: number for axis, number in said.items() if number is not None and axis in kept}


def _check_used(name: str, kept: dict[str, int], choice: Choice) -> None:
    """Check that what was chosen is there; 0 is, of an axis of one element."""
    if choice.channel and not kept.keys() & {"C", "S"}:
        raise UsageError(f"{name}: has one channel, there is no --channel {choice.channel}")
    if choice.time and "T" not in kept:
        raise UsageError(f"{name}: has one point in time, there is no --time {choice.time}")


def _position(name: str, axis: str, size: int, number: int) -> int:
    if number >= size:
        option = "--time" if axis == "T" else "--channel"
        raise UsageError(f"{name}: there is no {option} {number}, expected 0 to {size - 1}")
    return number


def _too_many(name: str, axis: str, shape: Sequence[int], axes: str) -> str:
    size = shape[axes.index(axis)]
    held = f"{name}: has {len(shape)} dimensions {_shown(shape)} ({axes}), expected 3 (z, y, x)"
    sections = f", or --axes {axes.replace(axis, 'Z')} if they are sections" if "Z" not in axes else ""
    match axis:
        case "S":
            return f"{held}; expected grey images: choose one of {size} colours or samples with --channel N (from 0)"
        case "C":
            return f"{held}; choose one of {size} channels with --channel N (from 0){sections}"
        case "T":
            return f"{held}; choose one of {size} points in time with --time N (from 0){sections}"
    return f"{held}; name its axes with --axes, of the letters {AXES}"


def _shown(shape: Sequence[int]) -> str:
    return str(tuple(map(int, shape)))


def axes_letters(text: str) -> str:
    """Check the value of ``--axes``, and return it in upper case; ``ValueError`` if it is none."""
    axes = text.upper()
    if set(axes) - set(AXES) or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes):
        raise ValueError(f"expected different letters of {AXES}, Y and X among them")
    return axes


def native(array: NDArray[Any]) -> NDArray[Any]:
    """The array in this machine's byte order."""
    return np.asarray(array, array.dtype.newbyteorder("="))
