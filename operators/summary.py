"""The end of a run: what has become of it, who is told, and whether the run has succeeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from airflow.sdk import BaseNotifier, BaseOperator, Context
from airflow.sdk.exceptions import AirflowFailException

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Vector, vector
from chunkflow_core.spec.schedule import NotifySpec
from chunkflow_core.steps.failures import Failure, lines
from chunkflow_core.variables import conceal
from operators.command_operator import FAILURE, AirflowRun, spec_of_task
from operators.commands import PUBLISH, SELECT

_SILENT = "said nothing: its process died, or it was marked as failed; its log may tell more"


class SummaryOperator(BaseOperator):
    """Says what has become of a run, in Airflow's own process.

    It is the run's only leaf, so it fails if anything has failed.
    """

    template_fields: Sequence[str] = ("spec",)
    ui_color = "#e8e8f4"

    def __init__(self, *, spec: str, **options: Any) -> None:
        """Make the operator.

        Args:
            spec: Path of the volume's spec.
            options: Those of ``BaseOperator``.
        """
        super().__init__(**options)
        self.spec = spec

    def execute(self, context: Context) -> dict[str, Any]:
        """Tell, notify, and return the report; ``AirflowFailException`` if anything has failed."""
        ti: Any = context["ti"]
        spec = spec_of_task(self.spec, AirflowRun(context, self.spec, in_volume_dag=True).settings)
        tasks = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id])[ti.run_id]
        states = {task: str(state) for task, state in tasks.items() if task != ti.task_id}
        reasons = {task: self._reason(ti, task) for task, state in states.items() if state == "failed"}
        figures = ti.xcom_pull(task_ids=PUBLISH) or {}
        told = what_failed(spec.grid, states, reasons)
        failed = bool(told)
        report = {
            "state": "failure" if failed else "success",
            "text": "\n".join(told or [figures_line(figures, ti.xcom_pull(task_ids=SELECT) or {})]),
            "volume": spec.name,
            "run": ti.run_id,
            "output": spec.written("output"),
            "figures": figures,
            "manifest": figures.get("manifest"),
            "picture": figures.get("picture"),
        }
        if spec.notify is not None and report["state"] in spec.notify.on:
            self._notify(spec.notify, context, report)
        if failed:
            raise AirflowFailException(report["text"])
        self.log.info("%s", report["text"])
        return report

    @staticmethod
    def _reason(ti: Any, task: str) -> str:
        return str(ti.xcom_pull(task_ids=task, key=FAILURE, map_indexes=-1) or _SILENT)

    def _notify(self, notify: NotifySpec, context: Context, report: dict[str, Any]) -> None:
        told: Any = {**context, "report": report}
        try:
            notifier_of(notify, Path(self.spec))(told)
        except Exception as error:  # whatever is wrong with it, the run has ended as it has ended
            said = conceal(f"{notify.notifier}: {type(error).__name__}: {error}")
            self.log.warning("nobody was notified: %s", said)


def what_failed(grid: BlockGrid, states: Mapping[str, str], reasons: Mapping[str, str]) -> list[str]:
    """What has failed in a run and what that leaves undone, a line each; empty if nothing has.

    Args:
        grid: Of the volume.
        states: Airflow's states by task id, the summary's own left out.
        reasons: Why tasks have failed, by task id.
    """
    places = {task: _place(task, grid) for task in (*states, *reasons)}
    failures = [Failure(*place, reason) for task, reason in reasons.items() if (place := places[task])]
    failures.sort(key=lambda failure: (failure.stage != "infer", failure.block))
    waiting = {place for task, state in states.items() if state == "upstream_failed" and (place := places[task])}
    told = lines(grid, failures, waiting) if failures else []
    told += [f"{task}: {' '.join(reason.split())}" for task, reason in sorted(reasons.items()) if not places[task]]
    kept = sorted(task for task, state in states.items() if state == "upstream_failed")
    return told or ([f"could not run: {', '.join(kept[:5])}"] if kept else [])


def figures_line(figures: Mapping[str, Any], selected: Mapping[str, Any]) -> str:
    """What a run that has succeeded has done, in a line.

    Args:
        figures: The run's report; empty if nothing was due.
        selected: What the selection has counted.
    """
    if not figures:
        return f"nothing was due: {selected.get('up_to_date', 'all')} blocks are up to date"
    seconds = f", {figures['span']:.0f} s from first start to last finish" if figures.get("span") else ""
    return (
        f"{figures['inferred']} of {figures['blocks']} blocks inferred, {figures['blended']} blended; "
        f"{figures['patches']:,} patches, {figures['voxels']:,} voxels written{seconds}"
    )


def notifier_of(notify: NotifySpec, file: Path) -> BaseNotifier:
    """Make the notifier of a spec; ``SpecError``, naming file and key, if that is not possible."""
    where, (module, _, name) = f"{file}: notify.notifier: {notify.notifier}", notify.notifier.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{where}: there is no such class here ({error})") from error
    if not (isinstance(kind, type) and issubclass(kind, BaseNotifier)):
        raise SpecError(f"{where}: expected a class that inherits from airflow.sdk.BaseNotifier")
    try:
        return kind(**notify.arguments)
    except Exception as error:  # what is wrong with arguments is the notifier's to say
        raise SpecError(f"{file}: notify.arguments: {notify.notifier} refuses them: {conceal(str(error))}") from error


def _place(task: str, grid: BlockGrid) -> tuple[Any, Vector] | None:
    """Stage and block of a task; None for those of no block.

    Neither has one that Airflow has added since the run began.
    """
    stage, dot, name = task.partition(".")
    block = vector(map(int, name.split("_"))) if dot else None
    return (stage, block) if block is not None and block in grid else None
