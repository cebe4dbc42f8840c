"""Which receipts count: what lies among the receipts of one stage for one block decides it here.

The planner knows names only, from listings; stages, reports and the audit read the files, too. All
ask here, so that none believes what another one would not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from chunkflow_core.exchange.marks import Mark, Stage, merged, parse_mark
from chunkflow_core.exchange.receipts import Receipt

VOID = "%void.json"
"""Ending of the name of a file that voids all receipts of its block while they are deleted."""
NOTE = ".same"
"""Ending of the name of a note: that storage describes one content by two digests."""


class BlockFiles:
    """The files among the receipts of a stage that are of one block.

    - Where there is one that voids them, no receipt counts: they are being deleted.
    - Receipts of the block as it is now go before those of before the ROI grew, when it ended
      elsewhere. Such a one, alone, is known by its name, which the block's digest then tells apart.
    - Several have to agree. Attempts that have read or given something else can leave some of each
      other's storage chunks: then none counts.
    """

    def __init__(self, stage: Stage, present: str) -> None:
        """Begin with no file.

        Args:
            stage: The stage.
            present: Range of the block as it is now, xyz.
        """
        self._stage, self._present = stage, present
        self._marks: list[tuple[str, Mark]] = []
        self._same: set[tuple[str, str]] = set()
        self.void = False
        """Whether its receipts are being deleted."""
        self.names: list[str] = []
        """Names of the files that may hold the receipt that counts; of none while they are void."""

    def add(self, name: str) -> None:
        """Take account of a file, by its name without folders; one that is none is passed over."""
        box, _, text = name.removesuffix(".json").partition("%")
        if name.endswith(VOID):
            self.void = True
            self.names = []
        elif text.endswith(NOTE):
            before, _, now = text.removesuffix(NOTE).partition("%")
            self._same.add((before, now))
        elif mark := parse_mark(self._stage, text):
            self._marks.append((box, mark))
            if box == self._present and not self.void:
                self.names.append(name)

    def receipt(self, receipts: Sequence[Receipt]) -> Receipt | None:
        """The receipt that counts; None if none does.

        Args:
            receipts: What the files of :attr:`names` hold, as far as they are intact.
        """
        return None if self.void else _agreed(receipts)

    def mark(self, read: Callable[[], Receipt | None]) -> Mark | None:
        """What the name of the receipt that counts says; None if none counts.

        Args:
            read: Gives :meth:`receipt`. Names that agree may be of attempts that have read
                something else: the files tell.
        """
        if self.void or not self._marks:
            return None
        several = [mark for box, mark in self._marks if box == self._present] or [mark for _, mark in self._marks]
        mark = merged(several)
        if mark is None or (len(several) > 1 and read() is None):
            return None
        return replace(mark, same=frozenset(self._same)) if self._same else mark


def _agreed(several: Sequence[Receipt]) -> Receipt | None:
    """The last of a block's receipts, if all say that the same was read, given and written.

    None if they disagree: attempts that have overlapped, each with another input, can leave some of
    each other's storage chunks.
    """
    if not several:
        return None
    *others, last = several
    same = all((r.content, r.mask, r.voxels) == (last.content, last.mask, last.voxels) for r in others)
    return last if same and merged([receipt.mark for receipt in several]) else None
