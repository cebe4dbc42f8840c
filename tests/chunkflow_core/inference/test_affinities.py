"""Affinities of any convention: turned back, converted, blended, and the same however it is cut.

The oracle says of each voxel whether it and another one have the same label. Networks here compute
just that from labels, in whatever orientation they see them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.errors import DataError
from chunkflow_core.inference.augmentation import contributions, moved_throughout
from chunkflow_core.lattice.affinities import CONVENTIONS, Offsets, edges
from chunkflow_core.lattice.blocks import AxisLattice
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.lattice.weights import normalised_weight
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import make_output
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer

NEAR: Offsets = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
FAR: Offsets = ((-2, 0, 0), (0, -3, 0), (0, 0, -3))
KINDS: dict[str, Offsets] = {
    **CONVENTIONS,
    "source, xyz": ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
    "some here, some there": ((1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "six, long-range": NEAR + FAR,
    "six, long-range, source": tuple(vector(-n for n in o) for o in NEAR + FAR),
    "mutex watershed": (
        *NEAR, (-1, -1, -1), (-1, 1, 1), (-1, -1, 1), (-1, 1, -1), (0, -3, 0), (0, 0, -3),
        (0, -3, -3), (0, 3, -3), (0, -3, -2), (0, -2, -3), (0, 2, -3), (0, 3, -2),
    ),
    "half of 26 neighbours": tuple(
        (z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1) if (z, y, x) < (0, 0, 0)
    ),
    "both directions": (*NEAR, (1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "foreground first": ((0, 0, 0), *NEAR),
    "sections far, all else near": ((-3, 0, 0), (0, 0, 2), (0, 2, 0)),
    "diagonals of sections": ((0, 2, 1), (0, 1, 2), (0, -2, 1), (0, 1, -2)),
}  # fmt: skip
"""Offsets of channels, all of them closed under flips and transposition."""


def other_voxel(offsets: Offsets) -> Offsets:
    """The same edges in the reverse order, each stored at its other voxel."""
    return tuple(vector(-n for n in offset) for offset in reversed(offsets))


def every_second(offsets: Offsets) -> Offsets:
    """The same channels, of which every second one stores its edges at the other voxel."""
    return tuple(vector(-n for n in o) if i % 2 else o for i, o in enumerate(offsets))


CONVERSIONS: dict[str, tuple[Offsets, Offsets]] = {
    **{name: (offsets, offsets) for name, offsets in KINDS.items()},
    **{f"{name}, reversed": (offsets, other_voxel(offsets)) for name, offsets in KINDS.items()},
    "abiss to waterz": (KINDS["abiss"], KINDS["waterz"]),
    "pytc_banis to abiss": (KINDS["pytc_banis"], KINDS["abiss"]),
    "waterz to pytc_banis": (KINDS["waterz"], KINDS["pytc_banis"]),
    "mutex watershed, half of it moved": (KINDS["mutex watershed"], every_second(KINDS["mutex watershed"])),
    "six, every second moved": (KINDS["six, long-range"], every_second(KINDS["six, long-range"])),
}
"""Offsets of a network and of a layer, by name."""

conversions = pytest.mark.parametrize(("given", "wanted"), CONVERSIONS.values(), ids=list(CONVERSIONS))


def same_label(labels: NDArray[Any], offsets: Offsets, low: int, sizes: tuple[int, ...]) -> NDArray[np.float32]:
    """For each offset and voxel, whether the voxel and voxel + offset have the same label.

    The voxels are those of a box that begins at ``(low, low, low)`` of the labels. Where the other
    one lies outside of the labels, it is a number that depends on the voxel's own label.
    """
    result = np.empty((len(offsets), *sizes), np.float32)
    for key in np.ndindex(result.shape):
        here = [n + low for n in key[1:]]
        there = [n + o for n, o in zip(here, offsets[key[0]], strict=True)]
        if all(0 <= n < size for n, size in zip(there, labels.shape, strict=True)):
            result[key] = labels[tuple(here)] == labels[tuple(there)]
        else:
            result[key] = 0.25 + 0.25 * (labels[tuple(here)] % 3)
    return result


def pairs(labels: NDArray[Any], offsets: Offsets, halo: int) -> NDArray[np.float32]:
    """What ``same_label`` says of all voxels but a halo, for many patches in a short time."""
    sizes = tuple(n - 2 * halo for n in labels.shape)
    result = np.empty((len(offsets), *sizes), np.float32)
    index = np.moveaxis(np.indices(sizes), 0, -1) + halo
    here = labels[tuple(np.moveaxis(index, -1, 0))]
    for channel, offset in enumerate(offsets):
        there = index + np.array(offset)
        inside = ((there >= 0) & (there < labels.shape)).all(-1)
        beside = labels[tuple(np.moveaxis(np.clip(there, 0, np.array(labels.shape) - 1), -1, 0))]
        result[channel] = np.where(inside, here == beside, 0.25 + 0.25 * (here % 3))
    return result


def some_labels(*sizes: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(0, 3, sizes).astype(np.float32)


def mean(labels: NDArray[np.float32], augmentation: str, given: Offsets, wanted: Offsets) -> NDArray[np.float32]:
    """The mean over all orientations of what a network gives, as the pipeline forms it."""
    transforms = contributions(augmentation, given, wanted)
    total = np.zeros((len(wanted), *labels.shape), np.float32)
    for transform in transforms:
        turned = np.ascontiguousarray(transform.apply(labels))
        total += transform.undo(pairs(turned, given, 0)) / np.float32(len(transforms))
    return total


@pytest.mark.parametrize("offsets", KINDS.values(), ids=list(KINDS))
def test_the_quick_network_is_the_slow_one(offsets: Offsets) -> None:
    labels = some_labels(3, 5, 4)
    np.testing.assert_array_equal(pairs(labels, offsets, 0), same_label(labels, offsets, 0, labels.shape))
    np.testing.assert_array_equal(pairs(labels, offsets, 1), same_label(labels, offsets, 1, (1, 3, 2)))


@conversions
@pytest.mark.parametrize(
    ("augmentation", "sizes"),
    [("flips", (5, 6, 7)), ("flips", (1, 2, 4)), ("flips_transpose", (5, 7, 7)), ("flips_transpose", (1, 3, 3))],
    ids=str,
)
def test_exact_affinities_are_exact_in_any_convention_and_orientation(
    augmentation: str, sizes: tuple[int, ...], given: Offsets, wanted: Offsets
) -> None:
    labels = some_labels(*sizes)
    expected = same_label(labels, wanted, 0, sizes)
    np.testing.assert_array_equal(mean(labels, augmentation, given, wanted), expected)


@conversions
def test_without_augmentation_values_move_and_leave_0_where_there_is_none(given: Offsets, wanted: Offsets) -> None:
    sizes = (5, 6, 7)
    labels = some_labels(*sizes)
    expected = same_label(labels, wanted, 0, sizes)
    for channel, offset in enumerate(wanted):
        if offset not in given:
            for voxel in np.ndindex(sizes):
                if not all(0 <= n + o < size for n, o, size in zip(voxel, offset, sizes, strict=True)):
                    expected[(channel, *voxel)] = 0
    np.testing.assert_array_equal(mean(labels, "none", given, wanted), expected)
    moved = tuple((0, 0, 0) if offset in given else offset for offset in wanted)
    assert moved_throughout(contributions("none", given, wanted)) == (moved if any(map(any, moved)) else ())
    assert moved_throughout(contributions("flips", given, wanted)) == ()


def test_a_channel_that_is_missing_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"no channel for the offset \[0, 1, 1\]"):
        contributions("flips", ((0, -1, 1),), ((0, 1, 1),))


@conversions
def test_tensors_and_batches_give_what_arrays_give(given: Offsets, wanted: Offsets) -> None:
    outputs = np.random.default_rng(1).random((2, len(given), 3, 4, 4), dtype=np.float32)
    for name in ("none", "flips_transpose"):
        for transform in contributions(name, given, wanted):
            expected = np.stack([transform.undo(output) for output in outputs])
            np.testing.assert_array_equal(transform.undo(outputs), expected, strict=True)
            tensors = torch.from_numpy(outputs.copy())
            np.testing.assert_array_equal(transform.undo(tensors).numpy(), expected, strict=True)
            np.testing.assert_array_equal(tensors.numpy(), outputs)


def test_conventions_are_those_of_the_programs() -> None:
    """By hand, from what each program's source says of ``aff`` at one voxel."""
    labels = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    labels[1, 1, 0] = labels[0, 1, 1] = labels[1, 1, 1]  # one to the left in x, one before in z; y differs
    labels[1, 1, 2] = labels[1, 1, 1]  # and one to the right
    at = {name: pairs(labels, offsets, 0)[:, 1, 1, 1].tolist() for name, offsets in CONVENTIONS.items()}
    assert at == {
        "abiss": [1, 0, 1],
        "deepem": [1, 0, 1],
        "waterz": [1, 0, 1],
        "pytc_deepem": [1, 0, 1],
        "pytc_banis": [0, 0, 1],
    }
    labels[1, 1, 0] = -1  # now only z before, and x after
    at = {name: pairs(labels, offsets, 0)[:, 1, 1, 1].tolist() for name, offsets in CONVENTIONS.items()}
    assert at == {
        "abiss": [0, 0, 1],
        "deepem": [0, 0, 1],
        "waterz": [1, 0, 0],
        "pytc_deepem": [1, 0, 0],
        "pytc_banis": [0, 0, 1],
    }


