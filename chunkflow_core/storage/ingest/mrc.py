"""MRC: the files of IMOD, SerialEM and cryo-EM programs, mapped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest.axes import Choice, native
from chunkflow_core.storage.ingest.stack import ArrayStack, Stack, readable, reader
from chunkflow_core.storage.units import nanometres

MRC = (".mrc", ".mrcs", ".rec", ".st", ".ali", ".map", ".ccp4")

_IMOD_STAMP, _IMOD_PLACE, _SIGNED_FLAG = 1146047817, 152, 1
"""What IMOD writes into its headers, where, and the bit of the next number that says int8."""


def open_mrc(file: Path, choice: Choice) -> Stack:
    """Open an MRC file, mapped; its sections are the slowest axis, or what the header says is z.

    Raises:
        DataError: It can't be read as a whole, or it is not known whether its bytes are signed.
        UsageError: What the user says does not fit.
        SpecError: What reads it is not installed.
    """
    mrcfile, name = reader("mrcfile"), str(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of files that are not as their header says
        opened = readable(lambda: mrcfile.mmap(file, mode="r"), name)
    try:
        data, header = opened.data, opened.header
        if int(header.mode) == 0:
            data = data.view(_byte(header, name))
        axes = choice.axes or _axes(header, data.ndim, name)
        return _Mrc(opened, data, name, axes, choice, _sizes(opened.voxel_size, axes))
    except BaseException:
        opened.close()
        raise


class _Mrc(ArrayStack):
    """A mapped file; it is closed with it."""

    def __init__(
        self, opened: Any, data: NDArray[Any], name: str, axes: str, choice: Choice, sizes: list[float | None]
    ) -> None:
        super().__init__(data, name, axes, choice, meaning=native, sizes=sizes)
        self._opened = opened
        self.files = [Path(name)]

    def close(self) -> None:
        self._opened.close()


def _byte(header: Any, name: str) -> str:
    """Dtype of mode 0: int8 by the standard of 2014, uint8 in many older files.

    IMOD says which in a flag of its own. The range of grey values in the header of an older file
    says it, too, if it is of values that only one of both has.
    """
    content = header.tobytes()[_IMOD_PLACE : _IMOD_PLACE + 8]
    stamp, flags = np.frombuffer(content, header.mode.dtype)
    if stamp == _IMOD_STAMP:
        return "i1" if flags & _SIGNED_FLAG else "u1"
    if int(header.nversion) >= 20140:
        return "i1"
    low, high = float(header.dmin), float(header.dmax)
    if -128 <= low < 0 <= high <= 127:
        return "i1"
    if 0 <= low <= 127 < high <= 255:
        return "u1"
    raise DataError(
        f"{name}: its mode 0 (bytes) may be signed or unsigned, and its header does not say which; store it again by a "
        "program that says it (IMOD, mrcfile)"
    )


def _axes(header: Any, dimensions: int, name: str) -> str:
    """Letter of each axis by the numbers of the axes in the header, which old ones leave out."""
    numbers = [int(header[field]) for field in ("maps", "mapr", "mapc")]
    if not any(numbers):
        numbers = [3, 2, 1]
    if sorted(numbers) != [1, 2, 3]:
        raise DataError(
            f"{name}: its header numbers the axes {numbers} (sections, rows, columns); name them with --axes"
        )
    return ("V" + "".join(" XYZ"[number] for number in numbers))[-dimensions:]


def _sizes(voxel_size: Any, axes: str) -> list[float | None]:
    """Voxel size in nm along each axis; the header has Å."""
    return [nanometres(voxel_size[axis.lower()], "angstrom") if axis in "XYZ" else None for axis in axes]
