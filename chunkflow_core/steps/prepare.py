"""First step of a run: checks everything that can be known before a GPU is paid for."""

from __future__ import annotations

import logging
from typing import Literal

from chunkflow_core.engines.outputs import UnfitPatchError
from chunkflow_core.engines.patch_sizes import fitting_patches
from chunkflow_core.errors import DataError, MissingInputError, SpecError
from chunkflow_core.exchange.epochs import delete_earlier, new_epoch
from chunkflow_core.exchange.folder import Trial
from chunkflow_core.inference.measuring import measure, store, stored
from chunkflow_core.inference.reference import Reference
from chunkflow_core.inference.values import Measured
from chunkflow_core.lattice.boxes import vector
from chunkflow_core.machine import peak_memory
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.steps.output import check_output, create_output, delete_cut_short, extend_output, has_voxels
from chunkflow_core.steps.provenance import History, Mode
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.addresses import is_same_place
from chunkflow_core.storage.files import is_on_disk
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.layers import format_beside, layer_exists
from chunkflow_core.storage.presence import Absence

log = logging.getLogger(__name__)

Other = Literal["refuse", "overwrite", "mixture"]
"""What to do with an output layer that has been made from another fingerprint."""


def prepare(
    workspace: Workspace, *, run: str = "", other: Other = "refuse", once: bool = False, take_over: bool = False
) -> Trial:
    """Check input, model, exchange and output; make, extend or claim the output layer.

    Nothing is changed before all checks have passed. Ended at any point, the next call does the
    rest.

    Args:
        workspace: What the steps of the volume share.
        run: Name of the run, for provenance.
        other: ``overwrite`` and ``mixture`` claim an output of another fingerprint. Either way no
            block of this one counts as done; they differ in what provenance says is meant to come
            of it. ``overwrite`` also claims one of this fingerprint that was done on a machine
            that gives other bits.
        once: Whether to try the model only if this has not been done for this fingerprint, and
            nothing of it is to be discarded.
        take_over: Whether to take the workspace's lease from a run that seems to be at work.

    Returns:
        What one patch took, which is left in the exchange for estimates.

    Raises:
        SpecError, MissingInputError, DataError, StorageError: A block would fail of the same later.
        BusyError: Another run is at work.
    """
    spec = workspace.spec
    roi, bounds = spec.grid.roi, workspace.input.bounds
    if roi not in bounds:
        raise SpecError(
            f"roi: {roi} reaches past the input layer {spec.input.path}, of which there is {bounds} to be read"
        )
    log.info("input %s: %s, %s, ROI %s", spec.input.path, bounds, workspace.input.scale.dtype, roi)
    _check_layers(workspace)
    layer, history = _look_at_output(spec, other)
    lease = workspace.lease
    if lease is not None and layer is not None:
        lease.take(take_over=take_over)
        layer, history = _look_at_output(spec, other)  # another run may have been at work until now
    anew = layer is None or not history.is_own
    measured, anew = _measured(workspace, anew=anew, again=other == "overwrite")
    known = workspace.exchange.trial() if once and not anew and other != "overwrite" else None
    if known is None or workspace.reference.stored() is None:
        trial, here = _try_model(workspace)
        anew = anew or _is_of_another_machine(workspace, here, other)
        if anew:
            workspace.enter_epoch(new_epoch(spec))
        if anew or workspace.reference.stored() is None:
            workspace.reference.store(here)  # before the claim: no block is done without
        workspace.exchange.put_trial(trial)
        known = trial
    if measured is not None:
        _keep_measured(workspace, measured)  # likewise
    if lease is not None:
        lease.check() if layer is not None else lease.take(take_over=take_over)
    epoch = workspace.exchange.epoch if anew else ""
    if layer is None:
        _make(spec, history, run, epoch)
    else:
        _claim(spec, layer, history, other, run, epoch)
    if anew and (discarded := delete_earlier(spec, epoch)):
        why = "the output layer is gone" if layer is None else "the output is claimed anew"
        log.warning("%s: %d receipts are discarded", why, discarded)
    return known


