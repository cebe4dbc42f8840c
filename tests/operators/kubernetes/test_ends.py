"""How pods end, judged by their objects as real clusters give them (Kubernetes 1.34)."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from chunkflow_core.commands.log_copy import KILLED_FOR_MEMORY
from operators.kubernetes.ends import Limits, Look, examine, is_lost, vanished, with_events
from operators.outcomes import Kind, Outcome, Retry

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
LIMITS = Limits(pending=3600, start=600)


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def pod(
    phase: str | None, state: dict[str, Any] | None = None, deleted: float | None = None, **status: Any
) -> dict[str, Any]:
    """A pod's object.

    ``state`` is that of its container, ``deleted`` the seconds since it was to be gone.
    """
    containers = [{"name": "sidecar", "state": {"running": {}}}, {"name": "base", "state": state}]
    resources = {"limits": {"memory": "4Gi"}}
    meta = {"name": "pod", "creationTimestamp": ago(5000)} | (
        {"deletionTimestamp": ago(deleted)} if deleted is not None else {}
    )
    return {
        "metadata": meta,
        "spec": {"containers": [{"name": "base", "resources": resources}]},
        "status": {"phase": phase, "containerStatuses": containers if state else None} | status,
    }


def ended(code: int, reason: str = "Error", message: str = "", finished: float = 100) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": ago(finished)}}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def condition(kind: str, status: str, reason: str, message: str = "", since: float = 100) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": ago(since)}


def disrupted(reason: str) -> list[dict[str, Any]]:
    return [condition("Ready", "False", "PodFailed"), condition("DisruptionTarget", "True", reason, "why")]


def event(kind: str, reason: str, message: str, since: float) -> dict[str, Any]:
    return {"type": kind, "reason": reason, "message": message, "lastTimestamp": ago(since)}


def scheduled(since: float) -> list[dict[str, Any]]:
    return [condition("PodScheduled", "True", "", since=since)]


UNSCHEDULABLE = [
    condition("PodScheduled", "False", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
]


NODE_FAULTS = (
    'error during container init: error mounting "cgroup" to rootfs at "/sys/fs/cgroup": no such file or directory',
    "error running prestart hook #0: exit status 1, stdout: , stderr: nvidia-container-cli: initialization error: load "
    "library failed: libnvidia-ml.so.1: cannot open shared object file: no such file or directory",
    'error running hook #0: exec: "nvidia-container-runtime-hook": executable file not found in $PATH',
    'error mounting "/var/lib/kubelet/pods/1/volumes/x" to rootfs at "/data": permission denied',
    "unable to retrieve OCI runtime error (open /run/log.json: no such file or directory): "
    'exec: "nvidia-container-runtime": executable file not found in $PATH',
)
BAD_COMMANDS = (
    'unable to start container process: exec: "/nothing": stat /nothing: no such file or directory',
    'unable to start container process: error during container init: exec: "python": permission denied',
    'level=error msg="unable to start container process: exec: \\"python\\": executable file not found in $PATH"',
    "executable file `python` not found in $PATH: No such file or directory",
    "exec /usr/bin/python: exec format error",
)
DENIALS = (
    "pull access denied, repository does not exist or may require authorization: insufficient_scope",
    "401 Unauthorized: manifest not found",
    "403 Forbidden: repository does not exist",
)


@pytest.mark.parametrize(
    ("object_", "kind", "retry", "code", "said"),
    [
        (pod("Succeeded", ended(0, "Completed")), Kind.DONE, Retry.COUNTED, 0, "done"),
        # The container is done although a sidecar, or the kubelet's slowness, keeps the pod up; nor
        # does a later disruption matter.
        (pod("Running", ended(0, "Completed", finished=0)), Kind.DONE, Retry.COUNTED, 0, "done"),
        (pod("Failed", ended(0, "Completed"), conditions=disrupted("TerminationByKubelet")),
         Kind.DONE, Retry.COUNTED, 0, "done"),
        (pod("Failed", ended(64, message="usage\nerror: --block: no")),
         Kind.WRONG_USAGE, Retry.NEVER, 64, "--block: no"),
        (pod("Failed", ended(65, message="error: NaN")), Kind.WRONG_DATA, Retry.NEVER, 65, "NaN"),
        (pod("Failed", ended(66, message="error: no layer")), Kind.MISSING_INPUT, Retry.NEVER, 66, "no layer"),
        (pod("Failed", ended(75, message="error: 503")), Kind.STORAGE, Retry.COUNTED, 75, "503"),
        (pod("Failed", ended(78, message="error: bad key")), Kind.WRONG_SPEC, Retry.NEVER, 78, "bad key"),
        (pod("Failed", ended(1, message="Traceback\nValueError: x")), Kind.ERROR, Retry.COUNTED, 1, "ValueError: x"),
        (pod("Failed", ended(3)), Kind.ERROR, Retry.COUNTED, 3, "exit code 3"),
        (pod("Failed", ended(137)), Kind.KILLED, Retry.COUNTED, 137, "exit code 137"),
        (pod("Failed", ended(139, "Error")), Kind.KILLED, Retry.COUNTED, 139, "exit code 139"),
        (pod("Running", ended(75, message="error: slow", finished=11)), Kind.STORAGE, Retry.COUNTED, 75, "slow"),
        (pod("Failed", ended(137, "OOMKilled")), Kind.OUT_OF_MEMORY, Retry.MORE_MEMORY, 137, "memory limit of 4Gi"),
        # Killed was a child of the main process, whose own exit code means nothing then.
        (pod("Failed", ended(65, "OOMKilled")), Kind.OUT_OF_MEMORY, Retry.MORE_MEMORY, 65, "memory limit of 4Gi"),
        # Nor need the node know of it; the log's last line does.
        *((pod("Failed", ended(code, "Error", f"{said}{KILLED_FOR_MEMORY}\n")),
           Kind.OUT_OF_MEMORY, Retry.MORE_MEMORY, code, "memory limit of 4Gi")
          for code, said in ((137, "error: killed by signal 9 (SIGKILL): "), (1, "error: a helper died\n"), (65, ""))),
        (pod("Failed", ended(1, message=f"{KILLED_FOR_MEMORY}\nerror: another end")),
         Kind.ERROR, Retry.COUNTED, 1, "another end"),
        (pod("Failed", ended(128, "StartError", "exec: \"python\": executable file not found in $PATH")),
         Kind.IMAGE, Retry.NEVER, 128, "not found in $PATH"),
        (pod("Failed", ended(137), conditions=disrupted("PreemptionByScheduler")),
         Kind.PREEMPTED, Retry.AT_ONCE, None, "why"),
        (pod("Failed", ended(137, "OOMKilled"), conditions=disrupted("TerminationByKubelet"), reason="Evicted",
             message="low on memory"),
         Kind.EVICTED, Retry.AT_ONCE, None, "low on memory"),
        (pod("Failed", None, reason="Evicted", message="ephemeral storage"),
         Kind.EVICTED, Retry.AT_ONCE, None, "ephemeral"),
        (pod("Failed", ended(143), conditions=disrupted("TerminationByKubelet"), reason="Terminated",
             message="imminent node shutdown"),
         Kind.NODE_SHUTDOWN, Retry.AT_ONCE, None, "imminent"),
        (pod("Failed", ended(143), conditions=disrupted("EvictionByEvictionAPI"), deleted=1),
         Kind.EVICTED, Retry.AT_ONCE, None, "why"),
        (pod("Failed", None, reason="OutOfcpu", message="Node didn't have enough"),
         Kind.EVICTED, Retry.AT_ONCE, None, "enough"),
        (pod("Failed", None, reason="OutOfnvidia.com/gpu", message="Node didn't have gpu"),
         Kind.EVICTED, Retry.AT_ONCE, None, "gpu"),
        (pod("Failed", ended(137), reason="DeadlineExceeded", message="active longer than"),
         Kind.DEADLINE, Retry.COUNTED, None, "longer deadline"),
        (pod("Failed", ended(143), deleted=1), Kind.DELETED, Retry.AT_ONCE, 143, "deleted the pod"),
        (pod("Failed", ended(75, message="error: x"), deleted=1), Kind.STORAGE, Retry.COUNTED, 75, "x"),
        # More memory is what it needs, also if its deletion was asked for meanwhile.
        (pod("Failed", ended(137, "OOMKilled"), deleted=1),
         Kind.OUT_OF_MEMORY, Retry.MORE_MEMORY, 137, "memory limit of 4Gi"),
        # Words about limits and a condition that does not hold are no eviction.
        (pod("Failed", ended(75, message="error: 503"), message="the log exceeds the limit"),
         Kind.STORAGE, Retry.COUNTED, 75, "503"),
        (pod("Failed", ended(75, message="error: 503"),
             conditions=[condition("DisruptionTarget", "False", "PreemptionByScheduler")]),
         Kind.STORAGE, Retry.COUNTED, 75, "503"),
        # The node went away: the pod stays Running for ever, or Terminating until the node is back.
        (pod("Running", {"running": {}}, deleted=11, conditions=disrupted("DeletionByTaintManager")),
         Kind.NODE_LOST, Retry.AT_ONCE, None, "why"),
        (pod("Running", {"running": {}}, deleted=61), Kind.NODE_LOST, Retry.AT_ONCE, None, "does not answer"),
        # The node restarted within minutes, and knows of the container only that it is dead.
        (pod("Failed", ended(255, "Unknown")), Kind.NODE_LOST, Retry.AT_ONCE, 255, "restarted"),
        (pod("Failed", ended(137, "ContainerStatusUnknown")), Kind.NODE_LOST, Retry.AT_ONCE, 137, "restarted"),
        (pod("Running", {"terminated": {"exitCode": 75, "reason": "Error"}}),
         Kind.STORAGE, Retry.COUNTED, 75, "exit code 75"),
        (pod("Failed", ended(128, "StartError", "nvidia-container-cli: device error")),
         Kind.NOT_STARTED, Retry.COUNTED, 128, "device"),
        # What a node lacks sounds like what an image lacks.
        *((pod("Failed", ended(128, "StartError", f"runc create failed: unable to start container process: {why}")),
           Kind.NOT_STARTED, Retry.COUNTED, 128, "the next try prefers another node")
          for why in NODE_FAULTS),
        *((pod("Failed", ended(128, "StartError", f"container create failed: {why}")),
           Kind.IMAGE, Retry.NEVER, 128, why)
          for why in BAD_COMMANDS),
        # A registry that denies does not say whether there is such an image.
        *((pod("Pending", waiting("ImagePullBackOff", f"Back-off pulling image: {why}"), conditions=scheduled(601)),
           Kind.IMAGE, Retry.COUNTED, None, why)
          for why in DENIALS),
        (pod("Pending", waiting("CreateContainerConfigError", "services have not yet been read at least once"),
             conditions=scheduled(601)),
         Kind.NOT_STARTED, Retry.COUNTED, None, "services"),
        (pod("Failed", None, reason="UnexpectedAdmissionError", message="no healthy devices present"),
         Kind.EVICTED, Retry.AT_ONCE, None, "healthy"),
        (pod("Failed", None, reason="Evicted",
             message="Pod ephemeral local storage usage exceeds the total limit of containers 1Gi."),
         Kind.EVICTED, Retry.AT_ONCE, None, "raise ephemeral_storage"),
        (pod("Failed", None, reason="Evicted", message='Usage of EmptyDir volume "shm" exceeds the limit "1Gi".'),
         Kind.EVICTED, Retry.AT_ONCE, None, "raise"),
        (pod("Failed", None, reason="Evicted",
             message="The node was low on resource: memory. Container base was using 3Gi, request "
                 "is 1Gi, has larger consumption."),
         Kind.EVICTED, Retry.AT_ONCE, None, "low on resource"),
        (pod("Failed", ended(137),
             conditions=[condition("DisruptionTarget", "True", "TerminationByKubelet",
                                   "The node was low on resource: memory.")]),
         Kind.EVICTED, Retry.AT_ONCE, None, "low on resource"),
        (pod("Failed", ended(137),
             conditions=[condition("DisruptionTarget", "True", "TerminationByKubelet",
                                   "Pod was terminated in response to imminent node shutdown.")]),
         Kind.NODE_SHUTDOWN, Retry.AT_ONCE, None, "imminent"),
        (pod("Failed", waiting("PodInitializing"),
             initContainerStatuses=[{"name": "fetch", "state": ended(3, "Error", "error: no model")}]),
         Kind.ERROR, Retry.COUNTED, None, "init container fetch ended with exit code 3: no model"),
        (pod("Pending", waiting("CreateContainerError", "context deadline exceeded"), conditions=scheduled(601)),
         Kind.CONFIGURATION, Retry.COUNTED, None, "context deadline exceeded"),
        (pod("Pending", waiting("ImagePullBackOff", "Back-off: 403 Forbidden: denied"), conditions=scheduled(601)),
         Kind.IMAGE, Retry.COUNTED, None, "denied"),
        (pod("Failed", None), Kind.ERROR, Retry.COUNTED, None, "no reason"),
        (pod("Pending", None, conditions=UNSCHEDULABLE), Kind.NO_NODE, Retry.COUNTED, None, "nvidia.com/gpu"),
        (pod("Pending", waiting("ContainerCreating"), conditions=scheduled(601)),
         Kind.NOT_STARTED, Retry.COUNTED, None, "ContainerCreating"),
        # A sidecar of the template that runs is nothing to wait for.
        (pod("Pending", waiting("ContainerCreating"), conditions=scheduled(601),
             initContainerStatuses=[{"name": "proxy", "state": {"running": {}}, "started": True}]),
         Kind.NOT_STARTED, Retry.COUNTED, None, "ContainerCreating"),
        (pod("Pending", waiting("InvalidImageName", "bad"), conditions=scheduled(1)),
         Kind.IMAGE, Retry.NEVER, None, "bad"),
        (pod("Pending", waiting("ImagePullBackOff", "Back-off: not found"), conditions=scheduled(1)),
         Kind.IMAGE, Retry.NEVER, None, "runner.image"),
        (pod("Pending", waiting("ImagePullBackOff", "Back-off: i/o timeout"), conditions=scheduled(601)),
         Kind.IMAGE, Retry.COUNTED, None, "timeout"),
        (pod("Pending", waiting("CreateContainerConfigError", 'secret "s" not found'), conditions=scheduled(601)),
         Kind.CONFIGURATION, Retry.NEVER, None, 'secret "s" not found'),
    ],
)  # fmt: skip
def test_ends(object_: dict[str, Any], kind: Kind, retry: Retry, code: int | None, said: str) -> None:
    outcome = examine(object_, LIMITS, NOW).outcome
    assert outcome
    assert (outcome.kind, outcome.retry, outcome.code) == (kind, retry, code)
    assert said in outcome.message
    assert kind.value in str(outcome) or outcome.reason in str(outcome)


@pytest.mark.parametrize(
    ("object_", "state"),
    [
        (pod(None), "waiting for a node: not scheduled yet"),
        (pod("Pending", conditions=scheduled(1)), "starting: ContainerCreating"),
        (pod("Pending", waiting("ErrImagePull", "not found"), conditions=scheduled(599)),
         "starting: ErrImagePull: not found"),
        (pod("Pending", waiting("ImagePullBackOff", "i/o timeout"), conditions=scheduled(1)),
         "starting: ImagePullBackOff: i/o timeout"),
        (pod("Pending", waiting("CreateContainerConfigError", "no secret"), conditions=scheduled(1)),
         "starting: CreateContainerConfigError: no secret"),
        (pod("Running", {"running": {}}), "running"),
        # Why it ended is not known yet: an eviction's reason comes after the container's exit code.
        (pod("Running", ended(137, finished=9)), "ending"),
        (pod("Pending", waiting("ImagePullBackOff", "Back-off: denied"), conditions=scheduled(1)),
         "starting: ImagePullBackOff: Back-off: denied"),
        (pod("Pending", waiting("PodInitializing"), conditions=scheduled(5000),
             initContainerStatuses=[{"name": "fetch", "state": {"running": {}}, "started": False}]),
         "starting: init container fetch runs"),
        (pod("Pending", waiting("ContainerCreating"), conditions=scheduled(5000),
             initContainerStatuses=[{"name": "fetch", "state": ended(0, finished=10)}]),
         "starting: ContainerCreating"),
        (pod("Pending", waiting("PodInitializing"), conditions=scheduled(1),
             initContainerStatuses=[{"name": "fetch", "state": ended(0)}]),
         "starting: ContainerCreating"),
        (pod("Running", {"running": {}}, deleted=-20), "being deleted"),
        (pod("Running", {"running": {}}, deleted=59), "being deleted"),
    ],
)  # fmt: skip
def test_going_on(object_: dict[str, Any], state: str) -> None:
    if state.startswith("waiting"):
        object_["metadata"]["creationTimestamp"] = ago(3599)
    assert examine(object_, LIMITS, NOW) == Look(state)


def test_a_missing_donation_may_come() -> None:
    missing = pod("Failed", ended(66, message="error: no donation"))
    outcome = examine(missing, LIMITS, NOW, inputs_may_come=True).outcome
    assert outcome and outcome.retry is Retry.COUNTED


def test_events_tell_about_pods_that_never_ran_or_are_gone() -> None:
    events = [
        {"type": "Normal", "reason": "Scheduled", "message": "assigned"},
        {"type": "Warning", "reason": "FailedMount", "message": "no claim"},
        {"type": "Warning", "reason": "FailedMount", "message": "no claim"},
    ]
    lost = vanished("p").outcome
    assert lost and lost.retry is Retry.AT_ONCE
    assert with_events(lost, events).message == "the pod p is gone, and its last status with it [FailedMount: no claim]"
    done = Outcome(Kind.STORAGE, Retry.COUNTED, "503", 75)
    assert with_events(done, events) == done


EVENTS = [
    event("Normal", "Scheduled", "assigned", 40),
    event("Warning", "FailedScheduling", "0/3 nodes are available: 3 Insufficient cpu", 30),
    event("Normal", "Pulling", "Pulling image", 10),
    event("Warning", "Failed", "Failed to pull image: 500 Internal Server Error", 10),
    event("Warning", "Failed", "Error: ErrImagePull", 10),
    event("Normal", "BackOff", 'Back-off pulling image "x"', 5),
    event("Warning", "Failed", "Error: ImagePullBackOff", 5),
    event("Normal", "Killing", "Stopping container base", 1),
    event("Normal", "SandboxChanged", "it will be killed and re-created", 1),
]


@pytest.mark.parametrize("seed", range(20))
def test_the_most_telling_events_are_told_in_whatever_order_they_come(seed: int) -> None:
    outcome = Outcome(Kind.IMAGE, Retry.COUNTED, "no image")
    events = random.Random(seed).sample(EVENTS, len(EVENTS))

    message = with_events(outcome, events).message

    assert message.startswith("no image [FailedScheduling: 0/3 nodes are available: 3 Insufficient cpu; ")
    assert "; Failed: Failed to pull image: 500 Internal Server Error; " in message
    assert "ErrImagePull" not in message
    assert "Back-off" not in message
    assert message.count("; ") == 2


def test_a_deleted_pod_was_preempted_if_an_event_says_so() -> None:
    gone = vanished("p").outcome
    assert gone
    told = with_events(gone, [*EVENTS, event("Normal", "Preempted", "Preempted by pod 1 on node node4", 50)])
    assert (told.kind, told.retry) == (Kind.PREEMPTED, Retry.AT_ONCE)
    assert "[Preempted: Preempted by pod 1 on node node4; " in told.message


@pytest.mark.parametrize(
    ("object_", "lost"),
    [
        (pod("Running", {"running": {}}), False),
        (pod("Running", {"running": {}}, deleted=59), False),
        (pod("Running", {"running": {}}, deleted=61), True),
        (pod("Pending", waiting("ContainerCreating"), deleted=61), True),
        (pod("Failed", ended(137), deleted=61), False),
        (pod("Running", {"running": {}}, deleted=11, conditions=disrupted("DeletionByTaintManager")), True),
    ],
)
def test_lost(object_: dict[str, Any], lost: bool) -> None:
    assert is_lost(object_, NOW) is lost


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('persistentvolumeclaim "nowhere" not found. not found', "there is no claim nowhere in the pod's namespace"),
        ("pod has unbound immediate PersistentVolumeClaims. not found", "kubectl describe pvc data"),
    ],
)
def test_a_claim_that_keeps_a_pod_from_its_node(text: str, said: str) -> None:
    conditions = [condition("PodScheduled", "False", "Unschedulable", f"0/3 nodes are available: {text}")]
    object_ = pod("Pending", conditions=conditions)
    object_["spec"]["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    outcome = examine(object_, LIMITS, NOW).outcome
    assert outcome
    assert said in outcome.message
