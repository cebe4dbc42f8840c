"""Memory of inference-and-donate does not grow with the depth of the block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from chunkflow_core.__main__ import main
from chunkflow_core.geometry import Box
from chunkflow_core.volumes import NewLayer

SIDE = 448
MEASURE = """
import sys
from chunkflow_core.inference_and_donate import main
from chunkflow_core.stages import peak_memory
code = main(sys.argv[1:])
print(peak_memory())
sys.exit(code)
"""


def peak_of_one_block(folder: Path, depth: int) -> int:
    """Peak resident memory, in bytes, of a process that infers the first block of a volume ``depth`` + 8 deep."""
    shape = (depth + 8, SIDE, SIDE)
    layer = NewLayer(f"file://{folder}/input", shape, dtype="uint8", resolution=(40, 4, 4), chunk=(8, 128, 128))
    data = np.random.default_rng(0).integers(1, 256, (1, *shape), dtype=np.uint8)
    layer.write(Box((0, 0, 0), shape), data)
    spec = {
        "name": "deep",
        "input": {"path": f"file://{folder}/input"},
        "output": {"path": f"file://{folder}/output", "channels": 3, "chunk_size": [8, 128, 128]},
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_size": [12, 96, 96],
        "patch_overlap": [4, 32, 32],
        "block_size": [depth, 384, 384],
        "model": {"engine": "identity"},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert main(["prepare", str(path)]) == 0
    arguments = [sys.executable, "-c", MEASURE, str(path), "--block", "0", "0", "0"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout.splitlines()[-1])


def test_a_block_four_times_as_deep_takes_no_more_memory(tmp_path: Path) -> None:
    (tmp_path / "shallow").mkdir()
    (tmp_path / "deep").mkdir()

    shallow = peak_of_one_block(tmp_path / "shallow", 32)
    deep = peak_of_one_block(tmp_path / "deep", 128)

    whole = 3 * 4 * 96 * SIDE * SIDE
    assert whole > 0.5 * shallow, "holding the deeper block's sums would have to show"
    assert deep < 1.1 * shallow
