"""NRRD files of every kind that their format has; pynrrd writes some only."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "raw": bytes,
    "gzip": gzip.compress,
    "gz": gzip.compress,
    "bzip2": bz2.compress,
    "bz2": bz2.compress,
    "ascii": bytes,
}


def write_nrrd(
    file: Path,
    data: NDArray[Any],
    *,
    encoding: str = "raw",
    files: str = "",
    lines: int = 0,
    skipped: int = 0,
    fields: Mapping[str, str] | None = None,
) -> None:
    """Write an array, whose slowest axis comes first.

    Args:
        file: The file; with ``files``, its header.
        data: The array, in the byte order in which it is written.
        encoding: The format's name of it.
        files: Nothing, or how data files are named: ``one``, ``LIST``, ``LIST 3``, ``pattern``, or
            ``pattern down``; several of them have a part of the slowest axis each.
        lines: Lines to skip before the data.
        skipped: Bytes to skip after decompression; -1 for some that the header does not count.
        fields: More lines of the header.
    """
    number = data.dtype.newbyteorder("=").name
    header = ["NRRD0005", f"type: {'float' if number == 'float32' else number.replace('float64', 'double')}"]
    header += [f"dimension: {data.ndim}", f"sizes: {' '.join(map(str, reversed(data.shape)))}", f"encoding: {encoding}"]
    if data.dtype.itemsize > 1:
        header.append(f"endian: {'big' if data.dtype.str[0] == '>' else 'little'}")
    header += [f"line skip: {lines}"] * bool(lines) + [f"byte skip: {skipped}"] * bool(skipped)
    header += [f"{name}: {value}" for name, value in (fields or {}).items()]
    before = b"\n".join([b"a line"] * lines) + b"\n" * bool(lines)
    count = len(data) if files and files != "one" else 1
    parts = [before + COMPRESSIONS[encoding](b"7" * abs(skipped) + part.tobytes()) for part in np.split(data, count)]
    names = [f"part{number:03d}.raw" for number in range(5, 5 + count)]
    if "down" in files:
        names.reverse()
    for name, part in zip(names, parts, strict=True):
        if files:
            (file.parent / name).write_bytes(part)
    if files == "one":
        header.append(f"data file: {names[0]}")
    elif files.startswith("pattern"):
        header.append(f"data file: part%03d.raw {names[0][4:7]} {names[-1][4:7]} {-1 if 'down' in files else 1}")
    elif files:
        header.append("\n".join([f"data file: {files}", *names]))
    file.write_bytes("\n".join(header).encode() + b"\n" + (b"" if files else b"\n" + parts[0]))
