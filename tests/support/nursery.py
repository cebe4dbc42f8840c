"""Processes of this project's commands, forked from one that has imported what they import.

A process of this project, such as a container's first one and its stage, imports for seconds to
work for milliseconds. A nursery is a process that has done so once. For a command such as ``python
-m chunkflow_core.commands.first_process …`` it forks a child, which takes over environment, folder
and outputs, a session of its own, and then runs the module as ``python -m`` does. So it does with
``python FILE`` and ``python -c PROGRAM``. What a child starts by ``os.posix_spawn``, as
:mod:`chunkflow_core.commands.first_process` does, is forked too if it is a module of this project.

A child differs from a process that was executed in what its kernel's entries say of its start:
``/proc/PID/cmdline`` and ``/proc/PID/environ`` are the nursery's. What modules read from the
environment while they are imported they have read in the nursery. Tests of how processes start are
not for it.

The nursery ends when its maker does, however that one ends, and kills what is left of its
children's sessions.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import site
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NoReturn

PACKAGE = "chunkflow_core"
PRELOADED = (
    *(
        f"{PACKAGE}.{name}"
        for name in (
            "__main__",
            "audit.audit",
            "commands.first_process",
            "commands.stages",
            "steps.blend",
            "steps.infer",
            "steps.local",
            "storage.clients",
        )
    ),
    *(f"{PACKAGE}.{name}" for name in ("inference_and_donate", "receive_and_blend", "engines.identity")),
)
"""Modules that a nursery imports unless told otherwise.

None may start a thread, or import PyTorch, which would cost each child its memory.
"""
_LENGTH = struct.Struct("!I")
_DESCRIPTORS = 3
_SPAWN = os.posix_spawn
Command = tuple[list[str], dict[str, str], str]
"""Command line, environment and folder of a process."""


def module_of(argv: Sequence[str]) -> str | None:
    """The module of this project that a command line runs; None if it runs anything else."""
    python = argv[0] == "python" or argv[0] == sys.executable
    named = python and len(argv) > 2 and argv[1] == "-m" and argv[2].partition(".")[0] == PACKAGE
    return argv[2] if named else None


class Child:
    """A process that a nursery has forked."""

    launched = True
    """Whether the command runs; always, as there is no launcher to become it."""

    def __init__(self, status: int) -> None:
        """``status`` is a file descriptor: a line gives the process id, another one how it ends."""
        self.descriptor = status
        """A file descriptor that can be read when the process has ended."""
        self._lines = os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._line())
        self.returncode: int | None = None

    def _line(self) -> bytes:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the nursery is gone; what it had to say is on standard error")
        return line

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit code, or minus the number of the signal.

        ``TimeoutError``: it has not ended within ``timeout`` seconds.
        """
        if self.returncode is None:
            if timeout is not None:
                ended = select.poll()
                ended.register(self.descriptor, select.POLLIN)
                if not ended.poll(timeout * 1000):
                    raise TimeoutError(f"process {self.pid} has not ended within {timeout:g} s")
            self.returncode = int(self._line())
            self._lines.close()
        return self.returncode


class Nursery:
    """A process to fork others from.

    It starts at once; the first child waits until it has imported ``modules``.
    """

    def __init__(self, modules: Sequence[str] = PRELOADED, **variables: str) -> None:
        """``variables`` are added to the bare environment in which the modules are imported."""
        self._channel, theirs = socket.socketpair()
        package = importlib.import_module(PACKAGE)
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
        with theirs, tempfile.TemporaryDirectory() as nowhere:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    __file__,
                    str(theirs.fileno()),
                    Path(str(package.__file__)).parents[1],
                    *modules,
                ],
                env=environment | {"HOME": nowhere} | variables,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Process id of the nursery itself."""
        return self._process.pid

    def start(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        output: int,
        errors: int | None = None,
    ) -> Child:
        """Start a command line that begins with ``python``.

        Args:
            argv: The command line, as :mod:`tests.support.nursery` says.
            environment: The child's whole environment.
            folder: The child's working directory.
            output: File descriptor of its standard output.
            errors: File descriptor of its standard error; ``output`` if None.

        Returns:
            The child, once it is forked.

        Raises:
            RuntimeError: The nursery is gone.
        """
        request = json.dumps([list(argv), dict(environment), str(folder)]).encode()
        status, theirs = os.pipe()
        try:
            with self._lock:
                socket.send_fds(
                    self._channel, [_LENGTH.pack(len(request))], [output, output if errors is None else errors, theirs]
                )
                self._channel.sendall(request)
        finally:
            os.close(theirs)
        return Child(status)

    def run(self, argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> CompletedProcess[str]:
        """Run a command line as ``start`` does, to its end; what it has printed is captured."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            code = self.start(argv, environment, folder, output.fileno(), errors.fileno()).wait()
            output.seek(0)
            errors.seek(0)
            return CompletedProcess(list(argv), code, output.read(), errors.read())

    def close(self) -> None:
        """End the nursery, and all that it has forked."""
        self._channel.close()
        self._process.wait()


@functools.cache
def shared() -> Nursery:
    """The nursery that all tests of this process share; it ends with the process."""
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery


