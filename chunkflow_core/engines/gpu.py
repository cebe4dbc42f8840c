"""One GPU of the machine for each process."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import suppress
from functools import cache
from itertools import count as numbers
from pathlib import Path

_held: list[int] = []
"""Descriptors of the locked files: open, and so locked, until the process ends, however it ends."""


def claim(count: int, folder: str | Path | None = None) -> int:
    """Index of the GPU that this process is to use: the one that the fewest processes use yet.

    It is the same at each call. Processes of one machine agree by locks on files
    ``chunkflow-gpu-INDEX-K``, tried breadth first: the first place on each GPU, then the second. A
    process that ends, also one that is killed, frees its place.

    Args:
        count: Number of GPUs that this process sees.
        folder: Folder of the files, the same for all processes that share the GPUs. Default: the
            one for temporary files.
    """
    return _claimed(os.getpid(), count, Path(folder or tempfile.gettempdir()))


@cache
def _claimed(_process: int, count: int, folder: Path) -> int:
    for place in numbers():
        for index in range(count):
            if _lock(folder / f"chunkflow-gpu-{index}-{place}"):
                return index
    raise AssertionError("unreachable: the places are endless")


def _lock(path: Path) -> bool:
    """Lock a file for this process, and return whether it is locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    except PermissionError:  # made by another user; in a folder for all, it may only be opened without O_CREAT
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:  # nor that: whether it is free can't be told
            return False
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held.append(descriptor)
        return True
    os.close(descriptor)
    return False
