"""What all commands share: arguments, logging, and how errors end a process."""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any, NoReturn, Protocol

from chunkflow_core import errors
from chunkflow_core.errors import ChunkflowError, UsageError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.machine import share_one_heap
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.variables import ConcealingStream

EXIT_CODES = "\n".join(
    textwrap.wrap(
        f"exit codes: {', '.join(f'{code} {kind}' for code, kind in errors.EXIT_CODES.items())}; "
        f"a retry can help after {errors.StorageError.exit_code}",
        width=120,
    )
)
"""Text that ends every help text: what each exit code means."""

Function = Callable[[argparse.Namespace], None]
"""Function that does a subcommand, given its parsed options."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends with EX_USAGE (64)."""

    def __init__(self, **options: Any) -> None:
        """Make a parser; arguments as ``ArgumentParser``. Its texts keep their lines."""
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Say what was wrong with the arguments, and how to get help."""
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\nSee {self.prog} -h\n")


class Add(Protocol):
    """Adds a subcommand to a command line."""

    def __call__(self, name: str, function: Function, text: str) -> Parser:
        """Add a subcommand, and return the parser for its arguments.

        Args:
            name: Name of the subcommand.
            function: What does it.
            text: A sentence on it, for the help.
        """


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments SPEC and --set."""
    parser.add_argument("spec", metavar="SPEC", help="volume spec, a YAML file such as dags/volumes/NAME.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the spec, such as --set model.threads=4; can be given several times",
    )


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments --bbox, --force and --check-input."""
    add_box_argument(parser)
    parser.add_argument("--force", action="store_true", help="infer again although there are receipts")
    parser.add_argument(
        "--check-input",
        action="store_true",
        help="infer again where the voxels of the input (or mask) have changed, and do again what is no longer as it "
        "was written in the output: asks storage for the dates or checksums of storage chunks, and reads them where "
        "that can't tell. Without it, only receipts are looked at",
    )


def add_box_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument --bbox."""
    parser.add_argument(
        "--bbox",
        type=int,
        nargs=6,
        metavar=("Z0", "Y0", "X0", "Z1", "Y1", "X1"),
        help="only the blocks that touch this box of voxels (start, stop); default: the whole ROI",
    )


def positive(text: str) -> int:
    """An integer of at least 1, as the ``type`` of an argument."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def not_negative(text: str) -> int:
    """An integer of at least 0, as the ``type`` of an argument."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 0")
    return value


def tolerance(text: str) -> float:
    """A finite number of at least 0, as the ``type`` of an argument."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 0")
    return value


def spec_of(arguments: argparse.Namespace) -> VolumeSpec:
    """The spec that the arguments name; ``SpecError`` if it is wrong."""
    return load_spec(arguments.spec, arguments.set)


def box_of(arguments: argparse.Namespace, grid: BlockGrid) -> Box | None:
    """The requested box; ``UsageError`` if it is empty or outside the ROI."""
    if arguments.bbox is None:
        return None
    box = Box(vector(arguments.bbox[:3]), vector(arguments.bbox[3:]))
    if not box & grid.roi:
        raise UsageError(
            f"--bbox: {box} holds no voxel of the ROI ({grid.roi}); give start and stop as Z0 Y0 X0 Z1 Y1 X1"
        )
    return box


def block_of(arguments: argparse.Namespace, grid: BlockGrid) -> Vector:
    """The requested block index; ``UsageError`` if there is no such block."""
    index = vector(arguments.block)
    if index not in grid:
        last = vector(n - 1 for n in grid.shape)
        raise UsageError(f"--block: there is no block {index}; the volume has (0, 0, 0) to {last}")
    return index


def set_up_logging(*, verbose: bool) -> None:
    """Log to standard error, one line a step."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )


def run_command(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code.

    A user's mistake is told in a line, never with a traceback. Standard error, logs included, has
    the names of the spec's variables in place of their values.
    """
    share_one_heap()
    gc.set_threshold(50_000)  # imports make hundreds of thousands of objects that stay
    with redirect_stderr(ConcealingStream(sys.stderr)):
        return _run(command, sys.argv[1:] if arguments is None else arguments)


def _run(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    try:
        command(arguments)
        sys.stdout.flush()
    except ChunkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what is complete is kept, run again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads the output (head, less) has gone; Python would complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        return 1
    return 0
