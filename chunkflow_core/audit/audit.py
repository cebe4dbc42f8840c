"""Audit of an output, and how what is wrong with it is undone.

``verify`` changes nothing. ``repair`` takes back whatever says that something wrong is done, so
that the planner has it done again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterator

from chunkflow_core.audit.findings import Audit, Finding, FindingKind
from chunkflow_core.audit.findings import advice as advice
from chunkflow_core.audit.seams import check_window, gives_wrong_sums, windows
from chunkflow_core.audit.stored import StoredAudit
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.progress import progress
from chunkflow_core.steps.provenance import History
from chunkflow_core.steps.workspace import Workspace

log = logging.getLogger(__name__)


def verify(
    workspace: Workspace,
    *,
    box: Box | None = None,
    blocks: Collection[Vector] | None = None,
    seams: int = 2,
    deep: bool = False,
    run: str = "",
    seed: int | None = None,
    step_done: Callable[[], object] = lambda: None,
) -> Audit:
    """Audit the output, or a part of it: whether what receipts say is stored, and nothing else.

    Args:
        workspace: What the steps of the volume share.
        box: Only the blocks that touch this box of voxels are looked at.
        blocks: Only these blocks are looked at.
        seams: Number of windows to compute again, most of them across block faces, edges and
            corners, each from all patches that touch it, and to compare bit for bit.
        deep: Whether to read all storage chunks and donations, and compare them with their
            checksums.
        run: Name of a run. At least half of the windows are at blocks that it has done, or if there
            are none, at those done last.
        seed: Chooses the windows; default: drawn anew, as what one audit overlooks another one may
            see.
        step_done: Called after each block, and after each window.
    """
    spec, grid = workspace.spec, workspace.spec.grid
    if blocks is None:
        blocks = list(grid.indices()) if box is None else grid.blocks_touching(box)
    else:
        boxes = [grid.block(index).box for index in blocks]
        box = Box.around(boxes) if boxes else Box(grid.roi.start, grid.roi.start)
    audit = Audit(box=box, blocks=len(blocks), seed=secrets.randbits(32) if seed is None else seed)
    history = History(spec)
    last = history.fingerprint
    if last not in (None, spec.fingerprint):
        audit.add("other model", None, str(last), f"another spec (fingerprint {last}) has written to this output since")
    stored = StoredAudit(workspace, blocks, audit, deep=deep, mixed=len(history.fingerprints) > 1)
    stored.run(step_done)
    for window in windows(workspace, stored, seams, run, audit.seed):
        check_window(workspace, window, stored.complete, audit)
        step_done()
    return audit


def repair(
    workspace: Workspace, *, box: Box | None = None, seams: int = 0, seed: int | None = None
) -> frozenset[Vector]:
    """Audit everything that is stored, or a part of it, and undo what is wrong.

    Receipts of wrong storage chunks are retracted; receipts and donations that can't be right, and
    stray storage chunks, are deleted. A plan for the blocks returned then does just what is needed.
    Ended at any point, the next call undoes the rest, and what was undone stays undone. Nothing
    else may be at work on the volume.

    Args:
        workspace: What the steps of the volume share.
        box: Only the blocks that touch this box of voxels are looked at.
        seams: Number of windows to compute again.
        seed: Chooses the windows; default: drawn anew.

    Returns:
        The blocks that have to be made right.

    Raises:
        SpecError: Another spec has claimed the output; what is wrong for this one may be right for
            that.
    """
    spec, exchange = workspace.spec, workspace.exchange
    workspace.check_claim()
    number = len(spec.grid.blocks_touching(spec.grid.roi if box is None else box))
    with progress("repair: audit", number + seams, "steps") as step_done:
        audit = verify(workspace, box=box, seams=seams, deep=True, seed=seed, step_done=step_done)
    # What an earlier repair has undone looks as if it had never been begun.
    undone = exchange.undone() & {f.block for f in audit.findings if f.kind == "not done" and f.block is not None}
    due = audit.to_do_again | undone
    exchange.put_undone(due)
    for (stage, block), why in sorted(_false_receipts(workspace, audit.findings).items()):
        exchange.retract(stage, block)
        log.info("%s: the receipt of block %s for %s is retracted", why, block, stage)
    files = [finding for finding in audit.findings if finding.kind in ("receipt", "donation")]
    for block, finding in _of_blocks(files, "receipt"):
        its: Stage = "infer" if finding.subject.startswith("receipts/infer/") else "blend"
        if exchange.receipt(its, block) is None:
            exchange.retract(its, block)  # all of them: one of several may not be left alone
    exchange.delete_files([finding.subject for finding in files])
    strays = [finding for finding in audit.findings if finding.kind == "stray chunk"]
    workspace.output.delete_chunks([finding.subject for finding in strays])
    for finding in files + strays:
        log.info("%s: deleted", finding)
    return due


def _false_receipts(workspace: Workspace, findings: Collection[Finding]) -> dict[tuple[Stage, Vector], str]:
    """The stages whose receipts vouch for what is wrong, and why."""
    grid, found = workspace.spec.grid, dict[tuple[Stage, Vector], str]()
    for block, finding in _of_blocks(findings, "missing chunk", "wrong chunk"):
        found.setdefault((_writer(grid, block, finding.subject), block), str(finding))
    chunks = set(found)
    for block, finding in _of_blocks(findings, "seam"):
        stage = _writer(grid, block, finding.subject)
        if (stage, block) in chunks:
            continue  # nobody would have computed it so: its storage chunks are not even what was written
        found.setdefault((stage, block), str(finding))
        # A donation that is still there and right need not be made again; one that is gone will be
        # made again anyway.
        for donor in grid.donors(block) if stage == "blend" else []:
            if gives_wrong_sums(workspace, donor, block, Box.from_key(finding.subject)):
                found.setdefault(("infer", donor), f"{finding}, and so do the sums that block {donor} has donated")
    return found


def _of_blocks(findings: Collection[Finding], *kinds: FindingKind) -> Iterator[tuple[Vector, Finding]]:
    for finding in findings:
        if finding.block is not None and finding.kind in kinds:
            yield finding.block, finding


def _writer(grid: BlockGrid, block: Vector, key: str) -> Stage:
    """The stage that writes a storage chunk of a block, or a part of one."""
    return "infer" if Box.from_key(key) in grid.block(block).core else "blend"
