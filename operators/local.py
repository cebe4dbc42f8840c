"""Tasks as processes on the worker."""

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
from pathlib import Path

from airflow.sdk import Context
from airflow.sdk.configuration import conf

from chunkflow_core.machine import CPUS_VARIABLE, available_cpus
from operators import warm
from operators.command_operator import CommandOperator, failure_reported, raise_for
from operators.outcomes import classify, last_word
from operators.warm import Child

_GRACE = 10.0
"""Seconds between asking a process to end and killing it."""


class ColdChild:
    """A command as a process that starts from nothing.

    It ends when this process does, even by SIGKILL.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], streams: Sequence[int]) -> None:
        """Start ``python -m``.

        Args:
            arguments: Module and arguments.
            environment: All of its environment.
            streams: Descriptors of its standard input, output and error.
        """
        guard = [sys.executable, "-m", "operators.launch", "--signal", "KILL", "--parent", str(os.getpid())]
        stdin, stdout, stderr = streams
        self._process = subprocess.Popen(
            [*guard, "--", sys.executable, "-m", *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            env=dict(environment),
        )

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command's end and give its exit code; see ``operators.warm.Child.wait``."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def terminate(self) -> None:
        """Ask the command, and all of its process group, to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End the command, and all of its process group."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


class CommandRunner:
    """Runs one command at a time: its output goes to the task's log, its processes end with it."""

    def __init__(
        self, log: logging.Logger, environment: Mapping[str, str] | None = None, imports: Sequence[str] = ()
    ) -> None:
        """Log to ``log``.

        Args:
            log: Where the command's output goes.
            environment: Added to this process's.
            imports: Modules that the command takes long to import, for a parent that keeps them
                (``operators.warm``).
        """
        self._log, self._environment, self._imports = log, dict(environment or {}), list(imports)
        self._child: Child | None = None

    def run(self, arguments: Sequence[str]) -> tuple[int, str, str]:
        """Run ``python -m`` with the arguments.

        The process is told to end when this one does, even by SIGKILL.

        Returns:
            Exit code, standard output, and the command's last word (its error message if it gave
            one).
        """
        self._log.info("running: %s", " ".join(["python", "-m", *arguments]))
        environment = os.environ | self._environment | {"PYTHONUNBUFFERED": "1"}
        with Path(os.devnull).open("rb") as nothing:
            (out, out_end), (err, err_end) = os.pipe(), os.pipe()
            try:
                streams = [nothing.fileno(), out_end, err_end]
                self._child = warm.start(arguments, environment, streams, self._imports) or ColdChild(
                    arguments, environment, streams
                )
            finally:
                os.close(out_end)
                os.close(err_end)
        tail: deque[str] = deque(maxlen=40)
        stdout: list[str] = []
        errors = threading.Thread(target=self._stream, args=(err, tail, None), daemon=True)
        errors.start()
        self._stream(out, tail, stdout)
        errors.join()
        return self._child.wait(), "".join(stdout), last_word(list(tail)) or "no output"

    def kill(self) -> None:
        """End the running command and everything it started."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(_GRACE)
        except TimeoutError:
            self._child.kill()
            self._child.wait()

    def _stream(self, pipe: int, tail: deque[str], kept: list[str] | None) -> None:
        with open(pipe, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if kept is not None:
                    kept.append(line)
                tail.append(line.rstrip())
                self._log.info("%s", line.rstrip())


class ProcessOperator(CommandOperator):
    """Runs a command as a process on the worker."""

    def execute(self, context: Context) -> None:
        """Run the command.

        Raises:
            AirflowFailException: It failed, and a retry can't help.
            AirflowException: It failed, and a retry may help.
        """
        with failure_reported(context):
            run = self.run_of(context)
            self.command.check(run)
            code, output, message = self.runner.run(self.command.line(self.spec, run))
            if code:
                raise_for(classify(code, message, inputs_may_come=self.command.inputs_may_come))
            self.use_result(output, run)

    def on_kill(self) -> None:
        """End the command when the task is cleared, marked or killed."""
        self.runner.kill()

    @cached_property
    def runner(self) -> CommandRunner:
        """What runs the command."""
        return CommandRunner(self.log, self.environment, self.imports)  # type: ignore[arg-type]

    @property
    def imports(self) -> list[str]:
        """What the command takes long to import.

        Engines that start threads when they are imported are not among it.
        """
        engines = ["chunkflow_core.engines.pytorch"] if self.volume.model.engine == "pytorch" else []
        return ["chunkflow_core.steps.warm_up", *(engines if self.command.runs_model else [])]

    @property
    def environment(self) -> dict[str, str]:
        """For a block, the machine's CPUs shared out among the tasks that may run at once."""
        if self.block is None:
            return {}
        assert self.dag is not None
        blocks = prod(self.volume.grid.shape)
        tasks = min(self.dag.max_active_tasks, conf.getint("core", "parallelism"), blocks)
        return {CPUS_VARIABLE: str(max(1, available_cpus() // tasks))}
