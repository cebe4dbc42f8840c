"""Is all of an HDF5 dataset there? HDF5 itself reads fill values for what is not."""

from __future__ import annotations

import os
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_core.errors import DataError, MissingInputError

_DEEPEST = 8
"""Virtual datasets of virtual datasets that are followed; more of them go in a circle."""

_REMEDY = "write the rest, or take its fill value for it with --gaps blank"


def check_parts(dataset: Any, name: str, *, blank: bool, depth: int = 0) -> str:
    """Check that the voxels of a dataset were all written, and are all there.

    Args:
        dataset: The dataset.
        name: Its name for messages.
        blank: Whether parts that were never written may have the fill value.
        depth: How many virtual datasets lie above this one.

    Returns:
        What was never written, in words; empty if nothing.

    Raises:
        MissingInputError: Files of other parts are not there, or have no such dataset.
        DataError: Parts were never written, and ``blank`` is off.
    """
    if not dataset.size:
        return ""
    if dataset.is_virtual:
        missing = _virtual(dataset, name, blank, depth)
    elif dataset.external:
        missing = _external(dataset, name)
    else:
        missing = _unwritten(dataset)
    if missing and not blank:
        raise DataError(f"{name}: {missing}; {_REMEDY}")
    return missing


def _unwritten(dataset: Any) -> str:
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size()
        whole = dataset.size * dataset.dtype.itemsize
        return "" if stored >= whole else "was never written"
    counts = [-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    written = dataset.id.get_num_chunks()
    if written >= prod(counts):
        return ""
    known: set[tuple[int, ...]] = set()
    dataset.id.chunk_iter(lambda info: known.add(tuple(map(int, info.chunk_offset))))
    starts = product(*(range(0, size, chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True)))
    first = next(start for start in starts if start not in known)
    return f"{prod(counts) - written} of {prod(counts)} chunks were never written, the first is that at {first}"


def _external(dataset: Any, name: str) -> str:
    """Files with a dataset's raw bytes, which HDF5 looks for in the folder it is started in."""
    prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(_folder(dataset)))
    left = dataset.size * dataset.dtype.itemsize
    for stored, offset, size in dataset.external:
        path = Path(prefix) / (stored.decode() if isinstance(stored, bytes) else stored)
        wanted = min(left, size)
        if not path.is_file():
            raise MissingInputError(f"{name}: its file {path} is not there (looked for from {Path.cwd()})")
        if path.stat().st_size < offset + wanted:
            raise MissingInputError(f"{name}: its file {path} is too short, expected {offset + wanted} bytes")
        left -= wanted
    return ""


def _virtual(dataset: Any, name: str, blank: bool, depth: int) -> str:
    import h5py

    if depth >= _DEEPEST:
        raise DataError(f"{name}: its virtual datasets go in a circle")
    boxes = []
    for source in dataset.virtual_sources():
        if "%" in source.file_name.replace("%%", ""):
            raise DataError(
                f"{name}: its sources are named by a pattern, {source.file_name}, so that it is not known how many "
                "there are; copy it into a dataset of its own"
            )
        boxes += _blocks(source.vspace, dataset.shape)
        _check_source(h5py, dataset, source, name, blank, depth)
    first = _uncovered(dataset.shape, boxes)
    return f"no source holds the voxel at {first} and others" if first is not None else ""


def _check_source(h5py: Any, dataset: Any, source: Any, name: str, blank: bool, depth: int) -> None:
    said = f"{name}: its source {source.dset_name} in {source.file_name}"
    if source.file_name == ".":
        _check_held(dataset.file, source, said, blank, depth)
        return
    prefix = os.environ.get("HDF5_VDS_PREFIX", "").replace("${ORIGIN}", str(_folder(dataset)))
    places = [Path(prefix) / source.file_name] if prefix else []
    path = next(
        (p for p in (*places, _folder(dataset) / source.file_name, Path(source.file_name)) if p.is_file()), None
    )
    if path is None:
        raise MissingInputError(f"{said} is not there: no such file in {_folder(dataset)}")
    try:
        opened = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{said} can't be read: {error}") from error
    with opened:
        _check_held(opened, source, said, blank, depth)


def _check_held(file: Any, source: Any, said: str, blank: bool, depth: int) -> None:
    import h5py

    try:
        held = file.get(source.dset_name)
    except (KeyError, OSError):
        held = None
    if not isinstance(held, h5py.Dataset):
        raise MissingInputError(f"{said} is not there: the file has no such dataset")
    space = source.src_space
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        wanted, fits = f"{source.vspace.get_select_npoints()} voxels", held.size == source.vspace.get_select_npoints()
    else:
        high = space.get_select_bounds()[1]
        wanted = f"at least {tuple(int(n) + 1 for n in high)}"
        fits = len(high) == len(held.shape) and all(n < size for n, size in zip(high, held.shape, strict=True))
    if not fits:
        raise DataError(f"{said} has the shape {held.shape}, expected {wanted}")
    check_parts(held, said, blank=blank, depth=depth + 1)


def _folder(dataset: Any) -> Path:
    return Path(dataset.file.filename).resolve().parent


def _blocks(space: Any, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (start, stop) that a selection is made of."""
    import h5py

    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return [((0,) * len(shape), shape)]
    blocks = np.asarray(space.get_select_hyper_blocklist()).reshape(-1, 2, len(shape))
    return [(tuple(map(int, low)), tuple(int(n) + 1 for n in high)) for low, high in blocks]


def _uncovered(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[int, ...] | None:
    """The first voxel of an array that no box holds; None if they hold all."""
    marks = [
        sorted({0, shape[a], *(min(edge[a], shape[a]) for box in boxes for edge in box)}) for a in range(len(shape))
    ]
    held = np.zeros([len(edges) - 1 for edges in marks], bool)
    for low, high in boxes:
        cells = [np.searchsorted(marks[a], (low[a], min(high[a], shape[a]))) for a in range(len(shape))]
        held[tuple(slice(start, stop) for start, stop in cells)] = True
    if held.all():
        return None
    return tuple(marks[a][k] for a, k in enumerate(np.argwhere(~held)[0]))
