"""Models that can't be used: what is said of their files, and of settings that don't fit them."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkflow_core.errors import ChunkflowError, MissingInputError, SpecError
from chunkflow_core.spec import load_spec
from tests.support.models.forms import NET, bare_state, pytorch, trained, write
from tests.support.models.loading import PATCH, MakeSpec, Section, load
from tests.support.models.two_convolutions import onnx_file

from .conftest import check_refused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters


# -------------------------------------------------------------------------------------------- files


def test_missing_files(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    for model in ({"engine": "pznet", "path": "net"}, {"engine": "onnx", "path": "model.onnx"}):
        with pytest.raises(MissingInputError, match=f"{tmp_path}/{model['path']} does not exist"):
            load(make_spec(model=model, output=output))


def test_missing_weights_and_missing_model(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=bare_state(tmp_path, trained()), output=output)
    (tmp_path / "weights.pt").unlink()
    check_refused(path, MissingInputError, f"{tmp_path}/weights.pt does not exist")
    (tmp_path / "model.py").unlink()
    check_refused(path, MissingInputError, f"{tmp_path}/model.py does not exist")


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_model(make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(SpecError, match=r"model\.onnx can't be loaded by") as caught:
        load(make_spec(model={"engine": engine, "path": "model.onnx"}, output=output))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("damage", "kind", "piece"),
    [
        (lambda data: data[: len(data) // 2], MissingInputError, "truncated"),
        (lambda data: b"", MissingInputError, "truncated"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", SpecError, "damaged"),
        (lambda data: pickle.dumps([1, 2, 3], protocol=2), (SpecError, MissingInputError), "weights.pt"),
    ],
    ids=["truncated", "empty", "a git-lfs pointer", "a list"],
)
@pytest.mark.parametrize("trust", ["true", "false"])
def test_damaged_checkpoint(
    make_spec: MakeSpec,
    tmp_path: Path,
    output: Section,
    damage: Callable[[bytes], bytes],
    kind: type[ChunkflowError] | tuple[type[ChunkflowError], ...],
    piece: str,
    trust: str,
) -> None:
    path = make_spec(model=bare_state(tmp_path, trained()) | {"trust": trust == "true"}, output=output)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(damage(weights.read_bytes()))
    check_refused(path, kind, "model.weights", str(weights), piece)


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_checkpoint_that_runs_code_is_refused_unless_trusted(
    make_spec: MakeSpec, tmp_path: Path, output: Section
) -> None:
    model = bare_state(tmp_path, trained())
    proof = tmp_path / "ran"
    torch.save({"state_dict": trained().state_dict(), "harmful": Harmful(proof)}, tmp_path / "weights.pt")
    path = make_spec(model=model, output=output)
    check_refused(path, SpecError, "model.weights", "weights.pt", "run code", "model.trust: true")
    assert not proof.exists()
    load(path, "model.trust=true")
    assert proof.exists()


def test_archive_that_runs_code_is_refused_unless_trusted(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch unpickles the sample inputs in a ``.pt2``, though the network needs none of them."""
    proof = tmp_path / "ran"
    program = torch.export.export(trained(), (torch.zeros(1, 1, *PATCH),))
    program._example_inputs = ((Harmful(proof),), {})
    torch.export.save(program, tmp_path / "model.pt2")
    path = make_spec(model=pytorch(path="model.pt2", weights=...), output=output)
    check_refused(path, SpecError, "model.path", f"{tmp_path}/model.pt2", "run code", "model.trust: true")
    assert not proof.exists()
    # PyTorch warns that the archive has needed a pickle, with an argument too few for its message
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
    load(path, "model.trust=true")
    assert proof.exists()


def test_checkpoint_of_another_network(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=bare_state(tmp_path, trained()), output=output)
    torch.save(torch.nn.Conv3d(1, 2, 5).state_dict(), tmp_path / "weights.pt")
    check_refused(path, SpecError, "model.weights", "does not fit the model", "conv.weight")
    torch.save({"state_dict": 5}, tmp_path / "weights.pt")
    check_refused(path, SpecError, "model.weights", "int", "expected a state_dict")


