"""Many workers at once over one store: whatever befalls them, nothing is believed that is wrong.

A step is one request to storage, or one decision on who goes on. Any failure names its seed:
``play(seed)`` does the same again.
"""

from __future__ import annotations

from itertools import count

import pytest

from tests.support.simulation.scenario import Told, play

STEPS = 250_000
"""Steps of one long test."""


def steps_of(seeds: count[int], steps: int) -> Told:
    """Let scenarios happen until there are so many steps."""
    told = Told()
    for seed in seeds:
        if told.steps >= steps:
            break
        told.add(play(seed))
    return told


def test_a_seed_is_replayed_exactly() -> None:
    for seed in range(3):
        first, second = play(seed), play(seed)
        assert first == second
        assert first.steps > 50


def test_some_thousand_steps() -> None:
    told = steps_of(count(3000), 12_000)

    fates = {"kill before", "kill after", "error", "lost", "twice", "late", "late and killed", "suspended"}
    assert fates <= told.happened.keys()
    assert told.ends.keys() >= {"0", "75", "killed"}


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_a_million_steps(part: int) -> None:
    told = steps_of(count(1_000_000 * (part + 1)), STEPS)

    assert told.steps >= STEPS
    assert told.ends.keys() >= {"0", "65", "66", "75", "78", "killed", "repaired"}
