"""The cluster's moving part: the store of objects, the scheduler, and the kubelets that take pods through their lives.

Everything here runs in one thread, the cluster's own, so that nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from double_containers import Keeper, Log, Session, Sleeping
from double_objects import (
    ApiError,
    Node,
    Object,
    Resources,
    good_image,
    merged,
    no_place,
    quantity,
    requests_of,
    stamp,
    unfit,
)
from double_pods import Contents, NotReady, Pod, environment_of, expanded, mount, unmount
from double_store import Store
from nursery import Nursery

_POLL_SECONDS = 0.025
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MESSAGE_LINES, _MESSAGE_BYTES = 80, 2048


@dataclass(frozen=True)
class Timing:
    """How long things take, in seconds; a real cluster's are in brackets."""

    schedule: float = 0.05
    """Until the scheduler has looked at a pod [0.1]."""
    create: float = 0.1
    """From then until the container runs, the pull included [1–60]."""
    back_off: float = 0.2
    """Between two tries at what is missing [10–300]."""
    log_lead: float = 0.3
    """From the end of the process, and of its log, until the status says terminated [1]."""
    phase: float = 0.1
    """From then until the phase says so [0–1]."""
    linger: float = 0.3
    """From the end of a deleted pod until the object is gone [0.7]."""
    toleration: float = 1.0
    """From the loss of a node until its pods are marked for deletion [300]."""
    shutdown: float = 1.0
    """What pods get to end in when their node shuts down [30]."""


@dataclass(eq=False)
class Rule:
    """See ``Cluster.add_rule``."""

    when: str
    action: Callable[[str], Any]
    match: Callable[[Pod], bool]
    times: int
    pods: list[str] = field(default_factory=list)
    """Names of the pods it acted on."""
    done: set[str] = field(default_factory=set)
    """Their uids."""


