"""What decodes storage chunks: whether it is installed, and what it must not be given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import SpecError
from chunkflow_core.storage.compression import decompress

_PACKAGES: Final[dict[str, tuple[str, str]]] = {
    "jpeg": ("simplejpeg", "simplejpeg"),
    "png": ("pyspng", "pyspng-seunglab"),
    "jxl": ("imagecodecs", "imagecodecs"),
    "compressed_segmentation": ("compressed_segmentation", "compressed-segmentation"),
    "compresso": ("compresso", "compresso"),
    "crackle": ("crackle", "crackle-codec"),
    "fpzip": ("fpzip", "fpzip"),
    "kempressed": ("fpzip", "fpzip"),
    "zfpc": ("zfpc", "zfpc"),
}
"""For each encoding, the module by which CloudVolume decodes it, and the package that has it."""

_BITS: Final = (0, 1, 2, 4, 8, 16, 32)
"""Numbers of bits of a voxel in a block of ``compressed_segmentation``."""


def check_codec(path: str, codec: str) -> None:
    """Check that storage chunks of an encoding can be decoded here.

    Raises:
        SpecError: The package is not installed.
    """
    module, package = _PACKAGES.get(codec, ("numpy", "numpy"))
    if find_spec(module) is None:
        raise SpecError(
            f"{path}: encoding {codec} of its info file: its optional codec is not installed. "
            f"Run: pip install {package}"
        )


@cache
def mend_decoders() -> None:
    """Let CloudVolume look at what it decodes, and print nothing where results go.

    It decompresses as all else here does: each compression has errors of its own for damaged files,
    and some of them look like those of a disk, or of memory that is short.
    """
    from cloudfiles import compression
    from cloudvolume import chunks
    from cloudvolume.datasource.precomputed.image import rx

    rx.compression = SimpleNamespace(decompress=decompress, transcode=compression.transcode)
    chunks.decode_compressed_segmentation = checked_segmentation(chunks.decode_compressed_segmentation)
    rx.print = lambda *_: None


def checked_segmentation(decode: Callable[..., NDArray[Any]]) -> Callable[..., NDArray[Any]]:
    """CloudVolume's decoder of ``compressed_segmentation``, with a check of what it is given.

    The decoder itself (compressed-segmentation 2.3.3) follows any offset that a file names: a
    damaged one gives it zeros or foreign memory, or ends the process.
    """

    def decode_checked(
        content: bytes, shape: Sequence[int], dtype: Any, block_size: Sequence[int] | None
    ) -> NDArray[Any]:
        if len(shape) > 3 and shape[3] != 1:
            raise ValueError(f"{shape[3]} channels, expected 1")
        check_segmentation(bytes(content), tuple(shape[:3]), np.dtype(dtype), tuple(block_size or (8, 8, 8)))
        return decode(content, shape, dtype, block_size)

    return decode_checked


def check_segmentation(
    content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], block_size: tuple[int, ...]
) -> None:
    """Check that all that a file of ``compressed_segmentation`` refers to lies in it.

    The format is that of Neuroglancer: the first channel's place, then for each block a header of
    two words (bits of a voxel and place of its table of labels; place of its voxels), all places in
    words of 32 bits from the channel's beginning.

    Args:
        content: The file.
        shape: Size of the storage chunk in voxels, xyz.
        dtype: Dtype of the labels.
        block_size: Size of a block in voxels, xyz.

    Raises:
        ValueError: The file is damaged, or has labels of another kind.
    """
    if dtype not in (np.uint32, np.uint64):
        raise ValueError(f"data_type {dtype}, expected uint32 or uint64")
    if len(content) % 4:
        raise ValueError(f"{len(content)} bytes, expected whole words of 4 bytes")
    words = np.frombuffer(content, "<u4")
    first = int(words[0]) if len(words) else 0
    blocks = math.prod(-(-size // block) for size, block in zip(shape, block_size, strict=True))
    channel = words[first:]
    if first < 1 or len(channel) < 2 * blocks:
        raise ValueError(f"{len(content)} bytes are too few for {blocks} blocks")
    headers = channel[: 2 * blocks].reshape(blocks, 2).astype(np.int64)
    bits, tables, places = headers[:, 0] >> 24, headers[:, 0] & 0xFFFFFF, headers[:, 1]
    voxels = math.prod(block_size)
    used = -(-bits * voxels // 32)
    if not np.isin(bits, _BITS).all() or (places + used > len(channel))[bits > 0].any():
        raise ValueError("a block's voxels lie outside of the file")
    label_words = dtype.itemsize // 4
    for number in np.unique(bits):
        which = np.flatnonzero(bits == number)
        most = _largest(channel, places[which], int(number), voxels)
        if (tables[which] + (most + 1) * label_words > len(channel)).any():
            raise ValueError("a block's table of labels lies outside of the file")


def _largest(words: NDArray[np.uint32], places: NDArray[np.int64], bits: int, voxels: int) -> NDArray[np.int64]:
    """The largest of the numbers, of so many bits, that stand from each of some places on."""
    if bits == 0:
        return np.zeros(len(places), np.int64)
    most, mask = np.zeros(len(places), np.uint32), np.uint32(2**bits - 1)
    per_word = 32 // bits
    for i in range(-(-voxels // per_word)):
        word = words[places + i]
        for shift in range(min(per_word, voxels - i * per_word)):
            np.maximum(most, (word >> np.uint32(shift * bits)) & mask, out=most)
    return most.astype(np.int64)
