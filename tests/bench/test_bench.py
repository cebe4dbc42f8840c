"""The benchmarks that need nothing but this project run, at their smallest; not those whose Airflow takes a minute to start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
CASES: dict[str, tuple[str, list[str]]] = {
    # script: (options, how lines with figures begin)
    "compare.py": ("--volume 28 224 224 --rounds 1 --rows identity", ["| this, identity |"]),
    "device.py": (
        "--device cpu --volume 6 24 24 --patch 4 16 16 --overlap 1 4 4 --precision float32 --batch 2 --rounds 1",
        ["| U-Net, float32, batch 2 |", "| identity, batch 2 |"],
    ),
    "io.py": (
        "--volume 4 32 32 --chunk 4 32 32 --parallel 1",
        [f"| {codec} |" for codec in ("none", "gzip", "gzip 1", "zstd 3", "br 5") for _ in ("probabilities", "EM")],
    ),
    "memory.py": ("--rounds 1 --rows identity --block 16 128 128", ["| identity |"]),
    "planning.py": (
        "--blocks 2 3 4",
        ["| nothing done | 24 | 23 |", "| all done | 0 | 0 |", "| 1 % of the blocks lost | 0 | 0 |"],
    ),
    "starts.py": ("--no-demo --rounds 1 --rows blend", ["| blend, cold |", "| blend, warm |"]),
    "stitching.py": (
        "--volume 28 224 224 --rounds 1",
        ["unet      1 patches: whole block", "identity  1 patches: whole"],
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("script", CASES)
def test_a_benchmark(python: Callable[..., Any], script: str) -> None:
    options, rows = CASES[script]
    outcome = python(BENCH / script, *options.split())
    assert outcome.returncode == 0, outcome.stderr
    figures = [line for line in outcome.stdout.splitlines() if line.startswith(tuple(rows))]
    assert len(figures) == len(rows), outcome.stdout
    assert not [line for line in figures if "Error" in line], "a row that fails shows why, and the others go on"


def test_every_benchmark_is_run() -> None:
    scripts = {path.name for path in BENCH.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == {*CASES, "clicks.py", "pods.py"}
