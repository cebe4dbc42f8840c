"""The interface of engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine(ABC):
    """Runs batches of patches through a convnet.

    The same patch must give the same bits at any position of a batch, in any process with the same settings.
    """

    @property
    def description(self) -> dict[str, Any]:
        """What runs where, for receipts and logs."""
        return {}

    @abstractmethod
    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch.

        Args:
            patches: float32 ``(batch, input channels, z, y, x)`` of the spec's ``patch_size``; integer layers scaled to
                [0, 1]. The batch always has the spec's ``batch_size``.

        Returns:
            ``(batch, output channels, z, y, x)`` of the spec's ``output_patch_size``.

        Raises:
            DataError: the network's output is not of the declared shape.
        """


def crop_to(array: Any, size: tuple[int, ...]) -> Any:
    """The centre of the last three axes of an array or tensor, cut to ``size``, where it is larger by an even number."""
    for axis, length in zip((-3, -2, -1), size, strict=True):
        margin, odd = divmod(array.shape[axis] - length, 2)
        if margin < 0 or odd:
            raise ValueError(f"{tuple(array.shape[-3:])} can't be cropped to {tuple(size)}")
        if margin:
            index = [slice(None)] * array.ndim
            index[axis] = slice(margin, margin + length)
            array = array[tuple(index)]
    return array
