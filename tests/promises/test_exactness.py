"""The promise: however a volume is cut, the output is bit for bit that of one computation.

That one is dense: it knows no blocks.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import make_output
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage import disk, files
from chunkflow_core.storage.layers import NewLayer
from tests.support.random_examples import examples
from tests.support.zarrs import write_zarr


@dataclass(frozen=True)
class Case:
    """A random volume and how it is cut."""

    size: Vector
    roi: tuple[tuple[int, ...], tuple[int, ...]]
    patch: tuple[int, ...]
    halo: tuple[int, ...]
    overlap: tuple[int, ...]
    block: tuple[int, ...]
    chunk: tuple[int, ...]
    input_chunk: Vector
    padding: Literal["reflect", "edge", "constant"]
    stored: str
    """Dtype of the output, or what is stored as ``uint8`` instead of values."""
    batch: int
    streams: int
    prefetch: int
    on_device: bool
    skip_zeros: bool
    masked: bool
    augmentation: str
    seed: int
    input_format: str = "precomputed"
    output_format: str = "precomputed"


MOST = 100
"""Storage chunks of a layer, and patches, at most, roughly.

More ask nothing else, and take most of the time.
"""
LONGEST = 40
"""Voxels of an axis at most."""


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, ...]:
    """One axis, in voxels, of a volume and of how it is cut.

    Volume size, ROI start and stop, patch, halo, overlap, block, storage chunk, input chunk.
    """
    patch = draw(st.integers(1, 9))
    overlap = draw(st.integers(0, patch - 1))
    stride = patch - overlap
    # A block is a multiple of stride and storage chunk. Where these have nothing in common, it is
    # as large as the volume.
    kin = [n for n in range(1, 9) if n % stride == 0 or stride % n == 0]
    chunk = draw(st.one_of(st.sampled_from(kin), st.integers(1, 8)))
    step = math.lcm(stride, chunk)
    block = step * (-(-max(overlap, 1) // step) + draw(st.integers(0, 1)))
    blocks = draw(st.sampled_from([2, 1, 3]))
    length = min((blocks - 1) * block + draw(st.integers(1, block)), LONGEST)
    start = draw(st.integers(0, 9))
    size = start + length + draw(st.integers(0, 9))
    return size, start, start + length, patch, draw(st.integers(0, 2)), overlap, block, chunk, draw(st.integers(1, 9))


def fewer(start: tuple[int, ...], stop: tuple[int, ...], step: tuple[int, ...]) -> tuple[int, ...]:
    """An end of the ROI with at most ``MOST`` steps in it.

    The axis with the most of them loses one, again and again.
    """
    counts = [-(-(b - a) // c) for a, b, c in zip(start, stop, step, strict=True)]
    while math.prod(counts) > MOST:
        counts[counts.index(max(counts))] -= 1
    return tuple(min(b, a + n * c) for a, b, c, n in zip(start, stop, step, counts, strict=True))


def coarse(chunk: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """A size of storage chunks with at most ``MOST`` of them.

    The axis with the most is cut more coarsely, again and again.
    """
    sizes = list(chunk)
    while math.prod(counts := [-(-n // c) for n, c in zip(size, sizes, strict=True)]) > MOST:
        sizes[counts.index(max(counts))] += 1
    return tuple(sizes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Three axes and the rest."""
    size, start, stop, patch, halo, overlap, block, chunk, input_chunk = zip(
        *(draw(axes()) for _ in range(3)), strict=True
    )
    stop = fewer(start, stop, chunk)
    stop = fewer(start, stop, tuple(p - o for p, o in zip(patch, overlap, strict=True)))
    input_chunk = coarse(input_chunk, size)
    return Case(
        vector(size), (start, stop), patch, halo, overlap, block, chunk, vector(input_chunk),
        padding=draw(st.sampled_from(["reflect", "edge", "constant"])),
        stored=draw(st.sampled_from(["uint8", "float32", *("uint16", "float16", "threshold", "argmax")])),
        batch=draw(st.integers(1, 3)),
        streams=draw(st.integers(1, 3)),
        prefetch=draw(st.integers(1, 3)),
        on_device=draw(st.booleans()),
        skip_zeros=draw(st.booleans()),
        masked=draw(st.booleans()),
        augmentation=draw(st.sampled_from(["none", "none", "none", "flips"])),
        seed=draw(st.integers(0, 2**32 - 1)),
        input_format=draw(st.sampled_from(["precomputed", "zarr3"])),
        output_format=draw(st.sampled_from(["precomputed", "ome-zarr", "shards"])),
    )  # fmt: skip


