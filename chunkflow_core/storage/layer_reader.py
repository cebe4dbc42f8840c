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
from chunkflow_core.storage.codecs import check_codec, mend_decoders
from chunkflow_core.storage.compression import CorruptFileError
from chunkflow_core.storage.disk import DiskFiles
from chunkflow_core.storage.files import CORRUPT, MissingChunkError, is_on_disk, open_files
from chunkflow_core.storage.layer_scale import SHARDED, LayerScale

if TYPE_CHECKING:
    from cloudvolume import CloudVolume


_NO_CHUNK = "EmptyVolumeException"
"""Name of CloudVolume's error for a storage chunk that isn't there."""

_GZIP = b"\x1f\x8b"
"""How gzip files begin."""


class LayerReader(Protocol):
    """One scale of a layer, to be read."""

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of a box inside the layer, ``(channels, z, y, x)``, in the layer's dtype."""


def open_layer(path: str, scale: LayerScale, mip: int = 0, *, fill_missing: bool = False) -> LayerReader:
    """The reader of a scale; makes no request.

    With ``fill_missing``, storage chunks that aren't there are zeros.

    Raises:
        SpecError: What decodes the layer's storage chunks is not installed.
    """
    if scale.array is not None:
        from chunkflow_core.storage.zarr_reader import ZarrReader  # a second of CPU

        return ZarrReader(path, scale, fill_missing=fill_missing)
    check_codec(path, scale.codec)
    if is_on_disk(plain(path)) and scale.encoding == "raw":
        return _DiskReader(plain(path), scale, fill_missing=fill_missing)
    return _VolumeReader(path, scale, mip, fill_missing=fill_missing)


def check_decoder(path: str, scale: LayerScale) -> None:
    """Check that a scale's storage chunks can be decoded here.

    Raises:
        SpecError: What decodes them is not installed, or not known.
    """
    if scale.array is None:
        check_codec(path, scale.codec)
        return
    from chunkflow_core.storage.zarr_chunks import ChunkCodec

    ChunkCodec(path, scale)


class _DiskReader:
    def __init__(self, path: str, scale: LayerScale, *, fill_missing: bool) -> None:
        self._files, self._scale = DiskFiles(path), scale
        self._dtype, self._fill_missing = np.dtype(scale.dtype), fill_missing

    def read(self, box: Box) -> NDArray[Any]:
        result = np.zeros((self._scale.channels, *box.shape), self._dtype)
        for chunk in self._scale.storage_chunks(box):
            name = self._scale.file(chunk)
            try:
                content = self._files.get(name)
            except CorruptFileError as error:
                raise CorruptFileError(f"storage chunk {name}: {error}", name) from error
            if content or (content is not None and not self._fill_missing):
                part = chunk & box
                voxels = self._voxels(chunk, name, content)[(slice(None), *part.slices(chunk.start))]
                result[(slice(None), *part.slices(box.start))] = voxels
            elif not self._fill_missing:
                raise MissingChunkError(name)
        return result

    def _voxels(self, chunk: Box, name: str, content: bytes) -> NDArray[Any]:
        size = self._scale.channels * chunk.voxels * self._dtype.itemsize
        if len(content) != size:
            looks = _looks(content)
            raise CorruptFileError(f"storage chunk {name} has {len(content)} bytes, expected {size}{looks}", name)
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
            data = self._read(larger)
        except CorruptFileError as error:
            raise self._named(larger, error) from error
        except Exception as error:
            if type(error).__name__ == _NO_CHUNK and self._scale.encoding != SHARDED:
                self._check_not_empty(str(error))
            raise
        return data[(slice(None), *box.slices(larger.start))]

    def _read(self, box: Box) -> NDArray[Any]:
        try:
            data: NDArray[Any] = np.asarray(self._volume[cloudvolume_slices(box)]).T
        except CorruptFileError:
            raise
        except (ImportError, NameError) as error:  # the latter: of a codec that CloudVolume has found missing
            raise SpecError(f"{self._path}: encoding {self._scale.codec} of its info file: {error}") from error
        except Exception as error:
            if type(error).__name__ not in CORRUPT and _is_of_storage(error):
                raise
            raise CorruptFileError(
                f"it can't be read as its info file says, with the encoding {self._scale.codec} and the data_type "
                f"{self._scale.dtype} ({type(error).__name__}: {error})"
            ) from error
        return data

    def _named(self, box: Box, error: CorruptFileError) -> CorruptFileError:
        """The error of the first storage chunk in a box that can't be read, with its name.

        CloudVolume does not say which one it was.
        """
        for chunk in self._scale.storage_chunks(box):
            try:
                self._read(chunk)
            except CorruptFileError as found:
                name = self._scale.file(chunk)
                looks = "" if self._scale.encoding == SHARDED else _looks(self._stored(name) or b"")
                return CorruptFileError(f"storage chunk {name}: {found}{looks}", name)
            except Exception as other:
                if type(other).__name__ != _NO_CHUNK:
                    raise
        return error

    def _check_not_empty(self, name: str) -> None:
        """Check that a storage chunk that CloudVolume has found to be missing has no file."""
        if self._stored(name) is not None:
            raise CorruptFileError(f"storage chunk {name} has 0 bytes", name)

    def _stored(self, name: str) -> bytes | None:
        """The file of a storage chunk as it is stored, None if it isn't there."""
        (answer,) = open_files(plain(self._path)).get([name], raw=True)
        content: bytes | None = answer["content"]
        return content


def _looks(content: bytes) -> str:
    """What else a file that is no storage chunk seems to be, for messages."""
    if content.lstrip()[:1] == b"<":
        return "; it looks like a web page"
    if content.startswith(_GZIP):
        return "; it looks like a gzip file, of which neither its name nor the server says so (Content-Encoding: gzip)"
    return ""


def _is_of_storage(error: Exception) -> bool:
    """Whether an error tells of storage or of this machine, and not of what is stored."""
    from chunkflow_core.storage.clients import meaning

    if type(error).__name__ == _NO_CHUNK:
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

    mend_decoders()
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
