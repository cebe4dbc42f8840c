"""Whose an output layer is: claims, of which the last one holds.

They are a journal beside the layer, ``<output>/claims/00000001.json`` and so on. ``prepare`` adds
one when it takes the layer for a spec, or extends it. All that a spec's blocks leave in the
exchange belongs to an *epoch*, which begins when the spec takes the layer, and ends when another
one does, or the layer is made anew. Nothing of an earlier epoch counts, whenever it was written:
it is in another folder.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.journal import Entry, Journal

FOLDER: Final = "claims"
"""The folder of the claims in an output layer."""


@dataclass(frozen=True)
class Claim:
    """What a claim says."""

    entry: Entry

    @property
    def number(self) -> int:
        """Its number, from 1."""
        return self.entry.number

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the spec whose the layer is."""
        return str(self.step.get("fingerprint", ""))

    @property
    def epoch(self) -> str:
        """Name of the epoch."""
        return str(self.step.get("epoch", ""))

    @property
    def by(self) -> str:
        """User who has made it."""
        return str(self.entry.content.get("by", ""))

    @property
    def step(self) -> dict[str, Any]:
        """What has been done, as the layer's provenance has it in ``method``."""
        method = self.entry.content.get("method")
        return method if isinstance(method, dict) else {}


class Claims:
    """The claims on the output layer of a spec.

    What reads or writes raises ``StorageError`` if the storage does not answer, or a claim can't be
    read, and ``SpecError`` if it refuses the credentials.
    """

    def __init__(self, spec: VolumeSpec) -> None:
        """Read nothing yet."""
        self._spec, self._journal = spec, Journal(plain(spec.output.path), FOLDER)

    def last(self) -> Claim | None:
        """The claim that holds; None if nobody has claimed the layer."""
        entry = self._journal.last()
        return Claim(entry) if entry else None

    def others_than(self, numbers: Iterable[int]) -> list[Claim]:
        """All claims but those with some numbers, in order."""
        known = set(numbers)
        wanted = [number for number in self._journal.numbers() if number not in known]
        return [Claim(entry) for entry in self._journal.read(wanted).values()] if wanted else []

    def add(self, after: Claim | None, by: str, step: dict[str, Any]) -> Claim:
        """Add a claim.

        Args:
            after: The one that has been the last; None if there was none.
            by: User who makes it.
            step: What is done, with ``epoch`` and ``fingerprint``.

        Raises:
            StorageError: Somebody else has added one meanwhile.
        """
        unique = {"by": by, "method": step, "token": secrets.token_hex(16)}
        return Claim(self._journal.add(after.entry if after else None, unique))

    def own(self) -> Claim | None:
        """The claim that holds, if it is one of this spec; else None."""
        last = self.last()
        return last if last and last.fingerprint == self._spec.fingerprint else None

    def check(self, held: Claim | None, epoch: str) -> Claim:
        """Make sure that the layer is still the spec's own to write to.

        Args:
            held: The spec's own claim as it was last; None if it has not been looked up.
            epoch: Name of the epoch that is being worked in.

        Returns:
            The spec's own claim that holds now: the layer may have been extended meanwhile.

        Raises:
            SpecError: The layer is somebody else's, or nobody's, or another epoch has begun.
        """
        entry = self._journal.after(held.entry) if held else self._journal.last()
        claim, path = Claim(entry) if entry else None, self._spec.output.path
        if claim is not None and claim.epoch == epoch:
            return claim
        if claim is None:
            raise SpecError(f"output.path: {path} does not say whose it is; run `chunkflow-core prepare SPEC` first")
        since = f"(since {claim.step.get('time', '?')}, by {claim.by or '?'}, run {claim.step.get('run') or '?'})"
        if claim.fingerprint == self._spec.fingerprint:
            raise SpecError(
                f"output.path: {path} has been taken anew for the same spec {since}: all that was done before is done "
                "again, so this task writes nothing more. Start the run again"
            )
        raise SpecError(
            f"output.path: {path} is claimed for fingerprint {claim.fingerprint} {since}, this spec is of "
            f"{self._spec.fingerprint}: another one has taken it over, or this one was changed since. `chunkflow-core "
            "prepare SPEC`, or a new run in Airflow, tells what differs and what can be done about it"
        )
