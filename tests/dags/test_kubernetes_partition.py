"""A real Airflow and a cluster whose nodes are cut off from it, and live.

The API takes their pods for lost, and Airflow launches others. So two pods of one block are at work
at a time, each with the storage at hand.

On the double by default; with ``-m cluster`` on a real cluster (``tests/README.md``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.commands.log_copy import log_url, read_log
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.files import open_files
from tests.support.airflow.volumes import until
from tests.support.airflow.world import World, write_spec
from tests.support.cluster.clusters import cut_off, rejoin, why_no_node_can_be_cut_off
from tests.support.volume import output_of

pytestmark = [pytest.mark.airflow, pytest.mark.long]

NAME = "parted"
SHAPE = (12, 40, 40)
"""Four blocks: z, y, x in voxels."""
BEFORE_A_LOOK = "pause chunkflow_core.steps.workspace:Workspace.check_claim 2"
"""Before a stage looks, the second time, whether the layer is still its own to write to."""
AFTER_A_LOOK = "pause chunkflow_core.storage.layers:OutputLayer.write 1"
"""Between that look and the first write."""
PAUSED = {
    "infer.0_0_0": AFTER_A_LOOK,
    "infer.0_0_1": BEFORE_A_LOOK,
    "infer.0_1_0": AFTER_A_LOOK,
    "infer.0_1_1": BEFORE_A_LOOK,
    "blend.0_0_1": AFTER_A_LOOK,
}
"""Where the first pod of a task stands still, until long after it was given up."""
GATE = "blend.0_1_1"
"""A task that keeps the run from ending until it is let go."""
TAKEN = "another one has taken it over"
"""What a task says that finds the output claimed by another model."""
OTHER_MODEL = ("--set", "output.range=[-7, 249]")


@dataclass(frozen=True)
class Parted:
    """A run, some of whose pods go on where nobody sees them."""

    world: World
    run: str
    ghosts: dict[str, str]
    """Names of these pods by task."""

    @property
    def spec(self) -> VolumeSpec:
        return load_spec(self.world.volumes.folder / f"{NAME}.yaml")

    def core(self, command: str, *options: str) -> int:
        """Run a command of ``chunkflow-core`` on the volume here; its exit code."""
        return main([command, str(self.world.volumes.folder / f"{NAME}.yaml"), *options])

    def last_words(self, task: str) -> str:
        """What the copy of a ghost's log in the exchange says."""
        return read_log(log_url(self.spec.exchange.path, NAME, self.run, self.ghosts[task])) or ""

    def let_go(self, task: str, end: str) -> None:
        """Have a ghost go on, to the end of which its log says something."""
        assert end not in self.last_words(task)
        self.world.resume(NAME, task)
        with suppress(TimeoutError):
            until(lambda: end in self.last_words(task), 60)
        assert end in self.last_words(task)

    @cached_property
    def right(self) -> NDArray[Any]:
        """What one machine makes of the volume: channel, z, y, x."""
        folder = self.world.volumes.home.parent / "alone"
        folder.mkdir()
        spec = write_spec(folder, self.world.cluster.storage, f"{NAME}-alone", {"kind": "local"}, SHAPE)
        assert main(["run", str(spec), "--seams", "0"]) == 0
        return output_of(spec)

    def output(self) -> dict[str, bytes]:
        """All files of the output layer that hold voxels, by name."""
        files = open_files(self.spec.output.path)
        names = [name for name in files.list() if re.match(r"[\d_]+/", name)]
        return {file["path"]: file["content"] for file in files.get(names)}

    def receipts(self) -> int:
        """Number of files that are receipts, whether they count or not."""
        return sum(
            "receipts/" in name and name.endswith(".json") for name in open_files(self.spec.exchange.path).list()
        )


@pytest.fixture(scope="class")
def parted(airflow_and_cluster: World) -> Iterator[Parted]:
    """A run; the first pods of some of its tasks are on nodes that are cut off, and go on."""
    world = airflow_and_cluster
    if why := why_no_node_can_be_cut_off(world.cluster):
        pytest.skip(why)
    world.add(NAME, {task: [pause] for task, pause in PAUSED.items()} | {GATE: ["count"]}, SHAPE, termination_grace=1)
    run, cut, ghosts = world.volumes.trigger(NAME), set[str](), dict[str, str]()
    try:
        for stage in ("infer", "blend"):
            tasks = [task for task in PAUSED if task.startswith(stage)]
            wait_for_each(world, tasks, lambda task: world.is_paused(NAME, task))
            found = {task: only_pod(world, task) for task in tasks}
            nodes = {node for _, node in found.values()}
            cut_off(world.cluster, nodes - cut)
            cut |= nodes
            ghosts |= {task: name for task, (name, _) in found.items()}
            wait_for_each(world, tasks, lambda task: state_of(world, run, task) == "success")
        yield Parted(world, run, ghosts)
    finally:
        rejoin(world.cluster, cut)
        world.remove_all()


