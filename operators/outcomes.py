"""How a stage command ended, and what a retry is worth."""

from __future__ import annotations

import signal
from dataclasses import dataclass

_REASONS = {
    0: "done",
    1: "unforeseen error",
    64: "wrong usage",
    65: "data that can't be right",
    66: "an input is missing",
    75: "storage or network trouble",
    78: "wrong spec",
    137: "killed (memory, eviction)",
    143: "terminated (eviction, preemption)",
}

_FINAL = frozenset({64, 65, 78})

MISSING_INPUT = 66


@dataclass(frozen=True)
class Outcome:
    """One end of a command."""

    code: int
    """Exit code; 128 + number for a signal."""
    reason: str
    retry: bool
    """Whether trying again can help."""
    message: str
    """The command's own last word, for people."""

    def __str__(self) -> str:
        worth = "worth a retry" if self.retry else "a retry can't help"
        return f"{self.reason} (exit code {self.code}, {worth}): {self.message}"


def classify(code: int, message: str, *, inputs_may_come: bool) -> Outcome:
    """The outcome of a command.

    Args:
        code: as ``subprocess`` gives it, negative for a signal.
        message: what the command said last.
        inputs_may_come: whether a missing input can appear by itself: a donation can, a layer or a model can't.
    """
    if code < 0:
        code = 128 - code
    if code in _REASONS:
        reason = _REASONS[code]
    elif 128 < code < 128 + signal.NSIG:
        reason = f"killed by signal {code - 128}"
    else:
        reason = "unknown exit code"
    final = code in _FINAL or (code == MISSING_INPUT and not inputs_may_come)
    return Outcome(code, reason, not final, message)
