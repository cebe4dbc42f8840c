"""What a stage has spent its time on, and how often: kept in receipts, never decisive."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Timings:
    """Seconds by phase, and counts. The seconds of phases in several threads add up."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    def measure(self, phase: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` and add the time it takes to ``phase``."""
        start = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            with self._lock:
                self.seconds[phase] += perf_counter() - start

    def count(self, what: str, number: int = 1) -> None:
        """Add a number to a count."""
        with self._lock:
            self.counts[what] += number
