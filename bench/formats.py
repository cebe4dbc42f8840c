"""What reads zarr and N5 right, and how fast: this, TensorStore, zarr-python, CloudVolume.

    python -m bench.formats --volume 32 128 128 --rounds 1      # a look
    python -m bench.formats                                     # half a minute

An image like electron microscopy lies on the local disk in several formats, written by zarr-python
and, for N5, by TensorStore. Each reader reads all of it by slabs, as blocks do; who begins changes
each round. The figures are seconds of ``this`` over seconds of the reader within a round, so that
more than 1 says that the reader is faster. A reader that gives other voxels says so instead; why
one can't read a format stands below the table.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tensorstore
import zarr
from numpy.typing import NDArray
from tqdm import tqdm
from zarr import codecs
from zarr.storage import ObjectStore

from bench.common import command_line, describe, em_like, error_text, machine, table, timed
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import open_layer

Array = NDArray[Any]
Read = Callable[[int, int], Array]
"""Gives planes of the volume, from one to another."""

CHUNK = (16, 64, 64)
SHARD = (32, 256, 256)


def write_zarr(folder: Path, image: Array, version: int, **options: Any) -> None:
    """Write an array of zarr, with attributes that CloudVolume needs too."""
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    changes = [{"type": "scale", "scale": [40.0, 4.0, 4.0]}]
    multiscale = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": changes}], "name": "em"}
    attributes = (
        {"multiscales": [multiscale | {"version": "0.4"}]}
        if version == 2
        else {"ome": {"version": "0.5", "multiscales": [multiscale]}}
    )
    group = zarr.open_group(folder, mode="w", zarr_format=version, attributes=attributes)  # type: ignore[arg-type]
    array = group.create_array("0", shape=image.shape, dtype=image.dtype, chunks=CHUNK, **options)
    array[:] = image


def write_n5(folder: Path, image: Array) -> None:
    """Write an array of N5."""
    metadata = {
        "dimensions": list(reversed(image.shape)),
        "blockSize": list(reversed(CHUNK)),
        "dataType": "uint8",
        "compression": {"type": "gzip", "level": 1},
    }
    store = {"driver": "file", "path": f"{folder}/s0/"}
    folder.mkdir()
    (folder / "attributes.json").write_text('{"n5": "2.0.0"}')
    opened = tensorstore.open({"driver": "n5", "kvstore": store, "metadata": metadata, "create": True}).result()
    opened.write(image.T).result()


NESTED = {"name": "v2", "configuration": {"separator": "/"}}
FORMATS: dict[str, tuple[str, str, Callable[[Path, Array], object]]] = {
    # what: (format of the address, TensorStore's driver, writer)
    "zarr 2, blosc": ("zarr", "zarr", lambda f, image: write_zarr(f, image, 2, chunk_key_encoding=NESTED)),
    "zarr 3, zstd": ("zarr", "zarr3", lambda f, image: write_zarr(f, image, 3)),
    "zarr 3, gzip": ("zarr", "zarr3", lambda f, image: write_zarr(f, image, 3, compressors=codecs.GzipCodec(level=1))),
    "zarr 3, shards": ("zarr", "zarr3", lambda f, image: write_zarr(f, image, 3, shards=SHARD)),
    "N5, gzip": ("n5", "n5", write_n5),
}


def ours(folder: Path, kind: str, driver: str) -> Read:
    """This project's reader."""
    address = f"{kind}://file://{folder}"
    scale = read_scale(address, 0)
    reader, (_, height, width) = open_layer(address, scale), scale.bounds.shape
    return lambda a, b: reader.read(Box((a, 0, 0), (b, height, width)))[0]


def with_tensorstore(folder: Path, kind: str, driver: str) -> Read:
    """TensorStore, which opens the files itself."""
    name = "s0" if kind == "n5" else "0"
    store = {"driver": "file", "path": f"{folder}/{name}/"}
    array = tensorstore.open({"driver": driver, "kvstore": store}, open=True).result()
    if kind == "n5":
        array = array.T
    return lambda a, b: np.asarray(array[a:b].read().result())


def with_zarr(folder: Path, kind: str, driver: str) -> Read:
    """zarr-python with its own store."""
    array = zarr.open_array(folder / "0", mode="r")
    return lambda a, b: np.asarray(array[a:b])


def with_obstore(folder: Path, kind: str, driver: str) -> Read:
    """zarr-python with obstore."""
    from obstore.store import LocalStore

    array = zarr.open_array(ObjectStore(LocalStore(str(folder / "0")), read_only=True), mode="r")
    return lambda a, b: np.asarray(array[a:b])


def with_cloudvolume(folder: Path, kind: str, driver: str) -> Read:
    """CloudVolume's readers of zarr and N5."""
    from cloudvolume import CloudVolume

    prefix = {"zarr": "zarr2", "zarr3": "zarr3", "n5": "n5"}[driver]
    volume = CloudVolume(f"{prefix}://file://{folder}", mip=0, progress=False)
    return lambda a, b: np.asarray(volume[:, :, a:b])[..., 0].T


READERS: dict[str, Callable[[Path, str, str], Read]] = {
    "this": ours,
    "TensorStore": with_tensorstore,
    "zarr-python": with_zarr,
    "zarr-python, obstore": with_obstore,
    "CloudVolume": with_cloudvolume,
}


def by_slabs(read: Read, depth: int) -> Array:
    """A volume, read by slabs of a storage chunk's depth."""
    return np.concatenate([read(a, min(a + CHUNK[0], depth)) for a in range(0, depth, CHUNK[0])])


def measure(folder: Path, what: str, image: Array, rounds: int, reasons: list[str]) -> list[str]:
    """A row of the table: of each reader, the median of ratios, or that it can't; notes why."""
    kind, driver, write = FORMATS[what]
    write(folder, image)
    told, readers, seconds = dict[str, str](), dict[str, Read](), dict[str, list[float]]()
    for name, open_reader in READERS.items():
        try:
            readers[name] = open_reader(folder, kind, driver)
            if not np.array_equal(by_slabs(readers[name], len(image)), image):
                told[name] = "other voxels"
        except Exception as error:  # the others go on
            told[name] = "no"
            reasons.append(f"{name}, {what}: {error_text(error)}")
    good = [name for name in readers if name not in told]
    for number in range(rounds):
        for name in good[number % len(good) :] + good[: number % len(good)]:
            seconds.setdefault(name, []).append(timed(lambda name=name: by_slabs(readers[name], len(image)))[0])  # type: ignore[misc]
    for name in good:
        told[name] = f"{median(a / b for a, b in zip(seconds['this'], seconds[name], strict=True)):.2f}"
    return [what, f"{image.nbytes / 1e6 / median(seconds['this']):.0f}", *(told[name] for name in READERS)]


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print Markdown."""
    parser = command_line("formats", __doc__)
    parser.add_argument("--volume", nargs=3, type=int, default=(64, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    z, y, x = options.volume
    size: Vector = (z, y, x)
    image = em_like(size)
    rows, reasons = [], list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for number, what in enumerate(tqdm(FORMATS, disable=not sys.stderr.isatty())):
            rows.append(measure(Path(folder) / str(number), what, image, options.rounds, reasons))
    print(describe(machine()))
    print()
    print(table(["format", "this, MB/s", *READERS], rows))
    print("\n".join(["", *(f"- {reason}" for reason in reasons)]))


if __name__ == "__main__":
    main()
