"""What is stored of a network's output: some of its channels, classes, masks, other dtypes.

Each is asked of a whole run, and has to be what the blended values of all channels say, which a run
in float32 gives.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloudvolume import CloudVolume
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.engines import load_engine
from chunkflow_core.engines.model_imports import import_file
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from tests.support.volume import output_of

MakeSpec = Callable[..., Path]
Section = dict[str, Any]

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv3d(1, 6, 3, padding=1)
        self.second = torch.nn.Conv3d(6, 5, 3, padding=1)

    def forward(self, x):
        return 8 * self.second(torch.relu(self.first(x)))

InstantiatedModel = Net()
"""
CLASSES = 5
LOGITS = [-32, 32]

CUTS: list[Section] = [
    {"block_size": [12, 24, 24], "chunk_size": [6, 12, 12]},
    {"block_size": [24, 48, 48], "chunk_size": [8, 16, 48]},
    {"block_size": [12, 48, 24], "chunk_size": [4, 8, 12]},
]
"""Eight blocks, one, and four; each with storage chunks of its own."""


def to_uint16(values: NDArray[Any], low: int, high: int) -> NDArray[Any]:
    """Values as uint16, by fractions: exact but for the one rounding, which is half to even."""
    numbers = [round((Fraction(float(v)) - low) * 65535 / (high - low)) for v in np.unique(values)]
    table = np.clip(numbers, 0, 65535).astype(np.uint16)
    return table[np.unique(values, return_inverse=True)[1]].reshape(values.shape)


Stored = Callable[[NDArray[Any]], NDArray[Any]]
KINDS: dict[str, tuple[Section, Section, Stored]] = {
    # keys of output and model, and what has to be stored of the blended values of all channels
    "some channels": (
        {"channels": [3, 1], "dtype": "float32"},
        {"activation": "sigmoid"},
        lambda values: values[[3, 1]],
    ),
    "softmax of some channels": (
        {"channels": [2, 4, 0], "dtype": "float32"},
        {"activation": "softmax", "channels": CLASSES},
        lambda values: values[[2, 4, 0]],
    ),
    "a grey channel": (
        {"channels": [4]},
        {"activation": "softmax"},
        lambda values: np.rint(values[[4]] * np.float32(255)).astype(np.uint8),
    ),
    "classes": (
        {"channels": CLASSES, "argmax": True},
        {"activation": "softmax"},
        lambda values: np.argmax(values, axis=0)[None].astype(np.uint8),
    ),
    "classes of some logits": (
        {"channels": [4, 1, 0], "argmax": True, "range": LOGITS},
        {},
        lambda values: np.argmax(values[[4, 1, 0]], axis=0)[None].astype(np.uint8),
    ),
    "classes of several orientations": (
        {"channels": CLASSES, "argmax": True},
        {"activation": "softmax", "augmentation": "flips"},
        lambda values: np.argmax(values, axis=0)[None].astype(np.uint8),
    ),
    "a mask": (
        {"channels": [1], "threshold": 0.2},
        {"activation": "softmax"},
        lambda values: (values[[1]] >= np.float32(0.2)).astype(np.uint8),
    ),
    "masks of logits": (
        {"channels": [0, 3], "threshold": 0.25, "range": LOGITS},
        {},
        lambda values: (values[[0, 3]] >= 0.25).astype(np.uint8),
    ),
    "uint16": (
        {"channels": [1, 2], "dtype": "uint16"},
        {"activation": "sigmoid"},
        lambda values: to_uint16(values[[1, 2]], 0, 1),
    ),
    "uint16 of logits": (
        {"channels": CLASSES, "dtype": "uint16", "range": LOGITS},
        {},
        lambda values: to_uint16(values, *LOGITS),
    ),
    "float16": (
        {"channels": CLASSES, "dtype": "float16", "range": LOGITS},
        {},
        lambda values: values.astype(np.float16),
    ),
}
USUAL = "classes of some logits"
"""What is not only asked in the long tests; ``test_exactness.py`` asks the rest in less time."""


def spec_of(make_spec: MakeSpec, folder: Path, output: Section, model: Section, cut: Section, name: str) -> Path:
    (folder / "net.py").write_text(NET)
    path = make_spec(
        output={"path": f"file://{folder}/{name}", "chunk_size": cut["chunk_size"], **output},
        exchange={"path": f"file://{folder}/exchange-{name}"},
        block_size=cut["block_size"],
        model={"engine": "pytorch", "path": "net.py", **model},
    )
    return path.rename(folder / f"{name}.yaml")


def blended(make_spec: MakeSpec, folder: Path, output: Section, model: Section) -> NDArray[Any]:
    """The blended values of all channels, with an activation."""
    whole = {"channels": CLASSES, "dtype": "float32", **({"range": output["range"]} if "range" in output else {})}
    path = spec_of(make_spec, folder, whole, model | {"channels": CLASSES}, CUTS[0], "whole")
    assert main(["run", str(path), "--seams", "0"]) == 0
    return output_of(path)


