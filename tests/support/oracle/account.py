"""Oracle for what is done and what is due: an account of a volume's history.

It keeps arrays, not digests: what each block has read last, what it gave to whom, what each
blending got, what each stage wrote. From those it finds by brute force what a run has to do. It
shares no code with ``chunkflow_core``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.oracle import exchange, numbers
from tests.support.oracle.geometry import Case, Index
from tests.support.oracle.numbers import Inferred
from tests.support.oracle.output import Output, put
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

    @property
    def is_there(self) -> bool:
        """Whether its receipt is still there, and no other in its place."""
        return self.file.exists() and self.file.read_bytes() == self.receipt


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


class Seen(NamedTuple):
    """What there is for a task that begins."""

    model: int
    exchange: Path
    """Folder of the model, in the epoch that holds."""
    inferred: dict[Index, Inferred]
    """What each block's inference gave."""
    now: dict[Index, Inferred]
    """What it would be now."""


class Owner(NamedTuple):
    """Whose the output is."""

    held: tuple[str, str]
    """Fingerprint and epoch of the last claim."""
    claimed: tuple[int, int] | None
    """The model, and the machine that has prepared it; None if nobody has claimed it."""


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
        self.machine = 0
        """The kind of machine that is used now: each gives other bits."""
        self.accounts = [Account(), Account()]
        self.claimed: tuple[int, int] | None = None
        """The model whose output it is, and the machine that has prepared it."""
        self.held = "", ""
        """Fingerprint and epoch of the last claim, as :meth:`look` has found it."""
        self.claims: list[bytes] = []
        """All claims, in order."""
        self.epochs = {""}
        """All epochs that ever were."""
        self.late: set[str] = set()
        """Names of receipts that have come late since the last run began: a run that has looked for
        receipts before does not know them, and they may be left alone when it takes back others."""
        self.attempts: list[tuple[int, str, Index, Done]] = []
        """All that was ever done: model, stage, block."""
        self.fingerprints = [self.spec().fingerprint, self._of_the_other()]
        self._known: dict[Any, dict[Index, Inferred]] = {}

    def _of_the_other(self) -> str:
        self.model = 1
        fingerprint = self.spec().fingerprint
        self.model = 0
        return fingerprint

    @property
    def account(self) -> Account:
        """The account of the model that is used now."""
        return self.accounts[self.model]

    @property
    def exchange(self) -> Path:
        """The folder of the model that is used now, in the epoch that holds."""
        return self._folder(self.model)

    def _folder(self, model: int) -> Path:
        fingerprint, epoch = self.fingerprints[model], self.held[1]
        return self.folder / "exchange" / fingerprint / (epoch if self.held[0] == fingerprint else "of nobody")

    @property
    def is_gone(self) -> bool:
        """Whether there is no output layer."""
        return self.output.is_gone

    @property
    def output(self) -> Output:
        """The output layer, as it is to be now."""
        return Output(self.folder / "output", self.case)

    def contents(self) -> dict[Path, tuple[bytes, int]]:
        """All files of output and exchange, with their times of last change in ns."""
        files = (file for name in ("output", "exchange") for file in (self.folder / name).rglob("*") if file.is_file())
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

    @property
    def is_new(self) -> bool:
        """Whether nothing of what has been done may count for a run that begins."""
        return self.claimed != (self.model, self.machine) or self.is_gone

    def donations(self) -> set[str]:
        """Names of all donations that the model that is used now has left."""
        return {file.name for file in exchange.donations(self.exchange)}

    def current(self) -> dict[Index, Inferred]:
        """What the inference of each block would be now."""
        return self._current(self.model, self.machine)

    def _current(self, model: int, machine: int) -> dict[Index, Inferred]:
        state = self.case, model, machine, self.clock
        if state not in self._known:
            self._known = dict(list(self._known.items())[-3:])
            self._known[state] = numbers.infer(self.geometry, self.layers, numbers.bits(model, machine))
        return self._known[state]

    def seen(self, model: int, machine: int) -> Seen:
        """What there is for a task of a model that begins on a machine."""
        return Seen(model, self._folder(model), self.accounts[model].inferred, self._current(model, machine))

    def expected(self, inferred: dict[Index, Inferred], receiver: Index) -> Any:
        """A block's output (czyx), from inference of it and all that give it something."""
        return numbers.blend(self.geometry, inferred, receiver)

    def damaged(self) -> set[tuple[str, Index]]:
        """Stages of blocks whose storage chunks are not what was written."""
        there = self.output.stored()
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
        same = {r for r in blend - forced if self._consumed(after, now, r) == done.blended.get(r)}
        blended = {r for r in blend if r not in same or ("blend", r) in damaged}
        return Due(infer, blend, blended)

    def spent(self, before: float) -> set[str]:
        """Donations that nobody needs any more, of blocks blended before a time in seconds."""
        ended = {r: done.ended for r, done in self.account.of("blend").items() if self.has_consumed(r)}
        receivers = {name: exchange.receiver_of(name, self.geometry) for name in self.donations()}
        return {name for name, receiver in receivers.items() if receiver in ended and ended[receiver] < before}

    def look(self, machine: int) -> bool:
        """Look whose the output is, and say whether another epoch holds than at the last look.

        Args:
            machine: Who has claimed it since, if anybody has.
        """
        claims = exchange.claims(self.folder / "output")
        assert claims[: len(self.claims)] == self.claims, "a claim has been changed"
        self.claims, found = claims, exchange.claim(self.folder / "output")
        begun = found[0] != "" and found != self.held
        if begun:
            assert found[1] not in self.epochs, "an epoch that has been"
            model = self.fingerprints.index(found[0])
            self.accounts[model].receipts.clear()
            self.held, self.claimed = found, (model, machine)
            self.epochs.add(found[1])
        return begun

    @property
    def owner(self) -> Owner:
        """Whose the output is, as the last look has found it."""
        return Owner(self.held, self.claimed)

    def restore(self, before: Owner) -> None:
        """Note what a power loss has left of all that ever was there.

        Args:
            before: Whose the output was before what may be lost now.
        """
        after, self.held = self.owner, exchange.claim(self.folder / "output")
        self.claims = exchange.claims(self.folder / "output")
        self.claimed = next((kept.claimed for kept in (before, after) if kept.held == self.held), None)
        for model, account in enumerate(self.accounts):
            account.receipts, folder = {}, self._folder(model)
            for by, stage, index, done in self.attempts:
                if by == model and done.file.is_relative_to(folder) and done.is_there:
                    account.receipts.setdefault((stage, index), {})[done.file.name] = done
        self.forget()

    def spoiled(self) -> set[Path]:
        """Donations of blocks that are inferred which are not what their receipts name."""
        given = {index: dict(done.donations) for index, done in self.account.of("infer").items()}
        left = [(file, exchange.donor_of(file.name, self.geometry)) for file in exchange.donations(self.exchange)]
        return {file for file, donor in left if donor in given and file.read_bytes() != given[donor].get(file)}

    def lies(self) -> set[tuple[str, Index, str]]:
        """What receipts that count vouch for, by its name, that is not there."""
        there = self.output.stored()
        wrong = set[tuple[str, Index, str]]()
        for stage in ("infer", "blend"):
            for index, done in self.account.of(stage).items():
                if not self._names(done.file, index):
                    continue
                chunks = {name for name, voxels in done.chunks.items() if there.get(name) != voxels}
                donations = {f.name for f, text in done.donations.items() if not f.exists() or f.read_bytes() != text}
                wrong |= {(stage, index, name) for name in chunks | donations}
        return wrong

    def _names(self, receipt: Path, index: Index) -> bool:
        """Whether a receipt is of a block as it is now; of before it grew, it counts no more."""
        return exchange.corners(receipt.name)[1] == tuple(axis.stop for axis in self.geometry.blocks[index])

    def lose(self, what: str, seed: int) -> None:
        """Let files of the exchange be gone.

        Of receipts that disagree, all are gone if one is: one that is left would count again, with
        the donations of the other.
        """
        files = (file for file in (self.exchange / what).rglob("*%*") if not file.name.endswith(exchange.VOID))
        for file in exchange.some(files, seed):
            file.unlink()
        for several in self.account.receipts.values():
            if not _agree(several.values()) and not all(done.is_there for done in several.values()):
                for done in several.values():
                    done.file.unlink(missing_ok=True)
        self.forget()

    def overwrite(self, number: int, seed: int | None) -> None:
        """Let somebody write to one of the storage chunks there are; with seed 0 the same again.

        With no seed, it is deleted.
        """
        layer = self.output
        there = [(name, voxels) for name, voxels in layer.stored().items() if name in self.geometry.chunks]
        if not there:
            return
        name, voxels = there[number % len(there)]
        if seed is None:
            layer.delete(name)
        else:
            noise = np.random.default_rng(seed).integers(0, 256, len(voxels), dtype=np.uint8)
            layer.write(name, (np.frombuffer(voxels, np.uint8) ^ noise).tobytes() if seed else voxels)

    def end_late(self, number: int, seed: int, *, receipt: bool) -> None:
        """Let an attempt of earlier do the last of its work now: some storage chunks, its receipt.

        Without its receipt, some of its donations, for odd seeds.
        Attempts are counted from the last. A receipt of before the ROI grew is left out: beside
        that of what the block is now it decides nothing, but ``verify`` tells of it.
        """
        if not self.attempts:
            return
        model, stage, index, done = self.attempts[-1 - number % len(self.attempts)]
        for name in exchange.some(done.chunks, seed):
            if name in self.geometry.chunks:
                self.output.write(name, done.chunks[name])
        if not receipt:
            for file in exchange.some(done.donations, seed) if seed % 2 else ():
                put(file, done.donations[file])
        elif self._names(done.file, index):
            self._complete_late(model, stage, index, done)

    def _complete_late(self, model: int, stage: str, index: Index, done: Done) -> None:
        """Let an attempt leave its receipt late, and before it, its donations."""
        if stage == "infer":  # all others of the block are deleted then
            for file in exchange.donations(done.file.parents[3]):
                if exchange.donor_of(file.name, self.geometry) == index:
                    file.unlink()
            for file, content in done.donations.items():
                put(file, content)
        put(done.file, done.receipt)
        if done.file.is_relative_to(self.exchange):  # what is left in another epoch counts for nothing
            self.accounts[model].receipts.setdefault((stage, index), {})[done.file.name] = done
            self.late.add(done.file.name)
            self.forget()  # it counts for nothing where receipts are being taken back

    def forget(self) -> None:
        """Forget the receipts that are gone, and those that are void."""
        void = exchange.void(self.exchange, self.geometry)
        for at, several in self.account.receipts.items():
            there = {name: done for name, done in several.items() if at not in void and done.is_there}
            known = {name for name in there if name not in self.late}
            alone = known and len(there) < len(several) and not _agree(several.values())
            assert not alone, f"{at}: one of several receipts that disagree is left"
            self.account.receipts[at] = there

    def ended(self, stage: str, index: Index, seen: Seen, written: Mapping[Path, bytes], now: float) -> None:
        """Note what a task has done that has ended, well or not.

        Args:
            stage: Its stage.
            index: Its block.
            seen: What there was for it.
            written: The files that it has written.
            now: Time of its receipt, in seconds.
        """
        self.forget()
        files = [file for file in written if file.is_relative_to(seen.exchange / "receipts" / stage)]
        for file in files:
            if not file.name.endswith(".json") or file.name.endswith(exchange.VOID):
                continue
            done = self._done(stage, index, file, seen, written, now)
            self.attempts.append((seen.model, stage, index, done))
            if seen.exchange == self._folder(seen.model):
                self.accounts[seen.model].receipts.setdefault((stage, index), {})[file.name] = done

    def _done(
        self, stage: str, index: Index, file: Path, seen: Seen, written: Mapping[Path, bytes], now: float
    ) -> Done:
        """What an attempt has done that has left a receipt."""
        output_files = {f: text for f, text in written.items() if f.is_relative_to(self.folder / "output")}
        layer = self.output
        chunks = {layer.name(f): layer.voxels(f, text) for f, text in output_files.items() if layer.name(f)}
        chunks = {name: voxels for name, voxels in chunks.items() if self.geometry.chunks.get(name) == (stage, index)}
        if stage == "blend":
            consumed = self._consumed(seen.inferred, seen.now, index)
            return Done(file, written[file], consumed, None, chunks, {}, now)
        inferred = seen.now[index]
        donations = {f: text for f, text in written.items() if f.is_relative_to(seen.exchange / "donations")}
        return Done(file, written[file], inferred.read, inferred, chunks, donations, now)

    def _counts(self, donations: Iterable[str]) -> Counter[tuple[Index, Index]]:
        """Number of donations by donor and receiver."""
        geometry = self.geometry
        return Counter((exchange.donor_of(name, geometry), exchange.receiver_of(name, geometry)) for name in donations)

    def _consumed(self, inferred: dict[Index, Inferred], now: dict[Index, Inferred], receiver: Index) -> Any:
        """What a block would be blended from: what its donors gave, and the mask as it is now."""
        geometry = self.geometry
        given = {donor: numbers.given(geometry, inferred, donor, receiver) for donor in geometry.donors[receiver]}
        mask = numbers.given(geometry, now, receiver, receiver)[2]
        return given | {receiver: (*given[receiver][:2], mask)}


def _agree(several: Collection[Done]) -> bool:
    """Whether attempts have read the same; then they have done the same."""
    return all(a.read == b.read for a, b in pairwise(several))
