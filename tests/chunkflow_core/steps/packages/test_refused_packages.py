"""What a spec can't say of a published model is refused in a sentence, never left out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.models import packages
from tests.support.models.libraries import LIBRARIES, installed

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

Command = Callable[..., Any]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with installed(tmp_path / "site", monkeypatch, *LIBRARIES):
        yield


def check_refused(chunkflow: Command, place: Path, code: int, *pieces: str, arguments: tuple[str, ...] = ()) -> None:
    outcome = chunkflow("model", place, *arguments)
    assert outcome.returncode == code, outcome.stderr
    assert outcome.stdout == ""
    assert len(outcome.stderr.splitlines()) == 1
    for piece in pieces:
        assert piece in outcome.stderr


def changed(file: Path, change: Change) -> None:
    """Change the content of a JSON or YAML file."""
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def step(name: str, **arguments: Any) -> Change:
    """A step before the network of a package of the format 0.4."""
    return lambda rdf: rdf["inputs"][0]["preprocessing"].append({"name": name, "kwargs": arguments})


def instead(name: str, **arguments: Any) -> Change:
    """Such a step as the only one."""
    return lambda rdf: rdf["inputs"][0].update(preprocessing=[{"name": name, "kwargs": arguments}])


OF_BIOIMAGEIO: dict[str, tuple[Change, list[str]]] = {
    "binarize": (instead("binarize", threshold=0.5), ["preprocessing of raw: binarize can't be said", "pre_process"]),
    "two normalisations": (step("scale_linear", gain=2.0), ["scale_linear after other steps"]),
    "other percentiles": (
        instead("scale_range", axes="zyx", min_percentile=1, reference_tensor="other"),
        ["scale_range by another tensor"],
    ),
    "section by section": (
        instead("zero_mean_unit_variance", axes="yx", mode="per_sample"),
        ["measuring over the axes yx"],
    ),
    "axes in another order": (
        lambda rdf: rdf["inputs"][0].update(axes="bczxy"),
        ["rdf.yaml", "bczxy", "bczyx or bcyx"],
    ),
    "two inputs": (
        lambda rdf: (rdf["inputs"].append(rdf["inputs"][0]), rdf["test_inputs"].append("test_input.npy")),
        ["2 inputs"],
    ),
    "no weights of PyTorch": (
        lambda rdf: rdf.update(weights={"keras_hdf5": {"source": "weights.h5"}}),
        ["no weights that can be run here"],
    ),
    "weights elsewhere": (
        lambda rdf: rdf["weights"]["pytorch_state_dict"].update(source="https://zenodo.org/weights.pt"),
        ["https://zenodo.org/weights.pt", "download the whole package"],
    ),
    "no architecture": (
        lambda rdf: rdf["weights"]["pytorch_state_dict"].pop("architecture"),
        ["rdf.yaml: not as a bioimage.io model has it", "'architecture' is missing"],
    ),
    "no inputs": (lambda rdf: rdf.update(inputs=None), ["rdf.yaml: not as a bioimage.io model has it"]),
}


@pytest.mark.parametrize("name", OF_BIOIMAGEIO)
def test_packages_of_bioimageio(chunkflow: Command, tmp_path: Path, name: str) -> None:
    change, pieces = OF_BIOIMAGEIO[name]
    place = packages.bioimageio_4(tmp_path).place
    changed(place / "rdf.yaml", change)
    check_refused(chunkflow, place, 78, *pieces)


def test_a_file_of_a_package_that_is_not_there(chunkflow: Command, tmp_path: Path) -> None:
    place = packages.bioimageio_4(tmp_path).place
    (place / "small.py").unlink()
    check_refused(chunkflow, place, 66, f"there is no {place}/small.py, which {place}/rdf.yaml names")


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        (
            lambda plans: plans.update(transpose_forward=[2, 0, 1]),
            ["transpose_forward", "pre_process and post_process"],
        ),
        (lambda plans: plans["configurations"]["3d_base"].update(previous_stage="3d_lowres"), ["3d_lowres"]),
        (lambda plans: plans["configurations"]["3d_base"].update(normalization_schemes=["Own"]), ["Own can't be said"]),
        (
            lambda plans: plans["configurations"]["3d_base"].update(
                normalization_schemes=["ZScoreNormalization", "NoNormalization"]
            ),
            ["another for each channel"],
        ),
        (lambda plans: plans["configurations"].pop("3d_base"), ["plans.json", "'3d_base' is missing"]),
        (lambda plans: plans["configurations"].pop("3d_fullres"), ["which of its configurations (2d, 3d_base)"]),
    ],
)
def test_results_of_nnunet(chunkflow: Command, tmp_path: Path, change: Change, pieces: list[str]) -> None:
    place = packages.results(tmp_path, packages.PLAN)
    changed(place / "plans.json", change)
    check_refused(chunkflow, place, 78, *pieces)


def test_results_without_the_checkpoint_that_is_asked_for(chunkflow: Command, tmp_path: Path) -> None:
    place = packages.results(tmp_path, packages.PLAN)
    check_refused(chunkflow, place, 66, "fold_*/checkpoint_best.pth", arguments=("--weights", "checkpoint_best.pth"))


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        (
            {"network_def": {"_target_": "UNet", "channels": "$[2 ** i for i in range(4)]"}},
            ["network_def.channels", "2 **"],
        ),
        ({"network_def": {"_target_": "UNet", "act": {"_target_": "torch.nn.ReLU"}}}, ["network_def.act"]),
        ({"network_def": {"_target_": "UNet", "channels": "@nowhere"}}, ["'nowhere' is missing"]),
        ({"network_def": "$nets.UNet()", "network": "$@network_def"}, ["there is no network_def"]),
        ({"preprocessing": [{"_target_": "HistogramNormalized"}]}, ["HistogramNormalized can't be said"]),
        ({"preprocessing": {"transforms": "$@a + @b"}}, ["preprocessing: $@a + @b", "a list of transforms"]),
        ({"postprocessing": {"transforms": ["$x()"]}}, ["postprocessing: $x()"]),
        (
            {"preprocessing": [{"_target_": "ScaleIntensityd", "minv": -1.0, "maxv": 1.0}]},
            ["minv and maxv other than 0 and 1"],
        ),
    ],
)
def test_bundles_of_monai(chunkflow: Command, tmp_path: Path, changes: dict[str, Any], pieces: list[str]) -> None:
    place = packages.bundle(tmp_path, packages.small(), packages.inference(**changes), scripted=False)
    check_refused(chunkflow, place, 78, *pieces)


def test_architectures_of_connectomics(chunkflow: Command, tmp_path: Path) -> None:
    for content in ({"MODEL": {"ARCHITECTURE": "swinunetr"}}, {"model": {"architecture": "mednext"}}):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        check_refused(chunkflow, tmp_path, 78, "rchitecture".upper() if "MODEL" in content else "mednext", ".py file")


def test_what_is_no_package(chunkflow: Command, tmp_path: Path) -> None:
    torch.jit.script(packages.small()).save(tmp_path / "plain.pt")  # type: ignore[no-untyped-call]
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "empty").mkdir()
    for name, code in {"plain.pt": 64, "list.yaml": 78, "empty": 64, "nowhere": 66}.items():
        check_refused(chunkflow, tmp_path / name, code, name)


# ------------------------------------------------------------------------ in the spec, when it runs


def refused(chunkflow: Command, path: Path) -> str:
    outcome = chunkflow("prepare", path)
    assert outcome.returncode == 78
    assert len(outcome.stderr.splitlines()) == 1
    text: str = outcome.stderr
    return text


BAD_MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a library that is not installed": (
        {"network": "monai.networks.nets.UNet", "arguments": {}},
        ["the package monai is not installed here: pip install monai"],
    ),
    "another that is not installed": (
        {"network": "lab_of_ours.nets.UNet"},
        ["the package lab_of_ours is not installed"],
    ),
    "no such class": ({"network": "torch.nn.Conv5d"}, ["torch.nn.Conv5d", "there is no torch.nn.Conv5d"]),
    "no such module": ({"network": "torch.nets.UNet"}, ["there is no torch.nets"]),
    "no class": ({"network": "torch.pi"}, ["torch.pi is a float"]),
    "arguments that it does not take": (
        {"network": "torch.nn.Conv3d", "arguments": {"channels": 1}},
        ["model.network: torch.nn.Conv3d can't be loaded: TypeError", "channels"],
    ),
    "an argument that names nothing": (
        {"network": "torch.nn.Identity", "arguments": {"kinds": [{"op": {"import": "torch.nn.Conf3d"}}]}},
        ["model.arguments.kinds.op: torch.nn.Conf3d"],
    ),
    "a name without a file": ({"network": "UNet"}, ["network: UNet: expected the file that has it in model.path"]),
    "no name": ({"network": "torch.nn.Conv3d()"}, ["expected a name of Python"]),
    "a compiled file": ({"network": "UNet", "path": "net.ts"}, ["only with a .py file"]),
    "another engine": ({"network": "UNet", "path": "net.onnx", "engine": "onnx"}, ["not for onnx"]),
    "arguments alone": ({"path": "net.py", "arguments": {"a": 1}}, ["arguments: only with model.network"]),
    "no such name in the file": ({"network": "UNet", "path": "net.py"}, ["net.py has nothing of this name"]),
    "an empty list": ({"path": "net.py", "weights": []}, ["weights: expected a checkpoint"]),
    "a folder": ({"path": "."}, ["is a folder", "chunkflow-core model"]),
    "a softmax of one channel": ({"path": "net.py", "activation": "softmax"}, ["softmax of a single channel"]),
    "a list for what is no module": (
        {"path": "function.py", "weights": ["a.pt", "a.pt"]},
        ["model.weights: a list is only for a torch.nn.Module"],
    ),
    "a list for PatchInferencer": (
        {"path": "inferencer.py", "weights": ["a.pt", "a.pt"]},
        ["model.weights: a list is not for PatchInferencer"],
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_make_no_sense(
    chunkflow: Command, make_spec: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path / "site")])
    (tmp_path / "net.py").write_text("import torch\nInstantiatedModel = torch.nn.Identity()\n")
    (tmp_path / "function.py").write_text("def load_model(weights): return lambda x: x\n")
    (tmp_path / "inferencer.py").write_text("class PatchInferencer:\n    def __init__(self, weights): pass\n")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    keys, pieces = BAD_MODELS[name]
    text = refused(chunkflow, make_spec(model={"engine": "pytorch"} | keys))
    for piece in pieces:
        assert piece in text
