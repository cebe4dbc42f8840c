"""What a pod's status says: conditions, and the state of its container. Pure changes of the object.

After a change, :meth:`tests.support.cluster.store.Store.changed` makes it known.
"""

from __future__ import annotations

import time

from tests.support.cluster.objects import Object, stamp
from tests.support.cluster.pods import Pod

NEVER_STARTED = "1970-01-01T00:00:00Z"
"""Kubernetes' time of what has not happened."""


def condition(pod: Pod, kind: str) -> Object | None:
    """The pod's condition of that type; None if it has none."""
    conditions = pod.object["status"].get("conditions") or []
    return next((found for found in conditions if found["type"] == kind), None)


def set_condition(pod: Pod, kind: str, true: bool, reason: str = "", message: str = "") -> None:
    """Give the pod a condition, in place of one of the same type."""
    conditions = pod.object["status"].setdefault("conditions", [])
    new = {
        "type": kind,
        "status": "True" if true else "False",
        "lastProbeTime": None,
        "lastTransitionTime": stamp(time.time()),
    }
    new |= {"reason": reason} if reason else {}
    new |= {"message": message} if message else {}
    conditions[:] = [other for other in conditions if other["type"] != kind] + [new]


def set_readiness(pod: Pod, true: bool, reason: str = "", message: str = "") -> None:
    """Say whether the pod and its container are ready."""
    for kind in ("Ready", "ContainersReady"):
        set_condition(pod, kind, true, reason, message)


def set_container(pod: Pod, state: Object) -> None:
    """Set the state of the pod's container: one of ``waiting``, ``running`` and ``terminated``."""
    running = "running" in state
    image = pod.box["image"]
    status = {
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
    pod.object["status"]["containerStatuses"] = [status]


def waiting(reason: str, message: str = "") -> Object:
    """The state of a container that has not started."""
    return {"waiting": {"reason": reason} | ({"message": message} if message else {})}


def terminated(code: int, reason: str, message: str, started: str, finished: str = "") -> Object:
    """The state of a container that has ended: now, unless ``finished`` says when."""
    end = {"exitCode": code, "reason": reason, "startedAt": started, "finishedAt": finished or stamp(time.time())}
    return {"terminated": end | ({"message": message} if message else {})}
