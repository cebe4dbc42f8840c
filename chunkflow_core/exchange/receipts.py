"""Receipts: what a stage of a block says when it is complete, and that as a file."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from chunkflow_core.exchange.marks import (
    BlendingMark,
    InferenceMark,
    Mark,
    Stage,
    consumed_digest,
    given_places,
)
from chunkflow_core.lattice.boxes import Vector, vector
from chunkflow_core.storage.digests import checksum, short_digest
from chunkflow_core.storage.signatures import WrittenChunk


@dataclass(frozen=True, slots=True)
class DonationEntry:
    """What a receipt says of one donation."""

    key: str
    receiver: Vector
    checksum: str | None
    """Checksum of the stored file; None if all sums are zero, then nothing is stored."""
    bytes: int


@dataclass(frozen=True)
class Receipt:
    """Proof that one stage of one block is complete."""

    stage: Stage
    block: Vector
    box: str
    """Range of the block, xyz: see ``Box.key``."""
    fingerprint: str
    geometry: str
    """``VolumeSpec.block_digest`` of the block."""
    run: str
    """Name of the run that made the receipt."""
    patches: int = 0
    """Number of patches that were run, not skipped."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of patches that were not run, by reason."""
    donations: tuple[DonationEntry, ...] = ()
    consumed: dict[str, str] = field(default_factory=dict)
    """Range of each donor → digest of what it gave; blend only.

    Donors are in the order of ``BlockGrid.donors``.
    """
    signature: str = ""
    """What storage said of the input's storage chunks before they were read; infer only.

    Empty if storage could not tell.
    """
    content: str = ""
    """Digest of all input that decided a number; infer only.

    It covers voxels as they were read, with padding and halo, and the mask.
    """
    mask: str = ""
    """Digest of the mask over the block's frame, empty if there is none; infer only."""
    written: dict[str, WrittenChunk] = field(default_factory=dict)
    """Names of the storage chunks written → what is known of each."""
    stored: str = ""
    """Digest of what storage said of all storage chunks when they were written.

    Empty if storage did not tell.
    """
    changes: tuple[str, ...] = ()
    """Names of the latest runs in which ``written`` has changed, the last first.

    A run before which there was no receipt counts as one.
    """
    facts: dict[str, Any] = field(default_factory=dict)
    """Timings in seconds, host, versions: for people, never decisive."""

    def given(self, receiver: Vector, mask: str | None = None) -> str:
        """Digest of all that this block donated to one receiver.

        Its own blending also applies the mask.

        Args:
            receiver: Index of the receiver, zyx.
            mask: Digest of the mask over the block's frame; default: of the mask that inference has
                read.
        """
        entries = sorted((e.key, e.checksum) for e in self.donations if e.receiver == receiver)
        own = (self.mask if mask is None else mask) if receiver == self.block else ""
        return short_digest(json.dumps([self.geometry, own, entries]).encode())

    @property
    def mark(self) -> Mark:
        """What the receipt's name says."""
        if self.stage == "blend":
            return BlendingMark(self.geometry, self.stored, consumed_digest(self.consumed.values()))
        stored = Counter(e.receiver for e in self.donations if e.checksum is not None)
        receivers = {e.receiver for e in self.donations}
        given = {receiver: (self.given(receiver), stored[receiver]) for receiver in receivers}
        return InferenceMark(self.geometry, self.stored, self.signature, given_places(self.block, given))

    @property
    def voxels(self) -> dict[str, str]:
        """Names of the storage chunks written → digests of their voxels."""
        return {name: chunk.voxels for name, chunk in self.written.items()}

    @property
    def storage_chunks(self) -> int:
        """Number of storage chunks that the stage has written."""
        return len(self.written)

    @property
    def name(self) -> str:
        """Name of the receipt's file within its group's folder."""
        return f"{self.box}%{self.mark.text}.json"

    def pack(self) -> bytes:
        """The receipt as a file (JSON), with a checksum."""
        fields = asdict(self)
        return json.dumps({"checksum": checksum(json.dumps(fields).encode()), "receipt": fields}, indent=1).encode()


def unpack(content: bytes | None, fingerprint: str) -> Receipt | None:
    """The receipt in a file; None if there is none that is intact and of this fingerprint."""
    if content is None:
        return None
    try:
        record = json.loads(content)
        fields = record["receipt"]
        if checksum(json.dumps(fields).encode()) != record["checksum"] or fields["fingerprint"] != fingerprint:
            return None
        entries = tuple(DonationEntry(**{**e, "receiver": vector(e["receiver"])}) for e in fields["donations"])
        written = {name: WrittenChunk(*chunk) for name, chunk in fields["written"].items()}
        lists = {"block": vector(fields["block"]), "changes": tuple(fields["changes"]), "donations": entries}
        return Receipt(**{**fields, **lists, "written": written})
    except (ValueError, KeyError, TypeError):
        return None


def why_not(content: bytes, fingerprint: str) -> str:
    """What is wrong with a file that :func:`unpack` doesn't take."""
    with suppress(ValueError, KeyError, TypeError):
        its = json.loads(content)["receipt"]["fingerprint"]
        if its != fingerprint:
            return f"it is of another fingerprint, {its}"
    return "it is not intact"
