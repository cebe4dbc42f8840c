"""What has to run: ``make`` for volumes. A pure function of geometry, request and what is there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Protocol

from chunkflow_core.exchange.marks import BlendingMark, InferenceMark, Stage, consumed_digest, slot
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.planning.reasons import Reason
from chunkflow_core.spec import VolumeSpec


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    box: Box | None = None
    """Voxels that are to be complete; None for the whole ROI."""
    blocks: frozenset[Vector] | None = None
    """Blocks that are to be complete, instead of a box."""
    force: bool = False
    """Whether to infer the requested blocks again although they are done."""
    check_input: bool = False
    """Whether to look at storage.

    Requested blocks, and their donors, are inferred again if their input has changed; requested
    blocks, whichever stage it is, if their storage chunks are no longer what was written.
    """


class Receipts(Protocol):
    """What has been done, according to receipts."""

    def load(self, blocks: Collection[Vector]) -> None:
        """Say which blocks will be asked for, so that storage can be asked for many at once."""

    def inferred(self, block: Vector) -> InferenceMark | None:
        """What the block's receipt of inference says; None if there is none."""

    def blended(self, block: Vector) -> BlendingMark | None:
        """What the block's receipt of blending says; None if there is none."""


class VolumeState(Receipts, Protocol):
    """What has been done, and what is there."""

    def stored(self, donor: Vector, receiver: Vector) -> int:
        """Number of donations that are there, from one block for another."""

    def changed_inputs(self, blocks: Collection[Vector]) -> Set[Vector]:
        """The blocks among these that would read something else than their receipts say.

        All have to have a receipt of inference.
        """

    def changed_outputs(self, stage: Stage, blocks: Collection[Vector]) -> Set[Vector]:
        """The blocks among these whose storage chunks are not what a stage's receipt says.

        All have to have a receipt of that stage.
        """


@dataclass(frozen=True)
class Plan:
    """What is due, in an order in which it can be done, x fastest."""

    infer: tuple[Vector, ...]
    blend: tuple[Vector, ...]
    up_to_date: tuple[Vector, ...]
    """Requested blocks for which nothing is due."""
    why: Mapping[Vector, Reason] = field(default_factory=dict, compare=False)
    """The reason why each block is to be inferred.

    With ``input``, and only then, nothing else makes it necessary: if it turns out that the input
    is the same, it need not be done.
    """


def plan(spec: VolumeSpec, request: Request, state: VolumeState) -> Plan:
    """Decide what is due.

    - Inference of a block: it is requested and has no valid receipt, or is forced, or its storage
      chunks are no longer what was written; or it, or a block that it donates to, is requested and
      its input has changed; or a block that has to be blended needs a donation of it that isn't
      there.
    - Blending of a block: it is requested, or has been blended before, and any donor's receipt is
      missing, about to change, or differs from what the block's own receipt says it consumed; or it
      is requested, and its storage chunks are no longer what was written.
      Blocks that are not requested are looked at where they share a donor with one that is, or that
      has to be blended.

    Storage is looked at if the request says so; the input of blocks that have to donate again
    always is, since it decides what they would give.

    Args:
        spec: The volume.
        request: What is asked for.
        state: What has been done, and what is there.
    """
    return _Planner(spec, request, state).plan()


class Done:
    """What has been done and is still valid: receipts of the geometry that blocks have."""

    def __init__(self, spec: VolumeSpec, receipts: Receipts) -> None:
        """Look at nothing yet.

        What has been looked at is remembered: a block is asked for with each of its receivers.
        """
        self._spec, self._receipts = spec, receipts
        self._inferred: dict[Vector, InferenceMark | None] = {}
        self._digests: dict[Vector, str] = {}

    def inferred(self, block: Vector) -> InferenceMark | None:
        """What a block's valid receipt of inference says; None if there is none.

        One of another geometry is not valid.
        """
        if block not in self._inferred:
            mark = self._receipts.inferred(block)
            self._inferred[block] = mark if mark is not None and mark.geometry == self._digest(block) else None
        return self._inferred[block]

    def has_consumed(self, receiver: Vector) -> bool:
        """Whether a block has been blended from just what its donors give at present."""
        mark = self._receipts.blended(receiver)
        if mark is None or mark.geometry != self._digest(receiver):
            return False
        given = []
        for donor in self._spec.grid.donors(receiver):
            donated = self.inferred(donor)
            if donated is None:
                return False
            given.append(donated.digest(slot(donor, receiver)))
        return mark.consumed == consumed_digest(given)

    def is_blended(self, block: Vector) -> bool:
        """Whether a block has a frame that is complete."""
        return self._spec.grid.has_frame(block) and self.has_consumed(block)

    def _digest(self, block: Vector) -> str:
        if block not in self._digests:
            self._digests[block] = self._spec.block_digest(block)
        return self._digests[block]


