"""Decides who goes on, and what becomes of each request to storage, by a seed.

Each actor has a stack of its own (a greenlet), and gives control back at every request. So exactly
one is at work at a time, no clock runs, and the same seed does the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Literal, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")

Fate = Literal["well", "kill before", "kill after", "error", "lost", "again", "twice", "late", "late and killed"]
"""What becomes of a request.

``error``: it is never done. ``lost``: it is done, and its answer is lost. ``again``: so it is, and
the client asks once more. ``twice``: it is done now, and a copy of it later. ``late``: the caller
gives it up, or is killed, and it is done later.
"""


class Killed(BaseException):
    """The process is gone: nothing in it may catch this."""


class NoAnswerError(OSError):
    """The storage does not answer, as far as the caller can see."""


_OF_WRITES: tuple[Fate, ...] = ("again", "twice", "late", "late and killed")
"""What becomes only of requests that change something, and may do so late."""


_LONGEST_PAUSE = 10_000
"""Steps after which nobody is taken to pause, but all to wait for each other."""


@dataclass(frozen=True)
class Weather:
    """How often, of a million requests, something goes wrong."""

    fates: dict[Fate, int] = field(default_factory=dict)
    suspended: int = 0
    """Its process stands still from here on, for long, and whoever waits for it gives it up."""


CALM = Weather()


class Actor:
    """Code that makes requests, on a stack of its own."""

    def __init__(self, name: str, work: Callable[[], object], hub: greenlet) -> None:
        """Name what is to be done; nothing is done yet."""
        self.name = name
        self.error: Exception | None = None
        """How it has failed, if it has."""
        self.dead = False
        """Whether it was killed: it makes no request any more."""
        self.over = False
        """Whether it has ended, in whatever way."""
        self.given_up = False
        """Whether nobody waits for it any more."""
        self.until: Callable[[], bool] | None = None
        """What it waits for, if that is no request."""
        self.request, self.may_be_late = "", False
        """What it asks storage for, when it goes on; and whether that may be done late."""
        self.wrote: list[str] = []
        """What it has changed in storage since it has last gone on after a standstill."""
        self.stack = greenlet(partial(self._run, work), hub)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Killed:
            self.dead = True
        except Exception as error:
            self.error = error
        finally:
            self.over = True

    @property
    def is_due(self) -> bool:
        """Whether it can go on."""
        return self.until is None or self.until()


@dataclass
class Late:
    """A request under way whose caller does not wait for it."""

    what: str
    do: Callable[[], object]
    chance: float
    """How probable it is, at each step, that it arrives."""


class Scheduler:
    """All actors, and what is under way between them and storage."""

    def __init__(self, seed: int) -> None:
        """Begin with nobody."""
        self.random = Random(seed)
        self.weather = CALM
        self.steps, self.now = 0, 1e9
        """Number of steps; and the clock, Unix time."""
        self.actors: list[Actor] = []
        """Those that are at work."""
        self.zombies: list[Actor] = []
        """Those that stand still, and may go on when nobody expects it."""
        self.late: list[Late] = []
        self.happened: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=400)
        self._trace = hashlib.blake2b(digest_size=16)
        self._hub = getcurrent()
        self._current: Actor | None = None
        self._last: Actor | None = None
        self._loyalty = 0.5
        self._idle = 0
        """How many steps ago anybody could go on."""

    @property
    def trace(self) -> str:
        """Digest of all that has happened."""
        return self._trace.hexdigest()

    def tell(self, what: str) -> None:
        """Note that something happens."""
        line = f"{self.steps} {what}"
        self._trace.update(line.encode())
        self.recent.append(line)

    def start(self, name: str, work: Callable[[], object]) -> Actor:
        """Let somebody begin."""
        actor = Actor(name, work, self._hub)
        self.actors.append(actor)
        return actor

    def wait(self, until: Callable[[], bool]) -> None:
        """Let the actor that is at work wait for something that others do."""
        actor = self._current
        assert actor is not None
        actor.until = until
        self._hub.switch()
        actor.until = None
        if actor.dead:
            raise Killed

    def pause(self, steps: int) -> None:
        """Let the actor that is at work stand still for some steps, while others are at work."""
        end = self.steps + steps
        self.wait(lambda: self.steps >= end or len(self.actors) == 1)

    def request(self, what: str, do: Callable[[], T], *, may_be_late: bool = False) -> T:
        """Make a request to storage.

        Args:
            what: Tells of it.
            do: What it does there, in one moment.
            may_be_late: Whether it may take effect when nobody waits for it any more.
        """
        actor = self._current
        if actor is None:  # somebody who only looks, while all others stand still
            return do()
        if actor.dead:
            raise Killed
        actor.request, actor.may_be_late = what, may_be_late
        fate: Fate = self._hub.switch()
        if actor.dead:
            raise Killed
        self.tell(f"{actor.name} {what} {fate}")
        if fate != "well":
            self.happened[fate] += 1
        if may_be_late:
            actor.wrote.append(what)
        return self._done(actor, what, do, fate)

    def _done(self, actor: Actor, what: str, do: Callable[[], T], fate: Fate) -> T:
        if fate in ("late", "late and killed", "twice"):
            chance = self.random.choice([0.2, 0.02, 0.002, 0.0002])
            self.late.append(Late(f"{actor.name} {what}", do, chance))
        if fate in ("kill before", "late and killed"):
            self._kill(actor)
        if fate in ("error", "late"):
            raise NoAnswerError(what)
        answer = do()
        if fate == "again":
            answer = do()
        if fate == "lost":
            raise NoAnswerError(what)
        if fate == "kill after":
            self._kill(actor)
        return answer

    @staticmethod
    def _kill(actor: Actor) -> None:
        actor.dead = True
        raise Killed

    def run(self, until: Callable[[], bool]) -> None:
        """Go on until something is so."""
        self._loyalty = self.random.choice([0.0, 0.5, 0.9, 0.99])
        while not until():
            self._step()

    def _step(self) -> None:
        self.steps += 1
        self.now += 60 * self.random.random()
        random = self.random.random
        for late in [late for late in self.late if random() < late.chance]:
            self.arrive(late)
        if self.zombies and random() < 0.0015:
            self.wake(self.random.choice(self.zombies))
        due = [actor for actor in self.actors if actor.is_due]
        self._idle = 0 if due else self._idle + 1
        assert self._idle < _LONGEST_PAUSE, "everybody waits for somebody"
        if not due:  # all that are at work pause
            return
        actor = self._last if self._last in due and random() < self._loyalty else self.random.choice(due)
        assert actor is not None
        self._last = actor
        self._resume(actor)

    def _resume(self, actor: Actor) -> None:
        fate: Fate = "well"
        if actor.request:
            draw = self.random.random() * 1e6 - self.weather.suspended
            if draw < 0:
                self.suspend(actor)
                return
            for possible, chance in self.weather.fates.items():
                draw -= chance
                if draw < 0:
                    fate = possible
                    break
        self._let(actor, fate)
        if actor.over and actor in self.actors:
            self.actors.remove(actor)

    def _let(self, actor: Actor, fate: Fate) -> None:
        if fate in _OF_WRITES and not actor.may_be_late:
            fate = "well"
        actor.request, self._current = "", actor
        try:
            actor.stack.switch(fate) if actor.stack else actor.stack.switch()
        finally:
            self._current = None

    def suspend(self, actor: Actor) -> None:
        """Let an actor stand still."""
        self.tell(f"{actor.name} stands still before {actor.request}")
        self.happened["suspended"] += 1
        actor.given_up = True
        self.actors.remove(actor)
        self.zombies.append(actor)

    def wake(self, actor: Actor) -> None:
        """Let an actor go on that has stood still."""
        self.tell(f"{actor.name} goes on")
        self.zombies.remove(actor)
        self.actors.append(actor)
        actor.wrote = []

    def arrive(self, late: Late) -> None:
        """Let a late request take effect."""
        self.tell(f"late: {late.what}")
        self.late.remove(late)
        late.do()

    def kill(self, actor: Actor) -> None:
        """End an actor, wherever it is."""
        for where in (self.actors, self.zombies):
            if actor in where:
                where.remove(actor)
        actor.dead = True
        if actor.stack and not actor.stack.dead:
            self.tell(f"{actor.name} is killed before {actor.request}")
            self._let(actor, "well")
        actor.over = True
