"""Rows of MONAI."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.common import Image, wait_for
from bench.compare.data import CHANNELS, Setting, load_network
from bench.compare.rows.base import WholeVolume

if TYPE_CHECKING:
    import torch


class Monai(WholeVolume):
    """``monai.inferers.sliding_window_inference`` in eager PyTorch."""

    def __init__(
        self, setting: Setting, name: str, precision: str = "float32", channels_last: bool = False, network: bool = True
    ) -> None:
        """Load nothing yet.

        Args:
            setting: What all rows share.
            name: Name of the row and of its output layers.
            precision: Precision of the forward passes.
            channels_last: Whether tensors have their channels last in memory.
            network: Whether the network is run; else the input is repeated over the channels.
        """
        super().__init__(setting, name)
        self._precision, self._channels_last, self._network = precision, channels_last, network

    @cached_property
    def predictor(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network, or the repetition of the input over the channels."""
        import torch

        if not self._network:
            return lambda batch: batch.repeat(1, CHANNELS, 1, 1, 1)
        layout = torch.channels_last_3d if self._channels_last else torch.contiguous_format
        dtype = getattr(torch, self._precision)
        network = load_network(self.setting).to(dtype=dtype, memory_format=layout)

        def run(batch: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = network(batch.to(dtype=dtype, memory_format=layout)).float()
            return output

        return run

    def infer(self, stack: Image) -> tuple[NDArray[np.float32], int]:
        """Run and blend all patches by the sliding window; see :meth:`WholeVolume.infer`."""
        import torch
        from monai.inferers.utils import sliding_window_inference

        setting, ran = self.setting, 0

        def predictor(batch: torch.Tensor) -> torch.Tensor:
            nonlocal ran
            ran += len(batch)
            return self.predictor(batch)

        with torch.inference_mode():
            image = torch.from_numpy(np.ascontiguousarray(stack))[None, None].to(setting.device).float().div_(255)
            # half a voxel less: MONAI rounds the stride down, and fractions are not exact
            overlap = [(o - 0.5) / p if o else 0.0 for o, p in zip(setting.overlap, setting.patch, strict=True)]
            result: Any = sliding_window_inference(
                image,
                setting.patch,
                setting.monai_batch,
                predictor,
                overlap=overlap,
                mode="gaussian",
                buffer_steps=setting.monai_buffer,
                buffer_dim=0,
            )
        return result[0].cpu().numpy(), ran

    def forward(self, count: int) -> None:
        """Run the network on ``count`` patches that are in memory, ``sw_batch_size`` at a time."""
        import torch

        size, patches = self.setting.monai_batch, self.tensors
        with torch.inference_mode():
            for first in range(0, count, size):
                numbers = range(first, min(first + size, count))
                self.predictor(torch.cat([patches[i % len(patches)] for i in numbers]))
        wait_for(self.setting.device)

    def parallelism(self) -> str:
        """Tell the threads of a pass, the patches of a batch, and MONAI's buffer if it has one."""
        buffered = f", {self.setting.monai_buffer} buffer steps" if self.setting.monai_buffer else ""
        return f"{super().parallelism()}, batch {self.setting.monai_batch}{buffered}"
