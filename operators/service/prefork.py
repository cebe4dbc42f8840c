"""Airflow's components as forks of the supervisor, which has imported once what they import.

Each works after seconds, and all share that memory.

Airflow is imported without its set-up. Connections, logging and this service's own settings each
component sets up for itself, as one that was executed does.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from setproctitle import getproctitle

from operators import forks, launch
from operators.service.state import ServiceError

_WITHOUT_SET_UP = "_AIRFLOW__AS_LIBRARY"
"""Environment variable (``airflow/__init__.py``): importing Airflow only imports."""

_EAGER = ("AIRFLOW__CORE__LAZY_LOAD_PLUGINS", "AIRFLOW__CORE__LAZY_DISCOVER_PROVIDERS")
"""Environment variables by which importing Airflow does more, which needs its set-up."""

_MODULES = (
    "airflow.jobs.scheduler_job_runner",
    "airflow.executors.local_executor",
    "airflow.dag_processing.manager",
    "airflow.jobs.triggerer_job_runner",
    "airflow.api_fastapi.execution_api.app",
    "airflow.api_fastapi.execution_api.routes",
    "airflow.cli.cli_parser",
)
"""What more than one component imports.

The API server alone has as much again, which can be imported while the others start.
"""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals by which a service is told to stop."""

_THREADS = Path("/proc/self/task")
_DESCRIPTORS = Path("/proc/self/fd")
_FAILED = 70


class _Interrupted(BaseException):
    """A signal came while something else was at work, which must not take it for its own error."""


class Parent:
    """This process as the parent of components."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """``environment`` is what the components run with."""
        self._environment = environment
        self._inherited: list[int] = []

    def import_airflow(self, seconds: float) -> bool:
        """Take over the components' environment and import what they share.

        Returns:
            Whether components can be forked now: not if it was told to stop meanwhile.

        Raises:
            ServiceError: Airflow can't be imported, or not in this time.
        """
        if sys.platform != "linux" or set(_EAGER) & self._environment.keys():
            return False
        self._inherited = _open_descriptors()
        getproctitle()  # it finds the command line only while the first environment is in use
        _set_environment({**self._environment, _WITHOUT_SET_UP: "1"})
        if not sys.flags.safe_path:
            del sys.path[0]  # as with -P: what lies beside a script or in the working directory shadows nothing
        gc.disable()
        interruptions: list[int] = []
        try:
            with _interruptible(seconds, interruptions), _no_warnings():
                for module in _MODULES:
                    importlib.import_module(module)
        except BaseException as error:
            # Where an import is interrupted, an extension module may make another error of it.
            if signal.SIGALRM in interruptions:
                raise ServiceError(f"Airflow could not be imported within {seconds:.0f} s") from None
            if interruptions:
                return False
            if not isinstance(error, Exception):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            raise ServiceError(f"Airflow can't be imported: {told}") from error
        finally:
            gc.enable()
            _set_environment(self._environment)
        gc.collect()
        gc.freeze()  # collections in the children would copy all these pages
        # A lock that another thread holds at a fork stays locked for ever in the child.
        return len(list(_THREADS.iterdir())) == 1

    def start(self, arguments: Sequence[str], log: int) -> Fork:
        """Fork a child that runs ``airflow`` in a session of its own, and ends with this process.

        Args:
            arguments: Of ``airflow``.
            log: A descriptor for all that it prints.
        """
        parent = os.getpid()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        # A signal that comes before the child has handlers of its own would call those of its
        # parent.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        pid = os.fork()
        if pid == 0:
            code = _FAILED
            try:
                launch.end_with_parent(signal.SIGKILL, parent)
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, [])
                nothing = os.open(os.devnull, os.O_RDONLY)
                forks.become([sys.executable, "-m", "airflow", *arguments], [nothing, log, log])
                for descriptor in (nothing, log, *self._inherited):  # such as the service's lock
                    with suppress(OSError):
                        os.close(descriptor)
                code = forks.end_of(lambda: _run(arguments))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return Fork(pid)


class Fork:
    """A child that was forked; as much of ``subprocess.Popen`` as a supervisor needs."""

    def __init__(self, pid: int) -> None:
        """Wait for the child with this process id."""
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The child's exit code if it has ended, negative for a signal, else ``None``."""
        if self._code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(ended[1])
        return self._code


def _run(arguments: Sequence[str]) -> None:
    from airflow import settings

    sys.argv = ["airflow", *arguments]  # the settings ask which component this is
    settings.initialize()  # type: ignore[no-untyped-call]
    forks.run_module(["airflow", *arguments])


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _open_descriptors() -> list[int]:
    """The descriptors that this process has besides the standard streams."""
    listed = [path for path in _DESCRIPTORS.iterdir() if int(path.name) > 2]
    # The one by which they were listed is closed by now.
    return [int(path.name) for path in listed if path.is_symlink()]


@contextmanager
def _interruptible(seconds: float, interruptions: list[int]) -> Iterator[None]:
    """Raise ``_Interrupted`` at a signal to stop, or after so many seconds.

    The signal is added to ``interruptions``, and its own handler runs first.

    What is imported may run commands of the user's, and hang.
    """
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM)}

    def interrupt(number: int, frame: FrameType | None) -> None:
        interruptions.append(number)
        if callable(handlers[number]):
            handlers[number](number, frame)
        raise _Interrupted

    try:
        for number in handlers:
            signal.signal(number, interrupt)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Ignore warnings of modules about each other.

    What modules say to Python's filters stays, as ``catch_warnings`` would not have it.
    """
    warnings.simplefilter("ignore")
    filters: Any = warnings.filters
    ours = filters[0]
    try:
        yield
    finally:
        if ours in filters:
            filters.remove(ours)