def wait_for_each(world: World, tasks: Sequence[str], condition: Callable[[str], bool]) -> None:
    """Wait until a condition is true of each of some tasks."""
    until(lambda: all(map(condition, tasks)), world.cluster.limit)


def only_pod(world: World, task: str) -> tuple[str, str]:
    """Name and node of the only pod of a task."""
    stage, _, block = task.partition(".")
    wanted = {"chunkflow/stage": stage, "chunkflow/block": block}
    (pod,) = [pod for pod in world.cluster.pods(NAME) if wanted.items() <= pod["metadata"]["labels"].items()]
    return pod["metadata"]["name"], pod["spec"]["nodeName"]


def state_of(world: World, run: str, task: str) -> str | None:
    return world.volumes.now(NAME, run, task)[0]


class TestPodsThatGoOnWhereNobodySeesThem:
    """In this order: one run, then another model."""

    def test_others_have_done_their_blocks(self, parted: Parted) -> None:
        tasks = parted.world.volumes.tasks(NAME, parted.run)
        for task in PAUSED:
            assert tasks[task]["try_number"] == 1, "it was the node's fault"
            ends = parted.world.volumes.state(NAME, parted.run, task)["pod_ends"]
            assert [end["kind"] for end in ends] == ["node_lost", "done"]
            assert ends[0]["pod"] == parted.ghosts[task] != ends[1]["pod"]
            if double := parted.world.cluster.double:
                stage, _, block = task.partition(".")
                assert double.most_running({"chunkflow/stage": stage, "chunkflow/block": block}) == 2
        assert parted.core("verify", "--seams", "0") == 65, "the last block is missing yet"

    def test_they_end_while_the_run_is_at_work(self, parted: Parted) -> None:
        before = parted.receipts()
        for task in ("infer.0_0_0", "infer.0_0_1"):
            parted.let_go(task, "patches inferred")
        assert parted.receipts() > before

    def test_their_receipts_count_once(self, parted: Parted) -> None:
        world = parted.world
        until(lambda: state_of(world, parted.run, GATE) in ("running", "deferred"), world.cluster.limit)
        world.let_go(NAME, GATE)
        assert world.volumes.wait(NAME, parted.run, world.cluster.limit) == "success"
        until(lambda: "4 of 4 blocks inferred, 3 blended" in world.volumes.log(NAME, parted.run, "summary", 1), 60)
        self.check_right(parted)

    def test_one_ends_after_the_run(self, parted: Parted) -> None:
        parted.let_go("blend.0_0_1", "blended")
        self.check_right(parted)

    def test_one_writes_nothing_once_another_model_has_the_output(self, parted: Parted) -> None:
        assert parted.core("run", *OTHER_MODEL, "--overwrite", "--seams", "0") == 0
        output = parted.output()
        receipts = parted.receipts()
        parted.let_go("infer.0_1_1", TAKEN)
        assert parted.output() == output
        assert parted.receipts() == receipts
        assert parted.core("verify", *OTHER_MODEL, "--seams", "0") == 0

    def test_what_one_was_just_writing_is_noticed_and_repaired(self, parted: Parted) -> None:
        output, receipts = parted.output(), parted.receipts()
        parted.let_go("infer.0_1_0", TAKEN)
        damaged = parted.output()
        assert {name for name, content in damaged.items() if output[name] != content}
        assert parted.receipts() == receipts
        assert parted.core("verify", *OTHER_MODEL, "--seams", "0") == 65
        assert parted.core("run", *OTHER_MODEL, "--check-input", "--seams", "0") == 0
        assert parted.output() == output
        assert parted.core("verify", *OTHER_MODEL, "--seams", "1", "--deep") == 0

    def check_right(self, parted: Parted) -> None:
        """Check the output to the bit, that ``verify`` finds nothing, and that nothing is due."""
        spec = parted.spec
        np.testing.assert_array_equal(Workspace(spec).output.read(spec.grid.roi), parted.right)
        assert parted.core("verify", "--seams", "1", "--deep") == 0
        assert parted.core("plan", "--check-input") == 0
