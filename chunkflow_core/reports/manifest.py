"""The manifest of a run, JSON in the output layer: what was asked, with what, and what came of it.

It is ``runs/<run>.json`` below the layer's path, beside CloudVolume's own ``provenance``, which
says whose the layer is. Until it is complete there is a ``runs/<run>.open`` too: what such a run
has changed has not been told to anybody, and is told with the next one that completes.
"""

from __future__ import annotations

import json
import platform
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from chunkflow_core.exchange.marks import STAGES
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.block_numbers import BlockSet
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.machine import user
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.steps.provenance import History, digests, now, spec_record
from chunkflow_core.storage.addresses import plain, safe_name
from chunkflow_core.storage.files import put_file, storage_errors
from chunkflow_core.storage.layers import layer_files

FORMAT: Final = 1

_PACKAGES = ("chunkflow-airflow", "cloud-files", "cloud-volume", "numba", "numpy", "torch")
_ENGINE_PACKAGES = {"onnx": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",), "pznet": ("pznet",)}
_OPEN = ".open"
_LONGEST = 150


def begin(spec: VolumeSpec, run: str, request: Mapping[str, Any]) -> None:
    """Store the manifest of a run that starts.

    A run that starts again keeps the time of its first start.

    Args:
        spec: The volume.
        run: Name of the run.
        request: What is asked for: ``box``, ``force``, ``check_input``, ``repair``, for JSON.
    """
    earlier = read(spec, run) or {}
    put_file(plain(spec.output.path), f"{stem(run)}{_OPEN}", json.dumps(run).encode())
    _put(spec, _begun(spec, run) | {"request": dict(request), "started": earlier.get("started") or now()})


def complete(spec: VolumeSpec, run: str, receipts: Iterable[Receipt]) -> dict[str, Any]:
    """Store the manifest of a run that has done all it had to, and return it.

    Args:
        spec: The volume.
        run: Name of the run.
        receipts: All there are, of whichever run.
    """
    outcome = Outcome(spec, run)
    for receipt in receipts:
        outcome.add(receipt)
    return outcome.complete()


class Outcome:
    """What has come of a run, from all receipts there are, of whichever run, one by one.

    What has changed is told with what runs before it have changed and not told, since they did not
    come so far. A few bytes are kept of each block of the volume.
    """

    def __init__(self, spec: VolumeSpec, run: str) -> None:
        """Read which runs have not told yet what they have changed; no receipt is known yet."""
        self._spec, self._run = spec, run
        self._manifest = read(spec, run) or _begun(spec, run)
        # the first is of a try that was ended too soon
        self._told = {*self._manifest.get("told", []), *unpublished(spec), run}
        self._own, self._valid = ({stage: BlockSet(spec.grid) for stage in STAGES} for _ in range(2))
        self._changed, self._hosts, self._devices = BlockSet(spec.grid), Counter[str](), Counter[str]()

    def add(self, receipt: Receipt) -> None:
        """Take account of a receipt."""
        if self._told.intersection(receipt.changes):
            self._changed.add(receipt.block)
        if receipt.geometry == self._spec.block_digest(receipt.block):
            self._valid[receipt.stage].add(receipt.block)
        if receipt.run != self._run:
            return
        self._own[receipt.stage].add(receipt.block)
        self._hosts[str(receipt.facts.get("host", "unknown"))] += 1
        if receipt.stage == "infer" and receipt.patches:
            self._devices[str(receipt.facts.get("device", "cpu"))] += 1

    def complete(self) -> dict[str, Any]:
        """Store the run's manifest as that of a run that has done all it had to, and return it.

        If every block is of this spec's fingerprint, the layer's provenance says so too.
        """
        spec, path = self._spec, self._spec.output.path
        outcome = {
            "state": "complete",
            "finished": now(),
            "told": sorted(self._told),
            "bounding_box": self._bounding_box(),
            "hosts": self._hosts,
            "devices": self._devices,
            "mixture": self._mixture(),
        }
        manifest: dict[str, Any] = json.loads(json.dumps(self._manifest | outcome))  # as whoever reads it gets it
        manifest["blocks"] = self._blocks()
        _put(spec, manifest)
        with storage_errors(f"writing {path}/runs"):
            layer_files(path).delete([f"{stem(name)}{_OPEN}" for name in self._told])
        return manifest

    def _blocks(self) -> dict[str, list[list[int]]]:
        """Indices of the blocks that the run has inferred, and blended, and of those changed."""
        sets = {"inferred": self._own["infer"], "blended": self._own["blend"], "changed": self._changed}
        lists: dict[str, list[list[int]]] = {name: [] for name in sets}
        for block in self._spec.grid.indices():
            index = [*block]  # of millions of blocks, one for all lists
            for name, blocks in sets.items():
                if block in blocks:
                    lists[name].append(index)
        return lists

    def _bounding_box(self) -> dict[str, Any] | None:
        """The box around all blocks that have changed; None if none has."""
        grid = self._spec.grid
        boxes = (grid.block(block).box for block in self._changed)
        around = reduce(lambda one, other: Box.around([one, other]), boxes, next(boxes, None))
        return asdict(around) if around else None

    def _mixture(self) -> list[str]:
        """Fingerprints of all whose voxels are in the layer, if there are several."""
        history = History(self._spec)
        if len(history.fingerprints) > 1 and history.fingerprint == self._spec.fingerprint and self._is_whole():
            history.add("whole", self._run)
            history.tell()
        return history.fingerprints if len(history.fingerprints) > 1 else []

    def _is_whole(self) -> bool:
        """Whether all blocks are done with this fingerprint.

        Receipts are discarded where another one has claimed the layer.
        """
        grid, inferred, blended = self._spec.grid, self._valid["infer"], self._valid["blend"]
        return all(i in inferred and (i in blended or not grid.has_frame(i)) for i in grid.indices())


def unpublished(spec: VolumeSpec) -> list[str]:
    """Names of the runs that have begun and are not complete."""
    files = layer_files(spec.output.path)
    with storage_errors(f"listing {spec.output.path}/runs"):
        names = [name for name in files.list(prefix="runs/") if name.endswith(_OPEN)]
        contents = [answer["content"] for answer in files.get(names)] if names else []
    return sorted(json.loads(content) for content in contents if content)


def read(spec: VolumeSpec, run: str) -> dict[str, Any] | None:
    """The manifest of a run; None if there is none that can be read."""
    path = f"{stem(run)}.json"
    with storage_errors(f"reading {spec.output.path}/{path}"):
        content = layer_files(spec.output.path).get(path)
    try:
        manifest = json.loads(content or b"")
    except ValueError:
        return None
    return manifest if isinstance(manifest, dict) else None


def stem(run: str) -> str:
    """Path of a run's files in the output layer, without their extension.

    Airflow's names have colons and plus signs, which not every storage and browser takes as they
    are. They are replaced; a hash then keeps names apart that only differ there.
    """
    return f"runs/{safe_name(run, substitute='_', joint='-', longest=_LONGEST, hidden=True)}"


def _begun(spec: VolumeSpec, run: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": spec.name,
        "run": run,
        "state": "running",
        "fingerprint": spec.fingerprint,
        "spec": spec_record(spec),
        "digests": digests(spec),
        "packages": _packages(spec),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "user": user(),
        "host": socket.gethostname(),
        "request": {},
        "started": None,
    }


def _packages(spec: VolumeSpec) -> dict[str, str]:
    """Versions of what decides or moves numbers, as far as it is installed here."""
    found = {}
    for name in (*_PACKAGES, *_ENGINE_PACKAGES.get(spec.model.engine, ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _put(spec: VolumeSpec, manifest: Mapping[str, Any]) -> None:
    put_file(plain(spec.output.path), f"{stem(manifest['run'])}.json", json.dumps(manifest).encode())
