"""The processes of a single-machine Airflow, kept running, and ended without a remainder.

    guard ── supervisor ─┬─ database ── its connections
                         ├─ api-server
                         ├─ scheduler ── LocalExecutor workers ── tasks
                         ├─ warm parent ── what the tasks run
                         ├─ dag-processor ── file processors
                         └─ triggerer ── trigger runner

Airflow's components are forks of the supervisor (``operators.service_components``) where that can be.

Guard and supervisor both adopt the orphans below them, so either can be killed and the other one ends the rest. If
both are killed at once, the kernel ends the components (``operators.launch``), and what they forked
(``airflow_local_settings.py``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Protocol

import psutil

from operators import launch, processes, warm
from operators.processes import Identity
from operators.service_components import STOP_SIGNALS, Parent
from operators.service_database import Database
from operators.service_health import (
    API_SERVER,
    COMPONENTS,
    DATABASE,
    EXECUTION_HEALTH_PATH,
    WARM_PARENT,
    Health,
    answers,
    is_healthy,
    probe,
)
from operators.service_settings import (
    HOST,
    USERNAME,
    Home,
    component_environment,
    database_mark,
    is_migrated,
    private_settings,
    tuning_settings,
    warm_parent_name,
    write_settings,
)
from operators.service_state import ServiceError, State

# All in seconds.
_TICK = 0.2
_PROBE_INTERVAL_STARTING = 0.5
_PROBE_INTERVAL = 5.0
_WARM_UP_TIMEOUT = 0.5
_UNHEALTHY_LIMIT = 120.0
_QUICK_DEATH = 60.0
_FIRST_BACKOFF = 0.5
# Tasks get this long to clean up (on_kill) and to report how they ended; the API server to finish its requests.
_TASK_GRACE = 10.0
_API_GRACE = 1.0
_DATABASE_GRACE = 10.0
_REST_GRACE = 1.0

_QUICK_DEATHS_LIMIT = 5
LOG_TAIL_LINES = 15
"""Of a component's log, told to the user."""
_LOG_LIMIT_BYTES = 10_000_000

# Log servers listen on all interfaces, and are not needed where the API server reads the same files.
_ARGUMENTS: Mapping[str, Sequence[str]] = {"scheduler": ["--skip-serve-logs"], "triggerer": ["--skip-serve-logs"]}


@dataclass(frozen=True, slots=True)
class Options:
    """What a service is started with."""

    home: Home
    dags: Path
    port: int
    database: Database | None
    """The service's own database, if it is to have one."""
    parallelism: int | None
    """How many tasks run at once; twice the number of cores if not given."""
    timeout: float
    """Seconds in which the service must become healthy."""
    watched: Identity | None
    """The service ends when this process does."""


def note(message: str) -> None:
    """Tell the user, or the supervisor's log, unless it can't be told any more."""
    with contextlib.suppress(OSError):
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}", file=sys.stderr, flush=True)


