"""Whether the bits of a block are those that they have to be."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import KEPT_PATCHES
from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.exchange.codec import decompress
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.blocks import Block
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.spec import parse_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.digests import checksum


def batches(tiers: list[list[Vector]], size: int) -> Iterator[list[Vector]]:
    """Give lattice positions in the batches of the stage, none of which reaches over two tiers."""
    for tier in tiers:
        yield from (tier[start : start + size] for start in range(0, len(tier), size))


def plain(workspace: Workspace, block: Block) -> tuple[Slab, list[torch.Tensor], int]:
    """Run a block without the pipeline.

    Returns:
        Its sums, some of its batches on the device, and how many batches there were.
    """
    spec, engine, patches = workspace.spec, workspace.engine, workspace.inference.patches
    reading = workspace.inference.reading(block)
    planes = reading.whole, np.ascontiguousarray(workspace.input.read(reading.whole))
    slab = Slab(spec.grid, block.reach, block.reach.shape[0], spec.output.summed_channels, patches.values)
    kept: list[torch.Tensor] = []
    count = 0
    for positions in batches(reading.tiers, engine.batch_size):
        batch = np.zeros((engine.batch_size, 1, *spec.patch_size), np.float32)
        for slot, position in enumerate(positions):
            batch[slot] = patches.take(position, planes)
        given = torch.from_numpy(batch).to(engine.device)
        for position, output in zip(positions, engine.forward(given).cpu().numpy(), strict=False):
            slab.add(position, output)
        if len(kept) * engine.batch_size < KEPT_PATCHES:
            kept.append(given)
        count += 1
    return slab, kept, count


def differing(workspace: Workspace, receipt: Receipt, slab: Slab) -> int:
    """Count the voxels of a stage that are not, bit for bit, what the sums say.

    Args:
        workspace: Where the stage has written and donated.
        receipt: What it has left.
        slab: The sums of the whole block.
    """
    spec, block = workspace.spec, workspace.spec.grid.block(receipt.block)
    written, converted = workspace.output.read(block.core), slab.converted(block.core, spec.output.conversion)
    count = int(np.count_nonzero(written != converted))
    entries = {entry.key: entry for entry in receipt.donations}
    donations = [donation for piece in spec.grid.pieces(block) for donation in piece.donations]
    payloads = workspace.exchange.get_donations((donation, entries[donation.key]) for donation in donations)
    for donation in donations:
        expected = slab.sum(donation.box)
        given = np.zeros_like(expected)  # a donation of zeros has no payload
        if donation.key in payloads:
            given = decompress(payloads[donation.key], len(expected), donation.box.shape)
        count += int(np.count_nonzero(given.view(np.uint32) != expected.view(np.uint32)))
    return count


def same_anywhere(engine: Engine, batch: torch.Tensor) -> bool:
    """Tell whether patches of a batch give the same bits at any place of it.

    Args:
        engine: What runs them.
        batch: float32 ``(batch, channels, z, y, x)`` on the engine's device.
    """
    outputs = engine.forward(batch)
    return all(torch.equal(engine.forward(batch.roll(n, 0)), outputs.roll(n, 0)) for n in range(1, len(batch)))


def elsewhere(content: dict[str, Any], batch: NDArray[np.float32]) -> list[str]:
    """Run patches in another process, each beside other patches than here, and give their digests.

    Args:
        content: The spec.
        batch: float32 ``(batch, channels, z, y, x)``; each patch is run at the next place of a
            batch that is zeros otherwise.
    """
    spec = parse_spec(content)
    engine = load_engine(spec)
    found = []
    for number, patch in enumerate(batch):
        alone = np.zeros_like(batch)
        alone[(number + 1) % len(batch)] = patch
        given = torch.from_numpy(alone).to(engine.device or "cpu")
        found.append(digest(engine.forward(given)[(number + 1) % len(batch)]))
        torch.cuda.empty_cache()  # this process stays, and shares the device
    return found


def digest(output: torch.Tensor) -> str:
    """Give a digest of an output's bits."""
    return checksum(np.ascontiguousarray(output.cpu().numpy()).tobytes())


def same_elsewhere(workspace: Workspace, batch: torch.Tensor, other: Executor) -> bool:
    """Tell whether another process gives the same bits for the patches of a batch."""
    here = [digest(output) for output in workspace.engine.forward(batch)]
    content = workspace.spec.model_dump(mode="json")
    there: list[str] = other.submit(elsewhere, content, batch.cpu().numpy()).result()
    return here == there


def left(receipt: Receipt) -> object:
    """Give what a run has left: checksums of its donations, and of the storage chunks it wrote."""
    return receipt.donations, {name: chunk.voxels for name, chunk in receipt.written.items()}
