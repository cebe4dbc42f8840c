"""Patches on an accelerator: input planes, batches, blending and sums stay there.

Final planes leave converted. Everything is queued on the device in order, and the caller runs ahead
of it: while a tier of patches is computed, the planes of the next one arrive and final ones leave
through pinned memory, each on a stream of their own. The numbers are those of ``Slab``: the same
products, rounded and added by the same rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkflow_core.inference.augmentation import Transform
from chunkflow_core.inference.patches import Patches, Planes
from chunkflow_core.inference.values import Numbers
from chunkflow_core.lattice.blocks import Block, BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.lattice.conversion import LARGEST_UINT16, Conversion
from chunkflow_core.lattice.slab import channel_parts
from chunkflow_core.lattice.weights import ExactStep, normalised_weight
from chunkflow_core.timing import Timings

Job = tuple[Vector, Transform]
ToHost = Callable[[torch.Tensor], Callable[[], torch.Tensor]]


class DeviceSlab:
    """Sums over consecutive planes of a region, as ``Slab``, on a device and for one thread."""

    def __init__(
        self, grid: BlockGrid, region: Box, depth: int, channels: int, values: ExactStep, device: torch.device
    ) -> None:
        """Start at the first plane of ``region``; arguments as ``Slab``."""
        self.grid, self.region, self.values, self.device = grid, region, values, device
        self.depth = min(depth, region.shape[0])
        self.sums = torch.zeros((channels, self.depth, *region.shape[1:]), dtype=torch.float32, device=device)
        self.start = region.start[0]
        self._weights: dict[tuple[int, int, int], torch.Tensor] = {}

    def inside(self, position: Vector, patch: torch.Tensor) -> torch.Tensor:
        """What of a patch, ``(channels, z, y, x)``, is added: what of it lies in the region."""
        box = self.grid.patch_box(position)
        return patch[(slice(None), *(box & self.region).slices(box.start))]

    def add(self, position: Vector, patch: torch.Tensor, share: float = 1.0, moved: Sequence[Vector] = ()) -> None:
        """Add a patch, weighted: float32 ``(channels, z, y, x)`` on the device; as ``Slab.add``."""
        box = self.grid.patch_box(position)
        inside = box & self.region
        if not inside:
            return
        within = inside.slices(box.start)
        for own, offset in channel_parts(moved):
            z, y, x = (self._weight(axis, position[axis], offset[axis])[within[axis]] for axis in range(3))
            weighted = patch[(own, *within)] * (y[:, None] * x[None, :])
            weighted.mul_((z * (share / self.values.step))[:, None, None]).round_()
            done = 0
            for part in self._parts(inside):
                depth = part.shape[1]
                part[own] += weighted[:, done : done + depth]
                done += depth

    def sum(self, box: Box) -> torch.Tensor:
        """A copy of the sums in a box: float32 ``(channels, z, y, x)``, in units of the values."""
        return torch.cat([part * self.values.step for part in self._parts(box)], dim=1)

    def converted(self, box: Box, conversion: Conversion) -> torch.Tensor:
        """What becomes of the complete sums in a box, by the rules of ``Conversion``."""
        sums = self.sum(box)
        if conversion.argmax:  # of several that are the largest, torch gives the first
            return sums.argmax(dim=0, keepdim=True).to(torch.uint8)
        if conversion.threshold is not None:
            return (sums >= float(np.float32(conversion.threshold))).to(torch.uint8)
        if conversion.dtype == "uint16":
            low, scale = self.values.uint16
            return sums.double().sub_(low).mul_(scale).round_().clamp_(0, LARGEST_UINT16).to(torch.uint16)
        if conversion.dtype == "uint8":
            low, scale = (float(number) for number in self.values.uint8)
            return sums.sub_(low).mul_(scale).round_().clamp_(0, 255).to(torch.uint8)
        return sums.to(getattr(torch, conversion.dtype))

    def advance(self, plane: int) -> None:
        """Drop the planes below ``plane`` and make room above."""
        stop = min(plane, self.start + self.depth)
        if stop > self.start:
            for part in self._parts(self.region.with_z(self.start, stop)):
                part.zero_()
        self.start = plane

    def _weight(self, axis: int, position: int, offset: int) -> torch.Tensor:
        key = axis, position, offset
        if key not in self._weights:
            weight = torch.from_numpy(normalised_weight(self.grid.axes[axis], position, offset))
            if self.device.type == "cuda":  # from other memory the copy would wait for all that is queued
                weight = weight.pin_memory()
            self._weights[key] = weight.to(self.device, non_blocking=True)
        return self._weights[key]

    def _parts(self, box: Box) -> Iterator[torch.Tensor]:
        """The one or two stretches of the ring that hold the planes of a box."""
        _, rows, columns = box.slices(self.region.start)
        first, remaining = (box.start[0] - self.region.start[0]) % self.depth, box.shape[0]
        while remaining:
            depth = min(remaining, self.depth - first)
            yield self.sums[:, first : first + depth, rows, columns]
            first, remaining = 0, remaining - depth


class OnDevice:
    """Runs patches of a block in batches, tier by tier."""

    ahead = 0
    """Tiers that may be started before the one before them has been finished.

    None has to be: the queue of the device is filled ahead anyway.
    """

    def __init__(self, patches: Patches, block: Block, timings: Timings, patch_done: Callable[[], object]) -> None:
        """Make the slab and the streams on the engine's device.

        Args:
            patches: What is done with each patch of the volume.
            block: The block.
            timings: Where seconds and patches are counted.
            patch_done: Called after each patch is queued.
        """
        device = patches.engine.device
        assert device is not None
        self._patches, self._timings, self._patch_done, self._device = patches, timings, patch_done, device
        grid, channels = patches.grid, patches.spec.output.summed_channels
        self._slab = DeviceSlab(grid, block.reach, grid.slab_depth(block), channels, patches.values, device)
        self._incoming, self._outgoing = _stream(device), _stream(device)
        self._numbers: tuple[Numbers, Numbers] | None = None
        self._extremes: list[tuple[Vector, torch.Tensor]] = []
        self._checks: list[Callable[[], None]] = []
        self.sums = DeviceSums(self._slab, patches.spec.output.conversion, self._to_host, self._checks)
        """What the finished patches add up to."""
        self._forward: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self, positions: list[Vector], planes: Planes) -> None:
        """Queue a tier of patches, given the input planes that they need."""
        if not positions:
            return
        voxels, numbers = self._upload(planes), self._numbers_of(planes)
        due = self._due(positions, planes)
        jobs = iter([(position, t) for position in due for t in self._patches.transforms])
        while batch := list(islice(jobs, self._patches.engine.batch_size)):
            self._run(batch, planes[0], voxels, numbers)

    def finish(self) -> None:
        """Queue the check of the tier's values; its error arises before any of them leaves."""
        if self._extremes:
            positions = [position for position, _ in self._extremes]
            arriving = self._to_host(torch.stack([extreme for _, extreme in self._extremes]))
            self._checks.append(_Once(partial(self._check, positions, arriving)))
            self._extremes = []
        while self._forward and self._forward[0][1].query():  # type: ignore[no-untyped-call]
            self._time_forward()

    def advance(self, plane: int) -> None:
        """Drop the sums below a plane."""
        self._slab.advance(plane)

    def close(self) -> None:
        """Wait for what is queued, so that its memory may go."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            while self._forward:
                self._time_forward()

    def _time_forward(self) -> None:
        start, end = self._forward.popleft()
        self._timings.seconds["forward"] += start.elapsed_time(end) / 1000

    def _due(self, positions: list[Vector], planes: Planes) -> Iterator[Vector]:
        for position in positions:
            if self._patches.is_skipped(position, planes):
                self._timings.count("zeros")
                self._patch_done()
            else:
                yield position

    def _numbers_of(self, planes: Planes) -> Numbers:
        """How numbers are made of the voxels of a tier, with tensors.

        Division by a number of the host would be a multiplication by its reciprocal on some
        devices.
        """
        box, data = planes
        made = self._patches.given.numbers(data.dtype, box.start[0], box.stop[0])
        if self._numbers is None or self._numbers[0] is not made:
            shift = None if made.shift is None else self._constant(made.shift)
            self._numbers = made, replace(made, divisor=self._constant(made.divisor), shift=shift)
        return self._numbers[1]

    def _constant(self, array: NDArray[np.float32]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":  # from other memory the copy would wait for all that is queued
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _upload(self, planes: Planes) -> torch.Tensor:
        voxels = torch.from_numpy(planes[1])
        if self._incoming is None:
            return voxels.to(self._device)
        with torch.cuda.stream(self._incoming):
            arrived = voxels.pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._incoming)
        arrived.record_stream(computing)
        return arrived

    def _run(self, batch: Sequence[Job], box: Box, voxels: torch.Tensor, numbers: Numbers) -> None:
        patches = self._patches
        shape = (patches.engine.batch_size, voxels.shape[0], *patches.spec.patch_size)
        given = torch.zeros(shape, device=self._device)
        for slot, (position, transform) in zip(given, batch, strict=False):
            part = voxels[(slice(None), *patches.input_box(position).slices(box.start))]
            slot.copy_(transform.apply(numbers.made_of(part.to(torch.float32, copy=True))))
        outputs = self._run_network(given)
        for (position, transform), output in zip(batch, outputs, strict=False):
            counting = output if patches.alters_values else self._slab.inside(position, output)  # as on CPUs
            self._extremes.append((position, torch.stack(counting.aminmax())))
            self._slab.add(position, transform.undo(output), patches.share, patches.moved)
            if transform == patches.transforms[-1]:
                self._timings.count("patches")
                self._patch_done()

    def _run_network(self, given: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return self._timings.measure("forward", self._patches.engine.forward, given)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        outputs = self._patches.engine.forward(given)
        end.record(stream)
        self._forward.append((start, end))
        return outputs

    def _check(self, positions: list[Vector], arriving: Callable[[], torch.Tensor]) -> None:
        for position, (least, most) in zip(positions, arriving().tolist(), strict=True):
            self._patches.check_extremes(position, least, most)

    def _to_host(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start a copy to the host; the function that is returned waits for it."""
        if self._outgoing is None:
            return tensor.cpu
        self._outgoing.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outgoing):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrived.record()
        tensor.record_stream(self._outgoing)

        def wait() -> torch.Tensor:
            arrived.synchronize()
            return host

        return wait


