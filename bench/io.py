"""What writing and reading layers costs, over CloudVolume's settings.

    python -m bench.io      # less than a minute
    python -m bench.io --rounds 3 --output docs/data/io.json --plot docs/images/io.png

Two layers on the local disk: probabilities of three channels, which are smooth with some noise, and
an image like electron microscopy. Processes are CloudVolume's ``parallel``; threads are the
caller's, each of which writes or reads rows of storage chunks of its own (CloudVolume by itself has
one thread for ``file://``). Where a level is given, chunks are compressed and put by CloudFiles, as
CloudVolume may not hand ``compress_level`` on; whether it does is told. Green threads are off
throughout.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cloudfiles import CloudFiles
from cloudvolume import CloudVolume
from tqdm import tqdm

from bench.common import (
    SIZE,
    Image,
    bare_pyplot,
    command_line,
    describe,
    em_like,
    machine,
    make_layer,
    save_figure,
    size_text,
    table,
    timed,
    write_json,
)
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import cloudvolume_slices
from chunkflow_core.storage.layer_scale import LayerScale

CODECS = ("none", "gzip", "zstd", "br")
LEVELS = {"gzip": (1, 3, 6, 9), "zstd": (1, 3, 9), "br": (1, 3, 5)}
NEAR_SMALLEST = 1.05
"""How much larger than the smallest a layer may be to count as small too."""


@dataclass(frozen=True)
class Setting:
    """How a layer is written and read."""

    codec: str
    level: int | None = None
    """Level of compression; with None CloudVolume compresses, with a level of its own choice."""
    processes: int = 1
    """Processes in which CloudVolume reads and writes."""
    threads: int = 1
    """Threads that call CloudVolume, each with pieces of the layer."""

    @property
    def compress(self) -> str | bool:
        """The codec as CloudVolume and CloudFiles take it: its name, or False for none."""
        return False if self.codec == "none" else self.codec

    @property
    def name(self) -> str:
        """Codec and level, as the table has them."""
        return self.codec if self.level is None else f"{self.codec} {self.level}"


def settings(most: int) -> Iterator[Setting]:
    """Give all that is tried.

    Each codec is tried by CloudVolume with processes or threads, each level with one of both.
    """
    for codec in CODECS:
        for processes, threads in ((1, 1), *(((most, 1), (1, most)) if most > 1 else ())):
            yield Setting(codec, processes=processes, threads=threads)
        for level in LEVELS.get(codec, ()):
            yield Setting(codec, level)


def probabilities(shape: Vector) -> Image:
    """Make three channels as a network gives them, uint8 ``(channels, z, y, x)``.

    They are mostly near 0 or 255, smooth in between, with some noise; ``shape`` in voxels, zyx.
    """
    rng = np.random.default_rng(0)
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfftn(rng.standard_normal(shape, dtype=np.float32))
        for axis, n in enumerate(shape):
            frequency = np.fft.rfftfreq(n) if axis == 2 else np.fft.fftfreq(n)
            width = 1.0 if axis == 0 else 6.0
            spectrum *= np.exp(-2 * (np.pi * width * frequency) ** 2).reshape(
                [-1 if axis == b else 1 for b in range(3)]
            )
        smooth = np.fft.irfftn(spectrum, shape, axes=(0, 1, 2)).astype(np.float32)
        logits = 5 * smooth / smooth.std() - 3 + 0.15 * rng.standard_normal(shape, dtype=np.float32)
        channels.append(np.rint(255 / (1 + np.exp(-logits))).astype(np.uint8))
    return np.stack(channels)


def rows_of_chunks(scale: LayerScale) -> Iterator[Box]:
    """Cut a layer along z and y at its storage chunks."""
    row = (*scale.chunk[:2], scale.bounds.shape[2])
    return replace(scale, chunk=row).storage_chunks(scale.bounds)


def spread(pieces: Iterator[Box], threads: int, function: Callable[[Box], object]) -> None:
    """Call a function with each piece, from several threads."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, pieces))


