"""What has become of an output layer: its claims, and CloudVolume's ``provenance`` file.

Each claim (``exchange/claims.py``) is a step: which spec has taken the layer, how, and for which
ROI. The provenance file repeats them for people and other programs, with ``by`` and ``method``; it
decides nothing, since other programs write it too. Only of a layer that nobody has claimed, of an
earlier version or a copy, it tells whose voxels are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from chunkflow_core.exchange.claims import Claim, Claims
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.lattice.weights import NUMERICS_VERSION
from chunkflow_core.machine import user
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
    """What has become of an output layer, as it is when this is made."""

    def __init__(self, spec: VolumeSpec) -> None:
        """Read the last claim on a spec's output; ``StorageError`` if storage does not answer."""
        self._spec, self._claims = spec, Claims(spec)
        self.claim: Claim | None = self._claims.last()
        """The claim that holds; None if nobody has claimed the layer."""
        ours = [] if self.claim else [step for step in _provenance(spec)["processing"] if _is_ours(step)]
        self.by: str = self.claim.by if self.claim else str(ours[-1].get("by", "")) if ours else ""
        """User who has made the last step."""
        self.last: dict[str, Any] = self.claim.step if self.claim else ours[-1]["method"] if ours else {}
        """What the last step says; empty if there is none."""

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the spec that has taken the layer last; None if unknown."""
        return self.last.get("fingerprint")

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprints of all specs whose voxels may be in the layer."""
        known = self.last.get("fingerprints")
        return list(known) if isinstance(known, list) else [self.fingerprint] if self.fingerprint else []

    def is_of(self, roi: Box) -> bool:
        """Whether the last step was made for this ROI."""
        return self.last.get("roi") == [list(corner) for corner in roi.corners]

    @property
    def is_own(self) -> bool:
        """Whether a claim says that the layer is this spec's."""
        return self.claim is not None and self.claim.fingerprint == self._spec.fingerprint

    def add(self, mode: Mode, run: str, epoch: str = "") -> None:
        """Claim the layer for this spec; :meth:`tell` tells it in the layer's provenance.

        Args:
            mode: Why there is a step.
            run: Name of the run that makes it.
            epoch: Name of the epoch that begins; default: the last one goes on.

        Raises:
            StorageError: Somebody else has claimed it meanwhile, or storage does not answer.
        """
        step = self._step(mode, run) | {"epoch": epoch or str(self.last["epoch"])}
        self.claim = self._claims.add(self.claim, user(), step)
        self.by, self.last = self.claim.by, self.claim.step

    def tell(self) -> None:
        """Tell in the layer's provenance of all claims that it doesn't have yet.

        Two that write it at once may lose what one of them has written: the next one tells it.
        """
        content, known = _provenance(self._spec), set[int]()
        for step in filter(_is_ours, content["processing"]):
            known.add(step["method"].get("claim", 0))
        missing = self._claims.others_than(known)
        if not missing:
            return
        content["processing"] += [{"by": claim.by, "method": claim.step | {"claim": claim.number}} for claim in missing]
        path, source = self._spec.input.path, self._spec.written("input")
        if path != source:  # a layer is made with the path itself
            content["sources"] = [known for known in content["sources"] if known != path]
            content["description"] = str(content["description"]).replace(path, source)
        if source not in content["sources"]:
            content["sources"].append(source)
        put_file(plain(self._spec.output.path), "provenance", json.dumps(content, indent=2).encode())

    def differences(self) -> list[str]:
        """What differs in this spec from the one that has taken the layer last, line by line.

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
    variables, a notifier's arguments, and keys that older records don't have and that are not set.
    """
    values = spec.model_dump(mode="json", exclude={"runner": {"env"}, "notify": {"arguments"}, **spec.unset_later})
    record: dict[str, Any] = put_back(values, spec.texts)
    return record


def now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _provenance(spec: VolumeSpec) -> dict[str, Any]:
    """The provenance of a spec's output; an empty one if there is none that can be read."""
    with storage_errors(f"reading the provenance of {spec.output.path}"):
        return _parse(layer_files(spec.output.path).get("provenance"))


def _is_ours(step: dict[str, Any]) -> bool:
    """Whether a step in a provenance is of this project."""
    return isinstance(step.get("method"), dict) and step["method"].get("task") == _TASK


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
