"""Side by side, on the same volume and the same patches: this pipeline, MONAI's sliding window, chunkflow's inferencer.

    pip install -r bench/requirements.txt
    python bench/compare.py --volume 28 224 224 --rounds 1                  # a look: some 200 s of CPU time
    python bench/compare.py --output docs/data/compare.json --plot docs/images/compare.png

Every row reads a precomputed layer from disk, runs the patches, blends them, converts to uint8 and writes a layer; the volume
is one block, whose lattice ends exactly at the volume's faces, so that all programs run the same patches. In turn with it, each
row runs the forward passes alone, the patches being in memory already and as many at a time as the row itself runs. Rows
that have no network (identity) are timed without reading and writing instead.

Each row lives in a process of its own, so that no program's settings reach another. In every round each row runs once; figures
are medians over the rounds, and ratios are taken within a round, so that they hold on a noisy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.machine import available_cpus
from chunkflow_core.spec import VolumeSpec, parse_spec

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
UNET = EXAMPLES / "unet"
CHANNELS = 3
RESOLUTION = (50, 4, 4)
INPUT_CHUNK: Vector = (16, 128, 128)
IN_MEMORY = 64
"""Patches that are kept for the forward passes alone, which take them in turn."""
PROBES = 4
"""Patches whose outputs are compared between engines."""
MATRIX = 2048
INSTALL = "pip install -r bench/requirements.txt"

Array = NDArray[Any]
Timing = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """What all rows share; handed to their processes."""

    folder: str
    volume: Vector
    patch: Vector
    overlap: Vector
    threads: int
    """CPUs of each row."""
    pass_threads: int
    """Threads of one forward pass of ours; as many passes at a time as fit ``threads``."""
    compression: str
    parallel: int
    """CloudVolume's processes for reading and writing, for the others."""
    monai_batch: int
    monai_buffer: int | None

    def shape(self, layer: str) -> Vector:
        """Shape of an input layer: the volume, one to warm up on, and one to check numbers on."""
        patches = {"warm": (1, 1, 2), "check": (2, 2, 2)}.get(layer)
        return self.volume if patches is None else exact(patches, self.patch, self.overlap)

    def path(self, layer: str, name: str) -> str:
        """Where a layer is stored."""
        return f"file://{self.folder}/{layer}/{name}"

    @property
    def model(self) -> dict[str, object]:
        """The network's part of a spec."""
        return {"path": f"{self.folder}/model.py", "weights": f"{self.folder}/model.pt"}

    def spec(self, layer: str, name: str, model: dict[str, object], dtype: str = "uint8") -> VolumeSpec:
        """A spec whose volume is exactly one block."""
        streams = max(1, self.threads // self.pass_threads)
        return parse_spec(
            {
                "name": "compare",
                "input": {"path": self.path(layer, "input")},
                "output": {
                    "path": self.path(layer, name),
                    "channels": CHANNELS,
                    "dtype": dtype,
                    "compression": self.compression,
                },
                "exchange": {"path": self.path(layer, f"{name}-exchange")},
                "patch_size": list(self.patch),
                "patch_overlap": list(self.overlap),
                "block_size": [n - o for n, o in zip(self.shape(layer), self.overlap, strict=True)],
                "model": {"threads": self.pass_threads, "streams": streams, "device": "cpu", **model},
            }
        )


def exact(patches: Sequence[int], patch: Vector, overlap: Vector) -> Vector:
    """The shape that a number of patches along each axis covers without reaching past it."""
    return vector(n * (p - o) + o for n, p, o in zip(patches, patch, overlap, strict=True))


def nearest_exact(shape: Sequence[int], patch: Vector, overlap: Vector) -> Vector:
    """The shape nearest to the wanted one that patches cover exactly."""
    wanted = zip(shape, patch, overlap, strict=True)
    return exact([max(1, round((n - o) / (p - o))) for n, p, o in wanted], patch, overlap)


# ---------------------------------------------------------------------------------------------------------------- data


def em_like(shape: Vector, seed: int = 0) -> NDArray[np.uint8]:
    """A stack that looks like electron microscopy, uint8 ``(z, y, x)``: one made-up sample, mirrored up to the shape, with noise."""
    sample = sample_stack(seed)
    padding = [(0, max(0, n - m)) for n, m in zip(shape, sample.shape, strict=True)]
    stack = np.pad(sample[tuple(slice(n) for n in shape)], padding, mode="reflect")
    stack = np.clip(stack, 5, 251)
    stack += np.random.default_rng(seed).integers(-4, 5, shape, dtype=np.int8).view(np.uint8)  # wraps, as it should
    return stack


@cache
def sample_stack(seed: int) -> NDArray[np.uint8]:
    """A small stack, without the sample's blank corner."""
    stack: NDArray[np.uint8] = load_file(EXAMPLES / "sample_volume.py").sample_volume((20, 256, 256), seed)
    return stack[:, :192, :192]


def load_file(path: Path) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_inputs(bench: Bench) -> None:
    """Store the input layers."""
    from chunkflow_core.storage.layers import NewLayer

    stack = em_like(bench.volume)
    for layer in ("volume", "warm", "check"):
        shape = bench.shape(layer)
        data = stack if layer == "volume" else em_like(shape)
        new = NewLayer(bench.path(layer, "input"), shape, dtype="uint8", resolution=RESOLUTION, chunk=INPUT_CHUNK)
        new.write(Box((0, 0, 0), shape), data[None])


def write_model(folder: str) -> None:
    """Write the example U-Net with its head repeated over the channels, as a model file and its weights."""
    import torch

    source = UNET / "model.py"
    text = f"""
import importlib.util
from torch import nn

spec = importlib.util.spec_from_file_location("example_unet", {str(source)!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
InstantiatedModel = example.UNet()
InstantiatedModel.head = nn.Conv3d(example.WIDTHS[0], {CHANNELS}, 1)
InstantiatedModel.eval()
"""
    Path(folder, "model.py").write_text(text.lstrip(), encoding="utf-8")
    state = torch.load(UNET / "model.pt", map_location="cpu", weights_only=True)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    for key in ("head.weight", "head.bias"):
        state[key] = state[key].repeat(CHANNELS, *[1] * (state[key].ndim - 1))
    torch.save(state, Path(folder, "model.pt"))


def load_network(bench: Bench) -> Any:
    """The network in plain PyTorch."""
    import torch

    network = load_file(Path(bench.folder, "model.py")).InstantiatedModel
    network.load_state_dict(torch.load(Path(bench.folder, "model.pt"), weights_only=True))
    return network.eval()


# ---------------------------------------------------------------------------------------------------------------- rows


class Row(ABC):
    """One program with one engine and precision. Lives in a process of its own."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name

    @abstractmethod
    def whole(self, layer: str) -> int:
        """Read a layer, run it, write a layer; the number of patches that were run."""

    @abstractmethod
    def compute(self) -> None:
        """Run the volume from memory to memory: uint8 in, uint8 out."""

    @abstractmethod
    def forward(self, count: int) -> None:
        """Run the network on some patches that are in memory, and nothing else."""

    def prepare(self) -> str:
        """Load everything, and run a small volume, so that nothing is compiled or allocated for the first time later.

        Returns:
            How the row runs, in a few words.
        """
        self.whole("warm")
        return self.settings()

    @abstractmethod
    def settings(self) -> str:
        """How many passes run at a time, in how many threads each."""

    @cached_property
    def data(self) -> Array:
        """The input volume, uint8 ``(z, y, x)``."""
        return read(self.bench, "volume")

    @cached_property
    def patches(self) -> list[NDArray[np.float32]]:
        """The first patches of the lattice, float32 ``(1, 1, z, y, x)`` in [0, 1]."""
        return list(lattice_patches(self.bench, self.data, IN_MEMORY))

    def outputs(self) -> NDArray[np.float32] | None:
        """The engine's outputs of the first patches; None if it has none of its own to be compared."""
        return None


def lattice_patches(bench: Bench, data: Array, most: int) -> Iterator[NDArray[np.float32]]:
    """The first patches of a stack, scaled to [0, 1]."""
    boxes = starts(data.shape, bench.patch, bench.overlap)
    for start, _ in zip(boxes, range(most), strict=False):
        index = tuple(slice(a, a + p) for a, p in zip(start, bench.patch, strict=True))
        yield np.ascontiguousarray(data[index], np.float32)[None, None] / np.float32(255)


def starts(shape: Sequence[int], patch: Vector, overlap: Vector) -> list[Vector]:
    """Where the patches of an exactly covered volume start."""
    counts = [(n - o) // (p - o) for n, p, o in zip(shape, patch, overlap, strict=True)]
    stride = [p - o for p, o in zip(patch, overlap, strict=True)]
    return [vector(k * s for k, s in zip(i, stride, strict=True)) for i in product(*map(range, counts))]


class Ours(Row):
    """``inference_and_donate`` of a volume that is one block."""

    def __init__(self, bench: Bench, name: str, model: dict[str, object], network: bool = True) -> None:
        super().__init__(bench, name)
        self.model = {**bench.model, **model} if network else model

    @cached_property
    def workspaces(self) -> dict[str, Any]:
        """Of each layer; they share the engine."""
        from chunkflow_core.steps.prepare import make_output
        from chunkflow_core.steps.stages import Workspace

        if self.model["engine"] == "onnx":
            self.model = {"engine": "onnx", "path": export_onnx(self.bench)}
        found: dict[str, Any] = {}
        for layer in ("warm", "volume"):
            spec = self.bench.spec(layer, self.name, self.model)
            make_output(spec)
            found[layer] = Workspace(spec)
        found["warm"].__dict__["engine"] = found["volume"].engine
        return found

    @property
    def engine(self) -> Any:
        """What runs patches."""
        return self.workspaces["volume"].engine

    def settings(self) -> str:
        streams, threads = getattr(self.engine, "streams", 1), self.bench.pass_threads
        return f"{streams} × {threads} thread{'s' if threads > 1 else ''}"

    def whole(self, layer: str) -> int:
        return self._run(self.workspaces[layer])

    @staticmethod
    def _run(workspace: Any) -> int:
        from chunkflow_core.steps.stages import inference_and_donate

        inference_and_donate(workspace, (0, 0, 0), force=True)
        return workspace.spec.grid.patches

    def compute(self) -> None:
        from chunkflow_core.steps.stages import Workspace

        workspace = Workspace(self.workspaces["volume"].spec)
        workspace.__dict__["engine"] = self.engine
        data, output = self.data, np.empty((CHANNELS, *self.bench.volume), np.uint8)

        def write(box: Box, part: Array) -> dict[str, str]:
            output[(slice(None), *box.slices((0, 0, 0)))] = part
            return {}

        workspace.input.read = lambda box: data[None][(slice(None), *box.slices((0, 0, 0)))]
        workspace.output.write = write
        self._run(workspace)

    def forward(self, count: int) -> None:
        engine, patches = self.engine, self.patches
        with ThreadPoolExecutor(getattr(engine, "streams", 1)) as pool:
            for _ in pool.map(engine, (patches[i % len(patches)] for i in range(count))):
                pass

    def outputs(self) -> NDArray[np.float32] | None:
        return np.concatenate([self.engine(patch) for patch in self.patches[:PROBES]])

    def check(self) -> dict[str, float]:
        """Largest differences of a small float32 volume to plain sums in float64.

        Returns:
            ``blending``: to the same forward passes, blended in float64. ``network``: to forward passes and blending in
            float64.
        """
        import torch

        from chunkflow_core.steps.prepare import make_output
        from chunkflow_core.steps.stages import Workspace

        spec = self.bench.spec("check", self.name, self.model, dtype="float32")
        make_output(spec)
        workspace = Workspace(spec)
        workspace.__dict__["engine"] = self.engine
        self._run(workspace)
        result = workspace.output.read(spec.grid.roi)
        stack = read(self.bench, "check")
        network = load_network(self.bench).double()

        def in_double(patch: Array) -> Array:
            with torch.inference_mode():
                return network(torch.from_numpy(patch).double()).numpy()

        blend = partial(blend_in_double, self.bench, stack)
        return {
            "blending": float(np.abs(result - blend(self.engine)).max()),
            "network": float(np.abs(result - blend(in_double)).max()),
        }


def blend_in_double(bench: Bench, stack: Array, network: Callable[[Array], Array]) -> NDArray[np.float64]:
    """Weighted mean of the patches' outputs, by sums over the whole volume in float64."""
    z, y, x = (np.exp(-((p + 1) ** 2) / (4.0 * np.arange(1, p + 1) * np.arange(p, 0, -1))) for p in bench.patch)
    weight = z[:, None, None] * y[:, None] * x
    sums, weights = np.zeros((CHANNELS, *stack.shape)), np.zeros(stack.shape)
    patches = lattice_patches(bench, stack, sys.maxsize)
    for start, patch in zip(starts(stack.shape, bench.patch, bench.overlap), patches, strict=True):
        index = tuple(slice(a, a + p) for a, p in zip(start, bench.patch, strict=True))
        sums[(slice(None), *index)] += network(patch)[0].astype(np.float64) * weight
        weights[index] += weight
    return sums / weights


class Other(Row):
    """A program that takes the whole volume in memory; layers are read and written by CloudVolume."""

    def whole(self, layer: str) -> int:
        result, patches = self.infer(read(self.bench, layer))
        self._layer(layer)[:, :, :] = to_uint8(result).T
        return patches

    def compute(self) -> None:
        to_uint8(self.infer(self.data)[0])

    @abstractmethod
    def infer(self, stack: Array) -> tuple[NDArray[np.float32], int]:
        """Blended output ``(channels, z, y, x)`` of a uint8 stack, and the number of patches that were run."""

    def _layer(self, layer: str) -> Any:
        from cloudvolume import CloudVolume

        from chunkflow_core.storage.layers import NewLayer

        bench, path = self.bench, self.bench.path(layer, self.name)
        chunk = bench.spec(layer, self.name, {"engine": "identity"}).storage_chunk
        if not Path(path.removeprefix("file://"), "info").exists():
            shape = bench.shape(layer)
            NewLayer(path, shape, dtype="uint8", resolution=RESOLUTION, chunk=chunk, channels=CHANNELS)
        compress = False if bench.compression == "none" else bench.compression
        return CloudVolume(path, progress=False, compress=compress, parallel=bench.parallel)

    def settings(self) -> str:
        import torch

        return f"1 × {torch.get_num_threads()} threads"


def read(bench: Bench, layer: str) -> Array:
    """An input layer, ``(z, y, x)``."""
    from cloudvolume import CloudVolume

    volume = CloudVolume(bench.path(layer, "input"), progress=False, parallel=bench.parallel)
    return np.asarray(volume[:, :, :])[..., 0].T


def to_uint8(result: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[0, 1] to 0–255, in place where it can be, with all threads."""
    import torch

    return torch.from_numpy(result).mul_(255).round_().clamp_(0, 255).to(torch.uint8).numpy()


class Monai(Other):
    """``monai.inferers.sliding_window_inference`` in eager PyTorch."""

    def __init__(
        self, bench: Bench, name: str, precision: str = "float32", channels_last: bool = False, network: bool = True
    ) -> None:
        super().__init__(bench, name)
        self.precision, self.channels_last, self.network = precision, channels_last, network

    @cached_property
    def predictor(self) -> Callable[[Any], Any]:
        """The network, or the repetition of the input."""
        import torch

        if not self.network:
            return lambda batch: batch.repeat(1, CHANNELS, 1, 1, 1)
        layout = torch.channels_last_3d if self.channels_last else torch.contiguous_format
        dtype = getattr(torch, self.precision)
        network = load_network(self.bench).to(dtype=dtype, memory_format=layout)

        def run(batch: torch.Tensor) -> torch.Tensor:
            return network(batch.to(dtype=dtype, memory_format=layout)).float()

        return run

    def infer(self, stack: Array) -> tuple[NDArray[np.float32], int]:
        import torch
        from monai.inferers.utils import sliding_window_inference

        bench, ran = self.bench, 0

        def predictor(batch: torch.Tensor) -> torch.Tensor:
            nonlocal ran
            ran += len(batch)
            return self.predictor(batch)

        with torch.inference_mode():
            image = torch.from_numpy(np.ascontiguousarray(stack))[None, None].float().div_(255)
            # half a voxel less than the overlap: MONAI rounds the stride down, and fractions are not exact
            overlap = [(o - 0.5) / p if o else 0.0 for o, p in zip(bench.overlap, bench.patch, strict=True)]
            result = sliding_window_inference(
                image,
                bench.patch,
                bench.monai_batch,
                predictor,
                overlap=overlap,
                mode="gaussian",
                buffer_steps=bench.monai_buffer,
                buffer_dim=0,
            )
        return result[0].numpy(), ran

    def forward(self, count: int) -> None:
        import torch

        size, patches = self.bench.monai_batch, self.patches
        with torch.inference_mode():
            for first in range(0, count, size):
                numbers = range(first, min(first + size, count))
                self.predictor(torch.from_numpy(np.concatenate([patches[i % len(patches)] for i in numbers])))

    def settings(self) -> str:
        buffered = f", {self.bench.monai_buffer} buffer steps" if self.bench.monai_buffer else ""
        return f"{super().settings()}, batch {self.bench.monai_batch}{buffered}"


class Chunkflow(Other):
    """chunkflow's ``Inferencer``, with its own PyTorch or identity framework."""

    def __init__(self, bench: Bench, name: str, framework: str = "pytorch") -> None:
        super().__init__(bench, name)
        self.framework = framework

    @cached_property
    def inferencer(self) -> Any:
        """The inferencer, its model loaded."""
        from chunkflow.flow.divid_conquer.inferencer import Inferencer

        return Inferencer(
            f"{self.bench.folder}/model.py",
            f"{self.bench.folder}/model.pt",
            self.bench.patch,
            output_patch_overlap=self.bench.overlap,
            num_output_channels=CHANNELS,
            framework=self.framework,
            mask_output_chunk=True,
        )

    def infer(self, stack: Array) -> tuple[NDArray[np.float32], int]:
        from chunkflow.chunk import Chunk

        with contextlib.redirect_stdout(io.StringIO()):  # it tells of each step
            result = self.inferencer(Chunk(stack, voxel_offset=(0, 0, 0), voxel_size=RESOLUTION))
        return result.array, len(self.inferencer.patch_slices_list)

    def forward(self, count: int) -> None:
        import torch

        network, patches = self.inferencer.patch_inferencer.model, self.patches
        with torch.no_grad():
            for i in range(count):
                network(torch.from_numpy(patches[i % len(patches)]))


@dataclass(frozen=True)
class Entry:
    """A row that can be asked for."""

    title: str
    make: Callable[[Bench, str], Row]
    precision: str = "float32"
    network: bool = True


def _ours(engine: str, precision: str) -> Callable[[Bench, str], Row]:
    return partial(Ours, model={"engine": engine, "precision": precision})


ROWS = {
    "pytorch-float32": Entry("this, PyTorch, float32", _ours("pytorch", "float32")),
    "pytorch-bfloat16": Entry("this, PyTorch, bfloat16", _ours("pytorch", "bfloat16"), "bfloat16"),
    "openvino-float32": Entry("this, OpenVINO, float32", _ours("openvino", "float32")),
    "openvino-bfloat16": Entry("this, OpenVINO, bfloat16", _ours("openvino", "bfloat16"), "bfloat16"),
    "onnx-float32": Entry("this, ONNX Runtime, float32", _ours("onnx", "float32")),
    "monai-float32": Entry("MONAI, float32", Monai),
    "monai-channels-last": Entry("MONAI, float32, channels last", partial(Monai, channels_last=True)),
    "monai-bfloat16": Entry(
        "MONAI, bfloat16, channels last", partial(Monai, precision="bfloat16", channels_last=True), "bfloat16"
    ),
    "chunkflow-float32": Entry("chunkflow, float32", Chunkflow),
    "identity": Entry("this, identity", partial(Ours, model={"engine": "identity"}, network=False), network=False),
    "monai-identity": Entry("MONAI, identity", partial(Monai, network=False), network=False),
    "chunkflow-identity": Entry("chunkflow, identity", partial(Chunkflow, framework="identity"), network=False),
}
REFERENCE, CHECKED = {True: "monai-float32", False: "monai-identity"}, "pytorch-float32"


def export_onnx(bench: Bench) -> str:
    """The network as an ONNX file; its path."""
    import torch

    path = Path(bench.folder, "model.onnx")
    example = torch.zeros(1, 1, *bench.patch)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(load_network(bench), (example,), path, input_names=["image"], output_names=["output"])
    return str(path)


# ----------------------------------------------------------------------------------------------------------- processes

_row: Row
_bench: Bench


def _start(bench: Bench, name: str) -> None:
    """First thing in a row's process."""
    global _row, _bench
    warnings.simplefilter("ignore")
    cpus = sorted(os.sched_getaffinity(0))
    if bench.threads < len(cpus):
        os.sched_setaffinity(0, cpus[: bench.threads])
    _bench = bench
    if name in ROWS:
        _row = ROWS[name].make(bench, name)


def _call(method: str, *arguments: Any) -> Any:
    """A method of the row, in its process."""
    return getattr(_row, method)(*arguments)


def _timed(method: str, *arguments: Any) -> tuple[Timing, Any]:
    """Wall and CPU seconds of a method of the row."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = getattr(_row, method)(*arguments)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}, result


def _peak_memory() -> int:
    """Largest resident memory of the process so far, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _matrix_rate(precision: str) -> float:
    """Multiply-adds per second of a matrix multiplication with all threads: the best of a few.

    The matrices grow to ``MATRIX`` until one takes half a second: a processor that can't do bfloat16 would take minutes.
    """
    import torch

    dtype, size = getattr(torch, precision), 256
    while True:
        a, b = (torch.rand(size, size).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            torch.matmul(a, b)
            seconds.append(time.perf_counter() - start)
        if size >= MATRIX or min(seconds) > 0.5:
            return size**3 / min(seconds)
        size *= 2


def _multiply_adds() -> int:
    """Multiply-adds of the network for one patch, padding included: those of the (transposed) convolutions."""
    import torch

    network, total = load_network(_bench), 0

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        transposed = isinstance(module, torch.nn.ConvTranspose3d)
        positions = (inputs[0] if transposed else output)[0, 0].numel()
        total += (
            positions * module.in_channels * module.out_channels // module.groups * int(np.prod(module.kernel_size))
        )

    for module in network.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            module.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.zeros(1, 1, *_bench.patch))
    return total


def _versions() -> dict[str, str]:
    names = ("torch", "openvino", "onnxruntime", "monai", "chunkflow", "cloud-volume", "numpy", "numba")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@dataclass
class Process:
    """A row and its process, and what was measured of it."""

    name: str
    pool: ProcessPoolExecutor
    error: str = ""
    settings: str = ""
    patches: int = 0
    peak_memory: int = 0
    timings: dict[str, list[Timing]] = field(default_factory=dict)

    @classmethod
    def start(cls, bench: Bench, name: str) -> Process:
        """Start an empty process."""
        context = get_context("spawn")
        return cls(name, ProcessPoolExecutor(1, context, initializer=_start, initargs=(bench, name)))

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function there. An error is kept for the table, and the row left out from then on."""
        if self.error:
            return None
        try:
            return self.pool.submit(function, *arguments).result()
        except ImportError as error:
            self.error = f"{error}; {INSTALL}"
        except Exception as error:
            self.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None

    def measure(self, what: str, *arguments: Any) -> None:
        """Time a method of the row."""
        answer = self.ask(_timed, what, *arguments)
        if answer is not None:
            timing, result = answer
            self.timings.setdefault(what, []).append(timing)
            self.patches = result or self.patches

    def seconds(self, what: str) -> list[float]:
        """Seconds of each round."""
        return [timing["seconds"] for timing in self.timings.get(what, [])]


# --------------------------------------------------------------------------------------------------------- measurement


def run_rounds(processes: list[Process], peak: Process, count: int, rounds: int) -> dict[str, float]:
    """Let each row run once in every round, in turn forwards and backwards.

    Returns the best rates of matrix multiplication, in the precisions that the rows' networks have.
    """
    networks = [entry for entry in (ROWS[process.name] for process in processes) if entry.network]
    rates: dict[str, list[float]] = {
        precision: [] for precision in sorted({e.precision for e in networks}, reverse=True)
    }
    with tqdm(total=rounds * len(processes), desc="rounds", unit="row") as progress:
        for number in range(rounds):
            for precision, found in rates.items():
                found.append(peak.ask(_matrix_rate, precision) or float("nan"))
            for process in processes if number % 2 == 0 else processes[::-1]:
                progress.set_postfix_str(process.name)
                process.measure("whole", "volume")
                if ROWS[process.name].network:
                    process.measure("forward", count)
                else:
                    process.measure("compute")
                progress.update()
    return {precision: max(found) for precision, found in rates.items()}


def summarise(bench: Bench, process: Process, reference: Process | None, work: int, rates: dict[str, float]) -> Timing:
    """Figures of a row: medians, and ratios within rounds."""
    entry, voxels = ROWS[process.name], Box((0, 0, 0), bench.volume).voxels
    whole, forward, compute = map(process.seconds, ("whole", "forward", "compute"))
    figures = {"whole_seconds": statistics.median(whole), "voxels_per_second": voxels / statistics.median(whole)}
    if forward:
        figures["forward_seconds"] = statistics.median(forward)
        figures["ratio"] = _median_ratio(whole, forward)
        cpu = [[t["cpu_seconds"] for t in process.timings[what]] for what in ("whole", "forward")]
        figures["cpu_ratio"] = _median_ratio(*cpu)
        rate = work * process.patches / figures["whole_seconds"]
        figures["multiply_adds_per_second"] = rate
        figures["of_matrix_rate"] = rate / rates[entry.precision]
    if compute:
        figures["compute_seconds"] = statistics.median(compute)
        figures["compute_voxels_per_second"] = voxels / figures["compute_seconds"]
    if reference and not reference.error:
        figures["speed_to_monai"] = _median_ratio(reference.seconds("whole"), whole)
        if compute:
            figures["compute_speed_to_monai"] = _median_ratio(reference.seconds("compute"), compute)
    return figures


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def check_numbers(bench: Bench, processes: list[Process]) -> dict[str, Any]:
    """How far the outputs are apart."""
    found: dict[str, Any] = {"to_float64": {}, "engines": {}, "uint8": {}}
    checked = next((p for p in processes if p.name == CHECKED and not p.error), None)
    if checked is None:
        return found
    found["to_float64"] = checked.ask(_call, "check") or {"error": checked.error}
    reference = checked.ask(_call, "outputs")
    for process in processes:
        if process is checked or process.error or not ROWS[process.name].network:
            continue
        if (outputs := process.ask(_call, "outputs")) is not None:
            found["engines"][process.name] = float(np.abs(outputs - reference).max())
        found["uint8"][process.name] = _grey_levels(bench, process.name)
    return found


def _grey_levels(bench: Bench, name: str) -> dict[str, float]:
    """How far a row's output layer is from that of PyTorch in float32, in grey levels."""
    from cloudvolume import CloudVolume

    one, other = (CloudVolume(bench.path("volume", row), progress=False) for row in (name, CHECKED))
    most, total, depth = 0, 0, bench.patch[0]
    for z in range(0, bench.volume[0], depth):
        planes = slice(z, min(z + depth, bench.volume[0]))
        apart = np.abs(np.asarray(one[:, :, planes], np.int16) - np.asarray(other[:, :, planes], np.int16))
        most, total = max(most, int(apart.max())), total + int(apart.sum())
    return {"largest": most, "mean": total / (CHANNELS * Box((0, 0, 0), bench.volume).voxels)}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
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


# -------------------------------------------------------------------------------------------------------------- output


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    processor = f"{facts['processor']}, {facts['cpus']} CPUs ({', '.join(facts['flags'])})"
    return f"{processor}, load {facts['load']:.1f} before the start; {versions}"


def _figure(figures: Timing, key: str, form: str, scale: float = 1.0) -> str:
    return format(figures[key] * scale, form) if key in figures else "–"


def network_table(rows: dict[str, Any]) -> str:
    """Rows that run the network."""
    header = ["", "at a time", "whole, s", "forward alone, s", "whole / forward", "in CPU time", "Mvoxel/s"]
    header += ["speed, MONAI = 1", "of the matrix rate", "peak memory, MB"]
    lines = []
    for name, row in rows.items():
        if not ROWS[name].network:
            continue
        if row["error"]:
            lines.append([ROWS[name].title, row["error"], *["–"] * (len(header) - 2)])
            continue
        figures = row["figures"]
        columns = [("whole_seconds", ".2f", 1), ("forward_seconds", ".2f", 1), ("ratio", ".3f", 1)]
        columns += [("cpu_ratio", ".3f", 1)]
        columns += [("voxels_per_second", ".2f", 1e-6), ("speed_to_monai", ".2f", 1), ("of_matrix_rate", ".0%", 1)]
        lines.append([ROWS[name].title, row["settings"], *(_figure(figures, *column) for column in columns)])
        lines[-1].append(f"{row['peak_memory'] / 1e6:.0f}")
    return markdown(header, lines)


def identity_table(rows: dict[str, Any]) -> str:
    """Rows that run no network."""
    header = ["", "end to end, Mvoxel/s", "MONAI = 1", "compute only, Mvoxel/s", "MONAI = 1", "peak memory, MB"]
    lines = []
    for name, row in rows.items():
        if ROWS[name].network:
            continue
        if row["error"]:
            lines.append([ROWS[name].title, row["error"], *["–"] * (len(header) - 2)])
            continue
        columns = [("voxels_per_second", ".1f", 1e-6), ("speed_to_monai", ".2f", 1)]
        columns += [("compute_voxels_per_second", ".1f", 1e-6), ("compute_speed_to_monai", ".2f", 1)]
        lines.append([ROWS[name].title, *(_figure(row["figures"], *column) for column in columns)])
        lines[-1].append(f"{row['peak_memory'] / 1e6:.0f}")
    return markdown(header, lines)


def check_lines(checks: dict[str, Any]) -> list[str]:
    """What is to be said of the numbers."""
    lines = []
    if "blending" in checks["to_float64"]:
        lines.append(
            "- float32 output of a small volume: at most {blending:.1e} from the same forward passes blended in float64, "
            "{network:.1e} from forward passes in float64 too.".format(**checks["to_float64"])
        )
    for name, apart in checks["engines"].items():
        lines.append(f"- {ROWS[name].title}: outputs of patches at most {apart:.1e} from PyTorch in float32.")
    for name, apart in checks["uint8"].items():
        lines.append(
            f"- {ROWS[name].title}: written grey levels {apart['mean']:.3f} apart on average, at most {apart['largest']:.0f}."
        )
    return lines


def plot(path: Path, report: dict[str, Any]) -> None:
    """Bars of output voxels per second, with the network and without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {
        True: ("forward_seconds", "forward passes alone"),
        False: ("compute_seconds", "without reading and writing"),
    }
    shown = {
        kind: {n: r for n, r in report["rows"].items() if ROWS[n].network == kind and not r["error"]} for kind in kinds
    }
    shown = {kind: rows for kind, rows in shown.items() if rows}
    heights = [len(rows) + 1 for rows in shown.values()]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(9, 0.55 * sum(heights) + 1), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (kind, rows) in zip(axes[:, 0], shown.items(), strict=True):
        key, label = kinds[kind]
        figures = [row["figures"] for row in rows.values()]
        ends = np.array([f["voxels_per_second"] for f in figures]) / 1e6
        parts = np.array([f["voxels_per_second"] * f["whole_seconds"] / f[key] for f in figures]) / 1e6
        places = np.arange(len(rows))
        colours = ["tab:blue" if ROWS[name].title.startswith("this") else "tab:gray" for name in rows]
        axis.barh(places, parts, 0.8, color="none", edgecolor="black", linestyle=":", label=label)
        bars = axis.barh(places, ends, 0.6, color=colours, label="end to end")
        axis.bar_label(bars, [f"{v:.2f}" if v < 10 else f"{v:.0f}" for v in ends], label_type="center", color="white")
        axis.set_yticks(places, [ROWS[name].title for name in rows])
        axis.invert_yaxis()
        axis.set_xlabel("output voxels per second, millions" + ("" if kind else " (no network)"))
        axis.legend(loc="best", fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    facts = report["machine"]
    figure.suptitle(
        f"{facts['processor']}, {report['options']['threads']} CPUs, {report['patches']} patches", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes: dict[str, Any] = {"type": int, "nargs": 3, "metavar": ("Z", "Y", "X")}
    parser.add_argument(
        "--volume",
        default=(112, 1024, 1024),
        help="nominal size (default: 112 1024 1024); rounded to what the lattice covers exactly",
        **sizes,
    )
    parser.add_argument("--patch", default=(16, 128, 128), help="default: 16 128 128", **sizes)
    parser.add_argument("--overlap", default=(4, 32, 32), help="default: 4 32 32", **sizes)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, help="CPUs of each row (default: all)")
    parser.add_argument(
        "--pass-threads",
        type=int,
        default=1,
        help="threads of one forward pass of this pipeline (model.threads), which runs as many passes at a time as there are "
        "CPUs for them (default: 1)",
    )
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--compression", choices=("gzip", "zstd", "br", "none"), default="gzip", help="of all output layers"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="CloudVolume's processes for the others' reading and writing (default: 1)",
    )
    parser.add_argument("--monai-batch", type=int, default=1, help="MONAI's sw_batch_size (default: 1)")
    parser.add_argument("--monai-buffer", type=int, help="MONAI's buffer_steps, along z (default: none)")
    parser.add_argument("--folder", type=Path, help="where to put the layers (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON, such as docs/data/compare.json")
    parser.add_argument("--plot", type=Path, help="draw them there, such as docs/images/compare.png")
    return parser.parse_args()


def measure(bench: Bench, names: list[str], rounds: int) -> dict[str, Any]:
    """Everything that is reported, except for the machine."""
    processes = [Process.start(bench, name) for name in names]
    peak = Process.start(bench, "peak")
    try:
        with ThreadPoolExecutor(bench.threads) as pool:
            settings = pool.map(lambda process: process.ask(_call, "prepare") or "", processes)
            for process, told in tqdm(zip(processes, settings, strict=True), "warming up", len(processes), unit="row"):
                process.settings = told
        work = peak.ask(_multiply_adds) or 0 if any(ROWS[name].network for name in names) else 0
        patches = bench.spec("volume", "none", {"engine": "identity"}).grid.patches
        rates = run_rounds(processes, peak, patches, rounds)
        rows: dict[str, Any] = {}
        for process in processes:
            process.peak_memory = process.ask(_peak_memory) or 0
        checks = check_numbers(bench, processes)
        for process in processes:
            reference = next((p for p in processes if p.name == REFERENCE[ROWS[process.name].network]), None)
            rows[process.name] = {
                "title": ROWS[process.name].title,
                "settings": process.settings,
                "error": process.error,
                "patches": process.patches,
                "peak_memory": process.peak_memory,
                "figures": {} if process.error else summarise(bench, process, reference, work, rates),
                "rounds": process.timings,
            }
        return {
            "patches": patches,
            "multiply_adds_per_patch": work,
            "matrix_rates": rates,
            "matrix_error": peak.error,
            "checks": checks,
            "rows": rows,
        }
    finally:
        for process in [*processes, peak]:
            process.pool.shutdown(cancel_futures=True)


def main() -> int:
    """Measure and print."""
    options = arguments()
    patch, overlap = vector(options.patch), vector(options.overlap)
    volume = nearest_exact(options.volume, patch, overlap)
    threads = options.threads or available_cpus()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="compare-", dir=options.folder) as folder:
        # for the rows' processes
        os.environ |= {"CHUNKFLOW_CPUS": str(threads), "CHUNKFLOW_CACHE": f"{folder}/cache", "TQDM_DISABLE": "1"}
        bench = Bench(
            folder=folder,
            volume=volume,
            patch=patch,
            overlap=overlap,
            threads=threads,
            pass_threads=options.pass_threads,
            compression=options.compression,
            parallel=options.parallel,
            monai_batch=options.monai_batch,
            monai_buffer=options.monai_buffer,
        )
        write_inputs(bench)
        write_model(folder)
        report = measure(bench, options.rows, options.rounds)
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "plot", "folder")}
    settings |= {"volume": volume, "threads": threads}
    report = {"machine": facts, "options": settings, **report}
    print_report(report, options.volume)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if options.plot:
        plot(options.plot, report)
    return 0


def print_report(report: dict[str, Any], nominal: Sequence[int]) -> None:
    """Print the tables, with what they stand for, as Markdown."""
    options, rates = report["options"], report["matrix_rates"]
    sizes = {key: " × ".join(map(str, options[key])) for key in ("volume", "patch", "overlap")}
    print(f"\n{describe(report['machine'])}.")
    print(
        f"\nVolume {sizes['volume']} (asked for: {' × '.join(map(str, nominal))}), {report['patches']} patches of "
        f"{sizes['patch']} with an overlap of {sizes['overlap']}, {CHANNELS} channels, uint8, {options['compression']}; "
        f"{options['threads']} CPUs; medians of {options['rounds']} rounds, ratios within rounds."
    )
    ran = {row["title"]: row["patches"] for row in report["rows"].values() if not row["error"]}
    odd = {title: count for title, count in ran.items() if count != report["patches"]}
    print(f"\nPatches that ran: {', '.join(f'{count} by {title}' for title, count in ran.items())}.")
    if odd:
        print(f"\n**Not the same patches**: {odd}.")
    if rates:
        found = ", ".join(f"{rate / 1e9:.0f} in {precision}" for precision, rate in rates.items())
        print(
            f"\nThe network takes {report['multiply_adds_per_patch'] / 1e9:.2f} billion multiply-adds a patch. Billion "
            f"multiply-adds per second of matrices of at most {MATRIX} × {MATRIX}: {found}."
        )
    print()
    kinds = {ROWS[name].network for name in report["rows"]}
    if True in kinds:
        print(network_table(report["rows"]) + "\n")
    if False in kinds:
        print(identity_table(report["rows"]) + "\n")
    print("\n".join(check_lines(report["checks"])))


if __name__ == "__main__":
    sys.exit(main())