def write(path: str, image: Image, scale: LayerScale, setting: Setting) -> None:
    """Write all voxels of a layer that has been made; ``image`` is ``(channels, z, y, x)``."""
    volume = CloudVolume(path, progress=False, compress=setting.compress, parallel=setting.processes)
    if setting.level is not None:
        put_chunks(volume, image, scale, setting)
    elif setting.threads == 1:
        volume[:, :, :] = image.T
    else:

        def write_piece(box: Box) -> None:
            part = np.ascontiguousarray(image[(slice(None), *box.slices((0, 0, 0)))])
            volume[cloudvolume_slices(box)] = part.T

        spread(rows_of_chunks(scale), setting.threads, write_piece)


def put_chunks(volume: Any, image: Image, scale: LayerScale, setting: Setting) -> None:
    """Compress and put the storage chunks of a CloudVolume one by one."""
    files = CloudFiles(f"{volume.cloudpath}/{volume.key}", progress=False, num_threads=1)
    for box in scale.storage_chunks(scale.bounds):
        files.put(
            box.key,
            image[(slice(None), *box.slices((0, 0, 0)))].tobytes(),
            content_type="application/octet-stream",
            compress=setting.compress or None,
            compression_level=setting.level,
        )


def read(path: str, scale: LayerScale, setting: Setting) -> Image:
    """Read all voxels of a layer, ``(channels, z, y, x)``."""
    volume = CloudVolume(path, progress=False, parallel=setting.processes)
    if setting.threads == 1:
        return np.asarray(volume[:, :, :]).T
    image = np.empty((volume.num_channels, *scale.bounds.shape), np.uint8)

    def read_piece(box: Box) -> None:
        image[(slice(None), *box.slices((0, 0, 0)))] = np.asarray(volume[cloudvolume_slices(box)]).T

    spread(rows_of_chunks(scale), setting.threads, read_piece)
    return image


def measure(folder: Path, image: Image, chunk: Vector, setting: Setting) -> dict[str, float]:
    """Write and read a layer once; ``AssertionError`` if what is read is not what was written.

    Args:
        folder: Where the layer is made; one of before is deleted.
        image: The voxels, ``(channels, z, y, x)``.
        chunk: Storage chunk in voxels, zyx.
        setting: How it is written and read.

    Returns:
        Size as a share of the raw one, and MB of the raw layer per second of wall clock and of CPU.
    """
    path, shape = f"file://{folder}/layer", vector(image.shape[1:])
    shutil.rmtree(folder / "layer", ignore_errors=True)
    make_layer(path, shape, chunk=chunk, channels=len(image))
    scale = read_scale(path, 0)
    write_wall, write_cpu, _ = timed(lambda: write(path, image, scale, setting))
    stored = sum(file.stat().st_size for file in (folder / "layer").rglob("*") if file.is_file())
    read_wall, read_cpu, result = timed(lambda: read(path, scale, setting))
    if not np.array_equal(result, image):
        raise AssertionError(f"{setting}: what was read is not what was written")
    megabytes = image.nbytes / 1e6
    return {
        "size": stored / image.nbytes,
        "write": megabytes / write_wall,
        "write_cpu": megabytes / max(write_cpu, 1e-3),
        "read": megabytes / read_wall,
        "read_cpu": megabytes / max(read_cpu, 1e-3),
        "both_cpu": megabytes / max(write_cpu + read_cpu, 1e-3),
    }


def level_is_used(folder: Path, image: Image, chunk: Vector) -> bool:
    """Tell whether CloudVolume compresses with the level that it is given."""
    sizes = []
    for level in (1, 9):
        path = f"file://{folder}/level-{level}"
        make_layer(path, vector(image.shape[1:]), chunk=chunk, channels=len(image))
        CloudVolume(path, progress=False, compress="gzip", compress_level=level)[:, :, :] = image.T
        sizes.append(
            sum(file.stat().st_size for file in (folder / f"level-{level}").rglob("*") if file.suffix == ".gz")
        )
    return sizes[0] != sizes[1]


def advice(layer: str, results: list[dict[str, Any]]) -> str:
    """Name the settings with one process and thread that take the least CPU time."""
    alone = [r for r in results if r["processes"] == r["threads"] == 1 and r["codec"] != "none"]
    least = max(alone, key=lambda r: r["both_cpu"])
    smallest = min(alone, key=lambda r: r["size"])
    near = max((r for r in alone if r["size"] <= NEAR_SMALLEST * smallest["size"]), key=lambda r: r["both_cpu"])
    return (
        f"- {layer}: least CPU time by {least['name']} ({least['both_cpu']:.0f} MB written and read per second of CPU, "
        f"{least['size']:.0%} of the size); within {NEAR_SMALLEST - 1:.0%} of the smallest by {near['name']} "
        f"({near['both_cpu']:.0f} MB, {near['size']:.0%})."
    )


