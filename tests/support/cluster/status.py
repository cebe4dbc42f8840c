"""What a pod's status says: conditions, and the state of its container. Pure changes of the object.

After a change, :meth:`tests.support.cluster.store.Store.changed` makes it known.
"""

from __future__ import annotations

import time

from tests.support.cluster.objects import Object, stamp
from tests.support.cluster.pods import Pod

NEVER_STARTED = "1970-01-01T00:00:00Z"
"""Kubernetes' time of what has not happened."""
_KUBELETS = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
"""Types of the conditions that the kubelet sets, in its order."""


def condition(pod: Pod, kind: str) -> Object | None:
    """The pod's condition of that type; None if it has none."""
    conditions = pod.object["status"].get("conditions") or []
    return next((found for found in conditions if found["type"] == kind), None)


def set_condition(
    pod: Pod, kind: str, true: bool, reason: str = "", message: str = "", *, observed: bool = True
) -> None:
    """Give the pod a condition, at the place of one of the same type or at the end.

    ``observed``: say which generation of the pod was looked at; a bind and an eviction don't.
    """
    conditions = pod.object["status"].setdefault("conditions", [])
    new: Object = {"type": kind, "status": "True" if true else "False", "lastProbeTime": None}
    new |= {"observedGeneration": pod.object["metadata"]["generation"]} if observed else {}
    new |= {"reason": reason} if reason else {}
    new |= {"message": message} if message else {}
    kinds = [other["type"] for other in conditions]
    at = kinds.index(kind) if kind in kinds else len(kinds)
    same = at < len(kinds) and conditions[at]["status"] == new["status"]
    new["lastTransitionTime"] = conditions[at]["lastTransitionTime"] if same else stamp(time.time())
    conditions[at : at + 1] = [new]


def set_by_kubelet(pod: Pod, true: bool, reason: str = "", message: str = "") -> None:
    """Set all conditions that the kubelet looks after; others, such as a disruption, stand first.

    Args:
        pod: The pod; the condition PodReadyToStartContainers says whether it has a sandbox.
        true: Whether the pod and its container are ready.
        reason: Why not.
        message: The same in words.
    """
    status = pod.object["status"]
    status["observedGeneration"] = pod.object["metadata"]["generation"]
    set_condition(pod, "PodReadyToStartContainers", pod.sandbox)
    set_condition(pod, "Initialized", True, reason if reason == "PodCompleted" else "")
    for kind in ("Ready", "ContainersReady"):
        set_condition(pod, kind, true, reason, message)
    set_condition(pod, "PodScheduled", True)
    own = {found["type"]: found for found in status["conditions"]}
    status["conditions"] = [found for kind, found in own.items() if kind not in _KUBELETS]
    status["conditions"] += [own[kind] for kind in _KUBELETS]


def set_container(pod: Pod, state: Object) -> None:
    """Set the state of the pod's container: one of ``waiting``, ``running`` and ``terminated``."""
    running = "running" in state
    image = pod.box["image"]
    status: Object = {
        "name": pod.box["name"],
        "image": image,
        "imageID": f"{image}@sha256:{'0' * 64}" if "waiting" not in state else "",
        "ready": running,
        "started": running,
        "restartCount": 0,
        "state": state,
        "lastState": {},
    }
    if "waiting" not in state:
        status["containerID"] = f"containerd://{pod.object['metadata']['uid'].replace('-', '') * 2}"
    if (end := state.get("terminated")) and end["reason"] != "ContainerStatusUnknown":
        end["containerID"] = status["containerID"]
    pod.object["status"]["containerStatuses"] = [status]


def waiting(reason: str, message: str = "") -> Object:
    """The state of a container that has not started."""
    return {"waiting": {"reason": reason} | ({"message": message} if message else {})}


def terminated(code: int, reason: str, message: str, started: str, finished: str = "") -> Object:
    """The state of a container that has ended: now, unless ``finished`` says when."""
    end = {"exitCode": code, "reason": reason, "startedAt": started, "finishedAt": finished or stamp(time.time())}
    return {"terminated": end | ({"message": message} if message else {})}
