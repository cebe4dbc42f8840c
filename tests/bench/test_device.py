"""What ``bench.device`` says of bits can be no; without a GPU it says that there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.common import UNET
from bench.device.bits import differing, left, plain, same_anywhere, same_elsewhere
from bench.device.measurement import are_right
from bench.device.volume import MIDDLE, Volume, open_workspace, whole
from chunkflow_core.engines.pytorch import PyTorch
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.steps.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """A block that has been run in the stage and plainly."""

    workspace: Workspace
    receipt: Receipt
    slab: Slab
    batch: torch.Tensor

    @property
    def network(self) -> torch.nn.Module:
        """The network of this process."""
        assert isinstance(self.workspace.engine, PyTorch)
        network = self.workspace.engine._model.network
        assert isinstance(network, torch.nn.Module)
        return network


@pytest.fixture
def run(tmp_path: Path) -> Run:
    volume = Volume.near(str(tmp_path), (6, 24, 24), (4, 16, 16), (1, 4, 4))
    volume.write()
    workspace = open_workspace(
        volume.spec("row", {"engine": "pytorch", **UNET, "threads": 1, "device": "cpu", "batch_size": 2})
    )
    receipt = whole(workspace)[1]
    slab, kept, _ = plain(workspace, workspace.spec.grid.block(MIDDLE))
    return Run(workspace, receipt, slab, kept[0])


@pytest.fixture(scope="module")
def other() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


def test_a_voxel_that_differs_is_counted(run: Run) -> None:
    assert differing(run.workspace, run.receipt, run.slab) == 0
    patch = np.ones((1, *run.workspace.spec.patch_size), np.float32)
    run.slab.add(run.workspace.spec.grid.block(MIDDLE).first_patch, patch)
    assert differing(run.workspace, run.receipt, run.slab) > 0


def test_other_bits_are_found_in_another_process(run: Run, other: ProcessPoolExecutor) -> None:
    assert same_elsewhere(run.workspace, run.batch, other)
    with torch.no_grad():
        next(run.network.parameters()).mul_(1.001)
    assert not same_elsewhere(run.workspace, run.batch, other)
    assert left(whole(run.workspace)[1]) != left(run.receipt)


def test_a_patch_that_depends_on_its_place_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_anywhere(run.workspace.engine, run.batch)
    forward = run.workspace.engine.forward
    places = torch.arange(2).view(2, 1, 1, 1, 1) * 2.0**-20
    monkeypatch.setattr(run.workspace.engine, "forward", lambda patches: forward(patches) + places)
    assert not same_anywhere(run.workspace.engine, run.batch)


@pytest.mark.parametrize(
    ("figures", "right"),
    [
        ({"voxels that differ": 0, "same each time": True, "same elsewhere": None}, True),
        ({"voxels that differ": 1, "same each time": True}, False),
        ({"voxels that differ": 0, "same elsewhere": False}, False),
        ({"error": "out of memory"}, True),
    ],
)
def test_one_row_that_differs_is_enough(figures: dict[str, Any], right: bool) -> None:
    rows = {"good": {"voxels that differ": 0, "same each time": True, "same at any place": True}, "row": figures}
    assert are_right(rows) == right


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    outcome = python("-m", "bench.device")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("PyTorch finds no GPU on this machine. With --device cpu")
