"""The processes of a single-machine Airflow, kept running, and ended without a remainder.

    guard ── supervisor ─┬─ database ── its connections
                         ├─ api-server
                         ├─ scheduler ── LocalExecutor workers ── tasks
                         ├─ warm parent ── what the tasks run
                         ├─ dag-processor ── file processors
                         └─ triggerer ── trigger runner

Airflow's components are forks of the supervisor (``operators.service.prefork``) where that can be.

Guard and supervisor both adopt the orphans below them, so either can be killed and the other one
ends the rest. If both are killed at once, the kernel ends the components (``operators.launch``),
and what they forked (``airflow_local_settings.py``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil

from operators import launch, warm
from operators.service import processes
from operators.service.component import Component, Process, how_ended, terminable, trees
from operators.service.database import Database
from operators.service.health import (
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
from operators.service.logs import note
from operators.service.prefork import Parent
from operators.service.processes import Identity
from operators.service.settings import (
    HOST,
    Home,
    component_environment,
    database_mark,
    is_migrated,
    private_settings,
    tuning_settings,
    warm_parent_name,
    write_settings,
)
from operators.service.state import ServiceError, State, ready_line

# All in seconds.
TICK = 0.2
_PROBE_INTERVAL_STARTING = 0.5
_PROBE_INTERVAL = 5.0
_WARM_UP_TIMEOUT = 0.5
_UNHEALTHY_LIMIT = 120.0
# Tasks get this long to clean up (on_kill) and to report how they ended; the API server to finish
# its requests.
_TASK_GRACE = 10.0
_API_GRACE = 1.0
_DATABASE_GRACE = 10.0
REST_GRACE = 1.0

_QUICK_DEATHS_LIMIT = 5

# Log servers listen on all interfaces, and are not needed where the API server reads the same
# files.
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


class Supervisor:
    """Starts the components, looks after them until told to stop, ends them.

    Runs in the main thread only.

    ``guard`` is the process above this one.
    """

    def __init__(self, options: Options, guard: int) -> None:
        """Write the settings of the service's Airflow, and begin to tell of the service."""
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
        """Run the service until it is told to stop.

        Raises :class:`ServiceError` if it can't be started or kept up.
        """
        try:
            self._write_state()
            database = [component for component in self._components if component.name == DATABASE]
            self._look_after_all(database)  # it comes up while Airflow is imported
            self._forking = self._parent.import_airflow(self._deadline - time.monotonic())
            self._wait_until_ready(*database)
            self._migrate()
            self._wait_until_ready(*self._components)
            self._announce()
            while not self._stop:
                self._look_after_all(self._components)
                time.sleep(TICK)
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
            time.sleep(TICK)
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
            time.sleep(TICK)

    def _announce(self) -> None:
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
                    f"{component.name} {how_ended(code)}, for the {component.quick_deaths}th time soon after its "
                    f"start, so it is not started again. Its log:\n{component.tail()}"
                )
            # Its orphans came to us: the workers of a dead scheduler would go on beside those of
            # the next one.
            self._end_adopted()
            if given_up:
                self._components.remove(component)
                note(f"{component.name} {how_ended(code)} once more: tasks start without it (log: {component.log})")
                return
            note(f"{component.name} {how_ended(code)}; starting it again (log: {component.log})")
            self._serves_tasks = self._serves_tasks and component.name != API_SERVER
        if component.process is None and time.monotonic() >= component.restart and self._may_start(component):
            component.start()

    def _may_start(self, component: Component) -> bool:
        """Whether all that the component waits for is healthy.

        All wait for the database, and the scheduler for the API server: else tasks left from the
        last time would fail at once.
        """
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

        # The kernel is about to kill them too. Asked to end instead, tasks would take it for a
        # cancellation and delete their pods.
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
            # The first request makes the server build this part of the API, which takes seconds
            # even if nobody waits for the answer any more: ask before a task does.
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
            # Asked to end, a scheduler that waits for its tasks after it lost the database would
            # have them fail; killed, they run again.
            ask = list if component.name == "scheduler" else component.terminable
            processes.end(component.tree, _API_GRACE, ask, self._pids())

    def _end(self) -> None:
        """End everything: tasks before the API server, the database last.

        So tasks can report how they ended.
        """
        with contextlib.suppress(OSError):
            self._write_state("stopping")
        tasks = [component for component in self._components if component.name not in (API_SERVER, DATABASE)]
        processes.end(partial(trees, tasks), _TASK_GRACE, partial(terminable, tasks), self._pids(), note)
        # When it has closed its connections, the server only spends seconds on taking its
        # interpreter apart.
        server = [component for component in self._components if component.name == API_SERVER]
        processes.end(partial(trees, server), _API_GRACE, keep=self._pids())
        database = [component for component in self._components if component.name == DATABASE]
        # By SIGTERM it would wait for whoever else is connected; SIGINT ends those.
        processes.send(terminable(database), signal.SIGINT)
        processes.end(partial(trees, database), _DATABASE_GRACE, list, self._pids(), note)
        if not processes.end_children(REST_GRACE):
            left = psutil.Process().children(recursive=True)
            note(f"some processes can't be ended: {', '.join(map(processes.describe, left))}")
        self._home.state.unlink(missing_ok=True)
