"""Many pods at once through one triggerer: memory, CPU, and whether every end is noticed.

    python bench/pods.py [--pods 500] [--seconds 420]

starts a private Airflow and the tests' stand-in for a cluster (pods are simulated, the API is real HTTP), has one DAG with a task
per pod, and measures the processes of Airflow from the first pod to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("kube", "chunkflow_core")]

from double import Cluster, Node  # noqa: E402

from chunkflow_core.lattice.boxes import Box  # noqa: E402
from chunkflow_core.storage.layers import NewLayer  # noqa: E402
from operators.processes import tree  # noqa: E402
from operators.service import Client, start  # noqa: E402
from operators.service_settings import Home  # noqa: E402
from operators.service_state import State  # noqa: E402

_IMAGE = "chunkflow:bench"
_COMPONENTS = ("triggerer", "scheduler")


@dataclass
class Usage:
    """CPU seconds and memory of a component, with all its processes."""

    cpu: dict[int, float] = field(default_factory=dict)
    peak: int = 0

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


def main() -> None:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=500, help="pods at once (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=420,
        help="life of each pod; all have to be launched before the first one ends (default: %(default)s)",
    )
    parser.add_argument("--poll", type=float, default=15, help="runner.poll_interval (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(Path(name), options.pods, options.seconds, options.poll), indent=2))


def measure(folder: Path, pods: int, seconds: float, poll: float) -> dict[str, object]:
    """The figures of one run."""
    nodes = [Node(f"node-{n}", cpu=10_000, memory=2**50) for n in range(4)]
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
    """A volume of as many blocks in a row, none of which overlap: its tasks are all inference, and all start at once."""
    layer = NewLayer(f"file://{folder}/input", (1, 1, pods), dtype="uint8", resolution=(1, 1, 1), chunk=(1, 1, pods))
    import numpy as np

    layer.write(Box((0, 0, 0), (1, 1, pods)), np.ones((1, 1, 1, pods), np.uint8))
    spec = {
        "name": "many",
        "input": {"path": f"file://{folder}/input"},
        "output": {"path": f"file://{folder}/output", "chunk_size": [1, 1, 1]},
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_size": [1, 1, 1],
        "patch_overlap": [0, 0, 0],
        "block_size": [1, 1, 1],
        "model": {"engine": "identity"},
        "runner": {
            "kind": "kubernetes",
            "image": _IMAGE,
            "poll_interval": poll,
            "infer": {"cpu": 1, "gpu": 0},
            "volumes": [{"mount": str(folder), "host_path": str(folder)}],
            "annotations": {"double/sleep": str(seconds)},
        },
    }
    (folder / "specs").mkdir()
    (folder / "specs" / "many.yaml").write_text(yaml.safe_dump(spec))


def watch(cluster: Cluster, client: Client, home: Path, pods: int, poll: float) -> dict[str, object]:
    """Trigger the blocks' tasks and watch Airflow until all have ended."""
    while not any(dag["dag_id"] == "many" for dag in client.pages("dags", "dags")):
        time.sleep(1)
    usage = {name: Usage() for name in _COMPONENTS}
    began = time.monotonic()
    run = str(client.post("dags/many/dagRuns", {"logical_date": None, "conf": {}})["dag_run_id"])
    skip_steps(client, run)
    most, all_running, idle = 0, 0.0, (0.0, 0.0)
    while True:
        sample(home, usage)
        alive = sum(pod["status"].get("phase") == "Running" for pod in cluster.pods())
        most = max(most, alive)
        if alive == pods and not all_running:
            all_running, idle = time.monotonic() - began, (time.monotonic(), usage["triggerer"].seconds)
        if idle[0] and alive == pods:
            watched = (time.monotonic() - idle[0], usage["triggerer"].seconds - idle[1])
        counts = states(client, run)
        if counts.get("success", 0) + counts.get("failed", 0) >= pods:
            break
        time.sleep(2)
    requests = sum(1 for request in cluster.requests if request.method == "GET" and "/pods/" in request.path)
    return {
        "pods": pods,
        "most at once": most,
        "launched": len(cluster.created),
        "seconds until all run": round(all_running),
        "seconds in all": round(time.monotonic() - began),
        "tasks": counts,
        "poll interval": poll,
        "GETs of pods": requests,
        "triggerer's CPU while all run": f"{100 * watched[1] / watched[0]:.0f} % of a core",
        "CPU seconds": {name: round(used.seconds) for name, used in usage.items()},
        "peak memory, MB (proportional)": {name: used.peak // 10**6 for name, used in usage.items()},
        "CPUs of the machine": os.cpu_count(),
    }


def skip_steps(client: Client, run: str) -> None:
    """The simulated cluster runs no command: take the steps before the blocks as done."""
    for task in ("prepare", "select_blocks"):
        client.patch(f"dags/many/dagRuns/{run}/taskInstances/{task}", {"new_state": "success"})


def sample(home: Path, usage: dict[str, Usage]) -> None:
    """Look at the processes of Airflow."""
    state = State.read(Home(home))
    for name, used in usage.items():
        component = state and state.components.get(name)
        process = component and component.process()
        used.look(tree(process) if process else [])


def states(client: Client, run: str) -> dict[str, int]:
    """How many blocks' tasks are in which state."""
    counts: dict[str, int] = {}
    for task in client.pages(f"dags/many/dagRuns/{run}/taskInstances", "task_instances"):
        if task["task_id"].startswith("infer."):
            counts[str(task["state"])] = counts.get(str(task["state"]), 0) + 1
    return counts


if __name__ == "__main__":
    main()
