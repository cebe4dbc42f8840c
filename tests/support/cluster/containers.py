"""What runs in a pod: its log, and its container.

A container is a session of real processes on this machine, or only simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from operators import launch
from operators.service.processes import is_alive
from tests.support.cluster.images import CANNOT_START
from tests.support.nursery import Child, Nursery, module_of

_LAUNCH_SECONDS = 0.005
_KILL_SECONDS = 10.0
_LOOKS, _LOOK_SECONDS = 3, 0.002
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Line:
    """One line of a log, its line break included if it has one."""

    nanoseconds: int
    """When it was written, since the epoch."""
    text: bytes

    @property
    def stamped(self) -> bytes:
        """The line with its time in front, to the nanosecond."""
        seconds, rest = divmod(self.nanoseconds, 10**9)
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z ".encode() + self.text


class Log:
    """What a container wrote.

    Lines are counted from the container's start. Beyond ``limit`` bytes the oldest are dropped and
    only counted; None keeps all.
    """

    def __init__(self, limit: int | None) -> None:
        self.lines: deque[Line] = deque()
        self.dropped = 0
        self.closed = False
        self.cuts = 0
        """How often the connection to the node broke: readers of before get no proper end."""
        self._limit = limit
        self._size = 0
        self._last = 0
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def end(self) -> int:
        """The number of lines ever written."""
        return self.dropped + len(self.lines)

    @property
    def text(self) -> str:
        """All lines that are kept, as text."""
        return b"".join(line.text for line in self.lines).decode(errors="replace")

    def append(self, text: bytes) -> None:
        """Add a line that was written now."""
        self._last = max(time.time_ns(), self._last + 1)
        self.lines.append(Line(self._last, text))
        self._size += len(text)
        while self._limit is not None and self._size > self._limit and len(self.lines) > 1:
            self._size -= len(self.lines.popleft().text)
            self.dropped += 1
        self._wake()

    def close(self) -> None:
        """Say that nothing more will come."""
        self.closed = True
        self._wake()

    def cut(self) -> None:
        """Break the connections of all who read."""
        self.cuts += 1
        self._wake()

    def since(self, start: int) -> Iterator[Line]:
        """The lines from number ``start`` on, as far as they are kept."""
        for index in range(max(start - self.dropped, 0), len(self.lines)):
            yield self.lines[index]

    async def more(self, after: int, timeout: float) -> None:
        """Wait for more than ``after`` lines, for the log's end, or for ``timeout`` seconds."""
        if self.end > after or self.closed:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        await asyncio.wait({future}, timeout=timeout)
        self._waiting.discard(future)

    def tail(self, lines: int, size: int) -> str:
        """The end of the log: at most so many lines, and at most so many bytes."""
        last = list(self.lines)[-lines:]
        return b"".join(line.text for line in last)[-size:].decode(errors="replace")

    def _wake(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)


class Container(Protocol):
    """What runs in a pod, or seems to."""

    def signal(self, number: int) -> None:
        """Send a signal to the main process, which does nothing if it has no handler."""

    def kill(self) -> None:
        """Send SIGKILL to all processes."""

    async def wait(self) -> int:
        """Wait for the end; the exit code, or 128 + number of the signal."""


