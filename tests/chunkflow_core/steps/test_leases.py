"""One run at a time is at work on an output; who has died is followed by the next."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from chunkflow_core import machine
from chunkflow_core.__main__ import main
from chunkflow_core.commands.stages import blend, infer
from chunkflow_core.errors import BusyError
from chunkflow_core.exchange import leases
from chunkflow_core.exchange.leases import Lease, held, refuse_beside_others
from chunkflow_core.machine import has_ended, this_process
from chunkflow_core.planning.planner import Request, plan
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.local import run_in_processes
from chunkflow_core.steps.workspace import Workspace
from tests.support.volume import files_below, output_of

MakeSpec = Callable[..., Path]
CLOCK = 1.8e9


@pytest.fixture
def path(make_spec: MakeSpec) -> Path:
    """The spec of a volume that is prepared."""
    path = make_spec()
    assert main(["prepare", str(path)]) == 0
    return path


@pytest.fixture
def spec(path: Path) -> VolumeSpec:
    return load_spec(path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock that leases look at, in seconds."""

    def set_clock(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: CLOCK + seconds)

    set_clock(0)
    return set_clock


def entries(spec: VolumeSpec) -> list[dict[str, Any]]:
    folder = Path(spec.output.path.removeprefix("file://")) / "leases"
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def test_one_run_at_a_time(spec: VolumeSpec) -> None:
    one, another = Lease(spec, "one"), Lease(spec, "another")
    one.take()
    with pytest.raises(BusyError, match=r"run one is at work there \(by .*last sign 0 s ago.*--take-over"):
        another.take()
    with pytest.raises(BusyError, match="run one is at work"):
        refuse_beside_others(spec)
    one.check()
    one.end()
    refuse_beside_others(spec)
    another.take()
    with pytest.raises(BusyError, match="run another is at work"):
        one.check()


def test_all_tasks_of_a_run_have_its_lease(spec: VolumeSpec) -> None:
    """Each in a process of its own; one that is left over from a run that has ended begins anew."""
    Lease(spec, "one").take()
    tasks = [Lease(spec, "one") for _ in range(3)]
    for task in tasks:
        task.check()
    assert len(entries(spec)) == 2, "one of the preparation, and the run's"
    tasks[0].end()
    tasks[1].check()
    with pytest.raises(BusyError, match="run one is at work"):
        Lease(spec, "another").take()


def test_of_several_that_begin_at_once_one_does(spec: VolumeSpec) -> None:
    barrier = Barrier(8)

    def begin(number: int) -> bool:
        lease = Lease(spec, f"run {number}")
        barrier.wait()
        try:
            lease.take()
        except BusyError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(begin, range(8))).count(True) == 1


def test_a_stage_that_begins_a_run_ends_it(path: Path) -> None:
    """It may be cleared when its run has ended, or run by hand. A run at work goes on."""
    spec, stage = load_spec(path), [str(path), "--block", "0", "0", "0", "--run", "one", "--force"]
    assert infer(stage) == 0
    assert entries(spec)[-1]["ended"]
    Lease(spec, "one").take()
    assert infer(stage) == 0
    assert entries(spec)[-1]["ended"] is None


@pytest.mark.parametrize("scheduler", ["", "a_dag at here"])
def test_a_run_that_gives_no_sign_counts_as_dead(
    spec: VolumeSpec, clock: Callable[[float], None], scheduler: str
) -> None:
    Lease(spec, "one", scheduler="a_dag at here").take()
    clock(899)
    if not scheduler:
        with pytest.raises(BusyError, match=r"last sign 899 s ago.* for 15 min"):
            Lease(spec, "another").take()
        clock(901)
    Lease(spec, "another", scheduler=scheduler).take()


def test_a_run_at_work_gives_signs(spec: VolumeSpec, clock: Callable[[float], None]) -> None:
    """Each look at the lease does, but not more often than needed."""
    one = Lease(spec, "one")
    one.take()
    clock(80)
    one.check()
    assert entries(spec)[-1]["sign"] == CLOCK
    clock(100)
    one.check()
    assert entries(spec)[-1]["sign"] == CLOCK + 100
    clock(990)
    with pytest.raises(BusyError):
        Lease(spec, "another").take()