def _check_layers(workspace: Workspace) -> None:
    """Check that there is something to read in input and mask.

    Raises:
        MissingInputError: Not a single storage chunk was found.
        SpecError: The input is where the output is to be.
    """
    spec, layer, mask = workspace.spec, workspace.input, workspace.mask
    if layer.path != spec.input.path:
        log.info("input %s redirects to %s", spec.input.path, layer.path)
    if is_same_place(layer.path, spec.output.path):
        raise SpecError(
            f"output.path: {spec.output.path} is where input.path {spec.input.path} redirects to, expected another "
            "place"
        )
    roi = spec.grid.roi
    if spec.input.fill_missing != "all":
        filled = spec.input.fill_missing
        _check_found("input", layer.nothing_in(roi.grown(spec.halo, spec.halo)), filled=filled)
    if mask is not None and spec.skip.mask is not None and spec.skip.mask.fill_missing != "all":
        _check_found("skip.mask", mask.nothing_in(roi), filled=spec.skip.mask.fill_missing)


def _check_found(section: str, absence: Absence, *, filled: bool) -> None:
    """Refuse a layer of which nothing was found.

    Args:
        section: Section of the spec with the layer.
        absence: What was not found.
        filled: Whether what is missing would be read as zeros. Else a block will tell by itself if
            it isn't sure that there is nothing.
    """
    if absence.text and (filled or absence.is_sure):
        zeros = f". If it is meant to be zeros all the same, set {section}.fill_missing: all" if filled else ""
        raise MissingInputError(f"{section}.path: {absence.text}{zeros}")


def make_output(spec: VolumeSpec) -> None:
    """Make the output layer, as this spec's own; stages write to no other."""
    _make(spec, History(spec), "", new_epoch(spec))


def _make(spec: VolumeSpec, history: History, run: str, epoch: str) -> None:
    history.add("new", run, epoch)  # first: of two that find no layer, one makes it
    create_output(spec)
    history.tell()
    log.info("output %s made: %s", spec.output.path, spec.grid.roi)


