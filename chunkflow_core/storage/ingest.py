"""Image stacks become precomputed layers: TIFF, folders of images, HDF5, npy, all as z, y, x."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError, UsageError
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.storage.files import storage_errors
from chunkflow_core.storage.layer_info import read_info
from chunkflow_core.storage.layers import NewLayer, layer_exists, layer_files

_T = TypeVar("_T")

IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")

DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32")
"""Dtypes that a precomputed layer can hold."""

HELD_BYTES = 1 << 28
"""Memory in bytes of the sections that are held at a time.

It is more where a single storage chunk's depth of sections is.
"""


class Stack(ABC):
    """A source of sections, as an array ``(z, y, x)``."""

    def __init__(self, name: str, shape: Vector, dtype: np.dtype[Any]) -> None:
        """Describe the stack.

        Args:
            name: Name for messages.
            shape: Size in voxels, zyx.
            dtype: Dtype of the voxels, in any byte order.

        Raises:
            DataError: No layer can hold such voxels, or there are none.
        """
        self.name, self.shape, self.dtype = name, shape, dtype.newbyteorder("=")
        if self.dtype.name not in DTYPES:
            raise DataError(
                f"{name}: dtype {dtype} can't be stored in a layer, convert it to one of {', '.join(DTYPES)}"
            )
        if 0 in shape:
            raise DataError(f"{name}: holds no voxel, its size is {shape}")

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Sections ``[start, stop)``, ``(z, y, x)``; ``DataError`` if they can't be read."""


class _ArrayStack(Stack):
    """Anything that is sliced like an array: npy (memory-mapped) and HDF5 datasets."""

    def __init__(self, array: Any, name: str) -> None:
        if len(array.shape) != 3:
            raise DataError(f"{name}: has {len(array.shape)} dimensions {array.shape}, expected 3 (z, y, x)")
        super().__init__(name, vector(array.shape), array.dtype)
        self._array = array

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return _readable(
            lambda: np.asarray(self._array[start:stop], self.dtype), f"{self.name}: sections {start}–{stop}"
        )


class _SectionStack(Stack):
    """One image a section, read by a function of the section's number."""

    def __init__(self, count: int, section: Callable[[int], NDArray[Any]], name: str) -> None:
        first = _readable(lambda: section(0), f"{name}: section 0")
        if first.ndim != 2:
            raise DataError(f"{name}: sections have the shape {first.shape}, expected grey images (y, x)")
        super().__init__(name, (count, first.shape[0], first.shape[1]), first.dtype)
        self._section = section

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return np.stack([self._read(z) for z in range(start, stop)])

    def _read(self, z: int) -> NDArray[Any]:
        section = _readable(lambda: self._section(z), f"{self.name}: section {z}")
        dtype = section.dtype.newbyteorder("=")
        if section.shape != self.shape[1:] or dtype != self.dtype:
            raise DataError(
                f"{self.name}: section {z} is {dtype} {section.shape}, the first {self.dtype} {self.shape[1:]}"
            )
        return section.astype(dtype, copy=False)


def open_stack(source: str) -> Stack:
    """Open a stack by its name's ending; for HDF5, ``file.h5:dataset`` (or the only dataset).

    Raises:
        MissingInputError: There is no such file or dataset.
        DataError: It is not a three-dimensional stack, or can't be read.
        UsageError: The format is unknown, or what reads it is not installed.
    """
    file, dataset = Path(source), ""
    if not file.exists() and ":" in source:
        path, _, dataset = source.rpartition(":")
        file = Path(path)
    if not file.exists():
        raise MissingInputError(f"{file} does not exist")
    if file.is_dir():
        return _folder(file)
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return _ArrayStack(_readable(lambda: np.lib.format.open_memmap(file, mode="r"), str(file)), str(file))
    if suffix in (".h5", ".hdf5", ".hdf"):
        return _hdf5(file, dataset)
    if suffix in (".tif", ".tiff"):
        return _tiff(file)
    raise UsageError(f"{file}: unknown format, expected .tif, .tiff, .h5, .hdf5, .npy, or a folder of images")


