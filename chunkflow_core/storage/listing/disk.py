"""What a disk says of a layer's storage chunks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Final

from chunkflow_core.storage.compression import EXTENSIONS
from chunkflow_core.storage.disk import PARTIAL, file_signature, plain_name
from chunkflow_core.storage.listing.grid import Chunks, Found, Wanted, batches, in_parallel

_DISK_THREADS: Final = 4
"""Threads that ask a disk. They help where it is in the network.

On a local disk, more would get into each other's way.
"""

_LISTED: Final = 100_000
"""Number of files that are asked for before the next are listed."""

_EXTENSIONS: Final = tuple(EXTENSIONS)


class Disk:
    """A folder on a disk: time of the last change, size and compression of each file."""

    def __init__(self, folder: str) -> None:
        """Name the folder; nothing is looked at yet."""
        self._folder = folder

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of those storage chunks that are wanted and there."""
        names = chunks.all_names(wanted)
        z, y, x = map(len, chunks.names)
        if len(names) * len(_EXTENSIONS) < z * y * x:
            extensions = dict.fromkeys(names, _EXTENSIONS)
        else:
            extensions = dict.fromkeys(names, ())
            self._scan(extensions)
        return in_parallel(self._signatures, batches(list(extensions.items()), 1000), _DISK_THREADS)

    def everything(self) -> Iterator[tuple[str, str]]:
        """Names and signatures of all files, without those that are being written.

        A name comes twice if it is there in two compressions.
        """
        try:
            entries = os.scandir(self._folder)
        except FileNotFoundError:
            return
        with entries:
            files = (entry.name for entry in entries if not entry.name.endswith(PARTIAL) and not entry.is_dir())
            while batch := [self._split(name) for name in islice(files, _LISTED)]:  # there may be millions
                yield from in_parallel(self._signatures, batches(batch, 1000), _DISK_THREADS)

    def names(self) -> Iterator[str]:
        """Names as ``everything`` has them, each read when it is needed."""
        try:
            entries = os.scandir(self._folder)
        except FileNotFoundError:
            return
        with entries:
            yield from (plain_name(entry.name) for entry in entries if not entry.is_dir())

    def holds(self, names: list[str]) -> bool:
        """Whether there is any file of some names that is not empty."""
        return any(_size(f"{self._folder}/{name}{extension}") > 0 for name in names for extension in _EXTENSIONS)

    @staticmethod
    def _split(file: str) -> tuple[str, tuple[str, ...]]:
        name = plain_name(file)
        return name, (file[len(name) :],)

    def _scan(self, extensions: dict[str, tuple[str, ...]]) -> None:
        """Note the extensions under which files are there."""
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
        return file_signature(status, extension)


def _size(path: str) -> int:
    """Size of a file in bytes; 0 if it isn't there."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 (as above)
    except (FileNotFoundError, NotADirectoryError):
        return 0
