"""What a pod's object says about it: still going, or ended, and then how.

Pure functions on the object as the API gives it (camelCase). The order of the questions matters: a
pod that was killed for memory, evicted or lost with its node carries exit codes that mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from operators.outcomes import Kind, Outcome, Retry, classify, last_word

BASE = "base"
"""Name of the container that runs the command."""

_SETTLING = 10.0
"""Seconds after the end of a container in which the pod's status may still learn why.

A sidecar may keep the pod up for ever.
"""
_LOST, _LOST_WITH_TAINT = 60.0, 10.0
"""Seconds that a pod may outlive its announced deletion before its node counts as lost.

The second is for a node that is known to be in trouble.
"""

_DISRUPTIONS = {
    "PreemptionByScheduler": Kind.PREEMPTED,
    "DeletionByTaintManager": Kind.NODE_LOST,
    "DeletionByPodGC": Kind.NODE_LOST,
    "EvictionByEvictionAPI": Kind.EVICTED,
    "TerminationByKubelet": Kind.NODE_SHUTDOWN,
}
"""Reasons of the condition DisruptionTarget:
https://kubernetes.io/docs/concepts/workloads/pods/disruptions/
"""

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
    "TopologyAffinityError": Kind.EVICTED,
}
_SHUTDOWN = re.compile(r"shutdown", re.I)
_OWN_LIMIT = re.compile(
    r"exceed\w* (the|its|total) .*limit|exceeds the limit|ephemeral local storage usage exceeds", re.I
)
"""Messages of evictions for what the pod itself has taken."""
_MORE_DISK = "raise ephemeral_storage in runner.infer or runner.blend, or the volume's memory"
_REFUSED_BY_NODE = re.compile(r"OutOf\S+")

_NEVER_STARTS = ("InvalidImageName", "ErrImageNeverPull")
_IMAGE_TROUBLE = ("ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable")
# A registry's "denied" and "unauthorized" are not among them: on new nodes, credentials may come a
# little later.
_NO_SUCH_IMAGE = re.compile(r"not found|manifest unknown|does not exist", re.I)
_CONFIGURATION = ("CreateContainerConfigError",)
_NOT_CREATED = ("CreateContainerError", "RunContainerError", "PostStartHookError")
_NOT_EXECUTED = ("StartError", "ContainerCannotRun")
_NO_COMMAND = re.compile(
    r"executable file not found|no such file or directory|permission denied|exec format error", re.I
)
_CONTAINER_LOST = ("Unknown", "ContainerStatusUnknown")
"""What a node says of containers that it finds dead after a restart."""

ADVICE = {
    Kind.IMAGE: "check runner.image and runner.image_pull_secrets",
    Kind.CONFIGURATION: "check the Secrets, ConfigMaps and volumes that the runner section names",
    Kind.NO_NODE: "check what runner.infer and runner.blend ask for (gpu, memory, node_selector, tolerations) against "
    "the nodes",
    Kind.NOT_STARTED: "see the pod's events; a large image may need a longer runner.start_timeout",
    Kind.DEADLINE: "give a longer deadline in runner.infer or runner.blend, or smaller blocks",
}

NEVER_RAN = frozenset({Kind.IMAGE, Kind.CONFIGURATION, Kind.NOT_STARTED, Kind.NO_NODE})
"""Ends of pods that have no log."""

TOLD_BY_EVENTS = NEVER_RAN | {Kind.DELETED}
"""Ends of which the cluster's events tell more than the pod's object."""

_ROUTINE = frozenset({"Scheduled", "Pulling", "Pulled", "Created", "Started"})
"""Reasons of events that every pod has."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a pod may take to start, in seconds."""

    pending: float
    """Until it has a node."""
    start: float
    """From the moment that it has a node, until its container runs."""


@dataclass(frozen=True, slots=True)
class Look:
    """A pod at a moment."""

    state: str
    """How it does, in a few words, for the log."""
    outcome: Outcome | None = None
    """How it ended; None while it goes on."""


def server_time(date: str | None) -> datetime:
    """The time that an answer's ``Date`` header gives, else this machine's.

    Their clocks may differ by minutes.
    """
    return parsedate_to_datetime(date) if date else datetime.now(UTC)


def vanished(name: str) -> Look:
    """What is known of a pod that is not there any more."""
    message = f"the pod {name} is gone, and its last status with it"
    return Look("gone", Outcome(Kind.DELETED, Retry.AT_ONCE, message))


