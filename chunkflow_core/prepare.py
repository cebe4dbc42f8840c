"""Everything that can be known before a GPU is paid for; and the cleaning up at the end."""

from __future__ import annotations

import json
import logging
from typing import Any

from chunkflow_core.errors import SpecError
from chunkflow_core.exchange import Exchange, Receipt, Trial
from chunkflow_core.geometry import vector
from chunkflow_core.planner import State
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.stages import Workspace, peak_memory
from chunkflow_core.storage import delete_partials, storage_errors
from chunkflow_core.volumes import check_output, create_output, layer_exists, layer_files, layer_path, processing_step

log = logging.getLogger(__name__)

_HOUR = 3600.0


def prepare(workspace: Workspace) -> Trial:
    """Check input, model, exchange and output, and make the output layer if there is none.

    Receipts would be lies if the output layer isn't there, or if a run with another fingerprint (another model, say) has
    written to it since; then they are deleted first.

    Returns:
        What one patch took, which is left in the exchange for estimates.

    Raises:
        SpecError, MissingInputError, DataError, StorageError: what a block would fail of later.
    """
    spec = workspace.spec
    roi, bounds = spec.grid.roi, workspace.input.scale.bounds
    if roi not in bounds:
        raise SpecError(f"roi: {roi} reaches past the input layer {spec.input.path}, which has {bounds}")
    log.info("input %s: %s, %s, ROI %s", spec.input.path, bounds, workspace.input.scale.dtype, roi)
    middle = vector(axis.count // 2 for axis in spec.grid.axes)
    seconds = workspace.inference.try_patch(middle)  # a wrong shape or range is known now
    trial = Trial(seconds, peak_memory(), workspace.engine.streams)
    log.info("model %s: %.3f s per patch, %d at a time", spec.model.engine, trial.seconds, trial.streams)
    exchange = workspace.exchange
    exchange.put_trial(trial)
    if layer_exists(spec.output.path):
        check_output(spec)
        _claim_output(spec, exchange)
    else:
        discarded = exchange.delete_receipts()
        if discarded:
            log.info("the output layer is gone: %d receipts of an earlier one are discarded", discarded)
        create_output(spec)
        log.info("output %s made: %s", spec.output.path, roi)
    return trial


def cleanup(spec: VolumeSpec) -> int:
    """Delete the donations that nothing needs any more, and return how many; none if the spec says ``keep``.

    A donation is needed until the receiver's receipt says that it consumed just this. Interrupted at any point, it leaves
    donations too many, never too few.
    """
    exchange = Exchange(spec)
    for path in (exchange.path, layer_path(spec.output.path)):
        delete_partials(path, older_than=_HOUR)
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


def _claim_output(spec: VolumeSpec, exchange: Exchange) -> None:
    """See to it that the last step of the layer's provenance is this spec, and that no receipt is older than that."""
    provenance, last = _provenance(spec)
    compression = last.get("spec", {}).get("output", {}).get("compression", spec.output.compression)
    if compression != spec.output.compression and spec.output.path.startswith("file://"):
        raise SpecError(
            f"output.compression: the layer at {spec.output.path} is stored with {compression}, the spec says "
            f"{spec.output.compression}. On a disk both would lie side by side, and the older be read. Give another path, "
            "or delete that layer"
        )
    if last.get("fingerprint") == spec.fingerprint:
        return
    discarded = exchange.delete_receipts()
    if discarded:
        log.warning("another run has written to %s since: %d receipts are discarded", spec.output.path, discarded)
    provenance["processing"].append(processing_step(spec))
    with storage_errors(f"writing the provenance of {spec.output.path}"):
        layer_files(spec.output.path).put_json("provenance", provenance, cache_control="no-cache")


def last_fingerprint(spec: VolumeSpec) -> str | None:
    """Fingerprint of the spec that has written to the output layer last; None if the layer does not say."""
    _, last = _provenance(spec)
    return last.get("fingerprint")


def _provenance(spec: VolumeSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """The output layer's provenance, and what the last of our steps in it says."""
    with storage_errors(f"reading the provenance of {spec.output.path}"):
        content = layer_files(spec.output.path).get("provenance")
    try:
        provenance = json.loads(content or b"{}")
    except ValueError:
        provenance = {}
    if not isinstance(provenance, dict) or not isinstance(provenance.setdefault("processing", []), list):
        provenance = {"processing": []}
    steps = [step.get("method") for step in provenance["processing"] if isinstance(step, dict)]
    ours = [step for step in steps if isinstance(step, dict) and step.get("task") == "chunkflow-airflow"]
    return provenance, ours[-1] if ours else {}
