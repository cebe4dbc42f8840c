"""The numbers that the network gets, against a computation of their own in numpy.

The reference pads a whole volume of voxels, sorts sections to find percentiles, and knows nothing
of blocks; patches have to have its bits.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.errors import ChunkflowError, DataError, SpecError
from chunkflow_core.inference.values import InputValues, Measured, Numbers, Pair
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer
from tests.support.random_examples import examples

SHAPE = (9, 14, 12)
PATCH, HALO, OVERLAP = (4, 6, 6), (1, 1, 0), (1, 2, 2)
ROI = ((0, 1, 0), (9, 14, 11))
DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]
Values = dict[str, Any]


def volume(dtype: str, channels: int, seed: int) -> NDArray[Any]:
    """Sections of other brightness and contrast each, with zeros; one empty, one grey."""
    rng = np.random.default_rng(seed)
    bright = rng.normal(0.5, 0.1, (channels, SHAPE[0], 1, 1))
    noise = rng.normal(bright, rng.uniform(0.01, 0.2, bright.shape), (channels, *SHAPE)).clip(0, 1)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        data = (noise * 300 - 100).astype(dtype)
    else:
        low, high = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
        data = np.clip(np.rint(low + noise * (high - low)), low, high * (1 - 2**-20)).astype(dtype)
    data[:, :, :3, :4] = 0
    data[:, 4] = 0
    data[:, 5] = 7
    return data


def write(place: str, data: NDArray[Any]) -> None:
    layer = NewLayer(
        f"{place}/input", SHAPE, dtype=str(data.dtype), resolution=(40, 4, 4), chunk=(4, 8, 5), channels=data.shape[0]
    )
    layer.write(Box((0, 0, 0), SHAPE), data)


def spec_of(place: str, values: Values, *, padding: str = "reflect", block: Vector = (6, 8, 8)) -> VolumeSpec:
    return parse_spec(
        {
            "name": "values",
            "input": {"path": f"{place}/input", "padding": padding, "values": values},
            "output": {"path": f"{place}/output", "dtype": "float32", "range": [-1e30, 1e30], "chunk_size": [3, 4, 4]},
            "exchange": {"path": f"{place}/exchange"},
            "roi": [list(corner) for corner in ROI],
            "patch_size": [p + 2 * h for p, h in zip(PATCH, HALO, strict=True)],
            "output_patch_size": list(PATCH),
            "patch_overlap": list(OVERLAP),
            "block_size": list(block),
            "model": {"engine": "identity"},
        }
    )


def percentile(counted: NDArray[Any], percent: float) -> np.float32:
    """The least one with so many percent of them at or below it."""
    rank = math.ceil(Fraction(str(percent)) * len(counted) / 100)
    return np.float32(np.sort(counted)[max(rank, 1) - 1])


def of_content(counted: NDArray[Any], values: Values) -> tuple[np.float32, np.float32]:
    """What is taken away and divided by, where that depends on the voxels."""
    if not values.get("count_zeros"):
        counted = counted[counted != 0]
    if not len(counted):
        return np.float32(0), np.float32(np.inf)
    if "percentiles" in values:
        low, high = (percentile(counted, percent) for percent in values["percentiles"])
        shift, divisor = low, high - low
    else:
        shift, divisor = np.float32(counted.astype(np.float64).mean()), np.float32(counted.astype(np.float64).std())
    return (shift, divisor) if divisor > 0 else (np.float32(0), np.float32(np.inf))


def reference(data: NDArray[Any], values: Values) -> NDArray[np.float32]:
    """The numbers for a whole volume, ``(channels, z, y, x)``."""
    (_, y0, x0), (_, y1, x1) = ROI
    shift, divisor = (np.zeros((*data.shape[:2], 1, 1), np.float32) for _ in range(2))
    integers = data.dtype.kind != "f"
    limits = (int(np.iinfo(data.dtype).min), int(np.iinfo(data.dtype).max)) if integers else (0, 1)
    scale = values.get("scale", "unit")
    for channel, voxels in enumerate(data):
        for z in range(len(voxels)):
            if "percentiles" in values or values.get("mean") == "measured":
                inside = voxels[z : z + 1] if values.get("per_section") else voxels[ROI[0][0] : ROI[1][0]]
                pair = of_content(inside[:, y0:y1, x0:x1].ravel(), values)
            elif "mean" in values:
                pair = (np.float32(values["mean"]), np.float32(values["std"]))
            elif scale == "symmetric":
                pair = (np.float32(sum(limits) / 2), np.float32((limits[1] - limits[0]) / 2))
            else:
                pair = (np.float32(0), np.float32(limits[1] if scale == "unit" else 1))
            shift[channel, z], divisor[channel, z] = pair
    numbers = (data.astype(np.float32) - shift) / divisor
    if values.get("invert"):
        ends = {"raw": sum(limits), "unit": 1, "symmetric": 0}
        numbers = np.float32(1 if "percentiles" in values else 0 if "mean" in values else ends[scale]) - numbers
    clip = values.get("clip", False)
    if clip is True:
        clip = [-1 if scale == "symmetric" else 0, 1]
    if clip is not False:
        numbers = np.minimum(np.maximum(numbers, np.float32(clip[0])), np.float32(clip[1]))
    return numbers.astype(np.float32, casting="no")


def expected(data: NDArray[Any], values: Values, padding: str, box: Box) -> NDArray[np.float32]:
    """The numbers for a box; padding has those of the section that it came from."""
    depth = SHAPE[0]
    if padding == "constant":  # zeros, at the ends with the numbers of the last section
        edged = np.pad(data, [(0, 0), (depth - 1,) * 2, (0, 0), (0, 0)], mode="edge")
        made = reference(edged[:, depth - 1 : 2 * depth - 1], values)
        zeros = reference_of_zeros(data, values)
        around = np.concatenate([zeros[:, :1].repeat(depth - 1, 1), zeros, zeros[:, -1:].repeat(depth - 1, 1)], 1)
        padded = np.broadcast_to(around, (data.shape[0], 3 * depth - 2, *(3 * n - 2 for n in SHAPE[1:]))).copy()
        padded[(slice(None), *(slice(n - 1, 2 * n - 1) for n in SHAPE))] = made
    else:
        made = reference(data, values)
        padded = np.pad(made, [(0, 0), *((n - 1, n - 1) for n in SHAPE)], mode=padding)  # type: ignore[call-overload]
    start = [a + n - 1 for a, n in zip(box.start, SHAPE, strict=True)]
    return padded[(slice(None), *(slice(a, a + n) for a, n in zip(start, box.shape, strict=True)))]


def reference_of_zeros(data: NDArray[Any], values: Values) -> NDArray[np.float32]:
    """The number of a voxel of 0 in each section: one is put where it is not measured."""
    wider = np.concatenate([data, np.zeros_like(data[..., :1])], axis=3)  # beyond the ROI, which is what is measured
    return reference(wider, values)[..., -1:][:, :, :1]


finite = st.floats(-300, 300, width=32)


@st.composite
def sections(draw: st.DrawFn, kind: str) -> Values:
    """A section that makes sense for a kind of voxels: ``u``, ``i`` or ``f``."""
    forms: list[Values] = [
        {},
        {"scale": "unit"},
        {"scale": "raw"},
        {"mean": draw(finite), "std": 0.5 + abs(draw(finite))},
    ]
    low = draw(st.sampled_from([0, 0.1, 1, 12.5, 50]))
    forms += [{"percentiles": [low, draw(st.sampled_from([60, 90, 99, 99.9, 100]))]}] * 3
    forms += [{"mean": "measured", "std": "measured"}] * 2
    forms += [{"scale": "symmetric"}] if kind != "f" else []
    values: Values = dict(draw(st.sampled_from(forms)))
    form = "mean" if "mean" in values else "percentiles" if "percentiles" in values else values.get("scale", "unit")
    if form == "percentiles" or values.get("mean") == "measured":
        values["per_section"] = draw(st.booleans())
        values["count_zeros"] = draw(st.booleans())
    signed_unit = kind == "i" and form == "unit"
    if draw(st.booleans()) and not signed_unit and not (form == "raw" and kind == "f"):
        values["invert"] = True
    clips: list[Any] = [False, sorted([draw(st.integers(-50, 0)), draw(st.integers(1, 50))])]
    clips += [True] if form in ("symmetric", "percentiles") or (form == "unit" and not signed_unit) else []
    values["clip"] = draw(st.sampled_from(clips))
    return values


@examples(30)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), channels=st.integers(1, 2), seed=st.integers(0, 999))
def test_a_patch_has_the_numbers_of_the_reference(data: st.DataObject, dtype: str, channels: int, seed: int) -> None:
    values = data.draw(sections(np.dtype(dtype).kind))
    padding = data.draw(st.sampled_from(["reflect", "edge", "constant"]))
    voxels = volume(dtype, channels, seed)
    with TemporaryDirectory() as folder:
        place = f"file://{folder}"
        write(place, voxels)
        spec = spec_of(place, values, padding=padding)
        workspace = Workspace(spec)
        prepare(workspace)
        again = Workspace(spec)  # as a stage in another process
        position = vector(data.draw(st.integers(0, axis.count - 1)) for axis in spec.grid.axes)
        taken = again.inference.take(position)
        box = again.inference.patches.input_box(position)
    wanted = expected(voxels, values, padding, box)
    assert taken.dtype == np.float32
    if values.get("mean") == "measured":  # the sums of the reference are in another order
        np.testing.assert_allclose(taken, wanted, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(taken, wanted)


@examples(30)
@given(data=st.data(), dtype=st.sampled_from(["uint8", "int16", "int32", "float32"]), seed=st.integers(0, 999))
def test_tensors_have_the_bits_of_arrays(data: st.DataObject, dtype: str, seed: int) -> None:
    """What is computed on an accelerator is what is computed without."""
    values = data.draw(sections(np.dtype(dtype).kind))
    voxels = volume(dtype, 1, seed)
    pairs: dict[int, tuple[Pair, ...]] = {z: ((7.5 * z, 0.1 + z),) for z in range(SHAPE[0])}
    with TemporaryDirectory() as folder:
        write(f"file://{folder}", voxels)
        spec = spec_of(f"file://{folder}", values)
        measured = Measured(sections=pairs) if values.get("per_section") else Measured(whole=((3.25, 0.7),))
        made = InputValues(spec, lambda: measured).numbers(voxels.dtype, 0, SHAPE[0])
    shift = None if made.shift is None else torch.from_numpy(made.shift.copy())
    tensors = Numbers(torch.from_numpy(made.divisor.copy()), shift, made.mirror, made.limits)
    array = made.made_of(voxels.astype(np.float32))
    tensor = tensors.made_of(torch.from_numpy(voxels.astype(np.float32)))
    assert array.tobytes() == tensor.numpy().tobytes()


def test_a_zero_that_is_clipped_has_one_sign() -> None:
    """Which of 0 and -0, which are equal, a processor takes for the larger one may differ."""
    zeros = np.array([-0.0, 0.0] * 40, np.float32).reshape(1, 1, 8, 10)
    made = Numbers(np.ones((1, 1, 1, 1), np.float32), limits=(0.0, 1.0)).made_of(zeros.copy())
    assert not np.signbit(made).any()
    tensor = Numbers(torch.ones(1, 1, 1, 1), limits=(-1.0, 1.0)).made_of(torch.from_numpy(zeros))
    assert not np.signbit(tensor.numpy()).any()


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("dtype", "values", "pieces"),
    [
        ("float32", {"scale": "symmetric"}, ["input.values.scale: symmetric", "float32", "percentiles"]),
        ("float64", {"scale": "raw", "invert": True}, ["input.values.invert", "float64", "mean and std"]),
        ("int16", {"clip": True}, ["input.values.clip: true", "int16", "scale: symmetric", "clip: [low, high]"]),
        ("int8", {"scale": "unit", "invert": True}, ["input.values.invert: true", "int8", "scale: symmetric"]),
        ("uint8", {"mean": [1, 2, 3], "std": 5}, ["input.values.mean: 3 numbers", "1 channel"]),
        ("uint8", {"mean": 1, "std": [5, 6]}, ["input.values.std: 2 numbers", "1 channel"]),
        ("uint8", {"percentiles": [1, 99], "mip": 3}, ["mip 3 does not exist"]),
    ],
)
def test_section_that_makes_no_sense_for_the_layer(
    tmp_path: Path, dtype: str, values: Values, pieces: list[str]
) -> None:
    place = f"file://{tmp_path}"
    write(place, volume(dtype, 1, 0))
    with pytest.raises(ChunkflowError) as caught:
        prepare(Workspace(spec_of(place, values)))
    for piece in pieces:
        assert piece in str(caught.value)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("values", [{"percentiles": [1, 99]}, {"mean": "measured", "std": "measured"}])
@pytest.mark.parametrize("voxel", [0, 9])
def test_volume_without_contrast(tmp_path: Path, values: Values, voxel: int) -> None:
    place = f"file://{tmp_path}"
    write(place, np.full((1, *SHAPE), voxel, np.uint8))
    with pytest.raises(DataError, match=r"input\.values: all voxels .* are the same, or none does"):
        prepare(Workspace(spec_of(place, values)))


@pytest.mark.parametrize(
    ("values", "piece"),
    [
        ({"scale": "unity"}, "input.values.scale: \"unity\": input should be 'unit', 'raw' or 'symmetric'"),
        ({"scale": "raw", "percentiles": [1, 99]}, "input.values.scale: expected one of scale, mean with std, and"),
        ({"mean": 3, "std": 1, "percentiles": [1, 99]}, "input.values.mean: expected one of scale, mean with std, and"),
        ({"mean": 3}, "input.values.mean: mean and std go together"),
        ({"std": 3}, "input.values.std: mean and std go together"),
        ({"mean": "measured", "std": 3}, "input.values.mean: mean and std go together, expected numbers for both"),
        ({"mean": 0, "std": 0}, "input.values.std: 0: expected numbers > 0"),
        ({"mean": float("nan"), "std": 1}, "input.values.mean: NaN: expected a number"),
        ({"mean": True, "std": 1}, "input.values.mean: true: expected a number"),
        ({"mean": [], "std": 1}, "input.values.mean: []: expected a number"),
        ({"percentiles": [99, 1]}, "input.values.percentiles: [99, 1]: expected [low, high]"),
        ({"percentiles": [0, 101]}, "input.values.percentiles: [0, 101]: expected [low, high]"),
        ({"percentiles": 99}, "input.values.percentiles: 99: expected [low, high]"),
        ({"per_section": True}, "input.values.per_section: only for what is measured"),
        ({"scale": "raw", "mip": 1}, "input.values.mip: only for what is measured"),
        ({"mean": 3, "std": 1, "count_zeros": True}, "input.values.count_zeros: only for what is measured"),
        ({"scale": "raw", "clip": True}, "input.values.clip: true: there is no range to clip to with raw"),
        ({"mean": 3, "std": 1, "clip": True}, "input.values.clip: true: there is no range to clip to with mean"),
        ({"clip": [1, 1]}, "input.values.clip: [1, 1]: expected true, false, or [low, high]"),
        ({"clip": [1, 1 + 1e-9]}, "input.values.clip: [1, 1.000000001]: expected true, false, or [low, high]"),
        ({"invert": 1}, "input.values.invert: 1: input should be a valid boolean"),
        ({"percentile": [1, 99]}, "input.values.percentile: unknown key; did you mean percentiles?"),
    ],
)
def test_section_that_makes_no_sense_for_any_layer(values: Values, piece: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of("file:///unused", values)
    assert piece in str(caught.value)
