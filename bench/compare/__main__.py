"""This pipeline, MONAI's sliding window and chunkflow's inferencer on the same volume and patches.

    pip install -r bench/requirements.txt
    python -m bench.compare --volume 28 224 224 --rounds 1      # a look, some 200 s of CPU time
    python -m bench.compare --output docs/data/compare.json --plot docs/images/compare.png

Every row reads a precomputed layer from disk, runs the patches, blends them, converts to uint8 and
writes a layer; the volume is one block, whose lattice ends exactly at the volume's faces, so that
all programs run the same patches. In turn with it, each row runs the forward passes alone, the
patches being in memory already and as many at a time as the row itself runs. Rows that have no
network (identity) are timed without reading and writing instead.

Each row lives in a process of its own, so that no program's settings reach another. In every round
each row runs once; figures are medians over the rounds, and ratios are taken within a round, so
that they hold on a noisy machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench.common import SIZE, command_line, machine, write_json
from bench.compare.data import Setting, nearest_covered
from bench.compare.measurement import measure
from bench.compare.rows import ROWS
from bench.compare.tables import plot, print_report
from chunkflow_core.lattice.boxes import vector
from chunkflow_core.machine import available_cpus


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line("compare", __doc__)
    parser.add_argument(
        "--volume",
        default=(112, 1024, 1024),
        help="nominal size (default: 112 1024 1024); rounded to what the lattice covers exactly",
        **SIZE,
    )
    parser.add_argument("--patch", default=(16, 128, 128), help="default: 16 128 128", **SIZE)
    parser.add_argument("--overlap", default=(4, 32, 32), help="default: 4 32 32", **SIZE)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of networks (default: cpu)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, help="CPUs of each row (default: all)")
    parser.add_argument(
        "--pass-threads",
        type=int,
        default=1,
        help="threads of one forward pass of this pipeline (model.threads), which runs as many passes at a time as "
        "there are CPUs for them (default: 1)",
    )
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--compression", choices=("gzip", "zstd", "br", "none"), default="gzip", help="of all output layers"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="CloudVolume's processes for the others' reading and writing (default: 1)",
    )
    parser.add_argument("--monai-batch", type=int, default=1, help="MONAI's sw_batch_size (default: 1)")
    parser.add_argument("--monai-buffer", type=int, help="MONAI's buffer_steps, along z (default: none)")
    parser.add_argument("--folder", type=Path, help="where to put the layers (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON, such as docs/data/compare.json")
    parser.add_argument("--plot", type=Path, help="draw them there, such as docs/images/compare.png")
    return parser.parse_args()


def main() -> int:
    """Measure and print."""
    options, facts = arguments(), machine()
    patch, overlap = vector(options.patch), vector(options.overlap)
    threads = options.threads or available_cpus()
    with tempfile.TemporaryDirectory(prefix="compare-", dir=options.folder) as folder:
        setting = Setting(
            folder=folder,
            volume=nearest_covered(options.volume, patch, overlap),
            patch=patch,
            overlap=overlap,
            threads=threads,
            pass_threads=options.pass_threads,
            compression=options.compression,
            parallel=options.parallel,
            monai_batch=options.monai_batch,
            monai_buffer=options.monai_buffer,
            device=options.device,
        )
        measured = measure(setting, options.rows, options.rounds)
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "plot", "folder")}
    settings |= {"volume": setting.volume, "threads": threads}
    report = {"machine": facts, "options": settings, **measured}
    print_report(report, options.volume)
    write_json(options.output, report)
    if options.plot:
        plot(options.plot, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
