"""What is stored, against what receipts say: storage chunks, donations, and receipts themselves.

It is done group by group, so that no more receipts are in memory than a group has. Donors lie in
the same group or in one before it; marks are kept until the last group that needs them. What stays
of a block is a few numbers: a volume may have millions.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from typing import cast

from chunkflow_core.audit.findings import Audit, FindingKind
from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.exchange.counting import VOID, BlockFiles
from chunkflow_core.exchange.groups import blocks_of, group_of
from chunkflow_core.exchange.marks import STAGES, BlendingMark, InferenceMark, Stage, parse_mark
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.lattice.block_numbers import BlockSet, number_of
from chunkflow_core.lattice.blocks import Block, Donation, given_box
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.planning.outputs import wrong_chunk
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
        self._blocks = BlockSet(self._grid, blocks)
        self._chunks = workspace.output.signatures()
        self._marks: dict[Stage, dict[Vector, str]] = {"infer": {}, "blend": {}}
        """Marks of valid receipts, as text: parsed ones take five times the memory."""
        self._needed_until: dict[Vector, list[Vector]] = defaultdict(list)
        """Group → blocks whose marks of inference no later group needs."""
        self.complete = BlockSet(self._grid)
        """Blocks for which nothing is due."""
        number = prod(self._grid.shape)
        self._names: dict[str, int] = {}
        """Name of a run → its number, from 1."""
        self._runs: dict[Stage, array[int]] = {stage: array("I", bytes(4 * number)) for stage in STAGES}
        self._finished = array("d", bytes(8 * number))

    def load(self, blocks: Collection[Vector]) -> None:
        """Do nothing: what the planner asks for is known already."""

    def inferred(self, block: Vector) -> InferenceMark | None:
        """What the block's valid receipt of inference says; None if there is none."""
        return cast("InferenceMark | None", parse_mark("infer", self._marks["infer"].get(block, "")))

    def blended(self, block: Vector) -> BlendingMark | None:
        """What the block's valid receipt of blending says; None if there is none."""
        return cast("BlendingMark | None", parse_mark("blend", self._marks["blend"].get(block, "")))

    def is_of(self, run: str, block: Vector) -> bool:
        """Whether any receipt of a block is of a run."""
        known, number = self._names.get(run), number_of(self._grid, block)
        return known is not None and any(runs[number] == known for runs in self._runs.values())

    def finished(self, block: Vector) -> float:
        """Time when the last of a block's stages was done, Unix time; 0 if that is not known."""
        return self._finished[number_of(self._grid, block)]

    def run(self, block_done: Callable[[], object]) -> None:
        """Audit the blocks; ``block_done`` is called after each."""
        groups = {group_of(b) for block in self._blocks for b in (block, *self._grid.donors(block))}
        if self._audit.box is None:
            groups |= self._exchange.stored_groups()
        self._check_strays()
        with ThreadPoolExecutor(_READERS, thread_name_prefix="audit") as pool:
            for group in sorted(groups):  # donors first
                self._check_group(group, pool, block_done)

    def _check_strays(self) -> None:
        box = self._audit.box
        for name in sorted(self._chunks.load_all()):
            if box is None or _touches(name, box):
                self._audit.add(
                    "stray chunk", None, name, f"{name} lies among the storage chunks, and is none of the layer's"
                )

    def _check_group(self, group: Vector, pool: ThreadPoolExecutor, block_done: Callable[[], object]) -> None:
        begun = set[Vector]()
        receipts = {stage: self._receipts(stage, group, begun) for stage in STAGES}
        self._check_donations(group, receipts["infer"], pool)
        done = Done(self._spec, self)
        for index in filter(self._blocks.__contains__, blocks_of(group, self._grid)):
            block = self._grid.block(index)
            for stage in STAGES:
                boxes = (block.core,) if stage == "infer" else block.frame
                receipt = receipts[stage].get(index)
                if receipt is not None and index in self._marks[stage]:
                    self._check_chunks(index, boxes, receipt, pool)
                    self._note(receipt)
            self._check_complete(block, done, begun)
            block_done()
        self._forget_marks(group, receipts["infer"].keys())

    def _note(self, receipt: Receipt) -> None:
        number = number_of(self._grid, receipt.block)
        self._runs[receipt.stage][number] = self._names.setdefault(receipt.run, len(self._names) + 1)
        self._finished[number] = max(self._finished[number], float(receipt.facts.get("finished", 0)))

    def _forget_marks(self, group: Vector, inferred: Set[Vector]) -> None:
        """Forget the marks that no group after this one needs.

        Args:
            group: The group that has been checked.
            inferred: Its blocks with a receipt of inference.
        """
        for donor in inferred:
            needing = [group_of(r) for r in self._grid.receivers(donor) if r in self._blocks]
            self._needed_until[max([group, *needing])].append(donor)
        for donor in self._needed_until.pop(group, ()):
            self._marks["infer"].pop(donor, None)
        self._marks["blend"].clear()

    def _receipts(self, stage: Stage, group: Vector, begun: set[Vector]) -> dict[Vector, Receipt]:
        """The receipts of a group that count, by block.

        Those from before the ROI grew, which have no mark, are among them where there are no
        others. Blocks that have any receipt are added to ``begun``.
        """
        current: dict[Vector, dict[str, Receipt]] = defaultdict(dict)
        outdated: dict[Vector, dict[str, Receipt]] = defaultdict(dict)
        files: dict[Vector, BlockFiles] = {}
        for name, receipt in self._exchange.stored_receipts(stage, [group]):
            block = self._exchange.owner(name)
            if block is not None:
                its = files.setdefault(block, BlockFiles(stage, self._grid.block(block).box.key))
                its.add(name.rpartition("/")[2])
            if block is not None and name.endswith(VOID):
                self._bad_receipt(name, block, "the block's receipts were being deleted, and count no more")
                continue
            if isinstance(receipt, str) or block is None:
                why = receipt if isinstance(receipt, str) else "its block is none of the volume's"
                self._bad_receipt(name, block, f"the receipt can't be right: {why}")
                continue
            box, geometry = self._grid.block(block).box.key, self._spec.block_digest(block)
            kind = current if (receipt.box, receipt.geometry) == (box, geometry) else outdated
            kind[block][name] = receipt
        begun.update(current, outdated)
        found = {}
        for block, several in current.items():
            if files[block].void:
                continue
            for name in outdated.pop(block, {}):
                self._bad_receipt(name, block, "a receipt from before the ROI grew stands beside the one that counts")
            if counting := files[block].receipt(list(several.values())):
                self._marks[stage][block] = counting.mark.text
                found[block] = counting
                continue
            for name in several:
                self._bad_receipt(name, block, f"{len(several)} receipts of the same stage disagree")
        return {block: next(iter(several.values())) for block, several in outdated.items()} | found

    def _bad_receipt(self, name: str, block: Vector | None, message: str) -> None:
        if (self._audit.box is None) if block is None else block in self._blocks:
            self._audit.add("receipt", block, name, f"{message} ({name})")

    def _check_chunks(self, index: Vector, boxes: Iterable[Box], receipt: Receipt, pool: ThreadPoolExecutor) -> None:
        output, names = self._workspace.output, []
        for chunk in (chunk for box in boxes if box for chunk in output.expected_chunks(box)):
            self._audit.storage_chunks += 1
            if self._chunks.exists(chunk.key):
                names.append(chunk.key)
            else:
                self._audit.add("missing chunk", index, chunk.key, f"the storage chunk {chunk.key} is missing")
        for name, problem in zip(names, pool.map(partial(self._wrong_chunk, receipt), names), strict=True):
            if problem:
                self._audit.add("wrong chunk", index, name, f"the storage chunk {name} is wrong: {problem}")

    def _wrong_chunk(self, receipt: Receipt, name: str) -> str:
        """What is wrong with a storage chunk; empty if nothing is."""
        return wrong_chunk(self._workspace.output, name, receipt, self._chunks.number(name), deep=self._deep)

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
        if self._audit.box is None or (donor is not None and donor in self._blocks):
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

    def _check_complete(self, block: Block, done: Done, begun: Set[Vector]) -> None:
        """Note a block as incomplete if the planner would do it again.

        Donations that were cleaned up are no fault.

        Args:
            block: The block.
            done: What is done, of its group and of those before.
            begun: Blocks of its group that have any receipt.
        """
        index = block.index
        stage: Stage = "blend"
        if done.inferred(index) is None:
            stage = "infer"
        elif not self._grid.has_frame(index) or done.has_consumed(index):
            self.complete.add(index)
            return
        has_begun = index in begun if stage == "infer" else self.blended(index) is not None
        kind: FindingKind = "incomplete" if has_begun or self._has_remains(block, stage) else "not done"
        self._audit.add(kind, index, stage, _COMPLETE[stage])

    def _has_remains(self, block: Block, stage: Stage) -> bool:
        """Whether there are storage chunks of a block that no receipt vouches for."""
        boxes = block.frame if stage == "blend" else (block.core, *block.frame)
        chunks = (chunk.key for box in boxes if box for chunk in self._workspace.output.expected_chunks(box))
        return not self._mixed and any(map(self._chunks.exists, chunks))


def _touches(name: str, box: Box) -> bool:
    try:
        return bool(Box.from_key(name) & box)
    except ValueError:
        return False


def _key(name: str) -> str:
    return name.rpartition("/")[2]
