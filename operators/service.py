"""A private Airflow on this machine: database, scheduler, DAG processor, triggerer and API server with its UI.

    chunkflow-airflow up | down | status

It replaces ``airflow standalone``: it listens on the loopback interface only, survives the death of its components and
ends without leaving a process behind. From Python::

    with start(Path(".airflow"), with_parent=True) as service, Client(service) as client:
        client.post("dags/my_volume/dagRuns", {"logical_date": None, "conf": {}})
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import psutil

from chunkflow_core.errors import ChunkflowError, MissingInputError, UsageError
from operators import processes, warm
from operators.processes import Identity
from operators.service_client import ApiError, Client
from operators.service_database import Database, free_of
from operators.service_health import COMPONENTS, DATABASE, WARM_PARENT, Health, heartbeat, is_healthy, probe
from operators.service_settings import HOST, SUPERVISED, Home, own_database, prepare_home, warm_parent_name
from operators.service_state import AlreadyRunning, ServiceError, State, lock
from operators.service_supervisor import LOG_TAIL_LINES, Options, log_tail, open_log, read_password, ready_line, run

__all__ = ["AlreadyRunning", "ApiError", "Client", "Service", "ServiceError", "find", "main", "start"]

# All in seconds.
DEFAULT_TIMEOUT = 300.0
_STOP_TIMEOUT = 40.0
_POLL = 0.1

# Below Linux's default range of ports for outgoing connections, any of which could take ours before we listen.
_PORTS = range(20_000, 32_768)
_PORT_TRIES = 100
_HIGHEST_PORT = 65_535

_EXIT_DEGRADED = 1
_EXIT_NOT_RUNNING = 3


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
        """Stop it and wait until its last process has ended. Raises :class:`ServiceError` if that can't be done."""
        _stop(Home(self.home))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    :param home: directory for everything it writes; made if it isn't there.
    :param dags: folder with the DAG files; that of the installed ``dags`` package by default.
    :param port: where the API server and UI listen on 127.0.0.1; 0 takes the last one of this home, or a free one.
    :param parallelism: how many tasks run at once; twice the number of cores by default.
    :param environment: variables for the components and tasks, in addition to those of this process.
    :param timeout: seconds in which it must become healthy.
    :param with_parent: end it when this process ends, however that happens.
    :param durable: whether its database survives a power cut; tests are faster without.

    Raises :class:`AlreadyRunning` if one runs in this home, :class:`ServiceError` with the end of the log if it doesn't
    become healthy, ``UsageError`` and ``MissingInputError`` (``chunkflow_core.errors``) for wrong arguments.
    """
    watched = os.getpid() if with_parent else None
    whole = {**os.environ, **(environment or {})}
    options = _check(home, dags, port, parallelism, timeout, watched, durable, whole)
    return _start_detached(options, whole)


def _service(home: Path, state: State) -> Service:
    return Service(
        home=home.absolute(),
        url=state.url,
        username=state.username,
        password_file=Path(state.password_file),
        pid=state.guard.pid,
    )


def _check(
    home: Path,
    dags: Path | None,
    port: int,
    parallelism: int | None,
    timeout: float,
    watched: int | None,
    durable: bool,
    environment: Mapping[str, str],
) -> Options:
    """Find the user's mistakes before anything is started."""
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
    """The port if it is free; for 0 the home's last one, so that an open browser tab stays valid, or a free one."""
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
    """Remove what a service left that was killed with all that watches over it. Only for whoever holds the lock."""
    processes.end(lambda: processes.with_variable(SUPERVISED, str(home.path)), grace=1.0)
    processes.end(Database(home, 0).processes, grace=1.0)
    home.state.unlink(missing_ok=True)


def _run_here(options: Options) -> int:
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


def _start_detached(options: Options, environment: Mapping[str, str]) -> Service:
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


def _stop(home: Home) -> bool:
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


def _report(home: Home) -> dict[str, Any] | None:
    """What ``status`` tells, ``None`` if nothing runs."""
    state = State.read(home)
    if state is None:
        return None
    health = probe(state.port)
    others = [name for name in (DATABASE, WARM_PARENT) if name in state.components]
    components = {name: _component_report(name, state, health) for name in (*others, *COMPONENTS)}
    if WARM_PARENT in components:
        components[WARM_PARENT]["healthy"] = warm.answers(warm_parent_name(home) or "")
    return {
        "healthy": state.phase == "ready" and all(report["healthy"] for report in components.values()),
        "phase": state.phase,
        "url": state.url,
        "username": state.username,
        "password_file": state.password_file,
        "home": str(home.path),
        "dags": state.dags,
        "pid": state.guard.pid,
        "components": components,
    }


def _component_report(name: str, state: State, health: Health | None) -> dict[str, Any]:
    identity = state.components.get(name)
    alive = identity is not None and identity.alive
    latest = heartbeat(name, health)
    return {
        "pid": identity.pid if identity is not None and alive else None,
        "healthy": identity is not None and alive and is_healthy(name, health, identity.created),
        "heartbeat_age_seconds": None if latest is None else round(time.time() - latest, 1),
    }