def test_a_process_gives_signs_by_itself(spec: VolumeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch may take longer than a dead run is waited for."""
    monkeypatch.setattr(leases, "_OF_A_PROCESS", 0.4)
    with held(Lease(spec, "one", of_process=True)) as lease:
        lease.take()
        first = entries(spec)[-1]["sign"]
        end = time.monotonic() + 60
        while entries(spec)[-1]["sign"] < first + 1 and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(BusyError):
            Lease(spec, "another").take()
    assert entries(spec)[-1]["ended"] > first + 1


def test_who_is_taken_over_is_told_and_does_not_take_it_back(spec: VolumeSpec) -> None:
    """Neither by force, nor as a run of the same scheduler."""
    one = Lease(spec, "one", scheduler="a_dag at here")
    one.take()
    Lease(spec, "another").take(take_over=True)
    with pytest.raises(BusyError, match="run another is at work"):
        one.check()
    third = Lease(spec, "third", scheduler="a_dag at here")
    third.take(take_over=True)
    fourth = Lease(spec, "fourth", scheduler="a_dag at here")
    fourth.take()
    for lease in (one, third):
        with pytest.raises(BusyError, match="run fourth is at work"):
            lease.check()
    one.end()
    third.end()
    fourth.check()
    assert entries(spec)[-1]["ended"] is None


def test_an_error_ends_the_lease(spec: VolumeSpec) -> None:
    with pytest.raises(KeyboardInterrupt), held(Lease(spec, "one")) as lease:
        lease.take()
        raise KeyboardInterrupt
    assert entries(spec)[-1]["ended"]


def test_processes_of_this_machine_and_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    own = this_process()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = json.loads(subprocess.check_output([sys.executable, "-c", _TELL], text=True))
    try:
        assert not has_ended(own)
        assert has_ended(own | {"started": own["started"] - 100}), "another process has its number by now"
        assert {key: other[key] for key in other.keys() - {"pid", "started"}} == machine._machine()
        assert has_ended(other)
        for unlike in ("host", "machine", "processes"):
            assert not has_ended(other | {unlike: "another"})
        assert not has_ended({})
        known = machine._machine()
        for name, ended in (("one machine", True), ("", False)):
            monkeypatch.setattr(machine, "_machine", lambda name=name: known | {"machine": name})
            assert has_ended(own | {"machine": name, "boot": "an earlier one"}) is ended
    finally:
        child.communicate(b"\n")


_TELL = "import json; from chunkflow_core.machine import this_process; print(json.dumps(this_process()))"

SLOW = """
import time
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.05)
        return torch.sigmoid(x)

InstantiatedModel = Net()
"""


def test_commands_beside_a_run(make_spec: MakeSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They refuse, and change nothing; killed, the run is followed by the next one at once."""
    (tmp_path / "net.py").write_text(SLOW)
    path = make_spec(model={"engine": "pytorch", "path": "net.py", "threads": 1})
    assert main(["prepare", str(path)]) == 0
    run = [sys.executable, "-m", "chunkflow_core", "run", str(path), "--seams", "0"]
    process = subprocess.Popen([*run, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        spec = load_spec(path)
        end = time.monotonic() + 60
        while not list((tmp_path / "output").glob("4_4_40/*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        (name,) = [entry["run"] for entry in entries(spec) if not entry["ended"]]
        for command in ("run", "cleanup", "repair", "prepare"):
            assert main([command, str(path)]) == 75
            assert f"run {name} is at work there" in capsys.readouterr().err
        block = [str(path), "--block", "1", "1", "1"]
        for stage in (infer, blend):
            for of_a_run in ([], ["--run", "of another"]):
                assert stage([*block, *of_a_run]) == 75
                assert f"run {name} is at work there" in capsys.readouterr().err
        assert main(["plan", str(path)]) == main(["report", str(path)]) == 0, "questions may be asked"
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert main(["run", str(path), "--seams", "0"]) == 0
    assert main(["verify", str(path)]) == 0


def test_a_run_that_is_taken_over_writes_no_more(make_spec: MakeSpec, tmp_path: Path) -> None:
    path = make_spec()
    assert main(["prepare", str(path), "--run", "one"]) == 0
    spec = load_spec(path)
    workspace = Workspace(spec)
    workspace.lease = Lease(spec, "one")

    def taken_over() -> None:
        Lease(spec, "another").take(take_over=True)

    with pytest.raises(BusyError, match="run another is at work"):
        inference_and_donate(workspace, (0, 0, 0), run="one", patch_done=taken_over)
    assert not (tmp_path / "output" / "4_4_40").exists()

    due = plan(spec, Request(), workspace.state())
    before = files_below(tmp_path / "output")
    with pytest.raises(Exception, match="run another is at work"):
        list(run_in_processes(spec, due, "one", 2, leased=True))
    assert files_below(tmp_path / "output") == before


def test_a_run_from_its_preparation_to_its_cleaning_up(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Airflow does it: each task is a process, and names the run."""
    spec, text = load_spec(path), str(path)
    assert main(["prepare", text, "--run", "one", "--scheduler", "a_dag at here"]) == 0
    for index in spec.grid.indices():
        assert infer([text, "--block", *map(str, index), "--run", "one"]) == 0
    assert main(["run", text]) == 75
    assert "run one is at work" in capsys.readouterr().err
    assert main(["prepare", text, "--run", "two"]) == 75
    for index in spec.grid.indices():
        assert blend([text, "--block", *map(str, index), "--run", "one"]) == 0
    assert main(["cleanup", text, "--run", "one"]) == 0

    assert main(["prepare", text, "--run", "two", "--scheduler", "a_dag at here"]) == 0
    assert main(["prepare", text, "--run", "three", "--scheduler", "a_dag at there"]) == 75
    assert main(["prepare", text, "--run", "three", "--scheduler", "a_dag at here"]) == 0, "two has failed, as it knows"
    assert main(["run", text, "--take-over", "--seams", "0"]) == 0
    assert output_of(path).any()
    assert len(entries(spec)) == 2, "old ones are deleted"


def test_what_another_run_has_done_until_the_lease_is_taken_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run looks at the output, and takes the lease when another one has just ended."""
    take = Lease.take

    def another_run_before(lease: Lease, **options: Any) -> None:
        monkeypatch.undo()
        assert main(["run", str(path), "--seams", "0", "--set", "model.threads=2"]) == 0
        take(lease, **options)

    monkeypatch.setattr(Lease, "take", another_run_before)
    assert main(["run", str(path), "--seams", "0"]) == 78
    assert "--accept-mixture" in capsys.readouterr().err
    assert main(["run", str(path), "--seams", "0", "--set", "model.threads=2"]) == 0
    assert "8 up to date" in capsys.readouterr().out
