"""Networks that the spec names, with their arguments; and the mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chunkflow_core.engines.building import Mean
from tests.support.models.loading import MakeSpec, Section, load, patches

FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self, channels, op, act, padding=0):
        super().__init__()
        self.conv = op(1, channels, 3, padding=padding)
        self.act = act["kind"](*act["arguments"])

    def forward(self, x):
        return self.act(self.conv(x))

class nets:
    @staticmethod
    def make(**arguments):
        return Net(**arguments)
"""
ARGUMENTS: Section = {
    "channels": 2,
    "op": {"import": "torch.nn.Conv3d"},
    "act": {"kind": {"import": "torch.nn.modules.activation.LeakyReLU"}, "arguments": [0.5]},
    "padding": 1,
}
INSTANCE = (
    FACTORY + 'InstantiatedModel = Net(2, torch.nn.Conv3d, {"kind": torch.nn.LeakyReLU, "arguments": [0.5]}, 1)\n'
)
LOADER = (
    INSTANCE
    + """
def load_model(weights):
    network = Net(2, torch.nn.Conv3d, {"kind": torch.nn.LeakyReLU, "arguments": [0.5]}, 1)
    network.conv.load_state_dict({key[5:]: value for key, value in torch.load(weights).items()})
    return network
"""
)


def convolutions(folder: Path, count: int) -> list[torch.nn.Conv3d]:
    """Convolutions, and a checkpoint of each in the folder."""
    found = []
    for number in range(count):
        torch.manual_seed(number)
        found.append(torch.nn.Conv3d(1, 2, 3, padding=1))
        state = {f"conv.{key}": value for key, value in found[-1].state_dict().items()}
        torch.save(state, folder / f"fold_{number}.pt")
    return found


def expected(layers: Sequence[torch.nn.Conv3d]) -> NDArray[np.float32]:
    outputs = [torch.nn.functional.leaky_relu(layer(torch.from_numpy(patches())), 0.5) for layer in layers]
    result: NDArray[np.float32] = (sum(outputs[1:], outputs[0]) / len(outputs)).detach().numpy()
    return result


@pytest.mark.parametrize("engine", ["pytorch", pytest.param("openvino", marks=pytest.mark.long)])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (FACTORY, {"network": "Net", "arguments": ARGUMENTS}),
        (FACTORY, {"network": "nets.make", "arguments": ARGUMENTS}),
        (INSTANCE, {}),
        (LOADER, {}),
    ],
    ids=["class", "function", "instance", "loader"],
)
def test_networks_and_means_of_them(
    make_spec: MakeSpec, tmp_path: Path, output: Section, text: str, keys: Section, count: int, engine: str
) -> None:
    (tmp_path / "net.py").write_text(text)
    layers = convolutions(tmp_path, count)
    weights = [f"fold_{number}.pt" for number in range(count)]
    model = {"engine": engine, "path": "net.py", "weights": weights if count > 1 else weights[0]} | keys
    given = load(make_spec(model=model, output=output))(patches())
    np.testing.assert_allclose(given, expected(layers), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["pytorch", "openvino"])
def test_a_network_of_an_installed_package(make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str) -> None:
    """There is no model file at all; other arguments are another network, also for OpenVINO."""
    (layer,) = convolutions(tmp_path, 1)
    torch.save({"state_dict": {f"module.{k}": v for k, v in layer.state_dict().items()}}, tmp_path / "last.ckpt")
    arguments = {"in_channels": 1, "out_channels": 2, "kernel_size": 3, "padding": 1, "padding_mode": "zeros"}
    model = {"engine": engine, "network": "torch.nn.Conv3d", "arguments": arguments, "weights": "last.ckpt"}
    path = make_spec(model=model, output=output)
    for mode in ("zeros", "replicate"):
        layer.padding_mode = mode
        layer._reversed_padding_repeated_twice = [1] * 6
        wanted = layer(torch.from_numpy(patches())).detach().numpy()
        given = load(path, f"model.arguments.padding_mode={mode}")(patches())
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-5)


class Several(torch.nn.Module):
    """Gives outputs in a structure, and works in place."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> Any:
        x *= self.factor
        return {"heads": [x, (x + 1, None)], "name": "a"}


def test_the_mean_of_structures() -> None:
    """Part by part; what is no tensor is the first's, and no network sees what another has done."""
    x = torch.ones(2)
    given = Mean([Several(2), Several(4), Several(9)])(x)
    assert given["name"] == "a"
    first, (second, nothing) = given["heads"]
    assert (first.tolist(), second.tolist(), nothing) == ([5, 5], [6, 6], None)
    assert x.tolist() == [1, 1]
