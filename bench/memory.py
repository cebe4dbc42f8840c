"""Memory of a block's process beside what ``plan`` says, and what settings of glibc's malloc gain.

    python -m bench.memory --rounds 1 --rows identity --block 16 128 128      # a look
    python -m bench.memory                                                    # 13 minutes

Inference of a block that has neighbours on all sides, as a process of its own, in turn as it is and
with glibc as it is by default (``chunkflow_core/machine.py`` has the settings); who begins changes
each round. Figures are medians, ratios are taken within a round. Wall time is without imports, CPU
time with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from tqdm import tqdm

from bench.common import (
    SIZE,
    UNET,
    ask,
    command_line,
    size_text,
    spec_content,
    table,
    table_line,
    write_json,
    write_random,
)
from chunkflow_core.lattice.boxes import Vector, vector

UNET_MODEL: dict[str, object] = {**UNET, "streams": 2}
SMALL: tuple[Vector, Vector] = (16, 128, 128), (4, 32, 32)
LARGE: tuple[Vector, Vector] = (16, 192, 192), (4, 64, 64)
RUN = """
import sys, time
from chunkflow_core import machine
if sys.argv[1] == "default":
    machine.set_glibc = lambda parameter, value: None
from chunkflow_core.inference_and_donate import main
start = time.perf_counter()
code = main(sys.argv[2:])
print(machine.peak_memory(), time.perf_counter() - start, time.process_time())
sys.exit(code)
"""


@dataclass(frozen=True)
class Row:
    """A network and sizes in voxels, zyx."""

    model: dict[str, object]
    """Section ``model`` of the spec."""
    patch: Vector
    overlap: Vector
    block: Vector
    channels: int = 1
    """Channels of the output."""


ROWS = {
    "openvino": Row({"engine": "openvino", **UNET_MODEL}, *SMALL, (96, 384, 384)),
    "openvino-wide": Row({"engine": "openvino", **UNET_MODEL}, *SMALL, (48, 768, 768)),
    "pytorch": Row({"engine": "pytorch", **UNET_MODEL}, *SMALL, (48, 384, 384)),
    "pytorch-large": Row({"engine": "pytorch", **UNET_MODEL}, *LARGE, (48, 512, 512)),
    "identity": Row({"engine": "identity", "streams": 2}, (12, 96, 96), (4, 32, 32), (96, 768, 768), 3),
}


@dataclass(frozen=True)
class Run:
    """What a process has taken."""

    peak: int
    """Largest resident memory in bytes."""
    wall: float
    """Seconds of wall clock, without imports."""
    cpu: float
    """CPU seconds, with imports."""


HEADER = [
    *("", "patch", "block", "interpreter, libraries, network", "data, by `plan`", "peak", "peak / plan", "wall"),
    *("by default: peak", "wall", "CPU"),
]
"""Titles of the table's columns."""


def write_spec(folder: Path, row: Row) -> Path:
    """Write random input around the block (1, 1, 1), and a spec; give the spec's path."""
    write_random(folder, vector(2 * b + 2 * o for b, o in zip(row.block, row.overlap, strict=True)))
    output: dict[str, object] = {"channels": row.channels}
    content = spec_content(
        folder, patch=row.patch, overlap=row.overlap, block=row.block, model=row.model, output=output
    )
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(how: str, spec: Path) -> Run:
    """Run inference of the block of a spec.

    Args:
        how: ``kept`` for memory as it is kept here, ``default`` for glibc as it is by default.
        spec: The spec's file.

    Raises:
        RuntimeError: The process fails.
    """
    arguments = [sys.executable, "-c", RUN, how, str(spec), "--block", "1", "1", "1", "--force"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    peak, wall, cpu = done.stdout.split()[-3:]
    return Run(int(peak), float(wall), float(cpu))


def measure(row: Row, rounds: int, progress: tqdm[Any]) -> dict[str, float]:
    """Run a row in rounds; give medians of bytes and seconds, and of ratios within rounds."""
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        spec = write_spec(Path(folder), row)
        ask("prepare", str(spec))  # converts the model, where an engine does
        process_bytes = ask("prepare", str(spec)).content["process_bytes"]
        planned = ask("plan", str(spec)).content["memory_bytes"]
        pairs = []
        for number in range(rounds):
            order = ("default", "kept") if number % 2 else ("kept", "default")
            runs = {how: run(how, spec) for how in order}
            pairs.append((runs["kept"], runs["default"]))
            progress.update()
    peak = median(kept.peak for kept, _ in pairs)
    return {
        "process_bytes": process_bytes,
        "data_bytes": planned - process_bytes,
        "peak_bytes": peak,
        "peak_of_plan": peak / planned,
        "wall_seconds": median(kept.wall for kept, _ in pairs),
        "default_peak": median(default.peak / kept.peak for kept, default in pairs),
        "default_wall": median(default.wall / kept.wall for kept, default in pairs),
        "default_cpu": median(default.cpu / kept.cpu for kept, default in pairs),
    }


def line(name: str, row: Row, figures: dict[str, float]) -> list[str]:
    """Write a line of the table."""
    megabytes = [f"{figures[key] / 1e6:.0f} MB" for key in ("process_bytes", "data_bytes", "peak_bytes")]
    by_default = [f"× {figures[key]:.2f}" for key in ("default_peak", "default_wall", "default_cpu")]
    took = [f"{figures['peak_of_plan']:.2f}", f"{figures['wall_seconds']:.1f} s"]
    return [name, size_text(row.patch), size_text(row.block), *megabytes, *took, *by_default]


def main() -> int:
    """Measure and print."""
    parser = command_line("memory", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--block", help="of all rows, a multiple of their strides (default: each has its own)", **SIZE)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    rows = {name: replace(ROWS[name], block=vector(options.block or ROWS[name].block)) for name in options.rows}
    figures: dict[str, dict[str, float]] = {}
    print(table(HEADER, []))
    with tqdm(total=options.rounds * len(options.rows), unit="round") as progress:
        for name, row in rows.items():
            progress.set_description(name)
            figures[name] = measure(row, options.rounds, progress)
            tqdm.write(table_line(line(name, row, figures[name])))
    report = {"cpus": os.cpu_count(), "rows": {name: asdict(rows[name]) | found for name, found in figures.items()}}
    write_json(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