def main(channel: socket.socket, modules: Sequence[str]) -> None:
    """Import modules, then fork on demand until the maker has gone."""
    channel.set_inheritable(False)
    for name in modules:
        importlib.import_module(name)
    if f"{PACKAGE}.lattice.kernels" in sys.modules:
        _compile()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Process id and status descriptor of each child, by the descriptor that tells of its end.
    children: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != channel.fileno():
                _tell_end(*children.pop(ready))
                poll.unregister(ready)
                os.close(ready)
            elif not (request := _receive(channel)):
                _kill_sessions({pid for pid, _ in children.values()})
                return
            else:
                (argv, environment, folder), output, errors, status = request
                pid = _fork(functools.partial(_enter, argv, environment, folder, output, errors))
                os.close(output)
                os.close(errors)
                with contextlib.suppress(BrokenPipeError):
                    os.write(status, b"%d\n" % pid)
                descriptor = os.pidfd_open(pid)
                children[descriptor] = pid, status
                poll.register(descriptor, select.POLLIN)


def _compile() -> None:
    """Load the compiled loops, as a block's first patch would."""
    import numpy as np

    from chunkflow_core.lattice import kernels

    for dtype in (np.uint8, np.float32):
        kernels.take_scaled(np.zeros((1, 1, 1, 1), dtype), (0, 0, 0), np.float32(1), np.zeros((1, 1, 1, 1), np.float32))


def _receive(channel: socket.socket) -> tuple[Command, int, int, int] | None:
    """A request: a command, and descriptors for its output, errors and status; None at the end."""
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, _DESCRIPTORS)
    if not head:
        return None
    (length,) = _LENGTH.unpack(head)
    body = b""
    while len(body) < length:
        part = channel.recv(length - len(body))
        if not part:
            return None
        body += part
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    output, errors, status = descriptors
    argv, environment, folder = json.loads(body)
    return (argv, environment, folder), output, errors, status


def _tell_end(pid: int, status: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % code)
    os.close(status)


def _kill_sessions(left: set[int]) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(process.name)) in left:
                os.kill(int(process.name), signal.SIGKILL)


def _fork(run: Callable[[], NoReturn]) -> int:
    """A child that runs something and never comes back from it."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    finally:
        os._exit(70)


def _enter(argv: list[str], environment: dict[str, str], folder: str, output: int, errors: int) -> NoReturn:
    """Become the first process of a session."""
    from operators.launch import end_with_parent

    parent = os.getppid()
    os.setsid()
    end_with_parent(signal.SIGKILL, parent)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    _close_private()
    os.chdir(folder)
    os.posix_spawn = _fork_instead  # type: ignore[assignment]
    _become(argv, environment)


def _fork_instead(
    path: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    file_actions: Sequence[tuple[Any, ...]] = (),
    setsigmask: Sequence[int] = (),
    setsigdef: Sequence[int] = (),
) -> int:
    """``os.posix_spawn``, but for modules of this project without executing anything.

    ``setsigdef`` makes no difference to them: Python sets SIGPIPE and SIGXFSZ, which it is for, as
    it starts.
    """
    if module_of(argv) is None:
        options: Any = {"file_actions": file_actions, "setsigmask": setsigmask, "setsigdef": setsigdef}
        return _SPAWN(path, list(argv), environment, **options)

    def run() -> NoReturn:
        for action, source, target in file_actions:
            assert action == os.POSIX_SPAWN_DUP2
            os.dup2(source, target)
        _close_private()
        signal.pthread_sigmask(signal.SIG_SETMASK, setsigmask)
        _become(argv, environment)

    return _fork(run)


def _close_private() -> None:
    """Close what an executed program would not get."""
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):
            if descriptor > 2 and fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(descriptor)


def _become(argv: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Do what Python does with these arguments in this environment, end included."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.stdout, sys.stderr = _stream(1, bool(environment.get("PYTHONUNBUFFERED"))), _stream(2, True)
    sys.orig_argv = list(argv)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    code = _ended(functools.partial(_run, *argv[1:]))
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _run(what: str, *arguments: str) -> None:
    """Run ``-m MODULE ARG…``, ``-c PROGRAM ARG…`` or ``FILE ARG…``."""
    sys.argv = [what, *arguments[what in ("-m", "-c") :]]
    sys.modules.pop("sitecustomize", None)
    site.execsitecustomize()
    sys.path.insert(0, {"-m": str(Path.cwd()), "-c": ""}.get(what, str(Path(what).parent)))
    if what == "-m":
        # Imported here before; it is run as the program now.
        for name in (arguments[0], f"{arguments[0]}.__main__"):
            sys.modules.pop(name, None)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.modules["__main__"] = program = types.ModuleType("__main__")
        exec(arguments[0], program.__dict__)
    else:
        runpy.run_path(what, run_name="__main__")


def _ended(run: Callable[[], None]) -> int:
    """The exit code that Python would end with."""
    try:
        run()
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return (ending.code or 0) & 0xFF
        print(ending.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _stream(descriptor: int, unbuffered: bool) -> io.TextIOWrapper:
    errors = "backslashreplace" if descriptor == 2 else "surrogateescape"
    raw = os.fdopen(descriptor, "wb", buffering=0 if unbuffered else -1, closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors=errors, write_through=unbuffered)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[2])
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[3:])
