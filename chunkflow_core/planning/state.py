"""What is there, for the planner: read from the exchange when it is asked for, group by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Set
from typing import cast

from chunkflow_core.exchange.folder import Exchange, group_of
from chunkflow_core.exchange.marks import BlendingMark, InferenceMark, Mark, Stage
from chunkflow_core.lattice.blocks import given_box
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.planning.inputs import Inputs
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
    """What an exchange and the input layer say: receipts, donations, changed inputs."""

    def __init__(self, exchange: Exchange, inputs: Callable[[], Inputs], *, confirm: bool) -> None:
        """Name what can be asked; nothing is read yet.

        Args:
            exchange: Where receipts and donations are.
            inputs: Gives what can tell whether an input has changed; called when that is asked.
            confirm: Whether an input that is found unchanged by its voxels is noted in its
                receipt, at once: the voxels need not be read again then.
        """
        super().__init__(exchange)
        self._inputs, self._confirm = inputs, confirm
        self._stored: dict[Vector, Counter[Vector]] = {}
        self._donations_listed: set[Vector] = set()

    def stored(self, donor: Vector, receiver: Vector) -> int:
        """Number of donations that are there, from one block for another."""
        group = group_of(donor)
        if group not in self._donations_listed:
            for block, keys in self._exchange.donations_of([group]).items():
                holding = self._exchange.spec.grid.holding
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
        doubtful = [block for block in sorted(blocks) if not self._is_signed(block, inputs)]
        changed = set()
        if doubtful:
            is_unchanged = inputs.confirm if self._confirm else inputs.unchanged
            with progress("reading input that may have changed", len(doubtful), "blocks") as block_read:
                for block in doubtful:
                    receipt = self._exchange.receipt("infer", block)
                    if receipt is None or not is_unchanged(receipt):
                        changed.add(block)
                    block_read()
        return changed

    def _is_signed(self, block: Vector, inputs: Inputs) -> bool:
        """Whether storage says of a block's input what it said when that was read."""
        mark, signature = self.inferred(block), inputs.signature(block)
        return mark is not None and signature != "" and signature == mark.signature
