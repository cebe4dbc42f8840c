"""First stage of a block, *inference and donate*: idempotent, complete with its receipt."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError, StorageError
from chunkflow_core.exchange.codec import compress
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.inference.block import FinalPiece
from chunkflow_core.inference.mask import MaskWindow, mask_digest
from chunkflow_core.lattice.blocks import Donation
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.planning.inputs import InputVersion
from chunkflow_core.planning.reasons import Reason
from chunkflow_core.steps.stage import StageResult, StageWork
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.signatures import WrittenChunk

SKIPPED = ("zeros", "outside mask")
"""Reasons why a patch is not run."""

_WRITERS = 8
"""Number of donations and storage chunks on their way at a time.

A piece has at most 14 donations.
"""


def inference_and_donate(
    workspace: Workspace,
    index: Vector,
    *,
    run: str = "",
    why: Reason | None = None,
    patch_done: Callable[[], object] = lambda: None,
) -> StageResult:
    """Run a block's patches, write its core, donate the rest, write the receipt.

    Args:
        workspace: What the steps of the volume share.
        index: Index of the block, zyx.
        run: Name of the run.
        why: The planner's reason why the block is due. With ``input``, it is done if its input is
            not what its receipt says; without a reason, or with ``output``, if it has no receipt;
            with any other, unless its receipt is of the same run and its input has not changed
            since. In any case it is done if its storage chunks are no longer what was written.
        patch_done: Called after each patch.

    Raises:
        SpecError: Another spec has claimed the output layer, or the model can't be used.
        MissingInputError: A layer, a storage chunk or a model file isn't there.
        DataError: The model's output can't be right.
        StorageError: The storage does not answer, or the input was changed while it was read.
    """
    spec, exchange = workspace.spec, workspace.exchange
    workspace.check_claim()  # and again later, since a block can take hours
    done = exchange.receipt("infer", index)
    if done is not None and done.geometry == spec.block_digest(index) and _is_enough(workspace, done, run, why):
        return StageResult(done, up_to_date=True)
    work = StageWork(workspace, "infer", spec.grid.block(index), run, before=done)
    before = workspace.inputs.at_present(index)  # before anything is read
    block_run = workspace.inference.run(work.block, work.timings, patch_done)
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
        leaving = _LeavingPieces(work, pool)
        try:
            for final in block_run.pieces():
                leaving.wait()  # so that no more than one piece is in memory
                if final.piece.core:
                    workspace.check_claim()
                if not leaving.begun:
                    work.retract()
                leaving.start(final, block_run.mask)
                work.tell_progress(final.piece.box)
        except (DataError, MissingInputError) as error:
            _check_same(workspace, index, before, error)
            raise
        leaving.wait()
    _check_same(workspace, index, before)
    counts = work.timings.counts
    exchange.keep_donations(index, leaving.donated)
    if spec.input.fill_missing:
        workspace.input.check_unchanged()  # what was missing may just have got another name
    return work.complete(
        written=leaving.written,
        voxels=work.block.box.voxels,
        engine=workspace.engine if counts["patches"] else None,
        patches=counts["patches"],
        skipped={why: counts[why] for why in SKIPPED if counts[why]},
        donations=tuple(leaving.donated),
        signature=before.signature,
        content=block_run.content.digest,
        mask=mask_digest(workspace.frame_windows(work.block, block_run.mask)),
    )


def _is_enough(workspace: Workspace, done: Receipt, run: str, why: Reason | None) -> bool:
    """Whether an intact receipt makes it needless to do the block."""
    anew = why not in (None, "input", "output")
    if anew and not (run != "" and done.run == run and workspace.exchange.has_donations(done)):
        return False
    if why not in (None, "output") and not workspace.inputs.unchanged(done, confirm=why == "input"):
        return False
    return workspace.outputs.are_as_written(done)


def _check_same(workspace: Workspace, index: Vector, before: InputVersion, error: Exception | None = None) -> None:
    """Check that storage still says of a block's input what it said before that was read.

    It may be changed meanwhile, and changed back.

    Args:
        workspace: What the steps of the volume share.
        index: Index of the block, zyx.
        before: What storage said.
        error: What has come of the reading, if it has failed.

    Raises:
        StorageError: It says something else: some voxels may be of before, others of after.
    """
    if workspace.inputs.at_present(index) != before:
        why = f": {error}" if error else ""
        raise StorageError(
            f"the input of block {index} was changed while it was read{why}. A retry reads it as it is then"
        ) from error


class _LeavingPieces:
    """Final pieces on their way to storage, and what has arrived there."""

    def __init__(self, work: StageWork, pool: ThreadPoolExecutor) -> None:
        self.donated: list[DonationEntry] = []
        self.written: dict[str, WrittenChunk] = {}
        """Names of storage chunks, with what is known of each."""
        self.begun = False
        """Whether anything has left."""
        self._work, self._pool = work, pool
        self._donating: list[Future[DonationEntry]] = []
        self._writing: list[Future[dict[str, WrittenChunk]]] = []

    def start(self, final: FinalPiece, mask: MaskWindow | None) -> None:
        """Start to write and donate what has become final; ``mask`` is the block's, if any."""
        self.begun = True
        workspace, core = self._work.workspace, final.piece.core
        for donation in final.piece.donations:
            self._donating.append(self._pool.submit(_donate, self._work, donation, final.sums.sum(donation.box)))
        for row in workspace.output.rows(core):
            self._writing.append(self._pool.submit(self._work.write, row, final.sums.converted(row), mask))

    def wait(self) -> None:
        """Wait for all that was started."""
        timings = self._work.timings
        self.donated += timings.measure("wait for output", lambda: [future.result() for future in self._donating])
        for written in timings.measure("wait for output", lambda: [future.result() for future in self._writing]):
            self.written |= written
        self._donating, self._writing = [], []


def _donate(work: StageWork, donation: Donation, sums: Callable[[], NDArray[np.float32]]) -> DonationEntry:
    data = sums()
    payload = work.timings.measure("donate", compress, data) if data.any() else None
    entry = work.timings.measure("donate", work.workspace.exchange.put_donation, donation, payload)
    work.timings.count("bytes donated", entry.bytes)
    return entry
