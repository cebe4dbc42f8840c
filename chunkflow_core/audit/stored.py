"""What is stored, against what receipts say: storage chunks, donations, and receipts themselves.

It is done group by group, so that no more receipts are in memory than a group has; what of them
other groups need is in their marks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

from chunkflow_core.audit.findings import Audit, FindingKind
from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.exchange.folder import group_of
from chunkflow_core.exchange.marks import STAGES, BlendingMark, InferenceMark, Mark, Stage
from chunkflow_core.exchange.receipts import DonationEntry, Receipt, agreed
from chunkflow_core.lattice.blocks import Block, Donation, given_box
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.planning.planner import Done
from chunkflow_core.steps.workspace import Workspace

_READERS = 16
"""Number of storage chunks and donations read at a time."""

_COMPLETE = {
    "infer": "inference is not complete (no valid receipt)",
    "blend": "blending is not complete (no receipt, or its donors have changed since)",
}


class StoredAudit:
    """Audits what is stored of some blocks, and has afterwards what it has learnt of them."""

    def __init__(
        self, workspace: Workspace, blocks: Collection[Vector], audit: Audit, *, deep: bool, mixed: bool
    ) -> None:
        """Look at nothing yet.

        Args:
            workspace: What the steps of the volume share.
            blocks: Indices of the blocks to audit, zyx.
            audit: Gets the findings.
            deep: Whether to read storage chunks and donations, too.
            mixed: Whether there may be storage chunks of other fingerprints, so that those without
                a receipt prove nothing.
        """
        self._workspace, self._audit, self._deep, self._mixed = workspace, audit, deep, mixed
        self._spec, self._grid, self._exchange = workspace.spec, workspace.spec.grid, workspace.exchange
        self._blocks = frozenset(blocks)
        self._chunks = workspace.output.stored_chunks()
        self._marks: dict[Stage, dict[Vector, Mark]] = {"infer": {}, "blend": {}}
        self._begun: set[Vector] = set()
        self.complete: set[Vector] = set()
        """Blocks for which nothing is due."""
        self.runs: dict[Vector, set[str]] = defaultdict(set)
        """Names of the runs that have done a block's stages."""
        self.finished: dict[Vector, float] = defaultdict(float)
        """Time when the last of a block's stages was done, Unix time."""

    def load(self, blocks: Collection[Vector]) -> None:
        """Do nothing: what the planner asks for is known already."""

    def inferred(self, block: Vector) -> InferenceMark | None:
        """What the block's valid receipt of inference says; None if there is none."""
        return cast("InferenceMark | None", self._marks["infer"].get(block))

    def blended(self, block: Vector) -> BlendingMark | None:
        """What the block's valid receipt of blending says; None if there is none."""
        return cast("BlendingMark | None", self._marks["blend"].get(block))

    def run(self, block_done: Callable[[], object]) -> None:
        """Audit the blocks; ``block_done`` is called after each."""
        by_group: dict[Vector, list[Vector]] = defaultdict(list)
        for block in sorted(self._blocks):
            by_group[group_of(block)].append(block)
        groups = set(by_group) | {group_of(donor) for block in self._blocks for donor in self._grid.donors(block)}
        if self._audit.box is None:
            groups |= self._exchange.stored_groups()
        self._check_strays()
        with ThreadPoolExecutor(_READERS, thread_name_prefix="audit") as pool:
            for group in sorted(groups):
                self._check_group(group, by_group[group], pool, block_done)
        for block in sorted(self._blocks):
            self._check_complete(self._grid.block(block))

    def _check_strays(self) -> None:
        box, output = self._audit.box, self._workspace.output
        for name in sorted(self._chunks):
            if output.chunk_named(name) is None and (box is None or _touches(name, box)):
                self._audit.add(
                    "stray chunk", None, name, f"{name} lies among the storage chunks, and is none of the layer's"
                )

    def _check_group(
        self, group: Vector, blocks: Iterable[Vector], pool: ThreadPoolExecutor, block_done: Callable[[], object]
    ) -> None:
        receipts = {stage: self._receipts(stage, group) for stage in STAGES}
        self._check_donations(group, receipts["infer"], pool)
        for index in blocks:
            block = self._grid.block(index)
            for stage in STAGES:
                boxes = (block.core,) if stage == "infer" else block.frame
                receipt = receipts[stage].get(index)
                if receipt is not None and receipt.block in self._marks[stage]:
                    self._check_chunks(index, boxes, receipt, pool)
                    self.runs[index].add(receipt.run)
                    self.finished[index] = max(self.finished[index], float(receipt.facts.get("finished", 0)))
            block_done()

    def _receipts(self, stage: Stage, group: Vector) -> dict[Vector, Receipt]:
        """The receipts of a group that count, by block.

        Those from before the ROI grew, which have no mark, are among them where there are no
        others.
        """
        current: dict[Vector, dict[str, Receipt]] = defaultdict(dict)
        outdated: dict[Vector, dict[str, Receipt]] = defaultdict(dict)
        for name, receipt in self._exchange.stored_receipts(stage, [group]):
            block = self._exchange.owner(name)
            if isinstance(receipt, str) or block is None:
                why = receipt if isinstance(receipt, str) else "its block is none of the volume's"
                self._bad_receipt(name, block, f"the receipt can't be right: {why}")
                continue
            box, geometry = self._grid.block(block).box.key, self._spec.block_digest(block)
            kind = current if (receipt.box, receipt.geometry) == (box, geometry) else outdated
            kind[block][name] = receipt
        self._begun.update(current, outdated)
        found = {}
        for block, several in current.items():
            for name in outdated.pop(block, {}):
                self._bad_receipt(name, block, "a receipt from before the ROI grew stands beside the one that counts")
            if counting := agreed(list(several.values())):
                self._marks[stage][block] = counting.mark
                found[block] = counting
                continue
            for name in several:
                self._bad_receipt(name, block, f"{len(several)} receipts of the same stage disagree")
        return {block: next(iter(several.values())) for block, several in outdated.items()} | found

    def _bad_receipt(self, name: str, block: Vector | None, message: str) -> None:
        if block in self._blocks or (block is None and self._audit.box is None):
            self._audit.add("receipt", block, name, f"{message} ({name})")

    def _check_chunks(self, index: Vector, boxes: Iterable[Box], receipt: Receipt, pool: ThreadPoolExecutor) -> None:
        output, names = self._workspace.output, []
        for chunk in (chunk for box in boxes if box for chunk in output.expected_chunks(box)):
            self._audit.storage_chunks += 1
            if chunk.key in self._chunks:
                names.append(chunk.key)
            else:
                self._audit.add("missing chunk", index, chunk.key, f"the storage chunk {chunk.key} is missing")
        if self._deep:
            for name, problem in zip(names, pool.map(partial(self._wrong_chunk, receipt), names), strict=True):
                if problem:
                    self._audit.add("wrong chunk", index, name, f"the storage chunk {name} is wrong: {problem}")

    def _wrong_chunk(self, receipt: Receipt, name: str) -> str:
        """What is wrong with a storage chunk; empty if nothing is."""
        try:
            digest = self._workspace.output.digest(name)
        except DataError as error:
            return str(error)
        return "" if digest == receipt.written.get(name) else "its voxels are not those that the receipt vouches for"

    def _check_donations(self, group: Vector, receipts: dict[Vector, Receipt], pool: ThreadPoolExecutor) -> None:
        by_donor: dict[Vector | None, dict[str, int]] = defaultdict(dict)
        for name, size in sorted(self._exchange.stored_donations([group]).items()):
            donor = self._exchange.owner(name)
            if self._concerns(donor, name):
                by_donor[donor][name] = size
        for donor, files in by_donor.items():
            if donor is None:
                for name in files:
                    self._bad_donation(name, None, "its donor is no block of the volume")
            elif donor not in receipts:
                for name in files:
                    self._bad_donation(name, donor, "its donor has no valid receipt")
            else:
                self._check_donations_of(receipts[donor], files, pool)

    def _check_donations_of(self, receipt: Receipt, files: dict[str, int], pool: ThreadPoolExecutor) -> None:
        entries, whole = {e.key: e for e in receipt.donations if e.checksum is not None}, {}
        for name, size in files.items():
            entry = entries.get(_key(name))
            if entry is None:
                self._bad_donation(name, receipt.block, "the receipt of its donor does not list it")
            elif size != entry.bytes:
                said = f"the receipt of its donor says {entry.bytes}"
                self._bad_donation(name, receipt.block, f"it has {size} bytes, {said}")
            else:
                whole[name] = entry
        if self._deep:
            pieces = self._grid.pieces(self._grid.block(receipt.block))
            donations = {donation.key: donation for piece in pieces for donation in piece.donations}
            known = [name for name in whole if _key(name) in donations]  # others are from before the ROI grew
            pairs = [(donations[_key(name)], whole[name]) for name in known]
            for name, problem in zip(known, pool.map(self._wrong_donation, pairs), strict=True):
                if problem:
                    self._bad_donation(name, receipt.block, problem)

    def _bad_donation(self, name: str, donor: Vector | None, message: str) -> None:
        self._audit.add("donation", donor, name, f"the donation {_key(name)} can't be right: {message}")

    def _concerns(self, donor: Vector | None, name: str) -> bool:
        """Whether a donation is of the blocks that are audited, or for them."""
        if self._audit.box is None or donor in self._blocks:
            return True
        try:
            start = given_box(_key(name)).start
        except ValueError:
            return False
        return self._grid.holding(start) in self._blocks

    def _wrong_donation(self, stored: tuple[Donation, DonationEntry]) -> str:
        """What is wrong with a donation; empty if nothing is.

        Nothing is if it has been cleaned up since it was listed.
        """
        try:
            self._exchange.get_donations([stored])
        except DataError as error:
            return str(error.__cause__ or error)
        except MissingInputError:
            pass
        return ""

    def _check_complete(self, block: Block) -> None:
        """Note a block as incomplete if the planner would do it again.

        Donations that were cleaned up are no fault.
        """
        index = block.index
        stage: Stage = "blend"
        done = Done(self._spec, self)  # remembering more would keep all groups in memory
        if done.inferred(index) is None:
            stage = "infer"
        elif not self._grid.has_frame(index) or done.has_consumed(index):
            self.complete.add(index)
            return
        begun = index in self._begun if stage == "infer" else self.blended(index) is not None
        kind: FindingKind = "incomplete" if begun or self._has_remains(block, stage) else "not done"
        self._audit.add(kind, index, stage, _COMPLETE[stage])

    def _has_remains(self, block: Block, stage: Stage) -> bool:
        """Whether there are storage chunks of a block that no receipt vouches for."""
        boxes = block.frame if stage == "blend" else (block.core, *block.frame)
        chunks = (chunk.key for box in boxes if box for chunk in self._workspace.output.expected_chunks(box))
        return not self._mixed and not self._chunks.isdisjoint(chunks)


def _touches(name: str, box: Box) -> bool:
    try:
        return bool(Box.from_key(name) & box)
    except ValueError:
        return False


def _key(name: str) -> str:
    return name.rpartition("/")[2]
