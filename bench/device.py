"""The path for accelerators on a GPU: speed, how busy the GPU is, and whether the bits are right.

    python -m bench.device --device cpu --volume 24 192 192 --patch 16 64 64 --overlap 4 16 16
    python -m bench.device --output docs/data/device.json

One block in the middle of a volume is read from a layer on disk, run, written and donated, as a
task does it: with the example U-Net in each precision and batch size, and with the identity, which
leaves everything but the network. In turn with it, the same forward passes alone run on batches
that are on the device already, waited for once, at the end.

The same batches then go one by one through the same engine on the same device, and are blended by
the sums of the CPU path: what the stage wrote and donated has to be that, bit for bit. Each row
also tells whether a patch gives the same bits at any place of its batch: if not, the output would
depend on the blocks.

With ``--device cpu``, a look, the path runs on PyTorch's CPU device, which says nothing of its
speed.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from bench.common import (
    INPUT_CHUNK,
    KEPT_PATCHES,
    SIZE,
    UNET,
    command_line,
    describe,
    em_like,
    error_text,
    machine,
    make_layer,
    median_ratio,
    size_text,
    spec_content,
    table,
    timed,
    write_json,
)
from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.engines.gpu import claim
from chunkflow_core.engines.identity import Identity
from chunkflow_core.exchange.codec import decompress
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.blocks import Block
from chunkflow_core.lattice.boxes import Box, Vector, ceil_to, vector
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.machine import available_cpus
from chunkflow_core.planning.estimate import data_bytes
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace

MIDDLE: Vector = (1, 1, 1)
"""The block that is timed, of 3 × 3 × 3: it has neighbours on all sides and donates all it can."""
PRECISIONS = ("float32", "bfloat16", "float16")

Figures = dict[str, Any]


class IdentityOnDevice(Identity):
    """Repeats a single input channel, on a device."""

    def __init__(self, spec: VolumeSpec, device: torch.device) -> None:
        """Take the batch size and the number of channels from a spec.

        Args:
            spec: The spec of a volume.
            device: Where patches come in and outputs are given.
        """
        super().__init__(spec)
        self.device, self.batch_size, self._channels = device, spec.model.batch_size, spec.output.channels

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Repeat the only channel of patches ``(batch, 1, z, y, x)`` over the output's channels."""
        return patches.repeat(1, self._channels, 1, 1, 1)


