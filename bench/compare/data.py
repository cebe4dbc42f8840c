"""What all rows are given: sizes and settings, input layers, the network, patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.common import UNET, Image, em_like, load_file, make_layer, spec_content
from chunkflow_core.lattice.blocks import AxisLattice, BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector, indices, vector
from chunkflow_core.spec import VolumeSpec, parse_spec

CHANNELS = 3
"""Channels of every output."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """What all rows share; handed to their processes. Sizes are in voxels, zyx."""

    folder: str
    """Where layers and the network are."""
    volume: Vector
    """Shape of the volume, which patches cover exactly."""
    patch: Vector
    overlap: Vector
    threads: int
    """CPUs of each row."""
    pass_threads: int
    """Threads of one forward pass of this pipeline, of which as many run at a time as fit."""
    compression: str
    """Compression of all output layers."""
    parallel: int
    """Processes in which CloudVolume reads and writes for the other programs."""
    monai_batch: int
    """``sw_batch_size`` of MONAI."""
    monai_buffer: int | None
    """``buffer_steps`` of MONAI, along z."""
    device: str = "cpu"
    """Where networks run: ``cpu``, or ``cuda``."""

    def shape(self, layer: str) -> Vector:
        """Give the shape of an input layer in voxels, zyx.

        Args:
            layer: ``volume``, ``warm`` to warm up on, or ``check`` to check numbers on.
        """
        patches = {"warm": (1, 1, 2), "check": (2, 2, 2)}.get(layer)
        return self.volume if patches is None else covered(patches, self.patch, self.overlap)

    def path(self, layer: str, name: str) -> str:
        """Give the address of an input or output layer."""
        return f"file://{self.folder}/{layer}/{name}"

    def grid(self, layer: str) -> BlockGrid:
        """Give the lattice of a layer, cut into a single block."""
        shape = self.shape(layer)
        size = vector(n - o for n, o in zip(shape, self.overlap, strict=True))
        return BlockGrid(Box((0, 0, 0), shape), self.patch, self.overlap, size, size)

    @cached_property
    def network(self) -> dict[str, object]:
        """The network's files, as the section ``model`` of a spec names them."""
        return {"path": f"{self.folder}/model.py", "weights": f"{self.folder}/model.pt"}

    def spec(self, layer: str, name: str, model: dict[str, object], dtype: str = "uint8") -> VolumeSpec:
        """Make a spec whose volume is exactly one block.

        Args:
            layer: The input: ``volume``, ``warm`` or ``check``.
            name: Of the output layer.
            model: The section ``model``, without threads and streams.
            dtype: Of the output.
        """
        streams = max(1, self.threads // self.pass_threads)
        return parse_spec(
            spec_content(
                f"{self.folder}/{layer}",
                name=name,
                patch=self.patch,
                overlap=self.overlap,
                block=self.grid(layer).block_size,
                model={"threads": self.pass_threads, "streams": streams, "device": self.device, **model},
                output={"channels": CHANNELS, "dtype": dtype, "compression": self.compression},
            )
        )


def covered(patches: Sequence[int], patch: Vector, overlap: Vector) -> Vector:
    """Give the shape that a number of patches along each axis covers without reaching past it."""
    axes = map(AxisLattice, patch, patch, overlap)
    return vector(n * axis.stride + axis.overlap for n, axis in zip(patches, axes, strict=True))


def nearest_covered(shape: Sequence[int], patch: Vector, overlap: Vector) -> Vector:
    """Give the shape nearest to a wanted one that patches cover exactly."""
    axes = map(AxisLattice, shape, patch, overlap)
    patches = [max(1, round((axis.length - axis.overlap) / axis.stride)) for axis in axes]
    return covered(patches, patch, overlap)


def write_inputs(setting: Setting) -> None:
    """Make the input layers."""
    for layer in ("volume", "warm", "check"):
        shape = setting.shape(layer)
        make_layer(setting.path(layer, "input"), shape).write(Box((0, 0, 0), shape), em_like(shape)[None])


def read_input(setting: Setting, layer: str) -> Image:
    """Read an input layer by CloudVolume, ``(z, y, x)``."""
    from cloudvolume import CloudVolume

    volume = CloudVolume(setting.path(layer, "input"), progress=False, parallel=setting.parallel)
    return np.asarray(volume[:, :, :])[..., 0].T


def patch_boxes(setting: Setting, layer: str) -> Iterator[Box]:
    """Give the boxes of a layer's patches in the order of the lattice, x fastest."""
    grid = setting.grid(layer)
    return map(grid.patch_box, indices((0, 0, 0), vector(axis.count for axis in grid.axes)))


def read_patches(setting: Setting, layer: str, stack: Image, most: int | None = None) -> Iterator[NDArray[np.float32]]:
    """Give the first patches of a layer, or all.

    Args:
        setting: Sizes of volume and patches.
        layer: Name of the layer.
        stack: Its voxels, uint8 ``(z, y, x)``.
        most: How many patches to give at most.

    Yields:
        float32 ``(1, 1, z, y, x)`` in [0, 1].
    """
    for box in islice(patch_boxes(setting, layer), most):
        yield np.ascontiguousarray(stack[box.slices((0, 0, 0))], np.float32)[None, None] / np.float32(255)


def write_network(folder: str) -> None:
    """Write the example U-Net, its head repeated over all channels: a model file and weights."""
    import torch

    text = f"""
import importlib.util
import torch
from torch import nn

spec = importlib.util.spec_from_file_location("example_unet", {UNET["path"]!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
InstantiatedModel = example.UNet()
InstantiatedModel.head = nn.Conv3d(example.WIDTHS[0], {CHANNELS}, 1)
InstantiatedModel.eval()
if torch.cuda.is_available():  # chunkflow takes a GPU where there is one, and leaves it to the file to say so
    InstantiatedModel.cuda()
"""
    Path(folder, "model.py").write_text(text.lstrip(), encoding="utf-8")
    state = torch.load(UNET["weights"], map_location="cpu", weights_only=True)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    for key in ("head.weight", "head.bias"):
        state[key] = state[key].repeat(CHANNELS, *[1] * (state[key].ndim - 1))
    torch.save(state, Path(folder, "model.pt"))


def load_network(setting: Setting) -> Any:
    """Load the network in plain PyTorch, on the setting's device."""
    import torch

    network = load_file(Path(setting.folder, "model.py")).InstantiatedModel
    network.load_state_dict(torch.load(Path(setting.folder, "model.pt"), weights_only=True))
    return network.to(setting.device).eval()
