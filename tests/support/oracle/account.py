"""Oracle for what is done and what is due: an account of a volume's history.

It keeps arrays, not digests: what each block has read last, what it gave to whom, what each
blending got. From those it finds by brute force what a run has to do. It shares no code with
``chunkflow_core``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.oracle import exchange, numbers
from tests.support.oracle.geometry import Case, Index
from tests.support.oracle.numbers import Inferred
from tests.support.oracle.volume import Volume


@dataclass
class Account:
    """What has been done with one model."""

    inferred: dict[Index, Inferred] = field(default_factory=dict)
    blended: dict[Index, dict[Index, Any]] = field(default_factory=dict)
    """For each block, what each donor gave it."""
    left: dict[Index, dict[Index, set[str]]] = field(default_factory=dict)
    """Files that a donor left for each receiver."""
    ended: dict[Index, float] = field(default_factory=dict)
    """When a block was blended, in seconds."""


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
        self._known: tuple[Any, dict[Index, Inferred]] = None, {}

    @property
    def account(self) -> Account:
        """The account of the model that is used now."""
        return self.accounts[self.model]

    @property
    def exchange(self) -> Path:
        """The folder of the model that is used now."""
        return self.folder / "exchange" / self.spec().fingerprint

    def donations(self) -> set[str]:
        """Names of all donations that the model that is used now has left."""
        return exchange.donations(self.exchange)

    def current(self) -> dict[Index, Inferred]:
        """What the inference of each block would be now."""
        state = self.case, self.model, self.clock
        if self._known[0] != state:
            self._known = state, numbers.infer(self.geometry, self.layers, self.model)
        return self._known[1]

    def expected(self, inferred: dict[Index, Inferred], receiver: Index) -> Any:
        """A block's output (czyx), from inference of it and all that give it something."""
        return numbers.blend(self.geometry, inferred, receiver)

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
        blended = {r for r in blend if r in forced or self._consumed(after, r) != done.blended.get(r)}
        return Due(infer, blend, blended)

    def spent(self, before: float) -> set[str]:
        """Donations that nobody needs any more, of blocks blended before a time in seconds."""
        ended = {r: self.account.ended[r] for r in self.geometry.blocks if self.has_consumed(r)}
        receivers = {name: exchange.receiver_of(name, self.geometry) for name in self.donations()}
        return {name for name, receiver in receivers.items() if receiver in ended and ended[receiver] < before}

    def claim(self) -> None:
        """Note that the output is now the model's; it had been the other's if it was not."""
        if self.claimed != self.model:
            self.account.inferred.clear()
            self.account.blended.clear()
        self.claimed = self.model

    def note(self, run: str, now: float) -> None:
        """Note what a run has done until a time in seconds, and what is gone."""
        account, current, blocks = self.account, self.current(), self.geometry.blocks
        receipts = exchange.receipts(self.exchange, self.geometry)
        for stage, records in (("infer", account.inferred), ("blend", account.blended)):
            for index in [b for b in records if (stage, b) not in receipts]:
                del records[index]
        for stage, index in sorted(receipts, reverse=True):  # inference first
            corners = tuple(axis.start for axis in blocks[index]), tuple(axis.stop for axis in blocks[index])
            boxes = [box for box, by in receipts[stage, index] if by == run and exchange.corners(box) == corners]
            if boxes and stage == "infer":
                account.inferred[index], account.left[index] = current[index], {}
                for name in self.donations():
                    if name.startswith(f"{boxes[0]}%"):
                        receiver = exchange.receiver_of(name, self.geometry)
                        account.left[index].setdefault(receiver, set()).add(name)
            elif boxes:
                account.blended[index] = self._consumed(account.inferred, index)
                account.ended[index] = now

    def _consumed(self, inferred: dict[Index, Inferred], receiver: Index) -> Any:
        """What a block would be blended from: what its donors gave, and the mask as it is now."""
        geometry = self.geometry
        given = {donor: numbers.given(geometry, inferred, donor, receiver) for donor in geometry.donors[receiver]}
        mask = numbers.given(geometry, self.current(), receiver, receiver)[2]
        return given | {receiver: (*given[receiver][:2], mask)}
