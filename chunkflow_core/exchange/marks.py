"""What the names of receipts say: all that the planner needs to know, so that a listing is enough.

::

    infer    <block-range>%<geometry>%<stored>%<input signature>%<given>
    blend    <block-range>%<geometry>%<stored>%<consumed>

``stored`` is a digest of what storage said of the storage chunks when they were written.

``given`` has eight places, for the receivers ``block + (z, y, x)`` with z, y, x of 0 or 1, x
fastest, joined by ``_``. A place holds a digest of what was donated and the number of donations
stored, ``digest.count``; it is empty where there is no receiver. ``consumed`` is a digest of what
all donors have given. A part that is not known is ``-``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.storage.digests import short_digest

Stage = Literal["infer", "blend"]
STAGES: tuple[Stage, Stage] = ("infer", "blend")

_UNKNOWN = "-"
_DIGEST, _PLACE = r"[a-z2-7]{13}", r"(?:[a-z2-7]{13}\.\d+)?"
_TEXTS: dict[Stage, re.Pattern[str]] = {
    "infer": re.compile(rf"({_DIGEST})%({_DIGEST}|-)%({_DIGEST}|-)%({_PLACE}(?:_{_PLACE}){{7}})"),
    "blend": re.compile(rf"({_DIGEST})%({_DIGEST}|-)%({_DIGEST})"),
}
"""Patterns of the marks. Whatever else lies there, such as a copy ``… (1).json``, is no receipt."""


Same = frozenset[tuple[str, str]]
"""Pairs of what storage said, each of one and the same content: digests, the earlier one first."""


@dataclass(frozen=True, slots=True)
class InferenceMark:
    """What the name of a receipt says of a block whose inference is complete."""

    geometry: str
    """``VolumeSpec.block_digest`` of the block."""
    stored: str
    """What storage said of the storage chunks that were written; empty if unknown."""
    signature: str
    """What storage said of the input's storage chunks before they were read; empty if unknown."""
    given: tuple[str, ...]
    """The eight places of ``given``, for the receivers that a block can have."""
    same: Same = field(default=frozenset(), compare=False)
    """Notes of what storage says of the same content since."""

    @property
    def text(self) -> str:
        """The mark in the receipt's name, after the block's range."""
        return f"{self.geometry}%{self.stored or _UNKNOWN}%{self.signature or _UNKNOWN}%{'_'.join(self.given)}"

    def digest(self, slot: int) -> str:
        """Digest of what the receiver at a place was given; empty if there is none."""
        return self.given[slot].partition(".")[0]

    def count(self, slot: int) -> int:
        """Number of donations stored for the receiver at a place."""
        return int(self.given[slot].partition(".")[2] or 0)


@dataclass(frozen=True, slots=True)
class BlendingMark:
    """What the name of a receipt says of a block whose blending is complete."""

    geometry: str
    """``VolumeSpec.block_digest`` of the block."""
    stored: str
    """What storage said of the storage chunks that were written; empty if unknown."""
    consumed: str
    """Digest of what all donors had given."""
    same: Same = field(default=frozenset(), compare=False)
    """Notes of what storage says of the same content since."""

    @property
    def text(self) -> str:
        """The mark in the receipt's name, after the block's range."""
        return f"{self.geometry}%{self.stored or _UNKNOWN}%{self.consumed}"


Mark = InferenceMark | BlendingMark


def slot(donor: Vector, receiver: Vector) -> int:
    """The place of a receiver among those that a donor can have."""
    return (receiver[0] - donor[0]) * 4 + (receiver[1] - donor[1]) * 2 + receiver[2] - donor[2]


def receiver_at(donor: Vector, place: int) -> Vector:
    """The receiver at a place, the inverse of :func:`slot`."""
    z, y, x = donor
    return (z + place // 4, y + place // 2 % 2, x + place % 2)


def given_places(donor: Vector, given: dict[Vector, tuple[str, int]]) -> tuple[str, ...]:
    """The eight places of a mark's ``given``, from digest and number of donations by receiver."""
    places = [receiver_at(donor, place) for place in range(8)]
    return tuple("{}.{}".format(*given[place]) if place in given else "" for place in places)


def consumed_digest(digests: Iterable[str]) -> str:
    """A mark's ``consumed``: digest of what was given, in the order of ``BlockGrid.donors``."""
    return short_digest("_".join(digests).encode())


def parse_mark(stage: Stage, text: str) -> Mark | None:
    """The mark in a receipt's name, after the block's range; None if there is none."""
    match = _TEXTS[stage].fullmatch(text)
    if match is None:
        return None
    stored = match[2].strip(_UNKNOWN)
    if stage == "blend":
        return BlendingMark(match[1], stored, match[3])
    return InferenceMark(match[1], stored, match[3].strip(_UNKNOWN), tuple(match[4].split("_")))


def is_known(mark: Mark, before: str, now: str) -> bool:
    """Whether what storage says now is of the content of which it said ``before``, as far as known.

    An empty digest is of nothing that is known.
    """
    return bool(before and now) and (before == now or (before, now) in mark.same)


def merged(marks: Sequence[Mark]) -> Mark | None:
    """What several receipts of one block say together; None if they disagree.

    Two attempts that have worked on different inputs, or on machines whose networks give different
    bits, can leave two. Receipts that differ only in what storage said are of one content.
    """
    if len(marks) == 1:
        return marks[0]
    first, *others = map(_of_content, marks)
    return first if all(mark == first for mark in others) else None


def _of_content(mark: Mark) -> Mark:
    """A mark without what storage said, which differs between attempts that did the same."""
    return replace(mark, stored="") if isinstance(mark, BlendingMark) else replace(mark, stored="", signature="")
