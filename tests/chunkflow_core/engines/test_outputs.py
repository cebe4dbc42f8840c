"""A model's output: which of several, cropped and activated; of another shape or range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunkflow_core.errors import DataError, SpecError
from chunkflow_core.inference_and_donate import main as infer
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.prepare import make_output
from tests.support.models.forms import pytorch, trained, write
from tests.support.models.loading import BATCH, PATCH, MakeSpec, Section, load, patches
from tests.support.models.two_convolutions import net, onnx_file, python_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters
Command = Callable[..., Any]


# ------------------------------------------------------------- one of several outputs; crop; logits


class Two(torch.nn.Module):
    """Two outputs, of which the second is the larger."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.net(x)
        return y[:, :1], y


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_output_is_taken_by_index_by_name_and_by_channels(
    make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str
) -> None:
    example = torch.zeros(1, 1, *PATCH)
    torch.onnx.export(
        Two(), (example,), str(tmp_path / "two.onnx"), dynamo=False, output_names=["membrane", "affinity"]
    )
    path = make_spec(model={"engine": engine, "path": "two.onnx"}, output=output)
    wanted = net()(torch.from_numpy(patches())).detach().numpy()
    for override in ("model.output=1", "model.output=-1", "model.output=affinity", "model.output=null"):
        np.testing.assert_allclose(load(path, override)(patches()), wanted, atol=1e-5)
    one = load(path, "model.output=membrane", "output.channels=1")(patches())
    np.testing.assert_allclose(one, wanted[:, :1], atol=1e-5)
    for value, piece in [("2", "the model gives 2 outputs"), ("b", "b is not among the model's outputs ['membrane', ")]:
        with pytest.raises(SpecError) as caught:
            load(path, f"model.output={value}")
        assert piece in str(caught.value)
    with pytest.raises(SpecError, match="of which 0 have 3 channels; name the one to take"):
        load(path, "output.channels=3")
    np.testing.assert_allclose(load(path, "output.channels=[1]")(patches()), wanted[:, 1:], atol=1e-5)
    first = load(path, "output.channels=[0]", "model.channels=1")(patches())
    np.testing.assert_allclose(first, wanted[:, :1], atol=1e-5)
    with pytest.raises(SpecError, match="of which 0 have 4 or more channels; name the one to take"):
        load(path, "output.channels=[3]")
    with pytest.raises(SpecError, match="of which 2 have 1 or more channels; name the one to take"):
        load(path, "output.channels=[0]")


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("engine", ["pytorch", "openvino", "onnx"])
def test_crop_and_activation(
    make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str, activation: str
) -> None:
    """The softmax is one over the channels of each voxel; large logits are no trouble."""
    model = onnx_file(tmp_path) if engine == "onnx" else python_file(tmp_path)
    geometry = {"output_patch_size": [6, 14, 14], "patch_overlap": [0, 2, 2]}
    path = make_spec(**geometry, model={**model, "engine": engine, "activation": activation}, output=output)
    far = patches() * 1000
    for batch in (patches(), far, -far):
        logits = net()(torch.from_numpy(batch))[:, :, 1:-1, 1:-1, 1:-1].detach()
        expected = (torch.sigmoid(logits) if activation == "sigmoid" else torch.softmax(logits, 1)).numpy()
        np.testing.assert_allclose(load(path)(batch), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "changes", "channel"),
    [
        ("[torch.cat([x, 2 * x], 1), 3 * x]", ("output.channels=[1]",), 2),
        ("{'a': x, 'b': torch.cat([x, 2 * x, 3 * x], 1)}", ("output.channels=[2]",), 3),
        ("{'a': torch.cat([x, 2 * x], 1), 'b': torch.cat([x, 3 * x, 4 * x], 1)}", ("model.channels=2",), 2),
        ("{'a': torch.cat([x, 2 * x], 1), 'b': torch.cat([x, 3 * x, 4 * x], 1)}", ("model.channels=3",), 3),
        ("{'a': torch.cat([x, 2 * x], 1), 'b': torch.cat([x, 3 * x, 4 * x], 1)}", ("model.output=b",), 3),
    ],
)
def test_channels_are_of_the_output_that_is_taken(
    make_spec: MakeSpec, tmp_path: Path, output: Section, body: str, changes: tuple[str, ...], channel: int
) -> None:
    write(tmp_path, model_of(body))
    path = make_spec(model=pytorch(weights=...), output=output | {"channels": [1]})
    np.testing.assert_array_equal(load(path, *changes)(patches()), channel * patches())


