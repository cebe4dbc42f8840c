"""A spec that went through environment variables is the same spec.

What can't travel is refused with a remedy.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.spec.transport import SPEC_VARIABLE, check_transportable, to_environment
from tests.support.random_examples import examples

MakeSpec = Callable[..., Path]

NAME = f"env:{SPEC_VARIABLE}"
LONGEST_VARIABLE = 128 * 1024
KUBERNETES = {"kind": "kubernetes", "image": "example.org/worker:1", "env": {"TOKEN_FILE": "/secret"}}


@pytest.fixture(autouse=True)
def _no_spec_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPEC_VARIABLE, raising=False)


def transported(spec: VolumeSpec, *overrides: str) -> VolumeSpec:
    """The spec after its way through this process's environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in to_environment(spec).items():
            patch.setenv(name, value)
        return load_spec(NAME, overrides)


def facts(spec: VolumeSpec) -> list[Any]:
    """All that decides numbers: fingerprint, and the digest of every block."""
    return [spec.fingerprint, [spec.block_digest(index) for index in spec.grid.indices()]]


def in_a_process(variables: dict[str, str]) -> list[Any]:
    """``facts``, as another process has them."""
    script = (
        "import json; from chunkflow_core.spec import load_spec; "
        "from tests.chunkflow_core.spec.test_transport import facts;"
        f"print(json.dumps(facts(load_spec('{NAME}'))))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | variables | {"PYTHONPATH": path}
    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    result: list[Any] = json.loads(answer.stdout)
    return result


# ----------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"roi": [[2, 4, 8], [18, 44, 40]], "patch_size": [12, 20, 16], "output_patch_size": [8, 16, 16]},
        {"runner": KUBERNETES, "schedule": "*/5 * * * *", "skip": {"zeros": False}},
        {"model": {"engine": "identity", "options": {"é": [1, 0.1, 1e300, None, True, {"deep": [[]]}], "": "line\n"}}},
    ],
)
def test_it_is_the_same_spec(make_spec: MakeSpec, changes: dict[str, Any]) -> None:
    spec = load_spec(make_spec(**changes))
    loaded = transported(spec)
    airflows = {"runner", "schedule", "notify"}
    assert loaded.model_dump(exclude=airflows) == spec.model_dump(exclude=airflows)
    assert facts(loaded) == facts(spec)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4),
    max_leaves=20,
)


@examples(60)
@given(
    options=st.dictionaries(st.text(), JSON, max_size=4),
    low=st.floats(-1e6, 0, exclude_max=True),
    batch=st.integers(1, 2**16),
    start=st.tuples(*[st.integers(-(10**9), 10**9)] * 3),
    zeros=st.booleans(),
)
def test_whatever_it_says(
    make_spec: MakeSpec, options: dict[str, Any], low: float, batch: int, start: tuple[int, ...], zeros: bool
) -> None:
    content = load_spec(make_spec()).model_dump()
    content["model"] |= {"options": options, "batch_size": batch}
    content["output"] |= {"range": (low, 1.0)}
    content["roi"] = [list(start), [number + 20 for number in start]]
    content["skip"] |= {"zeros": zeros}
    spec = VolumeSpec.model_validate(content)
    assert facts(transported(spec)) == facts(spec)


