"""Log files of the service and of its components, and messages for people."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import datetime
from pathlib import Path

LOG_TAIL_LINES = 15
"""How many of the last lines of a component's log are told to the user."""
_LOG_LIMIT_BYTES = 10_000_000


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
