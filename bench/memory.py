"""Memory of a block's process beside what ``plan`` says, and what settings of glibc's malloc gain (``chunkflow_core/machine.py``).

    python bench/memory.py [--rounds 3] [--rows openvino pytorch ...] [--block Z Y X] [--output memory.json]

Inference of a block that has neighbours on all sides, as a process of its own, in turn as it is and with glibc as it is by
default; who begins changes each round. Figures are medians, ratios are taken within a round. Wall time is without imports,
CPU time with them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm
from volumes import UNET_FILES, spec_content, write_random

from chunkflow_core.lattice.boxes import Vector, vector

UNET_MODEL: dict[str, object] = {**UNET_FILES, "streams": 2}
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
    """A model, its patches, and the size of a block."""

    model: dict[str, object]
    patch: Vector
    overlap: Vector
    block: Vector
    channels: int = 1


ROWS = {
    "openvino": Row({"engine": "openvino", **UNET_MODEL}, *SMALL, (96, 384, 384)),
    "openvino-wide": Row({"engine": "openvino", **UNET_MODEL}, *SMALL, (48, 768, 768)),
    "pytorch": Row({"engine": "pytorch", **UNET_MODEL}, *SMALL, (48, 384, 384)),
    "pytorch-large": Row({"engine": "pytorch", **UNET_MODEL}, *LARGE, (48, 512, 512)),
    "identity": Row({"engine": "identity", "streams": 2}, (12, 96, 96), (4, 32, 32), (96, 768, 768), 3),
}


@dataclass(frozen=True)
class Run:
    """A process: peak resident memory in bytes, seconds of wall clock and of CPU."""

    peak: int
    wall: float
    cpu: float


def write_spec(folder: Path, row: Row) -> Path:
    """Random input around the block (1, 1, 1), and the spec's path."""
    write_random(folder, vector(2 * b + 2 * o for b, o in zip(row.block, row.overlap, strict=True)))
    sizes = {"patch": row.patch, "overlap": row.overlap, "block": row.block}
    spec = spec_content(folder, **sizes, model=row.model, channels=row.channels)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def ask(*arguments: str) -> dict[str, Any]:
    """What a command says in JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "chunkflow_core", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def run(how: str, spec: Path) -> Run:
    """Inference of the block, with memory ``kept`` or glibc's ``default``."""
    arguments = [sys.executable, "-c", RUN, how, str(spec), "--block", "1", "1", "1", "--force"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    peak, wall, cpu = done.stdout.split()[-3:]
    return Run(int(peak), float(wall), float(cpu))


def measure(row: Row, rounds: int, progress: tqdm[Any]) -> dict[str, float]:
    """Medians of a row; ratios within rounds."""
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        spec = write_spec(Path(folder), row)
        ask("prepare", str(spec))  # converts the model, where an engine does
        trial = ask("prepare", str(spec))
        planned = ask("plan", str(spec))["memory_bytes"]
        pairs = []
        for number in range(rounds):
            order = ("default", "kept") if number % 2 else ("kept", "default")
            runs = {how: run(how, spec) for how in order}
            pairs.append((runs["kept"], runs["default"]))
            progress.update()
    peak = statistics.median(kept.peak for kept, _ in pairs)
    return {
        "process_bytes": trial["process_bytes"],
        "data_bytes": planned - trial["process_bytes"],
        "peak_bytes": peak,
        "peak_of_plan": peak / planned,
        "wall_seconds": statistics.median(kept.wall for kept, _ in pairs),
        "default_peak": statistics.median(default.peak / kept.peak for kept, default in pairs),
        "default_wall": statistics.median(default.wall / kept.wall for kept, default in pairs),
        "default_cpu": statistics.median(default.cpu / kept.cpu for kept, default in pairs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    block: dict[str, Any] = {"type": int, "nargs": 3, "metavar": ("Z", "Y", "X")}
    parser.add_argument("--block", help="of all rows, a multiple of their strides (default: each has its own)", **block)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args(arguments)
    rows = {name: replace(ROWS[name], block=vector(options.block or ROWS[name].block)) for name in options.rows}
    figures: dict[str, dict[str, float]] = {}
    print(
        "| | patch | block | interpreter, libraries, network | data, by `plan` | peak | peak / plan | wall | by default: peak | wall | CPU |"
    )
    print("|" + " --- |" * 11)
    with tqdm(total=options.rounds * len(options.rows), unit="round") as progress:
        for name, row in rows.items():
            progress.set_description(name)
            f = figures[name] = measure(row, options.rounds, progress)
            sizes = [" × ".join(map(str, size)) for size in (row.patch, row.block)]
            tqdm.write(
                f"| {name} | {sizes[0]} | {sizes[1]} | {f['process_bytes'] / 1e6:.0f} MB | {f['data_bytes'] / 1e6:.0f} MB | "
                f"{f['peak_bytes'] / 1e6:.0f} MB | {f['peak_of_plan']:.2f} | {f['wall_seconds']:.1f} s | × {f['default_peak']:.2f} | "
                f"× {f['default_wall']:.2f} | × {f['default_cpu']:.2f} |"
            )
    if options.output:
        options.output.write_text(
            json.dumps({"cpus": os.cpu_count(), "rows": {n: asdict(rows[n]) | f for n, f in figures.items()}}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
