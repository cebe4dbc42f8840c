"""Rows of chunkflow."""

from __future__ import annotations

import contextlib
import io
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.common import RESOLUTION, Image, wait_for
from bench.compare.data import CHANNELS, Setting
from bench.compare.rows.base import WholeVolume


class Chunkflow(WholeVolume):
    """chunkflow's ``Inferencer``, with its own PyTorch or identity framework."""

    def __init__(self, setting: Setting, name: str, framework: str = "pytorch") -> None:
        """Load nothing yet.

        Args:
            setting: What all rows share.
            name: Name of the row and of its output layers.
            framework: Framework of the inferencer, ``pytorch`` or ``identity``.
        """
        super().__init__(setting, name)
        self._framework = framework

    @cached_property
    def inferencer(self) -> Any:
        """The inferencer, its model loaded."""
        from chunkflow.flow.divid_conquer.inferencer import Inferencer

        return Inferencer(
            self.setting.network["path"],
            self.setting.network["weights"],
            self.setting.patch,
            output_patch_overlap=self.setting.overlap,
            num_output_channels=CHANNELS,
            framework=self._framework,
            mask_output_chunk=True,
        )

    def infer(self, stack: Image) -> tuple[NDArray[np.float32], int]:
        """Run and blend all patches by the inferencer; see :meth:`WholeVolume.infer`."""
        from chunkflow.chunk import Chunk

        with contextlib.redirect_stdout(io.StringIO()):  # it tells of each step
            result = self.inferencer(Chunk(stack, voxel_offset=(0, 0, 0), voxel_size=RESOLUTION))
        return result.array, len(self.inferencer.patch_slices_list)

    def forward(self, count: int) -> None:
        """Run the model on ``count`` patches that are in memory, one by one."""
        import torch

        network, patches = self.inferencer.patch_inferencer.model, self.tensors
        with torch.no_grad():
            for i in range(count):
                network(patches[i % len(patches)])
        wait_for(self.setting.device)
