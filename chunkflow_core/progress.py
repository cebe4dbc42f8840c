"""How far long work has come: a bar on a terminal, a line now and then in a pod's log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from chunkflow_core.machine import peak_memory

log = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines of a log."""


@contextmanager
def progress(title: str, total: int, unit: str, every: float = EVERY) -> Iterator[Callable[[], object]]:
    """Tell how far work has come: the function given is to be called after each step.

    It must not be called by two threads at once.

    Args:
        title: What is done.
        total: Number of steps.
        unit: What a step is, in the plural.
        every: Seconds between two lines, where there is no terminal.
    """
    if not sys.stderr.isatty():
        yield Lines(title, total, unit, every).step
        return
    with tqdm(total=total, unit=f" {unit}", desc=title) as bar:
        yield bar.update


class Lines:
    """Logs how far work has come, how fast it goes on, and the most memory so far."""

    def __init__(
        self, title: str, total: int, unit: str, every: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with nothing done.

        Args:
            title: What is done.
            total: Number of steps.
            unit: What a step is, in the plural.
            every: Seconds between two lines.
            now: A clock, in seconds.
        """
        self._title, self._total, self._unit, self._every, self._now = title, total, unit, every, now
        self._done, self._told, self._when = 0, 0, now()

    def step(self) -> None:
        """Count one more step as done, and log a line if one is due."""
        self._done += 1
        passed = self._now() - self._when
        if passed < self._every:
            return
        rate, share = (self._done - self._told) / passed, 100 * self._done // self._total
        log.info(
            "%s: %d of %d %s (%d %%), %.3g/s, some %d s to go, peak memory %.2f GiB",
            self._title,
            self._done,
            self._total,
            self._unit,
            share,
            rate,
            (self._total - self._done) / rate,
            peak_memory() / 2**30,
        )
        self._told, self._when = self._done, self._when + passed
