"""Memory of inference-and-donate is what ``plan`` says, whatever the depth of the block."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from chunkflow_core.__main__ import main
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.layers import NewLayer

MEASURE = """
import json, os, sys
from chunkflow_core import __main__, inference_and_donate
from chunkflow_core.machine import peak_memory

# Each in a process of its own, which has imported what it needs; its peak begins with what that takes.
for line in sys.stdin:
    if not os.fork():
        main = {"prepare": __main__.main, "infer": lambda words: inference_and_donate.main(words[1:])}
        words = json.loads(line)
        code = main[words[0]](words)
        print(json.dumps([code, peak_memory()]), flush=True)
        os._exit(0)
    os.wait()
"""


class Measured:
    """Runs commands in fresh processes."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", MEASURE]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def run(self, *words: str) -> int:
        """Run a command; give the peak of its resident memory, in bytes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        for line in self.process.stdout:
            if line.startswith("["):
                code, peak = json.loads(line)
                assert code == 0
                return int(peak)
        raise AssertionError("the process is gone")


@pytest.fixture
def measured() -> Iterator[Measured]:
    measured = Measured()
    yield measured
    measured.process.communicate()


def peak_and_estimate(
    folder: Path, depth: int, side: int, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> tuple[int, int, int]:
    """Infer a block that has neighbours on all sides; give what memory it takes, in bytes.

    Returns:
        Peak resident memory, what ``plan`` said, and sums.
    """
    shape = (2 * depth + 8, 2 * side + 64, 2 * side + 64)
    layer = NewLayer(f"file://{folder}/input", shape, dtype="uint8", resolution=(40, 4, 4), chunk=(8, 128, 128))
    # Only what this block reads, which is also where preparation tries a patch; it is an eighth of
    # the layer.
    read = Box((depth, side, side), shape)
    layer.write(read, np.random.default_rng(0).integers(1, 256, (1, *read.shape), dtype=np.uint8))
    spec = {
        "name": "deep",
        "input": {"path": f"file://{folder}/input"},
        "output": {"path": f"file://{folder}/output", "channels": 3, "chunk_size": [8, 128, 128]},
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_size": [12, 96, 96],
        "patch_overlap": [4, 32, 32],
        "block_size": [depth, side, side],
        "model": {"engine": "identity", "streams": 2},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    measured.run("prepare", str(path))
    capsys.readouterr()
    assert main(["plan", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["memory_bytes"]
    peak = measured.run("infer", str(path), "--block", "1", "1", "1")
    sums = 3 * 4 * (12 + 8 - 1) * (side + 64) ** 2
    return peak, planned, sums


@pytest.mark.long
def test_memory_is_what_plan_says_and_does_not_grow_with_depth(
    tmp_path: Path, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks: dict[tuple[int, int], int] = {}
    for depth, side in [(32, 384), (96, 384), (32, 768), (96, 768)]:
        folder = tmp_path / f"{depth}-{side}"
        folder.mkdir()
        peak, planned, sums = peak_and_estimate(folder, depth, side, measured, capsys)
        peaks[depth, side] = peak
        grid = load_spec(folder / "spec.yaml").grid
        margins = 3 * 4 * sum(d.box.voxels for piece in grid.pieces(grid.block((1, 1, 1))) for d in piece.donations)
        assert 0.85 * planned < peak < 1.15 * planned, (depth, side, peak, planned)
        assert peak < sums + margins + 300e6, (depth, side)
        shutil.rmtree(folder)

    whole = 3 * 4 * 64 * (768 + 64) ** 2
    assert whole > 0.5 * peaks[32, 768], "holding the deeper block's sums would have to show"
    for side in (384, 768):
        assert peaks[96, side] < 1.1 * peaks[32, side]