def log_tail(log: Path, offset: int = 0, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log, of what was written after ``offset`` bytes."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"({error})"
    return "\n".join(text.splitlines()[-lines:])


def open_log(log: Path) -> int:
    """Open a log for appending, after moving it aside if it has become large."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LOG_LIMIT_BYTES:
            log.replace(log.with_name(log.name + ".1"))
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _how_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


class Process(Protocol):
    """A child of this process."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code if it has ended, negative for a signal, else ``None``."""


@dataclass(slots=True)
class Component:
    """One command, which may be started many times, in a session of its own: Ctrl-C in a terminal is for the supervisor,
    which knows the right order.
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
        """Its living processes."""
        if self.process is None or self.process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return processes.tree(psutil.Process(self.process.pid))
        return []

    def terminable(self) -> list[psutil.Process]:
        """Those of its processes that end well when they get SIGTERM, and see to their children then.

        The scheduler's children run the tasks; it would wait for them, and they pass the signal on to the tasks.
        """
        everything = self.tree()
        if self.name != "scheduler":
            return everything[:1]
        return [
            process for process in everything if self.process and self.process.pid in (process.pid, _parent(process))
        ]

    def ended(self) -> int | None:
        """The exit code if it has ended since it was last asked (negative: by that signal), else ``None``."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.process = None
        self.healthy = False
        return code

    def count_death(self) -> None:
        """Decide when to start it again: at once, then later and later while it dies soon after each start."""
        lived = time.monotonic() - self._begun
        self.quick_deaths = self.quick_deaths + 1 if lived < _QUICK_DEATH else 1
        self.restart = time.monotonic() + _FIRST_BACKOFF * 2 ** (self.quick_deaths - 1)

    def tail(self) -> str:
        """The end of what it logged since its last start, with the name of the file."""
        return f"{log_tail(self.log, self._offset)}\n(end of {self.log})"


def _trees(components: Sequence[Component]) -> list[psutil.Process]:
    return [process for component in components for process in component.tree()]


def _terminable(components: Sequence[Component]) -> list[psutil.Process]:
    return [process for component in components for process in component.terminable()]


class Supervisor:
    """Starts the components, looks after them until told to stop, ends them. Runs in the main thread only.

    ``guard`` is the process above this one.
    """

    def __init__(self, options: Options, guard: int) -> None:
        self._options = options
        self._home = options.home
        self._database, self._warm_parent = options.database, warm_parent_name(options.home)
        database_port = None if self._database is None else self._database.port
        private = private_settings(
            options.home, options.dags, options.port, database_port, options.parallelism, os.environ
        )
        write_settings(options.home, private, tuning_settings(options.parallelism))
        self._environment = component_environment(options.home, private, os.environ)
        self._parent, self._forking = Parent(self._environment), False
        self._mark = database_mark(os.environ, version("apache-airflow-core"))
        self._components = [self._airflow(name, [name, *_ARGUMENTS.get(name, ())]) for name in COMPONENTS]
        if self._database is not None:
            self._components.insert(0, self._program(DATABASE, self._start_database))
        if (name := self._warm_parent) is not None:
            command = [sys.executable, "-P", "-m", "operators.warm", name]
            self._components.append(self._program(WARM_PARENT, lambda: launch.command(command)))
        self._deadline = time.monotonic() + options.timeout
        self._next_probe = 0.0
        self._serves_tasks = False
        self._stop = False
        self._state = State(
            phase="starting",
            guard=Identity.of(guard),
            supervisor=Identity.of(os.getpid()),
            url=f"http://{HOST}:{options.port}",
            port=options.port,
            dags=str(options.dags),
            password_file=str(options.home.passwords),
        )

    def _program(self, name: str, command: Callable[[], Sequence[str]]) -> Component:
        """A component that is executed; its command line is asked for at each start."""
        return Component(name, lambda log: self._execute(command(), log), self._home.log(name))

    def _airflow(self, name: str, arguments: Sequence[str]) -> Component:
        def begin(log: int) -> Process:
            if self._forking:
                return self._parent.start(arguments, log)
            return self._execute(launch.command([sys.executable, "-P", "-m", "airflow", *arguments]), log)

        return Component(name, begin, self._home.log(name))

    def _execute(self, command: Sequence[str], log: int) -> Process:
        return subprocess.Popen(
            command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def _start_database(self) -> Sequence[str]:
        assert self._database is not None
        self._database.prepare()
        return self._database.command()

    def stop(self) -> None:
        """Have :meth:`run` end soon. May be called from a signal handler."""
        self._stop = True

    def run(self) -> None:
        """Run the service until it is told to stop. Raises :class:`ServiceError` if it can't be started or kept up."""
        try:
            self._write_state()
            database = [component for component in self._components if component.name == DATABASE]
            self._look_after_all(database)  # it comes up while Airflow is imported
            self._forking = self._parent.import_airflow(self._deadline - time.monotonic())
            self._wait_until_ready(*database)
            self._migrate()
            self._wait_until_ready(*self._components)
            self._tell_ready()
            while not self._stop:
                self._look_after_all(self._components)
                time.sleep(_TICK)
        finally:
            self._end()

    def _write_state(self, phase: str | None = None) -> None:
        running = {
            component.name: Identity(component.process.pid, component.started)
            for component in self._components
            if component.process is not None
        }
        self._state = self._state.update(components=running, phase=phase or self._state.phase)
        self._state.write(self._home)

    def _migrate(self) -> None:
        """Bring the database to the installed Airflow's schema, unless it was before."""
        if self._stop or is_migrated(self._home, self._mark):
            return
        migration = self._airflow("migrate", ["db", "migrate"])
        migration.start()
        while (code := migration.ended()) is None:
            if self._stop:
                return
            self._check_time(migration)
            time.sleep(_TICK)
        if code:
            raise ServiceError(f"Airflow's database can't be set up:\n{migration.tail()}")
        self._home.migrated.write_text(self._mark)

    def _wait_until_ready(self, *components: Component) -> None:
        """Start these components and wait until they are healthy, or this one is told to stop."""
        while not self._stop:
            self._look_after_all(components)
            waiting = [component for component in components if not self._is_ready(component)]
            if not waiting:
                return
            self._check_time(*waiting)
            time.sleep(_TICK)

    def _tell_ready(self) -> None:
        if self._stop:
            return
        self._write_state("ready")
        with contextlib.suppress(OSError):
            print(ready_line(self._state), flush=True)

    def _check_time(self, *waiting: Component) -> None:
        if time.monotonic() > self._deadline:
            names = ", ".join(component.name for component in waiting)
            raise ServiceError(
                f"not healthy within {self._options.timeout:g} s: {names}. Give it longer with --timeout, or see its "
                f"log:\n{waiting[0].tail()}"
            )

    def _is_ready(self, component: Component) -> bool:
        return component.healthy and (self._serves_tasks or component.name != API_SERVER)

    def _look_after_all(self, components: Sequence[Component]) -> None:
        running = [component.process for component in self._components]
        for component in list(components):
            self._look_after(component)
        self._probe()
        processes.reap(self._pids())
        if running != [component.process for component in self._components]:
            self._write_state()

    def _pids(self) -> set[int]:
        return {component.process.pid for component in self._components if component.process is not None}

    def _look_after(self, component: Component) -> None:
        if (code := component.ended()) is not None:
            if component.name != WARM_PARENT or code:  # it ends by itself to make way for one with new code
                component.count_death()
            given_up = component.quick_deaths >= _QUICK_DEATHS_LIMIT
            if given_up and (component.name != WARM_PARENT or self._state.phase != "ready"):
                raise ServiceError(
                    f"{component.name} {_how_ended(code)}, for the {component.quick_deaths}th time soon after its "
                    f"start, so it is not started again. Its log:\n{component.tail()}"
                )
            # Its orphans came to us: the workers of a dead scheduler would go on beside those of the next one.
            self._end_adopted()
            if given_up:
                self._components.remove(component)
                note(f"{component.name} {_how_ended(code)} once more: tasks start without it (log: {component.log})")
                return
            note(f"{component.name} {_how_ended(code)}; starting it again (log: {component.log})")
            self._serves_tasks = self._serves_tasks and component.name != API_SERVER
        if component.process is None and time.monotonic() >= component.restart and self._may_start(component):
            component.start()

    def _may_start(self, component: Component) -> bool:
        """All wait for the database, and the scheduler for the API server: else tasks left from the last time would fail at once."""
        healthy = {other.name: other.healthy for other in self._components}
        if component.name == DATABASE:
            return True
        if not healthy.get(DATABASE, True):
            return False
        return component.name != "scheduler" or healthy[API_SERVER] or self._state.phase == "ready"

    def _end_adopted(self) -> None:
        def adopted() -> list[psutil.Process]:
            pids = self._pids()
            children = psutil.Process().children()
            return [process for child in children if child.pid not in pids for process in processes.tree(child)]

        # The kernel is about to kill them too. Asked to end instead, tasks would take it for a cancellation and delete their pods.
        processes.end(adopted, 0, ask=list, keep=self._pids())

    def _probe(self) -> None:
        now = time.monotonic()
        if now < self._next_probe:
            return
        health = probe(self._options.port)
        for component in self._components:
            if component.process is not None:
                self._judge(component, health)
        if health is not None and not self._serves_tasks:
            # The first request makes the server build this part of the API, which takes seconds even if nobody waits
            # for the answer any more: ask before a task does.
            self._serves_tasks = answers(self._options.port, EXECUTION_HEALTH_PATH, _WARM_UP_TIMEOUT)
        interval = _PROBE_INTERVAL if self._state.phase == "ready" else _PROBE_INTERVAL_STARTING
        self._next_probe = time.monotonic() + interval

    def _judge(self, component: Component, health: Health | None) -> None:
        """Restart a component that runs, but has shown no sign of life for long."""
        now = time.monotonic()
        unknown = False
        if component.name == DATABASE and self._database is not None:
            component.healthy = self._database.answers()
        elif component.name == WARM_PARENT and self._warm_parent is not None:
            component.healthy = warm.answers(self._warm_parent)
        else:
            component.healthy = is_healthy(component.name, health, component.started)
            unknown = health is None and component.name != API_SERVER
        if component.healthy or unknown:
            component.unhealthy_since = now
        elif now - component.unhealthy_since > _UNHEALTHY_LIMIT:
            note(f"{component.name} has shown no sign of life for {_UNHEALTHY_LIMIT:g} s; ending it")
            # Asked to end, a scheduler that waits for its tasks after it lost the database would have them fail; killed, they run again.
            ask = list if component.name == "scheduler" else component.terminable
            processes.end(component.tree, _API_GRACE, ask, self._pids())

    def _end(self) -> None:
        """End everything; tasks before the API server, so that they can report how they ended, the database last."""
        with contextlib.suppress(OSError):
            self._write_state("stopping")
        tasks = [component for component in self._components if component.name not in (API_SERVER, DATABASE)]
        processes.end(partial(_trees, tasks), _TASK_GRACE, partial(_terminable, tasks), self._pids(), note)
        # When it has closed its connections, the server only spends seconds on taking its interpreter apart.
        server = [component for component in self._components if component.name == API_SERVER]
        processes.end(partial(_trees, server), _API_GRACE, keep=self._pids())
        database = [component for component in self._components if component.name == DATABASE]
        # By SIGTERM it would wait for whoever else is connected; SIGINT ends those.
        processes.send(_terminable(database), signal.SIGINT)
        processes.end(partial(_trees, database), _DATABASE_GRACE, list, self._pids(), note)
        if not processes.end_children(_REST_GRACE):
            left = psutil.Process().children(recursive=True)
            note(f"some processes can't be ended: {', '.join(map(processes.describe, left))}")
        self._home.state.unlink(missing_ok=True)


def ready_line(state: State) -> str:
    """One line: where the service is and how to log in. The password itself only on a terminal."""
    password = f"the password in {state.password_file}"
    if sys.stdout.isatty():
        password = f"password {read_password(Path(state.password_file), state.username)}"
    return f"Airflow is up at {state.url} (log in as {state.username} with {password})"


def read_password(path: Path, username: str = USERNAME) -> str:
    """The password of a user. Raises :class:`ServiceError` if the file doesn't tell."""
    try:
        return str(json.loads(path.read_text())[username])
    except (OSError, ValueError, KeyError) as error:
        raise ServiceError(f"no password for {username} in {path} ({error}); remove the file and start again") from None


def run(options: Options) -> int:
    """Run a service in this process and one below it, until told to stop by SIGINT, SIGTERM or SIGHUP: an exit code."""
    guard = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # Signals wait until there are handlers for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child = os.fork()
    if child == 0:
        os._exit(_supervise(options, guard))
    return _guard(options, child)


def _handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _supervise(options: Options, guard: int) -> int:
    """The child's part of :func:`run`."""
    try:
        # Ctrl-C goes to the guard, which passes it on.
        os.setpgid(0, 0)
        launch.adopt_orphans()
        launch.end_with_parent(signal.SIGTERM, guard)
        supervisor = Supervisor(options, guard)
        _handle_stop_signals(lambda *_: supervisor.stop())
        supervisor.run()
    except ServiceError as error:
        note(str(error))
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    return 0


def _guard(options: Options, child: int) -> int:
    """The parent's part of :func:`run`: pass signals on, and end what the child leaves if it is killed."""
    received: list[int] = []
    _handle_stop_signals(lambda number, _: received.append(number))
    launch.adopt_orphans()
    watched = options.watched
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if watched is not None and not watched.alive:
            note("the process that this service was to end with has ended")
            received.append(signal.SIGTERM)
            watched = None
        while received:
            os.kill(child, received.pop())
        processes.reap({child})
        time.sleep(_TICK)
    code = os.waitstatus_to_exitcode(ended[1])
    if code < 0:
        note(f"the supervisor {_how_ended(code)}; ending what it started")
    processes.end_children(_REST_GRACE)
    options.home.state.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code
