"""Ends of the cluster's nodes, and what breaks on them: one object for a cluster."""

from __future__ import annotations

import asyncio
import time

from tests.support.cluster.kubelet import Kubelet
from tests.support.cluster.objects import stamp
from tests.support.cluster.pods import Pod
from tests.support.cluster.scheduler import Place, tolerated
from tests.support.cluster.status import condition, set_by_kubelet, set_condition, terminated


class Nodes:
    """What happens to nodes as a whole; it is told to the kubelets."""

    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet
        self._timing = kubelet.timing

    def shut_down(self, name: str) -> None:
        """Shut the node down as ``Cluster.shutdown_node`` says."""
        place = self._kubelet.places[name]
        place.shut_down = True
        message = "Pod was terminated in response to imminent node shutdown."
        for pod in list(place.pods):
            pod.ending = {"reason": "Terminated", "message": message}
            pod.ending["disruption"] = ("TerminationByKubelet", message)
            self._kubelet.spawn(self._kubelet.end_with_grace(pod, self._timing.shutdown))

    def lose(self, name: str, alive: bool) -> None:
        """Cut the node's power, or only its connection, as ``Cluster.lose_node`` says."""
        place = self._kubelet.places[name]
        place.lost, place.alive = True, alive
        for pod in list(place.pods):
            if "containerStatuses" in pod.object["status"] and not alive:
                self._kubelet.cut_off(pod)
        self._leave(place)

    def restart_kubelet(self, name: str, seconds: float) -> None:
        """Restart the node's kubelet as ``Cluster.restart_kubelet`` says."""
        place = self._kubelet.places[name]
        for pod in list(place.pods):
            pod.log.cut()
        self._leave(place)
        self._kubelet.spawn(self._start_kubelet(place, seconds))

    async def _start_kubelet(self, place: Place, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if not place.lost:
            self._return(place)
            self._show_ready(place)

    def _show_ready(self, place: Place) -> None:
        for pod in list(place.pods):
            ready = condition(pod, "Ready") or {}
            if pod.started is not None and pod.ended is None and ready.get("status") == "False":
                set_by_kubelet(pod, True)
                self._kubelet.store.changed(pod)

    def _leave(self, place: Place) -> None:
        place.kubelet.clear()
        if place.absence is not None:
            place.absence.cancel()
        place.absence = self._kubelet.spawn(self._miss(place))

    async def _miss(self, place: Place) -> None:
        store = self._kubelet.store
        await asyncio.sleep(self._timing.unready)
        place.not_ready = True
        for pod in list(place.pods):
            if (ready := condition(pod, "Ready")) and ready["status"] == "True":
                set_condition(pod, "Ready", False)
                store.changed(pod)
                store.event(pod, "NodeNotReady", "Node is not ready", warning=True, component="node-controller")
        await asyncio.sleep(self._timing.toleration)
        taint = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}
        for pod in list(place.pods):
            if not tolerated(taint, [found for found in pod.spec["tolerations"] if "tolerationSeconds" not in found]):
                message = "Taint manager: deleting due to NoExecute taint"
                self._kubelet.disrupt(pod, "DeletionByTaintManager", message)

    def _return(self, place: Place) -> None:
        if place.absence is not None:
            place.absence.cancel()
        place.absence, place.not_ready = None, False
        place.services_known = time.monotonic() + self._timing.services
        place.kubelet.set()

    def back(self, name: str) -> None:
        """Have the node back as ``Cluster.node_back`` says."""
        place = self._kubelet.places[name]
        place.shut_down, place.broken = False, None
        if place.alive:
            self._rejoin(place)
        elif place.lost:
            place.lost = False
            for pod in list(place.pods):
                if pod.cut_off or "deletionTimestamp" in pod.object["metadata"]:
                    self._kubelet.cut_off(pod)
                    self._kubelet.spawn(self._recover(pod))
            self._return(place)

    def _rejoin(self, place: Place) -> None:
        """Have the API and the node hear of each other again: the kubelet ends what it is told to.

        That is what was deleted meanwhile, also what the API knows no more.
        """
        place.lost = place.alive = False
        self._return(place)
        self._show_ready(place)
        for pod in self._kubelet.created:
            metadata = pod.object["metadata"]
            if pod.node == place.node.name and pod.container is not None and not pod.done.is_set():
                if pod.gone:
                    grace = pod.spec["terminationGracePeriodSeconds"]
                    self._kubelet.spawn(self._kubelet.end_with_grace(pod, grace))
                elif "deletionTimestamp" in metadata:
                    self._kubelet.spawn(self._kubelet.delete_with_grace(pod, metadata["deletionGracePeriodSeconds"]))

    async def _recover(self, pod: Pod) -> None:
        if pod.started is not None and "running" in pod.object["status"]["containerStatuses"][0]["state"]:
            self._kubelet.show(pod, terminated(255, "Unknown", "", stamp(pod.started)))
        self._kubelet.over(pod)
        if "deletionTimestamp" in pod.object["metadata"]:
            await asyncio.sleep(self._timing.linger)
            self._kubelet.remove(pod)

    def miss_all(self, seconds: float) -> None:
        """Have all nodes seem not ready for so long, as after an outage of the API."""
        if seconds > 0:
            places = [place for place in self._kubelet.places.values() if place.absence is None]
            for place in places:
                place.not_ready = True
            self._kubelet.spawn(self._hear_again(places, seconds))

    async def _hear_again(self, places: list[Place], seconds: float) -> None:
        await asyncio.sleep(seconds)
        for place in places:
            place.not_ready = place.absence is not None and place.not_ready
