"""Asks the kernel which files this process opens, by whatever library.

Python's audit events tell only of files that Python opens. Libraries such as HDF5's, or PyTorch
for TorchScript, open theirs themselves. Linux (5.13 and later) tells a process of the files that
it opens in folders that it has marked (fanotify). Where the kernel or a container forbids that,
nothing is told.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

_INIT: Final = 0x1 | 0x2 | 0x400 | 0x800
"""FAN_CLOEXEC, FAN_NONBLOCK, FAN_REPORT_DIR_FID, FAN_REPORT_NAME."""
_MARK: Final = 0x1 | 0x8
"""FAN_MARK_ADD, FAN_MARK_ONLYDIR."""
_MASK: Final = 0x20 | 0x08000000
"""FAN_OPEN, FAN_EVENT_ON_CHILD."""
_HERE: Final = -100
"""AT_FDCWD."""
_EVENT: Final = struct.Struct("=IBBHQii")
"""Length, version, reserved, length of this part, mask, descriptor, process."""
_RECORD: Final = struct.Struct("=BBH8sIi")
"""Type, padding, length, file system, length of the folder's handle, its type."""
_FOLDER_AND_NAME: Final = 2
_LONGEST_HANDLE: Final = 128

_MOST_FOLDERS, _MOST_ENTRIES = 256, 20_000
"""How many folders are marked, and how many entries are looked at for further ones."""


class NativeOpens:
    """Files that this process has opened in some folders, and below, since this was made."""

    def __init__(self, folders: Collection[Path]) -> None:
        """Begin, as far as the kernel allows it."""
        self._library = ctypes.CDLL(None, use_errno=True)
        self._folders: dict[bytes, str] = {}
        self._descriptor = self._begin()
        for folder in _with_inner(folders) if self._descriptor >= 0 else ():
            self._add(os.fsencode(folder))

    @property
    def is_told(self) -> bool:
        """Whether the kernel tells of any folder."""
        return bool(self._folders)

    def taken(self) -> list[str]:
        """Paths of the files that have been opened since the last call; each time one was."""
        found: list[str] = []
        while self._descriptor >= 0:
            try:
                data = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                break
            found += self._named(data)
        return found

    def close(self) -> None:
        """End it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _begin(self) -> int:
        try:
            return int(self._library.fanotify_init(_INIT, os.O_RDONLY))
        except AttributeError:  # not Linux
            return -1

    def _add(self, folder: bytes) -> None:
        handle = ctypes.create_string_buffer(8 + _LONGEST_HANDLE)
        struct.pack_into("=I", handle, 0, _LONGEST_HANDLE)
        mount = ctypes.c_int()
        if self._library.name_to_handle_at(_HERE, folder, handle, ctypes.byref(mount), 0):
            return
        marked = self._library.fanotify_mark(
            self._descriptor, _MARK, ctypes.c_uint64(_MASK), _HERE, ctypes.c_char_p(folder)
        )
        if marked == 0:
            (length,) = struct.unpack_from("=I", handle)
            self._folders[handle.raw[4 : 8 + length]] = os.fsdecode(folder)

    def _named(self, data: bytes) -> Iterator[str]:
        """The paths in events that the kernel has told."""
        at = 0
        while at < len(data):
            length, _, _, head, _, _, process = _EVENT.unpack_from(data, at)
            if process == os.getpid() and head + _RECORD.size <= length:
                kind, _, size, _, handle, _ = _RECORD.unpack_from(data, at + head)
                start = at + head + _RECORD.size - 4
                name = data[start + 4 + handle : at + head + size].partition(b"\0")[0]
                folder = self._folders.get(data[start : start + 4 + handle])
                if kind == _FOLDER_AND_NAME and folder is not None:
                    yield os.path.join(folder, os.fsdecode(name))  # noqa: PTH118
            at += length


def _with_inner(folders: Collection[Path]) -> list[str]:
    """Folders and those below them, the upper ones first, as far as there are not too many."""
    found: dict[str, None] = {}
    todo = deque(str(folder.resolve()) for folder in folders)
    entries = 0
    while todo and len(found) < _MOST_FOLDERS and entries < _MOST_ENTRIES:
        folder = todo.popleft()
        if folder in found:
            continue
        found[folder] = None
        try:
            for entry in os.scandir(folder):
                entries += 1
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith((".", "__pycache__")):
                    todo.append(entry.path)
        except OSError:  # which nobody may look into
            continue
    return list(found)