def test_edges_are_the_same_at_either_voxel() -> None:
    for offsets in KINDS.values():
        assert edges(offsets) == edges(other_voxel(offsets))
    assert edges(NEAR) != edges(FAR)


@pytest.mark.parametrize("offset", [-5, -3, -1, 0, 1, 2, 4])
@pytest.mark.parametrize("overlap", [0, 2, 3, 5])
def test_weights_of_what_was_moved_sum_to_one_where_any_patch_has_a_value(overlap: int, offset: int) -> None:
    patch, count = 7, 4
    axis = AxisLattice((count - 1) * (patch - overlap) + patch, patch, overlap)
    total = np.zeros(axis.length)
    having = np.zeros(axis.length, bool)
    for k in range(count):
        weight = normalised_weight(axis, k, offset)
        start = k * (patch - overlap)
        assert [i for i in range(patch) if weight[i] > 0] == [i for i in range(patch) if 0 <= i + offset < patch]
        total[start : start + patch] += weight
        having[[start + i for i in range(patch) if 0 <= i + offset < patch]] = True
    np.testing.assert_allclose(total, having, atol=1e-6)
    if abs(offset) <= overlap:
        assert having[abs(offset) : len(having) - abs(offset)].all()


# Whole volumes

SIZES = (24, 32, 32)
ROI = ((8, 9, 10), (17, 25, 24))
PATCH, OVERLAP = (6, 9, 9), (3, 5, 5)
CUTS: dict[str, dict[str, Any]] = {
    "one block": {"block_size": [18, 32, 32], "chunk_size": [6, 8, 8]},
    "blocks of two patches": {"block_size": [6, 8, 8], "chunk_size": [3, 4, 4]},
    "blocks of different shape": {"block_size": [3, 8, 16], "chunk_size": [3, 8, 8]},
}


