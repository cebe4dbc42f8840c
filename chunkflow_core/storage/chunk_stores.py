"""Asks storage what it says of a layer's storage chunks: disks here, S3, GCS and web servers in ``chunk_servers``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.compression import EXTENSIONS
from chunkflow_core.storage.disk import local_path
from chunkflow_core.storage.files import is_on_disk
from chunkflow_core.storage.layer_info import LayerScale

_DISK_THREADS: Final = 4
"""Helps where the disk is in the network; on a local one, more would get into each other's way."""

_EXTENSIONS: Final = tuple(EXTENSIONS)

Column = tuple[int, int]
"""Position (y, x) in the layer's grid of storage chunks."""
Wanted = dict[Column, list[int]]
"""Storage chunks to ask for: their positions in z, by column."""
Found = list[tuple[str, str]]
"""Names and signatures of storage chunks that are there."""

_Item = TypeVar("_Item")


class Chunks:
    """The grid of a scale's storage chunks, and their names."""

    def __init__(self, scale: LayerScale) -> None:
        self._bounds, self._size = scale.bounds, scale.chunk
        self.names = [
            [f"{a}-{min(a + size, stop)}" for a in range(start, stop, size)]
            for start, stop, size in zip(scale.bounds.start, scale.bounds.stop, scale.chunk, strict=True)
        ]
        """Of the ranges of an axis, by position; axes in the order z, y, x."""
        self._positions = [{name: i for i, name in enumerate(names)} for names in self.names]

    def touching(self, box: Box) -> tuple[range, range, range]:
        """Positions of the storage chunks that touch a box, in z, y and x."""
        inside = box & self._bounds
        if not inside:
            return range(0), range(0), range(0)
        z, y, x = (
            range((inside.start[a] - start) // size, (inside.stop[a] - 1 - start) // size + 1)
            for a, (start, size) in enumerate(zip(self._bounds.start, self._size, strict=True))
        )
        return z, y, x

    def name(self, column: Column, z: int) -> str:
        """Of a storage chunk's file."""
        return f"{self.names[2][column[1]]}_{self.names[1][column[0]]}_{self.names[0][z]}"

    def all_names(self, wanted: Wanted) -> list[str]:
        """Names of storage chunks."""
        return [self.name(column, z) for column, zs in wanted.items() for z in zs]

    def place(self, name: str) -> tuple[Column, int] | None:
        """The inverse of ``name``; None if no storage chunk of this scale is called so."""
        try:
            x, y, z = name.split("_")
            return (self._positions[1][y], self._positions[2][x]), self._positions[0][z]
        except (ValueError, KeyError):
            return None


class CannotTell(Exception):
    """A storage chunk is there, but nothing is said of its content."""


class Store(Protocol):
    """Whom to ask for the storage chunks of a scale."""

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of storage chunks that are there, among them all that are wanted."""


class _Disk:
    """A folder on a disk: time of the last change, size and compression of each file."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of those that are there, of the storage chunks that are wanted."""
        names = chunks.all_names(wanted)
        z, y, x = map(len, chunks.names)
        if len(names) * len(_EXTENSIONS) < z * y * x:
            extensions = dict.fromkeys(names, _EXTENSIONS)
        else:
            extensions = dict.fromkeys(names, ())
            self._scan(extensions)
        return in_parallel(self._signatures, batches(list(extensions.items()), 1000), _DISK_THREADS)

    def _scan(self, extensions: dict[str, tuple[str, ...]]) -> None:
        """Note under which extensions files are there."""
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    name, dot, extension = entry.name.partition(".")
                    if name in extensions and dot + extension in _EXTENSIONS:
                        extensions[name] += (dot + extension,)
        except FileNotFoundError:  # no storage chunk has been written yet
            return

    def _signatures(self, batch: list[tuple[str, tuple[str, ...]]]) -> Found:
        found = []
        for name, extensions in batch:
            # which of several a reader takes is up to the reader
            states = [self._state(f"{self._folder}/{name}{e}", e) for e in sorted(extensions)]
            if signature := " ".join(filter(None, states)):
                found.append((name, signature))
        return found

    def _state(self, path: str, extension: str) -> str:
        try:
            status = os.stat(path)  # noqa: PTH116 (a million of them)
        except FileNotFoundError:
            return ""
        return f"{extension} {status.st_mtime_ns} {status.st_size}"


def open_store(path: str, key: str) -> Store | None:
    """Whom to ask for the files ``key/…`` of a layer; None if there are none, or nothing is known of them."""
    if is_on_disk(path):
        return _Disk(str(local_path(path) / key))
    from chunkflow_core.storage.chunk_servers import open_server

    return open_server(path, key)


def in_parallel(ask: Callable[[_Item], Found], items: Iterable[_Item], threads: int) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(ask, items):
            yield from found


def batches(items: list[_Item], size: int) -> Iterator[list[_Item]]:
    return (items[i : i + size] for i in range(0, len(items), size))
