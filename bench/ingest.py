"""What threads gain that read the sections of a folder, and what a whole ``ingest`` takes.

    python -m bench.ingest --sections 8 --size 256 256 --rounds 1      # a look
    python -m bench.ingest                                             # some minutes

Sections like electron microscopy lie in files of several kinds. Each folder is read by one thread
and by those that ``ingest`` starts, in turn; who begins changes each round. Figures are medians,
ratios are taken within a round. All readings have to give the same voxels. The files are in the
page cache: what is gained is decoding. In the rows of a delay, each file is opened that much later,
as a disk in the network would have it.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import tifffile
from PIL import Image as PillowImage
from tqdm import tqdm

from bench.common import Image, command_line, describe, em_like, machine, table, timed
from chunkflow_core.storage.ingest import folder as ingest_folder
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.images import open_image
from chunkflow_core.storage.ingest.sources import open_stack
from chunkflow_core.storage.ingest.stack import Stack
from chunkflow_core.storage.ingest.store import ingest

WRITERS: dict[str, Callable[[Path, Image], object]] = {
    "png": lambda file, section: PillowImage.fromarray(section).save(file),
    "jpg": lambda file, section: PillowImage.fromarray(section).save(file, quality=90),
    "tif": lambda file, section: tifffile.imwrite(file, section, photometric="minisblack"),
    "zlib.tif": lambda file, section: tifffile.imwrite(file, section, photometric="minisblack", compression="zlib"),
}
HELD = 16
"""Sections that are read at a time."""


def write_folder(folder: Path, kind: str, stack: Image) -> None:
    """Write a stack as files of a kind."""
    folder.mkdir()
    for z, section in enumerate(stack):
        WRITERS[kind](folder / f"section{z:04d}.{kind}", section)


def set_up(threads: int, delay: float) -> None:
    """Let folders be read by some threads, and each file be opened some seconds later."""

    def open_late(file: Path, choice: Choice) -> Stack:
        time.sleep(delay)
        return open_image(file, choice)

    vars(ingest_folder)["threads"] = lambda: threads
    vars(ingest_folder)["open_image"] = open_late


def read(folder: Path) -> str:
    """Read a folder, and give a digest of its voxels."""
    digest = hashlib.blake2b()
    with closing(open_stack(str(folder), Choice())) as stack:
        for start in range(0, stack.shape[0], HELD):
            digest.update(stack.read(start, min(start + HELD, stack.shape[0])).tobytes())
    return digest.hexdigest()


def store(folder: Path, layer: Path) -> None:
    """Run an ingest of a folder."""
    with closing(open_stack(str(folder), Choice())) as stack:
        ingest(stack, f"file://{layer}", resolution=(40, 4, 4), chunk=(16, 128, 128), overwrite=True)


def measure(folder: Path, kind: str, delay: float, rounds: int, many: int) -> list[str]:
    """A row of the table: seconds of one thread and of many, for reading and for all of it."""
    seconds: dict[tuple[str, int], list[float]] = {}
    digests = set()
    for number in range(rounds):
        for threads in (1, many) if number % 2 else (many, 1):
            set_up(threads, delay)
            wall, _, digest = timed(lambda: read(folder / kind))
            digests.add(digest)
            seconds.setdefault(("read", threads), []).append(wall)
            wall, *_ = timed(lambda: store(folder / kind, folder / "layer"))
            seconds.setdefault(("ingest", threads), []).append(wall)
    assert len(digests) == 1, "threads gave other voxels"
    cells = [f"{kind}, {1000 * delay:g} ms later" if delay else kind]
    for what in ("read", "ingest"):
        one, several = seconds[what, 1], seconds[what, many]
        ratio = median(a / b for a, b in zip(one, several, strict=True))
        cells += [f"{median(one):.2f} s", f"{median(several):.2f} s", f"{ratio:.2f}"]
    return cells


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, and print its table."""
    parser = command_line("ingest", __doc__)
    parser.add_argument("--sections", type=int, default=64, help="sections of each folder")
    parser.add_argument("--size", type=int, nargs=2, default=[2048, 2048], metavar=("Y", "X"))
    parser.add_argument("--delay", type=float, default=20, help="milliseconds of the rows of a delay")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    facts, many = machine(), ingest_folder.threads()
    stack = em_like((options.sections, *options.size))
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as place:
        for kind in tqdm(WRITERS, unit="kind", disable=None):
            write_folder(Path(place, kind), kind, stack)
            rows += [measure(Path(place), kind, delay, options.rounds, many) for delay in (0, options.delay / 1000)]
    print(describe(facts) + "\n")
    print(f"{options.sections} sections of {options.size[0]} × {options.size[1]}, {options.rounds} rounds\n")
    several = f"{many} threads"
    print(
        table(
            ["files", "read, 1 thread", f"read, {several}", "ratio", "ingest, 1", f"ingest, {several}", "ratio"], rows
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
