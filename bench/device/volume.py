"""The block that is run, the engine on its device, and a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.common import INPUT_CHUNK, em_like, make_layer, spec_content, timed
from chunkflow_core.engines import load_engine
from chunkflow_core.engines.gpu import claim
from chunkflow_core.engines.identity import Identity
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.boxes import Box, Vector, ceil_to, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace

MIDDLE: Vector = (1, 1, 1)
"""The block that is timed, of 3 × 3 × 3: it has neighbours on all sides and donates all it can."""


class IdentityOnDevice(Identity):
    """Repeats a single input channel, on a device."""

    def __init__(self, spec: VolumeSpec, device: torch.device) -> None:
        """Take the batch size and the number of channels from a spec.

        Args:
            spec: The spec of a volume.
            device: Where patches come in and outputs are given.
        """
        super().__init__(spec)
        self.device, self.batch_size, self._channels = device, spec.model.batch_size, spec.output.summed_channels

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Repeat the only channel of patches ``(batch, 1, z, y, x)`` over the output's channels."""
        return patches.repeat(1, self._channels, 1, 1, 1)


@dataclass(frozen=True)
class Volume:
    """A layer of 3 × 3 × 3 blocks, of which only what the one in the middle reads is stored.

    Sizes are in voxels, zyx.
    """

    folder: str
    block: Vector
    patch: Vector
    overlap: Vector

    @classmethod
    def near(cls, folder: str, wanted: Vector, patch: Vector, overlap: Vector) -> Volume:
        """Choose blocks of about a wanted size, each with voxels that no other contributes to."""
        sizes = [(n, p - o, o) for n, p, o in zip(wanted, patch, overlap, strict=True)]
        block = vector(max(round(n / stride), -(-o // stride) + 1) * stride for n, stride, o in sizes)
        return cls(folder, block, patch, overlap)

    def write(self) -> None:
        """Make the layer."""
        shape = vector(3 * b + o for b, o in zip(self.block, self.overlap, strict=True))
        stops = zip(self.block, self.overlap, INPUT_CHUNK, shape, strict=True)
        box = Box(
            vector(b // c * c for b, c in zip(self.block, INPUT_CHUNK, strict=True)),
            vector(min(ceil_to(2 * b + o, c), n) for b, o, c, n in stops),
        )
        make_layer(f"file://{self.folder}/input", shape).write(box, em_like(box.shape)[None])

    def spec(self, name: str, model: dict[str, object]) -> VolumeSpec:
        """Make a spec whose output layer has a name; ``model`` is its section of that name."""
        output: dict[str, object] = {"channels": 3 if model["engine"] == "identity" else 1}
        content = spec_content(
            self.folder,
            name=name,
            patch=self.patch,
            overlap=self.overlap,
            block=self.block,
            model=model,
            output=output,
            fill_missing=True,
        )
        spec = parse_spec(content)
        if not spec.grid.block(MIDDLE).core:  # a small one, all of whose storage chunks touch the margin
            content["output"]["chunk_size"] = list(spec.grid.stride)
            spec = parse_spec(content)
        return spec


def open_workspace(spec: VolumeSpec) -> Workspace:
    """Open and prepare the workspace of a spec, its engine on the spec's device."""
    on_gpu = spec.model.device == "cuda"
    device = torch.device("cuda", claim(torch.cuda.device_count())) if on_gpu else torch.device("cpu")
    engine = IdentityOnDevice(spec, device) if spec.model.engine == "identity" else load_engine(spec)
    if not on_gpu:  # the path of accelerators, on a device that every machine has
        engine.device, engine.batch_size = device, spec.model.batch_size
    workspace = Workspace(spec, engine)
    prepare(workspace)
    return workspace


def whole(workspace: Workspace) -> tuple[float, Receipt]:
    """Run the block's first stage; give its wall seconds and its receipt."""
    seconds, _, result = timed(lambda: inference_and_donate(workspace, MIDDLE, why="forced"))
    assert result.receipt is not None
    return seconds, result.receipt
