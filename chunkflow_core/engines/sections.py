"""Networks of two dimensions: each section of a patch is run by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.spec import VolumeSpec

if TYPE_CHECKING:
    import torch


class Sections(Engine):
    """Runs patches section by section.

    A call of the network has one section of each patch of a batch. So its shape does not depend on
    the depth of a patch, nor on which sections there are, and the same section gives the same bits.
    """

    def __init__(self, engine: Engine) -> None:
        """Take an engine for patches of one section (``of_one_section``)."""
        self._engine = engine
        self.batch_size, self.streams, self.device = engine.batch_size, engine.streams, engine.device

    @property
    def description(self) -> dict[str, Any]:
        """That of the engine."""
        return self._engine.description

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the sections of a batch; see ``Engine.__call__``."""
        sections = np.split(patches, patches.shape[2], axis=2)
        return np.concatenate([self._engine(np.ascontiguousarray(section)) for section in sections], axis=2)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Run the sections of a batch; see ``Engine.forward``."""
        import torch

        sections = (patches[:, :, z : z + 1] for z in range(patches.shape[2]))
        return torch.cat([self._engine.forward(section.contiguous()) for section in sections], dim=2)


def of_one_section(spec: VolumeSpec) -> VolumeSpec:
    """A spec as an engine for sections gets it: patches are of depth 1."""
    return spec.model_copy(
        update={"patch_size": (1, *spec.patch_size[1:]), "output_patch_size": (1, *spec.output_size[1:])}
    )
