"""Reading, patches, blending and writing go on at once, within bounds.

Whatever the split, the result is the same.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.engines.base import Engine
from chunkflow_core.errors import DataError
from chunkflow_core.inference.block import Inference
from chunkflow_core.inference.on_gpu import DeviceSlab
from chunkflow_core.inference.reading import read_ahead
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.lattice.conversion import Conversion
from chunkflow_core.lattice.slab import Slab, convert
from chunkflow_core.lattice.weights import ExactStep
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer
from chunkflow_core.timing import Timings
from tests.support.volume import output_of, write_volume

TIMEOUT = 60.0


class Scripted(Engine):
    """Gives the input back, after a function of the number of the call has been called."""

    def __init__(self, before: Callable[[int], object], streams: int) -> None:
        self.before, self.streams, self.calls, self.lock = before, streams, 0, threading.Lock()
        self.begun = False
        """Whether calls count: not those that compare this machine with the one of ``prepare``."""

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.begun:
            with self.lock:
                number, self.calls = self.calls, self.calls + 1
            self.before(number)
        return np.ascontiguousarray(patches.repeat(2, axis=1))


@pytest.fixture
def volume(tmp_path: Path) -> VolumeSpec:
    """A volume of 2 × 2 × 2 blocks, prepared."""
    path = write_volume(tmp_path)
    assert main(["prepare", str(path)]) == 0
    return load_spec(path)


def run_block(spec: VolumeSpec, engine: Scripted) -> Workspace:
    workspace = Workspace(spec, engine)
    _ = workspace.engine
    engine.begun = True
    inference_and_donate(workspace, (0, 0, 0))
    return workspace


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("stream", "read", "write", "copy"))]


def test_as_many_patches_at_once_as_there_are_streams(volume: VolumeSpec) -> None:
    together = threading.Barrier(3)

    run_block(volume, Scripted(lambda n: together.wait(TIMEOUT) if n < 3 else None, streams=3))

    assert not together.broken


def test_the_next_layer_starts_before_the_last_patch_of_a_layer_is_done(volume: VolumeSpec) -> None:
    block = volume.grid.block((0, 0, 0))
    layer = block.patches // (block.stop_patch[0] - block.first_patch[0])
    above = threading.Event()

    def wait_for_the_next_layer(number: int) -> None:
        if number == layer - 1:
            assert above.wait(TIMEOUT), "no stream went on to the next layer"
        elif number >= layer:
            above.set()

    run_block(volume, Scripted(wait_for_the_next_layer, streams=2))


class Bad(Scripted):
    """Gives NaN for one patch, by its number."""

    def __init__(self, bad: int, *, on_device: bool) -> None:
        super().__init__(lambda number: setattr(self.given, "bad", number == bad), streams=2)
        self.given = threading.local()
        self.device = torch.device("cpu") if on_device else None

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        given = super().__call__(patches)
        return np.full_like(given, np.nan) if getattr(self.given, "bad", False) else given

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self(patches.numpy()))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("bad", [0, 5])
def test_a_bad_patch_ends_the_block_and_every_thread(volume: VolumeSpec, bad: int, on_device: bool) -> None:
    with pytest.raises(DataError, match=r"NaN or infinity .* at lattice position"):
        run_block(volume, Bad(bad, on_device=on_device))

    assert not stream_threads()
    workspace = Workspace(volume)
    assert workspace.exchange.receipt("infer", (0, 0, 0)) is None
    if bad == 0:
        assert not workspace.output.stored_chunks(), "nothing of its layer may be written"
        assert not workspace.exchange.donation_keys()


def test_giving_up_a_block_ends_every_thread(volume: VolumeSpec) -> None:
    workspace = Workspace(volume)
    inference = Inference(volume, lambda: Scripted(lambda n: None, streams=2), workspace.input, 4)
    pieces = inference.run(volume.grid.block((0, 0, 0)), Timings()).pieces()
    next(pieces)

    pieces.close()

    assert not stream_threads()


@pytest.mark.parametrize("ahead", [1, 3])
def test_reading_keeps_ahead_and_within_bounds(ahead: int) -> None:
    started: list[Box] = []
    boxes = [Box((z, 0, 0), (z + 1, 2, 2)) for z in range(10)]
    arrived = threading.Semaphore(0)

    def read(box: Box) -> NDArray[Any]:
        started.append(box)
        arrived.release()
        return np.full((1, 1, 2, 2), box.start[0])

    for number, (box, data) in enumerate(read_ahead(boxes, read, ahead)):
        for _ in range(ahead + 1 if number == 0 else 1 if number + ahead < len(boxes) else 0):
            assert arrived.acquire(timeout=TIMEOUT), "reading does not keep ahead"
        assert box == boxes[number]
        assert (data == number).all()
        assert len(started) == min(len(boxes), number + 1 + ahead)


def test_a_block_outside_the_mask_reads_nothing_and_loads_no_model(tmp_path: Path) -> None:
    """The mask has voxels 4 × 8 × 8 times as large; one of them is inside, in the first block."""
    inside = np.zeros((1, 5, 6, 5), np.uint8)
    inside[0, 0, 1, 1] = 1
    layer = NewLayer(f"file://{tmp_path}/mask", (5, 6, 5), dtype="uint8", resolution=(160, 32, 32), chunk=(8, 8, 8))
    layer.write(Box((0, 0, 0), (5, 6, 5)), inside)
    path = write_volume(tmp_path, skip={"mask": {"path": f"file://{tmp_path}/mask"}})
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    workspace = Workspace(spec)

    def fail(*arguments: Any) -> Any:
        raise AssertionError("there is nothing to do")

    workspace.input.read = fail  # type: ignore[method-assign, assignment]
    workspace.inference.patches._load = fail
    last = inference_and_donate(workspace, (1, 1, 1)).receipt
    assert last is not None
    assert (last.patches, last.skipped) == (0, {"outside mask": spec.grid.block((1, 1, 1)).patches})
    assert all(entry.checksum is None for entry in last.donations)
    assert last.storage_chunks > 0, "zeros are written, too"

    assert main(["run", str(path)]) == 0
    report = {index: receipt.skipped for index, receipt in workspace.exchange.receipts("infer").items()}
    assert report[0, 0, 0].get("outside mask", 0) < spec.grid.block((0, 0, 0)).patches
    output = output_of(path)
    assert output[:, :4, 8:16, 8:16].any()
    output[:, :4, 8:16, 8:16] = 0
    assert not output.any()


def test_an_error_of_reading_arises_in_the_block(volume: VolumeSpec) -> None:
    workspace = Workspace(volume)

    def fail(box: Box) -> NDArray[Any]:
        raise DataError(f"no voxels at {box}")

    workspace.input.read = fail  # type: ignore[method-assign]
    with pytest.raises(DataError, match="no voxels at"):
        inference_and_donate(workspace, (0, 0, 0))
    assert not stream_threads()


@pytest.fixture
def unet_runs(tmp_path: Path) -> Callable[..., NDArray[Any]]:
    """A function that runs a volume with the example U-Net and returns its output."""
    numbers: Iterator[int] = iter(range(1000))
    unet = Path(__file__).parents[2] / "examples" / "unet"

    def run(prefetch: int = 1, **model: object) -> NDArray[Any]:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        path = write_volume(
            folder,
            input={"path": f"file://{folder}/input", "prefetch": prefetch},
            output={"path": f"file://{folder}/output", "dtype": "float32", "chunk_size": [4, 8, 8]},
            roi=[[0, 0, 0], [12, 40, 40]],
            patch_size=[4, 16, 16],
            patch_overlap=[2, 8, 8],
            block_size=[8, 24, 24],
            model={"path": str(unet / "model.py"), "weights": str(unet / "model.pt"), **model},
        )
        assert main(["run", str(path), "--seams", "0"]) == 0
        return output_of(path)

    return run


@pytest.mark.parametrize("engine", ["pytorch", "openvino"])
def test_the_split_decides_no_bit(unet_runs: Callable[..., NDArray[Any]], engine: str) -> None:
    expected = unet_runs(engine=engine, streams=1)

    for options in ({"streams": 2}, {"streams": 5, "prefetch": 3}, {"streams": 2, "batch_size": 3}):
        np.testing.assert_array_equal(unet_runs(engine=engine, **options), expected, err_msg=str(options))
    assert expected.std() > 0.01


def test_a_device_sums_to_the_same_bits_as_the_host() -> None:
    """The ring of planes is cut here and there, and values are not steps."""
    region, values = Box((0, 0, 0), (20, 30, 28)), ExactStep(-0.7, 1.3)
    grid = BlockGrid(region, (8, 12, 12), (2, 3, 4), (6, 9, 8), (6, 9, 8))
    host = Slab(grid, region, 11, 2, values)
    device = DeviceSlab(grid, region, 11, 2, values, torch.device("cpu"))
    conversions = [Conversion(dtype, values) for dtype in ("uint8", "uint16", "float16", "float32")]
    conversions += [Conversion("uint8", values, threshold=0.3), Conversion("uint8", values, argmax=True)]
    rng = np.random.default_rng(0)
    for layer in range(3):
        for y in range(3):
            for x in range(3):
                patch = rng.uniform(-0.7, 1.3, (2, 8, 12, 12)).astype(np.float32)
                host.add((layer, y, x), patch, share=0.125)
                device.add((layer, y, x), torch.from_numpy(patch), share=0.125)
        planes = region.with_z(layer * 6, layer * 6 + 6 if layer < 2 else layer * 6 + 8)
        np.testing.assert_array_equal(device.sum(planes).numpy(), host.sum(planes))
        for conversion in conversions:
            there, here = device.converted(planes, conversion).numpy(), host.converted(planes, conversion)
            assert there.dtype == here.dtype
            np.testing.assert_array_equal(there, here)
            np.testing.assert_array_equal(convert(host.sum(planes), conversion), here)
        host.advance(planes.stop[0])
        device.advance(planes.stop[0])


STEP = 2.0**-23
"""The step of sums in a range up to 1."""
BELOW = 0.5 - STEP
STEPS = int(0.7 / STEP)


@pytest.mark.parametrize(
    ("dtype", "decided", "limits", "values", "wanted"),
    [
        # one row a channel; halves go to the even number
        ("uint8", {}, (0, 255), [[0.5, 1.5, 2.5, 253.5, 254.5, 255]], [[0, 2, 2, 254, 254, 255]]),
        ("uint16", {}, (0, 65535), [[0.5, 1.5, 2.5, 65533.5, 65534.5, 65535]], [[0, 2, 2, 65534, 65534, 65535]]),
        ("uint16", {}, (-32768, 32767), [[-32768, -0.5, 0.5, 32766.5]], [[0, 32768, 32768, 65534]]),
        ("float16", {}, (0, 4096), [[2047, 2049, 2051, 2050, 0.25]], [[2047, 2048, 2052, 2050, 0.25]]),
        ("float16", {}, (-65504, 65504), [[65504, -65504, 65488, 32]], [[65504, -65504, 65472, 32]]),
        ("uint8", {"threshold": 0.5}, (0, 1), [[0.5, BELOW, 0, 1]], [[1, 0, 0, 1]]),
        ("uint8", {"threshold": 0.7}, (0, 1), [[STEPS * STEP, (STEPS + 1) * STEP, 0.75, 0]], [[0, 1, 1, 0]]),
        ("uint8", {"threshold": -0.25}, (-1, 1), [[-0.25, -0.5, 0, -1]], [[1, 0, 1, 0]]),
        ("uint8", {"argmax": True}, (-1, 1), [[0, 0.5, -1, 1], [0, 0.5, -0.5, 1], [0, 0.25, -0.5, 1]], [[0, 0, 1, 0]]),
        ("uint8", {"argmax": True}, (0, 1), [[0, 1, 0.5, BELOW], [0.5, 0, 0.5, 0.5]], [[1, 0, 0, 1]]),
    ],
)
def test_halves_and_ties(
    dtype: str,
    decided: dict[str, Any],
    limits: tuple[float, float],
    values: list[list[float]],
    wanted: list[list[float]],
) -> None:
    """On the host, of donated sums, and on a device."""
    patch = np.array(values, np.float32)[:, None, None]
    region, step = Box((0, 0, 0), (1, 1, len(values[0]))), ExactStep(*limits)
    conversion = Conversion(dtype, step, **decided)
    grid = BlockGrid(region, region.shape, (0, 0, 0), region.shape, region.shape)
    host = Slab(grid, region, 1, len(patch), step)
    device = DeviceSlab(grid, region, 1, len(patch), step, torch.device("cpu"))
    host.add((0, 0, 0), patch)
    device.add((0, 0, 0), torch.from_numpy(patch))
    np.testing.assert_array_equal(host.sum(region), patch)
    for given in (
        host.converted(region, conversion),
        convert(patch, conversion),
        device.converted(region, conversion).numpy(),
    ):
        assert given.dtype == dtype
        np.testing.assert_array_equal(given[:, 0, 0], np.array(wanted, dtype))


def test_kernels_run_where_nothing_can_be_cached() -> None:
    """There is nowhere to cache in a container with a read-only file system."""
    program = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import numpy as np
from chunkflow_core.exchange.codec import compress, decompress
sums = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
assert (decompress(compress(sums), 1, (2, 3, 4)) == sums).all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
