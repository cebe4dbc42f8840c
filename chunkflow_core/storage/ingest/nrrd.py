"""NRRD: voxels after their header, or in files that a detached header names."""

from __future__ import annotations

from pathlib import Path

from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.flat import open_flat
from chunkflow_core.storage.ingest.nrrd_header import NrrdHeader
from chunkflow_core.storage.ingest.stack import Stack, readable, reader

NRRD = (".nrrd", ".nhdr")


def open_nrrd(file: Path, choice: Choice) -> Stack:
    """Open an NRRD file; what is compressed is decompressed a few sections at a time.

    Voxels stay in the order in which they are stored, wherever the header says that axes point to.

    Raises:
        DataError: It can't be read.
        MissingInputError: A data file is not there.
        UsageError: What the user says does not fit.
        SpecError: What reads it is not installed.
    """
    nrrd, name = reader("nrrd"), str(file)
    header = readable(lambda: NrrdHeader(nrrd, file), name)
    flat = readable(header.flat, name)
    axes, sizes = readable(lambda: (header.axes(), header.voxel_sizes()), name)
    stack = open_flat(flat, name, axes, choice, sizes=sizes)
    stack.files = sorted({file, *flat.files})
    if "spacedirections" in header.fields:
        space = header.fields.get("space", "its space")
        stack.notes["orientation"] = f"as stored: the directions of its axes in {space} are not applied"
    return stack
