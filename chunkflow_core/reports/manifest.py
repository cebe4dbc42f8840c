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
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from chunkflow_core.exchange.marks import STAGES, Stage
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.steps.provenance import History, digests, now, spec_record, user
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

    What has changed is told with what runs before it have changed and not told, since they did not
    come so far. If with that every block is of this spec's fingerprint, the layer's provenance says
    so too.

    Args:
        spec: The volume.
        run: Name of the run.
        receipts: All there are, of whichever run.
    """
    known = {(receipt.stage, receipt.block): receipt for receipt in receipts}
    own = [receipt for receipt in known.values() if receipt.run == run]
    manifest = read(spec, run) or _begun(spec, run)
    told = {*manifest.get("told", []), *unpublished(spec), run}  # the first is of a try that was ended too soon
    changed = {receipt.block for receipt in known.values() if told.intersection(receipt.changes)}
    inferred = [receipt for receipt in own if receipt.stage == "infer"]
    outcome = {
        "state": "complete",
        "finished": now(),
        "blocks": {
            "inferred": sorted(receipt.block for receipt in inferred),
            "blended": sorted(receipt.block for receipt in own if receipt.stage == "blend"),
            "changed": sorted(changed),
        },
        "told": sorted(told),
        "bounding_box": asdict(Box.around([spec.grid.block(b).box for b in changed])) if changed else None,
        "hosts": Counter(str(receipt.facts.get("host", "unknown")) for receipt in own),
        "devices": Counter(str(receipt.facts.get("device", "cpu")) for receipt in inferred if receipt.patches),
        "mixture": _mixture(spec, run, known),
    }
    stored = _put(spec, manifest | outcome)
    with storage_errors(f"writing {spec.output.path}/runs"):
        layer_files(spec.output.path).delete([f"{stem(name)}{_OPEN}" for name in told])
    return stored


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


def _mixture(spec: VolumeSpec, run: str, receipts: Mapping[tuple[Stage, Vector], Receipt]) -> list[str]:
    """Fingerprints of all whose voxels are in the layer, if there are several."""
    history = History(spec)
    if len(history.fingerprints) > 1 and history.fingerprint == spec.fingerprint and _is_whole(spec, receipts):
        history.add("whole", run)
    return history.fingerprints if len(history.fingerprints) > 1 else []


def _is_whole(spec: VolumeSpec, receipts: Mapping[tuple[Stage, Vector], Receipt]) -> bool:
    """Whether all blocks are done with this fingerprint.

    Receipts are discarded where another one has claimed the layer.
    """
    grid = spec.grid
    due = ((stage, i) for i in grid.indices() for stage in STAGES if stage == "infer" or grid.has_frame(i))
    return all((known := receipts.get(key)) is not None and known.geometry == spec.block_digest(key[1]) for key in due)


def _put(spec: VolumeSpec, manifest: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(manifest).encode()
    put_file(plain(spec.output.path), f"{stem(manifest['run'])}.json", content)
    stored: dict[str, Any] = json.loads(content)
    return stored
