"""Precomputed layers in the order z, y, x: open, create, read with padding, write aligned.

Arrays are ``(channels, z, y, x)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from time import time
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError, StorageError
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.storage.addresses import FORMATS, layer_format, plain
from chunkflow_core.storage.compression import CorruptFileError, compress, decompress
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.disk import PARTIAL, DiskFiles
from chunkflow_core.storage.files import Files, is_on_disk, open_files, put_file, storage_errors
from chunkflow_core.storage.layer_info import read_scale, scale_of
from chunkflow_core.storage.layer_reader import LayerReader, cloudvolume_slices, open_layer
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.listing.grid import Chunks
from chunkflow_core.storage.presence import Absence, nothing_there
from chunkflow_core.storage.signatures import LayerSignatures, WrittenChunk, signature_number

if TYPE_CHECKING:
    from chunkflow_core.storage.zarr_chunks import ChunkCodec

_CACHE = "public, max-age=3600"
"""What HTTP caches may do with storage chunks.

Those of a layer that is made anew are seen an hour later at the latest.
"""

_FRESH: Final = 600
"""Seconds for which a file may be incomplete since it is still written to."""

NO_PROVENANCE: Final[dict[str, Any]] = {"description": "", "owners": [], "processing": [], "sources": []}
"""CloudVolume's provenance of a layer of which nothing is said."""


class InputLayer:
    """The layer to read; voxels outside ``bounds`` are padded."""

    def __init__(
        self,
        path: str,
        mip: int,
        scale: LayerScale,
        bounds: Box,
        *,
        padding: str,
        fill_missing: bool = False,
        advice: str = "",
    ) -> None:
        """Open the layer; no request is made.

        Args:
            path: Address of the layer.
            mip: Number of the scale.
            scale: What the layer's ``info`` says of the scale, and where the layer is.
            bounds: Part of the scale that is read.
            padding: What stands outside ``bounds``: ``constant`` for zeros, ``edge``, ``reflect``.
            fill_missing: Whether storage chunks that aren't there are zeros.
            advice: What to do about storage chunks that aren't there, for the error's message.

        Raises:
            DataError: The voxels are no numbers.
            SpecError: What decodes the layer's storage chunks is not installed.
        """
        self.path, self.padding, self._advice = scale.address or path, padding, advice
        self._asked, self._mip = path, mip
        self.scale, self.bounds = scale, bounds
        with storage_errors(f"opening {self.path}"):
            self._reader = open_layer(self.path, self.scale, mip, fill_missing=fill_missing)
        kind = np.dtype(self.scale.dtype).kind
        if kind not in "uif":
            raise DataError(f"{self.path}: dtype {self.scale.dtype} is not a number type")

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of a box, ``(channels, z, y, x)``, in the layer's dtype.

        Voxels outside ``bounds`` are padded.

        Raises:
            MissingInputError: A storage chunk isn't there, and ``fill_missing`` is off.
            DataError: A storage chunk is corrupt.
            StorageError: The storage does not answer, or the layer has grown since it was opened,
                or a storage chunk that is corrupt may still be written to.
        """
        maps = self._sources(box)
        source = _hull(maps)
        try:
            with storage_errors(f"reading {self.path} at {source}", missing=self._told):
                data = self._reader.read(source)
        except MissingInputError:
            self.check_unchanged()
            raise
        except DataError as error:
            cause = error.__cause__
            if self._is_fresh(source, cause.name if isinstance(cause, CorruptFileError) else ""):
                raise StorageError(f"{error}. It has just been written, and may not be complete yet") from error
            raise
        for a, indices in enumerate(maps):
            if len(indices) != data.shape[a + 1] or (len(indices) > 1 and indices[0] >= indices[1]):
                data = np.take(data, indices - source.start[a], axis=a + 1)
        if self.padding == "constant" and box not in self.bounds:
            inside = (box & self.bounds).slices(box.start)
            padded = np.zeros_like(data)
            padded[(slice(None), *inside)] = data[(slice(None), *inside)]
            return padded
        return data

    def check_unchanged(self) -> None:
        """Check that the layer's scale is the one that was opened; ``StorageError`` if not.

        Storage chunks at the end of a layer that has grown may have other names.
        """
        now = read_scale(self._asked, self._mip)
        if now != self.scale:
            raise StorageError(
                f"{self._asked} has changed since it was opened: it had {self.scale.bounds}, now {now.bounds}. A retry "
                "reads it as it is now"
            )

    def nothing_in(self, box: Box) -> Absence:
        """What is missing if no storage chunk that is read for a box can be found."""
        return nothing_there(self.path, self.scale, self._mip, self.source(box))

    def _told(self) -> str:
        """What to say about a storage chunk that isn't there."""
        absence = self.nothing_in(self.bounds)
        return absence.text if absence.text and absence.is_sure else self._advice

    def _is_fresh(self, box: Box, name: str) -> bool:
        """Whether a file, or any of a box if it is not known, was written in the last minutes.

        Files on disks only can be read half: CloudVolume writes them in place, and so does rsync
        with some options.
        """
        if not is_on_disk(plain(self.path)):
            return False
        names = [name] if name else (self.scale.file(chunk) for chunk in self.scale.storage_chunks(box))
        return DiskFiles(plain(self.path)).changed_since(names, time() - _FRESH)

    def source(self, box: Box) -> Box:
        """The voxels inside ``bounds`` from which a box is filled."""
        return _hull(self._sources(box))

    def _sources(self, box: Box) -> list[NDArray[np.int64]]:
        return [self._source(a, box.start[a], box.stop[a]) for a in range(3)]

    def _source(self, axis: int, start: int, stop: int) -> NDArray[np.int64]:
        return padded_positions(start, stop, self.bounds.start[axis], self.bounds.stop[axis], self.padding)


