"""Builds the DAG of a volume.

::

    prepare ─► select_blocks ─┬─► infer.z_y_x ─┬─► blend.z_y_x ─┐
                              └─► …            └─► …            │
    ┌───────────────────────────────────────────────────────────┘
    └─► verify ─► publish ─► cleanup ─► summary

A blend waits for the inference of its at most eight donors and for nothing else. The summary waits
for everything, however it ends, and decides how the run has ended: a block that fails holds only
what depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import prod
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, BaseOperator, TaskGroup
from airflow.sdk.exceptions import AirflowException

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.spec.runner import KubernetesRunner
from operators.commands import (
    CLEANUP,
    PREPARE,
    PUBLISH,
    SELECT,
    VERIFY,
    Blend,
    Cleanup,
    Command,
    Infer,
    Prepare,
    Publish,
    Select,
    Verify,
    blend_task_id,
    infer_task_id,
)
from operators.form import form_of
from operators.kubernetes.manifest import check_runner
from operators.schedules import asset_of, schedule_of, wrong_cron
from operators.summary import SummaryOperator, notifier_of
from operators.tasks import operator_class

MAX_BLOCKS = 1000
"""Most blocks in a DAG: above, Airflow's scheduler and graph get slow.

The scheduler's cost grows with open task instances.
"""

_PARALLEL = {"local": 16, "kubernetes": MAX_BLOCKS}
_START = datetime(2024, 1, 1, tzinfo=UTC)
_MAX_RETRY_DELAY = timedelta(minutes=10)
_RUN_TYPES = ("scheduled", "manual", "operator_triggered", "asset_triggered", "asset_materialization")
"""All types of runs but backfills.

