"""What ``prepare`` measures in the input layer, for numbers that depend on what is in it.

It is measured on the grid of the layer's storage chunks, which no block decides, and stored in the
epoch's folder of the exchange, where all stages read it: no two blocks have other numbers. What has
been measured stays as it is as long as the epoch lasts; sections that come to the layer later are
added to it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError, SpecError
from chunkflow_core.inference.reading import read_ahead
from chunkflow_core.inference.values import Measured, Pair
from chunkflow_core.lattice.boxes import Box, Vector, indices, vector
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.digests import checksum
from chunkflow_core.storage.files import open_files, put_file, storage_errors
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.layers import InputLayer, padded_positions

log = logging.getLogger(__name__)

_NAME: Final = "values.json"
_WIDEST: Final = 1024
"""Length of what is read at a time along y and x, in voxels, unless storage chunks are longer."""
_AHEAD: Final = 4
"""Number of pieces that are read ahead."""
_BINS: Final = 2**16
_NO_CONTRAST: Final[Pair] = (0.0, math.inf)
"""What makes 0 of all voxels."""

Rows = dict[tuple[int, int], NDArray[Any]]
"""Voxels that count, by channel and section; by channel and 0 where sections are one."""
Tiles = Callable[[], Iterator[Rows]]
"""Gives all of a region, piece by piece, as often as it is asked."""


def measure(spec: VolumeSpec, known: Measured | None = None) -> Measured:
    """Measure what a spec needs in its input layer.

    Args:
        spec: Its ``input.values`` says what to measure.
        known: What has been measured before, and stays as it is.

    Raises:
        DataError: There is nothing to measure: nothing counts in the ROI, or all is the same.
        MissingInputError: The layer has no such mip, or a storage chunk isn't there.
        SpecError: The mip can't be used.
        StorageError: The storage does not answer.
    """
    region = _Region(spec)
    if not spec.input.values.per_section:
        return known or Measured(whole=region.whole())
    sections = dict((known.sections if known else None) or {})
    missing = sorted(_sections_read(spec).difference(sections))
    sections |= region.sections(missing)
    return Measured(sections=sections)


def stored(path: str) -> Measured | None:
    """What is stored in an epoch's folder; None if nothing is.

    Raises:
        DataError: What is stored is damaged.
        StorageError: The storage does not answer.
    """
    with storage_errors(f"reading {path}/{_NAME}"):
        content = open_files(path).get(_NAME)
    if content is None:
        return None
    try:
        facts = json.loads(content)
        values = facts["values"]
        if facts["checksum"] != checksum(json.dumps(values).encode()):
            raise ValueError("its checksum is another")
        sections = values["sections"]
        return Measured(
            _unpacked(values["whole"]),
            None if sections is None else {int(z): _unpacked(pairs) for z, pairs in sections.items()},
        )
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}/{_NAME}, what was measured of the input, is damaged ({error}): delete it, and run `prepare` "
            "again, which measures anew and has all blocks done again"
        ) from error


def store(path: str, measured: Measured) -> None:
    """Store what has been measured in an epoch's folder."""
    sections = measured.sections
    values = {
        "whole": _packed(measured.whole),
        "sections": None if sections is None else {str(z): _packed(sections[z]) for z in sorted(sections)},
    }
    content = {"checksum": checksum(json.dumps(values).encode()), "values": values}
    put_file(path, _NAME, json.dumps(content).encode())


def needed(path: str) -> Measured:
    """What is stored in an epoch's folder, for whoever can't do without; errors as ``stored``.

    Raises:
        MissingInputError: Nothing is stored.
    """
    found = stored(path)
    if found is None:
        raise MissingInputError(
            f"{path}/{_NAME}: there is nothing that was measured of the input, as input.values needs; run "
            "`chunkflow-core prepare SPEC`"
        )
    return found


def _packed(pairs: Iterable[Pair]) -> list[list[float | None]]:
    return [[shift, divisor if math.isfinite(divisor) else None] for shift, divisor in pairs]


def _unpacked(pairs: list[list[float | None]]) -> tuple[Pair, ...]:
    return tuple((float(shift or 0.0), math.inf if divisor is None else float(divisor)) for shift, divisor in pairs)


def _sections_read(spec: VolumeSpec) -> set[int]:
    """The sections, inside the input's bounds, whose voxels any patch gets."""
    axis, bounds, halo = spec.grid.axes[0], spec.input_bounds, spec.halo[0]
    start = spec.grid.roi.start[0]
    stop = start + (axis.count - 1) * spec.grid.stride[0] + spec.output_size[0]
    low, high = bounds.start[0], bounds.stop[0]
    return set(padded_positions(start - halo, stop + halo, low, high, spec.input.padding).tolist())


