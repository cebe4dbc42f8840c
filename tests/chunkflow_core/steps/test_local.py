"""Blocks that fail hold up only those that need their donations.

They fail by an exception, by bad numbers or by the death of a process.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from select import select
from subprocess import DEVNULL, CompletedProcess, Popen

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.failures import BlocksFailedError
from chunkflow_core.steps.local import DueTasks, Task, run_here, run_in_processes
from chunkflow_core.steps.workspace import Workspace
from tests.support.random_examples import examples
from tests.support.volume import output_of, spec_content

MakeSpec = Callable[..., Path]
Command = Callable[..., CompletedProcess[str]]

ALL = [(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]

HELD = [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)]
"""Blocks whose frames need donations of (0, 0, 1)."""

GAP = "1 block failed, 3 more wait for it: 14,496 voxels of the output (37.8 % of the ROI) are not complete"
"""What is told if inference of (0, 0, 1) fails; computed by hand in test_failures.py."""

MODEL = """
import json, os, pathlib, signal

FOLDER = pathlib.Path(__file__).parent.parent  # what it reads there is no part of the model

def InstantiatedModel(x):
    patch = " ".join(str(round(float(voxel) * 255)) for voxel in x[0, 0, 0, 0, :8])
    with (FOLDER / "patches").open("a") as seen:
        seen.write(patch + "\\n")
    causes = FOLDER / "causes.json"
    what = json.loads(causes.read_text()).get(patch) if causes.exists() else None
    if what == "raises":
        raise ValueError("this patch is beyond me")
    if what == "no memory":
        raise MemoryError("no room for this patch")
    if what == "dies" or (what == "dies once" and not (FOLDER / what).exists()):
        (FOLDER / what).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x * float("nan") if what == "NaN" else x
"""


class Trouble:
    """A prepared volume with a model that fails at one patch of some blocks."""

    def __init__(self, make_spec: MakeSpec, **changes: object) -> None:
        self.path = make_spec(model={"engine": "pytorch", "path": "model/model.py"}, **changes)
        self.folder = self.path.parent
        (self.folder / "model").mkdir()
        (self.folder / "model" / "model.py").write_text(MODEL)
        assert main(["prepare", str(self.path)]) == 0
        (self.folder / "patches").unlink()
        self.spec: VolumeSpec = load_spec(self.path)

    def cause(self, **blocks: str) -> None:
        """Let the model do something at a patch of some blocks, given by block name.

        It is a block's last patch, so that some of the block is done already.
        """
        (self.folder / "causes.json").write_text(
            json.dumps({self.patches(vector(map(int, name[1:].split("_"))))[-1]: what for name, what in blocks.items()})
        )

    def cured(self) -> None:
        (self.folder / "causes.json").unlink()

    def patches(self, index: Vector) -> list[str]:
        """A block's patches, as the model knows them."""
        block, layer, found = self.spec.grid.block(index), Workspace(self.spec).input, []
        for position in np.ndindex(*(b - a for a, b in zip(block.first_patch, block.stop_patch, strict=True))):
            z, y, x = self.spec.grid.patch_box(tuple(np.add(block.first_patch, position))).start
            found.append(" ".join(map(str, layer.read(Box((z, y, x), (z + 1, y + 1, x + 8)))[0, 0, 0])))
        return found

    def times_run(self) -> Counter[str]:
        """How often each patch has been run."""
        return Counter((self.folder / "patches").read_text().splitlines())

    def due(self) -> Plan:
        return plan(self.spec, Request(), Workspace(self.spec).state())

    def run(self, workers: int, done: list[Task]) -> None:
        """All that is due; ``done`` gets what has ended well."""
        steps = (
            run_here(Workspace(self.spec), self.due(), "test", lambda: None)
            if workers == 1
            else run_in_processes(self.spec, self.due(), "test", workers)
        )
        for task, _ in steps:
            done.append(task)

    def fail(self, workers: int) -> tuple[list[Task], BlocksFailedError]:
        """Run; what has ended well, and the error."""
        done: list[Task] = []
        with pytest.raises(BlocksFailedError) as caught:
            self.run(workers, done)
        return done, caught.value

    def output(self) -> NDArray[np.generic]:
        return Workspace(self.spec).output.read(self.spec.grid.roi)


