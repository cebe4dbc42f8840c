"""A digest of all input that decides a block's numbers, whatever the steps in which it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.inference.mask import MaskWindow
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.layer_scale import LayerScale


class Content:
    """Digest of a block's input; takes planes in any order, from several threads."""

    def __init__(self, *scales: LayerScale) -> None:
        """Begin with nothing read.

        Args:
            scales: The scales that are read, of the input layer and of a mask. What their info says
                of the meaning of voxels is a part of the digest.
        """
        self._meaning = " ".join(scale.meaning for scale in scales).encode()
        self._planes: dict[int, bytes] = {}
        self._mask = b""

    def add(self, start: int, data: NDArray[Any], used: Container[int]) -> None:
        """Add planes as they are read, with padding and halo.

        Args:
            start: Position of the first plane, z.
            data: ``(channels, z, y, x)``.
            used: The planes, by z, that count. Others decide nothing: they are read since storage
                chunks are read whole.
        """
        for z in range(data.shape[1]):
            if start + z in used:
                self._planes[start + z] = hashlib.sha256(np.ascontiguousarray(data[:, z]).data).digest()

    def add_mask(self, window: MaskWindow) -> None:
        """Add the mask over all voxels that the block's patches touch."""
        self._mask = hashlib.sha256(np.ascontiguousarray(window.present).data).digest()

    @property
    def digest(self) -> str:
        """Digest of all that was added."""
        planes = [b"%d:" % z + digest for z, digest in sorted(self._planes.items())]
        return short_digest(b"".join([self._meaning, self._mask, *planes]))