@dataclass(frozen=True)
class Volume:
    """A layer of 3 × 3 × 3 blocks, of which only what the one in the middle reads is stored.

    Sizes are in voxels, zyx.
    """

    folder: str
    block: Vector
    patch: Vector
    overlap: Vector

    @classmethod
    def near(cls, folder: str, wanted: Vector, patch: Vector, overlap: Vector) -> Volume:
        """Choose blocks of about a wanted size, each with voxels that no other contributes to."""
        sizes = [(n, p - o, o) for n, p, o in zip(wanted, patch, overlap, strict=True)]
        block = vector(max(round(n / stride), -(-o // stride) + 1) * stride for n, stride, o in sizes)
        return cls(folder, block, patch, overlap)

    def write(self) -> None:
        """Make the layer."""
        shape = vector(3 * b + o for b, o in zip(self.block, self.overlap, strict=True))
        stops = zip(self.block, self.overlap, INPUT_CHUNK, shape, strict=True)
        box = Box(
            vector(b // c * c for b, c in zip(self.block, INPUT_CHUNK, strict=True)),
            vector(min(ceil_to(2 * b + o, c), n) for b, o, c, n in stops),
        )
        make_layer(f"file://{self.folder}/input", shape).write(box, em_like(box.shape)[None])

    def spec(self, name: str, model: dict[str, object]) -> VolumeSpec:
        """Make a spec whose output layer has a name; ``model`` is its section of that name."""
        output: dict[str, object] = {"channels": 3 if model["engine"] == "identity" else 1}
        content = spec_content(
            self.folder,
            name=name,
            patch=self.patch,
            overlap=self.overlap,
            block=self.block,
            model=model,
            output=output,
            fill_missing=True,
        )
        spec = parse_spec(content)
        if not spec.grid.block(MIDDLE).core:  # a small one, all of whose storage chunks touch the margin
            content["output"]["chunk_size"] = list(spec.grid.stride)
            spec = parse_spec(content)
        return spec


def open_workspace(spec: VolumeSpec) -> Workspace:
    """Open and prepare the workspace of a spec, its engine on the spec's device."""
    on_gpu = spec.model.device == "cuda"
    device = torch.device("cuda", claim(torch.cuda.device_count())) if on_gpu else torch.device("cpu")
    engine = IdentityOnDevice(spec, device) if spec.model.engine == "identity" else load_engine(spec)
    if not on_gpu:  # the path of accelerators, on a device that every machine has
        engine.device, engine.batch_size = device, spec.model.batch_size
    workspace = Workspace(spec, engine)
    prepare(workspace)
    return workspace


def whole(workspace: Workspace) -> tuple[float, Receipt]:
    """Run the block's first stage; give its wall seconds and its receipt."""
    seconds, _, result = timed(lambda: inference_and_donate(workspace, MIDDLE, why="forced"))
    assert result.receipt is not None
    return seconds, result.receipt


def alone(engine: Engine, kept: list[torch.Tensor], count: int) -> float:
    """Run batches that are on the device, in turn; give the wall seconds of ``count`` of them."""

    def run() -> None:
        for number in range(count):
            engine.forward(kept[number % len(kept)])
        wait_for(kept[0].device)

    wait_for(kept[0].device)
    return timed(run)[0]


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_share(workspace: Workspace) -> float:
    """Give the share of a block's wall time in which some kernel runs, by PyTorch's profiler.

    Copies are not counted.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds, _ = whole(workspace)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]  # type: ignore[attr-defined]
    ranges = [event.time_range for event in events if not event.name.startswith(("Memcpy", "Memset"))]
    return covered((microseconds.start, microseconds.end) for microseconds in ranges) / 1e6 / seconds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Give the length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


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
    slab = Slab(spec.grid, block.reach, block.reach.shape[0], spec.output.channels, patches.values)
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
    written, converted = workspace.output.read(block.core), slab.converted(block.core, spec.output.dtype)
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


def measure(workspace: Workspace, rounds: int, step: Callable[[], object]) -> Figures:
    """Take all figures of a row.

    Args:
        workspace: Where the block is run.
        rounds: How often the block and its forward passes alone are timed.
        step: Called ``rounds + 2`` times, as the work goes on.

    Returns:
        Figures by column; under ``phases`` the seconds of each phase of the last run.
    """
    engine, block = workspace.engine, workspace.spec.grid.block(MIDDLE)
    on_gpu = engine.device is not None and engine.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(engine.device)
    _, receipt = whole(workspace)
    peak = torch.cuda.max_memory_allocated(engine.device) if on_gpu else 0
    slab, kept, count = plain(workspace, block)
    different = differing(workspace, receipt, slab)
    del slab
    step()
    receipts, seconds, forward = [], [], []
    for _ in range(rounds):
        took, receipt = whole(workspace)
        receipts.append(receipt)
        seconds.append(took)
        forward.append(alone(engine, kept, count))
        step()
    facts = [receipt.facts for receipt in receipts]
    figures = {
        "whole, s": median(seconds),
        "Mvoxel/s": median(block.box.voxels / 1e6 / took for took in seconds),
        "forward alone, s": median(forward),
        "whole / forward": median_ratio(seconds, forward),
        "forward, of wall": median(f["seconds"]["forward"] / f["wall"] for f in facts) if on_gpu else None,
        "kernels, of wall": busy_share(workspace) if on_gpu else None,
        "voxels that differ": different,
        "same at any place": same_anywhere(engine, kept[0]) if engine.batch_size > 1 else None,
        "device memory, MB": round(peak / 1e6) if on_gpu else None,
        "data by `plan`, MB": round(data_bytes(workspace.spec, block) / 1e6),
        "phases": facts[-1]["seconds"],
    }
    step()
    return figures


def results_table(rows: dict[str, Figures]) -> str:
    """Write the table of all rows; one that failed shows its error."""
    titles = list(dict.fromkeys(title for figures in rows.values() for title in figures if title != "phases"))
    return table(
        ["", *titles], [[name, *(cell(figures.get(title)) for title in titles)] for name, figures in rows.items()]
    )


def cell(value: Any) -> str:
    """Write a figure as it stands in the table."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def describe_device(kind: str) -> str:
    """Put the device, ``cuda`` or ``cpu``, and its settings into one line."""
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    name, driver = "PyTorch's CPU device", "?"
    if kind == "cuda":
        with suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        versions = f"driver {driver}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
        name = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {versions}"
    return f"{name}, TF32 {'on' if tf32 else 'off'}"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line("device", __doc__)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="default: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes (default: 1 4)")
    parser.add_argument("--volume", default=(224, 1152, 1152), help="of the block (default: 224 1152 1152)", **SIZE)
    parser.add_argument("--patch", default=(32, 256, 256), help="default: 32 256 256", **SIZE)
    parser.add_argument("--overlap", default=(4, 64, 64), help="default: 4 64 64", **SIZE)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON, such as docs/data/device.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main() -> int:
    """Measure and print."""
    options, facts, rows = arguments(), machine(), dict[str, Figures]()
    threads = available_cpus() if options.device == "cpu" else 1
    unet: dict[str, object] = {"engine": "pytorch", **UNET, "threads": threads, "device": options.device}
    models: dict[str, dict[str, object]] = {
        f"U-Net, {precision}, batch {batch}": {**unet, "precision": precision, "batch_size": batch}
        for precision, batch in product(options.precision, options.batch)
    }
    identity: dict[str, object] = {"engine": "identity", "device": options.device}
    models |= {f"identity, batch {batch}": {**identity, "batch_size": batch} for batch in options.batch}
    with (
        tempfile.TemporaryDirectory(prefix="device-") as folder,
        tqdm(total=len(models) * (options.rounds + 2), unit="step") as progress,
    ):
        sizes = (vector(size) for size in (options.volume, options.patch, options.overlap))
        volume = Volume.near(folder, *sizes)
        volume.write()
        for number, (name, model) in enumerate(models.items()):
            progress.set_description(name)
            try:
                spec = volume.spec(f"row{number}", model)
                rows[name] = measure(open_workspace(spec), options.rounds, progress.update)
            except Exception as error:  # the other rows go on
                rows[name] = {"error": error_text(error)}
            gc.collect()
            torch.cuda.empty_cache()
    device = describe_device(options.device)
    block, patch, overlap = map(size_text, (volume.block, volume.patch, volume.overlap))
    print(f"\n{device}; {describe(facts)}.\n")
    print(f"A block of {block} in the middle of a volume, patches of {patch} with an")
    print(f"overlap of {overlap}; medians of {options.rounds} rounds, ratios within rounds.\n\n{results_table(rows)}")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    write_json(options.output, {"device": device, "machine": facts, "options": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
