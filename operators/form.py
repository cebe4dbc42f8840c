"""The form that Airflow shows for the runs of a volume's DAG."""

from __future__ import annotations

from typing import get_args

from airflow.sdk import Param

from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import AXES
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.spec.runner import KubernetesRunner, Spot
from operators.request import BOX_PARAMS, DEFAULTS, OTHER_MODEL


def form_of(spec: VolumeSpec) -> dict[str, Param]:
    """The parameters of a volume's runs.

    All have defaults, so that runs can start by themselves.
    """
    params = _box_params(spec.grid)
    params["force"] = Param(
        DEFAULTS["force"],
        type="boolean",
        title="force",
        description="infer the blocks again although they are done",
    )
    params["check_input"] = Param(
        DEFAULTS["check_input"],
        type="boolean",
        title="check input",
        description="infer again the blocks whose input has changed, or whose output somebody else has changed",
    )
    params["only_repair"] = Param(
        DEFAULTS["only_repair"],
        type="boolean",
        title="only repair",
        description="read all that is stored, and do again what is missing or damaged, nothing else",
    )
    params["other_model"] = Param(
        DEFAULTS["other_model"],
        type="string",
        enum=list(OTHER_MODEL),
        title="other model",
        description="if the output holds results of another model or of other settings: refuse to run, overwrite all "
        "of them, or accept a mixture of both",
    )
    return params | (_pod_params(spec.runner) if isinstance(spec.runner, KubernetesRunner) else {})


def _box_params(grid: BlockGrid) -> dict[str, Param]:
    roi = grid.roi
    return {
        name: Param(
            DEFAULTS[name],
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
    """What of the runner can be set for a run; see ``operators.request.RUNNER_PARAMS``."""
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
