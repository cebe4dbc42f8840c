"""The two stages of a block, as plain functions: idempotent, complete once their receipt is written."""

from __future__ import annotations

import logging
import platform
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from time import perf_counter, time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.errors import MissingInputError
from chunkflow_core.exchange.codec import compress, decompress
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.inference.block import ChunkInference, Sums
from chunkflow_core.inference.content import Content
from chunkflow_core.inference.mask import Mask, MaskWindow
from chunkflow_core.lattice.blocks import Block, Donation, Piece
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.lattice.slab import convert
from chunkflow_core.lattice.weights import ExactStep
from chunkflow_core.machine import peak_memory
from chunkflow_core.planning.inputs import Inputs
from chunkflow_core.planning.state import ExchangeState
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.steps.output import open_output
from chunkflow_core.steps.provenance import check_claim
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.layers import InputLayer, OutputLayer
from chunkflow_core.timing import Timings

log = logging.getLogger(__name__)

SKIPPED = ("zeros", "outside mask")
"""Why a patch is not run."""

_CHANGES = 16
"""Runs that a receipt remembers to have changed something."""

_WRITERS = 8
"""Donations and storage chunks on their way at a time; a piece has at most 14 donations."""


@dataclass(frozen=True)
class StageResult:
    """How a stage ended."""

    receipt: Receipt | None
    """None where there is nothing to do: a block without lower neighbours receives nothing."""
    up_to_date: bool
    """Whether it had been done before."""


class Workspace:
    """What the stages of one spec share within a process, each opened when first needed."""

    def __init__(self, spec: VolumeSpec) -> None:
        self.spec = spec

    @cached_property
    def input(self) -> InputLayer:
        """The layer to read."""
        spec = self.spec.input
        return InputLayer(
            spec.path,
            spec.mip,
            self.spec.input_scale,
            self.spec.input_bounds,
            padding=spec.padding,
            fill_missing=spec.fill_missing,
        )

    @cached_property
    def output(self) -> OutputLayer:
        """The layer to write."""
        return open_output(self.spec)

    def check_claim(self) -> None:
        """``SpecError`` if the output layer is not this spec's to write to, as when another model has claimed it during a run."""
        _ = self.output  # a layer that is missing altogether is told as such
        check_claim(self.spec)

    @cached_property
    def exchange(self) -> Exchange:
        """Where donations and receipts are."""
        return Exchange(self.spec)

    @cached_property
    def mask(self) -> Mask | None:
        """Which patches are run; None for all."""
        return Mask(self.spec) if self.spec.skip.mask else None

    def masked(self, box: Box, data: NDArray[Any], window: MaskWindow | None = None) -> NDArray[Any]:
        """Output of a box, ``(channels, z, y, x)``, set to 0 outside the mask, in place; ``window`` if it is read already."""
        if self.mask is not None:
            data[:, ~(window or self.mask.window(box)).voxels(box)] = 0
        return data

    def frame_mask(self, block: Block) -> str:
        """Digest of the mask over a block's frame, which its blending applies; empty if there is none."""
        if self.mask is None or not block.frame:
            return ""
        return short_digest(b"".join(self.mask.window(box).present.tobytes() for box in block.frame))

    @cached_property
    def engine(self) -> Engine:
        """What runs patches."""
        return load_engine(self.spec)

    def state(self) -> ExchangeState:
        """What is there now, for the planner."""
        return ExchangeState(self.exchange, lambda: self.inputs)

    @cached_property
    def inputs(self) -> Inputs:
        """Whether what blocks read is what it was."""
        return Inputs(self.exchange, self.input, self.mask, self.inference)

    @cached_property
    def inference(self) -> ChunkInference:
        """Runs and sums patches."""
        return ChunkInference(self.spec, lambda: self.engine, self.input, self.input.scale.chunk[0], self.mask)


