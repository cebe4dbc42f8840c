"""A volume on disk, what may happen to it, and an account of it of the test's own.

The account is written without the library. It keeps arrays, not digests: what each block has read last, what it gave to whom,
what each blending got. From those it finds by brute force what a run has to do, and what the output has to be.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from cloudfiles.interfaces import FileInterface
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.storage.layers import NewLayer

Index = tuple[int, ...]
MASK_VOXEL = (1, 2, 3)
"""Size of a mask voxel in voxels of the input."""
MASK_CHUNK = (4, 3, 2)


@dataclass(frozen=True)
class Case:
    """A small volume and how it is cut; sizes zyx."""

    start: Index
    """Of the ROI, in the input layer."""
    stop: Index
    beyond: Index
    """Input voxels beyond the ROI's end."""
    patch: Index
    halo: Index
    overlap: Index
    block: Index
    chunk: Index
    input_chunk: Index
    padding: str = "reflect"
    dtype: str = "uint8"
    masked: bool = False
    seed: int = 0


class Axis(NamedTuple):
    """A block along one axis: all that decides its numbers, besides what it reads."""

    start: int
    stop: int
    chunk_stop: int
    """End of what its patches touch."""
    first: int
    last: int
    """One past its last patch."""
    near: int
    """One past the last patch that overlaps one of its own."""
    padded: tuple[int | None, int | None]
    """The input's ends, where it needs voxels beyond them."""


class Read(NamedTuple):
    """What decides what a block gives."""

    axes: tuple[Axis, ...]
    mask: bytes
    planes: tuple[tuple[int, bytes], ...]
    """Of each layer of patches that the mask touches: number, and input with padding and halo."""


class Inferred(NamedTuple):
    """A block's inference."""

    read: Read
    sums: NDArray[np.int64]
    """What its patches add up to over its chunk, in exact steps."""
    inside: NDArray[np.bool_]
    """The mask over its chunk."""
    patches: int
    """Run, not skipped."""


@dataclass
class Account:
    """What has been done with one model."""

    inferred: dict[Index, Inferred] = field(default_factory=dict)
    blended: dict[Index, dict[Index, Any]] = field(default_factory=dict)
    """For each block, what each donor gave it."""
    left: dict[Index, dict[Index, set[str]]] = field(default_factory=dict)
    """Files that a donor left for each receiver."""
    ended: dict[Index, float] = field(default_factory=dict)
    """When a block was blended."""


class Due(NamedTuple):
    """What a run has to do."""

    infer: set[Index]
    blend: set[Index]
    blended: set[Index]
    """Those of ``blend`` that turn out to have got something else than before."""


