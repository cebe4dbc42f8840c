"""The benchmarks that need nothing but this project run, at their smallest.

Those whose Airflow takes a minute to start are not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES: dict[str, tuple[str, list[str]]] = {
    # benchmark: (options, how lines with figures begin)
    "compare": (
        "--volume 28 224 224 --rounds 1 --rows pytorch-float32 identity",
        ["| this, PyTorch, float32 |", "| this, identity |", "- float32 output of a small volume: at most"],
    ),
    "device": (
        "--device cpu --volume 6 24 24 --patch 4 16 16 --overlap 1 4 4 --precision float32 --batch 2 --rounds 1 "
        "--peers pytorch-float32",
        ["| U-Net, float32, batch 2 | ", "| identity, batch 2 | ", "| this, PyTorch, float32 | "],
    ),
    "formats": (
        "--volume 16 64 64 --rounds 1",
        ["| zarr 2, blosc |", "| zarr 3, zstd |", "| zarr 3, gzip |", "| zarr 3, shards |", "| N5, gzip |"],
    ),
    "ingest": (
        "--sections 4 --size 64 64 --rounds 1",
        [f"| {kind}{delay} |" for kind in ("png", "jpg", "tif", "zlib.tif") for delay in ("", ", 20 ms later")],
    ),
    "io": (
        "--volume 4 32 32 --chunk 4 32 32 --parallel 1",
        [f"| {codec} |" for codec in ("none", "gzip", "gzip 1", "zstd 3", "br 5") for _ in ("probabilities", "EM")],
    ),
    "memory": ("--rounds 1 --rows identity --block 16 128 128", ["| identity |"]),
    "planning": (
        "--blocks 2 3 4",
        ["| nothing done | 24 | 23 |", "| all done | 0 | 0 |", "| 1 % of the blocks lost | 0 | 0 |"],
    ),
    "readers": (
        "--edges 2 3 --names 2",
        ["| plan |", "| verify, no windows |", "| report |", "| report --publish |"],
    ),
    "starts": ("--no-demo --rounds 1 --rows blend", ["| blend, cold |", "| blend, warm |"]),
    "stitching": (
        "--volume 28 224 224 --rounds 1",
        ["unet      1 patches: whole block", "identity  1 patches: whole"],
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_a_benchmark(python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # since it runs in an empty folder
    options, rows = CASES[name]
    outcome = python("-m", f"bench.{name}", *options.split())
    assert outcome.returncode == 0, outcome.stderr
    figures = [line for line in outcome.stdout.splitlines() if line.startswith(tuple(rows))]
    assert len(figures) == len(rows), outcome.stdout
    assert not [line for line in figures if "Error" in line], "a row that fails shows why, and the others go on"


def test_every_benchmark_is_run() -> None:
    files = [*(ROOT / "bench").glob("*.py"), *(ROOT / "bench").glob("*/__main__.py")]
    started = [file.parent if file.stem == "__main__" else file for file in files if '"__main__"' in file.read_text()]
    assert {path.stem for path in started} == {*CASES, "clicks", "pods"}
