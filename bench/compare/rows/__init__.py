"""The rows of the comparison: each a program with an engine and a precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bench.compare.data import Setting
from bench.compare.rows.base import Row
from bench.compare.rows.chunkflow import Chunkflow
from bench.compare.rows.monai import Monai


@dataclass(frozen=True)
class Entry:
    """A row that can be asked for."""

    title: str
    """Name of the row in tables."""
    make: Callable[[Setting, str], Row]
    """Makes the row, in its process, from what all rows share and its name."""
    precision: str = "float32"
    """Precision of the forward passes."""
    network: bool = True
    """Whether the row runs the network; else it repeats the input over the channels."""

    @property
    def ours(self) -> bool:
        """Whether the row is of this pipeline."""
        return self.title.startswith("this")


def _ours(setting: Setting, name: str, engine: str, precision: str = "float32") -> Row:
    from bench.compare.rows.ours import Ours  # not in the other programs' processes, whose memory is measured

    return Ours(setting, name, engine, precision)


ROWS = {
    "pytorch-float32": Entry("this, PyTorch, float32", partial(_ours, engine="pytorch")),
    "pytorch-bfloat16": Entry(
        "this, PyTorch, bfloat16", partial(_ours, engine="pytorch", precision="bfloat16"), "bfloat16"
    ),
    "openvino-float32": Entry("this, OpenVINO, float32", partial(_ours, engine="openvino")),
    "openvino-bfloat16": Entry(
        "this, OpenVINO, bfloat16", partial(_ours, engine="openvino", precision="bfloat16"), "bfloat16"
    ),
    "onnx-float32": Entry("this, ONNX Runtime, float32", partial(_ours, engine="onnx")),
    "monai-float32": Entry("MONAI, float32", Monai),
    "monai-channels-last": Entry("MONAI, float32, channels last", partial(Monai, channels_last=True)),
    "monai-bfloat16": Entry(
        "MONAI, bfloat16, channels last", partial(Monai, precision="bfloat16", channels_last=True), "bfloat16"
    ),
    "chunkflow-float32": Entry("chunkflow, float32", Chunkflow),
    "identity": Entry("this, identity", partial(_ours, engine="identity"), network=False),
    "monai-identity": Entry("MONAI, identity", partial(Monai, network=False), network=False),
    "chunkflow-identity": Entry("chunkflow, identity", partial(Chunkflow, framework="identity"), network=False),
}
"""All rows by the name under which they are asked for."""

CHECKED = "pytorch-float32"
"""The row whose numbers are compared with sums in float64, and those of the others with it."""


def reference(name: str) -> str:
    """Give the row of MONAI to whose speed that of a row is compared."""
    return "monai-float32" if ROWS[name].network else "monai-identity"
