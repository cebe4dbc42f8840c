"""What each task of a volume's DAG runs: a plain object, which knows nothing of Airflow.

A command says what stands on its command line, what must not start, and what its output is good
for. ``operators.local`` runs commands as processes on the worker, ``operators.kubernetes`` in
pods::

    Command ─┬─ Step ─── Prepare, Select, Verify, Cleanup
             ├─ Publish                holds the output's Asset
             └─ Stage ── Infer, Blend  each holds the index of its block
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from chunkflow_core.errors import ChunkflowError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Vector, vector
from operators.request import OTHER_MODEL, check_request, requested_box

if TYPE_CHECKING:
    from airflow.sdk import Asset

PREPARE, SELECT, VERIFY, PUBLISH, CLEANUP = "prepare", "select_blocks", "verify", "publish", "cleanup"
"""Task ids of a volume's DAG.

Other tasks look up the XComs of the first two and of the report (``publish``).
"""

_STEP_COLOR = "#e8e8f4"
_EVENT_KEYS = ("run", "fingerprint", "output", "bounding_box", "changed_blocks", "manifest", "picture")
"""What of the report goes with the event of the output's Asset."""


def infer_task_id(index: Vector) -> str:
    """Task id of a block's inference: ``infer.z_y_x``."""
    return "infer.{}_{}_{}".format(*index)


def blend_task_id(index: Vector) -> str:
    """Task id of a block's blending: ``blend.z_y_x``."""
    return "blend.{}_{}_{}".format(*index)


class SkippedError(Exception):
    """The task has nothing to do; the message says why."""


class Run(Protocol):
    """What commands ask of the DAG run that their task belongs to."""

    @property
    def id(self) -> str:
        """Airflow's id of the run."""

    @property
    def params(self) -> Mapping[str, Any]:
        """What is asked of the run: the parameters in ``operators.request.DEFAULTS``."""

    @property
    def settings(self) -> list[str]:
        """What the preparation has found for the run, as ``KEY=VALUE`` settings of the spec."""

    @property
    def grid(self) -> BlockGrid:
        """The volume's blocks as this run sees them: with its settings."""

    @property
    def reasons(self) -> Mapping[str, str] | None:
        """The selection's reasons why blocks are due, by ``z_y_x``; None without a selection."""

    @property
    def scheduler(self) -> str:
        """Who has started the run: the DAG, and this Airflow."""

    @property
    def is_alone(self) -> bool:
        """Whether it is the only run of the DAG at work."""

    @property
    def first_try(self) -> bool:
        """Whether the task is at work for the first time, and not tried or cleared again."""

    def other_at_work(self) -> str | None:
        """The id of another run of the DAG that is past its preparation and has not ended.

        None if there is none.
        """


@dataclass(frozen=True, slots=True)
class Result:
    """What follows from the output of a command."""

    value: Mapping[str, Any] | None = None
    """For other tasks of the run: the task's XCom."""
    message: str = ""
    """For the task's log."""
    skipped_tasks: tuple[str, ...] = ()
    """Ids of later tasks that have nothing to do."""
    event: Mapping[str, Any] | None = None
    """What goes with the event of the command's Asset."""
    skipped_because: str = ""
    """Why the task itself counts as skipped; empty if it doesn't."""


class Command:
    """One command on the spec of a volume."""

    name: ClassVar[str]
    """The command in a word, as Airflow's UI, labels and metrics show it."""
    module: ClassVar[tuple[str, ...]]
    """Module, and subcommand if it has any."""
    color: ClassVar[str] = _STEP_COLOR
    """Color of its tasks in Airflow's UI."""
    runs_model: ClassVar[bool] = False
    """Whether it needs what inference needs: a GPU, memory for the network."""
    inputs_may_come: ClassVar[bool] = False
    """Whether a missing input may appear by itself, so that a retry is worth it."""
    one_at_a_time: ClassVar[bool] = False
    """Whether only one of all the DAG's runs may be at work on such a task."""
    block: Vector | None
    """Index of the block that it is for, zyx; None if it is for the whole volume."""
    asset: Asset | None
    """The Asset that it updates."""

    def check(self, run: Run) -> None:
        """Look whether it may start.

        Raises:
            SkippedError: There is nothing to do.
            ChunkflowError: It must not start; of these, a ``UsageError`` is final.
        """

    def line(self, spec: str, run: Run) -> list[str]:
        """The arguments of ``python -m``.

        Args:
            spec: The spec, by the name that it has where the command runs.
            run: The run that the task is part of.
        """
        settings = [word for setting in run.settings for word in ("--set", setting)]
        return [*self.words(run), spec, *settings, *self.options(run)]

    def words(self, run: Run) -> tuple[str, ...]:
        """Module and subcommand: what stands before the spec."""
        return self.module

    def options(self, run: Run) -> list[str]:
        """What stands after the spec and its settings."""
        return []

    def result(self, output: str, run: Run) -> Result:
        """What follows from its standard output, once it has ended well."""
        return Result()


class Step(Command):
    """A command on the whole volume."""

    block = None
    asset = None


@dataclass(frozen=True)
class Stage(Command):
    """A command on one block."""

    one_at_a_time = True  # never the same block in two runs at once
    asset = None
    block: Vector

    def check(self, run: Run) -> None:
        """Look whether the run knows the block.

        Raises:
            SkippedError: It does not: Airflow has added the task since the run began.
        """
        if run.settings and self.block not in run.grid:
            raise SkippedError("the volume has grown since this run began; the next one does this block")

    def options(self, run: Run) -> list[str]:
        """The block, the run, and the reason why the block is due, if there is one."""
        reason = self.reason(run)
        run_arguments = ["--run", run.id]
        if not run.first_try and run.is_alone:  # it may be cleared after another run of the DAG has failed
            run_arguments += ["--scheduler", run.scheduler]
        return ["--block", *map(str, self.block), *run_arguments, *(["--reason", reason] if reason else [])]

    def reason(self, run: Run) -> str | None:
        """The selection's reason why the block is due; None if it has given none."""
        return (run.reasons or {}).get("_".join(map(str, self.block)))


