"""What the tasks of a volume's DAG run, whatever runs them: a command each, its arguments, and what its output is good for.

``operators.local`` runs the commands as processes on the worker, ``operators.kubernetes`` in pods; both have an operator for each
class of this module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

from airflow.sdk import Asset, BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, DownstreamTasksSkipped

from chunkflow_core.geometry import Vector, vector
from chunkflow_core.lattice import BlockGrid
from chunkflow_core.spec import VolumeSpec, load_spec
from operators.outcomes import Outcome, Retry

BOX_PARAMS = ("z_start", "y_start", "x_start", "z_stop", "y_stop", "x_stop")
"""Names of the run parameters that make the bounding box, in voxels; None stands for the ROI's end."""

RUNNER_PARAMS = {
    "image": "runner.image",
    "infer_memory": "runner.infer.memory",
    "blend_memory": "runner.blend.memory",
    "priority_class": "runner.infer.priority_class",
    "spot": "runner.infer.spot",
}
"""Run parameters that replace values of the spec, for pods; None leaves them as they are."""


def infer_task_id(index: Vector) -> str:
    """Task id of a block's inference: ``infer.z_y_x``."""
    return "infer.{}_{}_{}".format(*index)


def blend_task_id(index: Vector) -> str:
    """Task id of a block's blending: ``blend.z_y_x``."""
    return "blend.{}_{}_{}".format(*index)


class Command(BaseOperator):
    """One command on a volume spec."""

    template_fields: Sequence[str] = ("spec",)
    ui_color = "#e8e8f4"
    inputs_may_come = False
    """Whether a missing input may appear by itself, so that a retry is worth it."""
    command: tuple[str, ...] = ()
    """Module and subcommand."""
    stage = ""
    """The command in a word; default: its last one."""
    block: Vector | None = None
    """Index of the block that it is for, zyx."""
    runs_model = False
    """Whether it needs what inference needs: a GPU, memory for the network."""

    def __init__(
        self, *, spec: str, command: Sequence[str] = (), runs_model: bool | None = None, **options: Any
    ) -> None:
        """Make the operator.

        Args:
            spec: path of the volume spec.
            command: module and subcommand to run, such as ``("chunkflow_core", "prepare")``; default: the class's own.
            runs_model: whether the command runs the model; default: the class's own.
            options: of ``BaseOperator``, or of what runs the command.
        """
        super().__init__(**options)
        self.spec = spec
        if command:
            self.command = tuple(command)
        self.stage = self.stage or self.command[-1]
        if runs_model is not None:
            self.runs_model = runs_model

    def arguments_for(self, context: Context) -> list[str]:
        """What follows the spec on the command line."""
        return []

    def result(self, output: str, context: Context) -> Any:
        """What the task makes of the command's standard output."""
        return None

    @cached_property
    def volume(self) -> VolumeSpec:
        """The parsed spec."""
        return load_spec(self.spec)


class BlockCommand(Command):
    """A stage of one block."""

    template_fields: Sequence[str] = ("spec", "block")
    block: Vector

    def __init__(self, *, block: Vector, **options: Any) -> None:
        """Arguments: index of the ``block``, zyx, and those of :class:`Command`."""
        super().__init__(max_active_tis_per_dag=1, **options)  # never the same block in two runs at once
        self.block = block

    def arguments_for(self, context: Context) -> list[str]:
        # What select_blocks has not skipped is due, whatever receipts of earlier runs say.
        return ["--block", *map(str, self.block), "--force", "--run", str(context["run_id"])]


class Inference(BlockCommand):
    """First stage of one block: runs its patches, writes what is final, donates what its neighbours need."""

    ui_color = "#d5ebf9"
    command = ("chunkflow_core.inference_and_donate",)
    runs_model = True
    stage = "infer"


class Blending(BlockCommand):
    """Second stage of one block: adds up what its donors gave and writes the rest of the block."""

    ui_color = "#d9f2d9"
    command = ("chunkflow_core.receive_and_blend",)
    inputs_may_come = True
    stage = "blend"


class Selection(Command):
    """Asks the planner what is due and skips everything else in one step."""

    command = ("chunkflow_core", "plan")

    def arguments_for(self, context: Context) -> list[str]:
        return [*requested_box(context["params"], self.volume.grid), "--json"] + (
            ["--force"] if context["params"]["force"] else []
        )

    def result(self, output: str, context: Context) -> None:
        """Skip the tasks of all blocks that are not due."""
        due = json_of(output)
        infer, blend = ({vector(index) for index in due[stage]} for stage in ("infer", "blend"))
        grid = self.volume.grid
        skipped = [infer_task_id(index) for index in grid.indices() if index not in infer]
        skipped += [blend_task_id(i) for i in grid.indices() if grid.donors(i) and i not in blend]
        self.log.info("%d blocks to infer, %d to blend; %d tasks skipped", len(infer), len(blend), len(skipped))
        if skipped:
            raise DownstreamTasksSkipped(tasks=skipped)  # type: ignore[no-untyped-call]


class Verification(Command):
    """Audits the output, or the requested part of it."""

    command = ("chunkflow_core", "-v", "verify")
    runs_model = True

    def arguments_for(self, context: Context) -> list[str]:
        return requested_box(context["params"], self.volume.grid)


class Publication(Command):
    """Emits the output's Asset, with the report of the run, so that other DAGs can go on from it."""

    command = ("chunkflow_core", "report")

    def __init__(self, *, asset: Asset, **options: Any) -> None:
        """Arguments: the output's ``asset``, and those of :class:`Command`."""
        super().__init__(outlets=[asset], **options)
        self.asset = asset

    def arguments_for(self, context: Context) -> list[str]:
        return ["--json", "--run", str(context["run_id"])]

    def result(self, output: str, context: Context) -> dict[str, Any]:
        """Attach the report to the Asset event, and return it."""
        report = json_of(output)
        context["outlet_events"][self.asset].extra = report
        return report


def requested_box(params: Any, grid: BlockGrid) -> list[str]:
    """The run's bounding box as command-line arguments; none if the form was left empty."""
    values = [params[name] for name in BOX_PARAMS]
    if all(value is None for value in values):
        return []
    ends = [*grid.roi.start, *grid.roi.stop]
    return ["--bbox", *(str(end if value is None else value) for value, end in zip(values, ends, strict=True))]


def json_of(output: str) -> dict[str, Any]:
    """The last line of a command's output that is a JSON object; ``AirflowException`` if there is none."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise AirflowException("the command's output has no line of JSON, though it ended well: its log was lost")


def raise_for(outcome: Outcome) -> NoReturn:
    """``AirflowFailException`` if a retry can't help, ``AirflowException`` if it may."""
    raise (AirflowFailException if outcome.retry is Retry.NEVER else AirflowException)(str(outcome))
