"""What the header of an NRRD file says: teem's nearly raw raster data."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest.flat import Flat
from chunkflow_core.storage.units import nanometres

_LONGEST, _MOST_FILES = 1 << 16, 10**7
"""Limits of headers: bytes of a line, and files of a pattern."""
_PAIR = re.compile(rb"[^:]+:=")
"""Beginning of a line that says something of the user's own."""
_LIST = re.compile(r"data ?file\s*:\s*LIST(\s+\d+)?\s*$")
_NUMBERED = re.compile(r"(.*%\d*d.*)\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)(\s+\d+)?$")
_COMPRESSIONS: Final = {"raw": "", "gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2"}
_SPATIAL: Final = ("domain", "space")
_UNKNOWN: Final = ("???", "none")
_COLOURS: Final = ("3-color", "rgb-color", "hsv-color", "xyz-color", "4-color", "rgba-color")


class NrrdHeader:
    """The fields, and where the voxels lie. Axes are numbered as in the file, the fastest first."""

    def __init__(self, nrrd: Any, file: Path) -> None:
        """Read the header.

        Args:
            nrrd: The package pynrrd.
            file: The file, with voxels or without.

        Raises:
            DataError: There are fields that nothing here reads.
            Exception: Whatever pynrrd raises of headers that are wrong.
        """
        self._file, self._nrrd = file, nrrd
        with file.open("rb") as opened:
            lines = _lines(opened)
            self._listed = _listed(lines, opened)
            self._end = opened.tell()
        read = nrrd.read_header(lines)
        self.fields: dict[str, Any] = {key.replace(" ", ""): value for key, value in read.items()}
        self.sizes: list[int] = [int(size) for size in self.fields["sizes"]]
        if len(self.sizes) != self.fields["dimension"] or min(self.sizes) < 1:
            raise DataError(f"{file}: its sizes {self.sizes} are not those of {self.fields['dimension']} axes")

    def flat(self) -> Flat:
        """Where the voxels lie."""
        encoding = self.fields["encoding"].lower()
        compression = _COMPRESSIONS.get(encoding)
        lines, skipped = self.fields.get("lineskip", 0), self.fields.get("byteskip", 0)
        if compression is None or lines < 0 or skipped < (0 if compression else -1):
            raise DataError(
                f"{self._file}: has the encoding {encoding}, line skip {lines} and byte skip {skipped}, which can't be "
                "read in parts; store it with the encoding raw or gzip, without line skip and byte skip"
            )
        files = self._files()
        return Flat(
            files or [self._file],
            tuple(reversed(self.sizes)),
            self._dtype(),
            start=_after_lines(files[0] if files else self._file, 0 if files else self._end, lines),
            skipped=skipped,
            compression=compression,
        )

    def axes(self) -> str | None:
        """Letter of each axis, the slowest first; None if the header does not say what they are."""
        kinds = [self._kind(axis) for axis in range(len(self.sizes))]
        spatial = iter("XYZ")
        if kinds.count("space") not in (2, 3) or "" in kinds:
            return None
        return "".join(next(spatial) if kind == "space" else kind for kind in kinds)[::-1]

    def voxel_sizes(self) -> list[float | None]:
        """Voxel size in nm along each axis, the slowest first; None where it is not known."""
        return [self._voxel_size(axis) for axis in reversed(range(len(self.sizes)))]

    def _kind(self, axis: int) -> str:
        """``space``, a letter of another axis, or nothing if it is not known."""
        kind = self.fields["kinds"][axis].lower() if "kinds" in self.fields else "???"
        direction = self._direction(axis)
        if kind in _UNKNOWN and direction is not None:
            kind = "list" if math.isnan(direction[0]) else "space"
        if kind in _SPATIAL:
            return "space"
        if kind in _UNKNOWN:
            return "C" if self.sizes[axis] == 1 else ""
        return "T" if kind == "time" else "S" if kind in _COLOURS else "C"

    def _direction(self, axis: int) -> list[float] | None:
        directions = self.fields.get("spacedirections")
        return None if directions is None else [float(number) for number in directions[axis]]

    def _voxel_size(self, axis: int) -> float | None:
        direction = self._direction(axis)
        if direction is not None:
            found = set(self.fields.get("spaceunits", ()))
            return nanometres(math.hypot(*direction), found.pop()) if len(found) == 1 else None
        spacings, units = self.fields.get("spacings"), self.fields.get("units")
        return None if spacings is None or not units else nanometres(float(spacings[axis]), str(units[axis]))

    def _dtype(self) -> np.dtype[Any]:
        """Dtype of the voxels: of one that pynrrd is given to read."""
        one = {"dimension": 1, "sizes": np.array([1]), "encoding": "raw", "type": self.fields["type"].lower()}
        if "endian" in self.fields:
            one["endian"] = self.fields["endian"].lower()
        dtype: np.dtype[Any] = self._nrrd.read_data(one, io.BytesIO(bytes(8))).dtype
        return dtype

    def _files(self) -> list[Path]:
        """Files with the voxels; none if they follow the header."""
        named = self.fields.get("datafile")
        names: list[str] = self._listed or ([named] if named else [])
        if named and not self._listed and (numbered := _NUMBERED.match(named)):
            first, last, step = (int(numbered[k]) for k in (2, 3, 4))
            count = (last - first) // step + 1 if step else 0
            if not 0 < count <= _MOST_FILES:
                raise DataError(f"{self._file}: its data files {named} can't be counted")
            names = [numbered[1] % (first + k * step) for k in range(count)]
        return [self._file.parent / name for name in names]


def _lines(opened: IO[bytes]) -> list[str]:
    """Lines of a header, as far as pynrrd reads them, with names of fields in small letters."""
    magic = opened.readline(_LONGEST)
    if not magic.startswith(b"NRRD"):
        raise ValueError("it does not begin with NRRD")
    lines = [magic.decode("ascii", "replace")]
    for line in iter(lambda: opened.readline(_LONGEST), b""):
        if not line.strip():
            break
        if line.startswith(b"#") or _PAIR.match(line):
            continue
        field, colon, value = line.decode("utf-8", "replace").partition(":")
        lines.append(field.lower() + colon + value)
        if _LIST.match(lines[-1]):
            break
    return lines


def _listed(lines: list[str], opened: IO[bytes]) -> list[str]:
    """Names of data files that follow ``LIST`` to the end of the header."""
    if not _LIST.match(lines[-1]):
        return []
    rest = iter(lambda: opened.readline(_LONGEST).decode("utf-8", "replace"), "")
    names = (line.strip() for line in rest)
    found = list(islice((name for name in names if name), _MOST_FILES))
    if not found:
        raise ValueError("it lists no data files")
    return found


def _after_lines(file: Path, start: int, count: int) -> int:
    """Position after some lines that follow another position."""
    if not count or not file.is_file():
        return start
    with file.open("rb") as opened:
        opened.seek(start)
        _pass(opened, count)
        return opened.tell()


def _pass(opened: IO[bytes], count: int) -> None:
    lines: Iterator[bytes] = iter(lambda: opened.readline(_LONGEST), b"")
    for _ in range(count):
        next(lines, b"")
