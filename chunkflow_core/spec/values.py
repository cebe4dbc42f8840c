"""The section ``input.values``: which numbers the network gets for the voxels of the layer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from chunkflow_core.errors import SpecError

_LARGEST, _SMALLEST = 2.0**100, 2.0**-100
"""Largest number that a key may have, and least standard deviation, far from where float32 ends."""
_MEASURED = "measured"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _per_channel(value: Any) -> Any:
    if value is None or value == _MEASURED:
        return value
    numbers = value if isinstance(value, list | tuple) else [value]
    if not numbers or not all(map(_is_number, numbers)):
        raise ValueError("expected a number within ±2^100, a list with one for each channel, or measured")
    return tuple(map(float, numbers)) if isinstance(value, list | tuple) else float(value)


def _deviations(value: Any) -> Any:
    value = _per_channel(value)
    for number in value if isinstance(value, tuple) else [value]:
        if isinstance(number, float) and number < _SMALLEST:
            raise ValueError("expected numbers > 0 (2^-100 or more)")
    return value


def _two_percentiles(value: Any) -> Any:
    if value is None:
        return value
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
    if not pair or not 0 <= value[0] < value[1] <= 100:
        raise ValueError("expected [low, high], two percentiles from 0 to 100, low < high, such as [1, 99]")
    return tuple(map(float, value))


def _limits(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
    if not pair or not np.float32(value[0]) < np.float32(value[1]):
        raise ValueError("expected true, false, or [low, high], two numbers within ±2^100 with low < high in float32")
    return tuple(map(float, value))


class ValuesSpec(BaseModel):
    """Which numbers the network gets for the voxels of the layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scale: Literal["unit", "raw", "symmetric"] | None = None
    """What voxels are divided by, whatever is in them: ``unit`` takes unsigned integers of the
    layer's dtype to 0–1, signed ones to about −1–1, and floats as they are; ``symmetric`` takes the
    whole range of an integer dtype to −1–1; ``raw`` takes all numbers as they are. Default:
    `unit`, unless ``mean`` or ``percentiles`` is given.
    """
    mean: Annotated[float | tuple[float, ...] | Literal["measured"] | None, BeforeValidator(_per_channel)] = None
    """What is taken away before the division by ``std``, in the layer's own units: a number, a list
    with one for each channel, or ``measured``, each channel's mean.
    """
    std: Annotated[float | tuple[float, ...] | Literal["measured"] | None, BeforeValidator(_deviations)] = None
    """What is divided by after ``mean`` has been taken away: likewise, or ``measured``, each
    channel's standard deviation.
    """
    percentiles: Annotated[tuple[float, float] | None, BeforeValidator(_two_percentiles)] = None
    """``[low, high]``: these percentiles of each channel become 0 and 1. What is beyond goes beyond
    0 and 1, unless ``clip`` is set.
    """
    per_section: bool = False
    """Whether what is measured is measured in each section z by itself, not in the whole ROI."""
    mip: int | None = Field(None, ge=0)
    """Scale of the layer whose voxels are measured; a coarser one is read faster.

    Default: ``input.mip``.
    """
    count_zeros: bool = False
    """Whether voxels of 0 count when something is measured: they may stand for what is missing."""
    clip: Annotated[bool | tuple[float, float], BeforeValidator(_limits)] = False
    """``[low, high]``: the network gets nothing beyond these numbers. ``true`` is 0 to 1 for
    ``unit`` and ``percentiles``, and −1 to 1 for ``symmetric``.
    """
    invert: bool = False
    """Whether dark becomes bright: v becomes 1 − v for ``unit`` and ``percentiles``, −v for
    ``symmetric`` and ``mean``, and for ``raw`` the other end of the dtype's range. It comes before
    ``clip``.
    """

    @model_validator(mode="after")
    def _one_form(self) -> ValuesSpec:
        given = {"scale": self.scale, "mean": self.mean, "std": self.std, "percentiles": self.percentiles}
        named = [key for key, value in given.items() if value is not None]
        if ("mean" in named) != ("std" in named):
            raise ValueError(f"{named[0]}: mean and std go together, expected both or none")
        if (self.mean == _MEASURED) != (self.std == _MEASURED):
            raise ValueError("mean: mean and std go together, expected numbers for both, or measured for both")
        if len([key for key in named if key != "std"]) > 1:
            raise ValueError(f"{named[0]}: expected one of scale, mean with std, and percentiles; got {named}")
        if not self.is_measured:
            for key in ("per_section", "mip", "count_zeros"):
                if getattr(self, key) not in (False, None):
                    raise ValueError(f"{key}: only for what is measured: percentiles, or mean and std: measured")
        if self.clip is True and self.form in ("raw", "mean"):
            raise ValueError(f"clip: true: there is no range to clip to with {self.form}, expected [low, high]")
        return self

    @property
    def form(self) -> Literal["unit", "raw", "symmetric", "mean", "percentiles"]:
        """What the numbers are made by."""
        if self.percentiles is not None:
            return "percentiles"
        return "mean" if self.mean is not None else self.scale or "unit"

    @property
    def is_measured(self) -> bool:
        """Whether ``prepare`` has to measure something in the layer."""
        return self.percentiles is not None or self.mean == _MEASURED

    @property
    def is_default(self) -> bool:
        """Whether the numbers are those of a spec without this section."""
        return self in (ValuesSpec(), ValuesSpec(scale="unit"))

    def check_layer(self, dtype: str, channels: int) -> None:
        """Check that the section makes sense for a layer.

        Args:
            dtype: Of the layer's voxels.
            channels: Number of the layer's channels.

        Raises:
            SpecError: It doesn't. The message names the key.
        """
        kind = np.dtype(dtype).kind
        for key in ("mean", "std"):
            numbers = getattr(self, key)
            if isinstance(numbers, tuple) and len(numbers) != channels:
                raise SpecError(f"input.values.{key}: {len(numbers)} numbers, the input layer has {channels} channels")
        if kind == "f" and self.form == "symmetric":
            raise SpecError(
                f"input.values.scale: symmetric: the input layer has {dtype} voxels, whose range says nothing; "
                "expected unit or raw (as they are), mean and std, or percentiles"
            )
        if kind == "f" and self.form == "raw" and self.invert:
            raise SpecError(
                f"input.values.invert: the input layer has {dtype} voxels, whose range says nothing: raw ones can't be "
                "inverted. Expected unit (for voxels from 0 to 1), mean and std, or percentiles"
            )
        if kind == "i" and self.form == "unit":
            self._check_signed(dtype)

    def _check_signed(self, dtype: str) -> None:
        for key in [key for key in ("clip", "invert") if getattr(self, key) is True]:
            raise SpecError(
                f"input.values.{key}: true: the input layer has {dtype} voxels, which scale: unit takes to about -1 to "
                "1, not to 0 to 1; expected scale: symmetric, mean and std, or percentiles"
                + ("; or clip: [low, high]" if key == "clip" else "")
            )
