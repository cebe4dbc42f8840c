"""The processes in which rows run, so that no program's settings reach another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from bench.common import error_text, timed
from bench.compare.data import Setting
from bench.compare.rows import ROWS
from bench.compare.rows.base import Row

INSTALL = "pip install -r bench/requirements.txt"

Timing = dict[str, float]

_row: Row
"""The row of this process."""


@dataclass
class Process:
    """A process, that of a row or an empty one, and what was measured of it."""

    name: str
    """Name of the row."""
    pool: ProcessPoolExecutor
    error: str = ""
    """The first error, in a line; from then on nothing more is asked of the process."""
    parallelism: str = ""
    """How the row runs, in a few words."""
    patches: int = 0
    """How many patches the row has run in the volume."""
    peak_memory: int = 0
    """Largest resident memory in bytes."""
    device_memory: int = 0
    """Most bytes of tensors on a GPU."""
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    """Seconds of wall clock and CPU of each round, by the row's method."""

    @classmethod
    def start(cls, setting: Setting, name: str) -> Process:
        """Start the process of a row; one without a row if ``name`` is none's."""
        context = get_context("spawn")
        return cls(name, ProcessPoolExecutor(1, context, initializer=_start, initargs=(setting, name)))

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function there; give its result, or None after an error, which is kept."""
        if self.error:
            return None
        try:
            return self.pool.submit(function, *arguments).result()
        except ImportError as error:
            self.error = f"{error}; {INSTALL}"
        except Exception as error:  # the other rows go on
            self.error = error_text(error)
        return None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the row; give its result, or None after an error, which is kept."""
        return self.ask(_call, method, *arguments)

    def measure(self, method: str, *arguments: Any) -> None:
        """Call a method of the row and keep its timing.

        What the method gives, if anything, is the number of patches that were run.
        """
        answer = self.ask(_time, method, *arguments)
        if answer is not None:
            timing, patches = answer
            self.timings.setdefault(method, []).append(timing)
            self.patches = patches or self.patches

    def seconds(self, method: str) -> list[float]:
        """Give the wall seconds that a method took in each round."""
        return [timing["seconds"] for timing in self.timings.get(method, [])]

    def cpu_seconds(self, method: str) -> list[float]:
        """Give the CPU seconds that a method took in each round."""
        return [timing["cpu_seconds"] for timing in self.timings.get(method, [])]


def _start(setting: Setting, name: str) -> None:
    global _row
    warnings.simplefilter("ignore")
    if setting.device == "cpu":  # chunkflow would take a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cpus = sorted(os.sched_getaffinity(0))
    if setting.threads < len(cpus):
        os.sched_setaffinity(0, cpus[: setting.threads])
    if name in ROWS:
        _row = ROWS[name].make(setting, name)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_row, method)(*arguments)


def _time(method: str, *arguments: Any) -> tuple[Timing, Any]:
    wall, cpu, result = timed(lambda: _call(method, *arguments))
    return {"seconds": wall, "cpu_seconds": cpu}, result
