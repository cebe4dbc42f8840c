"""The identity: the input repeated over the output's channels.

It serves to test geometry, and to time everything but a network.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine, cpu_streams
from chunkflow_core.engines.outputs import finished, least_channels
from chunkflow_core.spec import VolumeSpec


class Identity(Engine):
    """Repeats the input's channels in turn."""

    def __init__(self, spec: VolumeSpec) -> None:
        """Make the engine for a spec; it needs no model."""
        self._spec = spec
        self.streams = cpu_streams(spec)

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Repeat the batch's channels in turn; what becomes of outputs becomes of them."""
        repeated = patches.take(np.arange(least_channels(self._spec)) % patches.shape[1], axis=1)
        return finished(repeated, self._spec, len(patches))


def load(spec: VolumeSpec) -> Identity:
    """The engine for a spec; it needs no model."""
    return Identity(spec)
