"""Networks of bfloat16, in any form: they run in what they declare, or are refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from chunkflow_core.__main__ import main
from chunkflow_core.engines.element_types import cast, of_bfloat16
from chunkflow_core.errors import SpecError
from tests.support.models.forms import write
from tests.support.models.loading import PATCH, MakeSpec, Section, load, patches

from .conftest import check_refused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)
        self.norm = torch.nn.BatchNorm3d(2)

    def forward(self, x):
        output: torch.Tensor = self.conv(x)
        return output

{before}
InstantiatedModel = Net()
InstantiatedModel.{of}.to(torch.{kind})
"""
KERNEL = np.random.default_rng(2).normal(0, 0.3, (2, 1, 3, 3, 3)).astype(np.float32)


def network(folder: Path, kind: str = "bfloat16", of: str = "conv", before: str = "") -> Section:
    """A model file whose weights are of a type: the convolution's, or all (``eval()``)."""
    write(folder, NET.format(kind=kind, of=of, before=before))
    return {"engine": "pytorch", "path": "model.py"}


def expected(patch: NDArray[np.float32], kind: torch.dtype) -> NDArray[np.float32]:
    """What the network of the text gives."""
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(1, 2, 3, padding=1).to(kind)
    with torch.inference_mode():
        outputs = [conv(torch.from_numpy(patch[i : i + 1]).to(kind)) for i in range(len(patch))]
        result: NDArray[np.float32] = torch.cat(outputs).float().numpy()
    return result


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("of", ["conv", "eval()"])
def test_weights_say_what_a_model_file_takes(
    make_spec: MakeSpec, tmp_path: Path, output: Section, kind: str, of: str
) -> None:
    """Those of some layers, too, where the first are of this type."""
    path = make_spec(model=network(tmp_path, kind, of), output=output)
    np.testing.assert_array_equal(load(path)(patches()), expected(patches(), getattr(torch, kind)))


def test_a_network_that_casts_its_input_gets_float32(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    """What it does with it is its own affair."""
    text = NET.format(kind="bfloat16", of="conv", before="").replace("self.conv(x)", "self.scaled(x)")
    scaled = "    def scaled(self, x):\n        return self.conv((1000.3 * x).to(torch.bfloat16))\n\n    def forward"
    write(tmp_path, text.replace("    def forward", scaled))
    path = make_spec(model={"engine": "pytorch", "path": "model.py"}, output=output | {"range": [-4096, 4096]})
    given = load(path)(patches())
    np.testing.assert_array_equal(given, expected(patches() * np.float32(1000.3), torch.bfloat16))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_functions_around_a_network(make_spec: MakeSpec, tmp_path: Path, output: Section, kind: str) -> None:
    before = "def pre_process(batch):\n    return batch * 2\n\ndef post_process(output):\n    return -output\n"
    path = make_spec(model=network(tmp_path, kind, "eval()", before=before), output=output)
    np.testing.assert_array_equal(load(path)(patches()), -expected(2 * patches(), getattr(torch, kind)))


@pytest.mark.parametrize("name", ["model.pt", pytest.param("model.pt2", marks=pytest.mark.long)])
def test_torchscript_and_exported_programs(make_spec: MakeSpec, tmp_path: Path, output: Section, name: str) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(1, 2, 3, padding=1).to(torch.bfloat16).eval()
    example = torch.zeros(1, 1, *PATCH, dtype=torch.bfloat16)
    if name == "model.pt":
        torch.jit.trace(conv, example).save(str(tmp_path / name))  # type: ignore[no-untyped-call]
    else:
        torch.export.save(torch.export.export(conv, (example,)), tmp_path / name)
    path = make_spec(model={"engine": "pytorch", "path": name, "trust": True}, output=output)
    np.testing.assert_array_equal(load(path)(patches()), expected(patches(), torch.bfloat16))


@pytest.mark.long
def test_a_whole_run(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=network(tmp_path, of="eval()") | {"activation": "softmax"}, output=output)
    assert main(["run", str(path), "--seams", "2"]) == 0
    assert main(["verify", str(path), "--deep"]) == 0


def onnx_file(folder: Path, given: str) -> Section:
    """A convolution in float32 of an input of bfloat16, whose output is cast to a type."""
    kind = {"float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16}[given]
    nodes = [
        helper.make_node("Cast", ["patch"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["cast", "kernel"], ["sum"], pads=[1] * 6),
        helper.make_node("Cast", ["sum"], ["logits"], to=kind),
    ]
    inputs = [helper.make_tensor_value_info("patch", TensorProto.BFLOAT16, ["n", 1, *PATCH])]
    outputs = [helper.make_tensor_value_info("logits", kind, ["n", 2, *PATCH])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(KERNEL, "kernel")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, folder / "model.onnx")
    return {"path": "model.onnx"}


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_compiled_networks(make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str, given: str) -> None:
    """Numbers are rounded to bfloat16 before they go in; those that come out are not misread."""
    path = make_spec(model=onnx_file(tmp_path, given) | {"engine": engine}, output=output)
    if (engine, given) == ("onnx", "bfloat16"):
        check_refused(path, SpecError, "model.path: model.onnx gives bfloat16", "logits", "float32")
        return
    rounded = torch.from_numpy(patches()).to(torch.bfloat16).float()
    wanted = torch.nn.functional.conv3d(rounded, torch.from_numpy(KERNEL), padding=1).numpy()
    made = load(path)(patches())
    rtol, atol = (2**-8, 0.0) if given == "bfloat16" else (0.0, 1e-6)
    np.testing.assert_allclose(made, wanted, rtol=rtol, atol=atol)
    np.testing.assert_array_equal(load(path)(rounded.numpy()), made)


def test_openvino_does_not_convert_them(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=network(tmp_path, of="eval()") | {"engine": "openvino"}, output=output)
    check_refused(path, SpecError, "model.engine: openvino", "model.py", "takes bfloat16", "pytorch")


def test_numbers_are_rounded_as_torch_does() -> None:
    """To the nearest, half to even: all that lie between two numbers, at both ends of the type."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1], np.uint32)
    values = (upper[:, None] | lower).view(np.float32)
    given = of_bfloat16(cast(values, "bfloat16"))
    wanted = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(np.isnan(given), np.isnan(wanted))
    known = ~np.isnan(wanted)
    np.testing.assert_array_equal(given[known].view(np.uint32), wanted[known].view(np.uint32))