def inference_and_donate(
    workspace: Workspace,
    index: Vector,
    *,
    run: str = "",
    force: bool = False,
    check_input: bool = False,
    patch_done: Callable[[], object] = lambda: None,
) -> StageResult:
    """First stage: run a block's patches, write its core, donate the rest, write the receipt.

    Args:
        workspace: of the spec.
        index: of the block, zyx.
        run: names the run; a receipt of the same run counts as done even if forced.
        force: do it again although there is a receipt.
        check_input: do it again if the input is not what the receipt says was read.
        patch_done: called after each patch.

    Raises:
        SpecError: another spec has claimed the output layer.
        MissingInputError, DataError, StorageError: see their exit codes.
    """
    spec, exchange = workspace.spec, workspace.exchange
    block, geometry = spec.grid.block(index), spec.block_digest(index)
    done = exchange.receipt("infer", index)
    if done is not None and done.geometry == geometry:
        if force:
            good = run != "" and done.run == run and exchange.has_donations(done)
        else:
            good = not check_input or workspace.inputs.unchanged(done)
        if good:
            return StageResult(done, up_to_date=True)
    workspace.check_claim()  # and again later, since a block can take hours
    started, timings, content = perf_counter(), Timings(), Content()
    signature = workspace.inputs.signature(index)  # before anything is read: what changes meanwhile is noticed later
    mask = workspace.frame_mask(block)
    exchange.retract("infer", index)
    leaving = _Leaving()
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
        for piece, sums in workspace.inference.block(block, timings, patch_done, content):
            leaving.wait(timings)  # so that no more than one piece is in memory
            if piece.core:
                workspace.check_claim()
            leaving.start(workspace, timings, piece, sums, pool)
            log.info("block %s: planes %d–%d of %d–%d done", block.name, *_z(piece.box), *_z(block.chunk))
        leaving.wait(timings)
    engine = workspace.engine if timings.counts["patches"] else None
    exchange.keep_donations(index, leaving.entries)
    receipt = Receipt(
        stage="infer",
        block=index,
        box=block.box.key,
        fingerprint=exchange.fingerprint,
        geometry=geometry,
        run=run,
        patches=timings.counts["patches"],
        skipped={why: timings.counts[why] for why in SKIPPED if timings.counts[why]},
        donations=tuple(leaving.entries),
        signature=signature,
        content=content.digest,
        mask=mask,
        written=leaving.written,
        changes=_changes(done, run, leaving.written),
        facts=_facts(timings, started, voxels=block.box.voxels, engine=engine),
    )
    workspace.check_claim()
    if spec.input.fill_missing:
        workspace.input.check_unchanged()  # what was missing may just have got another name
    exchange.put_receipt(receipt)
    return StageResult(receipt, up_to_date=False)


def _changes(before: Receipt | None, run: str, written: dict[str, str]) -> tuple[str, ...]:
    """The latest runs in which what a stage writes has changed; ``before``: what its receipt said."""
    if before is None:
        return (run,)
    earlier = tuple(name for name in before.changes if name != run)
    return before.changes if before.written == written else (run, *earlier)[:_CHANGES]


class _Leaving:
    """What is on its way to storage, and what has arrived."""

    def __init__(self) -> None:
        self.entries: list[DonationEntry] = []
        self.written: dict[str, str] = {}
        """Storage chunks, with digests of their voxels."""
        self._donating: list[Future[DonationEntry]] = []
        self._writing: list[Future[dict[str, str]]] = []

    def start(self, workspace: Workspace, timings: Timings, piece: Piece, sums: Sums, pool: ThreadPoolExecutor) -> None:
        """Start to write and donate what has become final."""
        for donation in piece.donations:
            self._donating.append(pool.submit(_give, workspace, timings, donation, sums.sum(donation.box)))
        window = timings.measure("read", workspace.mask.window, piece.core) if workspace.mask and piece.core else None
        for row in workspace.output.rows(piece.core):
            self._writing.append(pool.submit(_write, workspace, timings, row, sums.converted(row), window))

    def wait(self, timings: Timings) -> None:
        """Wait for all that was started."""
        self.entries += timings.measure("wait for output", lambda: [future.result() for future in self._donating])
        for digests in timings.measure("wait for output", lambda: [future.result() for future in self._writing]):
            self.written |= digests
        self._donating, self._writing = [], []


