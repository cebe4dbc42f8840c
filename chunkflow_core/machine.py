"""The machine that this process runs on: how many CPUs it may use, and its memory."""

from __future__ import annotations

import ctypes
import getpass
import os
import resource
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

CPUS_VARIABLE = "CHUNKFLOW_CPUS"
"""Environment variable by which whoever starts several processes shares the CPUs among them."""

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MACHINE, _BOOT = Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = Path("/proc/self/ns/pid")
_SAME_START = 2.0
"""Seconds by which the time when a process began may seem to differ, as the clock is set."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's malloc, from its malloc.h."""


def user() -> str:
    """Who runs this process: a name, or a number in containers that have no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def this_process() -> dict[str, Any]:
    """What tells this process from all others, on this machine and on others, as JSON takes it."""
    import psutil  # which takes 20 ms

    return {**_machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def has_ended(process: dict[str, Any]) -> bool:
    """Whether a process has ended, as far as it can be told: False for those of other machines.

    Args:
        process: What :func:`this_process` has given there.
    """
    import psutil

    here = _machine()
    same_machine = here["machine"] and all(process.get(key) == here[key] for key in ("host", "machine"))
    if same_machine and here["boot"] and process.get("boot", here["boot"]) != here["boot"]:
        return True  # it has been started again since
    if any(process.get(key) != value for key, value in here.items()):
        return False
    try:
        started: float = psutil.Process(process["pid"]).create_time()
    except psutil.NoSuchProcess:
        return True
    return bool(abs(started - process["started"]) > _SAME_START)


def _machine() -> dict[str, str]:
    """Where a process number is valid: this machine, since it was started, and this container.

    Empty texts are of what is not known here.
    """
    found = {"host": socket.gethostname(), "machine": "", "boot": "", "processes": ""}
    with suppress(OSError):
        found["machine"] = _MACHINE.read_text().strip()
    with suppress(OSError):
        found |= {"boot": _BOOT.read_text().strip(), "processes": str(_PROCESSES.stat().st_ino)}
    return found


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
