"""What a pod's object says about it: still going, or ended, and then how.

Pure functions on the object as the API gives it (camelCase). The order of the questions matters: a pod that was killed for memory,
evicted or lost with its node carries exit codes that mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from operators.outcomes import Kind, Outcome, Retry, classify, last_word

BASE = "base"
"""Name of the container that runs the command."""

_SETTLING = 10.0
"""Seconds after the end of a container in which the pod's status may still learn why; a sidecar may keep the pod up for ever."""
_LOST, _LOST_WITH_TAINT = 60.0, 10.0
"""Seconds that a pod may outlive its announced deletion before its node counts as lost; and on a node known to be in trouble."""

_DISRUPTIONS = {
    "PreemptionByScheduler": Kind.PREEMPTED,
    "DeletionByTaintManager": Kind.NODE_LOST,
    "DeletionByPodGC": Kind.NODE_LOST,
    "EvictionByEvictionAPI": Kind.EVICTED,
    "TerminationByKubelet": Kind.NODE_SHUTDOWN,
}
"""Reasons of the condition DisruptionTarget: https://kubernetes.io/docs/concepts/workloads/pods/disruptions/"""

_STATUS_REASONS = {
    "Evicted": Kind.EVICTED,
    "Preempting": Kind.PREEMPTED,
    "Terminated": Kind.NODE_SHUTDOWN,
    "NodeShutdown": Kind.NODE_SHUTDOWN,
    "Shutdown": Kind.NODE_SHUTDOWN,
    "NodeLost": Kind.NODE_LOST,
    # The node refused the pod after the scheduler had chosen it.
    "NodeAffinity": Kind.EVICTED,
    "UnexpectedAdmissionError": Kind.EVICTED,
}
_REFUSED_BY_NODE = re.compile(r"OutOf\S+")

_NEVER_STARTS = {"InvalidImageName": Kind.IMAGE, "ErrImageNeverPull": Kind.IMAGE}
_IMAGE_TROUBLE = ("ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable")
_NO_SUCH_IMAGE = re.compile(
    r"not found|manifest unknown|does not exist|denied|unauthorized|authentication|forbidden", re.I
)
_CONFIGURATION = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PostStartHookError")
_NOT_EXECUTED = ("StartError", "ContainerCannotRun")

ADVICE = {
    Kind.IMAGE: "check runner.image and runner.image_pull_secrets",
    Kind.CONFIGURATION: "check the Secrets, ConfigMaps and volumes that the runner section names",
    Kind.NO_NODE: "check what runner.infer and runner.blend ask for (gpu, memory, node_selector, tolerations) against the nodes",
    Kind.NOT_STARTED: "see the pod's events; a large image may need a longer runner.start_timeout",
    Kind.DEADLINE: "give a longer deadline in runner.infer or runner.blend, or smaller blocks",
}  # fmt: skip


NEVER_RAN = frozenset({Kind.IMAGE, Kind.CONFIGURATION, Kind.NOT_STARTED, Kind.NO_NODE})
"""Ends of pods that have no log."""

_ROUTINE = frozenset({"Scheduled", "Pulling", "Pulled", "Created", "Started"})
"""Reasons of events that every pod has."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a pod may take to start, in seconds."""

    pending: float
    """Until it has a node."""
    start: float
    """From then on until its container runs."""


@dataclass(frozen=True, slots=True)
class Look:
    """A pod at a moment."""

    state: str
    """In a few words, for the log."""
    outcome: Outcome | None = None
    """How it ended; None while it goes on."""


def vanished(name: str) -> Look:
    """What is known of a pod that is not there any more."""
    message = f"the pod {name} is gone, and its last status with it"
    return Look("gone", Outcome(Kind.DELETED, Retry.AT_ONCE, message))


def examine(pod: Mapping[str, Any], limits: Limits, now: datetime, *, inputs_may_come: bool = False) -> Look:
    """Whether a pod has ended, and how.

    Args:
        pod: the object.
        limits: after which a pod that does not start has failed.
        now: with a time zone.
        inputs_may_come: see :func:`operators.outcomes.classify`.
    """
    status = pod.get("status") or {}
    terminated = _container(status).get("terminated")
    phase = status.get("phase") or "Pending"
    if phase == "Succeeded" or (terminated and terminated.get("exitCode") == 0):
        return Look("succeeded", Outcome(Kind.DONE, Retry.COUNTED, "done", 0))
    if phase == "Failed":
        return Look("failed", _failure(pod, status, terminated, inputs_may_come))
    if terminated:
        if _age(terminated.get("finishedAt"), now) < _SETTLING:
            return Look("ending")
        return Look("failed", _failure(pod, status, terminated, inputs_may_come))
    if deleted := pod["metadata"].get("deletionTimestamp"):
        tainted = _condition(status, "DisruptionTarget").get("reason") == "DeletionByTaintManager"
        if _age(deleted, now) < (_LOST_WITH_TAINT if tainted else _LOST):
            return Look("being deleted")
        return Look("lost", _disrupted(pod, status) or _outcome(Kind.NODE_LOST, "its node does not answer", status))
    if phase == "Running":
        return Look("running")
    return _start(pod, status, limits, now)


def memory_limit(pod: Mapping[str, Any]) -> str | None:
    """The memory limit of a pod's container, as its manifest says it."""
    for container in pod["spec"]["containers"]:
        if container["name"] == BASE:
            limit: str | None = ((container.get("resources") or {}).get("limits") or {}).get("memory")
            return limit
    return None