def _describe(report: Mapping[str, Any]) -> str:
    lines = [
        f"{report['url']} ({report['phase']}, process {report['pid']})",
        f"log in as {report['username']} with the password in {report['password_file']}",
        f"DAG files in {report['dags']}, all else in {report['home']}",
    ]
    for name, component in report["components"].items():
        health = "healthy" if component["healthy"] else "NOT HEALTHY"
        process = f"process {component['pid']}" if component["pid"] else "not running"
        age = component["heartbeat_age_seconds"]
        beat = "" if age is None else f", heartbeat {age:g} s ago"
        lines.append(f"{name:<14} {health}, {process}{beat}")
    return "\n".join(lines)


def _up(arguments: argparse.Namespace) -> int:
    options = _check(
        arguments.home,
        arguments.dags,
        arguments.port,
        arguments.parallelism,
        arguments.timeout,
        arguments.with_parent,
        not arguments.no_fsync,
        os.environ,
    )
    if not arguments.detach:
        return _run_here(options)
    try:
        _start_detached(options, os.environ)
    except AlreadyRunning:
        processes.wait_until(lambda: find(options.home.path) is not None, options.timeout)
        if find(options.home.path) is None:
            raise
    state = State.read(options.home)
    if state is None:
        raise ServiceError(f"the service ended again; see {options.home.log('supervisor')}")
    print(ready_line(state))
    return 0


def _down(arguments: argparse.Namespace) -> int:
    home = Home(arguments.home.absolute())
    print("stopped" if _stop(home) else f"nothing runs in {home.path}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    home = Home(arguments.home.absolute())
    report = _report(home)
    if arguments.json:
        print(json.dumps(report or {"healthy": False, "phase": "not running", "home": str(home.path)}, indent=2))
    else:
        print(_describe(report) if report else f"nothing runs in {home.path}")
    if report is None:
        return _EXIT_NOT_RUNNING
    return 0 if report["healthy"] else _EXIT_DEGRADED


class _Parser(argparse.ArgumentParser):
    """Ends with the exit code that this project uses for wrong usage."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="chunkflow-airflow", description=(__doc__ or "").split("\n\n")[0])
    common = _Parser(add_help=False)
    common.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("CHUNKFLOW_AIRFLOW_HOME", ".airflow")),
        metavar="DIR",
        help="where the service keeps everything: database, logs, keys (default: $CHUNKFLOW_AIRFLOW_HOME, else .airflow "
        "in the working directory; here: %(default)s)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="up | down | status")
    up = commands.add_parser(
        "up",
        parents=[common],
        help="start it, and keep it running until Ctrl-C or SIGTERM",
        description="Start a private Airflow on this machine, listening on 127.0.0.1 only. It runs until Ctrl-C, SIGTERM "
        "or SIGHUP; --detach leaves it in the background until `chunkflow-airflow down`. The environment is passed on to "
        "the tasks. It brings a PostgreSQL of its own; AIRFLOW__DATABASE__SQL_ALCHEMY_CONN names another one. Exit codes: 0 it ran and was stopped (with --detach: it runs), 1 it failed, 64 wrong usage, 66 no "
        "DAGs folder, 75 one runs in this home already.",
    )
    up.add_argument(
        "--dags", type=Path, metavar="DIR", help="folder with the DAG files (default: that of the package `dags`)"
    )
    up.add_argument(
        "--port",
        type=int,
        default=0,
        metavar="N",
        help="port of the UI and API; 0 takes the one this home had last, or a free one (default: %(default)s)",
    )
    up.add_argument(
        "--parallelism", type=int, metavar="N", help="how many tasks run at once (default: twice the number of cores)"
    )
    up.add_argument(
        "--detach", action="store_true", help="return as soon as it is healthy, leaving it in the background"
    )
    up.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="S",
        help="seconds in which it must become healthy (default: %(default)g)",
    )
    up.add_argument(
        "--with-parent",
        type=int,
        nargs="?",
        const=os.getppid(),
        metavar="PID",
        help="stop when this process ends, however it ends (default: the process that runs this command)",
    )
    up.add_argument(
        "--no-fsync",
        action="store_true",
        help="faster, for tests: a power cut may damage the service's own database, the history of runs",
    )
    up.set_defaults(function=_up)
    down = commands.add_parser(
        "down",
        parents=[common],
        help="stop it",
        description="Stop the service of this home and wait until its last process has ended. Running tasks get 10 s "
        "to clean up. Exit code 0 also if nothing runs.",
    )
    down.set_defaults(function=_down)
    status = commands.add_parser(
        "status",
        parents=[common],
        help="tell where it is and how it does",
        description="Tell where the service is, how to log in, and how each component does. Exit codes: 0 healthy, "
        "1 degraded, 3 not running.",
    )
    status.add_argument("--json", action="store_true", help="the same as a JSON object")
    status.set_defaults(function=_status)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``chunkflow-airflow``; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.function(arguments))
    except ChunkflowError as error:
        print(f"chunkflow-airflow: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
