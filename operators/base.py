"""What the tasks of a volume's DAG run, whatever runs them: a command each, its arguments, and what its output is good for.

``operators.local`` runs the commands as processes on the worker, ``operators.kubernetes`` in pods; both have an operator for each
class of this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NoReturn

from airflow.sdk import Asset, BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException, DownstreamTasksSkipped

from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Vector, vector
from chunkflow_core.spec import VolumeSpec, load_spec
from operators.form import OTHER_MODEL, check_request, requested_box
from operators.outcomes import Outcome, Retry

FAILURE = "failure"
"""Key of the XCom in which a task leaves why it has failed."""

_EVENT_KEYS = ("run", "fingerprint", "output", "bounding_box", "changed_blocks", "manifest", "picture")
"""What of the report goes with the output's Asset."""


PREPARE = "prepare"
"""Task id of the preparation, whose XCom tells what the run looks at."""

SELECT = "select_blocks"
"""Task id of the selection, whose XCom tells why blocks are due."""


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
    _settings: tuple[Any, list[str]] | None = None
    """A try's id, and what :meth:`settings` gave for it."""

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

    def before(self, context: Context) -> None:
        """Refuse what must not start, by an ``AirflowException``."""

    def command_line(self, spec: str, context: Context) -> list[str]:
        """The whole command, with the ``spec`` by the name that it has where the command runs."""
        settings = [word for setting in self.settings(context) for word in ("--set", setting)]
        return [*self.words_for(context), spec, *settings, *self.arguments_for(context)]

    def words_for(self, context: Context) -> tuple[str, ...]:
        """What comes before the spec on the command line: module and subcommand."""
        return self.command

    def arguments_for(self, context: Context) -> list[str]:
        """What follows the spec on the command line."""
        return []

    def result(self, output: str, context: Context) -> None:
        """Make something of the command's standard output."""

    def give(self, context: Context, value: dict[str, Any]) -> None:
        """Give other tasks a result. What ``execute`` returns would not do: operators of pods don't pass it on."""
        context["ti"].xcom_push("return_value", value)

    @cached_property
    def volume(self) -> VolumeSpec:
        """The parsed spec."""
        return load_spec(self.spec)

    def settings(self, context: Context) -> list[str]:
        """:func:`settings_of` the run, asked for once in a process: each time is a request to Airflow's API server."""
        attempt = context["ti"].id
        if self._settings is None or self._settings[0] != attempt:
            self._settings = attempt, settings_of(context)
        return self._settings[1]

    def grid(self, context: Context) -> BlockGrid:
        """The blocks of this run."""
        return load_spec(self.spec, self.settings(context)).grid


class BlockCommand(Command):
    """A stage of one block."""

    template_fields: Sequence[str] = ("spec", "block")
    block: Vector

    def __init__(self, *, block: Vector, **options: Any) -> None:
        """Arguments: index of the ``block``, zyx, and those of :class:`Command`."""
        super().__init__(max_active_tis_per_dag=1, **options)  # never the same block in two runs at once
        self.block = block

    def before(self, context: Context) -> None:
        if self.settings(context) and self.block not in self.grid(context):
            raise AirflowSkipException("the volume has grown since this run began; the next one does this block")

    def arguments_for(self, context: Context) -> list[str]:
        return ["--block", *map(str, self.block), "--run", str(context["run_id"])]

    def why(self, context: Context) -> str | None:
        """Why the block's inference is due; None if the selection has not said."""
        selected = context["ti"].xcom_pull(task_ids=SELECT) or {}
        reason: str | None = selected.get("why", {}).get("_".join(map(str, self.block)))
        return reason


class Preparation(Command):
    """Checks all that can be known beforehand, and makes the output layer; the first task of a run."""

    command = ("chunkflow_core", "prepare")
    runs_model = True

    def __init__(self, **options: Any) -> None:
        """Arguments: those of :class:`Command`."""
        super().__init__(max_active_tis_per_dag=1, **options)  # so that of two runs, one sees that the other has begun

    def before(self, context: Context) -> None:
        check_request(context["params"], self.volume.grid)
        _refuse_company(context)

    def arguments_for(self, context: Context) -> list[str]:
        return ["--once", "--run", str(context["run_id"]), "--json", *OTHER_MODEL[context["params"]["other_model"]]]

    def result(self, output: str, context: Context) -> None:
        """Have all other tasks of the run look at the same part of a volume that may be growing."""
        found = json_of(output)
        self.give(context, {"roi": found["roi"], "input.bounds": found["input_bounds"]})


class Inference(BlockCommand):
    """First stage of one block: runs its patches, writes what is final, donates what its neighbours need."""

    ui_color = "#d5ebf9"
    command = ("chunkflow_core.inference_and_donate",)
    runs_model = True
    stage = "infer"

    def arguments_for(self, context: Context) -> list[str]:
        # What select_blocks has not skipped is due, whatever receipts of earlier runs say; but an input that was edited may have
        # been found to be the same after all.
        return [*super().arguments_for(context), "--check-input" if self.why(context) == "input" else "--force"]


