"""Image stacks become precomputed layers: TIFF, folders of images, HDF5, npy, all as z, y, x."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError, UsageError
from chunkflow_core.geometry import Box, Vector, ceil_to, vector
from chunkflow_core.volumes import NewLayer, layer_exists

IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")


class Stack(ABC):
    """A source of sections."""

    shape: Vector
    """Size zyx."""
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Sections ``[start, stop)``, ``(z, y, x)``."""


class _ArrayStack(Stack):
    """Anything that is sliced like an array: npy (memory-mapped) and HDF5 datasets."""

    def __init__(self, array: Any, name: str) -> None:
        if array.ndim != 3:
            raise DataError(f"{name}: has {array.ndim} dimensions {array.shape}, expected 3 (z, y, x)")
        self._array, self.shape, self.dtype = array, vector(array.shape), array.dtype

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return np.asarray(self._array[start:stop])


class _SectionStack(Stack):
    """One image a section, read by a function of its number."""

    def __init__(self, count: int, section: Callable[[int], NDArray[Any]], name: str) -> None:
        first = section(0)
        if first.ndim != 2:
            raise DataError(f"{name}: sections have the shape {first.shape}, expected grey images (y, x)")
        self._section, self._name = section, name
        self.shape, self.dtype = (count, first.shape[0], first.shape[1]), first.dtype

    def read(self, start: int, stop: int) -> NDArray[Any]:
        sections = [self._section(z) for z in range(start, stop)]
        for z, section in enumerate(sections, start):
            if section.shape != self.shape[1:] or section.dtype != self.dtype:
                raise DataError(
                    f"{self._name}: section {z} is {section.dtype} {section.shape}, the first one {self.dtype} {self.shape[1:]}"
                )
        return np.stack(sections)


def open_stack(source: str) -> Stack:
    """Open a stack by its name's ending; for HDF5, ``file.h5:dataset`` (or the only dataset).

    Raises:
        MissingInputError: there is no such file or dataset.
        DataError: it is not a three-dimensional stack.
        UsageError: the format is unknown.
    """
    path, _, dataset = source.partition(":")
    file = Path(path)
    if not file.exists():
        raise MissingInputError(f"{path} does not exist")
    if file.is_dir():
        return _folder(file)
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return _ArrayStack(np.load(file, mmap_mode="r"), path)
    if suffix in (".h5", ".hdf5", ".hdf"):
        return _hdf5(file, dataset)
    if suffix in (".tif", ".tiff"):
        import tifffile

        pages = tifffile.TiffFile(file).pages
        return _SectionStack(len(pages), lambda z: np.asarray(pages[z].asarray()), path)
    raise UsageError(f"{path}: unknown format, expected .tif, .tiff, .h5, .hdf5, .npy, or a folder of images")


def ingest(
    source: Stack,
    path: str,
    *,
    resolution: Vector,
    chunk: Vector,
    offset: Vector = (0, 0, 0),
    overwrite: bool = False,
    planes_done: Callable[[int], object] = lambda _: None,
) -> None:
    """Store a stack as a new layer, a few sections at a time.

    Args:
        source: the stack.
        path: of the layer.
        resolution: voxel size in nm, zyx.
        chunk: storage chunk size, zyx.
        offset: voxel position of the first voxel, zyx.
        overwrite: replace a layer that is there.
        planes_done: called with the number of sections written since the last call.

    Raises:
        UsageError: there is a layer and ``overwrite`` is off.
    """
    if layer_exists(path) and not overwrite:
        raise UsageError(f"{path}: there is a layer here already; give another path, or --overwrite")
    layer = NewLayer(path, source.shape, dtype=str(source.dtype), resolution=resolution, chunk=chunk, offset=offset)
    step = ceil_to(min(64, source.shape[0]), chunk[0])
    for start in range(0, source.shape[0], step):
        stop = min(start + step, source.shape[0])
        box = Box(offset, vector(np.add(offset, source.shape).tolist())).with_z(offset[0] + start, offset[0] + stop)
        layer.write(box, source.read(start, stop)[None])
        planes_done(stop - start)


def _folder(folder: Path) -> Stack:
    files = sorted((f for f in folder.iterdir() if f.suffix.lower() in IMAGES), key=_natural)
    if not files:
        raise MissingInputError(f"{folder}: no images in this folder ({', '.join(IMAGES)})")
    return _SectionStack(len(files), lambda z: _image(files[z]), str(folder))


def _image(file: Path) -> NDArray[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return np.asarray(image)
    except UnidentifiedImageError as error:
        raise DataError(f"{file}: is not an image that can be read") from error


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key with numbers by value: section 10 after section 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _hdf5(file: Path, dataset: str) -> Stack:
    import h5py

    container = h5py.File(file, "r")
    if not dataset:
        names: list[str] = []
        container.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        if len(names) != 1:
            raise UsageError(f"{file}: holds the datasets {names}; name one: {file}:DATASET")
        dataset = names[0]
    if dataset not in container:
        raise MissingInputError(f"{file}: has no dataset {dataset}")
    return _ArrayStack(container[dataset], f"{file}:{dataset}")