def receive_and_blend(workspace: Workspace, index: Vector, *, run: str = "", force: bool = False) -> StageResult:
    """Second stage: fetch all donations for a block, add them, write its frame, write the receipt.

    Nothing is written before every donation has been fetched and verified. Arguments as ``inference_and_donate``.

    Raises:
        SpecError: another spec has claimed the output layer.
        MissingInputError: a donor has no receipt, or a donation isn't there.
        DataError: a donation is not what its donor wrote.
        StorageError: see its exit code.
    """
    spec, exchange = workspace.spec, workspace.exchange
    block = spec.grid.block(index)
    if not block.frame:
        return StageResult(None, up_to_date=True)
    started, timings = perf_counter(), Timings()
    donors = [_donor_receipt(workspace, donor) for donor in spec.grid.donors(index)]
    mask = workspace.frame_mask(block)
    consumed = {receipt.box: receipt.given(index, mask) for receipt in donors}
    geometry = spec.block_digest(index)
    done = exchange.receipt("blend", index)
    current = done is not None and done.geometry == geometry and done.consumed == consumed
    if done is not None and current and (not force or (run and done.run == run)):
        return StageResult(done, up_to_date=True)
    wanted = [pair for receipt in donors for pair in _donations(workspace, receipt, block)]
    payloads = timings.measure("read", exchange.get_donations, wanted)
    timings.count("bytes read", sum(map(len, payloads.values())))
    donations = [donation for donation, _ in wanted if donation.key in payloads]
    values, written = ExactStep(*spec.output.range), dict[str, str]()
    workspace.check_claim()
    exchange.retract("blend", index)
    for piece in spec.grid.pieces(block):
        boxes = [box for box in (frame & piece.box for frame in block.frame) if box]
        given = timings.measure("stitch", _decompress, workspace, piece.box, donations, payloads) if boxes else []
        for box in boxes:
            sums = timings.measure("stitch", _sum, spec.output.channels, box, given)
            written |= _write(workspace, timings, box, partial(convert, sums, spec.output.dtype, values))
        log.info("block %s: planes %d–%d of %d–%d done", block.name, *_z(piece.box), *_z(block.chunk))
    receipt = Receipt(
        stage="blend",
        block=index,
        box=block.box.key,
        fingerprint=exchange.fingerprint,
        geometry=geometry,
        run=run,
        consumed=consumed,
        written=written,
        changes=_changes(done, run, written),
        facts=_facts(timings, started, voxels=sum(box.voxels for box in block.frame)),
    )
    workspace.check_claim()
    exchange.put_receipt(receipt)
    return StageResult(receipt, up_to_date=False)


def _decompress(
    workspace: Workspace, planes: Box, donations: list[Donation], payloads: dict[str, bytes]
) -> list[tuple[Box, NDArray[np.float32]]]:
    """The donations that touch some planes, with their sums."""
    channels = workspace.spec.output.channels
    return [(d.box, decompress(payloads[d.key], channels, d.box.shape)) for d in donations if d.box & planes]


def _sum(channels: int, box: Box, given: list[tuple[Box, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """All that was given for a box, added up. Exact, so the order is of no matter."""
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
    entries = {entry.key: entry for entry in receipt.donations}
    donations = workspace.spec.grid.donations(receipt.block, block.index)
    missing = [donation.key for donation in donations if donation.key not in entries]
    if missing:
        raise MissingInputError(
            f"the receipt of block {receipt.block} lacks the donation {missing[0]}. "
            f"{workspace.exchange.remedy(receipt.block)}"
        )
    return [(donation, entries[donation.key]) for donation in donations]


def _give(
    workspace: Workspace, timings: Timings, donation: Donation, sums: Callable[[], NDArray[np.float32]]
) -> DonationEntry:
    data = sums()
    payload = timings.measure("donate", compress, data) if data.any() else None
    entry = timings.measure("donate", workspace.exchange.put_donation, donation, payload)
    timings.count("bytes donated", entry.bytes)
    return entry


def _write(
    workspace: Workspace,
    timings: Timings,
    box: Box,
    converted: Callable[[], NDArray[Any]],
    window: MaskWindow | None = None,
) -> dict[str, str]:
    """Write a box; the storage chunks, with digests of their voxels."""
    data = timings.measure("convert", workspace.masked, box, converted(), window)
    written: dict[str, str] = timings.measure("write", workspace.output.write, box, data)
    timings.count("bytes written", data.nbytes)
    return written


def _z(box: Box) -> tuple[int, int]:
    return box.start[0], box.stop[0]


def _facts(timings: Timings, started: float, *, voxels: int, engine: Engine | None = None) -> dict[str, Any]:
    wall, seconds, streams = perf_counter() - started, timings.seconds, engine.streams if engine else 1
    seconds["idle"] = max(0.0, wall - (seconds["forward"] + seconds["stitch"]) / streams)
    return {
        "seconds": {phase: round(value, 4) for phase, value in sorted(seconds.items())},
        "wall": round(wall, 4),
        "streams": streams,
        "voxels_per_second": round(voxels / wall),
        "bytes": {what: timings.counts[f"bytes {what}"] for what in ("read", "written", "donated")},
        "finished": round(time(), 3),
        "host": socket.gethostname(),
        "processor": platform.processor() or platform.machine(),
        "peak_memory_bytes": peak_memory(),
        **(engine.description if engine else {}),
    }
