"""Which reader a source has."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chunkflow_core.errors import MissingInputError, UsageError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.folder import open_folder
from chunkflow_core.storage.ingest.hdf5 import HDF5, open_hdf5
from chunkflow_core.storage.ingest.images import TIFF
from chunkflow_core.storage.ingest.stack import ArrayStack, Stack, readable
from chunkflow_core.storage.ingest.tiff import open_tiff

_NOTHING = Choice()


def open_stack(source: str, choice: Choice = _NOTHING) -> Stack:
    """Open a stack by its name's ending; for HDF5, ``file.h5:dataset`` (or the only dataset).

    Args:
        source: Path of the file or folder.
        choice: What the user says of a source that is not simply one stack.

    Raises:
        MissingInputError: There is no such file or dataset, or parts of it are missing.
        DataError: It is not a three-dimensional stack, or can't be read.
        UsageError: The format is unknown, or what reads it is not installed.
        SpecError: A filter is missing that it was compressed with.
    """
    file, dataset = Path(source), ""
    if not file.exists() and ":" in source:
        path, _, dataset = source.rpartition(":")
        file = Path(path)
    if not file.exists():
        raise MissingInputError(f"{file} does not exist")
    if file.is_dir():
        return open_folder(file, choice)
    suffix = file.suffix.lower()
    if suffix == ".npy":
        array = readable(lambda: np.lib.format.open_memmap(file, mode="r"), str(file))
        return ArrayStack(array, str(file), None, choice)
    if suffix in HDF5:
        return open_hdf5(file, dataset, choice)
    if suffix in TIFF:
        return open_tiff(file, choice)
    raise UsageError(f"{file}: unknown format, expected .tif, .tiff, .h5, .hdf5, .npy, or a folder of images")
