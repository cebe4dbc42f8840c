"""The cluster's scheduler: which node a pod goes to, and what it is told where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.support.cluster import status
from tests.support.cluster.objects import Node, Object, Resources, quantity
from tests.support.cluster.pods import Contents, Pod
from tests.support.cluster.store import Store


@dataclass
class Place:
    """A node, with the pods on it and what they take of it."""

    node: Node
    used: Resources = field(default_factory=dict)
    pods: set[Pod] = field(default_factory=set)
    lost: bool = False
    shut_down: bool = False

    @property
    def taints(self) -> list[Mapping[str, str]]:
        """The node's own taints, and those that its state adds."""
        gone = [{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"}] if self.lost else []
        down = [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}] if self.shut_down else []
        return [*self.node.taints, *gone, *down]


class Scheduler:
    """Gives pods places on nodes, and takes them away."""

    def __init__(self, nodes: Iterable[Node], store: Store, contents: Contents) -> None:
        self.places = {node.name: Place(node) for node in nodes}
        self._store, self._contents = store, contents

    def place(self, pod: Pod) -> None:
        """Put the pod on the emptiest node that it fits on.

        If there is none, its condition PodScheduled and an event say why.
        """
        reasons, lack_of_room = [], 0
        if missing := self._missing_claim(pod):
            available = f"0/{len(self.places)} nodes are available: "
            helpless = f"{len(self.places)} Preemption is not helpful for scheduling"
            message = f"{available}{missing}. preemption: {available}{helpless}."
        else:
            for place in sorted(self.places.values(), key=lambda place: len(place.pods)):
                why, roomless = unfit(pod.object, place.node, place.taints, place.used)
                if not why:
                    self._bind(pod, place)
                    return
                reasons.append(why)
                lack_of_room += roomless
            message = no_place(reasons, lack_of_room)
        condition = status.condition(pod, "PodScheduled")
        if condition is None or condition.get("message") != message:
            status.set_condition(pod, "PodScheduled", False, "Unschedulable", message)
            self._store.changed(pod)
            self._store.event(pod, "FailedScheduling", message, warning=True, component="default-scheduler")

    def _missing_claim(self, pod: Pod) -> str | None:
        for volume in pod.spec.get("volumes") or []:
            if "persistentVolumeClaim" in volume:
                name = volume["persistentVolumeClaim"]["claimName"]
                if (pod.namespace, name) not in self._contents.claims:
                    return f'persistentvolumeclaim "{name}" not found'
        return None

    def _bind(self, pod: Pod, place: Place) -> None:
        place.pods.add(pod)
        for name, amount in requests_of(pod.object).items():
            place.used[name] = place.used.get(name, 0.0) + amount
        pod.node = place.node.name
        pod.object["spec"]["nodeName"] = pod.node
        status.set_condition(pod, "PodScheduled", True)
        self._store.changed(pod)
        message = f"Successfully assigned {pod.namespace}/{pod.name} to {pod.node}"
        self._store.event(pod, "Scheduled", message, component="default-scheduler")

    def release(self, pod: Pod) -> None:
        """Take the pod off its node, if that has not been done."""
        if pod.node is None or pod.released:
            return
        pod.released = True
        place = self.places[pod.node]
        place.pods.discard(pod)
        for name, amount in requests_of(pod.object).items():
            place.used[name] -= amount


def requests_of(pod: Object) -> Resources:
    """What the pod takes of its node: amounts by name of the resource, ``pods`` being one."""
    requests = pod["spec"]["containers"][0]["resources"].get("requests") or {}
    return {name: quantity(amount) for name, amount in requests.items()} | {"pods": 1.0}


def unfit(pod: Object, node: Node, taints: Iterable[Mapping[str, str]], used: Resources) -> tuple[list[str], bool]:
    """Why the pod can't be on the node, and whether it is only for lack of room.

    An empty list says that it can.
    """
    spec = pod["spec"]
    for taint in taints:
        if taint["effect"] != "PreferNoSchedule" and not _tolerated(taint, spec["tolerations"]):
            return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"], False
    labels = node.all_labels
    selector = spec.get("nodeSelector") or {}
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    terms = (affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms")
    if any(labels.get(key) != value for key, value in selector.items()) or (
        terms and not any(_term_matches(term, labels) for term in terms)
    ):
        return ["node(s) didn't match Pod's node affinity/selector"], False
    room = node.room
    lacking = [
        "Too many pods" if name == "pods" else f"Insufficient {name}"
        for name, amount in requests_of(pod).items()
        if used.get(name, 0.0) + amount > room.get(name, math.inf if name == "ephemeral-storage" else 0.0) + 1e-9
    ]
    return lacking, True


def _tolerated(taint: Mapping[str, str], tolerations: list[Object]) -> bool:
    return any(
        toleration.get("effect") in (None, "", taint["effect"])
        and toleration.get("key") in (None, "", taint["key"])
        and (toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", ""))
        for toleration in tolerations
    )


def _term_matches(term: Object, labels: Mapping[str, str]) -> bool:
    return bool(term.get("matchExpressions")) and all(_expression(part, labels) for part in term["matchExpressions"])


def _expression(part: Object, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(part["key"]), part.get("values") or []
    match part["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case _:
            return value is not None and int(value) < int(values[0])


def no_place(reasons: list[list[str]], lack_of_room: int) -> str:
    """What a scheduler says of a pod for which there is no place.

    ``reasons`` has a list for each node; ``lack_of_room`` of the nodes only have too little room.
    """
    nodes = len(reasons)
    counts: dict[str, int] = {}
    for reason in (reason for of_node in reasons for reason in of_node):
        counts[reason] = counts.get(reason, 0) + 1
    why = ", ".join(sorted(f"{count} {reason}" for reason, count in counts.items()))
    helpless = nodes - lack_of_room
    preemption = [f"{lack_of_room} No preemption victims found for incoming pod"] if lack_of_room else []
    preemption += [f"{helpless} Preemption is not helpful for scheduling"] if helpless else []
    available = f"0/{nodes} nodes are available: "
    return f"{available}{why}. preemption: {available}{', '.join(preemption)}."
