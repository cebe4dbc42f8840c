"""What a network takes is what its file declares: no engine casts to it what it does not mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from chunkflow_core.__main__ import main
from chunkflow_core.errors import ChunkflowError, DataError, SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import open_layer
from chunkflow_core.storage.layers import NewLayer
from tests.support.models.loading import PATCH, MakeSpec, Section, load
from tests.support.volume import output_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters

KERNEL = np.random.default_rng(2).normal(0, 0.3, (2, 1, 3, 3, 3)).astype(np.float32)
TYPES = {
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "bfloat16": TensorProto.BFLOAT16,
    "bool": TensorProto.BOOL,
    **{name: getattr(TensorProto, name.upper()) for name in ("uint8", "int8", "uint16", "int16", "int32", "int64")},
}
INTEGERS = ["uint8", "int8", "uint16", "int16", "int32", "int64"]
SHIFT, DIVISOR = 100.0, 60.0
BIG = (6, 12, 12)
"""Storage chunk of inputs."""


def onnx_file(path: Path, dtype: str, *, batch: int | str = "n", patch: tuple[int, ...] = PATCH) -> None:
    """A network of a convolution that takes a type, and gives it if it is float16."""
    half = dtype == "float16"
    inner = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    kernel = KERNEL.astype(np.float16 if half else np.float32)
    numbers = [np.array(value, kernel.dtype) for value in (SHIFT, DIVISOR)]
    nodes = [
        helper.make_node("Cast", ["patch"], ["cast"], to=inner),
        helper.make_node("Sub", ["cast", "shift"], ["shifted"]),
        helper.make_node("Div", ["shifted", "divisor"], ["divided"]),
        helper.make_node("Conv", ["divided", "kernel"], ["output"], pads=[1] * 6),
    ]
    constants = [
        numpy_helper.from_array(a, n) for a, n in zip([kernel, *numbers], ["kernel", "shift", "divisor"], strict=True)
    ]
    given = helper.make_tensor_value_info("patch", TYPES[dtype], [batch, 1, *patch])
    taken = helper.make_tensor_value_info("output", inner, [batch, 2, *patch])
    graph = helper.make_graph(nodes, "g", [given], [taken], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)


class Net(torch.nn.Module):
    """The same network in PyTorch, whose weights are float32 unless it is halved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1, bias=False)
        self.conv.weight.data = torch.from_numpy(KERNEL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.conv((x.to(torch.float32) - SHIFT) / DIVISOR)
        return output


class Half(Net):
    """One that takes its input as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.conv((x - SHIFT) / DIVISOR)
        return output


def onnx_model(folder: Path, dtype: str) -> Section:
    onnx_file(folder / "model.onnx", dtype)
    return {"engine": "onnx", "path": "model.onnx"}


def onnx_by_openvino(folder: Path, dtype: str) -> Section:
    return onnx_model(folder, dtype) | {"engine": "openvino"}


def openvino_model(folder: Path, dtype: str) -> Section:
    import openvino

    onnx_file(folder / "model.onnx", dtype)
    openvino.save_model(openvino.Core().read_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    return {"engine": "openvino", "path": "model.xml"}


def exported(folder: Path, dtype: str) -> Section:
    program = torch.export.export(Net().eval(), (torch.zeros(1, 1, *PATCH, dtype=getattr(torch, dtype)),))
    torch.export.save(program, folder / "model.pt2")
    return {"engine": "pytorch", "path": "model.pt2", "trust": True}


FORMS: dict[str, Callable[[Path, str], Section]] = {
    "onnx": onnx_model,
    "openvino onnx": onnx_by_openvino,
    "openvino xml": openvino_model,
    "pt2": exported,
}


def layer_of(folder: Path, dtype: str) -> Section:
    """An input layer of some type, with the type's ends in it."""
    rng = np.random.default_rng(4)
    kind = np.dtype(dtype)
    limits = (0.0, 255.0) if kind.kind == "f" else (float(np.iinfo(kind).min), float(np.iinfo(kind).max))
    voxels = rng.uniform(max(limits[0], -400), min(limits[1], 600), (1, *PATCH)).astype(kind)
    voxels[0, 0, 0, :2] = limits
    path = folder / "typed"
    NewLayer(f"file://{path}", PATCH, dtype=dtype, resolution=(40, 4, 4), chunk=BIG).write(
        Box((0, 0, 0), PATCH), voxels
    )
    return {"path": f"file://{path}"}


def voxels_of(folder: Path, dtype: str) -> NDArray[Any]:
    scale = read_scale(f"file://{folder}/typed", 0)
    assert scale.dtype == dtype
    return open_layer(f"file://{folder}/typed", scale).read(Box((0, 0, 0), PATCH))


@pytest.fixture
def one_patch(output: Section) -> Section:
    """The rest of a spec whose volume is a patch."""
    return {
        "output": output | {"dtype": "float32", "range": [-1e5, 1e5], "chunk_size": list(PATCH)},
        "patch_size": list(PATCH),
        "patch_overlap": [0, 0, 0],
        "block_size": list(PATCH),
    }


def expected_of(numbers: NDArray[Any]) -> NDArray[np.float32]:
    with torch.inference_mode():
        result: NDArray[np.float32] = Net()(torch.from_numpy(numbers[None].astype(np.float32)))[0].numpy()
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_network_for_grey_values_gets_them(
    make_spec: MakeSpec, tmp_path: Path, one_patch: Section, form: str, dtype: str
) -> None:
    """From a layer of the same type, through the whole of a run."""
    layer = dtype if dtype in ("uint8", "int8", "uint16", "int16") else "uint16"
    given = layer_of(tmp_path, layer) | {"values": {"scale": "raw"}}
    path = make_spec(model=FORMS[form](tmp_path, dtype), input=given, **one_patch)
    assert main(["run", str(path), "--seams", "1"]) == 0
    wanted = expected_of(voxels_of(tmp_path, layer))
    given_back = output_of(path).astype(np.float32)
    np.testing.assert_allclose(given_back, wanted, rtol=1e-5, atol=0.05)  # the step of the range
    assert np.ptp(wanted) > 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("values", [{}, {"scale": "symmetric"}, {"mean": 3, "std": 2}, {"percentiles": [1, 99]}])
def test_fractions_are_not_cast_to_integers(
    make_spec: MakeSpec, tmp_path: Path, one_patch: Section, form: str, values: Section
) -> None:
    path = make_spec(
        model=FORMS[form](tmp_path, "uint8"), input=layer_of(tmp_path, "uint8") | {"values": values}, **one_patch
    )
    with pytest.raises(SpecError) as caught:
        load(path)
    for piece in ("input.values.scale", "uint8", str(FORMS[form](tmp_path, "uint8")["path"]), "{scale: raw}"):
        assert piece in str(caught.value)
    assert main(["prepare", str(path)]) == 78
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("layer", "dtype", "values", "pieces"),
    [
        ("uint16", "uint8", {}, ["input.path: the layer has uint16 voxels", "uint8"]),
        ("uint8", "int8", {}, ["input.path: the layer has uint8 voxels", "int8"]),
        ("int16", "uint16", {}, ["input.path: the layer has int16 voxels", "uint16"]),
        ("float32", "uint8", {}, ["input.path: the layer has float32 voxels", "uint8"]),
        ("int32", "int32", {}, ["input.path: the layer has int32 voxels", "int32"]),
        ("uint8", "uint8", {"clip": [0.5, 20]}, ["input.values.clip: [0.5, 20]", "uint8", "two integers"]),
        ("uint8", "uint8", {"clip": [-1, 20]}, ["input.values.clip: [-1, 20]", "uint8", "two integers"]),
        ("uint8", "uint8", {"clip": [0, 300]}, ["input.values.clip: [0, 300]", "uint8", "two integers"]),
    ],
)
def test_numbers_that_a_type_does_not_hold(
    make_spec: MakeSpec, tmp_path: Path, one_patch: Section, layer: str, dtype: str, values: Section, pieces: list[str]
) -> None:
    given = layer_of(tmp_path, layer) | {"values": {"scale": "raw"} | values}
    for form in ("onnx", "openvino onnx", "pt2"):
        path = make_spec(model=FORMS[form](tmp_path, dtype), input=given, **one_patch)
        with pytest.raises(SpecError) as caught:
            load(path)
        for piece in pieces:
            assert piece in str(caught.value)


