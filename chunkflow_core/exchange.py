"""Donations and receipts: what blocks leave for each other in shared storage.

Layout below ``<exchange>/<fingerprint>/``::

    donations/<block-range>%<box-range>     weighted partial sums, self-describing, checksummed, compressed
    receipts/infer/<block-range>.json       written last by inference-and-donate
    receipts/blend/<block-range>.json       written last by receive-and-blend
    trial.json                              what prepare has measured, for estimates

Files on a local disk are replaced in one step, so that a second attempt never shows a reader half a file. Object stores do
that by themselves.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.geometry import Box, Vector, vector
from chunkflow_core.lattice import Donation
from chunkflow_core.object_stores import open_files
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage import PARTIAL, put_file, storage_errors

Stage = Literal["infer", "blend"]
STAGES: tuple[Stage, Stage] = ("infer", "blend")

_MAGIC = b"CFDONATE"
_TRIAL = "trial.json"


@dataclass(frozen=True, slots=True)
class DonationEntry:
    """What a receipt says of one donation."""

    key: str
    receiver: Vector
    checksum: str | None
    """Of the stored file; None if all sums are zero, then nothing is stored."""
    bytes: int


@dataclass(frozen=True)
class Receipt:
    """Proof that one stage of one block is complete."""

    stage: Stage
    block: Vector
    box: str
    """Range of the block, xyz."""
    fingerprint: str
    geometry: str
    """``VolumeSpec.block_digest`` of the block."""
    run: str
    """The run that made it."""
    patches: int = 0
    """Run, not skipped."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Patches that were not run, by reason."""
    donations: tuple[DonationEntry, ...] = ()
    consumed: dict[str, str] = field(default_factory=dict)
    """For blend: range of each donor → digest of what it gave."""
    storage_chunks: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    """Timings in seconds, host, versions: for people, never decisive."""

    def given(self, receiver: Vector) -> str:
        """Digest of all that this block donated to one receiver."""
        entries = sorted((e.key, e.checksum) for e in self.donations if e.receiver == receiver)
        return _hash(json.dumps([self.geometry, entries]).encode())


@dataclass(frozen=True, slots=True)
class Trial:
    """What one patch took when it was tried out: for estimates, never decisive."""

    seconds: float
    """Per patch, with all streams busy."""
    process_bytes: int
    """Peak memory of the process: interpreter, libraries, network."""
    streams: int
    """Patches at a time."""


def pack(donation: Donation, payload: bytes, channels: int, fingerprint: str) -> tuple[bytes, str]:
    """A donation as a file, and its checksum: magic, header length, header (JSON), payload.

    The header has the payload's checksum, so the header's is that of the whole file.

    Args:
        donation: what it is.
        payload: its sums, compressed.
        channels: of the sums.
        fingerprint: of the spec.
    """
    header = {"payload": _hash(payload), **_header(donation, channels, fingerprint)}
    text = json.dumps(header, sort_keys=True).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, payload]), _hash(text)


def unpack(data: bytes, donation: Donation, channels: int, fingerprint: str, checksum: str) -> bytes:
    """The payload of a donation file; ``DataError`` unless it is intact and exactly the donation that is expected."""
    try:
        if data[:8] != _MAGIC:
            raise ValueError("it does not begin as a donation (truncated, corrupt or foreign)")
        (length,) = struct.unpack_from("<I", data, 8)
        text, payload = data[12 : 12 + length], data[12 + length :]
        header = json.loads(text)
        if header["payload"] != _hash(payload):
            raise ValueError("the checksum of its content does not match (truncated or corrupt)")
        for name, value in _header(donation, channels, fingerprint).items():
            if header[name] != value:
                raise ValueError(f"its {name} is {header[name]}, expected {value} (a foreign donation)")
        if _hash(text) != checksum:
            raise ValueError("its checksum does not match the block's receipt (an older or foreign donation)")
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"donation {donation.key} can't be used: {error}") from error
    return payload


def _header(donation: Donation, channels: int, fingerprint: str) -> dict[str, Any]:
    return {
        "donor": list(donation.donor),
        "receiver": list(donation.receiver),
        "key": donation.key,
        "fingerprint": fingerprint,
        "format": "split float32 zstandard",
        "shape": [channels, *donation.box.shape],
    }