def examine(pod: Mapping[str, Any], limits: Limits, now: datetime, *, inputs_may_come: bool = False) -> Look:
    """Whether a pod has ended, and how.

    Args:
        pod: The object.
        limits: After which a pod that does not start has failed.
        now: By the cluster's clock, with a time zone.
        inputs_may_come: See :func:`operators.outcomes.classify`.
    """
    status = pod.get("status") or {}
    terminated = _container(status).get("terminated")
    phase = status.get("phase") or "Pending"
    if phase == "Succeeded" or (terminated and terminated.get("exitCode") == 0):
        return Look("succeeded", Outcome(Kind.DONE, Retry.COUNTED, "done", 0))
    if phase == "Failed":
        return Look("failed", _failure(pod, status, terminated, inputs_may_come))
    if terminated:
        finished = terminated.get("finishedAt")
        if finished and _age(finished, now) < _SETTLING:
            return Look("ending")
        return Look("failed", _failure(pod, status, terminated, inputs_may_come))
    if deleted := pod["metadata"].get("deletionTimestamp"):
        tainted = _condition(status, "DisruptionTarget").get("reason") == "DeletionByTaintManager"
        if _age(deleted, now) < (_LOST_WITH_TAINT if tainted else _LOST):
            return Look("being deleted")
        return Look("lost", _disrupted(pod, status) or _taken_away(Kind.NODE_LOST, "its node does not answer"))
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
    if outcome.kind not in TOLD_BY_EVENTS:
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
        message = str(status.get("message") or "the pod's deadline has passed")
        return Outcome(Kind.DEADLINE, Retry.COUNTED, f"{message}; {ADVICE[Kind.DEADLINE]}")
    if not terminated and (before := _failed_before(status)):
        return before
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
    if reason in _CONTAINER_LOST:
        return _taken_away(Kind.NODE_LOST, "its node has restarted, or lost the container", code)
    if reason in _NOT_EXECUTED and _NO_COMMAND.search(message):
        return Outcome(Kind.IMAGE, Retry.NEVER, f"{message}; {ADVICE[Kind.IMAGE]}", code)
    if reason in _NOT_EXECUTED:
        return Outcome(Kind.NOT_STARTED, Retry.COUNTED, f"{message}; {ADVICE[Kind.NOT_STARTED]}", code)
    if pod["metadata"].get("deletionTimestamp") and code in (137, 143):
        return _taken_away(Kind.DELETED, "somebody or something deleted the pod while it ran", code)
    return classify(code, message, inputs_may_come=inputs_may_come)


def _disrupted(pod: Mapping[str, Any], status: Mapping[str, Any]) -> Outcome | None:
    """The outcome of a pod that the cluster took away."""
    target, reason = _condition(status, "DisruptionTarget"), str(status.get("reason"))
    message = str(status.get("message") or target.get("message") or target.get("reason") or reason)
    if reason == "Evicted" and _OWN_LIMIT.search(message):
        return _taken_away(Kind.EVICTED, f"{message}; {_MORE_DISK}")
    if target.get("status") == "True":
        kind = _DISRUPTIONS.get(str(target.get("reason")), Kind.EVICTED)
        if kind is Kind.NODE_SHUTDOWN and reason not in _STATUS_REASONS and not _SHUTDOWN.search(message):
            kind = Kind.EVICTED  # the kubelet gives the same reason for both
        return _taken_away(Kind.EVICTED if reason == "Evicted" else kind, message)
    taken = _STATUS_REASONS.get(reason) or (Kind.EVICTED if _REFUSED_BY_NODE.fullmatch(reason) else None)
    return _taken_away(taken, message) if taken else None


def _failed_before(status: Mapping[str, Any]) -> Outcome | None:
    """The end of a template's container that runs before ours, if it failed the pod."""
    for container in status.get("initContainerStatuses") or []:
        ended = (container.get("state") or {}).get("terminated")
        if ended and ended.get("exitCode"):
            name, code = container.get("name"), ended["exitCode"]
            said = last_word((ended.get("message") or "").strip().splitlines()) or ended.get("reason")
            return Outcome(Kind.ERROR, Retry.COUNTED, f"init container {name} ended with exit code {code}: {said}")
    return None


def _taken_away(kind: Kind, message: str, code: int | None = None) -> Outcome:
    """The outcome of a pod that did nothing wrong."""
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
    began = str(scheduled.get("lastTransitionTime") or "")
    for container in status.get("initContainerStatuses") or []:
        state = container.get("state") or {}
        if "running" in state and not container.get("started"):
            return Look(f"starting: init container {container.get('name')} runs")
        began = max(began, str((state.get("terminated") or {}).get("finishedAt") or ""))
    reason, text = _waiting(status)
    kind, retry, for_good = _why_not_started(reason, status)
    shown = f"{reason}: {text}" if text else reason
    if not for_good and _age(began, now) < limits.start:
        return Look(f"starting: {shown}")
    return Look("not started", Outcome(kind, retry, f"{shown}; {ADVICE[kind]}"))


def _why_not_started(reason: str, status: Mapping[str, Any]) -> tuple[Kind, Retry, bool]:
    """What a container's reason for waiting means, should it last; and whether it surely does."""
    if reason in _NEVER_STARTS:
        return Kind.IMAGE, Retry.NEVER, True
    if reason == "ImagePullBackOff" and _NO_SUCH_IMAGE.search(_all_messages(status)):
        return Kind.IMAGE, Retry.NEVER, True
    if reason in _IMAGE_TROUBLE:
        return Kind.IMAGE, Retry.COUNTED, False
    if reason in _CONFIGURATION:
        return Kind.CONFIGURATION, Retry.NEVER, False
    if reason in _NOT_CREATED:
        return Kind.CONFIGURATION, Retry.COUNTED, False
    return Kind.NOT_STARTED, Retry.COUNTED, False


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
