"""Tasks as pods.

A task launches a pod, leaves its worker while the triggerer watches it (or stays, if the spec says
``deferrable: false``), and comes back to take the log and to judge how the pod ended:
``operators.kubernetes.ends``. The steps around the blocks leave only if they take more than some
seconds. Whatever was killed in between, the next process finds the pod by its labels and goes on
with it; a pod's name is decided by task, try, and number of interruptions, so that no try can have
two.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, NoReturn

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
from airflow.sdk import Context
from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryRule
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from kubernetes.client import V1ObjectMeta, V1Pod

from chunkflow_core.commands.log_copy import log_url
from chunkflow_core.errors import ChunkflowError
from chunkflow_core.spec.runner import KubernetesRunner
from chunkflow_core.spec.transport import check_transportable, to_environment
from operators.command_operator import CommandOperator, failure_reported, raise_for, spec_of_file, spec_of_task
from operators.commands import Command
from operators.kubernetes.api import PodApi, RefusedError, TryLaterError
from operators.kubernetes.ends import BASE
from operators.kubernetes.log import PodLog
from operators.kubernetes.manifest import own_labels, pod_manifest, pod_name
from operators.kubernetes.orphans import AIRFLOW_LABEL, TASK_ANNOTATIONS, airflow_label
from operators.kubernetes.pods import TaskPods
from operators.kubernetes.task_state import TaskState
from operators.kubernetes.trigger import PodTrigger
from operators.outcomes import Kind, Outcome, Retry
from operators.request import RUNNER_PARAMS

_RETRY_OUT_OF_MEMORY = timedelta(seconds=1)
_SOON, _LATE = 5.0, 300.0
"""Seconds until a launch that failed is tried again: at first, and after a while.

A trigger does not fire sooner.
"""
_STEP_SECONDS = 15.0
"""How long a step waits here for its pod: most have ended by then, and to leave the worker and to
come back takes longer than they do.
"""


class PodOutOfMemoryError(AirflowException):
    """A pod was killed for memory; the next try gets more."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What keeps a task from getting on."""

    kind: str
    """A value of ``Kind``."""
    since: float
    """Seconds since the epoch."""


