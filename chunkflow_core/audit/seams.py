"""Windows of the output, computed again as one machine with endless memory would.

Most of them lie across the borders of blocks.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.audit.findings import Audit
from chunkflow_core.audit.stored import StoredAudit
from chunkflow_core.errors import MissingInputError, SpecError, StorageError
from chunkflow_core.exchange.codec import decompress
from chunkflow_core.lattice.boxes import Box, Vector, indices, vector
from chunkflow_core.lattice.slab import Slab, convert
from chunkflow_core.lattice.weights import ExactStep
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.timing import Timings

log = logging.getLogger(__name__)

WINDOW: Vector = (4, 32, 32)
"""Size of the windows that are computed again, in voxels, zyx."""


def windows(workspace: Workspace, stored: StoredAudit, count: int, run: str, seed: int) -> Iterator[Box]:
    """Choose windows in complete blocks.

    Every other one is at a block that ``run`` has done, or else at one of those that were done
    last: across its low faces, edges and corners, if it has lower neighbours. Half of the rest are
    so at any block, the others anywhere. No block comes again before all of its kind have come.

    Args:
        workspace: What the steps of the volume share.
        stored: The audit of what is stored, which has been run.
        count: Number of windows.
        run: Name of a run; may be empty.
        seed: Chooses the windows.
    """
    chance = random.Random(seed)
    everywhere = sorted(stored.complete)
    seamed = [index for index in everywhere if any(index)] or everywhere
    recent = [index for index in seamed if run and run in stored.runs[index]]
    recent = recent or heapq.nlargest(max(1, count // 2), seamed, key=lambda index: stored.finished[index])
    at_recent, at_seams, anywhere = (_in_turn(blocks, chance) for blocks in (recent, seamed, everywhere))
    for number in range(count if everywhere else 0):
        if number % 2 == 0:
            yield _window(workspace, next(at_recent), chance, across_faces=True)
        elif chance.random() < 0.5:
            yield _window(workspace, next(at_seams), chance, across_faces=True)
        else:
            yield _window(workspace, next(anywhere), chance, across_faces=False)


def _in_turn(blocks: list[Vector], chance: random.Random) -> Iterator[Vector]:
    """The blocks in a random order, again and again."""
    while True:
        yield from chance.sample(blocks, len(blocks))


def _window(workspace: Workspace, index: Vector, chance: random.Random, *, across_faces: bool) -> Box:
    box, roi = workspace.spec.grid.block(index).box, workspace.spec.grid.roi
    across = [a for a in range(3) if across_faces and index[a] > 0]
    across = chance.sample(across, chance.randint(1, len(across))) if across else []
    centre = [box.start[a] if a in across else chance.randrange(box.start[a], box.stop[a]) for a in range(3)]
    start = vector(c - w // 2 for c, w in zip(centre, WINDOW, strict=True))
    return Box(start, vector(a + w for a, w in zip(start, WINDOW, strict=True))) & roi


def check_window(workspace: Workspace, window: Box, complete: set[Vector], audit: Audit) -> None:
    """Compute a window again, and compare what of it belongs to blocks that are complete."""
    spec = workspace.spec
    sums = workspace.inference.window(window)
    expected = workspace.masked(window, convert(sums, spec.output.dtype, ExactStep(*spec.output.range)))
    known, touching = len(audit.findings), complete.intersection(spec.grid.blocks_touching(window))
    for index in sorted(touching):
        block = spec.grid.block(index)
        for part in (box & window for box in (block.core, *block.frame)):
            if part:
                _compare(workspace, index, part, expected[(slice(None), *part.slices(window.start))], audit)
    audit.seams += 1
    if len(audit.findings) > known and _reads_something_else(spec, touching):
        del audit.findings[known:]
        log.info(
            "window %s: the input has changed since, so it can't be compared; a run that checks the input follows",
            window,
        )


def _reads_something_else(spec: VolumeSpec, blocks: set[Vector]) -> bool:
    """Whether the input of blocks, or of their donors, is not what they have read.

    Storage is asked anew, as the input may have been edited just before.
    """
    state = Workspace(spec).state()
    readers = blocks.union(*map(spec.grid.donors, blocks))
    return bool(state.changed_inputs({block for block in readers if state.inferred(block) is not None}))


def _compare(workspace: Workspace, index: Vector, part: Box, expected: NDArray[np.generic], audit: Audit) -> None:
    try:
        stored = workspace.output.read(part)
    except MissingInputError:
        return  # its storage chunk is among the findings already
    except (StorageError, SpecError):
        raise
    except Exception as error:  # each compression has its own
        audit.add("seam", index, part.key, f"the seam {part} can't be read: {error}")
        return
    places = np.argwhere(stored != expected)
    if len(places):
        first, last = (vector(int(a + b) for a, b in zip(p, part.start, strict=True)) for p in _ends(places[:, 1:]))
        wrong = Box(first, vector(a + 1 for a in last))
        audit.add(
            "seam",
            index,
            wrong.key,
            f"{len(places)} of {stored.size} values at the seam {part} differ from a fresh computation, all in {wrong}",
        )


def _ends(places: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return places.min(axis=0), places.max(axis=0)


def gives_wrong_sums(workspace: Workspace, donor: Vector, receiver: Vector, box: Box) -> bool:
    """Whether a donation that is still there has other sums in a box than its donor computes."""
    spec, exchange = workspace.spec, workspace.exchange
    receipt = exchange.receipt("infer", donor)
    entries = {entry.key: entry for entry in receipt.donations} if receipt else {}
    for donation in spec.grid.donations(donor, receiver):
        part, entry = donation.box & box, entries.get(donation.key)
        if not part or entry is None:
            continue
        try:
            payload = exchange.get_donations([(donation, entry)]).get(donation.key)
        except MissingInputError:
            continue  # it has been cleaned up, and would be made anew
        shape = donation.box.shape
        sums = decompress(payload, spec.output.channels, shape) if payload else np.zeros((1, *shape), np.float32)
        if (sums[(slice(None), *part.slices(donation.box.start))] != _given(workspace, donor, part)).any():
            return True
    return False


def _given(workspace: Workspace, donor: Vector, box: Box) -> NDArray[np.float32]:
    """What a block's own patches sum to in a box."""
    grid, inference = workspace.spec.grid, workspace.inference
    block = grid.block(donor)
    slab = Slab(grid, box, box.shape[0], workspace.spec.output.channels, inference.patches.values)
    own = [p for p in indices(block.first_patch, block.stop_patch) if grid.patch_box(p) & box]
    for position in inference.patches.inside_mask(own):
        read = inference.patches.input_box(position)
        planes = read, np.ascontiguousarray(inference.reader.read(read))
        inference.patches.run(slab, position, planes, Timings(), lambda: None)
    return slab.sum(box)
