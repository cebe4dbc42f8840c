"""What may happen to a volume, and random histories of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from tests.support.oracle.crashes import Fault, faults
from tests.support.oracle.geometry import Index


@dataclass(frozen=True)
class Run:
    """All that is due, for the whole ROI or a box of it, given in thousandths of the ROI."""

    box: tuple[Index, Index] | None = None
    force: bool = False
    check: bool = True
    fault: Fault | None = None
    meanwhile: tuple[Event, ...] = ()
    """What happens at the operation of the fault, instead of its failing."""
    power_loss: int | None = None
    """Seed of what is left by a power loss at some moment of the run, or at its end."""


@dataclass(frozen=True)
class Cleanup:
    """Delete donations; policy as in the spec."""

    policy: Any
    fault: Fault | None = None


@dataclass(frozen=True)
class Edit:
    """Change a storage chunk; with seed 0 write it again as it is."""

    layer: str
    chunk: int
    seed: int


@dataclass(frozen=True)
class Revert:
    """Undo all edits of a layer."""

    layer: str


@dataclass(frozen=True)
class Lose:
    """Some files of the exchange are gone."""

    what: str
    seed: int


@dataclass(frozen=True)
class Overwrite:
    """Write to a storage chunk of the output; with seed 0 the same again. With none, delete it."""

    chunk: int
    seed: int | None


@dataclass(frozen=True)
class EndLate:
    """An attempt of earlier, that was given up, writes some of its storage chunks only now."""

    attempt: int
    seed: int
    receipt: bool


@dataclass(frozen=True)
class Grow:
    """Move the end of ROI and input."""

    axis: int
    of_roi: int
    of_input: int


@dataclass(frozen=True)
class Switch:
    """Use the other model from now on."""


@dataclass(frozen=True)
class Move:
    """Use another kind of machine from now on, which gives other bits; the first one comes back."""


@dataclass(frozen=True)
class Refuse:
    """Somebody would prepare or infer who may not overwrite: with another model or machine."""

    what: str
    """``model`` or ``machine``: what is another one."""


Event = Run | Cleanup | Edit | Revert | Lose | Overwrite | EndLate | Grow | Switch | Move | Refuse

CORNERS = st.tuples(*[st.integers(0, 999)] * 3)
BOXES = st.none() | CORNERS.map(lambda corner: (corner, corner)) | st.tuples(CORNERS, CORNERS)
SEEDS = st.integers(1, 1000)
LAYERS = st.sampled_from(["input", "input", "mask"])
EDITS = st.builds(Edit, LAYERS, st.integers(0, 99), SEEDS)
LATE: st.SearchStrategy[Event] = st.one_of(
    st.builds(EndLate, st.integers(0, 19), SEEDS, st.booleans()),
    st.builds(Overwrite, st.integers(0, 99), st.none() | st.just(0) | SEEDS | SEEDS),
)
OTHER_RUNS: st.SearchStrategy[Run] = st.builds(Run, BOXES, st.booleans(), st.booleans())
MEANWHILE: st.SearchStrategy[tuple[Event, ...]] = st.one_of(
    st.tuples(OTHER_RUNS),
    st.tuples(st.just(Switch()), OTHER_RUNS),
    st.tuples(st.just(Switch()), OTHER_RUNS, st.just(Switch()), OTHER_RUNS),
    st.tuples(st.just(Move()), OTHER_RUNS),
    st.tuples(EDITS),
    st.tuples(EDITS, OTHER_RUNS),
    st.tuples(LATE),
    st.lists(
        st.one_of(
            LATE,
            EDITS,
            st.builds(Revert, LAYERS),
            st.builds(Cleanup, st.just("delete")),
            st.builds(Lose, st.sampled_from(["donations", "receipts"]), SEEDS),
            OTHER_RUNS,
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
)
"""What others do while a run is at work."""


def moments() -> st.SearchStrategy[Fault]:
    """Operations of a run, none of which is to fail."""
    after = st.integers(0, 8) | st.integers(0, 30) | st.integers(0, 80)
    storage = st.builds(Fault, st.just("storage"), after, st.just(False))
    return storage | storage | st.builds(Fault, st.just("forward"), st.integers(3, 12), st.just(False))


RUNS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Run, BOXES),
    st.builds(Run, BOXES, fault=st.none() | faults(60)),
    st.builds(Run, BOXES, st.booleans(), st.booleans(), st.none() | faults(100)),
    st.builds(Run, BOXES, st.just(True), st.booleans(), moments(), MEANWHILE),
    st.builds(Run, fault=moments(), meanwhile=MEANWHILE),
    st.builds(Run, st.none(), st.booleans(), power_loss=SEEDS),
)
OTHERS: st.SearchStrategy[Event] = st.one_of(
    EDITS,
    st.builds(Cleanup, st.sampled_from(["delete", "delete", "keep", {"days": 1}]), st.none() | st.none() | faults(20)),
    st.builds(Edit, LAYERS, st.integers(0, 99), st.just(0) | SEEDS),
    st.builds(Revert, LAYERS),
    st.builds(Lose, st.sampled_from(["donations", "receipts", "receipts/infer", "receipts/blend"]), SEEDS),
    st.builds(Overwrite, st.integers(0, 99), st.none() | st.just(0) | SEEDS | SEEDS),
    LATE,
    st.builds(Grow, st.integers(0, 2), st.integers(0, 4), st.integers(0, 3)),
    st.just(Switch()),
    st.just(Move()),
    st.builds(Refuse, st.sampled_from(["model", "machine"])),
)
ROUND = st.tuples(st.lists(OTHERS, max_size=3), RUNS).map(lambda both: [*both[0], both[1]])
EVENTS = st.one_of([st.lists(ROUND, min_size=rounds, max_size=rounds) for rounds in (1, 2, 3)])
"""Rounds: a few things happen, then there is a run."""


def at(event: Run, where: str, after: int, *meanwhile: Event) -> Run:
    """A run during which something happens, before an operation."""
    return replace(event, fault=Fault(where, after, fatal=False), meanwhile=meanwhile)