class PodOperator(CommandOperator, KubernetesPodOperator):
    """Runs a command in a pod."""

    def __init__(self, *, command: Command, spec: str, **options: Any) -> None:
        """Make the operator.

        Args:
            command: What the pod runs.
            spec: Path of the volume's spec, whose runner is ``kubernetes``.
            options: Those of ``CommandOperator``.
        """
        runner = spec_of_file(spec).runner
        if not isinstance(runner, KubernetesRunner):
            raise AirflowFailException(f"{spec}: runner.kind: {runner.kind}: expected kubernetes")
        super().__init__(
            command=command,
            spec=spec,
            kubernetes_conn_id=runner.connection,
            namespace=runner.namespace,
            deferrable=runner.deferrable,
            poll_interval=runner.poll_interval,
            base_container_name=BASE,
            termination_grace_period=runner.termination_grace,
            termination_message_policy="FallbackToLogsOnError",
            on_finish_action="keep_pod",
            random_name_suffix=False,
            log_pod_spec_on_failure=False,
            retry_policy=ExceptionRetryPolicy(
                [RetryRule(PodOutOfMemoryError, RetryAction.RETRY, _RETRY_OUT_OF_MEMORY, "with more memory")]
            ),
            **options,
        )
        self.memory = ""
        """The pod's memory, for people: it grows after the pod was killed for memory."""
        self.template_fields = (*self.template_fields, "memory")

    def render_template_fields(self, context: Context, jinja_env: Any = None) -> None:
        """Render as Airflow does, and say how much memory this try has."""
        with failure_reported(context):
            try:
                self._set_up(context)
            except ChunkflowError as error:
                raise AirflowFailException(str(error)) from None
        grown = " (grown after a pod was killed for memory)" if self._pods.state.memory else ""
        self.memory = f"{self._pods.memory // 2**20}Mi{grown}"
        super().render_template_fields(context, jinja_env)

    def execute(self, context: Context) -> Any:
        """Run the command.

        Raises:
            AirflowFailException: It failed, and a retry can't help.
            AirflowException: It failed, and a retry may help.
            TaskDeferred: The triggerer goes on.
        """
        with failure_reported(context):
            self.command.check(self._run)
            return self._go_on(context)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> Any:
        """Go on after the triggerer has seen the pod's end, or to try a launch again."""
        with failure_reported(context):
            return self._go_on_after(context, event)

    def _go_on_after(self, context: Context, event: dict[str, Any]) -> Any:
        waiting = Waiting(**event["waiting"]) if event.get("waiting") else None
        if event["status"] == "launch":
            return self._go_on(context, waiting)
        name, namespace = event["name"], event["namespace"]
        self._delete_on_kill(name, namespace)
        try:
            look = self._pods.look(name, namespace)
        except TryLaterError as later:
            self._leave_worker(name, namespace, self._still_waiting(later, waiting))
        except RefusedError as refused:
            raise_for(refused.outcome)
        if look.outcome is None:
            if event["status"] == "unreachable":
                raise_for(Outcome(Kind.UNREACHABLE, Retry.COUNTED, event["message"]))
            self._leave_worker(name, namespace)
        return self._finish(context, PodLog(name, namespace), look.outcome)

    def _go_on(self, context: Context, waiting: Waiting | None = None) -> Any:
        """Find the task's pod, or launch one, and see it through."""
        while True:
            try:
                selector, number = self._build_find_pod_label_selector(context), context["ti"].try_number
                name = self._pods.find(self._namespace, selector, number) or self._launch(context)
            except TryLaterError as later:
                waiting = self._still_waiting(later, waiting)
                delay = min(max(_SOON, (time.time() - waiting.since) / 4), _LATE)
                self.log.info("%s: %s; trying again in %.0f s", later.kind.value, later, delay)
                self._pause(delay, waiting)
                continue
            except RefusedError as refused:
                raise_for(refused.outcome)
            self._delete_on_kill(name, self._namespace)
            log = PodLog(name, self._namespace)
            outcome = self._wait(log)
            if outcome is None:
                self._leave_worker(name, self._namespace)
            return self._finish(context, log, outcome)

    def _wait(self, log: PodLog) -> Outcome | None:
        """How the pod ended; None if the triggerer is to watch it.

        That is so at once for a block, of which there are many at a time.
        """
        if not self.deferrable:
            return self._pods.follow(log, interval=self.poll_interval)
        if self.block is not None:
            return None
        interval = min(1.0, self.poll_interval)
        return self._pods.wait(log.name, log.namespace, seconds=_STEP_SECONDS, interval=interval)

    def _launch(self, context: Context) -> str:
        """Create the next pod of this try; its name."""
        ti = context["ti"]
        salt = (ti.dag_id, ti.run_id, ti.task_id, ti.map_index, ti.try_number, self._pods.state.interruptions)
        name = pod_name(self.volume.name, self.command.name, self.block, "/".join(map(str, salt)))
        command = self.command.line("env:CHUNKFLOW_SPEC", self._run)
        self.full_pod_spec = PodGenerator.deserialize_model_dict(
            pod_manifest(
                self._runner,
                folder=self.volume.folder,
                resources=self._pods.resources,
                memory=self._pods.memory,
                name=name,
                labels=self.labels,
                arguments=["--log", self._log_url(context, name, self.volume.written("exchange")), "--", *command],
                environment=to_environment(self.volume),
                avoided_nodes=self._pods.state.bad_nodes,
            )
        )
        pod = self.build_pod_request_obj(context)
        self._delete_on_kill(name, self._namespace)  # also while the call is under way
        self._api.create(pod)
        if self._killed:  # while the call was under way: the pod was not there yet to be deleted
            self._api.delete(name, self._namespace)
            raise AirflowException(f"{Kind.CANCELLED.value}: the task was killed while it launched pod {name}")
        self.log.info("launched pod %s with %d MiB of memory", name, self._pods.memory // 2**20)
        return name

    def _finish(self, context: Context, log: PodLog, outcome: Outcome) -> Any:
        """Show the log of a pod that has ended, judge the end, and go on accordingly."""
        name, namespace = log.name, log.namespace
        copy = self._log_url(context, name, self.volume.exchange.path)
        self._pods.show_rest(log, outcome, copy, interval=self.poll_interval)
        if self._killed:
            raise AirflowException(f"{Kind.CANCELLED.value}: the task was killed while pod {name} ran")
        outcome = self._pods.explained(name, namespace, outcome)
        self.log.log(_level(outcome), "pod %s: %s", name, outcome)
        self._pods.note_end(name, outcome)
        self._pods.dismiss(name, namespace)
        if outcome.kind is Kind.DONE:
            self.use_result("\n".join(log.lines), self._run)
            return None
        if outcome.retry is Retry.AT_ONCE:
            count = self._pods.state.interruptions
            if count <= self._runner.interruptions:
                if count > 1:  # what takes every pod away at once does not get 20 in a minute
                    self._pause(min(2.0 ** (count - 1), _LATE))
                return self._go_on(context)
            outcome = Outcome(
                outcome.kind, Retry.COUNTED, f"{count} pods of this try were interrupted: {outcome.message}"
            )
        if outcome.retry is Retry.MORE_MEMORY:
            outcome = self._pods.with_more_memory(outcome)
            if outcome.retry is Retry.MORE_MEMORY:
                raise PodOutOfMemoryError(str(outcome))
        return raise_for(outcome)

    def _delete_on_kill(self, name: str, namespace: str) -> None:
        """Have ``on_kill`` delete this pod."""
        self.pod = V1Pod(metadata=V1ObjectMeta(name=name, namespace=namespace))

    def _still_waiting(self, later: TryLaterError, before: Waiting | None) -> Waiting:
        """What is waited for, and since when; fails the try if that is too long."""
        waiting = before if before and before.kind == later.kind.value else Waiting(later.kind.value, time.time())
        patience = self._runner.api_timeout if later.kind is Kind.UNREACHABLE else self._runner.pending_timeout
        if time.time() - waiting.since > patience:
            raise_for(Outcome(later.kind, Retry.COUNTED, f"for {patience:.0f} s: {later}"))
        return waiting

    def _pause(self, delay: float, waiting: Waiting | None = None) -> None:
        """Wait for some seconds: here, or off the worker; then ``trigger_reentry`` goes on."""
        if not self.deferrable:
            time.sleep(delay)
            return
        # Its pod, if it has one after all, is still to be deleted when the task is cancelled.
        held = self.pod.metadata if self.pod else V1ObjectMeta(name="", namespace="")
        self._leave_worker(held.name, held.namespace, waiting, delay=delay)

    def _leave_worker(
        self, name: str, namespace: str, waiting: Waiting | None = None, *, delay: float | None = None
    ) -> NoReturn:
        """Have the triggerer watch a pod, or wait ``delay`` seconds; raises ``TaskDeferred``."""
        runner = self._runner
        trigger = PodTrigger(
            pod_name=name,
            pod_namespace=namespace,
            kubernetes_conn_id=runner.connection,
            poll_interval=runner.poll_interval,
            pending_timeout=runner.pending_timeout,
            start_timeout=runner.start_timeout,
            api_timeout=runner.api_timeout,
            termination_grace_period=runner.termination_grace,
            delay=delay,
            carried={"waiting": asdict(waiting)} if waiting else {},
        )
        raise TaskDeferred(trigger=trigger, method_name="trigger_reentry")

    def _set_up(self, context: Context) -> None:
        """Read the spec as the run changes it, and the state that earlier processes have left."""
        params = context["params"] if self.in_volume_dag else {}
        changes = [f"{key}={params[name]}" for name, key in RUNNER_PARAMS.items() if params.get(name) is not None]
        self.volume = spec_of_task(self.spec, changes)
        check_transportable(self.volume)
        assert isinstance(self.volume.runner, KubernetesRunner)
        self._runner: KubernetesRunner = self.volume.runner
        self._run = self.run_of(context)
        self.labels = own_labels(self.volume.name, self.command.name, self.block) | {AIRFLOW_LABEL: airflow_label()}
        ti = context["ti"]
        self.annotations = dict(zip(TASK_ANNOTATIONS, (ti.dag_id, ti.run_id, ti.task_id), strict=True))
        self._pods = TaskPods(
            self._api,
            TaskState(context),
            self._runner,
            self.command,
            volume=self.volume.name,
            log=self.log,  # type: ignore[arg-type]
        )

    @cached_property
    def _api(self) -> PodApi:
        return PodApi(lambda: self.client, self._forget_client)

    def _forget_client(self) -> None:
        for name in ("hook", "client"):
            self.__dict__.pop(name, None)

    @cached_property
    def _namespace(self) -> str:
        return str(self._runner.namespace or self.hook.get_namespace() or self._incluster_namespace or "default")

    def _log_url(self, context: Context, name: str, exchange: str) -> str:
        ti = context["ti"]
        return log_url(exchange, ti.dag_id, ti.run_id, name)


def _level(outcome: Outcome) -> int:
    """How grave an end is, as a level of logs."""
    if outcome.kind is Kind.DONE:
        return logging.INFO
    return logging.WARNING if outcome.retry is Retry.AT_ONCE else logging.ERROR
