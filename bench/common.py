"""What benchmarks share: layers, specs, timing, commands, the machine, and results as text."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.machine import available_cpus
from chunkflow_core.storage.layers import NewLayer

if TYPE_CHECKING:
    import torch

    from operators.service import Client

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
EXAMPLES = ROOT / "examples"
UNET = {"path": str(EXAMPLES / "unet" / "model.py"), "weights": str(EXAMPLES / "unet" / "model.pt")}
"""The example network, as the section ``model`` of a spec names it."""
RESOLUTION: Vector = (50, 4, 4)
"""Voxel size of all layers, in nanometres, zyx."""
INPUT_CHUNK: Vector = (16, 128, 128)
"""Storage chunk of input layers, in voxels, zyx."""
KEPT_PATCHES = 64
"""Patches that stay in memory for forward passes alone, which take them in turn."""
SIZE: dict[str, Any] = {"type": int, "nargs": 3, "metavar": ("Z", "Y", "X")}
"""Arguments of ``add_argument`` for a size."""

Image = NDArray[np.uint8]
T = TypeVar("T")


# Layers and specs


def em_like(shape: Vector, seed: int = 0) -> Image:
    """Make a stack that looks like electron microscopy, uint8 ``(z, y, x)``.

    It is a small synthetic sample, mirrored up to ``shape`` (voxels, zyx), with noise that does not
    repeat.
    """
    sample = _sample_stack(seed)
    padding = [(0, max(0, n - m)) for n, m in zip(shape, sample.shape, strict=True)]
    stack = np.pad(sample[tuple(slice(n) for n in shape)], padding, mode="reflect")
    stack = np.clip(stack, 5, 251)
    stack += np.random.default_rng(seed).integers(-4, 5, shape, dtype=np.int8).view(np.uint8)  # wraps, as it should
    return stack


@cache
def _sample_stack(seed: int) -> Image:
    stack: Image = load_file(EXAMPLES / "sample_volume.py").sample_volume((20, 256, 256), seed)
    return stack[:, :192, :192]  # without the sample's blank corner


def load_file(path: Path) -> ModuleType:
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_layer(path: str, shape: Vector, *, chunk: Vector = INPUT_CHUNK, channels: int = 1) -> NewLayer:
    """Make a uint8 layer without voxels.

    Args:
        path: Address of the layer.
        shape: Size in voxels, zyx.
        chunk: Size of a storage chunk in voxels, zyx.
        channels: Number of channels.
    """
    return NewLayer(path, shape, dtype="uint8", resolution=RESOLUTION, chunk=chunk, channels=channels)


def write_random(folder: Path, shape: Vector) -> None:
    """Make the layer ``input`` in a folder, uint8, of random voxels from a fixed seed.

    Args:
        folder: Where the layer is made.
        shape: Size in voxels, zyx.
    """
    voxels = np.random.default_rng(0).integers(0, 256, (1, *shape), dtype=np.uint8)
    make_layer(f"file://{folder}/input", shape).write(Box((0, 0, 0), shape), voxels)


def spec_content(
    folder: Path | str,
    *,
    patch: Vector,
    overlap: Vector,
    block: Vector,
    model: dict[str, object],
    output: dict[str, object],
    name: str = "output",
    fill_missing: bool = False,
) -> dict[str, Any]:
    """Give the content of a spec that runs the layer ``input`` of a folder.

    Args:
        folder: Where the layers are.
        patch: Patch size in voxels, zyx.
        overlap: Overlap of patches in voxels, zyx.
        block: Block size in voxels, zyx.
        model: The section ``model``.
        output: The section ``output``, without the path.
        name: Name of the output layer in the folder; that of the exchange is made from it.
        fill_missing: Whether missing storage chunks of the input are zeros, be it all of them.
    """
    return {
        "name": "bench",
        "input": {"path": f"file://{folder}/input", "fill_missing": "all" if fill_missing else False},
        "output": {"path": f"file://{folder}/{name}", **output},
        "exchange": {"path": f"file://{folder}/{name}-exchange"},
        "patch_size": list(patch),
        "patch_overlap": list(overlap),
        "block_size": list(block),
        "model": model,
    }


# Timing and commands


def timed(function: Callable[[], T]) -> tuple[float, float, T]:
    """Call a function and time it.

    Returns:
        Seconds of wall clock, seconds of CPU (finished child processes included), and the result.
    """
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = function()
    return time.perf_counter() - wall, cpu_seconds() - cpu, result


def cpu_seconds() -> float:
    """Give the CPU seconds that this process and its finished children have taken so far."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def run_passes(engine: Any, patches: Sequence[NDArray[np.float32]], count: int) -> None:
    """Run ``count`` forward passes on the CPUs, and nothing else.

    Args:
        engine: A ``chunkflow_core`` engine; as many passes go on at a time as it has streams.
        patches: Batches in memory, float32 ``(batch, channels, z, y, x)``, taken in turn.
        count: Number of passes.
    """
    with ThreadPoolExecutor(engine.streams) as pool:
        for _ in pool.map(engine, (patches[i % len(patches)] for i in range(count))):
            pass


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Give the median of ratios, each of two figures of the same round."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


