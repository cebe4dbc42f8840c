"""A run's manifest: what was asked, with what it was done, and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cloudvolume import CloudVolume

from chunkflow_core import machine
from chunkflow_core.exchange.marks import STAGES
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.reports import manifest
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import Other, prepare
from chunkflow_core.steps.provenance import History
from chunkflow_core.steps.workspace import Workspace

MakeSpec = Callable[..., Path]

BLOCKS = [[z, y, x] for z in (0, 1) for y in (0, 1) for x in (0, 1)]
RUN = "manual__2026-11-22T18:10:21.123456+00:00"


def do(spec: VolumeSpec, run: str, *, other: Other = "refuse", stop: int = 8, force: bool = False) -> dict[str, Any]:
    """Do the first blocks in a run, and complete its manifest."""
    workspace = Workspace(spec)
    prepare(workspace, run=run, other=other)
    indices = list(spec.grid.indices())
    for index in indices[:stop]:
        inference_and_donate(workspace, index, run=run, why="forced" if force else None)
    if stop == len(indices):
        for index in indices:
            receive_and_blend(workspace, index, run=run, why="forced" if force else None)
    return manifest.complete(spec, run, receipts(workspace))


def receipts(workspace: Workspace) -> list[Receipt]:
    return [receipt for stage in STAGES for receipt in workspace.exchange.receipts(stage).values()]


def stored(folder: Path, run: str = RUN) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "output" / f"{manifest.stem(run)}.json").read_text())
    return content


def test_what_it_says_of_a_run_that_has_begun(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import part\n")
    (tmp_path / "part.py").write_text("")
    spec = load_spec(make_spec(model={"engine": "onnx", "path": "net.onnx"}, schedule="@weekly"))
    (tmp_path / "net.onnx").write_bytes(b"a network")
    request = {"box": [0, 0, 0, 6, 12, 12], "force": False, "check_input": True, "repair": False}

    manifest.begin(spec, RUN, request)

    said = stored(tmp_path)
    assert (said["format"], said["name"], said["run"], said["state"]) == (1, "small", RUN, "running")
    assert said["fingerprint"] == spec.fingerprint
    assert said["request"] == request
    unset = {
        "input": {"values"},
        "output": {"threshold", "argmax", "format", "read_chunk_size", "affinities"},
        "model": {"weights_key", "dimensions", "channels", "affinities", "network", "arguments"},
    }
    assert said["spec"] == json.loads(spec.model_dump_json(exclude=unset))
    assert said["digests"] == {"net.onnx": hashlib.sha256(b"a network").hexdigest()}
    assert said["packages"]["chunkflow-airflow"] == version("chunkflow-airflow")
    assert {"numpy", "torch", "cloud-volume", "cloud-files", "numba", "onnxruntime"} <= said["packages"].keys()
    assert said["host"] == socket.gethostname()
    assert said["user"] and said["platform"] and said["python"]
    begun = datetime.fromisoformat(said["started"])
    assert begun.utcoffset() == timedelta(0)
    assert timedelta(0) <= datetime.now(UTC) - begun < timedelta(minutes=1)
    assert "finished" not in said


def test_what_it_says_of_a_run_that_is_complete(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = load_spec(make_spec())
    do(spec, "an earlier one", stop=3)
    manifest.begin(spec, RUN, {"force": False})
    returned = do(spec, RUN)

    said = stored(tmp_path)
    assert said == returned == manifest.read(spec, RUN)
    assert said["state"] == "complete"
    assert said["started"] <= said["finished"]
    assert said["request"] == {"force": False}
    assert said["blocks"] == {"inferred": BLOCKS[3:], "blended": BLOCKS[1:], "changed": BLOCKS[1:]}
    assert said["bounding_box"] == {"start": [0, 0, 0], "stop": [20, 48, 40]}
    assert said["hosts"] == {socket.gethostname(): 12}
    assert said["devices"] == {"cpu": 5}
    assert said["mixture"] == []
    earlier = stored(tmp_path, "an earlier one")
    assert earlier["blocks"] == {"inferred": BLOCKS[:3], "blended": [], "changed": BLOCKS[:3]}


def test_changed_is_only_what_has_other_voxels(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = load_spec(make_spec())
    do(spec, "first")
    said = do(spec, "again", force=True)
    assert said["blocks"] == {"inferred": BLOCKS, "blended": BLOCKS[1:], "changed": []}
    assert said["bounding_box"] is None


def test_box_is_that_of_the_changed_blocks(make_spec: MakeSpec) -> None:
    spec = load_spec(make_spec())
    said = do(spec, "first", stop=2)
    assert said["blocks"]["changed"] == [[0, 0, 0], [0, 0, 1]]
    assert said["bounding_box"] == {"start": [0, 0, 0], "stop": [12, 24, 40]}


def test_run_without_a_task_is_complete_too(make_spec: MakeSpec) -> None:
    spec = load_spec(make_spec())
    do(spec, "first")
    said = do(spec, "second")
    assert said["blocks"] == {"inferred": [], "blended": [], "changed": []}
    assert (said["state"], said["bounding_box"], said["hosts"]) == ("complete", None, {})


def test_run_that_begins_again(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The time of the first start stays, the rest is that of now.

    A run begins again when a task of Airflow is cleared.
    """
    spec = load_spec(make_spec())
    manifest.begin(spec, RUN, {"force": False})
    file = tmp_path / "output" / f"{manifest.stem(RUN)}.json"
    file.write_text(json.dumps(stored(tmp_path) | {"started": "2026-01-01T00:00:00+00:00"}))
    do(spec, RUN)
    manifest.begin(spec, RUN, {"force": True})
    said = stored(tmp_path)
    assert (said["started"], said["state"], said["request"]) == (
        "2026-01-01T00:00:00+00:00",
        "running",
        {"force": True},
    )
    assert "blocks" not in said
    file.write_text("{")
    assert manifest.read(spec, RUN) is None
    assert do(spec, RUN)["state"] == "complete"


