"""Storage chunks of zarr and N5: from voxels to the file's bytes and back, by TensorStore.

TensorStore sees one file at a time, in memory. Files are read and written as all others are: with
the same credentials, errors, repetitions, and what makes them last.
"""

from __future__ import annotations

import json
import re
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.compression import CorruptFileError
from chunkflow_core.storage.layer_scale import LayerScale, ZarrArray
from chunkflow_core.storage.zarr_info import METADATA

if TYPE_CHECKING:
    import tensorstore

_CODEC = re.compile(r"\\?\"([\w.:/-]+)\\?\" is not registered")


class ChunkCodec:
    """Encodes and decodes the storage chunks of one scale; threads may share it."""

    def __init__(self, path: str, scale: LayerScale) -> None:
        """Take what the layer's metadata says.

        Args:
            path: Address of the layer, for messages.
            scale: The scale, with its ``array``.

        Raises:
            MissingInputError: The metadata can't be understood.
            SpecError: What decodes the storage chunks is not known.
        """
        assert scale.array is not None
        self._path, self._scale, self._array = path, scale, scale.array
        self._has_shards = '"sharding_indexed"' in scale.array.metadata  # where pieces may be left out
        self._own = threading.local()
        self._opened()

    def decode(self, box: Box, files: dict[str, bytes], *, whole: bool = True) -> NDArray[Any]:
        """Voxels of a box inside the layer, ``(channels, z, y, x)``.

        Args:
            box: The box.
            files: The storage chunks' files, by their names below the layer's address.
            whole: Whether these are all files that the box needs; else the fill value stands for
                the others.

        Raises:
            CorruptFileError: A file is damaged, with its name.
        """
        store, array = self._opened()
        names = [name.removeprefix(self._array.folder) for name in files]
        part = array[self._index(box)]
        try:
            for name, content in zip(names, files.values(), strict=True):
                store[name] = content
            if whole and not self._has_shards:
                self._check_found(part, names)
            voxels = part.read().result()
        except ValueError as error:
            raise _corrupt(files, names, error) from error
        finally:
            for name in names:
                del store[name]
        return self._as_planes(voxels)

    def _check_found(self, part: tensorstore.TensorStore, names: list[str]) -> None:
        """Check that TensorStore takes the files for those it looks for, and fills nothing up."""
        if part.storage_statistics(query_not_stored=True, query_fully_stored=True).result().not_stored:
            raise AssertionError(f"{self._path}: TensorStore looks for other files than {', '.join(names)}")

    def encode(self, chunk: Box, voxels: NDArray[Any]) -> bytes:
        """The file of a storage chunk from all its voxels, ``(channels, z, y, x)``.

        What reaches past the layer is filled up with the fill value.
        """
        store, array = self._opened()
        at = {letter: i for i, letter in enumerate("czyx")}
        letters = self._array.axes
        order = [at[letter] for letter in letters if letter in at]
        missing = [at[letter] for letter in "czyx" if letter not in letters]
        planes = voxels.transpose([*order, *missing]).reshape(
            [voxels.shape[at[letter]] if letter in at else 1 for letter in letters]
        )
        array[self._index(chunk)].write(planes).result()
        name = self._scale.file(chunk).removeprefix(self._array.folder)
        content: bytes = store[name]
        del store[name]
        return content

    def _opened(self) -> tuple[tensorstore.KvStore, tensorstore.TensorStore]:
        """The array in this thread's own memory, with nothing but its metadata."""
        if not hasattr(self._own, "opened"):
            self._own.opened = _open(self._path, self._array)
        opened: tuple[tensorstore.KvStore, tensorstore.TensorStore] = self._own.opened
        return opened

    def _index(self, box: Box) -> tuple[Any, ...]:
        """The box, with all channels, in the order of the array's dimensions."""
        spatial = dict(zip("zyx", box.slices(self._scale.bounds.start), strict=True))
        whole = {"t": slice(0, 1), "c": slice(0, self._scale.channels)}
        return tuple((whole | spatial)[letter] for letter in self._array.axes)

    def _as_planes(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """Voxels as the array has them, as ``(channels, z, y, x)``."""
        letters = self._array.axes
        if "t" in letters:
            voxels = voxels.take(0, axis=letters.index("t"))
        kept = letters.replace("t", "")
        ordered = voxels.transpose([kept.index(letter) for letter in "czyx" if letter in kept])
        for axis, letter in enumerate("czyx"):
            if letter not in kept:
                ordered = np.expand_dims(ordered, axis)
        return np.ascontiguousarray(ordered, self._scale.dtype)


def _corrupt(files: dict[str, bytes], names: list[str], error: Exception) -> CorruptFileError:
    """The error of the file that is damaged, by its names below the layer's address, and in it."""
    for file, name in zip(files, names, strict=True):
        if len(files) == 1 or f'"{name}"' in str(error):
            return CorruptFileError(f"storage chunk {file} ({len(files[file])} bytes): {_told(error)}", file)
    return CorruptFileError(f"a storage chunk: {_told(error)}")


def _open(path: str, array: ZarrArray) -> tuple[tensorstore.KvStore, tensorstore.TensorStore]:
    import tensorstore

    context = tensorstore.Context()
    store = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    store[METADATA[array.driver]] = array.metadata.encode()
    try:
        opened = tensorstore.open(
            {
                "driver": array.driver,
                "kvstore": {"driver": "memory"},
                "store_data_equal_to_fill_value": True,
            },
            context=context,
            open=True,
        ).result()
    except ValueError as error:
        if codec := _CODEC.search(str(error)):
            raise SpecError(
                f"{path}: the layer's storage chunks are encoded by {codec[1]}, which TensorStore does not know. Copy "
                "the layer with another compression: blosc, gzip, zstd or none"
            ) from error
        raise MissingInputError(f"{path}: its metadata can't be understood ({_told(error)})") from error
    return store, opened


def decode_whole(shape: tuple[int, ...], dtype: str, codecs: list[Any], content: bytes) -> NDArray[Any]:
    """The array that some codecs of zarr 3 have encoded; ``ValueError`` if it is damaged."""
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": codecs,
    }
    store, array = _open("", ZarrArray("zarr3", "", "", json.dumps(metadata)))
    store[".".join("0" * len(shape))] = content
    decoded: NDArray[Any] = array.read().result()
    return decoded


def _told(error: Exception) -> str:
    """TensorStore's message, without what it says about itself."""
    text = str(error).partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
    return re.sub(r"^[A-Z_]+: ", "", " ".join(text.split()))