class World:
    """The volume on disk, and the account of it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        rng = np.random.default_rng(case.seed)
        self.start, self.stop = case.start, case.stop
        self.layers: dict[str, NDArray[np.uint8]] = {}
        self.first: dict[str, NDArray[np.uint8]] = {}
        self.model, self.claimed = 0, -1
        self.accounts = [Account(), Account()]
        self.clock = 1_000_000
        size = tuple(b + n for b, n in zip(case.stop, case.beyond, strict=True))
        volume = rng.integers(0, 256, size, dtype=np.uint8)
        volume[tuple(slice(0, int(n)) for n in rng.integers(0, np.array(size) + 1))] = 0
        self.put("input", volume)
        if case.masked:
            shape = [-(-n // voxel) for n, voxel in zip(size, MASK_VOXEL, strict=True)]
            self.put("mask", (rng.random(shape) < 0.1).astype(np.uint8))

    # the volume on disk

    def spec(self, donations: Any = "keep") -> VolumeSpec:
        """As it is now."""
        case, place = self.case, f"file://{self.folder}"
        return parse_spec(
            {
                "name": "case",
                "input": {"path": f"{place}/input", "padding": case.padding},
                "output": {"path": f"{place}/output", "channels": 2, "dtype": case.dtype, "chunk_size": [*case.chunk]},
                "exchange": {"path": f"{place}/exchange", "donations": donations},
                "roi": [list(self.start), list(self.stop)],
                "patch_size": [p + 2 * h for p, h in zip(case.patch, case.halo, strict=True)],
                "output_patch_size": list(case.patch),
                "patch_overlap": list(case.overlap),
                "block_size": list(case.block),
                "skip": {"mask": {"path": f"{place}/mask"} if case.masked else None},
                "model": {"engine": "identity", "options": {"number": self.model}},
            }
        )

    def put(self, name: str, data: NDArray[np.uint8], *, touched: Index | None = None) -> None:
        """Make a layer say ``data``; only storage chunks that differ are written, and one that is ``touched``."""
        resolution, chunk = ((40, 4, 4), self.case.input_chunk) if name == "input" else ((40, 8, 12), MASK_CHUNK)
        before = self.layers.get(name, np.empty((0, 0, 0), np.uint8))
        layer = NewLayer(
            f"file://{self.folder}/{name}",
            vector(data.shape),
            dtype="uint8",
            resolution=resolution,
            chunk=vector(chunk),
        )
        changed = {}
        for corner in product(*(range(0, n, c) for n, c in zip(data.shape, chunk, strict=True))):
            stop = tuple(min(a + c, n) for a, c, n in zip(corner, chunk, data.shape, strict=True))
            part = tuple(map(slice, corner, stop))
            if before[part].shape != data[part].shape or (before[part] != data[part]).any() or corner == touched:
                changed[corner] = stop
        at_once = {(0, 0, 0): data.shape} if before.size == 0 else changed
        for corner, stop in at_once.items():
            layer.write(Box(vector(corner), vector(stop)), data[tuple(map(slice, corner, stop))][None])
        for corner, stop in changed.items():
            x, y, z = (f"{a}-{b}" for a, b in zip(reversed(corner), reversed(stop), strict=True))
            self.clock += 1
            for file in (self.folder / name).glob(f"*/{x}_{y}_{z}*"):
                os.utime(file, ns=(self.clock, self.clock))  # the file system's own clock may be coarser than the test
        self.layers[name] = data
        self.first.setdefault(name, data)

    def edit(self, name: str, chunk: int, seed: int) -> None:
        """Change some voxels of one storage chunk of a layer; none with seed 0, though it is written again."""
        data, size = self.layers[name].copy(), self.case.input_chunk if name == "input" else MASK_CHUNK
        corners = list(product(*(range(0, n, c) for n, c in zip(data.shape, size, strict=True))))
        corner = corners[chunk % len(corners)]
        if seed:
            rng = np.random.default_rng(seed)
            stop = tuple(min(a + c, n) for a, c, n in zip(corner, size, data.shape, strict=True))
            low = [int(rng.integers(a, b)) for a, b in zip(corner, stop, strict=True)]
            high = [int(rng.integers(a, b)) + 1 for a, b in zip(low, stop, strict=True)]
            data[tuple(map(slice, low, high))] = rng.integers(0, 256) if name == "input" else rng.integers(0, 2)
        self.put(name, data, touched=corner)

    def revert(self, name: str) -> None:
        """Make a layer what it was at first."""
        self.put(name, self.first[name])

    def grow(self, axis: int, of_roi: int, of_input: int) -> None:
        """Move the ROI's end, and the input's, where it is asked for or needs to."""
        stop = list(self.stop)
        stop[axis] += of_roi
        self.stop = tuple(stop)
        size = list(self.layers["input"].shape)
        size[axis] = max(size[axis] + of_input, stop[axis])
        for name in self.layers:
            shape = [-(-n // v) for n, v in zip(size, MASK_VOXEL, strict=True)] if name == "mask" else size
            for versions in (self.first, self.layers):
                old = versions[name]
                rng = np.random.default_rng([self.case.seed, *shape])
                new = rng.integers(0, 256, shape, dtype=np.uint8)
                if name == "mask":
                    new = (new < 25).astype(np.uint8)
                new[tuple(map(slice, old.shape))] = old
                if versions is self.layers:
                    self.put(name, new)
                else:
                    versions[name] = new

    # geometry

    @property
    def counts(self) -> list[int]:
        """Patches along each axis."""
        case = self.case
        lengths = zip(self.start, self.stop, case.overlap, case.patch, strict=True)
        return [max(1, math.ceil((b - a - o) / (p - o))) for a, b, o, p in lengths]

    def axis(self, a: int) -> list[Axis]:
        """The blocks along one axis."""
        case, count = self.case, self.counts[a]
        start, stop, patch, halo = self.start[a], self.stop[a], case.patch[a], case.halo[a]
        stride, size = patch - case.overlap[a], self.layers["input"].shape[a]
        blocks = []
        for low in range(0, count * stride, case.block[a]):
            first, last = low // stride, min((low + case.block[a]) // stride, count)
            begin, end = start + first * stride - halo, start + (last - 1) * stride + patch + halo
            near = max(k + 1 for k in range(count) if k * stride < (last - 1) * stride + patch)
            padded = 0 if begin < 0 else None, size if end > size else None
            if max(-begin, end - size) >= size:  # reflected more than once
                padded = 0, size
            high = stop if last == count else start + low + case.block[a]
            blocks.append(Axis(start + low, high, min(stop, end - halo), first, last, near, padded))
        return blocks

    def blocks(self) -> dict[Index, tuple[Axis, ...]]:
        """All blocks."""
        return {
            index: tuple(axis for axis, _ in both)
            for both in product(*([(axis, i) for i, axis in enumerate(self.axis(a))] for a in range(3)))
            for index in [tuple(i for _, i in both)]
        }

    def frame(self, block: tuple[Axis, ...]) -> NDArray[np.bool_]:
        """The storage chunks of a block to which others contribute, as voxels of its chunk."""
        frame = np.zeros([axis.chunk_stop - axis.start for axis in block], bool)
        for a, axis in enumerate(block):
            if axis.first > 0:
                overlap, chunk = self.case.overlap[a], self.case.chunk[a]
                frame[(slice(None),) * a + (slice(0, -(-overlap // chunk) * chunk),)] = True
        frame[~self.own(block)] = False
        return frame

    def own(self, block: tuple[Axis, ...]) -> NDArray[np.bool_]:
        """The voxels of a block, among those of its chunk."""
        own = np.zeros([axis.chunk_stop - axis.start for axis in block], bool)
        own[tuple(slice(0, axis.stop - axis.start) for axis in block)] = True
        return own

    def given_voxels(self, donor: tuple[Axis, ...], receiver: tuple[Axis, ...]) -> NDArray[np.bool_]:
        """What a donor gives a receiver, as voxels of the donor's chunk."""
        if donor == receiver:
            return self.frame(donor)
        given = np.zeros([axis.chunk_stop - axis.start for axis in donor], bool)
        part = [
            (max(r.start, d.start) - d.start, min(r.stop, d.chunk_stop) - d.start)
            for d, r in zip(donor, receiver, strict=True)
        ]
        if all(a < b for a, b in part):
            given[tuple(slice(a, b) for a, b in part)] = True
        return given

    def donors(self, receiver: Index) -> list[Index]:
        """The blocks that give a block something; none if it has no frame."""
        blocks = self.blocks()
        if not self.frame(blocks[receiver]).any():
            return []
        return [d for d, donor in blocks.items() if self.given_voxels(donor, blocks[receiver]).any()]

    # numbers

    def current(self) -> dict[Index, Inferred]:
        """What the inference of each block would be now."""
        weights, padded, low = self._weights(), *self._padded()
        inside = self._inside()
        return {index: self._infer(block, weights, padded, low, inside) for index, block in self.blocks().items()}

    def _infer(
        self,
        block: tuple[Axis, ...],
        weights: list[list[NDArray[np.float32]]],
        padded: NDArray[np.float32],
        low: list[int],
        inside: NDArray[np.bool_],
    ) -> Inferred:
        case = self.case
        stride = np.subtract(case.patch, case.overlap)
        origin = np.array([axis.start for axis in block])
        within = inside[tuple(slice(axis.start, axis.chunk_stop) for axis in block)]
        extent = [(axis.last - axis.first - 1) * s + p for axis, s, p in zip(block, stride, case.patch, strict=True)]
        sums, planes, run = np.zeros((2, *extent), np.int64), {}, 0
        for k in product(*(range(axis.first, axis.last) for axis in block)):
            at = np.array(self.start) + k * stride  # in the input
            local = tuple(slice(a, a + p) for a, p in zip(at - origin, case.patch, strict=True))
            if not within[local].any():
                continue
            ends = [(a + m - h, a + m + p + h) for a, m, p, h in zip(at, low, case.patch, case.halo, strict=True)]
            if k[0] not in planes:
                whole = [(o + m - h, o + m + e + h) for o, m, e, h in zip(origin, low, extent, case.halo, strict=True)]
                planes[k[0]] = padded[tuple(slice(*end) for end in [ends[0], *whole[1:]])].tobytes()
            part = padded[tuple(slice(*end) for end in ends)]
            if not part.any():
                continue
            run += 1
            z, y, x = (weights[a][k[a]] for a in range(3))
            weighted = mix(part[None], case, self.model) * (y[:, None] * x[None, :])
            sums[(slice(None), *local)] += np.rint(weighted * (z * np.float32(2**23))[:, None, None]).astype(np.int64)
        sums = sums[(slice(None), *map(slice, within.shape))]
        mask = within.tobytes() if case.masked else b""
        return Inferred(Read(block, mask, tuple(planes.items())), sums, within, run)

    def _weights(self) -> list[list[NDArray[np.float32]]]:
        case, weights = self.case, []
        for patch, overlap, count in zip(case.patch, case.overlap, self.counts, strict=True):
            places = [slice(k * (patch - overlap), k * (patch - overlap) + patch) for k in range(count)]
            bump = np.array([math.exp(-1 / (1 - (2 * (i + 1) / (patch + 1) - 1) ** 2)) for i in range(patch)])
            total = np.zeros(places[-1].stop)
            for place in places:
                total[place] += bump
            weights.append([(bump / total[place]).astype(np.float32) for place in places])
        return weights

    def _padded(self) -> tuple[NDArray[np.float32], list[int]]:
        """The input with all that patches reach, and how much was added at the low ends."""
        case, size = self.case, self.layers["input"].shape
        stops = [
            start + (count - 1) * (p - o) + p
            for start, count, p, o in zip(self.start, self.counts, case.patch, case.overlap, strict=True)
        ]
        low = [max(0, h - start) for h, start in zip(case.halo, self.start, strict=True)]
        high = [max(0, stop + h - n) for h, stop, n in zip(case.halo, stops, size, strict=True)]
        mode: Any = case.padding
        padded = np.pad(self.layers["input"], list(zip(low, high, strict=True)), mode=mode)
        return padded.astype(np.float32) / np.float32(255), low

    def _inside(self) -> NDArray[np.bool_]:
        size = self.layers["input"].shape
        if not self.case.masked:
            return np.ones(size, bool)
        whole: NDArray[np.bool_] = np.kron(self.layers["mask"] != 0, np.ones(MASK_VOXEL, bool))
        return whole[tuple(map(slice, size))]

    def expected(self, inferred: dict[Index, Inferred], receiver: Index) -> NDArray[Any]:
        """What a block's output is, from inference of it and all that give it something."""
        blocks = self.blocks()
        target = blocks[receiver]
        total = np.zeros((2, *(axis.stop - axis.start for axis in target)), np.int64)
        for donor in {*self.donors(receiver), receiver}:
            given = inferred[donor].sums
            common = [
                (max(r.start, d.start), min(r.stop, d.chunk_stop)) for d, r in zip(blocks[donor], target, strict=True)
            ]
            to, of = (
                (slice(None), *(slice(a - axis.start, b - axis.start) for (a, b), axis in zip(common, at, strict=True)))
                for at in (target, blocks[donor])
            )
            total[to] += given[of]
        values = (total / 2**23).astype(np.float32)
        if self.case.dtype == "uint8":
            values = np.clip(np.rint(values * np.float32(255)), 0, 255).astype(np.uint8)
        values[:, ~inferred[receiver].inside[tuple(map(slice, values.shape[1:]))]] = 0
        return values

    # what is done, and what is due

    @property
    def account(self) -> Account:
        """Of the model that is used now."""
        return self.accounts[self.model]

    def is_valid(self, index: Index) -> bool:
        """Whether a block has been inferred as what it is now."""
        done = self.account.inferred.get(index)
        return done is not None and done.read.axes == self.blocks()[index]

    def given(self, inferred: dict[Index, Inferred], donor: Index, receiver: Index) -> Any:
        """What a block has given to another; to itself also its mask."""
        blocks, done = self.blocks(), inferred[donor]
        voxels = self.given_voxels(blocks[donor], blocks[receiver])
        mask = done.inside[voxels].tobytes() if donor == receiver else b""
        return done.read.axes, done.sums[:, voxels].tobytes(), mask

    def consumed(self, inferred: dict[Index, Inferred], receiver: Index, current: dict[Index, Inferred]) -> Any:
        """What a block would be blended from: what its donors have given, and the mask as it is now."""
        given = {donor: self.given(inferred, donor, receiver) for donor in self.donors(receiver)}
        return given | {receiver: (*given[receiver][:2], self.given(current, receiver, receiver)[2])}

    def has_consumed(self, receiver: Index) -> bool:
        """Whether a block has been blended from what its donors have given last."""
        consumed, done, donors = self.account.blended.get(receiver), self.account.inferred, self.donors(receiver)
        return (
            consumed is not None
            and all(self.is_valid(d) for d in donors)
            and {d: self.given(done, d, receiver) for d in donors} == consumed
        )

    def due(self, requested: set[Index], *, force: bool, check: bool) -> Due:
        """The least that has to be done, by looking at all blocks again and again until nothing is added."""
        done, now, blocks = self.account, self.current(), self.blocks()
        donors = {r: self.donors(r) for r in blocks}
        files = self.donations()
        valid = {b for b in blocks if self.is_valid(b)}
        other = {b for b in blocks if b not in valid or now[b].read != done.inferred[b].read}
        gone = {(d, r) for r in blocks for d in donors[r] if d not in valid or not done.left[d].get(r, set()) <= files}
        behind = {r for r in blocks if donors[r] and not self.has_consumed(r)}
        decisive = requested.union(*(donors[r] for r in requested))
        infer, changing, blend = set[Index](), set[Index](), set[Index]()
        while True:
            before = len(infer), len(changing), len(blend)
            for b in blocks:
                asked = b in requested and (b not in valid or force)
                asked |= check and b in decisive & valid & other
                needed = any((b, r) in gone for r in blend)
                if asked or needed:
                    infer.add(b)
                if asked or (needed and b in other):
                    changing.add(b)
            for r in blocks:
                touched = not changing.isdisjoint(donors[r])
                if r in requested and donors[r] and (touched or r in behind):
                    blend.add(r)
                near = not decisive.union(*(donors[other] for other in blend)).isdisjoint(donors[r])
                if r in done.blended and (touched or (near and r in behind)):
                    blend.add(r)
            if before == (len(infer), len(changing), len(blend)):
                break
        after = done.inferred | {b: now[b] for b in infer}
        forced = requested & valid if force else set()
        blended = {r for r in blend if r in forced or self.consumed(after, r, now) != done.blended.get(r)}
        return Due(infer, blend, blended)

    # what is on the disk, by what files are there

    def exchange(self) -> Path:
        """The folder of the model that is used now."""
        return self.folder / "exchange" / self.spec().fingerprint

    def donations(self) -> set[str]:
        """All donations there are."""
        return {f.name for f in (self.exchange() / "donations").rglob("*") if f.is_file() and "%" in f.name}

    def receipts(self) -> dict[tuple[str, Index], set[tuple[str, str]]]:
        """Stages of blocks that are said to be done: the box for which, and the run that did it."""
        found: dict[tuple[str, Index], set[tuple[str, str]]] = {}
        blocks = {tuple(axis.start for axis in block): index for index, block in self.blocks().items()}
        for stage in ("infer", "blend"):
            for file in (self.exchange() / "receipts" / stage).rglob("*%*.json"):
                box, run = file.name.partition("%")[0], json.loads(file.read_bytes())["receipt"]["run"]
                found.setdefault((stage, blocks[_corners(box)[0]]), set()).add((box, run))
        return found

    def receiver_of(self, donation: str) -> Index:
        """The block that owns a donation's voxels."""
        start, _ = _corners(donation.partition("%")[2])
        return next(
            index
            for index, block in self.blocks().items()
            if all(axis.start <= v < axis.stop for axis, v in zip(block, start, strict=True))
        )

    def note(self, run: str, now: float) -> None:
        """Note what a run has done, and what is gone."""
        account, current, receipts, blocks = self.account, self.current(), self.receipts(), self.blocks()
        for stage, records in (("infer", account.inferred), ("blend", account.blended)):
            for index in [b for b in records if (stage, b) not in receipts]:
                del records[index]
        for stage, index in sorted(receipts, reverse=True):  # inference first
            corners = tuple(axis.start for axis in blocks[index]), tuple(axis.stop for axis in blocks[index])
            boxes = [box for box, by in receipts[stage, index] if by == run and _corners(box) == corners]
            if boxes and stage == "infer":
                account.inferred[index], account.left[index] = current[index], {}
                for name in self.donations():
                    if name.startswith(f"{boxes[0]}%"):
                        account.left[index].setdefault(self.receiver_of(name), set()).add(name)
            elif boxes:
                account.blended[index] = self.consumed(account.inferred, index, current)
                account.ended[index] = now