class Exchange:
    """The folder of one fingerprint in the exchange."""

    def __init__(self, spec: VolumeSpec) -> None:
        """Open it; nothing is read or written yet."""
        self.fingerprint, self.spec = spec.fingerprint, spec
        self.path = f"{spec.exchange.path.removeprefix('precomputed://').rstrip('/')}/{self.fingerprint}"
        self._files = open_files(self.path)

    def put_donation(self, donation: Donation, payload: bytes | None) -> DonationEntry:
        """Store a donation, given its compressed sums, or None if all are zero; its entry for the receipt."""
        if payload is None:
            return DonationEntry(donation.key, donation.receiver, None, 0)
        data, checksum = pack(donation, payload, self.spec.output.channels, self.fingerprint)
        put_file(self.path, f"donations/{donation.key}", data)
        return DonationEntry(donation.key, donation.receiver, checksum, len(data))

    def get_donations(self, wanted: Iterable[tuple[Donation, DonationEntry]]) -> dict[str, bytes]:
        """Fetch donations: their compressed sums, by key; those that are all zeros are left out. All are checked.

        Raises:
            MissingInputError: one isn't there.
            DataError: one is not what its donor wrote.
        """
        entries = {d.key: (d, e.checksum) for d, e in wanted if e.checksum is not None}
        with storage_errors(f"fetching donations from {self.path}"):
            answers = self._files.get([f"donations/{key}" for key in entries], raise_errors=True)
        found: dict[str, bytes] = {}
        for answer in answers:
            key, content = answer["path"].removeprefix("donations/"), answer["content"]
            donation, checksum = entries[key]
            if content is None:
                raise MissingInputError(f"donation {key} is missing in {self.path}. {self.remedy(donation.donor)}")
            try:
                found[key] = unpack(content, donation, self.spec.output.channels, self.fingerprint, checksum)
            except DataError as error:
                raise DataError(f"{error}. {self.remedy(donation.donor)}") from error
        return found

    def remedy(self, donor: Vector) -> str:
        """What a user can do when a block's donation is missing or wrong."""
        index = " ".join(map(str, donor))
        return (
            f"Run its donor, block {donor}, again: python -m chunkflow_core.inference_and_donate SPEC --block {index} "
            f"--force (in Airflow: trigger the volume with force on that block's bounding box)"
        )

    def has_donations(self, receipt: Receipt) -> bool:
        """Whether all donations of a receipt are still there, in their full size."""
        sizes = {f"donations/{entry.key}": entry.bytes for entry in receipt.donations if entry.checksum is not None}
        with storage_errors(f"looking for donations in {self.path}"):
            return not sizes or dict(self._files.size(list(sizes))) == sizes

    def donation_keys(self) -> set[str]:
        """Keys of all donations there are."""
        return {name.removeprefix("donations/") for name in self._list("donations/")}

    def delete_donations(self, keys: Iterable[str]) -> None:
        """Delete donations; those that aren't there are passed over."""
        with storage_errors(f"deleting donations in {self.path}"):
            self._files.delete([f"donations/{key}" for key in keys])

    def put_receipt(self, receipt: Receipt) -> None:
        """Store a receipt: the block's stage is complete from here on."""
        content = json.dumps(asdict(receipt), sort_keys=True)
        text = json.dumps(
            {"checksum": _hash(content.encode()), "receipt": json.loads(content)}, sort_keys=True, indent=1
        )
        put_file(self.path, _receipt_name(receipt.stage, receipt.box), text.encode())

    def receipt(self, stage: Stage, box: Box) -> Receipt | None:
        """The receipt of a block's stage; None if there is none, or none that is intact and of this fingerprint."""
        with storage_errors(f"reading receipts in {self.path}"):
            content = self._files.get(_receipt_name(stage, box.key))
        return self._parse(content)

    def receipts(self, stage: Stage) -> dict[Vector, Receipt]:
        """All intact receipts of a stage, by block index; not those of a block that has another box since the ROI grew."""
        names = [name for name in self._list(f"receipts/{stage}/") if name.endswith(".json")]
        grid = self.spec.grid
        with storage_errors(f"reading receipts in {self.path}"):
            answers = self._files.get(names) if names else []
        parsed = (self._parse(answer["content"]) for answer in answers)
        return {r.block: r for r in parsed if r and r.block in grid and grid.block(r.block).box.key == r.box}

    def delete_receipts(self) -> int:
        """Delete all receipts, blends first, and return how many there were."""
        names = self._list("receipts/blend/") + self._list("receipts/infer/")
        with storage_errors(f"deleting receipts in {self.path}"):
            self._files.delete(names)
        return len(names)

    def put_trial(self, trial: Trial) -> None:
        """Store what ``prepare`` has measured."""
        put_file(self.path, _TRIAL, json.dumps(asdict(trial)).encode())

    def trial(self) -> Trial | None:
        """What ``prepare`` has measured; None if it has not run yet."""
        with storage_errors(f"reading {self.path}/{_TRIAL}"):
            content = self._files.get(_TRIAL)
        with suppress(ValueError, TypeError):
            return Trial(**json.loads(content or b""))
        return None

    def _list(self, prefix: str) -> list[str]:
        with storage_errors(f"listing {self.path}/{prefix}"):
            return [name for name in self._files.list(prefix=prefix) if not name.endswith(PARTIAL)]

    def _parse(self, content: bytes | None) -> Receipt | None:
        if content is None:
            return None
        try:
            record = json.loads(content)
            fields = record["receipt"]
            if _hash(json.dumps(fields, sort_keys=True).encode()) != record["checksum"]:
                return None
            if fields["fingerprint"] != self.fingerprint:
                return None
            entries = tuple(DonationEntry(**{**e, "receiver": vector(e["receiver"])}) for e in fields["donations"])
            return Receipt(**{**fields, "block": vector(fields["block"]), "donations": entries})
        except (ValueError, KeyError, TypeError):
            return None


def _receipt_name(stage: Stage, box_key: str) -> str:
    return f"receipts/{stage}/{box_key}.json"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]  # processors have instructions for it
