"""Training samples: augmented crops of an annotated stack, and a few synthetic ones.

Throughout, ``image`` and ``membrane`` are float32 (z, y, x) in [0, 1]; a membrane voxel is 1,
anything else 0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SYNTHETIC_SHARE = 0.12


@dataclass
class Random:
    """Random numbers from one generator, so that its seed decides the training set."""

    generator: torch.Generator

    def chance(self, probability: float) -> bool:
        """True in this share of the calls."""
        return self.uniform(0, 1) < probability

    def uniform(self, low: float, high: float) -> float:
        """A number of [low, high)."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def integer(self, low: int, high: int) -> int:
        """An integer of [low, high)."""
        return int(torch.randint(low, high, (), generator=self.generator).item())

    def tensor(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32."""
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(shape, generator=self.generator)

    def smooth(self, n_planes: int, size: int, wavelength: float) -> Tensor:
        """Noise of about unit amplitude varying over ``wavelength`` pixels.

        It is float32 (n_planes, size, size).
        """
        n_knots = max(2, round(size / wavelength) + 1)
        knots = self.normal(1, n_planes, n_knots, n_knots)
        return F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True)[0]


def crop(image: Tensor, membrane: Tensor, depth: int, size: int, random: Random) -> tuple[Tensor, Tensor]:
    """A random block (depth, size, size) of the stack, flipped, turned and zoomed.

    Half of the blocks keep the pixel grid (flips and quarter turns only), because interpolation
    removes the noise that real sections have. The others turn by any angle and zoom 0.7 to 1.4
    times; their labels are interpolated too.
    """
    z = random.integer(0, image.shape[0] - depth + 1)
    block = torch.stack((image[z : z + depth], membrane[z : z + depth]))
    if random.chance(0.5):
        block = block.flip(1)
    if random.chance(0.5):
        block = block.flip(3)
    height, width = block.shape[2:]
    if random.chance(0.5):
        top, left = random.integer(0, height - size + 1), random.integer(0, width - size + 1)
        block = block[:, :, top : top + size, left : left + size].rot90(random.integer(0, 4), (2, 3))
    else:
        angle, zoom = random.uniform(0, 2 * math.pi), math.exp(random.uniform(math.log(0.7), math.log(1.4)))
        centre_x, centre_y = random.uniform(0, width), random.uniform(0, height)
        steps = (torch.arange(size) - (size - 1) / 2) / zoom
        dy, dx = torch.meshgrid(steps, steps, indexing="ij")
        x = centre_x + math.cos(angle) * dx - math.sin(angle) * dy
        y = centre_y + math.sin(angle) * dx + math.cos(angle) * dy
        grid = torch.stack((2 * x / width - 1, 2 * y / height - 1), dim=-1)
        planes = block.reshape(1, -1, height, width)
        planes = F.grid_sample(planes, grid[None], padding_mode="reflection", align_corners=False)
        block = planes.reshape(2, depth, size, size)
    return block[0], block[1]


def synthetic(depth: int, size: int, random: Random) -> tuple[Tensor, Tensor]:
    """Bright textured cells between dark membranes.

    They are a Voronoi diagram whose seeds drift from section to section, and teach what a membrane
    is in images of other contrast and texture than one tissue's.
    """
    spacing, thickness = random.uniform(35, 85), random.uniform(3, 7)
    n_across = math.ceil(size / spacing) + 2
    cells = torch.cartesian_prod(torch.arange(n_across), torch.arange(n_across)).float()
    seeds = (cells - 0.5 + 0.8 * (random.tensor(len(cells), 2) - 0.5)) * spacing
    drift = random.normal(depth, len(seeds), 2).cumsum(0) * random.uniform(0, 4)
    seeds = seeds + drift

    pixels = torch.arange(size).float()
    grid = torch.stack(torch.meshgrid(pixels, pixels, indexing="ij"), dim=-1)
    wobble = random.smooth(2, size, random.uniform(15, 40)) * random.uniform(0, 4)
    grid = (grid + wobble.permute(1, 2, 0)).reshape(1, -1, 2)
    nearest, cell = torch.cdist(grid.expand(depth, -1, -1), seeds).topk(2, largest=False)
    ends = seeds.gather(1, cell.reshape(depth, -1, 1).expand(-1, -1, 2)).reshape(depth, -1, 2, 2)
    gap = (ends[:, :, 0] - ends[:, :, 1]).norm(dim=-1)
    to_border = (nearest[..., 1].square() - nearest[..., 0].square()) / (2 * gap)
    membrane = (thickness / 2 - to_border + 0.5).clamp(0, 1).reshape(depth, size, size)

    brightness = random.uniform(0.5, 0.85) + random.uniform(0, 0.15) * random.normal(len(cells))
    inside = brightness[cell[..., 0]].reshape(depth, size, size)
    for wavelength in (3, 8, 20):
        inside = inside + random.uniform(0, 0.08) * random.smooth(depth, size, wavelength)
    dark = random.uniform(0.05, 0.35)
    return inside.lerp(torch.full_like(inside, dark), membrane), membrane


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of each section; ``sigma`` in pixels, at most 1.5."""
    kernel = torch.exp(-0.5 * (torch.arange(-4, 5) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, 1, 9)
    planes = F.pad(image[:, None], (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel), kernel.mT)[:, 0]


def shade(image: Tensor, random: Random) -> Tensor:
    """The image with other blur, noise, contrast, brightness and gamma.

    Some of them are drawn per section.
    """
    depth, size = image.shape[0], image.shape[-1]
    if random.chance(0.3):
        image = blur(image, random.uniform(0.4, 1.5))
    if random.chance(0.8):
        mean = image.mean()
        image = (image - mean) * random.uniform(0.6, 1.5) + mean + random.uniform(-0.15, 0.2)
        image = image.clamp(0, 1) ** math.exp(random.uniform(-0.5, 0.4))
    if random.chance(0.5):
        gain = 1 + 0.15 * (2 * random.tensor(depth, 1, 1) - 1)
        image = image * gain + 0.1 * (2 * random.tensor(depth, 1, 1) - 1)
    if random.chance(0.3):
        image = image + 0.05 * random.smooth(1, size, 60)
    if random.chance(0.5):
        image = image + random.uniform(0, 0.1) * random.normal(*image.shape)
    return image.clamp(0, 1)


def blank(image: Tensor, membrane: Tensor, random: Random) -> None:
    """Set a part of the sample to 0 in place, as where a stack has no data.

    The part is a rectangle, whole sections, or all of it.
    """
    depth, size = image.shape[0], image.shape[-1]
    if random.chance(0.2):
        top, left = random.integer(-size // 2, size), random.integer(-size // 2, size)
        bottom, right = top + random.integer(16, size), left + random.integer(16, size)
        window = (slice(None), slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0)))
        image[window] = membrane[window] = 0
    if random.chance(0.1):
        empty = random.tensor(depth) < 0.3
        image[empty] = membrane[empty] = 0
    if random.chance(0.01):
        image.zero_()
        membrane.zero_()


def batches(
    image: Tensor, membrane: Tensor, shape: tuple[int, int, int, int], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end of images and membranes, each (batch, 1, z, y, x).

    ``shape`` is (batch, z, y, x), y = x.
    """
    random = Random(generator)
    n_samples, depth, size, _ = shape
    while True:
        images, membranes = torch.empty(n_samples, 1, depth, size, size), torch.empty(n_samples, 1, depth, size, size)
        for sample in range(n_samples):
            if random.chance(SYNTHETIC_SHARE):
                block, target = synthetic(depth, size, random)
            else:
                block, target = crop(image, membrane, depth, size, random)
            images[sample, 0], membranes[sample, 0] = shade(block, random), target
            blank(images[sample, 0], membranes[sample, 0], random)
        yield images, membranes
