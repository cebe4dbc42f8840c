"""What has to run: ``make`` for volumes. One pure function of geometry, request and receipts."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from chunkflow_core.exchange import Exchange, Receipt
from chunkflow_core.geometry import Box, Vector
from chunkflow_core.spec import VolumeSpec


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    box: Box | None = None
    """Voxels that are to be complete; None for the whole ROI."""
    force: bool = False
    """Infer the requested blocks again although they are done."""


@dataclass(frozen=True)
class State:
    """What is there: intact receipts by block, and keys of stored donations."""

    inferred: Mapping[Vector, Receipt]
    blended: Mapping[Vector, Receipt]
    donations: Set[str]

    @classmethod
    def read(cls, exchange: Exchange) -> State:
        """Read it from the exchange: three listings and the receipts."""
        inferred = exchange.receipts("infer")
        return cls(inferred, exchange.receipts("blend"), exchange.donation_keys() if inferred else frozenset())


@dataclass(frozen=True)
class Plan:
    """What is due, in an order in which it can be done, x fastest."""

    infer: tuple[Vector, ...]
    blend: tuple[Vector, ...]
    up_to_date: tuple[Vector, ...]
    """Requested blocks for which nothing is due."""


def plan(spec: VolumeSpec, request: Request, state: State) -> Plan:
    """Decide what is due.

    - Inference of a block: it is requested and has no valid receipt, or it is forced; or a block that has to be blended
      needs a donation of it that isn't there.
    - Blending of a block: it is requested, or has been blended before, and any donor's receipt is missing, about to
      change, or differs from what the block's own receipt says it consumed.
    """
    return _Planner(spec, request, state).plan()


class _Planner:
    def __init__(self, spec: VolumeSpec, request: Request, state: State) -> None:
        self.spec, self.request = spec, request
        self.grid = grid = spec.grid
        self.requested = set(grid.indices() if request.box is None else grid.blocks_touching(request.box))
        self.inferred = self._valid(state.inferred)
        self.blended = self._valid(state.blended)
        self.donations = state.donations

    def plan(self) -> Plan:
        infer = {b for b in self.requested if self.request.force or b not in self.inferred}
        changing, blend = set(infer), set[Vector]()
        todo = self.requested | self._receivers(infer)
        while todo:
            due = {r for r in todo - blend if self._blend_is_due(r, changing)}
            blend |= due
            needed = {d for r in due for d in self.grid.donors(r) if d not in infer and self._is_gone(d, r)}
            infer |= needed
            # a donor that is only asked for the same donations again does not change what others got from it
            new = {d for d in needed if d not in self.inferred}
            changing |= new
            todo = self._receivers(new) - blend
        return Plan(
            infer=tuple(sorted(infer)),
            blend=tuple(sorted(blend)),
            up_to_date=tuple(sorted(self.requested - infer - blend)),
        )

    def _valid(self, receipts: Mapping[Vector, Receipt]) -> dict[Vector, Receipt]:
        return {
            index: receipt
            for index, receipt in receipts.items()
            if index in self.grid and receipt.geometry == self.spec.block_digest(self.grid.block(index))
        }

    def _receivers(self, donors: Set[Vector]) -> set[Vector]:
        return {r for d in donors for r in self.grid.receivers(d)}

    def _blend_is_due(self, receiver: Vector, changing: Set[Vector]) -> bool:
        donors = self.grid.donors(receiver)
        receipt = self.blended.get(receiver)
        if not donors or (receiver not in self.requested and receipt is None):
            return False
        if receipt is None or any(d in changing or d not in self.inferred for d in donors):
            return True
        blocks = {self.grid.block(d).box.key: self.inferred[d].given(receiver) for d in donors}
        return receipt.consumed != blocks

    def _is_gone(self, donor: Vector, receiver: Vector) -> bool:
        receipt = self.inferred.get(donor)
        if receipt is None:
            return True
        entries = {entry.key: entry.checksum for entry in receipt.donations}
        return any(
            entries.get(d.key, "") is not None and d.key not in self.donations
            for d in self.grid.donations(donor, receiver)
        )
