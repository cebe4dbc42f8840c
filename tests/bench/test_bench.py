"""The benchmarks that need nothing but this project run, at their smallest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize(
    ("script", "options", "row"),
    [
        ("compare.py", "--volume 16 224 224 --rounds 1 --rows identity", "| this, identity |"),
        ("memory.py", "--rounds 1 --rows identity", "| identity |"),
        ("planning.py", "--blocks 2 3 4", "| nothing done | 24 | 23 |"),
    ],
)
def test_a_benchmark(python: Callable[..., Any], script: str, options: str, row: str) -> None:
    outcome = python(BENCH / script, *options.split())
    assert outcome.returncode == 0, outcome.stderr
    (figures,) = [line for line in outcome.stdout.splitlines() if line.startswith(row)]
    assert "Error" not in figures, "a row that fails shows why, and the others go on"
