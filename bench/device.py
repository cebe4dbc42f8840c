"""What the path for accelerators does on a GPU: its speed, how busy it keeps the GPU, whether its bits are the plain ones.

    python bench/device.py --output docs/data/device.json
    python bench/device.py --device cpu --volume 24 192 192 --patch 16 64 64 --overlap 4 16 16 --rounds 1     # a look

One block in the middle of a volume is read from a layer on disk, run, written and donated, as a task does it: with the example
U-Net in each precision and batch size, and with the identity, which leaves everything but the network. In turn with it, the
same forward passes alone run on batches that are on the device already, waited for once, at the end.

The same batches then go one by one through the same engine on the same device, and are blended by the sums of the CPU path:
what the stage wrote and donated has to be that, bit for bit. Each row also tells whether a patch gives the same bits at any
place of its batch: if not, the output would depend on the blocks.

With ``--device cpu`` the path runs on PyTorch's CPU device, which says nothing of its speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from compare import INPUT_CHUNK, RESOLUTION, UNET, describe, em_like, machine, markdown
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.engines.gpu import claim
from chunkflow_core.engines.identity import Identity
from chunkflow_core.exchange.codec import decompress
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.blocks import Block
from chunkflow_core.lattice.boxes import Box, Vector, ceil_to, indices, vector
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.machine import available_cpus
from chunkflow_core.planning.estimate import data_bytes
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.stages import Workspace, inference_and_donate
from chunkflow_core.storage.layers import NewLayer

MIDDLE: Vector = (1, 1, 1)
"""Of 3 × 3 × 3 blocks: it has lower and higher neighbours, so that it donates all it can."""
IN_MEMORY = 64
"""Patches that are kept on the device for the forward passes alone, which take their batches in turn."""
PRECISIONS = ("float32", "bfloat16", "float16")

Figures = dict[str, Any]


class IdentityOnDevice(Identity):
    """Repeats a single input channel, on a device."""

    def __init__(self, spec: VolumeSpec, device: torch.device) -> None:
        super().__init__(spec)
        self.device, self.batch_size, self._channels = device, spec.model.batch_size, spec.output.channels

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches.repeat(1, self._channels, 1, 1, 1)


def write_input(folder: str, options: argparse.Namespace) -> Vector:
    """Write a layer of 3 × 3 × 3 blocks of about the wanted size, but only what the one in the middle reads; the size."""
    sizes = list(zip(options.volume, options.patch, options.overlap, strict=True))
    block = [max(round(n / (p - o)), -(-o // (p - o)) + 1) * (p - o) for n, p, o in sizes]
    shape = vector(3 * b + o for b, o in zip(block, options.overlap, strict=True))
    layer = NewLayer(f"file://{folder}/input", shape, dtype="uint8", resolution=RESOLUTION, chunk=INPUT_CHUNK)
    stops = zip(block, options.overlap, INPUT_CHUNK, shape, strict=True)
    box = Box(
        vector(b // c * c for b, c in zip(block, INPUT_CHUNK, strict=True)),
        vector(min(ceil_to(2 * b + o, c), n) for b, o, c, n in stops),
    )
    layer.write(box, em_like(box.shape)[None])
    return vector(block)


def open_workspace(
    folder: str, name: str, options: argparse.Namespace, block: Vector, model: dict[str, object]
) -> Workspace:
    """A workspace for a model, prepared, its engine on the device."""
    output: dict[str, object] = {
        "path": f"file://{folder}/{name}",
        "channels": 3 if model["engine"] == "identity" else 1,
    }
    content = {
        "name": name,
        "input": {"path": f"file://{folder}/input", "fill_missing": True},
        "output": output,
        "exchange": {"path": f"file://{folder}/{name}-exchange"},
        "patch_size": list(options.patch),
        "patch_overlap": list(options.overlap),
        "block_size": list(block),
        "model": {**model, "device": options.device},
    }
    spec = parse_spec(content)
    if not spec.grid.block(MIDDLE).core:  # a small one, all of whose storage chunks touch the margin
        output["chunk_size"] = list(spec.grid.stride)
        spec = parse_spec(content)
    on_gpu, workspace = options.device == "cuda", Workspace(spec)
    device = torch.device("cuda", claim(torch.cuda.device_count())) if on_gpu else torch.device("cpu")
    engine = IdentityOnDevice(spec, device) if spec.model.engine == "identity" else load_engine(spec)
    if not on_gpu:  # the path of accelerators, on a device that every machine has
        engine.device, engine.batch_size = device, spec.model.batch_size
    workspace.__dict__["engine"] = engine
    prepare(workspace)
    return workspace


def whole(workspace: Workspace) -> tuple[float, Receipt]:
    """Seconds of the block's first stage, and its receipt."""
    start = time.perf_counter()
    receipt = inference_and_donate(workspace, MIDDLE, force=True).receipt
    assert receipt is not None
    return time.perf_counter() - start, receipt


