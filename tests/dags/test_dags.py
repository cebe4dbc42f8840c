"""The DAGs that are generated from specs, without running them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, Asset, AssetAny, AssetOrTimeSchedule, BaseNotifier, CronTriggerTimetable
from airflow.sdk.definitions.timetables.assets import AssetTriggeredTimetable
from airflow.serialization.serialized_objects import DagSerialization

import dags
import operators
from chunkflow_core.errors import ChunkflowError, SpecError, UsageError
from chunkflow_core.spec import load_spec
from operators.commands import blend_task_id, infer_task_id
from operators.dag import volume_dag
from operators.local import ProcessOperator
from operators.request import BOX_PARAMS, RUNNER_PARAMS, check_request, requested_box
from operators.summary import figures_line, notifier_of, what_failed
from operators.volume_dags import volume_dags

DAGS = Path(dags.__file__).parent
OPTIONS = ("force", "check_input", "only_repair", "other_model")


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
            assert dag.get_task(blend_task_id(index)).downstream_task_ids == {"verify", "summary"}
    assert "blend.0_0_0" not in dag.task_ids, "the first block receives nothing"
    assert len(dag.task_ids) == 8 + 7 + 6
    assert dag.get_task("verify").upstream_task_ids == {"infer.0_0_0"} | {
        blend_task_id(index) for index in grid.indices() if any(index)
    }


def test_the_summary_is_the_only_leaf_and_waits_for_every_block(dag: DAG) -> None:
    assert dag.leaves == [dag.get_task("summary")]
    stages = {task for task in dag.task_ids if "." in task}
    assert dag.get_task("summary").upstream_task_ids == stages | {"cleanup"}
    assert dag.get_task("summary").trigger_rule == "all_done"


@pytest.mark.parametrize(("parallel", "share"), [(1, "12"), (3, "4"), (None, "1")])
def test_tasks_that_may_run_at_once_share_the_cpus(
    make_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, parallel: int | None, share: str
) -> None:
    path = make_spec(runner={"kind": "local", "parallel": parallel})
    monkeypatch.setenv("CHUNKFLOW_CPUS", "12")
    task = volume_dag(load_spec(path), path).get_task("infer.0_0_0")
    assert isinstance(task, ProcessOperator)
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
    ends = {name: dag.params.get_param(name).schema for name in ("y_start", "y_stop")}
    assert {name: (schema["minimum"], schema["maximum"]) for name, schema in ends.items()} == {
        "y_start": (0, 47),
        "y_stop": (1, 48),
    }
    assert {*BOX_PARAMS, *OPTIONS} == set(dag.params)
    assert {name: dag.params[name] for name in OPTIONS} == {
        "force": False,
        "check_input": True,
        "only_repair": False,
        "other_model": "refuse",
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"z_start": 5, "z_stop": 5}, "z start 5 is not below z stop 5; expected start < stop on every axis"),
        ({"x_stop": 3, "x_start": 4}, "x start 4 is not below x stop 3"),
        ({"z_start": 1, "other_model": "overwrite"}, "other model: overwrite does the whole volume again"),
        ({"force": True, "only_repair": True}, "force and only repair: expected one of them"),
    ],
)
def test_what_can_not_be_meant_is_refused(
    dag: DAG, make_spec: Callable[..., Path], wrong: dict[str, Any], said: str
) -> None:
    grid = load_spec(make_spec()).grid
    params = dict(dag.params.dump())
    check_request(params, grid)
    with pytest.raises(UsageError, match=said):
        check_request(params | wrong, grid)


def test_part_of_a_box_is_completed_by_the_roi(dag: DAG, make_spec: Callable[..., Path]) -> None:
    grid = load_spec(make_spec()).grid
    params = dict(dag.params.dump())
    assert requested_box(params, grid) == []
    assert requested_box(params | {"y_start": 0}, grid) == ["--bbox", "0", "0", "0", "20", "48", "40"]
    assert requested_box(params | {"y_stop": 7}, grid) == ["--bbox", "0", "0", "0", "20", "7", "40"]


def test_the_form_of_a_volume_on_a_cluster_has_what_pods_are_like(make_spec: Callable[..., Path]) -> None:
    path = make_spec(runner={"kind": "kubernetes", "image": "lab/worker:1", "infer": {"memory": "3Gi"}})
    dag = volume_dag(load_spec(path), path)
    assert {*BOX_PARAMS, *OPTIONS, *RUNNER_PARAMS} == set(dag.params)
    assert dag.params.get_param("spot").schema["enum"] == [None, "never", "allowed", "required"]
    assert "3Gi" in str(dag.params.get_param("infer_memory").description)


@pytest.mark.parametrize("runner", [{"kind": "local"}, {"kind": "kubernetes", "image": "lab/worker:1"}])
def test_a_task_process_builds_its_own_task_only(make_spec: Callable[..., Path], runner: dict[str, str]) -> None:
    path = make_spec(runner=runner)
    full = volume_dag(load_spec(path), path)
    for task_id in full.task_ids:
        lean = volume_dag(load_spec(path), path, only_task=task_id)
        assert lean.task_ids == [task_id]
        assert type(lean.get_task(task_id)) is type(full.get_task(task_id))
        assert lean.get_task(task_id).priority_weight == full.get_task(task_id).priority_weight


@pytest.mark.parametrize("runner", [{"kind": "local"}, {"kind": "kubernetes", "image": "lab/worker:1"}])
def test_airflow_shows_what_tasks_run(make_spec: Callable[..., Path], runner: dict[str, str]) -> None:
    path = make_spec(runner=runner)
    stored = DagSerialization.to_dict(volume_dag(load_spec(path), path))["dag"]["tasks"]
    tasks = {task["__var"]["task_id"]: task["__var"] for task in stored}
    shown = {name: task.get("_operator_name") for name, task in tasks.items() if not name.endswith("1")}
    assert shown == {
        "prepare": "prepare",
        "select_blocks": "plan",
        "verify": "verify",
        "publish": "report",
        "cleanup": "cleanup",
        "summary": None,
        **dict.fromkeys(("infer.0_0_0", "infer.0_1_0", "infer.1_0_0", "infer.1_1_0"), "infer"),
        **dict.fromkeys(("blend.0_1_0", "blend.1_0_0", "blend.1_1_0"), "blend"),
    }
    memory = ["memory"] if runner["kind"] == "kubernetes" else []
    assert tasks["infer.0_0_0"]["template_fields"] == ["spec", "block", *memory]
    assert tasks["prepare"]["template_fields"] == ["spec", *memory]
    assert tasks["infer.0_0_0"]["ui_color"] != tasks["blend.0_1_0"]["ui_color"]


def test_a_dag_of_ones_own_names_the_spec_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nix\.yaml"):
        operators.InferenceAndDonateOperator(task_id="infer", spec=tmp_path / "nix.yaml", block=(0, 0, 0))


def test_operators_are_imported_on_demand() -> None:
    code = "import sys, operators; print('airflow' in sys.modules); operators.ReceiveAndBlendOperator"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'NixOperator'"):
        operators.NixOperator  # noqa: B018


def test_parsing_imports_nothing_that_takes_long(make_spec: Callable[..., Path]) -> None:
    folder = make_spec().parent
    code = (
        "import runpy, sys\n"
        f"found = runpy.run_path({str(DAGS / 'chunkflow_volumes.py')!r})\n"
        "assert found['dag_small'].dag_id == 'small'\n"
        "print({'torch', 'cloudvolume', 'cloudfiles', 'matplotlib', 'kubernetes', 'numba'} & set(sys.modules))\n"
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


WRONG_PODS: dict[str, tuple[dict[str, Any], list[str]]] = {
    # case: (keys of the runner section), (what is said of each)
    "toleration": (
        {"infer": {"tolerations": [{"key": "gpu"}, {"efect": "NoSchedule"}]}},
        ["runner.infer.tolerations.1.efect: unknown key; did you mean effect?"],
    ),
    "affinity, and a toleration of the other stage": (
        {"blend": {"affinity": {"nodeAffinty": {}}}, "infer": {"tolerations": [{"key": 1}]}},
        [
            "runner.infer.tolerations.0.key: 1: expected a text; numbers and true, false, dates in quotes",
            "runner.blend.affinity.nodeAffinty: unknown key; did you mean nodeAffinity?",
        ],
    ),
    "template": (
        {"pod_template": "pod.yml"},
        ["runner.pod_template: pod.yml: spec.containers.0.args: remove it; the pod's step decides what"],
    ),
    "template that is not there": ({"pod_template": "nix.yml"}, ["runner.pod_template: cannot read "]),
}


@pytest.fixture
def specs_on_a_cluster(make_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a spec with such a runner section where the DAG files look for specs.

    A good local one lies beside it.
    """

    def make(name: str, **runner: Any) -> Path:
        path = make_spec(name=name, runner={"kind": "kubernetes", "image": "lab/worker:1", **runner})
        path = path.rename(path.with_name(f"{name}.yaml"))
        (path.parent / "pod.yml").write_text("{spec: {containers: [{name: base, args: [x]}]}}")
        make_spec()
        monkeypatch.setenv("CHUNKFLOW_VOLUMES", str(path.parent))
        return path

    return make


