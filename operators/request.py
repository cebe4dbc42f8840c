"""What is asked of a run of a volume's DAG, and what the commands are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chunkflow_core.errors import UsageError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import AXES

BOX_PARAMS = ("z_start", "y_start", "x_start", "z_stop", "y_stop", "x_stop")
"""Names of the run parameters that make the bounding box, in voxels; None is the ROI's end."""

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

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(BOX_PARAMS),
    "force": False,
    "check_input": True,
    "only_repair": False,
    "other_model": "refuse",
}
"""The run parameters that all volumes have, and what they are when nothing is asked."""


def check_request(params: Mapping[str, Any], grid: BlockGrid) -> None:
    """Refuse parameters that contradict each other. Airflow has checked each one by itself.

    Args:
        params: The run's parameters.
        grid: The volume's blocks.

    Raises:
        UsageError: They do; the message names them.
    """
    ends = _box(params, grid)
    for axis, start, stop in zip(AXES, ends[:3], ends[3:], strict=True):
        if start >= stop:
            raise UsageError(
                f"bounding box: {axis} start {start} is not below {axis} stop {stop}; expected start < stop on every "
                f"axis, in voxels of the ROI ({grid.roi})"
            )
    if params["other_model"] == "overwrite" and requested_box(params, grid):
        raise UsageError("other model: overwrite does the whole volume again; expected an empty bounding box")
    if params["only_repair"] and params["other_model"] != "refuse":
        raise UsageError("only repair: of another model's output there is nothing to repair; expected one of them")
    if params["force"] and params["only_repair"]:
        raise UsageError("force and only repair: expected one of them; repair does no block again that is right")


def requested_box(params: Mapping[str, Any], grid: BlockGrid) -> list[str]:
    """The run's bounding box as command-line arguments; none if the form was left empty."""
    if all(params[name] is None for name in BOX_PARAMS):
        return []
    return ["--bbox", *map(str, _box(params, grid))]


def _box(params: Mapping[str, Any], grid: BlockGrid) -> list[int]:
    """Start and stop in voxels, zyx each."""
    ends = (*grid.roi.start, *grid.roi.stop)
    return [end if params[name] is None else params[name] for name, end in zip(BOX_PARAMS, ends, strict=True)]
