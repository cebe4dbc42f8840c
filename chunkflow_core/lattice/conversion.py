"""What complete sums become in the output layer: once, after the last addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.weights import ExactStep

LARGEST_UINT16 = 2**16 - 1


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is made of the complete sums of a voxel, by itself and in an order that is fixed.

    - ``argmax``: the index of the channel with the largest sum, of several such the lowest one.
    - ``threshold``: 1 where the sum is at least the threshold, in float32, and 0 elsewhere.
    - else the sum in the output's dtype: ``float32`` as it is, ``float16`` rounded to nearest, half
      to even. ``uint8`` and ``uint16`` map ``[low, high]`` to 0–255 and to 0–65535, rounded half to
      even and clipped: the former is computed in float32, the latter in float64.
    """

    dtype: str
    """Dtype of the output: ``uint8``, ``uint16``, ``float16`` or ``float32``."""
    values: ExactStep
    """Range of the values."""
    threshold: float | None = None
    argmax: bool = False

    def channels(self, summed: int) -> int:
        """Number of channels that are stored, given the number of those that are summed."""
        return 1 if self.argmax else summed

    @property
    def is_plain(self) -> bool:
        """Whether values are stored, and not what is decided by them."""
        return not self.argmax and self.threshold is None

    def of_plane(self, sums: NDArray[np.float32]) -> NDArray[Any]:
        """What becomes of a plane of complete sums.

        Args:
            sums: Float32 ``(channels, y, x)``, in the units of the values.

        Returns:
            ``(stored channels, y, x)``. To cast it to the output's dtype is what is left to do.
        """
        if self.argmax:
            largest: NDArray[np.intp] = np.argmax(sums, axis=0, keepdims=True)  # the first of several
            return largest
        if self.threshold is not None:
            return sums >= np.float32(self.threshold)
        if self.dtype == "uint16":
            low, scale = self.values.uint16
            scaled: NDArray[np.float64] = np.rint((sums.astype(np.float64) - low) * scale)
            np.clip(scaled, 0, LARGEST_UINT16, out=scaled)
            return scaled
        return sums
