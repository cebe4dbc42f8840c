"""Oracle for what is done and what is due: an account of a volume's history.

It keeps arrays, not digests: what each block has read last, what it gave to whom, what each
blending got, what each stage wrote. From those it finds by brute force what a run has to do. It
shares no code with ``chunkflow_core``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.oracle import exchange, numbers, output
from tests.support.oracle.geometry import Case, Index
from tests.support.oracle.numbers import Inferred
from tests.support.oracle.volume import Volume


class Done(NamedTuple):
    """A stage of a block, as an attempt has done it that wrote its receipt."""

    file: Path
    """The receipt."""
    receipt: bytes
    read: Any
    """What was read, or what each donor gave."""
    inferred: Inferred | None
    """Inference only."""
    chunks: dict[str, bytes]
    """Voxels of each storage chunk that it wrote, by name."""
    donations: dict[Path, bytes]
    """Files that it left."""
    ended: float
    """When, in seconds."""


@dataclass
class Account:
    """What has been done with one model, by the receipts that are there."""

    receipts: dict[tuple[str, Index], dict[str, Done]] = field(default_factory=dict)
    """For each stage of each block, who has done it, by the receipt's name."""

    def of(self, stage: str) -> dict[Index, Done]:
        """The blocks of which a stage is done: all receipts of it say the same."""
        found = {}
        for index in [index for name, index in self.receipts if name == stage]:
            done = [done for _, done in sorted(self.receipts[stage, index].items())]
            if done and _agree(done):
                found[index] = done[-1]
        return found

    @property
    def inferred(self) -> dict[Index, Inferred]:
        """What each block's inference gave."""
        return {index: done.inferred for index, done in self.of("infer").items() if done.inferred is not None}

    @property
    def blended(self) -> dict[Index, dict[Index, Any]]:
        """For each block that was blended, what each donor gave it."""
        return {index: done.read for index, done in self.of("blend").items()}


class Due(NamedTuple):
    """What a run has to do."""

    infer: set[Index]
    blend: set[Index]
    blended: set[Index]
    """Those of ``blend`` that turn out to have got something else than before."""


