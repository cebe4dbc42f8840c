"""The cluster's kubelets, which take pods through their lives.

Everything here runs in one thread, the cluster's own, so that nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.support.cluster.containers import Container, Keeper, Log, Session, Sleeping, cannot_run, memory_of
from tests.support.cluster.images import NOT_FOUND, Reference, malformed
from tests.support.cluster.objects import ApiError, Node, Object, merged, quantity, stamp
from tests.support.cluster.pods import Contents, NotReady, Pod, environment_of, expanded, mount, unmount
from tests.support.cluster.rules import Rules
from tests.support.cluster.scheduler import Place, Scheduler, refusal
from tests.support.cluster.status import (
    NEVER_STARTED,
    set_by_kubelet,
    set_condition,
    set_container,
    terminated,
    waiting,
)
from tests.support.cluster.store import Store
from tests.support.cluster.timing import Timing
from tests.support.nursery import Nursery

_POLL_SECONDS = 0.025
_MESSAGE_LINES, _MESSAGE_BYTES = 80, 2048


class Kubelet:
    """The kubelets of all nodes, and what else ends single pods: one object for a cluster."""

    def __init__(
        self,
        *,
        nodes: Iterable[Node],
        timing: Timing,
        images: set[str],
        environment: Mapping[str, str],
        folder: Path,
        mount_root: Path,
        log_limit: int | None,
        child_oom: bool,
        nursery: Nursery | None,
    ) -> None:
        self.timing, self.images, self.environment = timing, images, environment
        self.folder, self.mount_root = folder, mount_root
        self.log_limit, self.child_oom, self.nursery = log_limit, child_oom, nursery
        self.store, self.contents = Store(), Contents()
        self.scheduler = Scheduler(nodes, self.store, self.contents)
        self.places = self.scheduler.places
        self.image_trouble: dict[str, tuple[str, float]] = {}
        """What pulls of an image say, and the monotonic time until which they do, by image."""
        self.root_images: set[str] = set()
        """Images whose processes run as root if nobody says otherwise."""
        self.created: list[Pod] = []
        self._measured: dict[Pod, Session] = {}
        """Running pods with a limit of memory."""
        self._mounts_in_use: dict[Path, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.failures: list[BaseException] = []
        """What went wrong in this double itself."""
        self.rules = Rules(self.failures)

    # Life

    def start(self) -> None:
        """Begin to work. Call it once, in the thread that all else is called in."""
        self.keeper = Keeper()
        self.spawn(self._watch_memory())

    def stop(self) -> None:
        """Kill all pods, and wait until their processes are gone."""
        for task in self._tasks:
            task.cancel()
        for pod in self.created:
            if pod.container is not None and pod.ended is None:
                pod.container.kill()
                pod.ended = time.time()
            if isinstance(pod.container, Session):
                pod.container.reap()
        self.keeper.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine as a task; what it raises is kept in ``failures``."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.failures.append(error)

    def add(self, item: Object) -> Pod:
        """Add a pod, which is scheduled and run from now on.

        ``ApiError``: there is one of that name.
        """
        pod = Pod(item, Log(self.log_limit))
        key = (pod.namespace, pod.name)
        if key in self.store.pods:
            raise ApiError(409, f'pods "{pod.name}" already exists', name=pod.name)
        self.store.pods[key] = pod
        self.created.append(pod)
        self.store.changed(pod, "ADDED")
        pod.life = self.spawn(self._live(pod))
        self.rules.fire("created", pod)
        return pod

    async def _live(self, pod: Pod) -> None:
        if not await self._on_node(pod):
            return
        environment = await self._prepare(pod)
        if container := self._start(pod, environment):
            await self._report_running(pod)
            code = await container.wait()
            self._measured.pop(pod, None)
            pod.ended = time.time()
            pod.log.close()
            self.rules.fire("ended", pod)
            await asyncio.sleep(self.timing.log_lead)
            kubelet = self._place(pod).kubelet
            at_once = pod.told_to_end or not kubelet.is_set()
            await kubelet.wait()
            self._terminated(pod, code)
            if not at_once:
                self.store.changed(pod)
                await asyncio.sleep(self.timing.phase)
        else:
            self.store.changed(pod)
        self.over(pod)

    async def _on_node(self, pod: Pod) -> bool:
        """Bring the pod to a node; whether that one takes it."""
        if (name := pod.spec.get("nodeName")) is None:
            await asyncio.sleep(self.timing.schedule)
            while pod.node is None:
                self.scheduler.place(pod)
                if pod.node is None:
                    await asyncio.sleep(self.timing.back_off)
        elif name not in self.places:
            await asyncio.Event().wait()
        elif refused := refusal(pod.object, self.places[name]):
            await self.places[name].kubelet.wait()
            pod.ending = dict(zip(("reason", "message"), refused, strict=True))
            pod.object["status"] |= {"startTime": stamp(time.time()), "observedGeneration": 1}
            self.store.event(pod, *refused, warning=True)
            self.over(pod)
            return False
        else:
            self.scheduler.take(pod, self.places[name])
        self.rules.fire("scheduled", pod)
        if deadline := pod.spec.get("activeDeadlineSeconds"):
            self.spawn(self._enforce_deadline(pod, deadline))
        await self._place(pod).kubelet.wait()
        return True

    def _place(self, pod: Pod) -> Place:
        return self.places[pod.node or ""]

    # Start of a container

    async def _prepare(self, pod: Pod) -> dict[str, str]:
        address = self._place(pod).address
        pod.object["status"] |= {"hostIP": address, "hostIPs": [{"ip": address}], "startTime": stamp(time.time())}
        self._show_waiting(pod, "ContainerCreating")
        while True:
            try:
                problem = mount(pod, self.contents, self.mount_root, self._mounts_in_use)
            except NotReady as missing:
                unmount(pod, self._mounts_in_use)
                self.store.event(pod, "FailedMount", str(missing), warning=True)
                await asyncio.sleep(self.timing.back_off)
                continue
            break
        pod.sandbox = True
        pod.object["status"] |= {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
        await self._pull(pod)
        while True:
            try:
                environment = self._configured(pod)
                break
            except NotReady as missing:
                self._show_waiting(pod, "CreateContainerConfigError", str(missing))
                self.store.event(pod, "Failed", f"Error: {missing}", warning=True)
            await asyncio.sleep(self.timing.back_off)
        if problem:
            self._show_waiting(pod, "CreateContainerError", problem)
            self.store.event(pod, "Failed", f"Error: {problem}", warning=True)
            await asyncio.Event().wait()
        await asyncio.sleep(self.timing.create)
        await self._place(pod).kubelet.wait()
        return environment

    def _configured(self, pod: Pod) -> dict[str, str]:
        """The container's environment. ``NotReady``: the container can't be set up."""
        if time.monotonic() < self._place(pod).services_known:
            raise NotReady("services have not yet been read at least once, cannot construct envvars")
        environment = environment_of(pod, self.contents, self.environment)
        security = (pod.spec.get("securityContext") or {}) | (pod.box.get("securityContext") or {})
        if pod.box["image"] in self.root_images and security.get("runAsNonRoot") and "runAsUser" not in security:
            whole = f"{pod.name}_{pod.namespace}({pod.object['metadata']['uid']})"
            why = f'(pod: "{whole}", container: {pod.box["name"]})'
            raise NotReady(f"container has runAsNonRoot and image will run as root {why}")
        return environment

    async def _pull(self, pod: Pod) -> None:
        image = pod.box["image"]
        if why := malformed(image):
            self._show_waiting(pod, "InvalidImageName", why)
            self.store.event(pod, "InspectFailed", why, warning=True)
            await asyncio.Event().wait()
        while True:
            trouble = self._pull_trouble(image)
            if pod.box["imagePullPolicy"] == "Never" and image not in self.images:
                self._show_waiting(
                    pod, "ErrImageNeverPull", f'Container image "{image}" is not present with pull policy of Never'
                )
                await asyncio.Event().wait()
            self.store.event(pod, "Pulling", f'Pulling image "{image}"')
            if trouble is None:
                break
            why = Reference.of(image).failed(trouble)
            self._show_waiting(pod, "ErrImagePull", why)
            self.store.event(pod, "Failed", f'Failed to pull image "{image}": {why}', warning=True)
            await asyncio.sleep(self.timing.back_off)
            self._show_waiting(pod, "ImagePullBackOff", f'Back-off pulling image "{image}": ErrImagePull: {why}')
            self.store.event(pod, "BackOff", f'Back-off pulling image "{image}"')
            await asyncio.sleep(self.timing.back_off)
        self.store.event(pod, "Pulled", f'Successfully pulled image "{image}" in 10ms (10ms including waiting)')

    def _pull_trouble(self, image: str) -> str | None:
        text, until = self.image_trouble.get(image, ("", 0.0))
        if time.monotonic() < until:
            return text
        return None if image in self.images else NOT_FOUND

    def _start(self, pod: Pod, environment: dict[str, str]) -> Container | None:
        """Run the container; None if the command can't be run."""
        self.store.event(pod, "Created", f"Created container: {pod.box['name']}")
        if pod.sleep is not None:
            pod.container = Sleeping(pod.sleep, pod.log)
        else:
            own = self.folder / pod.folder_name
            for part in ("home", "tmp", "work"):
                (own / part).mkdir(parents=True)
            environment = {
                "HOME": str(own / "home"),
                "TMPDIR": str(own / "tmp"),
                "HOSTNAME": pod.name[:63],
            } | environment
            parts = [*pod.box["command"], *(pod.box.get("args") or [])]
            argv = [expanded(part, environment) for part in parts]
            cwd = Path(pod.box.get("workingDir") or own / "work")
            if problem := self._place(pod).broken or cannot_run(argv[0], environment, cwd):
                set_by_kubelet(pod, False, "PodFailed")
                set_container(pod, terminated(128, "StartError", problem, NEVER_STARTED))
                self.store.event(pod, "Failed", f"Error: {problem}", warning=True)
                pod.log.close()
                return None
            pod.container = session = Session(
                argv, environment, cwd, pod.log, lambda line: self.rules.wrote(pod, line), self.keeper, self.nursery
            )
            if "memory" in (pod.box["resources"].get("limits") or {}):
                self._measured[pod] = session
        pod.started = time.time()
        return pod.container

    async def _report_running(self, pod: Pod) -> None:
        if isinstance(pod.container, Session):
            await pod.container.executed()
        set_by_kubelet(pod, True)
        pod.object["status"]["phase"] = "Running"
        self.show(pod, {"running": {"startedAt": stamp(pod.started or 0)}})
        self.store.event(pod, "Started", f"Started container {pod.box['name']}")
        self.rules.fire("running", pod)

    # Status

    def show(self, pod: Pod, state: Object) -> None:
        """Set the container's state, and have all who watch the pod see it."""
        set_container(pod, state)
        self.store.changed(pod)

    def _show_waiting(self, pod: Pod, reason: str, message: str = "") -> None:
        set_by_kubelet(pod, False, "ContainersNotReady", f"containers with unready status: [{pod.box['name']}]")
        self.show(pod, waiting(reason, message))

    def _terminated(self, pod: Pod, code: int) -> None:
        reason = "OOMKilled" if pod.out_of_memory else ("Error" if code else "Completed")
        message = ""
        if pod.out_of_sight:
            self._lost_sight(pod)
            return
        if code and pod.box["terminationMessagePolicy"] == "FallbackToLogsOnError":
            message = pod.log.tail(_MESSAGE_LINES, _MESSAGE_BYTES)
        set_by_kubelet(pod, False, "PodFailed" if code else "PodCompleted")
        set_container(pod, terminated(code, reason, message, stamp(pod.started or 0), stamp(pod.ended or 0)))

    def over(self, pod: Pod) -> None:
        """Give the pod its last phase: Succeeded or Failed."""
        if pod.done.is_set():
            return
        status = pod.object["status"]
        states = [container["state"] for container in status.get("containerStatuses") or []]
        if pod.node is not None and any("terminated" not in state for state in states):
            self._lost_sight(pod)
            states = [container["state"] for container in status["containerStatuses"]]
        succeeded = bool(states) and states[0]["terminated"]["exitCode"] == 0 and not pod.ending
        ending = dict(pod.ending)
        if disruption := ending.pop("disruption", None):
            set_condition(pod, "DisruptionTarget", True, *disruption)
        status |= {"phase": "Succeeded" if succeeded else "Failed"} | ending
        pod.sandbox = False
        if states:
            set_by_kubelet(pod, False, "PodCompleted" if succeeded else "PodFailed")
        pod.done.set()
        unmount(pod, self._mounts_in_use)
        self.scheduler.release(pod)
        self.store.changed(pod)
        self.rules.fire("finished", pod)

    def _lost_sight(self, pod: Pod) -> None:
        unknown = "The container could not be located when the pod was terminated"
        set_container(pod, terminated(137, "ContainerStatusUnknown", unknown, NEVER_STARTED))

    # Memory

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            taken = memory_of({session.pid for session in self._measured.values()})
            for pod, session in list(self._measured.items()):
                if sum(taken[session.pid].values()) > quantity(pod.box["resources"]["limits"]["memory"]):
                    pod.out_of_memory = True
                    self._free_memory(session, taken[session.pid])

    def _free_memory(self, session: Session, taken: Mapping[int, int]) -> None:
        children = [pid for pid in taken if pid != session.pid]
        if self.child_oom and children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(max(children, key=lambda pid: (taken[pid], pid)), signal.SIGKILL)
        else:
            session.kill()

    # Ends

    def delete(self, pod: Pod, grace: float | None = None) -> None:
        """Delete the pod as the API does: at once where nothing runs, else with grace.

        Args:
            pod: The pod.
            grace: Seconds from SIGTERM to SIGKILL; the pod's own if None.
        """
        grace = pod.spec["terminationGracePeriodSeconds"] if grace is None else grace
        metadata = pod.object["metadata"]
        if grace == 0 or pod.node is None or pod.over:
            self.remove(pod)
            return
        if "deletionTimestamp" in metadata:
            # Only ever sooner.
            if grace < metadata["deletionGracePeriodSeconds"]:
                metadata["deletionTimestamp"] = stamp(time.time() + grace)
                metadata["deletionGracePeriodSeconds"] = int(grace)
                self.store.changed(pod)
                self.spawn(self.end_with_grace(pod, grace))
            return
        metadata["deletionTimestamp"] = stamp(time.time() + grace)
        metadata["deletionGracePeriodSeconds"] = int(grace)
        metadata["generation"] += 1
        self.store.changed(pod)
        self.rules.fire("deleting", pod)
        if not self._place(pod).lost:
            self.spawn(self.delete_with_grace(pod, grace))

    async def delete_with_grace(self, pod: Pod, grace: float) -> None:
        """End the pod with grace; then its object goes."""
        await self.end_with_grace(pod, grace)
        await asyncio.sleep(self.timing.linger)
        if not self._place(pod).lost:
            self.remove(pod)

    async def end_with_grace(self, pod: Pod, grace: float) -> None:
        """Send SIGTERM, and SIGKILL if need be; return when the phase tells of the end.

        If the node's kubelet is away, this begins when it is back.
        """
        await self._place(pod).kubelet.wait()
        pod.told_to_end = True
        if pod.container is None:
            self._cancel(pod)
            self.over(pod)
            return
        if pod.ended is None:
            self.store.event(pod, "Killing", f"Stopping container {pod.box['name']}")
            pod.container.signal(signal.SIGTERM)
        ended = asyncio.create_task(pod.container.wait())
        if not (await asyncio.wait({ended}, timeout=grace))[0] and not pod.done.is_set():
            pod.container.kill()
        await pod.done.wait()

    def _cancel(self, pod: Pod) -> None:
        if pod.life is not None:
            pod.life.cancel()

    def remove(self, pod: Pod) -> None:
        """Take the object away, and kill what runs."""
        if pod.gone:
            return
        pod.gone = True
        goes_on = pod.container is not None and pod.ended is None
        if not goes_on:
            self._cancel(pod)
        elif not (goes_on := self._place(pod).alive) and pod.container is not None:
            pod.container.kill()
        if not goes_on:
            pod.log.close()
            unmount(pod, self._mounts_in_use)
        self.scheduler.release(pod)
        del self.store.pods[pod.namespace, pod.name]
        self.store.changed(pod, "DELETED")
        self.rules.fire("gone", pod)

    async def _enforce_deadline(self, pod: Pod, seconds: float) -> None:
        waiting = asyncio.create_task(pod.done.wait())
        if (await asyncio.wait({waiting}, timeout=seconds))[0] or pod.gone:
            return
        if self._place(pod).lost and not self._place(pod).alive:
            return
        message = "Pod was active on the node longer than the specified deadline"
        pod.ending = {"reason": "DeadlineExceeded", "message": message}
        self.store.event(pod, "DeadlineExceeded", message)
        await self.end_with_grace(pod, pod.spec["terminationGracePeriodSeconds"])

    def evict(self, pod: Pod, disruption_target: bool, container_statuses: bool, log: bool) -> None:
        """Evict the pod as ``Cluster.evict`` says. ``ValueError``: it has ended."""
        if pod.over:
            raise ValueError(f"pod {pod.name!r} has ended ({pod.phase}): it can't be evicted")
        message = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. "
        if not disruption_target:
            message = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "
        pod.ending = {"reason": "Evicted", "message": message}
        if disruption_target:
            pod.ending["disruption"] = ("TerminationByKubelet", message)
        if not log:
            pod.no_log = f"unable to retrieve container logs for containerd://{pod.object['metadata']['uid']}"
        self.store.event(pod, "Evicted", message, warning=True)
        pod.out_of_sight = not container_statuses
        self.spawn(self.end_with_grace(pod, self.timing.eviction if container_statuses else 0.0))

    def cut_off(self, pod: Pod) -> None:
        """Kill what runs in the pod, with nobody there to tell of it."""
        pod.cut_off = True
        self._cancel(pod)
        self._measured.pop(pod, None)
        if pod.container is not None and pod.ended is None:
            pod.container.kill()
            pod.ended = time.time()
        pod.log.cut()
        pod.log.close()

    def disrupt(self, pod: Pod, reason: str, message: str, grace: float | None = None) -> None:
        """Delete a pod for a reason that its condition DisruptionTarget tells."""
        set_condition(pod, "DisruptionTarget", True, reason, message, observed=reason != "EvictionByEvictionAPI")
        self.store.changed(pod)
        self.delete(pod, grace)

    # Patches

    def patch(self, pod: Pod, patch: Object) -> None:
        """Merge a patch of labels, annotations and owners into the pod.

        ``ApiError``: the patch would change the spec.
        """
        wanted = merged(pod.object, patch)
        if wanted["spec"] != pod.object["spec"]:
            raise ApiError(
                422,
                f'Pod "{pod.name}" is invalid: spec: Forbidden: pod updates may not change fields other than '
                "`spec.containers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations`",
                name=pod.name,
                kind="Pod",
            )
        for key in ("labels", "annotations", "ownerReferences"):
            if wanted["metadata"].get(key) is not None:
                pod.object["metadata"][key] = wanted["metadata"][key]
            else:
                pod.object["metadata"].pop(key, None)
        self.store.changed(pod)