@pytest.mark.parametrize("invert", [False, True])
def test_inverted_grey_values_are_grey_values(
    make_spec: MakeSpec, tmp_path: Path, one_patch: Section, *, invert: bool
) -> None:
    for layer in ("uint8", "int8"):
        folder = tmp_path / layer
        folder.mkdir()
        given = layer_of(folder, layer) | {"values": {"scale": "raw", "invert": invert, "clip": [-100, 100]}}
        if layer == "uint8":
            given["values"]["clip"] = [3, 200]
        path = make_spec(model=onnx_model(tmp_path, layer), input=given, **one_patch)
        spec_folder = tmp_path / "output"
        assert main(["run", str(path), "--seams", "0", "--set", f"output.path=file://{spec_folder}{layer}"]) == 0
        voxels = voxels_of(folder, layer).astype(int)
        turned = (255 if layer == "uint8" else -1) - voxels if invert else voxels
        spec = load_spec(path, [f"output.path=file://{spec_folder}{layer}"])
        wanted = expected_of(np.clip(turned, *given["values"]["clip"]))
        np.testing.assert_allclose(Workspace(spec).output.read(spec.grid.roi), wanted, atol=0.05)


@pytest.mark.parametrize("form", [*FORMS, "script"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_other_floats(make_spec: MakeSpec, tmp_path: Path, one_patch: Section, form: str, dtype: str) -> None:
    """They get the numbers of float32, and their output is float32."""
    if form == "script":
        network = Half().to(getattr(torch, dtype)).eval()
        example = torch.zeros(1, 1, *PATCH, dtype=getattr(torch, dtype))
        torch.jit.trace(network, example).save(str(tmp_path / "model.pt"))  # type: ignore[no-untyped-call]
        model: Section = {"engine": "pytorch", "path": "model.pt"}
    else:
        model = FORMS[form](tmp_path, dtype)
    path = make_spec(model=model, **one_patch)
    patch = np.random.default_rng(8).uniform(0, 200, (1, 1, *PATCH)).astype(np.float32)
    given = load(path)(patch)
    assert given.dtype == np.float32
    tolerance = 2e-2 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(given[0], expected_of(patch[0]), atol=tolerance)
    if dtype == "float16":
        nearest = load(path)(patch.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(given, nearest)
        with pytest.raises(DataError, match=r"takes float16, which ends at 65504, and a patch has a number of size 7"):
            load(path)(patch + np.float32(7e4))


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_types_in_which_no_numbers_are_made(
    make_spec: MakeSpec, tmp_path: Path, one_patch: Section, engine: str
) -> None:
    path = make_spec(model=onnx_model(tmp_path, "bool") | {"engine": engine}, **one_patch)
    with pytest.raises(SpecError, match=r"model\.path: model\.onnx (takes|can't be loaded)") as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1


# --------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("form", ["onnx", "openvino onnx", "pt2"])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
def test_a_batch_that_is_fixed_in_the_file(
    make_spec: MakeSpec, tmp_path: Path, one_patch: Section, form: str, batch: int
) -> None:
    """The same bits at any place, and those of the network that takes any batch."""
    path = make_spec(model=FORMS[form](tmp_path, "float32"), **one_patch)
    patches = np.random.default_rng(8).random((5, 1, *PATCH), np.float32)
    alone = load(path)(patches)
    if form == "pt2":
        program = torch.export.export(Net().eval(), (torch.zeros(batch, 1, *PATCH),))
        torch.export.save(program, tmp_path / "model.pt2")
    else:
        onnx_file(tmp_path / "model.onnx", "float32", batch=batch)
    engine = load(path)
    given = engine(patches)
    assert given.shape == (5, 2, *PATCH)
    np.testing.assert_allclose(given, alone, atol=1e-6)
    np.testing.assert_array_equal(engine(patches[::-1].copy()), given[::-1])
    for index in range(5):
        np.testing.assert_array_equal(engine(patches[index : index + 1])[0], given[index])


def test_patches_of_another_size_than_the_file_fixes(make_spec: MakeSpec, tmp_path: Path, one_patch: Section) -> None:
    onnx_file(tmp_path / "model.onnx", "float32", patch=(4, 16, 16))
    path = make_spec(model={"engine": "onnx", "path": "model.onnx"}, **one_patch)
    with pytest.raises(ChunkflowError, match=r"patch_size: model\.onnx takes \['any', 1, 4, 16, 16\], the spec gives"):
        load(path)