@dataclass
class Place:
    """A node with what is on it."""

    node: Node
    used: Resources = field(default_factory=dict)
    pods: set[Pod] = field(default_factory=set)
    lost: bool = False
    shut_down: bool = False

    @property
    def taints(self) -> list[Mapping[str, str]]:
        """The node's own, and what its state adds."""
        gone = [{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"}] if self.lost else []
        down = [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}] if self.shut_down else []
        return [*self.node.taints, *gone, *down]


class Kubelet:
    """Scheduler, kubelets and controllers in one."""

    def __init__(
        self,
        *,
        nodes: list[Node],
        timing: Timing,
        images: set[str],
        environment: Mapping[str, str],
        folder: Path,
        mount_root: Path,
        log_limit: int | None,
        child_oom: bool,
        nursery: Nursery | None,
    ) -> None:
        self.places = {node.name: Place(node) for node in nodes}
        self.timing, self.images, self.environment = timing, images, environment
        self.folder, self.mount_root = folder, mount_root
        self.log_limit, self.child_oom, self.nursery = log_limit, child_oom, nursery
        self.store, self.contents = Store(), Contents()
        self.image_trouble: dict[str, tuple[str, float]] = {}
        """Text and until when, by image."""
        self.rules: list[Rule] = []
        self.created: list[Pod] = []
        self._measured: set[Pod] = set()
        self._mounts_in_use: dict[Path, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.failures: list[BaseException] = []
        """Of this double itself."""

    # Life

    def start(self) -> None:
        """To be called once, in the thread that all else is called in."""
        self.keeper = Keeper()
        self.spawn(self._watch_memory())

    def stop(self) -> None:
        """Kill all pods."""
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
        """Run something beside; what it raises is kept in ``failures``."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.failures.append(error)

    def add(self, item: Object) -> Pod:
        """A new pod, which goes its way from now on."""
        pod = Pod(item, Log(self.log_limit))
        key = (pod.namespace, pod.name)
        if key in self.store.pods:
            raise ApiError(409, f'pods "{pod.name}" already exists', name=pod.name)
        self.store.pods[key] = pod
        self.created.append(pod)
        self.store.changed(pod, "ADDED")
        pod.life = self.spawn(self._live(pod))
        self._fire("created", pod)
        return pod

    async def _live(self, pod: Pod) -> None:
        await asyncio.sleep(self.timing.schedule)
        while pod.node is None:
            self._place(pod)
            if pod.node is None:
                await asyncio.sleep(self.timing.back_off)
        self._fire("scheduled", pod)
        if deadline := pod.spec.get("activeDeadlineSeconds"):
            self.spawn(self._enforce_deadline(pod, deadline))
        environment = await self._prepare(pod)
        if self._start(pod, environment):
            await self._report_running(pod)
            code = await pod.container.wait()  # type: ignore[union-attr]
            self._measured.discard(pod)
            pod.ended = time.time()
            pod.log.close()
            self._fire("ended", pod)
            await asyncio.sleep(self.timing.log_lead)
            self._terminated(pod, code)
            await asyncio.sleep(self.timing.phase)
        self._over(pod)

    # Scheduling

    def _place(self, pod: Pod) -> None:
        reasons, lack_of_room = [], 0
        if missing := self._missing_claim(pod):
            message = f"0/{len(self.places)} nodes are available: {missing}. preemption: 0/{len(self.places)} nodes are available: {len(self.places)} Preemption is not helpful for scheduling."
        else:
            for place in sorted(self.places.values(), key=lambda place: len(place.pods)):
                why, roomless = unfit(pod.object, place.node, place.taints, place.used)
                if not why:
                    self._bind(pod, place)
                    return
                reasons.append(why)
                lack_of_room += roomless
            message = no_place(reasons, lack_of_room)
        condition = self._condition(pod, "PodScheduled")
        if condition is None or condition.get("message") != message:
            self._set_condition(pod, "PodScheduled", False, "Unschedulable", message)
            self.store.changed(pod)
            self.store.event(pod, "FailedScheduling", message, warning=True, component="default-scheduler")

    def _missing_claim(self, pod: Pod) -> str | None:
        for volume in pod.spec.get("volumes") or []:
            if "persistentVolumeClaim" in volume:
                name = volume["persistentVolumeClaim"]["claimName"]
                if (pod.namespace, name) not in self.contents.claims:
                    return f'persistentvolumeclaim "{name}" not found'
        return None

    def _bind(self, pod: Pod, place: Place) -> None:
        place.pods.add(pod)
        for name, amount in requests_of(pod.object).items():
            place.used[name] = place.used.get(name, 0.0) + amount
        pod.node = place.node.name
        pod.object["spec"]["nodeName"] = pod.node
        self._set_condition(pod, "PodScheduled", True)
        self.store.changed(pod)
        message = f"Successfully assigned {pod.namespace}/{pod.name} to {pod.node}"
        self.store.event(pod, "Scheduled", message, component="default-scheduler")

    def _release(self, pod: Pod) -> None:
        if pod.node is None or pod.released:
            return
        pod.released = True
        place = self.places[pod.node]
        place.pods.discard(pod)
        for name, amount in requests_of(pod.object).items():
            place.used[name] -= amount

    # Start of a container

    async def _prepare(self, pod: Pod) -> dict[str, str]:
        pod.object["status"] |= {"hostIP": "127.0.0.1", "podIP": "127.0.0.1", "startTime": stamp(time.time())}
        self._set_condition(pod, "Initialized", True)
        for condition in ("Ready", "ContainersReady"):
            self._set_condition(pod, condition, False, "ContainersNotReady", "containers with unready status: [base]")
        self._waiting(pod, "ContainerCreating")
        while True:
            try:
                problem = mount(pod, self.contents, self.mount_root, self._mounts_in_use)
            except NotReady as missing:
                unmount(pod, self._mounts_in_use)
                self.store.event(pod, "FailedMount", str(missing), warning=True)
                await asyncio.sleep(self.timing.back_off)
                continue
            break
        await self._pull(pod)
        while True:
            try:
                environment = environment_of(pod, self.contents, self.environment)
                break
            except NotReady as missing:
                self._waiting(pod, "CreateContainerConfigError", str(missing))
                self.store.event(pod, "Failed", f"Error: {missing}", warning=True)
            await asyncio.sleep(self.timing.back_off)
        if problem:
            self._waiting(pod, "CreateContainerError", problem)
            self.store.event(pod, "Failed", f"Error: {problem}", warning=True)
            await asyncio.Event().wait()
        await asyncio.sleep(self.timing.create)
        return environment

    async def _pull(self, pod: Pod) -> None:
        image = pod.box["image"]
        if not good_image(image):
            why = f'Failed to apply default image tag "{image}": couldn\'t parse image name "{image}": invalid reference format'
            self._waiting(pod, "InvalidImageName", why)
            self.store.event(pod, "InspectFailed", why, warning=True)
            await asyncio.Event().wait()
        while True:
            trouble = self._pull_trouble(image)
            if pod.box["imagePullPolicy"] == "Never" and image not in self.images:
                self._waiting(
                    pod, "ErrImageNeverPull", f'Container image "{image}" is not present with pull policy of Never'
                )
                await asyncio.Event().wait()
            self.store.event(pod, "Pulling", f'Pulling image "{image}"')
            if trouble is None:
                break
            why = f'failed to pull and unpack image "{image}": failed to resolve reference "{image}": {trouble}'
            self._waiting(pod, "ErrImagePull", why)
            self.store.event(pod, "Failed", f'Failed to pull image "{image}": {why}', warning=True)
            await asyncio.sleep(self.timing.back_off)
            self._waiting(pod, "ImagePullBackOff", f'Back-off pulling image "{image}": ErrImagePull: {why}')
            self.store.event(pod, "BackOff", f'Back-off pulling image "{image}"')
            await asyncio.sleep(self.timing.back_off)
        self.store.event(pod, "Pulled", f'Successfully pulled image "{image}" in 10ms (10ms including waiting)')

    def _pull_trouble(self, image: str) -> str | None:
        text, until = self.image_trouble.get(image, ("", 0.0))
        if time.monotonic() < until:
            return text
        return None if image in self.images else f"{image}: not found"

    def _start(self, pod: Pod, environment: dict[str, str]) -> bool:
        """Run the container; False if the command can't be run."""
        self.store.event(pod, "Created", f"Created container: {pod.box['name']}")
        if pod.sleep is not None:
            pod.container = Sleeping(pod.sleep, pod.log)
        else:
            own = self.folder / f"{pod.name}-{pod.object['metadata']['uid'][:8]}"
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
            if problem := _cannot_run(argv[0], environment, cwd):
                self._set_container(
                    pod,
                    {"terminated": self._end(128, "StartError", problem, started="1970-01-01T00:00:00Z")},
                )
                self.store.event(pod, "Failed", f"Error: {problem}", warning=True)
                pod.log.close()
                return False
            pod.container = Session(
                argv, environment, cwd, pod.log, lambda line: self._wrote(pod, line), self.keeper, self.nursery
            )
            if "memory" in (pod.box["resources"].get("limits") or {}):
                self._measured.add(pod)
        pod.started = time.time()
        return True

    async def _report_running(self, pod: Pod) -> None:
        if isinstance(pod.container, Session):
            await pod.container.executed()
        for condition in ("Ready", "ContainersReady"):
            self._set_condition(pod, condition, True)
        pod.object["status"]["phase"] = "Running"
        self._set_container(pod, {"running": {"startedAt": stamp(pod.started or 0)}})
        self.store.event(pod, "Started", f"Started container {pod.box['name']}")
        self._fire("running", pod)

    def _wrote(self, pod: Pod, line: bytes) -> None:
        if any(rule.when.startswith("log contains ") for rule in self.rules):
            self._fire("log", pod, line.decode(errors="replace"))

    # Status

    def _condition(self, pod: Pod, kind: str) -> Object | None:
        conditions = pod.object["status"].get("conditions") or []
        return next((condition for condition in conditions if condition["type"] == kind), None)

    def _set_condition(self, pod: Pod, kind: str, true: bool, reason: str = "", message: str = "") -> None:
        conditions = pod.object["status"].setdefault("conditions", [])
        condition = {
            "type": kind,
            "status": "True" if true else "False",
            "lastProbeTime": None,
            "lastTransitionTime": stamp(time.time()),
        }
        condition |= {"reason": reason} if reason else {}
        condition |= {"message": message} if message else {}
        conditions[:] = [other for other in conditions if other["type"] != kind] + [condition]

    def _waiting(self, pod: Pod, reason: str, message: str = "") -> None:
        self._set_container(pod, {"waiting": {"reason": reason} | ({"message": message} if message else {})})

    def _set_container(self, pod: Pod, state: Object) -> None:
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
        self.store.changed(pod)

    def _end(self, code: int, reason: str, message: str, started: str) -> Object:
        end = {"exitCode": code, "reason": reason, "startedAt": started, "finishedAt": stamp(time.time())}
        return end | ({"message": message} if message else {})

    def _terminated(self, pod: Pod, code: int) -> None:
        reason = "OOMKilled" if pod.out_of_memory else ("Error" if code else "Completed")
        message = ""
        if code and pod.box["terminationMessagePolicy"] == "FallbackToLogsOnError":
            message = pod.log.tail(_MESSAGE_LINES, _MESSAGE_BYTES)
        end = self._end(code, reason, message, stamp(pod.started or 0)) | {"finishedAt": stamp(pod.ended or 0)}
        why = "PodFailed" if code else "PodCompleted"
        for condition in ("Ready", "ContainersReady"):
            self._set_condition(pod, condition, False, why)
        self._set_container(pod, {"terminated": end})

    def _over(self, pod: Pod) -> None:
        """The last phase."""
        if pod.done.is_set():
            return
        status = pod.object["status"]
        states = [container["state"] for container in status.get("containerStatuses") or []]
        if pod.node is not None and any("terminated" not in state for state in states):
            unknown = "The container could not be located when the pod was terminated"
            self._set_container(
                pod, {"terminated": self._end(137, "ContainerStatusUnknown", unknown, "1970-01-01T00:00:00Z")}
            )
            states = [container["state"] for container in status["containerStatuses"]]
        succeeded = bool(states) and states[0]["terminated"]["exitCode"] == 0 and not pod.ending
        ending = dict(pod.ending)
        if ending.pop("bare", False):
            del status["containerStatuses"]
        if disruption := ending.pop("disruption", None):
            self._set_condition(pod, "DisruptionTarget", True, *disruption)
        status |= {"phase": "Succeeded" if succeeded else "Failed"} | ending
        pod.done.set()
        unmount(pod, self._mounts_in_use)
        self._release(pod)
        self.store.changed(pod)
        self._fire("finished", pod)

    # Memory

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            for pod, members in _sessions(self._measured).items():
                limit = quantity(pod.box["resources"]["limits"]["memory"])
                if sum(size for size, _ in members) > limit:
                    self._out_of_memory(pod, members)

    def _out_of_memory(self, pod: Pod, members: list[tuple[int, int]]) -> None:
        pod.out_of_memory = True
        main = pod.container.pid  # type: ignore[union-attr]
        children = [member for member in members if member[1] != main]
        if self.child_oom and children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(max(children)[1], signal.SIGKILL)
        else:
            pod.container.kill()  # type: ignore[union-attr]

    # Ends

    def delete(self, pod: Pod, grace: float | None = None) -> None:
        """Delete as the API does: at once where nothing runs, else with grace."""
        grace = pod.spec["terminationGracePeriodSeconds"] if grace is None else grace
        metadata = pod.object["metadata"]
        if grace == 0 or pod.node is None or pod.over:
            self._remove(pod)
            return
        if "deletionTimestamp" in metadata:
            # Only ever sooner.
            if grace < metadata["deletionGracePeriodSeconds"]:
                metadata["deletionTimestamp"] = stamp(time.time() + grace)
                metadata["deletionGracePeriodSeconds"] = int(grace)
                self.store.changed(pod)
                self.spawn(self._end_with_grace(pod, grace))
            return
        metadata["deletionTimestamp"] = stamp(time.time() + grace)
        metadata["deletionGracePeriodSeconds"] = int(grace)
        self.store.changed(pod)
        self._fire("deleting", pod)
        if not self.places[pod.node].lost:
            self.spawn(self._delete(pod, grace))

    async def _delete(self, pod: Pod, grace: float) -> None:
        await self._end_with_grace(pod, grace)
        await asyncio.sleep(self.timing.linger)
        if not self.places[pod.node or ""].lost:
            self._remove(pod)

    async def _end_with_grace(self, pod: Pod, grace: float) -> None:
        """SIGTERM, and SIGKILL if need be; returns when the phase says so."""
        if pod.container is None:
            self._cancel(pod)
            self._over(pod)
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

    def _remove(self, pod: Pod) -> None:
        if pod.gone:
            return
        pod.gone = True
        if pod.container is None or pod.ended is not None:
            self._cancel(pod)
        else:
            pod.container.kill()
        pod.log.close()
        unmount(pod, self._mounts_in_use)
        self._release(pod)
        del self.store.pods[pod.namespace, pod.name]
        self.store.changed(pod, "DELETED")
        self._fire("gone", pod)

    async def _enforce_deadline(self, pod: Pod, seconds: float) -> None:
        waiting = asyncio.create_task(pod.done.wait())
        if (await asyncio.wait({waiting}, timeout=seconds))[0] or pod.gone or self.places[pod.node or ""].lost:
            return
        message = "Pod was active on the node longer than the specified deadline"
        pod.ending = {"reason": "DeadlineExceeded", "message": message}
        self.store.event(pod, "DeadlineExceeded", message)
        await self._end_with_grace(pod, pod.spec["terminationGracePeriodSeconds"])

    def evict(self, pod: Pod, disruption_target: bool, container_statuses: bool) -> None:
        """See ``Cluster.evict``."""
        if pod.over:
            raise ValueError(f"pod {pod.name!r} has ended ({pod.phase}): it can't be evicted")
        message = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. "
        if not disruption_target:
            message = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "
        pod.ending = {"reason": "Evicted", "message": message, "bare": not container_statuses}
        if disruption_target:
            pod.ending["disruption"] = ("TerminationByKubelet", message)
        pod.no_log = f"unable to retrieve container logs for containerd://{pod.object['metadata']['uid']}"
        self.store.event(pod, "Evicted", message, warning=True)
        self._kill_or_finish(pod)

    def _kill_or_finish(self, pod: Pod) -> None:
        if pod.container is not None:
            pod.container.kill()
        elif not pod.over:
            self._cancel(pod)
            self._over(pod)

    def disrupt(self, pod: Pod, reason: str, message: str, grace: float | None = None) -> None:
        """Delete a pod for a reason that its conditions tell."""
        self._set_condition(pod, "DisruptionTarget", True, reason, message)
        self.store.changed(pod)
        self.delete(pod, grace)

    def shut_down(self, place: Place) -> None:
        """See ``Cluster.shutdown_node``."""
        place.shut_down = True
        message = "Pod was terminated in response to imminent node shutdown."
        for pod in list(place.pods):
            pod.ending = {"reason": "Terminated", "message": message}
            pod.ending["disruption"] = ("TerminationByKubelet", message)
            self.spawn(self._end_with_grace(pod, self.timing.shutdown))

    def lose(self, place: Place) -> None:
        """See ``Cluster.lose_node``."""
        place.lost = True
        for pod in list(place.pods):
            self._cancel(pod)
            self._measured.discard(pod)
            if pod.container is not None and pod.ended is None:
                pod.container.kill()
                pod.ended = time.time()
            pod.log.close(broken=True)
            self._set_condition(pod, "Ready", False, "NodeNotReady")
            self.store.changed(pod)
            self.store.event(pod, "NodeNotReady", "Node is not ready", warning=True, component="node-controller")
        self.spawn(self._give_up(place))

    async def _give_up(self, place: Place) -> None:
        await asyncio.sleep(self.timing.toleration)
        if place.lost:
            for pod in list(place.pods):
                message = "Taint manager: deleting due to NoExecute taint"
                self.disrupt(pod, "DeletionByTaintManager", message)

    def back(self, place: Place) -> None:
        """See ``Cluster.node_back``."""
        place.lost = place.shut_down = False
        for pod in list(place.pods):
            self.spawn(self._recover(pod))

    async def _recover(self, pod: Pod) -> None:
        if pod.started is not None and "running" in pod.object["status"]["containerStatuses"][0]["state"]:
            self._set_container(pod, {"terminated": self._end(255, "Unknown", "", stamp(pod.started))})
        self._over(pod)
        if "deletionTimestamp" in pod.object["metadata"]:
            await asyncio.sleep(self.timing.linger)
            self._remove(pod)

    # Patches and rules

    def patch(self, pod: Pod, patch: Object) -> None:
        """Change labels and annotations; anything else is refused."""
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

    def _fire(self, moment: str, pod: Pod, line: str = "") -> None:
        for rule in list(self.rules):
            uid = pod.object["metadata"]["uid"]
            if len(rule.pods) >= rule.times or uid in rule.done:
                continue
            hit = rule.when.removeprefix("log contains ") in line if moment == "log" else rule.when == moment
            if hit and (moment == "log") == rule.when.startswith("log contains ") and rule.match(pod):
                rule.pods.append(pod.name)
                rule.done.add(uid)
                # Not here: the change that this moment is part of has to be complete first.
                asyncio.get_running_loop().call_soon(self._act, rule, pod.name)

    def _act(self, rule: Rule, name: str) -> None:
        try:
            rule.action(name)
        except Exception as error:
            self.failures.append(error)


def _cannot_run(program: str, environment: Mapping[str, str], folder: Path) -> str | None:
    began = "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
    if not folder.is_dir():
        return f'{began}chdir to cwd ("{folder}") set in config.json failed: no such file or directory: unknown'
    if shutil.which(program, path=environment.get("PATH", "")) is None:
        where = "no such file or directory" if "/" in program else "executable file not found in $PATH"
        return f'{began}error during container init: exec: "{program}": {where}: unknown'
    return None


def _sessions(pods: set[Pod]) -> dict[Pod, list[tuple[int, int]]]:
    """Resident bytes and id of each process of each pod."""
    found: dict[int, list[tuple[int, int]]] = {pod.container.pid: [] for pod in pods}  # type: ignore[union-attr]
    if not found:
        return {}
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if (session := os.getsid(pid)) in found:
                pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
                found[session].append((pages * _PAGE, pid))
    return {pod: found[pod.container.pid] for pod in pods}  # type: ignore[union-attr]
