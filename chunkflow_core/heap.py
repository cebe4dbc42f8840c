"""How glibc keeps the memory that this process has freed; elsewhere these functions do nothing. Source: mallopt(3)."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Of glibc's malloc.h."""


def share_one_heap() -> None:
    """Have all threads allocate from one heap; to be called by a program, before its threads start.

    By itself glibc gives each thread its own, and what one frees is lost to the others: a block's process would hold up
    to a tenth more than ``plan`` says. Arrays are few and large, so that waiting for the heap's lock does not show.
    """
    set_glibc(_M_ARENA_MAX, 1)


def keep_large_arrays() -> None:
    """Have the memory of large arrays kept for the next ones.

    By itself glibc returns each array over 32 MB to the kernel and asks for it again, page by page: with PyTorch on CPUs,
    large activations at each layer of each patch, which can take a third of the time (``bench/memory.py``).
    """
    set_glibc(_M_MMAP_MAX, 0)
    set_glibc(_M_TRIM_THRESHOLD, 1 << 30)


def set_glibc(parameter: int, value: int) -> None:
    """Set a parameter of glibc's malloc, which wins over its environment variable."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
