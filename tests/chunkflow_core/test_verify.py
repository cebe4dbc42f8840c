"""The audit finds what is wrong, and only that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from volume import write_volume

from chunkflow_core.__main__ import main
from chunkflow_core.geometry import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.stages import Workspace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    spec = write_volume(tmp_path)
    assert main(["run", str(spec), "--seams", "0"]) == 0
    return spec


def test_all_is_well(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(path), "--seams", "8"]) == 0
    assert "8 blocks, 150 storage chunks, 8 seams computed again: 0 findings" in capsys.readouterr().out


def test_a_missing_storage_chunk(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(tmp_path.glob("output/*/8-16_8-16_0-4*")).unlink()

    assert main(["verify", str(path), "--seams", "0"]) == 65

    message = capsys.readouterr().err
    assert "block (0, 0, 0): the storage chunk 8-16_8-16_0-4 is missing" in message
    assert message.count("is missing") == 1


def test_a_lost_receipt(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(tmp_path.rglob("receipts/blend/24-40_24-48_12-20.json")).unlink()

    assert main(["verify", str(path), "--seams", "0"]) == 65
    assert "block (1, 1, 1): blending is not complete" in capsys.readouterr().err


def test_a_seam_that_is_wrong(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of every voxel around the face between the two layers of blocks: any window there must see it."""
    workspace = Workspace(load_spec(path))
    box = Box((8, 0, 0), (16, 48, 40))
    data = workspace.output.read(box)
    workspace.output.write(box, np.nextafter(data, np.float32(2)))

    assert main(["verify", str(path), "--seams", "12"]) == 65
    assert "at the seam" in capsys.readouterr().err


def test_a_part_is_audited_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What its neighbours hold, of another model or nothing at all, is not its affair."""
    spec = str(write_volume(tmp_path))
    last = ["--bbox", "18", "40", "36", "20", "48", "40"]
    assert main(["run", spec, "--seams", "0"]) == 0
    assert main(["run", spec, *last, "--seams", "20", "--set", "input.padding=edge", "--set", "model.threads=2"]) == 0
    assert "1 blocks, 12 storage chunks, 20 seams computed again: 0 findings" in capsys.readouterr().out


def test_another_spec_has_written_since(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(path), "--set", "input.padding=edge"]) == 0

    assert main(["verify", str(path), "--seams", "0"]) == 65
    assert "another spec" in capsys.readouterr().err
