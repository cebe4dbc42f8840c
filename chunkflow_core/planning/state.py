"""What is there, for the planner: read from the exchange when it is asked for, group by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Set
from functools import partial
from typing import cast

from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.groups import group_of
from chunkflow_core.exchange.marks import BlendingMark, InferenceMark, Mark, Stage, is_known
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.blocks import given_box
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.planning.inputs import Inputs
from chunkflow_core.planning.outputs import Outputs
from chunkflow_core.progress import progress


class ExchangeReceipts:
    """The receipts in an exchange, by listings alone."""

    def __init__(self, exchange: Exchange) -> None:
        """Name the exchange; nothing is read yet."""
        self._exchange = exchange
        self._marks: dict[Stage, dict[Vector, Mark]] = {"infer": {}, "blend": {}}
        self._listed: set[Vector] = set()

    def load(self, blocks: Collection[Vector]) -> None:
        """List the receipts of the groups that hold some blocks."""
        groups = {group_of(block) for block in blocks} - self._listed
        if groups:
            for stage, marks in self._marks.items():
                marks.update(self._exchange.marks(stage, groups))
            self._listed |= groups

    def inferred(self, block: Vector) -> InferenceMark | None:
        """What the block's receipt of inference says; None if there is none."""
        return cast("InferenceMark | None", self._mark("infer", block))

    def blended(self, block: Vector) -> BlendingMark | None:
        """What the block's receipt of blending says; None if there is none."""
        return cast("BlendingMark | None", self._mark("blend", block))

    def _mark(self, stage: Stage, block: Vector) -> Mark | None:
        if group_of(block) not in self._listed:
            self.load([block])
        return self._marks[stage].get(block)


class ExchangeState(ExchangeReceipts):
    """What an exchange and the layers say: receipts, donations, what has changed since."""

    def __init__(
        self, exchange: Exchange, inputs: Callable[[], Inputs], outputs: Callable[[], Outputs], *, confirm: bool
    ) -> None:
        """Name what can be asked; nothing is read yet.

        Args:
            exchange: Where receipts and donations are.
            inputs: Gives what can tell whether an input has changed; called when that is asked.
            outputs: Gives what can tell whether an output has changed; called when that is asked.
            confirm: Whether what is found unchanged by its voxels is noted at once: they need not
                be read again then.
        """
        super().__init__(exchange)
        self._inputs, self._outputs, self._confirm = inputs, outputs, confirm
        self._stored: dict[Vector, Counter[Vector]] = {}
        self._donations_listed: set[Vector] = set()

    def stored(self, donor: Vector, receiver: Vector) -> int:
        """Number of donations that are there, from one block for another."""
        group = group_of(donor)
        if group not in self._donations_listed:
            holding = self._exchange.spec.grid.holding
            for donated in self._exchange.donations_of([group]):
                for block, keys in donated.items():
                    self._stored[block] = Counter(holding(given_box(key).start) for key in keys)
            self._donations_listed.add(group)
        return self._stored.get(donor, Counter())[receiver]

    def changed_inputs(self, blocks: Collection[Vector]) -> Set[Vector]:
        """The blocks among these that would read something else than their receipts say.

        All have to have a receipt of inference.
        """
        if not blocks:
            return set()
        inputs = self._inputs()
        inputs.load(blocks)
        marks = {block: self.inferred(block) for block in blocks}
        known = {b for b, mark in marks.items() if mark and is_known(mark, mark.signature, inputs.signature(b))}
        return self._without("infer", marks.keys() - known, partial(inputs.unchanged, confirm=self._confirm), "input")

    def changed_outputs(self, stage: Stage, blocks: Collection[Vector]) -> Set[Vector]:
        """The blocks among these whose storage chunks are not what a stage's receipt says.

        All have to have a receipt of that stage.
        """
        if not blocks:
            return set()
        outputs = self._outputs()
        now = outputs.at_present(stage, blocks)
        marks = {block: self._mark(stage, block) for block in blocks}
        known = {b for b, mark in marks.items() if mark and is_known(mark, mark.stored, now[b])}
        return self._without(
            stage, marks.keys() - known, partial(outputs.are_as_written, confirm=self._confirm), "output"
        )

    def _without(
        self, stage: Stage, doubtful: Set[Vector], is_unchanged: Callable[[Receipt], bool], what: str
    ) -> Set[Vector]:
        """The blocks of which something has changed since their receipts, by reading voxels."""
        changed = set()
        if doubtful:
            with progress(f"reading {what} that may have changed", len(doubtful), "blocks") as block_read:
                for block in sorted(doubtful):
                    receipt = self._exchange.receipt(stage, block)
                    if receipt is None or not is_unchanged(receipt):
                        changed.add(block)
                    block_read()
        return changed
