"""Runs a stage's command and kills it (SIGKILL) when it reaches a phase for the nth time.

The command runs in this process. ``half`` phases leave half a file behind at the place where the
write was going on.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from chunkflow_core import inference_and_donate, receive_and_blend
from chunkflow_core.engines.identity import Identity
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.lattice.slab import Slab
from chunkflow_core.storage.layers import InputLayer, OutputLayer

PLACES: dict[str, tuple[Any, str]] = {
    "read": (InputLayer, "read"),
    "forward": (Identity, "__call__"),
    "blend": (Slab, "add"),
    "write": (OutputLayer, "write"),
    "donate": (Exchange, "put_donation"),
    "receive": (Exchange, "get_donations"),
    "receipt": (Exchange, "put_receipt"),
}


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def die_before(owner: Any, name: str, count: int) -> None:
    """Die at the nth call of a method, before it does anything."""
    original = getattr(owner, name)
    calls = 0

    def method(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return die() if calls == count else original(*args, **options)

    setattr(owner, name, method)


def die_half_way(phase: str, count: int) -> None:
    """Die when half of the nth file of a phase is written."""
    calls = 0

    place = {"donate": "donations", "receipt": "receipts", "write": "output"}[phase]
    open_file = Path.open

    class HalfFile(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[: len(data) // 2])
            return die()

    def half_open(self: Path, mode: str = "r", **options: Any) -> Any:
        nonlocal calls
        there = mode == "wb" and place in [parent.name for parent in self.parents[:3]]
        calls += there
        return HalfFile(self, mode) if there and calls == count else open_file(self, mode, **options)

    Path.open = half_open  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    stage, phase, nth, *arguments = sys.argv[1:]
    if phase.endswith(" half"):
        die_half_way(phase.removesuffix(" half"), int(nth))
    else:
        die_before(*PLACES[phase], int(nth))
    module = inference_and_donate if stage == "infer" else receive_and_blend
    sys.exit(module.main(arguments))