@pytest.mark.parametrize("name", ["model.pt", "model.pt2"])
def test_checkpoint_given_as_the_model(make_spec: MakeSpec, tmp_path: Path, output: Section, name: str) -> None:
    torch.save(trained().state_dict(), tmp_path / name)
    path = make_spec(model=pytorch(path=name, weights=..., trust=True), output=output)
    check_refused(path, SpecError, "model.path", str(tmp_path / name), "can't be loaded")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("def f(:\n", ["SyntaxError", "line 1"]),
        ("import torch\n\nraise ValueError('not today')\n", ["ValueError: not today", "model.py, line 3"]),
        ("import no_such_module\n", ["No module named 'no_such_module'"]),
        ("import sys\nsys.exit(0)\n", ["SystemExit"]),
        ("x = 1\n", ["defines none of InstantiatedModel, load_model and PatchInferencer"]),
        (NET + "InstantiatedModel = Net\n", ["Net", "expected an instance of a network"]),
        ("InstantiatedModel = 5\n", ["gives 5 as its model"]),
        ("def load_model(checkpoint): return None\n", ["gives None as its model"]),
        ("def load_model(checkpoint): return open('/nix/weights')\n", ["FileNotFoundError", "/nix/weights"]),
        ("class PatchInferencer:\n    pass\n", ["TypeError"]),
    ],
)
def test_model_file_that_can_not_be_used(
    make_spec: MakeSpec, tmp_path: Path, output: Section, text: str, pieces: list[str]
) -> None:
    write(tmp_path, text)
    path = make_spec(model=pytorch(weights=...), output=output)
    check_refused(path, SpecError, "model.path", f"{tmp_path}/model.py", *pieces)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_network_with_two_inputs(make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str) -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    example = torch.zeros(1, 1, *PATCH)
    torch.onnx.export(Sum(), (example, example), str(tmp_path / "sum.onnx"), dynamo=False)
    with pytest.raises(SpecError, match="has 2 inputs, expected a network with one"):
        load(make_spec(model={"engine": engine, "path": "sum.onnx"}, output=output))


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("model", "pieces"),
    [
        ({"engine": "onnx", "path": "model.py"}, ["model.path: model.py", "onnx does not run such files"]),
        ({"engine": "pytorch", "path": "model.onnx"}, ["model.path: model.onnx", "pytorch does not run such files"]),
        ({"engine": "openvino", "path": "model.xml", "weights": "w.pt"}, ["model.weights: only for networks in a .py"]),
        ({"engine": "onnx", "path": "m.onnx", "batch_statistics": True}, ["model.batch_statistics: only for"]),
        ({"engine": "openvino", "path": "model.py", "compile": True}, ["model.compile: only for the engine pytorch"]),
        ({"engine": "openvino", "path": "model.py", "device": "cuda"}, ["model.device: cuda", "runs on CPUs"]),
        ({"engine": "pznet", "path": "net", "precision": "bfloat16"}, ["model.precision: bfloat16", "float32"]),
    ],
)
def test_settings_that_an_engine_would_ignore(make_spec: MakeSpec, model: Section, pieces: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(make_spec(model=model))
    for piece in pieces:
        assert piece in str(caught.value)


def test_precision_and_device_that_onnx_runtime_can_not_choose(
    make_spec: MakeSpec, tmp_path: Path, output: Section
) -> None:
    path = make_spec(model=onnx_file(tmp_path, engine="onnx"), output=output)
    with pytest.raises(SpecError, match=r"model\.precision: bfloat16: the precision of an ONNX file is in the file"):
        load(path, "model.precision=bfloat16")
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match=r"model\.device: cuda, but ONNX Runtime has no GPU here"):
            load(path, "model.device=cuda")
