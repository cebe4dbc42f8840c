"""Who has written to an output layer: this project's steps in CloudVolume's ``provenance`` file.

Each step has ``by`` and ``method``; those of this project say there which spec has claimed the
layer, how, and for which ROI. The last of them is the one that holds.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from chunkflow_core.errors import SpecError, StorageError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.lattice.weights import NUMERICS_VERSION
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.files import put_file, storage_errors
from chunkflow_core.storage.layers import layer_files
from chunkflow_core.variables import conceal, put_back

Mode = Literal["new", "overwrite", "mixture", "extend", "whole"]
"""Why there is a step.

``new``: the layer was made, or did not say whose it is. ``overwrite``, ``mixture``: another spec's
blocks are to be replaced, or joined. ``extend``: the ROI's end has moved. ``whole``: every block is
of one fingerprint again.
"""

_TASK = "chunkflow-airflow"
_DECIDES_NOTHING = (
    "name",
    "exchange",
    "roi",
    "runner",
    "schedule",
    "notify",
    "input.prefetch",
    "input.bounds",
    "output.compression",
    "model.device",
    "model.mixed_hardware",
    "model.streams",
)
"""Keys or sections of the spec that decide no number of the output.

Of the ROI, only the start decides.
"""


class History:
    """An output layer's provenance, as it is when this is made. One that can't be read is empty."""

    def __init__(self, spec: VolumeSpec) -> None:
        """Read the provenance of a spec's output; ``StorageError`` if storage does not answer."""
        self._spec = spec
        with storage_errors(f"reading the provenance of {spec.output.path}"):
            content = layer_files(spec.output.path).get("provenance")
        self._content = _parse(content)
        self.readable = content is None or _is_json(content)
        """Whether the file is whole, or isn't there, rather than a part of what is written."""
        steps = self._content["processing"]
        ours = [step for step in steps if isinstance(step.get("method"), dict) and step["method"].get("task") == _TASK]
        self.by: str = str(ours[-1].get("by", "")) if ours else ""
        """User who has made the last step."""
        self.last: dict[str, Any] = ours[-1]["method"] if ours else {}
        """What the last step says; empty if there is none."""

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the spec that has claimed the layer last; None if unknown."""
        return self.last.get("fingerprint")

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprints of all specs whose voxels may be in the layer."""
        known = self.last.get("fingerprints")
        return list(known) if isinstance(known, list) else [self.fingerprint] if self.fingerprint else []

    def is_of(self, roi: Box) -> bool:
        """Whether the last step was made for this ROI."""
        return self.last.get("roi") == [list(corner) for corner in roi.corners]

    def add(self, mode: Mode, run: str) -> None:
        """Append a step of this spec, and store it.

        Args:
            mode: Why there is a step.
            run: Name of the run that makes it.
        """
        self.last = self._step(mode, run)
        self.by = user()
        self._content["processing"].append({"by": self.by, "method": self.last})
        path, source = self._spec.input.path, self._spec.written("input")
        if path != source:  # a layer is made with the path itself
            self._content["sources"] = [known for known in self._content["sources"] if known != path]
            self._content["description"] = str(self._content["description"]).replace(path, source)
        if source not in self._content["sources"]:
            self._content["sources"].append(source)
        put_file(plain(self._spec.output.path), "provenance", json.dumps(self._content, indent=2).encode())

    def differences(self) -> list[str]:
        """What differs in this spec from the one that has claimed the layer last, line by line.

        Each line has the key, the old value, and the new value. Values of variables are on no
        record; where the text is the same, they may be what differs.
        """
        before, after = _facts(self.last), _facts(self._step("new", ""))
        other = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
        lines = [
            f"{key}: {_short(before.get(key, 'not set'))}, now {_short(after.get(key, 'not set'))}" for key in other
        ]
        same = {key: text for key, text in self._from_variables().items() if not _is_below(key, other)}
        said = "has changed" if not lines and len(same) == 1 else "may have changed"
        return lines + [f"{key}: {_short(text)}, whose value {said}" for key, text in same.items()]

    def _from_variables(self) -> dict[str, str]:
        """The texts with variables that decide numbers, by key.

        Of model files, the content decides.
        """
        texts = {".".join(map(str, place)): text for place, text in self._spec.texts.items()}
        passed_over = (*_DECIDES_NOTHING, "model.path", "model.weights")
        return {key: text for key, text in texts.items() if not _is_below(key, passed_over)}

    def _step(self, mode: Mode, run: str) -> dict[str, Any]:
        spec = self._spec
        others = [] if mode in ("new", "whole") else [f for f in self.fingerprints if f != spec.fingerprint]
        return {
            "task": _TASK,
            "mode": mode,
            "run": run,
            "time": now(),
            "fingerprint": spec.fingerprint,
            "fingerprints": [*others, spec.fingerprint],
            "roi": [list(corner) for corner in spec.grid.roi.corners],
            "numerics": NUMERICS_VERSION,
            "digests": digests(spec),
            "spec": spec_record(spec),
        }


