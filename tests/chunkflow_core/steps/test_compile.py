"""The command ``compile`` tells which engine is the fastest for a model here.

It also tells how far an engine's numbers are from the reference.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from chunkflow_core.errors import UsageError
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.compile import Measurement, Setting, fastest, sample, settings, spec_lines

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]

MODEL = """
import torch
torch.manual_seed(3)
InstantiatedModel = torch.nn.Sequential(
    torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 1, 3, padding=1), torch.nn.Sigmoid()
)
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPUs, and an empty cache."""
    monkeypatch.setenv("CHUNKFLOW_CPUS", "2")
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    return make_spec(model={"engine": "pytorch", "path": "model.py"})


def rows(printed: str) -> list[list[str]]:
    """Words of the table's lines, without its head."""
    table, _, _ = printed.partition("\n\n")
    return [line.replace("►", "").split() for line in table.splitlines()[1:]]


@pytest.mark.long
def test_table_and_lines_for_the_spec(
    spec: Path, tmp_path: Path, python: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs as it is typed, with every engine that takes the model.

    What it prints can be put into the spec.
    """
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))  # which PyTorch would look for once in a process
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    outcome = python("-m", "chunkflow_core", "compile", spec, "--patches", 3)
    assert outcome.returncode == 0, outcome.stderr
    assert "Traceback" not in outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].split() == ["engine", "precision", "threads", "×", "streams", "s/patch", "speed-up", "difference"]
    found = {tuple(row[: row.index("×") + 2]): row[row.index("×") + 2 :] for row in rows(outcome.stdout)}
    for engine in ("pytorch", "openvino"):
        for split in (("1", "×", "2"), ("2", "×", "1")):
            seconds, _, difference = found[engine, "float32", *split]
            assert 0 < float(seconds) < 10
            assert float(difference) <= 1e-5
            if (engine, "bfloat16", *split) in found and engine == "pytorch":
                assert 1e-4 < float(found[engine, "bfloat16", *split][2]) < 3e-2
    assert found["pytorch", "float32", "1", "×", "2"][1:] == ["1.00", "0.0e+00"]
    # what can't be run has a row with the reason
    assert "needs a C++ compiler" in " ".join(found["pytorch", "compiled", "float32", "1", "×", "2"])
    (marked,) = [line for line in lines if line.startswith("►") and "×" in line]
    assert "float32" in marked
    assert "within 1e-05 of pytorch float32" in outcome.stdout
    section = yaml.safe_load(outcome.stdout.partition("in the spec:\n")[2])["model"]
    assert section["engine"] == marked.split()[1]
    changed = tmp_path / "changed.yaml"
    content = yaml.safe_load(spec.read_text())
    content["model"] |= section
    changed.write_text(yaml.safe_dump(content))
    assert load_spec(changed).model.precision == "float32"
    # the conversion is there for the blocks to come
    assert len(list((tmp_path / "cache" / "openvino").iterdir())) == 1
    assert not (tmp_path / "output").exists()


def test_one_engine_only(spec: Path, chunkflow: Command) -> None:
    outcome = chunkflow("compile", spec, "--engines", "openvino", "--patches", 1, "--tolerance", 0.1)
    assert outcome.returncode == 0
    engines = [row[0] for row in rows(outcome.stdout)]
    assert engines[0] == "pytorch"  # the reference is always there
    assert engines.count("openvino") == 4
    assert "within 0.1 of pytorch float32" in outcome.stdout


def test_onnx_model(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    """The reference of an ONNX model is its own engine."""
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 1, 3, padding=1), torch.nn.Sigmoid())
    with pytest.warns(DeprecationWarning):
        torch.onnx.export(network, (torch.zeros(1, 1, 8, 16, 16),), str(tmp_path / "model.onnx"), dynamo=False)
    spec = make_spec(model={"engine": "onnx", "path": "model.onnx"})
    outcome = chunkflow("compile", spec, "--patches", 2)
    assert outcome.returncode == 0, outcome.stderr
    found = rows(outcome.stdout)
    assert {row[0] for row in found} == {"onnx", "openvino"}
    assert found[0][:2] == ["onnx", "float32"]
    assert "within 1e-05 of onnx float32" in outcome.stdout


def test_identity_has_only_itself(make_spec: MakeSpec, chunkflow: Command) -> None:
    outcome = chunkflow("compile", make_spec())
    assert outcome.returncode == 0
    assert {row[0] for row in rows(outcome.stdout)} == {"identity"}


def test_a_patch_inferencer_is_told_not_to_be_convertible(spec: Path, tmp_path: Path, chunkflow: Command) -> None:
    text = "class PatchInferencer:\n def __init__(self, weights): pass\n def __call__(self, patch): return patch\n"
    (tmp_path / "model.py").write_text(text)
    outcome = chunkflow("compile", spec, "--patches", 1)
    assert outcome.returncode == 0
    assert "can't convert a PatchInferencer" in outcome.stdout
    found = rows(outcome.stdout)
    assert found[0][:5] == ["pytorch", "float32", "1", "×", "1"]  # not of use from two threads


@pytest.mark.parametrize(
    ("text", "code", "piece"),
    [
        ("import no_such_module\n", 78, "No module named 'no_such_module'"),
        ("import torch\ndef InstantiatedModel(x): return x * torch.nan\n", 65, "NaN or infinity in float32 already"),
        ("import torch\ndef InstantiatedModel(x): return torch.cat([x, x], 1)\n", 65, "(1, 2, 8, 16, 16)"),
    ],
)
def test_reference_that_can_not_be_run(
    spec: Path, tmp_path: Path, chunkflow: Command, text: str, code: int, piece: str
) -> None:
    (tmp_path / "model.py").write_text(text)
    outcome = chunkflow("compile", spec)
    assert outcome.returncode == code
    assert piece in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--engines", "pznet"], "--engines: pznet: expected some of pytorch,openvino,onnx"),
        (["--engines", "onnx"], "--engines onnx: model.py can be run by pytorch, openvino"),
        (["--tolerance", "-1"], "--tolerance: -1: expected at least 0"),
        (["--patches", "0"], "--patches: 0: expected at least 1"),
    ],
)
def test_wrong_usage(spec: Path, chunkflow: Command, arguments: list[str], piece: str) -> None:
    outcome = chunkflow("compile", spec, *arguments)
    assert outcome.returncode == 64
    assert piece in outcome.stderr


def test_settings_begin_with_the_reference_and_hold_the_specs_own(spec: Path) -> None:
    own = load_spec(spec, ["model.engine=openvino", "model.precision=bfloat16", "model.threads=3", "model.streams=5"])
    found = settings(own, ["pytorch"])
    assert found[0] == Setting("pytorch", "float32", 1, 2)
    assert found[-1] == Setting("openvino", "bfloat16", 3, 5)
    assert len(found) == len(set(found))
    with pytest.raises(UsageError):
        settings(own, ["onnx"])


def test_the_fastest_is_near_enough() -> None:
    def measured(engine: str, seconds: float | None, difference: float | None) -> Measurement:
        return Measurement(Setting(engine, "float32", 1, 1), seconds, difference)

    slow, fast, far = measured("slow", 3, 0), measured("fast", 2, 1e-6), measured("far", 1, 1e-2)
    several = [slow, fast, far, measured("failed", None, None), measured("nan", 0.1, float("nan"))]
    assert fastest(several, 1e-5) is fast
    assert fastest(several, 0) is slow
    assert fastest(several, 1) is far


def test_lines_for_the_spec_say_what_differs_from_the_default() -> None:
    assert yaml.safe_load(spec_lines(Setting("pytorch", "float32", 2, 1, compile=True))) == {
        "model": {"engine": "pytorch", "precision": "float32", "threads": 2, "compile": True}
    }


def test_sample_is_of_the_input_layer_from_all_over_the_roi(spec: Path) -> None:
    taken = sample(load_spec(spec), 5)
    assert [patch.shape for patch in taken] == [(1, 8, 16, 16)] * 5
    assert all(patch.dtype == np.float32 and patch.min() >= 0 and patch.max() <= 1 for patch in taken)
    assert len({patch.tobytes() for patch in taken}) == 5


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compiled_network_is_measured(spec: Path, chunkflow: Command) -> None:
    outcome = chunkflow("compile", spec, "--engines", "pytorch", "--patches", 1)
    (row,) = [row for row in rows(outcome.stdout) if row[:3] == ["pytorch", "compiled", "float32"]]
    assert float(row[-1]) <= 1e-5
