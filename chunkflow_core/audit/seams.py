"""Windows of the output, computed again as one machine with endless memory would.

Most of them lie across the borders of blocks.
"""

from __future__ import annotations

import heapq
import logging
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.audit.findings import Audit
from chunkflow_core.audit.stored import StoredAudit
from chunkflow_core.errors import MissingInputError, SpecError, StorageError
from chunkflow_core.exchange.codec import decompress
from chunkflow_core.inference.reference import ReferencePatches, has_other_bits
from chunkflow_core.lattice.block_numbers import BlockSet, block_of, number_of
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector, indices, vector
from chunkflow_core.lattice.slab import Slab, convert
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
    chance, grid, complete = random.Random(seed), workspace.spec.grid, stored.complete
    everywhere = _numbers(grid, complete)
    seamed = _numbers(grid, filter(any, complete)) or everywhere
    recent: Sequence[int] = _numbers(
        grid, (index for index in complete if any(index) and run and stored.is_of(run, index))
    )
    recent = recent or heapq.nlargest(max(1, count // 2), seamed, key=lambda n: stored.finished(block_of(grid, n)))
    at_recent, at_seams, anywhere = (_in_turn(grid, some, count, chance) for some in (recent, seamed, everywhere))
    for number in range(count if everywhere else 0):
        if number % 2 == 0:
            yield _window(workspace, next(at_recent), chance, across_faces=True)
        elif chance.random() < 0.5:
            yield _window(workspace, next(at_seams), chance, across_faces=True)
        else:
            yield _window(workspace, next(anywhere), chance, across_faces=False)


def _numbers(grid: BlockGrid, blocks: Iterable[Vector]) -> array[int]:
    """Numbers of blocks: those of millions in eight bytes each."""
    return array("Q", (number_of(grid, block) for block in blocks))


def _in_turn(grid: BlockGrid, numbers: Sequence[int], count: int, chance: random.Random) -> Iterator[Vector]:
    """The blocks with some numbers in a random order, again and again; ``count`` are asked for."""
    while True:
        for number in chance.sample(numbers, min(count, len(numbers))):
            yield block_of(grid, number)


def _window(workspace: Workspace, index: Vector, chance: random.Random, *, across_faces: bool) -> Box:
    box, roi = workspace.spec.grid.block(index).box, workspace.spec.grid.roi
    across = [a for a in range(3) if across_faces and index[a] > 0]
    across = chance.sample(across, chance.randint(1, len(across))) if across else []
    centre = [box.start[a] if a in across else chance.randrange(box.start[a], box.stop[a]) for a in range(3)]
    start = vector(c - w // 2 for c, w in zip(centre, WINDOW, strict=True))
    return Box(start, vector(a + w for a, w in zip(start, WINDOW, strict=True))) & roi


def check_window(workspace: Workspace, window: Box, complete: BlockSet, audit: Audit) -> None:
    """Compute a window again, and compare what of it belongs to blocks that are complete.

    Where the network gives other bits than where the volume was prepared, nothing is compared: that
    is noted once, and is a finding unless the spec allows such machines.
    """
    spec, reference = workspace.spec, workspace.reference
    if reference.is_other_machine:
        _note_other_machine(audit, reference, allowed=spec.model.mixed_hardware)
        return
    sums = workspace.inference.window(window)
    expected = workspace.masked(window, convert(sums, spec.output.conversion))
    known, touching = len(audit.findings), set(filter(complete.__contains__, spec.grid.blocks_touching(window)))
    for index in sorted(touching):
        block = spec.grid.block(index)
        for part in (box & window for box in (block.core, *block.frame)):
            if part:
                _compare(workspace, index, part, expected[(slice(None), *part.slices(window.start))], audit)
    audit.seams += 1
    if len(audit.findings) > known and _has_other_bits(workspace, touching):
        del audit.findings[known:]
        log.warning("window %s: not compared: some of its patches were run on a machine that gives other bits", window)
    elif len(audit.findings) > known and _reads_something_else(spec, touching):
        del audit.findings[known:]
        log.info(
            "window %s: the input has changed since, so it can't be compared; a run that checks the input follows",
            window,
        )


def _note_other_machine(audit: Audit, reference: ReferencePatches, *, allowed: bool) -> None:
    """Note that windows can't be compared on this machine."""
    differences = "; ".join(reference.differences)
    what = f"windows are not compared: {reference.told}: {differences}"
    if allowed:
        log.warning("%s", what)
    elif not any(finding.kind == "not compared" for finding in audit.findings):
        advice = "`verify` on a machine like that one compares them; `--seams 0` asks for no windows"
        audit.add("not compared", None, "windows", f"{what}. {advice}")


def _has_other_bits(workspace: Workspace, blocks: set[Vector]) -> bool:
    """Whether blocks, or their donors, were inferred where the network gives other bits.

    Only a spec that allows such machines has such blocks.
    """
    inferred = blocks.union(*map(workspace.spec.grid.donors, blocks))
    receipts = (workspace.exchange.receipt("infer", block) for block in inferred)
    return workspace.spec.model.mixed_hardware and any(has_other_bits(receipt) for receipt in receipts if receipt)


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
        sums = decompress(payload, spec.output.summed_channels, shape) if payload else np.zeros((1, *shape), np.float32)
        if (sums[(slice(None), *part.slices(donation.box.start))] != _given(workspace, donor, part)).any():
            return True
    return False


def _given(workspace: Workspace, donor: Vector, box: Box) -> NDArray[np.float32]:
    """What a block's own patches sum to in a box."""
    grid, inference = workspace.spec.grid, workspace.inference
    block = grid.block(donor)
    slab = Slab(grid, box, box.shape[0], workspace.spec.output.summed_channels, inference.patches.values)
    own = [p for p in indices(block.first_patch, block.stop_patch) if grid.patch_box(p) & box]
    for position in inference.patches.inside_mask(own):
        read = inference.patches.input_box(position)
        planes = read, np.ascontiguousarray(inference.reader.read(read))
        inference.patches.run(slab, position, planes, Timings(), lambda: None)
    return slab.sum(box)