class _Planner:
    """Looks for all that is due: the least sets of blocks to which the rules of :func:`plan` lead.

    The rules only ever add: a blending becomes due as a donor changes, an inference as a blending
    needs its donations; nothing that is due makes another thing not due. A finite lattice has one
    least fixpoint of such rules, and every order of applying them ends there, so it does not matter
    in which order blocks are looked at.

    It ends: each round looks at blocks that were not looked at before, or whose donors have come
    into ``changing`` since, and a donor comes there once. It has applied all rules then: what a
    receiver's rule depends on is what storage says, which stays the same for the plan, and its
    donors in ``changing``; each donor that comes there has its receivers looked at in the next
    round. An inference's rule depends on its receivers that are due, and is applied for each in the
    round in which that becomes due. Which blocks are looked at, too, only ever grows: those asked
    for, their receivers and those of their donors, and in turn the same around each that is due.
    """

    def __init__(self, spec: VolumeSpec, request: Request, state: VolumeState) -> None:
        self.spec, self.request, self.state = spec, request, state
        self.grid, self.done = spec.grid, Done(spec, state)
        grid = spec.grid
        if request.blocks is not None:
            self.requested = set(request.blocks)
        else:
            self.requested = set(grid.indices() if request.box is None else grid.blocks_touching(request.box))
        self.why: dict[Vector, Reason] = {}
        self.overwritten: Set[Vector] = set()
        """Blocks whose frames are no longer what was blended."""

    def plan(self) -> Plan:
        self.state.load(self.requested)
        self._ask_for_requested()
        # Those whose output was changed by others give what they gave before.
        changing, blend = {b for b, reason in self.why.items() if reason != "output"}, set[Vector]()
        # Around them too: a run that ended too soon may have changed a donor, and not blended all
        # that it gave to.
        todo = self.requested | self._receivers(changing.union(self.requested, *map(self.grid.donors, self.requested)))
        seen = set[Vector]()
        while todo:
            seen |= todo
            self.state.load(todo)
            due = {r for r in todo - blend if self._blend_is_due(r, changing)}
            blend |= due
            again = {d for r in due for d in self.grid.donors(r) if d not in self.why and self._is_gone(d, r)}
            # A donor that gives the same donations again does not change what others got from it.
            new = {d for d in again if self.done.inferred(d) is None}
            edited = self.state.changed_inputs(again - new)
            self._add("new", new)
            self._add("input", edited)
            self._add("donations", again - new - edited)
            changing |= new | edited
            around = {d for r in due for d in self.grid.donors(r)}
            todo = (self._receivers(around) - seen) | (self._receivers(new | edited) - blend)
        self._need_donations(blend, changing)
        return Plan(
            infer=tuple(sorted(self.why)),
            blend=tuple(sorted(blend)),
            up_to_date=tuple(sorted(self.requested - self.why.keys() - blend)),
            why=self.why,
        )

    def _ask_for_requested(self) -> None:
        new = {b for b in self.requested if self.done.inferred(b) is None}
        self._add("new", new)
        if self.request.force:
            self._add("forced", self.requested - new)
        if self.request.check_input:
            decisive = self.requested.union(*map(self.grid.donors, self.requested))
            self.state.load(decisive)
            done = {b for b in decisive if b not in self.why and self.done.inferred(b) is not None}
            self._add("input", self.state.changed_inputs(done))
            self._look_at_output()

    def _look_at_output(self) -> None:
        inferred = {b for b in self.requested if b not in self.why}
        self._add("output", self.state.changed_outputs("infer", inferred))
        self.overwritten = self.state.changed_outputs("blend", {b for b in self.requested if self.done.is_blended(b)})

    def _add(self, reason: Reason, blocks: Iterable[Vector]) -> None:
        self.why.update(dict.fromkeys(blocks, reason))

    def _need_donations(self, blend: Set[Vector], changing: Set[Vector]) -> None:
        """Let blocks whose lost donations are needed be due for that, not for their input.

        They are needed where another donor of a receiver changes, or the receiver has not consumed
        what there is. Such a block has to be done whatever becomes of its own input.
        """
        for block in [b for b, reason in self.why.items() if reason == "input"]:
            for receiver in blend & set(self.grid.receivers(block)):
                others = changing & set(self.grid.donors(receiver)) - {block}
                consumed = self.done.has_consumed(receiver)
                if self._is_gone(block, receiver) and (others or not consumed):
                    self.why[block] = "donations"

    def _receivers(self, donors: Set[Vector]) -> set[Vector]:
        return {r for d in donors for r in self.grid.receivers(d)}

    def _blend_is_due(self, receiver: Vector, changing: Set[Vector]) -> bool:
        donors = self.grid.donors(receiver)
        mark = self.state.blended(receiver)
        if not self.grid.has_frame(receiver) or (receiver not in self.requested and mark is None):
            return False
        if receiver in self.overwritten or any(d in changing for d in donors):
            return True
        return not self.done.has_consumed(receiver)

    def _is_gone(self, donor: Vector, receiver: Vector) -> bool:
        mark = self.done.inferred(donor)
        if mark is None:
            return True
        count = mark.count(slot(donor, receiver))
        return count > 0 and self.state.stored(donor, receiver) != count
