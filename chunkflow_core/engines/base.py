"""The interface of engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.machine import available_cpus
from chunkflow_core.spec import VolumeSpec

if TYPE_CHECKING:
    import torch


class Engine(ABC):
    """Runs patches through a convnet.

    The same patch must give the same bits at any position of a batch, in any process with the same
    settings, and whatever runs at the same time. Engines on CPUs run each patch by itself, in
    ``model.threads`` threads, and are called from ``streams`` threads at once: that scales better
    than many threads for one patch, and no number depends on how many patches run at a time.
    """

    batch_size: int = 1
    """Number of patches in one call."""

    streams: int = 1
    """Number of calls that may be made at once, each from a thread of its own."""

    device: torch.device | None = None
    """The accelerator on which patches stay; None for engines on CPUs.

    Where there is one, ``forward`` is called, with tensors there.
    """

    @property
    def description(self) -> dict[str, Any]:
        """What runs where: versions, device and threads, for receipts and logs."""
        return {}

    @abstractmethod
    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch.

        Args:
            patches: Float32 ``(batch, input channels, z, y, x)`` of the spec's ``patch_size``;
                integer layers scaled to [0, 1]. The batch always has ``batch_size`` patches.

        Returns:
            Float32 ``(batch, output channels, z, y, x)`` of the spec's ``output_patch_size``,
            contiguous. The caller may keep it, and does not change it.

        Raises:
            DataError: The network fails with the batch, or its output is not of the declared shape.
        """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Run a batch as ``__call__`` does, with tensors on ``device``.

        Only engines that have a device have this.
        """
        raise NotImplementedError


def cpu_streams(spec: VolumeSpec) -> int:
    """Number of forward passes at a time on this process's CPUs."""
    return spec.model.streams or max(1, available_cpus() // spec.model.threads)


def network_shape(spec: VolumeSpec) -> tuple[int, ...]:
    """Shape of what a network gets for one patch: ``(1, input channels, z, y, x)``.

    Without z for networks of two dimensions, whose patches are of one section.
    """
    return (1, spec.input_scale.channels, *spec.patch_size[3 - spec.model.dimensions :])


def network_input(patches: Any, spec: VolumeSpec) -> Any:
    """An array or tensor of patches as the network gets them; see ``network_shape``."""
    return patches[:, :, 0] if spec.model.dimensions == 2 else patches


def crop_to(array: Any, size: tuple[int, ...]) -> Any:
    """The centre of an array's or tensor's last three axes, cut to ``size``, zyx.

    Each axis has to have the length of ``size``, or be larger by an even number; ``ValueError`` if
    not.
    """
    for axis, length in zip((-3, -2, -1), size, strict=True):
        margin, odd = divmod(array.shape[axis] - length, 2)
        if margin < 0 or odd:
            raise ValueError(f"{tuple(array.shape[-3:])} can't be cropped to {tuple(size)}")
        if margin:
            index = [slice(None)] * array.ndim
            index[axis] = slice(margin, margin + length)
            array = array[tuple(index)]
    return array