@pytest.fixture
def trouble(make_spec: MakeSpec) -> Trouble:
    return Trouble(make_spec)


@pytest.fixture(scope="module")
def undisturbed(random_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.generic]:
    """The output of the same volume and, in effect, the same model."""
    folder = tmp_path_factory.mktemp("undisturbed")
    content = spec_content(random_layer, folder) | {
        "output": {"path": f"file://{folder}/output", "chunk_size": [6, 12, 12]}
    }
    path = folder / "spec.yaml"
    path.write_text(json.dumps(content))
    assert main(["prepare", str(path)]) == 0
    workspace = Workspace(load_spec(path))
    everything = plan(workspace.spec, Request(), workspace.state())
    assert len(list(run_here(workspace, everything, "undisturbed", lambda: None))) == 15
    return output_of(path)


def tasks(infer: Iterable[Vector], blend: Iterable[Vector]) -> set[Task]:
    return {("infer", b) for b in infer} | {("blend", b) for b in blend}


def but(blocks: Iterable[Vector], *others: Vector) -> list[Vector]:
    return [b for b in blocks if b not in others]


INDEPENDENT = tasks(but(ALL, (0, 0, 1)), but(ALL, (0, 0, 0), *HELD))
"""What does not need the inference of (0, 0, 1)."""
REST = tasks([(0, 0, 1)], HELD)


@pytest.mark.parametrize(
    ("what", "code", "reason"),
    [
        ("raises", 65, "data that can't be right: the model failed with a batch of shape (1, 1, 8, 16, 16) "),
        ("NaN", 65, "data that can't be right: the model gave NaN or infinity "),
        ("no memory", 1, "unforeseen error: MemoryError: no room for this patch. Waiting"),
    ],
)
def test_a_block_that_fails_holds_only_its_receivers(
    trouble: Trouble,
    undisturbed: NDArray[np.generic],
    caplog: pytest.LogCaptureFixture,
    what: str,
    code: int,
    reason: str,
) -> None:
    trouble.cause(b0_0_1=what)

    done, error = trouble.fail(1)

    assert set(done) == INDEPENDENT and len(done) == len(INDEPENDENT)
    head, line, advice = str(error).splitlines()
    assert head == GAP
    assert line.startswith(f"  inference of block (0, 0, 1), z 0–12 y 0–24 x 24–40: {reason}")
    assert line.endswith(". Waiting for it: (0, 1, 1), (1, 0, 1), (1, 1, 1)")
    assert "run again to do only what is missing" in advice
    assert error.exit_code == code
    assert ("Traceback" in caplog.text) == (code == 1), "only for the unforeseen"
    left = trouble.due()
    assert tasks(left.infer, left.blend) == REST

    trouble.cured()
    again: list[Task] = []
    trouble.run(1, again)

    assert set(again) == REST and len(again) == len(REST)
    np.testing.assert_array_equal(trouble.output(), undisturbed)


def test_processes_that_die_take_no_other_block_with_them(
    trouble: Trouble, undisturbed: NDArray[np.generic], caplog: pytest.LogCaptureFixture
) -> None:
    """One process dies whenever it gets to a patch, another only once.

    The latter is as when memory was short because of the others.
    """
    trouble.cause(b0_0_0="dies once", b0_0_1="dies")

    done, error = trouble.fail(2)

    assert set(done) == INDEPENDENT and len(done) == len(INDEPENDENT)
    assert "infer of block (0, 0, 0) was killed, it is tried again alone" in caplog.text
    assert ("infer", (0, 0, 0)) in done[6:], "when all other inference was done"
    head, line, _ = str(error).splitlines()
    assert head == GAP
    assert line.startswith(
        "  inference of block (0, 0, 1), z 0–12 y 0–24 x 24–40: killed: its worker process died twice"
    )
    assert "memory" in line
    assert error.exit_code == 75
    seen = trouble.times_run()
    assert {seen[patch] for index in ALL[2:] for patch in trouble.patches(index)} == {1}
    assert [seen[trouble.patches(index)[-1]] for index in ALL[:2]] == [2, 2], "once beside others, once alone"
    left = trouble.due()
    assert tasks(left.infer, left.blend) == REST

    trouble.cured()
    again: list[Task] = []
    trouble.run(1, again)

    assert set(again) == REST
    np.testing.assert_array_equal(trouble.output(), undisturbed)