class Sleeping:
    """A container that is only simulated: it writes one line and succeeds after ``seconds``."""

    def __init__(self, seconds: float, log: Log) -> None:
        log.append(f"simulated: asleep for {seconds} s\n".encode())
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._end, 0)

    def _end(self, code: int) -> None:
        self._timer.cancel()
        if not self._code.done():
            self._code.set_result(code)

    def signal(self, number: int) -> None:
        """End with 128 + the signal's number, whatever the signal is."""
        self._end(128 + number)

    def kill(self) -> None:
        """End as by SIGKILL."""
        self._end(128 + signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for the end; the exit code."""
        return await asyncio.shield(self._code)


class Keeper:
    """A process that outlives this one by a moment, and then kills the sessions that are left.

    The kernel ends only the main process of each pod with this one, not that process' children.
    """

    _SCRIPT = """
import os, signal, sys
left = set()
for line in sys.stdin:
    (left.add if line[0] == "+" else left.discard)(int(line[1:]))
for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
    try:
        if os.getsid(pid) in left:
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
"""

    def __init__(self) -> None:
        argv = [sys.executable, "-I", "-S", "-c", self._SCRIPT]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True)

    def watch(self, session: int) -> None:
        """Have a session killed if it outlives this process."""
        self._tell(f"+{session}\n")

    def forget(self, session: int) -> None:
        """Leave a session alone: it is dead, or about to be, and its number may be used again."""
        self._tell(f"-{session}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.write(line)

    def close(self) -> None:
        """Let the keeper end, and wait for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Executed:
    """A main process that is executed, by a launcher.

    Made in a thread that lives on: the kernel kills the process when the thread that started it
    ends.
    """

    def __init__(self, argv: list[str], environment: Mapping[str, str], folder: Path, output: int) -> None:
        self._process = subprocess.Popen(
            launch.command(argv),
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.descriptor = os.pidfd_open(self.pid)
        """A file descriptor that can be read when the process has ended."""

    @property
    def returncode(self) -> int | None:
        """How the process has ended, as ``wait`` gives it; None before it was waited for."""
        return self._process.returncode

    @property
    def launched(self) -> bool:
        """Whether the launcher has become the command.

        Only then is there something to signal, and a log to read.
        """
        with contextlib.suppress(OSError):
            return b"operators.launch" not in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        return True

    def wait(self) -> int:
        """Wait for the end; the exit code, or minus the number of the signal."""
        if self._process.returncode is None:
            os.close(self.descriptor)
        return self._process.wait()


class Session:
    """A container that runs: a session of processes whose first one is the main process.

    That one is forked from the nursery if there is one and it can, else executed. ``on_line`` is
    called with each line that the session writes.
    """

    def __init__(
        self,
        argv: list[str],
        environment: Mapping[str, str],
        folder: Path,
        log: Log,
        on_line: Callable[[bytes], None],
        keeper: Keeper,
        nursery: Nursery | None,
    ) -> None:
        self._log, self._on_line, self._rest = log, on_line, b""
        self._output, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writing, True)
        self._process: Executed | Child
        try:
            if nursery is not None and module_of(argv):
                self._process = nursery.start(argv, environment, folder, writing)
            else:
                self._process = Executed(argv, environment, folder, writing)
        finally:
            os.close(writing)
        self.pid = self._process.pid
        self._keeper = keeper
        keeper.watch(self.pid)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._process.descriptor, self.reap)

    async def executed(self) -> None:
        """Wait until the command itself runs, and read its log from then on."""
        while self._process.returncode is None and not self._process.launched:
            await asyncio.sleep(_LAUNCH_SECONDS)
        if not self._ended.done():
            self._loop.add_reader(self._output, self._read)

    def _members(self) -> list[psutil.Process]:
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.getsid(pid) == self.pid:
                    found.append(psutil.Process(pid))
        return found

    def signal(self, number: int) -> None:
        """Send a signal to the main process, which gets it as process 1 of a container would.

        That one gets only signals that it handles or waits for, and from outside SIGKILL and
        SIGSTOP.
        """
        if self._process.returncode is None and (number in (signal.SIGKILL, signal.SIGSTOP) or self._handles(number)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _handles(self, number: int) -> bool:
        """Whether the signal is caught, or blocked and so kept for sigwait.

        The kernel drops all others. A thread that waits for signals does not show them as blocked;
        those that it has started do.
        """
        if self._has("SigCgt", number):
            return True
        # A shell blocks all signals for a moment when it starts a command.
        for _ in range(_LOOKS):
            if not self._has("SigBlk", number):
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def _has(self, mask: str, number: int) -> bool:
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{self.pid}/task").glob("*/status"):
                status = dict(line.split(":", 1) for line in file.read_text().splitlines())
                # D: it waits for a new process to become a command.
                passing = mask == "SigBlk" and status["State"].split()[0] == "D"
                if int(status[mask], 16) >> (number - 1) & 1 and not passing:
                    return True
        return False

    def kill(self) -> None:
        """Send SIGKILL to all processes of the session until none is alive."""
        self._keeper.forget(self.pid)
        deadline = time.monotonic() + _KILL_SECONDS
        while alive := [member for member in self._members() if is_alive(member)]:
            for member in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            if time.monotonic() > deadline:
                raise RuntimeError(f"these processes of a pod don't die: {alive}")
            time.sleep(0.001)

    async def wait(self) -> int:
        """Wait for the end, and the whole log; the exit code, or 128 + number of the signal."""
        return await asyncio.shield(self._ended)

    def reap(self) -> None:
        """Take note of the end of the main process, and kill what is left of the session.

        Called when the process has ended or is about to.
        """
        if self._ended.done():
            return
        self._loop.remove_reader(self._process.descriptor)
        code = self._process.wait()
        self.kill()
        self._read()
        self._loop.remove_reader(self._output)
        os.close(self._output)
        if self._rest:
            self._line(self._rest)
        self._ended.set_result(code if code >= 0 else 128 - code)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output, 1 << 16):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._line(line + b"\n")
            # End of file: nobody can write any more.
            self._loop.remove_reader(self._output)

    def _line(self, text: bytes) -> None:
        self._log.append(text)
        self._on_line(text)


def cannot_run(program: str, environment: Mapping[str, str], folder: Path) -> str | None:
    """What the runtime says of a missing program or working folder; None: all is there."""
    if not folder.is_dir():
        return f'{CANNOT_START}chdir to cwd ("{folder}") set in config.json failed: no such file or directory: unknown'
    if shutil.which(program, path=environment.get("PATH", "")) is None:
        missing = f"stat {program}: no such file or directory"
        where = missing if "/" in program else "executable file not found in $PATH"
        return f'{CANNOT_START}exec: "{program}": {where}: unknown'
    return None


def memory_of(sessions: Collection[int]) -> dict[int, dict[int, int]]:
    """Resident bytes by process id, for each of the sessions."""
    found: dict[int, dict[int, int]] = {session: {} for session in sessions}
    if not found:
        return found
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if (session := os.getsid(pid)) in found:
                pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
                found[session][pid] = pages * _PAGE
    return found