@pytest.mark.parametrize(
    "kind", [kind if kind == USUAL else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
def test_what_is_stored_is_made_of_blended_values(make_spec: MakeSpec, tmp_path: Path, kind: str) -> None:
    output, model, stored = KINDS[kind]
    values = blended(make_spec, tmp_path, output, model)
    wanted = stored(values)
    assert len(np.unique(wanted)) > 1, "a constant would prove nothing"
    path = spec_of(make_spec, tmp_path, output, model, CUTS[0], "stored")
    assert main(["run", str(path), "--seams", "4"]) == 0
    given = output_of(path)
    assert given.dtype == wanted.dtype
    np.testing.assert_array_equal(given, wanted)
    assert main(["verify", str(path), "--deep", "--seams", "4"]) == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_depend_on_how_the_volume_is_cut(make_spec: MakeSpec, tmp_path: Path, kind: str) -> None:
    """Nor on whether sums stay on a device."""
    output, model, _ = KINDS[kind]
    given = []
    for number, cut in enumerate(CUTS):
        path = spec_of(make_spec, tmp_path, output, model, cut, f"cut{number}")
        assert main(["run", str(path), "--seams", "2"]) == 0
        given.append(output_of(path))
        np.testing.assert_array_equal(given[-1], given[0])
        assert main(["verify", str(path), "--deep", "--seams", "2"]) == 0
    path = spec_of(make_spec, tmp_path, output, model, CUTS[0], "device")
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    engine = load_engine(spec)
    engine.device = torch.device("cpu")  # the path of accelerators
    workspace = Workspace(spec, engine)
    for index in spec.grid.indices():
        inference_and_donate(workspace, index)
    for index in spec.grid.indices():
        receive_and_blend(workspace, index)
    np.testing.assert_array_equal(output_of(path), given[0])


def onnx_network(folder: Path) -> Section:
    (folder / "net.py").write_text(NET)
    network = import_file(folder / "net.py").InstantiatedModel
    torch.onnx.export(network, (torch.zeros(1, 1, 8, 16, 16),), str(folder / "net.onnx"), dynamo=False)
    return {"engine": "onnx", "path": "net.onnx"}


ENGINES: dict[str, Callable[[Path], Section]] = {
    "openvino": lambda _: {"engine": "openvino"},
    "openvino onnx": lambda folder: onnx_network(folder) | {"engine": "openvino"},
    "onnx": onnx_network,
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["softmax of some channels", "classes", "masks of logits", "uint16"])
def test_every_engine(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, engine: str
) -> None:
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    output, model, stored = KINDS[kind]
    model = model | ENGINES[engine](tmp_path)
    wanted = stored(blended(make_spec, tmp_path, output, model))
    for number, cut in enumerate(CUTS[:2]):
        path = spec_of(make_spec, tmp_path, output, model, cut, f"cut{number}")
        assert main(["run", str(path), "--seams", "2"]) == 0
        np.testing.assert_array_equal(output_of(path), wanted)
        assert main(["verify", str(path), "--deep", "--seams", "2"]) == 0


@pytest.mark.parametrize(
    ("output", "kind", "channels", "dtype"),
    [
        ({"channels": 3, "argmax": True}, "segmentation", 1, "uint8"),
        pytest.param({"threshold": 0.5}, "segmentation", 1, "uint8", marks=pytest.mark.long),
        # labels have one channel
        pytest.param({"channels": [0, 3], "threshold": 0.5}, "image", 2, "uint8", marks=pytest.mark.long),
        pytest.param({"channels": [0, 3], "dtype": "uint16"}, "image", 2, "uint16", marks=pytest.mark.long),
        pytest.param({"channels": [5], "dtype": "float16"}, "image", 1, "float16", marks=pytest.mark.long),
    ],
)
def test_the_layer_says_what_it_is_and_can_be_shown(
    make_spec: MakeSpec, tmp_path: Path, output: Section, kind: str, channels: int, dtype: str
) -> None:
    path = make_spec(output={"path": f"file://{tmp_path}/output", "chunk_size": [6, 12, 12], **output})
    assert main(["run", str(path), "--seams", "2"]) == 0
    stored = CloudVolume(f"file://{tmp_path}/output", progress=False)
    assert (stored.layer_type, stored.num_channels, stored.dtype) == (kind, channels, dtype)
    np.testing.assert_array_equal(np.asarray(stored[:]).T, output_of(path))
    assert main(["picture", str(path), str(tmp_path / "picture.png")]) == 0
    assert main(["report", str(path)]) == 0
    assert main(["plan", str(path)]) == 0