def padded_positions(start: int, stop: int, low: int, high: int, padding: str) -> NDArray[np.int64]:
    """Positions inside bounds whose voxels the positions of a range get, along one axis.

    Args:
        start: First position of the range.
        stop: The one after the last.
        low: Start of the bounds.
        high: Stop of the bounds.
        padding: As :class:`InputLayer` has it; with ``constant``, positions outside the bounds have
            the nearest one inside, whose voxels are then replaced.
    """
    positions = np.arange(start, stop) - low
    if padding == "reflect":
        period = max(1, 2 * (high - low - 1))
        positions = np.abs(positions) % period
        return low + np.minimum(positions, period - positions)
    return low + np.clip(positions, 0, high - low - 1)


class OutputLayer:
    """The layer to write: whole storage chunks only.

    What reads or writes raises ``StorageError`` if the storage does not answer, and ``SpecError``
    if it refuses the credentials.
    """

    def __init__(self, path: str, scale: LayerScale, compression: str) -> None:
        """Open the layer; no request is made.

        Args:
            path: Address of the layer.
            scale: What the layer's ``info`` says of its only scale.
            compression: Compression of storage chunks: ``gzip``, ``br``, ``zstd`` or ``none``. That
                of zarr is one of the layer's codecs.
        """
        self.path, self.scale = path, scale
        self._compression = None if compression == "none" or scale.array is not None else compression

    @cached_property
    def _reader(self) -> LayerReader:
        with storage_errors(f"opening {self.path}"):
            return open_layer(self.path, self.scale)

    @cached_property
    def _codec(self) -> ChunkCodec | None:
        """What encodes storage chunks; None if their files hold plain voxels, compressed or not."""
        if self.scale.array is None:
            return None
        from chunkflow_core.storage.zarr_chunks import ChunkCodec  # a second of CPU

        return ChunkCodec(self.path, self.scale)

    @cached_property
    def _chunks(self) -> Chunks:
        return Chunks(self.scale)

    def write(self, box: Box, data: NDArray[Any]) -> dict[str, WrittenChunk]:
        """Write voxels to a box of whole storage chunks.

        CloudVolume 12.15 would write gzip at level 9 always, at a sixth of the speed for 3 % less
        (``bench/io.py``), and files on a disk in place, where a process that is killed leaves half
        of one.

        Args:
            box: A box of whole storage chunks.
            data: ``(channels, z, y, x)``, in the layer's dtype.

        Returns:
            Keys of the storage chunks, with what is known of each.

        Raises:
            StorageError: The storage does not answer.
        """
        written: dict[str, WrittenChunk] = {}
        for chunk in self.expected_chunks(box):
            image = data[(slice(None), *chunk.slices(box.start))]
            voxels = image.tobytes()  # x fastest, channels last: the order of encoding "raw"
            content = compress(voxels, self._compression) if self._codec is None else self._codec.encode(chunk, image)
            name = self.scale.file(chunk)
            said = put_file(plain(self.path), name, content, compression=self._compression, cache=_CACHE)
            written[chunk.key] = WrittenChunk(short_digest(voxels), signature_number(said))
        return written

    def signatures(self) -> LayerSignatures:
        """What the storage says of the layer's storage chunks; nothing is asked yet."""
        return LayerSignatures(self.path, self.scale)

    def read(self, box: Box) -> NDArray[Any]:
        """What is stored in a box, ``(channels, z, y, x)``.

        Raises:
            MissingInputError: A storage chunk isn't there.
            DataError: A storage chunk is corrupt.
            StorageError: The storage does not answer.
        """
        advice = "Its block is not done: `plan` shows what is due, `run` does it"
        with storage_errors(f"reading {self.path} at {box}", missing=advice):
            return self._reader.read(box)

    def stored_chunks(self) -> set[str]:
        """Keys of all storage chunks there are, ``x0-x1_y0-y1_z0-z1``.

        Whatever else lies among them is named as its file is, but not what is in a subfolder of
        files of storage chunks: no reader takes that for one, and somebody may keep it there.
        """
        folder, is_nested = self.scale.folder, self.scale.naming.is_nested
        with storage_errors(f"listing {self.path}"):
            names = (name.removeprefix(folder) for name in layer_files(self.path).list(prefix=folder))
            files = {name for name in names if (is_nested or "/" not in name) and not name.endswith(PARTIAL)}
        return {self._key(name) for name in files}

    def _key(self, name: str) -> str:
        """Key of the storage chunk in a file; the file's name if it is none."""
        place = self._chunks.place(name)
        return name if place is None else self._chunks.key(place)

    def _file(self, key: str) -> str:
        """Name of a storage chunk's file below the layer's address, by its key.

        What else ``stored_chunks`` names is such a file.
        """
        place = self._chunks.place_of(key)
        return self.scale.folder + (key if place is None else self._chunks.name(*place))

    def chunk_at(self, voxel: Vector) -> Box | None:
        """The storage chunk that holds a voxel; None outside the layer."""
        inside = Box(voxel, vector(a + 1 for a in voxel)) & self.scale.bounds
        return next(self.expected_chunks(inside)) if inside else None

    def digest(self, key: str) -> str | None:
        """Digest of a stored storage chunk's voxels, as ``write`` gives it; None if it isn't there.

        Raises:
            DataError: The file can't be decompressed, or there are several.
        """
        name = self._file(key)
        if is_on_disk(plain(self.path)):
            files = DiskFiles(plain(self.path)).files_of(name)
            if len(files) > 1:
                raise DataError(f"there are {' and '.join(files)}: which one is read is up to the reader")
        with storage_errors(f"reading {key} of {self.path}"):
            (answer,) = layer_files(self.path).get([name], raw=True)
        if answer["content"] is None:
            return None
        try:
            content = decompress(answer["content"], answer["compress"])
            if self._codec is not None:
                content = self._codec.decode(Box.from_key(key), {name: content}).tobytes()
            return short_digest(content)
        except CorruptFileError as error:
            raise DataError(str(error)) from error

    def delete_chunks(self, keys: Iterable[str]) -> None:
        """Delete storage chunks, or what else lies among them, by ``stored_chunks``' names."""
        with storage_errors(f"deleting storage chunks of {self.path}"):
            layer_files(self.path).delete([self._file(key) for key in keys])

    def rows(self, box: Box) -> Iterator[Box]:
        """A box of whole storage chunks, cut into rows of storage chunks along x.

        The rows can be written at the same time.
        """
        if box:
            height, (z, y, x), stop = self.scale.chunk[1], box.start, box.stop
            for row in range(y, stop[1], height):
                yield Box((z, row, x), (stop[0], min(row + height, stop[1]), stop[2]))

    def expected_chunks(self, box: Box) -> Iterator[Box]:
        """The storage chunks of a box that is made of whole ones."""
        return self.scale.storage_chunks(box)


