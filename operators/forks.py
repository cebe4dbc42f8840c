"""What makes a forked child as good as a process that was started, with its imports done.

The parent from which tasks start warm (:mod:`operators.warm`) and the supervisor of a service fork
such children.
"""

from __future__ import annotations

import atexit
import io
import os
import runpy
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, TextIO, cast

from setproctitle import setproctitle


def become(command: Sequence[str], streams: Sequence[int]) -> None:
    """Take over a command line, as others see it, and the three standard streams.

    Args:
        command: Shown as the process's title.
        streams: Descriptors of standard input, output and error.
    """
    setproctitle(" ".join(command))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    standard: Any = sys
    standard.stdin = standard.__stdin__ = open(0, encoding=_encoding(sys.stdin))  # noqa: SIM115
    standard.stdout = standard.__stdout__ = _text(1, sys.stdout)
    standard.stderr = standard.__stderr__ = _text(2, sys.stderr)


def _text(descriptor: int, like: TextIO | None) -> TextIO:
    """A standard stream that keeps nothing back, as with ``python -u``."""
    binary = cast(BinaryIO, open(descriptor, "wb", 0))  # noqa: SIM115
    return io.TextIOWrapper(binary, _encoding(like), like.errors if like else None, write_through=True)


def _encoding(stream: TextIO | None) -> str:
    """The encoding of a standard stream, which is ``None`` if this process began with it closed."""
    return "utf-8" if stream is None else stream.encoding


def run_module(arguments: Sequence[str]) -> None:
    """Run a module as ``python -P -m`` does."""
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def end_of(job: Callable[[], None]) -> int:
    """Run a job as a program; its exit code.

    All that a program's end brings, but for taking the interpreter apart: that would copy the
    parent's memory, and take longer than many a job.
    """
    code = 0
    try:
        job()
    except SystemExit as ending:
        code = _exit_code(ending)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does in its children
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code


def _exit_code(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return (ending.code or 0) & 255
    print(ending.code, file=sys.stderr)
    return 1
