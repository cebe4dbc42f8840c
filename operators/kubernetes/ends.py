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

from chunkflow_core.commands.log_copy import KILLED_FOR_MEMORY
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
}
_SHUTDOWN = re.compile(r"shutdown", re.I)
_OWN_LIMIT = re.compile(
    r"exceed\w* (the|its|total) .*limit|exceeds the limit|ephemeral local storage usage exceeds", re.I
)
"""Messages of evictions for what the pod itself has taken."""
_MORE_DISK = "raise ephemeral_storage in runner.infer or runner.blend, or the volume's memory"
_REFUSED_BY_NODE = re.compile(r"OutOf\S+|NodeAffinity|UnexpectedAdmissionError|TopologyAffinityError")
"""Reasons of a node that refuses a pod after the scheduler has chosen it."""

_NEVER_STARTS = ("InvalidImageName", "ErrImageNeverPull")
_IMAGE_TROUBLE = ("ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable")
_NO_SUCH_IMAGE = re.compile(r"not found|manifest unknown|does not exist", re.I)
_IMAGE_DENIED = re.compile(r"denied|unauthorized|authorization|authentication|forbidden|insufficient_scope", re.I)
"""On new nodes, credentials may come a little later.

A registry that denies does not say whether the image is there: "repository does not exist or may
require authorization".
"""
_NO_CONFIGURATION = "CreateContainerConfigError"
_SURELY_WRONG = re.compile(r"not found|couldn't find key|non-existent|runAsNonRoot|runAsUser|non-numeric user", re.I)
"""What a kubelet can't make a container of.

Anything else may be its own trouble: "services have not yet been read at least once" it says after
a restart.
"""
_NOT_CREATED = ("CreateContainerError", "RunContainerError", "PostStartHookError")
_NOT_EXECUTED = ("StartError", "ContainerCannotRun")
_NO_COMMAND = re.compile(r'\bexec: \\?"|executable file `|exec format error', re.I)
"""Messages of runtimes (runc, crun) that tried to execute the pod's command.

Before that they make mounts and devices and run hooks. What is missing there is the node's, though
the words are the same: "libnvidia-ml.so.1: cannot open shared object file: no such file".
"""
_NO_RUNTIME = re.compile(r"unable to retrieve OCI runtime error|hook", re.I)
"""Messages of nodes on which the runtime itself, or a hook of it, can't be executed."""
_MISSING_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
_UNBOUND_CLAIM = re.compile(r"unbound immediate PersistentVolumeClaims|bound to non-existent persistentvolume")
_CONTAINER_LOST = ("Unknown", "ContainerStatusUnknown")
"""What a node says of containers that it finds dead after a restart."""