class Network(Engine):
    """Gives the affinities of labels, as far as it sees them, plus what else is asked."""

    def __init__(self, given: Offsets, halo: int, more: Callable[[NDArray[Any]], NDArray[Any]] | None = None) -> None:
        self._given, self._halo, self._more = given, halo, more
        self.streams = 2

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs = np.stack([pairs(patch[0], self._given, self._halo) for patch in patches])
        return outputs if self._more is None else self._more(outputs).astype(np.float32)


class OnDevice(Network):
    """The same, by the way of accelerators, on a device that every machine has."""

    device = torch.device("cpu")
    batch_size = 3

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self(patches.numpy()))


def spec_of(
    place: Path,
    given: Offsets,
    wanted: Offsets,
    halo: int,
    cut: dict[str, Any],
    dtype: str,
    augmentation: str,
    limits: tuple[float, float] = (0, 1),
) -> VolumeSpec:
    return parse_spec(
        {
            "name": "affinities",
            "input": {"path": f"file://{place.parent}/input", "values": {"scale": "raw"}},
            "output": {
                "path": f"file://{place}/output",
                "channels": len(given),
                "dtype": dtype,
                "range": list(limits),
                "chunk_size": cut["chunk_size"],
                "affinities": wanted,
            },
            "exchange": {"path": f"file://{place}/exchange"},
            "roi": [list(corner) for corner in ROI],
            "patch_size": [n + 2 * halo for n in PATCH],
            "output_patch_size": list(PATCH),
            "patch_overlap": list(OVERLAP),
            "block_size": cut["block_size"],
            "skip": {"zeros": False},
            "model": {"engine": "identity", "affinities": given, "augmentation": augmentation},
        }
    )


def volume_of(spec: VolumeSpec, engine: Engine, *, backwards: bool = False) -> NDArray[Any]:
    """The output of all blocks, done one after another."""
    make_output(spec)
    workspace = Workspace(spec, engine)
    blocks = list(spec.grid.indices())
    for index in blocks[::-1] if backwards else blocks:
        inference_and_donate(workspace, index)
    for index in blocks if backwards else blocks[::-1]:
        receive_and_blend(workspace, index)
    return workspace.output.read(spec.grid.roi)


@pytest.fixture
def labels(tmp_path: Path) -> NDArray[np.uint8]:
    """The labels of the input layer."""
    content = some_labels(*SIZES, seed=5).astype(np.uint8)
    layer = NewLayer(f"file://{tmp_path}/input", SIZES, dtype="uint8", resolution=(40, 4, 4), chunk=(16, 16, 16))
    layer.write(Box((0, 0, 0), SIZES), content[None])
    return content


