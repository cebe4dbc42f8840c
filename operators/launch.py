"""Run a command that ends when the process that started it ends, even by SIGKILL.

    python -m operators.launch [--signal TERM|KILL|QUIT] [--parent PID] -- COMMAND ARG...

asks the kernel for a signal at the parent's death (``prctl(PR_SET_PDEATHSIG)``), then becomes
COMMAND. This is what ``subprocess``'s ``preexec_fn`` is often used for, without running Python
between fork and exec of a threaded process. Where there is no ``prctl`` (macOS), COMMAND just runs.

Two properties of the kernel's to know: the signal comes when the *thread* that started the process
ends, so start long-lived commands from a thread that lives as long; and children of COMMAND do not
inherit it. :func:`tie_forks` hands it down through ``os.fork`` of the calling program.

This module stays small: it is imported before every supervised command and in every Airflow
process.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_NOT_EXECUTABLE = 126
_NOT_FOUND = 127


def _find_prctl() -> Callable[[int, int], int] | None:
    """The C library's ``prctl``, looked up once, so that a forked child only has to call it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def call(option: int, value: int) -> int:
        return int(prctl(option, ctypes.c_ulong(value), 0, 0, 0))

    return call


_prctl = _find_prctl()


def end_with_parent(signal_number: int, parent: int) -> None:
    """Have this process get ``signal_number`` when the thread that started it ends.

    ``parent`` is the id of the process that is expected to be the parent: if it died before this
    call, the signal is raised at once. Does nothing where the kernel can't do it.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal_number)


def adopt_orphans() -> None:
    """Make this process the new parent of every descendant whose own parent dies.

    Nothing where not supported.
    """
    if _prctl is not None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def tie_forks(signal_number: int = signal.SIGKILL) -> None:
    """Have every process that this one forks from now on end with its parent, and their forks.

    Processes forked by a thread other than the main one are left alone: their signal would come at
    the end of that thread, not of the process. Programs that are executed without ``preexec_fn``
    don't pass through here; use :func:`command` for those.
    """
    if _prctl is None:
        return
    forking = threading.local()

    def before() -> None:
        is_main = threading.current_thread() is threading.main_thread()
        forking.parent = os.getpid() if is_main else None

    def after_in_child() -> None:
        if forking.parent is not None:
            end_with_parent(signal_number, forking.parent)

    os.register_at_fork(before=before, after_in_child=after_in_child)


def command(argv: Sequence[str], signal_name: str = "KILL") -> list[str]:
    """The command line that runs ``argv`` as a child of this process and ends it with this one."""
    # -P: whatever lies in the working directory must not shadow an installed module.
    launcher = [sys.executable, "-P", "-m", "operators.launch", "--signal", signal_name, "--parent", str(os.getpid())]
    return [*launcher, "--", *argv]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m operators.launch",
        description="Run COMMAND so that it ends when the process that started it ends, however that one ends.",
    )
    parser.add_argument(
        "--signal",
        choices=("TERM", "KILL", "QUIT"),
        default="TERM",
        help="what COMMAND gets then (default: %(default)s)",
    )
    parser.add_argument(
        "--parent",
        type=int,
        default=os.getppid(),
        metavar="PID",
        help="the process to end with, which must be the parent (default: the parent found at the start)",
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="the program and its arguments, after --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Become COMMAND.

    Returns:
        Only if that fails: 127 if there is no such program, 126 if it can't be executed.
    """
    arguments = _parse(argv)
    # Python ignores these two for itself, and what is ignored stays so in COMMAND.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    end_with_parent(signal.Signals[f"SIG{arguments.signal}"], arguments.parent)
    try:
        os.execvp(arguments.command[0], arguments.command)
    except OSError as error:
        print(f"can't run {arguments.command[0]}: {error.strerror}", file=sys.stderr)
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main())