def check_claim(spec: VolumeSpec) -> None:
    """Make sure that an output layer is a spec's own to write to. Reads one small file.

    Raises:
        SpecError: This spec is not the one that has claimed the output layer last.
        StorageError: The file is not JSON; other programs write it too, and not all in one step.
    """
    history = History(spec)
    if history.fingerprint == spec.fingerprint:
        return
    if not history.readable:
        raise StorageError(f"the provenance of {spec.output.path} can't be read: it is being written, or damaged")
    if history.fingerprint is None:
        raise SpecError(
            f"output.path: {spec.output.path} does not say whose it is; run `chunkflow-core prepare SPEC` first"
        )
    raise SpecError(
        f"output.path: {spec.output.path} is claimed for fingerprint {history.fingerprint} (since "
        f"{history.last.get('time', '?')}, by {history.by or '?'}), this spec is of {spec.fingerprint}: another one "
        "has taken it over, or this one was changed since. `chunkflow-core prepare SPEC`, or a new run in Airflow, "
        "tells what differs and what can be done about it"
    )


def digests(spec: VolumeSpec) -> dict[str, str]:
    """SHA-256 of each file that makes the model, in hexadecimal, by name.

    Names are relative to the spec's folder where the files are there.
    """
    found: dict[str, str] = {}
    for path in spec.model_files:
        name = str(path.relative_to(spec.folder) if path.is_relative_to(spec.folder) else path.name)
        with path.open("rb") as file:
            found[str(path) if name in found else name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {conceal(name): digest for name, digest in found.items()}


def spec_record(spec: VolumeSpec) -> dict[str, Any]:
    """The spec for JSON, without what may be secret, as layers are public.

    What came from variables is as the file has it. Left out are the values of pods' environment
    variables, and a notifier's arguments.
    """
    values = spec.model_dump(mode="json", exclude={"runner": {"env"}, "notify": {"arguments"}})
    record: dict[str, Any] = put_back(values, spec.texts)
    return record


def user() -> str:
    """Who runs this process: a name, or a number in containers that have no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _parse(text: bytes | None) -> dict[str, Any]:
    """A provenance that CloudVolume takes, with all that can be read of this one."""
    try:
        content = json.loads(text or b"{}")
    except ValueError:
        content = {}
    known = content if isinstance(content, dict) else {}
    kinds = {"owners": str, "processing": dict, "sources": str}
    lists = {
        key: [item for item in known[key] if isinstance(item, kind)] if isinstance(known.get(key), list) else []
        for key, kind in kinds.items()
    }
    return {"description": "", **known, **lists}


def _facts(step: dict[str, Any]) -> dict[str, str]:
    """What of a step decides numbers, as text."""
    start, files = (step.get("roi") or [None])[0], step.get("digests") or {}
    return {
        **dict(_decisive(step.get("spec"))),
        **{f"model file {name}": f"sha256 {digest[:16]}…" for name, digest in files.items()},
        "start of the ROI": json.dumps(start),
        "numerics": str(step.get("numerics")),
    }


def _decisive(section: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a spec that decide numbers, ``key.sub``, and their values.

    Keys that are not set are left out.
    """
    if isinstance(section, dict):
        for name, value in section.items():
            key = f"{prefix}{name}"
            if key in _DECIDES_NOTHING or value is None:
                continue
            if isinstance(value, dict):
                yield from _decisive(value, f"{key}.")
            else:
                yield key, value if isinstance(value, str) else json.dumps(value)


def _is_below(key: str, others: Iterable[str]) -> bool:
    """Whether a key is one of others, or below one of them."""
    return any(key == other or key.startswith(f"{other}.") for other in others)


def _short(text: str) -> str:
    told = conceal(text)  # of a value that is cut short, a part would stay
    return told if len(told) <= 80 else f"{told[:79]}…"
