"""Whether the input of blocks is what it was.

What storage says of it tells, if that is enough, or else its voxels do.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from functools import cached_property
from typing import NamedTuple

from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.inference.block import Inference
from chunkflow_core.inference.mask import Mask
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.layers import InputLayer
from chunkflow_core.storage.signatures import LayerSignatures


class InputVersion(NamedTuple):
    """What storage says of what a block reads."""

    signature: str
    """Of its content: see ``Inputs.signature``."""
    version: str
    """Of the writes that have made it, too: it does not become again what it was."""


class Inputs:
    """What the blocks of a volume read: input layer and mask."""

    def __init__(self, exchange: Exchange, layer: InputLayer, mask: Mask | None, inference: Inference) -> None:
        """Look at nothing yet; what has been looked at is remembered.

        Args:
            exchange: Where receipts are.
            layer: The input layer.
            mask: The mask; None if the spec has none.
            inference: Knows what a block reads.
        """
        self._exchange, self._spec = exchange, exchange.spec
        self._layer, self._mask, self._inference = layer, mask, inference
        self._forget()

    def _forget(self, *, versions: bool = False) -> None:
        spec, mask = self._spec, self._mask
        self._signatures = LayerSignatures(self._layer.path, self._layer.scale, versions=versions)
        self._mask_signatures: LayerSignatures | None = None
        if mask is not None and spec.skip.mask is not None:
            self._mask_signatures = LayerSignatures(mask.path, mask.scale, versions=versions)

    def load(self, blocks: Collection[Vector]) -> None:
        """Ask storage for the signatures of many blocks at once."""
        self._signatures.load([self._source(block) for block in blocks])
        if self._mask_signatures is not None:
            self._mask_signatures.load([self._mask_source(block) for block in blocks])

    def signature(self, block: Vector) -> str:
        """Digest of what storage says of the storage chunks that a block reads; may be empty.

        It is empty if storage can't tell one content from another.
        """
        signature = self._signatures.digest(self._source(block))
        if self._mask_signatures is None or not signature:
            return signature
        of_mask = self._mask_signatures.digest(self._mask_source(block))
        return short_digest(f"{signature} {of_mask}".encode()) if of_mask else ""

    def at_present(self, block: Vector) -> InputVersion:
        """What storage says of what a block reads; it is asked anew whatever it has said before."""
        asking = copy(self)
        asking._forget(versions=True)
        signature, version = asking.signature(block), asking._signatures.version(self._source(block))
        if asking._mask_signatures is not None:
            version += asking._mask_signatures.version(self._mask_source(block))
        return InputVersion(signature, version)

    def unchanged(self, receipt: Receipt, *, confirm: bool = False) -> bool:
        """Whether a block would read what its receipt of inference says that it has read.

        Args:
            receipt: The block's receipt.
            confirm: Whether it is noted if voxels had to be read to find that out, so that they
                need not be read the next time.
        """
        signature = self.signature(receipt.block)
        if signature and signature == receipt.signature:
            return True
        before = self.at_present(receipt.block) if confirm else None
        if self.content(receipt.block) != receipt.content:
            return False
        if before is not None and before == self.at_present(receipt.block):  # it was so all the time
            self._exchange.put_note("infer", receipt.block, receipt.signature, before.signature)
        return True

    def content(self, block: Vector) -> str:
        """Digest of what a block reads, from its voxels: see ``Receipt.content``."""
        return self._inference.reading(self._spec.grid.block(block)).digest()

    @cached_property
    def _sources(self) -> list[list[tuple[int, int]]]:
        """Ranges that are read inside the layer, for each axis and each block along it.

        They are the same whatever the block's other indices.
        """
        grid, sources = self._spec.grid, []
        for axis, count in enumerate(grid.shape):
            blocks = (grid.block(vector(i if a == axis else 0 for a in range(3))) for i in range(count))
            boxes = [self._layer.source(self._inference.reading(block).whole) for block in blocks]
            sources.append([(box.start[axis], box.stop[axis]) for box in boxes])
        return sources

    def _source(self, block: Vector) -> Box:
        (z0, z1), (y0, y1), (x0, x1) = (ranges[i] for ranges, i in zip(self._sources, block, strict=True))
        return Box((z0, y0, x0), (z1, y1, x1))

    def _mask_source(self, block: Vector) -> Box:
        assert self._mask is not None
        return self._mask.region(self._spec.grid.block(block).reach & self._spec.grid.roi)
