"""Processes as a supervisor sees them: who is alive, who died, and how a whole tree ends.

Everything waits for a condition with a deadline; times are in seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import psutil

# psutil derives creation times from the boot time, which moves when the clock is adjusted.
_SAME_TIME_SECONDS = 2.0
_POLL_SECONDS = 0.05
# What SIGKILL leaves after this long hangs in the kernel (a dead network file system): nothing can
# be done about it.
_KILL_SECONDS = 10.0
_DESCRIPTION_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, told by its creation time from others that get the same id later."""

    pid: int
    created: float
    """Creation time, in seconds since the epoch."""

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The identity of the process that has this id now. Raises ``psutil.NoSuchProcess``."""
        return cls(pid, psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        """The process if it is alive (a zombie is not), else ``None``."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) > _SAME_TIME_SECONDS or not is_alive(process):
                return None
        except psutil.NoSuchProcess:
            return None
        return process

    @property
    def alive(self) -> bool:
        """Whether the process is alive."""
        return self.process() is not None


def is_alive(process: psutil.Process) -> bool:
    """Whether the process is still there and not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], timeout: float, poll: float = _POLL_SECONDS) -> bool:
    """Wait until ``condition()`` holds; whether it did within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll)
    return True


def reap(keep: Collection[int] = ()) -> None:
    """Collect the exit statuses of dead children, up to the first one in ``keep``.

    Its own keeper collects that one's.

    Needed by a process that adopts orphans: nobody else would collect theirs.
    """
    if not hasattr(os, "waitid"):
        return
    with contextlib.suppress(ChildProcessError):
        while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if dead.si_pid in keep:
                return
            os.waitpid(dead.si_pid, os.WNOHANG)


def tree(root: psutil.Process) -> list[psutil.Process]:
    """The process and all that descend from it, as far as they are alive."""
    try:
        return [process for process in (root, *root.children(recursive=True)) if is_alive(process)]
    except psutil.NoSuchProcess:
        return []


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """This user's living processes that were started with this environment variable.

    This process is not among them.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == value and process.pid != os.getpid() and is_alive(process):
                found.append(process)
    return found


def describe(process: psutil.Process) -> str:
    """A short text for people: id and command line."""
    try:
        text = " ".join(process.cmdline()).strip() or process.name()
    except psutil.Error:
        text = "?"
    return f"{process.pid} ({textwrap.shorten(text, _DESCRIPTION_LENGTH)})"


def send(processes: Iterable[psutil.Process], signal_number: signal.Signals) -> None:
    """Send a signal to each process that is still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(signal_number)


def end(
    find: Callable[[], list[psutil.Process]],
    grace: float,
    ask: Callable[[], list[psutil.Process]] | None = None,
    keep: Collection[int] | None = None,
    tell: Callable[[str], None] | None = None,
) -> bool:
    """End what ``find()`` finds: SIGTERM, and SIGKILL to what is left after ``grace`` seconds.

    ``find`` is asked again and again, so that processes which appear meanwhile don't get away;
    those that were found before are followed even when they lost the parent by which they were
    found. SIGTERM goes to what ``ask()`` finds, for those that end their children themselves; to
    all by default, to none with ``list``. A process that adopts orphans gives ``keep``, for
    :func:`reap`; others must not, because it would take exit statuses that somebody else waits for.
    ``tell`` gets a line about what has to be killed. Whether nothing is left at the end.
    """
    known: dict[int, psutil.Process] = {}

    def remaining() -> list[psutil.Process]:
        if keep is not None:
            reap(keep)
        known.update((process.pid, process) for process in find())
        return [process for process in known.values() if is_alive(process)]

    def killed() -> bool:
        left = remaining()
        send(left, signal.SIGKILL)
        return not left

    everything = remaining()
    send(everything if ask is None else ask(), signal.SIGTERM)
    if wait_until(lambda: not remaining(), grace):
        return True
    if tell is not None:
        tell(f"killing what did not end within {grace:g} s: {', '.join(map(describe, remaining()))}")
    return wait_until(killed, _KILL_SECONDS)


def end_children(grace: float) -> bool:
    """End everything below this process, which adopts orphans; see :func:`end`."""
    return end(lambda: tree(psutil.Process())[1:], grace, keep=())
