"""What the numbers in a TIFF page mean as grey values; what can't be kept exactly is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest.axes import native
from chunkflow_core.storage.ingest.turned import ORIENTATION

Meaning = Callable[[NDArray[Any]], NDArray[Any]]

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_JPEG = (6, 7, 34892, 33007)
"""Compressions whose colours tifffile gives as RGB, whatever the file has."""
_PHOTOMETRIC, _COMPLEX_OR_VOID = 262, (4, 5, 6)

SPARSE = "strips or tiles are not there"


def meaning(page: Any, name: str) -> Meaning:
    """What makes grey values of a page's numbers.

    Args:
        page: The ``TiffPage``.
        name: Name of the file for messages.

    Raises:
        DataError: Readers do not agree on what the numbers are.
    """
    _check_samples(page, name)
    photometric = int(page.photometric)
    if photometric == _WHITE_IS_ZERO:
        return _from_white(page, name)
    if photometric == _PALETTE:
        levels = _levels(page, name)
        return lambda numbers: levels[numbers]
    decoded = photometric == _YCBCR and int(page.compression) in _JPEG
    if photometric not in (_BLACK_IS_ZERO, _RGB) and not decoded:
        kind = getattr(page.photometric, "name", str(photometric))
        raise DataError(f"{name}: its photometric interpretation is {kind}, convert it to grey images (MINISBLACK)")
    return native


def orientation(page: Any) -> int:
    """Value of a page's tag Orientation; 1 if it has none."""
    return int(page.tags.valueof(ORIENTATION, 1))


def is_turned_over(page: Any) -> bool:
    """Whether 0 is white in a page, so that its grey values are turned over."""
    return int(page.photometric) == _WHITE_IS_ZERO


def _check_samples(page: Any, name: str) -> None:
    bits, sample_format = page.bitspersample, int(page.sampleformat)
    if bits < 8:
        kind = " (dtype bool)" if bits == 1 else ""
        raise DataError(
            f"{name}: holds samples of {bits} bit{'s' * (bits > 1)}{kind}, of which readers do not agree how bright "
            "they are; convert it to 8 bits"
        )
    if page.dtype is None or sample_format in _COMPLEX_OR_VOID or (sample_format == 2 and bits not in (8, 16, 32, 64)):
        kind = getattr(page.sampleformat, "name", str(sample_format))
        raise DataError(f"{name}: holds samples of {bits} bits of the format {kind}, convert it to 8 or 16 bits")
    if _PHOTOMETRIC not in page.tags:
        raise DataError(
            f"{name}: does not say whether 0 is black or white: its tag PhotometricInterpretation (262) is missing. "
            "`tiffset -s 262 1 FILE` says that 0 is black"
        )


def _from_white(page: Any, name: str) -> Meaning:
    if page.dtype.kind != "u" or page.samplesperpixel != 1:
        raise DataError(
            f"{name}: is min-is-white (0 is white) with samples of {page.dtype} × {page.samplesperpixel}, which has no "
            "common meaning; convert it to min-is-black"
        )
    top = page.dtype.type(2**page.bitspersample - 1)
    return lambda numbers: top - native(numbers)


def _levels(page: Any, name: str) -> NDArray[Any]:
    """Grey value of each number of a palette, uint8.

    TIFF has palettes in 16 bits; those of 8-bit images are multiples of 257, or of 256.
    """
    palette = page.colormap
    if palette is None or page.samplesperpixel != 1 or (palette != palette[:1]).any():
        raise DataError(f"{name}: has a palette of colours, expected grey images; convert it to grey")
    levels = np.asarray(palette[0], np.uint16)
    eight = (levels >> 8).astype(np.uint8)
    factors = [factor for factor in (257, 256) if (eight.astype(np.uint16) * factor == levels).all()]
    if not factors or len(levels) < 2 ** min(16, page.bitspersample):
        raise DataError(f"{name}: has a palette of grey values that 8 bits can't hold; convert it to grey of 16 bits")
    return eight


def check_whole(page: Any, name: str) -> None:
    """Check that a page's strips or tiles are in the file.

    tifffile reads zeros for those that aren't.

    Raises:
        DataError: Some are not.
    """
    offsets, sizes = page.dataoffsets, page.databytecounts
    missing = sum(1 for offset, size in zip(offsets, sizes, strict=False) if not offset or not size)
    missing += max(0, int(np.prod(page.keyframe.chunked)) - len(offsets)) if not page.keyframe.is_contiguous else 0
    if missing or not offsets:
        raise DataError(
            f"{name}: {missing} of {len(offsets)} {SPARSE}; write the file again, or take zeros for them with "
            "--gaps blank"
        )
