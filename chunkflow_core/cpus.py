"""How many CPUs this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CPUS_VARIABLE = "CHUNKFLOW_CPUS"
"""Environment variable by which whoever starts several processes shares the CPUs out among them."""

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cpus() -> int:
    """CPUs of this process: what the environment variable says, else its affinity and the limit of its container."""
    with suppress(KeyError, ValueError):
        return max(1, int(os.environ[CPUS_VARIABLE]))
    cpus = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus)