def test_names_of_runs_become_names_of_files() -> None:
    runs = [
        RUN,
        RUN.replace("+", "-"),
        RUN.replace(":", "_"),
        "a/b",
        "a_b",
        "../../x",
        "ä",
        "ö",
        "",
        "r" * 400,
        "r" * 401,
    ]
    names = [manifest.stem(run) for run in runs]
    assert len(set(names)) == len(runs)
    for name in names:
        folder, _, file = name.partition("/")
        assert folder == "runs"
        assert set(file) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert len(file) < 200
    assert manifest.stem("run-1a2b.x") == "runs/run-1a2b.x"
    assert manifest.stem(RUN).startswith("runs/manual__2026-11-22T18_10_21.123456_00_00-")


def test_layer_is_read_as_before(make_spec: MakeSpec, tmp_path: Path) -> None:
    """What lies beside the voxels is in nobody's way."""
    spec = load_spec(make_spec())
    manifest.begin(spec, RUN, {})  # even before there is a layer
    do(spec, RUN)
    assert CloudVolume(f"file://{tmp_path}/output", progress=False)[:, :, :].shape == (40, 48, 20, 1)
    assert len(Workspace(spec).output.stored_chunks()) == 64


def test_values_of_the_environment_of_pods_are_nobodys_affair(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The spec's ``${TOKEN}`` has been replaced by then, and many an output is public."""
    runner = {"kind": "kubernetes", "image": "example.org/worker:1", "env": {"TOKEN": "hush"}}
    spec = load_spec(make_spec(runner=runner))
    prepare(Workspace(spec))
    manifest.begin(spec, RUN, {})
    texts = [(tmp_path / "output" / name).read_text() for name in ("provenance", f"{manifest.stem(RUN)}.json")]
    assert all("example.org/worker:1" in text and "hush" not in text for text in texts)


def test_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run under any number, of which there may be no name."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    assert machine.user() == "987654"


@pytest.mark.parametrize("other", ["overwrite", "mixture"])
def test_mixture_until_every_block_is_of_one_fingerprint(make_spec: MakeSpec, other: Other) -> None:
    path = make_spec()
    first, second = load_spec(path), load_spec(path, ["output.range=[0, 2]"])
    assert do(first, "first")["mixture"] == []

    part = do(second, "part", other=other, stop=7)
    assert part["mixture"] == [first.fingerprint, second.fingerprint]
    assert History(second).last["mode"] == other

    assert do(second, "whole")["mixture"] == []
    last = History(second).last
    assert (last["mode"], last["run"], last["fingerprints"]) == ("whole", "whole", [second.fingerprint])
    steps = [step["method"]["mode"] for step in CloudVolume(second.output.path, progress=False).provenance.processing]
    do(second, "once more")
    assert steps == ["new", other, "whole"]
    assert History(second).last == last


def test_run_of_a_model_that_has_been_replaced_meanwhile(make_spec: MakeSpec) -> None:
    """The late completion of such a run does not claim the layer back."""
    path = make_spec()
    first, second = load_spec(path), load_spec(path, ["output.range=[0, 2]"])
    do(first, "first")
    prepare(Workspace(second), other="overwrite")
    known = receipts(Workspace(first))
    assert manifest.complete(first, "first", known)["mixture"] == [first.fingerprint, second.fingerprint]
    assert History(first).fingerprint == second.fingerprint


def test_what_a_run_that_failed_has_changed_is_told_with_the_next(make_spec: MakeSpec, tmp_path: Path) -> None:
    """It is told, too, where the next run has done the same block again, with the same outcome."""
    spec = load_spec(make_spec())
    workspace = Workspace(spec)
    prepare(workspace)
    manifest.begin(spec, "failed", {})
    first, second, third = ((0, 0, 0), (0, 0, 1), (0, 1, 0))
    inference_and_donate(workspace, first, run="failed")
    inference_and_donate(workspace, second, run="failed")
    assert manifest.unpublished(spec) == ["failed"]
    manifest.begin(spec, RUN, {})
    inference_and_donate(workspace, second, run=RUN, why="forced")
    inference_and_donate(workspace, third, run=RUN)

    told = manifest.complete(spec, RUN, receipts(workspace))

    assert told["told"] == sorted(["failed", RUN])
    assert told["blocks"]["changed"] == BLOCKS[:3]
    assert told["blocks"]["inferred"] == BLOCKS[1:3]
    assert manifest.unpublished(spec) == []
    assert manifest.complete(spec, RUN, receipts(workspace)) == told | {"finished": stored(tmp_path)["finished"]}
    assert manifest.complete(spec, "later", receipts(workspace))["blocks"]["changed"] == []
