"""All forms in which a model in Python or of PyTorch may come, of one trained network.

The network has normalisation and dropout, which training and evaluation do differently. A form is
a function that writes the model's files into a folder and gives the spec's section ``model``.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch

from tests.support.models.loading import BATCH, PATCH, Section

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, padding=1):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=padding)
        self.norm = torch.nn.BatchNorm3d(2)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        output: torch.Tensor = self.dropout(self.norm(self.conv(x)))
        return output
"""


class Net(torch.nn.Module):
    """The network of the text above."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=padding)
        self.norm = torch.nn.BatchNorm3d(2)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.dropout(self.norm(self.conv(x)))
        return output


def trained(padding: int = 1) -> Net:
    """A network whose stored statistics are far from those of a random patch."""
    torch.manual_seed(5)
    net = Net(padding)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
    net.norm.running_mean = torch.tensor([0.5, -0.25])
    net.norm.running_var = torch.tensor([2.0, 3.0])
    return net.eval()


def write(folder: Path, text: str, name: str = "model.py") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def pytorch(**more: Any) -> Section:
    """The model's section of a spec."""
    section = {"engine": "pytorch", "path": "model.py", "weights": "weights.pt", "batch_size": BATCH}
    return {k: v for k, v in (section | more).items() if v is not ...}


def bare_state(folder: Path, net: Net) -> Section:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(folder, NET + "InstantiatedModel = Net()\n")
    return pytorch()


def nested_state(folder: Path, net: Net) -> Section:
    torch.save({"epoch": 7, "state_dict": net.state_dict()}, folder / "weights.pt")
    write(folder, NET + "InstantiatedModel = Net()\n")
    return pytorch()


def data_parallel_state(folder: Path, net: Net) -> Section:
    """Weights saved from ``torch.nn.DataParallel``: every key has the prefix ``module.``."""
    torch.save(torch.nn.DataParallel(net).state_dict(), folder / "weights.pt")
    write(folder, NET + "InstantiatedModel = Net()\n")
    return pytorch()


def load_model(folder: Path, net: Net) -> Section:
    torch.save({"mine": net.state_dict()}, folder / "weights.pt")
    write(
        folder,
        NET
        + """
def load_model(checkpoint):
    net = Net().train()
    net.load_state_dict(torch.load(checkpoint, map_location="cpu")["mine"])
    return net
""",
    )
    return pytorch()


def with_pre_and_post_process(folder: Path, net: Net) -> Section:
    """Functions around the network, as chunkflow has them: a numpy batch comes in.

    Here sign and order are turned around twice.
    """
    torch.save(net.state_dict(), folder / "weights.pt")
    write(
        folder,
        NET
        + """
class Turned(Net):
    def forward(self, x):
        return [super().forward(-x), None]

InstantiatedModel = Turned()

def pre_process(patch):
    assert type(patch).__name__ == "ndarray" and patch.dtype == "float32" and patch.ndim == 5
    return torch.from_numpy(-patch)

def post_process(output):
    return output[0]
""",
    )
    return pytorch()


def list_of_logits(folder: Path, net: Net) -> Section:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(
        folder,
        NET
        + "class L(Net):\n def forward(self, x): y = super().forward(x); return [y, y * 2]\nInstantiatedModel = L()",
    )
    return pytorch()


def second_of_a_list(folder: Path, net: Net) -> Section:
    list_of_logits(folder, net)
    write(
        folder,
        NET + "class L(Net):\n def forward(self, x): y = super().forward(x); return y * 2, y\nInstantiatedModel = L()",
    )
    return pytorch(output=1)


def only_fitting_of_a_dict(folder: Path, net: Net) -> Section:
    torch.save(net.state_dict(), folder / "weights.pt")
    text = "{'embedding': torch.zeros(3, 24, 8, 16, 16), 'affinity': y, 'loss': 0.5, 'scales': [y]}"
    write(
        folder,
        NET + f"class D(Net):\n def forward(self, x): y = super().forward(x); return {text}\nInstantiatedModel = D()",
    )
    return pytorch()


def named_of_a_dict(folder: Path, net: Net) -> Section:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(
        folder,
        NET
        + (
            "class D(Net):\n def forward(self, x): y = super().forward(x); return {'a': -y, 'b': y}\n"
            "InstantiatedModel = D()"
        ),
    )
    return pytorch(output="b")


INFERENCER = (
    NET
    + """
import numpy as np

class PatchInferencer:
    def __init__(self, weights{parameter}):
        self.net = Net().eval()
        self.net.load_state_dict(torch.load(weights))
        self.mask = {mask}

    def __call__(self, patch):
        assert isinstance(patch, np.ndarray)
        with torch.no_grad():
            return self.net(torch.from_numpy(patch)).numpy() * self.mask
"""
)


def patch_inferencer(folder: Path, net: Net) -> Section:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(folder, INFERENCER.format(parameter="", mask="1"))
    return pytorch()


def patch_inferencer_with_mask(folder: Path, net: Net) -> Section:
    """An inferencer that multiplies by the mask, as chunkflow's do.

    It has to get ones: blended twice would be the worst of bugs.
    """
    torch.save(net.state_dict(), folder / "weights.pt")
    write(folder, INFERENCER.format(parameter=", output_patch_mask", mask="output_patch_mask"))
    return pytorch()


def siblings(folder: Path, net: Net) -> Section:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(folder, NET, "layers.py")
    write(folder, "from .deep import make\n", "parts/__init__.py")
    write(folder, "from layers import Net\ndef make(): return Net()\n", "parts/deep.py")
    write(folder, "import parts\nfrom spaces import one\nInstantiatedModel = parts.make() if one.x else None\n")
    write(folder, "x = 1\n", "spaces/one.py")  # a package without __init__.py
    return pytorch()


def torchscript(folder: Path, net: Net) -> Section:
    torch.jit.script(net).save(folder / "model.pt")  # type: ignore[no-untyped-call]
    return pytorch(path="model.pt", weights=...)


def exported(folder: Path, net: Net) -> Section:
    program = torch.export.export(net, (torch.zeros(1, 1, *PATCH),))
    torch.export.save(program, folder / "model.pt2")
    return pytorch(path="model.pt2", weights=..., trust=True)


FORMS = [
    bare_state,
    data_parallel_state,
    nested_state,
    load_model,
    with_pre_and_post_process,
    list_of_logits,
    second_of_a_list,
    only_fitting_of_a_dict,
    named_of_a_dict,
    patch_inferencer,
    patch_inferencer_with_mask,
    siblings,
    torchscript,
    exported,
]
