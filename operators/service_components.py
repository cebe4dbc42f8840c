"""Airflow's components as forks of the supervisor, which has imported once what they import: each works after seconds, and all share that memory.

What Airflow sets up at its import, such as connections, logging and this service's own settings, each of them sets up for itself. So
only modules are shared.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from setproctitle import getproctitle

from operators import forks, launch
from operators.service_preload import preload
from operators.service_state import ServiceError

_WITHOUT_SET_UP = "_AIRFLOW__AS_LIBRARY"
"""Environment variable (``airflow/__init__.py``): importing Airflow only imports."""

_MODULES = (
    "airflow.jobs.scheduler_job_runner",
    "airflow.executors.local_executor",
    "airflow.dag_processing.manager",
    "airflow.jobs.triggerer_job_runner",
    "airflow.api_fastapi.execution_api.app",
    "airflow.api_fastapi.execution_api.routes",
    "airflow.cli.cli_parser",
)
"""What more than one component imports. The API server alone has as much again, which can be imported while the others start."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FAILED = 70


def import_airflow(environment: Mapping[str, str], stopped: Callable[[], bool]) -> None:
    """Take over the environment of the components and import what they share, unless told to stop.

    Raises:
        ServiceError: Airflow can't be imported.
    """
    getproctitle()  # it looks where the command line and the first environment are, and finds them only while that one is in use
    # numpy's library would start threads, which a fork does not have.
    _set_environment({**environment, _WITHOUT_SET_UP: "1", "OPENBLAS_NUM_THREADS": "1"})
    if not sys.flags.safe_path:
        del sys.path[0]  # as with -P: what lies beside a script or in the working directory shadows nothing
    gc.disable()
    try:
        for module in _MODULES:
            if stopped():
                return
            importlib.import_module(module)
        preload()
    except Exception as error:
        raise ServiceError(f"Airflow can't be imported: {type(error).__name__}: {error}") from error
    finally:
        gc.enable()
        _set_environment(environment)
    gc.freeze()  # collections in the children would copy all these pages


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class Fork:
    """A child that was forked; as much of ``subprocess.Popen`` as a supervisor needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code if it has ended, negative for a signal, else ``None``."""
        if self._code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(ended[1])
        return self._code


def start(arguments: Sequence[str], log: int) -> Fork:
    """Fork a child that runs ``airflow`` with these arguments, in a session of its own, and ends with this process.

    ``log`` is a descriptor for all that it prints.
    """
    parent = os.getpid()
    # A signal that comes before the child has handlers of its own would call those of its parent.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
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
            forks.become([sys.executable, "-m", "airflow", *arguments], [os.open(os.devnull, os.O_RDONLY), log, log])
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the service's lock is not the child's
            code = forks.end_of(lambda: _run(arguments))
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Fork(pid)


def _run(arguments: Sequence[str]) -> None:
    from airflow import settings

    sys.argv = ["airflow", *arguments]  # the settings ask which component this is
    settings.initialize()  # type: ignore[no-untyped-call]
    forks.run_module(["airflow", *arguments])
