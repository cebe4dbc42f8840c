"""Everything that can be known before a GPU is paid for; and the cleaning up at the end."""

from __future__ import annotations

import logging
from time import perf_counter

from chunkflow_core.errors import SpecError
from chunkflow_core.exchange import Exchange, Receipt
from chunkflow_core.geometry import Box, vector
from chunkflow_core.planner import State
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.stages import Workspace
from chunkflow_core.volumes import check_output, create_output, layer_exists

log = logging.getLogger(__name__)


def prepare(workspace: Workspace) -> float:
    """Check input, model, exchange and output, and make the output layer if there is none.

    If the output layer isn't there, receipts of an earlier one would be lies; they are deleted first.

    Returns:
        Seconds of one forward pass of one batch.

    Raises:
        SpecError, MissingInputError, DataError, StorageError: what a block would fail of later.
    """
    spec = workspace.spec
    roi, bounds = spec.grid.roi, workspace.input.scale.bounds
    if roi not in bounds:
        raise SpecError(f"roi: {roi} reaches past the input layer {spec.input.path}, which has {bounds}")
    log.info("input %s: %s, %s, ROI %s", spec.input.path, bounds, workspace.input.scale.dtype, roi)
    seconds = _try_model(workspace)
    log.info("model %s: %.3f s for a batch of %d", spec.model.engine, seconds, spec.model.batch_size)
    exchange = workspace.exchange
    exchange.check_writable()
    if layer_exists(spec.output.path):
        check_output(spec)
    else:
        discarded = exchange.delete_receipts()
        if discarded:
            log.info("the output layer is gone: %d receipts of an earlier one are discarded", discarded)
        create_output(spec)
        log.info("output %s made: %s", spec.output.path, roi)
    return seconds


def cleanup(spec: VolumeSpec) -> int:
    """Delete the donations that nothing needs any more, and return how many; none if the spec says ``keep``.

    A donation is needed until the receiver's receipt says that it consumed just this. Interrupted at any point, it leaves
    donations too many, never too few.
    """
    exchange = Exchange(spec)
    exchange.delete_partials()
    if spec.exchange.donations == "keep":
        return 0
    state = State.read(exchange)
    spent = [
        entry.key
        for receipt in state.inferred.values()
        for entry in receipt.donations
        if entry.key in state.donations and _is_consumed(receipt, state.blended.get(entry.receiver))
    ]
    exchange.delete_donations(spent)
    return len(spent)


def _is_consumed(donor: Receipt, receiver: Receipt | None) -> bool:
    return receiver is not None and receiver.consumed.get(donor.box) == donor.given(receiver.block)


def _try_model(workspace: Workspace) -> float:
    """Run one batch from the middle of the ROI, so that a wrong shape or range is known now."""
    grid, inference = workspace.spec.grid, workspace.inference
    centre = vector((a + b) // 2 for a, b in zip(grid.roi.start, grid.roi.stop, strict=True))
    start = perf_counter()
    inference.window(Box(centre, vector(c + 1 for c in centre)))
    return perf_counter() - start
