"""Builds the DAG of a volume.

::

    prepare ─► select_blocks ─┬─► infer.z_y_x ─┬─► blend.z_y_x ─┐
                              └─► …            └─► …            ├─► verify ─► publish ─► cleanup

A blend waits for the inference of its at most eight donors and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, get_args

from airflow.sdk import DAG, Asset, BaseOperator, Param, TaskGroup
from airflow.sdk.exceptions import AirflowException

from chunkflow_core.errors import SpecError
from chunkflow_core.geometry import AXES, Vector
from chunkflow_core.lattice import BlockGrid
from chunkflow_core.runner_spec import KubernetesRunner, Spot
from chunkflow_core.spec import VolumeSpec
from operators.base import BOX_PARAMS, blend_task_id, infer_task_id

MAX_BLOCKS = 1000
"""Blocks in a DAG: above, Airflow's scheduler and graph get slow (its cost grows with open task instances)."""

_PARALLEL = {"local": 16, "kubernetes": MAX_BLOCKS}
_START = datetime(2024, 1, 1, tzinfo=UTC)
_MAX_RETRY_DELAY = timedelta(minutes=10)


def volume_dag(spec: VolumeSpec, file: Path, *, only_task: str | None = None) -> DAG:
    """The DAG of a volume.

    Args:
        spec: the volume.
        file: where the spec is.
        only_task: build only this task, without its neighbours: all that the task's own process needs.

    Raises:
        SpecError: the volume has too many blocks for one DAG, or its schedule is none.
    """
    blocks = prod(spec.grid.shape)
    if blocks > MAX_BLOCKS:
        raise SpecError(
            f"{file}: block_size: {spec.block_size} makes {blocks} blocks, expected at most {MAX_BLOCKS} in a DAG; "
            "give larger blocks (memory does not grow with their depth) or a smaller roi"
        )
    with DAG(
        dag_id=spec.name,
        schedule=spec.schedule,
        start_date=_START,
        catchup=False,
        auto_register=False,
        max_active_runs=1,
        max_active_tasks=spec.runner.parallel or _PARALLEL[spec.runner.kind],
        params=_params(spec),
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
        raise SpecError(
            f'{file}: schedule: "{spec.schedule}": expected null, a cron expression such as "0 3 * * 1", or a preset such '
            f"as @weekly ({error})"
        ) from error
    return dag


class _Tasks:
    """Makes the tasks of a volume, all or one."""

    def __init__(self, spec: VolumeSpec, file: str) -> None:
        self.spec, self.file, self.grid = spec, file, spec.grid
        # Imported here, since the Kubernetes client takes most of a second that local volumes need not pay.
        self.operators: Any = import_module(f"operators.{spec.runner.kind}")

    def build_all(self) -> None:
        """All tasks and their order; a collapsed group for each layer of blocks in z keeps graph and grid readable."""
        make = self._makers()
        prepare, select, verify, publish, cleanup = (make[name]() for name in make)
        infer: dict[Vector, BaseOperator] = {}
        ends = []
        for z in range(self.grid.shape[0]):
            with TaskGroup(f"z_{z}", prefix_group_id=False, tooltip=self._slab(z)):
                for index in self.grid.indices():
                    if index[0] != z:
                        continue
                    infer[index] = self._infer(index)
                    donors = self.grid.donors(index)
                    if donors:
                        blend = self._blend(index)
                        blend.set_upstream([infer[donor] for donor in donors])
                        ends.append(blend)
                    else:
                        ends.append(infer[index])
        select.set_downstream(list(infer.values()))
        verify.set_upstream(ends)
        prepare >> select
        verify >> publish >> cleanup

    def build(self, task_id: str) -> None:
        """One task alone."""
        stage, _, name = task_id.partition(".")
        if stage == "infer":
            self._infer(_index(name))
        elif stage == "blend":
            self._blend(_index(name))
        else:
            self._makers()[task_id]()

    def _makers(self) -> dict[str, Callable[[], BaseOperator]]:
        first, last, file = 4 * MAX_BLOCKS, 5 * MAX_BLOCKS, self.file
        asset = Asset(name=f"chunkflow-{self.spec.name}", uri=self.spec.output.path)

        def plain(name: str, **options: Any) -> BaseOperator:
            made: BaseOperator = self.operators.CommandOperator(
                task_id=name, spec=file, command=("chunkflow_core", name), **options
            )
            return made

        return {
            "prepare": lambda: plain("prepare", runs_model=True, priority_weight=first),
            "select_blocks": lambda: self.operators.SelectBlocksOperator(
                task_id="select_blocks", spec=file, priority_weight=first
            ),
            "verify": lambda: self.operators.VerifyOperator(
                task_id="verify", spec=file, trigger_rule="none_failed", priority_weight=last
            ),
            "publish": lambda: self.operators.PublishOperator(
                task_id="publish", spec=file, asset=asset, priority_weight=last
            ),
            "cleanup": lambda: plain("cleanup", priority_weight=last),
        }

    def _infer(self, index: Vector) -> BaseOperator:
        task: BaseOperator = self.operators.InferenceAndDonateOperator(
            task_id=infer_task_id(index),
            spec=self.file,
            block=index,
            pool=self.spec.runner.pool,
            trigger_rule="none_failed",
            priority_weight=self._priority(index),
        )
        return task

    def _blend(self, index: Vector) -> BaseOperator:
        task: BaseOperator = self.operators.ReceiveAndBlendOperator(
            task_id=blend_task_id(index),
            spec=self.file,
            block=index,
            trigger_rule="none_failed",
            priority_weight=2 * MAX_BLOCKS + self._priority(index),
        )
        return task

    def _priority(self, index: Vector) -> int:
        """Finishing before starting, and blocks in the order in which they let others finish."""
        _, height, width = self.grid.shape
        z, y, x = index
        return MAX_BLOCKS - ((z * height + y) * width + x)

    def _slab(self, z: int) -> str:
        box = self.grid.block((z, 0, 0)).box
        return f"blocks of z {box.start[0]}–{box.stop[0]}"


def _params(spec: VolumeSpec) -> dict[str, Param]:
    roi = spec.grid.roi
    params = {
        name: Param(
            None,
            type=["null", "integer"],
            minimum=roi.start[axis],
            maximum=roi.stop[axis],
            title=f"{AXES[axis]} {'start' if end == 0 else 'stop'}",
            description=f"voxels, {roi.start[axis]} to {roi.stop[axis]}; empty: {(roi.start, roi.stop)[end][axis]}",
            section="Bounding box (empty: the whole volume)",
        )
        for name, end, axis in zip(BOX_PARAMS, (0, 0, 0, 1, 1, 1), (0, 1, 2) * 2, strict=True)
    }
    params["force"] = Param(
        False, type="boolean", title="force", description="infer the blocks again although they are done"
    )
    return params | (_pod_params(spec.runner) if isinstance(spec.runner, KubernetesRunner) else {})


def _pod_params(runner: KubernetesRunner) -> dict[str, Param]:
    """What of the runner can be set for a run; the names are those of ``operators.base.RUNNER_PARAMS``."""
    section = "Pods (empty: as the spec says)"
    texts = {
        "image": f"container image; empty: {runner.image}",
        "infer_memory": f"memory of inference, such as 32Gi; empty: {runner.infer.memory}",
        "blend_memory": f"memory of blending, such as 4Gi; empty: {runner.blend.memory}",
        "priority_class": f"of inference; empty: {runner.infer.priority_class or 'none'}",
    }
    params = {
        name: Param(None, type=["null", "string"], title=name.replace("_", " "), description=text, section=section)
        for name, text in texts.items()
    }
    params["spot"] = Param(
        None,
        type=["null", "string"],
        enum=[None, *get_args(Spot)],
        title="spot",
        description=f"nodes for inference that the cloud may take back; empty: {runner.infer.spot}",
        section=section,
    )
    return params


def _documentation(spec: VolumeSpec, file: Path) -> str:
    grid: BlockGrid = spec.grid
    rows = {
        "input": f"{spec.input.path} (mip {spec.input.mip})",
        "output": f"{spec.output.path} ({spec.output.channels} × {spec.output.dtype})",
        "ROI": str(grid.roi),
        "blocks": f"{' × '.join(map(str, grid.shape))} of {' × '.join(map(str, spec.block_size))} voxels",
        "patches": f"{grid.patches} of {' × '.join(map(str, spec.patch_size))}",
        "model": f"{spec.model.engine} {spec.model.path or ''}",
        "spec": str(file),
    }
    return "\n".join([f"### {spec.name}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _index(name: str) -> Vector:
    z, y, x = map(int, name.split("_"))
    return (z, y, x)
