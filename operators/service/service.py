"""Starts the service of a home, finds it, and stops it."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from chunkflow_core.errors import MissingInputError, UsageError
from operators.service import processes
from operators.service.database import Database, free_of
from operators.service.guard import run
from operators.service.logs import LOG_TAIL_LINES, log_tail, open_log
from operators.service.processes import Identity
from operators.service.settings import HOST, SUPERVISED, Home, own_database, prepare_home
from operators.service.state import AlreadyRunning, ServiceError, State, lock, read_password
from operators.service.supervisor import Options

# All in seconds.
DEFAULT_TIMEOUT = 300.0
_STOP_TIMEOUT = 40.0
_POLL = 0.1

# Below Linux's default range of ports for outgoing connections, any of which could take ours before
# we listen.
_PORTS = range(20_000, 32_768)
_PORT_TRIES = 100
_HIGHEST_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Service:
    """A running service. As a context manager it is stopped at the end."""

    home: Path
    url: str
    username: str
    password_file: Path
    pid: int
    """The outermost process: a SIGTERM to it stops the service, and it ends last."""

    @property
    def password(self) -> str:
        """The user's password. Raises :class:`ServiceError` if its file is gone."""
        return read_password(self.password_file, self.username)

    def stop(self) -> None:
        """Stop it and wait until its last process has ended.

        Raises :class:`ServiceError` if that can't be done.
        """
        stop(Home(self.home))

    def __enter__(self) -> Self:
        """Use the service as a context manager, which stops it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the service."""
        self.stop()


def find(home: Path) -> Service | None:
    """The service that runs in this home and has become healthy, or ``None``."""
    state = State.read(Home(home.absolute()))
    return _service(home, state) if state is not None and state.phase == "ready" else None


def start(
    home: Path,
    *,
    dags: Path | None = None,
    port: int = 0,
    parallelism: int | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    with_parent: bool = False,
    durable: bool = True,
) -> Service:
    """Start a service in the background and return when it is healthy.

    Args:
        home: Directory for everything it writes; made if it isn't there.
        dags: Folder with the DAG files; that of the installed ``dags`` package by default.
        port: Where the API server and UI listen on 127.0.0.1; 0 takes the last one of this home,
            or a free one.
        parallelism: How many tasks run at once; twice the number of cores by default.
        environment: Variables for the components and tasks, in addition to those of this process.
        timeout: Seconds in which it must become healthy.
        with_parent: End it when this process ends, however that happens.
        durable: Whether its database survives a power cut; tests are faster without.

    Raises:
        AlreadyRunning: A service runs in this home.
        ServiceError: It did not become healthy; the message has the end of the log.
        UsageError: An argument is wrong.
        MissingInputError: There is no such folder with DAG files.
    """
    watched = os.getpid() if with_parent else None
    whole = {**os.environ, **(environment or {})}
    options = checked_options(
        home,
        dags=dags,
        port=port,
        parallelism=parallelism,
        timeout=timeout,
        watched=watched,
        durable=durable,
        environment=whole,
    )
    return start_detached(options, whole)


def _service(home: Path, state: State) -> Service:
    return Service(
        home=home.absolute(),
        url=state.url,
        username=state.username,
        password_file=Path(state.password_file),
        pid=state.guard.pid,
    )


def checked_options(
    home: Path,
    *,
    dags: Path | None,
    port: int,
    parallelism: int | None,
    timeout: float,
    watched: int | None,
    durable: bool,
    environment: Mapping[str, str],
) -> Options:
    """What to start a service with, as :func:`start` is asked; the user's mistakes are told here.

    Args:
        home: As for :func:`start`.
        dags: As for :func:`start`.
        port: As for :func:`start`.
        parallelism: As for :func:`start`.
        timeout: As for :func:`start`.
        watched: Id of a process to end with.
        durable: As for :func:`start`.
        environment: All of the service's environment.

    Raises:
        UsageError: An argument is wrong.
        MissingInputError: There is no such folder with DAG files.
        ServiceError: The home can't be used.
    """
    if parallelism is not None and parallelism < 1:
        raise UsageError(f"the parallelism must be at least 1, not {parallelism}")
    if timeout <= 0:
        raise UsageError(f"the timeout must be more than 0 seconds, not {timeout:g}")
    if not 0 <= port <= _HIGHEST_PORT:
        raise UsageError(f"the port must be between 0 (any free one) and {_HIGHEST_PORT}, not {port}")
    try:
        watched_process = None if watched is None else Identity.of(watched)
    except psutil.NoSuchProcess:
        raise UsageError(f"there is no process {watched} to end with") from None
    folder = _dags_folder(dags)
    prepared = Home(home.absolute())
    try:
        prepare_home(prepared)
    except OSError as error:
        raise UsageError(f"{home} can't be the service's home ({error}); choose another one with --home") from None
    database = None
    if own_database(environment):
        free_of(prepared)
        database = Database(prepared, 0, durable)
    return Options(prepared, folder, port, database, parallelism, timeout, watched_process)


