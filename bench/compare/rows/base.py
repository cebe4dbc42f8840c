"""What a row can do, and what programs share that take a whole volume in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.common import KEPT_PATCHES, Image, make_layer
from bench.compare.data import CHANNELS, Setting, read_input, read_patches

if TYPE_CHECKING:
    import torch


class Row(ABC):
    """One program with one engine and precision, in a process of its own."""

    def __init__(self, setting: Setting, name: str) -> None:
        """Load nothing yet; the output layers are called ``name``."""
        self.setting, self.name = setting, name

    @abstractmethod
    def whole(self, layer: str) -> int:
        """Read a layer, run it, write a layer; give the number of patches that were run."""

    @abstractmethod
    def compute(self) -> None:
        """Run the volume from memory to memory: uint8 in, uint8 out."""

    @abstractmethod
    def forward(self, count: int) -> None:
        """Run the network on some patches that are in memory, and nothing else."""

    @abstractmethod
    def parallelism(self) -> str:
        """Tell how many passes run at a time, in how many threads each."""

    def prepare(self) -> str:
        """Load everything and run a small volume, so that what is timed has no first times.

        Returns:
            How the row runs, in a few words.
        """
        self.whole("warm")
        return self.parallelism()

    def load(self, network: bool) -> None:
        """Bring the first patches, for the network, or the whole volume into memory."""
        _ = self.patches if network else self.data
        if network and self.setting.device != "cpu":
            _ = self.tensors

    @cached_property
    def data(self) -> Image:
        """The input volume, uint8 ``(z, y, x)``."""
        return read_input(self.setting, "volume")

    @cached_property
    def patches(self) -> list[NDArray[np.float32]]:
        """The first patches of the lattice, float32 ``(1, 1, z, y, x)`` in [0, 1]."""
        return list(read_patches(self.setting, "volume", self.data, KEPT_PATCHES))

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """The same patches as tensors, where the network is."""
        import torch

        return [torch.from_numpy(patch).to(self.setting.device) for patch in self.patches]

    def outputs(self) -> NDArray[np.float32] | None:
        """Run the first patches; None if the row has no engine of its own to be compared."""
        return None


class WholeVolume(Row):
    """A program that takes the whole volume in memory, read and written by CloudVolume."""

    @abstractmethod
    def infer(self, stack: Image) -> tuple[NDArray[np.float32], int]:
        """Run all patches of a volume and blend them.

        Args:
            stack: Uint8 ``(z, y, x)``.

        Returns:
            The output, float32 ``(channels, z, y, x)``, and how many patches were run.
        """

    def whole(self, layer: str) -> int:
        """Read a layer by CloudVolume, run it, write it; give the number of patches run."""
        result, patches = self.infer(read_input(self.setting, layer))
        self._output(layer)[:, :, :] = to_uint8(result).T
        return patches

    def compute(self) -> None:
        """Run the volume from memory to memory, the conversion to uint8 included."""
        to_uint8(self.infer(self.data)[0])

    def parallelism(self) -> str:
        """Tell in how many threads the only pass at a time runs, if on CPUs."""
        import torch

        return f"1 × {torch.get_num_threads()} threads" if self.setting.device == "cpu" else "1"

    def _output(self, layer: str) -> Any:
        from cloudvolume import CloudVolume

        setting, path = self.setting, self.setting.path(layer, self.name)
        if not Path(path.removeprefix("file://"), "info").exists():
            chunk = setting.spec(layer, self.name, {"engine": "identity"}).storage_chunk
            make_layer(path, setting.shape(layer), chunk=chunk, channels=CHANNELS)
        compress = False if setting.compression == "none" else setting.compression
        return CloudVolume(path, progress=False, compress=compress, parallel=setting.parallel)


def to_uint8(result: NDArray[np.float32]) -> Image:
    """Scale [0, 1] to 0–255, with all threads, in place where that is possible."""
    import torch

    scaled: Image = torch.from_numpy(result).mul_(255).round_().clamp_(0, 255).to(torch.uint8).numpy()
    return scaled
