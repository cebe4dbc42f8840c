"""The pods of one task, apart from Airflow's operator: how they do, and what their ends leave.

What has to survive the process is in the task's state: the memory that a pod gets, interruptions,
the pods that have ended.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from airflow.sdk.observability import stats

from chunkflow_core.commands.log_copy import read_log
from chunkflow_core.spec.runner import KubernetesRunner, PodResources, parse_memory
from operators.command_operator import raise_for
from operators.commands import Command
from operators.kubernetes.api import Pod, PodApi, RefusedError, TryLaterError
from operators.kubernetes.ends import NEVER_RAN, TOLD_BY_EVENTS, Limits, Look, examine, vanished, with_events
from operators.kubernetes.log import PodLog
from operators.kubernetes.task_state import TaskState
from operators.outcomes import Kind, Outcome, Retry

_LOG_PATIENCE = 60.0
"""Seconds that the log of a pod that is still there may be out of reach."""
_NO_PRIORITY = "it has no priority_class: pods of a higher priority may have taken its place"


class _Trouble:
    """Something that does not work for a while: said when it begins and when it is over."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log, self._what = log, what
        self._since: float | None = None

    def goes_on(self, why: Exception) -> None:
        """It does not work."""
        if self._since is None:
            self._log.warning("%s: %s", self._what, why)
            self._since = time.monotonic()

    def is_over(self) -> None:
        """It works."""
        if self._since is not None:
            self._log.info("no longer, after %.0f s: %s", time.monotonic() - self._since, self._what)
            self._since = None


