"""What a power loss can take from a disk, and how that is ruled out.

POSIX keeps a file's contents once the file has been synced, and a name, new or deleted, once its
folder has. Until then the one may be there without the other, in any order. A sync takes
milliseconds, so that files which nothing speaks of yet are noted and synced together, before
anything speaks of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Final, TypeVar

_THREADS: Final = 16
"""Threads that sync, delete or measure many files.

A disk may be in the network, and one that is not writes what several threads sync in one go.
"""

_SHORT: Final = 1e-3
"""Seconds for which no thread is started."""

_CANNOT_SYNC: Final = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)
"""What some network and FUSE file systems answer that have no sync for folders."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Unsynced:
    """The files that this process has written and not yet synced."""

    def __init__(self) -> None:
        self._changing, self._syncing = Lock(), Lock()
        self._files: dict[Path, object] = {}
        """Files, each with something that is another one when the file is written again."""
        self._failed: dict[Path, OSError] = {}

    def add(self, file: Path) -> None:
        with self._changing:
            self._files[file] = object()
            self._failed.pop(file, None)

    def sync(self) -> None:
        with self._syncing:  # another thread may be syncing what this one waits for
            with self._changing:
                found = dict(self._files)
            errors = dict(zip(found, each(_error_of_syncing, list(found)), strict=True))
            with self._changing:
                same = {file for file, written in found.items() if self._files.get(file) is written}
                # Another try may succeed although contents are lost: only writing it again helps.
                self._failed |= {file: error for file, error in errors.items() if error and file in same}
                failed = list(self._failed.values())
            if failed:
                raise failed[0]
            sync_folders({file.parent for file in found})
            with self._changing:
                self._files = {file: written for file, written in self._files.items() if found.get(file) is not written}


_UNSYNCED = _Unsynced()
_LASTING: set[Path] = set()
"""Folders whose names, and those of all folders above them, are known to stay."""


def sync_later(file: Path) -> None:
    """Note that a file has been written: the next ``sync_written`` syncs it and its folder."""
    _UNSYNCED.add(file)


def sync_written() -> None:
    """Sync all files that this process has noted by ``sync_later``, and their folders.

    Those that have been deleted since are passed over.

    Raises:
        OSError: A file can't be synced. So it is raised again until the file is written again.
    """
    _UNSYNCED.sync()


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are not there; their names will stay.

    Another process may have made them a moment ago, and not have synced yet what is above them. So
    all on the file system are synced once a process.
    """
    if folder.is_dir() and folder in _LASTING:
        return
    _LASTING.discard(folder)  # it may have been deleted: for other threads, before it is there again
    folder.mkdir(parents=True, exist_ok=True)
    real = folder.resolve()
    device = real.stat().st_dev
    sync_folders(above for above in real.parents if above.stat().st_dev == device)
    _LASTING.add(folder)


def sync_folders(folders: Iterable[Path]) -> None:
    """Sync the names in some folders; those that are not there are passed over."""
    each(_sync_folder, list(folders))


def each(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """What a function gives for each item, in their order.

    Items that take long are done in several threads, each of which has a share of them. In memory,
    a file takes less than a thread would take to start.
    """
    begun, found = perf_counter(), list[_Result]()
    while len(found) < len(items) and perf_counter() - begun < _SHORT:
        found.append(function(items[len(found)]))
    left = items[len(found) :]
    if not left:
        return found
    shares = min(_THREADS, len(left))
    with ThreadPoolExecutor(shares) as pool:
        parts = list(pool.map(lambda share: [function(item) for item in left[share::shares]], range(shares)))
    return found + [parts[i % shares][i // shares] for i in range(len(left))]


def _sync_folder(folder: Path) -> None:
    # What may not be read is somebody else's, and not made here.
    with suppress(FileNotFoundError, PermissionError):
        try:
            _sync(folder)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise


def _error_of_syncing(file: Path) -> OSError | None:
    try:
        _sync(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
