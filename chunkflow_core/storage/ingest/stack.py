"""A stack as an array ``(z, y, x)`` that is read in parts, and what all sources share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import ChunkflowError, DataError, SpecError
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.storage.ingest.axes import Choice, Selection, native, select

_T = TypeVar("_T")

DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32")
"""Dtypes that a precomputed layer can hold."""


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
        self.notes: dict[str, Any] = {}
        """What was made of the source beyond copying voxels, for the layer's provenance."""
        self.voxel_size: tuple[float, ...] | None = None
        """Voxel size in nm, zyx, as the source says; None if it does not."""
        self.files: Sequence[Path] | None = None
        """All files that voxels are read from; None if they are not known."""
        if self.dtype.name not in DTYPES:
            raise DataError(
                f"{name}: dtype {dtype} can't be stored in a layer, convert it to one of {', '.join(DTYPES)}"
            )
        if 0 in shape:
            raise DataError(f"{name}: holds no voxel, its size is {shape}")

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Sections ``[start, stop)``, ``(z, y, x)``; ``DataError`` if they can't be read."""

    def close(self) -> None:  # noqa: B027, most sources have nothing to close
        """Close the files of the stack."""


class ArrayStack(Stack):
    """Anything that is sliced like an array: npy (memory-mapped), HDF5, TIFF in one piece."""

    def __init__(
        self,
        array: Any,
        name: str,
        axes: str | None,
        choice: Choice,
        *,
        meaning: Callable[[NDArray[Any]], NDArray[Any]] = native,
        dtype: np.dtype[Any] | None = None,
        sizes: Sequence[float | None] = (),
    ) -> None:
        """Describe the stack.

        Args:
            array: What has ``shape`` and ``dtype``, and takes slices.
            name: Name for messages.
            axes: Letter of each axis, as the file says; None if it says nothing.
            choice: What the user says.
            meaning: What makes grey values of the numbers in the file.
            dtype: Dtype of the grey values, if it is another than that of the numbers.
            sizes: Voxel size in nm along each axis of the array; empty, or None, if not known.

        Raises:
            DataError: It is not a stack, or no layer can hold its voxels.
            UsageError: What the user says does not fit.
        """
        self._selection = select(name, array.shape, axes, choice)
        super().__init__(name, self._selection.shape, dtype or array.dtype)
        self.voxel_size = voxel_size(self._selection, sizes)
        self._array, self._meaning = array, meaning

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Sections ``[start, stop)``, ``(z, y, x)``; ``DataError`` if they can't be read."""
        index = self._selection.index(slice(start, stop))
        return readable(
            lambda: self._selection.arrange(native(self._meaning(np.asarray(self._array[index])))),
            f"{self.name}: sections {start}–{stop}",
        )


def voxel_size(selection: Selection, sizes: Sequence[float | None]) -> tuple[float, ...] | None:
    """Voxel size in nm, zyx; None if it is not known along each axis.

    Args:
        selection: The part of an array that is the stack.
        sizes: Voxel size in nm along each axis of the array, None where it is not known.
    """
    found = [sizes[place] for place in selection.places if place is not None and sizes]
    known = tuple(size for size in found if size is not None)
    return known if len(known) == 3 else None


def readable(read: Callable[[], _T], name: str) -> _T:
    """What ``read`` gives; ``DataError`` for whatever libraries raise of damaged or other files."""
    try:
        return read()
    except (ChunkflowError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise DataError(f"{name} can't be read: {type(error).__name__}: {text}") from error


def reader(package: str) -> Any:
    """A package that only ingestion needs; ``SpecError`` if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise SpecError(f"this needs the package {package}: pip install 'chunkflow-airflow[ingest]'") from error
