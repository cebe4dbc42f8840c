"""The objects that the cluster's API shows, and their changes."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from collections import deque
from dataclasses import dataclass

from tests.support.cluster.objects import Object, stamp
from tests.support.cluster.pods import Pod

_HISTORY = 20_000


@dataclass(frozen=True)
class Change:
    """One change of a stored object, as watchers see it."""

    version: int
    collection: str
    kind: str
    """What happened to the object: ADDED, MODIFIED or DELETED."""
    text: str


class Store:
    """All objects, and the queues of those who watch them."""

    def __init__(self) -> None:
        self.version = 1000
        self.pods: dict[tuple[str, str], Pod] = {}
        self.events: dict[tuple[str, str], dict[tuple[str, str], Object]] = {}
        """Events by (namespace, pod's name), then by (reason, message)."""
        self.history: deque[Change] = deque(maxlen=_HISTORY)
        self.watchers: set[asyncio.Queue[Change]] = set()
        self._random = random.Random(1)

    def changed(self, pod: Pod, kind: str = "MODIFIED") -> None:
        """Tell watchers that the pod's object has changed; of one that is gone nobody hears."""
        if pod.gone and kind != "DELETED":
            return
        pod.text_object = self.note("pods", kind, pod.object)

    def event(self, pod: Pod, reason: str, message: str, warning: bool = False, component: str = "kubelet") -> None:
        """Add an event about the pod; the same one again is counted."""
        events = self.events.setdefault((pod.namespace, pod.name), {})
        now = stamp(time.time())
        known = events.get((reason, message))
        if known is not None and known["involvedObject"]["uid"] == pod.object["metadata"]["uid"]:
            known |= {"count": known["count"] + 1, "lastTimestamp": now}
            self.note("events", "MODIFIED", known)
            return
        about = {key: pod.object["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")}
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                # The order of names is that of the events.
                "name": f"{pod.name}.{time.time_ns():x}",
                "namespace": pod.namespace,
                "uid": secrets.token_hex(16),
                "creationTimestamp": now,
            },
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "fieldPath": "", **about},
            "reason": reason,
            "message": message,
            "source": {"component": component, "host": pod.node or ""},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "type": "Warning" if warning else "Normal",
            "eventTime": None,
            "reportingComponent": component,
            "reportingInstance": pod.node or "",
        }
        events[reason, message] = event
        self._shuffle(events)
        self.note("events", "ADDED", event)

    def _shuffle(self, events: dict[tuple[str, str], Object]) -> None:
        """Put the events of the newest second into any order, as a server lists them."""
        newest = list(events.values())[-1]["firstTimestamp"]
        keys = [key for key, event in events.items() if event["firstTimestamp"] == newest]
        self._random.shuffle(keys)
        for key in keys:
            events[key] = events.pop(key)

    def note(self, collection: str, kind: str, item: Object) -> str:
        """Give an object its next version, and tell watchers of it; the object as JSON."""
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        text = json.dumps(item)
        change = Change(self.version, collection, kind, text)
        self.history.append(change)
        for watcher in self.watchers:
            watcher.put_nowait(change)
        return text
