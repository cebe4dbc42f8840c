"""A Kubernetes cluster that a test can start, break and look into: the real API over HTTP, pods as real processes.

    with Cluster(tmp_path / "kubeconfig", images={"chunkflow:test"}) as cluster:
        cluster.add_secret("bucket", {"key": "abc"})
        cluster.add_rule("log contains half way", "evict", match={"app": "infer"}, times=1)
        …                                    # kubectl, the clients, Airflow: with KUBECONFIG=cluster.kubeconfig
        cluster.wait("my-pod", "Succeeded")
        assert cluster.most_running({"block": "0_0_0"}) == 1

Constructor: see :class:`Cluster`. Everything below may be called from any thread, also from a rule's action. What ends
a pod *starts* the end and returns; :meth:`Cluster.wait` waits for what is then seen from outside.

=====================  =================================================================================================
contents               ``add_secret(name, data)``, ``add_config_map(name, data)``, ``add_claim(name, folder)``,
                       ``set_image(image, trouble=…, seconds=…)``, ``set_quota(pods, namespace=…, name=…)``,
                       ``add_node(node)``
ends of a pod          ``evict(name, disruption_target=True, container_statuses=True)``, ``preempt(name)``,
                       ``delete_pod(name, grace=…)``, ``kill(name, signal)``
ends of a node         ``shutdown_node(node)``, ``lose_node(node)``, ``node_back(node)``
when to do so          ``add_rule(when, action, match=…, times=…, **arguments)``
trouble with the API   ``add_fault(method, path_regex, times=…, status=… | delay=… | cut=True | lost_response=True)``,
                       ``pause()``, ``resume()``
looking in             ``pods()``, ``pod(name)``, ``log(name)``, ``events(name)``, ``node_of(name)``, ``requests``,
                       ``created``, ``most_running(labels)``, ``wait(name, until)``, ``kubeconfig``, ``url``, ``port``
=====================  =================================================================================================

What a pod may be: one container (no init containers, no sidecars), ``restartPolicy: Never``, a ``command`` (there is no
image to take one from), else 422. It runs in a session of its own in an empty folder, with only its own environment
on top of ``environment``. There are no mount namespaces: hostPath and claims must be mounted where they lie on this
machine, secrets and config maps below ``mount_root``. /tmp and /dev/shm as emptyDir are accepted and not done. Its main
process is process 1 of its container in one respect: a signal it has no handler for does nothing, but SIGKILL. When it
ends, the rest of its session is killed; a process that made a session of its own (``setsid``) gets away.

What is missing is waited for, as in reality: a claim by the scheduler (Unschedulable), a mounted secret by the kubelet
(ContainerCreating, events FailedMount), a secret in the environment as well (CreateContainerConfigError).

A pod with the annotation ``double/sleep: "SECONDS"`` is not executed: it writes one line and succeeds after that time.
"""

from __future__ import annotations

import asyncio
import base64
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

import yaml
from double_api import Api, Fault, Request
from double_kubelet import Kubelet, Place, Rule, Timing
from double_objects import Node, self_signed
from double_pods import Pod
from nursery import Nursery

__all__ = ["Cluster", "Fault", "Node", "Pod", "Request", "Rule", "Timing"]

_TWO_NODES = (Node("node-a"), Node("node-b"))
_MOMENTS = ("created", "scheduled", "running", "ended", "finished", "deleting", "gone")
_POLL_SECONDS = 0.02
Result = TypeVar("Result")
Match = Callable[[dict[str, Any]], bool] | Mapping[str, str] | str | None


