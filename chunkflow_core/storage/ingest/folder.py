"""A folder of images, a file a section."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.machine import available_cpus
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.images import IMAGES, open_image
from chunkflow_core.storage.ingest.numbering import sections
from chunkflow_core.storage.ingest.stack import Stack

_LEAST, _MOST = 4, 16
"""Threads that read sections: a disk in the network answers several at a time, and more of them
than that only take memory.
"""


_OPENED = 256
"""Files that are opened at a time: a wrong one is told before all others have been opened."""


def threads() -> int:
    """How many sections are read at the same time."""
    return min(_MOST, max(_LEAST, available_cpus()))


def open_folder(folder: Path, choice: Choice) -> Stack:
    """Open a folder of images; other files in it, and hidden ones, are passed over.

    Each image is opened once, so that a wrong one is known before anything is written.

    Raises:
        MissingInputError: There are no images.
        DataError: They are not the sections of one stack.
    """
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(IMAGES) and e.name[0] != "." and e.is_file()]
    if not names:
        raise MissingInputError(f"{folder}: no images in this folder ({', '.join(IMAGES)})")
    return _Folder(folder, sections(folder, [folder / name for name in names], choice), choice)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is known of a section before it is read."""

    name: str
    shape: Vector
    dtype: np.dtype[Any]
    notes: dict[str, Any]


class _Folder(Stack):
    """Sections that are files, or missing."""

    def __init__(self, folder: Path, files: Sequence[Path | None], choice: Choice) -> None:
        self._files, self._choice = files, choice
        first: _Kind | None = None
        turns: Counter[str] = Counter()
        for z, kind in self._kinds():
            first = first or kind
            _check(z, kind, first)
            turns.update([kind.notes["turned"]] if "turned" in kind.notes else [])
        assert first is not None
        super().__init__(str(folder), (len(files), *first.shape[1:]), first.dtype)
        self.files = [file for file in files if file is not None]
        self.notes |= {key: note for key, note in first.notes.items() if key != "turned"}
        if turns:
            self.notes["turned"] = {told: f"{count} of {len(self.files)} files" for told, count in turns.items()}
        if missing := [z for z, file in enumerate(files) if file is None]:
            self.notes["filled"] = {"with": choice.gaps, "sections": missing}

    def read(self, start: int, stop: int) -> NDArray[Any]:
        found = np.empty((stop - start, *self.shape[1:]), self.dtype)

        def read(z: int) -> None:
            found[z - start] = self._read(z)

        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(read, range(start, stop)))
        return found

    def _read(self, z: int) -> NDArray[Any]:
        if self._choice.gaps == "blank" and self._files[z] is None:
            return np.zeros(self.shape[1:], self.dtype)
        while (file := self._files[z]) is None:
            z -= 1
        with closing(open_image(file, self._choice)) as opened:
            section: NDArray[Any] = opened.read(0, 1)[0]
            return section

    def _kinds(self) -> Iterator[tuple[int, _Kind]]:
        """The kind of each section that is there, in order."""

        def kind(file: Path) -> _Kind:
            with closing(open_image(file, self._choice)) as opened:
                return _Kind(opened.name, opened.shape, opened.dtype, opened.notes)

        there = ((z, file) for z, file in enumerate(self._files) if file is not None)
        with ThreadPoolExecutor(threads()) as pool:
            while some := list(islice(there, _OPENED)):
                yield from zip([z for z, _ in some], pool.map(kind, [file for _, file in some]), strict=True)


def _check(z: int, opened: _Kind, first: _Kind) -> None:
    """Check that a section is like the first, also in what its numbers mean."""
    if (opened.shape, opened.dtype) != (first.shape, first.dtype):
        raise DataError(
            f"{opened.name}: section {z} is {opened.dtype} {opened.shape[1:]}, the first, {first.name}, is "
            f"{first.dtype} {first.shape[1:]}"
        )
    if opened.notes.get("grey_values") != first.notes.get("grey_values"):
        raise DataError(
            f"{opened.name} and {first.name} differ in whether 0 is white or black; convert the sections to one of both"
        )