@pytest.mark.parametrize("workers", [1, 2])
def test_several_failures_of_several_kinds(trouble: Trouble, caplog: pytest.LogCaptureFixture, workers: int) -> None:
    """What can't be cured by a retry decides, wherever it comes."""
    trouble.cause(b0_0_0="no memory", b1_1_0="NaN", b1_1_1="no memory")

    done, error = trouble.fail(workers)

    assert error.exit_code == 65
    assert set(done) == tasks(but(ALL, (0, 0, 0), (1, 1, 0), (1, 1, 1)), [])
    assert caplog.text.count("Traceback") == 2 and caplog.text.count('raise MemoryError("no room') == 2
    head, *told, _ = str(error).splitlines()
    # all but the cores of the five blocks that were inferred, (0, 0, 1) to (1, 0, 1)
    cores = 12 * 24 * 4 + 12 * 12 * 24 + 12 * 12 * 4 + 2 * 24 * 24 + 2 * 24 * 4
    assert head.startswith(f"3 blocks failed, 5 more wait for them: {38400 - cores:,} voxels of the output (")
    assert sorted(line.split(", z ")[0] for line in told) == [
        f"  inference of block {index}" for index in [(0, 0, 0), (1, 1, 0), (1, 1, 1)]
    ]


def test_storage_trouble_while_blending_is_worth_a_retry(trouble: Trouble, undisturbed: NDArray[np.generic]) -> None:
    """Something is in the way of a storage chunk of the frame of (0, 0, 1)."""
    (scale,) = json.loads((trouble.folder / "output" / "info").read_text())["scales"]
    obstacle = trouble.folder / "output" / scale["key"] / "24-36_0-12_0-6.gz"
    (obstacle / "in the way").mkdir(parents=True)

    done, error = trouble.fail(1)

    assert error.exit_code == 75
    assert set(done) == tasks(ALL, but(ALL, (0, 0, 0), (0, 0, 1)))
    head, line, _ = str(error).splitlines()
    assert head == "1 block failed: 3,456 voxels of the output (9 % of the ROI) are not complete"
    assert line.startswith("  blending of block (0, 0, 1), z 0–12 y 0–24 x 24–40: storage or network trouble: ")

    (obstacle / "in the way").rmdir()
    obstacle.rmdir()
    again: list[Task] = []
    trouble.run(1, again)

    assert again == [("blend", (0, 0, 1))]
    np.testing.assert_array_equal(trouble.output(), undisturbed)


def test_the_command_ends_with_the_exit_code_and_without_a_traceback(trouble: Trouble, chunkflow: Command) -> None:
    trouble.cause(b0_0_1="NaN")

    outcome = chunkflow("run", trouble.path)

    assert outcome.returncode == 65
    assert f"error: {GAP}\n  inference of block (0, 0, 1), " in outcome.stderr
    assert "verified" not in outcome.stdout

    trouble.cured()
    outcome = chunkflow("run", trouble.path, "--seams", 4)
    assert outcome.returncode == 0, outcome.stderr
    assert "1 blocks to infer, 4 to blend, 4 up to date" in outcome.stdout


