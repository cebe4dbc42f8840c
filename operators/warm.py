"""Processes that start warm: a parent with the imports done forks them in milliseconds.

    python -m operators.warm NAME

A task's command takes seconds to import what it runs on, and often less to do its work. The service
keeps this one process, which imports that once, with no threads, no CUDA and no open storage, and
forks a child for each command. :func:`start` asks it for one.

The child is what a started process would be: its arguments, environment, working directory, limits,
CPUs, standard streams, a session and process group of its own. Whoever asked holds a connection:
when that closes, however it comes about, the child's group is killed; so is the child when the
parent dies. The name is one of Linux's abstract sockets, open to the same user only.
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import resource
import select
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from operators import forks, launch

VARIABLE = "CHUNKFLOW_WARM_PARENT"
"""Environment variable with the name of the parent that a service keeps."""

_PACKAGES = ("chunkflow_core", "operators")
_RECORDS = (".dist-info", ".egg-info", ".pth")
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_TERMINATE, _KILL = b"T", b"K"
_LOST = -signal.SIGKILL
"""Exit code of a child whose parent has died: the kernel kills it with its parent."""
_LONGEST_REQUEST_SECONDS = 10.0
_THREADS = Path("/proc/self/task")
_PREFIX = struct.Struct("!Q")
_CREDENTIALS = struct.Struct("3i")


class Child(Protocol):
    """A running command."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, at most so many seconds: the exit code, negative for a signal.

        ``TimeoutError`` if it has not ended.
        """

    def terminate(self) -> None:
        """Ask it, and all of its process group, to end."""

    def kill(self) -> None:
        """End it, and all of its process group."""


class WarmChild:
    """A command that the parent has forked.

    A signal's handler may use it while the code below it waits.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        """Take over the connection to the parent of a child with this process id."""
        self.pid, self._connection = pid, connection
        self._code: int | None = None
        self._answer = b""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command's end and give its exit code; see :meth:`Child.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._code is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._connection], [], [], left)[0]:
                raise TimeoutError
            if self._code is None:
                self._read()
        return self._code

    def terminate(self) -> None:
        """Ask the command, and all of its process group, to end."""
        self._send(_TERMINATE)

    def kill(self) -> None:
        """End the command, and all of its process group."""
        self._send(_KILL)

    def _read(self) -> None:
        try:
            piece = self._connection.recv(4096)
        except OSError:
            piece = b""
        self._answer += piece
        if self._answer.endswith(b"\n"):
            self._code = int(json.loads(self._answer)["code"])
        elif not piece:
            self._code = _LOST

    def _send(self, message: bytes) -> None:
        with suppress(OSError):  # it has ended
            self._connection.sendall(message)