@dataclass(frozen=True)
class Infer(Stage):
    """First stage of one block: infers its patches, writes what is final, donates the rest."""

    name = "infer"
    module = ("chunkflow_core.inference_and_donate",)
    color = "#d5ebf9"
    runs_model = True

    def reason(self, run: Run) -> str | None:
        """The selection's reason why the block is due.

        ``forced`` if it has given none: then the block was up to date, and a user has cleared its
        task.
        """
        return super().reason(run) or (None if run.reasons is None else "forced")


@dataclass(frozen=True)
class Blend(Stage):
    """Second stage of one block: adds up what its donors gave and writes the rest of the block."""

    name = "blend"
    module = ("chunkflow_core.receive_and_blend",)
    color = "#d9f2d9"
    inputs_may_come = True


@dataclass(frozen=True)
class Prepare(Step):
    """Checks all that can be known beforehand, and makes the output; a run's first task."""

    name = "prepare"
    module = ("chunkflow_core", "prepare")
    runs_model = True
    one_at_a_time = True  # so that of two runs, one sees that the other has begun

    def check(self, run: Run) -> None:
        """Look whether the run may start.

        Raises:
            UsageError: What is asked of it can't be meant.
            ChunkflowError: Another run is at work on the volume.
        """
        check_request(run.params, run.grid)
        if other := run.other_at_work():
            raise ChunkflowError(
                f"run {other} of this volume is at work; nothing of this run has been started. Clear this task when "
                "the other run has ended"
            )

    def options(self, run: Run) -> list[str]:
        """The run, and what to do if the output holds another model's results."""
        run_arguments = ["--run", run.id, "--scheduler", run.scheduler]
        return ["--once", *run_arguments, "--json", *OTHER_MODEL[run.params["other_model"]]]

    def result(self, output: str, run: Run) -> Result:
        """Have all other tasks of the run look at the same part of a volume that may be growing."""
        found = json_of(output)
        return Result({"roi": found["roi"], "input.bounds": found["input_bounds"]})


@dataclass(frozen=True)
class Select(Step):
    """Asks the planner what is due, so that everything else is skipped in one step."""

    name = "plan"
    module = ("chunkflow_core", "plan")

    def words(self, run: Run) -> tuple[str, ...]:
        """Module and subcommand: a repair plans too, once it has taken back what is wrong."""
        return ("chunkflow_core", "repair") if run.params["only_repair"] else self.module

    def options(self, run: Run) -> list[str]:
        """The box that is asked for, the run, and what makes blocks due."""
        switches = [] if run.params["only_repair"] else ["force", "check_input"]
        wanted = [f"--{name.replace('_', '-')}" for name in switches if run.params[name]]
        return [*requested_box(run.params, run.grid), "--run", run.id, "--json", *wanted]

    def result(self, output: str, run: Run) -> Result:
        """Skip the tasks of all blocks that are not due.

        If none is, those are skipped too that would only look at them.
        """
        due = json_of(output)
        infer, blend = ({vector(index) for index in due[stage]} for stage in ("infer", "blend"))
        grid = run.grid
        skipped = [infer_task_id(index) for index in grid.indices() if index not in infer]
        skipped += [blend_task_id(i) for i in grid.indices() if grid.has_frame(i) and i not in blend]
        # What earlier runs have changed but not told, since a block or the audit failed, is audited
        # and told now.
        skipped += [] if infer or blend or due["unpublished"] else [VERIFY, PUBLISH]
        return Result(
            {"up_to_date": len(due["up_to_date"]), "why": due["why"]},
            f"{len(infer)} blocks to infer, {len(blend)} to blend; {len(skipped)} tasks skipped",
            tuple(skipped),
        )


@dataclass(frozen=True)
class Verify(Step):
    """Audits the output, or the requested part of it."""

    name = "verify"
    module = ("chunkflow_core", "-v", "verify")
    runs_model = True

    def options(self, run: Run) -> list[str]:
        """The box that is asked for, and the run."""
        begun = ["--begun"] if run.params["only_repair"] else []  # it is not for a repair to complete the volume
        return [*requested_box(run.params, run.grid), "--run", run.id, *begun]


@dataclass(frozen=True)
class Publish(Command):
    """Completes the run's manifest and emits the output's Asset.

    The event says what has changed, so that others can go on from it.
    """

    name = "report"
    module = ("chunkflow_core", "report")
    block = None
    asset: Asset

    def options(self, run: Run) -> list[str]:
        """The run, which is published."""
        return ["--run", run.id, "--publish", "--json"]

    def result(self, output: str, run: Run) -> Result:
        """Attach what has changed to the Asset's event, and give the whole report."""
        report = json_of(output)
        return Result(
            report,
            event={key: report[key] for key in _EVENT_KEYS},
            skipped_because="" if report["changed_blocks"] else "nothing has changed, so nobody is told",
        )


@dataclass(frozen=True)
class Cleanup(Step):
    """Deletes donations that have been used, and ends the run's lease of the output."""

    name = "cleanup"
    module = ("chunkflow_core", "cleanup")

    def options(self, run: Run) -> list[str]:
        """The run, which ends with this: another one may begin."""
        return ["--run", run.id]


def json_of(output: str) -> dict[str, Any]:
    """The last line of a command's output that is a JSON object.

    Raises:
        ChunkflowError: There is none.
    """
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise ChunkflowError("the command's output has no line of JSON, though it ended well: its log was lost")