@pytest.mark.parametrize("engine", ["pytorch", "onnx"])
def test_channels_that_are_not_there(make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str) -> None:
    """The long tests ask every engine."""
    model = onnx_file(tmp_path) if engine == "onnx" else python_file(tmp_path)
    path = make_spec(model={**model, "engine": engine}, output=output)
    for changes, told in [
        (("output.channels=[1,2]",), r"\(1, 3 or more, 8, 16, 16\) \(batch, output\.channels,"),
        (("output.channels=[0]", "model.channels=1"), r"\(1, 1, 8, 16, 16\) \(batch, model\.channels,"),
    ]:
        with pytest.raises(DataError, match=told):
            load(path, *changes)(patches(1))


LOGITS = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, 2 * x, -80 * x, torch.full_like(x, {})], 1)

InstantiatedModel = Net()
"""


@pytest.mark.parametrize("engine", ["pytorch", "openvino"])
@pytest.mark.parametrize("number", [90.0, -1e30, -np.inf, np.inf])
def test_softmax_of_large_and_infinite_logits(
    make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str, number: float
) -> None:
    """One of -inf is of a class that never is; others that are not finite give none."""
    write(tmp_path, LOGITS.format(f"float('{number}')"))
    model = {"engine": engine, "path": "model.py", "activation": "softmax"}
    given = load(make_spec(model=model, output=output | {"channels": 4}))(patches())
    if number == np.inf:
        assert np.isnan(given).all()
        return
    x = torch.from_numpy(patches()).double()
    expected = torch.cat([x, 2 * x, -80 * x, torch.full_like(x, number)], 1).softmax(1)
    np.testing.assert_allclose(given, expected.numpy(), rtol=2e-5, atol=1e-30)
    assert given.min() >= 0
    assert given.max() <= 1


def test_softmax_of_sections(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    write(tmp_path, model_of("torch.cat([x, 2 * x, 3 * x], 1)"))
    model = pytorch(weights=..., activation="softmax")
    flat = load(make_spec(model=model | {"dimensions": 2}, output=output | {"channels": [2, 0]}))(patches())
    whole = load(make_spec(model=model, output=output | {"channels": 3}))(patches())
    np.testing.assert_array_equal(flat, whole[:, [2, 0]])


# -------------------------------------------------------------------- outputs that are not declared


def model_of(body: str) -> str:
    """A model file whose network is one expression of the batch ``x``."""
    return f"import torch, numpy\ndef InstantiatedModel(x):\n    return {body}\n"


@pytest.mark.parametrize(
    ("body", "pieces"),
    [
        ("x", ["(1, 1, 8, 16, 16)", "(1, 2, 8, 16, 16)", "output.channels"]),
        ("torch.cat([x, x, x], 1)", ["(1, 3, 8, 16, 16)", "(1, 2, 8, 16, 16)"]),
        ("torch.cat([x, x], 1)[:, :, :6]", ["(1, 2, 6, 16, 16)", "(1, 2, 8, 16, 16)", "output_patch_size"]),
        ("torch.cat([x, x], 1)[:0]", ["(0, 2, 8, 16, 16)", "(1, 2, 8, 16, 16)"]),
        ("x[:, 0]", ["(1, 8, 16, 16)", "(1, 2, 8, 16, 16)"]),
        ("torch.cat([x, x], 1).mean()", ["()", "(1, 2, 8, 16, 16)"]),
        ("None", ["NoneType", "expected a tensor"]),
        ("'probabilities'", ["expected a tensor"]),
        ("[]", ["a list of 0 outputs"]),
        ("[None, x]", ["NoneType"]),
        ("{'a': x, 'b': x}", ["['a', 'b']", "0 have 2 channels", "model.output"]),
        ("{'a': torch.cat([x, x], 1), 'b': torch.cat([x, x], 1)}", ["2 have 2 channels", "model.output"]),
        ("x @ x[:, :, :3]", ["the model failed", "(1, 1, 8, 16, 16)", "RuntimeError", "model.py, line 3"]),
        ("torch.nn.functional.conv3d(x, torch.ones(2, 4, 1, 1, 1))", ["the model failed", "4 channels"]),
        ("undefined(x)", ["the model failed", "NameError", "undefined", "model.py, line 3"]),
    ],
)
def test_output_that_was_not_declared(
    make_spec: MakeSpec, tmp_path: Path, output: Section, body: str, pieces: list[str]
) -> None:
    write(tmp_path, model_of(body))
    engine = load(make_spec(model=pytorch(weights=...), output=output))
    with pytest.raises(DataError) as caught:
        engine(patches(1))
    assert len(str(caught.value).splitlines()) == 1
    for piece in pieces:
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("body", "wanted", "piece"),
    [
        ("[x, x]", "2", "2, but the model gives a list of 2 outputs"),
        ("[x, x]", "first", "first, but the model gives a list of 2 outputs"),
        ("{'a': x}", "b", "b is not among the model's outputs ['a']"),
        ("torch.cat([x, x], 1)", "1", "1, but the model gives a single output"),
    ],
)
def test_output_that_the_model_does_not_give(
    make_spec: MakeSpec, tmp_path: Path, output: Section, body: str, wanted: str, piece: str
) -> None:
    write(tmp_path, model_of(body))
    engine = load(make_spec(model=pytorch(weights=...), output=output), f"model.output={wanted}")
    with pytest.raises(DataError) as caught:
        engine(patches(1))
    assert piece in str(caught.value)


def test_exported_program_of_another_patch_size(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    program = torch.export.export(trained(), (torch.zeros(BATCH, 1, 8, 16, 12),))
    torch.export.save(program, tmp_path / "model.pt2")
    path = make_spec(model=pytorch(path="model.pt2", weights=..., trust=True), output=output)
    with pytest.raises(DataError, match=r"the model failed with a batch of shape \(1, 1, 8, 16, 16\)"):
        load(path)(patches(1))


# ----------------------------------------------------------------------- values that can't be right


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("torch.where(x > 0.999, torch.nan, x)", "NaN or infinity"),
        ("torch.where(x > 0.999, torch.inf, x)", "NaN or infinity"),
        ("torch.where(x > 0.999, -torch.inf, x)", "NaN or infinity"),
        ("x * 1.5", "values from 0 to 1.5"),
        ("x - 0.5", "values from -0.5 to 0.5"),
    ],
)
def test_values_outside_the_declared_range_end_the_stage_without_a_receipt(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, capsys: pytest.CaptureFixture[str], body: str, what: str
) -> None:
    write(tmp_path, model_of(body))
    path = make_spec(model=pytorch(weights=..., batch_size=2))
    make_output(load_spec(path))
    assert infer([str(path), "--block", "1", "0", "1"]) == 65
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    told = printed.splitlines()[-1]
    assert what in told
    assert "lattice position (2, 0, 2) (z 12–20 y 0–16 x 24–40)" in told
    assert "output.range [0, 1]" in told
    assert not list(tmp_path.rglob("receipts/*/*/*.json"))
    # the same from the command that is meant to find it before a GPU is paid for
    if "x -" in body or "x *" in body:
        assert chunkflow("prepare", path).returncode == 65


def test_the_range_itself_is_inside(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    write(tmp_path, model_of("(x > 0.5).float()"))
    path = make_spec(model=pytorch(weights=...))
    assert chunkflow("prepare", path).returncode == 0
    assert infer([str(path), "--block", "0", "0", "0"]) == 0
    assert list(tmp_path.rglob("receipts/infer/*/*.json"))


def test_float_layer_in_grey_values_is_found_by_prepare(
    make_spec: MakeSpec, chunkflow: Command, tmp_path: Path
) -> None:
    """Integer layers are scaled to [0, 1], float layers are taken as they are.

    Floats of 0–255 would be a common mistake.
    """
    np.save(tmp_path / "stack.npy", np.full((20, 48, 40), 200, np.float32))
    layer = f"file://{tmp_path}/float"
    assert chunkflow("ingest", tmp_path / "stack.npy", layer, "--voxel-size", 40, 4, 4).returncode == 0
    outcome = chunkflow("prepare", make_spec(input={"path": layer}))
    assert outcome.returncode == 65
    assert "200" in outcome.stderr
    assert "output.range" in outcome.stderr
