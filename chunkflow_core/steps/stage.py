"""What both stages of a block have in common: timing, writing to the output, and the receipt."""

from __future__ import annotations

import logging
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Any

from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.inference.mask import MaskWindow
from chunkflow_core.lattice.blocks import Block
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.machine import peak_memory
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.signatures import WrittenChunk
from chunkflow_core.timing import Timings

log = logging.getLogger(__name__)

_CHANGES = 16
"""Number of runs that a receipt remembers to have changed something."""


@dataclass(frozen=True)
class StageResult:
    """How a stage ended."""

    receipt: Receipt | None
    """The block's receipt; None where a block without lower neighbours has nothing to receive."""
    up_to_date: bool
    """Whether the stage had been done before."""


@dataclass
class StageWork:
    """A stage of a block at work, from when it is known to be due until its receipt is written."""

    workspace: Workspace
    stage: Stage
    block: Block
    run: str
    """Name of the run; empty if it has none."""
    before: Receipt | None
    """The block's receipt of this stage from before; None if there was none."""
    timings: Timings = field(default_factory=Timings)
    started: float = field(default_factory=perf_counter)
    """Time when the work began, as :func:`time.perf_counter` tells."""

    def retract(self) -> None:
        """Delete the receipt there is: from here on, the block counts as not done."""
        self.workspace.exchange.retract(self.stage, self.block.index)

    def write(
        self, box: Box, converted: Callable[[], NDArray[Any]], window: MaskWindow | None = None
    ) -> dict[str, WrittenChunk]:
        """Write a box of the output, set to 0 outside the mask.

        Args:
            box: A union of storage chunks.
            converted: Gives the voxels, ``(channels, z, y, x)`` in the output's dtype.
            window: The mask over the box or more, if it has been read already.

        Returns:
            Names of the storage chunks written, with what is known of each.
        """
        data = self.timings.measure("convert", self.workspace.masked, box, converted(), window)
        written: dict[str, WrittenChunk] = self.timings.measure("write", self.workspace.output.write, box, data)
        self.timings.count("bytes written", data.nbytes)
        return written

    def tell_progress(self, planes: Box) -> None:
        """Log which planes are done."""
        (start, stop), (first, last) = _z(planes), _z(self.block.reach)
        log.info("block %s: planes %d–%d of %d–%d done", self.block.name, start, stop, first, last)

    def complete(
        self, *, written: dict[str, WrittenChunk], voxels: int, engine: Engine | None = None, **particulars: Any
    ) -> StageResult:
        """Write the receipt, last of all.

        Args:
            written: Names of the storage chunks written, with what is known of each.
            voxels: Number of voxels that the stage has worked on, for its speed.
            engine: What has run patches, if any were run.
            particulars: Fields of :class:`Receipt` that only this stage fills in.

        Raises:
            SpecError: Another spec has claimed the output layer meanwhile.
        """
        workspace, exchange = self.workspace, self.workspace.exchange
        receipt = Receipt(
            stage=self.stage,
            block=self.block.index,
            box=self.block.box.key,
            fingerprint=exchange.fingerprint,
            geometry=workspace.spec.block_digest(self.block.index),
            run=self.run,
            written=written,
            stored=workspace.outputs.as_written(workspace.output, self.stage, self.block.index, written),
            changes=self._changes(written),
            facts=self._facts(voxels, engine),
            **particulars,
        )
        workspace.check_claim()
        exchange.put_receipt(receipt)
        return StageResult(receipt, up_to_date=False)

    def _changes(self, written: dict[str, WrittenChunk]) -> tuple[str, ...]:
        """The latest runs in which what the stage writes has changed."""
        if self.before is None:
            return (self.run,)
        if self.before.voxels == {name: chunk.voxels for name, chunk in written.items()}:
            return self.before.changes
        return (self.run, *(name for name in self.before.changes if name != self.run))[:_CHANGES]

    def _facts(self, voxels: int, engine: Engine | None) -> dict[str, Any]:
        wall, streams = perf_counter() - self.started, engine.streams if engine else 1
        seconds, counts = self.timings.seconds, self.timings.counts
        seconds["idle"] = max(0.0, wall - (seconds["forward"] + seconds["stitch"]) / streams)
        return {
            "seconds": {phase: round(value, 4) for phase, value in sorted(seconds.items())},
            "wall": round(wall, 4),
            "streams": streams,
            "voxels_per_second": round(voxels / wall),
            "bytes": {what: counts[f"bytes {what}"] for what in ("read", "written", "donated")},
            "finished": round(time(), 3),
            "host": socket.gethostname(),
            "processor": platform.processor() or platform.machine(),
            "peak_memory_bytes": peak_memory(),
            **(engine.description | self.workspace.reference.facts if engine else {}),
        }


def _z(box: Box) -> tuple[int, int]:
    return box.start[0], box.stop[0]
