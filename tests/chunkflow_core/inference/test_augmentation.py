"""Orientations of a patch, and the mean over what a network that sees directions gives for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations, product
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.inference.augmentation import Transform, contributions
from chunkflow_core.lattice.affinities import CONVENTIONS, Orientation
from tests.support.random_examples import examples

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]

COUNTS = {"none": 1, "flips": 8, "flips_transpose": 16}
INDEPENDENT = contributions("flips_transpose")
AFFINITY = contributions("flips_transpose", CONVENTIONS["abiss"], CONVENTIONS["abiss"])


def of_kind(name: str, *, affinity: bool) -> tuple[Transform, ...]:
    """The orientations of an augmentation for outputs of a kind."""
    return contributions(name, *[CONVENTIONS["abiss"]] * 2) if affinity else contributions(name)


def affine(flips: tuple[bool, bool, bool], transpose: bool) -> Transform:
    """One of the orientations, for affinities."""
    return next(t for t in AFFINITY if t.orientation == Orientation(flips, transpose))


def segmentation(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """A random segmentation, in which about every other pair of neighbours is of one segment."""
    return np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)


def affinities(segments: NDArray[np.float32]) -> NDArray[np.float32]:
    """A perfect affinity network: ``(1, z, y, x)`` segments to ``(3, z, y, x)``, channels x, y, z.

    The first plane along an axis, where the voxel before is unknown, depends on the voxel itself.
    """
    ids = segments[0]
    result = np.empty((3, *ids.shape), np.float32)
    for channel, axis in enumerate((2, 1, 0)):
        along, here = np.moveaxis(result[channel], axis, 0), np.moveaxis(ids, axis, 0)
        along[0] = 0.25 + 0.5 * here[0]
        along[1:] = here[1:] == here[:-1]
    return result


def convolution(channels: int, seed: int) -> Network:
    """A random network of small integers, so that no mean is rounded, without any symmetry."""

    def network(patch: NDArray[np.float32]) -> NDArray[np.float32]:
        rng = np.random.default_rng(seed)
        kernel = rng.integers(-4, 5, (channels, 3, 3, 3))
        z, y, x = patch.shape[1:]
        padded = np.pad(patch[0], 1)
        result = np.zeros((channels, z, y, x))
        for k, j, i in product(range(3), repeat=3):
            result += kernel[:, k, j, i, None, None, None] * padded[k : k + z, j : j + y, i : i + x]
        return (result + np.arange(result.size).reshape(result.shape) % 7).astype(np.float32)

    return network


def mean(network: Network, patch: NDArray[np.float32], transforms: tuple[Transform, ...]) -> NDArray[np.float32]:
    """The sum that the pipeline forms."""
    total, share = np.zeros((), np.float32), np.float32(1 / len(transforms))
    for transform in transforms:
        total = total + share * transform.undo(network(np.ascontiguousarray(transform.apply(patch))))
    return total


def mean_by_voxel(
    network: Network, patch: NDArray[np.float32], transposes: bool, affinity: bool
) -> NDArray[np.float64]:
    """The mean over all orientations, by following single voxels and edges.

    Nothing of the library is used. An orientation is a way to say where in the network's patch a
    voxel is: its three coordinates in another order (``order[b]`` is the patch's axis that is the
    network's axis ``b``), each counted from the low or the high end.
    """
    shape = patch.shape[1:]
    values: dict[tuple[int, ...], list[float]] = {}
    orders = [order for order in permutations(range(3)) if order == (0, 1, 2) or (transposes and order == (0, 2, 1))]
    for order, mirrored in product(orders, product((False, True), repeat=3)):

        def place(
            voxel: Sequence[int], order: tuple[int, ...] = order, mirrored: tuple[bool, ...] = mirrored
        ) -> tuple[int, ...]:
            seen = [shape[a] - 1 - voxel[a] if mirrored[a] else voxel[a] for a in range(3)]
            return tuple(seen[a] for a in order)

        turned = np.zeros((1, *(shape[a] for a in order)), np.float32)
        for one in np.ndindex(shape):
            turned[(0, *place(one))] = patch[(0, *one)]
        output = network(turned)
        for key in np.ndindex(output.shape[0], *shape):
            channel, *voxel = key
            if not affinity:
                values.setdefault(key, []).append(output[(channel, *place(voxel))])
                continue
            axis = 2 - channel
            before = [n - (a == axis) for a, n in enumerate(voxel)]
            here, there = place(voxel), place(before)
            along = next(b for b in range(3) if here[b] != there[b])
            owner = max(here, there, key=lambda position: position[along])
            if owner[along] < turned.shape[1:][along]:
                values.setdefault(key, []).append(output[(2 - along, *owner)])
    result = np.full((output.shape[0], *shape), np.nan)
    for key, found in values.items():
        result[key] = np.sum(found) / len(found)
    return result


def inner(axis: int) -> tuple[slice, ...]:
    """All but the first plane of an axis."""
    return tuple(slice(1, None) if a == axis else slice(None) for a in range(3))


@pytest.mark.parametrize("affinity", [False, True], ids=["independent", "affinity"])
@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_orientations_are_all_different_and_begin_with_the_patch_itself(name: str, count: int, affinity: bool) -> None:
    patch = np.arange(2 * 3 * 3, dtype=np.float32).reshape(1, 2, 3, 3)
    turned = [transform.apply(patch) for transform in of_kind(name, affinity=affinity)]
    np.testing.assert_array_equal(turned[0], patch)
    assert len({array.tobytes() for array in turned}) == len(turned) == count


def test_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="flips_transpose, got 'rotations'"):
        contributions("rotations")


def test_axes_are_flipped_before_the_transposition() -> None:
    patch = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    turned = Transform(Orientation((False, True, False), True)).apply(patch)
    np.testing.assert_array_equal(turned[0, 0], [[3, 0], [4, 1], [5, 2]])


@examples(100)
@given(
    shape=st.lists(st.integers(1, 5), min_size=4, max_size=6).map(tuple),
    transform=st.sampled_from(INDEPENDENT),
    data=st.randoms(use_true_random=False),
)
def test_undo_is_the_inverse(shape: tuple[int, ...], transform: Transform, data: Random) -> None:
    patch = np.random.default_rng(data.getrandbits(32)).random(shape, dtype=np.float32)
    before = patch.copy()
    restored = transform.undo(transform.apply(patch))
    np.testing.assert_array_equal(restored, patch)
    np.testing.assert_array_equal(patch, before)
    assert restored.flags.c_contiguous


@pytest.mark.parametrize("transform", AFFINITY, ids=str)
def test_affinities_of_every_orientation_are_those_of_the_patch(transform: Transform) -> None:
    patch = segmentation((1, 4, 5, 6))
    expected = affinities(patch)
    restored = transform.undo(affinities(transform.apply(patch)))
    for channel, axis in enumerate((2, 1, 0)):
        np.testing.assert_array_equal(restored[channel][inner(axis)], expected[channel][inner(axis)])
        first = 0 if transform.orientation.flips[axis] else 2 * np.take(expected[channel], 0, axis)
        np.testing.assert_array_equal(np.take(restored[channel], 0, axis), first)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (1, 1, 3, 1), (1, 2, 2, 2)], ids=str)
def test_mean_of_perfect_affinities_is_perfect_to_the_first_plane(name: str, shape: tuple[int, ...]) -> None:
    patch = segmentation(shape)
    np.testing.assert_array_equal(mean(affinities, patch, of_kind(name, affinity=True)), affinities(patch), strict=True)


@pytest.mark.parametrize("affinity", [False, True], ids=["independent", "affinity"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("flips", (3, 4, 5)), ("flips", (1, 2, 3)), ("flips_transpose", (3, 4, 4)), ("flips_transpose", (2, 3, 4))],
    ids=str,
)
def test_mean_of_an_asymmetric_network_is_that_of_its_voxels(name: str, shape: tuple[int, ...], affinity: bool) -> None:
    patch = np.random.default_rng(3).integers(0, 9, (1, *shape)).astype(np.float32)
    network = convolution(3 if affinity else 2, seed=4)
    expected = mean_by_voxel(network, patch, name == "flips_transpose", affinity)
    assert not np.array_equal(expected, network(patch))
    np.testing.assert_array_equal(mean(network, patch, of_kind(name, affinity=affinity)), expected)


def test_transposition_exchanges_the_channels_of_y_and_x() -> None:
    output = np.stack([np.full((2, 2, 2), value, np.float32) for value in (10, 20, 30)])
    restored = affine((False, False, False), True).undo(output)
    assert restored[:, 1, 1, 1].tolist() == [20, 10, 30]
    np.testing.assert_array_equal(Transform(Orientation((False, False, False), True)).undo(output), output)


@pytest.mark.parametrize("axis", range(3))
def test_a_flip_shifts_the_channel_of_its_axis_alone(axis: int) -> None:
    shape = [1, 1, 1]
    shape[axis] = 4
    output = np.broadcast_to(np.array([5, 6, 7, 8], np.float32).reshape(shape), (3, *shape))
    restored = affine((axis == 0, axis == 1, axis == 2), False).undo(output)
    expected = [[16, 14, 12, 10]] * 3  # the other axes are one voxel long, so all is first plane there
    expected[2 - axis] = [0, 8, 7, 6]
    assert [channel.ravel().tolist() for channel in restored] == expected


def test_a_flip_after_a_transposition_counts_for_the_axis_of_the_patch() -> None:
    output = np.arange(3 * 9, dtype=np.float32).reshape(3, 1, 3, 3)
    restored = affine((False, True, False), True).undo(output)
    # the network's x is the patch's y, from its high end; the network's y is the patch's x
    np.testing.assert_array_equal(restored[1, 0], [[0, 0, 0], [2, 5, 8], [1, 4, 7]])
    np.testing.assert_array_equal(restored[0, 0], [[22, 14, 17], [20, 13, 16], [18, 12, 15]])


def test_first_planes_are_doubled_only_where_half_of_the_orientations_have_a_value() -> None:
    output = np.ones((3, 3, 3, 3), np.float32)
    unchanged = AFFINITY[0].undo(output)
    for channel, axis in enumerate((2, 1, 0)):
        np.testing.assert_array_equal(np.take(unchanged[channel], 0, axis), 2)
        np.testing.assert_array_equal(unchanged[channel][inner(axis)], 1)
    np.testing.assert_array_equal(INDEPENDENT[0].undo(output), output)
    (alone,) = of_kind("none", affinity=True)
    np.testing.assert_array_equal(alone.undo(output), output)


@pytest.mark.parametrize("affinity", [False, True], ids=["independent", "affinity"])
@pytest.mark.parametrize("name", COUNTS)
def test_contributions_are_contiguous_and_leave_the_output_alone(name: str, affinity: bool) -> None:
    contiguous = np.random.default_rng(5).random((3, 2, 4, 4), dtype=np.float32)
    for output in (contiguous, np.asfortranarray(contiguous)):
        before = output.copy()
        for transform in of_kind(name, affinity=affinity):
            contribution = transform.undo(output)
            assert contribution.flags.c_contiguous
            assert contribution.dtype == np.float32
            np.testing.assert_array_equal(output, before)


@pytest.mark.parametrize("transform", INDEPENDENT + AFFINITY, ids=str)
def test_batches_and_tensors_give_what_single_arrays_give(transform: Transform) -> None:
    outputs = np.random.default_rng(6).random((2, 3, 4, 5, 5), dtype=np.float32)
    expected = np.stack([transform.undo(output) for output in outputs])
    turned = np.stack([transform.apply(output) for output in outputs])
    np.testing.assert_array_equal(transform.undo(outputs), expected, strict=True)
    np.testing.assert_array_equal(transform.apply(outputs), turned, strict=True)

    tensors = torch.from_numpy(outputs.copy())
    contribution = transform.undo(tensors)
    assert contribution.is_contiguous()
    np.testing.assert_array_equal(contribution.numpy(), expected, strict=True)
    np.testing.assert_array_equal(transform.apply(tensors).numpy(), turned, strict=True)
    np.testing.assert_array_equal(tensors.numpy(), outputs)


def test_affinities_have_three_channels() -> None:
    with pytest.raises(ValueError, match="3 channels, got 2"):
        AFFINITY[1].undo(np.zeros((2, 3, 3, 3), np.float32))