class DeviceSums:
    """Sums of final pieces, on their way to the host from when they are asked for."""

    def __init__(
        self, slab: DeviceSlab, conversion: Conversion, to_host: ToHost, checks: Sequence[Callable[[], None]]
    ) -> None:
        """Name the slab; nothing is copied yet.

        Args:
            slab: The sums.
            conversion: What becomes of complete sums.
            to_host: Starts a copy to the host, and returns a function that waits for it.
            checks: Grows by those of each tier that has been finished.
        """
        self._slab, self._conversion, self._to_host, self._checks = slab, conversion, to_host, checks

    def sum(self, box: Box) -> Callable[[], NDArray[Any]]:
        """Sums of a box: float32 ``(channels, z, y, x)``; see ``block.Sums``."""
        return self._checked(self._slab.sum(box))

    def converted(self, box: Box) -> Callable[[], NDArray[Any]]:
        """What becomes of complete sums of a box; see ``block.Sums``."""
        return self._checked(self._slab.converted(box, self._conversion))

    def _checked(self, result: torch.Tensor) -> Callable[[], NDArray[Any]]:
        """Start the copy to the host.

        The function that is returned waits for it, and for the checks of its tiers.
        """
        arriving, checks = self._to_host(result), tuple(self._checks)

        def wait() -> NDArray[Any]:
            for check in checks:
                check()
            array: NDArray[Any] = arriving().numpy()
            return array

        return wait


class _Once:
    """A check for all who need it to have passed: whoever comes first makes it, the others wait."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check: Callable[[], None] | None = check
        self._lock = Lock()

    def __call__(self) -> None:
        with self._lock:
            if self._check is not None:
                self._check()
                self._check = None  # and what it holds of the host's memory


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
