"""How a command ended, and what a retry is worth."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from chunkflow_core.errors import EXIT_CODES
from chunkflow_core.steps.failures import is_final


class Retry(StrEnum):
    """What trying again is worth."""

    NEVER = "a retry can't help"
    COUNTED = "worth a retry"
    MORE_MEMORY = "worth a retry with more memory"
    AT_ONCE = "not the block's fault, goes on in another pod"


class Kind(StrEnum):
    """What happened."""

    DONE = EXIT_CODES[0]
    WRONG_USAGE = EXIT_CODES[64]
    WRONG_DATA = EXIT_CODES[65]
    MISSING_INPUT = EXIT_CODES[66]
    STORAGE = EXIT_CODES[75]
    WRONG_SPEC = EXIT_CODES[78]
    ERROR = EXIT_CODES[1]
    KILLED = "killed"
    OUT_OF_MEMORY = "out of memory"
    EVICTED = "evicted"
    PREEMPTED = "preempted"
    NODE_SHUTDOWN = "node shut down"
    NODE_LOST = "node lost"
    DELETED = "pod deleted"
    DEADLINE = "deadline exceeded"
    IMAGE = "image can't be run"
    CONFIGURATION = "pod can't be set up"
    NOT_STARTED = "pod did not start"
    NO_NODE = "no node for the pod"
    REJECTED = "pod refused by the cluster"
    UNREACHABLE = "cluster out of reach"
    CANCELLED = "cancelled"


_EXITS = {code: Kind(words) for code, words in EXIT_CODES.items()}

_ERROR = "error: "

_SIGNALS = {9: "killed (memory, eviction)", 15: "terminated (eviction, preemption)"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One end of a command."""

    kind: Kind
    retry: Retry
    message: str
    """For people: the command's own last word, or what the cluster says; and what to do."""
    code: int | None = None
    """Exit code, 128 + number for a signal; None if the command never ended by itself."""
    reason: str = ""
    """``kind`` in more words."""
    bad_node: str = ""
    """Name of the node whose fault it may have been: the next pod had better be on another one."""

    def __str__(self) -> str:
        """What happened, what a retry is worth, and the message, for people."""
        if self.kind is Kind.DONE:
            return self.kind.value
        code = "" if self.code is None else f"exit code {self.code}, "
        return f"{self.reason or self.kind.value} ({code}{self.retry.value}): {self.message}"


def classify(code: int, message: str, *, inputs_may_come: bool) -> Outcome:
    """The outcome of a command that ended by itself, or by a signal for an unknown reason.

    Args:
        code: As ``subprocess`` gives it, negative for a signal; or 128 + number.
        message: What the command said last.
        inputs_may_come: Whether a missing input can appear by itself: a donation can, a layer or a
            model can't.
    """
    if code < 0:
        code = 128 - code
    if 128 < code < 128 + signal.NSIG:
        reason = _SIGNALS.get(code - 128, f"killed by signal {code - 128}")
        return Outcome(Kind.KILLED, Retry.COUNTED, message, code, reason)
    kind = _EXITS.get(code, Kind.ERROR)
    final = is_final(code, inputs_may_come=inputs_may_come)
    reason = "" if code in _EXITS else "unknown exit code"
    return Outcome(kind, Retry.NEVER if final else Retry.COUNTED, message, code, reason)


def last_word(lines: Sequence[str]) -> str:
    """What a command said last: its error message if it gave one. Empty if it said nothing."""
    for number, line in reversed(list(enumerate(lines))):
        if line.startswith(_ERROR):
            return "\n".join([line.removeprefix(_ERROR), *lines[number + 1 :]])
    return lines[-1] if lines else ""
