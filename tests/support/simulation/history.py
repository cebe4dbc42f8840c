"""Runs of a volume as Airflow makes them, one after another, whatever befalls them."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from chunkflow_core.audit.audit import repair, verify
from chunkflow_core.audit.findings import Finding
from chunkflow_core.errors import ChunkflowError
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.cleanup import cleanup
from chunkflow_core.steps.failures import is_final
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.local import DueTasks, Task
from chunkflow_core.steps.prepare import Other, prepare
from chunkflow_core.steps.provenance import History as Provenance
from tests.support.simulation.scheduler import CALM, Actor, Late, Scheduler, Weather
from tests.support.simulation.world import World

TRIES = 4
"""How often a task is tried, as the DAG says by default, before its run fails."""


@dataclass
class Run:
    """One run of the volume."""

    name: str
    model: int = 0
    check: bool = True
    force: bool = False
    blocks: frozenset[Vector] | None = None
    """What is asked for; None for the whole ROI."""
    workers: int = 3
    due: Plan | None = None
    failed: list[tuple[Task, BaseException]] = field(default_factory=list)
    """Tasks that have ended for good without being done."""
    begun: set[Task] = field(default_factory=set)


class History:
    """A volume, and all that works on it."""

    def __init__(self, world: World, scheduler: Scheduler) -> None:
        """Begin with a volume of which nothing is done."""
        self.world, self.scheduler = world, scheduler
        self.ends: Counter[str] = Counter()
        world.receipt_written = self._check_receipt
        self._models: dict[Actor, int] = {}
        """The model of each attempt at a task."""

    def start(self, name: str, work: Callable[[], object]) -> Actor:
        """Let a process begin."""
        return self.scheduler.start(name, work)

    def run(self, run: Run, weather: Weather = CALM, beside: Callable[[], object] | None = None) -> Actor:
        """Let a run go from its begin to its end, with an editor beside it."""
        scheduler = self.scheduler
        scheduler.weather = weather
        driver = self.start(f"{run.name}", partial(self._drive, run))
        if beside is not None:
            self.start("editor", beside)
        scheduler.run(lambda: driver.over or driver.given_up)
        if not driver.over:
            scheduler.kill(driver)
        for actor in [actor for actor in scheduler.actors if actor.name != "editor"]:
            if not weather.suspended or scheduler.random.random() < 0.5:
                scheduler.kill(actor)
            else:
                scheduler.suspend(actor)
        scheduler.run(lambda: not scheduler.actors)
        self._note(driver)
        for task, error in run.failed:
            self._check_failure(task, error)
        return driver

    def _check_failure(self, task: Task, error: BaseException) -> None:
        """Make sure that a task that no retry helps was failed by a late writer."""
        code = getattr(error, "exit_code", 137)
        self.ends[f"{task[0]} failed with {code}"] += 1
        if code in (75, 137):
            return
        assert task[0] == "blend", error
        assert code in (65, 66), error
        assert self.had_late_writers, error

    def alone(self, name: str, work: Callable[[], object], weather: Weather = CALM) -> Actor:
        """Let something that is no run happen from begin to end."""
        self.scheduler.weather = weather
        actor = self.start(name, work)
        self.scheduler.run(lambda: actor.over or actor.given_up)
        for other in list(self.scheduler.actors):
            self.scheduler.suspend(other)
        self._note(actor)
        return actor

    def _note(self, actor: Actor) -> None:
        error = actor.error
        if isinstance(error, ChunkflowError | None):
            self.ends["killed" if actor.dead else str(getattr(error, "exit_code", 0))] += 1
            return
        raise AssertionError("".join(traceback.format_exception(error))) from error

    def _drive(self, run: Run) -> None:
        """Prepare, plan, and hand out tasks."""
        world = self.world
        workspace = world.workspace(run.model)
        other: Other = "refuse" if self.owner in (None, run.model) else "overwrite"
        prepare(workspace, run=run.name, other=other, once=True)
        request = Request(blocks=run.blocks, check_input=run.check, force=run.force)
        run.due = plan(workspace.spec, request, workspace.state(confirm=True))
        tasks, tries, at_work = DueTasks(workspace.spec.grid, run.due), Counter[Task](), dict[Task, Actor]()
        again: list[Task] = []
        while True:
            while len(at_work) < run.workers and (task := again.pop(0) if again else tasks.next()):
                tries[task] += 1
                name = f"{run.name} {task[0]} {task[1]} {tries[task]}"
                at_work[task] = self.start(name, partial(self._do, run, task))
                self._models[at_work[task]] = run.model
            if not at_work:
                return
            self.scheduler.wait(lambda: any(actor.over or actor.given_up for actor in at_work.values()))
            for task in [task for task, actor in at_work.items() if actor.over or actor.given_up]:
                actor = at_work.pop(task)
                self._note(actor)
                if actor.over and not actor.dead and actor.error is None:
                    tasks.done(task)
                    continue
                code = getattr(actor.error, "exit_code", 137)
                if tries[task] < TRIES and not is_final(code, inputs_may_come=task[0] == "blend"):
                    again.append(task)
                else:
                    tasks.failed(task)
                    run.failed.append((task, actor.error or Exception("killed")))

    def _do(self, run: Run, task: Task) -> None:
        """One try of a task, as a process of its own."""
        assert run.due is not None
        workspace, (stage, index) = self.world.workspace(run.model), task
        why = run.due.why.get(index)
        if stage == "infer":
            inference_and_donate(workspace, index, run=run.name, why=why)
        else:
            receive_and_blend(workspace, index, run=run.name, why=why)

    def clean_up(self, weather: Weather = CALM) -> None:
        """Delete the donations that nobody needs: nothing is due then that was not before."""
        model, quiet = self.owner or 0, self.is_quiet
        before = self.due(model, check=False) if quiet else None
        self.alone("cleanup", partial(cleanup, self.world.specs[model], now=self.scheduler.now), weather)
        if before is not None and self.is_quiet:
            assert self.due(model, check=False) == before, "cleaning up has made something due"

    def repair(self, weather: Weather = CALM) -> frozenset[Vector]:
        """Undo what is wrong; the blocks that have to be made right."""
        found = list[Vector]()
        self.alone("repair", lambda: found.extend(repair(self.world.workspace(self.owner or 0))), weather)
        return frozenset(found)

    @property
    def owner(self) -> int | None:
        """The model that has claimed the output; None if it has not been made yet."""
        if not self.world.has_output:
            return None
        fingerprint = Provenance(self.world.specs[0]).fingerprint
        return next((model for model in (0, 1) if self.world.specs[model].fingerprint == fingerprint), None)

    def due(self, model: int, *, check: bool = True) -> Plan:
        """What a plan says."""
        workspace = self.world.workspace(model)
        return plan(workspace.spec, Request(check_input=check), workspace.state())

    def check(self) -> None:
        """Make sure that nothing is believed that is not true, whatever may still come."""
        if (model := self.owner) is None:
            return
        checked, grid = self.due(model), self.world.specs[model].grid
        wrong = [index for index in checked.up_to_date if not self.world.is_right(model, index)]
        assert not wrong, f"a checked plan calls blocks up to date that are wrong: {wrong}"
        if self.had_late_writers:
            return
        for index in self.due(model, check=False).up_to_date:
            assert checked.why.get(index) != "output", f"{index} has a receipt, and not its storage chunks"
            changed = not set(checked.infer).isdisjoint(grid.donors(index))
            assert index not in checked.blend or changed, f"{index} has a receipt, and not its frame"

    def _check_receipt(self, receipt: dict[str, Any]) -> None:
        """Make sure that all that a receipt vouches for is there when it is written."""
        if not self.had_late_writers:
            missing = [
                name for name, (digest, _) in receipt["written"].items() if not self.world.is_stored(name, digest)
            ]
            assert not missing, f"a receipt comes before its storage chunks: {missing}"

    def findings(self, model: int) -> list[Finding]:
        """What an audit finds that reads all there is."""
        return verify(self.world.workspace(model), seams=0, seed=0, deep=True).findings

    @property
    def is_quiet(self) -> bool:
        """Whether nobody is at work, and nothing under way."""
        scheduler = self.scheduler
        return not (scheduler.actors or scheduler.zombies or scheduler.late)

    def calm(self) -> None:
        """Let everything end that is still at work or under way, in any order."""
        scheduler, disowned = self.scheduler, list[Actor]()
        scheduler.weather = CALM
        while some := [*scheduler.zombies, *scheduler.late, *scheduler.actors]:
            one = scheduler.random.choice(some)
            if isinstance(one, Late):
                scheduler.arrive(one)
            elif one in scheduler.zombies:
                if self.is_of_earlier_claim(one):
                    disowned.append(one)
                scheduler.wake(one)
            if scheduler.actors:
                scheduler.run(after(scheduler, scheduler.random.randrange(30)))
        for actor in disowned:
            receipts = [what for what in actor.wrote if what.startswith("put") and what.endswith(".json")]
            assert not receipts, f"{actor.name} has written for an earlier claim: {receipts}"
            self._note(actor)

    def is_of_earlier_claim(self, actor: Actor) -> bool:
        """Whether an attempt's output is another's by now, and it has still to look at that."""
        return self._models.get(actor, self.owner) != self.owner and not actor.request.startswith(("put", "delete"))

    def end(self, model: int) -> None:
        """Make sure that two runs do all that is due, and that it is right.

        What a late donation has replaced is noticed, not healed: that takes a repair.
        """
        self.calm()
        self.check()
        if self.owner == model and self.scheduler.random.random() < 0.3:
            self.repair_and_finish(model)
        for number in range(2):
            self.finish(Run(f"last {number}", model, workers=4))
        if found := self.findings(model):
            assert self.had_late_writers, found
            assert {finding.kind for finding in found} == {"donation"}, found
            self.repair_and_finish(model)
        due = self.due(model)
        assert not due.infer, due
        assert not due.blend, due
        assert not (found := self.findings(model)), found

    def finish(self, run: Run) -> None:
        """Run in calm weather: each storage chunk is written once at most, and all is right."""
        before = self.world.written.copy()
        error = self.run(run).error
        assert error is None, error
        twice = [name for name, number in (self.world.written - before).items() if number > 1]
        assert not twice, f"written more than once: {twice}"
        if run.failed:  # the next run makes again what a late donation had replaced
            again = Run(f"{run.name} again", run.model)
            assert self.run(again).error is None
            assert not again.failed, again.failed
        self.check_run(run)

    def check_run(self, run: Run) -> None:
        """Make sure that a whole run that has ended well, with nobody beside it, has done all."""
        assert self.owner == run.model
        wrong = [index for index in self.world.geometry.blocks if not self.world.is_right(run.model, index)]
        assert not wrong, f"wrong after a run: {wrong}"

    def repair_and_finish(self, model: int) -> None:
        """Undo what is wrong, and do that again: no more damage is there."""
        self.ends["repaired"] += 1
        run = Run("repaired", model, check=False, blocks=self.repair(), workers=4)
        assert self.run(run).error is None
        assert not run.failed, run.failed
        # A mask that was edited between a block's stages leaves it due until edits are looked for.
        left = {"not done", "incomplete"} if self.world.case.masked else {"not done"}
        found = [finding for finding in self.findings(model) if finding.kind not in left]
        assert not found, found

    @property
    def had_late_writers(self) -> bool:
        """Whether any writer has come late, or twice."""
        happened = self.scheduler.happened
        return any(happened[what] for what in ("suspended", "late", "late and killed", "twice"))


def after(scheduler: Scheduler, steps: int) -> Callable[[], bool]:
    """So many steps, or when nobody is left."""
    end = scheduler.steps + steps
    return lambda: scheduler.steps >= end or not scheduler.actors
