"""What commands ask of Airflow, and what they give to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, DownstreamTasksSkipped

from chunkflow_core.errors import SpecError, StorageError, UsageError
from operators import InferenceAndDonateOperator, ReceiveAndBlendOperator
from operators.command_operator import FAILURE, AirflowRun, failure_reported
from operators.commands import Publish, Result, Select, SkippedError
from operators.request import DEFAULTS


class Task:
    """A task instance whose requests to Airflow are counted."""

    def __init__(self, **given: Any) -> None:
        self.given, self.asked, self.pushed = given, [], {}  # type: ignore[var-annotated]

    def xcom_pull(self, task_ids: str) -> Any:
        self.asked.append(task_ids)
        return self.given.get(task_ids)

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


def context(task: Task, **params: Any) -> Any:
    return {"ti": task, "run_id": "manual__1", "params": params}


def test_a_run_of_ones_own_dag_asks_nothing_of_airflow(make_spec: Callable[..., Path]) -> None:
    task = Task(prepare="the last line of a command", select_blocks={"why": {"0_0_0": "new"}})
    run = AirflowRun(context(task, force="with me"), str(make_spec()), in_volume_dag=False)
    assert (run.id, run.settings, run.reasons, run.other_at_work()) == ("manual__1", [], None, None)
    assert run.params == DEFAULTS
    assert run.grid.shape == (2, 2, 2)
    assert not task.asked


def test_a_run_of_a_volume_asks_once(make_spec: Callable[..., Path]) -> None:
    task = Task(prepare={"roi": [[0, 0, 0], [12, 24, 40]]}, select_blocks={"why": {"0_0_0": "new"}})
    run = AirflowRun(context(task, **DEFAULTS), str(make_spec()), in_volume_dag=True)
    for _ in range(2):
        assert run.settings == ["roi=[[0, 0, 0], [12, 24, 40]]"]
        assert run.grid.shape == (1, 1, 2)
        assert run.reasons == {"0_0_0": "new"}
    assert task.asked == ["prepare", "select_blocks"]


def test_a_run_whose_tasks_have_given_nothing(make_spec: Callable[..., Path]) -> None:
    run = AirflowRun(context(Task()), str(make_spec()), in_volume_dag=True)
    assert run.settings == []
    assert run.reasons == {}


@pytest.mark.parametrize(
    ("error", "becomes", "told"),
    [
        (UsageError("can't be meant"), AirflowFailException, {FAILURE: "can't be meant"}),
        (StorageError("away"), StorageError, {FAILURE: "away"}),
        (ValueError(), ValueError, {FAILURE: "ValueError"}),
        (SkippedError("has grown"), AirflowSkipException, {}),
        (AirflowSkipException("skipped"), AirflowSkipException, {}),
    ],
)
def test_what_fails_is_left_to_the_summary(error: Exception, becomes: type[Exception], told: dict[str, str]) -> None:
    task = Task()
    with pytest.raises(becomes) as raised, failure_reported(context(task)):
        raise error
    assert str(raised.value) == str(error)
    assert task.pushed == told


def test_what_is_skipped_is_skipped_after_the_value_was_given() -> None:
    task, asset = Task(), Asset("file:///output")
    run = AirflowRun(context(task), "SPEC", in_volume_dag=True)
    with pytest.raises(DownstreamTasksSkipped) as skipped:
        run.use(Result({"up_to_date": 3}, skipped_tasks=("verify",)), Select())
    assert skipped.value.tasks == ["verify"]
    assert task.pushed == {"return_value": {"up_to_date": 3}}
    events: Any = {asset: type("Event", (), {})()}
    run = AirflowRun(context(task) | {"outlet_events": events}, "SPEC", in_volume_dag=True)
    with pytest.raises(AirflowSkipException, match="nobody is told"):
        run.use(Result({}, event={"run": "x"}, skipped_because="nobody is told"), Publish(asset))
    assert events[asset].extra == {"run": "x"}


@pytest.mark.parametrize("block", [(0, 0), (0, 0, -1), (0, 0, 1.0), "{{ params.block }}", None])
def test_a_block_that_is_no_index_is_refused(make_spec: Callable[..., Path], block: Any) -> None:
    with pytest.raises(SpecError, match=r"block: .*: expected the block's index, three integers"):
        InferenceAndDonateOperator(task_id="infer", spec=make_spec(), block=block)
    with pytest.raises(SpecError, match=r"block: .*: expected the block's index, three integers"):
        ReceiveAndBlendOperator(task_id="blend", spec=make_spec(), block=block)
