"""The path of accelerators, on PyTorch's CPU device."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from chunkflow_core.__main__ import main
from chunkflow_core.engines.identity import Identity
from chunkflow_core.inference.patches import Patches
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from tests.support.volume import write_volume

WINDOW = 0.5
"""Seconds in which another thread that makes the same check would come in."""


class OnDevice(Identity):
    """Gives the input back, for the two channels of the volume, with tensors on a device."""

    device = torch.device("cpu")

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches.repeat(1, 2, 1, 1, 1)


def test_the_values_of_a_patch_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pieces of a block depend on its checks, and leave in several threads."""
    path = write_volume(tmp_path)
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    checked: list[Vector] = []
    again = threading.Event()
    check = Patches.check_extremes

    def note(self: Patches, position: Vector, least: float, most: float) -> None:
        if position in checked:
            again.set()
        checked.append(position)
        if len(checked) == 1:
            again.wait(WINDOW)
        check(self, position, least, most)

    workspace = Workspace(spec, OnDevice(spec))
    _ = workspace.engine  # it compares with prepare's reference
    monkeypatch.setattr(Patches, "check_extremes", note)
    for index in ((0, 0, 0), (1, 1, 1)):
        checked.clear()
        receipt = inference_and_donate(workspace, index, why="forced").receipt
        assert receipt is not None and receipt.patches > 1
        assert len(checked) == len(set(checked)) == receipt.patches
