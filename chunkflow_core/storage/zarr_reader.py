"""Reads voxels of zarr and N5 layers, ``(channels, z, y, x)``."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.files import MissingChunkError, open_files
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.zarr_chunks import ChunkCodec
from chunkflow_core.storage.zarr_shards import ShardReader, sharding_of

_MANY_TIMES: Final = 2
"""How many times the voxels of a box its shards have to have for pieces of them to be read.

A piece costs a request.
"""


class ZarrReader:
    """One scale of a zarr or N5 layer, to be read."""

    def __init__(self, path: str, scale: LayerScale, *, fill_missing: bool = False) -> None:
        """Open the scale; no request is made.

        Args:
            path: Address of the layer.
            scale: The scale.
            fill_missing: Whether the array's fill value stands for storage chunks that aren't
                there. Writers leave out those that are full of it, and those that they did not get
                to.

        Raises:
            MissingInputError: The metadata can't be understood.
            SpecError: What decodes the storage chunks is not known.
        """
        self._files, self._scale, self._fill_missing = open_files(plain(path)), scale, fill_missing
        self._codec = ChunkCodec(path, scale)
        sharding = sharding_of(scale)
        self._shards = ShardReader(path, scale, sharding) if sharding else None

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of a box inside the layer, ``(channels, z, y, x)``, in the layer's dtype.

        Raises:
            MissingChunkError: A storage chunk isn't there, and ``fill_missing`` is off.
            CorruptFileError: A storage chunk is damaged.
        """
        if not box:
            return np.zeros((self._scale.channels, *box.shape), self._scale.dtype)
        if self._shards is None:
            return self._read_whole(box)
        shards = list(self._scale.storage_chunks(box))
        if sum(shard.voxels for shard in shards) < _MANY_TIMES * box.voxels:
            return self._read_whole(box)
        voxels = np.empty((self._scale.channels, *box.shape), self._scale.dtype)
        for shard in shards:
            part = shard & box
            found = self._shards.read(part, shard, fill_missing=self._fill_missing)
            voxels[(slice(None), *part.slices(box.start))] = found
        return voxels

    def _read_whole(self, box: Box) -> NDArray[Any]:
        """Voxels of a box, of whole files."""
        parts = range(self._scale.naming.parts)
        names = [self._scale.file(chunk, part) for chunk in self._scale.storage_chunks(box) for part in parts]
        found = {answer["path"]: answer["content"] for answer in self._files.get(names)}
        there = {
            name: content
            for name, content in found.items()
            if content or (content is not None and not self._fill_missing)
        }
        if len(there) < len(names) and not self._fill_missing:
            raise MissingChunkError(next(name for name in names if name not in there))
        return self._codec.decode(box, there, whole=len(there) == len(names))
