"""Whatever has happened to a volume: a run does what is due, no more, and the output is right."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain, count
from typing import Any

import pytest
from hypothesis import given, seed, settings

from tests.promises.histories import History, in_memory, play
from tests.support.oracle.crashes import Fault
from tests.support.oracle.events import (
    EVENTS,
    Cleanup,
    Edit,
    EndLate,
    Event,
    Grow,
    Lose,
    Move,
    Overwrite,
    Revert,
    Run,
    Switch,
    at,
)
from tests.support.oracle.geometry import Case, cases
from tests.support.random_examples import examples

HISTORIES, PARTS = int(os.environ.get("CHUNKFLOW_TEST_HISTORIES", "320")), 40
"""How many random histories the long test plays, and parts of them, which processes share."""


def test_a_mask_that_is_edited_between_the_stages() -> None:
    case = Case(
        start=(0, 0, 0),
        stop=(2, 1, 9),
        beyond=(0, 0, 0),
        patch=(2, 1, 3),
        halo=(0, 0, 0),
        overlap=(0, 0, 1),
        block=(4, 1, 4),
        chunk=(4, 1, 2),
        input_chunk=(6, 3, 4),
        masked=True,
        seed=277,
    )
    edits: list[Event] = [Edit("mask", 72, 657), Lose("receipts/blend", 24), Edit("mask", 60, 604)]
    play(case, [Run(), Edit("input", 0, 1), Switch(), Run(), *edits, Run(check=False)])


@examples(15)
@given(case=cases(), rounds=EVENTS)
def test_any_history(case: Case, rounds: list[list[Event]]) -> None:
    play(case, [Run(), *chain.from_iterable(rounds)])


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_many_histories(part: int) -> None:
    @seed(part)
    @settings(examples(1), max_examples=HISTORIES // PARTS)
    @given(case=cases(tiny=True), rounds=EVENTS)
    def any_history(case: Case, rounds: list[list[Event]]) -> None:
        play(case, [Run(), *chain.from_iterable(rounds)])

    any_history()


SQUARE = Case((0, 0, 0), (4, 7, 8), (1, 1, 1), (4, 4, 4), (0, 0, 0), (0, 2, 2), (4, 4, 4), (4, 4, 4), (5, 5, 4))
"""Four blocks."""


@contextmanager
def kept(case: Case, before: list[Event]) -> Iterator[Callable[[], AbstractContextManager[History]]]:
    """What makes what a history has left there again, for another one to go on with it."""
    with in_memory() as folder:
        first = History(case, folder / "volume")
        with pytest.MonkeyPatch.context() as patch:
            first.watch(patch)
            for event in before:
                first.let(event)
        shutil.copytree(folder / "volume", folder / "kept")

        @contextmanager
        def again() -> Iterator[History]:
            shutil.rmtree(folder / "volume")
            shutil.copytree(folder / "kept", folder / "volume")
            history = copy.deepcopy(first)
            with pytest.MonkeyPatch.context() as patch:
                history.watch(patch)
                yield history

        yield again


COLUMN = Case((0, 0, 0), (8, 1, 2), (0, 0, 0), (2, 1, 2), (0, 0, 0), (1, 0, 0), (4, 1, 2), (2, 1, 2), (1, 1, 2))
"""Two blocks along z, of four patches each."""
EDITED: list[Event] = [Run(), Cleanup("delete"), Edit("input", 0, 1)]


@pytest.mark.parametrize(
    ("case", "before"),
    [
        pytest.param(SQUARE, [], id="new"),
        pytest.param(SQUARE, EDITED, id="edited", marks=pytest.mark.long),
        pytest.param(
            COLUMN,
            [Run(), Edit("input", 0, 1), Run(), *(EndLate(k, k, receipt=True) for k in (2, 3, 4))],
            id="receipts that disagree",
        ),
    ],
)
def test_every_crash_point(case: Case, before: list[Event]) -> None:
    with kept(case, before) as again:
        for after in count():
            with again() as history:
                fault = Fault("storage", after, fatal=True)
                history.let(Run(fault=fault))
                history.let(Cleanup("delete", fault))
                if not fault.happened:
                    break
                history.let(Revert("input"))  # no receipt may vouch for what the run has written until then
                history.let(Run())
    assert after > 10


@pytest.mark.parametrize(
    "meanwhile",
    [
        pytest.param([Run()], id="another run", marks=pytest.mark.long),
        pytest.param([Switch(), Run()], id="the other model", marks=pytest.mark.long),
        pytest.param([Switch(), Run(), Switch(), Run()], id="the other model, and this one again"),
        pytest.param([Move(), Run()], id="another machine", marks=pytest.mark.long),
        pytest.param([Edit("input", 4, 3)], id="an edit of what is read later", marks=pytest.mark.long),
        pytest.param([Edit("input", 0, 3), Run()], id="an edit and another run"),
        pytest.param([EndLate(0, 3, receipt=True), EndLate(1, 5, receipt=True)], id="late receipts"),
        pytest.param([EndLate(0, 3, receipt=False), EndLate(2, 5, receipt=False)], id="late writes"),
    ],
)
@pytest.mark.parametrize(
    "before",
    [
        pytest.param([Run(), Edit("input", 0, 1), Run(), Edit("input", 0, 2)], id="edited"),
        pytest.param([Run(), Switch()], id="other model", marks=pytest.mark.long),
    ],
)
def test_every_moment(before: list[Event], meanwhile: list[Event]) -> None:
    with kept(COLUMN, before) as again:
        for where in ("storage", "forward"):
            for after in count():
                with again() as history:
                    run = at(Run(power_loss=after if after % 2 else None), where, after, *meanwhile)
                    history.let(run)
                    history.let(Run())
                    assert run.fault is not None
                    if not run.fault.happened:
                        break
            assert after > 5


@pytest.mark.parametrize(
    "before", [[], [Run(), Edit("input", 0, 1)], [Run(), Switch()]], ids=["new", "edited", "other"]
)
def test_many_power_losses(before: list[Event]) -> None:
    with kept(COLUMN, before) as again:
        for loss in range(1, 20):
            with again() as history:
                history.let(Run(power_loss=loss))
                history.let(Run())


def row(length: int, **changes: Any) -> Case:
    """A volume of one row of blocks along x."""
    ones, zeros = (1, 1, 1), (0, 0, 0)
    case = Case(zeros, (1, 1, length), zeros, (1, 1, 4), zeros, (0, 0, 2), (1, 1, 4), (1, 1, 4), ones)
    return replace(case, **changes)


LAST = ((999, 999, 999), (999, 999, 999))
FIRST = ((0, 0, 0), (0, 0, 0))


@pytest.mark.parametrize(
    ("case", "events"),
    [
        pytest.param(row(8, halo=(0, 0, 1)), [Grow(2, 2, 2)], id="the high end decides nothing at the low end"),
        pytest.param(
            row(10, patch=(1, 1, 2), overlap=(0, 0, 1), chunk=(1, 1, 1)),
            [Edit("input", 6, 1)],
            id="an edit that changes nothing that is given",
        ),
        pytest.param(
            row(12, masked=True, input_chunk=(4, 2, 4)),
            [Edit("mask", 1, 1), Edit("input", 0, 3), Run(FIRST), Revert("mask")],
            id="a block blended for its neighbour, with a mask that it has not been inferred with",
        ),
        pytest.param(
            row(
                2,
                stop=(4, 1, 2),
                patch=(1, 1, 1),
                overlap=(0, 0, 0),
                block=(4, 1, 2),
                chunk=(4, 1, 2),
                masked=True,
                input_chunk=(4, 2, 4),
            ),
            [Edit("input", 0, 1)],
            id="an edit of planes that are outside the mask",
        ),
        pytest.param(
            row(12),
            [Cleanup("delete"), Edit("input", 5, 1), Run(LAST, force=True)],
            id="an edit that comes to light when donations are needed again",
        ),
        pytest.param(row(10), [Grow(2, 3, 0), Cleanup("delete"), Run(LAST, force=True)], id="grown"),
        pytest.param(
            row(12, chunk=(1, 1, 1)),
            [Overwrite(2, 1), Overwrite(6, None), Run(check=False)],
            id="late writes that nobody looks for",
        ),
        pytest.param(
            row(12, chunk=(1, 1, 1)),
            [Cleanup("delete"), Overwrite(10, 1), Overwrite(8, 0), Run(LAST)],
            id="a late write to a frame whose donations are gone",
        ),
        pytest.param(
            row(12, chunk=(1, 1, 1)),
            [Edit("input", 5, 1), Run(), *(EndLate(k, k, receipt=True) for k in range(9)), Run(FIRST), Revert("input")],
            id="all that was done before an edit ends late",
        ),
        pytest.param(
            row(16, block=(1, 1, 8), chunk=(1, 1, 1)),
            [Edit("input", 1, 1), Run(), EndLate(2, 1, receipt=True), Run(check=False)],
            id="two receipts that disagree on what was read, and on nothing that was given",
        ),
        pytest.param(
            row(12, chunk=(1, 1, 1)),
            [Switch(), Run(), Switch(), Run(FIRST), *(EndLate(k, k, receipt=True) for k in range(6, 11))],
            id="receipts of an earlier claim, and some of its storage chunks",
        ),
        pytest.param(
            row(12),
            [
                *(Edit("input", 7, 1), Run()),
                *(EndLate(k, random, receipt=False) for k in range(9) for random in (1, 3, 5)),
                *(Overwrite(2, 1), Run()),
            ],
            id="donations of before an edit, late",
        ),
        pytest.param(row(10), [Switch(), Run(FIRST), Switch(), Run(LAST), Cleanup("delete")], id="there and back"),
    ],
)
def test_history(case: Case, events: list[Event]) -> None:
    play(case, [Run(), *events])
