"""Whatever has happened to a volume: a run does what is due, no more, and the output is right."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_core.audit.audit import verify
from chunkflow_core.errors import ChunkflowError
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.steps import infer
from chunkflow_core.steps import stage as stage_module
from chunkflow_core.steps.cleanup import cleanup
from chunkflow_core.steps.local import run_here
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage import durable
from tests.support.oracle.account import World
from tests.support.oracle.crashes import BrokenModel, Fault, InlineExecutor, Killed, Model, failing, faults, no_fault
from tests.support.oracle.exchange import VOID, some
from tests.support.oracle.geometry import Case, Index, cases
from tests.support.random_examples import examples

DAY = 86400.0


@dataclass(frozen=True)
class Run:
    """All that is due, for the whole ROI or a box of it, given in thousandths of the ROI."""

    box: tuple[Index, Index] | None = None
    force: bool = False
    check: bool = True
    fault: Fault | None = None


@dataclass(frozen=True)
class Cleanup:
    """Delete donations; policy as in the spec."""

    policy: Any
    fault: Fault | None = None


@dataclass(frozen=True)
class Edit:
    """Change a storage chunk; with seed 0 write it again as it is."""

    layer: str
    chunk: int
    seed: int


@dataclass(frozen=True)
class Revert:
    """Undo all edits of a layer."""

    layer: str


@dataclass(frozen=True)
class Lose:
    """Some files of the exchange are gone."""

    what: str
    seed: int


@dataclass(frozen=True)
class Overwrite:
    """Write to a storage chunk of the output; with seed 0 the same again. With none, delete it."""

    chunk: int
    seed: int | None


@dataclass(frozen=True)
class EndLate:
    """An attempt of earlier, that was given up, writes some of its storage chunks only now."""

    attempt: int
    seed: int
    receipt: bool


@dataclass(frozen=True)
class Grow:
    """Move the end of ROI and input."""

    axis: int
    of_roi: int
    of_input: int


@dataclass(frozen=True)
class Switch:
    """Use the other model from now on."""


Event = Run | Cleanup | Edit | Revert | Lose | Overwrite | EndLate | Grow | Switch


class History:
    """Lets events happen, and compares what is there with what should be."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.world, self.days, self.runs = World(case, folder), 0.0, 0
        self.seams = 0
        """How many places an audit after a run computes again: most of its time, for numbers that
        are looked at here anyway."""

    def let(self, event: Event) -> None:
        """Let something happen, half a day after the last."""
        self.days += 0.5
        world = self.world
        match event:
            case Run():
                self.run(event)
            case Cleanup():
                self.clean_up(event)
            case Lose(what, seed):
                files = (file for file in (world.exchange / what).rglob("*%*") if not file.name.endswith(VOID))
                for file in some(files, seed):
                    file.unlink()
                world.note("", self.days * DAY)
            case Overwrite(chunk, seed):
                world.overwrite(chunk, seed)
            case EndLate(attempt, seed, receipt):
                world.end_late(attempt, seed, receipt=receipt)
            case Switch():
                world.model = 1 - world.model
            case _:
                self.change_input(event)

    def change_input(self, event: Edit | Revert | Grow) -> None:
        """Let something happen to what is read."""
        match event:
            case Edit(layer, chunk, seed) if layer in self.world.layers:
                self.world.edit(layer, chunk, seed)
            case Revert(layer) if layer in self.world.layers:
                self.world.revert(layer)
            case Grow(axis, of_roi, of_input):
                self.world.grow(axis, of_roi, of_input)

    def run(self, event: Run) -> None:
        """Run, and look at what was done and what is there."""
        world, fault = self.world, event.fault or no_fault()
        self.runs += 1
        provenance = world.folder / "output" / "provenance"
        claims = provenance.exists() and provenance.read_bytes()
        workspace = self.workspace(fault)
        try:
            with failing(fault):
                prepare(workspace, other="overwrite")
                world.claim()
                box = self.box(event.box)
                requested = set(map(tuple, workspace.spec.grid.indices() if box is None else self.touching(box)))
                due = world.due(requested, force=event.force, check=event.check)
                request = Request(box, force=event.force, check_input=event.check)
                planned = plan(workspace.spec, request, workspace.state(confirm=True))
                done = self.execute(workspace, planned)
        except (Killed, BrokenModel, ChunkflowError):
            if not fault.happened:
                raise
            if (provenance.exists() and provenance.read_bytes()) != claims:
                world.claim()
            world.note(f"run-{self.runs}", self.days * DAY)
            return
        assert (set(planned.infer), set(planned.blend)) == due[:2]
        assert set(planned.up_to_date) == requested - due.infer - due.blend
        assert done == {"infer": due.infer, "blend": due.blended}
        world.note(f"run-{self.runs}", self.days * DAY)
        self.check_output(workspace, requested, check=event.check)
        if event.check and requested == set(world.geometry.blocks):
            assert verify(self.workspace(), seams=self.seams, seed=self.runs, deep=True).findings == []

    def workspace(self, fault: Fault | None = None) -> Workspace:
        """Of the volume as it is now, with nothing remembered."""
        model = Model(self.world.case, self.world.model, fault or no_fault())
        return Workspace(self.world.spec(), model)

    def execute(self, workspace: Workspace, planned: Plan) -> dict[str, set[Index]]:
        """Do all that is planned; what turned out to be necessary."""
        name, done = f"run-{self.runs}", {"infer": set[Index](), "blend": set[Index]()}
        model, now = cast("Model", workspace.engine), self.world.current()
        model.passes = 0
        for (stage, index), receipt in run_here(workspace, planned, name, lambda: None):
            passes, model.passes = model.passes, 0
            assert receipt is not None
            if receipt.run != name:
                assert passes == 0 or model.fault.happened
                continue
            done[stage].add(index)
            patches = now[index].patches if stage == "infer" else 0
            assert receipt.patches == patches
            assert passes == patches or model.fault.happened  # then there may be some of a task that failed
            if stage == "infer":
                block = self.world.geometry.blocks[index]
                assert patches + sum(receipt.skipped.values()) == math.prod(axis.last - axis.first for axis in block)
        return done

    def check_output(self, workspace: Workspace, requested: set[Index], *, check: bool) -> None:
        """Compare the blocks that are complete with the dense reference."""
        world, now, inferred = self.world, self.world.current(), self.world.account.inferred
        damaged = world.damaged()
        read = {b: done.read == now[b].read for b, done in inferred.items()}
        for index, block in world.geometry.blocks.items():
            if not damaged.isdisjoint({("infer", index), ("blend", index)}) and not (check and index in requested):
                continue
            complete = world.is_complete(index)
            edited = index in inferred and inferred[index].read.mask != now[index].read.mask
            # Blended by another mask than it was inferred by, a block stays due where nobody was
            # asked to look for edits.
            assert complete or index not in requested or (edited and not check)
            if not complete or edited:
                continue
            box = Box(vector(axis.start for axis in block), vector(axis.stop for axis in block))
            output = workspace.output.read(box)
            np.testing.assert_array_equal(output, world.expected(inferred, index), f"block {index}")
            if check and index in requested:
                assert read[index]
                if all(read[d] for d in {*world.geometry.donors[index], index}):
                    np.testing.assert_array_equal(output, world.expected(now, index), f"block {index}")

    def clean_up(self, event: Cleanup) -> None:
        """Clean up, and look at what is left."""
        world, fault = self.world, event.fault or no_fault()
        now = self.days * DAY
        limit = {"keep": -math.inf, "delete": math.inf}.get(str(event.policy))
        if limit is None:
            limit = now - event.policy["days"] * DAY
        before, spent = world.donations(), world.spent(limit)
        try:
            with failing(fault):
                assert cleanup(world.spec(event.policy), now=now) == len(spent)
        except (Killed, ChunkflowError):
            if not fault.happened:
                raise
            assert before - spent <= world.donations() <= before
            return
        assert world.donations() == before - spent

    def box(self, thousandths: tuple[Index, Index] | None) -> Box | None:
        """A part of the ROI."""
        if thousandths is None:
            return None
        start, stop = self.world.case.start, self.world.case.stop
        ends = [
            [a + t * (b - a) // 1000 for a, b, t in zip(start, stop, corner, strict=True)] for corner in thousandths
        ]
        return Box(vector(map(min, *ends)), vector(max(a, b) + 1 for a, b in zip(*ends, strict=True)))

    def touching(self, box: Box) -> list[Index]:
        """The blocks that own a voxel of a box."""
        return self.world.geometry.touching(tuple(box.start), tuple(box.stop))


CORNERS = st.tuples(*[st.integers(0, 999)] * 3)
BOXES = st.none() | CORNERS.map(lambda corner: (corner, corner)) | st.tuples(CORNERS, CORNERS)
SEEDS = st.integers(1, 1000)
LAYERS = st.sampled_from(["input", "input", "mask"])
RUNS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Run, BOXES),
    st.builds(Run, BOXES, fault=st.none() | faults(150)),
    st.builds(Run, BOXES, st.booleans(), st.booleans(), st.none() | faults(150)),
)
OTHERS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Edit, LAYERS, st.integers(0, 99), SEEDS),
    st.builds(Cleanup, st.sampled_from(["delete", "delete", "keep", {"days": 1}]), st.none() | st.none() | faults(20)),
    st.builds(Edit, LAYERS, st.integers(0, 99), st.just(0) | SEEDS),
    st.builds(Revert, LAYERS),
    st.builds(Lose, st.sampled_from(["donations", "receipts", "receipts/infer", "receipts/blend"]), SEEDS),
    st.builds(Overwrite, st.integers(0, 99), st.none() | st.just(0) | SEEDS | SEEDS),
    st.builds(Overwrite, st.integers(0, 99), SEEDS),
    st.builds(EndLate, st.integers(0, 19), SEEDS, st.booleans()),
    st.builds(Grow, st.integers(0, 2), st.integers(0, 4), st.integers(0, 3)),
    st.builds(Switch),
)
EVENTS = st.lists(st.tuples(st.lists(OTHERS, max_size=3), RUNS).map(lambda both: [*both[0], both[1]]), max_size=4)
"""Rounds: a few things happen, then there is a run."""


