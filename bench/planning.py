"""How long it takes to plan a volume of many blocks, and how much memory.

    python -m bench.planning --blocks 10 20 25      # a look
    python -m bench.planning                        # 100,000 blocks; writes 200,000 small files

Writes an exchange as a run of the whole volume leaves it (receipts of all blocks; donations cleaned
up; no voxels), and times ``chunkflow-core plan`` as a process of its own: for nothing done yet, for
all done, and for some blocks lost.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from bench.common import SIZE, Answer, ask, command_line, make_layer, spec_content, table
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.lattice.boxes import Vector, vector
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.signatures import WrittenChunk

Written = dict[str, WrittenChunk]
"""Names of storage chunks → what is known of each."""
BLOCK: Vector = (112, 1152, 1152)
"""Block size in voxels, zyx."""


def write_spec(folder: Path, blocks: Vector) -> Path:
    """Write an input layer without voxels, and a spec.

    Args:
        folder: Where both are put.
        blocks: Number of blocks along z, y and x.

    Returns:
        The spec's file.
    """
    shape = vector(n * size for n, size in zip(blocks, BLOCK, strict=True))
    make_layer(f"file://{folder}/input", shape, chunk=(64, 512, 512))
    content = spec_content(
        folder,
        patch=(32, 256, 256),
        overlap=(4, 64, 64),
        block=BLOCK,
        model={"engine": "identity"},
        output={"channels": 3, "chunk_size": [16, 128, 128]},
        fill_missing=True,
    )
    path = folder / "planning.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_receipts(spec: VolumeSpec, written: Callable[[Stage, Vector], Written] = lambda *_: {}) -> None:
    """Write the receipts of a finished run, with made-up checksums, speeds and hosts.

    Args:
        spec: The volume.
        written: Gives what a stage of a block has written; default: the receipts list nothing.
    """
    workspace = Workspace(spec)
    exchange, inputs, grid = workspace.exchange, workspace.inputs, spec.grid
    given: dict[Vector, Receipt] = {}

    def receipt(index: Vector, stage: Stage) -> Receipt:
        chunks = written(stage, index)
        known = workspace.outputs.as_written(workspace.output, stage, index, chunks) if chunks else "s" * 13
        return Receipt(
            stage=stage,
            block=index,
            box=grid.block(index).box.key,
            fingerprint=exchange.fingerprint,
            geometry=spec.block_digest(index),
            run="bench",
            patches=grid.block(index).patches if stage == "infer" else 0,
            signature=inputs.signature(index) if stage == "infer" else "",
            content="c" * 13,
            written=chunks,
            stored=known,
            changes=("bench",),
            facts=_facts(sum(index)),
        )

    for index in tqdm(list(grid.indices()), desc="receipts", unit="block", disable=None):
        box = grid.block(index).box.key
        entries = tuple(
            DonationEntry(f"{box}%{r}", r, f"{hash((index, r)):032x}"[-32:], 1) for r in grid.receivers(index)
        )
        inferred = replace(receipt(index, "infer"), donations=entries)
        exchange.put_receipt(inferred)
        given[index] = replace(inferred, written={})
        donors = grid.donors(index)
        if donors:
            consumed = {given[d].box: given[d].given(index) for d in donors}
            exchange.put_receipt(replace(receipt(index, "blend"), consumed=consumed))


def _facts(number: int) -> dict[str, Any]:
    """What a task tells of itself; a hundred hosts do one after the other."""
    seconds = {"forward": 30.0, "stitch": 4.0, "load": 0.5, "read": 12.0, "convert": 0.6, "write": 2.5, "donate": 3.1}
    return {
        "seconds": seconds,
        "wall": 35.0 + number % 7 / 10,
        "streams": 1,
        "bytes": {"read": 10**8, "written": 10**8, "donated": 10**7},
        "finished": 1.7e9 + 10 * number,
        "host": f"host-{number % 100}",
        "processor": "x86_64",
        "peak_memory_bytes": 10**9 + number,
    }


def lose(spec: VolumeSpec, share: float) -> None:
    """Retract the receipts of inference of a share of the blocks, chosen from a fixed seed."""
    blocks = list(spec.grid.indices())
    for index in random.Random(0).sample(blocks, round(len(blocks) * share)):
        Exchange(spec).retract("infer", index)


def cells(name: str, answer: Answer) -> list[str]:
    """Write a line of the table."""
    due = [str(len(answer.content[key])) for key in ("infer", "blend")]
    return [name, *due, f"{answer.seconds:.1f}", f"{answer.peak_memory / 1e6:.0f} MB"]


def main() -> int:
    """Measure and print."""
    parser = command_line("planning", __doc__)
    parser.add_argument("--blocks", default=(40, 50, 50), help="along each axis (default: 40 50 50)", **SIZE)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="planning-", dir=options.folder) as folder:
        path = write_spec(Path(folder), vector(options.blocks))
        spec = load_spec(path)
        rows = [cells("nothing done", ask("plan", str(path)))]
        write_receipts(spec)
        rows.append(cells("all done", ask("plan", str(path))))
        lose(spec, 0.01)
        rows.append(cells("1 % of the blocks lost", ask("plan", str(path))))
    print(f"\n{prod(spec.grid.shape)} blocks\n\n{table(['', 'to infer', 'to blend', 'seconds', 'peak memory'], rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
