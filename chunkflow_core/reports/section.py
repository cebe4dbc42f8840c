"""A picture of a result: a section of the input, of the output, and the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.steps.workspace import Workspace

MAX_SIDE = 2048
"""Number of voxels shown at most along an axis, from the ROI's start."""


def draw_section(workspace: Workspace, path: Path, *, z: int | None = None) -> None:
    """Draw one section of input and output, with block faces and what was blended, as a PNG.

    Args:
        workspace: What the steps of the volume share.
        path: Path of the picture; its folder is made.
        z: Position of the section in voxels; default: the middle of the core of the volume's middle
            block.

    Raises:
        MissingInputError: The section has not been written yet.
        OSError: The picture can't be written.
    """
    grid = workspace.spec.grid
    z = _middle(grid) if z is None else z
    height, width = (min(n, MAX_SIDE) for n in grid.roi.shape[1:])
    _, y, x = grid.roi.start
    section = Box((z, y, x), (z + 1, y + height, x + width))
    figure, axes = plt.subplots(1, 3, figsize=(18, 6.6), constrained_layout=True)
    _show(axes[0], workspace.input.read(section)[0, 0], section, f"input, section z = {z}")
    output = workspace.output.read(section)[0, 0]
    _show(axes[1], output, section, f"output, channel 0 ({workspace.spec.model.engine})")
    _show(axes[2], output, section, "blocks (yellow) and what was blended across them (red)")
    _draw_blocks(axes[2], workspace, section)
    blocks = " × ".join(map(str, grid.shape))
    figure.suptitle(f"{workspace.spec.name}: {grid.roi}, {blocks} blocks, {grid.patches} patches", fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _middle(grid: BlockGrid) -> int:
    block = grid.block(vector(n // 2 for n in grid.shape))
    return ((block.core or block.box).start[0] + block.box.stop[0]) // 2


def _show(axes: Axes, image: NDArray[Any], section: Box, title: str) -> None:
    _, y0, x0 = section.start
    _, y1, x1 = section.stop
    axes.imshow(image, cmap="gray", extent=(x0, x1, y1, y0), interpolation="nearest")
    axes.set(title=title, xlabel="x (voxels)", ylabel="y (voxels)")


def _draw_blocks(axes: Axes, workspace: Workspace, section: Box) -> None:
    grid = workspace.spec.grid
    for index in grid.blocks_touching(section):
        block = grid.block(index)
        for receiver in grid.donors(index)[:-1]:
            for donation in grid.donations(receiver, index):
                if donation.box & section:
                    axes.add_patch(_rectangle(donation.box & section, facecolor="red", alpha=0.25, linewidth=0))
        axes.add_patch(_rectangle(block.box & section, fill=False, edgecolor="yellow", linewidth=1.5))
        _, y, x = (block.box & section).start
        axes.text(x + 4, y + 4, block.name, color="yellow", va="top", fontsize=8)


def _rectangle(box: Box, **style: Any) -> Rectangle:
    _, y, x = box.start
    _, height, width = box.shape
    return Rectangle((x, y), width, height, **style)