A volume's runs have no dates, and ``max_active_runs`` does not count those of a backfill.
"""


def volume_dag(spec: VolumeSpec, file: Path, *, only_task: str | None = None) -> DAG:
    """The DAG of a volume.

    Args:
        spec: The volume.
        file: Where the spec is.
        only_task: Build only this task, without its neighbours: all that the task's own process
            needs.

    Raises:
        SpecError: The volume has too many blocks for one DAG, its schedule or its notifier is none,
            or what it says of its pods is nothing that Kubernetes knows.
    """
    blocks = prod(spec.grid.shape)
    if blocks > MAX_BLOCKS and only_task is None:  # tasks of a run that has begun go on though the volume has grown
        raise SpecError(
            f"{file}: block_size: {spec.block_size} makes {blocks} blocks, expected at most {MAX_BLOCKS} in a DAG; "
            "give larger blocks (memory does not grow with their depth) or a smaller roi"
        )
    if spec.notify is not None and only_task is None:
        notifier_of(spec.notify, file)
    if isinstance(spec.runner, KubernetesRunner) and only_task is None:
        _check_pods(spec.runner, spec.folder, file)
    with DAG(
        dag_id=spec.name,
        schedule=schedule_of(spec, file) if only_task is None else None,
        start_date=_START,
        catchup=False,
        auto_register=False,
        max_active_runs=1,
        allowed_run_types=_RUN_TYPES,  # type: ignore[arg-type]  # the enumeration is not public, texts are converted
        max_active_tasks=spec.runner.parallel or _PARALLEL[spec.runner.kind],
        params=form_of(spec),
        tags=["chunkflow", spec.model.engine],
        doc_md=_documentation(spec, file),
        default_args={
            "owner": "chunkflow",
            "retries": spec.runner.retries,
            "retry_delay": timedelta(seconds=spec.runner.retry_delay),
            "retry_exponential_backoff": 2.0,
            "max_retry_delay": _MAX_RETRY_DELAY,
            "weight_rule": "absolute",
        },
    ) as dag:
        tasks = _Tasks(spec, str(file))
        if only_task is None:
            tasks.build_all()
        else:
            tasks.build(only_task)
    try:
        dag.validate()  # type: ignore[no-untyped-call]  # Airflow does it later, but then an error disables all volumes
    except AirflowException as error:
        raise wrong_cron(file, spec.schedule.cron if spec.schedule and spec.schedule.cron else "", error) from error
    return dag


def _check_pods(runner: KubernetesRunner, folder: str, file: Path) -> None:
    try:
        check_runner(runner, folder)
    except SpecError as error:
        raise SpecError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from error


class _Tasks:
    """Makes the tasks of a volume, all or one."""

    def __init__(self, spec: VolumeSpec, file: str) -> None:
        self.spec, self.file, self.grid = spec, file, spec.grid
        self.operator = operator_class(spec.runner.kind)

    def build_all(self) -> None:
        """Make all tasks and their order.

        A collapsed group for each layer of blocks in z keeps graph and grid readable.
        """
        builders = self._builders()
        prepare, select, verify, publish, cleanup, summary = (build() for build in builders.values())
        infer: dict[Vector, BaseOperator] = {}
        blends, ends = [], []
        for z in range(self.grid.shape[0]):
            with TaskGroup(f"z_{z}", prefix_group_id=False, tooltip=self._slab(z)):
                for index in self.grid.indices():
                    if index[0] != z:
                        continue
                    infer[index] = self._infer(index)
                    if self.grid.has_frame(index):
                        blend = self._blend(index)
                        blend.set_upstream([infer[donor] for donor in self.grid.donors(index)])
                        blends.append(blend)
                    else:
                        ends.append(infer[index])
        select.set_downstream(list(infer.values()))
        verify.set_upstream([*ends, *blends])
        prepare >> select
        verify >> publish >> cleanup >> summary
        # Of a blend that fails with one donor, the others may still be at work.
        summary.set_upstream([*infer.values(), *blends])

    def build(self, task_id: str) -> None:
        """One task alone."""
        stage, _, name = task_id.partition(".")
        if stage == "infer":
            self._infer(_index(name))
        elif stage == "blend":
            self._blend(_index(name))
        else:
            self._builders()[task_id]()

    def _builders(self) -> dict[str, Callable[[], BaseOperator]]:
        first, last = 4 * MAX_BLOCKS, 5 * MAX_BLOCKS
        asset = asset_of(self.spec.output.path)
        return {
            PREPARE: lambda: self._task(PREPARE, Prepare(), first),
            SELECT: lambda: self._task(SELECT, Select(), first),
            VERIFY: lambda: self._task(VERIFY, Verify(), last, trigger_rule="none_failed"),
            PUBLISH: lambda: self._task(PUBLISH, Publish(asset), last),
            CLEANUP: lambda: self._task(CLEANUP, Cleanup(), last, trigger_rule="none_failed"),
            "summary": lambda: SummaryOperator(
                task_id="summary", spec=self.file, trigger_rule="all_done", priority_weight=last
            ),
        }

    def _infer(self, index: Vector) -> BaseOperator:
        return self._task(
            infer_task_id(index),
            Infer(index),
            self._priority(index),
            trigger_rule="none_failed",
            pool=self.spec.runner.pool,
        )

    def _blend(self, index: Vector) -> BaseOperator:
        priority = 2 * MAX_BLOCKS + self._priority(index)
        return self._task(blend_task_id(index), Blend(index), priority, trigger_rule="none_failed")

    def _task(self, task_id: str, command: Command, priority: int, **options: Any) -> BaseOperator:
        return self.operator(
            task_id=task_id,
            command=command,
            spec=self.file,
            in_volume_dag=True,
            priority_weight=priority,
            **options,
        )

    def _priority(self, index: Vector) -> int:
        """Finishing before starting, and blocks in the order in which they let others finish."""
        _, height, width = self.grid.shape
        z, y, x = index
        return MAX_BLOCKS - ((z * height + y) * width + x)

    def _slab(self, z: int) -> str:
        box = self.grid.block((z, 0, 0)).box
        return f"blocks of z {box.start[0]}–{box.stop[0]}"


def _documentation(spec: VolumeSpec, file: Path) -> str:
    grid: BlockGrid = spec.grid
    rows = {
        "input": f"{spec.written('input')} (mip {spec.input.mip})",
        "output": f"{spec.written('output')} ({spec.output.stored_channels} × {spec.output.dtype})",
        "ROI": str(grid.roi),
        "blocks": f"{' × '.join(map(str, grid.shape))} of {' × '.join(map(str, spec.block_size))} voxels",
        "patches": f"{grid.patches} of {' × '.join(map(str, spec.patch_size))}",
        "model": f"{spec.model.engine} {spec.written('model') if spec.model.path else spec.model.network or ''}",
        "spec": str(file),
    }
    return "\n".join([f"### {spec.name}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _index(name: str) -> Vector:
    z, y, x = map(int, name.split("_"))
    return (z, y, x)
