"""Rows of this pipeline."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.common import Image, run_passes, wait_for
from bench.compare.data import CHANNELS, Array, Setting, load_network, patch_boxes, read_input, read_patches
from bench.compare.rows.base import Row
from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.lattice.weights import bump
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import make_output
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.signatures import WrittenChunk

PROBES = 4
"""Patches whose outputs are compared between engines."""


class Ours(Row):
    """``inference_and_donate`` of a volume that is one block."""

    def __init__(self, setting: Setting, name: str, engine: str, precision: str = "float32") -> None:
        """Load nothing yet.

        Args:
            setting: What all rows share.
            name: Name of the row and of its output layers.
            engine: Name of the engine, as the section ``model`` of a spec has it.
            precision: Precision of the forward passes.
        """
        super().__init__(setting, name)
        self._engine, self._precision = engine, precision

    @cached_property
    def model(self) -> dict[str, object]:
        """The section ``model`` of the specs."""
        if self._engine == "identity":
            return {"engine": "identity"}
        if self._engine == "onnx":
            return {"engine": "onnx", "path": export_onnx(self.setting)}
        return {**self.setting.network, "engine": self._engine, "precision": self._precision}

    @cached_property
    def engine(self) -> Engine:
        """The engine that runs the patches of all layers."""
        return load_engine(self._spec("volume"))

    def parallelism(self) -> str:
        """Tell how many passes run at a time, and in how many threads each if on CPUs."""
        threads = self.setting.pass_threads
        if self.engine.device is not None:
            return "1"
        return f"{self.engine.streams} × {threads} thread{'s' if threads > 1 else ''}"

    @cached_property
    def workspaces(self) -> dict[str, Workspace]:
        """Workspaces of the layers that are timed, by name; their output layers have been made."""
        return {layer: self._prepared(self._spec(layer)) for layer in ("warm", "volume")}

    def whole(self, layer: str) -> int:
        """Run the one block of a layer; give the number of patches that were run."""
        return self._run(self.workspaces[layer])

    def compute(self) -> None:
        """Run the one block of the volume between arrays in memory instead of stored layers."""
        workspace = Workspace(self.workspaces["volume"].spec, self.engine)
        output = np.empty((CHANNELS, *self.setting.volume), np.uint8)

        def read(box: Box) -> Image:
            return self.data[None][(slice(None), *box.slices((0, 0, 0)))]

        def write(box: Box, data: Array) -> dict[str, WrittenChunk]:
            output[(slice(None), *box.slices((0, 0, 0)))] = data
            return {}

        workspace.input.read = read  # type: ignore[method-assign]
        workspace.output.write = write  # type: ignore[method-assign]
        self._run(workspace)

    def forward(self, count: int) -> None:
        """Run ``count`` forward passes of the engine on patches that are in memory."""
        if self.engine.device is None:
            run_passes(self.engine, self.patches, count)
            return
        for i in range(count):
            self.engine.forward(self.tensors[i % len(self.tensors)])
        wait_for(self.engine.device)

    def outputs(self) -> NDArray[np.float32] | None:
        """Run the first ``PROBES`` patches; float32 ``(patch, channels, z, y, x)``."""
        return np.concatenate([self.engine(patch) for patch in self.patches[:PROBES]])

    def check(self) -> dict[str, float]:
        """Compare a small float32 volume with plain sums in float64.

        Returns:
            Largest differences. ``blending``: to the same forward passes, blended in float64.
            ``network``: to forward passes and blending in float64.
        """
        import torch

        workspace = self._prepared(self._spec("check", "float32"))
        self._run(workspace)
        result = workspace.output.read(workspace.spec.grid.roi)
        network = load_network(self.setting).double()

        def in_double(patch: Array) -> Array:
            with torch.inference_mode():
                output: Array = network(torch.from_numpy(patch).double().to(self.setting.device)).cpu().numpy()
                return output

        def apart(run: Callable[[Array], Array]) -> float:
            return float(np.abs(result - blend_in_double(self.setting, "check", run)).max())

        return {"blending": apart(self.engine), "network": apart(in_double)}

    def _spec(self, layer: str, dtype: str = "uint8") -> VolumeSpec:
        return self.setting.spec(layer, self.name, self.model, dtype)

    def _prepared(self, spec: VolumeSpec) -> Workspace:
        make_output(spec)
        return Workspace(spec, self.engine)

    @staticmethod
    def _run(workspace: Workspace) -> int:
        inference_and_donate(workspace, (0, 0, 0), why="forced")
        return workspace.spec.grid.patches


def blend_in_double(setting: Setting, layer: str, run: Callable[[Array], Array]) -> NDArray[np.float64]:
    """Blend the patches of an input layer by sums over the whole of it in float64.

    Args:
        setting: Sizes of volume and patches.
        layer: Name of the layer.
        run: Gives the output ``(1, channels, z, y, x)`` of a patch, float32 ``(1, 1, z, y, x)``.

    Returns:
        The weighted mean of the patches' outputs, ``(channels, z, y, x)``.
    """
    stack = read_input(setting, layer)
    z, y, x = map(bump, setting.patch)
    weight = z[:, None, None] * y[:, None] * x
    sums, weights = np.zeros((CHANNELS, *stack.shape)), np.zeros(stack.shape)
    patches = read_patches(setting, layer, stack)
    for box, patch in zip(patch_boxes(setting, layer), patches, strict=True):
        index = box.slices((0, 0, 0))
        sums[(slice(None), *index)] += run(patch)[0].astype(np.float64) * weight
        weights[index] += weight
    return sums / weights


def export_onnx(setting: Setting) -> str:
    """Export the network to an ONNX file; give its path."""
    import torch

    path = Path(setting.folder, "model.onnx")
    example = torch.zeros(1, 1, *setting.patch)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(load_network(setting), (example,), path, input_names=["image"], output_names=["output"])
    return str(path)
