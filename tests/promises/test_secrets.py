"""What came from an environment variable of a spec is told to nobody.

Values that stand nowhere else go through all commands, also failing ones. Then they are looked for
in all that was written and printed.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from airflow.serialization.serialized_objects import DagSerialization

from chunkflow_core.__main__ import main
from chunkflow_core.commands.log_copy import log_url
from chunkflow_core.errors import ChunkflowError, SpecError
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.spec.runner import KubernetesRunner
from chunkflow_core.spec.transport import SPEC_VARIABLE, to_environment
from operators.dag import volume_dag
from operators.kubernetes.manifest import pod_manifest
from operators.volume_dags import volume_dags
from tests.support.volume import write_layer

Commands = Callable[..., str]

VALUES = {
    "CANARY_INPUT": "canary-yellow-4711",
    "CANARY_OUTPUT": "canary-green-4712",
    "CANARY_EXCHANGE": "canary-red-4713",
    "CANARY_OPTION": 'canary "blue"\\4714 \u2713',
    "CANARY_ARGUMENT": "canary-white-4715",
    "CANARY_POD": "canary-black-4716",
}
SEEN_BY_PODS = {"CANARY_POD"}
"""Variables that a spec gives to pods by their values: ``runner.env`` stands in manifests."""
SEEN_AS_ASSETS = {"CANARY_OUTPUT"}
"""Variables in the address of a layer that Airflow knows as an Asset.

Other DAGs know it by this address.
"""
NOTIFIER = "airflow.providers.smtp.notifications.smtp.SmtpNotifier"


def found_in(content: str | bytes) -> set[str]:
    """Variables whose values stand in a text or a file, in any form in which they are written."""
    data = content.encode() if isinstance(content, str) else content
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    return {name for name, value in VALUES.items() if any(form.encode() in data for form in forms(value))}


def forms(value: str) -> set[str]:
    """A value as it is, in JSON, in a URL, and in quotes."""
    return {
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        quote(value),
        repr(value)[1:-1],
    }


def in_files(folder: Path) -> dict[str, set[str]]:
    """Files below a folder in which values of variables stand, and whose."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return {str(file.relative_to(folder)): names for file in files if (names := found_in(file.read_bytes()))}