def alone(engine: Engine, kept: list[torch.Tensor], count: int) -> float:
    """Seconds of so many forward passes of batches that are on the device."""
    wait = torch.cuda.synchronize if kept[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    for number in range(count):
        engine.forward(kept[number % len(kept)])
    wait()
    return time.perf_counter() - start


def busy_share(workspace: Workspace) -> float:
    """Share of a block's wall time in which some kernel runs, as the profiler sees it; copies are not counted."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds, _ = whole(workspace)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ranges = [event.time_range for event in events if not event.name.startswith(("Memcpy", "Memset"))]
    return covered((microseconds.start, microseconds.end) for microseconds in ranges) / 1e6 / seconds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How much lies in at least one of the intervals."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def batches(block: Block, size: int) -> Iterator[list[Vector]]:
    """The block's patches in the batches in which the stage runs them: none reaches over two layers."""
    (low, *first), (high, *stop) = block.first_patch, block.stop_patch
    for z in range(low, high):
        layer = list(indices(vector((z, *first)), vector((z + 1, *stop))))
        yield from (layer[start : start + size] for start in range(0, len(layer), size))


def plain(workspace: Workspace, block: Block) -> tuple[Slab, list[torch.Tensor], int]:
    """The block without the pipeline: its sums, some batches on the device, and how many there were."""
    spec, engine, patches = workspace.spec, workspace.engine, workspace.inference.patches
    box = workspace.inference.reads(block)
    planes = box, np.ascontiguousarray(workspace.input.read(box))
    slab = Slab(spec.grid, block.chunk, block.chunk.shape[0], spec.output.channels, patches.values)
    kept: list[torch.Tensor] = []
    count = 0
    for positions in batches(block, engine.batch_size):
        batch = np.zeros((engine.batch_size, 1, *spec.patch_size), np.float32)
        for slot, position in enumerate(positions):
            batch[slot] = patches.take(position, planes)
        given = torch.from_numpy(batch).to(engine.device)
        for position, output in zip(positions, engine.forward(given).cpu().numpy(), strict=False):
            slab.add(position, output)
        if len(kept) * engine.batch_size < IN_MEMORY:
            kept.append(given)
        count += 1
    return slab, kept, count


def differing(workspace: Workspace, receipt: Receipt, slab: Slab) -> int:
    """Voxels of what a stage wrote and donated that are not, bit for bit, what the sums say."""
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
    """Whether patches give the same bits at any place of a batch."""
    outputs = engine.forward(batch)
    return all(torch.equal(engine.forward(batch.roll(n, 0)), outputs.roll(n, 0)) for n in range(1, len(batch)))


def measure(workspace: Workspace, rounds: int, step: Callable[[], object]) -> Figures:
    """All figures of a row, by column; ``step`` is called two times more than there are rounds."""
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
    pairs = []
    for _ in range(rounds):
        pairs.append((*whole(workspace), alone(engine, kept, count)))
        step()
    facts = [receipt.facts for _, receipt, _ in pairs]
    figures = {
        "whole, s": median(seconds for seconds, _, _ in pairs),
        "Mvoxel/s": median(block.box.voxels / 1e6 / seconds for seconds, _, _ in pairs),
        "forward alone, s": median(forward for _, _, forward in pairs),
        "whole / forward": median(seconds / forward for seconds, _, forward in pairs),
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


def table(rows: dict[str, Figures]) -> str:
    """All rows; one that failed shows its error."""
    titles = list(dict.fromkeys(title for figures in rows.values() for title in figures if title != "phases"))
    return markdown(
        ["", *titles], [[name, *(cell(figures.get(title)) for title in titles)] for name, figures in rows.items()]
    )


def cell(value: Any) -> str:
    """A figure as it stands in the table."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def describe_device(kind: str) -> str:
    """The device and its settings in one line."""
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    name, driver = "PyTorch's CPU device", "?"
    if kind == "cuda":
        with suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        versions = f"driver {driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        name = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {versions}"
    return f"{name}, TF32 {'on' if tf32 else 'off'}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes: dict[str, Any] = {"type": int, "nargs": 3, "metavar": ("Z", "Y", "X")}
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="default: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes (default: 1 4)")
    parser.add_argument("--volume", default=(224, 1152, 1152), help="of the block (default: 224 1152 1152)", **sizes)
    parser.add_argument("--patch", default=(32, 256, 256), help="default: 32 256 256", **sizes)
    parser.add_argument("--overlap", default=(4, 64, 64), help="default: 4 64 64", **sizes)
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
    unet = {"engine": "pytorch", "path": f"{UNET}/model.py", "weights": f"{UNET}/model.pt"}
    threads = available_cpus() if options.device == "cpu" else 1
    models: dict[str, dict[str, object]] = {
        f"U-Net, {precision}, batch {batch}": {**unet, "precision": precision, "batch_size": batch, "threads": threads}
        for precision, batch in product(options.precision, options.batch)
    }
    models |= {f"identity, batch {batch}": {"engine": "identity", "batch_size": batch} for batch in options.batch}
    with (
        tempfile.TemporaryDirectory(prefix="device-") as folder,
        tqdm(total=len(models) * (options.rounds + 2), unit="step") as progress,
    ):
        block, step = write_input(folder, options), progress.update
        for number, (name, model) in enumerate(models.items()):
            progress.set_description(name)
            try:
                rows[name] = measure(
                    open_workspace(folder, f"row{number}", options, block, model), options.rounds, step
                )
            except Exception as error:  # the other rows go on
                rows[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            gc.collect()
            torch.cuda.empty_cache()
    device = describe_device(options.device)
    sizes = [" × ".join(map(str, size)) for size in (block, options.patch, options.overlap)]
    print(
        f"\n{device}; {describe(facts)}.\n\nA block of {sizes[0]} in the middle of a volume, patches of {sizes[1]} with an"
    )
    print(f"overlap of {sizes[2]}; medians of {options.rounds} rounds, ratios within rounds.\n\n{table(rows)}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        report = {"device": device, "machine": facts, "options": settings, "rows": rows}
        options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