class Cluster:
    """See the module. A context manager: pods run while it is open, all of them are killed when it closes.

    Closing raises what went wrong inside, in a rule's action for instance. KeyError: no pod of that name.

    ``kubeconfig``: the file to write; ``folder`` (its parent's ``pods`` by default) takes the pods' own folders.
    ``images``: names that can be pulled. ``nodes``: see :class:`Node`; two large ones by default.
    ``environment``: what the image would set; this Python's ``bin`` first on PATH by default.
    ``mount_root``: secrets and config maps may be mounted below it (``folder/mounts`` by default).
    ``quota``: how many pods not yet ended each namespace may have (the quota is called ``pods``).
    ``log_limit_bytes``: older lines are rotated away. ``child_oom``: beyond a memory limit only the largest process
    that is not the main one is killed. ``nursery``: forks the pods that run this project's own commands, which then
    start in no time (see :mod:`nursery`); without one, all are executed.
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
        namespaces = set(namespaces)
        self._api = Api(
            self._kubelet,
            token=secrets.token_urlsafe(),
            namespaces=namespaces,
            accounts=set(service_accounts),
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
        self._write_kubeconfig()
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
        await self._api.start()
        self._ready.set_result(None)
        await self._stopping.wait()
        self._kubelet.stop()
        await self._api.stop()

    def _write_kubeconfig(self) -> None:
        name, authority = "double", base64.b64encode(self._certificate).decode()
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": {"server": self.url, "certificate-authority-data": authority}}],
            "users": [{"name": name, "user": {"token": self._api.token}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "default"}}],
        }
        self.kubeconfig.parent.mkdir(parents=True, exist_ok=True)
        self.kubeconfig.write_text(yaml.safe_dump(content))
        self.kubeconfig.chmod(0o600)

    def _do(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call in the cluster's thread, which alone may touch its state."""
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return function(*arguments)
        assert self._loop is not None

        async def call() -> Result:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def _find(self, name: str) -> Pod:
        for namespace in self._api.namespaces:
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
        """Of the API."""
        return self._api.port

    @property
    def url(self) -> str:
        """Of the API."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        """The bearer token that the API wants."""
        return self._api.token

    @property
    def requests(self) -> list[Request]:
        """What was asked, in order: ``method``, ``path``, ``query`` (a dict), ``time`` (seconds since the epoch)."""
        return list(self._api.requests)

    @property
    def created(self) -> list[Pod]:
        """All pods ever created, in order, also those that are gone.

        Of each: ``name``, ``namespace``, ``labels``, ``object`` (as last seen), ``gone``, ``started``, ``ended``
        (the main process; seconds since the epoch or None), ``text`` (its log).
        """
        return list(self._kubelet.created)

    def pods(self, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Copies of the pod objects there are, oldest first; those with all of ``labels``."""
        chosen = dict(labels or {}).items()
        everything = self._do(lambda: [pod.text_object for pod in self._kubelet.store.pods.values()])
        found = [json.loads(text) for text in everything]
        return [pod for pod in found if chosen <= (pod["metadata"].get("labels") or {}).items()]

    def pod(self, name: str) -> dict[str, Any] | None:
        """A copy of the pod object, None if there is none (any more)."""
        try:
            return self._on_pod(lambda pod: pod.copy(), name)
        except KeyError:
            return None

    def log(self, name: str) -> str:
        """What the newest pod of that name has written, also if it is gone."""
        return self._do(lambda: self._newest(name).text)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events about a pod of that name."""

        def read() -> list[dict[str, Any]]:
            events = self._kubelet.store.events
            return [dict(event) for key in events if key[1] == name for event in events[key].values()]

        return self._do(read)

    def node_of(self, name: str) -> str | None:
        """The node that the pod is on."""
        return self._do(lambda: self._find(name).node)

    def most_running(self, labels: Mapping[str, str]) -> int:
        """How many pods with these labels ever had their process running at the same moment."""
        times: list[tuple[float, int]] = []
        for pod in self._do(lambda: list(self._kubelet.created)):
            if pod.started is not None and labels.items() <= pod.labels.items():
                times += [(pod.started, 1), (pod.ended or math.inf, -1)]
        # Of two at the same moment the end comes first.
        return max(itertools.accumulate(change for _, change in sorted(times)), default=0)

    def wait(self, name: str, until: str | Callable[[dict[str, Any]], bool], timeout: float = 20.0) -> dict[str, Any]:
        """Wait until the pod's phase is ``until``, or the callable is true of the pod; "gone": there is none.

        Returns the pod (for "gone" as last seen). TimeoutError names what the pod is instead.
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
        """A secret, new or replaced; pods waiting for it go on."""
        self._do(self._kubelet.contents.secrets.__setitem__, (namespace, name), _as_bytes(data))

    def add_config_map(self, name: str, data: Mapping[str, str | bytes], namespace: str = "default") -> None:
        """A config map, new or replaced; pods waiting for it go on."""
        self._do(self._kubelet.contents.config_maps.__setitem__, (namespace, name), _as_bytes(data))

    def add_claim(self, name: str, folder: Path, namespace: str = "default") -> None:
        """A persistent volume claim: a folder of this machine, to be mounted at its own path."""
        self._do(self._kubelet.contents.claims.__setitem__, (namespace, name), folder)

    def add_node(self, node: Node) -> None:
        """One more node; pods that found no place are tried again."""
        self._do(self._kubelet.places.__setitem__, node.name, Place(node))

    def set_image(self, image: str, trouble: str | None = "not found", seconds: float | None = None) -> None:
        """Have pulls of ``image`` fail with that text, for ``seconds`` from now (None: for good); None: no trouble."""

        def change() -> None:
            self._kubelet.image_trouble.pop(image, None)
            if trouble is not None:
                until = math.inf if seconds is None else time.monotonic() + seconds
                self._kubelet.image_trouble[image] = (trouble, until)
            if trouble is None or seconds is not None:
                self._kubelet.images.add(image)

        self._do(change)

    def set_quota(self, pods: int | None, namespace: str = "default", name: str = "pods") -> None:
        """At most so many pods that have not ended; None takes the quota away."""

        def change() -> None:
            self._api.quota.pop(namespace, None)
            if pods is not None:
                self._api.quota[namespace] = (name, pods)

        self._do(change)

    def evict(self, name: str, disruption_target: bool = True, container_statuses: bool = True) -> None:
        """The kubelet evicts the pod, killing it at once: phase Failed, reason Evicted. The object stays, its log is gone.

        ``disruption_target=False``: as for too much ephemeral storage, when that condition isn't set.
        ``container_statuses=False``: the status lists no containers.
        """
        self._on_pod(self._kubelet.evict, name, disruption_target, container_statuses)

    def preempt(self, name: str) -> None:
        """The scheduler takes the place away: condition DisruptionTarget, then deleted with its grace."""
        message = "default-scheduler: preempting to accommodate a higher priority pod"
        self._on_pod(self._kubelet.disrupt, name, "PreemptionByScheduler", message)

    def delete_pod(self, name: str, grace: float | None = None) -> None:
        """As ``kubectl delete pod`` does; 0 seconds of grace: gone at once."""
        self._on_pod(self._kubelet.delete, name, grace)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the container's main process, from outside."""

        def send(pod: Pod) -> None:
            if pod.container is None:
                raise ValueError(f"pod {name!r} is {pod.phase}: it has no process")
            pod.container.signal(number)

        self._on_pod(send, name)

    def shutdown_node(self, node: str) -> None:
        """Graceful shutdown of the node: its pods are asked to end, then Failed with reason Terminated; objects stay."""
        self._do(lambda: self._kubelet.shut_down(self._kubelet.places[node]))

    def lose_node(self, node: str) -> None:
        """Power loss: the processes die, the API learns nothing but that the node isn't ready.

        After ``timing.toleration`` its pods get a deletionTimestamp and stay Terminating until :meth:`node_back` or a
        delete without grace.
        """
        self._do(lambda: self._kubelet.lose(self._kubelet.places[node]))

    def node_back(self, node: str) -> None:
        """The node is there again: what was deleted meanwhile goes, other pods of before end as Failed."""
        self._do(lambda: self._kubelet.back(self._kubelet.places[node]))

    def add_rule(
        self, when: str, action: str | Callable[..., Any], match: Match = None, times: int = 1, **arguments: Any
    ) -> Rule:
        """Do something to a pod at a moment of its life: ``action(name, **arguments)``.

        ``when``: "created", "scheduled", "running", "ended" (the process did), "finished" (the phase says so),
        "deleting" (asked to), "gone", or "log contains TEXT" (a line does).
        ``action``: the name of a method here, or a callable, called in the cluster's own thread: it must not wait.
        ``match``: which pods: a function of the pod object, labels it must have, or a regular expression found in
        its name. The rule acts on at most ``times`` pods, once on each; ``rule.pods`` lists their names.
        """
        if when not in _MOMENTS and not when.startswith("log contains "):
            raise ValueError(f"when={when!r}: expected 'log contains TEXT' or one of {', '.join(_MOMENTS)}")
        method = getattr(self, action) if isinstance(action, str) else action
        rule = Rule(when, functools.partial(method, **arguments), _matcher(match), times)
        self._do(self._kubelet.rules.append, rule)
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
        """Have the next ``times`` requests of that method ("*": any) and path go wrong.

        ``status``: answered with that error, not done. ``delay``: done after so many seconds. ``cut``: not done, the
        connection closes without an answer. ``lost_response``: done, then the connection closes without an answer.
        ``fault.left`` counts down; set it to 0 to end the fault.
        """
        fault = Fault(method, re.compile(path_regex), times, status, delay, cut, lost_response)
        self._do(self._api.faults.append, fault)
        return fault

    def pause(self) -> None:
        """The API goes away: connections are cut, new ones refused. Pods run on."""
        self._do(self._api.leave)

    def resume(self) -> None:
        """The API is back, on the same port."""
        assert self._loop is not None
        if threading.current_thread() is self._thread:
            self._kubelet.spawn(self._api.listen())
        else:
            asyncio.run_coroutine_threadsafe(self._api.listen(), self._loop).result()


def _as_bytes(data: Mapping[str, str | bytes]) -> dict[str, bytes]:
    return {key: value.encode() if isinstance(value, str) else value for key, value in data.items()}


def _matcher(match: Match) -> Callable[[Pod], bool]:
    if match is None:
        return lambda pod: True
    if isinstance(match, str):
        return lambda pod: re.search(match, pod.name) is not None
    if callable(match):
        return lambda pod: match(pod.object)
    return lambda pod: match.items() <= pod.labels.items()
