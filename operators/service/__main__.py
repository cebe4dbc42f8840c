"""The command ``chunkflow-airflow``: a private Airflow on this machine, up, down, status."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from chunkflow_core.errors import ChunkflowError, UsageError
from operators.service import processes
from operators.service.report import describe, report_of
from operators.service.service import DEFAULT_TIMEOUT, checked_options, find, run_here, start_detached, stop
from operators.service.settings import Home
from operators.service.state import AlreadyRunning, ServiceError, State, ready_line

_DESCRIPTION = (
    "A private Airflow on this machine: database, scheduler, DAG processor, triggerer and API server with its UI."
)
_EXIT_DEGRADED = 1
_EXIT_NOT_RUNNING = 3


def _up(arguments: argparse.Namespace) -> int:
    options = checked_options(
        arguments.home,
        dags=arguments.dags,
        port=arguments.port,
        parallelism=arguments.parallelism,
        timeout=arguments.timeout,
        watched=arguments.with_parent,
        durable=not arguments.no_fsync,
        environment=os.environ,
    )
    if not arguments.detach:
        return run_here(options)
    try:
        start_detached(options, os.environ)
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
    print("stopped" if stop(home) else f"nothing runs in {home.path}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    home = Home(arguments.home.absolute())
    report = report_of(home)
    if arguments.json:
        print(json.dumps(report or {"healthy": False, "phase": "not running", "home": str(home.path)}, indent=2))
    else:
        print(describe(report) if report else f"nothing runs in {home.path}")
    if report is None:
        return _EXIT_NOT_RUNNING
    return 0 if report["healthy"] else _EXIT_DEGRADED


class _Parser(argparse.ArgumentParser):
    """Ends with the exit code that this project uses for wrong usage."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="chunkflow-airflow", description=_DESCRIPTION)
    common = _Parser(add_help=False)
    common.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("CHUNKFLOW_AIRFLOW_HOME", ".airflow")),
        metavar="DIR",
        help="where the service keeps everything: database, logs, keys (default: $CHUNKFLOW_AIRFLOW_HOME, else "
        ".airflow in the working directory; here: %(default)s)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="up | down | status")
    up = commands.add_parser(
        "up",
        parents=[common],
        help="start it, and keep it running until Ctrl-C or SIGTERM",
        description="Start a private Airflow on this machine, listening on 127.0.0.1 only. It runs until Ctrl-C, "
        "SIGTERM or SIGHUP; --detach leaves it in the background until `chunkflow-airflow down`. The environment is "
        "passed on to the tasks. It brings a PostgreSQL of its own; AIRFLOW__DATABASE__SQL_ALCHEMY_CONN names another "
        "one. Exit codes: 0 it ran and was stopped (with --detach: it runs), 1 it failed, 64 wrong usage, 66 no DAGs "
        "folder, 75 one runs in this home already.",
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
