"""Runs the commands of a volume's DAG in pods.

A task launches a pod, leaves its worker while the triggerer watches it (or stays, if the spec says ``deferrable: false``), and
comes back to take the log and to judge how the pod ended: ``operators.pod_ends``. The steps around the blocks leave only if they take
more than some seconds. Whatever was killed in between, the next process
finds the pod by its labels and goes on with it; a pod's name is decided by task, try, and number of interruptions, so that no try
can have two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
from airflow.sdk import Context
from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryRule
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from airflow.sdk.observability import stats
from kubernetes.client import V1ObjectMeta, V1Pod

from chunkflow_core.errors import ChunkflowError
from chunkflow_core.logged import log_url, read_log
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.spec.runner import KubernetesRunner, PodResources, parse_memory
from chunkflow_core.spec.transport import check_transportable, to_environment
from operators import base
from operators.form import RUNNER_PARAMS
from operators.orphans import AIRFLOW_LABEL, TASK_ANNOTATIONS, airflow_label
from operators.outcomes import Kind, Outcome, Retry
from operators.pod_api import Pod, PodApi, RefusedError, TryLaterError
from operators.pod_ends import BASE, NEVER_RAN, TOLD_BY_EVENTS, Limits, Look, examine, vanished, with_events
from operators.pod_log import PodLog
from operators.pods import own_labels, pod_manifest, pod_name
from operators.task_state import TaskState
from operators.triggers import PodTrigger

_RETRY_OUT_OF_MEMORY = timedelta(seconds=1)
_SOON, _LATE = 2.0, 300.0
"""Seconds until a launch that the cluster could not do is tried again: at first, and after a while."""
_STEP_SECONDS = 15.0
"""How long a step waits here for its pod: most have ended by then, and to leave the worker and to come back takes longer than they do."""
_LOG_PATIENCE = 60.0
"""Seconds that the log of a pod that is still there may be out of reach."""


class PodOutOfMemoryError(AirflowException):
    """A pod was killed for memory; the next try gets more."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What keeps a task from getting on."""

    kind: str
    """A value of ``Kind``."""
    since: float
    """Seconds since the epoch."""


