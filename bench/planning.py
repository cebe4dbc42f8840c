"""How long it takes to plan a volume of many blocks, and how much memory.

    python bench/planning.py [--blocks 40 50 50] [--folder DIR]

Writes an exchange as a run of the whole volume leaves it (receipts of all blocks; donations cleaned up; no voxels), and times
``chunkflow-core plan`` as a process of its own: for nothing done yet, for all done, and for some blocks lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import yaml
from tqdm import tqdm

from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.lattice.boxes import Vector, vector
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.stages import Workspace
from chunkflow_core.storage.layers import NewLayer

BLOCK = (112, 1152, 1152)


def write_spec(folder: Path, blocks: Vector) -> Path:
    """A spec of so many blocks, and an input layer without voxels."""
    shape = vector(n * size for n, size in zip(blocks, BLOCK, strict=True))
    NewLayer(f"file://{folder}/input", shape, dtype="uint8", resolution=(40, 4, 4), chunk=(64, 512, 512))
    spec = {
        "name": "planning",
        "input": {"path": f"file://{folder}/input", "fill_missing": True},
        "output": {"path": f"file://{folder}/output", "channels": 3, "chunk_size": [16, 128, 128]},
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_size": [32, 256, 256],
        "patch_overlap": [4, 64, 64],
        "block_size": list(BLOCK),
        "model": {"engine": "identity"},
    }
    path = folder / "planning.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def write_receipts(spec: VolumeSpec) -> None:
    """The receipts of a finished run, with made-up checksums."""
    workspace = Workspace(spec)
    exchange, inputs, grid = workspace.exchange, workspace.inputs, spec.grid
    given: dict[Vector, Receipt] = {}

    def receipt(index: Vector, stage: str) -> Receipt:
        box = grid.block(index).box.key
        return Receipt(
            stage=stage,  # type: ignore[arg-type]
            block=index,
            box=box,
            fingerprint=exchange.fingerprint,
            geometry=spec.block_digest(index),
            run="bench",
            signature=inputs.signature(index),
            content="c" * 13,
        )

    for index in tqdm(list(grid.indices()), desc="receipts", unit="block", disable=None):
        box = grid.block(index).box.key
        entries = tuple(
            DonationEntry(f"{box}%{r}", r, f"{hash((index, r)):032x}"[-32:], 1) for r in grid.receivers(index)
        )
        given[index] = replace(receipt(index, "infer"), donations=entries)
        exchange.put_receipt(given[index])
        donors = grid.donors(index)
        if donors:
            consumed = {given[d].box: given[d].given(index) for d in donors}
            exchange.put_receipt(replace(receipt(index, "blend"), consumed=consumed))


def lose(spec: VolumeSpec, share: float) -> None:
    """Retract the receipts of inference of some blocks."""
    blocks = list(spec.grid.indices())
    for index in random.Random(0).sample(blocks, round(len(blocks) * share)):
        Exchange(spec).retract("infer", index)


def measure(path: Path) -> tuple[float, int, dict[str, object]]:
    """Seconds and peak memory in bytes of planning, and the plan."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "chunkflow_core", "plan", str(path), "--json"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, usage.ru_maxrss * 1024, json.loads(output)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=3, default=[40, 50, 50], metavar=("Z", "Y", "X"))
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = write_spec(Path(folder), vector(options.blocks))
        spec = load_spec(path)
        rows = [("nothing done", measure(path))]
        write_receipts(spec)
        rows.append(("all done", measure(path)))
        lose(spec, 0.01)
        rows.append(("1 % of the blocks lost", measure(path)))
    print(
        f"\n{prod(spec.grid.shape)} blocks\n\n| | to infer | to blend | seconds | peak memory |\n|---|---|---|---|---|"
    )
    for name, (seconds, memory, plan) in rows:
        due = [len(plan[key]) for key in ("infer", "blend")]  # type: ignore[arg-type]
        print(f"| {name} | {due[0]} | {due[1]} | {seconds:.1f} | {memory / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