_COMMAND = """
import sys
from chunkflow_core.__main__ import main
from chunkflow_core.machine import peak_memory
code = main()
print(peak_memory())
sys.exit(code)
"""
"""A command that tells its peak memory in the end.

What its parent could be told of it counts the parent's own memory.
"""


@dataclass(frozen=True)
class Answer:
    """What a command says, and what it took."""

    content: dict[str, Any]
    """Its output, from JSON."""
    seconds: float
    """Wall seconds, imports included."""
    peak_memory: int
    """Largest resident memory in bytes."""


def ask(*arguments: str) -> Answer:
    """Run ``chunkflow-core ARGUMENTS --json`` as a process of its own.

    Raises:
        CalledProcessError: The command fails.
    """
    start = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", _COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, check=True
    ).stdout
    content, _, peak = output.strip().rpartition(b"\n")
    return Answer(json.loads(content), time.perf_counter() - start, int(peak))


def wait_for_dag(client: Client, dag: str, limit: float = 120.0) -> None:
    """Wait until Airflow has a DAG; ``TimeoutError`` after ``limit`` seconds."""
    end = time.monotonic() + limit
    while dag not in {row["dag_id"] for row in client.pages("dags", "dags")}:
        if time.monotonic() > end:
            raise TimeoutError(f"Airflow does not find the DAG {dag}")
        time.sleep(0.5)


def trigger(client: Client, dag: str) -> str:
    """Trigger a DAG; give the run's id."""
    return str(client.post(f"dags/{dag}/dagRuns", {"logical_date": None, "conf": {}})["dag_run_id"])


# The machine


def wait_for(device: torch.device | str) -> None:
    """Wait until a device has done all that it was given."""
    if str(device) != "cpu":  # PyTorch takes seconds to import
        import torch

        torch.cuda.synchronize(device)


def peak_device_memory(device: torch.device | str) -> int:
    """Tell the most bytes that this process's tensors have held on a GPU; 0 for CPUs."""
    if str(device) == "cpu":
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)


def machine() -> dict[str, Any]:
    """Tell the processor, its CPUs, load and instruction sets, and the versions of packages."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "processor": facts.get("model name", "unknown"),
        "family_model": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "cpus": available_cpus(),
        "load": round(os.getloadavg()[0], 2),
        "flags": [flag for flag in wanted if flag in flags],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    names = ("torch", "openvino", "onnxruntime", "monai", "chunkflow", "cloud-volume", "numpy", "numba")
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe(facts: dict[str, Any]) -> str:
    """Put what ``machine`` tells into one line."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    processor = f"{facts['processor']}, {facts['cpus']} CPUs ({', '.join(facts['flags'])})"
    return f"{processor}, load {facts['load']:.1f} before the start; {versions}"


# Arguments and results


def command_line(name: str, text: str | None) -> argparse.ArgumentParser:
    """Make the parser of ``python -m bench.NAME``, whose help has a module's docstring as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def size_text(size: Sequence[int]) -> str:
    """Write a size as ``16 × 128 × 128``."""
    return " × ".join(map(str, size))


def error_text(error: Exception) -> str:
    """Write an error as one line of at most some 300 characters, for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def table_line(cells: Sequence[str]) -> str:
    """Write a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    return "\n".join(map(table_line, [header, ["---"] * len(header), *rows]))


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write figures to a file, whose folders are made; to nowhere if there is no path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")


def bare_pyplot() -> Any:
    """Import ``matplotlib.pyplot`` so that it needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Save a figure of matplotlib to a file, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