class _Region:
    """The ROI in the scale that is measured."""

    def __init__(self, spec: VolumeSpec) -> None:
        values = spec.input.values
        self._spec, self._values = spec, values
        self._mip = spec.input.mip if values.mip is None else values.mip
        self._scale = spec.input_scale if self._mip == spec.input.mip else read_scale(spec.input.path, self._mip)
        advice = "If missing chunks of this layer mean zeros, set input.fill_missing: true"
        self._layer = InputLayer(
            spec.input.path,
            self._mip,
            self._scale,
            self._scale.bounds,
            padding="edge",
            fill_missing=bool(spec.input.fill_missing),
            advice=advice,
        )
        ratios = [self._ratio(axis) for axis in range(3)]
        self._same_depth = ratios[0] == 1
        start = vector(math.floor(a * r) for a, r in zip(spec.grid.roi.start, ratios, strict=True))
        stop = vector(math.ceil(b * r) for b, r in zip(spec.grid.roi.stop, ratios, strict=True))
        self._box = Box(start, stop)
        if not self._box & self._scale.bounds:
            raise SpecError(
                f"input.values.mip: {self._mip}: this scale has {self._scale.bounds}, nothing of the ROI, which is "
                f"{self._box} there"
            )

    def _ratio(self, axis: int) -> Fraction:
        """Voxels of the measured scale for a voxel of the input's, along an axis."""
        own, measured = (Fraction(str(scale.resolution[axis])) for scale in (self._spec.input_scale, self._scale))
        if own == measured:
            return Fraction(1)
        if not own or not measured:
            raise SpecError(f"input.values.mip: {self._mip}: the layer does not say how large its voxels are")
        return own / measured

    def whole(self) -> tuple[Pair, ...]:
        """Shift and divisor of each channel in the whole ROI."""
        log.info("measuring the input's voxels: mip %d, %s", self._mip, self._box & self._scale.bounds)
        found = self._pairs(lambda: self._rows(self._box & self._scale.bounds, by_section=False), range(1))
        if _NO_CONTRAST in found[0]:
            what = "count_zeros: true counts zeros" if not self._values.count_zeros else "there is no contrast"
            raise DataError(
                f"input.values: all voxels of {self._spec.input.path}, mip {self._mip}, {self._box}, that count are "
                f"the same, or none does ({what}): nothing can be made of them by {self._values.form}"
            )
        return found[0]

    def sections(self, wanted: list[int]) -> dict[int, tuple[Pair, ...]]:
        """Shift and divisor of each channel in each of some sections, by z."""
        if wanted and not self._same_depth:
            raise SpecError(
                f"input.values.mip: {self._mip}: its voxels are {self._scale.resolution[0]} nm deep, those of "
                f"input.mip {self._spec.input_scale.resolution[0]} nm; per_section needs sections of the same depth"
            )
        found: dict[int, tuple[Pair, ...]] = {}
        for slab in self._slabs(wanted):
            log.info("measuring the input's voxels: mip %d, %s", self._mip, slab)
            sections = range(slab.start[0], slab.stop[0])
            wanted_here = set(wanted).intersection(sections)
            pairs = self._pairs(lambda slab=slab: self._rows(slab, by_section=True), sections)  # type: ignore[misc]
            found |= {z: pairs[z] for z in wanted_here}
        return {z: found.get(z, (_NO_CONTRAST,) * self._scale.channels) for z in wanted}

    def _slabs(self, wanted: list[int]) -> Iterator[Box]:
        """Boxes as deep as storage chunks, or less, that hold the sections that are wanted."""
        depth, origin = self._scale.chunk[0], self._scale.bounds.start[0]
        for _, group in groupby(wanted, key=lambda z: (z - origin) // depth):
            here = list(group)
            slab = self._box.with_z(here[0], here[-1] + 1) & self._scale.bounds
            if slab:
                yield slab

    def _rows(self, box: Box, *, by_section: bool) -> Iterator[Rows]:
        """The voxels of a box that count, piece by piece, on the grid of storage chunks."""
        for piece, data in read_ahead(_pieces(self._scale, box), self._layer.read, _AHEAD):
            rows: Rows = {}
            for channel, voxels in enumerate(data):
                parts = [(z, voxels[z - piece.start[0]]) for z in range(piece.start[0], piece.stop[0])]
                for z, part in parts if by_section else [(0, voxels)]:
                    rows[channel, z] = self._counting(part.ravel())
            yield rows

    def _counting(self, voxels: NDArray[Any]) -> NDArray[Any]:
        if not self._values.count_zeros:
            voxels = voxels[voxels != 0]
        return voxels[np.isfinite(voxels)] if voxels.dtype.kind == "f" else voxels

    def _pairs(self, tiles: Tiles, sections: Iterable[int]) -> dict[int, tuple[Pair, ...]]:
        if self._values.percentiles is not None:
            ends = _percentiles(tiles, np.dtype(self._scale.dtype), self._values.percentiles)
        else:
            ends = _moments(tiles)
        channels = range(self._scale.channels)
        return {z: tuple(_pair(ends.get((channel, z))) for channel in channels) for z in sections}


def _pair(numbers: tuple[np.float32, np.float32] | None) -> Pair:
    """Shift and divisor, where there are some and they tell voxels apart."""
    if numbers is None or not 0 < numbers[1] < np.inf or not np.isfinite(numbers[0]):
        return _NO_CONTRAST
    return float(numbers[0]), float(numbers[1])


def _pieces(scale: LayerScale, box: Box) -> list[Box]:
    """A box inside a scale, cut at multiples of its storage chunks."""
    step = vector([scale.chunk[0], *(c * max(1, _WIDEST // c) for c in scale.chunk[1:])])
    first, last = (
        vector((p - o) // s for p, o, s in zip(corner, scale.bounds.start, step, strict=True))
        for corner in (box.start, vector(p - 1 for p in box.stop))
    )

    def piece(index: Vector) -> Box:
        start = vector(o + i * s for o, i, s in zip(scale.bounds.start, index, step, strict=True))
        return Box(start, vector(a + s for a, s in zip(start, step, strict=True))) & box

    return [piece(index) for index in indices(first, vector(i + 1 for i in last))]


def _moments(tiles: Tiles) -> dict[tuple[int, int], tuple[np.float32, np.float32]]:
    """Mean and standard deviation of each row, computed in float64.

    Source of the way to put parts together: T. F. Chan, G. H. Golub, R. J. LeVeque, Updating
    formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    found: dict[tuple[int, int], tuple[int, float, float]] = {}
    for rows in tiles():
        for row, voxels in rows.items():
            if not voxels.size:
                continue
            number, mean, squares = found.get(row, (0, 0.0, 0.0))
            values = voxels.astype(np.float64)
            part = float(values.mean())
            total, distance = number + values.size, part - mean
            squares += float(np.square(values - part).sum()) + distance**2 * number * values.size / total
            found[row] = total, mean + distance * values.size / total, squares
    with np.errstate(over="ignore"):
        return {row: (np.float32(mean), np.float32(math.sqrt(s / n))) for row, (n, mean, s) in found.items()}


def _percentiles(
    tiles: Tiles, dtype: np.dtype[Any], wanted: tuple[float, float]
) -> dict[tuple[int, int], tuple[np.float32, np.float32]]:
    """Low percentile of each row, and the distance of the high one.

    A percentile is the least voxel with at least that many percent of the row's voxels at or below
    it. They are counted in bins by the upper 16 bits of a key that has the order of the voxels,
    and, where it has 32 bits, in the bins that matter by the lower ones.
    """
    wide = dtype.itemsize > 2 or dtype.kind == "f"
    upper = _counted(tiles, lambda _, voxels: _keys(voxels) >> 16 if wide else _keys(voxels))
    places = {row: [_place(counts, percent) for percent in wanted] for row, counts in upper.items() if counts.any()}
    if not wide:
        least = np.iinfo(dtype).min
        ends = {row: [np.float32(bin_ + least) for bin_, _ in its] for row, its in places.items()}
    else:
        ends = {row: [] for row in places}
        for number in range(len(wanted)):
            bins = {row: its[number][0] for row, its in places.items()}
            lower = _counted(tiles, lambda row, voxels, bins=bins: _within(_keys(voxels), bins.get(row)))  # type: ignore[misc]
            for row, its in places.items():
                bin_, rank = its[number]
                ends[row].append(_of_key(bin_ << 16 | int(np.searchsorted(lower[row].cumsum(), rank))))
    return {row: (low, np.float32(high - low)) for row, (low, high) in ends.items()}


def _counted(tiles: Tiles, bins: Callable[[tuple[int, int], NDArray[Any]], NDArray[Any]]) -> Rows:
    found: Rows = {}
    for rows in tiles():
        for row, voxels in rows.items():
            counts = found.setdefault(row, np.zeros(_BINS, np.int64))
            counts += np.bincount(bins(row, voxels), minlength=_BINS)
    return found


def _place(counts: NDArray[Any], percent: float) -> tuple[int, int]:
    """The bin of a percentile, and its rank, from 1, within the bin."""
    cumulated = counts.cumsum()
    rank = max(1, math.ceil(Fraction(str(percent)) * int(cumulated[-1]) / 100))
    bin_ = int(np.searchsorted(cumulated, rank))
    return bin_, rank - int(cumulated[bin_ - 1] if bin_ else 0)


def _within(keys: NDArray[np.int64], bin_: int | None) -> NDArray[np.int64]:
    """The lower 16 bits of the keys whose upper ones are those of a bin."""
    inside: NDArray[np.int64] = keys[keys >> 16 == bin_]
    return inside & 0xFFFF


def _keys(voxels: NDArray[Any]) -> NDArray[np.int64]:
    """Integers from 0 in the order of voxels: of 16 bits for integers of 8 and 16, else of 32.

    The latter are made of the voxels' float32.
    """
    if voxels.dtype.kind != "f" and voxels.dtype.itemsize <= 2:
        return voxels.astype(np.int64) - np.iinfo(voxels.dtype).min
    with np.errstate(over="ignore"):
        numbers = voxels.astype(np.float32) + np.float32(0)  # of -0 and 0 it makes one
    bits = numbers.view(np.uint32).astype(np.int64)
    return np.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)


def _of_key(key: int) -> np.float32:
    """The number of which a key of 32 bits was made."""
    bits = key - 0x80000000 if key >= 0x80000000 else 0xFFFFFFFF - key
    return np.uint32(bits).view(np.float32)