@pytest.mark.parametrize("case", WRONG_PODS)
def test_wrong_pods_are_told_by_the_dag_files(specs_on_a_cluster: Callable[..., Path], case: str) -> None:
    runner, said = WRONG_PODS[case]
    path = specs_on_a_cluster("far", **runner)

    found = runpy.run_path(str(DAGS / "chunkflow_volumes.py"))
    with pytest.raises(ImportError) as told:
        runpy.run_path(str(DAGS / "chunkflow_spec_errors.py"))

    assert sorted(name for name in found if name.startswith("dag_")) == ["dag_small"], "the other volume goes on"
    _, *lines = str(told.value).splitlines()
    assert len(lines) == len(said)
    for line, start in zip(lines, said, strict=True):
        assert line.startswith(f"{path}: {start}")


def test_good_pods_have_a_dag(specs_on_a_cluster: Callable[..., Path]) -> None:
    path = specs_on_a_cluster("far", infer={"tolerations": [{"key": "gpu"}]}, pod_template="good.yml")
    path.with_name("good.yml").write_text("{spec: {containers: [{name: base}]}}")
    runpy.run_path(str(DAGS / "chunkflow_spec_errors.py"))
    assert {"dag_far", "dag_small"} <= set(runpy.run_path(str(DAGS / "chunkflow_volumes.py")))