def ingest(
    source: Stack,
    path: str,
    *,
    resolution: tuple[float, ...],
    chunk: Vector,
    offset: Vector = (0, 0, 0),
    overwrite: bool = False,
    planes_done: Callable[[int], object] = lambda _: None,
) -> None:
    """Store a stack as a new layer, a few sections at a time.

    Args:
        source: The stack.
        path: Address of the layer.
        resolution: Voxel size in nm, zyx.
        chunk: Storage chunk size in voxels, zyx.
        offset: Position of the first voxel, zyx.
        overwrite: Whether to replace a layer that is there.
        planes_done: Called with the number of sections written since the last call.

    Raises:
        UsageError: There is a layer, and ``overwrite`` is off.
        DataError: The stack can't be read.
        StorageError: The storage does not answer.
    """
    if layer_exists(path):
        if not overwrite:
            raise UsageError(f"{path}: there is a layer here already; give another path, or --overwrite")
        _delete_voxels(path)
    layer = NewLayer(path, source.shape, dtype=str(source.dtype), resolution=resolution, chunk=chunk, offset=offset)
    layer_bytes = chunk[0] * source.shape[1] * source.shape[2] * source.dtype.itemsize
    step = chunk[0] * max(1, HELD_BYTES // layer_bytes)
    for start in range(0, source.shape[0], step):
        stop = min(start + step, source.shape[0])
        box = Box(offset, vector(np.add(offset, source.shape).tolist())).with_z(offset[0] + start, offset[0] + stop)
        layer.write(box, source.read(start, stop)[None])
        planes_done(stop - start)


def _delete_voxels(path: str) -> None:
    """Delete a layer's storage chunks.

    What a new layer does not overwrite would be left among its own.
    """
    keys = [scale["key"] for scale in read_info(path)["scales"]]
    with storage_errors(f"deleting the layer {path}"):
        files = layer_files(path)
        for key in keys:
            files.delete(files.list(prefix=f"{key}/"))


def _readable(read: Callable[[], _T], name: str) -> _T:
    """What ``read`` gives; ``DataError`` for whatever libraries raise of damaged or other files."""
    try:
        return read()
    except (ChunkflowError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise DataError(f"{name} can't be read: {type(error).__name__}: {text}") from error


def _reader(package: str) -> Any:
    """A package that only ingestion needs; ``UsageError`` if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise UsageError(f"this needs the package {package}: pip install 'chunkflow-airflow[ingest]'") from error


class _BrokenChain(logging.Filter):
    """Catches what tifffile logs of a truncated file, whose remaining sections it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._logger = logging.getLogger("tifffile")

    def filter(self, record: logging.LogRecord) -> bool:
        broken = record.levelno >= logging.ERROR and "TiffPages" in record.getMessage()
        if broken:
            self.texts.append(" ".join(record.getMessage().split()))
        return not broken

    def __enter__(self) -> None:
        self._logger.addFilter(self)

    def __exit__(self, *_: object) -> None:
        self._logger.removeFilter(self)


def _tiff(file: Path) -> Stack:
    tifffile = _reader("tifffile")
    chain = _BrokenChain()
    with chain:
        tiff = _readable(lambda: tifffile.TiffFile(file), str(file))
        pages, series = tiff.pages, _readable(lambda: tiff.series[0], str(file))
        count = _readable(lambda: len(pages), str(file))
    if chain.texts:
        raise DataError(f"{file} can't be read to its end, it may be truncated: {chain.texts[0]}")
    if series.ndim > 3:
        raise DataError(f"{file}: has {series.ndim} dimensions {series.shape} ({series.axes}), expected 3 (z, y, x)")
    if count == 1 and series.ndim == 3 and "S" not in series.axes:  # all sections behind one header
        mapped = series.dataoffset is not None
        return _ArrayStack(
            _readable(lambda: tifffile.memmap(file, mode="r") if mapped else series.asarray(), str(file)), str(file)
        )
    return _SectionStack(count, lambda z: np.asarray(pages[z].asarray()), str(file))


def _folder(folder: Path) -> Stack:
    found = (f for f in folder.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith("."))
    files = sorted(found, key=_natural)
    if not files:
        raise MissingInputError(f"{folder}: no images in this folder ({', '.join(IMAGES)})")
    _reader("PIL")
    return _SectionStack(len(files), lambda z: _readable(lambda: _image(files[z]), str(files[z])), str(folder))


def _image(file: Path) -> NDArray[Any]:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # sections of electron microscopy are larger than what Pillow takes for an attack
    with Image.open(file) as image:
        count = getattr(image, "n_frames", 1)
        if count > 1:
            raise DataError(f"{file}: holds {count} images, expected one; give the file instead of its folder")
        if image.mode == "P":  # numbers of colours, not grey values
            colours = np.asarray(image.convert("RGB"))
            return colours[:, :, 0] if (colours == colours[:, :, :1]).all() else colours
        return np.asarray(image)


def _natural(file: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort key with numbers by value: section 10 after section 9."""
    parts = re.split(r"([0-9]+)", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], file.name


def _hdf5(file: Path, dataset: str) -> Stack:
    h5py = _reader("h5py")
    container = _readable(lambda: h5py.File(file, "r"), str(file))
    if not dataset:
        names: list[str] = []
        container.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        if len(names) != 1:
            raise UsageError(f"{file}: holds the datasets {names}; name one: {file}:DATASET")
        dataset = names[0]
    if not isinstance(container.get(dataset), h5py.Dataset):
        raise MissingInputError(f"{file}: has no dataset {dataset}")
    return _ArrayStack(container[dataset], f"{file}:{dataset}")
