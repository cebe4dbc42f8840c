"""One process of the service: how it is started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from operators.service import processes
from operators.service.logs import log_tail, open_log
from operators.service.processes import Identity

_QUICK_DEATH_SECONDS = 60.0
_FIRST_BACKOFF_SECONDS = 0.5


class Process(Protocol):
    """A child of this process."""

    pid: int

    def poll(self) -> int | None:
        """The process's exit code if it has ended, negative for a signal, else ``None``."""


@dataclass(slots=True)
class Component:
    """One command, which may be started many times, in a session of its own.

    Ctrl-C in a terminal is for the supervisor, which knows the right order.
    """

    name: str
    begin: Callable[[int], Process]
    """Starts it as a child of this process, with what it prints going to this descriptor."""
    log: Path
    process: Process | None = None
    started: float = 0.0
    """Time of the last start, seconds since the epoch."""
    restart: float = 0.0
    """When to start it (again), on the monotonic clock, if it does not run."""
    unhealthy_since: float = 0.0
    """Since when it has not been seen healthy, on the monotonic clock."""
    healthy: bool = False
    quick_deaths: int = 0
    _begun: float = field(default=0.0, repr=False)
    _offset: int = field(default=0, repr=False)

    def start(self) -> None:
        """Start it."""
        log = open_log(self.log)
        try:
            self._offset = os.fstat(log).st_size
            self.process = self.begin(log)
        finally:
            os.close(log)
        self.started = Identity.of(self.process.pid).created
        self._begun = self.unhealthy_since = time.monotonic()
        self.healthy = False

    def tree(self) -> list[psutil.Process]:
        """The component's living processes."""
        if self.process is None or self.process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return processes.tree(psutil.Process(self.process.pid))
        return []

    def terminable(self) -> list[psutil.Process]:
        """The component's processes that end well at a SIGTERM, and see to their children then.

        The scheduler's children run the tasks; it would wait for them, and they pass the signal on
        to the tasks.
        """
        everything = self.tree()
        if self.name != "scheduler":
            return everything[:1]
        return [
            process for process in everything if self.process and self.process.pid in (process.pid, _parent_id(process))
        ]

    def ended(self) -> int | None:
        """The exit code if it has ended since it was last asked, else ``None``.

        A negative one is the signal that has ended it.
        """
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.process = None
        self.healthy = False
        return code

    def count_death(self) -> None:
        """Decide when to start it again: at once, or later and later while it dies soon."""
        lived = time.monotonic() - self._begun
        self.quick_deaths = self.quick_deaths + 1 if lived < _QUICK_DEATH_SECONDS else 1
        self.restart = time.monotonic() + _FIRST_BACKOFF_SECONDS * 2 ** (self.quick_deaths - 1)

    def tail(self) -> str:
        """The end of what it logged since its last start, with the name of the file."""
        return f"{log_tail(self.log, self._offset)}\n(end of {self.log})"


def trees(components: Sequence[Component]) -> list[psutil.Process]:
    """The living processes of some components."""
    return [process for component in components for process in component.tree()]


def terminable(components: Sequence[Component]) -> list[psutil.Process]:
    """The processes of some components that end well at a SIGTERM."""
    return [process for component in components for process in component.terminable()]


def how_ended(code: int) -> str:
    """How a process ended, in words; a negative exit code is the signal that killed it."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _parent_id(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None
