"""How Airflow runs a command: the base of the operators, and the run as commands see it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from airflow.sdk import BaseOperator, Context
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException, DownstreamTasksSkipped
from airflow.sdk.log import mask_secret

from chunkflow_core.errors import UsageError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.variables import conceal, remembered
from operators.commands import PREPARE, SELECT, Command, Result, SkippedError
from operators.outcomes import Outcome, Retry
from operators.request import DEFAULTS

FAILURE = "failure"
"""Key of the XCom in which a task leaves why it has failed."""


class CommandOperator(BaseOperator):
    """Runs one command on the spec of a volume. Subclasses say where."""

    def __init__(self, *, command: Command, spec: str, in_volume_dag: bool = False, **options: Any) -> None:
        """Make the operator.

        Args:
            command: What it runs.
            spec: Path of the volume's spec.
            in_volume_dag: Whether it is a task of a volume's own DAG. Then it heeds the run's
                parameters, what ``prepare`` has found, and why ``select_blocks`` holds its block
                for due.
            options: Those of ``BaseOperator``.
        """
        defaults: dict[str, Any] = {"max_active_tis_per_dag": 1} if command.one_at_a_time else {}
        if command.asset is not None:
            defaults["outlets"] = [command.asset]
        super().__init__(**(defaults | options))
        self.command, self.spec, self.in_volume_dag = command, spec, in_volume_dag
        self.block = command.block
        self.ui_color = command.color
        self.template_fields = ("spec",) if command.block is None else ("spec", "block")

    @property
    def custom_operator_name(self) -> str:
        """What Airflow shows as the operator's name: that of the command."""
        return self.command.name

    @cached_property
    def volume(self) -> VolumeSpec:
        """The volume that the spec describes."""
        return spec_of_task(self.spec)

    def run_of(self, context: Context) -> AirflowRun:
        """The run that a task is part of."""
        return AirflowRun(context, self.spec, in_volume_dag=self.in_volume_dag)

    def use_result(self, output: str, run: AirflowRun) -> None:
        """Do what follows from the command's standard output.

        Raises:
            DownstreamTasksSkipped: Later tasks have nothing to do.
            AirflowSkipException: This task counts as skipped.
        """
        result = self.command.result(output, run)
        if result.message:
            self.log.info("%s", result.message)
        run.use(result, self.command)


