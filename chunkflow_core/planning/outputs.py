"""Whether storage chunks are still what blocks have written.

What storage says of them tells, if that is enough, or else their voxels do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property

from chunkflow_core.errors import DataError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.layers import OutputLayer
from chunkflow_core.storage.signatures import ABSENT, LayerSignatures, WrittenChunk


class Outputs:
    """What the blocks of a volume have written."""

    def __init__(self, exchange: Exchange, layer: Callable[[], OutputLayer]) -> None:
        """Look at nothing yet.

        Args:
            exchange: Where notes of what was found out are put.
            layer: Gives the output layer; called when that is looked at.
        """
        self._exchange, self._grid, self._open = exchange, exchange.spec.grid, layer

    @cached_property
    def _layer(self) -> OutputLayer:
        return self._open()

    def as_written(self, layer: OutputLayer, stage: Stage, block: Vector, written: Mapping[str, WrittenChunk]) -> str:
        """Digest of what storage said when a stage wrote: see ``Receipt.stored``."""
        if not all(name in written and written[name].stored for name in self._names(layer, stage, block)):
            return ""
        signatures = layer.signatures()
        for name, chunk in written.items():
            signatures.note(name, chunk.stored)
        return self._digest(signatures, stage, block)

    def at_present(self, stage: Stage, blocks: Collection[Vector]) -> dict[Vector, str]:
        """Digests of what storage says now of what a stage has written, by block; may be empty."""
        signatures = self._layer.signatures()
        signatures.load(box for block in blocks for box in self._boxes(stage, block))
        return {block: self._digest(signatures, stage, block) for block in blocks}

    def are_as_written(self, receipt: Receipt, *, confirm: bool = True) -> bool:
        """Whether all storage chunks are there, and hold what a receipt says was written.

        Where storage says something else than it did, voxels are read.

        Args:
            receipt: The block's receipt.
            confirm: Whether it is noted if they turn out to be the same, so that they need not be
                read again.
        """
        layer, signatures = self._layer, self._layer.signatures()
        signatures.load(self._boxes(receipt.stage, receipt.block))
        now = self._digest(signatures, receipt.stage, receipt.block)
        if now and now == receipt.stored:
            return True
        names = self._names(layer, receipt.stage, receipt.block)
        if any(wrong_chunk(layer, name, receipt, signatures.number(name)) for name in names):
            return False
        if confirm:
            self._exchange.put_note(receipt.stage, receipt.block, receipt.stored, now)
        return True

    def _boxes(self, stage: Stage, index: Vector) -> Iterator[Box]:
        block = self._grid.block(index)
        yield from (box for box in ((block.core,) if stage == "infer" else block.frame) if box)

    def _names(self, layer: OutputLayer, stage: Stage, block: Vector) -> Iterator[str]:
        """Names of the storage chunks that a stage writes."""
        return (chunk.key for box in self._boxes(stage, block) for chunk in layer.expected_chunks(box))

    def _digest(self, signatures: LayerSignatures, stage: Stage, block: Vector) -> str:
        digests = [signatures.digest(box) for box in self._boxes(stage, block)]
        return short_digest(" ".join(digests).encode()) if all(digests) else ""


def wrong_chunk(layer: OutputLayer, name: str, receipt: Receipt, number: int, *, deep: bool = False) -> str:
    """What is wrong with a storage chunk, of which a receipt says what was written.

    Args:
        layer: The output layer.
        name: Name of the storage chunk.
        receipt: The receipt of the stage that writes it.
        number: What storage says of it now: see ``LayerSignatures.number``.
        deep: Whether to read its voxels in any case, not only if storage says something else of it
            than it did, or never said anything.

    Returns:
        A text; empty if nothing is wrong.
    """
    written = receipt.written.get(name)
    if written is None:
        return "the receipt does not vouch for it"
    if not deep and written.stored in (0, number) and number != ABSENT:
        return ""
    try:
        digest = layer.digest(name)
    except DataError as error:
        return str(error)
    if digest is None:
        return "it is missing"
    return "" if digest == written.voxels else "its voxels are not those that the receipt vouches for"