def results_table(results: list[dict[str, Any]]) -> str:
    """Write the table of all settings of a layer."""
    header = ["codec", "by", "processes", "threads", "size", "write, MB/s", "per CPU s", "read, MB/s", "per CPU s"]
    lines = []
    for r in results:
        by = "CloudVolume" if r["level"] is None else "CloudFiles"
        figures = [f"{r[key]:.0f}" for key in ("write", "write_cpu", "read", "read_cpu")]
        lines.append([r["name"], by, str(r["processes"]), str(r["threads"]), f"{r['size']:.1%}", *figures])
    return table(header, lines)


def plot(path: Path, layers: dict[str, list[dict[str, Any]]]) -> None:
    """Draw size against throughput per CPU second, of one process and thread, to an image file."""
    plt = bare_pyplot()
    figure, axes = plt.subplots(1, len(layers), figsize=(5.5 * len(layers), 4.2), squeeze=False, layout="constrained")
    for axis, (layer, results) in zip(axes[0], layers.items(), strict=True):
        for codec in CODECS:
            points = [r for r in results if r["codec"] == codec and r["processes"] == r["threads"] == 1]
            points = [r for r in points if r["level"] is not None] or points
            axis.plot([100 * r["size"] for r in points], [r["write_cpu"] for r in points], "o-", label=codec)
            for r in points:
                label = "" if r["level"] is None else str(r["level"])
                axis.annotate(label, (100 * r["size"], r["write_cpu"]), xytext=(4, 4), textcoords="offset points")
        axis.set(title=layer, xlabel="size, % of raw", ylabel="written, MB per second of CPU", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line("io", __doc__)
    parser.add_argument("--volume", default=(32, 256, 512), help="default: 32 256 512", **SIZE)
    parser.add_argument("--chunk", default=(32, 128, 128), help="storage chunk (default: 32 128 128)", **SIZE)
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    parser.add_argument("--parallel", type=int, default=2, help="the most processes or threads (default: 2)")
    parser.add_argument("--folder", type=Path, help="where to put the layers (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON, such as docs/data/io.json")
    parser.add_argument("--plot", type=Path, help="draw them there, such as docs/images/io.png")
    return parser.parse_args()


def main() -> int:
    """Measure and print."""
    options, facts = arguments(), machine()
    shape, chunk, tried = vector(options.volume), vector(options.chunk), list(settings(options.parallel))
    images = {"probabilities, 3 channels": probabilities(shape), "like EM, 1 channel": em_like(shape)[None]}
    found: dict[tuple[str, Setting], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="io-", dir=options.folder) as folder:
        used = level_is_used(Path(folder), images["like EM, 1 channel"], chunk)
        runs = list(product(range(options.rounds), tried, images.items()))
        for _, setting, (layer, image) in tqdm(runs, unit="run"):
            found.setdefault((layer, setting), []).append(measure(Path(folder), image, chunk, setting))
    layers: dict[str, list[dict[str, Any]]] = {layer: [] for layer in images}
    for (layer, setting), rounds in found.items():
        medians = {key: median(r[key] for r in rounds) for key in rounds[0]}
        layers[layer].append({"name": setting.name, **asdict(setting), **medians})
    print(f"\n{describe(facts)}.\n\nLayers of {size_text(shape)} in storage chunks of", end=" ")
    print(f"{size_text(chunk)}, uint8; medians of {options.rounds} rounds. MB are of the raw layer.")
    print(f"\nCloudVolume {'uses' if used else 'does not use'} the compress_level that it is given.")
    for layer, results in layers.items():
        print(f"\n{layer}:\n\n{results_table(results)}")
    print("\n" + "\n".join(advice(layer, results) for layer, results in layers.items()))
    report = {"machine": facts, "volume": shape, "chunk": chunk, "level_is_used": used, "layers": layers}
    write_json(options.output, report)
    if options.plot:
        plot(options.plot, layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
