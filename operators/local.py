"""Runs a stage's command as a process on the worker."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO

_ERROR = "error: "
_GRACE = 10.0
"""Seconds between asking a process to end and killing it."""


class LocalRunner:
    """One command at a time, its output in the task's log, its process tree gone when the task is."""

    def __init__(self, log: logging.Logger, environment: Mapping[str, str] | None = None) -> None:
        """Log to ``log``; ``environment`` is added to this process's."""
        self._log, self._environment = log, dict(environment or {})
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[str]) -> tuple[int, str, str]:
        """Run ``python -m`` with the arguments.

        The process is told to end when this one does, even by SIGKILL.

        Returns:
            Exit code, standard output, and the command's last word (its error message if it gave one).
        """
        command = [sys.executable, "-m", *arguments]
        self._log.info("running: %s", " ".join(["python", "-m", *arguments]))
        guarded = [sys.executable, "-m", "operators.launch", "--signal", "KILL", "--parent", str(os.getpid())]
        self._process = subprocess.Popen(
            [*guarded, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | self._environment | {"PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        tail: deque[str] = deque(maxlen=40)
        stdout: list[str] = []
        errors = threading.Thread(target=self._stream, args=(self._process.stderr, tail, None), daemon=True)
        errors.start()
        self._stream(self._process.stdout, tail, stdout)
        errors.join()
        code = self._process.wait()
        return code, "".join(stdout), _last_word(list(tail))

    def kill(self) -> None:
        """End the running command and everything it started."""
        if self._process is None or self._process.poll() is not None:
            return
        group = self._process.pid
        os.killpg(group, signal.SIGTERM)
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(group, signal.SIGKILL)
            self._process.wait()

    def _stream(self, pipe: IO[str], tail: deque[str], kept: list[str] | None) -> None:
        for line in pipe:
            if kept is not None:
                kept.append(line)
            tail.append(line.rstrip())
            self._log.info("%s", line.rstrip())


def _last_word(lines: list[str]) -> str:
    for number, line in reversed(list(enumerate(lines))):
        if line.startswith(_ERROR):
            return "\n".join([line.removeprefix(_ERROR), *lines[number + 1 :]])
    return lines[-1] if lines else "no output"