class PodOperator(base.Command, KubernetesPodOperator):
    """A command in a pod."""

    template_fields: Sequence[str] = ("spec", "memory")
    _memory: int
    """Bytes that the next pod gets."""

    def __init__(self, *, spec: str, **options: Any) -> None:
        """Arguments: those of ``operators.base.Command``, and of ``BaseOperator``."""
        runner = _runner_of(spec)
        super().__init__(
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

    def render_template_fields(self, context: Context, jinja_env: Any = None) -> None:
        """As Airflow does; and say how much memory this try has."""
        with base.telling(context):
            try:
                self._set_up(context)
            except ChunkflowError as error:
                raise AirflowFailException(str(error)) from None
        grown = " (grown after a pod was killed for memory)" if self._state.memory else ""
        self.memory = f"{self._memory // 2**20}Mi{grown}"
        super().render_template_fields(context, jinja_env)

    def execute(self, context: Context) -> Any:
        """Run the command; ``AirflowFailException`` if a retry can't help, ``AirflowException`` if it may."""
        with base.telling(context):
            self.before(context)
            return self._go_on(context)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> Any:
        """Go on after the triggerer has seen the pod's end."""
        with base.telling(context):
            return self._go_on_after(context, event)

    def _go_on_after(self, context: Context, event: dict[str, Any]) -> Any:
        waiting = Waiting(**event["waiting"]) if event.get("waiting") else None
        if event["status"] == "launch":
            return self._go_on(context, waiting)
        name, namespace = event["name"], event["namespace"]
        self._hold(name, namespace)
        try:
            look = self._look(name, namespace)
        except TryLaterError as later:
            self._defer_to_watch(name, namespace, self._still_waiting(later, waiting))
        except RefusedError as refused:
            base.raise_for(refused.outcome)
        if look.outcome is None:
            if event["status"] == "unreachable":
                base.raise_for(Outcome(Kind.UNREACHABLE, Retry.COUNTED, event["message"]))
            self._defer_to_watch(name, namespace)
        return self._finish(context, PodLog(name, namespace), look.outcome)

    def _go_on(self, context: Context, waiting: Waiting | None = None) -> Any:
        """Find the task's pod, or launch one, and see it through."""
        while True:
            try:
                name, namespace = self._attach(context) or self._launch(context)
            except TryLaterError as later:
                waiting = self._still_waiting(later, waiting)
                delay = min(max(_SOON, (time.time() - waiting.since) / 4), _LATE)
                self.log.info("%s: %s; trying again in %.0f s", later.kind.value, later, delay)
                self._pause(delay, waiting)
                continue
            except RefusedError as refused:
                base.raise_for(refused.outcome)
            self._hold(name, namespace)
            log = PodLog(name, namespace)
            outcome = self._wait_briefly(name, namespace) if self.deferrable else self._follow(log, name, namespace)
            if outcome is None:
                self._defer_to_watch(name, namespace)
            return self._finish(context, log, outcome)

    def _attach(self, context: Context) -> tuple[str, str] | None:
        """The pod that an earlier process of this task has launched and that is worth going on with."""
        namespace, current = self._namespace, str(context["ti"].try_number)
        kept: list[Pod] = []
        dealt_with = self._state.ended_pods
        for pod in self._api.find(namespace, self._build_find_pod_label_selector(context)):
            name = pod["metadata"]["name"]
            outcome = self._judge(pod).outcome
            if pod["metadata"].get("deletionTimestamp"):
                continue
            if name in dealt_with:
                self._retire(name, namespace)
            elif outcome and outcome.kind is not Kind.DONE and pod["metadata"]["labels"].get("try_number") != current:
                self.log.info("pod %s of an earlier try: %s", name, outcome)
                self._remember(name, outcome)
                self._retire(name, namespace)
                if outcome.retry is Retry.MORE_MEMORY:
                    self._with_more_memory(outcome)
            else:
                kept.append(pod)
        kept.sort(key=lambda pod: self._judge(pod).outcome is None)  # one that has succeeded before one that works
        for surplus in kept[1:]:
            self._retire(surplus["metadata"]["name"], namespace)
        if not kept:
            return None
        name = kept[0]["metadata"]["name"]
        self.log.info("going on with pod %s (%s)", name, self._judge(kept[0]).state)
        return name, namespace

    def _launch(self, context: Context) -> tuple[str, str]:
        """Create the next pod of this try."""
        ti = context["ti"]
        salt = (ti.dag_id, ti.run_id, ti.task_id, ti.map_index, ti.try_number, self._state.interruptions)
        name = pod_name(self.volume.name, self.stage, self.block, "/".join(map(str, salt)))
        self.full_pod_spec = PodGenerator.deserialize_model_dict(
            pod_manifest(
                self._runner,
                folder=self.volume.folder,
                resources=self._resources,
                memory=self._memory,
                name=name,
                labels=self.labels,
                arguments=[
                    "--log",
                    self._log_url(context, name),
                    "--",
                    *self.command_line("env:CHUNKFLOW_SPEC", context),
                ],
                environment=to_environment(self.volume),
            )
        )
        pod = self.build_pod_request_obj(context)
        self._hold(name, self._namespace)  # so that it is deleted if the task is killed while the call is under way
        self._api.create(pod)
        if self._killed:  # while the call was under way: the pod was not there yet to be deleted
            self._api.delete(name, self._namespace)
            raise AirflowException(f"{Kind.CANCELLED.value}: the task was killed while it launched pod {name}")
        self.log.info("launched pod %s with %d MiB of memory", name, self._memory // 2**20)
        return name, self._namespace

    def _wait_briefly(self, name: str, namespace: str) -> Outcome | None:
        """The end of a step's pod, if it comes soon; nothing about blocks, of which there are many at a time."""
        if self.block is not None:
            return None
        end, state = time.monotonic() + _STEP_SECONDS, ""
        while time.monotonic() < end:
            try:
                look = self._look_and_tell(name, namespace, state)
            except (TryLaterError, RefusedError):
                return None  # the triggerer is more patient
            if look.outcome:
                return look.outcome
            state = look.state
            time.sleep(min(1.0, self.poll_interval))
        return None

    def _follow(self, log: PodLog, name: str, namespace: str) -> Outcome:
        """Wait here for a pod's end, its log going to the task's."""
        answered, state = time.monotonic(), ""
        while True:
            try:
                look = self._look_and_tell(name, namespace, state)
                answered, state = time.monotonic(), look.state
                if look.outcome:
                    return look.outcome
                if state == "running":
                    self._show(log.read(self._api) or [])
            except TryLaterError as later:
                if time.monotonic() - answered > self._runner.api_timeout:
                    base.raise_for(Outcome(Kind.UNREACHABLE, Retry.COUNTED, str(later)))
                self.log.warning("can't look at pod %s: %s", name, later)
            except RefusedError as refused:
                base.raise_for(refused.outcome)
            time.sleep(self.poll_interval)

    def _finish(self, context: Context, log: PodLog, outcome: Outcome) -> Any:
        """Show the log of a pod that has ended, judge the end, and go on accordingly."""
        assert self.pod is not None
        name, namespace = self.pod.metadata.name, self.pod.metadata.namespace
        self._show_rest(context, log, outcome)
        if self._killed:
            raise AirflowException(f"{Kind.CANCELLED.value}: the task was killed while pod {name} ran")
        outcome = self._explained(name, namespace, outcome)
        self.log.log(_weight(outcome), "pod %s: %s", name, outcome)
        self._remember(name, outcome)
        self._retire(name, namespace)
        if outcome.kind is Kind.DONE:
            self.result("\n".join(log.lines), context)
            return None
        if outcome.retry is Retry.AT_ONCE:
            count = self._state.interruptions
            if count <= self._runner.interruptions:
                if count > 1:  # what takes every pod away at once does not get 20 in a minute
                    self._pause(min(2.0 ** (count - 1), _LATE))
                return self._go_on(context)
            outcome = Outcome(
                outcome.kind, Retry.COUNTED, f"{count} pods of this try were interrupted: {outcome.message}"
            )
        if outcome.retry is Retry.MORE_MEMORY:
            outcome = self._with_more_memory(outcome)
            if outcome.retry is Retry.MORE_MEMORY:
                raise PodOutOfMemoryError(str(outcome))
        return base.raise_for(outcome)

    def _with_more_memory(self, outcome: Outcome) -> Outcome:
        """Have the next try get more memory, if there is more to get."""
        most = self._resources.largest_memory
        if self._memory >= most:
            where = f"runner.{'infer' if self.runs_model else 'blend'}.memory_max"
            message = f"{outcome.message}, the most that {where} allows; raise it, or take smaller patches or blocks"
            return Outcome(outcome.kind, Retry.NEVER, message, outcome.code)
        self._memory = min(int(self._memory * self._runner.memory_growth), most)
        self._state.memory = self._memory
        message = f"{outcome.message}; the next try gets {self._memory // 2**20} MiB"
        return Outcome(outcome.kind, Retry.MORE_MEMORY, message, outcome.code)

    def _remember(self, name: str, outcome: Outcome) -> None:
        """Count an end, and keep it where the task's state is shown."""
        if outcome.retry is Retry.AT_ONCE:
            self._state.interruptions += 1
        self._state.add_end(name, outcome)
        _count(self.volume.name, self.stage, outcome)

    def _retire(self, name: str, namespace: str) -> None:
        """Have nobody go on with a pod. Trouble with that leaves work to the maintenance, no more."""
        try:
            self._api.check_off(name, namespace)
            lost = self._look(name, namespace).state == "lost"
            self._api.delete(name, namespace, grace=0 if lost else None)
        except (TryLaterError, RefusedError) as error:
            self.log.warning("can't delete pod %s: %s", name, error)

    def _show_rest(self, context: Context, log: PodLog, outcome: Outcome) -> None:
        """Show what was not yet shown of a pod's log: as the cluster has it, or else the copy that the pod has kept."""
        if outcome.kind in NEVER_RAN:
            return
        deadline = time.monotonic() + _LOG_PATIENCE
        gone = outcome.retry is Retry.AT_ONCE or outcome.code is None
        while True:
            try:
                new = log.read(self._api)
                if new is not None and (log.lines or not gone):
                    self._show(new)
                    return
            except TryLaterError as later:
                if not gone and time.monotonic() < deadline:
                    self.log.info("the pod's log is out of reach: %s", later)
                    time.sleep(self.poll_interval)
                    continue
            break
        url = self._log_url(context, log.name)
        try:
            kept = read_log(url)
        except Exception as error:  # whatever it is, a log does not decide how a task ends
            self.log.warning("%s: %s", url, error)
            kept = None
        if kept is None:
            self.log.warning("no log of pod %s is left, neither in the cluster nor at %s", log.name, url)
            return
        lines = kept.splitlines()[len(log.lines) :]
        log.lines += lines
        self._show(lines)

    def _show(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.log.info("[pod] %s", line)

    def _explained(self, name: str, namespace: str, outcome: Outcome) -> Outcome:
        """The outcome, with what the cluster's events tell about it."""
        if outcome.kind not in TOLD_BY_EVENTS:
            return outcome
        try:
            events = self._api.events(name, namespace)
        except (TryLaterError, RefusedError):
            return outcome
        return with_events(outcome, events)

    def _look(self, name: str, namespace: str) -> Look:
        pod = self._api.get(name, namespace)
        return vanished(name) if pod is None else self._judge(pod)

    def _look_and_tell(self, name: str, namespace: str, before: str) -> Look:
        """Look, and log a state that is another one than ``before``."""
        look = self._look(name, namespace)
        if look.state != before:
            self.log.info("pod %s: %s", name, look.state)
        return look

    def _judge(self, pod: Pod) -> Look:
        limits = Limits(self._runner.pending_timeout, self._runner.start_timeout)
        return examine(pod, limits, self._api.now, inputs_may_come=self.inputs_may_come)

    def _hold(self, name: str, namespace: str) -> None:
        """Have ``on_kill`` delete this pod."""
        self.pod = V1Pod(metadata=V1ObjectMeta(name=name, namespace=namespace))

    def _still_waiting(self, later: TryLaterError, before: Waiting | None) -> Waiting:
        """What is waited for, and since when; fails the try if that is too long."""
        waiting = before if before and before.kind == later.kind.value else Waiting(later.kind.value, time.time())
        patience = self._runner.api_timeout if later.kind is Kind.UNREACHABLE else self._runner.pending_timeout
        if time.time() - waiting.since > patience:
            base.raise_for(Outcome(later.kind, Retry.COUNTED, f"for {patience:.0f} s: {later}"))
        return waiting

    def _pause(self, delay: float, waiting: Waiting | None = None) -> None:
        """Wait for some seconds: here, or off the worker; then ``trigger_reentry`` goes on."""
        if not self.deferrable:
            time.sleep(delay)
            return
        # Its pod, if it has one after all, is still to be deleted when the task is cancelled.
        held = self.pod.metadata if self.pod else V1ObjectMeta(name="", namespace="")
        self._defer(held.name, held.namespace, waiting, delay=delay)

    def _defer_to_watch(self, name: str, namespace: str, waiting: Waiting | None = None) -> NoReturn:
        self._defer(name, namespace, waiting)

    def _defer(self, name: str, namespace: str, waiting: Waiting | None, *, delay: float | None = None) -> NoReturn:
        """Leave the worker; raises ``TaskDeferred``."""
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
        """Read the spec with what the run changes of it, and the state that earlier processes of the task have left."""
        params = context["params"]
        changes = [f"{key}={params[name]}" for name, key in RUNNER_PARAMS.items() if params.get(name) is not None]
        self.volume = load_spec(self.spec, changes)
        check_transportable(self.volume)
        assert isinstance(self.volume.runner, KubernetesRunner)
        self._runner: KubernetesRunner = self.volume.runner
        self._resources: PodResources = self._runner.infer if self.runs_model else self._runner.blend
        self.labels = own_labels(self.volume.name, self.stage, self.block) | {AIRFLOW_LABEL: airflow_label()}
        ti = context["ti"]
        self.annotations = dict(zip(TASK_ANNOTATIONS, (ti.dag_id, ti.run_id, ti.task_id), strict=True))
        self._state = TaskState(context)
        self._memory = max(self._state.memory, parse_memory(self._resources.memory))

    @cached_property
    def _api(self) -> PodApi:
        return PodApi(lambda: self.client, self._forget_client)

    def _forget_client(self) -> None:
        for name in ("hook", "client"):
            self.__dict__.pop(name, None)

    @cached_property
    def _namespace(self) -> str:
        return str(self._runner.namespace or self.hook.get_namespace() or self._incluster_namespace or "default")

    def _log_url(self, context: Context, name: str) -> str:
        ti = context["ti"]
        return log_url(self.volume.exchange.path, ti.dag_id, ti.run_id, name)


class InferenceAndDonateOperator(base.Inference, PodOperator):
    __doc__ = base.Inference.__doc__
    template_fields = ("spec", "block", "memory")


class ReceiveAndBlendOperator(base.Blending, PodOperator):
    __doc__ = base.Blending.__doc__
    template_fields = ("spec", "block", "memory")


class PrepareOperator(base.Preparation, PodOperator):
    __doc__ = base.Preparation.__doc__
    template_fields = PodOperator.template_fields


class SelectBlocksOperator(base.Selection, PodOperator):
    __doc__ = base.Selection.__doc__
    template_fields = PodOperator.template_fields


class VerifyOperator(base.Verification, PodOperator):
    __doc__ = base.Verification.__doc__
    template_fields = PodOperator.template_fields


class PublishOperator(base.Publication, PodOperator):
    __doc__ = base.Publication.__doc__
    template_fields = PodOperator.template_fields


CommandOperator = PodOperator
"""Runs any other command."""


def _runner_of(spec: str) -> KubernetesRunner:
    """The runner section of a spec file. Hundreds of operators ask for the same one."""
    runner = _load(spec, Path(spec).stat().st_mtime_ns).runner
    if not isinstance(runner, KubernetesRunner):
        raise AirflowFailException(f"{spec}: runner.kind: {runner.kind}: expected kubernetes")
    return runner


@lru_cache(maxsize=4)
def _load(spec: str, changed: int) -> VolumeSpec:
    return load_spec(spec)


def _weight(outcome: Outcome) -> int:
    if outcome.kind is Kind.DONE:
        return logging.INFO
    return logging.WARNING if outcome.retry is Retry.AT_ONCE else logging.ERROR


def _count(volume: str, stage: str, outcome: Outcome) -> None:
    """One more end of this kind, in Airflow's metrics."""
    stats.incr(f"chunkflow.pod_ends.{outcome.kind.name.lower()}", tags={"volume": volume, "stage": stage})
