"""Many pods at once through one triggerer: memory, CPU, and whether every end is noticed.

    python -m bench.pods --pods 20 --seconds 60      # a look
    python -m bench.pods                             # 500 pods

Starts a private Airflow and the tests' stand-in for a cluster (pods are simulated, the API is real
HTTP), has one DAG with a task per pod, and measures the processes of Airflow from the first pod to
the last. Needs the extra ``test``. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import yaml

from bench.common import command_line, make_layer, spec_content, trigger, wait_for_dag
from chunkflow_core.lattice.boxes import Box, Vector
from operators.service import Client, start
from operators.service.processes import tree
from operators.service.settings import Home
from operators.service.state import State
from tests.support.cluster.double import Cluster, Node

_IMAGE = "chunkflow:bench"
_COMPONENTS = ("triggerer", "scheduler")


@dataclass
class Usage:
    """What a component of Airflow has taken, with all its processes."""

    cpu: dict[int, float] = field(default_factory=dict)
    """CPU seconds so far, by process id."""
    peak: int = 0
    """Largest memory at a time in bytes; what several share counts once."""

    def look(self, processes: list[psutil.Process]) -> None:
        """Take a sample."""
        memory = 0
        for process in processes:
            try:
                times, memory = process.cpu_times(), memory + process.memory_full_info().pss
            except psutil.Error:
                continue
            self.cpu[process.pid] = times.user + times.system
        self.peak = max(self.peak, memory)

    @property
    def seconds(self) -> float:
        """CPU seconds so far."""
        return sum(self.cpu.values())


def main() -> int:
    """Measure and print."""
    parser = command_line("pods", __doc__)
    parser.add_argument("--pods", type=int, default=500, help="pods at once (default: 500)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=420.0,
        help="life of each pod; all have to be launched before the first one ends (default: 420)",
    )
    parser.add_argument("--poll", type=float, default=15.0, help="runner.poll_interval (default: 15)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pods-") as folder:
        print(json.dumps(measure(Path(folder), options.pods, options.seconds, options.poll), indent=2))
    return 0


def measure(folder: Path, pods: int, seconds: float, poll: float) -> dict[str, object]:
    """Start Airflow and the cluster, and let pods live until all have ended.

    Args:
        folder: Where everything is put.
        pods: How many there are at once.
        seconds: How long each lives.
        poll: Seconds between two looks at a pod.

    Returns:
        The figures that are printed.
    """
    nodes = [Node(f"node-{n}", cpu="10000", memory=str(2**50)) for n in range(4)]
    with Cluster(folder / "kubeconfig", images={_IMAGE}, folder=folder / "pods", nodes=nodes) as cluster:
        write_volume(folder, pods, seconds, poll)
        connection = {
            "conn_type": "kubernetes",
            "extra": {"kube_config_path": str(folder / "kubeconfig"), "namespace": "default"},
        }
        environment = {
            "AIRFLOW_CONN_KUBERNETES_DEFAULT": json.dumps(connection),
            "CHUNKFLOW_VOLUMES": str(folder / "specs"),
            "AIRFLOW__TRIGGERER__CAPACITY": str(2 * pods),
        }
        with (
            start(folder / "home", environment=environment, with_parent=True, durable=False) as service,
            Client(service) as client,
        ):
            return watch(cluster, client, folder / "home", pods, poll)


def write_volume(folder: Path, pods: int, seconds: float, poll: float) -> None:
    """Write a volume of ``pods`` blocks in a row, none of which overlap.

    All of its tasks are inference and start at once.
    """
    shape: Vector = (1, 1, pods)
    make_layer(f"file://{folder}/input", shape, chunk=shape).write(
        Box((0, 0, 0), shape), np.ones((1, *shape), np.uint8)
    )
    content = spec_content(
        folder,
        patch=(1, 1, 1),
        overlap=(0, 0, 0),
        block=(1, 1, 1),
        model={"engine": "identity"},
        output={"chunk_size": [1, 1, 1]},
    )
    runner = {
        "kind": "kubernetes",
        "image": _IMAGE,
        "poll_interval": poll,
        "infer": {"cpu": 1, "gpu": 0},
        "volumes": [{"mount": str(folder), "host_path": str(folder)}],
        "annotations": {"double/sleep": str(seconds)},
    }
    (folder / "specs").mkdir()
    (folder / "specs" / "many.yaml").write_text(yaml.safe_dump(content | {"name": "many", "runner": runner}))


def watch(cluster: Cluster, client: Client, home: Path, pods: int, poll: float) -> dict[str, object]:
    """Trigger the blocks' tasks and watch Airflow until all have ended; give the figures."""
    wait_for_dag(client, "many")
    usage = {name: Usage() for name in _COMPONENTS}
    began = time.monotonic()
    run = trigger(client, "many")
    skip_steps(client, run)
    most = 0
    watched: list[tuple[float, float]] = []  # while all pods run: when, and the triggerer's CPU seconds
    while True:
        sample(home, usage)
        alive = sum(pod["status"].get("phase") == "Running" for pod in cluster.pods())
        most = max(most, alive)
        if alive == pods:
            watched.append((time.monotonic(), usage["triggerer"].seconds))
        counts = states(client, run)
        if counts.get("success", 0) + counts.get("failed", 0) >= pods:
            break
        time.sleep(2)
    requests = sum(1 for request in cluster.requests if request.method == "GET" and "/pods/" in request.path)
    return {
        "pods": pods,
        "most at once": most,
        "launched": sum("chunkflow/block" in pod.labels for pod in cluster.created),  # other steps may have pods too
        "seconds until all run": round(watched[0][0] - began) if watched else None,
        "seconds in all": round(time.monotonic() - began),
        "tasks": counts,
        "poll interval": poll,
        "GETs of pods": requests,
        "triggerer's CPU while all run": share_of_a_core(watched),
        "CPU seconds": {name: round(used.seconds) for name, used in usage.items()},
        "peak memory, MB (proportional)": {name: used.peak // 10**6 for name, used in usage.items()},
        "CPUs of the machine": os.cpu_count(),
    }


def share_of_a_core(samples: list[tuple[float, float]]) -> str | None:
    """Write the CPU seconds between the first and the last sample as a share of the wall seconds.

    Args:
        samples: Wall seconds and CPU seconds so far, in order.

    Returns:
        None if there are less than two samples.
    """
    if len(samples) < 2:
        return None
    (first, before), (last, after) = samples[0], samples[-1]
    return f"{100 * (after - before) / (last - first):.0f} % of a core"


def skip_steps(client: Client, run: str) -> None:
    """Take the steps before the blocks as done, since the simulated cluster runs no command."""
    for task in ("prepare", "select_blocks"):
        client.patch(f"dags/many/dagRuns/{run}/taskInstances/{task}", {"new_state": "success"})


def sample(home: Path, usage: dict[str, Usage]) -> None:
    """Take a sample of each component of the Airflow in a folder."""
    state = State.read(Home(home))
    for name, used in usage.items():
        component = state and state.components.get(name)
        process = component and component.process()
        used.look(tree(process) if process else [])


def states(client: Client, run: str) -> dict[str, int]:
    """Count the blocks' tasks by state."""
    counts: dict[str, int] = {}
    for task in client.pages(f"dags/many/dagRuns/{run}/taskInstances", "task_instances"):
        if task["task_id"].startswith("infer."):
            counts[str(task["state"])] = counts.get(str(task["state"]), 0) + 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
