"""Airflow operators for a volume: both stages of its blocks, and the steps before and after.

Each runs one command of ``chunkflow_core`` through a runner, and turns the way it ended into success, a retry, or failure at
once. The runner is the spec's: ``local`` runs the command as a process on the worker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

from airflow.sdk import Asset, BaseOperator, Context
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, DownstreamTasksSkipped

from chunkflow_core.cpus import CPUS_VARIABLE, available_cpus
from chunkflow_core.geometry import Vector, vector
from chunkflow_core.lattice import BlockGrid
from chunkflow_core.spec import VolumeSpec, load_spec
from operators.local import LocalRunner
from operators.outcomes import classify

BOX_PARAMS = ("z_start", "y_start", "x_start", "z_stop", "y_stop", "x_stop")
"""Names of the run parameters that make the bounding box, in voxels; None stands for the ROI's end."""


def infer_task_id(index: Vector) -> str:
    """Task id of a block's inference: ``infer.z_y_x``."""
    return "infer.{}_{}_{}".format(*index)


def blend_task_id(index: Vector) -> str:
    """Task id of a block's blending: ``blend.z_y_x``."""
    return "blend.{}_{}_{}".format(*index)


class VolumeOperator(BaseOperator):
    """Runs one command on a volume spec."""

    template_fields: Sequence[str] = ("spec",)
    ui_color = "#e8e8f4"
    inputs_may_come = False
    """Whether a missing input may appear by itself, so that a retry is worth it."""

    def __init__(self, *, spec: str, command: Sequence[str] = (), **options: Any) -> None:
        """Make the operator.

        Args:
            spec: path of the volume spec.
            command: module and subcommand to run, such as ``("chunkflow_core", "verify")``.
            options: of ``BaseOperator``.
        """
        super().__init__(**options)
        self.spec, self.command = spec, tuple(command)

    def arguments(self, context: Context) -> list[str]:
        """What follows the spec on the command line."""
        return []

    def execute(self, context: Context) -> Any:
        """Run the command; ``AirflowFailException`` if a retry can't help, ``AirflowException`` if it may."""
        return self.run([*self.command, self.spec, *self.arguments(context)])

    def on_kill(self) -> None:
        """End the command when the task is cleared, marked or killed."""
        self.runner.kill()

    @cached_property
    def runner(self) -> LocalRunner:
        """What runs the command."""
        return LocalRunner(self.log, self.environment)  # type: ignore[arg-type]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the command, beside those of the worker."""
        return {}

    @cached_property
    def volume(self) -> VolumeSpec:
        """The parsed spec."""
        return load_spec(self.spec)

    def run(self, arguments: Sequence[str]) -> str:
        """Run a command and return its standard output; exceptions as ``execute``."""
        code, output, message = self.runner.run(arguments)
        if code == 0:
            return output
        outcome = classify(code, message, inputs_may_come=self.inputs_may_come)
        raise (AirflowException if outcome.retry else AirflowFailException)(str(outcome))


class _StageOperator(VolumeOperator):
    template_fields: Sequence[str] = ("spec", "block")

    def __init__(self, *, block: Vector, **options: Any) -> None:
        """Make the operator for the block with an index, zyx."""
        super().__init__(max_active_tis_per_dag=1, **options)  # never the same block in two runs at once
        self.block = block

    @property
    def environment(self) -> dict[str, str]:
        """The machine's CPUs, shared out among the tasks that may run at once."""
        assert self.dag is not None
        blocks = prod(self.volume.grid.shape)
        tasks = min(self.dag.max_active_tasks, conf.getint("core", "parallelism"), blocks)
        return {CPUS_VARIABLE: str(max(1, available_cpus() // tasks))}

    def arguments(self, context: Context) -> list[str]:
        # What select_blocks has not skipped is due, whatever receipts of earlier runs say.
        return ["--block", *map(str, self.block), "--force", "--run", str(context["run_id"])]

    def execute(self, context: Context) -> None:
        self.run([*self.command, self.spec, *self.arguments(context)])


class InferenceAndDonateOperator(_StageOperator):
    """First stage of one block: runs its patches, writes what is final, donates what its neighbours need."""

    ui_color = "#d5ebf9"

    def __init__(self, **options: Any) -> None:
        """Arguments: ``spec``, ``block`` (zyx), and those of ``BaseOperator``."""
        super().__init__(command=("chunkflow_core.inference_and_donate",), **options)


class ReceiveAndBlendOperator(_StageOperator):
    """Second stage of one block: adds up what its donors gave and writes the rest of the block."""

    ui_color = "#d9f2d9"
    inputs_may_come = True

    def __init__(self, **options: Any) -> None:
        """Arguments: ``spec``, ``block`` (zyx), and those of ``BaseOperator``."""
        super().__init__(command=("chunkflow_core.receive_and_blend",), **options)


class SelectBlocksOperator(VolumeOperator):
    """Asks the planner what is due and skips everything else in one step."""

    def __init__(self, **options: Any) -> None:
        """Arguments: ``spec``, and those of ``BaseOperator``."""
        super().__init__(command=("chunkflow_core", "plan"), **options)

    def arguments(self, context: Context) -> list[str]:
        return [*requested_box(context["params"], self.volume.grid), "--json"] + (
            ["--force"] if context["params"]["force"] else []
        )

    def execute(self, context: Context) -> None:
        """Skip the tasks of all blocks that are not due."""
        due = json.loads(super().execute(context))
        infer, blend = ({vector(index) for index in due[stage]} for stage in ("infer", "blend"))
        grid = self.volume.grid
        skipped = [infer_task_id(index) for index in grid.indices() if index not in infer]
        skipped += [blend_task_id(i) for i in grid.indices() if grid.donors(i) and i not in blend]
        self.log.info("%d blocks to infer, %d to blend; %d tasks skipped", len(infer), len(blend), len(skipped))
        if skipped:
            raise DownstreamTasksSkipped(tasks=skipped)  # type: ignore[no-untyped-call]


class VerifyOperator(VolumeOperator):
    """Audits the output, or the requested part of it."""

    def __init__(self, **options: Any) -> None:
        """Arguments: ``spec``, and those of ``BaseOperator``."""
        super().__init__(command=("chunkflow_core", "verify"), **options)

    def arguments(self, context: Context) -> list[str]:
        return requested_box(context["params"], self.volume.grid)


class PublishOperator(VolumeOperator):
    """Emits the output's Asset, with the report of the run, so that other DAGs can go on from it."""

    def __init__(self, *, asset: Asset, **options: Any) -> None:
        """Arguments: the output's ``asset``, ``spec``, and those of ``BaseOperator``."""
        super().__init__(command=("chunkflow_core", "report"), outlets=[asset], **options)
        self.asset = asset

    def arguments(self, context: Context) -> list[str]:
        return ["--json", "--run", str(context["run_id"])]

    def execute(self, context: Context) -> dict[str, Any]:
        """Attach the report to the Asset event, and return it."""
        report: dict[str, Any] = json.loads(super().execute(context))
        context["outlet_events"][self.asset].extra = report
        return report


def requested_box(params: Any, grid: BlockGrid) -> list[str]:
    """The run's bounding box as command-line arguments; none if the form was left empty."""
    values = [params[name] for name in BOX_PARAMS]
    if all(value is None for value in values):
        return []
    ends = [*grid.roi.start, *grid.roi.stop]
    return ["--bbox", *(str(end if value is None else value) for value, end in zip(values, ends, strict=True))]
