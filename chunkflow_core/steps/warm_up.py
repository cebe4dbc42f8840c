"""What a process does once before others are forked from it.

It imports the stages and loads their compiled loops. Nothing is left behind but memory: no thread,
no device, no open file.
"""

from __future__ import annotations

import numpy as np

from chunkflow_core.exchange.codec import compress, decompress
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.lattice.conversion import Conversion
from chunkflow_core.lattice.kernels import take_scaled
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.lattice.weights import ExactStep
from chunkflow_core.steps import blend as blend  # what they import is what takes the time
from chunkflow_core.steps import infer as infer

_INPUTS = (np.uint8, np.uint16, np.float32)
"""Usual dtypes of inputs; the loop for another one is loaded when it is needed."""


def warm_up() -> None:
    """Run each compiled loop on next to nothing, so that it is loaded.

    It is compiled where that has never been done.
    """
    size = (2, 2, 2)
    box = Box((0, 0, 0), size)
    slab = Slab(BlockGrid(box, size, (0, 0, 0), size, size), box, 2, 1, ExactStep(0.0, 1.0))
    patch = np.zeros((1, *size), np.float32)
    for dtype in _INPUTS:
        take_scaled(np.zeros((1, *size), dtype), (0, 0, 0), np.float32(1), patch)
    slab.add((0, 0, 0), patch, limits=(0.0, 1.0))
    slab.converted(box, Conversion("uint8", slab.values))
    decompress(compress(slab.sum(box)), 1, size)