class World(Volume):
    """The volume on disk, and the account of it."""

    def __init__(self, case: Case, folder: Path) -> None:
        super().__init__(case, folder)
        self.accounts = [Account(), Account()]
        self.claimed = -1
        """The model whose output it is."""
        self.attempts: list[tuple[int, str, Index, Done]] = []
        """All that was ever done: model, stage, block."""
        self._known: tuple[Any, dict[Index, Inferred]] = None, {}

    @property
    def account(self) -> Account:
        """The account of the model that is used now."""
        return self.accounts[self.model]

    @property
    def exchange(self) -> Path:
        """The folder of the model that is used now, in the epoch that holds."""
        fingerprint, claims = self.spec().fingerprint, sorted((self.folder / "output" / "claims").glob("*.json"))
        last = json.loads(claims[-1].read_text())["method"] if claims else {}
        epoch = last["epoch"] if last.get("fingerprint") == fingerprint else "of nobody"
        return self.folder / "exchange" / fingerprint / epoch

    def donations(self) -> set[str]:
        """Names of all donations that the model that is used now has left."""
        return {file.name for file in exchange.donations(self.exchange)}

    def current(self) -> dict[Index, Inferred]:
        """What the inference of each block would be now."""
        state = self.case, self.model, self.clock
        if self._known[0] != state:
            self._known = state, numbers.infer(self.geometry, self.layers, self.model)
        return self._known[1]

    def expected(self, inferred: dict[Index, Inferred], receiver: Index) -> Any:
        """A block's output (czyx), from inference of it and all that give it something."""
        return numbers.blend(self.geometry, inferred, receiver)

    def damaged(self) -> set[tuple[str, Index]]:
        """Stages of blocks whose storage chunks are not what was written."""
        there = output.stored(self.folder / "output")
        return {
            (stage, index)
            for stage in ("infer", "blend")
            for index, done in self.account.of(stage).items()
            if any(there.get(name) != voxels for name, voxels in done.chunks.items())
        }

    def is_valid(self, index: Index) -> bool:
        """Whether a block has been inferred as what it is now."""
        done = self.account.inferred.get(index)
        return done is not None and done.read.axes == self.geometry.blocks[index]

    def has_consumed(self, receiver: Index) -> bool:
        """Whether a block has been blended from what its donors have given last."""
        consumed, done = self.account.blended.get(receiver), self.account.inferred
        donors = self.geometry.donors[receiver]
        return (
            consumed is not None
            and all(self.is_valid(d) for d in donors)
            and {d: numbers.given(self.geometry, done, d, receiver) for d in donors} == consumed
        )

    def is_complete(self, receiver: Index) -> bool:
        """Whether nothing of a block's output has still to be inferred or blended."""
        donors = {*self.geometry.donors[receiver], receiver}
        return all(map(self.is_valid, donors)) and (len(donors) == 1 or self.has_consumed(receiver))

    def due(self, requested: set[Index], *, force: bool, check: bool) -> Due:
        """The least that a run has to do.

        Found by looking at all blocks again and again, until nothing is added.

        Args:
            requested: The blocks that the run is asked for.
            force: Whether those are to be done again.
            check: Whether the run looks for changes of the input.
        """
        done, now, blocks, donors = self.account, self.current(), self.geometry.blocks, self.geometry.donors
        valid = {b for b in blocks if self.is_valid(b)}
        other = {b for b in blocks if b not in valid or now[b].read != done.inferred[b].read}
        left = self._counts(file.name for by in done.of("infer").values() for file in by.donations)
        there = self._counts(self.donations())
        gone = {(d, r) for r in blocks for d in donors[r] if d not in valid or 0 < left[d, r] != there[d, r]}
        damaged = self.damaged()
        behind = {r for r in blocks if donors[r] and not self.has_consumed(r)}
        decisive = requested.union(*(donors[r] for r in requested))
        infer, changing, blend = set[Index](), set[Index](), set[Index]()
        while True:
            before = len(infer), len(changing), len(blend)
            for b in blocks:
                asked = b in requested and (b not in valid or force)
                asked |= check and b in decisive & valid & other
                needed = any((b, r) in gone for r in blend)
                overwritten = check and b in requested & valid and ("infer", b) in damaged
                if asked or needed or overwritten:
                    infer.add(b)
                if asked or (needed and b in other):
                    changing.add(b)
            for r in blocks:
                touched = not changing.isdisjoint(donors[r])
                overwritten = check and ("blend", r) in damaged
                if r in requested and donors[r] and (touched or overwritten or r in behind):
                    blend.add(r)
                near = not decisive.union(*(donors[other] for other in blend)).isdisjoint(donors[r])
                if r in done.blended and (touched or (near and r in behind)):
                    blend.add(r)
            if before == (len(infer), len(changing), len(blend)):
                break
        after = done.inferred | {b: now[b] for b in infer}
        forced = requested & valid if force else set()
        same = {r for r in blend - forced if self._consumed(after, r) == done.blended.get(r)}
        blended = {r for r in blend if r not in same or ("blend", r) in damaged}
        return Due(infer, blend, blended)

    def spent(self, before: float) -> set[str]:
        """Donations that nobody needs any more, of blocks blended before a time in seconds."""
        ended = {r: done.ended for r, done in self.account.of("blend").items() if self.has_consumed(r)}
        receivers = {name: exchange.receiver_of(name, self.geometry) for name in self.donations()}
        return {name for name, receiver in receivers.items() if receiver in ended and ended[receiver] < before}

    def claim(self) -> None:
        """Note that the output is now the model's; it had been the other's if it was not."""
        if self.claimed != self.model:
            self.account.receipts.clear()
        self.claimed = self.model

    def overwrite(self, number: int, seed: int | None) -> None:
        """Let somebody write to one of the storage chunks there are; with seed 0 the same again.

        With no seed, it is deleted.
        """
        folder = self.folder / "output"
        there = [(name, voxels) for name, voxels in output.stored(folder).items() if name in self.geometry.chunks]
        if not there:
            return
        name, voxels = there[number % len(there)]
        if seed is None:
            output.delete(folder, name)
        else:
            noise = np.random.default_rng(seed).integers(0, 256, len(voxels), dtype=np.uint8)
            output.write(folder, name, (np.frombuffer(voxels, np.uint8) ^ noise).tobytes() if seed else voxels)

    def end_late(self, number: int, seed: int, *, receipt: bool) -> None:
        """Let an attempt of earlier do the last of its work now: some storage chunks, its receipt.

        Attempts are counted from the last. A receipt of before the ROI grew is left out: beside
        that of what the block is now it decides nothing, but ``verify`` tells of it.
        """
        if not self.attempts:
            return
        model, stage, index, done = self.attempts[-1 - number % len(self.attempts)]
        for name in exchange.some(done.chunks, seed):
            if name in self.geometry.chunks:
                output.write(self.folder / "output", name, done.chunks[name])
        box = tuple(axis.stop for axis in self.geometry.blocks[index])
        if not receipt or exchange.corners(done.file.name)[1] != box:
            return
        if stage == "infer":  # its donations have come before, and all others of the block are deleted then
            for file in exchange.donations(done.file.parents[3]):
                if exchange.donor_of(file.name, self.geometry) == index:
                    file.unlink()
            for file, content in done.donations.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        done.file.parent.mkdir(parents=True, exist_ok=True)
        done.file.write_bytes(done.receipt)
        if done.file.is_relative_to(self.exchange):  # what is left in another epoch counts for nothing
            self.accounts[model].receipts.setdefault((stage, index), {})[done.file.name] = done

    def note(self, run: str, now: float) -> None:
        """Note what a run has done until a time in seconds, and what is gone."""
        receipts, found = self.account.receipts, exchange.receipts(self.exchange, self.geometry)
        void = exchange.void(self.exchange, self.geometry)
        for at, several in receipts.items():
            if at in void:
                receipts[at] = {}
                continue
            there = {name: done for name, done in several.items() if done.file in found.get(at, {})}
            if not _agree(several.values()) and len(there) < len(several):
                # One that is left would count again, with the donations of the other.
                for name in [name for name, done in there.items() if found[at][done.file] != run]:
                    there[name].file.unlink()
                    del found[at][there.pop(name).file]
            receipts[at] = there
        for at in sorted(found, reverse=True):  # inference first
            for file in [file for file, by in found[at].items() if by == run]:
                done = self._done(*at, file, now)
                receipts.setdefault(at, {})[file.name] = done
                self.attempts.append((self.model, *at, done))

    def _done(self, stage: str, index: Index, file: Path, now: float) -> Done:
        """What an attempt has done that has just ended, in nobody's way."""
        there, names = output.stored(self.folder / "output"), self.geometry.chunks.items()
        chunks = {name: there[name] for name, by in names if by == (stage, index)}
        if stage == "blend":
            return Done(file, file.read_bytes(), self._consumed(self.account.inferred, index), None, chunks, {}, now)
        inferred = self.current()[index]
        left = exchange.donations(self.exchange)
        donations = {file: file.read_bytes() for file in left if exchange.donor_of(file.name, self.geometry) == index}
        return Done(file, file.read_bytes(), inferred.read, inferred, chunks, donations, now)

    def _counts(self, donations: Iterable[str]) -> Counter[tuple[Index, Index]]:
        """Number of donations by donor and receiver."""
        geometry = self.geometry
        return Counter((exchange.donor_of(name, geometry), exchange.receiver_of(name, geometry)) for name in donations)

    def _consumed(self, inferred: dict[Index, Inferred], receiver: Index) -> Any:
        """What a block would be blended from: what its donors gave, and the mask as it is now."""
        geometry = self.geometry
        given = {donor: numbers.given(geometry, inferred, donor, receiver) for donor in geometry.donors[receiver]}
        mask = numbers.given(geometry, self.current(), receiver, receiver)[2]
        return given | {receiver: (*given[receiver][:2], mask)}


def _agree(several: Collection[Done]) -> bool:
    """Whether attempts have read the same; then they have done the same."""
    return all(a.read == b.read for a, b in pairwise(several))
