"""The identity: the input repeated over the output's channels. For tests of geometry and for timing everything else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine, cpu_streams, crop_to
from chunkflow_core.spec import VolumeSpec


class Identity(Engine):
    """Repeats the input's channels in turn."""

    def __init__(self, spec: VolumeSpec) -> None:
        self._channels, self._size, self.streams = spec.output.channels, spec.output_size, cpu_streams(spec)
        self.streams = cpu_streams(spec)

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        cropped: NDArray[np.float32] = crop_to(patches, self._size)
        repeated: NDArray[np.float32] = cropped.take(np.arange(self._channels) % cropped.shape[1], axis=1)
        return repeated


def load(spec: VolumeSpec) -> Identity:
    """The engine for a spec."""
    return Identity(spec)