def format_of(case: Case) -> dict[str, object]:
    """What a spec's output says about its format."""
    if case.output_format == "precomputed":
        return {}
    halves = [size // 2 if size % 2 == 0 else size for size in case.chunk]
    return {"format": "ome-zarr"} | ({"read_chunk_size": halves} if case.output_format == "shards" else {})


THRESHOLD = 0.45
STORED: dict[str, dict[str, object]] = {
    "threshold": {"dtype": "uint8", "threshold": THRESHOLD},
    "argmax": {"dtype": "uint8", "argmax": True},
}
"""Keys of the output by ``Case.stored``; of others, it is the dtype."""


def stored(case: Case, blended: NDArray[np.float32]) -> NDArray[Any]:
    """What is stored of blended values, ``(channels, z, y, x)``."""
    if case.stored == "argmax":
        return np.array([np.argmax(blended, axis=0)], np.uint8)
    if case.stored == "threshold":
        return (blended >= np.float32(THRESHOLD)).astype(np.uint8)
    if case.stored == "uint16":  # these products are exact
        return np.array(np.clip(np.rint(blended.astype(np.float64) * 65535), 0, 65535), np.uint16)
    if case.stored == "uint8":
        return np.array(np.clip(np.rint(blended * np.float32(255)), 0, 255), np.uint8)
    return blended.astype(case.stored)


def spec_of(case: Case, place: str, **model: object) -> VolumeSpec:
    """The case as a volume spec; output and exchange are its own."""
    kept = STORED.get(case.stored, {"dtype": case.stored})
    return parse_spec(
        {
            "name": "case",
            "input": {
                "path": ("zarr3://" if case.input_format == "zarr3" else "") + f"{place}/input",
                "padding": case.padding,
                "prefetch": case.prefetch,
            },
            "output": {
                "path": f"{place}/output",
                "channels": 2,
                "chunk_size": list(case.chunk),
                **kept,
                **format_of(case),
            },
            "exchange": {"path": f"{place}/exchange"},
            "roi": [list(corner) for corner in case.roi],
            "patch_size": [p + 2 * h for p, h in zip(case.patch, case.halo, strict=True)],
            "output_patch_size": list(case.patch),
            "patch_overlap": list(case.overlap),
            "block_size": list(case.block),
            "skip": {"zeros": case.skip_zeros, "mask": {"path": f"{place}/mask"} if case.masked else None},
            "model": {"engine": "identity", "batch_size": case.batch, "augmentation": case.augmentation, **model},
        }
    )


class Mixing(Engine):
    """A nonlinear stand-in for a convnet.

    It depends on the position in the patch and on the context around each voxel.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.streams = case.streams
        if case.on_device:  # the path of accelerators, on a device that every machine has
            self.device, self.batch_size = torch.device("cpu"), case.batch

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        assert len(patches) == self.batch_size
        return np.stack([mix(patch, self.case) for patch in patches])

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self(patches.numpy()))


def mix(patch: NDArray[np.float32], case: Case) -> NDArray[np.float32]:
    """The function that ``Mixing`` computes, for one patch."""
    rng = np.random.default_rng(case.seed)
    kernel = rng.random((2, 3), dtype=np.float32)
    mean = np.ascontiguousarray(patch[0]).mean(dtype=np.float64).astype(np.float32)
    index = tuple(slice(h, h + p) for h, p in zip(case.halo, case.patch, strict=True))
    position = rng.random(case.patch, dtype=np.float32)
    return np.stack(
        [(k[0] * patch[0][index] + k[1] * mean + k[2] * position) / np.float32(3.5) for k in kernel]
    ).astype(np.float32)


@contextmanager
def counted_writes(place: Path) -> Iterator[Counter[str]]:
    """Count what reaches the disk, file by file, by its name below ``place``."""
    counts: Counter[str] = Counter()
    original = disk.replace_file

    def replace_file(target: Path, content: bytes, compression: str | None, *, durable: bool) -> str:
        counts[str(target.relative_to(place))] += 1
        return original(target, content, compression, durable=durable)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "replace_file", replace_file)
        yield counts


def patch_counts(case: Case) -> list[int]:
    """Patches along each axis: just enough to cover the ROI."""
    length = np.subtract(case.roi[1], case.roi[0])
    stride = np.subtract(case.patch, case.overlap)
    return [max(1, math.ceil(n)) for n in (length - case.overlap) / stride]


MASK_VOXEL = (1, 2, 3)
"""Size of a mask voxel in voxels of the input."""


def random_volume(case: Case) -> NDArray[np.uint8]:
    """Noise, with a corner of zeros."""
    rng = np.random.default_rng(case.seed)
    volume = rng.integers(0, 256, case.size, dtype=np.uint8)
    volume[tuple(slice(0, int(n)) for n in rng.integers(0, np.array(case.size) + 1))] = 0
    return volume


def random_mask(case: Case) -> NDArray[np.bool_]:
    """A few voxels of a coarse mask."""
    shape = [-(-n // size) for n, size in zip(case.size, MASK_VOXEL, strict=True)]
    return np.random.default_rng(case.seed + 1).random(shape) < 0.1


def dense(case: Case, volume: NDArray[np.uint8]) -> tuple[NDArray[np.float32], int]:
    """What one machine with endless memory gives, and the number of patches run.

    Every patch is added into one array. This is written without the library: the input is padded
    with ``np.pad``, weights are summed over the dense lattice, sums are kept as integers, the mask
    is enlarged to the input's voxels.
    """
    start, stop = np.array(case.roi)
    patch, overlap, halo = np.array(case.patch), np.array(case.overlap), np.array(case.halo)
    length, stride = stop - start, patch - overlap
    counts = np.array(patch_counts(case))
    extent = (counts - 1) * stride + patch
    low = np.maximum(0, halo - start)
    high = np.maximum(0, start + extent + halo - np.array(case.size))
    padded = np.pad(volume, list(zip(low, high, strict=True)), mode=case.padding).astype(np.float32) / np.float32(255)

    def bump(p: int) -> NDArray[np.float64]:
        x = [2 * (i + 1) / (p + 1) - 1 for i in range(p)]
        return np.array([math.exp(-1 / (1 - v * v)) for v in x])

    weights = []
    for axis in range(3):
        total = np.zeros(extent[axis])
        for k in range(counts[axis]):
            total[k * stride[axis] : k * stride[axis] + patch[axis]] += bump(patch[axis])
        weights.append(
            [
                (bump(patch[axis]) / total[k * stride[axis] : k * stride[axis] + patch[axis]]).astype(np.float32)
                for k in range(counts[axis])
            ]
        )
    inside = np.ones(case.size, bool)
    if case.masked:
        inside = np.kron(random_mask(case), np.ones(MASK_VOXEL, bool))[tuple(map(slice, case.size))]
    inside = inside[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    orientations: list[tuple[int, ...]] = (
        [()]
        if case.augmentation == "none"
        else [axes for n in range(4) for axes in itertools.combinations((1, 2, 3), n)]
    )
    sums = np.zeros((2, *extent), np.int64)
    run = 0
    for position in itertools.product(*map(range, counts)):
        at = np.array(position) * stride
        source = tuple(
            slice(a, b) for a, b in zip(start + low + at - halo, start + low + at + patch + halo, strict=True)
        )
        part = padded[source][None]
        within = inside[tuple(slice(a, a + p) for a, p in zip(at, patch, strict=True))]
        if (case.skip_zeros and not part.any()) or not within.any():
            continue
        run += 1
        z, y, x = (weights[a][position[a]] for a in range(3))
        for axes in orientations:
            output = np.flip(mix(np.flip(part, axes), case), axes)
            weighted = output * (y[:, None] * x[None, :]) * (z * np.float32(2**23 / len(orientations)))[:, None, None]
            sums[(slice(None), *(slice(a, a + p) for a, p in zip(at, patch, strict=True)))] += np.rint(weighted).astype(
                np.int64
            )
    depth, height, width = length
    return np.where(inside, (sums[:, :depth, :height, :width] / 2**23).astype(np.float32), 0), run


def run_case(
    case: Case, volume: NDArray[np.uint8], order: list[int], engine: Engine | None
) -> tuple[NDArray[np.generic], Counter[str], Counter[str], VolumeSpec]:
    """Run all blocks in some order, each blend as soon as it can be.

    Returns:
        The output, how often each file was written, patches by fate, and the spec.
    """
    with TemporaryDirectory() as folder:
        return run_in(Path(folder), case, volume, order, engine)


def run_in(
    folder: Path, case: Case, volume: NDArray[np.uint8], order: list[int], engine: Engine | None
) -> tuple[NDArray[np.generic], Counter[str], Counter[str], VolumeSpec]:
    """Do ``run_case``, with all layers and the exchange in a folder."""
    place = f"file://{folder}"
    if case.input_format == "zarr3":
        write_zarr(folder / "input", volume, chunks=case.input_chunk, voxel_size=(40, 4, 4))
    else:
        layer = NewLayer(f"{place}/input", case.size, dtype="uint8", resolution=(40, 4, 4), chunk=case.input_chunk)
        layer.write(Box((0, 0, 0), case.size), volume[None])
    if case.masked:
        mask = random_mask(case).astype(np.uint8)
        resolution = tuple(n * voxel for n, voxel in zip((40, 4, 4), MASK_VOXEL, strict=True))
        NewLayer(f"{place}/mask", vector(mask.shape), dtype="uint8", resolution=resolution, chunk=(8, 8, 8)).write(
            Box((0, 0, 0), vector(mask.shape)), mask[None]
        )
    spec = spec_of(case, place)
    make_output(spec)
    workspace = Workspace(spec, engine)
    patches: Counter[str] = Counter()
    blocks = list(spec.grid.indices())
    with counted_writes(folder) as writes:
        done: set[tuple[int, ...]] = set()
        blended: set[tuple[int, ...]] = set()
        for number in order:
            if number < len(blocks):
                result = inference_and_donate(workspace, blocks[number], patch_done=lambda: patches.update(done=1))
                assert result.receipt is not None
                patches.update(run=result.receipt.patches, skipped=sum(result.receipt.skipped.values()))
                done.add(blocks[number])
                for receiver in spec.grid.receivers(blocks[number]):
                    if done.issuperset(spec.grid.donors(receiver)) and receiver not in blended:
                        receive_and_blend(workspace, receiver)
                        blended.add(receiver)
    output = workspace.output.read(spec.grid.roi)
    if case.output_format != "precomputed":
        read = np.asarray(zarr.open_array(folder / "output" / "0", mode="r")[:])
        np.testing.assert_array_equal(read.reshape(output.shape), output)
    return output, writes, patches, spec


@examples(20)
@given(case=cases(), data=st.data())
def test_output_equals_the_dense_reference(case: Case, data: st.DataObject) -> None:
    volume = random_volume(case)
    order = data.draw(st.permutations(range(60)))
    blocks = math.prod(spec_of(case, "file:///unused").grid.shape)
    order += list(range(60, blocks))

    output, writes, patches, spec = run_case(case, volume, order, Mixing(case))

    expected, run = dense(case, volume)
    wanted = stored(case, expected)
    assert output.dtype == wanted.dtype
    np.testing.assert_array_equal(output, wanted)
    assert patches["run"] == run
    assert patches["run"] + patches["skipped"] == patches["done"] == spec.grid.patches == math.prod(patch_counts(case))
    name = r"output/(0/c(/\d+){3,4}|\w+/\S+-\S+)"
    chunks = {path: n for path, n in writes.items() if re.fullmatch(name, path)}
    expected_chunks = math.prod(-(-(b - a) // c) for a, b, c in zip(*case.roi, case.chunk, strict=True))
    assert len(chunks) == expected_chunks
    assert set(chunks.values()) == {1}


@examples(20)
@given(case=cases())
def test_identity_gives_the_input_back(case: Case) -> None:
    case = replace(case, stored="uint8", masked=False)
    volume = random_volume(case)
    blocks = math.prod(spec_of(case, "file:///unused").grid.shape)

    output, *_ = run_case(case, volume, list(range(blocks)), None)

    inside = volume[tuple(slice(a, b) for a, b in zip(*case.roi, strict=True))]
    np.testing.assert_array_equal(output, np.stack([inside, inside]))
