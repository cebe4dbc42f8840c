"""What a disk says of a layer's storage chunks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Final

from chunkflow_core.storage.compression import EXTENSIONS
from chunkflow_core.storage.disk import PARTIAL, file_signature, files_below, plain_name, scan
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

    def __init__(self, folder: str, *, is_nested: bool = False) -> None:
        """Name the folder, and say whether files are in folders below; nothing is looked at yet."""
        self._folder, self._is_nested = folder, is_nested

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of those storage chunks that are wanted and there."""
        names = chunks.all_names(wanted)
        z, y, x = map(len, chunks.ranges)
        if self._is_nested or len(names) * len(_EXTENSIONS) < z * y * x:
            extensions = dict.fromkeys(names, _EXTENSIONS)
        else:
            extensions = dict.fromkeys(names, ())
            self._scan(extensions)
        return in_parallel(self._signatures, batches(list(extensions.items()), 1000), _DISK_THREADS)

    def everything(self) -> Iterator[tuple[str, str]]:
        """Names and signatures of all files, without those that are being written.

        A name comes twice if it is there in two compressions.
        """
        files = (name for name in self._files() if not name.endswith(PARTIAL))
        while batch := [self._split(name) for name in islice(files, _LISTED)]:  # there may be millions
            yield from in_parallel(self._signatures, batches(batch, 1000), _DISK_THREADS)

    def names(self) -> Iterator[str]:
        """Names as ``everything`` has them, each read when it is needed."""
        return map(plain_name, self._files())

    def holds(self, names: list[str]) -> bool:
        """Whether there is any file of some names that is not empty."""
        return any(_size(f"{self._folder}/{name}{extension}") > 0 for name in names for extension in _EXTENSIONS)

    def _files(self) -> Iterator[str]:
        """Files in the folder, and below it if that is where the layer's are."""
        if self._is_nested:
            return files_below(self._folder)
        return (entry.name for entry in scan(self._folder) if not entry.is_dir())

    @staticmethod
    def _split(file: str) -> tuple[str, tuple[str, ...]]:
        name = plain_name(file)
        return name, (file[len(name) :],)

    def _scan(self, extensions: dict[str, tuple[str, ...]]) -> None:
        """Note the extensions under which files are there."""
        for entry in scan(self._folder):
            name, found = self._split(entry.name)
            if name in extensions:
                extensions[name] += found

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
