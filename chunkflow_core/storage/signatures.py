"""Whether what a block has read or written may have changed, without reading voxels.

What the storage says of its storage chunks is enough to tell.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.disk import local_path
from chunkflow_core.storage.files import is_on_disk, storage_errors
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.listing.disk import Disk
from chunkflow_core.storage.listing.grid import VERSION, CannotTell, Chunks, Column, Store, Wanted

_UNKNOWN, ABSENT = 0, 1


class WrittenChunk(NamedTuple):
    """What is known of a storage chunk that was written."""

    voxels: str
    """Digest of its voxels."""
    stored: int
    """What storage said of its file when it was written: see ``signature_number``."""


class LayerSignatures:
    """What the storage says of a layer's storage chunks, without reading them."""

    def __init__(self, path: str, scale: LayerScale, *, versions: bool = False) -> None:
        """Name the storage chunks of one scale of a layer; nothing is asked yet.

        Args:
            path: Address of the layer.
            scale: The scale.
            versions: Whether to remember what :meth:`version` takes, which needs more memory.
        """
        self.path = plain(path)
        self._versions: dict[tuple[Column, int], str] | None = {} if versions else None
        self._chunks = Chunks(scale)
        self._meaning = f"{scale.meaning} {scale.encoding} {scale.chunk}"
        self._columns: dict[Column, array[int]] = {}
        with storage_errors(f"opening {self.path}"):
            self._store = open_store(self.path, scale) if scale.has_own_files else None

    def load(self, boxes: Iterable[Box]) -> None:
        """Ask the storage for all storage chunks that touch some boxes, and remember the answers.

        Boxes may overlap and extend past the layer. For many blocks this is by far faster than a
        ``digest`` of each: whole rows and columns are listed, at the same time.

        Raises:
            SpecError: The storage refuses the credentials, or finds none.
            StorageError: The storage does not answer.
        """
        if self._store is None:
            return
        wanted = self._unknown(boxes)
        try:
            with storage_errors(f"asking {self.path} which storage chunks there are"):
                for name, signature in self._store.ask(self._chunks, wanted):
                    place = self._chunks.place(name)
                    if place is not None and place[0] in self._columns:
                        self._columns[place[0]][place[1]] = signature_number(signature)
                        if self._versions is not None:
                            self._versions[place] = signature
        except CannotTell:
            self._store = None
            return
        for column, zs in wanted.items():
            numbers = self._columns[column]
            for z in zs:
                numbers[z] = numbers[z] or ABSENT

    def load_all(self) -> list[str]:
        """Ask the storage for all storage chunks of the layer by one listing.

        Returns:
            Names of what lies among them and is none of them. What is in a subfolder is left out:
            no reader takes that for a storage chunk, and somebody may keep it there.

        Raises:
            SpecError: The storage refuses the credentials, finds none, or has no listing.
            StorageError: The storage does not answer.
        """
        if self._store is None:
            raise SpecError(f"{self.path}: storage of this kind can't be listed")
        strays: list[str] = []
        _, height, width = map(len, self._chunks.ranges)
        self._columns = {column: self._unknown_column() for column in product(range(height), range(width))}
        twice = defaultdict[Column, list[int]](list)
        with storage_errors(f"listing {self.path}"):
            for name, signature in self._store.everything():
                place = self._chunks.place(name)
                if place is None:
                    strays.append(name)
                elif self._columns[place[0]][place[1]] != _UNKNOWN:
                    twice[place[0]].append(place[1])
                else:
                    self._columns[place[0]][place[1]] = signature_number(signature)
            for name, signature in self._store.ask(self._chunks, twice) if twice else ():
                self._note(self._chunks.place(name), signature_number(signature))
        for numbers in self._columns.values():
            for z in [z for z, number in enumerate(numbers) if number == _UNKNOWN]:
                numbers[z] = ABSENT
        return strays

    def note(self, key: str, number: int) -> None:
        """Remember a storage chunk's ``signature_number`` as the storage's answer."""
        self._note(self._chunks.place_of(key), number)

    def _note(self, place: tuple[Column, int] | None, number: int) -> None:
        if place is not None:
            column = self._columns.setdefault(place[0], self._unknown_column())
            column[place[1]] = number

    def number(self, key: str) -> int:
        """The ``signature_number`` of a storage chunk that has been loaded.

        It is 0 if the storage can't tell, and 1 if the storage chunk isn't there.
        """
        column, z = self._chunks.place_of(key) or ((0, 0), 0)
        return self._columns[column][z] if self._store is not None else _UNKNOWN

    def exists(self, key: str) -> bool:
        """Whether a storage chunk that has been loaded is there."""
        return self.number(key) != ABSENT

    def digest(self, box: Box) -> str:
        """Hash of names and signatures of the storage chunks that touch a box; "" if unknown.

        What the layer's info says of the voxels' meaning is part of it: dtype, channels, encoding,
        voxel size and storage chunk size. What is not loaded yet is loaded. A storage chunk that
        isn't there counts as such. The hash is the same whichever way the storage was asked, and
        when other parts of the layer change or are added. It is unknown if the storage can't tell.
        """
        zs, ys, xs = self._chunks.touching(box)
        if self._store is not None and not self._is_known(zs, product(ys, xs)):
            self.load([box])
        if self._store is None:
            return ""
        names_z, names_y, names_x = self._chunks.ranges
        content = hashlib.sha256(" ".join([self._meaning, *names_z[zs.start : zs.stop]]).encode())
        for y, x in product(ys, xs):
            content.update(f" {names_x[x]}_{names_y[y]} ".encode())
            content.update(self._columns[y, x][zs.start : zs.stop])
        return short_digest(content.digest())

    def version(self, box: Box) -> str:
        """Hash of which writes have made the storage chunks that touch a box; "" if unknown.

        Other than a ``digest``, it is never again what it was, as far as storage tells one write
        from the next: by time or generation, besides the content.
        """
        signature = self.digest(box)
        if not signature or self._versions is None:
            return ""
        zs, ys, xs = self._chunks.touching(box)
        said = [self._versions.get(((y, x), z), "") for y, x, z in product(ys, xs, zs)]
        return short_digest("\n".join([signature, *said]).encode())

    def _is_known(self, zs: range, columns: Iterable[Column]) -> bool:
        known = (self._columns.get(column) for column in columns)
        return all(numbers is not None and _UNKNOWN not in numbers[zs.start : zs.stop] for numbers in known)

    def _unknown(self, boxes: Iterable[Box]) -> Wanted:
        """The storage chunks that touch boxes and have not been asked for.

        Room is made for their answers.
        """
        marks: dict[Column, bytearray] = defaultdict(lambda: bytearray(len(self._chunks.ranges[0])))
        for box in boxes:
            zs, ys, xs = self._chunks.touching(box)
            marked = b"\1" * len(zs)
            for column in product(ys, xs):
                marks[column][zs.start : zs.stop] = marked
        wanted = {}
        for column, mark in marks.items():
            numbers = self._columns.setdefault(column, self._unknown_column())
            if zs_of_column := [z for z, marked_z in enumerate(mark) if marked_z and numbers[z] == _UNKNOWN]:
                wanted[column] = zs_of_column
        return wanted

    def _unknown_column(self) -> array[int]:
        return array("Q", bytes(8 * len(self._chunks.ranges[0])))


def open_store(path: str, scale: LayerScale) -> Store | None:
    """The storage to ask for the files of a scale; None if it can't be asked for them."""
    if is_on_disk(path):
        return Disk(str(local_path(path) / scale.key), is_nested=scale.naming.is_nested)
    from chunkflow_core.storage.listing.servers import open_server

    return open_server(path, scale.key, is_nested=scale.naming.is_nested)


def signature_number(signature: str) -> int:
    """64 bits of a hash of what a storage says of a storage chunk; 0 if it says nothing.

    What it says of a single write, after ``VERSION``, is left out.
    """
    if not signature:
        return _UNKNOWN
    content = signature.partition(VERSION)[0]
    number = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little")
    return max(number, ABSENT + 1)
