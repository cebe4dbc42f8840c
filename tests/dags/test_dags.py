"""The DAGs that are generated from specs, without running them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from airflow.sdk import DAG

import dags
from chunkflow_core.errors import ChunkflowError
from chunkflow_core.spec import load_spec
from operators.base import BOX_PARAMS, RUNNER_PARAMS, blend_task_id, infer_task_id
from operators.dag import volume_dag
from operators.local import InferenceAndDonateOperator
from operators.specs import volume_dags

DAGS = Path(dags.__file__).parent


@pytest.fixture
def dag(make_spec: Callable[..., Path]) -> DAG:
    path = make_spec()
    return volume_dag(load_spec(path), path)


def test_a_blend_waits_for_its_donors_and_nothing_else(dag: DAG, make_spec: Callable[..., Path]) -> None:
    grid = load_spec(make_spec()).grid
    for index in grid.indices():
        assert dag.get_task(infer_task_id(index)).upstream_task_ids == {"select_blocks"}
        if any(index):
            donors = {infer_task_id(donor) for donor in grid.donors(index)}
            assert dag.get_task(blend_task_id(index)).upstream_task_ids == donors
            assert dag.get_task(blend_task_id(index)).downstream_task_ids == {"verify"}
    assert "blend.0_0_0" not in dag.task_ids, "the first block receives nothing"
    assert len(dag.task_ids) == 8 + 7 + 5
    assert dag.get_task("verify").upstream_task_ids == {"infer.0_0_0"} | {
        blend_task_id(index) for index in grid.indices() if any(index)
    }


@pytest.mark.parametrize(("parallel", "share"), [(1, "12"), (3, "4"), (None, "1")])
def test_tasks_that_may_run_at_once_share_the_cpus(
    make_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, parallel: int | None, share: str
) -> None:
    path = make_spec(runner={"kind": "local", "parallel": parallel})
    monkeypatch.setenv("CHUNKFLOW_CPUS", "12")
    task = volume_dag(load_spec(path), path).get_task("infer.0_0_0")
    assert isinstance(task, InferenceAndDonateOperator)
    assert task.environment == {"CHUNKFLOW_CPUS": share}


def test_finishing_goes_before_starting(dag: DAG) -> None:
    weights = {
        stage: [t.priority_weight for t in dag.tasks if t.task_id.startswith(stage)] for stage in ("infer", "blend")
    }
    assert min(weights["blend"]) > max(weights["infer"])
    assert dag.get_task("infer.0_0_0").priority_weight > dag.get_task("infer.1_1_1").priority_weight


def test_layers_are_groups(dag: DAG) -> None:
    assert set(dag.task_group_dict) == {"z_0", "z_1"}
    assert "infer.1_0_1" in dag.task_group_dict["z_1"].children


def test_the_form_knows_the_volume(dag: DAG) -> None:
    schema = dag.params.get_param("y_stop").schema
    assert (schema["minimum"], schema["maximum"]) == (0, 48)
    assert {*BOX_PARAMS, "force"} == set(dag.params)


def test_the_form_of_a_volume_on_a_cluster_has_what_pods_are_like(make_spec: Callable[..., Path]) -> None:
    path = make_spec(runner={"kind": "kubernetes", "image": "lab/worker:1", "infer": {"memory": "3Gi"}})
    dag = volume_dag(load_spec(path), path)
    assert {*BOX_PARAMS, "force", *RUNNER_PARAMS} == set(dag.params)
    assert dag.params.get_param("spot").schema["enum"] == [None, "never", "allowed", "required"]
    assert "3Gi" in dag.params.get_param("infer_memory").description


@pytest.mark.parametrize("runner", [{"kind": "local"}, {"kind": "kubernetes", "image": "lab/worker:1"}])
def test_a_task_process_builds_its_own_task_only(make_spec: Callable[..., Path], runner: dict[str, str]) -> None:
    path = make_spec(runner=runner)
    full = volume_dag(load_spec(path), path)
    for task_id in full.task_ids:
        lean = volume_dag(load_spec(path), path, only_task=task_id)
        assert lean.task_ids == [task_id]
        assert type(lean.get_task(task_id)) is type(full.get_task(task_id))
        assert lean.get_task(task_id).priority_weight == full.get_task(task_id).priority_weight


def test_parsing_imports_neither_torch_nor_cloudvolume(make_spec: Callable[..., Path]) -> None:
    folder = make_spec().parent
    code = (
        "import runpy, sys\n"
        f"found = runpy.run_path({str(DAGS / 'chunkflow_volumes.py')!r})\n"
        "assert found['dag_small'].dag_id == 'small'\n"
        "print({'torch', 'cloudvolume', 'cloudfiles', 'matplotlib'} & set(sys.modules))\n"
    )
    environment = {"CHUNKFLOW_VOLUMES": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().splitlines()[-1:] == ["set()"], done.stderr


def test_one_bad_spec_leaves_the_others_alone(make_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_spec()
    (good.parent / "bad.yaml").write_text(good.read_text().replace("patch_overlap", "patch_overlapp"))
    (good.parent / "late.yaml").write_text(good.read_text().replace("name: small", "name: late\nschedule: never"))
    (good.parent / "twin.yaml").write_text(good.read_text())
    many = good.read_text().replace("name: small", "name: many").replace("- 24\n- 24", "- 12\n- 12")
    (good.parent / "many.yaml").write_text(many + "roi: [[0, 0, 0], [20, 48, 40]]\n")
    monkeypatch.setenv("CHUNKFLOW_VOLUMES", str(good.parent))

    made = list(volume_dags(DAGS / "volumes"))

    assert [dag.dag_id for dag in made if isinstance(dag, DAG)] == ["many", "small"]
    errors = [str(error) for error in made if isinstance(error, ChunkflowError)]
    assert len(errors) == 3
    assert "bad.yaml: patch_overlapp: unknown key; did you mean patch_overlap?" in errors[0]
    assert "late.yaml" in errors[1]
    assert "never" in errors[1]
    assert "twin.yaml: name: small is the name of" in errors[2]


def test_too_many_blocks_for_a_dag(make_spec: Callable[..., Path]) -> None:
    path = make_spec(
        patch_size=[1, 1, 1], patch_overlap=[0, 0, 0], block_size=[1, 1, 1], output={"path": "file:///nowhere/output"}
    )
    with pytest.raises(ChunkflowError, match="38400 blocks, expected at most 1000"):
        volume_dag(load_spec(path), path)