ADVICE = {
    Kind.IMAGE: "check runner.image and runner.image_pull_secrets",
    Kind.CONFIGURATION: "check the Secrets, ConfigMaps and volumes that the runner section names; an image that runs "
    "as root needs runner.run_as_user",
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

_TELLING = (
    "Preempted",
    "Evicted",
    "EvictionThresholdMet",
    "TaintManagerEviction",
    "NodeShutdown",
    "FailedScheduling",
    "FailedMount",
    "FailedAttachVolume",
    "FailedMapVolume",
    "FailedCreatePodSandBox",
    "InspectFailed",
    "ErrImageNeverPull",
    "Failed",
)
"""Reasons of events that say why, the most telling first."""
_ECHO = re.compile(
    r"Error: (ErrImagePull|ImagePullBackOff|ErrImageNeverPull|InvalidImageName)|Back-off pulling image .*"
)
"""Messages that only repeat that something is wrong."""
_TOLD = 3
"""How many events are told."""


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
    if is_lost(pod, now):
        return Look("lost", _disrupted(pod, status) or _taken_away(Kind.NODE_LOST, "its node does not answer"))
    if pod["metadata"].get("deletionTimestamp"):
        return Look("being deleted")
    if phase == "Running":
        return Look("running")
    return _start(pod, status, limits, now)


def is_lost(pod: Mapping[str, Any], now: datetime) -> bool:
    """Whether a pod should have been gone for so long that its node must be lost.

    Only a deletion without grace removes its object before the node is back.

    Args:
        pod: The object.
        now: By the cluster's clock, with a time zone.
    """
    status = pod.get("status") or {}
    deleted = pod["metadata"].get("deletionTimestamp")
    if not deleted or status.get("phase") in ("Succeeded", "Failed"):
        return False
    tainted = _condition(status, "DisruptionTarget").get("reason") == "DeletionByTaintManager"
    return _age(deleted, now) >= (_LOST_WITH_TAINT if tainted else _LOST)


def memory_limit(pod: Mapping[str, Any]) -> str | None:
    """The memory limit of a pod's container: what its node says, else what was asked for."""
    status, spec = pod.get("status") or {}, pod["spec"]
    for container in [*(status.get("containerStatuses") or []), *(spec.get("containers") or [])]:
        limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
        if container["name"] == BASE and limit:
            return str(limit)
    return None


def with_events(outcome: Outcome, events: Sequence[Mapping[str, Any]]) -> Outcome:
    """The outcome, with the cluster's words on a pod that never ran or that is gone.

    The most telling ones are chosen: those of one second come in any order, and the last ones are
    often about something else.
    """
    if outcome.kind not in TOLD_BY_EVENTS:
        return outcome
    untold = [event for event in sorted(events, key=_telling) if event.get("reason") not in _ROUTINE]
    told = list(dict.fromkeys(f"{event.get('reason')}: {event.get('message')}" for event in untold))
    if not told:
        return outcome
    kind = outcome.kind
    if kind is Kind.DELETED and any(event.get("reason") == "Preempted" for event in events):
        kind = Kind.PREEMPTED
    return replace(outcome, kind=kind, message=f"{outcome.message} [{'; '.join(told[:_TOLD])}]")


def _telling(event: Mapping[str, Any]) -> tuple[bool, int, float]:
    """What to sort events by: the most telling first, of alike ones the latest."""
    reason, time = str(event.get("reason")), str(event.get("lastTimestamp") or event.get("eventTime") or "")
    at = datetime.fromisoformat(time).timestamp() if time else 0.0
    rank = _TELLING.index(reason) if reason in _TELLING else len(_TELLING) + (event.get("type") != "Warning")
    return _ECHO.fullmatch(str(event.get("message"))) is not None, rank, -at


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
    said = (terminated.get("message") or "").strip()
    message = last_word(said.splitlines()) or f"the container ended with exit code {code}, see its log"
    # Where only one process was killed, some nodes say no more than Error.
    if reason == "OOMKilled" or (said.endswith(KILLED_FOR_MEMORY) and code):
        limit = memory_limit(pod)
        return Outcome(Kind.OUT_OF_MEMORY, Retry.MORE_MEMORY, f"killed at the memory limit of {limit}", code)
    if reason in _CONTAINER_LOST:
        return _taken_away(Kind.NODE_LOST, "its node has restarted, or lost the container", code)
    if reason in _NOT_EXECUTED and _NO_COMMAND.search(message) and not _NO_RUNTIME.search(message):
        return Outcome(Kind.IMAGE, Retry.NEVER, f"{message}; {ADVICE[Kind.IMAGE]}", code)
    if reason in _NOT_EXECUTED:
        node = _node(pod)
        message = f"node {node} could not start the container: {message}; the next try prefers another node"
        return Outcome(Kind.NOT_STARTED, Retry.COUNTED, message, code, bad_node=node)
    if pod["metadata"].get("deletionTimestamp") and code in (137, 143):
        return _taken_away(Kind.DELETED, "somebody or something deleted the pod while it ran", code)
    return classify(code, message, inputs_may_come=inputs_may_come)


def _disrupted(pod: Mapping[str, Any], status: Mapping[str, Any]) -> Outcome | None:
    """The outcome of a pod that the cluster took away."""
    target, reason = _condition(status, "DisruptionTarget"), str(status.get("reason"))
    message = str(status.get("message") or target.get("message") or target.get("reason") or reason).rstrip(". ")
    if reason == "Evicted" and _OWN_LIMIT.search(message):
        return _taken_away(Kind.EVICTED, f"{message}; {_MORE_DISK}")
    if target.get("status") == "True":
        kind = _DISRUPTIONS.get(str(target.get("reason")), Kind.EVICTED)
        if kind is Kind.NODE_SHUTDOWN and reason not in _STATUS_REASONS and not _SHUTDOWN.search(message):
            kind = Kind.EVICTED  # the kubelet gives the same reason for both
        return _taken_away(Kind.EVICTED if reason == "Evicted" else kind, message)
    if _REFUSED_BY_NODE.fullmatch(reason):
        return replace(_taken_away(Kind.EVICTED, message), bad_node=_node(pod))
    taken = _STATUS_REASONS.get(reason)
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
        return _unscheduled(pod, str(scheduled.get("message") or "not scheduled yet"), limits, now)
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
    bad_node = _node(pod) if kind is Kind.NOT_STARTED or reason in _NOT_CREATED else ""
    return Look("not started", Outcome(kind, retry, f"{shown}; {ADVICE[kind]}", bad_node=bad_node))


def _unscheduled(pod: Mapping[str, Any], text: str, limits: Limits, now: datetime) -> Look:
    """A pod that has no node yet."""
    age = _age(pod["metadata"].get("creationTimestamp"), now)
    if missing := _MISSING_CLAIM.search(text):
        if age < limits.start:
            return Look(f"waiting for the claim {missing[1]}: {text}")
        message = (
            f"there is no claim {missing[1]} in the pod's namespace; make it, or name another one in runner.volumes"
        )
        return Look("not started", Outcome(Kind.CONFIGURATION, Retry.NEVER, message))
    if age < limits.pending:
        return Look(f"waiting for a node: {text}")
    advice = ADVICE[Kind.NO_NODE]
    if _UNBOUND_CLAIM.search(text):
        volumes = [volume.get("persistentVolumeClaim") for volume in pod["spec"].get("volumes") or []]
        claims = ", ".join(claim["claimName"] for claim in volumes if claim)
        advice = f"no volume is bound to a claim of runner.volumes: kubectl describe pvc {claims}"
    message = f"no node for {limits.pending:.0f} s: {text}; {advice}"
    return Look("unschedulable", Outcome(Kind.NO_NODE, Retry.COUNTED, message))


def _why_not_started(reason: str, status: Mapping[str, Any]) -> tuple[Kind, Retry, bool]:
    """What a container's reason for waiting means, should it last; and whether it surely does."""
    if reason in _NEVER_STARTS:
        return Kind.IMAGE, Retry.NEVER, True
    said = _all_messages(status)
    if reason == "ImagePullBackOff" and _NO_SUCH_IMAGE.search(said) and not _IMAGE_DENIED.search(said):
        return Kind.IMAGE, Retry.NEVER, True
    if reason in _IMAGE_TROUBLE:
        return Kind.IMAGE, Retry.COUNTED, False
    if reason == _NO_CONFIGURATION and _SURELY_WRONG.search(said):
        return Kind.CONFIGURATION, Retry.NEVER, False
    if reason == _NO_CONFIGURATION:
        return Kind.NOT_STARTED, Retry.COUNTED, False
    if reason in _NOT_CREATED:
        return Kind.CONFIGURATION, Retry.COUNTED, False
    return Kind.NOT_STARTED, Retry.COUNTED, False


def _node(pod: Mapping[str, Any]) -> str:
    return str(pod["spec"].get("nodeName") or "")


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
