"""Arrays whose voxels lie in files one after another: plain, compressed, or over several files."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.storage.ingest.axes import Choice, Selection, native, select
from chunkflow_core.storage.ingest.stack import ArrayStack, Stack, readable, voxel_size

_PASSED_OVER = 1 << 20
"""Bytes of a compressed file that are decompressed at a time to get to those that are wanted."""


@dataclass(frozen=True, slots=True)
class Flat:
    """What a header says of where an array lies."""

    files: Sequence[Path]
    """Files with the same number of bytes each, in the order of the slowest axis."""
    shape: tuple[int, ...]
    """Shape of the array, the slowest axis first."""
    dtype: np.dtype[Any]
    start: int = 0
    """Position of the data in each file; if it is compressed, of the compressed data."""
    skipped: int = 0
    """Bytes before the first voxel, after decompression; -1 for all but those of the array."""
    compression: str = ""
    """``gzip``, ``bzip2``, or nothing."""

    @property
    def part(self) -> int:
        """Bytes of the array that each file holds."""
        return self.size // len(self.files)

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return prod((*self.shape, int(self.dtype.itemsize)))


def open_flat(
    flat: Flat,
    name: str,
    axes: str | None,
    choice: Choice,
    *,
    meaning: Callable[[NDArray[Any]], NDArray[Any]] = native,
    dtype: np.dtype[Any] | None = None,
    sizes: Sequence[float | None] = (),
) -> Stack:
    """Open the array as a stack; arguments are those of :class:`ArrayStack`.

    What is compressed is decompressed as it is read, a few sections at a time, in their order.

    Raises:
        MissingInputError: A file is not there.
        DataError: A file is too short or too long, or sections do not lie in it one by one.
    """
    if flat.size % len(flat.files):
        raise DataError(f"{name}: {len(flat.files)} files can't have equal parts of an array of {flat.shape}")
    for file in flat.files:
        if not file.is_file():
            raise MissingInputError(f"{name}: its file {file} is not there")
    parts = [_Part(file, flat, name) for file in flat.files]
    stack: Stack
    if len(parts) == 1 and not flat.compression and flat.size:
        mapped = readable(
            lambda: np.memmap(flat.files[0], flat.dtype, mode="r", offset=parts[0].first, shape=flat.shape), name
        )
        stack = ArrayStack(mapped, name, axes, choice, meaning=meaning, dtype=dtype, sizes=sizes)
    else:
        selection = select(name, flat.shape, axes, choice)
        stack = _FlatStack(parts, flat, name, selection, meaning, dtype or flat.dtype)
        stack.voxel_size = voxel_size(selection, sizes)
    stack.files = [*flat.files]
    return stack


class _Part:
    """A file's share of the array, read forwards."""

    def __init__(self, file: Path, flat: Flat, name: str) -> None:
        self._file, self._flat = file, flat
        self.first = flat.start + flat.skipped
        """Position of the first voxel, unless it is compressed."""
        self._raw: IO[bytes] | None = None
        self._stream: Any = None
        self._position = 0
        if not flat.compression:
            size = file.stat().st_size
            if flat.skipped < 0:
                self.first = size - flat.part
            if self.first < flat.start or size != self.first + flat.part:
                long = "too long" if size > self.first + flat.part else "too short, it may be truncated"
                told = "it" if str(file) == name else f"its file {file.name}"
                raise DataError(
                    f"{name} can't be read: {told} is {long}, holds {size} bytes, its header speaks of "
                    f"{max(self.first, flat.start) + flat.part}"
                )

    def read(self, start: int, count: int) -> bytes:
        """Bytes of the array from a position in this part."""
        if self._stream is None or start < self._position:
            self._open()
        if self._flat.compression:
            self._pass_over(start - self._position)
        else:
            self._stream.seek(self.first + start)
        found: bytes = self._stream.read(count)
        self._position = start + len(found)
        if len(found) < count:
            raise EOFError(f"{self._file.name} ends too early, it may be truncated")
        if self._position == self._flat.part and self._stream.read(1):  # this also compares the checksum
            raise ValueError(f"{self._file.name} is too long, its header speaks of less")
        return found

    def close(self) -> None:
        """Close the file; it is opened again when it is read."""
        if self._raw is not None:
            self._raw.close()
        self._raw = self._stream = None

    def _open(self) -> None:
        self.close()
        self._raw = self._file.open("rb")
        self._raw.seek(self._flat.start)
        self._stream = self._raw
        if self._flat.compression:
            self._stream = (gzip.open if self._flat.compression == "gzip" else bz2.open)(self._raw)
            self._pass_over(self._flat.skipped)
        self._position = 0

    def _pass_over(self, count: int) -> None:
        while count > 0:
            passed = len(self._stream.read(min(count, _PASSED_OVER)))
            if not passed:
                raise EOFError(f"{self._file.name} ends too early, it may be truncated")
            count -= passed


class _FlatStack(Stack):
    """Sections that lie one after another in files that are read forwards."""

    def __init__(
        self,
        parts: list[_Part],
        flat: Flat,
        name: str,
        selection: Selection,
        meaning: Callable[[NDArray[Any]], NDArray[Any]],
        dtype: np.dtype[Any],
    ) -> None:
        super().__init__(name, selection.shape, dtype)
        self._parts, self._flat, self._selection, self._meaning = parts, flat, selection, meaning
        self._lead = next(axis for axis, position in enumerate(selection.fixed) if position is None)
        if selection.z not in (None, self._lead):
            raise DataError(
                f"{name}: is compressed or lies in several files, and its sections do not follow each other in them; "
                "store it uncompressed in one file"
            )

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return readable(lambda: self._read(start, stop), f"{self.name}: sections {start}–{stop}")

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        shape, lead = self._flat.shape, self._lead
        low, high = (0, shape[lead]) if self._selection.z is None else (start, stop)
        fixed = [position for position in self._selection.fixed[:lead] if position is not None]
        before = int(np.ravel_multi_index(fixed, shape[:lead])) if fixed else 0
        item = prod(shape[lead + 1 :]) * self._flat.dtype.itemsize
        content = self._bytes((before * shape[lead] + low) * item, (high - low) * item)
        block = np.frombuffer(content, self._flat.dtype).reshape(high - low, *shape[lead + 1 :])
        inner = self._selection.index(slice(None))[lead + 1 :]
        return self._selection.arrange(native(self._meaning(block[(slice(None), *inner)])))

    def _bytes(self, start: int, count: int) -> bytes:
        size, found = self._flat.part, []
        while count:
            number, position = divmod(start, size)
            length = min(count, size - position)
            found.append(self._parts[number].read(position, length))
            if position + length == size and len(self._parts) > 1:
                self._parts[number].close()  # there may be more files than may be open
            start, count = start + length, count - length
        return found[0] if len(found) == 1 else b"".join(found)
