"""What can be asked of a run: the form that Airflow shows for it, and what the commands are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowFailException

from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import AXES
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.spec.runner import KubernetesRunner, Spot

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

OTHER_MODEL: dict[str, list[str]] = {"refuse": [], "overwrite": ["--overwrite"], "mixture": ["--accept-mixture"]}
"""What to do if the output holds another model's results, and what ``prepare`` is told then."""


def form_of(spec: VolumeSpec) -> dict[str, Param]:
    """The parameters of a volume's runs. All have defaults, so that runs can start by themselves."""
    params = _box_params(spec.grid)
    params["force"] = Param(
        False, type="boolean", title="force", description="infer the blocks again although they are done"
    )
    params["check_input"] = Param(
        True, type="boolean", title="check input", description="infer again the blocks whose input has changed"
    )
    params["only_repair"] = Param(
        False,
        type="boolean",
        title="only repair",
        description="read all that is stored, and do again what is missing or damaged, nothing else",
    )
    params["other_model"] = Param(
        "refuse",
        type="string",
        enum=list(OTHER_MODEL),
        title="other model",
        description="if the output holds results of another model or of other settings: refuse to run, overwrite all "
        "of them, or accept a mixture of both",
    )
    return params | (_pod_params(spec.runner) if isinstance(spec.runner, KubernetesRunner) else {})


def check_request(params: Mapping[str, Any], grid: BlockGrid) -> None:
    """Refuse what can't be meant; ``AirflowFailException``. Airflow has checked each value by itself."""
    ends = _box(params, grid)
    for axis, start, stop in zip(AXES, ends[:3], ends[3:], strict=True):
        if start >= stop:
            raise AirflowFailException(
                f"bounding box: {axis} start {start} is not below {axis} stop {stop}; expected start < stop on every "
                f"axis, in voxels of the ROI ({grid.roi})"
            )
    if params["other_model"] == "overwrite" and requested_box(params, grid):
        raise AirflowFailException("other model: overwrite does the whole volume again; expected an empty bounding box")
    if params["only_repair"] and params["other_model"] != "refuse":
        raise AirflowFailException(
            "only repair: of another model's output there is nothing to repair; expected one of them"
        )
    if params["force"] and params["only_repair"]:
        raise AirflowFailException(
            "force and only repair: expected one of them; repair does no block again that is right"
        )


def requested_box(params: Mapping[str, Any], grid: BlockGrid) -> list[str]:
    """The run's bounding box as command-line arguments; none if the form was left empty."""
    if all(params[name] is None for name in BOX_PARAMS):
        return []
    return ["--bbox", *map(str, _box(params, grid))]


def _box(params: Mapping[str, Any], grid: BlockGrid) -> list[int]:
    ends = (*grid.roi.start, *grid.roi.stop)
    return [end if params[name] is None else params[name] for name, end in zip(BOX_PARAMS, ends, strict=True)]


def _box_params(grid: BlockGrid) -> dict[str, Param]:
    roi = grid.roi
    return {
        name: Param(
            None,
            type=["null", "integer"],
            minimum=roi.start[axis] + end,  # not even one voxel's box may be empty
            maximum=roi.stop[axis] - 1 + end,
            title=f"{AXES[axis]} {'stop' if end else 'start'}",
            description=f"voxels, {roi.start[axis] + end} to {roi.stop[axis] - 1 + end}; "
            f"empty: {(roi.start, roi.stop)[end][axis]}",
            section="Bounding box (empty: the whole volume)",
        )
        for name, end, axis in zip(BOX_PARAMS, (0, 0, 0, 1, 1, 1), (0, 1, 2) * 2, strict=True)
    }


def _pod_params(runner: KubernetesRunner) -> dict[str, Param]:
    """What of the runner can be set for a run: ``RUNNER_PARAMS``."""
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