def _hull(maps: list[NDArray[np.int64]]) -> Box:
    """The smallest box that holds the positions along each axis."""
    return Box(vector(int(m.min()) for m in maps), vector(int(m.max()) + 1 for m in maps))


def layer_exists(path: str) -> bool:
    """Whether there is a layer at an address.

    An empty ``info`` is none: a machine that crashed while it made the layer may have left it.
    """
    with storage_errors(f"looking for {path}"):
        return bool(layer_files(path).get(_description(path)))


def _description(path: str) -> str:
    """Name of the file by which a layer that is written here is known."""
    return "info" if layer_format(path) == FORMATS[0] else "zarr.json"


def format_beside(path: str) -> str:
    """The file of a layer of another format at an address, by which it is known; empty if none."""
    names = sorted({"info", "zarr.json", ".zgroup", ".zarray", "attributes.json"} - {_description(path)})
    with storage_errors(f"looking for {path}"):
        answers = layer_files(path).get(names)
    return next((answer["path"] for answer in answers if answer["content"]), "")


class NewLayer:
    """A layer that is being made, of one scale."""

    def __init__(
        self,
        path: str,
        shape: Vector,
        *,
        dtype: str,
        resolution: tuple[float, ...],
        chunk: Vector,
        offset: Vector = (0, 0, 0),
        channels: int = 1,
        kind: Literal["image", "segmentation"] = "image",
        provenance: dict[str, Any] | None = None,
        at_once: bool = True,
    ) -> None:
        """Make the layer, or describe one that :meth:`publish` makes.

        Args:
            path: Address of the layer.
            shape: Size in voxels, zyx.
            dtype: Dtype of the voxels.
            resolution: Voxel size in nm, zyx.
            chunk: Storage chunk size in voxels, zyx.
            offset: Position of the first voxel, zyx.
            channels: Number of channels.
            kind: What viewers and whatever makes coarser scales take the voxels for: values, or
                labels, of which there is no mean.
            provenance: Fields of CloudVolume's provenance to set; the others are empty.
            at_once: Whether the layer is there before its voxels are.

        Raises:
            StorageError: The storage does not answer.
        """
        from cloudvolume import CloudVolume

        from chunkflow_core.storage.clients import located

        info = CloudVolume.create_new_info(
            num_channels=channels,
            layer_type=kind,
            data_type=dtype,
            encoding="raw",
            resolution=list(reversed(resolution)),
            voxel_offset=list(reversed(offset)),
            volume_size=list(reversed(shape)),
            chunk_size=list(reversed(chunk)),
        )
        self.path = path
        with storage_errors(f"creating {path}"):
            self._volume = CloudVolume(**located(path), info=info, provenance={}, progress=False)
        self.key: str = info["scales"][0]["key"]
        self._described = {"provenance": NO_PROVENANCE | (provenance or {}), "info": info}
        if at_once:
            self.publish()

    @property
    def scale(self) -> LayerScale:
        """The layer's only scale, also before it is there; ``ValueError`` if no reader takes it."""
        return scale_of(self.path, self._described["info"], 0)

    def publish(self) -> None:
        """Write ``provenance`` and ``info`` of the layer, each in one step.

        ``info`` comes last, since there is a layer from then on. CloudVolume would write it in
        place: killed then, it leaves a part of it, which nobody can open.
        """
        for name, content in self._described.items():
            put_file(plain(self.path), name, json.dumps(content, sort_keys=True, indent=2).encode())

    def write(self, box: Box, data: NDArray[Any]) -> None:
        """Write ``data``, ``(channels, z, y, x)``, to a box of whole storage chunks."""
        with storage_errors(f"writing {self.path} at {box}"):
            self._volume[cloudvolume_slices(box)] = np.ascontiguousarray(data).T


def layer_files(path: str) -> Files:
    """The files of a layer, for what CloudVolume has no call for."""
    return open_files(plain(path))