def test_a_task_process_does_not_check_its_pods_again(specs_on_a_cluster: Callable[..., Path]) -> None:
    path = specs_on_a_cluster("far", pod_template="pod.yml")
    assert volume_dag(load_spec(path), path, only_task="infer.0_0_0").task_ids == ["infer.0_0_0"]


def test_too_many_blocks_for_a_dag(make_spec: Callable[..., Path]) -> None:
    path = make_spec(
        patch_size=[1, 1, 1], patch_overlap=[0, 0, 0], block_size=[1, 1, 1], output={"path": "file:///nowhere/output"}
    )
    with pytest.raises(ChunkflowError, match="38400 blocks, expected at most 1000"):
        volume_dag(load_spec(path), path)


def scheduled(make_spec: Callable[..., Path], schedule: Any) -> Any:
    path = make_spec(schedule=schedule)
    return volume_dag(load_spec(path), path).timetable


def test_a_clock_starts_runs(make_spec: Callable[..., Path]) -> None:
    assert scheduled(make_spec, None).can_be_scheduled is False
    for text in ("0 3 * * 1", {"cron": "0 3 * * 1"}):
        plain = scheduled(make_spec, text)
        assert isinstance(plain, CronTriggerTimetable)
        assert (plain.expression, str(plain.timezone)) == ("0 3 * * 1", "UTC")
    zoned = scheduled(make_spec, {"cron": "@weekly", "timezone": "Europe/Zurich"})
    assert (zoned.expression, zoned.timezone) == ("0 0 * * 0", "Europe/Zurich")


