"""The path for accelerators on a GPU: speed, how busy the GPU is, and whether the bits are right.

    python -m bench.device                  # some 3 minutes on an H200
    python -m bench.device --device cpu     # a look without a GPU
    python -m bench.device --volume 112 1152 1152 --rounds 3 --seconds 1200

One block in the middle of a volume is read from a layer on disk, run, written and donated, as a
task does it: with the example U-Net in each precision and batch size, and with the identity, which
leaves everything but the network. In turn with it, the same forward passes alone run on batches
that are on the device already, waited for once, at the end.

The same batches then go one by one through the same engine on the same device, and are blended by
the sums of the CPU path: what the stage wrote and donated has to be that, bit for bit. Each row
also tells whether all runs left the same, and whether a patch gives the same bits at any place of
its batch, and in another process beside other patches: if not, the output would depend on the
blocks.

Then this pipeline, MONAI's sliding window and chunkflow's inferencer run the same patches there, as
``bench.compare`` runs them. What is not installed is left out. If any bits differ, the exit code
is 1.

With ``--device cpu``, a look, the path runs on PyTorch's CPU device, which says nothing of its
speed.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.common import SIZE, UNET, command_line, describe, error_text, machine, size_text, write_json
from bench.compare.data import Setting, nearest_covered
from bench.compare.measurement import measure as compare
from bench.compare.tables import rows_table
from bench.device.measurement import Figures, are_right, measure, results_table
from bench.device.volume import Volume, open_workspace
from chunkflow_core.lattice.boxes import vector
from chunkflow_core.machine import available_cpus

PRECISIONS = ("float32", "bfloat16", "float16")
PEERS = ("pytorch-float32", "monai-float32", "chunkflow-float32")
"""Rows of ``bench.compare`` that are run, too."""
DEFAULTS: dict[str, dict[str, Sequence[Any]]] = {
    "cuda": {
        "precision": PRECISIONS,
        "volume": (112, 768, 768),
        "patch": (32, 256, 256),
        "overlap": (4, 64, 64),
    },
    "cpu": {
        "precision": ("float32", "bfloat16"),
        "volume": (12, 96, 96),
        "patch": (8, 32, 32),
        "overlap": (2, 8, 8),
    },
}
"""What is taken by device, where the command line says nothing; sizes are in voxels, zyx."""


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


def beside_others(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run other programs and this one on the device, once; give what ``compare`` does."""
    patch, overlap = vector(options.patch), vector(options.overlap)
    setting = Setting(
        folder=folder,
        volume=nearest_covered(options.volume, patch, overlap),
        patch=patch,
        overlap=overlap,
        threads=available_cpus(),
        pass_threads=1,
        compression="gzip",
        parallel=1,
        monai_batch=max(options.batch),
        monai_buffer=None,
        device=options.device,
    )
    return {"volume": setting.volume, **compare(setting, options.peers, 1)}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line("device", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: all of a GPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes (default: 1 4)")
    for name, text in {"volume": "of the block", "patch": "of patches", "overlap": "of patches"}.items():
        size = " ".join(map(str, DEFAULTS["cuda"][name]))
        parser.add_argument(f"--{name}", help=f"{text} (default on a GPU: {size})", **SIZE)
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=PEERS, metavar="ROW", help=f"of {', '.join(PEERS)} (default: all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=120, help="own rows that would begin later are left out (default: 120)"
    )
    parser.add_argument("--output", type=Path, help="write the figures there as JSON, such as docs/data/device.json")
    options = parser.parse_args()
    for name, default in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def models(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Give the section ``model`` of each row, those that tell most first."""
    threads = available_cpus() if options.device == "cpu" else 1
    unet: dict[str, object] = {"engine": "pytorch", **UNET, "threads": threads, "device": options.device}
    rows: dict[str, dict[str, object]] = {
        f"U-Net, {precision}, batch {batch}": {**unet, "precision": precision, "batch_size": batch}
        for precision, batch in product(options.precision, options.batch)
    }
    most = max(options.batch)
    return rows | {f"identity, batch {most}": {"engine": "identity", "device": options.device, "batch_size": most}}


def run_rows(volume: Volume, options: argparse.Namespace) -> dict[str, Figures]:
    """Run this pipeline's rows; give the figures, or the error, of each."""
    rows, chosen, end = dict[str, Figures](), models(options), time.monotonic() + options.seconds
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as other,
        tqdm(total=len(chosen) * (options.rounds + 2), unit="step") as progress,
    ):
        for number, (name, model) in enumerate(chosen.items()):
            progress.set_description(name)
            if time.monotonic() > end:
                rows[name] = {"error": f"left out: {options.seconds:g} s are over (--seconds)"}
                continue
            try:
                spec = volume.spec(f"row{number}", model)
                rows[name] = measure(open_workspace(spec), options.rounds, progress.update, other)
            except Exception as error:  # the other rows go on
                rows[name] = {"error": error_text(error)}
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Measure and print."""
    options, facts = arguments(), machine()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU on this machine. With --device cpu the same runs on its CPUs.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="device-") as folder:
        sizes = (vector(size) for size in (options.volume, options.patch, options.overlap))
        volume = Volume.near(folder, *sizes)
        volume.write()
        rows = run_rows(volume, options)
    with tempfile.TemporaryDirectory(prefix="device-") as folder:
        peers = beside_others(folder, options) if options.peers else None
    device = describe_device(options.device)
    block, patch, overlap = map(size_text, (volume.block, volume.patch, volume.overlap))
    print(f"\n{device}; {describe(facts)}.\n")
    print(f"A block of {block} in the middle of a volume, patches of {patch} with an")
    print(f"overlap of {overlap}; medians of {options.rounds} rounds, ratios within rounds.\n\n{results_table(rows)}")
    if peers:
        print(f"\nA whole volume of {size_text(peers['volume'])}, {peers['patches']} such patches, by each program:\n")
        print(rows_table(peers["rows"], network=True))
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    report = {"device": device, "machine": facts, "options": settings, "rows": rows, "peers": peers}
    write_json(options.output, report)
    if not are_right(rows):
        print("\n**Bits differ that have to be the same.**")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