def start(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    streams: Sequence[int],
    imports: Iterable[str] = (),
) -> WarmChild | None:
    """Have the service's parent start ``python -m`` with these arguments.

    Args:
        arguments: The module and its arguments.
        environment: All of the child's.
        streams: Descriptors of its standard input, output and error.
        imports: Modules of this project that the parent is to have imported before, and whose
            ``warm_up()`` it is to have called.

    Returns:
        The child; ``None`` if there is no parent, or none that would do, so that the command has to
        start by itself.
    """
    name = environment.get(VARIABLE)
    if not name or sys.platform != "linux":
        return None
    request = {
        "arguments": list(arguments),
        "environment": dict(environment),
        "imports": list(imports),
        "folder": str(Path.cwd()),
        "umask": _umask(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "limits": [[limit, *resource.getrlimit(limit)] for limit in _LIMITS],
        "python": sys.executable,
    }
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect("\0" + name)
        if _peer(connection) != os.geteuid():
            raise ConnectionRefusedError("the name is somebody else's")
        text = json.dumps(request).encode()
        rights = array.array("i", streams).tobytes()
        connection.sendmsg([_PREFIX.pack(len(text))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        connection.sendall(text)
        pid = _read_pid(connection)
    except OSError:
        pid = None
    if pid is None:
        connection.close()
        return None
    return WarmChild(connection, pid)


def _read_pid(connection: socket.socket) -> int | None:
    """The child's process id; ``None`` if the parent has refused."""
    answer = b""
    while not answer.endswith(b"\n"):
        piece = connection.recv(1)  # what comes after it is the child's end
        if not piece:
            return None
        answer += piece
    return int(json.loads(answer)["pid"])


def answers(name: str) -> bool:
    """Whether a parent of this name takes requests."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.connect("\0" + name)
        return True
    return False


class Parent:
    """Forks children on request, in one thread."""

    def __init__(self, name: str) -> None:
        """Take requests under this name."""
        self._path = list(sys.path)  # before any import adds to it
        self._stamp = _stamp(self._path)
        self._stopping = False
        self._prepared = set[str]()
        self._children: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0" + name)
        self._listener.listen(1024)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._wakeup, signals = socket.socketpair()
        for end in (self._wakeup, signals):
            end.setblocking(False)
        signal.set_wakeup_fd(signals.fileno())
        self._signals = signals
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._reap)

    def run(self) -> Callable[[], None] | None:
        """Serve; in a child, what it has to run.

        ``None`` in the parent, when it is to stop and its last child has ended.
        """
        while not self._stopping or self._children:
            for key, _ in self._selector.select():
                job: Callable[[], None] | None = key.data(key.fileobj)
                if job is not None:
                    return job
        return None

    def _accept(self, listener: socket.socket) -> Callable[[], None] | None:
        connection, _ = listener.accept()
        connection.settimeout(_LONGEST_REQUEST_SECONDS)
        try:
            streams, request = _receive(connection)
        except (OSError, ValueError):  # it only looked whether somebody answers, or has gone meanwhile
            connection.close()
            return None
        try:
            if _peer(connection) != os.geteuid() or not self._is_fit(request):
                connection.close()
                return None
            return self._fork(connection, streams, request)
        finally:
            for stream in streams:
                os.close(stream)

    def _stop(self) -> None:
        """Take no requests any more; end with the last child."""
        if not self._stopping:
            self._stopping = True
            self._selector.unregister(self._listener)
            self._listener.close()

    def _is_fit(self, request: Mapping[str, Any]) -> bool:
        """Whether a child of this process would be what a new process is."""
        if _stamp(self._path) != self._stamp:
            self._stop()  # the next parent, which the supervisor starts, has the new code
            return False
        for module in request["imports"]:
            if module not in self._prepared and module.partition(".")[0] in _PACKAGES:
                getattr(importlib.import_module(module), "warm_up", lambda: None)()
                self._prepared.add(module)
        # A lock that another thread holds at this moment would be locked for ever in the child.
        return request["python"] == sys.executable and len(list(_THREADS.iterdir())) == 1

    def _fork(
        self, connection: socket.socket, streams: Sequence[int], request: Mapping[str, Any]
    ) -> Callable[[], None] | None:
        gc.collect()
        gc.freeze()  # collections in the child would copy all these pages
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            launch.end_with_parent(signal.SIGKILL, parent)
            os.setsid()
            self._leave()
            connection.close()
            _become(streams, request)
            return lambda: _run(request["arguments"])
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self._children[pid] = connection
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, lambda _: self._listen(pid))
        self._answer(connection, {"pid": pid})
        return None

    def _leave(self) -> None:
        """In the child, close and reset what is the parent's alone."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for end in (self._listener, self._wakeup, self._signals, *self._children.values()):
            end.close()
        self._selector.close()

    def _listen(self, pid: int) -> None:
        """What the one who asked for a child says about it; silence for good is the end of both."""
        connection = self._children[pid]
        try:
            message = connection.recv(1)
        except OSError:
            message = b""
        number = signal.SIGTERM if message == _TERMINATE else signal.SIGKILL
        try:
            os.killpg(pid, number)
        except (
            ProcessLookupError
        ):  # it has just been forked, and has no group yet; or has ended, and is kept until it is reaped
            os.kill(pid, number)
        if not message:
            self._selector.unregister(connection)

    def _reap(self, wakeup: socket.socket) -> None:
        with suppress(BlockingIOError):
            wakeup.recv(4096)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                if (connection := self._children.pop(pid, None)) is None:
                    continue
                with suppress(KeyError):
                    self._selector.unregister(connection)
                self._answer(connection, {"code": os.waitstatus_to_exitcode(status)})
                connection.close()

    def _answer(self, connection: socket.socket, answer: Mapping[str, int]) -> None:
        with suppress(OSError):
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _receive(connection: socket.socket) -> tuple[list[int], dict[str, Any]]:
    """Descriptors and the request. ``ValueError`` if there is none."""
    prefix, ancillary, _, _ = connection.recvmsg(_PREFIX.size, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data)
    try:
        if len(prefix) < _PREFIX.size or len(streams) != 3:
            raise ValueError("no request")
        text, missing = b"", _PREFIX.unpack(prefix)[0]
        while missing > len(text):
            piece = connection.recv(missing - len(text))
            if not piece:
                raise ValueError("cut off")
            text += piece
        return list(streams), json.loads(text)
    except BaseException:
        for stream in streams:
            os.close(stream)
        raise


def _become(streams: Sequence[int], request: Mapping[str, Any]) -> None:
    """Take over everything by which one process differs from another."""
    forks.become([sys.executable, "-m", *request["arguments"]], streams)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cpus"])
    for limit, soft, hard in request["limits"]:
        resource.setrlimit(limit, (soft, hard))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _run(arguments: Sequence[str]) -> None:
    """Run a module as ``python -m`` does."""
    sys.path.insert(0, str(Path.cwd()))
    forks.run_module(arguments)


def _stamp(path: Sequence[str]) -> dict[str, tuple[int, int]]:
    """What tells that code or packages have changed.

    That are this project's files, and the records of packages installed in these folders. What else
    lies in the folders is not looked at: one may be a home where files come and go all the time. A
    package that is installed in editable form counts as changed when it is installed again.
    """
    folders = [Path(path) for module in _PACKAGES for path in importlib.import_module(module).__path__]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    files += [record for folder in path for kind in _RECORDS for record in Path(folder).glob(f"*{kind}")]
    stamp = {}
    for file in files:
        with suppress(OSError):
            facts = file.stat()
            stamp[str(file)] = (facts.st_mtime_ns, facts.st_size)
    return stamp


def _peer(connection: socket.socket) -> int:
    """The user at the other end."""
    return int(_CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1])


def _umask() -> int:
    """This process's umask, read without changing it for a moment."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)


def main(arguments: Sequence[str]) -> None:
    """Be the parent of this name until told to end; in a child, run its command."""
    # numpy's library would start threads when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    job = Parent(arguments[0]).run()
    if job is not None:
        os._exit(forks.end_of(job))


if __name__ == "__main__":
    main(sys.argv[1:])
