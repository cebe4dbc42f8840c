"""Two convolutions, and the file of every kind that holds them.

There is nothing in this network that an engine can't convert, so the same numbers are expected of
all; :mod:`tests.support.models.forms` has a network as models in Python have them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.models.loading import PATCH, Section

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.second = torch.nn.Conv3d(4, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x):
        output: torch.Tensor = self.second(torch.relu(self.first(x)))
        return output

InstantiatedModel = Net()
"""


class Net(torch.nn.Module):
    """The network of the text above; by its random weights it sees every direction differently."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.second = torch.nn.Conv3d(4, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(torch.relu(self.first(x)))
        return output


def net() -> Net:
    torch.manual_seed(7)
    return Net().eval()


def python_file(folder: Path, **more: Any) -> Section:
    """The network as chunkflow takes it."""
    (folder / "model.py").write_text(NET)
    torch.save(net().state_dict(), folder / "weights.pt")
    return {"path": "model.py", "weights": "weights.pt", **more}


def onnx_file(folder: Path, network: torch.nn.Module | None = None, **more: Any) -> Section:
    example = torch.zeros(1, 1, *PATCH)
    torch.onnx.export(network or net(), (example,), str(folder / "model.onnx"), dynamo=False, input_names=["patch"])
    return {"path": "model.onnx", **more}


def openvino_file(folder: Path, **more: Any) -> Section:
    import openvino

    network = openvino.convert_model(net(), example_input=torch.zeros(1, 1, *PATCH))
    openvino.save_model(network, folder / "model.xml", compress_to_fp16=False)
    return {"path": "model.xml", **more}