class TaskPods:
    """Finds, follows, judges and deletes the pods of one task."""

    def __init__(
        self,
        api: PodApi,
        state: TaskState,
        runner: KubernetesRunner,
        command: Command,
        *,
        volume: str,
        log: logging.Logger,
    ) -> None:
        """Take over from an earlier process of the task, if there was one.

        Args:
            api: The cluster's calls.
            state: What earlier processes of the task have left.
            runner: The section of the spec.
            command: What the pods run.
            volume: The volume's name, a tag of metrics.
            log: The task's log.
        """
        self._api, self._runner, self._command = api, runner, command
        self._volume, self._log = volume, log
        self.state = state
        self.resources: PodResources = runner.infer if command.runs_model else runner.blend
        self.memory = max(state.memory, parse_memory(self.resources.memory))
        """Bytes that the next pod gets."""

    def find(self, namespace: str, selector: str, current_try: int) -> str | None:
        """The name of the pod of an earlier process of this task that is worth going on with.

        All others are deleted, once their ends have been noted.

        Args:
            namespace: Where they are.
            selector: Labels by which the task's pods are found.
            current_try: A pod of an earlier try that has failed is of no use to this one.
        """
        kept: list[Pod] = []
        dealt_with = self.state.ended_pods
        for pod in self._api.find(namespace, selector):
            name = pod["metadata"]["name"]
            look = self._examine(pod)
            outcome = look.outcome
            if pod["metadata"].get("deletionTimestamp"):
                if look.state == "lost":
                    self.dismiss(name, namespace)
            elif name in dealt_with:
                self.dismiss(name, namespace)
            elif (
                outcome
                and outcome.kind is not Kind.DONE
                and pod["metadata"]["labels"].get("try_number") != str(current_try)
            ):
                self._log.info("pod %s of an earlier try: %s", name, outcome)
                self.note_end(name, outcome)
                self.dismiss(name, namespace)
                if outcome.retry is Retry.MORE_MEMORY:
                    self.with_more_memory(outcome)
            else:
                kept.append(pod)
        kept.sort(key=lambda pod: self._examine(pod).outcome is None)  # one that has succeeded before one that works
        for surplus in kept[1:]:
            self.dismiss(surplus["metadata"]["name"], namespace)
        if not kept:
            return None
        name = kept[0]["metadata"]["name"]
        self._log.info("going on with pod %s (%s)", name, self._examine(kept[0]).state)
        return str(name)

    def look(self, name: str, namespace: str) -> Look:
        """How a pod does. Raises as ``PodApi`` does."""
        pod = self._api.get(name, namespace)
        return vanished(name) if pod is None else self._examine(pod)

    def wait(self, name: str, namespace: str, *, seconds: float, interval: float) -> Outcome | None:
        """A pod's end, if it comes within some seconds; None if not, or without an answer."""
        end, state = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            try:
                look = self._look_and_log(name, namespace, state)
            except (TryLaterError, RefusedError):
                return None  # the triggerer is more patient
            if look.outcome:
                return look.outcome
            state = look.state
            time.sleep(interval)
        return None

    def follow(self, log: PodLog, *, interval: float) -> Outcome:
        """Wait for a pod's end, its log going to the task's.

        Args:
            log: The pod's log.
            interval: Seconds between looks.

        Raises:
            AirflowException: The cluster has not answered for long, or refuses.
        """
        answered, state = time.monotonic(), ""
        away = _Trouble(self._log, f"can't look at pod {log.name}")
        silent = _Trouble(self._log, f"the log of pod {log.name} is out of reach")
        while True:
            try:
                look = self._look_and_log(log.name, log.namespace, state)
                away.is_over()
                answered, state = time.monotonic(), look.state
                if look.outcome:
                    return look.outcome
                if state == "running":
                    self._show_new(log, silent)
            except TryLaterError as later:
                if time.monotonic() - answered > self._runner.api_timeout:
                    raise_for(Outcome(Kind.UNREACHABLE, Retry.COUNTED, str(later)))
                away.goes_on(later)
            except RefusedError as refused:
                raise_for(refused.outcome)
            time.sleep(interval)

    def _show_new(self, log: PodLog, silent: _Trouble) -> None:
        """Show what has come to a pod's log, if it can be read."""
        try:
            lines = log.read(self._api) or []
        except TryLaterError as later:
            silent.goes_on(later)
            return
        silent.is_over()
        self._show(lines)

    def show_rest(self, log: PodLog, outcome: Outcome, copy: str, *, interval: float) -> None:
        """Show what was not yet shown of a pod's log.

        Args:
            log: The log, as far as it was read.
            outcome: How the pod ended.
            copy: Address of the copy that the pod has kept, for one that has left no log in the
                cluster.
            interval: Seconds after which to ask for a log again that is out of reach.
        """
        if outcome.kind in NEVER_RAN:
            return
        deadline = time.monotonic() + _LOG_PATIENCE
        gone = outcome.retry is Retry.AT_ONCE or outcome.code is None
        silent = _Trouble(self._log, f"the log of pod {log.name} is out of reach")
        while True:
            try:
                new = log.read(self._api)
                silent.is_over()
                if new is not None and (log.lines or not gone):
                    self._show(new)
                    return
            except TryLaterError as later:
                if not gone and time.monotonic() < deadline:
                    silent.goes_on(later)
                    time.sleep(interval)
                    continue
            break
        self._show_copy(log, copy)

    def explained(self, name: str, namespace: str, outcome: Outcome) -> Outcome:
        """The outcome, with what the cluster's events tell about it."""
        if outcome.kind not in TOLD_BY_EVENTS:
            return outcome
        with contextlib.suppress(TryLaterError, RefusedError):
            outcome = with_events(outcome, self._api.events(name, namespace))
        if outcome.kind is Kind.DELETED and not self.resources.priority_class:
            outcome = replace(outcome, message=f"{outcome.message}; {_NO_PRIORITY}")
        return outcome

    def note_end(self, name: str, outcome: Outcome) -> None:
        """Count an end, and keep it where the task's state is shown."""
        if outcome.retry is Retry.AT_ONCE:
            self.state.interruptions += 1
        self.state.add_end(name, outcome)
        tags = {"volume": self._volume, "stage": self._command.name}
        stats.incr(f"chunkflow.pod_ends.{outcome.kind.name.lower()}", tags=tags)

    def dismiss(self, name: str, namespace: str) -> None:
        """Have nobody go on with a pod, and delete it.

        Trouble with that leaves work to the maintenance, no more.
        """
        try:
            self._api.check_off(name, namespace)
            lost = self.look(name, namespace).state == "lost"
            self._api.delete(name, namespace, grace=0 if lost else None)
        except (TryLaterError, RefusedError) as error:
            self._log.warning("can't delete pod %s: %s", name, error)

    def with_more_memory(self, outcome: Outcome) -> Outcome:
        """Have the next try get more memory; a retry can't help if there is no more."""
        most = self.resources.largest_memory
        if self.memory >= most:
            where = f"runner.{'infer' if self._command.runs_model else 'blend'}.memory_max"
            message = f"{outcome.message}, the most that {where} allows; raise it, or take smaller patches or blocks"
            return Outcome(outcome.kind, Retry.NEVER, message, outcome.code)
        self.memory = min(int(self.memory * self._runner.memory_growth), most)
        self.state.memory = self.memory
        message = f"{outcome.message}; the next try gets {self.memory // 2**20} MiB"
        return Outcome(outcome.kind, Retry.MORE_MEMORY, message, outcome.code)

    def _look_and_log(self, name: str, namespace: str, before: str) -> Look:
        """Look, and log a state that is another one than ``before``."""
        look = self.look(name, namespace)
        if look.state != before:
            self._log.info("pod %s: %s", name, look.state)
        return look

    def _examine(self, pod: Pod) -> Look:
        limits = Limits(self._runner.pending_timeout, self._runner.start_timeout)
        return examine(pod, limits, self._api.now, inputs_may_come=self._command.inputs_may_come)

    def _show_copy(self, log: PodLog, copy: str) -> None:
        try:
            kept = read_log(copy)
        except Exception as error:  # whatever it is, a log does not decide how a task ends
            self._log.warning("%s: %s", copy, error)
            kept = None
        if kept is None:
            self._log.warning("no log of pod %s is left, neither in the cluster nor at %s", log.name, copy)
            return
        lines = kept.splitlines()[len(log.lines) :]
        log.lines += lines
        self._show(lines)

    def _show(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._log.info("[pod] %s", line)
