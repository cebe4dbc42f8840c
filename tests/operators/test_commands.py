"""What the tasks of a volume's DAG run, without Airflow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from chunkflow_core.errors import ChunkflowError, UsageError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.spec import load_spec
from operators.commands import (
    Blend,
    Cleanup,
    Command,
    Infer,
    Prepare,
    Publish,
    Result,
    Select,
    SkippedError,
    Verify,
    json_of,
)
from operators.request import DEFAULTS


@dataclass
class PlainRun:
    """A run of a DAG that is none of Airflow's."""

    grid: BlockGrid
    id: str = "manual__1"
    params: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)
    settings: list[str] = field(default_factory=list)
    reasons: Mapping[str, str] | None = None
    other: str | None = None
    scheduler: str = "a_dag at http://here"
    first_try: bool = True
    is_alone: bool = True

    def other_at_work(self) -> str | None:
        return self.other

    def asked(self, **params: Any) -> PlainRun:
        """The run, with these parameters."""
        self.params = DEFAULTS | params
        return self


@pytest.fixture
def run(make_spec: Callable[..., Path]) -> PlainRun:
    return PlainRun(load_spec(make_spec()).grid)


BLOCK = (0, 1, 0)
INFER = ["chunkflow_core.inference_and_donate", "SPEC", "--block", "0", "1", "0", "--run", "manual__1"]
BLEND = ["chunkflow_core.receive_and_blend", *INFER[1:]]
BEGUN = ["--run", "manual__1", "--scheduler", "a_dag at http://here"]


@pytest.mark.parametrize(
    ("reasons", "infer", "blend"),
    [
        (None, [], []),  # no volume's DAG: the receipts decide
        ({}, ["--reason", "forced"], []),  # cleared by a user, though up to date
        ({"0_0_0": "input"}, ["--reason", "forced"], []),
        ({"0_1_0": "new"}, ["--reason", "new"], ["--reason", "new"]),
        ({"0_1_0": "input"}, ["--reason", "input"], ["--reason", "input"]),
        ({"0_1_0": "donations"}, ["--reason", "donations"], ["--reason", "donations"]),
        ({"0_1_0": "forced"}, ["--reason", "forced"], ["--reason", "forced"]),
    ],
)
def test_the_reason_of_the_selection_goes_to_the_stages(
    run: PlainRun, reasons: dict[str, str] | None, infer: list[str], blend: list[str]
) -> None:
    run.reasons = reasons
    assert Infer(BLOCK).line("SPEC", run) == INFER + infer
    assert Blend(BLOCK).line("SPEC", run) == BLEND + blend


def test_what_the_preparation_has_found_comes_before_the_options(run: PlainRun) -> None:
    run.settings = ["roi=[[0, 0, 0], [1, 2, 3]]", "input.bounds=null"]
    assert Cleanup().line("SPEC", run) == [
        *("chunkflow_core", "cleanup", "SPEC"),
        *("--set", "roi=[[0, 0, 0], [1, 2, 3]]", "--set", "input.bounds=null"),
        *("--run", "manual__1"),
    ]


@pytest.mark.parametrize(("first_try", "is_alone"), [(True, True), (True, False), (False, False)])
def test_what_another_run_has_left_is_taken_over_where_none_is_at_work(
    run: PlainRun, *, first_try: bool, is_alone: bool
) -> None:
    """A task of an earlier run may be cleared after a later one has failed."""
    run.first_try, run.is_alone = first_try, is_alone
    assert Infer(BLOCK).line("SPEC", run) == INFER
    run.first_try, run.is_alone = False, True
    assert Infer(BLOCK).line("SPEC", run) == INFER + BEGUN[2:]
    assert Blend(BLOCK).line("SPEC", run) == BLEND + BEGUN[2:]


def test_a_block_that_the_run_does_not_know_is_skipped(run: PlainRun) -> None:
    for stage in (Infer, Blend):
        stage((9, 9, 9)).check(run)
        stage(BLOCK).check(run)
    run.settings = ["input.bounds=null"]
    Infer(BLOCK).check(run)
    with pytest.raises(SkippedError, match="the volume has grown since this run began"):
        Infer((9, 9, 9)).check(run)


