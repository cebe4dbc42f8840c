"""Lets a history happen to a volume, and compares what is there with what should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest

from chunkflow_core.audit.audit import verify
from chunkflow_core.errors import ChunkflowError, SpecError
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.steps import local
from chunkflow_core.steps import stage as stage_module
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.cleanup import cleanup
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.local import run_here
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace
from tests.support.oracle.account import Due, World
from tests.support.oracle.crashes import BrokenModel, Fault, Killed, Model, failing, in_one_thread, no_fault
from tests.support.oracle.events import (
    Cleanup,
    Edit,
    EndLate,
    Event,
    Grow,
    Lose,
    Move,
    Overwrite,
    Refuse,
    Revert,
    Run,
    Switch,
)
from tests.support.oracle.exchange import corners
from tests.support.oracle.geometry import Case, Index
from tests.support.power_loss import Disk, recorded

DAY = 86400.0
_MEMORY = Path("/dev/shm")


class Outcome(NamedTuple):
    """What a run that was not held up has done."""

    requested: set[Index]
    due: Due
    planned: Plan
    done: dict[str, set[Index]]


class History:
    """Lets events happen, and compares what is there with what should be."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.world, self.days, self.runs = World(case, folder), 0.0, 0
        self.seams = 0
        """How many places an audit after a run computes again: most of its time, for numbers that
        are looked at here anyway."""
        self.at_work: list[Model] = []
        """Models of the runs at work, each within the one before."""
        self.errors: list[BaseException] = []
        """What has gone wrong within a run that may have caught it."""
        self.told: list[float] = []
        """Times that the runs at work have been told last, in seconds."""

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
                world.lose(what, seed)
            case Overwrite(chunk, seed):
                world.overwrite(chunk, seed)
            case EndLate(attempt, seed, receipt):
                world.end_late(attempt, seed, receipt=receipt)
            case Switch():
                world.model = 1 - world.model
            case Move():
                world.machine = 1 - world.machine
            case Refuse(what):
                self.refuse(what)
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

    def meanwhile(self, events: Iterable[Event]) -> None:
        """Let something happen while a run is at work; it can't catch what comes of it."""
        try:
            self.wait_for_clock()
            self.world.look(self.at_work[-1].machine)
            self.world.forget()
            for event in events:
                self.let(event)
            self.wait_for_clock()
        except BaseException as error:
            self.errors.append(error)
            raise

    def wait_for_clock(self) -> None:
        """Wait until the file system gives what is written another time than to all before."""
        probe = self.world.folder / "clock"
        probe.write_bytes(b"")
        before = probe.stat().st_mtime_ns
        while probe.stat().st_mtime_ns == before:
            probe.write_bytes(b"")

    def run(self, event: Run) -> None:
        """Run, and look at what was done and what is there."""
        world, fault = self.world, event.fault or no_fault()
        self.runs += 1
        if event.meanwhile:
            fault.action = lambda: self.meanwhile(event.meanwhile)
        before, wrong, folders = world.owner, world.lies(), (world.folder / "output", world.folder / "exchange")
        loss = event.power_loss
        with nullcontext() if loss is None else recorded(*folders) as recording:
            outcome = self.held_up(event, f"run-{self.runs}", fault)
        if self.errors:
            raise self.errors[0]
        if outcome is None:
            self.check_stored()
        else:
            self.check(event, outcome)
        if recording is not None:
            wrong |= world.lies()
            random = Random(loss)
            disk = Disk(recording)
            for step in recording.steps[: random.randrange(len(recording.steps) + 1)]:
                disk.apply(step)
            disk.draw(random)
            world.restore(before)
            only_runs = all(isinstance(other, Run | Switch | Move) for other in event.meanwhile)
            assert world.lies() <= wrong or not only_runs

    def held_up(self, event: Run, run: str, fault: Fault) -> Outcome | None:
        """Run; None if something has happened meanwhile, with which a run may end as it likes."""
        world = self.world
        if not self.at_work:
            world.late.clear()
        model = Model(world.case, world.model, world.machine, fault)
        outcome, wrong = None, world.spoiled()
        try:
            with self.working(model), failing(fault):
                outcome = self.attempt(event, run, Workspace(world.spec(), model), model)
        except (Killed, BrokenModel, ChunkflowError):
            if not fault.happened:
                deleted = any(not file.exists() for file in wrong)  # by the blend that has found it
                if not self.mend() and not deleted:
                    raise
                return self.held_up(event, f"{run}-again", fault)
        world.look(model.machine)
        world.forget()
        return None if fault.happened else outcome

    @contextmanager
    def working(self, model: Model) -> Iterator[None]:
        """Let a run be at work that uses a model."""
        self.at_work.append(model)
        self.told.append(0.0)
        try:
            yield
        finally:
            self.at_work.pop()
            self.told.pop()

    def attempt(self, event: Run, run: str, workspace: Workspace, model: Model) -> Outcome:
        """Prepare, plan, do what is due."""
        world, fault, is_new = self.world, model.fault, self.world.is_new
        prepare(workspace, other="overwrite")
        begun = world.look(model.machine)
        assert fault.happened or begun == is_new
        model.epoch = world.held[1]
        box = self.box(event.box)
        requested = set(map(tuple, workspace.spec.grid.indices() if box is None else self.touching(box)))
        due = world.due(requested, force=event.force, check=event.check)
        request = Request(box, force=event.force, check_input=event.check)
        planned = plan(workspace.spec, request, workspace.state(confirm=True))
        return Outcome(requested, due, planned, self.execute(workspace, planned, run, model))

    def mend(self) -> bool:
        """Delete donations that an audit finds to be spoiled, and say whether there are any."""
        spoiled = self.world.spoiled()
        if spoiled:
            findings = verify(self.workspace(), seams=0, deep=True).findings
            found = {finding.subject.rpartition("/")[2] for finding in findings if finding.kind == "donation"}
            assert {file.name for file in spoiled} <= found
        for file in spoiled:
            file.unlink()
        return bool(spoiled)

    def check(self, event: Run, outcome: Outcome) -> None:
        """Check what a run has done in which nothing has happened meanwhile."""
        requested, due, planned, done = outcome
        assert (set(planned.infer), set(planned.blend)) == due[:2]
        assert set(planned.up_to_date) == requested - due.infer - due.blend
        assert done == {"infer": due.infer, "blend": due.blended}
        self.check_output(self.workspace(), requested, check=event.check)
        if event.check and requested == set(self.world.geometry.blocks) and not self.mend():
            assert verify(self.workspace(), seams=self.seams, seed=self.runs, deep=True).findings == []

    def workspace(self) -> Workspace:
        """Of the volume as it is now, with nothing remembered."""
        world = self.world
        return Workspace(world.spec(), Model(world.case, world.model, world.machine, no_fault()))

    def execute(self, workspace: Workspace, planned: Plan, run: str, model: Model) -> dict[str, set[Index]]:
        """Do all that is planned; what turned out to be necessary."""
        done, now = {"infer": set[Index](), "blend": set[Index]()}, self.world.current()
        model.passes = 0
        for (stage, index), receipt in run_here(workspace, planned, run, lambda: None):
            passes, model.passes = model.passes, 0
            assert receipt is not None
            if receipt.run != run:
                assert passes == 0 or model.fault.happened
                continue
            done[stage].add(index)
            if model.fault.action is not None and model.fault.happened:
                continue
            patches = now[index].patches if stage == "infer" else 0
            assert receipt.patches == patches
            assert passes == patches or model.fault.happened  # then there may be some of a task that failed
            if stage == "infer":
                block = self.world.geometry.blocks[index]
                assert patches + sum(receipt.skipped.values()) == math.prod(axis.last - axis.first for axis in block)
        return done

    def noted(self, stage: str, do: Callable[..., Any]) -> Callable[..., Any]:
        """A stage, of which the account takes note when it has ended."""

        def call(workspace: Workspace, index: Index, **options: Any) -> Any:
            model, world = self.at_work[-1], self.world
            seen, written = world.seen(model.model, model.machine), model.fault.written
            foreign = model.epoch not in ("", world.held[1])
            written.clear()
            try:
                done = do(workspace, index, **options)
                assert not foreign, "the output is another one's"
            except AssertionError as error:
                self.errors.append(error)
                raise
            finally:
                if foreign and written:
                    self.errors.append(AssertionError("the output is another one's"))
                world.ended(stage, index, seen, written, self.told[-1])
            return done

        return call

    def time(self) -> float:
        """The time, in seconds."""
        if self.told:
            self.told[-1] = self.days * DAY
        return self.days * DAY

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Let the library's stages be noted, at the history's own times, in one thread."""
        patch.setattr(stage_module, "time", self.time)
        patch.setattr(local, "inference_and_donate", self.noted("infer", inference_and_donate))
        patch.setattr(local, "receive_and_blend", self.noted("blend", receive_and_blend))
        in_one_thread(patch)

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

    def check_stored(self) -> None:
        """Compare what is stored of blocks that are complete with the dense reference."""
        world, inferred, damaged = self.world, self.world.account.inferred, self.world.damaged()
        there = world.output.stored()
        for index in filter(world.is_complete, world.geometry.blocks):
            if not damaged.isdisjoint({("infer", index), ("blend", index)}):
                continue
            voxels, start = world.expected(inferred, index), [axis.start for axis in world.geometry.blocks[index]]
            for name in [name for name, (_, block) in world.geometry.chunks.items() if block == index]:
                low, high = corners(name)
                part = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
                assert there[name] == voxels[(slice(None), *part)].tobytes(), f"storage chunk {name}"

    def refuse(self, what: str) -> None:
        """Look at what somebody does who may not overwrite the output, which is another one's."""
        world = self.world
        if world.claimed is None or world.is_gone or not world.output.stored():
            return
        mine, (model, machine) = (world.model, world.machine), world.claimed
        world.model, world.machine = (1 - model, machine) if what == "model" else (model, 1 - machine)
        before = world.contents()
        with pytest.raises(SpecError):
            prepare(self.workspace())
        assert world.contents() == before
        if what == "machine":
            self.intrude()
        world.model, world.machine = mine

    def intrude(self) -> None:
        """Let a machine that gives other bits work without being prepared."""
        world, fault = self.world, no_fault()
        model = Model(world.case, world.model, world.machine, fault)
        workspace = Workspace(world.spec(), model)
        with self.working(model), failing(fault), suppress(ChunkflowError):
            planned = plan(workspace.spec, Request(force=True, check_input=False), workspace.state())
            for _, receipt in run_here(workspace, planned, "intruder", lambda: None):
                assert receipt is not None
                assert receipt.run != "intruder" or not receipt.patches
        self.check_stored()

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


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder for volumes, in memory if there is a file system for that: nothing waits for it."""
    with TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def play(case: Case, events: Iterable[Event]) -> None:
    """Let it all happen, and a whole run at the end."""
    with in_memory() as folder, pytest.MonkeyPatch.context() as patch:
        history = History(case, folder)
        history.watch(patch)
        for event in events:
            history.let(event)
        history.seams = 2
        history.let(Run())
