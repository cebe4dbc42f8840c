"""Train the membrane U-Net of model.py on an annotated stack, and write its weights.

DATA_FOLDER holds isbi2012_image.tif, uint8 (z, y, x), and isbi2012_membrane.tif of the same shape,
0 where an expert saw a membrane and 255 in cell interiors. The last --validate sections are kept
out of the training and scored at the end.
"""

import argparse
import math
import time
from pathlib import Path

import tifffile
import torch
import torch.nn.functional as F
from model import UNet
from samples import batches
from torch import Tensor
from tqdm import tqdm

BATCH = (4, 6, 128, 128)
"""Samples of one step: (batch, z, y, x)."""
LEARNING_RATE = 4e-3
WARM_UP = 0.05
"""Part of the training during which the learning rate rises."""
FREEZE_STATISTICS = 0.75
"""Part of the training after which the batch statistics stand still.

The weights then settle on the statistics that the network will run with.
"""


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Image in [0, 1] and membrane in {0, 1}, both float32 (z, y, x)."""
    image = torch.from_numpy(tifffile.imread(folder / "isbi2012_image.tif")).float() / 255
    membrane = torch.from_numpy(tifffile.imread(folder / "isbi2012_membrane.tif")) == 0
    return image, membrane.float()


def train(
    network: UNet, image: Tensor, membrane: Tensor, n_steps: int, minutes: float, generator: torch.Generator
) -> None:
    """Train in place until ``n_steps`` are done or ``minutes`` have passed, whichever is first."""
    network.train().to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    start, loss_average = time.monotonic(), 0.7
    samples = batches(image, membrane, BATCH, generator)
    with tqdm(total=n_steps, unit="step") as bar:
        for step in range(n_steps):
            done = max(step / n_steps, (time.monotonic() - start) / (60 * minutes))
            if done >= 1:
                break
            if done > FREEZE_STATISTICS:
                network.eval()
            rate = LEARNING_RATE * min(done / WARM_UP + 0.01, 0.5 + 0.5 * math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, targets = next(samples)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network.logits(images.to(memory_format=torch.channels_last_3d))
            loss = F.binary_cross_entropy_with_logits(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            loss_average += 0.02 * (loss.item() - loss_average)
            bar.update()
            bar.set_postfix(loss=f"{loss_average:.4f}", rate=f"{rate:.1e}")
    network.eval()


def score(network: UNet, image: Tensor, membrane: Tensor) -> dict[str, float]:
    """Figures of the network on sections that it has not seen, over all their voxels.

    Pixel error is the share of voxels wrong at threshold 0.5, mean error the mean of
    |probability - label|.
    """
    with torch.inference_mode():
        probability = network(image[None, None])[0, 0]
    n_bins = 1000
    bins = (probability * n_bins).long().clamp(max=n_bins - 1).flatten()
    # Counts of voxels at or above each threshold, from the highest threshold down.
    hits = torch.bincount(bins, weights=membrane.flatten().double(), minlength=n_bins).flip(0).cumsum(0)
    found = torch.bincount(bins, minlength=n_bins).flip(0).cumsum(0)
    f1 = 2 * hits / (found + hits[-1])
    return {
        "AUC": torch.trapezoid(hits / hits[-1], (found - hits) / (found[-1] - hits[-1])).item(),
        "best F1": f1.max().item(),
        "at threshold": 1 - (f1.argmax().item() + 1) / n_bins,
        "pixel error": ((probability > 0.5) != (membrane > 0.5)).float().mean().item(),
        "mean error": (probability - membrane).abs().mean().item(),
    }


def main() -> None:
    """Read the command line, train, write the weights and print their score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA_FOLDER", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="file to write the weights to, such as model.pt")
    parser.add_argument("--steps", type=int, default=2500, help="training steps at most (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="training time at most (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and samples (default %(default)s)")
    parser.add_argument("--validate", type=int, default=4, help="last sections to hold out (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    image, membrane = read(arguments.data)
    n_train = len(image) - arguments.validate
    network = UNet()
    train(network, image[:n_train], membrane[:n_train], arguments.steps, arguments.minutes, generator)

    # Half precision halves the file; loading copies it into the float32 parameters.
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save(weights, arguments.output)
    print(f"wrote {arguments.output}, {arguments.output.stat().st_size:,} bytes")
    if arguments.validate:
        network.load_state_dict(weights)
        for name, value in score(network, image[n_train:], membrane[n_train:]).items():
            print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main()
