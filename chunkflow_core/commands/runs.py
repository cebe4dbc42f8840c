"""Arguments of commands that are, begin, go on with or end a run, and its lease of the output."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chunkflow_core.exchange.leases import Lease
    from chunkflow_core.spec import VolumeSpec


def add_run_arguments(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the arguments --run, with a text for its help, and --scheduler."""
    parser.add_argument("--run", default="", metavar="NAME", help=text)
    parser.add_argument(
        "--scheduler",
        default="",
        metavar="NAME",
        help="for programs: who has started the run and keeps his runs apart; what an earlier one of them has left "
        "unfinished is taken over at once",
    )


def add_take_over(parser: argparse.ArgumentParser) -> None:
    """Add the argument --take-over."""
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="begin although another run seems to be at work on the output: if you know that it is dead",
    )


@contextmanager
def lease_for(spec: VolumeSpec, options: argparse.Namespace, work: str, *, ends: bool = False) -> Iterator[Lease]:
    """The lease of the run that is named, or else of a run that is this process.

    Args:
        spec: The volume.
        options: The arguments.
        work: What is done, for the name of a run that has none.
        ends: Whether a run that is named ends with the context; one that is this process does.
    """
    from chunkflow_core.exchange.leases import Lease, held

    name, scheduler = getattr(options, "run", ""), getattr(options, "scheduler", "")
    lease = Lease(spec, name or f"{work}-{uuid.uuid4().hex[:12]}", scheduler=scheduler, of_process=not name)
    if name and not ends:
        yield lease
    else:
        with held(lease):
            yield lease
