"""Values beyond ``output.range`` stop a block, and do so alike on CPUs and on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chunkflow_core.engines.identity import Identity
from chunkflow_core.errors import ChunkflowError
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace

MakeSpec = Callable[..., Path]


class Beyond(Identity):
    """An engine that gives a value beyond the range in one column of each patch."""

    def __init__(self, spec: VolumeSpec, column: int, value: float) -> None:
        super().__init__(spec)
        self._column, self._value = column, value

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        output = super().__call__(patches)
        output[..., self._column] = self._value
        return output


class BeyondOnDevice(Beyond):
    """The same, with tensors on a device."""

    device = torch.device("cpu")

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self(patches.numpy()))


def ended(workspace: Workspace, do: Callable[[Workspace], Any]) -> int:
    """The exit code of a step."""
    try:
        do(workspace)
    except ChunkflowError as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize("value", [2.0, float("nan")])
@pytest.mark.parametrize(
    ("column", "augmentation", "code"),
    [(14, "none", 65), (15, "none", 0), (15, "flips", 65)],
    ids=["inside", "past the ROI", "past the ROI, in some orientation inside"],
)
def test_one_spec_ends_alike_everywhere(
    make_spec: MakeSpec, column: int, augmentation: str, code: int, value: float
) -> None:
    """The patch reaches past the ROI by one column, which nobody gets."""
    path = make_spec(roi=[[0, 0, 0], [8, 16, 15]], block_size=[12, 24, 24])
    spec = load_spec(path, [f"model.augmentation={augmentation}"])
    prepare(Workspace(spec))

    codes = {
        kind.__name__: (
            ended(
                Workspace(spec, kind(spec, column, value)),
                lambda workspace: workspace.trial.try_patch((0, 0, 0), [int]),
            ),
            ended(Workspace(spec, kind(spec, column, value)), _blocks_of_an_unknown_machine),
        )
        for kind in (Beyond, BeyondOnDevice)
    }

    assert codes == {"Beyond": (code, code), "BeyondOnDevice": (code, code)}


def _blocks_of_an_unknown_machine(workspace: Workspace) -> None:
    workspace.exchange.delete_files(["reference.json"])
    inference_and_donate(workspace, (0, 0, 0), why="forced")