def with_events(outcome: Outcome, events: Sequence[Mapping[str, Any]]) -> Outcome:
    """The outcome, with the cluster's last words on a pod that never ran or that is gone."""
    if outcome.kind not in NEVER_RAN | {Kind.DELETED}:
        return outcome
    told = [f"{event.get('reason')}: {event.get('message')}" for event in events if event.get("reason") not in _ROUTINE]
    if not told:
        return outcome
    return replace(outcome, message=f"{outcome.message} [{'; '.join(dict.fromkeys(told[-3:]))}]")


def _failure(
    pod: Mapping[str, Any], status: Mapping[str, Any], terminated: Mapping[str, Any] | None, inputs_may_come: bool
) -> Outcome:
    """How a pod failed: the first of these that fits."""
    if disrupted := _disrupted(pod, status):
        return disrupted
    if status.get("reason") == "DeadlineExceeded":
        return _outcome(Kind.DEADLINE, str(status.get("message") or "the pod's deadline has passed"), status)
    if not terminated:
        text = status.get("message") or status.get("reason") or "the cluster gives no reason and no exit code"
        return Outcome(Kind.ERROR, Retry.COUNTED, str(text))
    code, reason = int(terminated.get("exitCode", -1)), terminated.get("reason")
    message = (
        last_word((terminated.get("message") or "").strip().splitlines())
        or f"the container ended with exit code {code}, see its log"
    )
    if reason == "OOMKilled":
        limit = memory_limit(pod)
        return Outcome(Kind.OUT_OF_MEMORY, Retry.MORE_MEMORY, f"killed at the memory limit of {limit}", code)
    if reason in _NOT_EXECUTED:
        return Outcome(Kind.IMAGE, Retry.NEVER, f"{message}; {ADVICE[Kind.IMAGE]}", code)
    if pod["metadata"].get("deletionTimestamp") and code in (137, 143):
        return _outcome(Kind.DELETED, "somebody or something deleted the pod while it ran", status, code)
    return classify(code, message, inputs_may_come=inputs_may_come)


def _disrupted(pod: Mapping[str, Any], status: Mapping[str, Any]) -> Outcome | None:
    """The outcome of a pod that the cluster took away."""
    target = _condition(status, "DisruptionTarget")
    if target.get("status") == "True":
        kind = _DISRUPTIONS.get(str(target.get("reason")), Kind.EVICTED)
        if status.get("reason") == "Evicted":
            kind = Kind.EVICTED
        return _outcome(kind, str(status.get("message") or target.get("message") or target.get("reason")), status)
    reason = str(status.get("reason"))
    taken = _STATUS_REASONS.get(reason) or (Kind.EVICTED if _REFUSED_BY_NODE.fullmatch(reason) else None)
    return _outcome(taken, str(status.get("message") or reason), status) if taken else None


def _outcome(kind: Kind, message: str, status: Mapping[str, Any], code: int | None = None) -> Outcome:
    if kind is Kind.DEADLINE:
        return Outcome(kind, Retry.COUNTED, f"{message}; {ADVICE[kind]}", code)
    return Outcome(kind, Retry.AT_ONCE, message, code)


def _start(pod: Mapping[str, Any], status: Mapping[str, Any], limits: Limits, now: datetime) -> Look:
    """A pod that does not run yet."""
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") != "True":
        text = str(scheduled.get("message") or "not scheduled yet")
        if _age(pod["metadata"].get("creationTimestamp"), now) < limits.pending:
            return Look(f"waiting for a node: {text}")
        message = f"no node for {limits.pending:.0f} s: {text}; {ADVICE[Kind.NO_NODE]}"
        return Look("unschedulable", Outcome(Kind.NO_NODE, Retry.COUNTED, message))
    reason, text = _waiting(status)
    late = _age(scheduled.get("lastTransitionTime"), now) >= limits.start
    kind, retry = Kind.NOT_STARTED, Retry.COUNTED
    if reason in _NEVER_STARTS:
        kind, retry, late = _NEVER_STARTS[reason], Retry.NEVER, True
    elif reason in _IMAGE_TROUBLE:
        kind = Kind.IMAGE
        if reason == "ImagePullBackOff" and _NO_SUCH_IMAGE.search(_all_messages(status)):
            retry, late = Retry.NEVER, True
    elif reason in _CONFIGURATION:
        kind, retry = Kind.CONFIGURATION, Retry.NEVER
    shown = f"{reason}: {text}" if text else reason
    if not late:
        return Look(f"starting: {shown}")
    return Look("not started", Outcome(kind, retry, f"{shown}; {ADVICE[kind]}"))


def _container(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """State of our container; empty if it has none yet."""
    for container in status.get("containerStatuses") or []:
        if container.get("name") == BASE:
            return container.get("state") or {}
    return {}


def _waiting(status: Mapping[str, Any]) -> tuple[str, str]:
    """Reason and message of the first container that waits, those that run before ours first."""
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting")
        if waiting and waiting.get("reason") != "PodInitializing":
            return str(waiting.get("reason")), str(waiting.get("message") or "")
    return "ContainerCreating", ""


def _all_messages(status: Mapping[str, Any]) -> str:
    states = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return " ".join(str(((c.get("state") or {}).get("waiting") or {}).get("message") or "") for c in states)


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((c for c in status.get("conditions") or [] if c.get("type") == kind), {})


def _age(time: str | None, now: datetime) -> float:
    """Seconds since a time of the API; 0 for one that isn't given."""
    return (now - datetime.fromisoformat(time)).total_seconds() if time else 0.0
