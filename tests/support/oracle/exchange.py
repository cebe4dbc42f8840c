"""Oracle for the exchange: what has been left there, by the files that are there.

It reads names, and claims; all else of the formats is the library's own affair. It shares no code
with ``chunkflow_core``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.oracle.geometry import Geometry, Index

VOID = "%void.json"
"""Ending of what voids the receipts of a block."""


def void(folder: Path, geometry: Geometry) -> set[tuple[str, Index]]:
    """Stages of blocks whose receipts count no more, as their deletion has begun."""
    files = {stage: (folder / "receipts" / stage).rglob(f"*{VOID}") for stage in ("infer", "blend")}
    return {(stage, donor_of(file.name, geometry)) for stage, found in files.items() for file in found}


def claim(output: Path) -> tuple[str, str]:
    """Fingerprint and epoch of the last claim on an output layer; empty if there is none."""
    found = claims(output)
    step = json.loads(found[-1])["method"] if found else {}
    return step.get("fingerprint", ""), step.get("epoch", "")


def claims(output: Path) -> list[bytes]:
    """All claims on an output layer, in order."""
    return [file.read_bytes() for file in sorted((output / "claims").glob("*.json"))]


def donations(folder: Path) -> set[Path]:
    """All donations below a model's folder of the exchange."""
    return {file for file in (folder / "donations").rglob("*") if file.is_file() and "%" in file.name}


def donor_of(file: str, geometry: Geometry) -> Index:
    """The block that a file is named after."""
    return geometry.owner(corners(file)[0])


def receiver_of(donation: str, geometry: Geometry) -> Index:
    """The block that owns a donation's voxels."""
    return geometry.owner(corners(donation.partition("%")[2])[0])


def corners(name: str) -> tuple[Index, Index]:
    """Start and stop, zyx, of a range that a file is named after."""
    ranges = [axis.split("-") for axis in name.partition("%")[0].split("_")]
    return tuple(int(a) for a, _ in reversed(ranges)), tuple(int(b) for _, b in reversed(ranges))


def some(items: Iterable[Any], seed: int) -> list[Any]:
    """A random part of some items, at least one if there are any."""
    rng, ordered = np.random.default_rng(seed), sorted(items)
    part = [item for item in ordered if rng.random() < 0.3]
    return part or [ordered[int(rng.integers(len(ordered)))]] if ordered else []
