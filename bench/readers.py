"""What commands take that read what a whole volume has left, by its number of blocks.

    python -m bench.readers --edges 4 6      # a look
    python -m bench.readers                  # 1,000 and 10,648 blocks, some minutes

Writes an exchange as a run of the whole volume leaves it, and an empty file for each storage chunk,
as none of the commands reads voxels. Each command is a process of its own. The last column is a
line through the two largest volumes, at a million blocks.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from bench.common import Answer, ask, command_line, make_layer, spec_content, table
from bench.planning import Written, write_receipts
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.lattice.boxes import Vector, vector
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.disk import file_signature, local_path
from chunkflow_core.storage.signatures import WrittenChunk, signature_number

EDGE = 8
"""Edge of a block in voxels: eight storage chunks, of which one or none is core."""
COMMANDS = {
    "plan": ["plan"],
    "verify, no windows": ["verify", "--seams", "0"],
    "report": ["report"],
    "report --publish": ["report", "--publish", "--run", "bench"],
}


def write_volume(folder: Path, blocks: Vector, *, names: int = 0) -> Path:
    """Write what a finished run leaves, but for voxels and donations, and return the spec's file.

    Args:
        folder: Where all is put.
        blocks: Number of blocks along z, y and x.
        names: Number of storage chunks that each receipt lists besides its own. In a volume of
            usual size these are hundreds.
    """
    make_layer(f"file://{folder}/input", vector(n * EDGE for n in blocks), chunk=(EDGE, EDGE, EDGE))
    half = [EDGE // 2] * 3
    content = spec_content(
        folder,
        patch=(EDGE, EDGE, EDGE),
        overlap=(EDGE // 2, EDGE // 2, EDGE // 2),
        block=(EDGE, EDGE, EDGE),
        model={"engine": "identity"},
        output={"channels": 1, "chunk_size": half},
        fill_missing=True,
    )
    path = folder / "readers.yaml"
    path.write_text(yaml.safe_dump(content))
    spec = load_spec(path)
    prepare(Workspace(spec), run="bench")
    _write_finished(spec, names)
    return path


def _write_finished(spec: VolumeSpec, names: int) -> None:
    layer, grid = Workspace(spec).output, spec.grid
    folder = local_path(layer.path) / layer.scale.info["scales"][0]["key"]
    folder.mkdir(exist_ok=True)
    more = {f"{n}-{n + 1}_0-1_0-1": WrittenChunk("v" * 13, 2**63 + n) for n in range(10**6, 10**6 + names)}

    def written(stage: Stage, index: Vector) -> Written:
        block = grid.block(index)
        boxes = [box for box in ((block.core,) if stage == "infer" else block.frame) if box]
        return {chunk.key: _written(folder / chunk.key) for box in boxes for chunk in layer.expected_chunks(box)} | more

    write_receipts(spec, written)


def _written(file: Path) -> WrittenChunk:
    """Make an empty storage chunk, and give what a receipt says of it."""
    file.touch()
    return WrittenChunk("v" * 13, signature_number(file_signature(file.stat(), "")))


def rows(answers: dict[int, dict[str, Answer]]) -> Iterator[list[str]]:
    """Write the lines of the table, from answers by number of blocks and command."""
    for command in COMMANDS:
        found = {blocks: several[command] for blocks, several in answers.items()}
        cells = [f"{answer.seconds:.1f} s, {answer.peak_memory / 1e6:.0f} MB" for answer in found.values()]
        (few, less), (many, more) = sorted(found.items())[-2:]
        seconds, memory = ((b - a) / (many - few) for a, b in zip(_cost(less), _cost(more), strict=True))
        at_last = f"{(more.seconds + seconds * (1e6 - many)) / 60:.0f} min, "
        at_last += f"{(more.peak_memory + memory * (1e6 - many)) / 1e6:.0f} MB"
        yield [command, *cells, f"{1e6 * seconds:.0f} µs, {memory:.0f} B", at_last]


def _cost(answer: Answer) -> tuple[float, float]:
    return answer.seconds, float(answer.peak_memory)


def main() -> int:
    """Measure and print."""
    parser = command_line("readers", __doc__)
    parser.add_argument(
        "--edges", type=int, nargs="+", default=[10, 22], metavar="N", help="blocks along each axis (default: 10 22)"
    )
    parser.add_argument("--names", type=int, default=100, help="storage chunks a receipt lists besides its own")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    answers: dict[int, dict[str, Answer]] = {}
    for edge in sorted({*options.edges}):
        with tempfile.TemporaryDirectory(prefix="readers-", dir=options.folder) as folder:
            path = str(write_volume(Path(folder), (edge, edge, edge), names=options.names))
            answers[edge**3] = {command: ask(first, path, *more) for command, (first, *more) in COMMANDS.items()}
    header = ["", *(f"{blocks:,} blocks" for blocks in answers), "each more block", "1,000,000 blocks"]
    print(f"\n{table(header, list(rows(answers)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
