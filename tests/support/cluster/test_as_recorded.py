"""The double shows what a real cluster showed: each recorded scenario is played on it.

The scenarios run side by side: those that end nodes on one double, all others on another. A pod's
command prints what the recorded one printed, and ends as that did.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes
import pytest
from kubernetes.client import CoreV1Api
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from tests.support.cluster import images
from tests.support.cluster.client import IMAGE, api_of, condition, manifest
from tests.support.cluster.double import Cluster, Node, Timing
from tests.support.cluster.recorded import SCENARIOS, Shown, recorded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and process file descriptors are Linux's")

SPACE = "chunkflow"
SECONDS = 20.0
"""From the beginning of the play until all that was recorded has been shown, at most."""
TIMING = Timing(
    schedule=0.01, create=0.01, back_off=0.05, log_lead=0.05, phase=0.05, linger=0.05, toleration=3.0, eviction=5.0,
    shutdown=5.0,
)  # fmt: skip
TERMINATED = "error: killed by signal 15 (SIGTERM)"
TAINT = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
MOUNTS = Path("/mounts")
"""Nothing is mounted there in the end."""
HOST = "kubernetes.io/hostname"

# Pods print SAID. They then wait for a file of that name if there is GO, and end with CODE; without
# CODE they hang until SIGTERM, and print LAST.
SCRIPT = """
trap 'printf %s "$LAST"; exit 143' TERM
printf %s "$SAID"
while [ -n "$GO" ] && [ ! -e "$GO" ]; do sleep 0.05; done
[ -z "$CODE" ] || exit "$CODE"
sleep 1000 & wait
"""
EATER = "import time\ndata = bytearray(100 << 20)\nfor i in range(0, len(data), 4096): data[i] = 1\ntime.sleep(60)"
OUT_OF_MEMORY = f"""
exec 2> /dev/null
printf %s "$SAID" | head -n 1
python -c '{EATER}'
printf %s "$SAID" | tail -n 1
exit 137
"""

Act = Callable[[Cluster, str], None]


def _delete_and_lose(on: Cluster, pod: str) -> None:
    on.delete_pod(pod, grace=0)
    on.lose_node("losedeleted")


NEW_NODES = ("loselong", "mempressure2", "preempt", "shutdownterm")
"""Scenarios whose node is new, and tainted at first."""
ON_NODES: dict[str, tuple[str, Act] | None] = {
    "containerdkilled": ("created", lambda on, _: on.restart_kubelet("containerdkilled", 0.3)),
    "kubeletkilled": None,
    "kubeletkilledend": ("log contains injected", lambda on, _: on.restart_kubelet("kubeletkilledend", 0.3)),
    "kubeletkilledend2": ("running", lambda on, _: on.restart_kubelet("kubeletkilledend2", 2.0)),
    "losedeleted": ("running", _delete_and_lose),
    "loselong": ("running", lambda on, _: on.lose_node("loselong")),
    "loseshort": ("created", lambda on, _: on.break_node("loseshort", images.NO_CGROUP)),
    "mempressure2": None,
    "preempt": ("log contains hang", lambda on, pod: on.preempt(pod)),
    "shutdown": ("log contains hang", lambda on, _: on.shutdown_node("shutdown")),
    "shutdownterm": ("log contains counting 3", lambda on, _: on.shutdown_node("shutdownterm")),
}
"""Scenarios with a node of their own, of the scenario's name: when something happens, and what."""
ON_PODS: dict[str, tuple[str, Act]] = {
    "delete": ("log contains hang", lambda on, pod: on.delete_pod(pod)),
    "deletenow": ("running", lambda on, pod: on.delete_pod(pod, grace=0)),
    "disk": ("log contains disk", lambda on, pod: on.evict(pod, disruption_target=False)),
    "mempressure": ("log contains hang", lambda on, pod: on.evict(pod)),
    "runckill": ("log contains hang", lambda on, pod: on.kill(pod)),
    "slowdelete": ("log contains hang", lambda on, pod: on.delete_pod(pod)),
}
"""Scenarios in which something happens to the pod: when, and what."""
NOT_PULLED = {
    "image-broken": ("127.0.0.1:5001/broken:1", images.REGISTRY_BROKEN),
    "image-denied": ("127.0.0.1:5001/denied:1", images.FORBIDDEN),
    "image-dns": ("chunkflow.invalid/nothing:1", images.NO_SUCH_HOST),
    "image-hub": ("nothing-here:1", images.NO_SUCH_HOST),
    "image-nothere": ("127.0.0.1:5001/notfound:1", images.NOT_FOUND),
    "image-private": ("127.0.0.1:5002/private:1", images.PULL_DENIED),
    "image-refused": ("127.0.0.1:5999/x:1", images.REFUSED),
}
CUT_OFF = {"exit0", *NOT_PULLED}
"""Recordings that end in the midst of things: at a deletion, or between two tries."""