def play(case: Case, events: list[Event]) -> None:
    """Let it all happen, and a whole run at the end."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        history = History(case, Path(folder))
        patch.setattr(stage_module, "time", lambda: history.days * DAY)
        patch.setattr(infer, "ThreadPoolExecutor", InlineExecutor)
        patch.setattr(durable, "ThreadPoolExecutor", InlineExecutor)
        for event in events:
            history.let(event)
        history.seams = 2
        history.let(Run())


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


@examples(30)
@given(case=cases(), rounds=EVENTS)
def test_any_history(case: Case, rounds: list[list[Event]]) -> None:
    play(case, [Run(), *chain.from_iterable(rounds)])


@pytest.mark.parametrize("before", [[], [Run(), Cleanup("delete"), Edit("input", 0, 1)]], ids=["new", "edited"])
def test_every_crash_point(before: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((0, 0, 0), (4, 7, 8), (1, 1, 1), (4, 4, 4), (0, 0, 0), (0, 2, 2), (4, 4, 4), (4, 4, 4), (5, 5, 4))
    folder, kept = tmp_path / "volume", tmp_path / "kept"
    start = History(case, folder)
    monkeypatch.setattr(stage_module, "time", lambda: start.days * DAY)
    monkeypatch.setattr(durable, "ThreadPoolExecutor", InlineExecutor)
    for event in before:
        start.let(event)
    shutil.copytree(folder, kept)
    for after in count():
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        history, fault = copy.deepcopy(start), Fault("storage", after, fatal=True)
        history.let(Run(fault=fault))
        history.let(Cleanup("delete", fault))
        if not fault.happened:
            break
        history.let(Revert("input"))  # no receipt may vouch for what the run has written until then
        history.let(Run())
    assert after > 20


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
        pytest.param(row(10), [Switch(), Run(FIRST), Switch(), Run(LAST), Cleanup("delete")], id="there and back"),
    ],
)
def test_history(case: Case, events: list[Event]) -> None:
    play(case, [Run(), *events])
