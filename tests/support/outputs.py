"""Volumes that are prepared and run in this process, and what their outputs say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloudvolume import CloudVolume

from chunkflow_core.__main__ import main
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.prepare import Other, prepare
from chunkflow_core.steps.workspace import Workspace

OTHER = ("input.padding=edge", "model.threads=2")
"""What makes another fingerprint of a spec."""


def prepared(path: Path, *changes: str, other: Other = "refuse", once: bool = False) -> VolumeSpec:
    spec = load_spec(path, changes)
    prepare(Workspace(spec), run="by-hand", other=other, once=once)
    return spec


def run(path: Path, *changes: str) -> None:
    settings = [word for change in changes for word in ("--set", change)]
    assert main(["run", str(path), "--seams", "0", *settings]) == 0


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the output's provenance says, once CloudVolume has found it valid."""
    stored = CloudVolume(f"file://{folder}/output", progress=False).provenance
    stored.validate()
    assert all(step["by"] for step in stored["processing"])
    return [step["method"] for step in stored["processing"]]


def modes(folder: Path) -> list[str]:
    return [step["mode"] for step in steps(folder)]
