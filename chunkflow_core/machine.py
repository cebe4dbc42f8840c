"""The machine that this process runs on: how many CPUs it may use, and its memory."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path

CPUS_VARIABLE = "CHUNKFLOW_CPUS"
"""Environment variable by which whoever starts several processes shares the CPUs among them."""

_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's malloc, from its malloc.h."""


def available_cpus() -> int:
    """Number of CPUs that this process may use, at least 1.

    It is what the environment variable says, else what affinity and the limit of the container
    allow.
    """
    with suppress(KeyError, ValueError):
        return max(1, int(os.environ[CPUS_VARIABLE]))
    cpus = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    with suppress(OSError):  # Linux's rusage counts the memory of the process that started this one too
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def share_one_heap() -> None:
    """Have all threads allocate from one heap; to be called by a program, before its threads start.

    By itself glibc gives each thread its own, and what one frees is lost to the others: a block's
    process would hold up to a tenth more than ``plan`` says. Arrays are few and large, so that
    waiting for the heap's lock does not show.
    """
    set_glibc(_M_ARENA_MAX, 1)


def keep_large_arrays() -> None:
    """Have the memory of large arrays kept for the next ones.

    By itself glibc returns each array over 32 MB to the kernel and asks for it again, page by page:
    with PyTorch on CPUs, large activations at each layer of each patch, which can take a third of
    the time (``bench/memory.py``).
    """
    set_glibc(_M_MMAP_MAX, 0)
    set_glibc(_M_TRIM_THRESHOLD, 1 << 30)


def set_glibc(parameter: int, value: int) -> None:
    """Change a parameter of glibc's malloc; elsewhere do nothing.

    It wins over the parameter's environment variable. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