def _try_model(workspace: Workspace) -> tuple[Trial, Reference]:
    """Run one patch, so that a wrong shape or range shows before any block is run.

    Returns:
        What it took; and what the network gives here for the reference patches.
    """
    middle = vector(axis.count // 2 for axis in workspace.spec.grid.axes)
    try:
        seconds, digests = workspace.trial.try_patch(middle, workspace.reference.runs)
    except UnfitPatchError as error:
        remedy = fitting_patches(workspace.spec)
        raise DataError(f"the model {remedy}; as the spec is, {error}" if remedy else str(error)) from error
    trial = Trial(seconds, peak_memory(), workspace.trial.patches.engine.streams)
    log.info("model %s: %.3f s per patch, %d at a time", workspace.spec.model.engine, trial.seconds, trial.streams)
    return trial, workspace.reference.here(digests)


def _measured(workspace: Workspace, *, anew: bool, again: bool) -> tuple[Measured | None, bool]:
    """Measure what ``input.values`` needs, but for what has been measured for blocks that count.

    Args:
        workspace: What the steps of the volume share; has it then.
        anew: Whether no block counts.
        again: Whether to measure all of it again.

    Returns:
        What the input gives, None if nothing is needed; and whether no block counts, since it is so
        already, or blocks may have had other numbers.
    """
    if not workspace.spec.input.values.is_measured:
        return None, anew
    known = None if anew else stored(workspace.exchange.path)
    now = workspace.measured = measure(workspace.spec, None if again else known)
    if known is None and not anew:
        log.warning("what was measured of the input for the blocks that are done is lost: they are done again")
    elif known is not None and now.differs_from(known):
        log.warning("the input gives other numbers than those that were measured: all blocks are done again")
        return now, True
    return now, known is None


def _keep_measured(workspace: Workspace, measured: Measured) -> None:
    """Store what has been measured in the present epoch, unless it is there already."""
    path = workspace.exchange.path
    if measured != stored(path):
        store(path, measured)
    workspace.measured = measured


def _is_of_another_machine(workspace: Workspace, here: Reference, other: Other) -> bool:
    """Whether what was done is to be discarded, as it was done on a machine that gives other bits.

    Raises:
        SpecError: It was done there, and neither this is asked for, nor may machines be mixed.
    """
    workspace.reference.compare(here)
    if workspace.reference.is_other_machine and other == "overwrite":
        log.warning("%s: its blocks are done again", workspace.reference.told)
        return True
    workspace.reference.check()
    return False


def _look_at_output(spec: VolumeSpec, other: Other) -> tuple[LayerScale | None, History]:
    """The output layer's scale, if there is a layer, and what has become of it.

    Raises:
        SpecError: The layer does not fit, or is another spec's, and that is not asked for.
    """
    layer = check_output(spec, may_grow=True) if layer_exists(spec.output.path) else None
    if layer is None and (other_format := format_beside(spec.output.path)):
        raise SpecError(
            f"output.path: there is a layer of another format at {spec.output.path} ({other_format}). Give another "
            "path, or delete that layer"
        )
    history = History(spec)
    if layer is not None:
        _check_history(spec, history, other)
    return layer, history


def _check_history(spec: VolumeSpec, history: History, other: Other) -> None:
    """Refuse to leave two kinds of storage chunks in one layer, unless that is asked for."""
    compression = history.last.get("spec", {}).get("output", {}).get("compression", spec.output.compression)
    if compression != spec.output.compression and is_on_disk(spec.output.path):
        raise SpecError(
            f"output.compression: the layer at {spec.output.path} is stored with {compression}, the spec says "
            f"{spec.output.compression}. On a disk both would lie side by side, and the older be read. Give another "
            "path, or delete that layer"
        )
    if history.fingerprint not in (None, spec.fingerprint) and other == "refuse" and has_voxels(spec):
        raise SpecError(
            "\n  ".join(
                [
                    f"output.path: {spec.output.path} is of fingerprint {history.fingerprint} (since "
                    f"{history.last.get('time', '?')}, by {history.by or '?'}), this spec is of {spec.fingerprint}. "
                    "What differs:",
                    *(history.differences() or ["nothing that is on record"]),
                    "Ways out: another output.path; or --overwrite, to do the whole ROI again (in Airflow: "
                    "other_model: overwrite in the trigger form); or --accept-mixture, to have blocks of both in one "
                    "layer, which its provenance then records (in Airflow: other_model: mixture)",
                ]
            )
        )


def _claim(spec: VolumeSpec, layer: LayerScale, history: History, other: Other, run: str, epoch: str) -> None:
    """Claim the output layer for this spec and extend it, where need be.

    What is done here can be done again; the claim, which says that there is nothing to do, comes
    last.

    Args:
        spec: The volume.
        layer: The layer's scale.
        history: What has become of the layer so far.
        other: What is to be done with another spec's output.
        run: Name of the run.
        epoch: Name of the epoch that begins; empty if the layer is the spec's own and stays so.
    """
    roi = spec.grid.roi
    if not epoch and history.is_of(roi) and layer.bounds == roi:
        history.tell()
        return
    mode: Mode = "extend"
    if epoch:
        mode = "new" if history.fingerprint is None or other == "refuse" else other
        log.warning("output %s is claimed (%s)", spec.output.path, mode)
    if layer.bounds != roi:
        extend_output(spec, layer)
        log.info("output %s extended: %s, it was %s", spec.output.path, roi, layer.bounds)
        if len(layer.info.get("scales", [])) > 1:
            log.warning("the %d smaller scales of the layer are as they were", len(layer.info["scales"]) - 1)
    if not history.is_of(roi):
        log.info("%d storage chunks that its old end had cut short are deleted", delete_cut_short(spec))
    history.add(mode, run, epoch)
    history.tell()