def _secret(key: str, name: str) -> dict[str, Any]:
    return {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}]}


CONTAINERS: dict[str, dict[str, Any]] = {
    "badcommand": {"command": ["/nothing"]},
    "image-badname": {"image": "chunkflow-worker:0.1.0/CPU"},
    "image-never": {"image": "chunkflow-worker:9", "imagePullPolicy": "Never"},
    "noenvfrom": {"envFrom": [{"secretRef": {"name": "nowhere"}}]},
    "nosecretenv": _secret("key", "nowhere") | {"resources": {"requests": {"cpu": "250m"}}},
    "nosecretvolume": {"volumeMounts": [{"name": "data", "mountPath": str(MOUNTS / "secret")}]},
    "oom": {"command": ["sh", "-c", OUT_OF_MEMORY], "resources": {"limits": {"memory": "60Mi"}}},
    "outofcpu": {"resources": {"requests": {"cpu": "64"}}},
    "rootimage": {"image": "root:1", "securityContext": {"runAsNonRoot": True}},
    "toobig": {"resources": {"requests": {"cpu": "2000"}}},
    "wrongkey": _secret("nokey", "storage-credentials"),
    **{scenario: {"image": image} for scenario, (image, _) in NOT_PULLED.items()},
}
SPECS: dict[str, dict[str, Any]] = {
    "deadline": {"activeDeadlineSeconds": 3},
    "noclaim": {"volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "nowhere"}}]},
    "nodeaffinity": {"nodeName": "small", "nodeSelector": {"zone": "other"}},
    "nonode": {"nodeSelector": {"zone": "nowhere"}},
    "nosecretenv": {"nodeSelector": {HOST: "small"}},
    "nosecretvolume": {"volumes": [{"name": "data", "secret": {"secretName": "nowhere"}}]},
    "outofcpu": {"nodeName": "small"},
    **{scenario: {"nodeSelector": {HOST: scenario}} for scenario in ON_NODES},
}
OFF_ITS_KUBELET = "image-private-0"
"""A pod whose node's kubelet did nothing."""


# What is compared


def view(pod: dict[str, Any]) -> str:
    """What is compared of a pod's object, as JSON."""
    status, metadata = pod["status"], pod["metadata"]
    container = (status.get("containerStatuses") or [{"state": {}}])[0]["state"]
    shown = {
        "phase": [status["phase"], status.get("reason"), status.get("message"), status.get("observedGeneration")],
        "container": [
            [kind, *(found.get(key) for key in ("reason", "exitCode", "message"))] for kind, found in container.items()
        ],
        "conditions": [
            [found.get(key) for key in ("type", "status", "observedGeneration", "reason", "message")]
            for found in status.get("conditions") or []
        ],
        "deleted": metadata.get("deletionGracePeriodSeconds") if "deletionTimestamp" in metadata else None,
    }
    text = json.dumps(shown).replace(metadata["name"], "POD")
    for pattern, replacement in (
        (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UID"),
        (r"\b\d+(\.\d+){3}(:\d+)?\b", "ADDRESS"),
        (r"/sys/fs/cgroup/\S+(?=:)", "CGROUP"),
        (r"\b\d+[KMG]i\b", "AMOUNT"),
        (r"\b\d+(/\d+)?(?= (nodes|node\(s\)|Insufficient|Preemption))", "N"),
        # The order of reasons is that of the numbers of nodes.
        (r"(?<=nodes are available: )[^.]*(?=\.)", lambda found: ", ".join(sorted(found[0].split(", ")))),
    ):
        text = re.sub(pattern, replacement, text)
    return text


def without_repeats(views: Sequence[str]) -> list[str]:
    """The views, each that is as the one before left out."""
    return [now for at, now in enumerate(views) if at == 0 or now != views[at - 1]]


def first_missing(wanted: Sequence[str], shown: Sequence[str]) -> str | None:
    """The first of the wanted views that is not shown, or not in that order; None: all are."""
    left = iter(shown)
    return next((view for view in wanted if view not in left), None)


# The play


@dataclass
class Stage:
    """A cluster that plays, and all that it showed of each pod."""

    cluster: Cluster
    api: CoreV1Api
    folder: Path
    views: dict[str, list[str]] = field(default_factory=dict)
    end: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    def watch(self) -> None:
        """Keep all that is shown from now on, in a thread that ends with the cluster."""
        version = self.api.list_namespaced_pod(SPACE).metadata.resource_version

        def follow() -> None:
            options = {"resource_version": version, "watch": True, "_preload_content": False}
            with suppress(HTTPError):
                for line in api_of(self.cluster).list_namespaced_pod(SPACE, **options):
                    change = json.loads(line)
                    if change["type"] != "DELETED":
                        pod = change["object"]
                        self.views.setdefault(pod["metadata"]["name"], []).append(view(pod))

        threading.Thread(target=follow, daemon=True).start()

    def play(self, scenario: str, only: int | None = None) -> None:
        """Create the pods of a scenario; ``only``: the one of that number."""
        for number, shown in enumerate(recorded(scenario)):
            if only in (None, number):
                self._play(f"{scenario}-{number}", scenario, shown)

    def _play(self, name: str, scenario: str, shown: list[Shown]) -> None:
        if rule := {**ON_NODES, **ON_PODS}.get(scenario):
            when, act = rule
            self.cluster.add_rule(when, lambda pod: act(self.cluster, pod), match=f"^{name}$")
        env = [{"name": key, "value": value} for key, value in self._words(scenario, shown).items()]
        policy = {"terminationMessagePolicy": "FallbackToLogsOnError"}
        container: dict[str, Any] = {"command": ["sh", "-c", SCRIPT]} | policy
        container |= CONTAINERS.get(scenario, {})
        container["env"] = [*env, *container.get("env", [])]
        spec = {"terminationGracePeriodSeconds": shown[0].pod["spec"]["terminationGracePeriodSeconds"]}
        spec |= SPECS.get(scenario, {})
        if name == OFF_ITS_KUBELET:
            toleration = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
            spec |= {"nodeSelector": {HOST: "off"}, "tolerations": [toleration]}
            self.cluster.add_rule("created", lambda _: self.cluster.restart_kubelet("off", 1000), match=f"^{name}$")
        self.api.create_namespaced_pod(SPACE, manifest(name, container=container, **spec))

    def _words(self, scenario: str, shown: list[Shown]) -> dict[str, str]:
        """What the command of a recorded pod said, and how it ended."""
        statuses = shown[-1].pod["status"].get("containerStatuses") or [{"state": {}}]
        end = statuses[0]["state"].get("terminated")
        message = end.get("message", "") if end else "mood: hang\n"
        said, killed, _ = message.partition(TERMINATED)
        words = {"SAID": said, "LAST": f"{killed}\n"}
        if end and not killed and scenario != "runckill":
            words["CODE"] = str(end["exitCode"])
        if scenario in ("kubeletkilled", "kubeletkilledend2"):
            words["GO"] = str(self.folder / scenario)
        return words

    def go(self, scenario: str) -> None:
        """Let a pod end that waits for it."""
        (self.folder / scenario).touch()

    def wait(self, pod: str, until: str | Callable[[dict[str, Any]], bool]) -> None:
        """Wait for a pod, as ``Cluster.wait`` does."""
        self.cluster.wait(pod, until, timeout=SECONDS)


def _play_on_nodes(stage: Stage) -> None:
    def unschedulable(text: str) -> Callable[[dict[str, Any]], bool]:
        return lambda pod: text in condition(pod, "PodScheduled").get("message", "")

    stage.play("loselong")
    stage.wait("loselong-0", unschedulable("didn't match"))
    for node in NEW_NODES:
        stage.cluster.add_node(Node(node, taints=(TAINT,)))
    for scenario in ON_NODES:
        if scenario != "loselong":
            stage.play(scenario)
    stage.play("image-private", only=0)
    for node in NEW_NODES:
        stage.wait(f"{node}-0", unschedulable("untolerated"))
        stage.cluster.add_node(Node(node))
    stage.wait("kubeletkilledend2-0", lambda pod: condition(pod, "Ready").get("status") == "False")
    stage.go("kubeletkilledend2")
    stage.wait("kubeletkilled-0", "Running")
    stage.cluster.restart_kubelet("kubeletkilled", 0.3)
    _wait_for_kubelet(stage.api, "kubeletkilled-0")
    stage.go("kubeletkilled")


def _wait_for_kubelet(api: CoreV1Api, pod: str) -> None:
    """Wait until the node of a pod gives its log."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            api.read_namespaced_pod_log(pod, SPACE)
            return
        except ApiException as error:
            assert "connect: connection refused" in str(error.body) and time.monotonic() < end
            time.sleep(0.02)


def _play_on_pods(stage: Stage) -> None:
    for image, trouble in NOT_PULLED.values():
        stage.cluster.set_image(image, trouble)
    stage.cluster.add_image("root:1", root=True)
    stage.cluster.add_secret("storage-credentials", {"key": "x"}, namespace=SPACE)
    stage.play("nosecretenv")
    # It takes of the node that lacks CPUs for another.
    stage.wait("nosecretenv-0", lambda pod: "nodeName" in pod["spec"])
    for scenario in SCENARIOS:
        if scenario not in (*ON_NODES, "nosecretenv"):
            stage.play(scenario, only=1 if scenario == "image-private" else None)
    stage.wait("drain-0", "Running")
    body = kubernetes.client.V1Eviction(metadata=kubernetes.client.V1ObjectMeta(name="drain-0"))
    stage.api.create_namespaced_pod_eviction("drain-0", SPACE, body)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Stage]]:
    of_nodes = [Node(name) for name in ("node1", "off", *(node for node in ON_NODES if node not in NEW_NODES))]
    of_pods = [Node("node1"), Node("node2"), Node("small", cpu="1", labels={"zone": "small"})]
    found = []
    with ExitStack() as stack:
        for nodes in (of_nodes, of_pods):
            folder = tmp_path_factory.mktemp("cluster")
            cluster = stack.enter_context(
                Cluster(
                    folder / "kubeconfig", images=[IMAGE], namespaces=[SPACE], nodes=nodes, timing=TIMING,
                    child_oom=True, mount_root=MOUNTS,
                )
            )  # fmt: skip
            found.append(Stage(cluster, api_of(cluster), folder))
            found[-1].watch()
        _play_on_pods(found[1])
        _play_on_nodes(found[0])
        yield found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_as_recorded(stages: list[Stage], scenario: str) -> None:
    for number, pod in enumerate(recorded(scenario)):
        wanted = without_repeats([view(shown.pod) for shown in pod])
        while True:
            seen = [views for stage in stages for name, views in stage.views.items() if name == f"{scenario}-{number}"]
            shown = without_repeats([view for views in seen for view in views])
            missing = first_missing(wanted, shown)
            last = not shown or (shown[-1] != wanted[-1] and scenario not in CUT_OFF)
            if missing is None and not last:
                break
            assert time.monotonic() < stages[0].end, _difference(missing or wanted[-1], shown)
            time.sleep(0.02)
        if scenario not in CUT_OFF and not any(map(_half_ended, wanted)):
            assert not any(map(_half_ended, shown)), "a pod that its kubelet ends is over in one step"


def _half_ended(shown: str) -> bool:
    pod = json.loads(shown)
    return pod["phase"][0] == "Running" and [kind for kind, *_ in pod["container"]] == ["terminated"]


def _difference(missing: str, shown: Sequence[str]) -> str:
    return "\n".join([f"not shown, or not at that place: {missing}", "but:", *shown])
