"""Reads voxels of precomputed layers, ``(channels, z, y, x)``.

Layers on a disk whose storage chunks are plain voxels are read here, all others by CloudVolume,
which takes a second of CPU to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import ChunkflowError, MissingInputError, SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.compression import CorruptFileError
from chunkflow_core.storage.disk import DiskFiles
from chunkflow_core.storage.files import MissingChunkError, is_on_disk
from chunkflow_core.storage.layer_info import LayerScale

if TYPE_CHECKING:
    from cloudvolume import CloudVolume


class LayerReader(Protocol):
    """One scale of a layer, to be read."""

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of a box inside the layer, ``(channels, z, y, x)``, in the layer's dtype."""


def open_layer(path: str, scale: LayerScale, mip: int = 0, *, fill_missing: bool = False) -> LayerReader:
    """The reader of a scale; makes no request.

    With ``fill_missing``, storage chunks that aren't there are zeros.
    """
    if is_on_disk(plain(path)) and scale.encoding == "raw":
        return _DiskReader(plain(path), scale, mip, fill_missing=fill_missing)
    return _VolumeReader(path, scale, mip, fill_missing=fill_missing)


class _DiskReader:
    def __init__(self, path: str, scale: LayerScale, mip: int, *, fill_missing: bool) -> None:
        self._files, self._key, self._scale = DiskFiles(path), scale.info["scales"][mip]["key"], scale
        self._dtype, self._fill_missing = np.dtype(scale.dtype), fill_missing

    def read(self, box: Box) -> NDArray[Any]:
        result = np.zeros((self._scale.channels, *box.shape), self._dtype)
        for chunk in self._scale.storage_chunks(box):
            content = self._files.get(f"{self._key}/{chunk.key}")
            if content:
                part = chunk & box
                voxels = self._voxels(chunk, content)[(slice(None), *part.slices(chunk.start))]
                result[(slice(None), *part.slices(box.start))] = voxels
            elif not self._fill_missing:
                raise MissingChunkError(chunk.key)
        return result

    def _voxels(self, chunk: Box, content: bytes) -> NDArray[Any]:
        size = self._scale.channels * chunk.voxels * self._dtype.itemsize
        if len(content) != size:
            raise CorruptFileError(f"storage chunk {chunk.key} has {len(content)} bytes, expected {size}")
        return np.frombuffer(content, self._dtype).reshape(self._scale.channels, *chunk.shape)


class _VolumeReader:
    def __init__(self, path: str, scale: LayerScale, mip: int, *, fill_missing: bool) -> None:
        self._path, self._scale = path, scale
        try:
            self._volume = open_volume(path, scale, mip, fill_missing=fill_missing)
        except Exception as error:
            if _is_of_storage(error):
                raise
            raise MissingInputError(
                f"{path}: CloudVolume can't open a layer with this info file ({type(error).__name__}: {error})"
            ) from error

    def read(self, box: Box) -> NDArray[Any]:
        # CloudVolume 12.15 reads a single voxel of several channels in a way of its own: it gives
        # one channel of another voxel.
        larger = (box.grown((1, 1, 1), (1, 1, 1)) & self._scale.bounds) if box.voxels == 1 else box
        try:
            data: NDArray[Any] = np.asarray(self._volume[cloudvolume_slices(larger)]).T
        except (ImportError, NameError) as error:  # the latter: of a codec that CloudVolume has found missing
            raise SpecError(f"{self._path}: encoding {self._scale.encoding} of its info file: {error}") from error
        except Exception as error:
            if _is_of_storage(error):
                raise
            raise CorruptFileError(
                f"it can't be read as its info file says, with the encoding {self._scale.encoding} and the data_type "
                f"{self._scale.dtype} ({type(error).__name__}: {error})"
            ) from error
        return data[(slice(None), *box.slices(larger.start))]


def _is_of_storage(error: Exception) -> bool:
    """Whether an error tells of storage or of this machine, and not of what is stored."""
    from chunkflow_core.storage.clients import meaning

    if type(error).__name__ == "EmptyVolumeException":  # of CloudVolume: a storage chunk isn't there
        return True
    return isinstance(error, OSError | MemoryError | ChunkflowError) or meaning(error) is not None


def open_volume(path: str, scale: LayerScale, mip: int = 0, *, fill_missing: bool = False) -> CloudVolume:
    """The layer as CloudVolume opens it, without a request.

    Its ``info`` has been read for the scale, and its provenance is not asked for. CloudVolume's
    arrays are ``(x, y, z, channels)`` in Fortran order, so that a transposition is enough and
    nothing is copied.
    """
    from cloudvolume import CloudVolume

    from chunkflow_core.storage.clients import located

    return CloudVolume(
        **located(path),
        mip=mip,
        info=scale.info,
        provenance={},
        fill_missing=fill_missing,
        bounded=True,
        non_aligned_writes=False,
        progress=False,
    )


def cloudvolume_slices(box: Box) -> tuple[slice, slice, slice]:
    """Index of a box in CloudVolume, in the order x, y, z."""
    z, y, x = box.slices((0, 0, 0))
    return x, y, z
