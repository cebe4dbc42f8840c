"""Which reader a source has."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chunkflow_core.errors import MissingInputError, UsageError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.folder import open_folder
from chunkflow_core.storage.ingest.hdf5 import HDF5, open_hdf5
from chunkflow_core.storage.ingest.images import TIFF
from chunkflow_core.storage.ingest.mrc import MRC, open_mrc
from chunkflow_core.storage.ingest.nifti import NIFTI, open_nifti
from chunkflow_core.storage.ingest.nrrd import NRRD, open_nrrd
from chunkflow_core.storage.ingest.stack import ArrayStack, Stack, readable
from chunkflow_core.storage.ingest.tiff import open_tiff

_NOTHING = Choice()
_READERS = {TIFF: open_tiff, NRRD: open_nrrd, MRC: open_mrc, NIFTI: open_nifti}
"""What reads files of other endings."""


def open_stack(source: str, choice: Choice = _NOTHING) -> Stack:
    """Open a stack by its name's ending; for HDF5, ``file.h5:dataset`` (or the only dataset).

    Args:
        source: Path of the file or folder.
        choice: What the user says of a source that is not simply one stack.

    Raises:
        MissingInputError: There is no such file or dataset, or parts of it are missing.
        DataError: It is not a three-dimensional stack, or can't be read.
        UsageError: The format is unknown.
        SpecError: What reads it is not installed, or a filter that it was compressed with.
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
        stack = ArrayStack(array, str(file), None, choice)
        stack.files = [file]
        return stack
    if suffix in HDF5:
        return open_hdf5(file, dataset, choice)
    for endings, reading in _READERS.items():
        if file.name.lower().endswith(endings):
            return reading(file, choice)
    raise UsageError(
        f"{file}: unknown format, expected .tif, .tiff, .h5, .hdf5, .npy, .nrrd, .nhdr, .mrc, .nii, .nii.gz, or a "
        "folder of images"
    )


def says_voxel_size(source: str) -> bool:
    """Whether sources with such a name may say how large their voxels are."""
    return source.lower().endswith((*NRRD, *MRC, *NIFTI))
