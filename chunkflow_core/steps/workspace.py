"""What the steps of one spec share within a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.leases import Lease
from chunkflow_core.inference.block import Inference
from chunkflow_core.inference.mask import Mask, MaskWindow
from chunkflow_core.inference.measuring import needed
from chunkflow_core.inference.reference import ReferencePatches
from chunkflow_core.inference.values import Measured
from chunkflow_core.lattice.blocks import Block
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.planning.inputs import Inputs
from chunkflow_core.planning.outputs import Outputs
from chunkflow_core.planning.state import ExchangeState
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.steps.output import open_output
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import check_decoder
from chunkflow_core.storage.layers import InputLayer, OutputLayer


class Workspace:
    """What the steps of one spec share within a process, each opened when first needed."""

    def __init__(self, spec: VolumeSpec, engine: Engine | None = None) -> None:
        """Open nothing yet.

        Args:
            spec: The volume.
            engine: What runs patches; default: what the spec names, loaded when the first patch is
                run.
        """
        self.spec, self._engine = spec, engine
        self.lease: Lease | None = None
        """That of the run that is at work; None if several may be, for whoever keeps them apart."""

    @cached_property
    def input(self) -> InputLayer:
        """The input layer; ``MissingInputError`` if there is none."""
        spec = self.spec.input
        return InputLayer(
            spec.path,
            spec.mip,
            self.spec.input_scale,
            self.spec.input_bounds,
            padding=spec.padding,
            fill_missing=bool(spec.fill_missing),
            advice="If missing chunks of this layer mean zeros, set input.fill_missing: true",
        )

    def check_codecs(self) -> None:
        """Check that what is to be read can be decoded here, without opening it.

        Raises:
            SpecError: What decodes the input or the mask is not installed.
            MissingInputError: There is no such layer.
            StorageError: The storage does not answer.
        """
        scales, mask = [self.spec.input_scale], self.spec.skip.mask
        if mask is not None:
            scales.append(read_scale(mask.path, mask.mip))
        for scale in scales:
            check_decoder(scale.address, scale)

    @cached_property
    def output(self) -> OutputLayer:
        """The output layer; ``MissingInputError`` if ``prepare`` has not made it."""
        return open_output(self.spec)

    def check_claim(self) -> None:
        """Check that the output layer is this spec's, and this run's, to write to.

        Raises:
            SpecError: Another model, or another kind of machine, has taken the layer.
            BusyError: Another run has taken over.
        """
        _ = self.output  # a layer that is missing altogether is told as such
        self.exchange.check_claim()
        if self.lease is not None:
            self.lease.check()

    @cached_property
    def exchange(self) -> Exchange:
        """Where donations and receipts are, in the epoch that holds when this is first asked."""
        return Exchange(self.spec)

    def enter_epoch(self, epoch: str) -> None:
        """Go on in an epoch that begins."""
        for of_the_last in ("exchange", "reference", "engine", "inputs", "outputs", "measured"):
            vars(self).pop(of_the_last, None)
        self.exchange = Exchange(self.spec, epoch)

    @cached_property
    def measured(self) -> Measured:
        """What ``prepare`` has measured in the input, for a spec that needs that.

        Raises:
            MissingInputError: It hasn't.
            DataError: What is stored of it is damaged.
        """
        return needed(self.exchange.path)

    @cached_property
    def mask(self) -> Mask | None:
        """The mask of the spec, which says where there is something to do; None without one."""
        return Mask(self.spec) if self.spec.skip.mask else None

    def masked(self, box: Box, data: NDArray[Any], window: MaskWindow | None = None) -> NDArray[Any]:
        """Output of a box, set to 0 outside the mask, in place.

        Args:
            box: The box.
            data: Its voxels, ``(channels, z, y, x)``.
            window: The mask over the box, if it has been read already.
        """
        if self.mask is not None:
            data[:, ~(window or self.mask.window(box)).voxels(box)] = 0
        return data

    def frame_windows(self, block: Block, read: MaskWindow | None = None) -> list[MaskWindow]:
        """The mask over each box of a block's frame; none if there is no mask, or no frame.

        Args:
            block: The block.
            read: The mask over all of the block, if it has been read already.
        """
        if self.mask is None or not self.spec.grid.has_frame(block.index):
            return []
        return [(read.cut if read else self.mask.window)(box) for box in block.frame]

    @cached_property
    def engine(self) -> Engine:
        """The engine that runs patches, with which a reference patch has been run first.

        Raises:
            SpecError: The model can't be used, its files are not those of the fingerprint, or it
                gives other bits here than the reference has.
        """
        engine = self._any_engine
        self.reference.check()
        return engine

    @cached_property
    def reference(self) -> ReferencePatches:
        """The reference patches of the fingerprint, and whether this machine gives their bits."""
        return ReferencePatches(self.spec, self.exchange.path, lambda: self._any_engine)

    @cached_property
    def _any_engine(self) -> Engine:
        """The engine, whatever bits it gives here."""
        if self._engine is not None:
            return self._engine
        _ = self.spec.fingerprint  # made of the files before they are loaded
        engine = load_engine(self.spec)
        self.spec.check_model_files()
        return engine

    def state(self, *, confirm: bool = False) -> ExchangeState:
        """What is there at present, for the planner; ``confirm`` as ``ExchangeState`` has it."""
        return ExchangeState(self.exchange, lambda: self.inputs, lambda: self.outputs, confirm=confirm)

    @cached_property
    def outputs(self) -> Outputs:
        """What can tell whether storage chunks are still what blocks have written."""
        return Outputs(self.exchange, lambda: open_output(self.spec, may_grow=True))

    @cached_property
    def inputs(self) -> Inputs:
        """What can tell whether what blocks read has changed."""
        return Inputs(self.exchange, self.input, self.mask, self.inference)

    @cached_property
    def inference(self) -> Inference:
        """What runs and sums patches."""
        return self._inference(lambda: self.engine)

    @cached_property
    def trial(self) -> Inference:
        """What runs patches whatever bits it gives here: to try the model, not for blocks."""
        return self._inference(lambda: self._any_engine)

    def _inference(self, load: Callable[[], Engine]) -> Inference:
        return Inference(self.spec, load, self.input, self.input.scale.chunk[0], self.mask, lambda: self.measured)