def has_value(offset: tuple[int, ...]) -> NDArray[np.bool_]:
    """The voxels of the ROI that lie in some patch together with voxel + offset."""
    found = []
    for axis, n in enumerate(offset):
        length, stride = ROI[1][axis] - ROI[0][axis], PATCH[axis] - OVERLAP[axis]
        starts = range(0, length - OVERLAP[axis], stride)
        found.append(
            [any(s <= v < s + PATCH[axis] and s <= v + n < s + PATCH[axis] for s in starts) for v in range(length)]
        )
    z, y, x = (np.array(axis) for axis in found)
    return np.asarray(z[:, None, None] & y[:, None] & x)


def some_long(*names: tuple[str, str], quick: int) -> pytest.MarkDecorator:
    """Conversions and augmentations; those after the first few are for the long tests."""
    cases = [pytest.param(*name, marks=[pytest.mark.long] * (i >= quick), id=str(name)) for i, name in enumerate(names)]
    return pytest.mark.parametrize(("name", "augmentation"), cases)


@pytest.mark.parametrize("engine", [Network, OnDevice])
@some_long(
    ("abiss to waterz", "none"),
    ("six, every second moved", "none"),
    ("pytc_banis to abiss", "flips"),
    ("pytc_banis to abiss", "none"),
    ("mutex watershed, half of it moved", "none"),
    ("mutex watershed, half of it moved", "flips_transpose"),
    quick=3,
)
def test_a_volume_holds_the_affinities_of_its_labels(
    tmp_path: Path, labels: NDArray[np.uint8], name: str, augmentation: str, engine: type[Network]
) -> None:
    """The network sees what is beside its patch, so that it knows all edges."""
    given, wanted = CONVERSIONS[name]
    spec = spec_of(tmp_path / "run", given, wanted, 3, CUTS["one block"], "uint8", augmentation)
    output = volume_of(spec, engine(given, 3))
    inside = tuple(slice(a, b) for a, b in zip(*ROI, strict=True))
    for channel, offset in enumerate(wanted):
        beside = np.roll(labels, [-n for n in offset], (0, 1, 2))[inside]
        expected = labels[inside] == beside
        if augmentation == "none" and offset not in given:
            expected &= has_value(offset)
        np.testing.assert_array_equal(output[channel], expected * np.uint8(255), err_msg=str(offset))


@some_long(
    ("pytc_banis to abiss", "none"),
    ("six, every second moved", "none"),
    ("pytc_banis to abiss", "flips"),
    ("mutex watershed, half of it moved", "none"),
    ("mutex watershed, half of it moved", "flips_transpose"),
    quick=2,
)
def test_a_volume_is_the_same_bit_for_bit_however_it_is_cut(
    tmp_path: Path, labels: NDArray[np.uint8], name: str, augmentation: str
) -> None:
    """The network errs, in each patch otherwise, and what it says at borders is blended too."""
    given, wanted = CONVERSIONS[name]

    def erring(outputs: NDArray[Any]) -> NDArray[Any]:
        error = np.random.default_rng(8).random(outputs.shape[1:])
        return np.asarray(0.6 * outputs + 0.3 * error + 0.1 * outputs.mean((1, 2, 3, 4), keepdims=True))

    outputs = [
        volume_of(
            spec_of(tmp_path / f"{number} {kind.__name__}", given, wanted, 0, cut, "float32", augmentation),
            kind(given, 0, erring),
            backwards=number == 1,
        )
        for number, cut in enumerate(CUTS.values())
        for kind in ((Network, OnDevice) if number == 1 else (Network,))
    ]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])
    assert len(np.unique(outputs[0])) > 1000


@pytest.mark.parametrize("engine", [Network, OnDevice])
def test_the_range_is_that_of_the_network_not_of_what_was_moved(
    tmp_path: Path, labels: NDArray[np.uint8], engine: type[Network]
) -> None:
    """No value is left at the border of a patch, where 0 would be beyond this range."""
    given, wanted = CONVERSIONS["pytc_banis to abiss"]

    def spec(name: str) -> VolumeSpec:
        return spec_of(tmp_path / name, given, wanted, 3, CUTS["one block"], "float32", "none", limits=(1, 2))

    output = volume_of(spec("within"), engine(given, 3, lambda outputs: outputs + 1))
    for channel, offset in enumerate(wanted):
        assert set(np.rint(output[channel][has_value(offset)])) == {1, 2}
        assert set(output[channel][~has_value(offset)]) == {0}
    np.testing.assert_allclose(output, np.rint(output), atol=1e-6)

    def beyond(outputs: NDArray[Any]) -> NDArray[Any]:
        result = outputs + 1
        result[:, 2, :, :, -1] = 0.5  # of edges that no voxel of the patch stores in the layer's convention
        return np.asarray(result)

    with pytest.raises(DataError, match=r"values from 0\.5 to 2"):
        volume_of(spec("beyond"), engine(given, 3, beyond))
