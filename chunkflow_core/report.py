"""What has been done, in figures, from the receipts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from chunkflow_core.exchange import STAGES, Exchange
from chunkflow_core.spec import VolumeSpec


@dataclass(frozen=True)
class Report:
    """Figures of a run, or of all that is there."""

    name: str
    output: str
    fingerprint: str
    run: str | None
    blocks: int
    """Of the whole volume."""
    inferred: int
    """Blocks with a receipt of inference."""
    blended: int
    """Blocks with a receipt of blending."""
    patches: int
    storage_chunks: int
    """Storage chunks written."""
    donated_bytes: int
    """As stored."""
    patches_per_second: float | None
    """Of one process, over the whole time of its inference tasks."""
    seconds: dict[str, float]
    """Sum over blocks, by phase; concurrent phases overlap."""


def summarise(spec: VolumeSpec, exchange: Exchange, *, run: str | None = None) -> Report:
    """Summarise the receipts of a run, or all of them."""
    infer, blend = (
        [receipt for receipt in exchange.receipts(stage).values() if run is None or receipt.run == run]
        for stage in STAGES
    )
    seconds: Counter[str] = Counter()
    for receipt in [*infer, *blend]:
        for phase, value in receipt.facts["seconds"].items():
            seconds[f"{receipt.stage}: {phase}"] += value
    wall = sum(receipt.facts["wall"] for receipt in infer)
    patches = sum(receipt.patches for receipt in infer)
    return Report(
        name=spec.name,
        output=spec.output.path,
        fingerprint=spec.fingerprint,
        run=run,
        blocks=sum(1 for _ in spec.grid.indices()),
        inferred=len(infer),
        blended=len(blend),
        patches=patches,
        storage_chunks=sum(receipt.storage_chunks for receipt in [*infer, *blend]),
        donated_bytes=sum(entry.bytes for receipt in infer for entry in receipt.donations),
        patches_per_second=round(patches / wall, 3) if wall else None,
        seconds={phase: round(value, 3) for phase, value in sorted(seconds.items())},
    )
