"""Runs the commands of a volume's DAG as processes on the worker."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import IO

from airflow.sdk import Context
from airflow.sdk.configuration import conf

from chunkflow_core.cpus import CPUS_VARIABLE, available_cpus
from operators import base
from operators.outcomes import classify, last_word

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
        return code, "".join(stdout), last_word(list(tail)) or "no output"

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


class LocalOperator(base.Command):
    """A command as a process on the worker."""

    def execute(self, context: Context) -> None:
        """Run the command; ``AirflowFailException`` if a retry can't help, ``AirflowException`` if it may."""
        with base.telling(context):
            self.before(context)
            code, output, message = self.runner.run(self.command_line(self.spec, context))
            if code:
                base.raise_for(classify(code, message, inputs_may_come=self.inputs_may_come))
            self.result(output, context)

    def on_kill(self) -> None:
        """End the command when the task is cleared, marked or killed."""
        self.runner.kill()

    @cached_property
    def runner(self) -> LocalRunner:
        """What runs the command."""
        return LocalRunner(self.log, self.environment)  # type: ignore[arg-type]

    @property
    def environment(self) -> dict[str, str]:
        """For a block, the machine's CPUs shared out among the tasks that may run at once."""
        if self.block is None:
            return {}
        assert self.dag is not None
        blocks = prod(self.volume.grid.shape)
        tasks = min(self.dag.max_active_tasks, conf.getint("core", "parallelism"), blocks)
        return {CPUS_VARIABLE: str(max(1, available_cpus() // tasks))}


class InferenceAndDonateOperator(base.Inference, LocalOperator):
    __doc__ = base.Inference.__doc__


class ReceiveAndBlendOperator(base.Blending, LocalOperator):
    __doc__ = base.Blending.__doc__


class PrepareOperator(base.Preparation, LocalOperator):
    __doc__ = base.Preparation.__doc__


class SelectBlocksOperator(base.Selection, LocalOperator):
    __doc__ = base.Selection.__doc__


class VerifyOperator(base.Verification, LocalOperator):
    __doc__ = base.Verification.__doc__


class PublishOperator(base.Publication, LocalOperator):
    __doc__ = base.Publication.__doc__


CommandOperator = LocalOperator
"""Runs any other command."""