@pytest.fixture
def spec(make_spec: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A volume with variables in many places."""
    for name, value in VALUES.items():
        monkeypatch.setenv(name, value)
    write_layer(tmp_path / VALUES["CANARY_INPUT"])
    return make_spec(
        input={"path": f"file://{tmp_path}/${{CANARY_INPUT}}"},
        output={"path": f"file://{tmp_path}/${{CANARY_OUTPUT}}", "chunk_size": [6, 12, 12]},
        exchange={"path": f"file://{tmp_path}/${{CANARY_EXCHANGE}}/", "donations": "keep"},
        model={"engine": "identity", "options": {"key": "${CANARY_OPTION}", "more": ["Bearer ${CANARY_OPTION}"]}},
        notify={"notifier": NOTIFIER, "arguments": {"to": "a@b.org", "subject": "${CANARY_ARGUMENT}"}},
        schedule="@weekly",
        runner={
            "kind": "kubernetes",
            "image": "example.org/worker:1",
            "env": {"CANARY_POD": "${CANARY_POD}"},
            "secret_env": {name: {"secret": "canaries", "key": name} for name in VALUES if name != "CANARY_POD"},
        },
    )


@pytest.fixture
def commands(spec: Path, capfd: pytest.CaptureFixture[str]) -> Commands:
    """Runs a command on the volume that ends with ``code``; gives what it printed."""

    def call(*words: str, code: int = 0) -> str:
        assert main([words[0], str(spec), *words[1:]]) == code
        printed = capfd.readouterr()
        assert found_in(printed.out) == set(), printed.out
        assert found_in(printed.err) == set(), printed.err
        return printed.out + printed.err

    return call


def test_no_command_tells(spec: Path, commands: Commands, tmp_path: Path, warm_python: Callable[..., Any]) -> None:
    logged = warm_python("-m", "chunkflow_core", "-v", "prepare", spec, "--run", "first").stderr
    assert f"input file://{tmp_path}/${{CANARY_INPUT}}: " in logged
    assert found_in(logged) == set()
    said = [commands("plan"), commands("plan", "--json", "--run", "first")]
    beside = commands("run", code=75)
    assert f"file://{tmp_path}/${{CANARY_OUTPUT}}: run first is at work there" in beside
    commands("cleanup", "--run", "first")
    said += [commands("run"), commands("run", "--force", "--workers", "2")]
    said += [commands("verify", "--json", "--deep", "--run", "first"), commands("repair", "--json"), commands("report")]
    report = json.loads(commands("report", "--json"))
    (run, *_) = report["runs"]
    published = json.loads(commands("report", "--run", run, "--publish").splitlines()[-1])
    commands("picture", str(tmp_path / "picture.png"))
    commands("cleanup")

    assert in_files(tmp_path) == {}
    layer = f"file://{tmp_path}/${{CANARY_OUTPUT}}"
    assert any(f"output: {layer}" in text for text in said)
    assert (report["output"], published["output"]) == (layer, layer)
    assert report["exchange"].startswith(f"file://{tmp_path}/${{CANARY_EXCHANGE}}/{report['fingerprint']}/0001-")
    assert published["manifest"].startswith(f"{layer}/runs/{run}.json")

    folder = tmp_path / VALUES["CANARY_OUTPUT"]
    provenance = json.loads((folder / "provenance").read_text())
    source = f"file://{tmp_path}/${{CANARY_INPUT}}"
    assert provenance["sources"] == [source]
    assert source in provenance["description"]
    records = [
        provenance["processing"][-1]["method"]["spec"],
        *(json.loads(file.read_text())["spec"] for file in folder.glob("runs/*.json")),
    ]
    for record in records:
        assert record["input"]["path"] == source
        assert record["model"]["options"] == {"key": "${CANARY_OPTION}", "more": ["Bearer ${CANARY_OPTION}"]}
        assert record["input"]["padding"] == "reflect", "what the file leaves out is on record"


NET = """
import logging, os, sys

class PatchInferencer:
    def __init__(self, weights):
        pass

    def __call__(self, patch):
        logging.warning("there is %s", os.environ["CANARY_OPTION"])
        print(os.environ["CANARY_ARGUMENT"], file=sys.stderr)
        raise ValueError("no such service: https://example.org/?key=" + os.environ["CANARY_POD"])
"""


@pytest.mark.parametrize(
    ("settings", "code", "told"),
    [
        (["input.path=file:///nowhere/${CANARY_INPUT}"], 66, "file:///nowhere/${CANARY_INPUT}"),
        (["input.path=nowhere/${CANARY_INPUT}"], 78, 'input.path: "nowhere/${CANARY_INPUT}": expected a storage path'),
        (["model.precision=${CANARY_OPTION}"], 78, 'model.precision: "${CANARY_OPTION}": '),
        (["model.threads=${CANARY_OPTION}"], 78, 'model.threads: "${CANARY_OPTION}": '),
        (["input.fill_missing=[1, {a: '${CANARY_OPTION}'}]"], 78, 'input.fill_missing: [1, {"a": "${CANARY_OPTION}"}]'),
        (["exchange.path=file://${CANARY_INPUT}"], 78, 'exchange.path: "file://${CANARY_INPUT}": '),
        (["runner.image=${CANARY_OPTION}"], 78, 'runner.image: "${CANARY_OPTION}": expected a container image'),
        (["runner.labels={a: '${CANARY_OPTION}'}"], 78, 'runner.labels: {"a": "${CANARY_OPTION}"}: expected values of'),
        (["notify.on=['${CANARY_ARGUMENT}']"], 78, 'notify.on: ["${CANARY_ARGUMENT}"]: expected'),
        (["schedule=${CANARY_ARGUMENT}", "roi=${CANARY_INPUT}"], 78, 'roi: "${CANARY_INPUT}": expected two corners'),
        (["model.engine=pytorch", "model.path=/nets/${CANARY_INPUT}.py"], 66, "model file /nets/${CANARY_INPUT}.py"),
        (["model.engine=onnx", "model.path=/nets/${CANARY_INPUT}.py"], 78, "model.path: /nets/${CANARY_INPUT}.py: the"),
        (["model={engine: pytorch, path: net.py}"], 65, "no such service: https://example.org/?key=${CANARY_POD}"),
    ],
)
def test_no_error_tells(settings: list[str], code: int, told: str, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    changes = [word for setting in settings for word in ("--set", setting)]
    assert told in commands("prepare", *changes, code=code)


def test_a_long_value_is_not_told_in_part(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages cut long values short."""
    monkeypatch.setenv("CANARY_OPTION", "Zx9" * 100)
    assert "Zx9" not in commands("plan", "--set", "model.threads=${CANARY_OPTION}", code=78)
    monkeypatch.setenv("CANARY_OPTION", "Zx9")
    assert "Zx9" not in commands("plan", "--set", "model.threads=${CANARY_OPTION}", code=78)


def test_a_value_that_has_changed_is_noticed(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands("run")
    monkeypatch.setenv("CANARY_ARGUMENT", "canary-of-no-number")
    assert "8 up to date" in commands("run")
    other = "canary-orange-4717"
    monkeypatch.setenv("CANARY_OPTION", other)
    said = commands("run", code=78)
    assert "model.options.key: ${CANARY_OPTION}, whose value may have changed" in said
    assert "model.options.more.0: Bearer ${CANARY_OPTION}, whose value may have changed" in said
    assert "input.padding" not in said
    assert "canary-" not in said
    said = commands("run", "--set", "input.padding=edge", "--set", "model.options.key=[]", code=78)
    assert "input.padding: reflect, now edge" in said
    assert "model.options.key: ${CANARY_OPTION}, now []" in said


def test_only_one_value_can_have_changed(
    make_spec: Callable[..., Path], chunkflow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_OPTION", "first")
    path = make_spec(model={"engine": "identity", "options": {"key": "${CANARY_OPTION}"}})
    assert chunkflow("run", path).returncode == 0
    monkeypatch.setenv("CANARY_OPTION", "second")
    assert "\n  model.options.key: ${CANARY_OPTION}, whose value has changed\n" in chunkflow("run", path).stderr


def test_what_a_variable_stood_for_before_is_taken_out(spec: Path, commands: Commands, tmp_path: Path) -> None:
    """A layer may have been made when provenance had values; whose else it is stays."""
    commands("prepare")
    file = tmp_path / VALUES["CANARY_OUTPUT"] / "provenance"
    content = json.loads(file.read_text())
    layer = load_spec(spec).input.path
    content |= {"sources": ["gs://theirs/em", layer], "description": f"small: identity inference of {layer}"}
    file.write_text(json.dumps(content))
    commands("prepare", "--set", "input.padding=edge", "--overwrite")
    assert in_files(file.parent) == {}
    assert json.loads(file.read_text())["sources"] == ["gs://theirs/em", f"file://{tmp_path}/${{CANARY_INPUT}}"]


# -- Airflow and pods


def test_no_dag_tells(spec: Path) -> None:
    dag = volume_dag(load_spec(spec), spec)
    stored = json.dumps(DagSerialization.to_dict(dag))
    (asset,) = dag.get_task("publish").outlets
    assert found_in(stored) == SEEN_AS_ASSETS
    assert found_in(stored.replace(asset.uri, "")) == set()
    assert "${CANARY_INPUT} (mip 0)" in (dag.doc_md or "")
    assert found_in(dag.doc_md or "") == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"cron": "${CANARY_ARGUMENT}"}},
        {"schedule": {"cron": "@daily", "timezone": "${CANARY_OPTION}"}},
        {"notify": {"notifier": NOTIFIER, "arguments": {"${CANARY_OPTION}": 1, "such": ["${CANARY_OPTION}"]}}},
        {"notify": {"notifier": "no.such.${CANARY_NAME}"}},
        {"roi": ..., "input": {"path": "file:///nowhere/${CANARY_INPUT}"}},
        {"patch_size": [8, "${CANARY_OPTION}", 16]},
    ],
)
def test_no_spec_that_can_not_be_used_tells(
    changes: dict[str, Any], spec: Path, make_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_NAME", "canaries_of_5000")
    make_spec(**changes)
    (error,) = volume_dags(spec.parent)
    assert isinstance(error, ChunkflowError)
    assert found_in(str(error)) == set()
    assert "canaries_of_5000" not in str(error)


@pytest.fixture
def in_a_pod(spec: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], VolumeSpec]]:
    """Reads the spec as a pod does, whose environment it is given."""

    def read(environment: dict[str, str]) -> VolumeSpec:
        for name in VALUES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return load_spec(f"env:{SPEC_VARIABLE}")

    yield read


