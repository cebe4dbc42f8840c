"""Files of precomputed layers, compressed as CloudVolume does it.

Importing CloudFiles for that would take a second.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import Final

import brotli
import deflate
import zstandard

EXTENSIONS: Final[dict[str, str | None]] = {
    "": None,
    ".gz": "gzip",
    ".br": "br",
    ".zstd": "zstd",
    ".xz": "xz",
    ".bz2": "bzip2",
}
"""Extensions of compressed files' names on a disk, and how each file is compressed."""

_GZIP_LEVEL, _BROTLI_QUALITY, _ZSTANDARD_LEVEL = 1, 5, 1
"""Effort of each compression: what more would gain is less than it would cost."""


class CorruptFileError(Exception):
    """A stored file is not what it should be."""

    def __init__(self, message: str, name: str = "") -> None:
        """Take the message, and the file's name below the layer's address; empty if unknown."""
        super().__init__(message)
        self.name = name


def compress(content: bytes, method: str | None) -> bytes:
    """Compress a file by ``gzip``, ``br`` or ``zstd``; None leaves it as it is."""
    if method is None:
        return content
    if method == "gzip":
        return bytes(deflate.gzip_compress(content, _GZIP_LEVEL))
    if method == "br":
        return bytes(brotli.compress(content, quality=_BROTLI_QUALITY))
    if method == "zstd":
        return bytes(zstandard.ZstdCompressor(level=_ZSTANDARD_LEVEL).compress(content))
    raise ValueError(f"{method}: expected gzip, br or zstd")


def decompress(content: bytes, method: str | None) -> bytes:
    """Decompress a file by ``gzip``, ``br``, ``zstd``, ``xz`` or ``bzip2``; None leaves it alone.

    A web server may say the same by other names, or have used ``deflate`` (zlib).

    Raises:
        CorruptFileError: The file is damaged.
        ValueError: There is no such method.
    """
    try:
        match (method or "").lower():
            case "":
                return content
            case "gzip" | "x-gzip":
                return bytes(deflate.gzip_decompress(content))
            case "br":
                return bytes(brotli.decompress(content))
            case "zstd":
                return bytes(zstandard.ZstdDecompressor().decompress(content))
            case "xz" | "lzma":
                return lzma.decompress(content)
            case "bzip2" | "bz2":
                return bz2.decompress(content)
            case "deflate":
                return zlib.decompress(content)
    except Exception as error:  # each compression has its own
        raise CorruptFileError(f"it can't be decompressed: {error or type(error).__name__}") from error
    raise ValueError(f"{method}: expected gzip, br, zstd, xz or bzip2")