def test_updates_of_layers_start_runs(make_spec: Callable[..., Path], random_layer: Path) -> None:
    own = Asset(f"file://{random_layer}")
    single = scheduled(make_spec, {"asset": "input"})
    assert isinstance(single, AssetTriggeredTimetable)
    assert single.asset_condition == own
    either = scheduled(make_spec, {"asset": ["input", "precomputed://gs://lab/mask/"]}).asset_condition
    assert isinstance(either, AssetAny)
    assert either.objects == (own, Asset("gs://lab/mask"))


def test_clock_and_updates_together(make_spec: Callable[..., Path], random_layer: Path) -> None:
    both = scheduled(make_spec, {"cron": "0 3 * * 1", "timezone": "Europe/Zurich", "asset": "input"})
    assert isinstance(both, AssetOrTimeSchedule)
    assert both.asset_condition == Asset(f"file://{random_layer}")
    assert both.timetable == CronTriggerTimetable("0 3 * * 1", timezone="Europe/Zurich")


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("never", 'schedule: "never": expected null, a cron expression such as'),
        ({"cron": "61 * * * *", "asset": "input"}, 'schedule: "61 \\* \\* \\* \\*": expected null, a cron expression'),
        ({"cron": "@once", "timezone": "Europe/Zurich"}, 'schedule: "@once": expected null, a cron expression'),
        (
            {"cron": "@daily", "timezone": "Mars/Base"},
            'schedule.timezone: "Mars/Base": expected the name of a time zone',
        ),
        ({"cron": "@daily", "timezone": "../x"}, 'schedule.timezone: "../x": expected the name of a time zone'),
        ({"timezone": "Europe/Zurich", "asset": "input"}, "schedule.timezone: only with cron"),
        ({}, "schedule.cron, asset: expected at least one of them"),
        ({"asset": "my_table"}, 'schedule.asset: "my_table": expected input, an address such as'),
        ({"asset": []}, "schedule.asset: \\[\\]: expected input, an address such as"),
        ({"corn": "@daily"}, "schedule.corn: unknown key; did you mean cron?"),
        (3, "schedule: 3: expected null, a cron expression such as"),
    ],
)
def test_a_wrong_schedule_names_file_and_key(make_spec: Callable[..., Path], schedule: Any, said: str) -> None:
    path = make_spec(schedule=schedule)
    with pytest.raises(SpecError, match=f"{path}: {said}"):
        volume_dag(load_spec(path), path)


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("file:///data/membrane", "file:///data/membrane"),
        ("precomputed://gs://bucket/em/membrane/", "gs://bucket/em/membrane"),
        ("gs://bucket", "gs://bucket/"),
        ("s3://https://minio.example.org/bucket/em", "s3://https://minio.example.org/bucket/em"),
        ("file:///data/größe 1", "file:///data/größe 1"),
        ("file:///data/a#1", "file:///data/a%231"),
        ("file:///data/a?b=1", "file:///data/a%3Fb=1"),
        ("gs://[odd/x", "gs://%5Bodd/x"),
        ("file:///[x]", "file:///[x]"),
    ],
)
def test_any_output_has_an_asset(make_spec: Callable[..., Path], path: str, uri: str) -> None:
    spec = make_spec(output={"path": path, "chunk_size": [6, 12, 12]})
    (asset,) = volume_dag(load_spec(spec), spec).get_task("publish").outlets
    assert asset.uri == uri
    if "%" not in uri:
        assert asset == Asset(path.removeprefix("precomputed://").rstrip("/")), "what anybody would write"


def test_no_run_can_overlap_another(make_spec: Callable[..., Path]) -> None:
    path = make_spec(schedule="@hourly")
    dag = volume_dag(load_spec(path), path)
    assert (dag.catchup, dag.max_active_runs) == (False, 1)
    kinds: Any = dag.allowed_run_types
    assert "backfill" not in {kind.value for kind in kinds}
    assert dag.get_task("prepare").max_active_tis_per_dag == 1


