"""A tiny volume in the simulated store, and what its output has to be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import product
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.compression import decompress
from chunkflow_core.storage.digests import short_digest
from tests.support.oracle import numbers
from tests.support.oracle.crashes import Model, no_fault
from tests.support.oracle.geometry import Case, Geometry, Index
from tests.support.oracle.numbers import MASK_VOXEL
from tests.support.oracle.volume import MASK_CHUNK
from tests.support.simulation.store import BUCKET, Store

RESOLUTIONS = {"input": (4, 4, 40), "mask": (12, 8, 40)}
"""Voxel sizes of the layers in nm, xyz."""


class World:
    """The layers of a case, what is edited there, and the oracle for what comes of them."""

    def __init__(self, case: Case, store: Store) -> None:
        """Write input and mask."""
        self.case, self.store, self.geometry = case, store, Geometry(case)
        self.layers: dict[str, NDArray[np.uint8]] = {}
        self.written: Counter[str] = Counter()
        """How often each storage chunk of the output was written."""
        self.receipt_written: Callable[[dict[str, Any]], object] = lambda receipt: None
        """Called for each receipt that gets into the store."""
        store.written = self._note
        rng = np.random.default_rng(case.seed)
        volume = rng.integers(0, 256, case.size, dtype=np.uint8)
        volume[tuple(slice(0, int(n)) for n in rng.integers(0, np.array(case.size) // 2 + 1))] = 0
        self._make("input", volume, case.input_chunk)
        if case.masked:
            shape = [-(-n // voxel) for n, voxel in zip(case.size, MASK_VOXEL, strict=True)]
            self._make("mask", (rng.random(shape) < 0.3).astype(np.uint8), MASK_CHUNK)
        self.first = {name: data.copy() for name, data in self.layers.items()}
        self.specs = [self._spec(model) for model in (0, 1)]
        self._known: dict[tuple[int, bytes], dict[Index, NDArray[Any]]] = {}

    @property
    def has_output(self) -> bool:
        """Whether the output layer is there."""
        return f"{BUCKET}/output/info" in self.store.objects

    def workspace(self, model: int) -> Workspace:
        """What a process opens."""
        return Workspace(self.specs[model], Model(self.case, model, 0, no_fault()))

    def expected(self, model: int) -> dict[Index, NDArray[Any]]:
        """The output (czyx) of each block, from the layers as they are now."""
        key = model, b"".join(data.tobytes() for data in self.layers.values())
        if key not in self._known:
            inferred = numbers.infer(self.geometry, self.layers, model)
            blended = {index: numbers.blend(self.geometry, inferred, index) for index in self.geometry.blocks}
            self._known = {key: blended}
        return self._known[key]

    def is_right(self, model: int, index: Index) -> bool:
        """Whether a block's output is what it has to be, all storage chunks there."""
        box = Box(*(vector(getattr(axis, end) for axis in self.geometry.blocks[index]) for end in ("start", "stop")))
        output = self.workspace(model).output.read(box)
        return bool(np.array_equal(output, self.expected(model)[index]))

    def edit(self, random: Random) -> None:
        """Change some storage chunks of a layer, one after the other, or write them as they are."""
        name = random.choice(list(self.layers))
        corners, same = list(self._corners(name)), random.random() < 0.2
        first, stop = random.randrange(len(corners)), random.choice([1, 256, 256] if name == "input" else [1, 2, 2])
        number = random.choice([1, 1, 2, 4] if stop > 1 else [1, 4, 9])
        for corner in corners[first : first + number]:
            voxels = self.layers[name][self._part(name, corner)]
            if not same:
                values = [random.randrange(stop) for _ in range(voxels.size)]
                voxels = np.array(values, np.uint8).reshape(voxels.shape)
            self._put(name, corner, voxels)

    def revert(self) -> None:
        """Make all layers what they were at first."""
        for name in self.layers:
            for corner in self._corners(name):
                part = self._part(name, corner)
                if (self.layers[name][part] != self.first[name][part]).any():
                    self._put(name, corner, self.first[name][part])

    def is_stored(self, chunk: str, voxels: str) -> bool:
        """Whether a storage chunk of the output holds voxels of a digest."""
        for key, found in self.store.objects.items():
            if "/output/" in key and key.endswith(f"/{chunk}"):
                return short_digest(decompress(found.content, found.compression)) == voxels
        return False

    def _make(self, name: str, data: NDArray[np.uint8], chunk: Index) -> None:
        self.layers[name] = np.zeros_like(data)
        scale = {
            "key": "scale",
            "size": [*reversed(data.shape)],
            "chunk_sizes": [[*reversed(chunk)]],
            "resolution": RESOLUTIONS[name],
            "voxel_offset": [0, 0, 0],
            "encoding": "raw",
        }
        info = {"type": "image", "data_type": "uint8", "num_channels": 1, "scales": [scale]}
        self.store.put(f"{BUCKET}/{name}/info", json.dumps(info).encode())
        for corner in self._corners(name):
            self._put(name, corner, data[self._part(name, corner)])

    def _put(self, name: str, corner: Index, voxels: NDArray[np.uint8]) -> None:
        """Write a storage chunk of a layer."""
        stop = [a + n for a, n in zip(corner, voxels.shape, strict=True)]
        key = "_".join(f"{a}-{b}" for a, b in zip(reversed(corner), reversed(stop), strict=True))
        address = f"{BUCKET}/{name}/scale/{key}"
        self.store.in_time.add(address)
        self.store.put(address, voxels.tobytes())

    def _part(self, name: str, corner: Index) -> tuple[slice, ...]:
        """The voxels of a storage chunk of a layer."""
        return tuple(slice(a, a + c) for a, c in zip(corner, self._chunk(name), strict=True))

    def _note(self, key: str, content: bytes) -> None:
        """Note what gets into the store: voxels of input and mask, and how often the output."""
        layer, _, name = key.removeprefix(f"{BUCKET}/").partition("/")
        if "/receipts/" in key and b'"written"' in content:
            self.receipt_written(json.loads(content)["receipt"])
        if layer == "output" and "_" in name.rpartition("/")[2]:
            self.written[name.rpartition("/")[2]] += 1
        elif layer in self.layers and name.startswith("scale/"):
            ranges = [tuple(map(int, axis.split("-"))) for axis in reversed(name.removeprefix("scale/").split("_"))]
            part = tuple(slice(a, b) for a, b in ranges)
            data = self.layers[layer]
            data[part] = np.frombuffer(content, np.uint8).reshape(data[part].shape)

    def _chunk(self, name: str) -> Index:
        return self.case.input_chunk if name == "input" else MASK_CHUNK

    def _corners(self, name: str) -> list[Index]:
        sizes = zip(self.layers[name].shape, self._chunk(name), strict=True)
        return list(product(*(range(0, n, c) for n, c in sizes)))

    def _spec(self, model: int) -> VolumeSpec:
        case = self.case
        spec = parse_spec(
            {
                "name": "simulated",
                "input": {"path": f"{BUCKET}/input", "padding": case.padding},
                "output": {
                    "path": f"{BUCKET}/output",
                    "channels": 2,
                    "dtype": case.dtype,
                    "chunk_size": [*case.chunk],
                },
                "exchange": {"path": f"{BUCKET}/exchange", "donations": "delete"},
                "roi": [list(case.start), list(case.stop)],
                "patch_size": [p + 2 * h for p, h in zip(case.patch, case.halo, strict=True)],
                "output_patch_size": list(case.patch),
                "patch_overlap": list(case.overlap),
                "block_size": list(case.block),
                "skip": {"mask": {"path": f"{BUCKET}/mask"} if case.masked else None},
                "model": {"engine": "identity", "options": {"number": model}},
            }
        )
        _ = spec.fingerprint
        return spec