class AirflowRun:
    """The run of a task's context, as ``operators.commands.Run`` wants it.

    What is found by a request to Airflow's API server is asked for once.
    """

    def __init__(self, context: Context, spec: str, *, in_volume_dag: bool) -> None:
        """Wrap a task's context.

        Args:
            context: What Airflow gives the task.
            spec: Path of the volume's spec.
            in_volume_dag: As for :class:`CommandOperator`.
        """
        self._context, self._spec, self._in_volume_dag = context, spec, in_volume_dag

    @property
    def id(self) -> str:
        """Airflow's id of the run."""
        return str(self._context["run_id"])

    @property
    def params(self) -> Mapping[str, Any]:
        """The run's parameters; outside a volume's DAG, whose own differ, the defaults."""
        return self._context["params"] if self._in_volume_dag else DEFAULTS

    @cached_property
    def settings(self) -> list[str]:
        """What the preparation has found for the whole run, as settings of the spec.

        A volume without a ``roi`` of its own grows with its input, and Airflow builds the DAG anew
        while a run is at work.
        """
        return [f"{key}={json.dumps(value)}" for key, value in self._pull(PREPARE).items()]

    @cached_property
    def grid(self) -> BlockGrid:
        """The blocks of this run."""
        return spec_of_task(self._spec, self.settings).grid

    @cached_property
    def reasons(self) -> Mapping[str, str] | None:
        """Why blocks are due, as the selection has said it; None outside a volume's DAG."""
        if not self._in_volume_dag:
            return None
        found: Mapping[str, str] = self._pull(SELECT).get("why", {})
        return found

    @property
    def scheduler(self) -> str:
        """The DAG, and the address of this Airflow."""
        return f"{self._context['ti'].dag_id} at {conf.get('api', 'base_url', fallback='') or socket.gethostname()}"

    @property
    def is_alone(self) -> bool:
        """Whether no other run of the DAG is at work."""
        ti: Any = self._context["ti"]
        alone: bool = ti.get_dr_count(dag_id=ti.dag_id, states=["running"]) < 2
        return alone

    @property
    def first_try(self) -> bool:
        """Whether the task is tried for the first time; Airflow counts on when it is cleared."""
        return int(self._context["ti"].try_number) < 2

    def other_at_work(self) -> str | None:
        """Another run of this volume's DAG that is at work.

        ``max_active_runs`` alone does not exclude it: two schedulers that start two queued runs at
        the same moment don't see each other's. Of all preparations of a DAG only one is at work at
        a time, so of two runs the second sees that the first has succeeded with it.
        """
        ti: Any = self._context["ti"]
        if not self._in_volume_dag or ti.get_dr_count(dag_id=ti.dag_id, states=["running"]) < 2:
            return None
        states = ti.get_task_states(dag_id=ti.dag_id, task_ids=[ti.task_id])
        for run, tasks in states.items():
            begun = run != ti.run_id and tasks.get(ti.task_id) == "success"
            if begun and ti.get_dr_count(dag_id=ti.dag_id, run_ids=[run], states=["running"]):
                return str(run)
        return None

    def use(self, result: Result, command: Command) -> None:
        """Give a command's result to Airflow; exceptions as ``CommandOperator.use_result``."""
        if result.event is not None and command.asset is not None:
            self._context["outlet_events"][command.asset].extra = dict(result.event)
        if result.value is not None:
            # What ``execute`` returns would not do: operators of pods don't pass it on.
            self._context["ti"].xcom_push("return_value", dict(result.value))
        if result.skipped_tasks:
            raise DownstreamTasksSkipped(tasks=list(result.skipped_tasks))  # type: ignore[no-untyped-call]
        if result.skipped_because:
            raise AirflowSkipException(result.skipped_because)

    def _pull(self, task_id: str) -> dict[str, Any]:
        """The XCom of another task of a volume's DAG; empty elsewhere, or if there is none."""
        found: dict[str, Any] = (self._context["ti"].xcom_pull(task_ids=task_id) or {}) if self._in_volume_dag else {}
        return found


@contextmanager
def failure_reported(context: Context) -> Iterator[None]:
    """Have a task that fails leave its reason to the run's summary.

    Errors of commands become Airflow's.
    """
    try:
        try:
            yield
        except SkippedError as skipped:
            raise AirflowSkipException(str(skipped)) from None
        except UsageError as error:
            raise AirflowFailException(conceal(str(error))) from None
    except (DownstreamTasksSkipped, AirflowSkipException):
        raise
    except Exception as error:
        with suppress(Exception):  # what goes wrong now must not hide what went wrong before
            context["ti"].xcom_push(FAILURE, conceal(str(error)) or type(error).__name__)
        raise


def raise_for(outcome: Outcome) -> NoReturn:
    """``AirflowFailException`` if a retry can't help, ``AirflowException`` if it may."""
    raise (AirflowFailException if outcome.retry is Retry.NEVER else AirflowException)(str(outcome))


def spec_of_task(path: str, settings: Iterable[str] = ()) -> VolumeSpec:
    """The spec in a file, for the task of this process, whose log hides the values of variables.

    Args:
        path: Path of the spec.
        settings: ``KEY=VALUE`` texts that replace what the file says.

    Raises:
        SpecError: There is no such file, or what it says is wrong.
    """
    spec = load_spec(path, settings)
    for value in remembered():
        mask_secret(value)
    return spec


def spec_of_file(path: str) -> VolumeSpec:
    """The spec in a file, which is read once as long as it doesn't change.

    Hundreds of operators ask for the same one.

    Raises:
        SpecError: There is no such file, or what it says is wrong.
    """
    file = Path(path)
    return _load(path, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=4)
def _load(path: str, changed: int) -> VolumeSpec:
    return load_spec(path)
