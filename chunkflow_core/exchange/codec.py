"""Sums, compressed for the exchange: bytes of equal rank together, then zstandard.

The low bytes of sums are noise, the high ones are not: sorted by rank they compress better and
faster than number by number. That is done in stretches that stay in the processor's cache.
"""

from __future__ import annotations

import math

import numpy as np
import zstandard
from numpy.typing import NDArray

from chunkflow_core.errors import DataError
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.lattice.kernels import join_bytes, split_bytes

_STRETCH = 1 << 16
"""Number of float32 sums in a stretch."""
_LEVEL = 1


def compress(sums: NDArray[np.float32]) -> bytes:
    """Compress sums: float32 ``(channels, z, y, x)``, contiguous."""
    words = sums.reshape(-1).view(np.uint32)
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=words.nbytes)
    parts = []
    for start in range(0, len(words), _STRETCH):
        stretch = words[start : start + _STRETCH]
        planes = np.empty((4, len(stretch)), np.uint8)
        split_bytes(stretch, planes)
        parts.append(compressor.compress(planes.data))
    parts.append(compressor.flush())
    return b"".join(parts)


def decompress(payload: bytes, channels: int, shape: Vector) -> NDArray[np.float32]:
    """Decompress what :func:`compress` has given.

    Args:
        payload: The compressed sums.
        channels: Number of channels.
        shape: Size of the box, zyx.

    Returns:
        Float32 ``(channels, z, y, x)``.

    Raises:
        DataError: The payload does not hold exactly as many sums as the box has.
    """
    data = _content(payload, 4 * channels * math.prod(shape))
    result = np.empty((channels, *shape), np.float32)
    words = result.reshape(-1).view(np.uint32)
    for start in range(0, len(words), _STRETCH):
        stretch = words[start : start + _STRETCH]
        join_bytes(data[4 * start : 4 * (start + len(stretch))].reshape(4, -1), stretch)
    return result


def _content(payload: bytes, size: int) -> NDArray[np.uint8]:
    """The bytes of a compressed payload, which have to be ``size``; else ``DataError``.

    The frame says its size, and is asked before it is decompressed: the size decides how much
    memory that takes.
    """
    try:
        told = zstandard.frame_content_size(payload)
        if told != size:
            raise DataError(f"a donation has {told} bytes of sums, its box needs {size}: this program did not write it")
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise DataError(f"a donation can't be decompressed: {error}") from error
