"""NIfTI: ``.nii``, ``.nii.gz``, and pairs of ``.hdr`` and ``.img``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.storage.ingest.axes import Choice, native
from chunkflow_core.storage.ingest.flat import Flat, open_flat
from chunkflow_core.storage.ingest.stack import Stack, readable, reader
from chunkflow_core.storage.units import nanometres

NIFTI = (".nii", ".hdr", ".img", ".nii.gz", ".hdr.gz", ".img.gz")

_AXES = "XYZTCV"
"""Letters of the axes, the fastest first; the fifth holds the parts of vectors and the like.

An axis V is never taken by itself.
"""
_WIDEST = 32
"""Bits of integers that are scaled."""


def open_nifti(file: Path, choice: Choice) -> Stack:
    """Open a NIfTI file, 1 or 2; what is compressed is decompressed a few sections at a time.

    Voxels stay in the order in which they are stored, wherever the affine says that axes point to.

    Raises:
        DataError: It can't be read, or its scaled values can't be kept exactly.
        MissingInputError: The other file of a pair is not there.
        UsageError: What the user says does not fit.
        SpecError: What reads it is not installed.
    """
    nibabel, name = reader("nibabel"), str(file)
    image = _loaded(nibabel, file, name)
    stored = image.dataobj
    shape, axes, dtype = tuple(map(int, stored.shape))[::-1], _AXES[: len(stored.shape)][::-1], stored.dtype
    zooms = [None] * (len(shape) - 3) + [
        nanometres(zoom, image.header.get_xyzt_units()[0]) for zoom in image.header.get_zooms()[:3][::-1]
    ]
    meaning, made, told = _scaling(float(stored.slope), float(stored.inter), dtype, name)
    if dtype.names:  # colours
        shape, axes, zooms = (*shape, len(dtype.names)), axes + "S", [*zooms, None]
        dtype = made = np.dtype("u1")
    where = Path(image.file_map["image"].filename)
    flat = Flat([where], shape, dtype, skipped=int(stored.offset), compression="gzip" * (where.suffix == ".gz"))
    stack = open_flat(
        flat, name, axes if len(axes) == len(shape) else None, choice, meaning=meaning, dtype=made, sizes=zooms
    )
    stack.files = sorted({file, where})
    stack.notes |= told
    codes = "".join(code or "?" for code in nibabel.aff2axcodes(image.affine))
    stack.notes["orientation"] = f"as stored: x, y, z point to {codes} by the affine, which is not applied"
    return stack


def _loaded(nibabel: Any, file: Path, name: str) -> Any:
    """The image, without its voxels; nibabel's words on odd headers are not logged."""
    logger = nibabel.imageglobals.logger
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        image = readable(lambda: nibabel.load(file), name)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise MissingInputError(f"{name}: the other file of the pair is not there") from error
        raise
    finally:
        logger.setLevel(level)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise DataError(f"{name}: is an image of the kind {type(image).__name__}, expected NIfTI")
    return image


def _scaling(
    slope: float, intercept: float, dtype: np.dtype[Any], name: str
) -> tuple[Callable[[NDArray[Any]], NDArray[Any]], np.dtype[Any], dict[str, str]]:
    """What the stored numbers mean, ``slope × number + intercept``, where integers can hold it.

    Returns:
        What makes voxels of numbers, their dtype, and what is to be noted of it.
    """
    if (slope, intercept) == (1, 0):
        return native, dtype, {}
    whole = slope.is_integer() and intercept.is_integer() and dtype.kind in "iu" and dtype.itemsize * 8 <= _WIDEST
    made = _holding(int(slope), int(intercept), dtype) if whole else None
    if made is None:
        raise DataError(
            f"{name}: its voxels are {slope:g} × a stored {dtype.name} + {intercept:g}, which no dtype of a layer "
            "keeps exactly; store them without scaling (scl_slope, scl_inter)"
        )
    factor, added = int(slope), int(intercept)
    told = {"scaled": f"{factor} × number in the file ({dtype.name}) + {added}, exactly, as {made.name}"}
    return lambda numbers: (numbers.astype(np.int64) * factor + added).astype(made), made, told


def _holding(slope: int, intercept: int, dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The smallest integers that hold all scaled numbers of a dtype; None if there are none."""
    limits = np.iinfo(dtype)
    ends = [slope * int(number) + intercept for number in (limits.min, limits.max)]
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"):
        if np.iinfo(name).min <= min(ends) and max(ends) <= np.iinfo(name).max:
            return np.dtype(name)
    return None
