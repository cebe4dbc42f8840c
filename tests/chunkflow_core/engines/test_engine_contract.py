"""What every engine owes, with a real model for each.

The same patch gives the same bits, and an output has the declared shape or is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkflow_core.errors import DataError, SpecError
from tests.support.models.cases import CASES, STREAMS, Case
from tests.support.models.loading import PATCH, load, patches

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters


@pytest.fixture(scope="module")
def common_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What OpenVINO has converted once, for the tests that do not ask how."""
    return tmp_path_factory.mktemp("cache")


_IN_TURN = [pytest.param(name, marks=pytest.mark.long) if name == "pytorch compiled" else name for name in CASES]
"""To compile a network takes longer than all that is asked of it."""


@pytest.fixture(params=_IN_TURN)
def case(
    request: pytest.FixtureRequest,
    make_case: Callable[[str], Case | None],
    common_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Case:
    """Every engine in turn."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(common_cache))
    made = make_case(request.param)
    if made is None:
        pytest.skip("not on this machine: there is no C++ compiler, or its CPU does not compute in bfloat16")
    return made


def test_numbers_of_the_reference_and_the_declared_form(case: Case) -> None:
    engine, batch = load(case.path), patches()
    given = engine(batch)
    np.testing.assert_array_equal(batch, patches())
    assert given.dtype == np.float32
    assert given.flags.c_contiguous
    np.testing.assert_allclose(given, case.expected, atol=case.tolerance)
    assert given.std() > case.tolerance, "a constant would prove nothing"
    for axis in (2, 3, 4):
        mirrored = np.flip(engine(np.ascontiguousarray(np.flip(patches(), axis))), axis)
        is_blind = case.path.stem == "identity"
        assert is_blind or abs(mirrored - given).max() > 2 * case.tolerance, (
            "neither would a network without directions"
        )
    assert engine.batch_size == 1
    assert 1 <= engine.streams <= STREAMS
    assert all(isinstance(value, str | int | float) for value in engine.description.values())


def test_same_bits_at_any_place_and_whatever_else_was_run(case: Case) -> None:
    engine = load(case.path)
    first = engine(patches())
    kept = first.copy()
    engine(np.random.default_rng(5).random((2, 1, *PATCH), np.float32) * 3)
    engine(np.zeros((1, 1, *PATCH), np.float32))
    for shift in range(1, 3):
        np.testing.assert_array_equal(engine(np.roll(patches(), shift, axis=0)), np.roll(first, shift, axis=0))
    for index in range(3):
        np.testing.assert_array_equal(engine(patches()[index : index + 1])[0], first[index])
    np.testing.assert_array_equal(first, kept)  # the caller may keep it


def test_same_bits_from_several_threads_at_once(case: Case) -> None:
    engine = load(case.path)
    many = np.random.default_rng(9).random((24, 1, *PATCH), np.float32)
    alone = [engine(patch[None]) for patch in many]
    with ThreadPoolExecutor(engine.streams) as pool:
        together = list(pool.map(lambda patch: engine(patch[None]), many))
    np.testing.assert_array_equal(together, alone)


def test_output_that_is_not_of_the_declared_shape(case: Case) -> None:
    engine = load(case.path, "output.channels=3", "output.range=[-64,64]")
    if case.path.read_text().count("engine: identity"):
        return  # it has as many channels as are declared
    with pytest.raises(DataError) as caught:
        engine(patches(1))
    assert "(1, 2, 8, 16, 16)" in str(caught.value)
    assert "(1, 3, 8, 16, 16)" in str(caught.value)


@pytest.mark.parametrize(
    "activation",
    [pytest.param("none", marks=pytest.mark.long), pytest.param("sigmoid", marks=pytest.mark.long), "softmax"],
)
def test_some_channels_are_those_of_all(case: Case, activation: str) -> None:
    """Bit for bit, in the order that the spec has: a softmax is over all that the network gives."""
    keys = (f"model.activation={activation}", "output.range=[-64,64]")
    whole = load(case.path, *keys)(patches())
    logits = torch.from_numpy(case.expected)
    expected = {"none": logits, "sigmoid": logits.sigmoid(), "softmax": logits.softmax(1)}[activation]
    np.testing.assert_allclose(whole, expected.numpy(), atol=case.tolerance)
    identity = case.path.stem == "identity"  # which gives as many as it has to
    for taken, declared in (([1, 0], "2"), ([0], "2" if identity else "null")):
        given = load(case.path, *keys, f"output.channels={taken}", f"model.channels={declared}")(patches())
        assert given.dtype == np.float32
        assert given.flags.c_contiguous
        np.testing.assert_array_equal(given, whole[:, taken])


@pytest.mark.long
def test_channels_that_the_network_does_not_give(case: Case) -> None:
    if case.path.read_text().count("engine: identity"):
        return  # it has as many channels as are declared
    for changes, told in [
        (("output.channels=[1,4]",), r"\(1, 5 or more, 8, 16, 16\) \(batch, output\.channels,"),
        (("output.channels=[0]", "model.channels=3"), r"\(1, 3, 8, 16, 16\) \(batch, model\.channels,"),
        (("output.channels=[0]", "model.channels=1"), r"\(1, 1, 8, 16, 16\) \(batch, model\.channels,"),
    ]:
        with pytest.raises(DataError, match=told) as caught:
            load(case.path, *changes)(patches(1))
        assert "(1, 2, 8, 16, 16)" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_patch_of_another_size(case: Case) -> None:
    """A patch of another size never gives another number, nor ends the process."""
    if case.path.read_text().count("engine: pznet"):
        with pytest.raises(SpecError, match=r"compiled for patches of shape \(1, 1, 8, 16, 16\)"):
            load(case.path, "patch_size=[16,16,16]", "block_size=[42,84,84]", "output.chunk_size=[7,7,7]")
        return
    with pytest.raises(DataError, match=r"\(1, 1, 4, 16, 16\)|\(1, 2, 4, 16, 16\)|\(4, 16, 16\)"):
        load(case.path)(np.zeros((1, 1, 4, 16, 16), np.float32))
