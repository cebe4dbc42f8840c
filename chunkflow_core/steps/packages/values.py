"""Normalisations of packages as ``input.values`` says them.

What the steps of a package do to a voxel, one after the other, is a scaling with known or measured
numbers, and perhaps bounds at the end. What is something else can't be said in a spec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chunkflow_core.errors import SpecError

Values = dict[str, Any]
"""The section ``input.values``."""
Numbers = float | list[float]
"""One for all channels, or one for each."""

RAW: Values = {"scale": "raw"}


class Normalisation:
    """What the network gets for a voxel, built up step by step."""

    def __init__(self, where: str) -> None:
        """Start with the voxels as they are; ``where`` is the place of the steps, for messages."""
        self._where, self._values = where, dict(RAW)

    @property
    def values(self) -> Values:
        """The section ``input.values``."""
        return dict(self._values)

    def unfit(self, what: str) -> SpecError:
        """The error for a step that a spec can't say."""
        return SpecError(
            f"{self._where}: {what} can't be said in input.values; a .py file with pre_process can do it around the "
            "network (docs/models.md)"
        )

    def linear(self, gain: Numbers, offset: Numbers, what: str) -> None:
        """Take v to v · gain + offset."""
        if not self._is_fixed or self._values.get("invert"):
            raise self.unfit(f"{what} after other steps")
        gains = gain if isinstance(gain, list) else [gain]
        if all(g > 0 for g in gains):
            self._values = self._composed(_each(lambda g, o: 0.0 - o / g, gain, offset), _each(lambda g: 1 / g, gain))
        elif isinstance(gain, list) or isinstance(offset, list) or not gain or self._values != RAW:
            raise self.unfit(f"{what} by {gain}")
        else:
            self._values = {"mean": offset / -gain, "std": 1 / -gain, "invert": True}

    def fixed(self, mean: Numbers, std: Numbers) -> None:
        """Take v to (v − mean) ÷ std."""
        if not self._is_fixed or self._values.get("invert"):
            raise self.unfit("a second normalisation")
        self._values = self._composed(mean, std)

    def measured(self, values: Values, what: str) -> None:
        """Do what is measured in the layer."""
        if self._values != RAW:
            raise self.unfit(f"{what} after other steps")
        self._values = values

    def clip(self, low: float, high: float) -> None:
        """Bound the numbers."""
        if "clip" in self._values:
            raise self.unfit("a second clipping")
        self._values["clip"] = [float(low), float(high)]

    @property
    def _is_fixed(self) -> bool:
        return "clip" not in self._values and (
            self._values == RAW or isinstance(self._values.get("mean"), float | list)
        )

    def _composed(self, mean: Numbers, std: Numbers) -> Values:
        """What is there already, followed by (v − mean) ÷ std."""
        if self._values == RAW:
            return {"mean": _floats(mean), "std": _floats(std)}
        before_mean, before_std = self._values["mean"], self._values["std"]
        return {
            "mean": _each(lambda m, s, n: m + s * n, before_mean, before_std, mean),
            "std": _each(lambda s, t: s * t, before_std, std),
        }


def _floats(numbers: Numbers) -> Numbers:
    return [float(n) for n in numbers] if isinstance(numbers, list | tuple) else float(numbers)


def _each(function: Callable[..., float], *numbers: Numbers) -> Numbers:
    """A function of numbers, channel by channel if one of them is so."""
    lists: Sequence[list[float]] = [n for n in numbers if isinstance(n, list)]
    if not lists:
        return float(function(*numbers))
    columns = [n if isinstance(n, list) else [n] * len(lists[0]) for n in numbers]
    return [float(function(*row)) for row in zip(*columns, strict=True)]