WAITING = """
import multiprocessing, os, pathlib

FOLDER = pathlib.Path(__file__).parent

def InstantiatedModel(x):
    if multiprocessing.parent_process() is not None:
        with (FOLDER / "begun").open("w") as begun:
            begun.write(f"{os.getpid()} {os.getppid()}\\n")
            begun.flush()
            (FOLDER / "never").open()
    return x
"""
"""A model that, in a worker, says so in a pipe and waits for ever at another."""


def test_workers_are_forked_from_a_warm_process_and_none_outlives_the_command(make_spec: MakeSpec) -> None:
    path = make_spec(model={"engine": "pytorch", "path": "model.py", "streams": 1})
    folder = path.parent
    (folder / "model.py").write_text(WAITING)
    for pipe in ("begun", "never"):
        os.mkfifo(folder / pipe)
    command = [sys.executable, "-m", "chunkflow_core", "run", str(path), "--workers", "2"]
    begun, told = os.open(folder / "begun", os.O_RDWR), b""
    with Popen(command, stdout=DEVNULL, stderr=DEVNULL) as process:
        try:
            while told.count(b"\n") < 2:
                assert select([begun], [], [], 120)[0]
                told += os.read(begun, 1000)
            (one, warm), (other, its_parent) = (map(int, line.split()) for line in told.splitlines())
            assert one != other and warm == its_parent != process.pid
            threads = list(Path(f"/proc/{warm}/task").iterdir())
            assert len(threads) == 1, (
                "others would be missing in a forked process, and what they have locked stay locked"
            )
            assert "libtorch_cpu" in Path(f"/proc/{warm}/maps").read_text()
            ends = [os.pidfd_open(pid) for pid in (one, other, warm)]
        finally:
            process.kill()
    assert all(select([end], [], [], 60)[0] for end in ends)
    for descriptor in (begun, *ends):
        os.close(descriptor)


def test_a_volume_of_a_single_block(make_spec: MakeSpec) -> None:
    trouble = Trouble(make_spec, block_size=[24, 48, 48])
    trouble.cause(b0_0_0="NaN")

    done, error = trouble.fail(1)

    assert done == []
    head, line, _ = str(error).splitlines()
    assert head == "1 block failed: 38,400 voxels of the output (100 % of the ROI) are not complete"
    assert line.startswith(
        "  inference of block (0, 0, 0), z 0–20 y 0–48 x 0–40: data that can't be right: the model gave NaN"
    )
    assert line.endswith("expected values within output.range [0, 1]")


@examples(200)
@given(st.data())
def test_what_depends_on_a_failure_never_starts_and_all_else_does(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    overlap = data.draw(st.tuples(*[st.integers(0, 1)] * 3))
    roi, patch = Box((0, 0, 0), tuple(4 * n + 1 for n in shape)), tuple(4 + o for o in overlap)
    grid = BlockGrid(roi, patch, overlap, (4, 4, 4), (2, 2, 2))
    blocks = st.lists(st.sampled_from(list(grid.indices())), unique=True)
    infer = data.draw(blocks)
    blend = [b for b in data.draw(blocks) if grid.donors(b)]
    bad = (
        set(data.draw(st.lists(st.sampled_from(sorted(tasks(infer, blend))), unique=True))) if infer or blend else set()
    )
    schedule = DueTasks(grid, Plan(tuple(sorted(infer)), tuple(sorted(blend)), ()))
    running: list[Task] = []
    started: list[Task] = []
    done: set[Task] = set()

    def start() -> Iterator[Task]:
        while len(running) < data.draw(st.integers(1, 3)) and (task := schedule.next()):
            yield task

    while True:
        for task in start():
            assert task[0] == "infer" or done >= tasks(set(grid.donors(task[1])) & set(infer), [])
            running.append(task)
            started.append(task)
        if not running:
            break
        task = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if task in bad:
            schedule.failed(task)
        else:
            schedule.done(task)
            done.add(task)
    held = {("blend", b) for b in blend if any(("infer", d) in bad for d in grid.donors(b))}
    assert len(started) == len(set(started))
    assert set(started) == tasks(infer, blend) - held
    assert schedule.dropped == held
