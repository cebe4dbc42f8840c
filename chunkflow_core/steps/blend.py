"""Second stage of a block, *receive and blend*: idempotent, complete with its receipt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError, StorageError
from chunkflow_core.exchange.codec import decompress
from chunkflow_core.exchange.donations import WrongDonationsError
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.inference.mask import MaskWindow, mask_digest
from chunkflow_core.lattice.blocks import Block, Donation
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.lattice.slab import convert
from chunkflow_core.planning.reasons import Reason
from chunkflow_core.steps.stage import StageResult, StageWork
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.signatures import WrittenChunk

log = logging.getLogger(__name__)


def receive_and_blend(workspace: Workspace, index: Vector, *, run: str = "", why: Reason | None = None) -> StageResult:
    """Fetch all donations for a block, add them, write its frame, write the receipt.

    Nothing is written before every donation has been fetched and verified.

    Args:
        workspace: What the steps of the volume share.
        index: Index of the block, zyx.
        run: Name of the run.
        why: The planner's reason why the block's inference is due. With ``forced``, the block is
            blended again, unless its receipt is of the same run; else, if its receipt does not name
            what the donors give, or its storage chunks are no longer what was written.

    Raises:
        SpecError: Another spec has claimed the output layer.
        MissingInputError: A donor has no receipt, or a donation isn't there.
        DataError: A donation is not what its donor wrote.
        StorageError: The storage does not answer, or a donor was done again meanwhile.
    """
    started = perf_counter()
    spec, exchange = workspace.spec, workspace.exchange
    block = spec.grid.block(index)
    if not spec.grid.has_frame(index):
        return StageResult(None, up_to_date=True)
    workspace.check_claim()
    donors = [_donor_receipt(workspace, donor) for donor in spec.grid.donors(index)]
    windows = workspace.frame_windows(block)
    consumed = {receipt.box: receipt.given(index, mask_digest(windows)) for receipt in donors}
    done = exchange.receipt("blend", index)
    current = done is not None and done.geometry == spec.block_digest(index) and done.consumed == consumed
    asked_for = why == "forced" and not (run and done is not None and done.run == run)
    if done is not None and current and not asked_for and workspace.outputs.are_as_written(done):
        return StageResult(done, up_to_date=True)
    work = StageWork(workspace, "blend", block, run, before=done, started=started)
    wanted = [pair for receipt in donors for pair in _donations(workspace, receipt, block)]
    try:
        payloads = work.timings.measure("read", exchange.get_donations, wanted)
    except (DataError, MissingInputError) as error:
        if [_donor_receipt(workspace, donor) for donor in spec.grid.donors(index)] == donors:
            _discard_wrong(workspace, error)
            raise
        raise StorageError(f"block {index}: a donor was done again while its donations were read: {error}") from error
    work.timings.count("bytes read", sum(map(len, payloads.values())))
    workspace.check_claim()
    work.retract()
    written = _blend(work, [donation for donation, _ in wanted if donation.key in payloads], payloads, windows)
    return work.complete(written=written, voxels=sum(box.voxels for box in block.frame), consumed=consumed)


def _discard_wrong(workspace: Workspace, error: Exception) -> None:
    """Delete donations that are not what their donors wrote, such as of an attempt that wrote late.

    The next plan finds them missing, and has their donors make them again.
    """
    if isinstance(error, WrongDonationsError):
        workspace.check_claim()
        workspace.exchange.delete_donations(error.keys)
        log.warning("%d donations are deleted, so that the next run makes them again", len(error.keys))


def _blend(
    work: StageWork, donations: list[Donation], payloads: dict[str, bytes], windows: list[MaskWindow]
) -> dict[str, WrittenChunk]:
    """Add up donations and write the block's frame, piece by piece.

    Args:
        work: The stage.
        donations: Those that are not all zeros.
        payloads: Their content, by key.
        windows: The mask over each box of the frame; none if there is no mask.

    Returns:
        Names of the storage chunks written, with what is known of each.
    """
    spec, block = work.workspace.spec, work.block
    channels, written = spec.output.summed_channels, dict[str, WrittenChunk]()
    masks: Sequence[MaskWindow | None] = windows or [None] * len(block.frame)
    for piece in spec.grid.pieces(block):
        boxes = [(frame & piece.box, mask) for frame, mask in zip(block.frame, masks, strict=True) if frame & piece.box]
        touching = [donation for donation in donations if boxes and donation.box & piece.box]
        given = work.timings.measure("stitch", _decompressed, channels, touching, payloads)
        for box, mask in boxes:
            sums = work.timings.measure("stitch", _sum, channels, box, given)
            written |= work.write(box, partial(convert, sums, spec.output.conversion), mask)
        work.tell_progress(piece.box)
    return written


def _decompressed(
    channels: int, donations: list[Donation], payloads: dict[str, bytes]
) -> list[tuple[Box, NDArray[np.float32]]]:
    """Boxes of donations, with their sums, ``(channels, z, y, x)``."""
    return [(d.box, decompress(payloads[d.key], channels, d.box.shape)) for d in donations]


def _sum(channels: int, box: Box, given: list[tuple[Box, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """All that was given for a box, added up. It is exact, so the order is of no matter."""
    total = np.zeros((channels, *box.shape), np.float32)
    for source, sums in given:
        common = source & box
        total[(slice(None), *common.slices(box.start))] += sums[(slice(None), *common.slices(source.start))]
    return total


def _donor_receipt(workspace: Workspace, donor: Vector) -> Receipt:
    exchange = workspace.exchange
    receipt = exchange.receipt("infer", donor)
    if receipt is None or receipt.geometry != workspace.spec.block_digest(donor):
        raise MissingInputError(
            f"block {donor} has not donated yet: {exchange.path} holds no valid receipt of it. {exchange.remedy(donor)}"
        )
    return receipt


def _donations(workspace: Workspace, receipt: Receipt, block: Block) -> list[tuple[Donation, DonationEntry]]:
    """What a donor gives a block, with what the donor's receipt says of it."""
    entries = {entry.key: entry for entry in receipt.donations}
    donations = workspace.spec.grid.donations(receipt.block, block.index)
    missing = [donation.key for donation in donations if donation.key not in entries]
    if missing:
        raise MissingInputError(
            f"the receipt of block {receipt.block} lacks the donation {missing[0]}. "
            f"{workspace.exchange.remedy(receipt.block)}"
        )
    return [(donation, entries[donation.key]) for donation in donations]