class Post(BaseNotifier):
    """A notifier; the addressee has to be given."""

    def __init__(self, addressee: str) -> None:
        super().__init__()
        self.addressee = addressee


SMTP = "airflow.providers.smtp.notifications.smtp.SmtpNotifier"


@pytest.mark.parametrize(
    ("notify", "said"),
    [
        ({}, "notify.notifier: missing; this key is required"),
        ({"notifier": "Slack"}, 'notify.notifier: "Slack": expected module and class'),
        ({"notifier": "no.such.Thing"}, "notify.notifier: no.such.Thing: there is no such class here"),
        ({"notifier": "json.Thing"}, "notify.notifier: json.Thing: there is no such class here"),
        ({"notifier": "json.JSONDecoder"}, "notify.notifier: json.JSONDecoder: expected a class that inherits from"),
        ({"notifier": SMTP, "arguments": {"too": "a@b.org"}}, "notify.arguments: .*SmtpNotifier refuses them: .* 'to'"),
        ({"notifier": SMTP, "on": ["never"]}, 'notify.on: \\["never"\\]: expected \\[success\\]'),
        ({"notifier": SMTP, "to": "a@b.org"}, "notify.to: unknown key; expected one of notifier, "),
    ],
)
def test_a_wrong_notifier_names_file_and_key(make_spec: Callable[..., Path], notify: Any, said: str) -> None:
    path = make_spec(notify=notify)
    with pytest.raises(SpecError, match=f"{path}: {said}"):
        volume_dag(load_spec(path), path)


def test_a_notifier_gets_its_arguments(make_spec: Callable[..., Path]) -> None:
    path = make_spec()
    path.write_text(
        path.read_text() + "notify: {notifier: tests.dags.test_dags.Post, arguments: {addressee: lab}, on: [failure]}\n"
    )
    notify = load_spec(path).notify
    assert notify is not None
    assert notify.on == ("failure",), "though YAML reads on as true"
    assert notifier_of(notify, path).addressee == "lab"  # type: ignore[attr-defined]


def test_what_failed_is_told(make_spec: Callable[..., Path]) -> None:
    grid = load_spec(make_spec()).grid
    states = dict.fromkeys(("infer.0_0_0", "infer.1_1_1", "blend.0_0_1"), "success")
    assert what_failed(grid, states, {}) == []
    states |= {"infer.0_1_0": "failed", "blend.0_1_0": "upstream_failed", "verify": "upstream_failed"}
    told = what_failed(grid, states, {"infer.0_1_0": "wrong data (exit code 65): NaN"})
    assert "1 block failed" in told[0]
    assert [line for line in told if "(0, 1, 0)" in line and "wrong data (exit code 65): NaN" in line]
    assert what_failed(
        grid, {"prepare": "failed"} | states | {"infer.0_1_0": "upstream_failed"}, {"prepare": "no\nGPU"}
    ) == ["prepare: no GPU"]
    assert what_failed(grid, {"verify": "upstream_failed"}, {}) == ["could not run: verify"]
    added = {"infer.0_9_0": "failed", "blend.0_9_0": "upstream_failed"}  # by Airflow, as the volume has grown since
    reasons = {"infer.0_1_0": "wrong data (exit code 65): NaN", "infer.0_9_0": "died"}
    assert what_failed(grid, states | added, reasons) == [*told, "infer.0_9_0: died"]


def test_figures_are_told_in_a_line() -> None:
    assert figures_line({}, {"up_to_date": 8}) == "nothing was due: 8 blocks are up to date"
    figures = {"inferred": 1, "blocks": 8, "blended": 7, "patches": 1234, "voxels": 56789, "span": 1.6}
    assert figures_line(figures, {}) == (
        "1 of 8 blocks inferred, 7 blended; 1,234 patches, 56,789 voxels written, 2 s from first start to last finish"
    )
