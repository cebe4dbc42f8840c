"""The cluster's scheduler: which node a pod goes to, and what it is told where there is none."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.support.cluster import status
from tests.support.cluster.objects import Node, Object, Resources, quantity
from tests.support.cluster.pods import Contents, Pod
from tests.support.cluster.store import Store

_OTHER_NODE = "didn't match Pod's node affinity/selector"


@dataclass
class Place:
    """A node, with the pods on it and what they take of it."""

    node: Node
    used: Resources = field(default_factory=dict)
    pods: set[Pod] = field(default_factory=set)
    address: str = ""
    """The node's address in the cluster."""
    lost: bool = False
    """Whether the API can't reach the node."""
    alive: bool = False
    """Whether a lost node is only cut off from the API: what runs there runs on."""
    shut_down: bool = False
    not_ready: bool = False
    """Whether the API says so: some time after the last sign of life."""
    kubelet: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the node's kubelet works."""
    services_known: float = 0.0
    """Monotonic time from which on the kubelet can make containers."""
    broken: str | None = None
    """What the container runtime says of each start; None: it works."""
    absence: asyncio.Task[None] | None = None
    """What happens while the kubelet is away."""

    @property
    def taints(self) -> list[Mapping[str, str]]:
        """The node's own taints, and those that its state adds."""
        gone = [{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"}] if self.not_ready else []
        down = [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}] if self.shut_down else []
        return [*self.node.taints, *gone, *down]


class Scheduler:
    """Gives pods places on nodes, and takes them away."""

    def __init__(self, nodes: Iterable[Node], store: Store, contents: Contents) -> None:
        self.places: dict[str, Place] = {}
        self._store, self._contents = store, contents
        for node in nodes:
            self.add(node)

    def add(self, node: Node) -> None:
        """Add a node, whose kubelet works."""
        place = Place(node, address=f"10.0.0.{len(self.places) + 1}")
        place.kubelet.set()
        self.places[node.name] = place

    def place(self, pod: Pod) -> None:
        """Put the pod on the node that it prefers of those that it fits on, else on the emptiest.

        If there is none, its condition PodScheduled and an event say why.
        """
        reasons, lack_of_room = [], 0
        if missing := self._missing_claim(pod):
            message = f"0/{len(self.places)} nodes are available: {missing}. not found"
        else:
            order = sorted(self.places.values(), key=lambda at: (-preference(pod.object, at.node), len(at.pods)))
            for place in order:
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

    def take(self, pod: Pod, place: Place) -> None:
        """Have the pod on the node, with all that it takes of it."""
        place.pods.add(pod)
        for name, amount in requests_of(pod.object).items():
            place.used[name] = place.used.get(name, 0.0) + amount
        pod.node = place.node.name

    def _bind(self, pod: Pod, place: Place) -> None:
        self.take(pod, place)
        pod.object["spec"]["nodeName"] = pod.node
        status.set_condition(pod, "PodScheduled", True, observed=False)
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
    """Why the pod can't be on the node, and whether room can be made for it.

    An empty list says that it can.
    """
    for taint in taints:
        if taint["effect"] != "PreferNoSchedule" and not tolerated(taint, pod["spec"]["tolerations"]):
            return ["node(s) had untolerated taint(s)"], False
    if not wanted(pod, node):
        return [f"node(s) {_OTHER_NODE}"], False
    short = lacking(pod, node, used)
    texts = ["Too many pods" if name == "pods" else f"Insufficient {name}" for name in short]
    return texts, not lacking(pod, node, {})


def lacking(pod: Object, node: Node, used: Resources) -> list[str]:
    """Names of the resources of which the node has too little for the pod, beside those used."""
    room = node.room
    return [
        name
        for name, amount in requests_of(pod).items()
        if used.get(name, 0.0) + amount > room.get(name, math.inf if name == "ephemeral-storage" else 0.0) + 1e-9
    ]


def wanted(pod: Object, node: Node) -> bool:
    """Whether the node is one that the pod's selector and required affinity allow."""
    selector = pod["spec"].get("nodeSelector") or {}
    if any(node.all_labels.get(key) != value for key, value in selector.items()):
        return False
    required = _affinity(pod).get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    terms = required.get("nodeSelectorTerms")
    return not terms or any(_term_matches(term, node) for term in terms)


def preference(pod: Object, node: Node) -> int:
    """The sum of the weights of the preferred terms that the node matches."""
    terms = _affinity(pod).get("preferredDuringSchedulingIgnoredDuringExecution") or []
    return sum(term["weight"] for term in terms if _term_matches(term["preference"], node))


def refusal(pod: Object, place: Place) -> tuple[str, str] | None:
    """Reason and text with which the node's kubelet refuses a pod; None: it takes it."""
    if not wanted(pod, place.node):
        return "NodeAffinity", f"Pod was rejected: Predicate NodeAffinity failed: node(s) {_OTHER_NODE}"
    for name in lacking(pod, place.node, place.used):
        factor = 1000 if name == "cpu" else 1
        amounts = (requests_of(pod)[name], place.used.get(name, 0.0), place.node.room.get(name, 0.0))
        requested, used, capacity = (round(amount * factor) for amount in amounts)
        numbers = f"requested: {requested}, used: {used}, capacity: {capacity}"
        return f"OutOf{name}", f"Pod was rejected: Node didn't have enough resource: {name}, {numbers}"
    return None


def _affinity(pod: Object) -> Object:
    return (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}


def tolerated(taint: Mapping[str, str], tolerations: Iterable[Object]) -> bool:
    """Whether one of the tolerations is for the taint."""
    return any(
        toleration.get("effect") in (None, "", taint["effect"])
        and toleration.get("key") in (None, "", taint["key"])
        and (toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", ""))
        for toleration in tolerations
    )


def _term_matches(term: Object, node: Node) -> bool:
    fields = {"metadata.name": node.name}
    found = [_expression(part, node.all_labels) for part in term.get("matchExpressions") or []]
    found += [_expression(part, fields) for part in term.get("matchFields") or []]
    return bool(found) and all(found)


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
    return f"{available}{why}. no new claims to deallocate, preemption: {available}{', '.join(preemption)}."