def test_a_megabyte_that_does_not_compress_reaches_another_process(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import helper\n")
    (tmp_path / "helper.py").write_text("depth = 3\n")
    noise = base64.b64encode(random.Random(1).randbytes(2**20 * 3 // 4)).decode()
    model = {"engine": "pytorch", "path": str(tmp_path / "model.py"), "options": {"noise": noise}}
    spec = load_spec(make_spec(model=model, runner=KUBERNETES))

    variables = to_environment(spec)

    assert sum(map(len, variables.values())) > len(noise) == 2**20
    assert list(variables)[:3] == ["CHUNKFLOW_SPEC", "CHUNKFLOW_SPEC_1", "CHUNKFLOW_SPEC_2"]
    assert max(len(f"{name}={value}") for name, value in variables.items()) < LONGEST_VARIABLE
    assert in_a_process(variables) == facts(spec)


def test_the_runner_stays_behind_and_defaults_take_no_room(make_spec: MakeSpec) -> None:
    spec = load_spec(make_spec(runner=KUBERNETES))
    assert transported(spec).runner.kind == "local"
    assert list(to_environment(spec)) == [SPEC_VARIABLE]
    assert to_environment(spec) == to_environment(load_spec(make_spec(runner={"kind": "local"}, skip={"zeros": True})))


def test_variables_are_replaced_once(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKFLOW_TEST_TEXT", "${CHUNKFLOW_TEST_TEXT} $(HOME) $HOME")
    spec = load_spec(make_spec(model={"engine": "identity", "options": {"text": "${CHUNKFLOW_TEST_TEXT}"}}))
    loaded = transported(spec, "model.options.more=${NOT_SET}")
    assert loaded.model.options == {"text": "${CHUNKFLOW_TEST_TEXT} $(HOME) $HOME", "more": "${NOT_SET}"}


def test_set_applies(make_spec: MakeSpec) -> None:
    loaded = transported(load_spec(make_spec()), "model.threads=3", "skip.zeros=false")
    assert (loaded.model.threads, loaded.skip.zeros) == (3, False)
    with pytest.raises(SpecError, match=rf"^{NAME}: model\.thread: unknown key; did you mean threads\?$"):
        transported(load_spec(make_spec()), "model.thread=3")


def test_commands_take_it(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, chunkflow: Callable[..., Any]) -> None:
    for name, value in to_environment(load_spec(make_spec())).items():
        monkeypatch.setenv(name, value)
    answer = chunkflow("plan", NAME)
    assert answer.returncode == 0, answer.stderr
    assert "8 " in answer.stdout


# ------------------------------------------------------------------------------------------- errors


def test_a_missing_variable(monkeypatch: pytest.MonkeyPatch, chunkflow: Callable[..., Any]) -> None:
    answer = chunkflow("plan", NAME)
    assert answer.returncode == 78
    assert answer.stderr.startswith(
        f"error: {NAME}: the environment variable {SPEC_VARIABLE} is not set. Start the pod"
    )


def encoded(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize(
    "value",
    ["", "x", "not base64!", base64.b64encode(b"not zlib").decode(), encoded(b"{"), encoded(b"[1]"), encoded(b"\xff")],
)
def test_a_garbled_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPEC_VARIABLE, value)
    with pytest.raises(
        SpecError, match=rf"^{NAME}: the spec is cut off or garbled \(1 variables, .+\)\. Start the pod"
    ):
        load_spec(NAME)


@pytest.mark.parametrize("lost", ["", "_1", "_2"])
def test_a_piece_is_missing_or_cut_off(make_spec: MakeSpec, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(1).randbytes(150_000).hex()
    variables = to_environment(load_spec(make_spec(model={"engine": "identity", "options": {"noise": noise}})))
    assert len(variables) == 3
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    load_spec(NAME)
    monkeypatch.setenv(SPEC_VARIABLE + lost, variables[SPEC_VARIABLE + lost][:-8])
    with pytest.raises(SpecError, match="cut off or garbled"):
        load_spec(NAME)
    monkeypatch.delenv(SPEC_VARIABLE + lost)
    with pytest.raises(SpecError, match="cut off or garbled" if lost else "is not set"):
        load_spec(NAME)


@pytest.mark.parametrize("path", ["model.py", "nets/model.py", "../model.py", "~/model.py"])
@pytest.mark.parametrize("key", ["path", "weights"])
def test_model_files_beside_the_spec_can_not_travel(make_spec: MakeSpec, key: str, path: str) -> None:
    files = {"path": "/nets/model.py", "weights": "gs://bucket/weights.pt"} | {key: path}
    spec = load_spec(make_spec(model={"engine": "pytorch", **files}))
    expected = rf"^{{}}: model\.{key}: {path}: a pod has .* expected an absolute path .* gs://bucket/model\.py$"
    for refused in (check_transportable, to_environment):
        with pytest.raises(SpecError, match=expected.format("spec")):
            refused(spec)
    good = load_spec(make_spec(model={"engine": "pytorch", "path": "/nets/model.py", "weights": "s3://bucket/w.pt"}))
    with pytest.raises(SpecError, match=expected.format(NAME)):
        transported(good, f"model.{key}={path}")


def test_networks_by_name_and_folds_travel(make_spec: MakeSpec) -> None:
    arguments = {"conv_op": {"import": "torch.nn.Conv3d"}, "eps": 1e-5, "widths": [2, 3]}
    model = {"engine": "pytorch", "network": "lab.nets.UNet", "arguments": arguments, "weights": ["/a.pt", "/b.pt"]}
    spec = load_spec(make_spec(model=model))
    assert transported(spec).model == spec.model
    with pytest.raises(SpecError, match=r"^spec: model\.weights\.1: b\.pt: a pod has "):
        check_transportable(load_spec(make_spec(model=model | {"weights": ["/a.pt", "b.pt"]})))


@pytest.mark.parametrize("name", ["gain.json", "parts/*", "file://~/gain.json"])
def test_listed_files_beside_the_spec_can_not_travel(make_spec: MakeSpec, name: str) -> None:
    files = ["/nets/good.json", name]
    spec = load_spec(make_spec(model={"engine": "pytorch", "path": "/nets/model.py", "files": files}))
    with pytest.raises(SpecError, match=rf"^spec: model\.files\.1: {re.escape(name)}: a pod has "):
        check_transportable(spec)


def test_folders_below_home_can_not_travel(make_spec: MakeSpec) -> None:
    spec = load_spec(make_spec(exchange={"path": "file://~/exchange"}))
    with pytest.raises(SpecError, match=r"exchange\.path: file://~/exchange: a pod has another home; expected an abs"):
        check_transportable(spec)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{a: {9: 1}}", r"model\.options\.a: 9: a pod gets texts as keys only; write it in quotes"),
        ("{a: [1, {b: !!pairs [x: 1]}]}", r"model\.options\.a\.1\.b\.0: \('x', 1\): a pod gets texts, numbers"),
    ],
)
def test_what_json_would_change_can_not_travel(make_spec: MakeSpec, options: str, expected: str) -> None:
    spec = load_spec(make_spec(), [f"model.options={options}"])
    with pytest.raises(SpecError, match=expected):
        check_transportable(spec)
