"""Audit of an output: is every storage chunk there, do the receipts agree, are the seams what one machine would write?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from chunkflow_core.blending import Grid
from chunkflow_core.errors import MissingInputError
from chunkflow_core.geometry import Box, Vector, vector
from chunkflow_core.planner import Request, State, plan
from chunkflow_core.prepare import last_fingerprint
from chunkflow_core.slab import convert
from chunkflow_core.stages import Workspace

SEAM_WINDOW: Vector = (4, 32, 32)
"""Size of the windows that are computed again, zyx."""


@dataclass
class Audit:
    """What an audit looked at and found wrong."""

    storage_chunks: int = 0
    """Storage chunks that have to be there."""
    blocks: int = 0
    """Blocks that were looked at."""
    seams: int = 0
    """Windows that were computed again."""
    findings: list[str] = field(default_factory=list)
    """One line for each thing that is wrong; empty if all is well."""


def verify(
    workspace: Workspace,
    *,
    box: Box | None = None,
    seams: int = 2,
    seed: int = 0,
    step_done: Callable[[], object] = lambda: None,
) -> Audit:
    """Audit the output, or the blocks that touch ``box``.

    Args:
        workspace: of the spec.
        box: voxels to look at; None for the whole ROI.
        seams: how many windows across block faces, edges and corners to compute again, each from all patches that touch
            it, and to compare bit for bit.
        seed: chooses the windows.
        step_done: called after each window.
    """
    grid, audit = workspace.spec.grid, Audit()
    indices = list(grid.indices()) if box is None else grid.blocks_touching(box)
    audit.blocks = len(indices)
    _check_receipts(workspace, box, audit)
    _check_chunks(workspace, indices, audit)
    for window in _seam_windows(workspace, indices, seams, random.Random(seed)):
        _check_window(workspace, window, set(indices), audit)
        step_done()
    return audit


def _check_receipts(workspace: Workspace, box: Box | None, audit: Audit) -> None:
    """What the planner would do again is not complete; donations that were cleaned up are no fault."""
    spec = workspace.spec
    last = last_fingerprint(spec)
    if last not in (None, spec.fingerprint):
        audit.findings.append(
            f"another spec (fingerprint {last}) has written to this output since; `run` does this one again"
        )
    state = State.read(workspace.exchange)
    everything = frozenset(e.key for receipt in state.inferred.values() for e in receipt.donations)
    due = plan(spec, Request(box), State(state.inferred, state.blended, everything))
    audit.findings += [f"block {index}: inference is not complete (no valid receipt)" for index in due.infer]
    audit.findings += [
        f"block {index}: blending is not complete (no receipt, or its donors have changed since)" for index in due.blend
    ]


def _check_chunks(workspace: Workspace, indices: list[Vector], audit: Audit) -> None:
    stored = workspace.output.stored_chunks()
    for index in indices:
        for chunk in workspace.output.expected_chunks(workspace.spec.grid.block(index).box):
            audit.storage_chunks += 1
            if chunk.key not in stored:
                audit.findings.append(f"block {index}: the storage chunk {chunk.key} is missing")


def _seam_windows(workspace: Workspace, indices: list[Vector], count: int, chance: random.Random) -> Iterator[Box]:
    """Windows around points on the low faces, edges and corners of blocks that have lower neighbours."""
    grid = workspace.spec.grid
    inner = [index for index in indices if any(index)]
    for _ in range(count if inner else 0):
        index = chance.choice(inner)
        block = grid.block(index)
        across = [a for a in range(3) if index[a] > 0]
        across = chance.sample(across, chance.randint(1, len(across)))
        centre = [
            block.box.start[a] if a in across else chance.randrange(block.box.start[a], block.box.stop[a])
            for a in range(3)
        ]
        start = vector(c - w // 2 for c, w in zip(centre, SEAM_WINDOW, strict=True))
        yield Box(start, vector(a + w for a, w in zip(start, SEAM_WINDOW, strict=True))) & grid.roi


def _check_window(workspace: Workspace, window: Box, audited: set[Vector], audit: Audit) -> None:
    """Compute a window again and compare what of it belongs to the audited blocks."""
    spec = workspace.spec
    sums = workspace.inference.window(window)
    expected = workspace.masked(window, convert(sums, spec.output.dtype, Grid(*spec.output.range)))
    for index in audited.intersection(spec.grid.blocks_touching(window)):
        part = window & spec.grid.block(index).box
        try:
            stored = workspace.output.read(part)
        except MissingInputError:
            continue  # its storage chunk is among the findings already
        wrong = np.argwhere(stored != expected[(slice(None), *part.slices(window.start))])
        if len(wrong):
            first = vector(int(a + b) for a, b in zip(wrong[0][1:], part.start, strict=True))
            audit.findings.append(
                f"block {index}: {len(wrong)} of {stored.size} values at the seam {part} differ from a fresh computation, "
                f"the first at {first}"
            )
    audit.seams += 1