def _corners(name: str) -> tuple[Index, Index]:
    """Start and stop, zyx, of a range that a file is named after."""
    ranges = [axis.split("-") for axis in name.partition("%")[0].split("_")]
    return tuple(int(a) for a, _ in reversed(ranges)), tuple(int(b) for _, b in reversed(ranges))


def mix(patch: NDArray[np.float32], case: Case, model: int) -> NDArray[np.float32]:
    """A nonlinear stand-in for a convnet: depends on the position in the patch and on the context around each voxel."""
    rng = np.random.default_rng([case.seed, model])
    kernel = rng.random((2, 3), dtype=np.float32)
    mean = np.ascontiguousarray(patch[0]).mean(dtype=np.float64).astype(np.float32)
    index = tuple(slice(h, h + p) for h, p in zip(case.halo, case.patch, strict=True))
    position = rng.random(case.patch, dtype=np.float32)
    values = [(k[0] * patch[0][index] + k[1] * mean + k[2] * position) / np.float32(3.5) for k in kernel]
    return np.stack(values).astype(np.float32)


class Killed(Exception):
    """The process is gone: all that it still tries to do fails like this."""


class BrokenModel(Exception):
    """A forward pass that fails."""


@dataclass
class Fault:
    """What goes wrong, once a number of operations have gone well."""

    where: str
    """``storage`` or ``forward``."""
    after: int
    fatal: bool
    """Whether nothing is done any more from then on, as if the process had been killed."""
    happened: bool = False
    counts: dict[str, int] = field(default_factory=lambda: {"storage": 0, "forward": 0})
    _lock: Any = field(default_factory=Lock)

    def count(self, where: str) -> None:
        """Count an operation that is about to be done, and let it fail."""
        with self._lock:
            if self.fatal and self.happened:
                raise Killed
            self.counts[where] += 1
            if where != self.where or self.counts[where] != self.after + 1:
                return
            self.happened = True
        if self.fatal:
            raise Killed
        raise OSError(28, "No space left on device") if where == "storage" else BrokenModel