def _dags_folder(given: Path | None) -> Path:
    if given is not None:
        folder = given.absolute()
        if not folder.is_dir():
            raise MissingInputError(f"there is no folder {folder} with DAG files; name an existing one with --dags")
        return folder
    package = importlib.util.find_spec("dags")
    if package is None or not package.submodule_search_locations:
        raise MissingInputError("the package `dags` is not installed; name the folder with the DAG files with --dags")
    return Path(next(iter(package.submodule_search_locations)))


def _is_free(port: int) -> bool:
    with socket.socket() as probe_socket:
        # As the server does: connections that linger from the last run are no obstacle.
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((HOST, port))
        except OSError:
            return False
    return True


def _choose_port(home: Home, port: int) -> int:
    """The port if it is free; for 0 the home's last one, or a free one.

    With the last one, an open browser tab stays valid.
    """
    if port:
        if not _is_free(port):
            raise ServiceError(f"port {port} is in use or not permitted; choose another one, or 0 for any free one")
        return port
    try:
        last = [int(home.last_port.read_text())]
    except (OSError, ValueError):
        last = []
    chosen = _free_port(*last)
    home.last_port.write_text(str(chosen))
    return chosen


def _free_port(*preferred: int, but: int = 0) -> int:
    for candidate in (*preferred, *random.sample(_PORTS, _PORT_TRIES)):
        if candidate != but and _is_free(candidate):
            return candidate
    raise ServiceError("no free port found; name one with --port")


def _already_running(home: Home) -> AlreadyRunning:
    state = State.read(home)
    where = f"at {state.url} ({state.phase}, process {state.guard.pid})" if state else "(it is just starting)"
    return AlreadyRunning(f"a service runs in {home.path} already {where}")


def _clean(home: Home) -> None:
    """Remove what a service left that was killed with all that watches over it.

    Only for whoever holds the lock.
    """
    processes.end(lambda: processes.with_variable(SUPERVISED, str(home.path)), grace=1.0)
    processes.end(Database(home, 0).processes, grace=1.0)
    home.state.unlink(missing_ok=True)


def run_here(options: Options) -> int:
    """Run a service in the foreground: its exit code."""
    if lock(options.home) is None:
        raise _already_running(options.home)
    _clean(options.home)
    port = _choose_port(options.home, options.port)
    database = options.database and replace(options.database, port=_free_port(but=port))
    return run(replace(options, port=port, database=database))


def _foreground_command(options: Options) -> list[str]:
    command = [sys.executable, "-P", "-m", "operators.service", "up", f"--home={options.home.path}"]
    command += [f"--dags={options.dags}", f"--port={options.port}", f"--timeout={options.timeout}"]
    if options.parallelism is not None:
        command.append(f"--parallelism={options.parallelism}")
    if options.watched is not None:
        command.append(f"--with-parent={options.watched.pid}")
    if options.database is not None and not options.database.durable:
        command.append("--no-fsync")
    return command


def start_detached(options: Options, environment: Mapping[str, str]) -> Service:
    """Run a service in a session of its own and wait until it is healthy."""
    log_path = options.home.log("supervisor")
    log = open_log(log_path)
    try:
        offset = os.fstat(log).st_size
        process = subprocess.Popen(
            _foreground_command(options),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)
    try:
        return _wait_until_ready(options, process, log_path, offset)
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _wait_until_ready(options: Options, process: subprocess.Popen[bytes], log: Path, offset: int) -> Service:
    home = options.home
    # It gives up by itself when its time is over, and then needs some to end.
    deadline = time.monotonic() + options.timeout + _STOP_TIMEOUT
    while time.monotonic() < deadline:
        state = State.read(home)
        if state is not None and state.guard.pid == process.pid and state.phase == "ready":
            _STARTED[process.pid] = process
            return _service(home.path, state)
        if (code := process.poll()) is not None:
            if code == AlreadyRunning.exit_code:
                raise _already_running(home)
            told = log_tail(log, offset, 2 * LOG_TAIL_LINES)  # what went wrong, and the end of a component's log
            raise ServiceError(f"the service did not start (exit code {code}):\n{told}")
        time.sleep(_POLL)
    raise ServiceError(f"the service hangs; its log:\n{log_tail(log, offset)}")


# The services that this process started: their exit statuses are its to collect.
_STARTED: dict[int, subprocess.Popen[bytes]] = {}


def stop(home: Home) -> bool:
    """Stop the service of a home; whether there was one. Raises :class:`ServiceError`."""
    state = State.read(home)
    if state is None:
        if home.path.is_dir() and (descriptor := lock(home)) is not None:
            _clean(home)
            os.close(descriptor)
        return False

    def living() -> list[psutil.Process]:
        outer = [process for identity in (state.guard, state.supervisor) if (process := identity.process())]
        return [process for root in outer for process in processes.tree(root)]

    everything = living()
    processes.send([process for process in everything if process.pid == state.guard.pid], signal.SIGTERM)
    processes.send([process for process in everything if process.pid == state.supervisor.pid], signal.SIGTERM)
    if not processes.wait_until(lambda: not state.alive, _STOP_TIMEOUT) and not processes.end(living, 0):
        left = ", ".join(map(processes.describe, living()))
        raise ServiceError(f"some processes of the service in {home.path} can't be ended: {left}")
    if (started := _STARTED.pop(state.guard.pid, None)) is not None:
        started.wait()
    home.state.unlink(missing_ok=True)
    return True
