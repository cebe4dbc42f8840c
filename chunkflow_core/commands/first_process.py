"""Run a command as the first process of a container, and keep a copy of its log in storage.

    python -m chunkflow_core.commands.first_process --log gs://bucket/logs/pod.log -- MODULE ARG...

Variables (``${NAME}``) in the address are those of this process.

A pod's log is gone with the pod; the copy stays. What the command prints (standard output and
error, merged) goes to standard output as it comes, and to the copy: when the command starts, every
few seconds while there is something new, when the pod is asked to end, and at the end. The exit
code is the command's, whatever becomes of the copy.

The duties of a container's first process are done too: SIGTERM and SIGINT are handed on, orphans
are reaped. If the command fails and the kernel has killed a process for memory meanwhile, that is
said last: it may have been one that the command had started.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from chunkflow_core.commands.log_copy import KILLED_FOR_MEMORY, Copy, Output
from chunkflow_core.errors import UsageError
from chunkflow_core.variables import expand

INTERVAL = 15.0
PATIENCE = 10.0

_PIECE = 64 * 2**10
_POLL = 0.1
"""Seconds until the end of the command is noticed, though others keep its output open."""
_KILLS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
"""Where a container sees how many of its processes were killed for memory: cgroup v2, and v1."""
_WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
_SI_KERNEL = 0x80  # from <asm-generic/siginfo.h>: sent by the kernel, as by a terminal's Ctrl-C to all that run in it
_PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>


def run(command: Sequence[str], url: str | None, interval: float = INTERVAL, patience: float = PATIENCE) -> int:
    """Run a module with arguments, and return its exit code, 128 + n for a signal n.

    Args:
        command: Module and arguments.
        url: Address of the copy of its log; without one, or on a terminal, the command prints where
            this process does.
        interval: Seconds between two uploads.
        patience: Seconds that the last upload may delay the end.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # from here on they wait until they are asked for
    _adopt_orphans()
    output, kills = Output(), _kills()
    if url is None or os.isatty(1):
        child = _start(command, mask)
        return _ended(_wait_for(child, None), output, kills)
    source, sink = os.pipe()
    child = _start(command, mask, sink)
    os.close(sink)
    copy, ended = Copy(output, url, interval), threading.Event()
    pump = threading.Thread(target=_hand_on, args=(source, output, ended))
    pump.start()
    copy.start()
    code = _wait_for(child, copy)
    ended.set()
    pump.join()
    code = _ended(code, output, kills)
    copy.finish(patience)
    return code


def _start(command: Sequence[str], mask: set[signal.Signals] | set[int], output: int | None = None) -> int:
    """Start the module with this signal mask, and return its process id."""
    arguments = [sys.executable, "-m", *command]
    printing = [(os.POSIX_SPAWN_DUP2, output, stream) for stream in (1, 2)] if output is not None else []
    return os.posix_spawn(
        sys.executable,
        arguments,
        os.environ | {"PYTHONUNBUFFERED": "1"},
        file_actions=printing,
        setsigmask=mask,
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # which Python ignores for itself
    )


def _wait_for(child: int, copy: Copy | None) -> int:
    """Hand on signals and reap what dies, until the child has died.

    Returns:
        The child's exit code, negative for a signal.
    """
    handed_on: set[int] = set()
    while True:
        received = signal.sigwaitinfo(_WATCHED)
        if received.si_signo == signal.SIGCHLD:
            code = _reap(child)
            if code is not None:
                return code
        elif received.si_signo not in handed_on and received.si_code != _SI_KERNEL:
            handed_on.add(received.si_signo)
            os.kill(child, received.si_signo)
            if copy is not None:
                copy.hurry()


def _reap(child: int) -> int | None:
    """Collect all that have died: one SIGCHLD can stand for several.

    Returns:
        The child's exit code if it is among them, else None.
    """
    code = None
    with suppress(ChildProcessError):
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            if process == child:
                code = os.waitstatus_to_exitcode(status)
    return code


def _hand_on(source: int, output: Output, ended: threading.Event) -> None:
    """Read until nobody can write; or, once the command has ended, all that is there."""
    while not ended.is_set():
        if select.select([source], [], [], _POLL)[0]:
            data = os.read(source, _PIECE)
            if not data:
                return
            output.write(data)
    left = int.from_bytes(fcntl.ioctl(source, termios.FIONREAD, bytes(4)), sys.byteorder)
    while left > 0:
        data = os.read(source, min(left, _PIECE))
        output.write(data)
        left -= len(data)


def _ended(code: int, output: Output, kills: int) -> int:
    for_memory = code != 0 and _kills() > kills
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        why = f": {KILLED_FOR_MEMORY}" if for_memory else ""
        output.say(f"error: killed by signal {-code} ({name}){why}", now=True)
        return 128 - code
    if for_memory:
        output.say(KILLED_FOR_MEMORY, now=True)
    return code


def _kills() -> int:
    """How many processes of this container were killed for memory; 0 if the kernel does not say."""
    for file in _KILLS:
        with suppress(OSError):
            counts = dict(line.split() for line in Path(file).read_text().splitlines() if " " in line)
            return int(counts.get("oom_kill", 0))
    return 0


def _adopt_orphans() -> None:
    """Have orphans handed to this process.

    The kernel does so by itself for the first process of a container, unless containers share their
    processes.
    """
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\nSee {self.prog} -h\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _Parser(
        prog="python -m chunkflow_core.commands.first_process",
        description="Run python -m MODULE ARG..., with the duties of a container's first process; keep a copy of its "
        "log.",
        epilog="The exit code is the command's, 128 + n if it was killed by signal n.",
    )
    parser.add_argument("--log", metavar="URL", help="storage address of the copy, such as gs://bucket/logs/pod.log")
    parser.add_argument(
        "--interval", type=float, default=INTERVAL, metavar="S", help="seconds between uploads (default: %(default)g)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="S",
        help="seconds that the last upload may delay the end (default: %(default)g)",
    )
    parser.add_argument("command", nargs="+", metavar="MODULE", help="the module and its arguments, after --")
    options = parser.parse_args(arguments)
    url = options.log and expand(options.log)
    return run(options.command, url, options.interval, options.patience)


if __name__ == "__main__":
    os._exit(main())  # without waiting for threads of storage clients, which could hold the end
