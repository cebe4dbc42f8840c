"""A real Airflow and a cluster, the double or a real one, as tests see them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.files import open_files, put_file
from chunkflow_core.storage.layers import NewLayer
from operators.service import Client, start
from tests.support.airflow.volumes import ENVIRONMENT, Volumes, copy_dags, until
from tests.support.cluster.clusters import TestCluster, the_double, the_real_one
from tests.support.cluster.double import Node
from tests.support.volume import SHAPE

ONE_BLOCK: Vector = (12, 24, 24)
"""Shape of a part of the input that is one block: z, y, x in voxels."""
CANARY = {"CHUNKFLOW_TEST_CANARY": "canary-of-airflow-4711"}
"""A variable of Airflow's environment, whose value stands nowhere else."""
FIRST = "first"
"""Name of the volume that is there when Airflow starts, and stays."""


class Metrics(threading.Thread):
    """A StatsD server that keeps the names of the metrics that Airflow sends."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.names: set[str] = set()

    def run(self) -> None:
        """Receive as long as the process lives."""
        while packet := self.socket.recv(65536):
            self.names |= {line.partition(":")[0] for line in packet.decode().splitlines()}


@dataclass(frozen=True)
class World:
    """Airflow, a cluster, and the volumes that run on both."""

    volumes: Volumes
    cluster: TestCluster
    right: NDArray[Any]
    """What the output of every volume has to be: channel, z, y, x."""
    metrics: Metrics

    def add(
        self, name: str, moods: Mapping[str, list[str]] | None = None, shape: Vector = SHAPE, **runner: Any
    ) -> None:
        """Add a volume and wait until Airflow has it.

        Args:
            name: The volume's name.
            moods: How commands misbehave; see ``TestCluster.runner_section``.
            shape: How much of the input is taken: z, y, x in voxels.
            **runner: Keys of the runner section to add or replace.
        """
        self.write(name, moods, shape, **runner)
        self.volumes.known(name)

    def write(
        self, name: str, moods: Mapping[str, list[str]] | None = None, shape: Vector = SHAPE, **runner: Any
    ) -> None:
        """Write a volume's spec, which Airflow finds at its next look; arguments as for ``add``."""
        section = self.cluster.runner_section(moods or {}, self._moods(name), **runner)
        write_spec(self.volumes.folder, self.cluster.storage, name, section, shape)

    def _moods(self, name: str) -> str:
        return f"{self.cluster.storage}/{name}/moods"

    def let_go(self, name: str, task: str) -> None:
        """Have a task whose mood is to count do its work."""
        put_file(self._moods(name), f"go-{task}", b"")

    def is_paused(self, name: str, task: str) -> bool:
        """Whether a process of a task whose mood is to pause stands still."""
        return f"paused-{task}" in open_files(self._moods(name)).list(prefix=f"paused-{task}")

    def resume(self, name: str, task: str) -> None:
        """Have a process of a task go on that has paused."""
        put_file(self._moods(name), f"resume-{task}", b"")

    def remove_all(self) -> None:
        """Remove the volumes that were added.

        Airflow would read each of them again whenever one is added.
        """
        for spec in self.volumes.folder.glob("*.yaml"):
            if spec.stem != FIRST:
                spec.unlink()

    def check_output(self, name: str) -> None:
        """Check that the volume's output is right to the bit, and that no pod is left."""
        spec = load_spec(self.volumes.folder / f"{name}.yaml")
        np.testing.assert_array_equal(Workspace(spec).output.read(spec.grid.roi), self.right)
        self.check_no_pod_left(name)

    def pods_of(self, name: str, task: str) -> list[str]:
        """Names of all pods that a task ever had; only the double knows."""
        stage, _, block = task.partition(".")
        wanted = {"chunkflow/volume": name, "chunkflow/stage": stage, "chunkflow/block": block}
        assert self.cluster.double
        return [pod.name for pod in self.cluster.double.created if wanted.items() <= pod.labels.items()]

    def check_no_pod_left(self, name: str) -> None:
        """Check that the volume's pods are gone, or go within a minute."""
        until(lambda: not self.cluster.pods(name), 60)


def write_spec(folder: Path, storage: str, name: str, runner: dict[str, Any], shape: Vector = SHAPE) -> Path:
    """Write the spec of a volume whose layers are at the address ``storage``; the file."""
    spec = {
        "name": name,
        "input": {"path": f"{storage}/input"},
        "output": {"path": f"{storage}/{name}/output", "channels": 2, "dtype": "float32", "chunk_size": [4, 8, 8]},
        "exchange": {"path": f"{storage}/{name}/exchange"},
        "roi": [[0, 0, 0], list(shape)],
        "patch_size": [8, 16, 16],
        "patch_overlap": [2, 4, 4],
        "block_size": [12, 24, 24],
        "model": {"engine": "identity"},
        "runner": runner,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@contextmanager
def start_world(folder: Path, kind: str) -> Iterator[World]:
    """Start Airflow and a cluster, ``double`` or ``real``; all files are below ``folder``."""
    specs = folder / "specs"
    specs.mkdir()
    with ExitStack() as stack:
        cluster = stack.enter_context(
            the_double(folder, nodes=[Node(f"node-{n}") for n in range(20)]) if kind == "double" else the_real_one()
        )
        data = np.random.default_rng(1).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
        layer = NewLayer(f"{cluster.storage}/input", SHAPE, dtype="uint8", resolution=(40, 4, 4), chunk=(8, 16, 16))
        layer.write(Box((0, 0, 0), SHAPE), data)
        local = write_spec(folder, cluster.storage, "local", {"kind": "local"})
        assert main(["run", str(local)]) == 0
        right = Workspace(load_spec(local)).output.read(load_spec(local).grid.roi)
        # The scheduler imports Kubernetes' client at its start only if there is a volume for it;
        # else each task does.
        write_spec(specs, cluster.storage, FIRST, cluster.runner_section({}, f"{cluster.storage}/{FIRST}/moods"))
        metrics = Metrics()
        metrics.start()
        environment = (
            cluster.environment
            | ENVIRONMENT
            | CANARY
            | {
                "AIRFLOW__METRICS__STATSD_ON": "True",
                "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
                "AIRFLOW__METRICS__STATSD_PORT": str(metrics.socket.getsockname()[1]),
                "CHUNKFLOW_VOLUMES": str(specs),
                # A task whose process was killed is noticed in seconds, not in five minutes.
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
            }
        )
        dags = copy_dags(folder)
        service = stack.enter_context(
            start(folder / "home", dags=dags, environment=environment, with_parent=True, durable=False)
        )
        client = stack.enter_context(Client(service))
        yield World(Volumes(client, specs, dags, folder / "home"), cluster, right, metrics)
