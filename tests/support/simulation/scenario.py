"""Histories drawn by a seed: of which volume, what is done to it, and what goes wrong meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.support.oracle.geometry import Case
from tests.support.simulation.history import History, Run
from tests.support.simulation.processes import in_turn
from tests.support.simulation.scheduler import CALM, Fate, Scheduler, Weather
from tests.support.simulation.store import Store, installed
from tests.support.simulation.world import World

CASES = [
    Case((0, 0, 0), (5, 10, 9), (0, 1, 0), (2, 4, 4), (0, 0, 0), (1, 2, 2), (2, 4, 4), (1, 2, 2), (2, 4, 4)),
    Case(
        (0, 0, 0), (2, 14, 9), (0, 1, 0), (2, 4, 4), (0, 1, 0), (0, 2, 2), (2, 4, 4), (2, 2, 2), (2, 5, 4),
        masked=True, seed=3,
    ),
    Case(
        (0, 0, 0), (4, 4, 9), (0, 0, 0), (2, 4, 4), (0, 0, 0), (1, 0, 2), (1, 4, 2), (1, 4, 2), (2, 4, 4),
        masked=True, seed=5,
    ),
    Case(
        (1, 0, 0), (2, 1, 15), (0, 0, 0), (1, 1, 4), (0, 0, 0), (0, 0, 2), (1, 1, 4), (1, 1, 2), (1, 1, 4),
        dtype="float32",
    ),
]  # fmt: skip
"""Volumes of 2 × 2 × 2, 1 × 3 × 2, 3 × 1 × 4 and 1 × 1 × 3 blocks."""

_IN_TIME: tuple[Fate, ...] = ("kill before", "kill after", "error", "lost", "again")
_LATE: tuple[Fate, ...] = ("twice", "late", "late and killed")
_OF_WRITES = 16
"""How much oftener than others something happens that happens to writes only."""


@dataclass
class Told:
    """What has happened in some scenarios."""

    steps: int = 0
    trace: str = ""
    happened: Counter[str] = field(default_factory=Counter)
    """Fates of requests."""
    ends: Counter[str] = field(default_factory=Counter)
    """How processes have ended."""

    def add(self, other: Told) -> None:
        """Add what has happened in another one."""
        self.steps += other.steps
        self.happened += other.happened
        self.ends += other.ends


def play(seed: int) -> Told:
    """Let a scenario happen, and look at whatever is believed on the way.

    Raises:
        AssertionError: Something was believed that is not true, or what was due was not done.
    """
    scheduler = Scheduler(seed)
    random = scheduler.random
    store = Store(scheduler, by_content=random.random() < 0.5)
    with in_turn(scheduler), installed(store):
        history = History(World(random.choice(CASES), store), scheduler)
        try:
            history.end(_play(history, random))
        except AssertionError as error:
            told = "\n".join([*list(scheduler.recent)[-60:], f"seed {seed}, step {scheduler.steps}"])
            raise AssertionError(f"{told}: {error}") from error
        finally:
            for actor in [*scheduler.actors, *scheduler.zombies]:
                scheduler.kill(actor)
    return Told(scheduler.steps, scheduler.trace, scheduler.happened, history.ends)


def _play(history: History, random: Random) -> int:
    """Some rounds; the model whose output is wanted at last."""
    world, name, model = history.world, "run", 0
    punctual = random.random() < 0.4
    for number in range(random.randrange(1, 6)):
        model = 1 - model if random.random() < 0.35 else model
        for _ in range(random.choice([0, 1, 1, 2])):
            world.edit(random)
        if random.random() < 0.2:
            world.revert()
        if random.random() < 0.7:  # else the last run is cleared, and done once more
            name = f"run {number}"
        run, quiet, editor = _run(history, name, model, random), history.is_quiet, _editor(history, random)
        driver = history.run(run, _weather(random, punctual=punctual), editor)
        history.check()
        done = not (driver.error or driver.dead or driver.given_up or run.failed)
        if done and quiet and history.is_quiet and editor is None and run.check and run.blocks is None:
            history.check_run(run)
        if random.random() < 0.4:
            history.clean_up(_weather(random, punctual=punctual))
            history.check()
        if random.random() < 0.2:
            history.repair(_weather(random, punctual=punctual))
            history.check()
    return model


def _run(history: History, name: str, model: int, random: Random) -> Run:
    grid = history.world.specs[model].grid
    some = frozenset(block for block in grid.indices() if random.random() < 0.5)
    return Run(
        name,
        model,
        check=random.random() < 0.8,
        force=random.random() < 0.3,
        blocks=some if some and random.random() < 0.2 else None,
        workers=random.choice([1, 2, 3, 8]),
    )


def _editor(history: History, random: Random) -> Callable[[], None] | None:
    """What edits the input while a run is at work, if anybody does."""
    if random.random() < 0.5:
        return None

    def work() -> None:
        for _ in range(random.randrange(1, 4)):
            history.scheduler.pause(random.randrange(150))
            history.world.revert() if random.random() < 0.3 else history.world.edit(random)

    return work


def _weather(random: Random, *, punctual: bool) -> Weather:
    """How often something goes wrong; ``punctual``: nobody writes late, or twice."""
    level = random.choice([0, 3000, 10000, 30000])
    if not level:
        return CALM
    chosen = [fate for fate in _IN_TIME if random.random() < 0.5]
    fates = {fate: int(level * random.random()) for fate in chosen}
    if punctual:
        return Weather(fates)
    late = {fate: int(_OF_WRITES * level * random.random()) for fate in _LATE if random.random() < 0.7}
    return Weather(fates | late, suspended=int(level * 1.5 * random.random()))