def test_no_pod_tells(spec: Path, in_a_pod: Callable[[dict[str, str]], VolumeSpec]) -> None:
    volume = load_spec(spec)
    environment = to_environment(volume)
    runner = volume.runner
    assert isinstance(runner, KubernetesRunner)
    manifest = pod_manifest(
        runner,
        folder=volume.folder,
        resources=runner.infer,
        memory=2**30,
        name="canary",
        labels={},
        arguments=["--log", log_url(volume.written("exchange"), "dag", "run", "pod")],
        environment=environment,
    )
    assert found_in(json.dumps(manifest)) == SEEN_BY_PODS
    assert found_in(zlib.decompress(base64.b64decode(environment[SPEC_VARIABLE]))) == set()

    loaded = in_a_pod(environment | VALUES)
    assert loaded.model.options == volume.model.options
    assert loaded.model.options["key"] == VALUES["CANARY_OPTION"]
    changed = load_spec(f"env:{SPEC_VARIABLE}", ["model.options.key=plain"])
    assert changed.model.options == volume.model.options | {"key": "plain"}
    assert ("model", "options", "key") not in changed.texts
    assert (loaded.fingerprint, loaded.written("exchange")) == (volume.fingerprint, volume.written("exchange"))
    with pytest.raises(
        SpecError, match=r"^env:CHUNKFLOW_SPEC: model\.options\.key: \$\{CANARY_OPTION\}: the .* not set"
    ):
        in_a_pod(environment | {name: VALUES[name] for name in ("CANARY_INPUT", "CANARY_OUTPUT", "CANARY_EXCHANGE")})


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, False),
        ({"secret_env": {"OTHER": {"secret": "a", "key": "b"}}, "env": {"NAME": "${CANARY_OPTION}"}}, False),
        ({"env": {"CANARY_OPTION": "${CANARY_OPTION}"}}, True),
        ({"secret_env": {"CANARY_OPTION": {"secret": "a", "key": "b"}}}, True),
        ({"env_from": ["canaries"]}, True),
        ({"pod_template": "pod.yml"}, True),
    ],
)
def test_pods_have_to_get_a_variable(
    changes: dict[str, Any], good: bool, spec: Path, make_spec: Callable[..., Path]
) -> None:
    model = {"engine": "identity", "options": {"key": "${CANARY_OPTION}"}}
    runner = {"kind": "kubernetes", "image": "example.org/worker:1"}
    volume = load_spec(make_spec(model=model, runner=runner | changes))
    if good:
        assert to_environment(volume)
    else:
        with pytest.raises(
            SpecError, match=r"^spec: model\.options\.key: \$\{CANARY_OPTION\}: pods don't have the var"
        ):
            to_environment(volume)