def no_fault() -> Fault:
    """All goes well."""
    return Fault("nowhere", 0, fatal=False)


class Model(Engine):
    """Runs ``mix``."""

    def __init__(self, case: Case, model: int, fault: Fault) -> None:
        self.case, self.model, self.fault, self.passes = case, model, fault, 0

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        self.fault.count("forward")
        self.passes += len(patches)
        return np.stack([mix(patch, self.case, self.model) for patch in patches])


@contextmanager
def failing(fault: Fault) -> Iterator[None]:
    """Let operations that change files fail: those of the library, and those of CloudFiles."""
    replace, unlink, remove, put_file = os.replace, os.unlink, os.remove, FileInterface.put_file

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if Path(path).exists():  # what isn't there can't change
                fault.count("storage")
            return function(path, *arguments, **options)

        return call

    def put(*arguments: Any, **options: Any) -> Any:
        fault.count("storage")
        return put_file(*arguments, **options)

    os.replace, os.unlink, os.remove, FileInterface.put_file = counted(replace), counted(unlink), counted(remove), put
    try:
        yield
    finally:
        os.replace, os.unlink, os.remove, FileInterface.put_file = replace, unlink, remove, put_file


def some(items: Iterable[Any], seed: int) -> list[Any]:
    """A random part of some items, at least one if there are any."""
    rng, ordered = np.random.default_rng(seed), sorted(items)
    part = [item for item in ordered if rng.random() < 0.3]
    return part or [ordered[int(rng.integers(len(ordered)))]] if ordered else []
