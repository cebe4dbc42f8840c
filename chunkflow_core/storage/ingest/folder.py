"""A folder of images, a file a section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.images import IMAGES, open_image
from chunkflow_core.storage.ingest.numbering import sections
from chunkflow_core.storage.ingest.stack import Stack


def open_folder(folder: Path, choice: Choice) -> Stack:
    """Open a folder of images; other files in it, and hidden ones, are passed over.

    Each image is opened once, so that a wrong one is known before anything is written.

    Raises:
        MissingInputError: There are no images.
        DataError: They are not the sections of one stack.
    """
    found = [f for f in folder.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith(".") and f.is_file()]
    if not found:
        raise MissingInputError(f"{folder}: no images in this folder ({', '.join(IMAGES)})")
    return _Folder(folder, sections(folder, found, choice), choice)


class _Folder(Stack):
    """Sections that are files, or missing."""

    def __init__(self, folder: Path, files: list[Path | None], choice: Choice) -> None:
        self._files, self._choice = files, choice
        first: Stack | None = None
        for z, file in enumerate(files):
            if file is not None:
                opened = open_image(file, choice)
                opened.close()
                first = first or opened
                _check(z, opened, first)
        assert first is not None
        super().__init__(str(folder), (len(files), *first.shape[1:]), first.dtype)
        self.notes |= first.notes
        if missing := [z for z, file in enumerate(files) if file is None]:
            self.notes["filled"] = {"with": choice.gaps, "sections": missing}

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return np.stack([self._read(z) for z in range(start, stop)])

    def _read(self, z: int) -> NDArray[Any]:
        if self._choice.gaps == "blank" and self._files[z] is None:
            return np.zeros(self.shape[1:], self.dtype)
        while (file := self._files[z]) is None:
            z -= 1
        opened = open_image(file, self._choice)
        try:
            section: NDArray[Any] = opened.read(0, 1)[0]
            return section
        finally:
            opened.close()


def _check(z: int, opened: Stack, first: Stack) -> None:
    """Check that a section is like the first, also in what its numbers mean."""
    if (opened.shape, opened.dtype) != (first.shape, first.dtype):
        raise DataError(
            f"{opened.name}: section {z} is {opened.dtype} {opened.shape[1:]}, the first, {first.name}, is "
            f"{first.dtype} {first.shape[1:]}"
        )
    if opened.notes != first.notes:
        raise DataError(
            f"{opened.name} and {first.name} differ in whether 0 is white or black; convert the sections to one of both"
        )