class Blending(BlockCommand):
    """Second stage of one block: adds up what its donors gave and writes the rest of the block."""

    ui_color = "#d9f2d9"
    command = ("chunkflow_core.receive_and_blend",)
    inputs_may_come = True
    stage = "blend"

    def arguments_for(self, context: Context) -> list[str]:
        # The receipts tell whether it has to be done, unless it is to be done again whatever they tell.
        return [*super().arguments_for(context), *(["--force"] if self.why(context) == "forced" else [])]


class Selection(Command):
    """Asks the planner what is due and skips everything else in one step."""

    command = ("chunkflow_core", "plan")

    def words_for(self, context: Context) -> tuple[str, ...]:
        return ("chunkflow_core", "repair" if context["params"]["only_repair"] else "plan")

    def arguments_for(self, context: Context) -> list[str]:
        params = context["params"]
        options = [] if params["only_repair"] else ["force", "check_input"]
        wanted = [f"--{name.replace('_', '-')}" for name in options if params[name]]
        return [*requested_box(params, self.grid(context)), "--run", str(context["run_id"]), "--json", *wanted]

    def result(self, output: str, context: Context) -> None:
        """Skip the tasks of all blocks that are not due; and if none is, those that would only look at them."""
        due = json_of(output)
        infer, blend = ({vector(index) for index in due[stage]} for stage in ("infer", "blend"))
        grid = self.grid(context)
        skipped = [infer_task_id(index) for index in grid.indices() if index not in infer]
        skipped += [blend_task_id(i) for i in grid.indices() if grid.donors(i) and i not in blend]
        # What earlier runs have changed but not told, since a block or the audit failed, is audited and told now.
        skipped += [] if infer or blend or due["unpublished"] else ["verify", "publish"]
        self.log.info("%d blocks to infer, %d to blend; %d tasks skipped", len(infer), len(blend), len(skipped))
        self.give(context, {"up_to_date": len(due["up_to_date"]), "why": due["why"]})
        if skipped:
            raise DownstreamTasksSkipped(tasks=skipped)  # type: ignore[no-untyped-call]


class Verification(Command):
    """Audits the output, or the requested part of it."""

    command = ("chunkflow_core", "-v", "verify")
    runs_model = True

    def arguments_for(self, context: Context) -> list[str]:
        params = context["params"]
        begun = ["--begun"] if params["only_repair"] else []  # it is not for a repair to complete the volume
        return [*requested_box(params, self.grid(context)), "--run", str(context["run_id"]), *begun]


class Publication(Command):
    """Completes the run's manifest and emits the output's Asset, saying what has changed, so that others can go on from it."""

    command = ("chunkflow_core", "report")

    def __init__(self, *, asset: Asset, **options: Any) -> None:
        """Arguments: the output's ``asset``, and those of :class:`Command`."""
        super().__init__(outlets=[asset], **options)
        self.asset = asset

    def arguments_for(self, context: Context) -> list[str]:
        return ["--run", str(context["run_id"]), "--publish", "--json"]

    def result(self, output: str, context: Context) -> None:
        """Attach what has changed to the Asset event, and give the whole report."""
        report = json_of(output)
        context["outlet_events"][self.asset].extra = {key: report[key] for key in _EVENT_KEYS}
        self.give(context, report)
        if not report["changed_blocks"]:
            raise AirflowSkipException("nothing has changed, so nobody is told")


def settings_of(context: Context) -> list[str]:
    """What the preparation has found for the whole run, as settings of the spec; none before it has.

    A volume without a ``roi`` of its own grows with its input, and Airflow builds the DAG anew while a run is at work.
    """
    found = context["ti"].xcom_pull(task_ids=PREPARE) or {}
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


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


@contextmanager
def telling(context: Context) -> Iterator[None]:
    """Have a task that fails leave its reason to the run's summary."""
    try:
        yield
    except (DownstreamTasksSkipped, AirflowSkipException):
        raise
    except Exception as error:
        with suppress(Exception):  # what goes wrong now must not hide what went wrong before
            context["ti"].xcom_push(FAILURE, str(error) or type(error).__name__)
        raise


def _refuse_company(context: Context) -> None:
    """``AirflowException`` if another run of the DAG has begun.

    ``max_active_runs`` alone does not exclude it: two schedulers that start two queued runs at the same moment don't see each other's.
    Of all preparations of a DAG only one is at work at a time, so of two runs the second sees that the first has succeeded with it.
    """
    ti: Any = context["ti"]
    if ti.get_dr_count(dag_id=ti.dag_id, states=["running"]) < 2:
        return
    states = ti.get_task_states(dag_id=ti.dag_id, task_ids=[ti.task_id])
    for run, tasks in states.items():
        begun = run != ti.run_id and tasks.get(ti.task_id) == "success"
        if begun and ti.get_dr_count(dag_id=ti.dag_id, run_ids=[run], states=["running"]):
            raise AirflowException(
                f"run {run} of this volume is at work; nothing of this run has been started. Clear this task when the "
                "other run has ended"
            )