@pytest.mark.parametrize(
    ("command", "asked", "line"),
    [
        (Prepare(), {}, ["prepare", "SPEC", "--once", *BEGUN, "--json"]),
        (Prepare(), {"other_model": "mixture"}, ["prepare", "SPEC", "--once", *BEGUN, "--json", "--accept-mixture"]),
        (Select(), {}, ["plan", "SPEC", "--run", "manual__1", "--json", "--check-input"]),
        (
            Select(),
            {"force": True, "check_input": False, "x_stop": 5},
            ["plan", "SPEC", "--bbox", "0", "0", "0", "20", "48", "5", "--run", "manual__1", "--json", "--force"],
        ),
        (Select(), {"only_repair": True}, ["repair", "SPEC", "--run", "manual__1", "--json"]),
        (Verify(), {}, ["-v", "verify", "SPEC", "--run", "manual__1"]),
        (Verify(), {"only_repair": True}, ["-v", "verify", "SPEC", "--run", "manual__1", "--begun"]),
        (Publish(None), {}, ["report", "SPEC", "--run", "manual__1", "--publish", "--json"]),  # type: ignore[arg-type]
    ],
)
def test_what_is_asked_of_the_run_is_told_to_the_steps(
    run: PlainRun, command: Command, asked: dict[str, Any], line: list[str]
) -> None:
    assert command.line("SPEC", run.asked(**asked)) == ["chunkflow_core", *line]


def test_a_run_that_can_not_be_meant_is_not_begun(run: PlainRun) -> None:
    with pytest.raises(UsageError, match="x start 3 is not below x stop 3"):
        Prepare().check(run.asked(x_start=3, x_stop=3))


def test_of_two_runs_the_second_gives_way(run: PlainRun) -> None:
    Prepare().check(run)
    run.other = "scheduled__2"
    with pytest.raises(ChunkflowError, match="run scheduled__2 of this volume is at work") as refused:
        Prepare().check(run)
    assert not isinstance(refused.value, UsageError), "a retry may help"


def test_the_preparation_gives_what_all_tasks_look_at(run: PlainRun) -> None:
    output = 'a line\n{"roi": [[0, 0, 0], [1, 2, 3]], "input_bounds": null, "voxels": 6}\n'
    assert Prepare().result(output, run) == Result({"roi": [[0, 0, 0], [1, 2, 3]], "input.bounds": None})


def plan(**changes: Any) -> str:
    found = {"infer": [], "blend": [], "up_to_date": [], "unpublished": False, "why": {}}
    return json.dumps(found | changes)


def test_what_is_not_due_is_skipped(run: PlainRun) -> None:
    why = {"0_0_0": "new"}
    result = Select().result(plan(infer=[[0, 0, 0]], blend=[[0, 0, 1]], up_to_date=[[1, 1, 1]], why=why), run)
    assert result.value == {"up_to_date": 1, "why": why}
    grid = run.grid
    stages = {f"infer.{z}_{y}_{x}" for z, y, x in grid.indices()}
    stages |= {f"blend.{z}_{y}_{x}" for z, y, x in grid.indices() if grid.donors((z, y, x))}
    assert set(result.skipped_tasks) == stages - {"infer.0_0_0", "blend.0_0_1"}
    assert result.message == "1 blocks to infer, 1 to blend; 13 tasks skipped"


def test_with_nothing_due_only_what_was_not_told_is_looked_at(run: PlainRun) -> None:
    assert {"verify", "publish"} <= set(Select().result(plan(), run).skipped_tasks)
    assert not {"verify", "publish"} & set(Select().result(plan(unpublished=True), run).skipped_tasks)


def test_the_report_goes_with_the_event(run: PlainRun) -> None:
    keys = ("run", "fingerprint", "output", "bounding_box", "changed_blocks", "manifest", "picture")
    report = dict.fromkeys(keys, "x") | {"changed_blocks": [[0, 0, 0]], "voxels": 8}
    result = Publish(None).result(json.dumps(report), run)  # type: ignore[arg-type]
    assert result.value == report
    assert result.event == {key: report[key] for key in keys}
    assert not result.skipped_because
    unchanged = Publish(None).result(json.dumps(report | {"changed_blocks": []}), run)  # type: ignore[arg-type]
    assert unchanged.skipped_because == "nothing has changed, so nobody is told"


def test_an_output_without_the_line_is_an_error_that_a_retry_may_cure() -> None:
    assert json_of('{"a": 1}\n{"a": 2}\nthe end') == {"a": 2}
    with pytest.raises(ChunkflowError, match="its log was lost"):
        json_of("the end\n")


def test_commands_do_not_change() -> None:
    infer = Infer(BLOCK)
    assert infer == Infer(BLOCK)
    with pytest.raises(FrozenInstanceError):
        infer.block = (0, 0, 0)  # type: ignore[misc]


def test_commands_need_no_airflow() -> None:
    code = (
        "import sys, operators.commands; print([name for name in sys.modules if name.partition('.')[0] == 'airflow'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
