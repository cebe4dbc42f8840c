"""Networks of two dimensions run each section of a patch by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunkflow_core.errors import DataError, SpecError
from chunkflow_core.spec import load_spec
from tests.support.models.forms import pytorch, write
from tests.support.models.loading import PATCH, MakeSpec, Section, load, patches

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters
Command = Callable[..., Any]

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        assert x.ndim == 4
        return self.conv(x)
"""


class Net(torch.nn.Module):
    """The network of the text above."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.conv(x)
        return output


def python(folder: Path) -> Section:
    write(folder, NET + "InstantiatedModel = Net()\n")
    return pytorch(weights=...)


def of_a_dict(folder: Path) -> Section:
    text = "{'a': x, 'b': super().forward(x), 'c': x[:, 0]}"
    write(folder, NET + f"class D(Net):\n def forward(self, x): return {text}\nInstantiatedModel = D()")
    return pytorch(weights=...)


def with_functions_around(folder: Path) -> Section:
    write(
        folder,
        NET
        + "InstantiatedModel = Net()\n"
        + "def pre_process(x):\n    assert x.ndim == 4\n    return -x\n"
        + "def post_process(y): return 2 * InstantiatedModel.conv.bias[None, :, None, None] - y\n",
    )
    return pytorch(weights=...)


def inferencer(folder: Path) -> Section:
    write(
        folder,
        NET
        + "class PatchInferencer:\n"
        + "    def __init__(self, weights, mask): self.net, self.mask = Net().eval(), mask\n"
        + "    def __call__(self, x): return self.net(torch.from_numpy(x)).numpy() * self.mask\n",
    )
    return pytorch(weights=...)


def torchscript(folder: Path) -> Section:
    torch.jit.trace(Net().eval(), torch.zeros(1, 1, *PATCH[1:])).save(str(folder / "model.pt"))  # type: ignore[no-untyped-call]
    return pytorch(path="model.pt", weights=...)


def onnx(folder: Path) -> Section:
    example = torch.zeros(1, 1, *PATCH[1:])
    torch.onnx.export(Net().eval(), (example,), str(folder / "model.onnx"), dynamo=False)
    return {"engine": "onnx", "path": "model.onnx"}


def openvino(folder: Path) -> Section:
    return python(folder) | {"engine": "openvino"}


def openvino_around(folder: Path) -> Section:
    return with_functions_around(folder) | {"engine": "openvino"}


def openvino_onnx(folder: Path) -> Section:
    return onnx(folder) | {"engine": "openvino"}


FORMS = [
    *(python, of_a_dict, with_functions_around, inferencer, torchscript),
    *(onnx, openvino, openvino_around, openvino_onnx),
]


@pytest.mark.parametrize("form", FORMS)
def test_each_section_is_run_by_itself(
    make_spec: MakeSpec, tmp_path: Path, output: Section, form: Callable[[Path], Section]
) -> None:
    path = make_spec(model={**form(tmp_path), "dimensions": 2}, output=output)
    engine, batch = load(path), patches()
    given = engine(batch)
    assert given.shape == (len(batch), 2, *PATCH)
    assert given.dtype == np.float32
    assert given.flags.c_contiguous
    with torch.no_grad():
        sections = torch.from_numpy(batch).transpose(1, 2).reshape(-1, 1, *PATCH[1:])
        expected = Net()(sections).reshape(len(batch), PATCH[0], 2, *PATCH[1:]).transpose(1, 2)
    np.testing.assert_allclose(given, expected, atol=1e-5)
    # the bits of a section are those of the section, wherever it is, and whatever is beside it
    np.testing.assert_array_equal(engine(np.ascontiguousarray(batch[:, :, ::-1])), given[:, :, ::-1])
    np.testing.assert_array_equal(engine(batch[1:2]), given[1:2])
    lone = np.zeros_like(batch)
    lone[:, :, 5] = batch[:, :, 5]
    np.testing.assert_array_equal(engine(lone)[:, :, 5], given[:, :, 5])


def test_depth_of_the_patches_changes_no_bit(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model={**python(tmp_path), "dimensions": 2}, output=output)
    flat = ["patch_size=[1,16,16]", "patch_overlap=[0,2,2]", "block_size=[12,84,84]"]
    one, whole = load(path, *flat), load(path)(patches())
    for z in range(PATCH[0]):
        np.testing.assert_array_equal(one(patches()[:, :, z : z + 1]), whole[:, :, z : z + 1])


def test_smaller_output_sections(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    write(tmp_path, NET.replace("padding=1", "padding=0") + "InstantiatedModel = Net()\n")
    geometry = {"output_patch_size": [8, 14, 14], "patch_overlap": [1, 2, 2], "block_size": [42, 84, 84]}
    path = make_spec(model=pytorch(weights=..., dimensions=2), output=output, **geometry)
    expected = Net()(torch.from_numpy(patches(1)[:, 0])[:, None][0].transpose(0, 1)).detach().numpy()
    np.testing.assert_allclose(
        load(path)(patches(1))[0, :, :, :, :], expected.swapaxes(0, 1)[..., 1:-1, 1:-1], atol=1e-5
    )
    with pytest.raises(SpecError, match=r"output_patch_size: 6 along z, expected patch_size 8"):
        load_spec(path, ["output_patch_size=[6,14,14]", "block_size=[30,84,84]"])


def test_dimensions_are_in_the_fingerprint_where_they_are_set(make_spec: MakeSpec, tmp_path: Path) -> None:
    path = make_spec(model=python(tmp_path))
    prints = [load_spec(path, o).fingerprint for o in ([], ["model.dimensions=3"], ["model.dimensions=2"])]
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


@pytest.mark.parametrize("form", [python, torchscript])
def test_prepare_finds_that_a_network_is_for_sections(
    make_spec: MakeSpec, tmp_path: Path, output: Section, chunkflow: Command, form: Callable[[Path], Section]
) -> None:
    path = make_spec(model=form(tmp_path), output=output)
    outcome = chunkflow("prepare", path)
    assert outcome.returncode == 65
    assert "takes single sections: model.dimensions: 2" in outcome.stderr
    assert chunkflow("prepare", path, "--set", "model.dimensions=2").returncode == 0


@pytest.mark.parametrize("form", [onnx, openvino_onnx])
def test_what_a_file_declares_says_that_it_is_for_sections(
    make_spec: MakeSpec, tmp_path: Path, output: Section, form: Callable[[Path], Section]
) -> None:
    with pytest.raises(SpecError, match=r"for a network of two dimensions: model\.dimensions: 2"):
        load(make_spec(model=form(tmp_path), output=output))


def test_an_output_that_is_not_of_the_declared_shape(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model={**python(tmp_path), "dimensions": 2}, output={**output, "channels": 3})
    with pytest.raises(DataError, match=r"\(1, 2, 1, 16, 16\), the spec says \(1, 3, 1, 16, 16\)"):
        load(path)(patches(1))


def test_a_volume_by_sections_is_that_of_patches_of_one_section(
    make_spec: MakeSpec, tmp_path: Path, output: Section, chunkflow: Command
) -> None:
    from cloudvolume import CloudVolume

    given = []
    for name, geometry in {
        "thick": {},
        "flat": {"patch_size": [1, 16, 16], "patch_overlap": [0, 4, 4]},
    }.items():
        place = f"file://{tmp_path}/{name}"
        path = make_spec(
            model=pytorch(weights=..., dimensions=2, batch_size=1),
            output={**output, "path": place, "dtype": "float32"},
            exchange={"path": f"{place}-exchange"},
            **geometry,
        )
        write(tmp_path, NET + "InstantiatedModel = Net()\n")
        outcome = chunkflow("run", path)
        assert outcome.returncode == 0, outcome.stderr
        given.append(np.asarray(CloudVolume(place, progress=False)[:]))
    np.testing.assert_allclose(given[0], given[1], atol=2e-4)
    assert given[0].std() > 0.05
