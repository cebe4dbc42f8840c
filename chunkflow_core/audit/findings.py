"""What an audit finds, as data, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Literal, get_args

from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.spec import VolumeSpec

FindingKind = Literal[
    "other model",
    "missing chunk",
    "wrong chunk",
    "seam",
    "stray chunk",
    "receipt",
    "donation",
    "incomplete",
    "not compared",
    "not done",
]
"""What can be wrong.

``incomplete`` is a block that was begun, or whose donors have changed since; ``not done`` is one
that was never begun. ``not compared`` is no damage: voxels were to be computed again, and this
machine can't, as its network gives other bits.
"""

_DUE: tuple[FindingKind, ...] = ("incomplete", "not done")
"""Findings that the planner sees by itself."""
_NO_DAMAGE: tuple[FindingKind, ...] = (*_DUE, "not compared")
"""Findings with which all that is there may be right."""
_SHOWN = 20
"""Number of findings that are told of one by one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: FindingKind
    block: Vector | None
    """Index of the block that it is about, zyx; None for what is no block's."""
    subject: str
    """Name of what is wrong.

    It is that of a storage chunk, of a file in the exchange, of a box, of a stage, or a
    fingerprint.
    """
    message: str

    def __str__(self) -> str:
        """The message, after the block that it is about."""
        return f"block {self.block}: {self.message}" if self.block is not None else self.message


@dataclass
class Audit:
    """What an audit looked at and found wrong."""

    box: Box | None = None
    """The part of the volume that was looked at; None for all."""
    storage_chunks: int = 0
    """Number of storage chunks that have to be there: those of stages with a receipt."""
    blocks: int = 0
    """Number of blocks that were looked at."""
    seams: int = 0
    """Number of windows that were computed again."""
    seed: int = 0
    """What has chosen them: the same one chooses the same windows of the same blocks."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong; empty if all is well."""

    def add(self, kind: FindingKind, block: Vector | None, subject: str, message: str) -> None:
        """Note what is wrong."""
        self.findings.append(Finding(kind, block, subject, message))

    @property
    def to_do_again(self) -> frozenset[Vector]:
        """The blocks with something wrong, without those that were never begun."""
        return frozenset(f.block for f in self.findings if f.block is not None and f.kind != "not done")


def advice(audit: Audit, spec: VolumeSpec) -> str:
    """What is wrong, the most telling first, and the command that mends it."""
    kinds = {finding.kind for finding in audit.findings}
    started = {finding.block for finding in audit.findings if finding.kind == "incomplete"}
    due = started | {finding.block for finding in audit.findings if finding.kind == "not done"}
    part = "" if audit.box is None else " --bbox " + " ".join(map(str, (*audit.box.start, *audit.box.stop)))
    where = " and this bounding box" if part else ""
    unfinished = f"{len(due)} of {audit.blocks} blocks are not done yet: `chunkflow-core run SPEC{part}` does them"
    if kinds <= {"not done"}:
        return f"{spec.output.path} is not complete: {unfinished}; nothing else is wrong"
    lines = [f"{spec.output.path} {_state(kinds)}:", *_shown(audit.findings)]
    if "other model" in kinds:
        lines.append(
            f"`chunkflow-core run SPEC{part}` tells what differs from that spec, and what can be done about it"
        )
    if kinds - {"other model", *_NO_DAMAGE}:
        lines.append(
            f"To do again just what is wrong: `chunkflow-core run SPEC --repair{part}` (in Airflow: trigger the "
            f"volume with only repair{where})"
        )
    if due and spec.skip.mask is not None:
        unfinished += " (with --check-input if the mask has been edited)"
    return "\n  ".join([*lines, unfinished] if due else lines)


def _state(kinds: Set[FindingKind]) -> str:
    """What can be said of an output with findings of some kinds."""
    if kinds - set(_NO_DAMAGE):
        return "is not right"
    return "is not complete" if kinds & set(_DUE) else "is as its receipts say, but no voxel was computed again"


def _shown(findings: Iterable[Finding]) -> list[str]:
    order = get_args(FindingKind)
    told = sorted((f for f in findings if f.kind != "not done"), key=lambda finding: order.index(finding.kind))
    more = [f"… and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
    return [*map(str, told[:_SHOWN]), *more]
