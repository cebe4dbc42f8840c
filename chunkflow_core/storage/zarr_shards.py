"""Reads pieces of shards of zarr, version 3: a shard may be far larger than what a block needs.

A shard is a file with many pieces, each encoded by itself, and an index that says where each one
begins and how long it is (`specification
<https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html>`_).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.compression import CorruptFileError
from chunkflow_core.storage.files import MissingChunkError, get_parts, open_files
from chunkflow_core.storage.layer_scale import LayerScale, ZarrArray
from chunkflow_core.storage.zarr_chunks import ChunkCodec, decode_whole

_NONE: Final = 2**64 - 1
"""Where a piece begins that is full of the fill value, and not stored."""

_CHECKSUM_BYTES: Final = 4


class ShardReader:
    """The pieces of one scale whose storage chunks are shards."""

    def __init__(self, path: str, scale: LayerScale, sharding: dict[str, Any]) -> None:
        """Take what the layer's metadata says.

        Args:
            path: Address of the layer.
            scale: The scale.
            sharding: Configuration of its codec ``sharding_indexed``.
        """
        assert scale.array is not None
        self._place, self._scale, self._sharding = plain(path), scale, sharding
        self._files = open_files(self._place)
        metadata = json.loads(scale.array.metadata)
        shard: list[int] = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        self._counts = [n // m for n, m in zip(shard, sharding["chunk_shape"], strict=True)]
        inside = metadata | {
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": sharding["chunk_shape"]}},
            "codecs": sharding["codecs"],
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        }
        self._axes = scale.array.axes
        size = dict(zip(self._axes, sharding["chunk_shape"], strict=True))
        self._size = [size.get(axis, 1) for axis in "zyx"]
        array = ZarrArray("zarr3", "", self._axes, json.dumps(inside))
        self._codec = ChunkCodec(path, replace(scale, array=array))
        self._checksum = _CHECKSUM_BYTES * (len(sharding["index_codecs"]) > 1)

    def read(self, box: Box, shard: Box, *, fill_missing: bool) -> NDArray[Any]:
        """Voxels of a box inside a shard, ``(channels, z, y, x)``.

        Raises:
            MissingChunkError: The shard isn't there, and ``fill_missing`` is off.
            CorruptFileError: The shard is damaged.
        """
        name = self._scale.file(shard)
        size = self._files.size([name])[name]
        if size is None:
            if not fill_missing:
                raise MissingChunkError(name)
            return self._codec.decode(box, {}, whole=False)
        index = self._index(name, size)
        wanted = {file: index[place] for file, place in self._touched(box, shard)}
        ranges = {file: (int(start), int(start + length)) for file, (start, length) in wanted.items() if start != _NONE}
        if any(stop > size or start > stop for start, stop in ranges.values()):
            raise CorruptFileError(f"storage chunk {name}: its index names bytes past its end ({size})", name)
        contents = get_parts(self._place, name, list(ranges.values()))
        try:
            return self._codec.decode(box, dict(zip(ranges, contents, strict=True)), whole=False)
        except CorruptFileError as error:
            raise CorruptFileError(f"storage chunk {name}: a piece of it is damaged: {error}", name) from error

    def _index(self, name: str, size: int) -> NDArray[np.uint64]:
        """Where each piece begins and how long it is, by its place in the shard."""
        length = 16 * int(np.prod(self._counts)) + self._checksum
        if length > size:
            raise CorruptFileError(f"storage chunk {name} has {size} bytes, fewer than its index has", name)
        start = 0 if self._sharding.get("index_location") == "start" else size - length
        (content,) = get_parts(self._place, name, [(start, start + length)])
        try:
            return decode_whole((*self._counts, 2), "uint64", self._sharding["index_codecs"], content)
        except ValueError as error:
            raise CorruptFileError(f"storage chunk {name}: its index is damaged ({error!s:.200})", name) from error

    def _touched(self, box: Box, shard: Box) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names of the pieces that touch a box, and their places in the shard."""
        first = dict.fromkeys("tc", 0)
        ranges = {axis: range(count) for axis, count in zip(self._axes, self._counts, strict=True)}
        for a, (axis, size) in enumerate(zip("zyx", self._size, strict=True)):
            low = shard.start[a]
            ranges[axis] = range((box.start[a] - low) // size, (box.stop[a] - 1 - low) // size + 1)
            first[axis] = (low - self._scale.bounds.start[a]) // size
        for place in product(*(ranges[axis] for axis in self._axes)):
            numbers = (str(first[axis] + n) for axis, n in zip(self._axes, place, strict=True))
            yield ".".join(["c", *numbers]), place


def sharding_of(scale: LayerScale) -> dict[str, Any] | None:
    """The configuration of a scale's sharding, if pieces can be read by it; else None.

    Its index has to have a size that is known before.
    """
    if scale.array is None or scale.array.driver != "zarr3" or scale.naming.parts != 1:
        return None
    codecs = json.loads(scale.array.metadata)["codecs"]
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
        return None
    sharding: dict[str, Any] = codecs[0]["configuration"]
    names = [codec["name"] for codec in sharding["index_codecs"]]
    return sharding if names in (["bytes"], ["bytes", "crc32c"]) else None
