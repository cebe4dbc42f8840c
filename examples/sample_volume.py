"""A seeded stack that looks like electron microscopy: textured cells between dark membranes.

    python examples/sample_volume.py file:///tmp/sample --shape 28 416 416

The cells are a Voronoi partition around jittered points, with distances bent by smooth noise, so
that no face is flat. One corner is blank.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.storage.layers import NewLayer

CELL: Vector = (14, 58, 58)
"""Mean distance of cells, voxels zyx: sections are about ten times as thick as a voxel is wide."""
VOXEL_SIZE: Vector = (50, 4, 4)
"""Voxel size in nanometres, zyx."""
CHUNK: Vector = (16, 128, 128)
MEMBRANE = 2.6
"""Half the thickness of a membrane, voxels in y and x."""


def sample_volume(shape: Vector, seed: int = 0) -> NDArray[np.uint8]:
    """The stack, uint8 ``(z, y, x)``."""
    rng = np.random.default_rng(seed)
    nearest, second = _distances(shape, rng)
    wall = (second - nearest) / 2
    membrane = 1 / (1 + np.exp((wall - MEMBRANE) * 1.6))
    cytoplasm = 0.66 + 0.05 * _smooth_noise(shape, (2, 9, 9), rng) + 0.035 * _smooth_noise(shape, (1, 2, 2), rng)
    image = cytoplasm * (1 - membrane) + 0.2 * membrane
    image += 0.02 * rng.standard_normal((shape[0], 1, 1), dtype=np.float32)  # sections differ in staining
    image += 0.045 * rng.standard_normal(shape, dtype=np.float32)
    stack = np.clip(np.rint(image * 255), 1, 255).astype(np.uint8)
    corner = tuple(slice(n - n // 4, n) for n in shape[1:])
    stack[(slice(None), *corner)] = 0
    return stack


def write_sample(path: str, shape: Vector, seed: int = 0) -> None:
    """Store the stack as a layer at ``path``."""
    layer = NewLayer(path, shape, dtype="uint8", resolution=VOXEL_SIZE, chunk=CHUNK)
    layer.write(Box((0, 0, 0), shape), sample_volume(shape, seed)[None])


def _distances(shape: Vector, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distance to the nearest and to the second nearest cell centre, in voxels of y and x."""
    cells = [n // c + 3 for n, c in zip(shape, CELL, strict=True)]
    jitter = rng.uniform(0.05, 0.95, (*cells, 3)).astype(np.float32)
    bent = [
        np.broadcast_to(np.arange(n, dtype=np.float32).reshape([-1 if a == b else 1 for b in range(3)]), shape)
        + (0.9 if a == 0 else 9.0) * _smooth_noise(shape, (5, 24, 24), rng)
        for a, n in enumerate(shape)
    ]
    home = [np.clip((p / c).astype(np.int32) + 1, 1, k - 2) for p, c, k in zip(bent, CELL, cells, strict=True)]
    nearest = np.full(shape, np.inf, np.float32)
    second = nearest.copy()
    for step in itertools.product((-1, 0, 1), repeat=3):
        index = tuple(h + s for h, s in zip(home, step, strict=True))
        squared = np.zeros(shape, np.float32)
        for a in range(3):
            centre = (index[a] - 1 + jitter[..., a][index]) * CELL[a]
            squared += ((bent[a] - centre) * (CELL[1] / CELL[a])) ** 2
        distance = np.sqrt(squared)
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    return nearest, second


def _smooth_noise(shape: Vector, width: Vector, rng: np.random.Generator) -> NDArray[np.float32]:
    """Noise of unit variance with a correlation length, made by a Gaussian in frequency space."""
    spectrum = np.fft.rfftn(rng.standard_normal(shape, dtype=np.float32))
    for axis, (n, w) in enumerate(zip(shape, width, strict=True)):
        frequency = np.fft.rfftfreq(n) if axis == 2 else np.fft.fftfreq(n)
        spectrum *= np.exp(-2 * (np.pi * w * frequency) ** 2).reshape([-1 if axis == b else 1 for b in range(3)])
    noise = np.fft.irfftn(spectrum, shape, axes=(0, 1, 2)).astype(np.float32)
    result: NDArray[np.float32] = (noise - noise.mean()) / noise.std()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layer", help='where to store it, such as "file:///tmp/sample"')
    parser.add_argument("--shape", type=int, nargs=3, default=[28, 416, 416], metavar=("Z", "Y", "X"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_sample(options.layer, tuple(options.shape), options.seed)
