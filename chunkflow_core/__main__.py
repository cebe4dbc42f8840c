"""Block-wise convnet inference of a volume, exact to the bit.

One volume is described by a YAML spec; see dags/volumes/ for examples.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points

from chunkflow_core.commands import tools, volume
from chunkflow_core.commands.arguments import EXIT_CODES, Function, Parser, run_command, set_up_logging


def command(arguments: Sequence[str]) -> None:
    """Parse the arguments and run the subcommand."""
    options = parser().parse_args(arguments)
    set_up_logging(verbose=options.verbose)
    options.function(options)


@cache
def parser() -> Parser:
    """The command line.

    Other packages add subcommands by the entry point ``chunkflow_core.commands``.
    """
    top = Parser(prog="chunkflow-core", description=__doc__, epilog=EXIT_CODES)
    top.add_argument("-v", "--verbose", action="store_true", help="log every step")
    subparsers = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, function: Function, text: str) -> Parser:
        sub: Parser = subparsers.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        sub.set_defaults(function=function)
        return sub

    volume.add_commands(add)
    tools.add_commands(add)
    for point in entry_points(group="chunkflow_core.commands"):
        point.load()(add)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
