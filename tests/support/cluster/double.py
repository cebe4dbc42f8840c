"""A Kubernetes cluster that a test can start, break and look into.

The API is real HTTP, pods are real processes. An example, and what is faked how faithfully, are in
``README.md`` beside this file.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import math
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.support.cluster.api import Api, Fault, Request
from tests.support.cluster.discovery import ACCOUNTS, CONFIG_MAPS, NAMESPACES, SECRETS
from tests.support.cluster.disks import watch_disks
from tests.support.cluster.kept import Kept
from tests.support.cluster.kubelet import Kubelet
from tests.support.cluster.nodes import Nodes
from tests.support.cluster.objects import Node, self_signed, write_kubeconfig
from tests.support.cluster.pods import Pod
from tests.support.cluster.rules import LOG_CONTAINS, MOMENTS, Match, Rule, matcher
from tests.support.cluster.timing import Timing
from tests.support.nursery import Nursery

__all__ = ["Cluster", "Fault", "Node", "Pod", "Request", "Rule", "Timing"]

_TWO_NODES = (Node("node-a"), Node("node-b"))
_POLL_SECONDS = 0.02
Result = TypeVar("Result")


class Cluster:
    """A cluster as a context manager.

    Pods run while it is open, and all of them are killed when it closes. Closing raises what went
    wrong inside, in a rule's action for instance. All methods may be called from any thread, also
    from a rule's action. What ends a pod *starts* the end and returns; :meth:`wait` waits for what
    is then seen from outside. Methods that take the name of a pod raise ``KeyError`` if there is
    none.

    Args:
        kubeconfig: The kubeconfig to write.
        images: Names of images that can be pulled.
        namespaces: Names of the namespaces there are.
        nodes: The nodes; two large ones by default.
        timing: How long things take.
        environment: What images would set; by default a PATH that begins with this Python's
            folder.
        folder: Takes the pods' own folders; by default ``pods`` beside the kubeconfig.
        mount_root: Secrets and config maps may be mounted below it; ``folder/mounts`` by default.
        service_accounts: Names of the service accounts there are.
        priority_classes: Names of the priority classes there are.
        quota: How many pods that have not ended each namespace may have, by a quota called
            ``pods``; None: any number.
        log_limit_bytes: Size of a log beyond which older lines are rotated away; None: no limit.
        child_oom: Beyond a memory limit, kill only the largest process that is not the main one.
        nursery: Forks the pods that run this project's own commands, which then start in no time;
            without one, all are executed.
        port: Port of the API; 0: any.
    """

    def __init__(
        self,
        kubeconfig: Path,
        *,
        images: Iterable[str] = (),
        namespaces: Iterable[str] = ("default",),
        nodes: Iterable[Node] = _TWO_NODES,
        timing: Timing | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        mount_root: Path | None = None,
        service_accounts: Iterable[str] = ("default",),
        priority_classes: Iterable[str] = (),
        quota: int | None = None,
        log_limit_bytes: int | None = None,
        child_oom: bool = False,
        nursery: Nursery | None = None,
        port: int = 0,
    ) -> None:
        folder = folder or kubeconfig.parent / "pods"
        base = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        self._kubelet = Kubelet(
            nodes=list(nodes),
            timing=timing or Timing(),
            images=set(images),
            environment=base if environment is None else dict(environment),
            folder=folder,
            mount_root=mount_root or folder / "mounts",
            log_limit=log_limit_bytes,
            child_oom=child_oom,
            nursery=nursery,
        )
        namespaces, accounts = list(namespaces), list(service_accounts)
        self._nodes = Nodes(self._kubelet)
        self._kept = Kept(self._kubelet)
        for namespace in namespaces:
            self._kept.add(NAMESPACES, None, namespace)
            for account in accounts:
                self._kept.add(ACCOUNTS, namespace, account)
        self._api = Api(
            self._kubelet,
            self._kept,
            token=secrets.token_urlsafe(),
            priorities=set(priority_classes),
            quota={} if quota is None else dict.fromkeys(namespaces, ("pods", quota)),
            port=port,
        )
        self.kubeconfig = kubeconfig
        self.timing = self._kubelet.timing
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, name="kubernetes", daemon=True)
        self._ready: Future[None] = Future()
        self._stopping: asyncio.Event | None = None
        self._certificate, self._api.tls = self_signed(folder)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.result()
        write_kubeconfig(self.kubeconfig, self.url, self.token, self._certificate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None and self._stopping is not None
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        if self._kubelet.failures and error is None:
            raise self._kubelet.failures[0]

    def _serve(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _run(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._kubelet.start()
        self._kubelet.spawn(watch_disks(self._kubelet))
        await self._api.start()
        self._ready.set_result(None)
        await self._stopping.wait()
        self._kubelet.stop()
        await self._api.stop()

    def _do(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in the cluster's thread, which alone may touch its state."""
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return function(*arguments)
        assert self._loop is not None

        async def call() -> Result:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def _find(self, name: str) -> Pod:
        for namespace in self._kept.namespaces:
            if pod := self._kubelet.store.pods.get((namespace, name)):
                return pod
        raise KeyError(f"there is no pod {name!r}")

    def _newest(self, name: str) -> Pod:
        for pod in reversed(self._kubelet.created):
            if pod.name == name:
                return pod
        raise KeyError(f"there never was a pod {name!r}")

    def _on_pod(self, function: Callable[..., Result], name: str, *arguments: Any) -> Result:
        return self._do(lambda: function(self._find(name), *arguments))

    @property
    def port(self) -> int:
        """Port of the API."""
        return self._api.port

    @property
    def url(self) -> str:
        """Address of the API."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        """The bearer token that the API wants."""
        return self._api.token

    @property
    def requests(self) -> list[Request]:
        """All requests to the API so far, in order."""
        return list(self._api.requests)

    @property
    def created(self) -> list[Pod]:
        """All pods ever created, in order, also those that are gone."""
        return list(self._kubelet.created)

    def pods(self, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Copies of the objects of the pods that have all of ``labels``, oldest first."""
        chosen = dict(labels or {}).items()
        everything = self._do(lambda: [pod.text_object for pod in self._kubelet.store.pods.values()])
        found = [json.loads(text) for text in everything]
        return [pod for pod in found if chosen <= (pod["metadata"].get("labels") or {}).items()]

    def pod(self, name: str) -> dict[str, Any] | None:
        """A copy of the pod's object; None if there is none, or none any more."""
        try:
            return self._on_pod(Pod.copy, name)
        except KeyError:
            return None

    def log(self, name: str) -> str:
        """The log of the newest pod of that name, also if it is gone."""
        return self._do(lambda: self._newest(name).text)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events about pods of that name, in order; the API gives those of a second in any."""

        def read() -> list[dict[str, Any]]:
            events = self._kubelet.store.events
            found = [dict(event) for key in events if key[1] == name for event in events[key].values()]
            return sorted(found, key=lambda event: event["metadata"]["name"])

        return self._do(read)

    def node_of(self, name: str) -> str | None:
        """Name of the node that the pod is on; None: it has none yet."""
        return self._do(lambda: self._find(name).node)

    def most_running(self, labels: Mapping[str, str]) -> int:
        """The largest number of pods with these labels whose processes ran at the same time."""
        times: list[tuple[float, int]] = []
        for pod in self._do(lambda: list(self._kubelet.created)):
            if pod.started is not None and labels.items() <= pod.labels.items():
                times += [(pod.started, 1), (pod.ended or math.inf, -1)]
        # Of two at the same moment the end comes first.
        return max(itertools.accumulate(change for _, change in sorted(times)), default=0)

    def wait(self, name: str, until: str | Callable[[dict[str, Any]], bool], timeout: float = 20.0) -> dict[str, Any]:
        """Wait for a pod.

        Args:
            name: The pod's name.
            until: A phase; or a callable that has to be true of the pod's object; or "gone", when
                there is to be no such pod any more.
            timeout: In seconds.

        Returns:
            A copy of the pod's object, for "gone" as last seen.

        Raises:
            TimeoutError: It names what the pod is instead, and the end of its log.
        """
        deadline = time.monotonic() + timeout
        while True:
            now = self.pod(name)
            if now is None and until == "gone":
                return self._do(lambda: self._newest(name).copy())
            if now is not None and (until(now) if callable(until) else now["status"]["phase"] == until):
                return now
            if time.monotonic() > deadline:
                status = now["status"] if now else "gone"
                raise TimeoutError(
                    f"pod {name} is not {until} after {timeout} s: {status}; it wrote: {self._last_words(name)}"
                )
            time.sleep(_POLL_SECONDS)

    def _last_words(self, name: str) -> str:
        try:
            return self.log(name)[-1000:]
        except KeyError:
            return "nothing, it was never created"

    def add_secret(self, name: str, data: Mapping[str, str | bytes], namespace: str = "default") -> None:
        """Add or replace a secret; pods that wait for it go on."""
        self._do(self._kept.add, SECRETS, namespace, name, _as_bytes(data))

    def add_config_map(self, name: str, data: Mapping[str, str | bytes], namespace: str = "default") -> None:
        """Add or replace a config map; pods that wait for it go on."""
        self._do(self._kept.add, CONFIG_MAPS, namespace, name, _as_bytes(data))

    def add_claim(self, name: str, folder: Path, namespace: str = "default") -> None:
        """Add a claim: a folder of this machine, which pods mount at its own path."""
        self._do(self._kubelet.contents.claims.__setitem__, (namespace, name), folder)

    def add_node(self, node: Node) -> None:
        """Add a node; pods that found no place are tried again."""
        self._do(self._kubelet.scheduler.add, node)

    def add_image(self, image: str, root: bool = False) -> None:
        """Have an image that can be pulled; ``root``: its own user is root."""
        self._do(self._kubelet.images.add, image)
        if root:
            self._do(self._kubelet.root_images.add, image)

    def set_image(self, image: str, trouble: str | None = "not found", seconds: float | None = None) -> None:
        """Have pulls of an image fail.

        Args:
            image: The image's name.
            trouble: What the registry says, such as the texts of ``images.py``; None: pulls
                succeed again.
            seconds: For how long from now; after that pulls succeed. None: for good.
        """

        def change() -> None:
            self._kubelet.image_trouble.pop(image, None)
            if trouble is not None:
                until = math.inf if seconds is None else time.monotonic() + seconds
                self._kubelet.image_trouble[image] = (trouble, until)
            if trouble is None or seconds is not None:
                self._kubelet.images.add(image)

        self._do(change)

    def set_quota(self, pods: int | None, namespace: str = "default", name: str = "pods") -> None:
        """Allow at most so many pods that have not ended; None takes the quota away."""

        def change() -> None:
            self._api.quota.pop(namespace, None)
            if pods is not None:
                self._api.quota[namespace] = (name, pods)

        self._do(change)

    def evict(
        self, name: str, disruption_target: bool = True, container_statuses: bool = True, log: bool | None = None
    ) -> None:
        """Have the kubelet evict the pod, which gets SIGTERM and a moment to end.

        The object stays, with phase Failed and reason Evicted. ``ValueError``: the pod has ended.

        Args:
            name: The pod's name.
            disruption_target: For lack of memory, with that condition; else for too much
                ephemeral storage, without.
            container_statuses: Tell how the container ended; else it is killed at once, and the
                kubelet does not find it any more (ContainerStatusUnknown).
            log: Whether the log can be read afterwards; None: if the container is found.
        """
        readable = container_statuses if log is None else log
        self._on_pod(self._kubelet.evict, name, disruption_target, container_statuses, readable)

    def preempt(self, name: str) -> None:
        """Have the scheduler take the place away: condition DisruptionTarget, then a delete."""
        message = "default-scheduler: preempting to accommodate a higher priority pod"
        self._on_pod(self._kubelet.disrupt, name, "PreemptionByScheduler", message)

    def delete_pod(self, name: str, grace: float | None = None) -> None:
        """Delete the pod as ``kubectl delete pod`` does.

        ``grace`` is in seconds: the pod's own if None; gone at once if 0.
        """
        self._on_pod(self._kubelet.delete, name, grace)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the container's main process from outside.

        ``ValueError``: it has none.
        """

        def send(pod: Pod) -> None:
            if pod.container is None:
                raise ValueError(f"pod {name!r} is {pod.phase}: it has no process")
            pod.container.signal(number)

        self._on_pod(send, name)

    def shutdown_node(self, node: str) -> None:
        """Shut the node down gracefully.

        Its pods are asked to end; then they are Failed with reason Terminated, and their objects
        stay.
        """
        self._do(self._nodes.shut_down, node)

    def lose_node(self, node: str, alive: bool = False) -> None:
        """Cut the node's power: processes die, and nobody hears of it. ``alive``: its pods work on.

        After ``timing.unready`` the node and its pods are not ready, and after
        ``timing.toleration`` the pods get a deletionTimestamp. They stay Terminating until
        :meth:`node_back`, or a delete without grace.
        """
        self._do(self._nodes.lose, node, alive)

    def break_node(self, node: str, message: str) -> None:
        """Have containers on the node fail to start (StartError), until :meth:`node_back`.

        ``message`` is what the container runtime says, such as ``images.NO_GPU_DRIVER``.
        """
        self._do(lambda: setattr(self._kubelet.places[node], "broken", message))

    def restart_kubelet(self, node: str, seconds: float) -> None:
        """Take the node's kubelet away for so long; pods run on, and their ends are told later.

        For ``timing.services`` after that, it can't make containers.
        """
        self._do(self._nodes.restart_kubelet, node, seconds)

    def node_back(self, node: str) -> None:
        """Have the node back and whole.

        Pods that were deleted meanwhile go; others of before are Failed, or go on if they live.
        """
        self._do(self._nodes.back, node)

    def add_rule(
        self, when: str, action: str | Callable[..., Any], match: Match = None, times: int = 1, **arguments: Any
    ) -> Rule:
        """Do something to a pod at a moment of its life.

        Args:
            when: "created", "scheduled", "running", "ended" (the process did), "finished" (the
                phase says so), "deleting" (asked to), "gone", or "log contains TEXT" (a line
                does).
            action: The name of a method of this class, or a callable. It is called as
                ``action(name, **arguments)`` in the cluster's own thread, and must not wait.
            match: Which pods: a function of the pod's object, labels that it must have, or a
                regular expression that is found in its name; None: all.
            times: On how many pods the rule acts at most, once on each.
            **arguments: Keywords for the action.

        Returns:
            The rule; its ``pods`` are the names of those that it has acted on.
        """
        if when not in MOMENTS and not when.startswith(LOG_CONTAINS):
            raise ValueError(f"when={when!r}: expected 'log contains TEXT' or one of {', '.join(MOMENTS)}")
        method = getattr(self, action) if isinstance(action, str) else action
        rule = Rule(when, functools.partial(method, **arguments), matcher(match), times)
        self._do(self._kubelet.rules.add, rule)
        return rule

    def add_fault(
        self,
        method: str,
        path_regex: str,
        *,
        times: int = 1,
        status: int | None = None,
        delay: float | None = None,
        cut: bool = False,
        lost_response: bool = False,
    ) -> Fault:
        """Have requests to the API go wrong.

        Args:
            method: Which requests: those of this method, "*" for any.
            path_regex: Which of them: those in whose path this is found.
            times: How many requests it hits.
            status: Answer with this error instead of doing anything.
            delay: Do it after so many seconds.
            cut: Close the connection without an answer, and do nothing.
            lost_response: Do it, then close the connection without an answer.

        Returns:
            The fault; its ``left`` counts down, and 0 ends it.
        """
        fault = Fault(method, re.compile(path_regex), times, status, delay, cut, lost_response)
        self._do(self._api.faults.append, fault)
        return fault

    def pause(self) -> None:
        """Take the API away: connections are cut, new ones refused; pods run on."""
        self._do(self._api.leave)

    def resume(self, nodes_not_ready: float = 0.0) -> None:
        """Have the API back, on the same port.

        For ``nodes_not_ready`` seconds it has not heard of the nodes: no pod finds one.
        """
        assert self._loop is not None
        self._do(self._nodes.miss_all, nodes_not_ready)
        if threading.current_thread() is self._thread:
            self._kubelet.spawn(self._api.listen())
        else:
            asyncio.run_coroutine_threadsafe(self._api.listen(), self._loop).result()


def _as_bytes(data: Mapping[str, str | bytes]) -> dict[str, bytes]:
    return {key: value.encode() if isinstance(value, str) else value for key, value in data.items()}
